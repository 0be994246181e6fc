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

from nova.compute import task_states
from nova import exception
from nova import objects
from nova import test
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.tests.unit.virt.libvirt.storage.records import test_lifecycle
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import lifecycle
from nova.virt.libvirt.storage.records import metadata

POOL = two_hosts.POOL


@ddt.ddt
class HasComeTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.flags(host='here')
        self.instance = objects.Instance(uuid=uuids.instance)
        self.disks = metadata.InstanceDisks(
            self.instance, {}, mock.Mock(driver_info=None))
        self.disks.set('disk', metadata.LibvirtDiskMetadata(
            backend='flat', format='raw', size=1, state='ready', host='dead'))

    def find_unsettled(self):
        return evacuation.find_unsettled(
            mock.sentinel.context, self.instance, self.disks)

    def has_come(self, *migrations):
        with mock.patch.object(
                objects.MigrationList, 'get_by_filters',
                return_value=list(migrations)) as get:
            found = evacuation.has_come(self.find_unsettled(), self.disks)
            expected = mock.call(
                mock.sentinel.context, {'instance_uuid': uuids.instance})
            self.assertEqual([expected] * get.call_count, get.mock_calls)
        return found

    @staticmethod
    def migration(number, **values):
        return objects.Migration(**{
            'id': number, 'migration_type': 'evacuation', 'status': 'done',
            'source_compute': 'dead', 'dest_compute': 'here', **values})

    @ddt.data('done', 'completed')
    def test_evacuated(self, status):
        self.assertTrue(self.has_come(
            self.migration(2, status=status),
            self.migration(1, migration_type='live-migration')))

    @ddt.data({'status': 'failed'}, {'status': 'accepted'},
              {'source_compute': 'other'}, {'dest_compute': 'other'},
              {'migration_type': 'live-migration'})
    def test_not_evacuated(self, values):
        self.assertFalse(self.has_come(self.migration(1, **values)))

    def test_moved_since(self):
        self.assertFalse(self.has_come(
            self.migration(1),
            self.migration(2, migration_type='live-migration')))

    def test_never_moved(self):
        self.assertFalse(self.has_come())

    def test_recorded_since(self):
        self.disks.get('disk').host = 'here'
        self.disks.set('disk', self.disks.get('disk'))
        self.assertFalse(self.has_come(self.migration(1)))

    def has_failed(self, *migrations):
        with mock.patch.object(objects.MigrationList, 'get_by_filters',
                               return_value=list(migrations)):
            return evacuation.has_failed(self.find_unsettled(), self.disks)

    @ddt.data(({'status': 'failed'}, True), ({'status': 'error'}, True),
              ({'status': 'done'}, False),
              ({'status': 'failed', 'dest_compute': 'other'}, False),
              ({'status': 'failed', 'source_compute': 'other'}, False),
              ({'status': 'failed', 'migration_type': 'migration'}, False))
    @ddt.unpack
    def test_has_failed(self, values, expected):
        self.assertEqual(expected, self.has_failed(self.migration(1, **{
            'source_compute': 'here', 'dest_compute': 'dead', **values})))

    def test_has_failed_and_another_migration_was_refused(self):
        evacuated = self.migration(
            1, status='failed', source_compute='here', dest_compute='dead')
        for kind, status, expected in (
                ('resize', 'error', True), ('migration', 'failed', True),
                ('resize', 'migrating', True),
                ('live-migration', 'accepted', True),
                ('live-migration', 'running', False),
                ('resize', 'confirmed', False),
                ('live-migration', 'error', False)):
            self.assertEqual(expected, self.has_failed(
                evacuated, self.migration(
                    2, migration_type=kind, status=status)))

    def test_has_failed_and_one_is_here(self):
        record = self.disks.get('disk').obj_clone()
        record.previous, record.host = record.obj_clone(), 'here'
        self.disks.set('disk', record)
        self.assertFalse(self.has_failed(self.migration(
            1, status='failed', source_compute='here', dest_compute='dead')))


