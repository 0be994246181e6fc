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

"""Run upstream Tempest against the lab that is up.

    .venv/bin/python -m lab.tempest [--list] [REGEX]

See TEMPEST.md.
"""

import argparse
import sys

from . import cloud as lab_cloud
from . import config
from . import ui
from .cloud import bootstrap
from .cloud import config as cloud_config
from .cloud import neutron
from .cloud import venvs
from .cloud.cloud import VENVS
from .machine import forward
from .machine import terminal

PACKAGES = ('SQLAlchemy<2.1', 'tempest==47.0.0')
# What takes a host's disks from one place to another, or starts on them.
REGEX = (r'^tempest\.(api\.compute|scenario\.test_(server_basic_ops'
         r'|server_advanced_ops|minimum_basic|shelve_instance'
         r'|snapshot_pattern))')
CONF = '''[DEFAULT]
log_file = tempest.log
[oslo_concurrency]
lock_path = %(folder)s/lock
[auth]
admin_username = admin
admin_password = %(password)s
admin_project_name = admin
admin_domain_name = Default
create_isolated_networks = false
[identity]
uri_v3 = %(identity)s
auth_version = v3
region = %(region)s
[service_available]
cinder = false
swift = false
neutron = %(neutron)s
glance = true
nova = true
[validation]
run_validation = false
[image]
region = %(region)s
[compute]
region = %(region)s
image_ref = %(image)s
image_ref_alt = %(image_alt)s
flavor_ref = %(flavor)s
flavor_ref_alt = %(flavor_alt)s
fixed_network_name = %(network)s
min_compute_nodes = 2
min_microversion = 2.1
max_microversion = latest
build_timeout = 300
build_interval = 1
[network]
region = %(region)s
project_networks_reachable = true
[compute-feature-enabled]
resize = true
cold_migration = true
live_migration = %(live)s
block_migration_for_live_migration = true
live_migrate_back_and_forth = true
shelve_migrate = true
rescue = true
snapshot = true
suspend = true
console_output = true
config_drive = true
vnc_console = false
change_password = false
interface_attach = %(neutron)s
swap_volume = false
volume_backed_live_migration = false
attach_encrypted_volume = false
'''


def configure(cloud, live=True):
    """Write what Tempest has to know.

    :returns: the folder of its workspace
    """
    folder = config.STATE / 'tempest'
    (folder / 'lock').mkdir(parents=True, exist_ok=True)
    (folder / '.stestr.conf').write_text(
        '[DEFAULT]\ntest_path=%s/test_discover\ntop_dir=%s\n'
        r'group_regex=([^\.]*\.)*' '\n' % (_tests(), _tests()))
    path = folder / 'tempest.conf'
    path.touch(mode=0o600)
    path.write_text(CONF % {
        'folder': folder, 'password': cloud.keys.admin,
        'identity': cloud.layout.url('keystone', '/v3'),
        'region': cloud_config.REGION, 'live': str(live).lower(),
        'neutron': str(bool(cloud.layout.network)).lower(),
        'network': neutron.NETWORK if cloud.layout.network else '',
        'image': cloud.image('guest').id,
        'image_alt': cloud.image('guest-raw').id,
        'flavor': cloud.flavor('lab.small').id,
        'flavor_alt': cloud.flavor('lab.medium').id})
    return folder


def _tests():
    (found,) = (VENVS / 'tempest').glob('lib/python3*/site-packages/tempest')
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m lab.tempest')
    parser.add_argument('regex', nargs='?', default=REGEX)
    parser.add_argument('--list', action='store_true',
                        help='only list the tests')
    arguments = parser.parse_args()
    cloud = lab_cloud.Cloud()
    venvs.ensure_one(VENVS, 'tempest', PACKAGES, ui.Steps().step)
    folder = configure(cloud)
    if not arguments.list:
        # QEMU 7.2 dies when a guest with one goes there and back paused.
        for host in cloud.layout.hosts:
            if cloud.get(host, 'DEFAULT', 'force_config_drive') != 'false':
                cloud.set(host, 'DEFAULT', 'force_config_drive', 'false')
    # Its ports are those of the control plane's network.
    return forward(cloud.control.popen(
        [VENVS / 'tempest/bin/tempest', 'run', '--config-file',
         folder / 'tempest.conf', '--concurrency', '1', '--regex',
         arguments.regex, *(['--list-tests'] if arguments.list else [])],
        cwd=folder, env={
            **terminal(),
            **bootstrap.environment(cloud.layout, cloud.keys)}).wait())


if __name__ == '__main__':
    sys.exit(main())
