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
"""What libvirt does with volume groups: the fake beside a real daemon.

For the latter set NOVA_TEST_LIBVIRT_URI, and NOVA_TEST_LIBVIRT_VG to a volume
group of that daemon's host that has 200 MiB left and nobody else uses. What a
full snapshot leaves there, no libvirt can delete.
"""

import contextlib
import os

from oslo_utils import units
from oslo_utils import uuidutils

from nova import exception
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage import test_conformance
from nova.virt.libvirt.storage.pool import clearing
from nova.virt.libvirt.storage.pool import config
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import stream

VOLUME_GROUP = os.environ.get('NOVA_TEST_LIBVIRT_VG')
DIRECTORY = os.environ.get('NOVA_TEST_LIBVIRT_DIR', '/var/tmp')

POOL = ("<pool type='logical'><name>%s</name><source><name>%s</name>"
        "<format type='lvm2'/></source><target><path>/dev/%s</path></target>"
        "</pool>")
FILES = ("<pool type='dir'><name>%s</name><target><path>%s</path></target>"
         "</pool>")
SNAPSHOT = ("<volume><name>%s</name><capacity unit='bytes'>%d</capacity>"
            "<backingStore><path>%s</path></backingStore></volume>")
VOLUME = ("<volume><name>%s</name><capacity unit='bytes'>%d</capacity>"
          "<allocation unit='bytes'>%d</allocation><target><format type='%s'/>"
          "</target></volume>")
MIB = units.Mi


