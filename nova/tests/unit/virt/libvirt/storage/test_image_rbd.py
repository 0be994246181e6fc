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
"""Disks that are images of a Ceph pool."""

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
from nova.tests.fixtures import ceph
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt import images
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import api
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import image_rbd
from nova.virt.libvirt.storage.move import offer
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import lifecycle
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF

RBD = fields.LibvirtDiskBackend.LIBVIRT_STORAGE_RBD
MIB = units.Mi


class RbdDiskTestCase(base.PoolsTestCase):

    def setUp(self):
        super().setUp()
        path = self.useFixture(fixtures.TempDir()).path
        self.flags(instances_path=path, state_path=path)
        self.flags(group='libvirt', storage_disks_pool='ceph',
                   images_type='libvirt-storage',
                   storage_pool_mapping={'swap': 'files'},
                   rbd_destroy_volume_retries=1,
                   rbd_destroy_volume_retry_interval=0)
        self.useFixture(fixtures.MockPatch('nova.privsep.path.utime'))
        self.ceph = self.useFixture(ceph.CephFixture()).cluster
        self.images = self.ceph.pools['nova']
        self.conn.secretDefineXML(
            "<secret ephemeral='no' private='no'><uuid>%s</uuid></secret>" %
            base.SECRET).setValue(b'a key')
        self.raw = self.add_pool('ceph', kind='rbd')
        self.add_pool('files')
        self.add_pool('nova-base-images-pool',
                      os.path.join(path, '_base'))
        self.backends = imagebackend.Backend(True)
        self.backends.BACKEND.update(
            image_rbd.bound_to(lambda: self.conn))
        self.instance = objects.Instance(
            uuid=uuids.instance, host='here', task_state='spawning',
            system_metadata={}, migration_context=None)
        self.in_glance = ceph.StoredImage(20 * MIB, b'image')
        self.in_glance.snapshots['snap'] = ceph.Snapshot(b'image', 20 * MIB)
        self.in_glance.snapshots['snap'].protected = True
        self.ceph.pools['images'][uuids.image] = self.in_glance
        self.glance = self.useFixture(fixtures.MockPatchObject(
            imagebackend, 'IMAGE_API')).mock
        self.meta = {'id': uuids.image, 'disk_format': 'raw', 'locations': [
            {'url': 'rbd://%s/images/%s/snap' % (
                self.ceph.fsid, uuids.image)}]}
        self.glance.get.return_value = self.meta
        self.fetched = []
        self.stub_out('nova.virt.libvirt.utils.fetch_image', self._fetch)

    def _fetch(self, target, **kwargs):
        self.fetched.append(target)
        with open(target, 'wb') as f:
            f.write(b'image')

    def image(self, name='disk', record=None):
        mapping = {'bus': 'virtio', 'dev': 'vda', 'type': 'disk'}
        if record is not None:
            mapping['metadata'] = record
        return self.backends.by_name(
            self.instance, name, disk_info_mapping=mapping)

    def new(self, name='disk', size=48 * MIB):
        return self.image(name, self.image(name).metadata(size))

    def create(self, size=48 * MIB):
        made = self.new()
        made.create_from_image(mock.sentinel.context, uuids.image, size)
        made.record.state = fields.LibvirtDiskState.READY
        return made

    @property
    def disk(self):
        return self.images['%s_disk' % uuids.instance]


