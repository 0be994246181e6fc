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
import time
import types
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova import context
from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt.storage import orphans
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata

POOL = 'nova-disks-pool'


@ddt.ddt
class OrphansTestCase(test.NoDBTestCase):
    def setUp(self):
        super().setUp()
        self.flags(host='here')
        self.context = context.get_admin_context()
        self.guests = [uuids.other]
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
            uuid=uuids.instance, host='there', node='there', deleted=False)
        self.get = self.stub_get(self.instance)
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

    @ddt.data('base', '_disk', 'x' * 36 + '_disk', 'probe.1')
    def test_nobodys(self, name):
        self.volumes.clear()
        self.add(name)
        self.assertEqual([], self.kinds())

    def test_instance_is_deleted(self):
        self.instance.deleted = True
        self.assertEqual([orphans.Kind.LEFT_OVER], self.kinds())
        self.assertEqual('yes', self.get.call_args.args[1].read_deleted)
        self.assertEqual([self.disk], self.swept())
        self.assertIn(self.disk, self.stdlog.logger.output)

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

    def test_noted_as_left_where_there_is_a_guest(self):
        # An operator may have settled a live migration the wrong way.
        self.keep(hours=0)
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

    def unread(self):
        found = []
        orphans.find(self.context, self.connection, (), found)
        return found

    def test_pool_is_off(self):
        self.pool.is_active.return_value = False
        self.assertEqual([], self.kinds())
        self.assertEqual([(POOL, 'it is not active')], self.unread())

    def test_ceph_is_everybodys(self):
        self.pool.kind.return_value = kinds.of_type('rbd')
        self.assertEqual([], self.kinds())
        self.assertEqual([], self.unread())
        self.pool.volumes.assert_not_called()

    def test_pool_is_sick(self):
        self.pool.volumes.side_effect = exception.StoragePoolError(
            pool=POOL, host='here', reason='I/O error', code=1)
        self.assertEqual([], self.kinds())
        self.assertIn('I/O error', self.unread()[0].reason)

    def test_volume_cant_be_deleted(self):
        self.instance.deleted = True
        self.volumes[0].delete.side_effect = exception.StorageVolumeError(
            pool=POOL, host='here', volume=self.disk, reason='busy', code=1)
        self.assertEqual([], orphans.sweep(self.context, None, ()))
