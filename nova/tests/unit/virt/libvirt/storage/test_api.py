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
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import task_states
from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import api
from nova.virt.libvirt.storage.records import metadata

STORAGE = 'nova.virt.libvirt.storage.'


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
        self.instance = objects.Instance(
            id=1, uuid=uuids.instance, image_ref=uuids.image,
            system_metadata={}, task_state=None, trusted_certs=None,
            deleted=False)

    def patch(self, target, **kwargs):
        patcher = mock.patch(STORAGE + target, **kwargs)
        self.addCleanup(patcher.stop)
        return patcher.start()

    def test_add_image_type(self):
        backend = imagebackend.Backend(True)
        api.add_image_type(backend, lambda: mock.sentinel.connection)
        self.assertEqual(
            mock.sentinel.connection,
            backend.by_name(self.instance, 'disk')._get_connection())

    @ddt.data('libvirt-storage', 'qcow2')
    def test_init_host(self, images_type):
        self.flags(images_type=images_type, group='libvirt')
        ensure = self.patch('pool.setup.ensure_pools')
        has_pools = self.patch('pool.ownership.has_pools')
        self.api.init_host()
        self.assertEqual(images_type == 'libvirt-storage', ensure.called)
        # Disks made there stay, whatever images_type says now.
        has_pools.assert_called_once_with(self.conn)

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

    def test_offer_refused(self):
        # The instance stays as it is if there is no other host to try
        refusal = exception.MigrationPreCheckError(reason='no pool')
        self.patch('move.destination.offer', side_effect=refusal)
        self.patch('records.metadata.InstanceDisks.load')
        e = self.assertRaises(
            exception.InstanceFaultRollback, self.api.offer,
            mock.sentinel.context, self.instance, mock.sentinel.migration)
        self.assertEqual(refusal, e.inner_exception)

    @ddt.data('take_up_running', 'move_to_pools')
    def test_depart_is_refused_while_the_guest_runs(self, step):
        refusal = exception.DiskTransitionFailed(
            instance=uuids.instance, reason='a test')
        for name in ('take_up_running', 'move_to_pools'):
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
    def test_live_migration_of_pool_disks_is_refused(self, images_type):
        self.flags(images_type=images_type, group='libvirt')
        self.host.get_guest.return_value = self._guest()
        e = self.assertRaises(
            exception.MigrationPreCheckError, self.api.check_live_migration,
            mock.sentinel.context, self.instance, {})
        for word in (uuids.instance, 'vdb', 'p/v'):
            self.assertIn(word, str(e))

    def test_live_migration_without_a_guest(self):
        self.host.get_guest.side_effect = exception.InstanceNotFound(
            instance_id=uuids.instance)
        self.api.check_live_migration(
            mock.sentinel.context, self.instance, {})

    def test_delete_keeps_what_a_revert_needs(self):
        delete = self.patch('pool.ownership.delete_volumes')
        kept = self.patch('move.source.kept')
        # A host that never had pools has nothing to delete.
        self.assertTrue(self.api.delete(self.instance))
        delete.assert_not_called()

        self.api._has_pools = True
        self.instance.task_state = task_states.RESIZE_REVERTING
        self.assertEqual(delete.return_value, self.api.delete(self.instance))
        [disks] = kept.call_args.args
        delete.assert_called_once_with(
            self.conn, self.instance, keep=kept.return_value, disks=disks)

        kept.reset_mock()
        self.instance.task_state = task_states.DELETING
        self.api.delete(self.instance, {})
        kept.assert_not_called()
        delete.assert_called_with(
            self.conn, self.instance, keep=(), disks=mock.ANY)

    def test_delete_looks_into_the_pools_on_record(self):
        self.api._has_pools = True
        delete = self.patch('pool.ownership.delete_volumes')
        of_instance = self.patch('records.lifecycle.of_instance')
        self.api.delete(self.instance, mock.sentinel.block_device_info)
        of_instance.assert_called_once_with(
            self.instance, mock.sentinel.block_device_info)
        self.assertEqual(of_instance.return_value,
                         delete.call_args.kwargs['disks'])

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
        self.api.sweep(mock.sentinel.context)
        sweep.assert_not_called()

        self.api._has_pools = True
        self.api.sweep(mock.sentinel.context)
        mock_uuids.assert_called_once_with(mock.sentinel.context, 'here')
        sweep.assert_called_once_with(
            mock.sentinel.context, self.conn, {uuids.instance})

    def test_sweep_where_the_pools_cant_be_listed(self):
        self.patch('orphans.sweep', side_effect=exception.StoragePoolError(
            pool='all', host='here', code=38, reason='no daemon'))
        self.api._has_pools = True
        with mock.patch.object(objects.InstanceList, 'get_uuids_by_host',
                               return_value=[]):
            self.api.sweep(mock.sentinel.context)
        self.assertIn('no daemon', self.stdlog.logger.output)

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

    def test_probes(self):
        make = self.patch('pool.sharing.make_probes', return_value=['p'])
        find = self.patch('pool.sharing.find_probes')
        remove = self.patch('pool.sharing.remove_probes')
        self.assertEqual({}, self.api.make_probes(self.instance))
        self.assertFalse(self.api.find_probes({'volumes': ['p']}))
        self.api.remove_probes({})
        for mocked in (make, find, remove):
            mocked.assert_not_called()

        self.api._has_pools = True
        data = self.api.make_probes(self.instance)
        make.assert_called_once_with(self.conn, uuids.instance)
        self.assertEqual(find.return_value, self.api.find_probes(data))
        find.assert_called_once_with(self.conn, ['p'])
        self.api.remove_probes(data)
        remove.assert_called_once_with(self.conn, ['p'])
