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
import shutil
import time
import types
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import task_states
from nova.compute import vm_states
from nova import context
from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt.storage import orphans
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata

POOL = 'nova-disks-pool'


class OrphansTestBase(test.NoDBTestCase):
    def setUp(self):
        super().setUp()
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.flags(host='here', instances_path=self.folder)
        self.context = context.get_admin_context()
        self.guests = [uuids.neighbour]
        self.connection = mock.Mock()
        self.connection.listAllDomains.side_effect = lambda flags: [
            types.SimpleNamespace(UUIDString=lambda uuid=uuid: uuid)
            for uuid in self.guests]
        self.pool = mock.Mock()
        self.pool.is_active.return_value = True
        self.pool.name = POOL
        self.pool.kind.return_value = kinds.of_type('dir')
        self.stub_out('nova.virt.libvirt.storage.pool.pool.list_pools',
                      lambda connection, host: [self.pool])
        self.stub_out('nova.virt.libvirt.storage.pool.pool.StoragePool',
                      lambda connection, name, host: self.pool)
        self.pool.volumes.side_effect = lambda: self.volumes
        self.volumes = []
        self.disk = '%s_disk' % uuids.instance
        self.add(self.disk)
        self.instance = objects.Instance(
            uuid=uuids.instance, host='there', node='there', deleted=False,
            vm_state='active', task_state=None)
        self.get = self.stub_get(self.instance)
        self.others = []
        self.get_many = mock.Mock(
            side_effect=lambda cls, context, filters, expected_attrs: [
                instance for instance in self.others
                if instance.uuid in filters['uuid'] and
                ('deleted' in instance and instance.deleted) ==
                filters['deleted']])
        self.stub_out('nova.objects.InstanceList.get_by_filters',
                      self.get_many)
        self.stub_out(
            'nova.objects.BlockDeviceMappingList.get_by_instance_uuids',
            lambda *args: [self.bdm])
        self.bdm = objects.BlockDeviceMapping(
            id=1, uuid=uuids.bdm, instance_uuid=uuids.instance,
            source_type='image', destination_type='local', boot_index=0,
            driver_info=None)
        self.disks = metadata.InstanceDisks.from_bdms(
            self.instance, [self.bdm])
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.load',
            lambda *args: self.disks)

    def stub_get(self, result):
        get = mock.Mock(return_value=result)
        if isinstance(result, Exception):
            get.side_effect = result
        self.stub_out('nova.objects.Instance.get_by_uuid', get)
        return get

    def add(self, name):
        volume = mock.Mock()
        volume.name = name
        volume.pool = self.pool
        self.volumes.append(volume)
        self.pool.volume.return_value = volume
        return volume

    def record(self, host, volume=None, **kwargs):
        return metadata.LibvirtDiskMetadata(**{
            'backend': 'libvirt-storage', 'format': 'raw', 'size': 1,
            'state': 'ready', 'host': host, 'pool': POOL,
            'volume': volume or self.disk, **kwargs})

    def kinds(self, own=()):
        return [orphan.kind for orphan in orphans.find(
            self.context, self.connection, own)]

    def unread(self):
        found = []
        orphans.find(self.context, self.connection, (), found)
        return found


