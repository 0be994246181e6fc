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
from unittest import mock

import ddt
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova.compute import task_states
from nova import exception
from nova import objects
from nova.objects import fields
from nova import test
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt.storage import operation
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage import reboot
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage import transition

OF_INSTANCE = 'nova.virt.libvirt.storage.records.lifecycle.of_instance'


def record(name='disk', **values):
    return metadata.LibvirtDiskMetadata(**{
        'backend': fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
        'format': 'raw', 'size': 1, 'state': 'ready', 'host': 'here',
        'pool': 'p', 'volume': '%s_%s' % (uuids.instance, name), **values})


class OperationTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.flags(images_type='libvirt-storage', group='libvirt')
        self.flags(host='here', instances_path=self.useFixture(
            test.fixtures.TempDir()).path)
        self.local = operation.LocalHost(
            mock.Mock(), mock.Mock(), mock.Mock(), 'qemu:///system',
            mock.Mock())
        self.local.image_backend.by_name.return_value.get_disk_size = (
            lambda volume: 1)
        self.guest = self.local.host.get_guest.return_value
        self.guest.is_active.return_value = False
        self.instance = objects.Instance(
            id=1, uuid=uuids.instance, image_ref=uuids.image,
            system_metadata={}, task_state=None, old_flavor=None,
            trusted_certs=None, migration_context=None)
        self.records = metadata.InstanceDisks(
            self.instance, {}, mock.Mock(driver_info=None))
        self.records.clear()
        self.records.save = mock.Mock()
        self.of_instance = self.patch(
            OF_INSTANCE, return_value=self.records)
        self.error = exception.DiskTransitionFailed(
            instance=uuids.instance, reason='a test')

    def patch(self, target, **kwargs):
        patcher = mock.patch(target, **kwargs)
        self.addCleanup(patcher.stop)
        return patcher.start()

    def of(self, cls=operation.DiskOperation):
        return cls(self.local, mock.sentinel.context, self.instance, {})


class LocalHostTestCase(OperationTestCase):

    def test_guest_that_peers_may_not_touch(self):
        self.assertTrue(self.local.has_guest(self.instance))
        self.assertFalse(self.local.has_guest(self.instance, running=True))
        self.guest.is_active.return_value = True
        self.assertTrue(self.local.has_guest(self.instance, running=True))
        self.local.host.get_guest.side_effect = exception.InstanceNotFound(
            instance_id=uuids.instance)
        self.assertFalse(self.local.has_guest(self.instance))
        self.assertFalse(self.local.has_guest(self.instance, running=True))

    def test_connection(self):
        self.assertIs(self.local.host.get_connection.return_value,
                      self.local.get_connection())
        self.local.host.drop_connection.assert_not_called()

    def test_connection_that_has_lost_virtstoraged(self):
        lost = self.patch('nova.virt.libvirt.storage.pool.pool.'
                          'has_lost_storage', return_value=True)
        old, new = mock.Mock(), mock.Mock()
        self.local.host.get_connection.side_effect = [old, new]
        self.assertIs(new, self.local.get_connection())
        lost.assert_called_once_with(old)
        self.local.host.drop_connection.assert_called_once_with(old)

    def test_connection_that_has_lost_virtsecretd(self):
        lost = self.patch('nova.virt.libvirt.storage.pool.pool.'
                          'has_lost_secrets', return_value=True)
        old, new = mock.Mock(), mock.Mock()
        self.local.host.get_connection.side_effect = [old, new]
        self.assertIs(new, self.local.get_connection())
        lost.assert_called_once_with(old)
        self.local.host.drop_connection.assert_called_once_with(old)


