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
"""Volume groups and NFS exports, on the real thing.

Nova's own tests of its fakes run on the storage machine's libvirtd, as Nova's
user on host-a.
"""

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
import tomllib
import types
import unittest

import lab
from lab.cloud import cloud as lab_cloud
from lab import config
from lab import nova_user
from lab import storage

ROOM = 'nova.tests.unit.virt.libvirt.storage.'
SERVER = '127.0.0.1'  # of the exports, for the machine's own libvirt
MIB = 1 << 20
POOL = ('<pool type="dir"><name>%s</name><target><path>%s</path></target>'
        '</pool>')
GROUP = ('<pool type="logical"><name>%s</name><source><name>%s</name><format '
         'type="lvm2"/></source><target><path>/dev/%s</path></target></pool>')
VOLUME = ('<volume><name>%s</name><capacity>%d</capacity><allocation>%d'
          '</allocation><target><format type="raw"/>%s</target></volume>')
OWNER = ('<permissions><owner>%d</owner><group>%d</group><mode>0644</mode>'
         '</permissions>')

#: Nova's pump, from a file into a logical volume and back, both verified.
PUMP = '''
import sys
from nova.virt.libvirt.storage.pump import transfer as pump
uri, length, longer = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
here, there = "qemu:///system", sys.argv[4]
first = pump.Volume(here, "files", "first")
second = pump.Volume(uri, there, "second")
third = pump.Volume(here, "files", "third")
sent = pump.copy(first, second, length, stall_timeout=300)
pump.verify(second, length, sent.checksum, key=sent.key, stall_timeout=300)
print(sent.data, sent.holes)
back = pump.copy(second, third, longer, stall_timeout=300)
pump.verify(third, longer, back.checksum, key=back.key)
'''


class StorageTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tree = lab_cloud.find_tree('tree')
        if os.geteuid():
            raise unittest.SkipTest('the lab makes namespaces: root only')
        if cls.tree is None or not (
                cls.tree / (ROOM + 'test_conformance_lvm').replace(
                    '.', '/')).with_suffix('.py').exists():
            raise unittest.SkipTest('the tree has no such modules')
        if os.environ.get('LAB_SCENARIOS') != 'all':
            raise unittest.SkipTest('its machine takes minutes where the '
                                    'processors are busy: make lab-test')
        try:
            storage.prepare()
        except lab.LabError as error:
            if os.environ.get('CI') == 'true':
                raise
            raise unittest.SkipTest(str(error))
        cls.host, _other = cls.enterClassContext(lab.Hosts(storage='vm'))
        cls.vm = storage.StorageVM()

    def conform(self, module, **environment):
        """Run Nova's own module, which else runs on a fake."""
        series = tomllib.loads(
            (config.ROOT / 'tools/series.toml').read_text())
        done = self.host.run(
            nova_user.command([sys.executable, '-m', 'unittest', '-v',
                               ROOM + module + '.DaemonTestCase']),
            cwd=self.tree, check=False, timeout=900, env={
                **series['tests']['environment'], **nova_user.environment(),
                'NOVA_TEST_LIBVIRT_URI': self.vm.uri, **environment})
        self.assertEqual(0, done.returncode, done.stderr[-5000:])
        self.assertRegex(done.stderr, r'(?m)DaemonTestCase.*\.\.\. ok$')
        self.assertEqual([], re.findall(r'\.\.\. skipped', done.stderr))

    def test_volume_group(self):
        self.conform('test_conformance_lvm',
                     NOVA_TEST_LIBVIRT_VG=storage.VOLUME_GROUP,
                     NOVA_TEST_LIBVIRT_DIR='/srv/file-system')

    def test_volume_group_is_left_clean(self):
        """But for the snapshot that is made to be lost."""
        left = self.vm.run('lvs --noheadings -o segtype,lv_name %s' %
                           storage.VOLUME_GROUP)
        self.assertNotIn('thin', left)
        self.assertEqual(
            [], [line for line in left.splitlines()
                 if 'linear' in line and '_lost' not in line])

    @staticmethod
    def group(connection):
        """The pool over the volume group; the tests of Nova use it, too."""
        name = 'nova-test-vg'
        for pool in connection.listAllStoragePools():
            if pool.name() == name:
                return pool
        pool = connection.storagePoolDefineXML(GROUP % (
            name, storage.VOLUME_GROUP, storage.VOLUME_GROUP))
        pool.create()
        return pool

    def test_copy_into_a_volume_group_and_back(self):
        """Holes of a file don't travel; what comes back is longer."""
        length, longer = 10 * MIB + 7, 12 * MIB
        folder = '/var/lib/nova/instances/files'
        self.host.run(['install', '-d', '-o', 'nova', '-g', 'nova', folder])
        with contextlib.closing(self.host.connect()) as here, \
                contextlib.closing(self.vm.connect()) as there:
            files = here.storagePoolDefineXML(POOL % ('files', folder))
            files.create()
            self.addCleanup(self.host.run, ['virsh', 'pool-undefine', 'files'])
            self.addCleanup(self.host.run, ['virsh', 'pool-destroy', 'files'])
            owner = OWNER % (nova_user.ID, nova_user.ID)
            for name, size in (('first', length), ('third', longer)):
                files.createXML(VOLUME % (name, size, 0, owner))
            group = self.group(there)
            second = group.createXML(VOLUME % ('second', length, length, ''))
            content = (b'first' + bytes(8 * MIB) + b'middle' + bytes(
                length - 8 * MIB - 15) + b'last')
            path = self.host.path(folder + '/first')
            with open(path, 'r+b') as f:
                for text in (b'first', b'middle', b'last'):
                    f.seek(content.index(text))
                    f.write(text)
            told = self.host.run(
                nova_user.command([sys.executable, '-c', PUMP, self.vm.uri,
                                   length, longer, group.name()]),
                timeout=300, env={
                    'PYTHONPATH': str(self.tree),
                    'OS_NOVA_DISABLE_EVENTLET_PATCHING': 'true',
                    **nova_user.environment()}).stdout.split()
            second.delete()
        self.assertLess(int(told[0]), MIB)
        self.assertEqual(length, int(told[0]) + int(told[1]))
        with open(self.host.path(folder + '/third'), 'rb') as f:
            self.assertEqual(content, f.read(length))

    def test_exports(self):
        self.conform('test_conformance_nfs',
                     NOVA_TEST_LIBVIRT_EXPORTS=SERVER + ':/srv')

    def test_a_mount_is_known_by_its_export(self):
        """By what the kernel calls it, and not only by what it was given."""
        path = self.tree / 'nova/virt/libvirt/storage/pool/mounts.py'
        spec = importlib.util.spec_from_file_location('mounts', path)
        mounts = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mounts)
        source = types.SimpleNamespace(hosts=[(SERVER, None)],
                                       dir='/srv/trusting/')
        with tempfile.NamedTemporaryFile('w') as told:
            mounts.MOUNTINFO = told.name
            for mounted in (True, False):
                script = ('mkdir -p "/mnt/a b"; mount -t nfs -o nfsvers=4.2 '
                          '%s:/srv/trusting/ "/mnt/a b"' % SERVER
                          if mounted else 'umount "/mnt/a b"')
                text = self.vm.run(script + '; cat /proc/self/mountinfo')
                told.seek(0)
                told.truncate()
                told.write(text)
                told.flush()
                found = mounts.source_at('/mnt/a b')
                if mounted:
                    self.assertIn(found.rstrip('/'), {
                        name.rstrip('/')
                        for name in mounts.sources_of(source)})
                else:
                    self.assertIsNone(found)
