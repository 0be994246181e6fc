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

import itertools
import os
from unittest import mock

import ddt
from oslo_utils.fixture import uuidsentinel as uuids

import nova
from nova.compute import task_states
import nova.conf
from nova import exception
from nova import objects
from nova import test
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.move import source
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.records import leftovers

CONF = nova.conf.CONF

POOL = two_hosts.POOL


class TableTestCase(test.NoDBTestCase):
    def test_docstring(self):
        text = ' '.join(state.__doc__.split())
        for step in state.STEPS:
            self.assertIn('%s (%s): %s lies there: %s killed here: %s' % step,
                          text)

    def test_reference(self):
        path = os.path.join(
            os.path.dirname(nova.__file__), '..', 'doc', 'source',
            'reference', 'libvirt-storage-moves.rst')
        with open(path) as f:
            page = f.read()
        rows = page.split('   * - ')[2:]
        self.assertEqual(
            [tuple(step) for step in state.STEPS],
            [tuple(cell.split('\n\n')[0].strip()
                   for cell in row.split('\n     - ')) for row in rows])


class Killed(BaseException):
    pass


class CrashTestCase(test_move.OutgoingTestCase):
    """A compute service is killed in the midst of a move.

    What has happened by then stays; nothing that the process would do
    afterwards, cleaning up for example, happens any more.
    """

    def setUp(self):
        super().setUp()
        self.fname = imagecache.get_cache_fname(uuids.image)
        # what the database has: what is merely in memory is lost
        self.database = {bdm.uuid: bdm.driver_info for bdm in self.bdms}
        self.happened = 0
        self.killed_after = None
        self.dead = False
        self.phase = None
        self.stub_out(
            'nova.objects.BlockDeviceMappingList._save_driver_info',
            lambda cls, context, uuid, infos: self.save(infos))
        for name, do in (('Pool.create', two_hosts.Pool.create),
                         ('Volume.delete', two_hosts.Volume.delete)):
            self.stub_out('nova.tests.unit.virt.libvirt.storage.move.'
                          'two_hosts.' + name, self._as_event(do))
        for name in ('pool.stream.upload_file', 'pump.transfer.copy',
                     'move.guest_files.unpack'):
            self._wrap('nova.virt.libvirt.storage.' + name)
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.load',
            lambda *args: self.load())
        self.stub_out('nova.virt.libvirt.storage.move.destination._adopt_base',
                      lambda *args: None)

    def _wrap(self, name):
        patch = mock.patch(name)
        do, _local = patch.get_original()
        self.stub_out(name, self._as_event(do))

    def _as_event(self, do):
        return lambda *args, **kwargs: self.event(do, *args, **kwargs)

    def event(self, do, *args, **kwargs):
        if self.dead:
            raise Killed
        result = do(*args, **kwargs)
        self.happened += 1
        if self.happened == self.killed_after:
            self.dead = True
            raise Killed
        return result

    def save(self, infos):
        self.event(self.database.update, infos)

    def load(self, context=None, instance=None):
        if hasattr(self, 'database'):
            for bdm in self.bdms:
                bdm.driver_info = self.database[bdm.uuid]
                bdm.obj_reset_changes()
        return super().load()

    def lose_base_image(self):
        """Let Glance have lost the base image of the root disk."""
        self.lay_over('disk', self.fname, 50)
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        self.stub_out('os.rename', self._as_event(self.rename))

    def rename(self, old, new):
        """Put a volume of the destination into its image cache."""
        self.dest.pools[two_hosts.BASES].pop(os.path.basename(old))
        os.makedirs(os.path.dirname(new), exist_ok=True)
        with open(new, 'w'):
            pass

    # -- the phases of a move, each in one process

    def do_offer(self):
        self.make_offer()

    def do_move(self):
        with open(os.path.join(self.directory, 'console.log'), 'w') as f:
            f.write('it boots')
        self.disks = self.load()
        self.move()

    def at_dest(self, do, *args):
        self.flags(host='dest')
        try:
            return do(*args)
        finally:
            self.flags(host='source')

    def do_accept(self):
        self.at_dest(destination.accept, self.context, self.instance,
                     self.load(), self.dest, 'dest:///', self.cache_base)

    def do_confirm(self):
        source.confirm(self.context, self.source, self.instance)

    def do_give_back(self):
        self.instance.task_state = task_states.RESIZE_REVERTING
        disks = self.load()
        self.at_dest(destination.give_back, self.dest, self.instance, disks,
                     source.kept(disks))

    def do_abandon(self):
        source.abandon(self.context, self.host, self.instance,
                       self.migration, self.load())

    def run_until_killed(self, phases):
        """Run the phases.

        :returns: the one in which the service was killed, None if none was
        """
        for self.phase in phases:
            try:
                getattr(self, 'do_' + self.phase)()
            except Killed:
                return self.phase
        return None

    def revive(self):
        self.dead, self.killed_after, self.phase = False, None, None
        self.nothing_is_lost()

    def new_migration(self, number):
        self.migration = objects.Migration(
            self.context, id=number, source_compute='source',
            dest_compute='dest', dest_host='192.0.2.2')
        self.migration.save = mock.Mock()
        self.instance.migration_context = objects.MigrationContext(
            migration_id=number)
        self.instance.task_state = None

    def try_again(self):
        self.new_migration(8)
        for phase in ('offer', 'move', 'accept'):
            getattr(self, 'do_' + phase)()

    # -- what lies where

    def volumes(self, daemon):
        # A probe goes with the instance.
        return [name for name in self.ours(daemon) if 'probe' not in name]

    def nothing_is_lost(self):
        """Each disk is whole where its record says that it is ready."""
        for name, record in self.load().items():
            if name == 'disk.swap':
                continue
            if record.is_building:
                record = record.previous
            self.assertEqual('ready', record.state)
            daemon = getattr(self, record.host)
            self.assertEqual('content of ' + name, daemon.pools[POOL][
                record.volume]['content'])

    def is_at_source(self):
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual(sorted(test_move.AT_SOURCE),
                         self.volumes(self.source))
        self.assertEqual([], self.volumes(self.dest))
        self.assertEqual({}, self.dest.pools[two_hosts.BASES])
        self.nothing_is_lost()
        self.nothing_of_a_move()

    def is_at_dest(self):
        self.assertEqual(
            [('ready', 'dest')] * 3,
            [place[:2] for name, place in self.places().items()
             if name != 'disk.swap'])
        self.assertEqual(test_move.COPIED, self.volumes(self.dest))
        self.assertEqual({}, self.dest.pools[two_hosts.BASES])
        self.nothing_is_lost()

    def is_confirmed(self):
        self.delete_left()
        self.assertEqual([], self.volumes(self.source))
        self.is_at_dest()
        self.nothing_of_a_move()


