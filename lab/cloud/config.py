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

"""Write the configuration of every service of the cloud."""

import configparser
import dataclasses
import json
import os
import pathlib
import secrets
import shutil

from .. import ceph
from .. import nova_user
from ..machine import Machine

PORTS = {'keystone': 5000, 'placement': 8778, 'glance': 9292,
         'nova-api': 8774, 'network': 9696, 'memcached': 11211,
         'mariadb': 3306, 'rabbitmq': 5672}
REGION = 'RegionOne'
USERS = ('nova', 'placement', 'glance')
# nova.service tells at debug level when a service has begun to listen.
LOG_LEVELS = (
    'amqp=WARN,amqplib=WARN,sqlalchemy=WARN,oslo.messaging=INFO,'
    'oslo_messaging=INFO,iso8601=WARN,requests.packages.urllib3=WARN,'
    'urllib3=WARN,websocket=WARN,keystonemiddleware=WARN,routes.middleware='
    'WARN,stevedore=WARN,taskflow=WARN,keystoneauth=WARN,oslo.cache=INFO,'
    'dogpile.core.dogpile=INFO,glanceclient=WARN,oslo.privsep.daemon=INFO,'
    'nova.service=DEBUG')


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things are.

    :ivar folder: of the cloud's state; everything written lies below it
    :ivar control: address of the control plane
    :ivar hosts: the compute hosts' names and addresses
    :ivar services: the services' virtual environment
    :ivar nova: Nova's virtual environment
    :ivar network: Neutron's virtual environment; None: a cloud without
        networks
    :ivar tree: checkout of the Nova that runs; None: the one of the
        environment
    :ivar images_type: of both hosts
    :ivar threading: "native" or "eventlet"
    :ivar user: nova-compute runs as nova, else as root
    :ivar umask: of nova-compute, octal
    :ivar environment: of nova-compute, added to the lab's
    :ivar ceph: whether there is Ceph, see lab.ceph
    """

    folder: pathlib.Path
    control: str
    hosts: dict
    services: pathlib.Path
    nova: pathlib.Path
    network: pathlib.Path | None = None
    tree: pathlib.Path | None = None
    images_type: str = 'default'
    threading: str = 'native'
    user: bool = True
    umask: str = ''
    environment: dict = dataclasses.field(default_factory=dict)
    ceph: bool = False

    @property
    def etc(self) -> pathlib.Path:
        return self.folder / 'etc'

    def url(self, service: str, path: str = '') -> str:
        return 'http://%s:%d%s' % (self.control, PORTS[service], path)

    def overrides(self, place: str) -> pathlib.Path:
        """The file into which "lab set" writes; read after all others."""
        return self.etc / 'nova' / ('set-%s.conf' % place)

    def nova_files(self, place: str = 'ctl', database=False) -> list[str]:
        """Arguments of a Nova service.

        :param place: "ctl" or a host's name
        :param database: on a host, the access to the databases too, which a
            nova-compute must not have
        """
        files = [self.etc / 'nova/nova.conf']
        if place == 'ctl' or database:
            files.append(self.etc / 'nova/ctl.conf')
        if place != 'ctl':
            files.append(self.etc / 'nova' / ('%s.conf' % place))
        files.append(self.overrides(place))
        return [word for file in files
                for word in ('--config-file', str(file))]


def _for_nova(path) -> None:
    """As Debian has it of /etc/nova/nova.conf."""
    os.chown(path, 0, nova_user.ID)
    path.chmod(0o640)


class Secrets:
    """The lab's random credentials, kept in a file of mode 0600."""

    def __init__(self, path: pathlib.Path):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(json.dumps({
                name: secrets.token_hex(16)
                for name in ('admin', 'service', 'database', 'rabbit',
                             'cookie')}))
        values = json.loads(path.read_text())
        self.admin = values['admin']
        self.service = values['service']
        self.database = values['database']
        self.rabbit = values['rabbit']
        self.cookie = values['cookie']


