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
import gc
import importlib.util
import json
import os
import pathlib
import re
import sys
import tempfile
import time
import tomllib
import types
import unittest

import lab
from lab.cloud import cloud as lab_cloud
from lab import config
from lab import nova_user
from lab import storage

HERE = pathlib.Path(__file__).resolve().parent
ROOM = 'nova.tests.unit.virt.libvirt.storage.'
SERVER = '127.0.0.1'  # of the exports, for the machine's own libvirt
#: Below which path of the server the exports are, by the protocol's version.
EXPORTS = {'3': '/srv', '4.2': '/'}
MIB = 1 << 20
POOL = ('<pool type="dir"><name>%s</name><target><path>%s</path></target>'
        '</pool>')
GROUP = ('<pool type="logical"><name>%s</name><source><name>%s</name><format '
         'type="lvm2"/></source><target><path>/dev/%s</path></target></pool>')
VOLUME = ('<volume><name>%s</name><capacity>%d</capacity><allocation>%d'
          '</allocation><target><format type="raw"/>%s</target></volume>')
EXPORT = ('<pool type="netfs" xmlns:fs="http://libvirt.org/schemas/'
          'storagepool/fs/1.0"><name>%s</name><source><host name="%s"/>'
          '<dir path="%s"/>'
          '<format type="nfs"/></source><target><path>/mnt/%s</path></target>'
          '<fs:mount_opts><fs:option name="nfsvers=%s"/></fs:mount_opts>'
          '</pool>')
OWNER = ('<permissions><owner>%d</owner><group>%d</group><mode>0644</mode>'
         '</permissions>')

#: What scripts begin with.
NOVA = '''
import json, os, sys
import libvirt
from nova import conf
from nova import exception
from nova.virt.libvirt.storage.pool import config
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pump import transfer as pump
libvirt.registerErrorHandler(lambda context, error: None, None)
uri, *arguments = sys.argv[1:]
conf.CONF([], project='nova', default_config_files=[])
conf.CONF.set_override('host', 'outside')

def wanted(name, capacity):
    found = config.LibvirtConfigStorageVolume()
    found.name, found.capacity, found.allocation = name, int(capacity), 0
    found.target_format = 'raw'
    return found

def told(function, *args):
    try:
        function(*args)
    except exception.NovaException as e:
        return [type(e).__name__, str(e)]

def pool_of(name, host='storage'):
    return storage_pool.StoragePool(libvirt.open(uri), name, host)
'''

#: In the machine there is no other daemon of Nova's to have privileges.
INSIDE = '''
import nova.privsep
nova.privsep.sys_admin_pctxt.set_client_mode(False)
conf.CONF.set_override('host', 'storage')
'''

#: From a file into a logical volume and back, both verified.
PUMP = '''
length, longer = map(int, arguments[:2])
here, there = "qemu:///system", arguments[2]
first = pump.Volume(here, "files", "first")
second = pump.Volume(uri, there, "second")
third = pump.Volume(here, "files", "third")
sent = pump.copy(first, second, length, stall_timeout=300)
pump.verify(second, length, sent.checksum, key=sent.key, stall_timeout=300)
back = pump.copy(second, third, longer, find_holes=True, stall_timeout=300)
pump.verify(third, longer, back.checksum, key=back.key)
print(json.dumps([[sent.data, sent.holes], [back.data, back.holes],
                  back.allocation]))
'''

BETWEEN = '''
name, length = arguments[0], int(arguments[1])
sent = pump.copy(pump.Volume(uri, name, "from"), pump.Volume(uri, name, "to"),
                 length, find_holes=True, stall_timeout=600)
print(json.dumps([sent.data, sent.holes, round(sent.seconds)]))
'''