@ddt.ddt
class DiskOperationTestCase(OperationTestCase):

    @ddt.data(('libvirt-storage', True, 'qcow2'),
              ('libvirt-storage', False, 'libvirt-storage'),
              ('flat', True, 'flat'))
    @ddt.unpack
    @mock.patch('nova.virt.libvirt.storage.records.lifecycle.take_up')
    def test_file_of_which_nothing_is_known(
            self, configured, use_cow, expected, mock_take_up):
        """It was made before the host's default was changed."""
        self.flags(use_cow_images=use_cow)
        backend = self.local.image_backend.backend.return_value
        backend.RECORDED_AS = configured
        self.of().take_up({'mapping': {}}, None)
        self.assertEqual(expected, mock_take_up.call_args.args[3])

    @mock.patch('nova.virt.libvirt.storage.records.lifecycle.begin')
    @mock.patch('nova.virt.libvirt.storage.move.undo.after_evacuation')
    def test_begin_not_with_an_old_copy(self, mock_after, mock_begin):
        self.of().begin({'mapping': {}})
        mock_after.assert_called_once_with(self.instance, self.records)
        self.assertEqual(mock_after.return_value,
                         mock_begin.call_args.args[-1])
        self.records.save.assert_called_once_with(mock.sentinel.context)

    @ddt.data('', '.rescue')
    @mock.patch('nova.virt.libvirt.storage.records.lifecycle.begin')
    @mock.patch.object(operation.DiskOperation, 'settle_evacuation')
    def test_begin_a_rescue(self, suffix, mock_settle, mock_begin):
        """The guest gets its own disks, too, wherever those are on record."""
        mock_settle.side_effect = mock_begin.assert_not_called
        self.of().begin({'mapping': {}}, suffix=suffix)
        self.assertEqual(bool(suffix), mock_settle.called)
        mock_begin.assert_called_once()

    @ddt.data((None, True), (task_states.REBUILD_SPAWNING, False))
    @ddt.unpack
    @mock.patch('nova.virt.libvirt.storage.records.evacuation.find_unsettled',
                return_value=None)
    @mock.patch('nova.virt.libvirt.storage.records.evacuation.give_up')
    def test_settle_evacuation(
            self, task_state, is_over, mock_give_up, mock_find):
        disks = self.of()
        self.instance.task_state = task_state
        disks.settle_evacuation()
        self.assertEqual([mock.call(self.records)] * is_over,
                         mock_give_up.mock_calls)

    @ddt.data(
        ('disk.swap', {}, True, 'qcow2'), ('disk.swap', {}, False, None),
        ('disk.config', {}, True, 'qcow2'),
        ('disk.config', {}, False, 'libvirt-storage'),
        ('disk.swap', {'metadata': 'known'}, True, None),
        ('disk.rescue', {}, True, None))
    @ddt.unpack
    def test_new_disk_of_an_instance_that_keeps_files(
            self, name, mapping, stays, image_type):
        """Volumes and files together could not be migrated."""
        self.flags(images_type='libvirt-storage', group='libvirt')
        with mock.patch.object(operation.DiskOperation, '_stays_in_files',
                               return_value=stays):
            self.of().image(name, mapping)
        self.local.image_backend.by_name.assert_called_once_with(
            self.instance, name, image_type, disk_info_mapping=mapping)

    @ddt.data((None, 'here', True), (None, 'there', False),
              # What comes beside the disks is noted until it is whole.
              ('[]', 'here', False))
    @ddt.unpack
    @mock.patch('nova.virt.libvirt.storage.records.lifecycle.arrived')
    @mock.patch('nova.virt.libvirt.storage.records.lifecycle.begin')
    @mock.patch('nova.virt.libvirt.storage.records.leftovers.forget_gone')
    def test_begin_where_the_instance_was_before(
            self, moved_disks, host, expected, mock_forget, mock_begin,
            mock_arrived):
        """It has deleted what it had, when it was back."""
        self.records.leftovers = [(host, 'p', '%s_disk' % uuids.instance)]
        self.of().begin({'mapping': {}}, moved_disks=moved_disks)
        self.assertEqual(
            [mock.call(self.local.host.get_connection.return_value,
                       self.records)] * expected, mock_forget.mock_calls)

    @mock.patch('nova.virt.libvirt.storage.records.lifecycle.begin')
    def test_begin_leaves_the_directory_to_the_driver(self, mock_begin):
        directory = os.path.join(
            operation.CONF.instances_path, uuids.instance)
        mock_begin.side_effect = lambda *args: os.mkdir(directory)
        self.of().begin({'mapping': {}})
        self.assertFalse(os.path.exists(directory))

        mock_begin.side_effect = None
        os.mkdir(directory)
        self.of().begin({'mapping': {}})
        self.assertTrue(os.path.exists(directory))

    @ddt.data(('', 'disk.config'), ('.rescue', 'disk.config.rescue'))
    @ddt.unpack
    def test_finish(self, suffix, name):
        for disk in ('disk.config', 'disk.config.rescue'):
            self.records.set(disk, record(disk, state='building'))
        disks = self.of()
        with mock.patch('nova.virt.libvirt.storage.records.lifecycle.begin'):
            disks.begin({'mapping': {}}, suffix=suffix)
        make = mock.Mock()
        disks.finish(make)
        make.assert_called_once_with(record=self.records.get(name))
        self.assertEqual(
            {name}, {'disk.config', 'disk.config.rescue'} - set(
                self.records.building()))

    def test_config_drive_without_a_record(self):
        self.of().image('disk.config')
        self.local.image_backend.by_name.assert_called_once_with(
            self.instance, 'disk.config', 'libvirt-storage',
            disk_info_mapping=None)

    @mock.patch('nova.virt.libvirt.storage.move.destination.accept')
    def test_nobody_writes_to_what_is_taken_over(self, mock_accept):
        self.local.intake = mock.MagicMock()
        closing = self.local.intake.handing_over.return_value

        def accept(*args):
            closing.__enter__.assert_called_once_with()
            closing.__exit__.assert_not_called()

        mock_accept.side_effect = accept
        self.of().accept()
        self.local.intake.handing_over.assert_called_once_with(self.instance)
        mock_accept.assert_called_once()
        closing.__exit__.assert_called_once()
        mock_accept.reset_mock()
        closing.__enter__.side_effect = exception.StorageIntakeError(
            host='here', reason='somebody still does')
        self.assertRaises(exception.StorageIntakeError, self.of().accept)
        mock_accept.assert_not_called()

    @mock.patch('nova.virt.libvirt.storage.move.destination.accept')
    def test_accept_caches_the_base_image(self, mock_accept):
        disk = record()
        self.records.set('disk', disk)
        disks = self.of()
        self.assertEqual('there', disks.may_copy_from('there'))
        disks.accept()
        self.assertIsNone(disks.may_copy_from('there'))
        # Not before there is an overlay that needs it
        by_name = self.local.image_backend.by_name
        by_name.assert_not_called()
        base = mock_accept.call_args.args[5]()
        by_name.assert_called_once_with(
            self.instance, 'disk', None, disk_info_mapping={'metadata': disk})
        ensure = by_name.return_value.ensure_image_cached
        ensure.assert_called_once_with(
            mock.sentinel.context, uuids.image, trusted_certs=None)
        self.assertEqual(ensure.return_value, base)

    @mock.patch('nova.virt.libvirt.storage.move.base_image.context_to_fetch',
                side_effect=[mock.sentinel.own, None])
    @mock.patch('nova.virt.libvirt.storage.move.destination.accept')
    def test_base_image_that_the_user_does_not_see(self, mock_accept,
                                                   mock_context):
        """Glance has it, so that what the source sends is not taken."""
        lost = exception.ImageNotFound(image_id=uuids.image)
        self.records.set('disk', record())
        ensure = (self.local.image_backend.by_name.return_value.
                  ensure_image_cached)
        ensure.side_effect = [lost, 'the base', lost]
        self.of().accept()
        cache_base = mock_accept.call_args.args[5]
        self.assertEqual('the base', cache_base())
        self.assertIs(mock.sentinel.own, ensure.call_args.args[0])
        self.assertIs(lost, self.assertRaises(
            exception.ImageNotFound, cache_base))

    @mock.patch('nova.virt.libvirt.storage.move.handover.look_again')
    @mock.patch('nova.virt.libvirt.storage.move.handover.look')
    @mock.patch('nova.virt.libvirt.storage.move.destination.accept')
    def test_what_has_come_is_looked_at_again(
            self, mock_accept, mock_look, mock_again):
        coming = record(state='building', previous=record(host='there'))
        self.records.set('disk.eph0', coming)
        mock_accept.side_effect = lambda *args: self.records.mark('ready')
        disks = self.of()
        disks.accept()
        connection, came = mock_look.call_args.args
        self.assertTrue(came['disk.eph0'].is_building)
        mock_again.assert_not_called()
        # When nothing but the guest's start is left to do
        make = mock.Mock(side_effect=lambda **kwargs:
                         mock_again.assert_not_called())
        disks.finish(make)
        make.assert_called_once_with(record=None)
        mock_again.assert_called_once_with(
            mock.sentinel.context, self.local.get_connection, self.records,
            mock_look.return_value)
        self.assertIs(connection, self.local.get_connection())

    @mock.patch('nova.virt.libvirt.storage.move.handover.look_again')
    def test_what_was_here_is_not_looked_at_again(self, mock_again):
        self.records.set('disk.eph0', record())
        disks = self.of()
        with mock.patch(
                'nova.virt.libvirt.storage.move.destination.accept'):
            disks.accept()
        disks.finish(mock.Mock())
        mock_again.assert_not_called()

    def _move(self, **kwargs):
        disks = self.of()
        with mock.patch.object(transition, 'Transition') as mock_transition:
            moving = mock_transition.return_value
            moving.run.side_effect = self.error
            disks.move_to_pools(**kwargs)
        disks.started()
        return moving

    def test_a_guest_that_is_off_goes_on_with_its_legacy_disks(self):
        self.records.set('disk', record())
        disk_info = {'mapping': {'disk': {}}}
        self._move(disk_info=disk_info).finish.assert_called_once_with()
        self.assertEqual(
            {'disk': {'metadata': self.records.get('disk')}},
            disk_info['mapping'])

    def test_a_guest_that_runs_stays(self):
        self.assertRaises(exception.DiskTransitionFailed, self._move,
                          guest_is_off=False)

    def test_logical_volumes_do_not_migrate(self):
        """Nothing is copied that nobody can copy, the guest being off."""
        self.records.set('disk', record())
        self.of().refuse_logical_volumes()
        self.records.set('disk.local', record(
            backend='lvm', pool=None, volume=None))
        e = self.assertRaises(exception.MigrationPreCheckError,
                              self.of().refuse_logical_volumes)
        self.assertIn('as disk.local are', str(e))

    @ddt.data(('dir', 'disk', 'qcow2', True), ('netfs', 'disk', 'raw', True),
              ('rbd', 'disk', 'qcow2', False),
              ('rbd', 'disk.config', 'raw', False),
              ('logical', 'disk', 'raw', False),
              ('logical', 'disk.swap', 'qcow2', False),
              # That of an instance with logical volumes
              ('logical', 'disk.config', 'raw', True))
    @ddt.unpack
    def test_files_go_into_directories(self, pool_type, name, image_format,
                                       expected):
        """Elsewhere an instance keeps them, and migrates with them."""
        pool_of = self.patch('nova.virt.libvirt.storage.pool.setup.pool_of')
        pool_of.return_value.kind.return_value = kinds.of_type(pool_type)
        self.records.set(name, record(backend='flat', format=image_format))
        self.assertEqual(expected, self._move().run.called)

    def test_libvirt_does_not_say_what_pool_it_is(self):
        # Its storage daemon may be away; the files need none.
        self.patch('nova.virt.libvirt.storage.pool.setup.pool_of',
                   ).return_value.exists.side_effect = (
            exception.StoragePoolError(pool='p', host='here', code=38,
                                       reason='daemon is away'))
        self.records.set('disk', record(backend='qcow2', format='qcow2'))
        # The guest has to be started.
        self._move().run.assert_not_called()
        self.assertIn('daemon is away', self.stdlog.logger.output)
        e = self.assertRaises(exception.DiskTransitionFailed, self._move,
                              guest_is_off=False)
        self.assertIn('daemon is away', str(e))

    def test_legacy_backend(self):
        self.flags(images_type='qcow2', group='libvirt')
        self._move().run.assert_not_called()

    def test_no_mappings(self):
        self.of_instance.return_value = metadata.InstanceDisks(
            self.instance, {}, None)
        self._move().run.assert_not_called()

    def test_finish_that_fails_is_for_next_time(self):
        disks = self.of()
        with mock.patch.object(transition, 'Transition') as mock_transition:
            mock_transition.return_value.finish.side_effect = OSError
            disks.finish_earlier_move()
        disks.started()