class TakeBackTestCase(test_lifecycle.RecordsTestCase):
    """What the destination has recorded, and the guest as it is here."""

    VOLUME = '%s_disk' % uuids.instance

    def take_back(self, guest, **record):
        disks = self.disks(self.record(**{
            'host': 'there', 'size': 5, 'format': 'raw', **record}))
        leftovers.note(disks, 'here', [('p', self.VOLUME)])
        evacuation.take_back(disks, guest, 'qcow2')
        found = disks.get('disk')
        self.assertEqual(5, found.size)
        return ((found.backend, found.format, found.state, found.host),
                [tuple(left) for left in disks.leftovers])

    def volume(self):
        return self.guest('disk', 'volume', 'qcow2', source_pool='p',
                          source_volume=self.VOLUME)

    def in_pool(self, **record):
        return {'backend': 'libvirt-storage', 'pool': 'q',
                'volume': self.VOLUME, **record}

    def test_volume_that_was_made_anew(self):
        self.assertEqual(
            (('libvirt-storage', 'qcow2', 'ready', 'here'),
             [('there', 'q', self.VOLUME)]),
            self.take_back(self.volume(), **self.in_pool(state='building')))

    def test_whole_volume_that_was_made_anew(self):
        volume = self.VOLUME + '.1'
        self.assertEqual(
            (('libvirt-storage', 'qcow2', 'ready', 'here'),
             [('there', 'p', volume)]),
            self.take_back(self.volume(), **self.in_pool(
                pool='p', volume=volume)))

    def test_volume_that_both_see(self):
        self.assertEqual(
            (('libvirt-storage', 'qcow2', 'ready', 'here'), []),
            self.take_back(self.volume(), **self.in_pool(pool='p')))

    def test_file(self):
        self.write('disk')
        self.assertEqual(
            (('qcow2', 'qcow2', 'ready', 'here'),
             [('here', 'p', self.VOLUME), ('there', 'q', self.VOLUME)]),
            self.take_back(self.guest('disk', 'file', 'qcow2'),
                           **self.in_pool(state='building')))

    def test_image_on_ceph(self):
        self.assertEqual(
            (('libvirt-storage-rbd', 'raw', 'ready', 'here'), []),
            self.take_back(
                self.guest('disk', 'network', 'raw',
                           source_name='pool/' + self.VOLUME),
                **self.in_pool(pool='p', backend='libvirt-storage-rbd')))

    def test_no_guest(self):
        found, _left = self.take_back(None, **self.in_pool())
        self.assertEqual('there', found[-1])