def _parser(path):
    parser = configparser.RawConfigParser(
        default_section=None, strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(path)
    return parser


def get_option(path, section, key, default=None) -> str | None:
    return _parser(path).get(section, key, fallback=default)


def set_option(path, section, key, value) -> None:
    """Set an option in a file that a service reads last."""
    parser = _parser(path)
    if not parser.has_section(section):
        parser.add_section(section)
    parser.set(section, key, value)
    with open(path, 'w') as file:
        parser.write(file)


class Writer:
    """Writes the files of one cloud."""

    def __init__(self, layout: Layout, keys: Secrets):
        self.layout = layout
        self.keys = keys

    def write_all(self) -> None:
        self._keystone()
        self._placement()
        self._glance()
        self.write_nova()
        for host in self.layout.hosts:
            self.write_compute(host)

    def _write(self, path, text):
        path = self.layout.etc / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(text)
        if path.parent.name == 'nova':
            _for_nova(path)

    def _folder(self, path):
        path = self.layout.folder / path
        path.mkdir(parents=True, exist_ok=True)
        return path

    def rabbit(self):
        return 'rabbit://openstack:%s@%s:%d/' % (
            self.keys.rabbit, self.layout.control, PORTS['rabbitmq'])

    def database(self, name):
        return 'mysql+pymysql://lab:%s@%s/%s?charset=utf8mb3' % (
            self.keys.database, self.layout.control, name)

    def _auth(self, user):
        return f'''auth_type = password
auth_url = {self.layout.url('keystone', '/v3')}
username = {user}
password = {self.keys.service}
project_name = service
user_domain_name = Default
project_domain_name = Default
region_name = {REGION}
'''

    def _token(self, user, kind):
        return f'''[keystone_authtoken]
www_authenticate_uri = {self.layout.url('keystone', '/v3')}
memcached_servers = {self.layout.control}:{PORTS['memcached']}
service_token_roles = service
service_token_roles_required = true
service_type = {kind}
{self._auth(user)}'''

    def _cache(self):
        return f'''[cache]
enabled = true
backend = oslo_cache.memcache_pool
memcache_servers = {self.layout.control}:{PORTS['memcached']}
'''

    def _keystone(self):
        keys = self._folder('keystone/fernet')
        credential = self._folder('keystone/credential')
        self._write('keystone/keystone.conf', f'''[DEFAULT]
[database]
connection = {self.database('keystone')}
max_pool_size = 5
{self._cache()}
[token]
provider = fernet
expiration = 43200
[fernet_tokens]
key_repository = {keys}
[credential]
key_repository = {credential}
[fernet_receipts]
key_repository = {keys}
''')

    def _placement(self):
        self._write('placement/placement.conf', f'''[DEFAULT]
[placement_database]
connection = {self.database('placement')}
[api]
auth_strategy = keystone
{self._token('placement', 'placement')}''')

    def _glance(self):
        paste = self.layout.etc / 'glance/glance-api-paste.ini'
        self._paste(self.layout.services / 'etc/glance/glance-api-paste.ini',
                    paste)
        self._write('glance/glance-api.conf', f'''[DEFAULT]
bind_host = {self.layout.control}
bind_port = {PORTS['glance']}
workers = 1
enabled_backends = {'ceph:rbd,' if self.layout.ceph else ''}local:file
show_image_direct_url = {self.layout.ceph}
show_multiple_locations = {self.layout.ceph}
[database]
connection = {self.database('glance')}
[glance_store]
default_backend = {'ceph' if self.layout.ceph else 'local'}
{self._images_on_ceph() if self.layout.ceph else ''}
[local]
filesystem_store_datadir = {self._folder('glance/images')}
[os_glance_tasks_store]
filesystem_store_datadir = {self._folder('glance/tasks')}
[os_glance_staging_store]
filesystem_store_datadir = {self._folder('glance/staging')}
[paste_deploy]
flavor = keystone
config_file = {paste}
[oslo_concurrency]
lock_path = {self._folder('glance/lock')}
{self._token('glance', 'image')}''')

    @staticmethod
    def _images_on_ceph():
        return f'''[ceph]
rbd_store_pool = {ceph.IMAGES}
rbd_store_user = {ceph.USER}
rbd_store_ceph_conf = {ceph.CONF}
rbd_store_chunk_size = 4
'''

    @staticmethod
    def _disks_on_ceph():
        """What images_type = rbd reads."""
        return f'''images_rbd_pool = {ceph.DISKS}
images_rbd_ceph_conf = {ceph.CONF}
rbd_user = {ceph.USER}
rbd_secret_uuid = {ceph.SECRET}
rbd_destroy_volume_retries = 5
rbd_destroy_volume_retry_interval = 1
'''

    def _paste(self, source, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)

    def write_nova(self) -> None:
        """Write what all services of Nova read."""
        layout = self.layout
        paste = layout.etc / 'nova/api-paste.ini'
        self._paste(
            (layout.tree / 'etc/nova/api-paste.ini') if layout.tree
            else layout.nova / 'etc/nova/api-paste.ini', paste)
        backend = {'native': 'threading', 'eventlet': 'eventlet'}
        filters = ','.join((
            'ComputeFilter', 'ComputeCapabilitiesFilter',
            'ImagePropertiesFilter', 'ServerGroupAntiAffinityFilter',
            'ServerGroupAffinityFilter', 'SameHostFilter',
            'DifferentHostFilter'))
        self._write('nova/nova.conf', f'''[DEFAULT]
concurrency_backend = {backend[layout.threading]}
default_log_levels = {LOG_LEVELS}
transport_url = {self.rabbit()}
state_path = {self._folder('nova')}
my_ip = {layout.control}
osapi_compute_workers = 1
metadata_workers = 1
allow_resize_to_same_host = false
heal_instance_info_cache_interval = {60 if layout.network else -1}
vif_plugging_timeout = 60
update_resources_interval = 60
resize_confirm_window = 0
service_down_time = 60
report_interval = 10
force_config_drive = true
initial_cpu_allocation_ratio = 16.0
initial_ram_allocation_ratio = 1.5
initial_disk_allocation_ratio = 1.0
[wsgi]
api_paste_config = {paste}
[api]
auth_strategy = keystone
[conductor]
workers = 1
[scheduler]
workers = 1
[filter_scheduler]
enabled_filters = {filters}
{self._cache()}
[placement]
{self._auth('nova')}
[glance]
api_servers = {layout.url('glance')}
[keystone]
{self._auth('nova')}
[neutron]
{self._auth('neutron')}
[service_user]
send_service_user_token = true
{self._auth('nova')}
[vnc]
enabled = false
[oslo_concurrency]
lock_path = {self._folder('nova/lock')}
{self._token('nova', 'compute')}''')
        # A nova-compute that can see them asks them, and is refused.
        self._write('nova/ctl.conf', f'''[api_database]
connection = {self.database('nova_api')}
[database]
connection = {self.database('nova')}
''')
        self._overrides('ctl')

    def _overrides(self, place):
        path = self.layout.overrides(place)
        path.touch(mode=0o600)
        _for_nova(path)

    def write_compute(self, host) -> None:
        layout = self.layout
        address = layout.hosts[host]
        sudo = 'sudo ' if layout.user else ''
        helper = sudo + ' '.join(['privsep-helper', *layout.nova_files(host)])
        nova_user.write_privsep_helper(
            Machine(host), [layout.nova / 'bin/privsep-helper'],
            layout.tree or '')
        # Where lab_keys.FileKeyManager keeps what it is given.
        keys = self._folder('keys')
        os.chown(keys, nova_user.ID, nova_user.ID)
        self._write('nova/%s.conf' % host, f'''[DEFAULT]
compute_driver = libvirt.LibvirtDriver
host = {host}
my_ip = {address}
use_cow_images = true
force_raw_images = true
preallocate_images = none
state_path = /var/lib/nova
instances_path = /var/lib/nova/instances
[oslo_concurrency]
lock_path = /var/lock/nova
[libvirt]
virt_type = qemu
cpu_mode = custom
cpu_models = Nehalem
live_migration_scheme = tls
live_migration_with_native_tls = true
live_migration_inbound_addr = {host}
images_type = {layout.images_type}
storage_migration_transport = libvirt
{self._disks_on_ceph() if layout.ceph else ''}
[compute]
live_migration_wait_for_vif_plug = false
[nova_sys_admin]
helper_command = {helper}
[vif_plug_ovs_privileged]
helper_command = {helper}
''')
        self._overrides(host)