class WhichTestCase(RbdDiskTestCase):

    def test_new_disk_is_what_its_pool_is(self):
        self.assertIsInstance(self.image(), image_rbd.LibvirtStorageRbd)
        swap = self.image('disk.swap')
        self.assertIsInstance(swap, image.LibvirtStorage)
        self.assertNotIsInstance(swap, image_rbd.LibvirtStorageRbd)

    def test_disk_is_what_is_on_record(self):
        record = self.image().metadata(MIB)
        self.assertEqual(
            (RBD, 'raw', 'ceph', '%s_disk' % uuids.instance, 'building'),
            (record.backend, record.format, record.pool, record.volume,
             record.state))
        self.flags(group='libvirt', storage_disks_pool='files')
        self.assertIsInstance(self.image(record=record),
                              image_rbd.LibvirtStorageRbd)
        record.backend = fields.LibvirtDiskBackend.LIBVIRT_STORAGE
        self.flags(group='libvirt', storage_disks_pool='ceph')
        self.assertNotIsInstance(self.image(record=record),
                                 image_rbd.LibvirtStorageRbd)

    def test_pool_that_is_not_there(self):
        self.flags(group='libvirt', storage_disks_pool='nowhere')
        self.assertNotIsInstance(self.image(), image_rbd.LibvirtStorageRbd)

    def test_constructor_asks_nobody(self):
        record = self.image().metadata(MIB)
        self.ceph.answers = False
        self.ceph.opened.clear()
        self.image(record=record)
        self.assertEqual([], self.ceph.opened)

    def test_name_is_taken(self):
        self.images['%s_disk' % uuids.instance] = ceph.StoredImage(1)
        self.assertEqual('%s_disk.1' % uuids.instance,
                         self.image().metadata(MIB).volume)

    def test_evacuated_without_a_record(self):
        """A new disk would be an empty one."""
        self.images['%s_disk' % uuids.instance] = ceph.StoredImage(1)
        self.instance.task_state = 'rebuild_spawning'
        self.instance.host = 'there'
        record = self.image().metadata(MIB)
        self.assertEqual(('%s_disk' % uuids.instance, 'ready'),
                         (record.volume, record.state))

    def test_sent_without_a_record(self):
        """By a compute from before, over the same Ceph pool."""
        self.images['%s_disk' % uuids.instance] = ceph.StoredImage(1)
        for task, host, records, expected in (
                ('resize_finish', 'here', False, ('', 'ready')),
                ('resize_finish', 'here', True, ('.1', 'building')),
                # It is another cell's, and sent by way of Glance.
                ('resize_finish', 'there', False, ('.1', 'building')),
                ('spawning', 'here', False, ('.1', 'building'))):
            self.instance.task_state, self.instance.host = task, host
            self.instance.hidden = host == 'there'
            self.instance.system_metadata = {}
            self.instance.flavor = objects.Flavor(
                root_gb=1, ephemeral_gb=0, swap=0)
            disks = metadata.InstanceDisks(self.instance, {}, mock.Mock(
                driver_info=None))
            if records:
                disks.set('disk.swap', self.image().metadata(MIB))
            lifecycle.begin(
                disks, {'disk': {}}, None, lambda name, mapping:
                self.backends.by_name(self.instance, name,
                                      disk_info_mapping=mapping), None, {})
            record = disks.get('disk')
            self.assertEqual(
                ('%s_disk%s' % (uuids.instance, expected[0]), expected[1]),
                (record.volume, record.state))

    def test_evacuated_after_it_was_copied_elsewhere(self):
        """What lies there is what the disk was before a move."""
        name = '%s_disk' % uuids.instance
        self.images[name] = ceph.StoredImage(1)
        self.instance.task_state = 'rebuild_spawning'
        record = self.backends.by_name(
            self.instance, 'disk', disk_info_mapping={'taken': {name}}
        ).metadata(MIB)
        self.assertEqual((name + '.1', 'building'),
                         (record.volume, record.state))


