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
import os
import subprocess
from unittest import mock

import ddt
import fixtures
from oslo_concurrency import processutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova.compute import task_states
import nova.conf
from nova import exception
from nova import objects
from nova.objects import fields
import nova.privsep.storage
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.unit.virt.libvirt import test_imagebackend
from nova.virt import images
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage import image as backend
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.pool import ownership as cleanup
from nova.virt.libvirt.storage.pool import pool
from nova.virt.libvirt.storage.pool import stream as upload
from nova.virt.libvirt.storage.pool import volume as storage_volume
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import lifecycle as records
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF

DISKS = 'nova-disks-pool'
BASE = 'nova-base-images-pool'


class Volume:
    """As much of a StorageVolume as the backend takes."""

    def __init__(self, pool, config, path):
        self.pool = pool
        self.name = config.name
        self.path = path
        # What libvirt takes it for
        self.seen = config
        self.length = config.capacity
        self.resized = []
        self.fault = None

    def config(self):
        return self.seen

    def info(self):
        return storage_volume.VolumeInfo(0, self.seen.capacity, 0)

    def physical(self):
        return self.length

    def resize(self, capacity, allocate=False):
        self.resized.append((capacity, allocate))
        self.seen.capacity = self.length = capacity

    def delete(self):
        if self.fault:
            raise self.fault
        self.pool.volumes_by_name.pop(self.name, None)


class Pool:
    """As much of a StoragePool as the backend takes."""

    def __init__(self, name, path):
        self.name = name
        self.host = 'here'
        self.path = path
        self.volumes_by_name = {}
        self.created = []
        self.refreshed = 0
        self.there = True
        self.busy = False

    def exists(self):
        return self.there

    def kind(self):
        return kinds.of_type('dir')

    def refresh(self, timeout=None):
        self.refreshed += 1
        self.timeout = timeout
        if self.busy and timeout == 0:
            raise exception.StoragePoolError(
                pool=self.name, host=self.host, code=1,
                reason='asynchronous jobs running')
        if not self.there:
            raise exception.StoragePoolNotFound(
                pool=self.name, host=self.host)
        for name in self.names_in_directory():
            if name not in self.volumes_by_name:
                self.add(name, 'raw')

    def add(self, name, target_format, capacity=512):
        config = storage_config.LibvirtConfigStorageVolume()
        config.name = name
        config.target_format = target_format
        config.capacity = capacity
        self.volumes_by_name[name] = Volume(
            self, config, os.path.join(self.path, name))
        return self.volumes_by_name[name]

    def file_names(self):
        return {*self.volumes_by_name, *self.names_in_directory()}

    def names_in_directory(self):
        return set(os.listdir(self.path) if os.path.exists(self.path) else ())

    def volumes(self):
        if not self.there:
            raise exception.StoragePoolNotFound(
                pool=self.name, host=self.host)
        return list(self.volumes_by_name.values())

    def volume(self, name):
        if name not in self.volumes_by_name:
            raise exception.StorageVolumeNotFound(
                volume=name, pool=self.name, host=self.host)
        return self.volumes_by_name[name]

    def create(self, config, source=None):
        if config.name in self.volumes_by_name:
            raise exception.StorageVolumeExists(
                volume=config.name, pool=self.name, host=self.host)
        self.created.append((config, source))
        volume = Volume(self, config, os.path.join(self.path, config.name))
        self.volumes_by_name[config.name] = volume
        return volume

    create_from = create
    free_name = pool.StoragePool.free_name


class StorageFixture(fixtures.Fixture):
    """The pools of a host."""

    def _setUp(self):
        path = os.path.join(CONF.instances_path, 'disks')
        self.pools = {
            DISKS: Pool(DISKS, path),
            BASE: Pool(BASE, os.path.join(CONF.instances_path, '_base')),
            'fast': Pool('fast', path),
        }
        self.useFixture(fixtures.MockPatchObject(
            pool, 'StoragePool', side_effect=self.get))
        self.useFixture(fixtures.MockPatchObject(
            pool, 'list_pools', return_value=[]))

    def get(self, conn, name, host):
        return self.pools[name]


class LibvirtStorageMixinTestCase(
        test_imagebackend._ImageTestCase, test.NoDBTestCase):
    """What upstream asks of every image backend."""

    SIZE = 1024

    def setUp(self):
        self.image_class = backend.LibvirtStorage.bound_to(mock.Mock)
        super().setUp()
        self.flags(storage_raw_files=True, group='libvirt')
        self.storage = self.useFixture(StorageFixture())

    def test_prealloc_image(self):
        # Blocks are allocated by libvirt, see LibvirtStorageTestCase.
        self.flags(preallocate_images='space')
        image = self.image_class(self.INSTANCE, self.NAME)
        self.assertTrue(image.preallocate)
        self.assertEqual('native', image.driver_io)

    def test_prealloc_image_without_write_access(self):
        self.flags(preallocate_images='space')
        image = self.image_class(self.INSTANCE, self.NAME)
        self.storage.pools[DISKS].add(
            '%s_%s' % (self.INSTANCE.uuid, self.NAME), 'raw', self.SIZE)
        with test.nested(
            mock.patch('os.access', return_value=False),
            mock.patch('nova.privsep.storage.allocate'),
            mock.patch('oslo_concurrency.processutils.execute'),
        ) as (mock_access, mock_allocate, mock_execute):
            image.create_from_image(self.CONTEXT, self.IMAGE_ID, self.SIZE)
        mock_allocate.assert_called_once_with(image.path, self.SIZE)
        mock_execute.assert_not_called()

    def test_get_disk_size(self):
        self.storage.pools[DISKS].add(
            '%s_%s' % (self.INSTANCE.uuid, self.NAME), 'raw', 2361393152)
        image = self.image_class(self.INSTANCE, self.NAME)
        self.assertEqual(2361393152, image.get_disk_size(image.path))


