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

from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import task_states
from nova import exception
from nova import objects
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool
from nova.virt.libvirt.storage.records import metadata

DISKS, SWAPS = 'nova-disks-pool', 'fast'


class OwnershipTestCase(base.PoolsTestCase):

    def setUp(self):
        super().setUp()
        self.flags(group='libvirt', storage_pool_mapping={'swap': SWAPS})
        self.instance = objects.Instance(
            uuid=uuids.instance, system_metadata={})
        self.disks = self.add_pool(DISKS)
        self.swaps = self.add_pool(SWAPS)
        for name in ('disk', 'disk.1', 'disk.rescue', 'disk.config.rescue.1'):
            self.add(self.disks, name)
        self.add(self.swaps, 'disk.swap')
        self.add_volume(self.disks, '%s_disk' % uuids.other)

    def add(self, raw_pool, name):
        self.add_volume(raw_pool, '%s_%s' % (uuids.instance, name))

    def left(self):
        return sorted(
            volume.name().replace(uuids.instance, 'it').replace(
                uuids.other, 'other')
            for raw in self.conn.listAllStoragePools()
            for volume in raw._volumes.values())

    def delete(self, **kwargs):
        return ownership.delete_volumes(self.conn, self.instance, **kwargs)

    def records(self, **pools):
        """:param pools: disk name, without its dot -> the pool on record"""
        root = objects.BlockDeviceMapping(
            id=1, uuid=uuids.root, instance_uuid=uuids.instance,
            source_type='image', destination_type='local', boot_index=0,
            driver_info=None)
        disks = metadata.InstanceDisks.from_bdms(self.instance, [root])
        for name, pool_name in pools.items():
            disks.set(name, metadata.LibvirtDiskMetadata(
                backend='libvirt-storage', format='raw', size=1,
                state='ready', host='here', pool=pool_name,
                volume='%s_%s' % (uuids.instance, name)))
        return disks


@ddt.ddt
class DeleteTestCase(OwnershipTestCase):

    def test_all(self):
        self.assertTrue(self.delete())
        self.assertEqual(['other_disk'], self.left())
        self.assertTrue(self.delete())

    def test_of_rescue(self):
        self.assertTrue(self.delete(rescue=True))
        self.assertEqual(['it_disk', 'it_disk.1', 'it_disk.swap',
                          'other_disk'], self.left())

    def test_keep(self):
        self.assertTrue(self.delete(
            keep={(DISKS, '%s_disk' % uuids.instance)}))
        self.assertEqual(['it_disk', 'other_disk'], self.left())

    def test_failure_keeps_no_other_volume(self):
        volume = self.disks._volumes['%s_disk' % uuids.instance]
        volume.delete = mock.Mock(side_effect=self.disks._check_jobs)
        with self.disks.job():
            self.assertFalse(self.delete())
        self.assertEqual(['it_disk', 'other_disk'], self.left())

    def test_no_pools(self):
        self.conn.storage.clear()
        self.assertTrue(self.delete())
        self.assertFalse(ownership.has_pools(self.conn))

    def test_pool_that_nova_conf_no_longer_names(self):
        """Of a host whose settings have changed since."""
        self.flags(group='libvirt', storage_pool_mapping={},
                   storage_disks_pool='new')
        self.assertTrue(ownership.has_pools(self.conn))
        self.assertTrue(self.delete(rescue=True))
        self.assertEqual(['it_disk', 'it_disk.1', 'it_disk.swap',
                          'other_disk'], self.left())
        self.assertTrue(self.delete())
        self.assertEqual(['other_disk'], self.left())

    def test_sick_pool_keeps_no_other_volume(self):
        self.disks.destroy()
        self.assertFalse(self.delete())
        self.assertEqual([], self.left())
        self.disks.create(0)
        self.assertTrue(self.delete())
        self.assertEqual(['other_disk'], self.left())

    def test_pool_on_record_can_not_be_read(self):
        self.flags(group='libvirt', storage_pool_mapping={})
        self.swaps.destroy()
        # Without a record it is anybody's pool.
        self.assertTrue(self.delete())
        records = self.records(disk=DISKS, swap=SWAPS)
        self.assertFalse(self.delete(disks=records))
        self.swaps.create(0)
        self.assertTrue(self.delete(disks=records))
        self.assertEqual(['other_disk'], self.left())

    def test_pool_on_record_is_undefined(self):
        self.assertFalse(self.delete(disks=self.records(disk='gone')))
        self.assertEqual(['other_disk'], self.left())

    def test_pool_of_previous_record(self):
        disks = self.records(disk=DISKS)
        record = disks.get('disk')
        record.previous = record.obj_clone()
        record.previous.pool = 'gone'
        self.assertEqual({DISKS, 'gone'}, ownership.pools_on_record(disks))
        record.previous.host = record.host = 'there'
        self.assertEqual(set(), ownership.pools_on_record(disks))

    def test_pool_of_what_is_left(self):
        disks = self.records()
        disks.leftovers = [('here', 'left', 'v'), ('there', 'other', 'v')]
        self.assertEqual({'left'}, ownership.pools_on_record(disks))

    def test_broken_record(self):
        disks = self.records()
        disks._root.driver_info = '{'
        self.assertEqual(set(), ownership.pools_on_record(disks))
        self.assertTrue(self.delete(disks=disks))
        self.assertEqual(['other_disk'], self.left())

    @ddt.data(('libvirt-storage-rbd', False), ('libvirt-storage', True))
    @ddt.unpack
    def test_pool_is_another_one_now(self, backend, expected):
        """What was in it is somewhere."""
        disks = self.records(disk=DISKS)
        disks.get('disk').backend = backend
        self.assertEqual(expected, self.delete(disks=disks))
        self.assertEqual(['other_disk'], self.left())
        self.assertEqual(not expected, 'is another one than' in
                         self.stdlog.logger.output)

    def test_foreign_pools_are_left_alone(self):
        iscsi = self.add_pool('iscsi', kind='iscsi')
        base_images = self.add_pool('nova-base-images-pool')
        off = self.add_pool('off', active=False)
        for raw in (iscsi, base_images, off):
            raw.listAllVolumes = mock.Mock(side_effect=AssertionError)
        self.assertTrue(self.delete())

    def test_no_storage_driver(self):
        """Hosts without storage pools need not run it."""
        with mock.patch.object(
                self.conn, 'listAllStoragePools',
                side_effect=lambda flags: self.disks._check_active(False)):
            self.assertTrue(self.delete())
        self.assertEqual(['other_disk'], self.left())

    def test_names_of(self):
        disks = pool.StoragePool(self.conn, DISKS, 'host')
        self.assertEqual(
            ['%s_disk' % uuids.instance, '%s_disk.1' % uuids.instance],
            ownership.names_of(disks, uuids.instance, 'disk'))
        self.assertEqual(
            [], ownership.names_of(disks, uuids.instance, 'disk.swap'))

    def test_delete_named(self):
        name = '%s_disk' % uuids.instance
        self.assertTrue(ownership.delete_named(self.pool(DISKS), name))
        self.assertTrue(ownership.delete_named(self.pool(DISKS), name))
        self.assertFalse(ownership.delete_named(self.pool('gone'), name))


