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
"""Disks that are logical volumes."""

import os
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

import nova.conf
from nova import exception
from nova import objects
from nova.objects import fields
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt import images
from nova.virt.libvirt import config as guest_config
from nova.virt.libvirt.storage import image as backend
from nova.virt.libvirt.storage.pool import usage

CONF = nova.conf.CONF

MIB = units.Mi


@ddt.ddt
class LogicalDiskTestCase(base.PoolsTestCase):

    def setUp(self):
        super().setUp()
        self.flags(instances_path=self.useFixture(fixtures.TempDir()).path)
        self.flags(group='libvirt', storage_disks_pool='vg-pool')
        self.conn.file_system = libvirt_storage.RealFileSystem()
        self.add_pool('vg-pool', '/dev/vg', kind='logical')
        self.cache = os.path.join(CONF.instances_path, '_base')
        os.makedirs(self.cache)
        self.add_pool('nova-base-images-pool', self.cache)
        self.group = self.conn.volume_group('vg')
        self.stub_out('nova.privsep.fs.lvorigins', self.group.lvorigins)
        self.stub_out('nova.privsep.fs.vginfo', self.group.vginfo)
        self.image_class = backend.LibvirtStorage.bound_to(lambda: self.conn)
        self.instance = objects.Instance(
            uuid=uuids.instance, system_metadata={})
        self.content = b'image' * 1000
        self.stub_out('nova.virt.libvirt.utils.fetch_image', self._fetch)
        self.useFixture(fixtures.MockPatch('nova.privsep.path.utime'))
        self.base_info = mock.Mock(
            # as qemu-img rounds 5000 bytes
            file_format='raw', virtual_size=5120, backing_file=None,
            format_specific=None)
        self.useFixture(fixtures.MockPatchObject(
            images, 'qemu_img_info', return_value=self.base_info))
        self.useFixture(fixtures.MockPatchObject(
            images, 'get_image_format',
            return_value=mock.Mock(__str__=lambda self: 'raw')))
        # What another instance has left, and nobody has overwritten.
        old = self.group.make('old', 64 * MIB)
        for offset in range(0, 64 * MIB, 4096):
            old.write(offset, b'secret')
        self.group.remove('old')

    def _fetch(self, target, **kwargs):
        with open(target, 'wb') as f:
            f.write(self.content)

    def _image(self, name='disk', record=None):
        mapping = {'bus': 'virtio', 'dev': 'vda', 'type': 'disk'}
        if record is not None:
            mapping['metadata'] = record
        return self.image_class(
            self.instance, name, disk_info_mapping=mapping)

    def _new(self, name='disk', size=48 * MIB):
        return self._image(name, self._image(name).metadata(size))

    def _device(self, name='disk'):
        return self.group.devices['%s_%s' % (uuids.instance, name)]

    def _create(self, name='disk', size=48 * MIB):
        image = self._new(name, size)
        image.create_from_image(mock.sentinel.context, uuids.image, size)
        image.record.state = fields.LibvirtDiskState.READY
        return image

    def _generate(self, name, content, size=None):
        def write(target):
            with open(target, 'wb') as f:
                f.write(content)

        image = self._new(name, size or len(content))
        image.create_from_func(write, size)
        image.record.state = fields.LibvirtDiskState.READY
        return image

    def assert_whole(self, name, content):
        """Nothing but that, and zeroes behind it."""
        device = self._device(name)
        self.assertIsNone(device.room)
        found = device.read(0, device.length)
        self.assertEqual(content, found[:len(content)])
        self.assertEqual(b'', found[len(content):].strip(b'\0'))

    @ddt.data(True, False)
    def test_record_is_raw(self, use_cow_images):
        self.flags(use_cow_images=use_cow_images)
        for name in ('disk', 'disk.eph0', 'disk.config', 'disk.rescue'):
            self.assertEqual('raw', self._image(name).metadata(1).format)

    def test_image(self):
        self._create()
        self.assert_whole('disk', self.content)
        self.assertEqual(48 * MIB, self._device().length)

    def test_rescue(self):
        self._create('disk.rescue', None)
        self.assert_whole('disk.rescue', self.content)
        self.assertEqual(4 * MIB, self._device('disk.rescue').length)

    def test_image_that_libvirt_does_not_know(self):
        with mock.patch.object(self.image_class, '_find_base_volume',
                               return_value=None):
            self._create()
        self.assert_whole('disk', self.content)

    def test_image_of_qcow2(self):
        """libvirt converts it; what is in the clusters the fake doesn't."""
        self.content = libvirt_storage.qcow2_header(8 * MIB)
        self.base_info.file_format = 'qcow2'
        self.base_info.virtual_size = 8 * MIB
        self._create()
        device = self._device()
        self.assertEqual(b'', device.read(
            8 * MIB, device.length).strip(b'\0'))

    @ddt.data(('disk.config', None, 4), ('disk.swap', 9 * MIB, 12),
              ('disk.eph0', 16 * MIB, 16))
    @ddt.unpack
    def test_generated(self, name, size, expected):
        self._generate(name, b'generated', size)
        self.assert_whole(name, b'generated')
        self.assertEqual(expected * MIB, self._device(name).length)

    def test_unfinished_is_removed(self):
        fault = libvirt_storage.system_error('no', 5)
        with mock.patch.object(libvirt_storage.Stream, 'finish',
                               side_effect=[fault, None]):
            self.assertRaises(exception.StorageVolumeError, self._generate,
                              'disk.config', b'generated')
        self.assertEqual({}, self.group.devices)

    def test_group_is_full(self):
        self.group.capacity = 40 * MIB
        self.assertRaises(exception.InsufficientStoragePoolSpace,
                          self._create)
        self.assertEqual({}, self.group.devices)

    @mock.patch('nova.privsep.fs.lvextend', autospec=True)
    @mock.patch('nova.privsep.qemu.resize_image', autospec=True)
    def test_resize(self, mock_qemu_img, mock_extend):
        mock_extend.side_effect = lambda path, size, extents: (
            self.group.extend(os.path.basename(path), size, extents))
        self.stub_out('nova.privsep.fs.lvextents', lambda path: (
            self.group.extents(os.path.basename(path))))
        image = self._create()
        image.create_from_image(mock.sentinel.context, uuids.image, 64 * MIB)
        self.assertEqual(64 * MIB, image.get_disk_size(None))
        self.assert_whole('disk', self.content)
        mock_qemu_img.assert_not_called()
        # It is that large already.
        image.create_from_image(mock.sentinel.context, uuids.image, 64 * MIB)
        mock_extend.assert_called_once()

    @mock.patch('nova.privsep.storage.allocate', autospec=True)
    def test_nothing_is_preallocated(self, mock_allocate):
        self.flags(preallocate_images='space')
        self._create()
        mock_allocate.assert_not_called()

    @mock.patch.object(images, 'convert_image')
    def test_snapshot(self, mock_convert):
        self._create().snapshot_extract('/target', 'qcow2')
        args = mock_convert.call_args
        self.assertEqual(
            ('/dev/vg/%s_disk' % uuids.instance, '/target', 'raw', 'qcow2'),
            args.args)

    @ddt.data(('none', 'native'), ('directsync', 'native'),
              ('writeback', None))
    @ddt.unpack
    def test_guest(self, cache_mode, io):
        disk = self._create().libvirt_info(cache_mode, {})
        self.assertEqual(
            ('volume', 'vg-pool', '%s_disk' % uuids.instance, 'raw', io),
            (disk.source_type, disk.source_pool, disk.source_volume,
             disk.driver_format, disk.driver_io))

    def test_usage(self):
        self._create()
        disk = guest_config.LibvirtConfigGuestDisk()
        disk.source_pool = 'vg-pool'
        disk.source_volume = '%s_disk' % uuids.instance
        disk.driver_format = 'raw'
        info = usage.Volumes(lambda: self.conn, 'here').disk_info(disk)
        self.assertEqual(
            (48 * MIB, 48 * MIB, 0, ''),
            (info['virt_disk_size'], info['disk_size'],
             info['over_committed_disk_size'], info['backing_file']))

    def test_delete(self):
        self._create().delete()
        self.assertEqual({}, self.group.devices)