class ImageTestCase(test.NoDBTestCase):
    SIZE = units.Gi

    def setUp(self):
        super().setUp()
        self.flags(instances_path=self.useFixture(fixtures.TempDir()).path)
        self.storage = self.useFixture(StorageFixture())
        self.disks = self.storage.pools[DISKS]
        self.base_pool = self.storage.pools[BASE]
        self.connection = mock.Mock()
        self.image_class = backend.LibvirtStorage.bound_to(self.connection)
        self.instance = objects.Instance(
            uuid=uuids.instance, system_metadata={})
        self.fetch = self.useFixture(fixtures.MockPatchObject(
            libvirt_utils, 'fetch_image', side_effect=self._fetch)).mock
        self.upload = self.useFixture(fixtures.MockPatchObject(
            upload, 'upload_file')).mock
        self.useFixture(fixtures.MockPatch('nova.privsep.path.utime'))
        self.base_info = mock.Mock(
            file_format='raw', virtual_size=512, backing_file=None,
            format_specific=None)
        self.useFixture(fixtures.MockPatchObject(
            images, 'qemu_img_info', return_value=self.base_info))
        self.inspector = mock.Mock(__str__=lambda self: 'raw')
        self.useFixture(fixtures.MockPatchObject(
            images, 'get_image_format', return_value=self.inspector))

    @staticmethod
    def _fetch(target, **kwargs):
        open(target, 'w').close()

    def _image(self, name='disk', record=None):
        mapping = {'bus': 'virtio', 'dev': 'vda', 'type': 'disk'}
        if record is not None:
            mapping['metadata'] = record
        return self.image_class(
            self.instance, name, disk_info_mapping=mapping)

    def _new(self, name='disk', size=SIZE):
        """A disk that is about to be made, as the driver does it."""
        record = self._image(name).metadata(size)
        return self._image(name, record)

    def _made(self, name='disk', **kwargs):
        image = self._new(name)
        image.create_from_image(mock.sentinel.context, uuids.image, self.SIZE)
        image.record.state = fields.LibvirtDiskState.READY
        return image


@ddt.ddt
class ContainerTestCase(ImageTestCase):
    """New disks begin with bytes of ours."""

    def setUp(self):
        super().setUp()
        self.flags(use_cow_images=False)
        self.fill = self.useFixture(
            fixtures.MockPatch('nova.privsep.qemu.fill_image')).mock

    @ddt.data('disk', 'disk.rescue', 'disk.swap', 'disk.eph0', 'disk.local',
              'disk.config')
    def test_format(self, name):
        for use_cow_images in (True, False):
            self.flags(use_cow_images=use_cow_images)
            self.assertEqual('qcow2', self._image(name).metadata(1).format)

    def test_raw_files(self):
        self.flags(storage_raw_files=True, group='libvirt')
        self.assertEqual('raw', self._image().metadata(1).format)
        self.flags(use_cow_images=True)
        self.assertEqual('qcow2', self._image().metadata(1).format)
        self.assertEqual('raw', self._image('disk.swap').metadata(1).format)

    def test_record_wins(self):
        record = self._image().metadata(1)
        record.format = 'raw'
        self.assertEqual('raw', self._image(record=record).driver_format)

    def test_generated(self):
        image = self._new('disk.swap')

        def generate(target):
            with open(target, 'wb') as f:
                f.write(b'x' * 1000)

        image.create_from_func(generate, self.SIZE, cache_name='swap_1')
        [(config, source)] = self.disks.created
        self.assertIsNone(source)
        self.assertEqual(('qcow2', '1.1', self.SIZE), (
            config.target_format, config.compat, config.capacity))
        volume = self.disks.volume(image.volume_name)
        self.fill.assert_called_once_with(
            mock.ANY, 'raw', volume.path, 'qcow2')
        self.assertFalse(os.path.exists(self.fill.call_args.args[0]))
        self.upload.assert_not_called()

    def test_copy(self):
        self._made()
        [(config, source)] = self.disks.created
        self.assertEqual(self.base_pool, source.pool)
        self.assertEqual(('qcow2', '1.1', None), (
            config.target_format, config.compat, config.backing_store))
        self.fill.assert_not_called()

    def test_copy_without_libvirt(self):
        self.base_pool.busy = True
        image = self._made()
        self.fill.assert_called_once_with(
            self.fetch.call_args.kwargs['target'], 'raw',
            self.disks.volume(image.volume_name).path, 'qcow2')

    def test_reservation_of_what_has_come(self):
        """A copy has holes where the source had zeroes."""
        image = self._made()
        with mock.patch.object(image, '_preallocate') as mock_preallocate, (
                mock.patch.object(image, 'get_backing_file',
                                  return_value=None)):
            image.create_from_image(
                mock.sentinel.context, uuids.image, self.SIZE)
            image.create_from_func(mock.Mock(), self.SIZE)
            self.assertEqual([mock.call(self.SIZE)] * 2,
                             mock_preallocate.mock_calls)
            image.create_from_image(mock.sentinel.context, uuids.image, None)
            self.assertEqual(2, mock_preallocate.call_count)

    def test_fill_fails(self):
        self.base_pool.busy = True
        self.fill.side_effect = processutils.ProcessExecutionError
        self.assertRaises(processutils.ProcessExecutionError, self._made)
        self.assertEqual({}, self.disks.volumes_by_name)