#: Where the volumes are local, with LVM at hand.
LOCAL = '''
import subprocess
MIB = 1 << 20
pool = pool_of(arguments[0])
pool.adopt()
volume = pool.create(wanted("u_disk", 8 * MIB))
lvm = lambda *command: subprocess.run(command, check=True,
                                      stdout=subprocess.DEVNULL)
found = {}
before = pool.info()
lvm("lvcreate", "-qqy", "-n", "theirs", "-L", "64M", "vg0")
# What Nova says has gone, and libvirt.
found["taken"] = [before.available - pool.info().available,
                  before.available - pool._lookup().info()[3]]
lvm("lvremove", "-qqfy", "vg0/theirs")
lvm("lvcreate", "-qqy", "-s", "-n", "u_disk-backup", "-L", "4M", "vg0/u_disk")
found["delete"] = told(volume.delete)
found["grow"] = told(volume.resize, 16 * MIB)
pool.refresh()
found["snapshot"] = told(pool.volume("u_disk-backup").delete)
lvm("lvremove", "-qqfy", "vg0/u_disk-backup")
with open(volume.path, "r+b") as f:
    f.write(b"of the guest")
volume.resize(15 * MIB)
found["size"] = [volume.physical(), volume.info().capacity]
with open(volume.path, "rb") as f:
    content = f.read()
found["content"] = [content[:12].decode(), len(content),
                    content[8 * MIB:].count(0)]
found["full"] = told(volume.resize, 1 << 40)
conf.CONF.set_override("volume_clear", "shred", "libvirt")
volume.delete()
pool.refresh()
found["left"] = sorted(volume.name for volume in pool.volumes())
print(json.dumps(found))
'''

BUSY = '''
pool = pool_of(arguments[0])
print(json.dumps(told(pool.volume(arguments[1]).delete)))
'''

CREATE = '''
pool = pool_of(arguments[0])
print(json.dumps(told(pool.create, wanted(*arguments[1:]))))
'''

SHARED = '''
import types
from nova.virt.libvirt.storage.pool import sharing
instance = types.SimpleNamespace(
    uuid="5d1c4d11-6f3a-4c5e-9a70-0f6f2c1d8e01", obj_attr_is_set=None)
here = pool_of(arguments[0], "here")
print(json.dumps([sharing.is_same(here, pool_of(name, "there"), instance)
                  for name in arguments[1:]]))
'''