class UnknownDisksTestCase(OperationTestCase):
    """Neither records nor the guest nor files tell of the root disk."""

    def setUp(self):
        super().setUp()
        self.disk_info = self.patch(
            'nova.virt.libvirt.blockinfo.get_disk_info', return_value={
                'mapping': {'disk': {}, 'disk.swap': {}, 'root': {}}})
        self.guest.get_config.return_value.devices = []
        self.local.image_backend.by_name.side_effect = self.image
        leftovers.note(self.records, 'here', [
            ('p', '%s_disk' % uuids.instance)])

    @staticmethod
    def image(instance, name, image_type, disk_info_mapping):
        return mock.Mock(pool_name='p',
                         volume_name='%s_%s' % (instance.uuid, name))

    def check(self):
        self.of(reboot.Reboot)._check_finished()

    def test_destroyed_and_not_made_again(self):
        # Its name may be that of what a rebuild couldn't delete.
        e = self.assertRaises(exception.DiskNotFinished, self.check)
        self.assertIn('rebuild', str(e))
        self.assertIn(' disk ', str(e))

    def test_on_record(self):
        self.records.set('disk', record())
        self.check()

    def test_in_the_guest(self):
        device = vconfig.LibvirtConfigGuestDisk()
        device.source_type, device.driver_format = 'volume', 'qcow2'
        device.source_volume = '%s_disk' % uuids.instance
        self.guest.get_config.return_value.devices = [device]
        self.check()

    def test_nothing_is_left(self):
        # On Ceph, for example, it may be whole, and is raw.
        leftovers.forget(self.records, 'here', leftovers.on_host(
            self.records, 'here'))
        self.check()

    def test_other_backend(self):
        self.flags(images_type='rbd', group='libvirt')
        self.check()