@ddt.ddt
class LibvirtStorageTestCase(ImageTestCase):

    def setUp(self):
        super().setUp()
        self.flags(storage_raw_files=True, group='libvirt')

    def test_no_side_effects(self):
        self._image()
        pool.StoragePool.assert_not_called()
        self.connection.assert_not_called()
        self.assertEqual([], os.listdir(CONF.instances_path))

    @ddt.data(('disk', True, 'qcow2'), ('disk', False, 'raw'),
              ('disk.rescue', True, 'qcow2'), ('disk.swap', True, 'raw'),
              ('disk.eph0', True, 'raw'), ('disk.local', True, 'raw'),
              ('disk.config', True, 'raw'))
    @ddt.unpack
    def test_metadata(self, name, use_cow_images, disk_format):
        self.flags(use_cow_images=use_cow_images)
        record = self._image(name).metadata(self.SIZE)
        self.assertEqual('libvirt-storage', record.backend)
        self.assertEqual(disk_format, record.format)
        self.assertEqual(self.SIZE, record.size)
        self.assertEqual('building', record.state)
        self.assertEqual(CONF.host, record.host)
        self.assertEqual(DISKS, record.pool)
        self.assertEqual('%s_%s' % (uuids.instance, name), record.volume)

    def test_metadata_name_of_what_is_left(self):
        # Gone, and still on the list of what is to be deleted
        image = self._image()
        image.disk_info_mapping = {'taken': {'%s_disk' % uuids.instance}}
        self.assertEqual('%s_disk.1' % uuids.instance,
                         image.metadata(self.SIZE).volume)

    def test_metadata_mapped_pool(self):
        self.flags(group='libvirt', storage_pool_mapping={'swap': 'fast'})
        self.assertEqual('fast', self._image('disk.swap').metadata(1).pool)
        self.assertEqual(DISKS, self._image('disk').metadata(1).pool)

    def test_metadata_name_taken(self):
        wanted = '%s_disk' % uuids.instance
        self.disks.add(wanted, 'qcow2')
        self.disks.add(wanted + '.1', 'qcow2')
        self.assertEqual(
            wanted + '.2', self._image().metadata(self.SIZE).volume)

    def test_metadata_name_that_libvirt_does_not_know(self):
        """Another host, or one of another cell, has made it there."""
        wanted = '%s_disk' % uuids.instance
        self.disks.add(wanted, 'qcow2')
        os.makedirs(self.disks.path)
        open(os.path.join(self.disks.path, wanted + '.1'), 'w').close()
        self.assertEqual(
            wanted + '.2', self._image().metadata(self.SIZE).volume)
        self.assertEqual(0, self.disks.refreshed)

    def test_record_wins(self):
        self.flags(use_cow_images=True)
        self.flags(group='libvirt', storage_pool_mapping={'root': 'fast'})
        record = self._image().metadata(self.SIZE)
        record.format, record.pool, record.volume = 'raw', DISKS, 'other.1'
        info = self._image(record=record).libvirt_info('none', {})
        self.assertEqual('volume', info.source_type)
        self.assertEqual(DISKS, info.source_pool)
        self.assertEqual('other.1', info.source_volume)
        self.assertEqual('raw', info.driver_format)
        self.assertIsNone(info.source_path)
        # What the guest runs with says the same
        told = backend.record_of(info)
        self.assertEqual((DISKS, 'other.1', 'raw', 'libvirt-storage'), (
            told.pool, told.volume, told.format, told.backend))

    def test_exists(self):
        image = self._new()
        self.assertFalse(image.exists())
        self.assertIsNone(image.path)
        self.disks.add(image.volume_name, 'qcow2')
        # Somebody has begun to make it
        self.assertFalse(image.exists())
        image.record.state = fields.LibvirtDiskState.READY
        self.assertTrue(image.exists())
        self.assertEqual(
            os.path.join(self.disks.path, image.volume_name), image.path)

    def test_exists_made_by_another_host(self):
        # In a pool that both see. libvirt here has not looked there since.
        image = self._new()
        image.record.state = fields.LibvirtDiskState.READY
        os.makedirs(self.disks.path)
        self.assertFalse(image.exists())
        self.assertEqual(0, self.disks.refreshed)
        self._fetch(os.path.join(self.disks.path, image.volume_name))
        # As long as another server's disk may be copied
        self.disks.busy = True
        self.assertTrue(image.exists())
        self.assertEqual(1, self.disks.refreshed)
        self.assertGreater(self.disks.timeout, 3600)
        self.assertTrue(image.exists())
        self.assertEqual(1, self.disks.refreshed)

    def test_create_overlay(self):
        self.flags(use_cow_images=True)
        self._made()
        [(config, source)] = self.disks.created
        base = self.fetch.call_args.kwargs['target']
        self.assertIsNone(source)
        self.assertEqual('qcow2', config.target_format)
        self.assertEqual('1.1', config.compat)
        self.assertEqual(self.SIZE, config.capacity)
        self.assertEqual(0, config.allocation)
        self.assertEqual(base, config.backing_store.path)
        self.assertEqual('raw', config.backing_store.format)
        # The base pool learns of the image
        self.assertEqual(1, self.base_pool.refreshed)

    def test_made_private(self):
        """As another file: who has the one before open reads no more."""
        image = self._made()
        before = self.disks.volume(image.volume_name)
        image.make_private('/base', 'raw', self.SIZE)
        self.assertIsNot(before, self.disks.volume(image.volume_name))
        (_old, _none), (config, source) = self.disks.created
        self.assertIsNone(source)
        self.assertEqual((image.volume_name, 'qcow2', '1.1', self.SIZE, 0), (
            config.name, config.target_format, config.compat,
            config.capacity, config.allocation))
        self.assertEqual(('/base', 'raw'), (
            config.backing_store.path, config.backing_store.format))
        self.assertEqual((0o600, os.geteuid(), os.getegid()), (
            config.permissions.mode, config.permissions.owner,
            config.permissions.group))

    def test_create_overlay_preallocate(self):
        self.flags(use_cow_images=True, preallocate_images='space')
        with mock.patch.object(self.image_class, '_preallocate') as mock_pre:
            self._made()
        mock_pre.assert_called_once_with(self.SIZE)

    def test_create_overlay_no_pool_over_the_cache(self):
        # The overlay needs the file, not the volume
        self.flags(use_cow_images=True)
        self.base_pool.there = False
        self._made()
        self.assertEqual(1, len(self.disks.created))

    @ddt.data('none', 'space')
    def test_create_copy(self, preallocate):
        self.flags(use_cow_images=False, preallocate_images=preallocate)
        self._made()
        [(config, source)] = self.disks.created
        self.assertEqual('raw', config.target_format)
        self.assertEqual(self.SIZE if preallocate == 'space' else 0,
                         config.allocation)
        self.assertEqual(self.base_pool, source.pool)
        self.upload.assert_not_called()

    def test_create_copy_libvirt_disagrees(self):
        # An ISO is raw to qemu: libvirt must not be asked to convert it
        self.flags(use_cow_images=False)
        image = self._new()
        base = image._get_cached_path('base')
        self._fetch(base)
        self.base_pool.add('base', 'iso')
        with mock.patch.object(self.image_class, 'ensure_image_cached',
                               return_value=base):
            image.create_from_image(
                mock.sentinel.context, uuids.image, self.SIZE)
        [(config, source)] = self.disks.created
        self.assertIsNone(source)
        self.upload.assert_called_once_with(
            self.disks.volume(image.volume_name), base, sparse=True)

    def test_create_copy_of_unknown_base(self):
        # Somebody has put the image there and not told libvirt
        self.flags(use_cow_images=False)
        image = self._new()
        base = image._get_cached_path('base')
        self._fetch(base)
        with mock.patch.object(self.image_class, 'ensure_image_cached',
                               return_value=base):
            image.create_from_image(
                mock.sentinel.context, uuids.image, self.SIZE)
        self.assertEqual(1, self.base_pool.refreshed)
        self.assertEqual('base', self.disks.created[0][1].name)

    @ddt.data('busy', 'off', 'gone')
    def test_create_copy_while_base_pool_is(self, state):
        """While the image of another server is copied, say."""
        self.flags(use_cow_images=False)
        self.base_pool.busy = state == 'busy'
        self.base_pool.there = state != 'gone'
        if state == 'off':
            self.base_pool.volume = mock.Mock(
                side_effect=exception.StoragePoolInactive(
                    pool=BASE, host='here'))
        image = self._made()
        [(config, source)] = self.disks.created
        self.assertIsNone(source)
        self.upload.assert_called_once_with(
            self.disks.volume(image.volume_name),
            self.fetch.call_args.kwargs['target'], sparse=True)

    def test_create_unsafe_base(self):
        self.base_info.backing_file = '/etc/shadow'
        self.assertRaises(exception.InvalidDiskInfo, self._made)
        self.base_info.backing_file = None
        self.base_info.format_specific = {'data': {'data-file': '/etc/shadow'}}
        self.assertRaises(exception.InvalidDiskInfo, self._made)
        self.assertEqual([], self.disks.created)

    def test_create_too_small(self):
        self.base_info.virtual_size = self.SIZE + 1
        self.assertRaises(exception.FlavorDiskSmallerThanImage, self._made)
        self.assertEqual([], self.disks.created)

    def test_create_over_what_this_host_has_not_begun(self):
        """It was not there when the name was chosen, or not to be seen."""
        image = self._new()
        there = self.disks.add(image.volume_name, 'raw')
        self.assertRaises(
            exception.StorageVolumeExists, image.create_from_image,
            mock.sentinel.context, uuids.image, self.SIZE)
        self.assertRaises(
            exception.StorageVolumeExists, image.create_from_func,
            self._fetch, self.SIZE)
        self.assertIs(there, self.disks.volume(image.volume_name))

    def test_create_from_image_exists(self):
        image = self._made()
        self.fetch.reset_mock()
        base = image._get_cached_path(imagecache.get_cache_fname(uuids.image))
        os.unlink(base)
        with self._over(base):
            image.create_from_image(
                mock.sentinel.context, uuids.image, 2 * self.SIZE)
        # Its backing file and its size, but no second disk
        self.fetch.assert_called_once()
        self.assertEqual(1, len(self.disks.created))
        self.assertEqual([(2 * self.SIZE, False)],
                         self.disks.volume(image.volume_name).resized)

    @ddt.data('another', None)
    def test_create_from_image_exists_without_that_base(self, name):
        # It was unshelved: its image may be gone from Glance by now.
        image = self._made()
        self.fetch.reset_mock()
        with self._over(name and image._get_cached_path(name)):
            image.create_from_image(
                mock.sentinel.context, uuids.other_image, 2 * self.SIZE)
        self.fetch.assert_not_called()
        self.assertEqual([(2 * self.SIZE, False)],
                         self.disks.volume(image.volume_name).resized)

    @ddt.data(('_base', 'raw', False), ('_base', 'qcow2', True),
              ('_base', None, True), ('elsewhere', 'raw', True))
    @ddt.unpack
    def test_create_from_image_exists_over_it(
            self, directory, base_format, is_rewritten):
        """In a pool that hosts share; another one has made the overlay.

        :param base_format: of the base image there
        """
        image = self._made()
        base = image._get_cached_path(
            imagecache.get_cache_fname(uuids.image))
        with self._over(base.replace('_base', directory), base_format), \
                mock.patch.object(image_cache, 'checked_base',
                                  side_effect=lambda path: path), \
                mock.patch('nova.privsep.qemu.rewrite_backing_file') as (
                    rewrite):
            image.create_from_image(
                mock.sentinel.context, uuids.image, 2 * self.SIZE)
        self.assertEqual(
            [mock.call(image.path, 'qcow2', base, 'raw')]
            if is_rewritten else [], rewrite.mock_calls)
        self.assertEqual(is_rewritten, self.disks.refreshed == 1)

    def _over(self, base, base_format='raw'):
        return mock.patch.object(
            content, 'look_at_qcow2', return_value=mock.Mock(
                backing_file=base, backing_file_format=base_format))

    @mock.patch('nova.privsep.qemu.flatten_image')
    def test_flatten(self, mock_flatten):
        self.flags(use_cow_images=True)
        image = self._made()
        with self._over(image._get_cached_path('snapshot')):
            image.flatten()
        mock_flatten.assert_called_once_with(image.path, 'qcow2')

    @mock.patch('nova.privsep.qemu.flatten_image')
    def test_flatten_what_is_flat(self, mock_flatten):
        self.flags(use_cow_images=False)
        self._made().flatten()
        self.flags(use_cow_images=True)
        image = self._new('disk.rescue')
        image.create_from_image(mock.sentinel.context, uuids.image, self.SIZE)
        with self._over(None):
            image.flatten()
        mock_flatten.assert_not_called()

    @mock.patch('nova.privsep.qemu.flatten_image')
    def test_flatten_over_something_foreign(self, mock_flatten):
        self.flags(use_cow_images=True)
        image = self._made()
        with self._over('/etc/shadow'):
            self.assertRaises(exception.InvalidDiskInfo, image.flatten)
        mock_flatten.assert_not_called()

    def _generate(self, target):
        self.generated = target
        with open(target, 'w') as f:
            f.truncate(4096)

    @ddt.data((8192, 8192), (None, 4096))
    @ddt.unpack
    def test_create_from_func(self, size, capacity):
        image = self._new('disk.swap')
        image.create_from_func(self._generate, size, cache_name='swap_1')
        [(config, source)] = self.disks.created
        self.assertEqual('raw', config.target_format)
        self.assertEqual(capacity, config.capacity)
        self.upload.assert_called_once_with(
            self.disks.volume(image.volume_name), self.generated, sparse=True)
        self.assertFalse(os.path.exists(self.generated))

    def test_create_from_func_upload_fails(self):
        self.upload.side_effect = exception.StorageVolumeUploadFailed(
            pool=DISKS, volume='v', host='here', path='p', reason='full')
        image = self._new('disk.swap')
        self.assertRaises(exception.StorageVolumeUploadFailed,
                          image.create_from_func, self._generate, 4096)
        self.assertEqual({}, self.disks.volumes_by_name)
        self.assertFalse(os.path.exists(self.generated))

    def test_create_from_func_exists(self):
        image = self._new('disk.swap')
        self.disks.add(image.volume_name, 'raw', 4096)
        image.record.state = fields.LibvirtDiskState.READY
        func = mock.Mock()
        image.create_from_func(func, 4096)
        func.assert_not_called()

    def test_size_of_an_overlay_that_libvirt_takes_for_raw(self):
        """As one is that has come over NBD, until the pool is refreshed."""
        image = self._new()
        self.disks.add(image.volume_name, 'raw', self.SIZE)
        with mock.patch('nova.virt.libvirt.storage.content.look_at_qcow2',
                        return_value=mock.Mock(virtual_size=7)) as look:
            self.assertEqual(7, image.get_disk_size(None))
        look.assert_called_once_with(image.path)

    def _hostile(self, seen='qcow2', encryption=None):
        """A raw disk with a header which its guest has written."""
        self.flags(use_cow_images=False)
        image = self._new()
        volume = self.disks.add(image.volume_name, seen, 8 * self.SIZE)
        volume.length = self.SIZE
        volume.seen.encryption = encryption
        volume.seen.backing_store = mock.Mock(path='/etc/shadow')
        image.record.state = fields.LibvirtDiskState.READY
        return image, volume

    @ddt.data(('qcow2', None), ('vmdk', None), ('ploop', None),
              ('raw', mock.Mock(format='luks')))
    @ddt.unpack
    def test_resize_hostile(self, seen, encryption):
        image, volume = self._hostile(seen, encryption)
        self.assertEqual(self.SIZE, image.get_disk_size(None))
        with mock.patch('nova.privsep.qemu.resize_image') as mock_resize:
            image.resize_image(2 * self.SIZE)
        mock_resize.assert_called_once_with(
            volume.path, 'raw', 2 * self.SIZE)
        self.assertEqual([], volume.resized)

    @mock.patch('nova.privsep.storage.allocate')
    def test_resize(self, mock_allocate):
        self.flags(use_cow_images=True, preallocate_images='space')
        image = self._made()
        image.resize_image(2 * self.SIZE)
        self.assertEqual([mock.call(image.path, self.SIZE),
                          mock.call(image.path, 2 * self.SIZE)],
                         mock_allocate.mock_calls)
        self.assertEqual([(2 * self.SIZE, False)],
                         self.disks.volume(image.volume_name).resized)

    @mock.patch('nova.privsep.storage.allocate')
    def test_preallocate_what_nova_can_not_write(self, mock_allocate):
        self.flags(use_cow_images=True, preallocate_images='space')
        with mock.patch('os.access', return_value=False):
            image = self._made()
        mock_allocate.assert_called_once_with(image.path, self.SIZE)

    @mock.patch('nova.privsep.storage.allocate')
    def test_preallocate_each_disk_anew(self, mock_allocate):
        """What one pool's file system can't do another's may."""
        self.flags(use_cow_images=True, preallocate_images='space')
        mock_allocate.side_effect = processutils.ProcessExecutionError(
            stderr='fallocate failed: Operation not supported')
        image = self._made()
        image._preallocate(self.SIZE)
        self.assertEqual(2, mock_allocate.call_count)
        self.assertIn('%s of storage pool %s is not preallocated' % (
            image.volume_name, DISKS), self.stdlog.logger.output)

    @mock.patch('nova.privsep.storage.allocate')
    def test_preallocate_in_a_full_pool(self, mock_allocate):
        self.flags(use_cow_images=True, preallocate_images='space')
        mock_allocate.side_effect = processutils.ProcessExecutionError(
            stderr='fallocate failed: No space left on device')
        self.assertRaises(processutils.ProcessExecutionError, self._made)
        self.assertEqual({}, self.disks.volumes_by_name)

    @mock.patch('nova.privsep.qemu.resize_image')
    @mock.patch.object(backend.disk_api, 'is_image_extendable')
    def test_file_system_that_nova_can_not_write(
            self, mock_extendable, mock_resize):
        self.flags(use_cow_images=False)
        image = self._made()
        with mock.patch('os.access', return_value=False):
            image.resize_image(2 * self.SIZE)
        mock_resize.assert_called_once_with(
            image.path, 'raw', 2 * self.SIZE)
        mock_extendable.assert_not_called()
        self.assertIn('can not write to %s' % image.path,
                      self.stdlog.logger.output)

    @mock.patch('nova.privsep.qemu.resize_image')
    def test_resize_what_libvirt_disagrees_about(self, mock_resize):
        self.flags(use_cow_images=True)
        image = self._made()
        volume = self.disks.volume(image.volume_name)
        volume.seen.target_format = 'raw'
        image.resize_image(2 * self.SIZE)
        mock_resize.assert_called_once_with(
            volume.path, 'qcow2', 2 * self.SIZE)
        self.assertIn('not acted upon', self.stdlog.logger.output)

    @mock.patch.object(images, 'convert_image')
    def test_libvirt_looks_into_no_raw_disk(self, mock_convert):
        """It may fail to, or open what the guest has named there."""
        image, volume = self._hostile()
        volume.config = volume.info = mock.Mock(side_effect=AssertionError)
        with mock.patch('nova.privsep.qemu.resize_image'):
            image.create_from_image(
                mock.sentinel.context, uuids.image, 2 * self.SIZE)
        image.snapshot_extract('/target', 'qcow2')
        image.flatten()
        self.assertTrue(image.exists())
        self.assertEqual(0, self.disks.refreshed)
        image.delete()

    @mock.patch.object(images, 'convert_image')
    @mock.patch.object(images, 'privileged_qemu_img_info')
    def test_snapshot_extract_hostile(self, mock_info, mock_convert):
        image, volume = self._hostile()
        image.snapshot_extract('/target', 'qcow2')
        mock_info.assert_not_called()
        self.assertEqual(
            (volume.path, '/target', 'raw', 'qcow2'),
            mock_convert.call_args.args)

    @mock.patch.object(images, 'convert_image')
    @mock.patch('nova.privsep.storage.read_start')
    def test_snapshot_extract_data_file(self, mock_read, mock_convert):
        """A QEMU that was broken into has written the header."""
        image = self._made()
        path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'disk')
        subprocess.run(
            ['qemu-img', 'create', '-q', '-f', 'qcow2', '-o',
             'data_file=%s,data_file_raw=on' % (path + '.data'), path, '1M'],
            check=True)
        with open(path, 'rb') as f:
            mock_read.return_value = f.read(4096)
        e = self.assertRaises(exception.UnsafeDiskContent,
                              image.snapshot_extract, '/target', 'raw')
        self.assertIn('data_file', str(e))
        mock_convert.assert_not_called()

    @mock.patch.object(images, 'convert_image')
    @mock.patch.object(content, 'look_at_qcow2')
    def test_snapshot_extract_backing_file(self, mock_info, mock_convert):
        image = self._made()
        mock_info.return_value.backing_file = image._get_cached_path('base')
        image.snapshot_extract('/target', 'raw')
        mock_info.assert_called_once_with(image.path)
        mock_convert.assert_called_once()

        mock_info.return_value.backing_file = '/etc/shadow'
        e = self.assertRaises(exception.BaseImageMisplaced,
                              image.snapshot_extract, '/target', 'raw')
        self.assertIn('/etc/shadow', str(e))
        self.assertIn('/etc/shadow', self.stdlog.logger.output)
        mock_convert.assert_called_once()

    def test_shared_nothing(self):
        self.assertFalse(self.image_class.is_shared_block_storage())
        self.assertFalse(self.image_class.is_file_in_instance_path())

    def test_get_model(self):
        image = self._made()
        model = image.get_model(None)
        self.assertEqual((image.path, 'qcow2'), (model.path, model.format))

    def test_delete(self):
        image = self._made()
        image.delete()
        self.assertEqual({}, self.disks.volumes_by_name)
        image.delete()


