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

import errno
import os
from unittest import mock

import ddt
import fixtures
from oslo_concurrency import processutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova import exception
from nova import objects
import nova.privsep.storage
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.virt import fake
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage import transition


class Crash(BaseException):
    """The process is gone: nothing catches it."""


class DirectoryVolume:
    """A volume as libvirt has it: known by its pool, a file below it."""

    def __init__(self, pool, name):
        self.pool = pool
        self.name = name
        self.path = os.path.join(pool.directory, name)

    def info(self):
        try:
            return mock.Mock(capacity=os.stat(self.path).st_size)
        except FileNotFoundError:
            raise exception.StorageVolumeNotFound(
                volume=self.name, pool=self.pool.name, host='here')

    def delete(self):
        os.unlink(self.path)
        self.pool.known.remove(self.name)


class DirectoryPool:
    """A pool over a real directory; it knows only what it has made."""

    def __init__(self, name, directory):
        self.name = name
        self.directory = directory
        self.known = set()
        self.made = []
        self.available = units.Gi

    def info(self):
        return mock.Mock(available=self.available)

    def volumes(self):
        return [DirectoryVolume(self, name) for name in sorted(self.known)]

    def volume(self, name):
        if name not in self.known:
            raise exception.StorageVolumeNotFound(
                volume=name, pool=self.name, host='here')
        return DirectoryVolume(self, name)

    def create(self, config):
        self.made.append(config)
        with open(os.path.join(self.directory, config.name), 'xb') as f:
            f.truncate(config.capacity)
        self.known.add(config.name)
        return self.volume(config.name)

    free_name = storage_pool.StoragePool.free_name


class FakeDisks:
    """Records as the database has them: what isn't saved dies with us."""

    def __init__(self, database):
        self.database = database
        self.records = {
            name: record.obj_clone() for name, record in database.items()}
        self.saves = 0

    def items(self):
        return list(self.records.items())

    def set(self, name, record):
        self.records[name] = record

    def save(self, context):
        self.saves += 1
        self.database.clear()
        self.database.update({
            name: record.obj_clone() for name, record in self.records.items()})


class TransitionTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.PrivsepFixture())
        top = self.useFixture(fixtures.TempDir()).path
        self.instance_dir = os.path.join(top, 'instance')
        self.base_dir = os.path.join(top, '_base')
        pool_dir = os.path.join(top, 'disks')
        for path in (self.instance_dir, self.base_dir, pool_dir):
            os.mkdir(path)
        self.pool = DirectoryPool('nova-disks-pool', pool_dir)
        self.instance = objects.Instance(
            uuid=uuids.instance, system_metadata={})
        self.database = {}
        self.content = {}

    def legacy(self, name, content=None, backend='flat', format='raw',
               state='ready'):
        content = content or ('I am %s' % name).encode() * 100
        with open(os.path.join(self.instance_dir, name), 'wb') as f:
            f.write(content)
        self.content[name] = content
        self.database[name] = metadata.LibvirtDiskMetadata(
            backend=backend, format=format, size=len(content), state=state,
            host='here', pool=None, volume=None, previous=None, unmapped=None)

    def transition(self, **kwargs):
        """What a compute service has after a start: only what was saved."""
        self.disks = FakeDisks(self.database)
        return transition.Transition(
            mock.sentinel.context, self.instance, self.disks,
            lambda name: self.pool, self.instance_dir, self.base_dir,
            **kwargs)

    def assert_moved(self):
        for name, content in self.content.items():
            record = self.database[name]
            self.assertEqual('libvirt-storage', record.backend)
            self.assertEqual('ready', record.state)
            self.assertEqual('nova-disks-pool', record.pool)
            self.assertEqual(len(content), record.size)
            with open(self.pool.volume(record.volume).path, 'rb') as f:
                self.assertEqual(content, f.read())
            self.assertFalse(os.path.lexists(
                os.path.join(self.instance_dir, name)))
        self.assertEqual(
            {record.volume for record in self.database.values()},
            set(os.listdir(self.pool.directory)))

    def assert_legacy(self):
        for name, content in self.content.items():
            record = self.database[name]
            self.assertEqual('flat', record.backend)
            self.assertIsNone(record.volume)
            with open(os.path.join(self.instance_dir, name), 'rb') as f:
                self.assertEqual(content, f.read())
        self.assertEqual([], os.listdir(self.pool.directory))

    def no_hard_links(self, code=errno.EXDEV):
        self.useFixture(fixtures.MockPatchObject(
            nova.privsep.storage, 'link_over',
            side_effect=OSError(code, os.strerror(code))))