@ddt.ddt
class RebuildTestCase(RbdDiskTestCase):

    def setUp(self):
        super().setUp()
        self.stub_out(
            'nova.objects.BlockDeviceMappingList._save_driver_info',
            lambda *args: None)
        # It is no evacuation.
        self.stub_out('nova.objects.MigrationList.get_by_filters',
                      lambda *args: [])
        self.bdm = objects.BlockDeviceMapping(
            id=1, uuid=uuids.bdm, instance_uuid=uuids.instance,
            source_type='image', destination_type='local', boot_index=0,
            guest_format=None, driver_info=None, no_device=False)
        self.instance._context = mock.sentinel.context
        disks = self.disks()
        disks.set('disk', self.create().record)
        disks.save(mock.sentinel.context)
        self.api = api.LocalDisks.__new__(api.LocalDisks)
        self.api._has_pools, self.api._is_starting = True, False
        self.api._stayed = set()
        self.api._local = mock.Mock(get_connection=lambda: self.conn)

    def disks(self):
        return metadata.InstanceDisks.from_bdms(self.instance, [self.bdm])

    def rebuild(self, then=lambda: None):
        """What the driver does first; :returns: the new disk's record"""
        self.instance.task_state = 'rebuilding'
        with mock.patch.object(lifecycle, 'of_instance',
                               side_effect=lambda *args: self.disks()):
            self.api.delete(self.instance)
            self.api.forget(mock.sentinel.context, self.instance, {})
        then()
        self.instance.task_state = 'rebuild_spawning'
        return self.backends.by_name(self.instance, 'disk', disk_info_mapping={
            'taken': leftovers.names(self.disks())}).metadata(MIB)

    def test_rebuild(self):
        record = self.rebuild()
        self.assertEqual(('%s_disk' % uuids.instance, 'building'),
                         (record.volume, record.state))

    def test_old_disk_that_could_not_be_deleted(self):
        """An operator has made a snapshot of it, say."""
        self.disk.snapshots['backup'] = ceph.Snapshot(b'old', 48 * MIB)
        record = self.rebuild()
        self.assertEqual(('%s_disk.1' % uuids.instance, 'building'),
                         (record.volume, record.state))
        # It is tried again.
        self.assertEqual([('here', 'ceph', '%s_disk' % uuids.instance)],
                         self.disks().leftovers)
        del self.disk.snapshots['backup']
        disks = self.disks()
        disks.set('disk', record)
        leftovers.delete(self.conn, disks)
        self.assertEqual([], disks.leftovers)
        self.assertNotIn('%s_disk' % uuids.instance, self.images)

    def test_ceph_is_away_for_a_moment(self):
        """The rebuilt server doesn't get the disk that it had."""
        self.ceph.answers = False
        record = self.rebuild(
            then=lambda: setattr(self.ceph, 'answers', True))
        self.assertEqual(('%s_disk.1' % uuids.instance, 'building'),
                         (record.volume, record.state))

    @ddt.data('here', 'there')
    def test_source_of_an_evacuation_is_back(self, host):
        """The images are another host's, or will be."""
        self.stub_out('nova.objects.MigrationList.get_by_filters',
                      lambda *args: [mock.Mock(status='accepted')])
        self.stub_out('nova.objects.InstanceActionList.get_by_instance_uuid',
                      lambda *args: [mock.Mock(action='evacuate')])
        self.instance.host = host
        with mock.patch('nova.virt.libvirt.storage.pool.ownership.'
                        'delete_volumes', return_value=False):
            self.rebuild()
        self.assertEqual([], self.disks().leftovers)

    def test_noted_where_it_is_another_hosts_disk(self):
        disks = self.disks()
        record = disks.get('disk')
        record.host = 'there'
        disks.set('disk', record)
        leftovers.note(disks, 'here', [('ceph', record.volume)])
        leftovers.delete(self.conn, disks)
        self.assertIn(record.volume, self.images)
        self.assertEqual([], disks.leftovers)

    def test_broken_record(self):
        """A rebuild is the way out of it."""
        self.disk.snapshots['backup'] = ceph.Snapshot(b'old', 48 * MIB)
        self.bdm.driver_info = '{'
        self.assertRaises(exception.InvalidDiskMetadata,
                          lambda: self.disks().items())
        self.assertEqual('%s_disk.1' % uuids.instance, self.rebuild().volume)


class XMLTestCase(RbdDiskTestCase):

    def test_network_disk(self):
        info = self.image(record=self.image().metadata(MIB)).libvirt_info(
            'none', {})
        self.assertEqual(
            ('network', 'rbd', 'nova/%s_disk' % uuids.instance, 'raw', 'qemu',
             None), (info.source_type, info.source_protocol,
                     info.source_name, info.driver_format, info.driver_name,
                     info.driver_io))
        self.assertEqual((['10.0.0.1', 'fd00::1'], ['6790', '6789']),
                         (info.source_hosts, info.source_ports))
        self.assertEqual(
            ('ceph', base.SECRET, 'compute'),
            (info.auth_secret_type, info.auth_secret_uuid,
             info.auth_username))
        self.assertEqual([], self.ceph.commands)

    def test_model(self):
        model = self.create().get_model(self.conn)
        self.assertEqual(
            ('nova', 'compute', b'YSBrZXk=',
             ['10.0.0.1:6790', '[fd00::1]:6789']),
            (model.pool, model.user, model.password, model.servers))