class AllocateTestCase(test.NoDBTestCase):
    """What fallocate(1) is asked for; ext4 gives all that it has."""

    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'disk')
        with open(self.path, 'wb') as f:
            os.posix_fallocate(f.fileno(), 0, 1 << 20)
        self.execute = self.useFixture(fixtures.MockPatch(
            'oslo_concurrency.processutils.execute')).mock
        self.useFixture(fixtures.MockPatch(
            'os.statvfs', return_value=mock.Mock(
                f_bavail=256, f_frsize=4096)))

    def test_room(self):
        # 1 MiB is there, and 1 MiB is free
        nova.privsep.storage.allocate(self.path, 2 << 20)
        self.assertEqual(2 << 20, self.execute.call_args.args[3])

    def test_no_room(self):
        e = self.assertRaises(
            processutils.ProcessExecutionError,
            nova.privsep.storage.allocate, self.path, (2 << 20) + 4097)
        self.assertIn('No space left', e.stderr)
        self.execute.assert_not_called()


@ddt.ddt
class EvacuationTestCase(test.NoDBTestCase):
    """This host has had the instance before: 'here', then 'there'."""

    def setUp(self):
        super().setUp()
        self.flags(host='here',
                   instances_path=self.useFixture(fixtures.TempDir()).path)
        self.flags(images_type='libvirt-storage', group='libvirt')
        self.storage = self.useFixture(StorageFixture())
        self.disks = self.storage.pools[DISKS]
        os.makedirs(self.disks.path)
        self.image_class = backend.LibvirtStorage.bound_to(mock.Mock())
        self.old = '%s_disk' % uuids.instance
        self.disks.add(self.old, 'raw')
        self.instance = objects.Instance(
            uuid=uuids.instance, system_metadata={},
            task_state=task_states.REBUILD_SPAWNING,
            flavor=objects.Flavor(root_gb=1, ephemeral_gb=0, swap=0))
        self.instance.save = mock.Mock()
        self.records = metadata.InstanceDisks.from_bdms(self.instance, [
            objects.BlockDeviceMapping(
                id=1, uuid=uuids.root, instance_uuid=uuids.instance,
                source_type='image', destination_type='local', boot_index=0,
                driver_info=None)])

    def _move(self, volume, kept, state='ready'):
        """Record a disk on the other host.

        :param kept: Why the old one is still here.
        """
        record = metadata.LibvirtDiskMetadata(
            backend='libvirt-storage', format='raw', size=units.Gi,
            state=state, host='there', pool=DISKS, volume=volume)
        if kept == 'not confirmed':
            record.previous = record.obj_clone()
            record.previous.host, record.previous.volume = 'here', self.old
            record.previous.state = 'ready'
        else:
            leftovers.note(self.records, 'here', [(DISKS, self.old)])
        self.records.set('disk', record)

    def _has_volumes(self):
        return cleanup.has_volumes(
            None, uuids.instance,
            evacuation.old_copies(self.instance, self.records))

    def _begin(self):
        """Evacuate to this host.

        :return: The record of the disk.
        """
        stale = evacuation.after_evacuation(self.instance, self.records)
        records.begin(
            self.records, {'disk': {}}, None,
            lambda name, mapping: self.image_class(
                self.instance, name, disk_info_mapping=mapping),
            'libvirt-storage', {}, stale=stale)
        self.assertIsNone(self.records.get('disk').previous)
        return self.records.get('disk')

    @ddt.data('not confirmed', 'not deleted')
    def test_distinct_pools(self, kept):
        self._move(self.old, kept)
        self.assertFalse(self._has_volumes())
        record = self._begin()
        # Made anew, beside what is kept
        self.assertEqual(('building', 'here', self.old + '.1'),
                         (record.state, record.host, record.volume))
        self.assertIn(self.old, self.disks.volumes_by_name)
        self.assertEqual([(DISKS, self.old)],
                         leftovers.on_host(self.records, 'here'))

    @ddt.data('not confirmed', 'not deleted')
    def test_shared_pool(self, kept):
        new = self.old + '.1'
        open(os.path.join(self.disks.path, new), 'w').close()
        self._move(new, kept)
        self.assertTrue(self._has_volumes())
        record = self._begin()
        self.assertEqual(('ready', 'here', new),
                         (record.state, record.host, record.volume))
        self.assertEqual([(DISKS, self.old)],
                         leftovers.on_host(self.records, 'here'))

    @ddt.data('', '.1')
    def test_never_arrived(self, suffix):
        # The other host hasn't found it whole, so this is still the disk.
        self._move(self.old + suffix, 'not confirmed', 'building')
        self.assertTrue(self._has_volumes())
        record = self._begin()
        self.assertEqual(('ready', 'here', self.old),
                         (record.state, record.host, record.volume))
        self.assertEqual([], leftovers.on_host(self.records, 'here'))


