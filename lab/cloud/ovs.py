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

"""Open vSwitch in user space on a compute host, for Neutron's agent.

The kernels of virtual machines often lack the openvswitch module; the datapath
"netdev" needs none.
"""

from . import services
from .. import config as lab_config
from ..machine import Machine
from ..network import DATA

RUN = '/run/openvswitch'  # on the host; goes with it
SCHEMA = '/usr/share/openvswitch/vswitch.ovsschema'
MANAGER = 6640  # where Neutron's agent and os-vif look for the database
INTEGRATION, PHYSICAL = 'br-int', 'br-phys'


def daemons(host: str) -> list[services.Service]:
    """In the order in which they are started."""
    return [
        services.Service('ovsdb-server', host, (
            'ovsdb-server', RUN + '/conf.db',
            '--remote=punix:%s/db.sock' % RUN,
            '--remote=ptcp:%d:127.0.0.1' % MANAGER, '--pidfile'),
            ready=MANAGER),
        services.Service('ovs-vswitchd', host, ('ovs-vswitchd', '--pidfile'))]


def create_database(machine: Machine) -> None:
    machine.run(['mkdir', '-p', RUN])
    machine.run(['ovsdb-tool', 'create', RUN + '/conf.db', SCHEMA])


def create_bridges(machine: Machine) -> None:
    """Neutron's two bridges; the guests' network is a port of the second.

    ovs-vsctl is back when ovs-vswitchd has made them.
    """
    machine.run(['ovs-vsctl', '--timeout=30', '--no-wait', 'init'])
    words = ['ovs-vsctl', '--timeout=30']
    for bridge in (INTEGRATION, PHYSICAL):
        words += ['--', 'add-br', bridge, '--', 'set', 'bridge', bridge,
                  'datapath_type=netdev']
    machine.run([*words, '--', 'set', 'bridge', INTEGRATION,
                 'fail-mode=secure', '--', 'add-port', PHYSICAL, DATA])


def start(host: str, launch) -> None:
    """Start Open vSwitch on a host.

    :param launch: starts a services.Service, back when it serves
    """
    assert host in lab_config.HOSTS
    machine = Machine(host)
    create_database(machine)
    for daemon in daemons(host):
        launch(daemon)
    create_bridges(machine)