class CreateTestCase(RbdDiskTestCase):

    def test_clone(self):
        self.create()
        self.assertEqual(('images', uuids.image, 'snap'), self.disk.parent)
        self.assertEqual(48 * MIB, self.disk.size)
        self.assertEqual([], self.fetched)
        self.assertEqual(0, self.raw.refreshes)

    def test_image_is_larger(self):
        self.assertRaises(exception.FlavorDiskSmallerThanImage,
                          self.create, 10 * MIB)

    def test_import(self):
        self.meta['locations'] = []
        self.create()
        self.assertEqual(b'image', self.disk.content)
        self.assertEqual(48 * MIB, self.disk.size)
        self.assertIn(CONF.state_path + '/ceph/ceph.conf',
                      self.ceph.commands[0])

    def test_never_download(self):
        self.flags(group='workarounds', never_download_image_if_on_rbd=True)
        self.meta['locations'] = []
        self.assertRaises(exception.ImageUnacceptable, self.create)
        self.assertEqual([], self.fetched)

    def base_of_overlays(self):
        """Disks in files lie on it, though new ones are on Ceph."""
        base = os.path.join(CONF.instances_path, '_base',
                            imagecache.get_cache_fname(uuids.image))
        os.makedirs(os.path.dirname(base), exist_ok=True)
        with open(base, 'wb') as f:
            f.write(libvirt_storage.qcow2_header(20 * MIB))
        return base

    def test_clone_beside_overlays(self):
        base = self.base_of_overlays()
        self.create()
        self.assertEqual(('images', uuids.image, 'snap'), self.disk.parent)
        self.assertTrue(os.path.exists(base))

    def test_import_beside_overlays(self):
        base = self.base_of_overlays()
        self.meta['locations'] = []
        self.useFixture(fixtures.MockPatchObject(
            images, 'qemu_img_info', return_value=mock.Mock(
                file_format='qcow2', backing_file=None,
                format_specific=None)))
        convert = self.useFixture(fixtures.MockPatchObject(
            images, 'convert_image',
            side_effect=lambda source, dest, *formats: self._fetch(dest))).mock
        self.create()
        self.assertEqual(b'image', self.disk.content)
        convert.assert_called_once_with(base, mock.ANY, 'qcow2', 'raw')
        self.assertFalse(os.path.exists(convert.call_args.args[1]))
        self.assertTrue(os.path.exists(base))

    def test_never_import_beside_overlays(self):
        self.flags(group='workarounds', never_download_image_if_on_rbd=True)
        self.base_of_overlays()
        self.meta['locations'] = []
        self.assertRaises(exception.ImageUnacceptable, self.create)

    def test_copy_to_the_store_of_this_ceph(self):
        self.flags(group='libvirt', images_rbd_glance_store_name='near',
                   images_rbd_glance_copy_poll_interval=0)
        here, self.meta['locations'] = self.meta['locations'], []

        def copied(context, image_id, store):
            self.meta.update(locations=here, stores='far,near')

        self.glance.copy_image_to_store.side_effect = copied
        self.create()
        self.assertEqual(('images', uuids.image, 'snap'), self.disk.parent)

    def test_begun_before(self):
        record = self.image().metadata(48 * MIB)
        self.images[record.volume] = ceph.StoredImage(1)
        self.assertFalse(self.image(record=record).exists())
        self.image(record=record).discard()
        self.assertEqual({}, self.images)

    def test_generated(self):
        def write(target):
            with open(target, 'wb') as f:
                f.write(b'drive')

        self.new('disk.config').create_from_func(write, None)
        self.assertEqual(
            b'drive',
            self.images['%s_disk.config' % uuids.instance].content)

    def test_exists(self):
        made = self.create()
        self.assertTrue(made.exists())
        self.images.clear()
        self.assertFalse(made.exists())
        self.ceph.answers = False
        self.assertRaises(exception.StorageCephError, made.exists)


