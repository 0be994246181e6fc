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

import ast
from unittest import mock

import ddt
from oslo_config import cfg
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import task_states
from nova.conf import libvirt as libvirt_conf
from nova import exception
from nova import objects
from nova import test
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import api
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.records import metadata

STORAGE = 'nova.virt.libvirt.storage.'
# What Nova's other tests have replaced by what it was.
DEFAULT = libvirt_conf.DEFAULT_IMAGES_TYPE


class LayersTestCase(test.NoDBTestCase):

    def test_only_import_of_the_driver(self):
        with open(libvirt_driver.__file__) as f:
            tree = ast.parse(f.read())
        imported = {
            name.name for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and
            (node.module + '.').startswith(STORAGE) for name in node.names}
        # Two of them are Nova's.
        self.assertEqual({'api', 'dmcrypt', 'lvm'}, imported)


@ddt.ddt
class LocalDisksTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.flags(images_type='libvirt-storage', group='libvirt')
        self.flags(host='here')
        self.host = mock.Mock()
        self.conn = self.host.get_connection.return_value
        self.image_backend = mock.Mock()
        self.api = api.LocalDisks(
            self.host, self.image_backend, mock.sentinel.job_tracker,
            'qemu:///system', lambda: '192.0.2.1')
        self.recover = self.patch('move.bitmaps.recover')
        self.has_stayed = self.patch(
            'pool.ownership.has_stayed', return_value=False)
        self.instance = objects.Instance(
            id=1, uuid=uuids.instance, image_ref=uuids.image,
            system_metadata={}, task_state=None, trusted_certs=None,
            deleted=False, host='here')

    def patch(self, target, **kwargs):
        patcher = mock.patch(STORAGE + target, **kwargs)
        self.addCleanup(patcher.stop)
        return patcher.start()

    def patch_of(self, target, name, **kwargs):
        patcher = mock.patch.object(target, name, **kwargs)
        self.addCleanup(patcher.stop)
        return patcher.start()

    # Cold migration and resize

    def _confirm(self, previous, backend='libvirt-storage-rbd'):
        """:param previous: the backend of the root disk before the resize"""
        self.api._has_pools = True
        self.image_backend.reset_mock()
        forget = self.patch('move.source.confirm', new=mock.Mock())
        self.image_backend.by_name.side_effect = (
            lambda *args, **kwargs: self.assertFalse(forget.called) or
            mock.Mock())
        root = metadata.LibvirtDiskMetadata(backend=backend)
        if previous:
            root.previous = metadata.LibvirtDiskMetadata(backend=previous)
        self.patch('records.metadata.InstanceDisks.load',
                   new=mock.Mock(return_value={'disk': root}))
        self.api.confirm(mock.sentinel.context, self.instance)
        return self.image_backend.by_name.called

    def test_confirm_removes_the_snapshot(self):
        self.assertTrue(self._confirm(None))
        self.assertTrue(self._confirm('libvirt-storage-rbd'))

    def test_confirm_of_images_outside_of_the_pools(self):
        self.assertFalse(self._confirm('qcow2', 'qcow2'))
        self.assertTrue(self._confirm('rbd', 'rbd'))
        self.flags(images_type='rbd', group='libvirt')
        # The driver does.
        self.assertFalse(self._confirm('rbd', 'rbd'))

    def test_confirm_of_what_came_into_ceph(self):
        """This host need not have such a pool."""
        self.assertFalse(self._confirm('libvirt-storage'))

    # Live images

    def _save_live(self):
        states = mock.Mock()
        self.nics = self.patch('live_image.interfaces.of')
        self.api.save_live(
            mock.sentinel.context, self.instance, mock.sentinel.driver,
            mock.sentinel.image_api, uuids.image, mock.sentinel.metadata,
            states)
        self.assertEqual(
            [mock.call(task_state=task_states.IMAGE_PENDING_UPLOAD),
             mock.call(task_state=task_states.IMAGE_UPLOADING,
                       expected_state=task_states.IMAGE_PENDING_UPLOAD)],
            states.mock_calls)

    def test_save_live(self):
        self.flags(live_images=True, group='libvirt')
        capture = self.patch('live_image.capture.Capture')
        store = self.patch('live_image.store.Store')
        self._save_live()
        capture.assert_called_once_with(
            self.host, self.instance, self.nics.return_value)
        self.nics.assert_called_once_with(
            self.host, mock.sentinel.driver, mock.sentinel.context,
            self.instance)
        store.return_value.publish.assert_called_once_with(
            mock.sentinel.context, uuids.image, mock.sentinel.metadata,
            capture.return_value.__enter__.return_value)

    def _patch_pools(self):
        self.patch('pool.setup.ensure_pools')
        self.patch('pool.ownership.has_pools', return_value=False)
        self.patch('intake.reaper.reap')
        return self.patch('pool.setup.pool_of')

    def _starts_live(self, live=True, images_type='libvirt-storage',
                     virt_type='kvm'):
        self.flags(live_images=live, images_type=images_type,
                   virt_type=virt_type, group='libvirt')
        return self.api.init_host()['supports_live_images']

    def test_starts_live_as_configured(self):
        pool_of = self._patch_pools()
        pool_of.return_value.kind.return_value = kinds.of_type('dir')
        self.assertIs(True, self._starts_live())
        self.assertIs(True, self._starts_live(virt_type='qemu'))
        pool_of.reset_mock()
        self.assertIs(False, self._starts_live(virt_type='lxc'))
        self.assertIs(False, self._starts_live(images_type='qcow2'))
        self.assertIs(False, self._starts_live(live=False))
        # The root disk would be no overlay.
        self.flags(use_cow_images=False)
        self.assertIs(False, self._starts_live())
        pool_of.assert_not_called()

    @ddt.data(('dir', True), ('logical', False), ('rbd', False))
    @ddt.unpack
    def test_starts_live(self, kind, expected):
        """The scheduler sends none to where it can not be."""
        pool_of = self._patch_pools()
        pool_of.return_value.kind.return_value = kinds.of_type(kind)
        self.assertIs(expected, self._starts_live())
        pool_of.assert_called_once_with(self.conn, 'disk')

    def test_starts_live_without_its_pool(self):
        self._patch_pools().return_value.kind.side_effect = (
            exception.StoragePoolNotFound(pool='p', host='here'))
        self.assertIs(False, self._starts_live())
        self.assertIn('no storage pool p', self.stdlog.logger.output)

    def test_save_live_is_off(self):
        error = self.assertRaises(
            exception.LiveImageRefused, self._save_live)
        self.assertIn('[libvirt]/live_images', str(error))

    @ddt.data(('check_user', False), ('publish', True))
    @ddt.unpack
    def test_save_live_without_a_user_of_nova(self, step, is_captured):
        self.flags(live_images=True, group='libvirt')
        capture = self.patch('live_image.capture.Capture')
        capture.return_value.__exit__ = mock.Mock(return_value=False)
        setattr(self.patch('live_image.store.Store').return_value, step,
                mock.Mock(side_effect=memory_file.Unusable('no user')))
        error = self.assertRaises(
            exception.LiveImageRefused, self._save_live)
        self.assertIn('no user', str(error))
        self.assertIs(is_captured, capture.called)

    def cut_off(self, **kwargs):
        self.load = self.patch('records.metadata.InstanceDisks.load')
        self.is_open = self.patch(
            'live.settle.is_open', **{'return_value': False, **kwargs})

    def test_recover_live_of_a_guest_that_may_run_elsewhere(self):
        self.patch('live_image.under_way.instances',
                   return_value=[uuids.instance])
        recover = self.patch('live_image.capture.recover')
        end = self.patch('live_image.capture.end')
        self.cut_off(side_effect=[
            True, exception.InternalError('no libvirt')])
        for _n in range(2):
            self.api.recover_live(
                mock.sentinel.context, [self.instance], mock.Mock())
        # The mark stays.
        recover.assert_not_called()
        end.assert_not_called()
        self.assertIn('no libvirt', self.stdlog.logger.output)

    def test_recover_live_of_a_server_with_a_broken_record(self):
        self.patch('live_image.under_way.instances',
                   return_value=[uuids.instance])
        recover = self.patch('live_image.capture.recover')
        self.cut_off(side_effect=exception.InvalidDiskMetadata(
            instance_uuid=uuids.instance, mapping='m', reason='a test'))
        self.api.recover_live(
            mock.sentinel.context, [self.instance], mock.Mock())
        recover.assert_not_called()
        self.assertIn('a test', self.stdlog.logger.output)

    def test_recover_live(self):
        self.cut_off()
        self.patch('live_image.under_way.instances',
                   return_value=[uuids.instance, uuids.gone])
        end = self.patch('live_image.under_way.end')
        recover = self.patch('live_image.capture.recover')
        others = objects.Instance(uuid=uuids.other)
        nics = self.patch('live_image.interfaces.of')
        self.api.recover_live(mock.sentinel.context, [others, self.instance],
                              mock.sentinel.driver)
        nics.assert_called_once_with(
            self.host, mock.sentinel.driver, mock.sentinel.context,
            self.instance)
        recover.assert_called_once_with(
            self.host, self.instance, nics.return_value)
        self.is_open.assert_called_once_with(
            self.host, self.load.return_value)
        self.assertIs(self.instance, self.load.call_args.args[1])
        # Nobody has that guest here any more.
        end.assert_called_once_with(uuids.gone)

    def test_recover_live_where_files_can_not_be_deleted(self):
        self.patch('live_image.under_way.instances', return_value=[
            uuids.gone])
        self.patch('live_image.under_way.end', side_effect=OSError('no'))
        self.api.recover_live(mock.sentinel.context, [self.instance], None)

    def test_nothing_to_recover(self):
        self.patch('live_image.under_way.instances', return_value=[])
        self.api.recover_live(
            mock.sentinel.context, mock.sentinel.no_list, None)

    def test_live_boot(self):
        prepare = self.patch('live_image.spawn.prepare')
        self.assertEqual(prepare.return_value, self.api.live_boot(
            mock.sentinel.context, self.instance, mock.sentinel.image_api))
        prepare.assert_called_once_with(
            self.host, mock.sentinel.image_api, mock.sentinel.context,
            self.instance)

    def test_memories_age_with_base_images(self):
        store = self.patch('live_image.store.Store')
        self.patch('image_cache.cache_changed')
        self.api.image_cache_changed()
        store.return_value.sweep.assert_called_once_with()

    @ddt.data(('libvirt-storage', False), ('libvirt-storage-rbd', True))
    @ddt.unpack
    def test_add_image_type(self, recorded_as, is_ceph):
        self.patch('image_rbd._is_on_ceph', return_value=is_ceph)
        self.flags(images_type='libvirt-storage', group='libvirt')
        backend = imagebackend.Backend(True)
        api.add_image_type(backend, lambda: mock.sentinel.connection)
        self.assertEqual(
            mock.sentinel.connection,
            backend.by_name(self.instance, 'disk')._get_connection())
        self.assertEqual(recorded_as, backend.by_name(
            self.instance, 'disk').RECORDED_AS)

    @ddt.data('libvirt-storage', 'qcow2')
    def test_init_host(self, images_type):
        self.flags(images_type=images_type, group='libvirt')
        ensure = self.patch('pool.setup.ensure_pools')
        reap = self.patch('intake.reaper.reap')
        has_pools = self.patch('pool.ownership.has_pools')
        self.api.init_host()
        self.assertEqual(images_type == 'libvirt-storage', ensure.called)
        # Disks made there stay, whatever images_type says now.
        has_pools.assert_called_once_with(self.conn)
        # So may what an earlier service has let write to them.
        reap.assert_called_once_with()

    def test_init_host_without_a_storage_driver(self):
        """A host without pools need not have one."""
        self.flags(images_type='qcow2', group='libvirt')
        self.patch('intake.reaper.reap')
        has_pools = self.patch(
            'pool.ownership.has_pools',
            side_effect=exception.StoragePoolError(
                pool='p', host='here', code=38, reason='no virtstoraged'))
        delete = self.patch('pool.ownership.delete_volumes')
        self.api.init_host()
        self.assertTrue(self.api.delete(self.instance))
        delete.assert_not_called()
        # It was not there yet when this service was started.
        has_pools.side_effect = None
        self.api.delete(self.instance)
        self.api.delete(self.instance)
        self.assertEqual(2, delete.call_count)
        self.assertEqual(3, has_pools.call_count)

    def test_what_the_source_asks_for(self):
        handle = self.patch('intake.intake.Intake.handle')
        self.assertEqual(handle.return_value, self.api.take_in(
            mock.sentinel.context, self.instance, mock.sentinel.migration,
            {'do': 'greet'}))
        handle.assert_called_once_with(
            mock.sentinel.context, self.instance, mock.sentinel.migration,
            {'do': 'greet'})

    @ddt.data(True, False)
    def test_what_moves_have_left_in_guests(self, has_pools):
        self.patch('pool.setup.ensure_pools')
        self.patch('pool.ownership.has_pools', return_value=has_pools)
        self.api.init_host()
        self.assertEqual([mock.call(self.host)] if has_pools else [],
                         self.recover.mock_calls)

    def test_exports_that_ended_are_noticed(self):
        look = self.patch('intake.intake.Intake.look_after')
        self.patch('move.readiness.Readiness.stats')
        self.api.stats()
        look.assert_called_once_with()

    @ddt.data(('libvirt-storage', False), ('libvirt-storage', True),
              ('qcow2', False))
    @ddt.unpack
    def test_warns_of_live_migration_in_plain_text(self, images_type, tls):
        self.flags(images_type=images_type,
                   live_migration_with_native_tls=tls, group='libvirt')
        self.patch('pool.setup.ensure_pools')
        self.patch('pool.ownership.has_pools')
        self.api.init_host()
        self.assertEqual(
            images_type == 'libvirt-storage' and not tls,
            'in plain text' in self.stdlog.logger.output)

    @mock.patch.object(libvirt_conf, 'DEFAULT_IMAGES_TYPE', DEFAULT)
    @mock.patch.object(api.LOG, 'warning')
    def test_deprecated_images_types(self, warning):
        self.patch('pool.setup.ensure_pools')
        self.patch('pool.ownership.has_pools')
        for images_type, deprecated in (
                ('raw', True), ('flat', True), ('qcow2', True),
                ('lvm', False), ('rbd', False), ('default', False),
                ('libvirt-storage', False)):
            warning.reset_mock()
            self.flags(images_type=images_type, group='libvirt',
                       live_migration_with_native_tls=True)
            self.api.init_host()
            self.assertEqual(deprecated, warning.called, images_type)
        self.flags(images_type='flat', group='libvirt')
        self.api.init_host()
        self.assertIn('images_type = flat is deprecated',
                      warning.call_args.args[0] % warning.call_args.args[1])

    @ddt.data('default', 'libvirt-storage', 'qcow2')
    @mock.patch.object(libvirt_conf, 'DEFAULT_IMAGES_TYPE', DEFAULT)
    def test_default_means_pools(self, images_type):
        self.flags(images_type=images_type, group='libvirt')
        self.assertEqual(images_type != 'qcow2', api.makes_pool_disks())

    @mock.patch.object(libvirt_conf, 'DEFAULT_IMAGES_TYPE', DEFAULT)
    def test_option_that_is_not_set(self):
        conf = cfg.ConfigOpts()
        libvirt_conf.register_opts(conf)
        conf([], default_config_files=[])
        self.assertEqual('libvirt-storage', conf.libvirt.images_type)
        self.assertRaises(ValueError, conf.set_override, 'images_type',
                          'qcow', group='libvirt')

    @ddt.data('libvirt-storage', 'qcow2')
    def test_what_is_of_no_interest_without_pools(self, images_type):
        self.flags(images_type=images_type, group='libvirt')
        warn = self.patch('report.warn_of_legacy_disks')
        changed = self.patch('image_cache.cache_changed')
        self.api.warn_of_legacy_disks(mock.sentinel.context, [])
        self.api.image_cache_changed()
        self.assertEqual([images_type == 'libvirt-storage'] * 2,
                         [warn.called, changed.called])

    @ddt.data(('raw', 'raw'), ('qcow2', 'raw'), ('lvm', 'raw'),
              ('rbd', 'rbd'), ('libvirt-storage', 'libvirt-storage'))
    @ddt.unpack
    def test_config_drive_image_type(self, images_type, expected):
        self.flags(images_type=images_type, group='libvirt')
        self.assertEqual(expected, api.config_drive_image_type())

    @ddt.data('open', 'check_reboot')
    def test_broken_record(self, method):
        records = self.patch('records.lifecycle.of_instance').return_value
        records.items.side_effect = exception.InvalidDiskMetadata(
            instance_uuid=uuids.instance, mapping='m', reason='r')
        self.assertRaises(
            exception.InvalidDiskMetadata, getattr(self.api, method),
            mock.sentinel.context, self.instance, {})

    @ddt.data(True, False)
    def test_ensure_base_cached(self, is_its_image):
        name = imagecache.get_cache_fname(uuids.image)
        self.api.ensure_base_cached(
            mock.sentinel.context, self.instance,
            {'backing_file': '/base/%s' % name if is_its_image else ''},
            'there')
        disk = self.image_backend.by_name.return_value
        self.assertEqual(
            [mock.call(mock.sentinel.context, uuids.image,
                       trusted_certs=None, fallback_from_host='there')
             ] if is_its_image else [], disk.ensure_image_cached.mock_calls)

    def _guest(self):
        config = vconfig.LibvirtConfigGuest()
        for n, source_type in enumerate(('file', 'volume')):
            disk = vconfig.LibvirtConfigGuestDisk()
            disk.source_type, disk.driver_format = source_type, 'qcow2'
            disk.target_dev = 'vd' + 'ab'[n]
            disk.source_pool, disk.source_volume = 'p', 'v'
            config.add_device(disk)
        guest = mock.Mock(spec=libvirt_guest.Guest)
        guest.get_config.return_value = config
        guest.get_disk.side_effect = {
            disk.target_dev: disk for disk in config.devices}.get
        return guest

    def test_pool_disk(self):
        disk = self.api.pool_disk(self.instance, self._guest(), 'vdb')
        self.assertEqual(self.image_backend.by_name.return_value, disk)
        record = self.image_backend.by_name.call_args.kwargs[
            'disk_info_mapping']['metadata']
        self.assertEqual(('p', 'v', 'qcow2'),
                         (record.pool, record.volume, record.format))

    def test_pool_disk_is_a_legacy_one(self):
        guest = self._guest()
        self.assertIsNone(self.api.pool_disk(self.instance, guest, 'vda'))
        self.assertIsNone(self.api.pool_disk(self.instance, guest, 'vdc'))
        guest.get_disk.reset_mock()
        for path in ('/dev/vg/disk', 'rbd:pool/disk', '/a/disk'):
            self.assertIsNone(self.api.pool_disk(self.instance, guest, path))
        # libvirt isn't asked for what a path tells.
        guest.get_disk.assert_not_called()

    def test_offer(self):
        offer = self.patch('move.destination.offer')
        load = self.patch('records.metadata.InstanceDisks.load')
        self.api._has_pools = True
        self.api.offer(mock.sentinel.context, self.instance,
                       mock.sentinel.migration)
        load.assert_called_once_with(mock.sentinel.context, self.instance)
        offer.assert_called_once_with(
            self.conn, self.instance, mock.sentinel.migration,
            load.return_value)

    def test_offer_of_a_pool_that_was_defined_later(self):
        # What comes there is deleted with its instance.
        self.patch('move.destination.offer')
        self.patch('records.metadata.InstanceDisks.load')
        delete = self.patch('pool.ownership.delete_volumes')
        has_pools = self.patch('pool.ownership.has_pools', return_value=True)
        for _n in range(2):
            self.api.offer(mock.sentinel.context, self.instance,
                           mock.sentinel.migration)
        has_pools.assert_called_once_with(self.conn)
        self.api.delete(self.instance)
        delete.assert_called_once()

    def test_offer_without_a_storage_driver(self):
        """Of files, which need none."""
        self.patch('move.destination.offer')
        self.patch('records.metadata.InstanceDisks.load')
        self.patch('pool.ownership.has_pools',
                   side_effect=exception.StoragePoolError(
                       pool='p', host='here', code=38, reason='none'))
        self.api.offer(mock.sentinel.context, self.instance,
                       mock.sentinel.migration)

    @ddt.data(exception.MigrationPreCheckError(reason='no pool'),
              fakelibvirt.libvirtError('no answer'))
    def test_offer_refused(self, refusal):
        # The instance stays as it is if there is no other host to try
        self.patch('move.destination.offer', side_effect=refusal)
        self.patch('records.metadata.InstanceDisks.load')
        e = self.assertRaises(
            exception.InstanceFaultRollback, self.api.offer,
            mock.sentinel.context, self.instance, mock.sentinel.migration)
        self.assertEqual(refusal, e.inner_exception)

    @ddt.data(
        ('take_up_running', fakelibvirt.libvirtError('no answer')),
        ('move_to_pools', exception.HypervisorUnavailable()),
        ('refuse_logical_volumes', exception.DiskTransitionFailed(
            instance='i', reason='a test')))
    @ddt.unpack
    def test_depart_is_refused_while_the_guest_runs(self, step, refusal):
        for name in ('take_up_running', 'move_to_pools',
                     'refuse_logical_volumes'):
            self.patch('operation.DiskOperation.%s' % name,
                       side_effect=refusal if name == step else None)
        prepare = self.patch('move.source.prepare')
        e = self.assertRaises(
            exception.InstanceFaultRollback, self.api.depart,
            mock.sentinel.context, self.instance, {})
        self.assertIs(refusal, e.inner_exception)
        prepare.assert_not_called()

    def test_depart(self):
        self.patch('operation.DiskOperation.take_up_running')
        move = self.patch('operation.DiskOperation.move_to_pools')
        self.patch('operation.DiskOperation.refuse_logical_volumes')
        prepare = self.patch('move.source.prepare')
        self.assertEqual(
            prepare.return_value,
            self.api.depart(mock.sentinel.context, self.instance, {}))
        move.assert_called_once_with(guest_is_off=False)
        given = prepare.call_args.args[0]
        self.assertEqual(
            (self.host, mock.sentinel.job_tracker, 'qemu:///system',
             '192.0.2.1'),
            (given.host, given.job_tracker, given.uri, given.address))

    def test_give_up_has_the_directory_first(self):
        calls = mock.Mock()
        self.patch('reboot.Return.bring_directory_back', new=calls.directory)
        self.patch('reboot.Return.take_back', new=calls.disks)
        self.api.give_up(mock.sentinel.context, self.instance,
                         mock.sentinel.migration, {})
        self.assertEqual(
            [mock.call.directory(), mock.call.disks(mock.sentinel.migration)],
            calls.mock_calls)

    @ddt.data('libvirt-storage', 'qcow2')
    def test_live_migration_of_unknown_pool_disks(self, images_type):
        # They would be left out of what is copied.
        self.flags(images_type=images_type, group='libvirt')
        self.host.get_guest.return_value = self._guest()
        e = self.assertRaises(
            exception.MigrationPreCheckError, self.api.plan_live,
            mock.sentinel.context, self.instance, {},
            objects.LibvirtLiveMigrateData())
        for word in (uuids.instance, 'vdb', 'p/v'):
            self.assertIn(word, str(e))

    def test_live_migration_without_a_guest(self):
        self.host.get_guest.side_effect = exception.InstanceNotFound(
            instance_id=uuids.instance)
        data = objects.LibvirtLiveMigrateData()
        # Whether hosts share its disks, the driver finds out.
        self.assertIsNone(self.api.plan_live(
            mock.sentinel.context, self.instance, {}, data))
        self.assertFalse(data.has_planned_disks)

    @ddt.data((('share',), True), (('share', 'mirror'), False))
    @ddt.unpack
    def test_live_migration_of_pool_disks(self, ways, expected):
        for name in ('live.settle.settle', 'live.plan.Plan.make',
                     'operation.DiskOperation.take_up_running'):
            self.patch(name)
        self.patch('live.plan.is_pool_backed', return_value=True)
        self.assertIs(expected, self.api.plan_live(
            mock.sentinel.context, self.instance, {},
            objects.LibvirtLiveMigrateData(disks=[
                objects.LibvirtLiveMigrateDiskInfo(way=way)
                for way in ways])))

    def _patch_plan(self):
        self.patch('live.settle.settle')
        self.patch('operation.DiskOperation.take_up_running')
        self.patch('transition.is_due', return_value=True)
        return self.patch('live.plan.Plan.make')

    def _plan_legacy(self, **data):
        self.host.get_guest.return_value = self._guest()
        self.host.get_guest.return_value.get_config.return_value.devices = []
        data = objects.LibvirtLiveMigrateData(**data)
        self.api.plan_live(mock.sentinel.context, self.instance, {}, data)

    def test_live_migration_of_legacy_disks(self):
        make = self._patch_plan()
        self._plan_legacy()
        self._plan_legacy(
            dst_takes_legacy=False, is_shared_instance_path=False)
        make.assert_not_called()
        self._plan_legacy(
            dst_takes_legacy=True, is_shared_instance_path=False)
        make.assert_called_once_with()

    def test_live_migration_of_legacy_disks_that_stay(self):
        make = self._patch_plan()
        self._plan_legacy(
            dst_takes_legacy=True, is_shared_instance_path=True)
        make.assert_not_called()
        self._plan_legacy(
            dst_takes_legacy=True, dst_takes_links=False,
            is_shared_instance_path=True)
        make.assert_not_called()
        self.assertIn('take no hard links', self.stdlog.logger.output)
        self._plan_legacy(
            dst_takes_legacy=True, dst_takes_links=True,
            is_shared_instance_path=True)
        make.assert_called_once_with()
        # The server migrates nevertheless, as it always has.
        make.side_effect = exception.MigrationPreCheckError(reason='no room')
        self._plan_legacy(
            dst_takes_legacy=True, is_shared_instance_path=False)
        self.assertIn('no room', self.stdlog.logger.output)

    def test_live_migration_without_pool_disks(self):
        # Nothing is asked, of nobody.
        load = self.patch('records.metadata.InstanceDisks.load')
        data = objects.LibvirtLiveMigrateData()
        for given in (data, None):
            self.assertFalse(self.api.receive_live(
                mock.sentinel.context, self.instance, given))
            self.assertFalse(self.api.leave(
                mock.sentinel.context, self.instance, given))
            self.api.abandon_live(
                mock.sentinel.context, self.instance, given)
            self.api.stayed_live(
                mock.sentinel.context, self.instance, given)
        self.api.check_live(mock.sentinel.context, self.instance, data)
        self.assertIs(True, self.api.send_live(
            mock.sentinel.context, self.instance, data))
        self.assertEqual({}, self.api.offer_live(
            mock.sentinel.context, self.instance))
        self.assertIsNone(self.api.copied_live(mock.sentinel.guest, data))
        self.assertEqual(0, self.api.gb_live(data))
        load.assert_not_called()

    @ddt.data(({}, True), ({'source_compute': 'here'}, False),
              ({'cross_cell_move': True}, False))
    @ddt.unpack
    def test_files_are_given_back(self, values, expected):
        self.api._has_pools = True
        self.instance.task_state = task_states.RESIZE_REVERTING
        self.instance.migration_context = objects.MigrationContext(
            migration_id=5)
        get = self.patch_of(
            objects.Migration, 'get_by_id_and_instance',
            return_value=objects.Migration(**{
                'source_compute': 'there', 'cross_cell_move': False,
                **values}))
        load = self.patch('records.metadata.InstanceDisks.load')
        give_back = self.patch('move.destination.give_files_back')
        self.assertFalse(self.api.leave(
            mock.sentinel.context, self.instance, None))
        get.assert_called_once_with(
            mock.sentinel.context, 5, uuids.instance)
        self.assertEqual(
            [mock.call(self.conn, load.return_value)] if expected else [],
            give_back.mock_calls)
        # The revert goes on, whatever fails.
        get.side_effect = exception.CellTimeout()
        self.assertFalse(self.api.leave(
            mock.sentinel.context, self.instance, None))

    def test_live_migration_has_begun_and_the_source_cant_clean_up(self):
        # The guest runs on the destination, which has to be told.
        self.patch('records.metadata.InstanceDisks.load',
                   side_effect=exception.CellTimeout())
        data = objects.LibvirtLiveMigrateData(
            disks=[objects.LibvirtLiveMigrateDiskInfo()])
        self.assertTrue(self.api.leave(
            mock.sentinel.context, self.instance, data))

    def test_live_migration_has_failed_and_the_guest_runs_on(self):
        # A destination that has died won't say so.
        load = self.patch('records.metadata.InstanceDisks.load')
        settle = self.patch('live.settle.settle')
        wait = self.patch('live.settle.wait_until_ended')
        data = objects.LibvirtLiveMigrateData(
            disks=[objects.LibvirtLiveMigrateDiskInfo()])
        self.api.stayed_live(mock.sentinel.context, self.instance, data)
        wait.assert_called_once_with(self.host, self.instance)
        settle.assert_called_once_with(
            mock.sentinel.context, self.host, load.return_value)
        # Whatever is wrong, the rest has to be rolled back.
        settle.side_effect = exception.DisksMayBeElsewhere(
            instance_uuid='i', host='a', dest='b', volumes='v')
        self.api.stayed_live(mock.sentinel.context, self.instance, data)
        self.assertIn('host b', self.stdlog.logger.output)

    def test_rollback_comes_too_late(self):
        load = self.patch('records.metadata.InstanceDisks.load')
        abandon = self.patch('live.settle.abandon')
        is_overtaken = self.patch('live.settle.is_overtaken',
                                  return_value=False)
        data = objects.LibvirtLiveMigrateData(
            disks=[objects.LibvirtLiveMigrateDiskInfo()])
        self.api.abandon_live(mock.sentinel.context, self.instance, data)
        abandon.assert_called_once_with(
            mock.sentinel.context, self.conn, load.return_value, data.disks)
        is_overtaken.return_value = True
        self.api.abandon_live(mock.sentinel.context, self.instance, data)
        abandon.assert_called_once()
        self.assertTrue(self.api.is_overtaken_live(
            mock.sentinel.context, self.instance, data))
        is_overtaken.reset_mock()
        self.assertFalse(self.api.is_overtaken_live(
            mock.sentinel.context, self.instance,
            objects.LibvirtLiveMigrateData()))
        is_overtaken.assert_not_called()

    @ddt.data(exception.StoragePoolInactive(pool='p', host='here'),
              FileNotFoundError(2, 'not there'))
    def test_live_migration_is_refused(self, error):
        self.api._has_pools = True
        for stub in ('operation.DiskOperation.take_up_running',
                     'live.offer.make', 'live.receive.Receiver.check'):
            self.patch(stub, side_effect=error)
        self.patch('live.settle.wait_until_ended')
        settle = self.patch('live.settle.settle')
        self.patch('live.plan.planned', return_value=True)
        self.patch('live.receive.Receiver.__init__', return_value=None)
        self.patch('records.metadata.InstanceDisks.load')
        for call, arguments in (
                (self.api.offer_live, ()), (self.api.check_live, (None,)),
                (self.api.plan_live, ({}, None))):
            e = self.assertRaises(
                exception.MigrationPreCheckError, call,
                mock.sentinel.context, self.instance, *arguments)
            self.assertEqual(1, str(e).count('Migration pre-check error'))
            self.assertIn(str(error), str(e))
        settle.side_effect = exception.MigrationPreCheckError(reason='why')
        self.assertIs(settle.side_effect, self.assertRaises(
            exception.MigrationPreCheckError, self.api.plan_live,
            mock.sentinel.context, self.instance, {}, None))

    def test_live_migration_that_is_done_stays_done(self):
        """The guest runs here: this host looks again when it starts."""
        self.patch('live.settle.arrived', return_value=True)
        self.patch('operation.LocalHost.get_guest_config')
        self.patch('records.metadata.InstanceDisks.save',
                   side_effect=exception.InvalidDiskMetadata(
                       mapping=1, instance_uuid='i', reason='why'))
        self.api.live_migrated(mock.sentinel.context, self.instance, {})
        self.assertIn('why', self.stdlog.logger.output)

    def test_settles_before_anything_is_done(self):
        settle = self.patch('live.settle.settle',
                            side_effect=exception.DisksMayBeElsewhere(
                                instance_uuid='i', host='a', dest='b',
                                volumes='v'))
        for call in (self.api.open, self.api.check_reboot):
            self.assertRaises(
                exception.DisksMayBeElsewhere, call,
                mock.sentinel.context, self.instance, {})
        self.assertRaises(
            exception.InstanceFaultRollback, self.api.depart,
            mock.sentinel.context, self.instance, {})
        # For an exception that it doesn't know the conductor puts a running
        # instance in ERROR.
        e = self.assertRaises(
            exception.MigrationPreCheckError, self.api.plan_live,
            mock.sentinel.context, self.instance, {}, None)
        self.assertIn("Look for the server's guest", str(e))
        self.assertEqual(4, settle.call_count)

    def test_ends_a_migration_before_the_guest_is_ended(self):
        # libvirt could have moved it in between.
        calls = mock.Mock()
        calls.settle.side_effect = exception.DisksMayBeElsewhere(
            instance_uuid='i', host='a', dest='b', volumes='v')
        for name in ('settle', 'end_moving'):
            self.stub_out('nova.virt.libvirt.storage.live.settle.' + name,
                          getattr(calls, name))
        for call in (self.api.open, self.api.check_reboot, self.api.depart):
            self.assertRaises(
                exception.NovaException, call,
                mock.sentinel.context, self.instance, {})
        self.assertEqual(
            ['end_moving', 'settle'] * 3,
            [name for name, _args, _kwargs in calls.mock_calls])
        calls.end_moving.side_effect = exception.LiveMigrationNotEnded(
            instance_uuid=uuids.instance, host='here', dest='there')
        self.assertRaises(
            exception.InstanceFaultRollback, self.api.depart,
            mock.sentinel.context, self.instance, {})
        # A live migration waits for the other one.
        calls.reset_mock()
        wait = self.patch('live.settle.wait_until_ended')
        self.assertRaises(
            exception.MigrationPreCheckError, self.api.plan_live,
            mock.sentinel.context, self.instance, {}, None)
        calls.end_moving.assert_not_called()
        wait.assert_called_once_with(self.host, self.instance)
        calls.reset_mock()
        wait.side_effect = exception.MigrationPreCheckError(reason='wait')
        self.assertRaises(
            exception.MigrationPreCheckError, self.api.plan_live,
            mock.sentinel.context, self.instance, {}, None)
        calls.settle.assert_not_called()

    def test_delete_keeps_what_a_revert_needs(self):
        delete = self.patch('pool.ownership.delete_volumes')
        give_back = self.patch('move.destination.give_back')
        kept = self.patch('move.source.kept')
        # A host that never had pools has nothing to delete.
        self.assertTrue(self.api.delete(self.instance))
        delete.assert_not_called()

        self.api._has_pools = True
        self.instance.task_state = task_states.RESIZE_REVERTING
        self.assertEqual(
            give_back.return_value, self.api.delete(self.instance))
        [disks] = kept.call_args.args
        give_back.assert_called_once_with(
            self.conn, self.instance, disks, keep=kept.return_value,
            is_copy=False)
        delete.assert_not_called()

        kept.reset_mock()
        self.instance.task_state = task_states.DELETING
        self.api.delete(self.instance, {})
        kept.assert_not_called()
        delete.assert_called_once_with(
            self.conn, self.instance, keep=(), disks=mock.ANY, is_copy=False)

    @ddt.data(True, False)
    def test_delete_of_another_backend(self, is_gone):
        delete = self.patch('unconfigured.delete', return_value=is_gone)
        self.assertEqual(is_gone, self.api.delete(self.instance))
        self.api._has_pools = True
        self.patch('pool.ownership.delete_volumes', return_value=True)
        self.assertEqual(is_gone, self.api.delete(self.instance))
        self.assertEqual(2, delete.call_count)

    @ddt.data(('libvirt-storage', None, True), ('qcow2', True, True),
              ('qcow2', False, False), ('qcow2', None, False))
    @ddt.unpack
    def test_delete_knows_of_pools(self, images_type, found, expected):
        """Those that libvirt doesn't tell of now may show the disks."""
        self.flags(images_type=images_type, group='libvirt')
        self.api._has_pools = found
        self.patch('pool.ownership.has_pools', return_value=False)
        self.patch('pool.ownership.delete_volumes', return_value=True)
        delete = self.patch('unconfigured.delete', return_value=True)
        self.api.delete(self.instance)
        self.assertIs(expected, delete.call_args.args[-1])

    @ddt.data((task_states.DELETING, False), (task_states.REBUILDING, True),
              (task_states.SHELVING, True),
              (task_states.SHELVING_OFFLOADING, True),
              (task_states.SPAWNING, True))
    @ddt.unpack
    def test_delete_what_cant_be_deleted(self, task_state, expected):
        """When it comes back, what is left isn't its disk."""
        self.api._has_pools = True
        self.patch('pool.ownership.delete_volumes', return_value=False)
        note = self.patch('records.leftovers.note_undeleted')
        self.instance.task_state = task_state
        self.assertFalse(self.api.delete(self.instance))
        self.assertEqual(expected, note.called)

    def test_rebuild_that_fails(self):
        """What it brings along are the records of what it has destroyed."""
        self.api._has_pools = True
        self.patch('pool.ownership.delete_volumes', return_value=False)
        note = self.patch('records.leftovers.note_undeleted')
        forget = self.patch('records.lifecycle.forget')
        self.patch('pool.ownership.is_making', return_value=True)
        new = self.patch('records.metadata.InstanceDisks.load').return_value
        self.instance.task_state = task_states.REBUILD_SPAWNING
        self.assertFalse(self.api.delete(self.instance, {}))
        self.api.forget(mock.sentinel.context, self.instance, {})
        note.assert_called_once_with(self.conn, new, ())
        self.assertEqual([mock.call(mock.ANY, new)] * 2, forget.mock_calls)

    @ddt.data(True, False)
    def test_delete_notes_in_one_save(self, is_there):
        """Killed between two, a hard reboot would start what is left."""
        self.api._has_pools = True
        self.patch('pool.ownership.delete_volumes', return_value=False)
        self.patch('pool.ownership.get_volumes', return_value=iter(()))
        self.patch('pool.ownership.has_gone_with_images', return_value=False)
        self.patch('pool.pool.StoragePool.find')
        self.instance.task_state = task_states.REBUILDING
        disks = metadata.InstanceDisks(
            self.instance, {}, mock.Mock(driver_info=None))
        disks.set('disk', metadata.LibvirtDiskMetadata(
            backend='libvirt-storage', format='raw', size=1, state='ready',
            host='here', pool='p', volume='v'))
        self.patch('records.lifecycle.of_instance', return_value=disks)

        def save(_context):
            saved.append((disks.get('disk'), disks.leftovers))
            if not is_there:
                raise exception.BDMNotFound(id='i')

        saved = []
        disks.save = save
        self.assertFalse(self.api.delete(self.instance, {}))
        self.assertEqual([(None, [('here', 'p', 'v')])], saved)

    def _volume(self, name, pool='p'):
        volume = mock.Mock()
        volume.name = '%s_%s' % (uuids.instance, name)
        volume.pool.name = pool
        volume.pool.kind.return_value.is_ceph = False
        return volume

    def _on_record(self, volume, state='ready'):
        disks = metadata.InstanceDisks(
            self.instance, {}, mock.Mock(driver_info=None))
        disks.set('disk', metadata.LibvirtDiskMetadata(
            backend='libvirt-storage', format='raw', size=1, state=state,
            host='here', pool='p', volume=volume))
        return disks

    @ddt.data((None, False), (None, True),
              (task_states.RESIZE_REVERTING, False),
              (task_states.RESIZE_REVERTING, True))
    @ddt.unpack
    def test_delete_in_one_of_two_cells(self, task_state, is_private):
        # A pool that the hosts of both use has the other cell's disk, too:
        # at a confirm the one that the server runs with.
        self.api._has_pools = True
        own, other = self._volume('disk'), self._volume('disk.1')
        self.patch('pool.ownership.get_volumes',
                   side_effect=lambda *args, **kwargs: iter([own, other]))
        self.patch('records.keeping.is_private', return_value=is_private)
        disks = self._on_record(own.name)
        disks.save = mock.Mock()
        if task_state:
            self.patch('records.lifecycle.of_instance', return_value=disks)
        else:
            # What confirms says nothing of them.
            self.patch('records.metadata.InstanceDisks.load',
                       return_value=disks)
        self.instance.task_state = task_state
        self.instance.migration_context = objects.MigrationContext(
            migration_id=7)
        with mock.patch.object(
                objects.Migration, 'get_by_id', return_value=objects.Migration(
                    cross_cell_move=True)) as get:
            self.assertTrue(self.api.delete(self.instance, None))
        get.assert_called_once_with(mock.ANY, 7)
        own.delete.assert_called_once_with()
        self.assertEqual(is_private, other.delete.called)

    @ddt.data((task_states.RESIZE_REVERTING, 'here', True),
              # It comes without its migration context.
              (task_states.RESIZE_FINISH, 'there', True),
              (task_states.RESIZE_REVERTING, 'here', False),
              (task_states.RESIZE_FINISH, 'here', False),
              (None, 'there', False))
    @ddt.unpack
    def test_delete_images_that_another_cell_has_not(
            self, task_state, host, is_deleted):
        self.api._has_pools = True
        own, other = self._volume('disk.1'), self._volume('disk')
        for volume in (own, other):
            volume.pool.kind.return_value.is_ceph = True
        self.patch('pool.ownership.get_volumes',
                   side_effect=lambda *args, **kwargs: iter([own, other]))
        self.patch('pool.ownership._is_evacuated', return_value=True)
        self.patch('pool.ownership._of_other_kinds', return_value=[])
        self.patch('records.keeping.is_private', return_value=False)
        disks = self._on_record(own.name)
        disks.get('disk').backend = 'libvirt-storage-rbd'
        self.patch('records.lifecycle.of_instance', return_value=disks)
        self.patch('records.metadata.InstanceDisks.load', return_value=disks)
        self.instance.task_state, self.instance.host = task_state, host
        self.instance.hidden = is_deleted
        if task_state == task_states.RESIZE_REVERTING:
            self.instance.migration_context = objects.MigrationContext(
                migration_id=7)
        with mock.patch.object(
                objects.Migration, 'get_by_id', return_value=objects.Migration(
                    cross_cell_move=is_deleted)):
            self.assertTrue(self.api.delete(self.instance, {}))
        self.assertEqual(is_deleted, own.delete.called)
        other.delete.assert_not_called()

    @ddt.data((None, 'there', False, True),
              (None, 'there', True, False),
              (task_states.REBUILD_SPAWNING, 'there', False, True),
              (task_states.DELETING, 'there', False, False),
              (None, 'here', False, False))
    @ddt.unpack
    def test_delete_what_another_host_may_have(
            self, task_state, host, is_private, stays):
        """Hosts that share a pool with one that an evacuation left, or met."""
        self.api._has_pools = True
        own, other, came = [
            self._volume(name) for name in ('disk.1', 'disk', 'disk.2')]
        self.patch('pool.ownership.get_volumes', side_effect=(
            lambda *args, **kwargs: iter([own, other, came])))
        self.patch('records.keeping.is_private', return_value=is_private)
        disks = self._on_record(own.name)
        coming = disks.get('disk').obj_clone()
        coming.volume, coming.state = came.name, 'building'
        disks.get('disk').next = coming
        self.patch('records.metadata.InstanceDisks.load', return_value=disks)
        self.instance.task_state, self.instance.host = task_state, host
        self.assertTrue(self.api.delete(self.instance, {}))
        own.delete.assert_called_once_with()
        came.delete.assert_called_once_with()
        self.assertEqual(not stays, other.delete.called)

    @ddt.data(True, False)
    def test_delete_what_was_to_be_evacuated(self, has_stayed):
        self.api._has_pools = True
        # It fails for good amid this.
        self.has_stayed.side_effect = [has_stayed, False]
        self.api._is_starting = True
        unconfigured = self.patch('unconfigured.delete', return_value=True)
        forget = self.patch('records.lifecycle.forget')
        delete = self.patch('pool.ownership.delete_volumes',
                            return_value=True)
        self.assertTrue(self.api.delete(self.instance, {}))
        self.api.forget(mock.sentinel.context, self.instance, {})
        for called in (unconfigured, delete, forget):
            self.assertEqual(not has_stayed, called.called)
        self.has_stayed.assert_called_once_with(self.instance, True)
        self.api.forget(mock.sentinel.context, self.instance, {})
        self.assertTrue(forget.called)

    def test_delete_what_has_stayed_once(self):
        """The clean-up failed then before it came to the records."""
        self.api._has_pools = True
        self.has_stayed.side_effect = [True, False]
        forget = self.patch('records.lifecycle.forget')
        self.patch('pool.ownership.delete_volumes', return_value=True)
        for _time in range(2):
            self.assertTrue(self.api.delete(self.instance, {}))
        self.api.forget(mock.sentinel.context, self.instance, {})
        self.assertTrue(forget.called)

    def test_is_starting_until_the_evacuated_are_destroyed(self):
        self.flags(images_type='qcow2', group='libvirt')
        self.patch('intake.intake.Intake.start')
        self.patch('pool.ownership.has_pools', return_value=False)
        self.api.init_host()
        self.assertTrue(self.api._is_starting)
        self.api.warn_of_legacy_disks(mock.sentinel.context, [])
        self.assertFalse(self.api._is_starting)

    @ddt.data(True, False)
    def test_delete_while_a_pool_can_not_be_read(self, is_making):
        """What was made for an evacuation that fails is noted."""
        self.api._has_pools = True
        self.patch('pool.ownership.get_volumes', side_effect=(
            exception.StoragePoolError(pool='p', host='here', code=38,
                                       reason='no disk')))
        disks = self._on_record('v', state='building')
        disks.save = mock.Mock()
        self.patch('records.metadata.InstanceDisks.load', return_value=disks)
        self.instance.host = 'down'
        self.instance.task_state = (
            task_states.REBUILD_SPAWNING if is_making else None)
        self.assertFalse(self.api.delete(self.instance, {}))
        self.assertEqual([('here', 'p', 'v')] * is_making, disks.leftovers)
        self.assertEqual(not is_making, disks.get('disk') is not None)

    def test_delete_in_one_of_two_cells_without_records(self):
        self.api._has_pools = True
        self.patch('pool.ownership.get_volumes', side_effect=(
            exception.StoragePoolError(pool='p', host='here', code=38,
                                       reason='no disk')))
        delete = self.patch('pool.ownership.delete_volumes')
        self.patch('records.metadata.InstanceDisks.load',
                   return_value=metadata.InstanceDisks(
                       self.instance, {}, mock.Mock(driver_info=None)))
        self.instance.migration_context = objects.MigrationContext(
            migration_id=7)
        with mock.patch.object(objects.Migration, 'get_by_id',
                               return_value=objects.Migration(
                                   cross_cell_move=True)):
            self.assertFalse(self.api.delete(self.instance, None))
        delete.assert_not_called()
        self.assertIn('no disk', self.stdlog.logger.output)

    def test_delete_looks_into_the_pools_on_record(self):
        self.api._has_pools = True
        close = self.patch('intake.intake.Intake.close')
        delete = self.patch('pool.ownership.delete_volumes')
        delete.side_effect = lambda *args, **kwargs: (
            close.assert_called_once_with(self.instance))
        of_instance = self.patch('records.lifecycle.of_instance')
        self.api.delete(self.instance, mock.sentinel.block_device_info)
        of_instance.assert_called_once_with(
            self.instance, mock.sentinel.block_device_info)
        self.assertEqual(of_instance.return_value,
                         delete.call_args.kwargs['disks'])

    def test_start_pools(self):
        disks = self._rescued()
        ready_for = self.patch('pool.health.ready_for')
        # A host that never had pools asks for no records.
        self.api.start_pools(mock.sentinel.context, self.instance)
        ready_for.assert_not_called()

        self.api._has_pools = True
        self.api.start_pools(mock.sentinel.context, self.instance)
        ready_for.assert_called_once_with(
            self.api._local.get_connection, disks)

    def test_start_pools_with_a_broken_record(self):
        self.patch('records.metadata.InstanceDisks.load')
        self.patch('pool.health.ready_for',
                   side_effect=exception.InvalidDiskMetadata(
                       instance_uuid=uuids.instance, mapping='m',
                       reason='a test'))
        self.api._has_pools = True
        self.api.start_pools(mock.sentinel.context, self.instance)
        self.assertIn('a test', self.stdlog.logger.output)

    @ddt.data(('open', ({},)), ('arrive', ({}, {}, '[]')),
              ('take_back', (mock.sentinel.migration, {})),
              ('give_up', (mock.sentinel.migration, {})))
    @ddt.unpack
    def test_pools_are_started_first(self, method, args):
        # What comes next would fail half-way, with the guest gone.
        self.patch('pool.health.ready_for',
                   side_effect=exception.StoragePoolError(
                       pool='p', host='here', code=38, reason='no disk'))
        accept = self.patch('move.destination.accept')
        abandon = self.patch('move.source.abandon')
        self.assertRaises(
            exception.StoragePoolError, getattr(self.api, method),
            mock.sentinel.context, self.instance, *args)
        accept.assert_not_called()
        abandon.assert_not_called()

    def _rescued(self):
        disks = metadata.InstanceDisks(
            self.instance, {}, mock.Mock(driver_info=None))
        for name in ('disk', 'disk.rescue', 'disk.config.rescue'):
            disks.set(name, metadata.LibvirtDiskMetadata(
                backend='libvirt-storage', format='raw', size=1,
                state='ready', host='here', pool='p', volume=name))
        disks.save = mock.Mock()
        self.patch('records.metadata.InstanceDisks.load', return_value=disks)
        return disks

    @ddt.data(True, False)
    def test_unrescued(self, is_deleted):
        # What can't be deleted goes with the instance.
        delete = self.patch('pool.ownership.delete_volumes',
                            return_value=is_deleted)
        disks = self._rescued()
        self.api._has_pools = True
        self.api.unrescued(mock.sentinel.context, self.instance)
        delete.assert_called_once_with(
            self.conn, self.instance, rescue=True, disks=disks)
        self.assertEqual(['disk'], [name for name, _r in disks.items()])
        disks.save.assert_called_once_with(mock.sentinel.context)

    def test_unrescued_with_a_broken_record(self):
        delete = self.patch('pool.ownership.delete_volumes')
        disks = self._rescued()
        self.api._has_pools = True
        self.patch('records.lifecycle.unrescued',
                   side_effect=exception.InvalidDiskMetadata(
                       instance_uuid=uuids.instance, mapping='m',
                       reason='a test'))
        self.api.unrescued(mock.sentinel.context, self.instance)
        delete.assert_called_once()
        disks.save.assert_not_called()
        self.assertIn('a test', self.stdlog.logger.output)

    def test_unrescued_without_pools(self):
        disks = self._rescued()
        self.api.unrescued(mock.sentinel.context, self.instance)
        self.conn.assert_not_called()
        disks.save.assert_not_called()

    @mock.patch.object(objects.InstanceList, 'get_uuids_by_host',
                       return_value=[uuids.instance])
    def test_sweep(self, mock_uuids):
        sweep = self.patch('orphans.sweep')
        self.api.sweep(mock.sentinel.context, mock.sentinel.driver)
        sweep.assert_not_called()

        self.api._has_pools = True
        self.api.sweep(mock.sentinel.context, mock.sentinel.driver)
        mock_uuids.assert_called_once_with(mock.sentinel.context, 'here')
        sweep.assert_called_once_with(
            mock.sentinel.context, self.conn, {uuids.instance},
            with_directories=True)

        self.flags(images_type='qcow2', group='libvirt')
        self.api.sweep(mock.sentinel.context, mock.sentinel.driver)
        sweep.assert_called_with(
            mock.sentinel.context, self.conn, {uuids.instance},
            with_directories=False)

    def test_sweep_of_captures(self):
        """With the memory of a server that is deleted by now."""
        self.patch('live_image.under_way.left', return_value=[uuids.gone])
        end = self.patch('live_image.capture.end')
        with mock.patch.object(objects.InstanceList, 'get_uuids_by_host',
                               return_value=[uuids.instance]):
            self.api.sweep(mock.sentinel.context, mock.sentinel.driver)
        end.assert_called_once_with(uuids.gone)

    @ddt.data((None, 1), ('rebooting_hard', 0))
    @ddt.unpack
    def test_sweep_of_a_guest_that_is_not_right(self, task, times):
        """libvirt was away for longer than was waited for it."""
        self.cut_off()
        self.patch('live_image.under_way.left', return_value=[uuids.instance])
        recover = self.patch('live_image.capture.recover')
        nics = self.patch('live_image.interfaces.of')
        self.instance.task_state = task
        with mock.patch.object(objects.InstanceList, 'get_uuids_by_host',
                               return_value=[uuids.instance]), \
                mock.patch.object(objects.Instance, 'get_by_uuid',
                                  return_value=self.instance):
            self.api.sweep(mock.sentinel.context, mock.sentinel.driver)
        self.assertEqual(
            [mock.call(self.host, self.instance, nics.return_value)] * times,
            recover.mock_calls)

    def test_sweep_where_the_pools_cant_be_listed(self):
        self.patch('orphans.sweep', side_effect=exception.StoragePoolError(
            pool='all', host='here', code=38, reason='no daemon'))
        self.api._has_pools = True
        with mock.patch.object(objects.InstanceList, 'get_uuids_by_host',
                               return_value=[]):
            self.api.sweep(mock.sentinel.context, mock.sentinel.driver)
        self.assertIn('no daemon', self.stdlog.logger.output)

    def test_guest_of_another_virt_type_stays(self):
        """libvirt's LXC supports no call that asks for a job."""
        self.flags(virt_type='lxc', group='libvirt')
        self.api.check_stays(self.instance)
        self.host.get_guest.assert_not_called()
        self.flags(virt_type='kvm', group='libvirt')
        self.host.get_guest.side_effect = exception.InstanceNotFound(
            instance_id=uuids.instance)
        self.api.check_stays(self.instance)
        self.host.get_guest.assert_called()

    def test_check_pools(self):
        why = self.patch('pool.health.why_no_new_instance',
                         return_value='it is off')
        set_host_enabled = mock.Mock()
        self.api.check_pools(set_host_enabled)
        why.assert_called_once_with(self.conn)
        set_host_enabled.assert_called_once_with(False, 'it is off')
        # It remembers that it was this which has disabled the host.
        why.return_value = None
        self.api.check_pools(set_host_enabled)
        set_host_enabled.assert_called_with(True, '')
        self.api.check_pools(set_host_enabled)
        self.assertEqual(2, set_host_enabled.call_count)

    def test_delete_of_deleted(self):
        self.api._has_pools = True
        delete = self.patch('pool.ownership.delete_volumes',
                            return_value=False)
        # Its disks may live on after a migration
        self.assertTrue(self.api.delete_of_deleted(self.instance))
        delete.assert_not_called()
        self.instance.deleted = True
        self.assertFalse(self.api.delete_of_deleted(self.instance))

    @ddt.data((False, True), (True, False), (None, False))
    @ddt.unpack
    def test_delete_of_deleted_without_libvirt(self, has_pools, expected):
        """The compute manager's loop over instances catches nothing."""
        self.api._has_pools = has_pools
        self.host.get_connection.side_effect = (
            exception.HypervisorUnavailable())
        self.instance.deleted = True
        self.assertIs(expected, self.api.delete_of_deleted(self.instance))
        self.assertEqual(
            not expected,
            'Connection to the hypervisor' in self.stdlog.logger.output)

    def test_probes(self):
        make = self.patch('pool.sharing.make_probes', return_value=['p'])
        find = self.patch('pool.sharing.find_probes')
        remove = self.patch('pool.sharing.remove_probes')
        self.assertEqual({}, self.api.make_probes(self.instance))
        self.flags(images_type='qcow2', group='libvirt')
        self.assertFalse(self.api.find_probes({'volumes': ['p']}))
        self.flags(images_type='libvirt-storage', group='libvirt')
        self.api.remove_probes({})
        for mocked in (make, find, remove):
            mocked.assert_not_called()

        self.api._has_pools = True
        data = self.api.make_probes(self.instance)
        make.assert_called_once_with(self.conn, uuids.instance)
        self.assertEqual(find.return_value, self.api.find_probes(data))
        find.assert_called_once_with(self.conn, ['p'], True)
        self.api.remove_probes(data)
        remove.assert_called_once_with(self.conn, ['p'])

    def test_probes_where_libvirt_does_not_answer(self):
        """Else the other host would delete what this one may see."""
        self.api._has_pools = None
        error = exception.StoragePoolError(
            pool='p', host='h', code=1, reason='no answer')
        self.patch('pool.ownership.has_pools', side_effect=error)
        self.patch('pool.ownership.places', side_effect=error)
        self.assertIs(error, self.assertRaises(
            exception.StoragePoolError, self.api.find_probes,
            {'volumes': [['p', 'v']]}))
