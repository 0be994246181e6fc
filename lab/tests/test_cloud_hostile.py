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
"""A guest makes its raw disks look like qcow2, with a host's file behind them.

Whoever probes such a disk gives the guest the host's file. It has to stay the
raw disk that it is, through whatever is done to the server. The root disk still
boots: its first bytes are a qcow2 header and a boot sector at once.
"""

import base64
import os
import pathlib
import struct
import subprocess
import tempfile
import unittest
from xml.etree import ElementTree

from lab.host import both
from lab.host import Host
from lab.machine import Machine
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import GIB
from lab.tests.cloud_case import LEGACY
from lab.tests.cloud_case import MIB

SECRET = '/var/lib/nova/secret'
MARK = b'the host keeps this to itself\n'
CLUSTER = 64 << 10
DATA = ('alpha', 12)
EPHEMERAL = ('beta', 4)
WRITE = 'boot 1: fill data 12 alpha\nboot 1: fill raw 4 beta vdb 64\n'

#: Where the header has the backing file's name. The processor executes this
#: number as "jump 64 bytes on": behind the header and its last, empty extension.
NAME_AT = 0xeb40
#: Moves itself out of the way (0x600), loads the sector to which the disk's own
#: boot code was moved, and goes on there.
LOADED_BY = 100  # sector
JUMP = bytes.fromhex(
    '31c0 8ed8 8ec0 8ed0 bc007c fc be007c bf0006 b90001 f3a5 ea6c060000'
    'be7806 b442 cd13 ea007c0000') + struct.pack(
        '<BBHHHQ', 16, 0, 1, 0x7c00, 0, LOADED_BY)


