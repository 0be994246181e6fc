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
"""Random histories of moves: faults in the midst of what follows faults."""

import random
from unittest import mock

import ddt
import oslo_messaging
import tenacity
from testtools import content

from nova.compute import task_states
from nova.compute import vm_states
import nova.conf
from nova import exception
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import test_state
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.move import source
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.records import leftovers

CONF = nova.conf.CONF

POOL = two_hosts.POOL
HISTORIES = 20
#: Faults before everything goes well, and things that happen in a phase.
FAULTS, EVENTS = 6, 14
ERRORS = {
    'create': lambda: exception.StorageVolumeError(
        volume='a volume', pool=POOL, host='a host', reason='it broke'),
    'save': lambda: oslo_messaging.MessagingTimeout('no conductor'),
    'rename': lambda: OSError('it broke'),
    'copy': lambda: exception.StorageTransferError(reason='it broke')}
ERRORS['delete'] = ERRORS['upload_file'] = ERRORS['create']
ERRORS['unpack'] = ERRORS['rename']


class CreateTestCase(test_move.OutgoingTestCase):
    """What is made on the destination while its answer is lost."""

    def create(self):
        return state.create_volume(
            two_hosts.Pool(self.dest, POOL, 'dest'), 'a volume', 10, (1, 1))

    def test_is_deleted(self):
        make = two_hosts.Pool.create

        def create(pool, config):
            make(pool, config)
            raise ERRORS['create']()

        self.stub_out('nova.tests.unit.virt.libvirt.storage.move.two_hosts.'
                      'Pool.create', create)
        self.assertRaises(exception.StorageVolumeError, self.create)
        self.assertEqual({}, self.dest.pools[POOL])

    def test_is_deleted_if_it_can_not_be_cleared(self):
        with mock.patch('nova.virt.libvirt.storage.pool.clearing.clear_rest',
                        side_effect=ERRORS['create']()):
            self.assertRaises(exception.StorageVolumeError, self.create)
        self.assertEqual({}, self.dest.pools[POOL])

    def test_what_was_there_stays(self):
        self.create()
        self.assertRaises(exception.StorageVolumeExists, self.create)
        self.assertEqual(['a volume'], list(self.dest.pools[POOL]))