@ddt.ddt
class OrphansTestCase(OrphansTestBase):

    def swept(self):
        gone = orphans.sweep(self.context, self.connection, ())
        for volume in self.volumes:
            self.assertEqual(
                (POOL, volume.name) in [orphan[:2] for orphan in gone],
                volume.delete.called)
        return [orphan.volume for orphan in gone]

    def test_of_an_instance_that_is_here(self):
        self.assertEqual([], self.kinds({uuids.instance}))
        self.get.assert_not_called()

    @ddt.data(None, '{"host": "there"}')
    def test_disk_of_another_host_in_a_shared_pool(self, record):
        self.others.append(self.instance)
        self.bdm.driver_info = record
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())
        self.get.assert_not_called()

    @ddt.data('record', 'node', 'directory')
    def test_instance_that_has_to_do_with_this_host(self, why):
        self.others.append(self.instance)
        if why == 'record':
            self.bdm.driver_info = '{"leftovers": {"host": "here"}}'
        elif why == 'node':
            self.instance.node = 'here'
        else:
            os.mkdir(os.path.join(self.folder, uuids.instance))
        self.kinds()
        self.get.assert_called_once()

    def test_many_are_asked_for_at_once(self):
        self.volumes.clear()
        for number in range(450):
            self.add('%s_disk' % getattr(uuids, 'instance%d' % number))
        self.others = [objects.Instance(
            uuid=getattr(uuids, 'instance%d' % number), host='there',
            node='there') for number in range(449)]
        self.assertEqual(450, len(self.kinds()))
        self.assertEqual(3, self.get_many.call_count)
        self.get.assert_called_once()

    @ddt.data('base', '_disk', 'x' * 36 + '_disk', 'probe.1')
    def test_nobodys(self, name):
        self.volumes.clear()
        self.add(name)
        self.assertEqual([], self.kinds())

    def test_instance_is_deleted(self):
        self.instance.host = 'here'
        self.instance.deleted = True
        self.assertEqual([orphans.Kind.LEFT_OVER], self.kinds())
        self.assertEqual('yes', self.get.call_args.args[1].read_deleted)
        self.assertEqual([self.disk], self.swept())
        self.assertIn(self.disk, self.stdlog.logger.output)

    def test_instance_is_deleted_and_its_guest_is_kept(self):
        # As [DEFAULT]/running_deleted_instance_action may say.
        self.instance.host = 'here'
        self.instance.deleted = True
        self.guests.append(uuids.instance)
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())
        self.assertEqual([], self.swept())
        self.guests.remove(uuids.instance)
        self.assertEqual([self.disk], self.swept())

    @ddt.data(('there', 'dir', True, True), ('there', 'dir', False, False),
              (None, 'dir', False, True), ('here', 'dir', False, True),
              ('there', 'logical', False, True))
    @ddt.unpack
    def test_instance_is_deleted_on_another_host(
            self, host, kind, is_private, is_left):
        """Which may have been down then, and run the guest in a shared pool.

        :param host: that the instance was on
        :param is_private: whether no other host sees the pool
        """
        self.instance.host, self.instance.deleted = host, True
        self.pool.kind.return_value = kinds.of_type(kind)
        self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.records.keeping.is_private',
            return_value=is_private))
        self.assertEqual(
            [orphans.Kind.LEFT_OVER if is_left else orphans.Kind.UNKNOWN],
            self.kinds())

    def test_instance_is_deleted_and_the_guests_are_not_known(self):
        self.instance.deleted = True
        self.connection.listAllDomains.side_effect = OSError('gone')
        self.assertEqual([], self.swept())

    def test_instance_was_never_here(self):
        self.stub_get(exception.InstanceNotFound(instance_id=uuids.instance))
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())

    def test_instance_has_come_since(self):
        self.instance.host = 'here'
        leftovers.note(self.disks, 'here', [(POOL, self.disk)])
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())

    def test_noted_as_left(self):
        self.disks.set('disk', self.record('there', 'other'))
        leftovers.note(self.disks, 'here', [(POOL, self.disk)])
        self.assertEqual([self.disk], self.swept())

    def test_noted_as_left_on_another_host(self):
        leftovers.note(self.disks, 'third', [(POOL, self.disk)])
        self.assertEqual([], self.swept())

    def test_noted_as_left_where_it_is_the_disk_in_a_shared_pool(self):
        self.disks.set('disk', self.record('there'))
        leftovers.note(self.disks, 'here', [(POOL, self.disk)])
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())
        self.assertEqual([], self.swept())

    @ddt.data(0, 2)
    def test_noted_as_left_where_no_other_host_sees_it(self, hours):
        self.keep(hours=hours)
        self.after(3)
        self.assertEqual([self.disk], self.swept())

    def test_noted_as_left_and_the_disk_of_a_guest_that_is_coming(self):
        # Its records are this host's before the instance is.
        self.keep(hours=0)
        self.disks.set('disk', self.record('here'))
        self.assertEqual([], self.swept())

    @ddt.data(None, 'other')
    def test_noted_as_left_where_there_is_a_guest(self, volume):
        # An operator may have settled a live migration the wrong way.
        self.keep(hours=0)
        self.disks.set('disk', self.record('there', volume))
        self.guests.append(uuids.instance)
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())
        self.assertEqual([], self.swept())

    def test_noted_as_left_and_the_guests_are_not_known(self):
        self.keep(hours=0)
        self.connection.listAllDomains.side_effect = OSError('gone')
        self.assertEqual([], self.swept())

    def test_noted_as_left_in_a_volume_group(self):
        # Hosts may share it.
        self.keep(hours=0)
        self.pool.config.return_value.type = 'logical'
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())

    def test_sweep_looks_at_an_instance_right_before_it_deletes(self):
        self.keep(hours=0)
        other = self.add('%s_disk' % uuids.other)
        seen = []

        def get(uuid):
            seen.append((uuid, self.volumes[0].delete.called))
            return self.instance if uuid == uuids.instance else (
                objects.Instance(uuid=uuid, host='there', deleted=True))

        self.get.side_effect = lambda *args: get(args[-1])
        self.pool.volume.side_effect = lambda name: next(
            volume for volume in self.volumes if volume.name == name)
        self.swept()
        self.assertTrue(other.delete.called)
        self.assertEqual(
            [(uuids.instance, False), (uuids.other, True)], seen)

    def keep(self, is_local=True, hours=2):
        """A copy that was kept here has the name of the disk there."""
        self.flags(storage_migration_keep_copies=hours, group='libvirt')
        self.stub_out('nova.virt.libvirt.storage.pool.mounts.is_local',
                      lambda path: is_local)
        folder = self.useFixture(fixtures.TempDir()).path
        self.pool.config.return_value = mock.Mock(
            type='dir', target_path=folder)
        self.volumes[0].path = os.path.join(folder, self.disk)
        with open(self.volumes[0].path, 'w'):
            pass
        self.disks.set('disk', self.record('there'))
        leftovers.note(self.disks, 'here', [(POOL, self.disk)])

    def after(self, hours):
        now = time.time() + hours * 3600
        self.useFixture(fixtures.MonkeyPatch('time.time', lambda: now))

    def test_copy_that_is_kept(self):
        self.keep()
        self.after(1.9)
        self.assertEqual([orphans.Kind.KEPT], self.kinds())
        self.assertEqual([], self.swept())

    def test_copy_whose_time_is_over(self):
        self.keep()
        self.after(2.1)
        self.assertEqual([self.disk], self.swept())

    def test_copy_whose_instance_is_deleted(self):
        self.keep()
        self.instance.deleted = True
        self.assertEqual([self.disk], self.swept())

    @ddt.data(0, 3)
    def test_copy_where_others_see_it(self, hours):
        # It may be the disk itself.
        self.keep(is_local=False)
        self.after(hours)
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())
        self.assertEqual([], self.swept())

    def test_other_leftovers_are_no_copies(self):
        self.keep()
        self.add('%s_files' % uuids.instance).path = self.volumes[0].path
        leftovers.note(self.disks, 'here',
                       [(POOL, '%s_files' % uuids.instance)])
        self.assertEqual(['%s_files' % uuids.instance], self.swept())

    def probe(self):
        """A service was killed while it asked what hosts share."""
        self.keep()
        self.volumes.clear()
        name = '%s_probe.%s' % (uuids.instance, uuids.probe.replace('-', ''))
        probe = self.add(name)
        probe.path = os.path.join(
            self.pool.config.return_value.target_path, name)
        with open(probe.path, 'w'):
            pass
        self.others.append(self.instance)
        return name

    def test_probe_that_is_left_over(self):
        name = self.probe()
        self.after(1.1)
        self.assertEqual([orphans.Kind.LEFT_OVER], self.kinds())
        self.assertEqual([name], self.swept())

    def test_probe_that_another_host_may_look_for(self):
        self.probe()
        self.after(0.9)
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())
        self.assertEqual([], self.swept())

    def test_probe_in_a_pool_that_cant_be_read(self):
        self.probe()
        self.after(1.1)
        self.pool.volume.side_effect = exception.StorageVolumeNotFound(
            pool=POOL, volume='probe', host='here')
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())

    def test_kept_for_revert(self):
        self.disks.set('disk', self.record(
            'there', 'other', previous=self.record('here')))
        self.assertEqual([orphans.Kind.REVERT], self.kinds())
        self.assertEqual([], self.swept())

    def test_wanted_by_a_move(self):
        self.disks.set('disk', self.record(
            'here', state='building', previous=self.record('there')))
        self.assertEqual([orphans.Kind.MOVE], self.kinds())
        self.assertEqual([], self.swept())

    def test_wanted_by_a_live_migration(self):
        self.disks.set('disk', self.record(
            'there', next=self.record('here', state='building')))
        self.assertEqual([orphans.Kind.MOVE], self.kinds())
        self.assertEqual([], self.swept())

    def test_broken_record(self):
        self.bdm.driver_info = 'broken'
        self.assertEqual([orphans.Kind.UNKNOWN], self.kinds())

    def test_pool_is_off(self):
        self.pool.is_active.return_value = False
        self.assertEqual([], self.kinds())
        self.assertEqual([(POOL, 'it is not active')], self.unread())

    @ddt.data(('there', True, []), ('here', True, [orphans.Kind.LEFT_OVER]),
              (None, True, [orphans.Kind.LEFT_OVER]), (None, False, []))
    @ddt.unpack
    def test_ceph_is_everybodys(self, host, is_deleted, expected):
        """Nobody else looks after what was on no host."""
        self.pool.kind.return_value = kinds.of_type('rbd')
        self.pool.file_names.return_value = {self.disk, 'another', 'base_disk'}
        self.instance.host, self.instance.deleted = host, is_deleted
        self.others = [self.instance] if is_deleted else []
        self.assertEqual(expected, self.kinds())
        self.assertEqual([], self.unread())
        _cls, asked, filters = self.get_many.mock_calls[0].args[:3]
        self.assertEqual(
            ('only', {'uuid': [uuids.instance], 'deleted': True,
                      'soft_deleted': False}),
            (asked.read_deleted, filters))

    def test_ceph_is_away(self):
        self.pool.kind.return_value = kinds.of_type('rbd')
        self.pool.ceph().check.side_effect = exception.StorageCephError(
            pool=POOL, host='here', reason='timed out', code=110)
        self.assertEqual([], self.kinds())
        self.assertIn('timed out', self.unread()[0].reason)

    def test_pool_is_sick(self):
        self.pool.volumes.side_effect = exception.StoragePoolError(
            pool=POOL, host='here', reason='I/O error', code=1)
        self.assertEqual([], self.kinds())
        self.assertIn('I/O error', self.unread()[0].reason)

    def test_volume_cant_be_deleted(self):
        self.instance.host = 'here'
        self.instance.deleted = True
        self.volumes[0].delete.side_effect = exception.StorageVolumeError(
            pool=POOL, host='here', volume=self.disk, reason='busy', code=1)
        tried, unread = [], []
        self.assertEqual([], orphans.sweep(
            self.context, self.connection, (), tried, unread))
        self.volumes[0].delete.assert_called_once()
        self.assertEqual([(self.disk, False)], [
            (orphan.volume, is_gone) for orphan, is_gone in tried])
        self.assertEqual([], unread)

    def test_sweep_fails_halfway(self):
        """What is gone by then is told of."""
        self.instance.host = 'here'
        self.instance.deleted = True
        self.add('%s_disk' % uuids.second)
        self.get.side_effect = [self.instance, ValueError('no answer')]
        tried = []
        self.assertRaises(ValueError, orphans.sweep, self.context,
                          self.connection, (), tried)
        self.assertEqual([(self.disk, True)], [
            (orphan.volume, is_gone) for orphan, is_gone in tried])

    def test_sweep_passes_over_what_is_off(self):
        self.pool.is_active.return_value = False
        unread = []
        orphans.sweep(self.context, self.connection, (), unread=unread)
        self.assertEqual([POOL], [pool.pool for pool in unread])