@ddt.ddt
class EventsTestCase(CrashTestCase):
    """The service is killed after each single thing that it does."""

    def setUp(self):
        super().setUp()
        self.steps = set()

    def revive(self):
        super().revive()
        self.steps.add(state.step_of(self.load()))

    def finish(self, phase, again):
        """What the table says of a crash in a phase.

        :param again: whether the destination is asked to revert once more
        """
        if phase == 'give_back' and again:
            self.do_give_back()
        if phase in ('offer', 'move', 'give_back', 'abandon'):
            self.do_abandon()
            self.is_at_source()
            self.try_again()
        elif phase == 'accept':
            self.do_accept()
        self.is_at_dest()
        self.do_confirm()
        self.is_confirmed()

    def crash_everywhere(self, phases, again=False):
        fresh = (dict(self.database), dict(self.source.pools[POOL]),
                 dict(self.source.pools[two_hosts.BASES]))
        cached = os.path.join(CONF.instances_path, '_base', self.fname)
        for after in itertools.count(1):
            self.killed_after, self.happened = after, 0
            phase = self.run_until_killed(phases)
            if phase is None:
                return after
            with self.subTest(phase=phase, after=after):
                self.revive()
                self.finish(phase, again)
            # everything anew
            self.database.clear()
            self.database.update(fresh[0])
            for pool, content in zip((POOL, two_hosts.BASES), fresh[1:]):
                self.source.pools[pool].clear()
                self.source.pools[pool].update(
                    {name: dict(volume) for name, volume in content.items()})
                self.dest.pools[pool].clear()
            if os.path.exists(cached):
                os.unlink(cached)
            self.new_migration(7)
            self.assertLess(after, 100)

    @ddt.data(False, True)
    def test_until_confirmed(self, has_base):
        if has_base:
            self.lose_base_image()
        self.assertGreater(self.crash_everywhere(
            ['offer', 'move', 'accept', 'confirm']), 15)
        self.assertEqual(
            {state.OFFER, state.PACK, state.INTENT, state.EXPECT, state.TAKE,
             state.VERIFY, state.CONFIRM}, self.steps)

    @ddt.data(*itertools.product((False, True), (False, True)))
    @ddt.unpack
    def test_until_reverted(self, has_base, again):
        if has_base:
            self.lose_base_image()
        self.assertGreater(self.crash_everywhere(
            ['offer', 'move', 'accept', 'give_back', 'abandon'], again), 20)
        self.assertEqual([], leftovers.on_host(self.load(), 'dest'))


# In which phase each row of the table is saved, and how step_of() calls it
# where two rows look alike.
PHASES = {
    state.OFFER: ('offer', state.OFFER), state.PACK: ('move', state.PACK),
    state.INTENT: ('move', state.INTENT), state.EXPECT: (
        'move', state.EXPECT), state.TAKE: ('accept', state.TAKE),
    state.VERIFY: ('accept', state.VERIFY), state.CONFIRM: (
        'confirm', state.CONFIRM), state.GIVE_BACK: (
        'give_back', state.CONFIRM), state.REVERT: ('abandon', state.OFFER)}