@ddt.ddt
class RebootTestCase(OperationTestCase):

    def setUp(self):
        super().setUp()
        self.pool = self.patch('nova.virt.libvirt.storage.pool.pool.'
                               'StoragePool').return_value
        self.pool.kind.return_value.is_ceph = False
        self.pool.volumes.return_value = []
        self.instance.flavor = objects.Flavor(root_gb=1, swap=0)
        self.migration = None
        self.patch('nova.virt.libvirt.storage.move.source.unfinished',
                   side_effect=lambda *args: self.migration)
        evacuation = 'nova.virt.libvirt.storage.records.evacuation.'
        self.unknown = self.patch(
            'nova.virt.libvirt.storage.reboot.Reboot._unknown',
            return_value=[])
        self.patch(evacuation + 'find_unsettled')
        self.has_come = self.patch(
            evacuation + 'has_come', return_value=False)
        self.has_failed = self.patch(
            evacuation + 'has_failed', return_value=False)
        self.off = exception.StoragePoolError(
            pool='p', host='here', code=1, reason='can not be started')

    def check(self):
        disks = self.of(reboot.Reboot)
        disks.check()
        return disks

    def test_check_finds_a_pool_that_cant_be_started(self):
        self.records.set('disk', record())
        self.check()
        self.pool.start.side_effect = self.off
        self.assertIs(self.off, self.assertRaises(
            exception.StoragePoolError, self.check))

    @ddt.data(('qcow2', 'qcow2'), ('raw', 'flat'))
    @ddt.unpack
    def test_check_believes_the_files_of_an_older_compute(
            self, image_format, backend):
        self.has_come.return_value = True
        device = vconfig.LibvirtConfigGuestDisk()
        device.source_type, device.driver_format = 'file', image_format
        device.source_path = '/instances/%s/disk' % uuids.instance
        self.guest.get_config.return_value.devices = [device]
        self.records.set('disk', record(host='dead', size=7))
        self.check()
        found = self.records.get('disk')
        self.assertEqual((backend, image_format, 'here', 7, None), (
            found.backend, found.format, found.host, found.size, found.pool))
        # It is deleted when its host is back.
        self.assertEqual(
            [('dead', 'p', '%s_disk' % uuids.instance)],
            [tuple(left) for left in self.records.leftovers])
        self.pool.start.assert_not_called()

    def test_check_takes_back_what_was_to_be_evacuated(self):
        self.has_failed.return_value = True
        device = vconfig.LibvirtConfigGuestDisk()
        device.source_type, device.driver_format = 'volume', 'qcow2'
        device.source_pool = 'p'
        device.source_volume = '%s_disk' % uuids.instance
        self.guest.get_config.return_value.devices = [device]
        self.records.set('disk', record(host='there', state='building'))
        self.check()
        found = self.records.get('disk')
        self.assertEqual(('here', 'ready', 'qcow2'),
                         (found.host, found.state, found.format))
        self.pool.start.assert_called_once_with()

    def test_check_starts_each_pool_once(self):
        for name in ('disk', 'disk.eph0', 'disk.eph1'):
            self.records.set(name, record(name))
        self.check()
        self.pool.start.assert_called_once_with()

    @ddt.data({'host': 'there'},
              {'backend': 'flat', 'pool': None, 'volume': None})
    def test_check_does_not_start_pools_that_are_not_used(self, values):
        self.records.set('disk', record(**values))
        self.check()
        self.pool.start.assert_not_called()

    def test_check_starts_pools_that_are_gone_back_to(self):
        self.migration = mock.sentinel.migration
        self.records.set('disk', record(host='there', previous=record()))
        self.pool.start.side_effect = self.off
        self.assertRaises(exception.StoragePoolError, self.check)

    def test_check_finds_a_disk_that_is_being_copied(self):
        self.records.set('disk', record(
            state='building', host='there', migration_id=7,
            previous=record()))
        e = self.assertRaises(exception.DiskBeingCopied, self.check)
        self.assertIn(uuids.instance, str(e))
        # The guest isn't touched, nor what it runs with.
        self.pool.start.assert_not_called()
        # A copy that was cut off is undone.
        self.migration = mock.sentinel.migration
        self.check()
        self.pool.start.assert_called_once_with()

    def test_check_finds_a_disk_that_is_being_copied_on_this_host(self):
        self.records.set('disk', record(
            state='building', migration_id=7, previous=record()))
        # One that has ended is gone on with.
        self.check()
        self.patch('nova.virt.libvirt.storage.move.source.is_running',
                   return_value=True)
        self.assertRaises(exception.DiskBeingCopied, self.check)

    @ddt.data(True, False)
    def test_check_finds_a_disk_that_was_given_back(self, is_gone):
        # A revert was cut off here, and an operator has reset the state.
        self.records.set('disk', record(host='there'))
        self.check()  # in a pool that both hosts see, say
        if is_gone:
            self.pool.find.return_value = None
        else:
            self.records.leftovers = [('here', 'p', record().volume)]
        e = self.assertRaises(exception.DiskGivenBack, self.check)
        for part in ('host there', 'host here', record().volume):
            self.assertIn(part, str(e))
        self.migration = mock.sentinel.migration
        self.check()

    def want(self, *names):
        """The disks that the instance has by its flavor and image."""
        self.patch('nova.virt.libvirt.storage.operation.DiskOperation.'
                   '_disk_info',
                   return_value={'mapping': dict.fromkeys(names, {})})

    @ddt.data('disk', 'disk.local')
    def test_check_finds_a_disk_that_was_never_finished(self, name):
        self.want('disk', 'disk.local')
        self.records.set(name, record(name, state='building'))
        e = self.assertRaises(exception.DiskNotFinished, self.check)
        self.assertIn(name, str(e))

    def test_disk_that_was_never_finished_and_is_wanted_no_more(self):
        # finish_migration has failed, and Nova has put the flavor back.
        self.want('disk')
        self.records.set('disk', record())
        self.records.set('disk.local', record('disk.local', state='building'))
        discard = self.patch(
            'nova.virt.libvirt.storage.records.lifecycle._discard')
        image = self.patch(
            'nova.virt.libvirt.storage.operation.DiskOperation.image')
        self.bring_in_order()
        image.assert_called_once_with('disk.local', mock.ANY)
        discard.assert_called_once_with(image.return_value, mock.ANY)
        self.assertIsNone(self.records.get('disk.local'))
        self.assertIsNotNone(self.records.get('disk'))

    @ddt.data('disk.swap', 'disk.config', 'disk.rescue')
    def test_check_lets_pass_what_is_made_anew(self, name):
        self.records.set(name, record(name, state='building'))
        self.check()

    def test_check_lets_pass_what_has_come(self):
        self.records.set('disk', record(
            state='building', previous=record(host='there')))
        self.check()

    def bring_in_order(self):
        """:returns: what is called, in its order"""
        calls = mock.Mock()
        for name in ('source.abandon', 'source.settle', 'destination.accept',
                     'guest_files.restore_nvram', 'guest_files.restore_tpm'):
            self.patch('nova.virt.libvirt.storage.move.%s' % name,
                       new=getattr(calls, name.split('.')[1]))
        self.patch('nova.virt.libvirt.storage.records.lifecycle.take_up',
                   new=calls.take_up)
        self.patch('nova.virt.libvirt.storage.records.lifecycle.went_back',
                   new=calls.went_back)
        # Whole, once it is accepted.
        calls.accept.side_effect = lambda *args: self.records.mark(
            'ready', ['disk'])
        for name in ('look', 'look_again'):
            self.patch('nova.virt.libvirt.storage.move.handover.%s' % name,
                       new=getattr(calls, name))
        self.reboot = self.check()
        with mock.patch.object(transition, 'Transition') as mock_transition:
            calls.attach_mock(mock_transition, 'transition')
            self.reboot.bring_in_order({'mapping': {}}, None, None)
        return [call[0] for call in calls.mock_calls]

    def test_nothing_to_bring_in_order(self):
        self.assertEqual(
            ['take_up', 'settle', 'transition', 'transition().run'],
            self.bring_in_order())

    @ddt.data(('libvirt-storage', 1), ('rbd', 0))
    @ddt.unpack
    def test_disks_of_a_rescue_that_has_failed(self, backend, expected):
        self.records.set('disk', record())
        self.records.set('disk.rescue', record(
            'disk.rescue', backend=backend, state='building'))
        delete = self.patch(
            'nova.virt.libvirt.storage.pool.ownership.delete_volumes')
        self.bring_in_order()
        self.assertEqual(
            ['disk'], [name for name, _record in self.records.items()])
        self.assertEqual(expected * [mock.call(
            mock.ANY, self.instance, rescue=True, disks=self.records)],
            delete.mock_calls)

    def _fail_to_resize(self, *mapping):
        """To a flavor with all disks, from one with the root disk alone."""
        flavor = {'root_gb': 1, 'ephemeral_gb': 2, 'swap': 3}
        self.instance.flavor = objects.Flavor(**flavor)
        self.instance.old_flavor = objects.Flavor(
            **{**flavor, 'ephemeral_gb': 0, 'swap': 0})
        self.instance.os_type, self.instance.vm_mode = 'linux', None
        self.patch('nova.virt.libvirt.blockinfo.get_disk_info', return_value={
            'mapping': dict.fromkeys(mapping, {})})
        self.records.set('disk', record())
        self.made, self.images = [], []
        self.local.image_backend.by_name.side_effect = self._image

    def _image(self, instance, name, image_type, disk_info_mapping):
        image = mock.Mock(is_block_dev=False)
        image.metadata.side_effect = lambda size: record(
            name, state='building', size=size)
        image.create_from_func.side_effect = (
            lambda func, size, **kwargs: self.made.append(
                (name, size, func.func, func.keywords)))
        self.images.append((name, disk_info_mapping))
        return image

    def _finish(self, *mapping):
        disks, driver = self.of(reboot.Reboot), mock.Mock()
        with mock.patch.object(disks, 'move_to_pools'), mock.patch(
                'nova.virt.libvirt.storage.move.source.settle'):
            disks.bring_in_order(
                {'mapping': dict.fromkeys(mapping, {})}, None, driver)
        return driver

    def test_disks_that_a_failed_resize_has_not_begun(self):
        mapping = 'disk', 'disk.local', 'disk.swap', 'root'
        self._fail_to_resize(*mapping)
        leftovers.note(self.records, 'there', [('p', 'left')])
        driver = self._finish(*mapping)
        self.assertEqual(
            [{'left'}] * 2, [taken['taken'] for _name, taken in self.images
                             if 'taken' in taken])
        swap, local = sorted(self.made, key=lambda made: made[1])
        self.assertEqual(
            ('disk.swap', 3 * units.Mi, driver._create_swap), swap[:3])
        self.assertEqual(3, swap[3]['swap_mb'])
        self.assertEqual(
            ('disk.local', 2 * units.Gi, driver._create_ephemeral), local[:3])
        self.assertEqual(2, local[3]['ephemeral_size'])
        # Finished with the guest.
        self.assertEqual(['disk.local', 'disk.swap'],
                         sorted(self.records.building()))

    def test_disk_that_a_failed_resize_has_begun(self):
        self._fail_to_resize('disk', 'disk.local')
        self.records.set('disk.local', record('disk.local', state='building'))
        self.check()
        # The guest has had it.
        self.instance.old_flavor.ephemeral_gb = 1
        self.assertRaises(exception.DiskNotFinished, self.check)

    def test_older_compute_has_made_the_disk(self):
        """It keeps no records, and the guest has written to the file."""
        self._fail_to_resize('disk', 'disk.local')
        directory = os.path.join(reboot.CONF.instances_path, uuids.instance)
        os.mkdir(directory)
        with open(os.path.join(directory, 'disk.local'), 'w'):
            pass
        self._finish('disk', 'disk.local')
        self.assertEqual([], self.made)
        self.assertFalse(self.records.get('disk.local').is_in_pool)

    def test_volume_backed_instance(self):
        """It has had no records until now."""
        self._fail_to_resize('disk.swap')
        self.records.clear()
        self._finish('disk.swap')
        self.assertEqual(['disk.swap'], [made[0] for made in self.made])

    @ddt.data(('active', 'libvirt-storage-rbd', True),
              ('error', 'rbd', True), ('error', 'qcow2', False),
              ('resized', 'libvirt-storage-rbd', False))
    @ddt.unpack
    def test_snapshot_of_a_resize(self, vm_state, backend, expected):
        """One that may be reverted yet is started with its host."""
        self.instance.vm_state = vm_state
        self.pool.kind.return_value.is_ceph = (
            backend == 'libvirt-storage-rbd')
        self.records.set('disk', record(
            backend=backend, previous=record(backend=backend, host='there')))
        image = self.local.image_backend.by_name.return_value
        self.bring_in_order()
        self.assertEqual(expected, image.remove_snap.called)
        # The guest starts without it.
        image.remove_snap.side_effect = self.off
        self.bring_in_order()
        self.assertEqual(expected, 'is left' in self.stdlog.logger.output)

    def test_snapshot_of_a_revert_that_has_failed(self):
        """An operator may go back to it."""
        self.instance.vm_state = 'error'
        self.pool.kind.return_value.is_ceph = True
        self.records.set('disk', record(backend='libvirt-storage-rbd'))
        self.bring_in_order()
        self.local.image_backend.by_name.assert_not_called()

    def test_disks_that_came(self):
        # finish_migration has failed; a hard reboot is the way out.
        self.records.set('disk', record(
            state='building', previous=record(host='there')))
        calls = self.bring_in_order()
        self.assertEqual(['accept', 'look'], calls[:2])
        # As long as the source's copies are kept
        self.assertEqual(['look_again', 'settle'], calls[3:5])

    def test_config_drive_that_was_never_finished(self):
        # It tells what devices the guest has, which is to be defined first.
        self.records.set('disk.config', record('disk.config',
                                               state='building'))
        create, make = mock.Mock(), mock.Mock()
        self.patch('nova.virt.libvirt.storage.records.lifecycle._discard')
        self.patch('nova.virt.libvirt.storage.records.lifecycle.measure')
        self.bring_in_order()
        self.reboot.creator(create, make)('xml', power_on=True)
        make.assert_not_called()
        create.assert_called_once_with(
            'xml', power_on=True, post_xml_callback=mock.ANY)
        create.call_args.kwargs['post_xml_callback']()
        make.assert_called_once_with(record=self.records.get('disk.config'))
        self.assertEqual('ready', self.records.get('disk.config').state)

    def test_nothing_unfinished(self):
        self.bring_in_order()
        self.assertIs(mock.sentinel.create, self.reboot.creator(
            mock.sentinel.create, mock.sentinel.make))

    def test_disks_that_were_copied_and_not_sent(self):
        # The compute manager has failed on the source after the copy.
        self.migration = mock.sentinel.migration
        directory = os.path.join(reboot.CONF.instances_path, uuids.instance)
        os.mkdir(directory)
        os.mkdir(directory + '_resize')
        with open(os.path.join(directory + '_resize', 'disk.info'), 'w'):
            pass
        self.assertEqual(
            ['abandon', 'restore_nvram', 'restore_tpm', 'went_back',
             'take_up'],
            self.bring_in_order()[:5])
        self.assertEqual(['disk.info'], os.listdir(directory))
        self.assertFalse(os.path.exists(directory + '_resize'))

    def test_guest_that_was_never_off(self):
        # This service was killed while disks were sent ahead.
        abandon = self.patch('nova.virt.libvirt.storage.move.source.abandon')
        self.patch('nova.virt.libvirt.storage.move.guest_files.restore_nvram')
        self.guest.is_active.return_value = True
        disks = self.of(reboot.Return)
        with mock.patch.object(disks, 'take_up') as mock_take_up:
            disks.take_back(mock.sentinel.migration)
        abandon.assert_called_once()
        self.assertTrue(disks.guest_runs)
        mock_take_up.assert_not_called()

    def test_made_on_ceph_for_a_flavor_that_is_given_up(self):
        for name in ('source.abandon', 'guest_files.restore_nvram'):
            self.patch('nova.virt.libvirt.storage.move.%s' % name)
        self.instance.flavor = objects.Flavor(root_gb=1, swap=0)
        swap = record('disk.swap', host='there',
                      backend='libvirt-storage-rbd')
        self.records.set('disk.swap', swap)
        noted = [('here', 'p', swap.volume)]
        told = []
        self.records.save.side_effect = lambda context: told.append(
            [tuple(left) for left in self.records.leftovers])
        volume = self.pool.volume.return_value
        volume.delete.side_effect = lambda: told.append('deleted')
        disks = self.of(reboot.Return)
        with mock.patch.object(disks, 'take_up'), \
                mock.patch.object(disks, '_disk_info'), \
                mock.patch.object(disks, 'finish_earlier_move'):
            disks.take_back(mock.sentinel.migration)
        # Killed in between, this compute knows what is left.
        self.assertEqual([noted, 'deleted', []], told)
        self.pool.volume.assert_called_once_with(swap.volume)

    @ddt.data(True, False)
    def test_swap_of_a_flavor_that_is_given_up(self, had_swap):
        """Made by a resize on this host; no mapping, no record names it."""
        for name in ('source.abandon', 'guest_files.restore_nvram'):
            self.patch('nova.virt.libvirt.storage.move.%s' % name)
        self.instance.flavor = objects.Flavor(
            root_gb=1, swap=64 if had_swap else 0)
        self.records.set('disk', record())
        self.pool.name = 'nova-disks-pool'
        self.pool.volumes.return_value = []
        for name in ('disk', 'disk.swap', 'disk.swap.1', 'disk.swapper'):
            volume = mock.Mock()
            volume.name = record(name).volume
            self.pool.volumes.return_value.append(volume)
        noted = []
        self.records.save.side_effect = lambda context: noted.append(
            [tuple(left) for left in self.records.leftovers])
        disks = self.of(reboot.Return)
        with mock.patch.object(disks, 'take_up'), \
                mock.patch.object(disks, '_disk_info'), \
                mock.patch.object(disks, 'finish_earlier_move'):
            disks.take_back(mock.sentinel.migration)
        left = [] if had_swap else [
            record(name).volume for name in ('disk.swap', 'disk.swap.1')]
        self.assertEqual([] if had_swap else [[
            ('here', 'nova-disks-pool', name) for name in left], []], noted)
        self.assertCountEqual(
            left, [call.args[0] for call in self.pool.volume.mock_calls
                   if call.args])
        self.assertEqual(len(left),
                         self.pool.volume.return_value.delete.call_count)

    def test_swap_of_a_flavor_that_is_given_up_is_not_seen(self):
        """The instance runs again; what is left goes with it."""
        for name in ('source.abandon', 'guest_files.restore_nvram'):
            self.patch('nova.virt.libvirt.storage.move.%s' % name)
        self.instance.flavor = objects.Flavor(root_gb=1, swap=0)
        self.records.set('disk', record())
        self.pool.volumes.side_effect = self.off
        disks = self.of(reboot.Return)
        with mock.patch.object(disks, 'take_up') as mock_take_up, \
                mock.patch.object(disks, '_disk_info'), \
                mock.patch.object(disks, 'finish_earlier_move'):
            disks.take_back(mock.sentinel.migration)
        mock_take_up.assert_called_once()
        self.assertIn('can not be started', self.stdlog.logger.output)

    def test_legacy_names_go_at_a_revert(self):
        # They were linked into the pool while the guest ran.
        for name in ('source.abandon', 'guest_files.restore_nvram'):
            self.patch('nova.virt.libvirt.storage.move.%s' % name)
        disks = self.of(reboot.Return)
        with mock.patch.object(transition, 'Transition') as mock_transition, \
                mock.patch.object(disks, 'take_up'), \
                mock.patch.object(disks, '_disk_info'):
            disks.take_back(mock.sentinel.migration)
        mock_transition.return_value.finish.assert_not_called()
        disks.started()
        mock_transition.return_value.run.assert_not_called()
        mock_transition.return_value.finish.assert_called_once_with()

    @ddt.data((None, True, False), (objects.Flavor(), True, True),
              (objects.Flavor(), False, False))
    @ddt.unpack
    def test_brought_tpm(self, old_flavor, is_there, expected):
        self.instance.old_flavor = old_flavor
        disks = self.of(reboot.Reboot)
        with mock.patch('nova.virt.libvirt.storage.move.guest_files.has_tpm',
                        return_value=is_there):
            self.assertEqual(expected, disks.brought_tpm)