@ddt.ddt
class DirectoriesTestCase(OrphansTestBase):
    """What lies beside the pools, in instances_path."""

    def setUp(self):
        super().setUp()
        self.is_local = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.mounts.is_local',
            return_value=True)).mock
        self.volumes.clear()
        self.path = self.make(uuids.instance)

    def make(self, name):
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.join(path, 'folder'))
        with open(os.path.join(path, 'console.log'), 'w'):
            pass
        return path

    def found(self, own=()):
        return [(orphan.volume, orphan.kind) for orphan in orphans.find(
            self.context, self.connection, own) if orphan.pool is None]

    def is_swept(self):
        gone = [orphan.volume for orphan in orphans.sweep(
            self.context, self.connection, ()) if orphan.pool is None]
        self.assertEqual(not os.path.exists(self.path), self.path in gone)
        return self.path in gone

    @ddt.data('', '_resize', '_del')
    def test_directory_of_a_deleted_instance(self, suffix):
        self.instance.deleted = True
        os.rename(self.path, self.path + suffix)
        self.path += suffix
        self.assertEqual([(self.path, orphans.Kind.LEFT_OVER)], self.found())
        self.assertTrue(self.is_swept())
        self.assertIn('Deleting directory %s' % self.path,
                      self.stdlog.logger.output)

    def test_directory_that_is_not_looked_for(self):
        self.instance.deleted = True
        self.assertEqual([], orphans.sweep(
            self.context, self.connection, (), with_directories=False))
        self.assertTrue(os.path.exists(self.path))

    def test_all_of_one_instance_with_its_volumes(self):
        self.instance.host = 'here'
        self.instance.deleted = True
        self.add(self.disk)
        self.make(uuids.instance + '_resize')
        self.assertEqual(
            [(None, self.path), (None, self.path + '_resize'),
             (POOL, self.disk)],
            [orphan[:2] for orphan in orphans.find(
                self.context, self.connection, ())])
        self.assertEqual(3, len(orphans.sweep(
            self.context, self.connection, ())))
        self.assertEqual([], os.listdir(self.folder))

    def test_directory_of_an_instance_of_this_host(self):
        self.assertEqual([], self.found(own={uuids.instance}))

    def test_directory_of_an_instance_on_another_host(self):
        """That may have the same file system."""
        self.assertEqual([(self.path, orphans.Kind.UNKNOWN)], self.found())
        self.assertFalse(self.is_swept())

    def test_directories_that_other_hosts_may_see(self):
        """They may be many, and each host is asked for its own."""
        self.instance.deleted = True
        self.is_local.return_value = False
        self.assertEqual([], self.found())
        self.is_local.assert_called_once_with(os.path.realpath(self.folder))
        self.get.assert_not_called()
        self.is_local.side_effect = OSError('no /proc')
        self.assertFalse(self.is_swept())

    def test_directory_of_a_guest_that_is_kept(self):
        self.instance.deleted = True
        self.guests.append(uuids.instance)
        self.assertEqual([(self.path, orphans.Kind.UNKNOWN)], self.found())
        self.assertFalse(self.is_swept())

    def test_directory_of_an_instance_of_which_nothing_is_known(self):
        self.stub_get(exception.InstanceNotFound(instance_id=uuids.instance))
        self.assertFalse(self.is_swept())

    @ddt.data(*task_states.resizing_states, task_states.RESIZE_CONFIRMING,
              task_states.RESIZE_REVERTING, task_states.MIGRATING)
    def test_directory_while_the_instance_moves(self, state):
        self.instance.task_state = state
        os.rename(self.path, self.path + '_resize')
        arriving, self.path = self.path, self.path + '_resize'
        self.make(uuids.instance)
        self.assertEqual([(arriving, orphans.Kind.MOVE),
                          (self.path, orphans.Kind.REVERT)], self.found())
        self.assertFalse(self.is_swept())

    def test_directory_until_the_resize_is_confirmed(self):
        self.instance.vm_state = vm_states.RESIZED
        self.path = self.make(uuids.instance + '_resize')
        self.assertIn((self.path, orphans.Kind.REVERT), self.found())
        self.assertFalse(self.is_swept())

    @ddt.data('_base', 'locks', 'compute_nodes', uuids.instance[:-1],
              uuids.instance.upper(), uuids.instance + '_disk',
              uuids.instance + '.x')
    def test_nobodys_directory(self, name):
        self.instance.deleted = True
        shutil.rmtree(self.path)
        self.path = self.make(name)
        self.assertEqual([], self.found())
        self.assertFalse(self.is_swept())

    def test_what_is_no_directory(self):
        self.instance.deleted = True
        elsewhere = self.make('elsewhere')
        shutil.rmtree(self.path)
        os.symlink(elsewhere, self.path)
        with open(self.path + '_del', 'w'):
            pass
        self.assertEqual([], self.found())
        self.assertFalse(self.is_swept())
        self.assertTrue(os.path.exists(elsewhere + '/console.log'))

    def test_link_in_a_directory_is_not_followed(self):
        self.instance.deleted = True
        elsewhere = self.make('elsewhere')
        os.symlink(elsewhere, self.path + '/link')
        self.assertTrue(self.is_swept())
        self.assertTrue(os.path.exists(elsewhere + '/console.log'))

    def test_directory_cant_be_deleted(self):
        self.instance.deleted = True
        with mock.patch('shutil.rmtree', side_effect=OSError(13, 'a test')):
            self.assertFalse(self.is_swept())
        self.assertIn('a test', self.stdlog.logger.output)
        self.assertTrue(self.is_swept())

    def test_directory_that_somebody_deletes_at_once(self):
        self.instance.deleted = True
        [orphan] = orphans.find(self.context, self.connection, ())
        shutil.rmtree(self.path)
        self.assertEqual([orphan], orphans.delete(self.connection, [orphan]))

    def test_no_directory_at_all(self):
        shutil.rmtree(self.folder)
        self.assertEqual([], self.found())
        self.assertEqual([], self.unread())
        os.makedirs(self.folder)

    def test_directories_cant_be_listed(self):
        self.add(self.disk)
        with mock.patch('os.scandir', side_effect=OSError(13, 'a test')):
            self.assertEqual([], self.found())
            self.assertEqual(1, len(self.kinds()))
            [unread] = self.unread()
        self.assertEqual(self.folder, unread.pool)
        self.assertIn('a test', unread.reason)