class HostTestCase(OwnershipTestCase):

    def set_up(self, task_state, host, evacuation, actions):
        """Let an instance be as its tables in the database say.

        :param evacuation: state of one from this host, None without one
        :param actions: the newest first
        """
        self.flags(host='here')
        self.useFixture(fixtures.MockPatch(
            'nova.objects.MigrationList.get_by_filters',
            return_value=[mock.Mock(status=evacuation)] if evacuation else []))
        self.useFixture(fixtures.MockPatch(
            'nova.objects.InstanceActionList.get_by_instance_uuid',
            return_value=[mock.Mock(action=action) for action in actions]))
        self.instance.task_state, self.instance.host = task_state, host


@ddt.ddt
class MakingTestCase(HostTestCase):

    @ddt.data(
        (task_states.SPAWNING, 'there', None, True),
        (task_states.DELETING, 'here', None, False),
        (None, 'here', None, False),
        # A rebuild, here and on the destination of an evacuation
        (task_states.REBUILD_SPAWNING, 'here', None, True),
        (task_states.REBUILD_SPAWNING, 'there', 'pre-migrating', True),
        # The source of one is back.
        (task_states.REBUILD_SPAWNING, 'here', 'pre-migrating', False))
    @ddt.unpack
    def test_is_making(self, task_state, host, evacuation, expected):
        self.set_up(task_state, host, evacuation, ['evacuate'])
        self.assertEqual(expected, ownership.is_making(self.instance))


@ddt.ddt
class StayedTestCase(HostTestCase):

    def has_stayed(self, task_state, host='here', evacuation='accepted',
                   actions=()):
        self.set_up(task_state, host, evacuation, actions)
        return ownership.has_stayed(self.instance)

    @ddt.data(
        ({}, True), ({'evacuation': 'done'}, True),
        ({'host': 'there'}, False), ({'evacuation': None}, False),
        ({'task_state': task_states.REBOOTING_HARD}, True),
        ({'task_state': task_states.DELETING}, False),
        ({'task_state': task_states.SHELVING}, False),
        ({'task_state': task_states.SPAWNING}, False),
        ({'task_state': task_states.RESIZE_REVERTING}, False))
    @ddt.unpack
    def test_has_stayed(self, values, expected):
        self.assertEqual(
            expected, self.has_stayed(**{'task_state': None, **values}))

    @ddt.data(
        (task_states.REBUILDING, ['reboot', 'evacuate', 'rebuild'], True),
        (task_states.REBUILD_SPAWNING, ['evacuate'], True),
        (task_states.REBUILDING, ['rebuild', 'evacuate'], False),
        (task_states.REBUILD_BLOCK_DEVICE_MAPPING, [], False))
    @ddt.unpack
    def test_rebuild(self, task_state, actions, expected):
        """It has the task states of an evacuation."""
        self.assertEqual(
            expected, self.has_stayed(task_state, actions=actions))

    @ddt.data((task_states.SHELVING, True),
              (task_states.RESIZE_REVERTING, True),
              (task_states.REBUILDING, True), (task_states.DELETING, False),
              (task_states.SOFT_DELETING, True))
    @ddt.unpack
    def test_service_starts(self, task_state, expected):
        """What was under way was cut off."""
        self.has_stayed(task_state)
        self.assertEqual(
            expected, ownership.has_stayed(self.instance, is_starting=True))

    def test_without_a_host(self):
        self.assertFalse(ownership.has_stayed(
            objects.Instance(uuid=uuids.instance)))