def header(size: int, tables: int, secret: str = SECRET,
           name_at: int = NAME_AT) -> bytes:
    """A qcow2 header, version 2, of an empty overlay on the secret.

    :param size: of the disk, in bytes
    :param tables: offset of two clusters of zeroes, in bytes
    :param name_at: offset of the secret's name, in bytes; libvirt looks for it
        in the first 33280 alone
    """
    return struct.pack(
        '>4sIQIIQIIQQIIQ', b'QFI\xfb', 2, name_at, len(secret), 16, size, 0,
        size // (512 * MIB), tables, tables + CLUSTER, 1, 0, 0) + bytes(8)


class Scenarios:
    """Run by classes which say where the server is made, and what it becomes.

    :cvar images_type: of both hosts when the server is made
    :cvar options: likewise, see Cloud.set_images_type
    :cvar later: images_type and options afterwards; None: the same
    :cvar raw: the guest's names of the disks that are raw
    """

    later = None
    raw = ('vda', 'vdb')

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for host in both():
            path = host.path(SECRET)
            path.write_bytes(MARK * (CLUSTER // len(MARK) + 1))
            path.chmod(0o644)

    def setUp(self):
        super().setUp()
        self.cloud.set_images_type(self.images_type, **self.options)

    def settle(self, server):
        """What may happen on a host at any time; then all is as before."""

    def become(self):
        if self.later:
            images_type, options = self.later
            self.cloud.set_images_type(images_type, **options)

    def hostile_server(self):
        server = self.boot(flavor='lab.small.disks', script=WRITE)
        for disk in self.raw:
            self.assertEqual('raw', self.formats(server)[disk])
            self.spoil(server, disk)
        said = server.look()
        self.assert_raw(server, said)
        for disk in self.raw:
            self.assert_would_be_followed(server, disk)
        return server, said

    @staticmethod
    def spoil(server, disk, secret=SECRET):
        """Have the guest write such a header to its disk."""
        def write(data, offset):
            server.command('write-head', disk,
                           base64.b64encode(data).decode(), offset)

        tables = 2 * CLUSTER if disk == 'vda' else 48 * MIB
        for command in (
                'dd if=/dev/%s of=/run/sector bs=512 count=1',
                'dd if=/run/sector of=/dev/%%s bs=512 seek=%d '
                'conv=notrunc' % LOADED_BY,
                'dd if=/dev/zero of=/dev/%%s bs=64k seek=%d count=2 '
                'conv=notrunc' % (tables // CLUSTER)):
            server.command('sh', command % disk)
        write(secret.encode(), NAME_AT)
        write(header(GIB, tables, secret) + JUMP, 0)

    def assert_would_be_followed(self, server, disk):
        """The header is good: who probes finds the secret."""
        host = Machine(server.host)
        path = self.path(server, disk)
        with tempfile.NamedTemporaryFile(dir=host.path('/var/lib/nova')) as f:
            host.run(['qemu-img', 'convert', '-U', '-O', 'raw', path,
                      '/var/lib/nova/' + pathlib.Path(f.name).name])
            self.assertIn(MARK, pathlib.Path(f.name).read_bytes()[:CLUSTER])

    # -- what libvirt says of it

    def sources(self, server):
        with server.domain() as domain:
            tree = ElementTree.fromstring(domain.XMLDesc())
        return {disk.find('target').get('dev'): disk
                for disk in tree.findall('devices/disk')}

    def formats(self, server):
        return {name: disk.find('driver').get('type')
                for name, disk in self.sources(server).items()}

    def path(self, server, disk):
        """The path on its host of a disk."""
        source = self.sources(server)[disk].find('source')
        if not source.get('volume'):
            return source.get('file') or source.get('dev')
        connection = Host(server.host).connect()
        try:
            return connection.storagePoolLookupByName(
                source.get('pool')).storageVolLookupByName(
                source.get('volume')).path()
        finally:
            connection.close()

    # -- what must not change

    def assert_raw(self, server, said, disks=None, size=GIB):
        self.assert_data(said, data=DATA, raw=EPHEMERAL)
        self.assertEqual(size, said.disks['vda']['bytes'])
        for disk in disks or self.raw:
            self.assertEqual('raw', self.formats(server)[disk])
            self.assertEqual('qcow2', said.disks[disk]['magic'])
            self.assertEqual(header(GIB, 0)[:16].hex(),
                             said.disks[disk]['head'])
            self.assertEqual('0', server.command(
                'sh', 'head -c 1048576 /dev/%s | grep -c "%s" || true' % (
                    disk, MARK.decode().strip())).strip())

    def assert_goes_on(self, server, before, **more):
        said = server.testimony(after=before)
        self.assert_raw(server, said, **more)
        self.settle(server)
        return said

    def test_in_place(self):
        """Reboots, rescue and snapshots."""
        server, said = self.hostile_server()
        server.hard_reboot()
        said = self.assert_goes_on(server, said)
        self.become()
        server.hard_reboot()
        said = self.assert_goes_on(server, said)
        server.stop()
        self.settle(server)
        server.start()
        said = self.assert_goes_on(server, said)
        self.assert_snapshot(server)
        server.stop()
        self.settle(server)
        self.assert_snapshot(server)
        server.start()
        said = self.assert_goes_on(server, said)
        server.rescue()
        rescued = server.testimony(after=said)
        self.settle(server)
        (other,) = rescued.others.values()
        self.assertEqual(said.boot, other['boot'])
        self.assertEqual(said.ranges['data']['sha256'],
                         other['ranges']['data']['sha256'])
        self.assertNotIn(MARK.decode().strip(), server.command(
            'sh', 'head -c 1048576 /dev/vdb'))
        server.unrescue()
        self.assert_goes_on(server, rescued)

    def test_moves(self):
        """Resize and migration, there and back."""
        server, said = self.hostile_server()
        self.become()
        server.migrate('host-b')
        said = self.assert_goes_on(server, said)
        server.revert()
        said = self.assert_goes_on(server, said)
        server.resize('lab.medium.disks')
        said = self.assert_goes_on(server, said, size=2 * GIB)
        server.confirm()
        self.settle(server)
        server.migrate('host-a')
        said = self.assert_goes_on(server, said, size=2 * GIB)
        server.confirm()
        server.hard_reboot()
        self.assert_goes_on(server, said, size=2 * GIB)

    def assert_snapshot(self, server):
        """It has the disk's own bytes and nothing of the host's."""
        for host in both():
            # Glance refuses a raw image that looks like qcow2.
            if self.cloud.get(host.name, 'libvirt',
                              'snapshot_image_format') != 'qcow2':
                self.cloud.set(host.name, 'libvirt',
                               'snapshot_image_format', 'qcow2')
        image = server.snapshot('of-%s' % server.id)
        self.addCleanup(self.cloud.conn.image.delete_image, image.id)
        self.settle(server)
        with tempfile.TemporaryDirectory() as folder:
            found = os.path.join(folder, 'found.qcow2')
            self.cloud.conn.image.download_image(image.id, output=found)
            subprocess.run(
                ['qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', found,
                 found + '.raw'], check=True)
            self.assertFalse(self._marked(found))
            self.assertFalse(self._marked(found + '.raw'))
            if 'vda' in self.raw:
                with open(found + '.raw', 'rb') as file:
                    self.assertEqual(header(GIB, 2 * CLUSTER) + JUMP,
                                     file.read(136))

    @staticmethod
    def _marked(path):
        return not subprocess.run(
            ['grep', '-q', '-a', MARK.decode().strip(), path]).returncode


class TestFlat(Scenarios, CloudTestCase):
    """Raw files, on a host that makes raw files."""

    lab = LEGACY
    images_type = 'flat'

    def settle(self, server):
        """What a disk is must not depend on the file beside it."""
        for host in both():
            host.path('/var/lib/nova/instances/%s/disk.info' % server.id
                      ).unlink(missing_ok=True)


class TestFlatOnQcow2(TestFlat):
    """Raw files, on hosts that would make qcow2 of them."""

    later = ('qcow2', {})


class TestFlatOnQcow2WithoutCow(TestFlat):
    """The same, where stock Nova declares the guest's bytes to be qcow2."""

    later = ('qcow2', {'use_cow_images': 'false'})


def load_tests(loader, tests, _pattern):
    if os.environ.get('LAB_SCENARIOS', 'fast') == 'all':
        return tests
    return unittest.TestSuite()


if __name__ == '__main__':
    unittest.main()
