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
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt.libvirt.storage.pool import ceph
from nova.virt.libvirt.storage.pool import health
from nova.virt.libvirt.storage.records import metadata

DISKS = 'nova-disks-pool'


def record(pool, host='here', previous=None):
    return metadata.LibvirtDiskMetadata(
        backend='libvirt-storage', format='raw', size=1, state='ready',
        host=host, pool=pool, volume='%s_disk' % uuids.instance,
        previous=previous)


@ddt.ddt
class ReadyForTestCase(base.PoolsTestCase):

    def setUp(self):
        super().setUp()
        self.get_connection = mock.Mock(return_value=self.conn)
        self.raw = self.add_pool(DISKS, active=False)
        self.other = self.add_pool('other', active=False)

    def ready_for(self, *records):
        health.ready_for(self.get_connection, mock.Mock(items=lambda: [
            ('disk%d' % n, one) for n, one in enumerate(records)]))

    def test_starts_what_is_needed(self):
        legacy = record(None)
        self.ready_for(record(DISKS), record(DISKS), legacy)
        self.assertTrue(self.raw.isActive())
        self.assertFalse(self.other.isActive())
        self.ready_for(record(DISKS))

    def test_nothing_is_asked_for_disks_outside_pools(self):
        self.ready_for()
        self.ready_for(record(None))
        self.get_connection.assert_not_called()

    def test_disks_that_are_elsewhere(self):
        self.ready_for(record(DISKS, host='there'))
        self.assertFalse(self.raw.isActive())

    def test_what_a_move_is_taken_back_to(self):
        self.ready_for(record('x', host='there', previous=record(DISKS)))
        self.assertTrue(self.raw.isActive())

    @mock.patch('nova.virt.libvirt.storage.pool.pool.START_TIMEOUT', 0)
    def test_can_not_be_started(self):
        self.conn.file_system.directories.clear()
        exc = self.assertRaises(exception.StoragePoolError, self.ready_for,
                                record(DISKS))
        self.assertIn(DISKS, str(exc))

    def test_ceph_is_asked_for_the_disks(self):
        raw = self.add_pool('ceph', kind='rbd', active=False)
        images = mock.Mock(spec_set=ceph.CephPool)
        with mock.patch.object(ceph, 'CephPool', autospec=True,
                               return_value=images):
            swap, disk = record('ceph'), record('ceph')
            swap.volume = 'swap'
            swap.backend = disk.backend = 'libvirt-storage-rbd'
            self.ready_for(swap, disk, record('ceph', host='there'))
            images.check.assert_called_once_with(
                sorted(['swap', '%s_disk' % uuids.instance]))
            self.assertTrue(raw.isActive())
            raw.destroy()
            images.check.side_effect = exception.StorageCephError(
                pool='ceph', host='here', reason='', code=110)
            self.assertRaises(
                exception.StorageCephError, self.ready_for, disk)
            # libvirt would wait for it, too.
            self.assertFalse(raw.isActive())

    @ddt.data(('rbd', False), ('dir', True))
    @ddt.unpack
    def test_is_another_one(self, kind, is_on_ceph):
        """The guest is let alone."""
        raw = self.add_pool('p', kind=kind, active=False)
        disk = record('p')
        if is_on_ceph:
            disk.backend = 'libvirt-storage-rbd'
        error = self.assertRaises(
            exception.StoragePoolIsAnother, self.ready_for, disk)
        self.assertIn('is of type %s now' % kind, str(error))
        self.assertFalse(raw.isActive())

    def test_is_gone(self):
        self.assertRaises(exception.StoragePoolNotFound, self.ready_for,
                          record('gone'))


@ddt.ddt
class OfferingTestCase(base.PoolsTestCase):

    def setUp(self):
        super().setUp()
        self.flags(images_type='libvirt-storage', group='libvirt')
        self.raw = self.add_pool(DISKS)
        self.set_enabled = mock.Mock()
        self.offering = health.Offering(self.set_enabled)

    def check(self):
        self.set_enabled.reset_mock()
        self.offering.check(self.conn)
        return [call.args for call in self.set_enabled.call_args_list]

    def test_well(self):
        """What somebody else has disabled is left alone."""
        self.assertEqual([], self.check())

    def test_off_and_back(self):
        self.raw.destroy()
        with mock.patch.object(health.LOG, 'error') as mock_error:
            for _n in range(2):
                [(enabled, reason)] = self.check()
                self.assertFalse(enabled)
                self.assertIn('virsh pool-start', reason[:200])
                self.assertIn(DISKS, reason)
        mock_error.assert_called_once()
        self.raw.create(0)
        self.assertEqual([(True, '')], self.check())
        self.assertEqual([], self.check())

    def test_reason_fits_its_column(self):
        name = 'p' * 200
        self.flags(storage_disks_pool=name, group='libvirt')
        [(_enabled, reason)] = self.check()
        self.assertLessEqual(len('AUTO: ' + reason), 255)

    @ddt.data(('swap', 0), ('ephemeral', 0), ('root', 1), ('config', 1))
    @ddt.unpack
    def test_mapped_pool(self, kind, calls):
        """Not every instance has a swap disk."""
        self.flags(storage_pool_mapping={kind: 'gone'}, group='libvirt')
        self.assertEqual(calls, len(self.check()))

    def test_other_image_backend(self):
        self.flags(images_type='qcow2', group='libvirt')
        self.raw.destroy()
        self.assertEqual([], self.check())