class Conformance:
    """To be mixed with what provides libvirt, conn and group."""

    def setUp(self):
        super().setUp()
        self.provide()
        self.useFixture(fakelibvirt.LibvirtModuleFixture(self.libvirt))
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.prefix = 'test-%s_' % uuidutils.generate_uuid()
        self.raw = self.define()
        self.addCleanup(self._clear, self.raw)
        # Not this host's: nothing is asked but libvirt.
        self.pool = storage_pool.StoragePool(
            self.conn, self.raw.name(), 'elsewhere')

    def define(self):
        """Define and start the pool, once for all tests of a daemon.

        To stop it is to deactivate all volumes of the group.
        """
        try:
            return self.conn.storagePoolLookupByName('nova-test-vg')
        except self.libvirt.libvirtError:
            raw = self.conn.storagePoolDefineXML(POOL % (
                'nova-test-vg', self.group, self.group), 0)
            raw.create(0)
            return raw

    def define_files(self):
        """A pool of files, until the test ends."""
        raw = self.conn.storagePoolDefineXML(FILES % (
            self.prefix + 'files', os.path.join(
                DIRECTORY, self.prefix + 'files')), 0)
        self.addCleanup(raw.undefine)
        raw.build(0)
        raw.create(0)
        self.addCleanup(raw.destroy)
        self.addCleanup(self._clear, raw)
        return raw

    def _clear(self, raw):
        for volume in raw.listAllVolumes(0):
            if volume.name().startswith(self.prefix):
                volume.delete(0)

    def make(self, name='v', capacity=8 * MIB, allocation=None, raw=None,
             fmt='raw'):
        if allocation is None:
            allocation = capacity
        return (raw or self.raw).createXML(VOLUME % (
            self.prefix + name, capacity, allocation, fmt), 0)

    def wanted(self, capacity, name='v'):
        made = config.LibvirtConfigStorageVolume()
        made.name, made.capacity = self.prefix + name, capacity
        made.allocation = 0
        return made

    def fails(self, code, function, *args):
        """:returns: libvirt's message"""
        e = self.assertRaises(self.libvirt.libvirtError, function, *args)
        self.assertEqual(code, e.get_error_code(), e.get_error_message())
        return e.get_error_message()

    def write(self, raw, data, offset=0):
        sent, upload = 0, self.conn.newStream(0)
        raw.upload(upload, offset, len(data), 0)
        while sent < len(data):
            sent += upload.send(data[sent:sent + 65536])
        upload.finish()

    def read(self, raw, length, offset=0):
        download = self.conn.newStream(0)
        raw.download(download, offset, length, 0)
        parts = []
        while part := download.recv(65536):
            parts.append(part)
        download.finish()
        return b''.join(parts)

    def test_size_is_rounded_up_to_an_extent(self):
        raw = self.make(capacity=10000001)
        self.assertEqual([1, 12 * MIB, 12 * MIB], list(raw.info()))
        self.assertEqual([1, 12 * MIB, 12 * MIB], list(raw.infoFlags(1)))

    def test_sizes_of_the_pool(self):
        before = self.raw.info()
        self.make(capacity=5 * MIB)
        self.raw.refresh(0)
        after = self.raw.info()
        self.assertEqual(before[1], after[1])
        self.assertEqual(8 * MIB, before[3] - after[3])

    def test_name_is_taken(self):
        self.make()
        self.fails(90, self.make)
        self.assertRaises(exception.StorageVolumeExists, self.pool.create,
                          self.wanted(8 * MIB))

    def test_too_large(self):
        self.assertIn('insufficient free space', self.fails(
            1, self.make, 'v', 1 << 50))
        self.assertRaises(exception.InsufficientStoragePoolSpace,
                          self.pool.create, self.wanted(1 << 50))
        self.assertEqual([], [volume.name() for volume in
                              self.raw.listAllVolumes(0)
                              if volume.name().startswith(self.prefix)])

    def test_no_other_capacity(self):
        self.assertIn('does not support changing of volume capacity',
                      self.fails(3, self.make().resize, 16 * MIB))

    def test_less_allocation_is_a_snapshot_that_is_lost(self):
        raw = self.make('lost', 16 * MIB, 0)
        # Nobody is told while it is written, or when that ends.
        with contextlib.suppress(self.libvirt.libvirtError):
            self.write(raw, b'x' * 16 * MIB)
        self.raw.refresh(0)
        self.fails(50, self.raw.storageVolLookupByName, self.prefix + 'lost')

    def test_what_nova_makes_holds_all_of_its_capacity(self):
        volume = self.pool.create(self.wanted(16 * MIB))
        self.write(volume.raw, b'x' * 16 * MIB)
        self.raw.refresh(0)
        self.assertEqual(16 * MIB, volume.info().capacity)
        self.assertEqual(b'x' * 16, self.read(volume.raw, 16, 16 * MIB - 16))

    def test_past_the_end(self):
        """What the last packets have too many, nobody is told of."""
        raw = self.make(capacity=4 * MIB)
        e = self.assertRaises(self.libvirt.libvirtError, self.write, raw,
                              b'x' * 8 * MIB)
        self.assertEqual((38, 28), (e.get_error_code(), e.get_int1()))

    def test_snapshot_goes_with_its_origin(self):
        """And Nova lets neither of them go."""
        volume = self.pool.create(self.wanted(8 * MIB))
        taken = self.raw.createXML(SNAPSHOT % (
            self.prefix + 'backup', 8 * MIB, volume.path), 0)
        self.assertEqual(
            volume.path,
            self.pool.volume(taken.name()).config().backing_store.path)
        for name in (volume.name, taken.name()):
            e = self.assertRaises(exception.StorageVolumeHasSnapshots,
                                  self.pool.volume(name).delete)
            self.assertIn('at logical volumes %s, and' % taken.name(),
                          str(e))
        volume.raw.delete(0)
        self.raw.refresh(0)
        self.fails(50, self.raw.storageVolLookupByName, taken.name())

    def test_hole_is_written_as_zeroes(self):
        volume = self.pool.create(self.wanted(4 * MIB))
        self.write(volume.raw, b'x' * 4 * MIB)
        stream.write_zeroes(volume, 10, 3 * MIB)
        self.assertEqual(
            b'x' * 10 + bytes(3 * MIB - 10) + b'x' * MIB,
            self.read(volume.raw, 4 * MIB))

    def secrets(self, volume):
        return self.read(volume.raw, 0).count(b'secret')

    def test_next_volume_has_the_blocks_of_a_deleted_one(self):
        volume = self.pool.create(self.wanted(8 * MIB))
        self.write(volume.raw, b'secret12' * MIB)
        volume.raw.delete(0)
        again = self.pool.create(self.wanted(8 * MIB))
        self.assertGreater(self.secrets(again), 1000000)
        clearing.clear_rest(again, 4 * MIB)
        self.assertLess(self.secrets(again), MIB // 2 + 1)
        # now as Nova deletes it
        again.delete()
        last = self.pool.create(self.wanted(8 * MIB))
        self.assertEqual(0, self.secrets(last))

    def test_copies_of_files(self):
        files = self.define_files()
        source = storage_pool.StoragePool(
            self.conn, self.prefix + 'files', 'elsewhere')
        for fmt in ('raw', 'qcow2'):
            self.make('image.' + fmt, 6 * MIB, 0, files, fmt)
        self.write(source.volume(self.prefix + 'image.raw').raw, b'content')
        for fmt, capacity, expected in (('raw', 4, 8), ('raw', 16, 16),
                                        ('qcow2', 16, 16)):
            with self.subTest(fmt, capacity=capacity):
                name = 'of-%s-%d' % (fmt, capacity)
                copy = self.pool.create_from(
                    self.wanted(capacity * MIB, name),
                    source.volume('%simage.%s' % (self.prefix, fmt)))
                self.assertEqual(expected * MIB, copy.info().capacity)
                if fmt == 'raw':
                    self.assertEqual(b'content', self.read(copy.raw, 7))

    def test_delete(self):
        volume = self.pool.create(self.wanted(4 * MIB))
        volume.delete()
        self.fails(50, self.raw.storageVolLookupByName, self.prefix + 'v')
        volume.delete()


class FakeTestCase(Conformance, test.NoDBTestCase):
    def provide(self):
        self.libvirt = fakelibvirt
        self.conn = fakelibvirt.Connection('qemu:///system')
        self.conn.file_system = libvirt_storage.FileSystem()
        self.group = 'vg'

    # What takes more than libvirt to bring about.

    def test_resize_is_seen_after_a_refresh(self):
        raw = self.make(capacity=8 * MIB)
        self.conn.volume_group('vg').extend(self.prefix + 'v', 16 * MIB)
        self.assertEqual(8 * MIB, raw.info()[1])
        self.raw.refresh(0)
        self.assertEqual(16 * MIB, raw.info()[1])


class DaemonTestCase(Conformance, test.NoDBTestCase):
    def provide(self):
        test_conformance.connect(
            self, VOLUME_GROUP, 'NOVA_TEST_LIBVIRT_URI and '
            'NOVA_TEST_LIBVIRT_VG name no volume group')
        self.group = VOLUME_GROUP
