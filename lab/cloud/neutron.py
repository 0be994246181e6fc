#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""Neutron: its configuration, its services and the guests' network."""

import pathlib
import subprocess
import time

from . import config
from . import ovs
from . import services
from .. import network
from ..errors import LabError
from ..machine import Machine

NETWORK = 'shared'
KEY_PAIR = 'lab'
PHYSICAL = 'physnet1'
# neutron-rpc-server logs it, at debug level, when its worker listens.
CONSUMING = 'RpcWorker start finished'
SUDO = '''#!/bin/sh
# Everything runs as root in the lab's machines.
while [ "${1#-}" != "$1" ]; do shift; done
exec "$@"
'''


class Writer(config.Writer):
    """Writes Neutron's files."""

    def write_all(self) -> None:
        layout = self.layout
        paste = layout.etc / 'neutron/api-paste.ini'
        self._paste(layout.network / 'etc/neutron/api-paste.ini', paste)
        self._write('neutron/neutron.conf', f'''[DEFAULT]
default_log_levels = neutron.service=DEBUG,{config.LOG_LEVELS}
transport_url = {self.rabbit()}
core_plugin = ml2
service_plugins =
auth_strategy = keystone
state_path = {self._folder('neutron')}
api_paste_config = {paste}
rpc_workers = 1
rpc_state_report_workers = 0
notify_nova_on_port_status_changes = true
notify_nova_on_port_data_changes = true
dhcp_agents_per_network = 1
[database]
connection = {self.database('neutron')}
[nova]
{self._auth('nova')}
[placement]
{self._auth('placement')}
[oslo_concurrency]
lock_path = {self._folder('neutron/lock')}
{self._token('neutron', 'network')}''')
        self._write('neutron/ml2.ini', f'''[ml2]
type_drivers = flat,vlan
tenant_network_types = vlan
mechanism_drivers = openvswitch
extension_drivers = port_security
[ml2_type_flat]
flat_networks = {PHYSICAL}
[ml2_type_vlan]
network_vlan_ranges = {PHYSICAL}:100:299
[securitygroup]
enable_security_group = true
''')
        self._write('neutron/ovs.ini', f'''[ovs]
bridge_mappings = {PHYSICAL}:{ovs.PHYSICAL}
datapath_type = netdev
[agent]
tunnel_types =
[securitygroup]
enable_security_group = false
firewall_driver = noop
''')
        self._write('neutron/dhcp.ini', '''[DEFAULT]
interface_driver = openvswitch
enable_isolated_metadata = false
enable_metadata_network = false
[ovs]
datapath_type = netdev
''')
        for host in layout.hosts:
            self._write('neutron/agent-%s.conf' % host, f'''[DEFAULT]
host = {host}
transport_url = {self.rabbit()}
state_path = /var/lib/neutron
[agent]
root_helper = sudo
report_interval = 15
[oslo_concurrency]
lock_path = /var/lib/neutron/lock
''')
        sudo = self._folder('neutron/bin') / 'sudo'
        sudo.write_text(SUDO)
        sudo.chmod(0o755)


def _files(layout, *names):
    return [word for name in names
            for word in ('--config-file', layout.etc / 'neutron' / name)]


def _agent(layout, host, name, file):
    return services.Service(name, host, (
        layout.network / 'bin' / name,
        *_files(layout, 'agent-%s.conf' % host, file)),
        {'PATH': '%s:%s/bin:/usr/sbin:/usr/bin:/sbin:/bin' % (
            layout.folder / 'neutron/bin', layout.network)})


def api(layout) -> services.Service:
    return services.wsgi(
        layout, 'neutron-api', layout.network, 'neutron.wsgi.api', 2,
        port='network',
        env={'OS_NEUTRON_CONFIG_DIR': str(layout.etc / 'neutron'),
             'OS_NEUTRON_CONFIG_FILES': 'neutron.conf;ml2.ini'})


def rpc_server(layout) -> services.Service:
    return services.Service('neutron-rpc-server', 'ctl', (
        layout.network / 'bin/neutron-rpc-server',
        *_files(layout, 'neutron.conf', 'ml2.ini')), {}, CONSUMING)


def agents(layout, host) -> list[services.Service]:
    """Open vSwitch's on each host, DHCP's on the first."""
    found = [_agent(layout, host, 'neutron-openvswitch-agent', 'ovs.ini')]
    if host == next(iter(layout.hosts)):
        found.append(_agent(layout, host, 'neutron-dhcp-agent', 'dhcp.ini'))
    return found


def schema(layout, run) -> None:
    """:param run: schemas.Schemas.run"""
    run('neutron-db-manage', [
        layout.network / 'bin/neutron-db-manage',
        *_files(layout, 'neutron.conf', 'ml2.ini'), 'upgrade', 'heads'])


def wait_agents(conn, layout, limit: float = 60) -> None:
    """:param limit: seconds"""
    wanted = {(service.name, host) for host in layout.hosts
              for service in agents(layout, host)}
    until = time.monotonic() + limit
    while True:
        alive = {(agent.binary, agent.host)
                 for agent in conn.network.agents() if agent.is_alive}
        if alive >= wanted:
            return
        if time.monotonic() > until:
            raise LabError('agents of Neutron that are not up after %d s: %s'
                           % (limit, ', '.join('%s on %s' % pair for pair in
                                               sorted(wanted - alive))))
        time.sleep(.5)


def key(layout) -> pathlib.Path:
    """The private key with which the control plane enters guests."""
    return layout.folder / 'guest-key'


def create_network(conn, layout, control: Machine) -> None:
    """The guests' network, reached from the control plane; a key pair."""
    prefix = network.DATA_ADDRESS.rpartition('.')[0]
    made = conn.network.create_network(
        name=NETWORK, shared=True, provider_network_type='flat',
        provider_physical_network=PHYSICAL)
    conn.network.create_subnet(
        name=NETWORK, network_id=made.id, ip_version=4,
        cidr='%s.0/%d' % (prefix, network.PREFIX_LENGTH),
        gateway_ip=network.DATA_ADDRESS, enable_dhcp=True,
        allocation_pools=[{'start': prefix + '.20', 'end': prefix + '.250'}])
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', 'lab',
                    '-f', key(layout)], check=True)
    conn.compute.create_keypair(
        name=KEY_PAIR, public_key=key(layout).with_suffix('.pub').read_text())
    # So that "lab/lab exec ctl -- ssh 10.98.0.20" is enough.
    folder = control.path('/root/.ssh')
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / 'config').write_text('''Host %s.*
 User root
 IdentityFile %s
 StrictHostKeyChecking no
 UserKnownHostsFile /dev/null
 LogLevel ERROR
 ConnectTimeout 3
 BatchMode yes
''' % (prefix, key(layout)))
