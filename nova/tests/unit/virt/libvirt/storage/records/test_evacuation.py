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

import ddt

from nova.compute import task_states
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import leftovers

POOL = two_hosts.POOL


@ddt.ddt
class AfterEvacuationTestCase(two_hosts.TwoHostsTestCase):
    """The instance was moved from source to dest, or from dest to source.

    Then the other host has died, and this host is source.
    """

    def setUp(self):
        super().setUp()
        self.instance.task_state = task_states.REBUILD_SPAWNING
        for name in ('disk.eph0', 'disk.config', 'disk.swap'):
            self.disks.clear(name)
        self.disks.save(self.context)

    def moved(self, volume='disk', host='dest', name='disk', state='ready',
              previous='disk'):
        """Have a disk on record that was moved and not confirmed."""
        record = self.disks.get('disk')
        if previous is not None:
            record.previous = record.obj_clone()
            record.previous.host = 'source' if host == 'dest' else 'dest'
            record.previous.volume = self.volume_name(previous)
            record.migration_id = 7
        record.host, record.state = host, state
        record.volume = self.volume_name(volume)
        self.disks.set(name, record)

    def after(self):
        stale = evacuation.after_evacuation(self.instance, self.disks)
        return sorted(volume for _pool, volume in stale)

    def left(self):
        return sorted(volume for _pool, volume in leftovers.on_host(
            self.disks, 'source'))

    @ddt.data('disk', 'disk.1')
    def test_never_confirmed(self, volume):
        # distinct pools, or a shared one
        self.moved(volume)
        self.assertEqual([self.volume_name('disk')], self.after())
        self.assertEqual([self.volume_name('disk')], self.left())
        self.assertEqual(('dest', self.volume_name(volume), None), (
            self.disks.get('disk').host, self.disks.get('disk').volume,
            self.disks.get('disk').previous))
        self.assertIsNone(self.disks.get('disk').migration_id)
        self.assertEqual({}, self.disks.extras)
        self.assertIn(self.volume_name('disk'), self.stdlog.logger.output)

    def test_confirmed_and_not_deleted(self):
        self.moved(previous=None)
        leftovers.note(self.disks, 'source', [(POOL, 'one')])
        leftovers.note(self.disks, 'dest', [(POOL, 'two')])
        self.assertEqual(['one'], self.after())
        self.assertEqual(['one'], self.left())

    def test_never_found_whole(self):
        # What is here is the only copy that was ever booted.
        self.moved(state='building')
        self.assertEqual([], self.after())
        self.assertEqual([], self.left())
        self.assertEqual(('source', 'ready', None), (
            self.disks.get('disk').host, self.disks.get('disk').state,
            self.disks.get('disk').previous))
        # The other host deletes its part when it is back.
        self.assertEqual([(POOL, self.volume_name('disk'))],
                         leftovers.on_host(self.disks, 'dest'))

    @ddt.data('disk', 'disk.1')
    def test_never_found_whole_and_made_anew_elsewhere(self, volume):
        # The source has died while it copied.
        self.moved(volume, state='building')
        self.flags(host='third')
        self.assertEqual([], self.after())
        self.assertEqual('source', self.disks.get('disk').host)
        self.assertEqual([('dest', POOL, self.volume_name(volume))],
                         self.disks.leftovers)

    @ddt.data('disk', 'disk.1')
    def test_never_copied_whole_to_here(self, volume):
        # distinct pools, or a shared one; the source has died
        self.moved(volume, host='source', state='building')
        self.assertEqual([self.volume_name(volume)], self.after())
        self.assertEqual([self.volume_name(volume)], self.left())
        self.assertEqual(('dest', 'ready', self.volume_name('disk')), (
            self.disks.get('disk').host, self.disks.get('disk').state,
            self.disks.get('disk').volume))

    def test_swap_is_made_anew(self):
        self.moved(name='disk.swap', state='building')
        self.assertEqual([self.volume_name('disk')], self.after())
        self.assertEqual(('dest', 'building', None), (
            self.disks.get('disk.swap').host,
            self.disks.get('disk.swap').state,
            self.disks.get('disk.swap').previous))

    def going(self, host, state='building', volume='disk.1'):
        """Have the disk on record on the way to a host, the guest running."""
        record = self.disks.get('disk')
        coming = record.obj_clone()
        coming.host, coming.state = host, state
        coming.volume = self.volume_name(volume)
        record.host = 'dest' if host == 'source' else 'source'
        record.next = coming
        self.disks.set('disk', record)

    def test_live_migration_to_here_never_ended(self):
        self.going('source')
        self.assertEqual([self.volume_name('disk.1')], self.after())
        self.assertEqual([self.volume_name('disk.1')], self.left())
        self.assertEqual(('dest', None), (
            self.disks.get('disk').host, self.disks.get('disk').next))

    def test_live_migration_to_elsewhere_never_ended(self):
        self.going('dest')
        self.assertEqual([], self.after())
        self.assertEqual([], self.left())
        self.assertEqual(
            [(POOL, self.volume_name('disk.1'))],
            leftovers.on_host(self.disks, 'dest'))
        self.assertIsNone(self.disks.get('disk').next)

    def test_live_migration_of_a_shared_volume_never_ended(self):
        self.going('source', 'ready', 'disk')
        self.assertEqual([], self.after())
        self.assertEqual([], self.disks.leftovers)
        self.assertEqual(('dest', None), (
            self.disks.get('disk').host, self.disks.get('disk').next))

    def test_half_a_copy_is_no_disk(self):
        # Or an evacuation would take it for one on shared storage.
        self.going('source')
        self.assertEqual({(POOL, self.volume_name('disk.1'))},
                         evacuation.old_copies(self.instance, self.disks))
        self.going('source', 'ready', 'disk')
        self.assertEqual(
            set(), evacuation.old_copies(self.instance, self.disks))

    def test_on_ceph_there_is_no_old_copy(self):
        """Or the disk would be made anew, and lost."""
        self.moved()
        record = self.disks.get('disk')
        record.backend = record.previous.backend = 'libvirt-storage-rbd'
        self.disks.set('disk', record)
        self.assertEqual([], self.after())
        self.assertEqual([], self.left())
        self.assertIsNone(self.disks.get('disk').previous)

    def test_third_host(self):
        self.moved()
        self.flags(host='third')
        self.assertEqual([], self.after())
        self.assertEqual('source', self.disks.get('disk').previous.host)

    def test_resized_on_one_host(self):
        self.moved('disk.1', host='source')
        self.disks.get('disk').previous.host = 'source'
        self.assertEqual([], self.after())
        self.assertIsNotNone(self.disks.get('disk').previous)

    def test_legacy_disk(self):
        self.moved()
        record = self.disks.get('disk')
        record.pool = record.volume = None
        record.previous.pool = record.previous.volume = None
        self.assertEqual([], self.after())
        self.assertEqual([], self.left())

    @ddt.data(None, task_states.REBOOTING_HARD, task_states.RESIZE_FINISH)
    def test_not_evacuated(self, task_state):
        self.instance.task_state = task_state
        self.moved()
        self.assertEqual([], self.after())
        self.assertIsNotNone(self.disks.get('disk').previous)
        self.assertEqual(7, self.disks.get('disk').migration_id)

    def test_nothing_to_do(self):
        self.assertEqual([], self.after())
        self.assertFalse(self.disks._changed)