@ddt.ddt
class TestTransition(TransitionTestCase):

    def test_all_disks_move_in_two_saves(self):
        for name in ('disk', 'disk.eph0', 'disk.swap', 'disk.config'):
            self.legacy(name)
        moving = self.transition()
        self.assertTrue(moving.run())
        moving.finish()
        self.assert_moved()
        self.assertEqual(2, self.disks.saves)
        self.assertEqual('%s_disk.eph0' % uuids.instance,
                         self.database['disk.eph0'].volume)

    def test_a_second_time_nothing_is_done(self):
        self.legacy('disk')
        moving = self.transition()
        moving.run()
        moving.finish()
        again = self.transition()
        self.assertFalse(again.run())
        again.finish()
        self.assertEqual(0, self.disks.saves)
        self.assertEqual(1, len(self.pool.made))
        self.assert_moved()

    def test_file_keeps_its_inode(self):
        self.legacy('disk')
        inode = os.stat(os.path.join(self.instance_dir, 'disk')).st_ino
        moving = self.transition()
        moving.run()
        moving.finish()
        path = self.pool.volume(self.database['disk'].volume).path
        self.assertEqual(inode, os.stat(path).st_ino)

    @ddt.data(errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
    def test_copied_where_hard_links_do_not_work(self, code):
        self.legacy('disk')
        self.no_hard_links(code)
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()

    def test_other_errors_of_link_are_none_of_these(self):
        self.legacy('disk')
        self.no_hard_links(errno.EIO)
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertIn(uuids.instance, str(e))
        self.assert_legacy()

    def test_copy_needs_room(self):
        self.legacy('disk')
        self.no_hard_links()
        self.pool.available = 1
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertIn('1 bytes left', str(e))
        self.assert_legacy()

    def test_running_guests_disk_is_linked(self):
        self.legacy('disk')
        moving = self.transition(guest_is_off=False)
        moving.run()
        path = self.pool.volume(self.database['disk'].volume).path
        with open(os.path.join(self.instance_dir, 'disk'), 'r+b') as f:
            f.write(b'later')
        with open(path, 'rb') as f:
            self.assertEqual(b'later', f.read(5))

    def test_running_guests_disk_is_not_copied(self):
        self.legacy('disk')
        self.no_hard_links()
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition(guest_is_off=False).run)
        self.assertIn('hard reboot the server first', str(e))
        self.assert_legacy()

    def test_failed_copy_of_the_last_disk_undoes_all(self):
        for name in ('disk', 'disk.eph0', 'disk.config'):
            self.legacy(name)
        self.no_hard_links()
        real = nova.privsep.storage.copy_over
        with mock.patch.object(
                nova.privsep.storage, 'copy_over', side_effect=[
                    mock.DEFAULT, mock.DEFAULT,
                    processutils.ProcessExecutionError('full')]) as copy:
            copy.side_effect = self._fail_third(real)
            self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assert_legacy()

    @staticmethod
    def _fail_third(real):
        calls = []

        def copy(source, target):
            calls.append(target)
            if len(calls) == 3:
                raise processutils.ProcessExecutionError('No space left')
            real(source, target)
        return copy

    def test_wrong_capacity_in_libvirt_is_refused(self):
        self.legacy('disk')
        with mock.patch.object(DirectoryVolume, 'info',
                               return_value=mock.Mock(capacity=7)):
            e = self.assertRaises(exception.DiskTransitionFailed,
                                  self.transition().run)
        self.assertIn('7 bytes', str(e))
        self.assert_legacy()

    def test_size_on_record_is_mended(self):
        self.legacy('disk')
        self.database['disk'].size = 3
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()

    def test_missing_file_moves_nothing(self):
        self.legacy('disk')
        self.legacy('disk.eph0')
        os.unlink(os.path.join(self.instance_dir, 'disk.eph0'))
        del self.content['disk.eph0']
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertIn('disk.eph0', str(e))
        self.assertEqual([], self.pool.made)

    @ddt.data(exception.InvalidDiskInfo(reason='no answer'),
              exception.DiskNotFound(location='no answer'),
              processutils.ProcessExecutionError('no answer'))
    def test_disk_that_cannot_be_inspected(self, error):
        with self._qcow2(None) as info:
            info.side_effect = error
            e = self.assertRaises(exception.DiskTransitionFailed,
                                  self.transition().run)
        self.assertIn('no answer', str(e))
        self.assertIn(uuids.instance, str(e))
        self.assertEqual([], self.pool.made)
        self.assertEqual('qcow2', self.database['disk'].backend)

    def test_refusal_is_told_once(self):
        self.legacy('disk', state='building')
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertEqual(1, str(e).count(uuids.instance))

    def test_name_of_what_is_left_is_not_taken(self):
        self.instance.system_metadata = {
            'libvirt_storage_left_1': '["here", "nova-disks-pool", "%s_disk"]'
            % uuids.instance}
        self.legacy('disk')
        self.transition().run()
        self.assertEqual('%s_disk.1' % uuids.instance,
                         self.database['disk'].volume)

    def test_symbolic_link_is_not_followed(self):
        self.legacy('disk')
        path = os.path.join(self.instance_dir, 'disk')
        os.rename(path, path + '.real')
        os.symlink(path + '.real', path)
        self.assertRaises(exception.DiskTransitionFailed,
                          self.transition().run)
        self.assertEqual([], self.pool.made)

    def test_half_made_disk_stays(self):
        self.legacy('disk', state='building')
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertIn('never finished', str(e))
        self.assertEqual([], self.pool.made)

    @ddt.data('lvm', 'rbd', 'ploop')
    def test_with_a_disk_of_another_backend_all_stay(self, backend):
        self.legacy('disk', backend=backend)
        self.legacy('disk.config')
        self.assertFalse(self.transition().run())
        self.assertEqual([], self.pool.made)

    def test_rescue_disks_stay(self):
        self.legacy('disk')
        self.legacy('disk.rescue')
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assertEqual('flat', self.database['disk.rescue'].backend)
        self.assertTrue(os.path.exists(
            os.path.join(self.instance_dir, 'disk.rescue')))

    def test_taken_name_gets_a_suffix(self):
        taken = '%s_disk' % uuids.instance
        self.pool.known = {taken}
        with open(os.path.join(self.pool.directory, taken), 'wb') as f:
            f.write(b'other')
        self.legacy('disk')
        moving = self.transition()
        moving.run()
        self.assertEqual(taken + '.1', self.database['disk'].volume)
        self.assertEqual(5, self.pool.volume(taken).info().capacity)

    def test_guest_written_header_is_never_read(self):
        # A qcow2 header that names a file of the host as backing file.
        header = (b'QFI\xfb' + (3).to_bytes(4, 'big') +
                  (104).to_bytes(8, 'big') + (11).to_bytes(4, 'big'))
        self.legacy('disk', header.ljust(104, b'\0') + b'/etc/passwd')
        with mock.patch('nova.privsep.qemu.privileged_qemu_img_info') as info:
            moving = self.transition()
            moving.run()
            moving.finish()
        info.assert_not_called()
        self.assertEqual('raw', self.pool.made[0].target_format)
        self.assertIsNone(self.pool.made[0].backing_store)
        self.assert_moved()

    def _qcow2(self, backing):
        self.legacy('disk', backend='qcow2', format='qcow2')
        return mock.patch(
            'nova.virt.images.privileged_qemu_img_info',
            return_value=mock.Mock(
                virtual_size=len(self.content['disk']),
                backing_file=backing, backing_file_format='raw'))

    def test_overlay_keeps_its_base(self):
        base = os.path.join(self.base_dir, 'abc')
        with self._qcow2(base) as info:
            self.transition().run()
        self.assertEqual({'qcow2'}, {
            call.kwargs['format'] for call in info.call_args_list})
        config = self.pool.made[0]
        self.assertEqual(('qcow2', '1.1'),
                         (config.target_format, config.compat))
        self.assertEqual((base, 'raw'), (config.backing_store.path,
                                         config.backing_store.format))

    @ddt.data('/etc/passwd', 'json:{"file.filename":"/etc/passwd"}',
              'nbd://localhost/x', '../_base/../../etc/passwd')
    def test_base_outside_of_the_image_cache_is_refused(self, backing):
        with self._qcow2(backing):
            e = self.assertRaises(exception.DiskTransitionFailed,
                                  self.transition().run)
        self.assertIn('image cache', str(e))
        self.assertEqual([], self.pool.made)

    def test_rescued_guest_goes_back_to_the_volume(self):
        self.legacy('disk')
        xml = os.path.join(self.instance_dir, 'unrescue.xml')
        with open(xml, 'w') as f:
            f.write("<domain><devices><disk type='file'><driver type='raw'/>"
                    "<source file='%s/disk' index='1'/></disk><disk "
                    "type='file'><source file='/other'/></disk></devices>"
                    "</domain>" % self.instance_dir)
        moving = self.transition()
        moving.run()
        moving.finish()
        with open(xml) as f:
            text = f.read()
        self.assertNotIn(self.instance_dir, text)
        self.assertIn('<disk type="volume"><driver type="raw"/><source '
                      'pool="nova-disks-pool" volume="%s_disk"/>' %
                      uuids.instance, text)
        self.assertIn('<disk type="file"><source file="/other"/>', text)

    def test_last_name_is_never_removed(self):
        self.legacy('disk')
        moving = self.transition()
        moving.run()
        os.unlink(self.pool.volume(self.database['disk'].volume).path)
        self.assertRaises(exception.StorageVolumeNotFound, moving.finish)
        self.assertTrue(os.path.exists(
            os.path.join(self.instance_dir, 'disk')))


