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

"""What a cloud's databases need before its services start."""

from . import services


class Schemas:
    """The schema commands; each service's can run beside the others'.

    :param layout: config.Layout
    :param keys: config.Secrets
    :param run: callable(log name, argv, env): runs a command of the control
        plane and raises when it fails
    """

    def __init__(self, layout, keys, run):
        self.layout = layout
        self.keys = keys
        self.run = run

    def install_mariadb(self):
        """Write an empty data directory."""
        data = self.layout.folder / 'mariadb' / 'data'
        data.mkdir(parents=True)
        self.run('mariadb-install', [
            'mariadb-install-db', '--no-defaults', '--user=root',
            '--datadir=%s' % data, '--skip-test-db',
            '--auth-root-authentication-method=normal'])

    def create_databases(self):
        lines = ['CREATE DATABASE %s CHARACTER SET utf8mb3;' % name
                 for name in services.DATABASES]
        lines.append("CREATE USER 'lab'@'%%' IDENTIFIED BY '%s';"
                     "GRANT ALL ON *.* TO 'lab'@'%%';"
                     "ALTER USER 'root'@'localhost' IDENTIFIED BY '%s';" % (
                         self.keys.database, self.keys.database))
        self.run('mariadb-create', [
            'mariadb', '--no-defaults', '-uroot', '-S', services.SOCKET, '-e',
            ' '.join(lines)])

    def keystone(self):
        url = self.layout.url('keystone', '/v3')
        command = [self.layout.services / 'bin/keystone-manage',
                   '--config-file', self.layout.etc / 'keystone/keystone.conf']
        self.run('keystone-manage', [*command, 'db_sync'])
        owner = ['--keystone-user', 'root', '--keystone-group', 'root']
        self.run('keystone-manage', [*command, 'fernet_setup', *owner])
        self.run('keystone-manage', [
            *command, 'bootstrap', '--bootstrap-region-id', 'RegionOne',
            '--bootstrap-admin-url', url, '--bootstrap-internal-url', url,
            '--bootstrap-public-url', url],
            {'OS_BOOTSTRAP_PASSWORD': self.keys.admin})

    def placement(self):
        self.run('placement-manage', [
            self.layout.services / 'bin/placement-manage', '--config-file',
            self.layout.etc / 'placement/placement.conf', 'db', 'sync'])

    def glance(self):
        self.run('glance-manage', [
            self.layout.services / 'bin/glance-manage', '--config-file',
            self.layout.etc / 'glance/glance-api.conf', 'db_sync'])

    def _nova(self, *words):
        self.run('nova-manage', [
            *services.manage(self.layout, 'nova-manage'), *words],
            services.nova_environment(self.layout))

    def nova(self):
        self._nova('api_db', 'sync')
        self._nova('cell_v2', 'map_cell0')
        self._nova('cell_v2', 'create_cell', '--name', 'cell1')
        self._nova('db', 'sync')

    def upgrade_nova(self):
        self._nova('api_db', 'sync')
        self._nova('db', 'sync')

    def discover_hosts(self):
        self._nova('cell_v2', 'discover_hosts')