@ddt.ddt
class HistoryTestCase(test_state.CrashTestCase):
    """Kills, errors and peers that are away, one after the other.

    After each the disks are whole somewhere and on record; when there are no
    more the move succeeds, and nothing is left.
    """

    def setUp(self):
        super().setUp()
        # One disk after the other, so that a seed has one history.
        self.flags(storage_migration_parallel_disks=1, group='libvirt')
        self.stub_out('nova.virt.libvirt.storage.move.undo._delete_anew.'
                      'retry.stop', tenacity.stop_after_attempt(1))
        self.instance.vm_state = vm_states.ACTIVE
        self.told = []
        self.number = 6
        self.fault = None
        self.is_killed = False

    # -- faults

    def event(self, do, *args, **kwargs):
        if self.dead:
            raise test_state.Killed
        self.happened += 1
        fault, happened = self.fault, self.happened
        name = do.__name__ if do.__name__ in ERRORS else 'save'
        if fault is None or not (
                fault[1] <= happened < fault[1] + fault[2]):
            self.host.local = self.source
            return do(*args, **kwargs)
        if fault[0] == 'no libvirt here':
            self.told.append('%s at %d' % (fault[0], happened))
            self.host.local = exception.HypervisorUnavailable(host='source')
            return do(*args, **kwargs)
        if fault[0] in ('killed before', 'error before'):
            self.fail_now(name)
        result = do(*args, **kwargs)
        if name == 'create':
            # One that was made, and can't be deleted at once, is found by
            # its name: see orphans.py.
            self.fault = (*self.fault[:2], 1)
        self.fail_now(name)
        return result

    def fail_now(self, name):
        self.told.append('%s of %d (%s)' % (
            self.fault[0], self.happened, name))
        if self.fault[0].startswith('killed'):
            self.dead = True
            raise test_state.Killed
        raise ERRORS[name]()

    def draw_fault(self):
        self.fault = None
        if self.faults_left and self.random.random() < .7:
            self.faults_left -= 1
            self.fault = (self.random.choice(
                ['killed before', 'killed after', 'error before',
                 'error after', 'no libvirt here']),
                self.random.randint(1, EVENTS),
                self.random.choice([1, 1, 2, 4, 100]))
        self.host.peer = (ValueError('no route') if self.faults_left and
                          self.random.random() < .15 else self.dest)

    def does(self, phase, *args):
        """Do a phase, perhaps with a fault.

        :returns: whether it has come to its end
        """
        self.draw_fault()
        self.happened, self.dead = 0, False
        self.told.append('%s%s' % (
            phase, '' if self.host.peer is self.dest else ', no route'))
        try:
            getattr(self, 'do_' + phase)(*args)
            return True
        except (test_state.Killed, Exception) as error:
            self.told.append(repr(error)[:120])
            if self.fault is None and self.host.peer is self.dest:
                raise
            self.is_killed = isinstance(error, test_state.Killed)
            return False
        finally:
            self.fault, self.dead = None, False
            self.host.peer, self.host.local = self.dest, self.source
            self.nothing_is_lost()

    # -- what Nova does

    def at_source(self):
        """It runs on the source, and is to move.

        :returns: whether it has moved
        """
        self.number += 1
        self.new_migration(self.number)
        self.migrations[self.number] = self.migration
        if not self.does('offer'):
            return False
        if self.does('move'):
            return True
        # The driver gives up what has failed, if it lives.
        if not self.is_killed:
            self.does('abandon')
        while not self.does('reboot_at_source'):
            pass
        self.is_whole('source')
        return False

    def do_reboot_at_source(self):
        with mock.patch('nova.objects.Migration.get_by_id',
                        lambda context, number: self.migrations[number]):
            found = source.unfinished(
                self.context, self.instance, self.load())
        if found is not None:
            source.abandon(self.context, self.host, self.instance, found,
                           self.load())
        source.settle(self.context, self.instance, self.load())

    def do_reboot_at_dest(self):
        with mock.patch('nova.objects.Migration.get_by_id',
                        lambda context, number: self.migrations[number]):
            self.assertIsNone(self.at_dest(
                source.unfinished, self.context, self.instance, self.load()))
        if self.at_dest(destination.is_due, self.instance, self.load()):
            self.do_accept()

    def give_back(self):
        while not self.does('give_back'):
            if self.random.random() < .5:
                break
        while not self.does('abandon'):
            pass
        self.instance.task_state = None
        self.is_whole('source')

    def history(self):
        while True:
            if not self.at_source():
                continue
            done = self.does('accept')
            while not done:
                done = self.does('reboot_at_dest')
            self.is_whole('dest')
            if self.random.random() < .5 and self.faults_left:
                self.give_back()
                continue
            while not self.does('confirm'):
                pass
            return

    # -- what must hold

    def is_whole(self, host):
        """All disks are there, and whatever lies elsewhere is on record."""
        disks = self.load()
        for name, record in disks.items():
            if name != 'disk.swap':
                self.assertEqual(('ready', host), (record.state, record.host))
        known = {(where, volume)
                 for where, _pool, volume in disks.leftovers}
        for _name, record in [*disks.items(), *disks.extras.items()]:
            while record is not None:
                known.add((record.host, record.volume))
                record = record.previous
        for daemon in (self.source, self.dest):
            self.assertEqual(set(), {
                (daemon.name, volume) for volume in daemon.pools[POOL]
                if 'probe' not in volume} - known)

    def nothing_is_left(self):
        disks = self.load()
        self.at_dest(leftovers.delete, self.dest, disks)
        disks.save(self.context)
        self.delete_left()
        if self.source is not self.dest:
            self.assertEqual([], self.volumes(self.source))
            self.assertEqual({}, self.dest.pools[two_hosts.BASES])
        self.assertEqual(
            sorted(record.volume for name, record in self.load().items()
                   if name != 'disk.swap'),
            [volume for volume in sorted(self.dest.pools[POOL])
             if 'probe' not in volume])
        self.nothing_is_lost()
        self.nothing_of_a_move()

    def run_history(self, seed, has_base):
        if has_base:
            self.lose_base_image()
        self.random = random.Random(seed)
        self.faults_left = self.random.randint(1, FAULTS)
        self.migrations = {}
        try:
            self.history()
            self.fault = None
            self.nothing_is_left()
        except BaseException:
            self.addDetail('history', content.text_content('\n'.join(
                self.told)))
            raise

    @ddt.data(*((seed, has_base) for seed in range(HISTORIES)
                for has_base in (False, True)))
    @ddt.unpack
    def test_history(self, seed, has_base):
        self.run_history(seed, has_base)


class SameHostTestCase(HistoryTestCase):
    """Resizes on one and the same host."""

    def new_migration(self, number):
        super().new_migration(number)
        self.migration.dest_compute = 'source'

    def at_dest(self, do, *args):
        return do(*args)

    def do_offer(self):
        destination.offer(
            self.source, self.instance, self.migration, self.load())

    def move(self):
        return super().move(same_host=True)

    def do_accept(self):
        destination.accept(
            self.context, self.instance, self.load(), self.source,
            'qemu:///system', self.cache_base)

    def do_give_back(self):
        self.instance.task_state = task_states.RESIZE_REVERTING
        disks = self.load()
        destination.give_back(
            self.source, self.instance, disks, source.kept(disks))

    def is_whole(self, host):
        super().is_whole('source')

    def nothing_is_left(self):
        self.dest = self.source
        super().nothing_is_left()