@ddt.ddt
class TestCrash(TransitionTestCase):
    """The service dies after one step; the next call finishes the work."""

    def setUp(self):
        super().setUp()
        for name in ('disk', 'disk.eph0', 'disk.config'):
            self.legacy(name)
        with open(os.path.join(self.instance_dir, 'unrescue.xml'), 'w') as f:
            f.write("<domain><devices><disk type='file'>"
                    "<source file='%s/disk'/></disk></devices></domain>" %
                    self.instance_dir)

    def _name_that_counts(self, name):
        record = self.database[name]
        if record.backend == 'libvirt-storage':
            return self.pool.volume(record.volume).path
        return os.path.join(self.instance_dir, name)

    def _assert_no_disk_is_lost(self):
        for name, content in self.content.items():
            with open(self._name_that_counts(name), 'rb') as f:
                self.assertEqual(content, f.read())

    def _crash_after(self, step):
        real = getattr(transition.Transition, step)

        def crash(moving):
            real(moving)
            raise Crash()

        with mock.patch.object(transition.Transition, step, crash):
            moving = self.transition()
            try:
                moving.run()
                moving.finish()
            except Crash:
                return
        self.fail('%s is no step' % step)

    @ddt.data(*(transition.Transition.STEPS +
                transition.Transition.CLOSING_STEPS))
    def test_linked(self, step):
        self._crash_after(step)
        self._assert_no_disk_is_lost()
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()

    @ddt.data(*(transition.Transition.STEPS +
                transition.Transition.CLOSING_STEPS))
    def test_copied(self, step):
        self.no_hard_links()
        self._crash_after(step)
        self._assert_no_disk_is_lost()
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()

    def test_guest_wrote_on_after_a_copy_that_did_not_count(self):
        self.no_hard_links()
        self._crash_after('_check_volumes')
        self.content['disk'] = b'newer'.ljust(len(self.content['disk']))
        with open(os.path.join(self.instance_dir, 'disk'), 'wb') as f:
            f.write(self.content['disk'])
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()

    def test_volume_that_libvirt_forgot_the_making_of(self):
        # Killed within libvirt: the file is there, unknown to the pool.
        self._crash_after('_fill_volumes')
        self.pool.known.clear()
        for name in os.listdir(self.pool.directory):
            self.pool.known.add(name)
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()