#: Copies a file into a volume of an export; the machine's disks go on.
SILENT = '''
name, length = arguments[0], int(arguments[1])
print(json.dumps(told(lambda: pump.copy(
    pump.Volume("qemu:///system", "files", "silent"),
    pump.Volume(uri, name, arguments[2]), length,
    stall_timeout=float(arguments[3])))))
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
        # What a failed test holds of libvirt's asks the machine when it goes.
        cls.addClassCleanup(gc.collect)
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

    def nova(self, script, *arguments, timeout=300):
        """Run a script of Nova's modules as Nova's user on host-a.

        :returns: what it prints, parsed as JSON
        """
        return json.loads(self.host.run(
            nova_user.command([sys.executable, '-W', 'ignore', '-c',
                               NOVA + script, self.vm.uri, *arguments]),
            timeout=timeout, env={
                'PYTHONPATH': str(self.tree),
                'OS_NOVA_DISABLE_EVENTLET_PATCHING': 'true',
                **nova_user.environment()}).stdout.splitlines()[-1])

    def nova_inside(self, script, *arguments, timeout=400):
        """The same in the machine, as root, where the volumes are local."""
        with tempfile.NamedTemporaryFile(
                'w', suffix='.py', dir=config.STATE) as program:
            program.write(NOVA + INSIDE + script)
            program.flush()
            return self.program_inside(
                program.name, 'qemu:///system', *arguments, timeout=timeout)

    def program_inside(self, path, *arguments, timeout):
        return json.loads(self.vm.run(
            'cd /tmp; OS_NOVA_DISABLE_EVENTLET_PATCHING=true '
            'PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=%s %s -W ignore %s %s' %
            (self.tree, sys.executable, path, ' '.join(arguments)),
            timeout=timeout).splitlines()[-1])

    def test_volume_group(self):
        self.conform('test_conformance_lvm',
                     NOVA_TEST_LIBVIRT_VG=storage.VOLUME_GROUP,
                     NOVA_TEST_LIBVIRT_DIR='/srv')
        # But for the snapshot that is made to be lost.
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
            group.createXML(VOLUME % ('second', length, length, ''))
            content = (b'first' + bytes(8 * MIB) + b'middle' + bytes(
                length - 8 * MIB - 15) + b'last')
            path = self.host.path(folder + '/first')
            with open(path, 'r+b') as f:
                for text in (b'first', b'middle', b'last'):
                    f.seek(content.index(text))
                    f.write(text)
            self.addCleanup(self.vm.run, 'lvremove -qfy vg0/second')
            sent, back, allocated = self.nova(
                PUMP, length, longer, group.name())
        # What is no zeroes; a packet of the pump's is the least.
        for data, holes in (sent, back):
            self.assertLess(data, MIB)
        self.assertEqual([length, longer], [sum(sent), sum(back)])
        self.assertLess(allocated, MIB)
        with open(self.host.path(folder + '/third'), 'rb') as f:
            self.assertEqual(content, f.read(length))

    def test_copy_between_logical_volumes(self):
        """What is zeroes neither travels nor is left out."""
        length, every = 512 * MIB, 10
        with contextlib.closing(self.vm.connect()) as there:
            group = self.group(there)
            for name in ('from', 'to'):
                group.createXML(VOLUME % (name, length, length, ''))
                self.addCleanup(self.vm.run, 'lvremove -qfy vg0/' + name)
        self.vm.run(
            'blkdiscard -z /dev/vg0/from; yes old | head -c 64M | '
            'dd of=/dev/vg0/to bs=1M iflag=fullblock status=none; '
            'for n in $(seq 3 %d %d); do dd if=/dev/urandom of=/dev/vg0/from '
            'bs=1M count=1 seek=$n conv=notrunc status=none; done; sync' % (
                every, length // MIB - 1), timeout=300)
        data = len(range(3, length // MIB, every)) * MIB
        sent, holes, seconds = self.nova(
            BETWEEN, group.name(), length, timeout=900)
        print('%d of %d bytes, %d s' % (sent, data, seconds), file=sys.stderr)
        self.assertEqual(length, sent + holes)
        self.assertLessEqual(sent, 1.1 * data)
        self.vm.run('cmp /dev/vg0/from /dev/vg0/to', timeout=300)

    def test_local_volumes(self):
        """What an operator makes, growth with a refresh, shred."""
        with contextlib.closing(self.vm.connect()) as there:
            name = self.group(there).name()
        found = self.nova_inside(LOCAL, name)
        self.assertEqual([64 * MIB, 0], found['taken'])
        for key in ('delete', 'grow', 'snapshot'):
            self.assertEqual('StorageVolumeHasSnapshots', found[key][0], key)
            self.assertIn('at logical volumes u_disk-backup, and remove',
                          found[key][1])
        self.assertEqual([16 * MIB] * 2, found['size'])
        self.assertEqual(['of the guest', 16 * MIB, 8 * MIB],
                         found['content'])
        self.assertEqual('InsufficientStoragePoolSpace', found['full'][0])
        self.assertNotIn('u_disk', found['left'])

    def test_disk_that_grows(self):
        """By extents, which the guest sees to their ends; or not at all."""
        with contextlib.closing(self.vm.connect()) as there:
            name = self.group(there).name()
        found = self.program_inside(HERE / 'grower.py', name, timeout=900)

        def disk(size):
            return {'disk': size}

        # What is on record is what was asked for, and says nothing.
        self.assertEqual([disk(20 * MIB), 20 * MIB, 20 * MIB, 18 * MIB],
                         found['made'])
        self.assertEqual([disk(32 * MIB), 32 * MIB, True], found['grown'])
        for key, taken in (('full', ['rest']),
                           ('full in the middle', ['rest'])):
            error, volumes, seen, is_clean = found[key]
            self.assertEqual('InsufficientStoragePoolSpace', error[0], error)
            self.assertIn(name, error[1])
            self.assertEqual(['disk', *taken], sorted(volumes), key)
            self.assertEqual([32 * MIB] * 2 + [True],
                             [volumes['disk'], seen, is_clean], key)
        self.assertEqual(
            [None, disk(64 * MIB), 64 * MIB, True, 64 * MIB],
            found['next try'])
        self.assertEqual([32 * MIB, 64 * MIB], found['known'])
        self.assertEqual([64 * MIB, True], found['snapshot'])
        self.assertEqual(
            [{'disk': 64 * MIB, 'disk.rescue': 12 * MIB}, 12 * MIB, True],
            found['rescue'])
        self.assertEqual({}, found['left'])

    def test_volume_that_is_busy(self):
        with contextlib.closing(self.vm.connect()) as there:
            group = self.group(there)
            group.createXML(VOLUME % ('busy', 4 * MIB, 4 * MIB, ''))
        self.vm.run('sleep 300 3< /dev/vg0/busy > /dev/null 2>&1 & '
                    'echo $! > /tmp/busy')
        error = self.nova(BUSY, group.name(), 'busy')
        self.vm.run('kill $(cat /tmp/busy)')
        self.assertEqual('StorageVolumeError', error[0])
        self.assertIn('in use', error[1])
        self.assertIsNone(self.nova(BUSY, group.name(), 'busy'))

    def test_group_that_fills_up(self):
        """By an operator, after somebody has looked."""
        with contextlib.closing(self.vm.connect()) as there:
            name = self.group(there).name()
        self.vm.run('lvcreate -qqy -n rest -l 100%FREE vg0')
        try:
            error = self.nova(CREATE, name, 'u_disk', 8 * MIB)
        finally:
            self.vm.run('lvremove -qqfy vg0/rest')
        self.assertEqual('InsufficientStoragePoolSpace', error[0])
        self.assertEqual('', self.vm.run(
            'lvs --noheadings -o lv_name -S lv_name=u_disk vg0').strip())
        self.assertIsNone(self.nova(CREATE, name, 'u_disk', 8 * MIB))
        self.assertIsNone(self.nova(BUSY, name, 'u_disk'))

    def export(self, there, name, server=SERVER, version='4.2'):
        """Start a pool over the trusting export, until the test ends."""
        pool = there.storagePoolDefineXML(EXPORT % (
            name, server, os.path.join(EXPORTS[version], 'trusting'), name,
            version))
        self.addCleanup(pool.undefine)
        pool.build()
        pool.create()
        self.addCleanup(pool.destroy)
        return pool

    def test_one_export_is_one_pool(self):
        """By whatever names and versions two hosts mount it."""
        there = self.enterContext(contextlib.closing(self.vm.connect()))
        self.export(there, 'one')
        self.export(there, 'other', 'localhost')
        self.export(there, 'old', version='3')
        other = there.storagePoolDefineXML(POOL % ('not-it', '/mnt/not-it'))
        self.addCleanup(other.undefine)
        other.build()
        other.create()
        self.addCleanup(other.destroy)
        self.assertEqual([True, True, False], self.nova(
            SHARED, 'one', 'other', 'old', 'not-it'))

    def test_server_that_is_silent(self):
        """The copy is given up, others go on, and the next one ends."""
        length, folder = 8 * MIB, '/var/lib/nova/instances/silent'
        self.host.run(['install', '-d', '-o', 'nova', '-g', 'nova', folder])
        with open(self.host.path(folder + '/silent'), 'wb') as f:
            f.write(os.urandom(length))
        here = self.enterContext(contextlib.closing(self.host.connect()))
        there = self.enterContext(contextlib.closing(self.vm.connect()))
        files = here.storagePoolDefineXML(POOL % ('files', folder))
        self.addCleanup(files.undefine)
        files.create()
        self.addCleanup(files.destroy)
        pool = self.export(there, 'one')
        # Until it ends libvirtd keeps open what it could not write to.
        self.addCleanup(self.vm.run, 'umount -l /mnt/one')
        group = self.group(there)
        for name in ('first', 'next'):
            volume = pool.createXML(VOLUME % (name, length, 0, OWNER % (
                nova_user.ID, nova_user.ID)))
            self.addCleanup(volume.delete)
        self.vm.run('rpc.nfsd 0')
        try:
            error = self.nova(SILENT, 'one', length, 'first', 20)
            begin = time.monotonic()
            with contextlib.closing(self.vm.connect()) as again:
                again.storagePoolLookupByName(group.name()).info()
                again.listAllDomains()
            seconds = time.monotonic() - begin
        finally:
            self.vm.run('rpc.nfsd 4', timeout=120)
        self.assertEqual('StorageTransferStalled', error[0])
        self.assertLess(seconds, 20)
        self.assertIsNone(self.nova(SILENT, 'one', length, 'next', 120))

    def test_exports(self):
        for version, directory in EXPORTS.items():
            with self.subTest(version):
                self.conform(
                    'test_conformance_nfs',
                    NOVA_TEST_LIBVIRT_EXPORTS=SERVER + ':' + directory,
                    NOVA_TEST_LIBVIRT_NFS_VERSION=version)

    def test_a_mount_is_known_by_its_export(self):
        """By what the kernel calls it, and not only by what it was given."""
        path = self.tree / 'nova/virt/libvirt/storage/pool/mounts.py'
        spec = importlib.util.spec_from_file_location('mounts', path)
        mounts = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mounts)
        source = types.SimpleNamespace(hosts=[(SERVER, None)],
                                       dir='/trusting/')
        with tempfile.NamedTemporaryFile('w') as told:
            mounts.MOUNTINFO = told.name
            for mounted in (True, False):
                script = ('mkdir -p "/mnt/a b"; mount -t nfs -o nfsvers=4.2 '
                          '%s:/trusting/ "/mnt/a b"' % SERVER
                          if mounted else 'umount "/mnt/a b"')
                text = self.vm.run(script + ' && cat /proc/self/mountinfo')
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
