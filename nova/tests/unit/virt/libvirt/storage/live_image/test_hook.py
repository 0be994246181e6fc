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
"""The hook for guests, with commands that only say that they were run."""

import os
import pathlib
import subprocess

import fixtures
from oslo_serialization import jsonutils

import nova
from nova import test

HOOK = pathlib.Path(nova.__path__[0]).parent.joinpath(
    'contrib', 'live-images', 'nova-clone')
MOUNT = '''#!/bin/sh
echo mount >>"$SAID"; [ -e "$DRIVE" ] || exit 1
for last; do :; done
mkdir -p "$last/openstack/latest"
cp "$DRIVE" "$last/openstack/latest/meta_data.json"
'''
UMOUNT = '#!/bin/sh\nrm -rf "$1/openstack"\n'
STUB = '#!/bin/sh\necho "${0##*/} $*" >>"$SAID"\n'
STUBS = ('hostname', 'systemd-machine-id-setup', 'ssh-keygen', 'systemctl',
         'python3', 'sleep')


class HookTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        (self.folder / 'bin').mkdir()
        for name, text in {'mount': MOUNT, 'umount': UMOUNT,
                           **dict.fromkeys(STUBS, STUB)}.items():
            path = self.folder / 'bin' / name
            path.write_text(text)
            path.chmod(0o755)
        for name in ('dev', 'etc/ssh', 'var/lib/dbus'):
            (self.folder / 'root' / name).mkdir(parents=True)
        for name in ('etc/ssh/ssh_host_rsa_key', 'etc/ssh/sshd_config',
                     'etc/machine-id'):
            (self.folder / 'root' / name).write_text('theirs')
        self.said = self.folder / 'said'
        self.drive = self.folder / 'drive'

    def _run(self, uuid=None):
        self.said.write_text('')
        if uuid:
            self.drive.write_text(jsonutils.dumps({
                'availability_zone': 'nova', 'hostname': 'host-' + uuid,
                'name': 'name', 'random_seed': 'c2VlZA==', 'uuid': uuid}))
        done = subprocess.run(['sh', str(HOOK)], capture_output=True, env={
            'PATH': '%s:%s' % (self.folder / 'bin', os.environ['PATH']),
            'NOVA_CLONE_ROOT': str(self.folder / 'root'),
            'SAID': str(self.said), 'DRIVE': str(self.drive)})
        return done.returncode, self.said.read_text().split('\n')[:-1]

    def _has(self, name):
        path = self.folder / 'root' / name
        return path.read_text() if path.exists() else None

    def test_first_start_and_reboots_change_nothing(self):
        for _attempt in range(2):
            self.assertEqual((0, ['mount']), self._run('one'))
            self.assertEqual('theirs', self._has('etc/ssh/ssh_host_rsa_key'))

    def test_another_server(self):
        self._run('one')
        code, said = self._run('two')
        self.assertEqual(0, code)
        self.assertEqual(
            ['mount', 'python3', 'hostname', 'systemd-machine-id-setup',
             'ssh-keygen', 'systemctl'], [line.split()[0] for line in said])
        self.assertIn('hostname host-two', said)
        self.assertEqual('seed', self._has('dev/urandom'))
        self.assertEqual('host-two\n', self._has('etc/hostname'))
        self.assertIsNone(self._has('etc/machine-id'))
        self.assertIsNone(self._has('etc/ssh/ssh_host_rsa_key'))
        self.assertEqual('theirs', self._has('etc/ssh/sshd_config'))
        # Once.
        self.assertEqual((0, ['mount']), self._run('two'))

    def test_cut_off(self):
        self._run('one')
        keygen = self.folder / 'bin' / 'ssh-keygen'
        text = keygen.read_text()
        keygen.write_text('#!/bin/sh\nexit 1\n')
        self.assertNotEqual(0, self._run('two')[0])
        keygen.write_text(text)
        self.assertIn('ssh-keygen -A', self._run('two')[1])

    def test_no_drive(self):
        code, said = self._run()
        self.assertNotEqual(0, code)
        self.assertEqual(5, said.count('mount'))