HOSTS = {'S': 'source', 'D': 'dest'}

# Who goes on in the words of the table: the method that does it.
WAYS = (('S by a hard reboot: abandon()', 'reboot_source'),
        ('S: abandon()', 'go_back'), ('S: revert', 'go_back'),
        ('D by', 'reboot_dest'), ('a hard reboot on D is refused', 'refuse'),
        ('the next try', 'try_again'), ('deletes the leftovers', 'end'))


def ways_of(step):
    for clause in step.goes_on.split('; '):
        found = [way for words, way in WAYS if words in clause]
        if clause != 'nobody has to':
            yield found[0]


ROWS = [(step.name, way) for step in state.STEPS for way in ways_of(step)]


@ddt.ddt
class StepsTestCase(CrashTestCase):
    """The table, row by row: who saves it, what it says, who goes on.

    :ivar step: the row after whose save the service is killed
    :ivar late: at once, or when the next row would be saved
    """

    step = late = None
    saved = False

    def save(self, infos):
        if self.step and self.saved and self.late:
            self.dead = True
        super().save(infos)
        if self.step and PHASES[self.step.name] == (
                self.phase, state.step_of(self.load())):
            self.assertEqual(HOSTS[self.step.host], CONF.host)
            self.saved = True
            if not self.late:
                self.dead = True
                raise Killed

    def facts(self):
        """What is on record, in the words of the table."""
        disks = self.load()
        record = disks.get('disk.eph0')
        hosts = {host: letter for letter, host in HOSTS.items()}
        yield '%s@%s' % (record.state, hosts[record.host])
        if record.previous is not None:
            yield 'previous %s@%s' % (
                record.previous.state, hosts[record.previous.host])
        if record.expected is not None:
            yield 'expected'
        if not set(disks.extras) - {'disk.swap'}:
            yield 'extras gone'
        if disks.leftovers:
            yield 'leftovers'

    def told(self, step):
        """What the table says, without a reference to the row before."""
        parts = step.record.split(', ')
        if parts[0] != 'as before':
            return parts
        before = state.STEPS[state.STEPS.index(step) - 1]
        return self.told(before) + parts[1:]

    def lies_as_told(self, step):
        at_source, at_dest = step.disks.split(' / ')
        self.assertEqual(
            sorted([*test_move.AT_SOURCE,
                    *(['files'] if 'files' in at_source else [])]),
            self.volumes(self.source))
        found = set(self.volumes(self.dest)) - {'files'}
        expected = set() if at_dest == '-' else set(test_move.COPIED)
        if at_dest == 'part':
            self.assertLessEqual(found, expected)
        else:
            self.assertEqual(expected, found)

    def go_back(self):
        self.do_abandon()
        self.is_at_source()
        self.try_again()

    def end(self):
        self.is_confirmed()

    def refuse(self):
        """Nothing boots on the destination from what it has given back."""
        self.assertRaises(
            exception.DiskGivenBack, self.at_dest, leftovers.refuse_given_back,
            self.dest, self.load())
        self.go_back()

    def reboot_source(self):
        with mock.patch('nova.objects.Migration.get_by_id',
                        return_value=self.migration):
            self.assertIs(self.migration, source.unfinished(
                self.context, self.instance, self.load()))
        self.go_back()

    def reboot_dest(self):
        disks = self.load()
        with mock.patch('nova.objects.Migration.get_by_id',
                        return_value=self.migration):
            self.assertIsNone(self.at_dest(
                source.unfinished, self.context, self.instance, disks))
        if self.at_dest(destination.is_due, self.instance, disks):
            self.do_accept()

    @ddt.data(*((name, way, has_base, late) for name, way in ROWS
                for has_base in (False, True) for late in (False, True)))
    @ddt.unpack
    def test_killed(self, name, way, has_base, late):
        if has_base:
            self.lose_base_image()
        [step] = [step for step in state.STEPS if step.name == name]
        self.step, self.late = step, late
        phases = ['offer', 'move', 'accept', 'confirm']
        if PHASES[name][0] not in phases:
            phases[3:] = ['give_back', 'abandon']
        if name == state.OFFER:
            # An offer is no record.
            self.saved = True
            phases = phases if late else ['offer']
        killed = self.run_until_killed(phases)
        self.step = None
        self.revive()
        if not late:
            self.assertEqual(name != state.OFFER, killed is not None)
            self.assertLessEqual(set(self.told(step)), set(self.facts()))
        # The volume that holds the files is made after the save.
        if late == (name == state.PACK):
            self.lies_as_told(step)
        getattr(self, way)()
        self.is_at_dest()
        self.do_confirm()
        self.is_confirmed()