@ddt.ddt
class UploadTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fakelibvirt.LibvirtModuleFixture())
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'file')
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.flags(host='here')
        self.volume = mock.MagicMock()
        self.volume.name = 'vol'
        self.volume.path = self.path + '.volume'
        self.volume.pool.name, self.volume.pool.host = 'disks', 'here'
        self.version = self.volume.raw.connect.return_value.getLibVersion
        self.version.return_value = 9_000_000
        self.volume.libvirt_errors.return_value.__exit__.return_value = False
        self.stream = (
            self.volume.raw.connect.return_value.newStream.return_value)
        self.sent = []

    def _sparse_send_all(self, read, next_section, skip, fd):
        # As libvirt-python does it
        while True:
            is_data, length = next_section(self.stream, fd)
            self.sent.append((is_data, length))
            if not is_data:
                self.assertGreaterEqual(skip(self.stream, length, fd), 0)
                if not length:
                    return
            while is_data and length:
                length -= len(read(self.stream, min(length, 65536), fd))

    def test_sparse(self):
        with open(self.path, 'wb') as f:
            f.seek(units.Mi)
            f.write(b'x' * units.Mi)
            f.truncate(4 * units.Mi)
        self.stream.sparseSendAll.side_effect = self._sparse_send_all
        upload.upload_file(self.volume, self.path)
        self.volume.raw.upload.assert_called_once_with(
            self.stream, 0, 4 * units.Mi, 1)
        self.assertEqual(
            [(False, units.Mi), (True, units.Mi), (False, 2 * units.Mi),
             (False, 0)], self.sent)
        self.stream.finish.assert_called_once_with()
        self.stream.abort.assert_not_called()

    def test_too_few_bytes(self):
        with open(self.path, 'wb') as f:
            f.write(b'x' * 100)
        self.stream.sendAll.side_effect = (
            lambda read, fd: read(self.stream, 99, fd))
        e = self.assertRaises(
            exception.StorageVolumeUploadFailed,
            upload.upload_file, self.volume, self.path, sparse=False)
        self.assertIn('99 of 100 bytes', str(e))
        self.stream.finish.assert_not_called()
        self.stream.abort.assert_called_once_with()

    def test_no_file(self):
        self.assertRaises(exception.StorageVolumeUploadFailed,
                          upload.upload_file, self.volume, self.path)

    def write(self, sparse):
        self.version.return_value = 11_003_000
        with open(self.path, 'wb') as f:
            f.seek(2 * units.Mi)
            f.write(b'x' * units.Mi)
        with open(self.volume.path, 'wb') as f:
            f.truncate(4 * units.Mi)
        inode = os.stat(self.volume.path).st_ino
        upload.upload_file(self.volume, self.path, sparse)
        self.volume.raw.upload.assert_not_called()
        with open(self.volume.path, 'rb') as f:
            self.assertEqual(bytes(2 * units.Mi) + b'x' * units.Mi +
                             bytes(units.Mi), f.read())
        found = os.stat(self.volume.path)
        self.assertEqual(inode, found.st_ino)
        return found.st_blocks * 512

    def test_without_libvirt_where_a_full_disk_ends_it(self):
        self.assertLess(self.write(sparse=True), 2 * units.Mi)

    def test_without_libvirt_and_holes(self):
        self.assertGreaterEqual(self.write(sparse=False), 3 * units.Mi)

    @ddt.data(('No space left on device',
               exception.InsufficientStoragePoolSpace),
              ('Input/output error', exception.StorageVolumeUploadFailed))
    @ddt.unpack
    def test_file_that_can_not_be_written(self, stderr, error):
        self.version.return_value = 11_003_000
        with mock.patch('nova.privsep.storage.write_over', side_effect=(
                processutils.ProcessExecutionError(stderr=stderr))):
            e = self.assertRaises(error, upload.upload_file, self.volume,
                                  self.path)
        for text in (stderr, 'disks', 'vol', 'here'):
            self.assertIn(text, str(e))

    @ddt.data('host', 'block device')
    def test_by_libvirt_where_no_file_of_this_host_is_written(self, what):
        self.version.return_value = 11_003_000
        if what == 'host':
            self.volume.pool.host = 'there'
        else:
            self.volume.pool.kind.return_value.sparse = False
        with open(self.path, 'wb') as f:
            f.write(b'x')
        self.stream.sendAll.side_effect = (
            lambda read, fd: read(self.stream, 1, fd))
        upload.upload_file(self.volume, self.path, sparse=False)
        self.stream.finish.assert_called_once_with()


class GuestDiskTestCase(test.NoDBTestCase):

    def test_find_disk(self):
        guest = mock.Mock()
        disk = vconfig.LibvirtConfigGuestDisk()
        disk.source_type = 'volume'
        disk.source_pool, disk.source_volume = DISKS, 'it_disk'
        disk.driver_format, disk.target_dev = 'qcow2', 'vda'
        guest.get_config.return_value = mock.Mock(
            virt_type='kvm', devices=[disk])
        # As LocalDisks.pool_disk() expects it
        self.assertEqual(('vda', 'qcow2'), libvirt_utils.find_disk(guest))
        self.assertIsNone(libvirt_utils.get_disk_type_from_path('vda'))