class FindTestCase(OwnershipTestCase):

    def find(self, name, pool=DISKS):
        return ownership.find(self.pool(pool), name)

    def test_find(self):
        self.assertEqual('%s_disk' % uuids.instance,
                         self.find('%s_disk' % uuids.instance).name)
        self.assertIsNone(self.find('disk'))
        self.assertIsNone(self.find('disk', 'gone'))

    def test_libvirt_does_not_know_of_it_yet(self):
        found = self.pool(DISKS)
        with mock.patch.object(found, 'volume', side_effect=[
                exception.StorageVolumeNotFound(
                    volume='disk', pool=DISKS, host='here'),
                mock.sentinel.volume]), mock.patch.object(
                    found, 'refresh') as mock_refresh:
            self.assertIs(mock.sentinel.volume, ownership.find(found, 'disk'))
        mock_refresh.assert_called_once_with()


class HasVolumesTestCase(OwnershipTestCase):

    def has_volumes(self, instance_uuid=uuids.instance, *args):
        return ownership.has_volumes(self.conn, instance_uuid, *args)

    def test_pool_that_nova_conf_no_longer_names(self):
        self.flags(group='libvirt', storage_pool_mapping={},
                   storage_disks_pool='new')
        self.assertTrue(self.has_volumes())
        self.assertFalse(self.has_volumes(uuids.third))

    def test_ignored(self):
        here = {(v.pool.name, v.name) for v in ownership.get_volumes(
            self.conn, uuids.instance)}
        self.assertFalse(self.has_volumes(uuids.instance, here))
        here.remove((DISKS, '%s_disk.1' % uuids.instance))
        self.assertTrue(self.has_volumes(uuids.instance, here))

    def test_pool_of_somebody_that_cant_be_read(self):
        self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.pool.StoragePool.file_names',
            side_effect=exception.StoragePoolError(
                pool=DISKS, host='here', code=38, reason='stale')))
        self.flags(group='libvirt', storage_pool_mapping={},
                   storage_disks_pool='new')
        self.assertFalse(self.has_volumes())
        self.assertRaises(exception.StoragePoolError, self.has_volumes,
                          uuids.instance, (), {DISKS})
        self.flags(group='libvirt', storage_disks_pool=DISKS)
        self.assertRaises(exception.StoragePoolError, self.has_volumes)

    def test_libvirt_need_not_know_of_it(self):
        """Nor is it let look: it interprets whatever it finds."""
        with mock.patch('nova.privsep.storage.names_in',
                        return_value=['%s_disk' % uuids.third]), (
                mock.patch.object(self.disks, 'refresh')) as mock_refresh:
            self.assertTrue(self.has_volumes(uuids.third))
            self.assertFalse(self.has_volumes(uuids.fourth))
        mock_refresh.assert_not_called()


@ddt.ddt
class PlacesTestCase(OwnershipTestCase):

    def test_order_and_reasons(self):
        self.add_pool('formerly')
        found = ownership.places(self.conn, self.records(disk='formerly'))
        self.assertEqual(
            [(SWAPS, True, False), ('formerly', False, True),
             (DISKS, True, False)],
            [(p.pool.name, p.is_configured, p.is_on_record) for p in found])

    @ddt.data((True, False), (False, True))
    @ddt.unpack
    def test_unreadable(self, is_configured, is_on_record):
        self.disks.destroy()
        place = ownership.Place(
            self.pool(DISKS), is_configured, is_on_record)
        self.assertRaises(exception.StoragePoolInactive,
                          place.volumes, uuids.instance)
        self.assertEqual([], ownership.Place(
            self.pool(DISKS)).volumes(uuids.instance))

    def test_lists_no_volume_twice(self):
        with mock.patch.object(pool.StoragePool, 'volumes', autospec=True,
                               return_value=[]) as mock_volumes:
            self.delete(disks=self.records(disk=DISKS))
        self.assertEqual(2, mock_volumes.call_count)