class LaterTestCase(RbdDiskTestCase):

    def test_revert_of_a_resize(self):
        made = self.create()
        # A resize has left one that was never ended.
        self.disk.content = b'long ago'
        made.create_snap('nova-resize')
        self.disk.content = b'before'
        made.create_snap('nova-resize')
        made.create_from_image(mock.sentinel.context, uuids.image, 96 * MIB)
        self.assertEqual(96 * MIB, self.disk.size)
        self.disk.content = b'after'
        # Its service was killed: no other host has had the disk.
        self.instance.task_state = 'resize_migrating'
        made.rollback_to_snap('nova-resize')
        self.assertEqual(b'after', self.disk.content)
        self.instance.task_state = 'resize_reverting'
        made.rollback_to_snap('nova-resize')
        made.remove_snap('nova-resize')
        self.assertEqual((b'before', 48 * MIB, {}), (
            self.disk.content, self.disk.size, self.disk.snapshots))

    def test_flatten(self):
        self.create().flatten()
        self.assertIsNone(self.disk.parent)

    def test_no_snapshot_of_what_came_into_ceph(self):
        """A revert goes back to the original."""
        made = self.create()
        made.record.previous = metadata.LibvirtDiskMetadata(
            backend=fields.LibvirtDiskBackend.LIBVIRT_STORAGE)
        made.create_snap('nova-resize')
        self.assertEqual({}, self.disk.snapshots)
        # Out of another Ceph pool
        made.record.previous.backend = RBD
        made.record.previous.volume = made.volume_name + '.1'
        made.create_snap('nova-resize')
        self.assertEqual({}, self.disk.snapshots)
        made.record.previous.volume = made.volume_name
        made.create_snap('nova-resize')
        self.assertEqual({'nova-resize'}, set(self.disk.snapshots))

    def patch_migration(self, **fields):
        self.useFixture(fixtures.MockPatchObject(
            objects.Migration, 'get_by_id',
            return_value=objects.Migration(**fields)))

    def test_no_snapshot_of_what_is_made_anew(self):
        """A revert goes back to the other cell's image."""
        self.new().create_snap('nova-resize')
        self.assertEqual({}, self.images)

    def test_revert_to_what_another_cell_has_not_touched(self):
        made = self.create()
        self.instance.task_state = 'resize_reverting'
        self.instance.migration_context = objects.MigrationContext(
            migration_id=7)
        self.patch_migration(cross_cell_move=True)
        made.rollback_to_snap('nova-resize')
        made.remove_snap('nova-resize')
        self.assertEqual(b'image', self.disk.content)

    def offered(self, identity):
        self.instance.migration_context = objects.MigrationContext(
            migration_id=7)
        with mock.patch.object(self.instance, 'save'):
            offer.save(self.instance, offer.Offer(7, [1, 2], {
                'p': offer.OfferedPool(['disk'], None, 0, identity)}))

    def test_revert_of_what_was_copied_out_of_ceph(self):
        """Nobody has written to it since."""
        made = self.create()
        self.instance.task_state = 'resize_reverting'
        self.patch_migration(cross_cell_move=False)
        self.offered('%s/nova' % self.ceph.fsid)
        self.assertRaises(exception.SnapshotNotFound,
                          made.rollback_to_snap, 'nova-resize')
        # Into files, and into another Ceph pool
        for there in (None, '%s/other' % self.ceph.fsid):
            self.offered(there)
            made.rollback_to_snap('nova-resize')
            self.assertEqual(b'image', self.disk.content)

    def test_direct_snapshot(self):
        made = self.create()
        self.disk.content = b'snapshot'
        url = made.direct_snapshot(
            mock.sentinel.context, 'temporary', 'raw', uuids.snapshot,
            uuids.image)
        self.assertEqual(
            'rbd://%s/images/%s/snap' % (self.ceph.fsid, uuids.snapshot), url)
        kept = self.ceph.pools['images'][uuids.snapshot]
        self.assertEqual((b'snapshot', None), (kept.content, kept.parent))
        self.assertTrue(kept.snapshots['snap'].protected)
        self.assertEqual({}, self.disk.snapshots)

    def test_snapshot_by_qemu_img(self):
        made = self.create()
        with mock.patch.object(images, 'convert_image',
                               autospec=True) as mock_convert:
            made.snapshot_extract('/target', 'qcow2')
        self.assertEqual(
            'rbd:nova/%s_disk:id=compute:conf=%s/ceph/ceph.conf' % (
                uuids.instance, CONF.state_path),
            mock_convert.call_args.args[0])

    def test_delete(self):
        made = self.create()
        made.delete()
        made.delete()
        self.assertEqual({}, self.images)