@ddt.ddt
class MadeAnewTestCase(test_lifecycle.RecordsTestCase):
    """This host makes a disk in place of that of one which is down."""

    OLD = '%s_disk' % uuids.instance
    NEW = OLD + '.1'

    def setUp(self):
        super().setUp()
        self.instance.task_state = task_states.REBUILD_SPAWNING
        self.instance.host = 'down'

        self.now = objects.Instance(host='down')
        self.stub_out('nova.objects.Instance.get_by_uuid',
                      lambda *args, **kwargs: self.now)

    def volume(self, host, name, pool='p', **kwargs):
        return self.record(backend='libvirt-storage', pool=pool, volume=name,
                           host=host, **kwargs)

    def begin(self, disks, is_there=False):
        image = mock.Mock()
        image.exists.return_value = is_there
        image.metadata.side_effect = lambda size: self.volume(
            'here', self.NEW, state='building')
        self.taken = []

        def image_of(name, mapping):
            self.taken += mapping.get('taken', ())
            return image

        lifecycle.begin(disks, {'disk': {'dev': 'vda'}}, None, image_of,
                        'qcow2', {})

    def begun(self, host='here', state='ready'):
        return self.disks(self.volume(
            host, self.NEW, state=state, previous=self.volume(
                'down', self.OLD, state='replaced')))

    def over(self, disks):
        """Return what is on record when the instance is with its disk."""
        disks.save(self.context)
        self.instance.host = disks.get('disk').host
        return metadata.InstanceDisks.from_bdms(self.instance, self.bdms)

    def told(self, disks):
        record = disks.get('disk')
        return (record.host, record.volume, record.state,
                record.previous and record.previous.host,
                [tuple(left) for left in disks.leftovers])

    def test_what_it_was_is_known_until_it_is_over(self):
        disks = self.disks(self.volume('down', self.OLD))
        self.begin(disks)
        self.assertEqual([self.OLD], self.taken)
        self.assertEqual(
            ('here', self.NEW, 'building', 'down', []), self.told(disks))
        self.assertEqual('replaced', disks.get('disk').previous.state)
        disks = self.over(disks)
        self.assertEqual(('here', self.NEW, 'building', None,
                          [('down', 'p', self.OLD)]), self.told(disks))
        # The next one who saves anything saves that; another host has
        # read the rest long ago.
        number = len(self.saves)
        for host in ('down', 'here'):
            self.flags(host=host)
            disks = metadata.InstanceDisks.from_bdms(self.instance, self.bdms)
            disks.items()
            disks.save(self.context)
            self.assertEqual(host == 'here', len(self.saves) > number)
        self.assertNotIn('replaced', self.saves[-1][uuids.root])

    @ddt.data(('down', task_states.RESIZE_FINISH, 'ready'),
              ('down', task_states.REBUILD_SPAWNING, 'building'),
              # It is rebuilt where it is.
              ('first', task_states.REBUILD_SPAWNING, 'ready'))
    @ddt.unpack
    def test_noted_at_once_what_is_no_disk(self, host, task_state, state):
        self.instance.task_state = task_state
        if host == 'first':
            self.instance.host = 'here'
        disks = self.disks(self.volume(host, self.OLD, state=state))
        self.begin(disks)
        self.assertEqual(('here', self.NEW, 'building', None,
                          [(host, 'p', self.OLD)]), self.told(disks))

    def moved(self, kept=OLD):
        return self.disks(self.volume(
            'down', self.OLD, migration_id=5,
            previous=self.volume('first', kept)))

    @ddt.data((False, OLD, ['down', 'first']), (True, NEW, ['first']),
              # What is there may be that of either host.
              (True, OLD, []))
    @ddt.unpack
    def test_move_that_was_never_confirmed(self, is_there, kept, left):
        """What was kept for its revert is known as long."""
        disks = self.moved(kept)
        self.begin(disks, is_there=is_there)
        if not is_there:
            self.assertEqual([self.OLD], self.taken)
        record = disks.get('disk')
        self.assertEqual(
            (None, 'here', 'down', 5, 'first', []),
            (record.migration_id, record.host, record.previous.host,
             record.previous.migration_id, record.previous.previous.host,
             disks.leftovers))
        self.assertEqual(sorted(left), [
            host for host, _p, _v in self.over(disks).leftovers])
        self.assertEqual(not left, 'what host first has kept' in
                         self.stdlog.logger.output)

    @ddt.data(('first', OLD, []), ('down', OLD, ['down']),
              ('first', NEW, ['first']))
    @ddt.unpack
    def test_what_a_move_has_left_may_be_the_disk(self, host, name, left):
        disks = self.disks(self.volume('down', self.OLD))
        leftovers.note(disks, host, [('p', name)])
        self.begin(disks, is_there=True)
        self.assertEqual(left, [host for host, _p, _v in disks.leftovers])
        self.assertEqual(not left, 'what host first has kept' in
                         self.stdlog.logger.output)

    @ddt.data(('dead', 'replaced', True), ('dead', 'ready', False),
              ('dead', 'building', False), ('down', 'replaced', False))
    @ddt.unpack
    def test_is_replacing(self, host, state, expected):
        record = self.volume(host, self.NEW, previous=self.volume(
            'first', self.OLD, state=state))
        self.assertIs(
            expected, evacuation.is_replacing(self.instance, record))
        del self.instance.host
        self.assertFalse(evacuation.is_replacing(self.instance, record))

    def test_disk_of_a_move_that_has_come_to_another_host(self):
        """What is made in its place has the same to go back to."""
        self.instance.task_state = task_states.RESIZE_FINISH
        disks = self.moved(self.NEW)
        self.begin(disks)
        record = disks.get('disk')
        self.assertEqual(
            ('here', 5, 'first', [('down', 'p', self.OLD)]),
            (record.host, record.migration_id, record.previous.host,
             [tuple(left) for left in disks.leftovers]))

    def test_this_host_goes_on(self):
        """It was killed when one of the disks was on record."""
        swap = self.volume('down', '%s_disk.swap' % uuids.instance)
        disks = self.disks(self.begun(state='building').get('disk'), swap)
        evacuation.after_evacuation(self.instance, disks)
        self.assertEqual(('here', self.NEW, 'building', 'down'),
                         self.told(disks)[:-1])

    def test_names_of_all_that_is_left(self):
        """A host that sees one of them would not delete it later."""
        self.begin(self.moved(self.NEW))
        self.assertEqual({self.OLD, self.NEW}, set(self.taken))

    @ddt.data('down', 'third')
    def test_move_that_was_never_confirmed_goes_on(self, host):
        disks = self.moved()
        self.begin(disks)
        self.flags(host=host)
        if host == 'down':
            evacuation.give_up(disks)
        else:
            evacuation.after_evacuation(self.instance, disks)
        record = disks.get('disk')
        self.assertEqual(
            ('down', 'first', [('here', 'p', self.NEW)]),
            (record.host, record.previous.host,
             [tuple(left) for left in disks.leftovers]))

    def test_disk_that_was_elsewhere(self):
        """The instance has come to a host, and its disk hasn't."""
        disks = self.disks(self.volume('first', self.OLD))
        self.begin(disks)
        begun = ('here', self.NEW, 'building', 'first', [])
        self.assertEqual(begun, self.told(disks))
        self.flags(host='third')
        evacuation.give_up(disks)
        self.assertEqual(begun, self.told(disks))
        self.flags(host='down')
        evacuation.give_up(disks)
        self.assertEqual(('first', self.OLD, 'ready', None,
                          [('here', 'p', self.NEW)]), self.told(disks))

    @ddt.data((5, OLD, True), (None, OLD, False), (None, NEW, True))
    @ddt.unpack
    def test_note_original(self, migration_id, name, is_noted):
        """One that two hosts see is the disk; a copy has its own name then."""
        disks = self.disks(self.volume(
            'here', self.OLD, migration_id=migration_id,
            previous=self.volume('first', name)))
        expected = [('first', 'p', name)] if is_noted else []
        leftovers.note_original(disks, disks.get('disk'))
        self.assertEqual(expected, [tuple(left) for left in disks.leftovers])

    def test_note_original_on_ceph(self):
        disks = self.disks(self.volume(
            'here', self.OLD, migration_id=5,
            previous=self.volume('first', self.OLD)))
        record = disks.get('disk')
        record.previous.backend = 'libvirt-storage-rbd'
        leftovers.note_original(disks, record)
        self.assertEqual([('first', 'p', self.OLD)],
                         [tuple(left) for left in disks.leftovers])
        # An image that has stayed in its Ceph pool is the disk.
        record.backend, disks.leftovers = 'libvirt-storage-rbd', []
        leftovers.note_original(disks, record)
        self.assertEqual([], disks.leftovers)

    @ddt.data('building', 'ready')
    def test_destroyed(self, state):
        disks = self.begun(state=state)
        lifecycle.destroyed(disks)
        self.assertEqual(
            ('down', self.OLD, 'ready', None, []), self.told(disks))

    @ddt.data('building', 'ready')
    def test_another_host_was_to_make_it(self, state):
        disks = self.begun('dead', state)
        self.assertEqual(
            set(), evacuation.after_evacuation(self.instance, disks))
        self.assertEqual(('down', self.OLD, 'ready', None,
                          [('dead', 'p', self.NEW)]), self.told(disks))

    @ddt.data('building', 'ready')
    def test_this_host_tries_again(self, state):
        """What is whole is used, what isn't is made anew; of one name."""
        disks = self.begun(state=state)
        self.assertEqual(
            set(), evacuation.after_evacuation(self.instance, disks))
        self.begin(disks)
        self.assertEqual([self.OLD], self.taken)
        self.assertEqual(
            ('here', self.NEW, 'building', 'down', []), self.told(disks))

    def test_hosts_that_share_the_pool(self):
        """It is one disk, whichever of them has it, and never left over."""
        disks = self.disks(self.volume('down', self.OLD))
        self.begin(disks, is_there=True)
        begun = ('here', self.OLD, 'ready', 'down', [])
        self.assertEqual(begun, self.told(disks))
        self.begin(disks, is_there=True)
        self.assertEqual(begun, self.told(disks))
        self.assertEqual(('here', self.OLD, 'ready', None, []),
                         self.told(self.over(disks)))

    @ddt.data('here', 'dead')
    def test_host_that_shares_the_pool_has_failed(self, host):
        known = self.volume('down', self.OLD, state='replaced')
        disks = self.disks(self.volume(host, self.OLD, previous=known))
        if host == 'here':
            lifecycle.destroyed(disks)
        else:
            evacuation.after_evacuation(self.instance, disks)
        self.assertEqual(
            ('down', self.OLD, 'ready', None, []), self.told(disks))

    @ddt.data(('down', 'down', [('dead', 'p', NEW)]), ('here', 'down', []),
              # It was evacuated, and this was cast to its host before.
              ('down', 'dead', []))
    @ddt.unpack
    def test_give_up(self, host, now, left):
        self.flags(host=host)
        self.now.host = now
        disks = self.begun('dead')
        evacuation.give_up(disks)
        self.assertEqual(
            ('down', self.OLD, 'ready', None, left) if left else
            ('dead', self.NEW, 'ready', 'down', []), self.told(disks))

    @ddt.data(task_states.REBUILDING, task_states.SHELVING)
    def test_destroyed_where_it_still_is(self, task_state):
        """Nothing brings it back later, when an evacuation has failed."""
        self.flags(host='down')
        self.instance.task_state = task_state
        disks = self.begun('dead', 'building')
        lifecycle.destroyed(disks)
        self.assertIsNone(disks.get('disk'))
        self.assertEqual([('dead', 'p', self.NEW)],
                         [tuple(left) for left in disks.leftovers])

    def test_host_is_back_before_that_is_over(self):
        """It takes its disks back if the evacuation has failed."""
        self.flags(host='down')
        last = objects.Migration(
            id=1, migration_type='evacuation', status='failed',
            source_compute='down', dest_compute='dead')
        disks = self.begun('dead')
        with mock.patch.object(objects.MigrationList, 'get_by_filters',
                               return_value=[last]):
            self.assertTrue(evacuation.has_failed(
                evacuation.find_unsettled(
                    self.context, self.instance, disks), disks))

    @ddt.data(('p', 'q', False, False, True), ('p', 'p', False, False, False),
              ('p', 'q', True, False, False), ('p', 'q', False, True, False))
    @ddt.unpack
    def test_pool_of_another_name(
            self, old, new, is_private, is_left, is_refused):
        disks = self.disks(self.volume(
            'here', self.NEW, new, previous=self.volume(
                'down', self.OLD, old, state='replaced')))
        leftovers.note(disks, 'here', [(new, self.OLD)] * is_left)
        self.stub_out('nova.virt.libvirt.storage.records.keeping.is_private',
                      lambda connection, name: is_private)
        found = mock.Mock(return_value=mock.Mock())
        self.stub_out('nova.virt.libvirt.storage.pool.ownership.find', found)
        if is_refused:
            self.assertRaises(
                exception.StoragePoolNamedOtherwise,
                evacuation.refuse_other_names, mock.Mock(), disks)
            found.return_value = None
        evacuation.refuse_other_names(mock.Mock(), disks)


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