class DriverTestCase(test.NoDBTestCase):
    """When the driver moves disks, and what becomes of a failure."""

    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.LibvirtFixture())
        self.driver = libvirt_driver.LibvirtDriver(fake.FakeVirtAPI())
        self.flags(images_type='libvirt-storage', group='libvirt')
        self.instance = objects.Instance(
            uuid=uuids.instance, image_ref=uuids.image, system_metadata={})
        self.disks = mock.Mock(has_mappings=True)
        self.error = exception.DiskTransitionFailed(
            instance=uuids.instance, reason='a test')

    def move(self, **kwargs):
        with mock.patch.object(transition, 'Transition') as mock_transition:
            mock_transition.return_value.run.side_effect = self.error
            return self.driver._move_disks_to_pools(
                mock.sentinel.context, self.instance, self.disks, **kwargs)

    def test_a_guest_that_is_off_goes_on_with_its_legacy_disks(self):
        self.assertIsNotNone(self.move())

    def test_a_guest_that_runs_stays(self):
        self.assertRaises(exception.DiskTransitionFailed, self.move,
                          guest_is_off=False)

    def test_migration_is_refused_while_the_guest_runs(self):
        with test.nested(
            mock.patch.object(self.driver, '_take_up_disks'),
            mock.patch.object(self.driver, '_move_disks_to_pools',
                              side_effect=self.error),
            mock.patch.object(self.driver, '_get_existing_guest_config'),
            mock.patch('nova.virt.libvirt.blockinfo.get_disk_info'),
        ):
            e = self.assertRaises(
                exception.InstanceFaultRollback,
                self.driver._link_disks_into_pools, mock.sentinel.context,
                self.instance, {})
        self.assertIs(self.error, e.inner_exception)

    def test_legacy_backend(self):
        self.flags(images_type='qcow2', group='libvirt')
        self.assertIsNone(self.move())

    def test_no_mappings(self):
        self.disks.has_mappings = False
        self.assertIsNone(self.move())

    def test_finish_that_fails_is_for_next_time(self):
        moving = mock.Mock()
        moving.finish.side_effect = OSError
        self.driver._finish_move_to_pools(self.instance, moving)
        self.driver._finish_move_to_pools(self.instance, None)

    def test_legacy_names_go_at_revert(self):
        """They were linked into the pool while the guest ran."""
        calls = mock.Mock()
        with test.nested(
            mock.patch('nova.virt.libvirt.blockinfo.get_disk_info',
                       return_value={'mapping': {}}),
            mock.patch('nova.virt.libvirt.storage.move.source.abandon'),
            mock.patch.object(self.driver, '_image_of'),
            mock.patch.object(self.driver, '_take_back_disks',
                              return_value=self.disks),
            mock.patch.object(self.driver, '_finish_revert_migration_vtpm'),
            mock.patch.object(self.driver,
                              '_get_all_assigned_mediated_devices'),
            mock.patch.object(self.driver, '_get_existing_guest_config'),
            mock.patch.object(self.driver, '_get_guest_xml'),
            mock.patch.object(self.driver, '_create_guest_with_network',
                              calls.create),
            mock.patch.object(transition, 'Transition', calls.transition),
        ):
            self.driver.finish_revert_migration(
                mock.sentinel.context, self.instance, [], None, {},
                power_on=False)
        self.assertEqual(
            ['create', 'transition', 'transition().finish'],
            [call[0] for call in calls.mock_calls])
