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

from nova import exception
from nova import objects
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata

DISK = '%s_disk' % uuids.instance


@ddt.ddt
class UndeletedTestCase(base.PoolsTestCase):
    """What a rebuild or a shelve couldn't delete."""

    def setUp(self):
        super().setUp()
        self.disks = metadata.InstanceDisks(
            objects.Instance(uuid=uuids.instance), {},
            mock.Mock(driver_info=None))
        self.disks.save = mock.Mock()
        self.useFixture(fixtures.MockPatchObject(
            ownership, 'has_gone_with_images', return_value=False))
        # By name, whether a volume is there, None if that can't be told
        self.there = {}
        self.stub_out('nova.virt.libvirt.storage.pool.pool.StoragePool.find',
                      self.find_volume)

    def find_volume(self, _pool, name, refresh):
        self.assertTrue(refresh)
        found = self.there.get(name)
        if found is None:
            raise exception.StoragePoolError(
                pool='p', host='here', code=1, reason='is off')
        return mock.sentinel.volume if found else None

    def record(self, name, **values):
        self.disks.set(name, metadata.LibvirtDiskMetadata(**{
            'backend': 'libvirt-storage', 'format': 'raw', 'size': 1,
            'state': 'ready', 'host': 'here', 'pool': 'p', 'volume': DISK,
            **values}))

    def note(self, *volumes, error=None, keep=()):
        def find(*args, **kwargs):
            for name in volumes:
                volume = mock.Mock()
                volume.name, volume.pool.name = name, 'p'
                yield volume
            if error:
                raise error

        with mock.patch.object(ownership, 'get_volumes', side_effect=find):
            leftovers.note_undeleted(self.conn, self.disks, keep)
        return sorted(volume for _p, volume in leftovers.on_host(
            self.disks, 'here'))

    def test_forget_gone(self):
        self.there = {DISK: True, DISK + '.1': False}
        kept = [('here', 'p', DISK), ('here', 'p', DISK + '.off'),
                ('there', 'p', DISK + '.1')]
        self.disks.leftovers = [*kept, ('here', 'p', DISK + '.1')]
        leftovers.forget_gone(self.conn, self.disks)
        self.assertEqual(kept, self.disks.leftovers)

    def test_disk_of_two_hosts(self):
        """An evacuation that has failed has taken it over."""
        self.there = {DISK: True}
        self.record('disk', previous=metadata.LibvirtDiskMetadata(
            backend='libvirt-storage', format='raw', size=1, state='ready',
            host='down', pool='p', volume=DISK))
        self.assertEqual([], self.note())
        leftovers.note_own(self.disks)
        self.assertEqual([], self.disks.leftovers)

    def test_what_was_to_stay(self):
        """In a pool that hosts share it is another one's disk."""
        self.assertEqual([DISK + '.1'], self.note(
            DISK, DISK + '.1', keep={('p', DISK)}))

    def test_pool_that_can_not_be_read(self):
        """Then the records alone tell of it, and they are cleared next."""
        self.record('disk')
        self.record('disk.eph0', volume=DISK + '.eph0', host='other')
        self.record('disk.config', backend='flat', pool=None, volume=None)
        error = exception.StoragePoolError(
            pool='p', host='here', code=1, reason='is off')
        self.assertEqual([DISK, DISK + '.swap'],
                         self.note(DISK + '.swap', error=error))
        self.assertIn('is off', self.stdlog.logger.output)

    def test_what_is_gone(self):
        # The name may be another disk's by the time that notes are followed.
        self.record('disk')
        self.there[DISK] = False
        self.assertEqual([DISK + '.swap'], self.note(DISK + '.swap'))

    def test_image_on_ceph(self):
        """All hosts see it; one with images_type=rbd may have it next."""
        self.record('disk', backend='libvirt-storage-rbd')
        self.assertEqual([], self.note())

    def test_what_is_there(self):
        self.record('disk')
        self.there[DISK] = True
        self.assertEqual([DISK, DISK + '.swap'],
                         self.note(DISK, DISK + '.swap'))

    def test_record_that_nobody_can_read(self):
        """It goes, so that there is a place for the notes."""
        self.disks._root.driver_info = 'broken'
        self.assertEqual([DISK], self.note(DISK))
        self.assertEqual([], self.disks.items())

    def test_swap_that_the_instance_has(self):
        """One that it has no more is deleted by what is noted of it."""
        swap = '%s_disk.swap' % uuids.instance
        with mock.patch.object(
                leftovers.setup, 'pool_of') as pool_of, mock.patch.object(
                    ownership, 'names_of', return_value=[swap]):
            pool_of.return_value.name = 'p'
            leftovers.note_swap(self.conn, self.disks)
            self.assertEqual([('here', 'p', swap)], self.disks.leftovers)
            self.disks.leftovers = []
            self.record('disk.swap', volume=swap)
            leftovers.note_swap(self.conn, self.disks)
        self.assertEqual([], self.disks.leftovers)

    @ddt.data((exception.StoragePoolNotFound(pool='p', host='here'), False),
              (exception.StoragePoolError('off'), True))
    @ddt.unpack
    def test_swap_and_no_pool(self, error, is_told):
        with mock.patch.object(leftovers.setup, 'pool_of'), \
                mock.patch.object(ownership, 'names_of', side_effect=error), \
                mock.patch.object(leftovers.LOG, 'warning') as warning:
            leftovers.note_swap(self.conn, self.disks)
        self.assertEqual(is_told, warning.called)
        self.assertEqual([], self.disks.leftovers)

    @ddt.data(('lvm', 'here', 'logical', False),
              ('rbd', 'there', 'rbd', False),
              ('lvm', 'there', 'logical', True),
              ('lvm', 'here', 'dir', True), ('rbd', 'here', 'dir', True),
              ('lvm', 'here', 'rbd', True), ('rbd', 'here', 'logical', True),
              ('lvm', 'here', None, True), ('flat', 'here', 'dir', True))
    @ddt.unpack
    def test_disk_outside_of_pools_has_the_name(
            self, backend, host, kind, is_deleted):
        """It was made by Nova itself when that had deleted the leftover.

        Only a pool over what Nova makes it in shows it.
        """
        if kind is not None:
            self.add_pool('p', kind=kind, active=False)
        self.record('disk', backend=backend, host=host, pool=None,
                    volume=None)
        self.disks.leftovers = [('here', 'p', DISK)]
        with mock.patch.object(
                leftovers, 'delete_volumes', return_value=[]) as delete:
            leftovers.delete(self.conn, self.disks)
        self.assertEqual({('here', 'p', DISK)[1:]} if is_deleted else set(),
                         delete.call_args.args[2])
        self.assertEqual([], self.disks.leftovers)

    def test_broken_record(self):
        self.record('disk')
        with mock.patch.object(
                self.disks, 'items',
                side_effect=exception.InvalidDiskMetadata(
                    mapping='m', instance_uuid='i', reason='broken')):
            self.assertEqual([DISK], self.note(DISK))
