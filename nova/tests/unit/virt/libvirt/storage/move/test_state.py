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
from unittest import mock

import nova
import nova.conf
from nova import objects
from nova import test
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
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
    """A compute service is killed after each thing that it does.

    What has happened by then stays; nothing that the process would do
    afterwards, cleaning up for example, happens any more.
    """

    def setUp(self):
        super().setUp()
        # what the database has: what is merely in memory is lost
        self.database = {bdm.uuid: bdm.driver_info for bdm in self.bdms}
        self.happened = 0
        self.killed_after = None
        self.dead = False
        self.steps = set()
        self.stub_out(
            'nova.objects.BlockDeviceMappingList._save_driver_info',
            staticmethod(lambda context, uuid, infos: self.event(
                self.database.update, infos)))
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

    def load(self, context=None, instance=None):
        if hasattr(self, 'database'):
            for bdm in self.bdms:
                bdm.driver_info = self.database[bdm.uuid]
                bdm.obj_reset_changes()
        return super().load()

    # -- the phases of a move, each in one process

    def do_offer(self):
        self.make_offer()

    def do_move(self):
        with open(os.path.join(self.directory, 'console.log'), 'w') as f:
            f.write('it boots')
        self.disks = self.load()
        self.move()

    def do_accept(self):
        self.flags(host='dest')
        try:
            destination.accept(self.context, self.instance, self.load(),
                               self.dest, 'dest:///', self.cache_base)
        finally:
            self.flags(host='source')

    def do_confirm(self):
        source.confirm(self.context, self.source, self.instance)

    def do_abandon(self):
        source.abandon(self.context, self.host, self.instance,
                       self.migration, self.load())

    def killed_in(self, phases, after):
        """Run the phases.

        :returns: the one in which the service was killed, None if none was
        """
        self.killed_after, self.happened = after, 0
        for phase in phases:
            try:
                getattr(self, 'do_' + phase)()
            except Killed:
                return phase
            finally:
                # Its connections go with it.
                self.killed_after = None if self.dead else after
        return None

    def revive(self):
        self.dead, self.killed_after = False, None
        self.steps.add(state.step_of(self.load()))

    def try_again(self):
        self.migration = objects.Migration(
            self.context, id=8, source_compute='source', dest_compute='dest',
            dest_host='192.0.2.2')
        self.migration.save = mock.Mock()
        self.instance.migration_context = objects.MigrationContext(
            migration_id=8)
        for phase in ('offer', 'move', 'accept'):
            getattr(self, 'do_' + phase)()

    def volumes(self, daemon):
        # A probe goes with the instance.
        return [name for name in self.ours(daemon) if 'probe' not in name]

    def is_at_source(self):
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual(sorted(test_move.AT_SOURCE),
                         self.volumes(self.source))
        self.assertEqual([], self.volumes(self.dest))
        self.nothing_of_a_move()

    def is_at_dest(self):
        self.assertEqual(
            [('ready', 'dest')] * 3,
            [place[:2] for name, place in self.places().items()
             if name != 'disk.swap'])
        self.assertEqual(test_move.COPIED, self.volumes(self.dest))
        for name in test_move.COPIED:
            self.assertEqual('content of ' + name, self.dest.pools[POOL][
                self.load().get(name).volume]['content'])

    def finish(self, phase):
        """What the table says of a crash in a phase."""
        if phase in ('offer', 'move', 'abandon'):
            self.do_abandon()
            self.is_at_source()
            self.try_again()
        elif phase == 'accept':
            self.do_accept()
        self.is_at_dest()
        self.do_confirm()
        self.delete_left()
        self.assertEqual([], self.volumes(self.source))
        self.is_at_dest()
        self.nothing_of_a_move()

    def crash_everywhere(self, phases):
        fresh = (dict(self.database), dict(self.source.pools[POOL]))
        after = 0
        while True:
            after += 1
            phase = self.killed_in(phases, after)
            if phase is None:
                break
            with self.subTest(phase=phase, after=after):
                self.revive()
                self.finish(phase)
            # everything anew
            self.database.clear()
            self.database.update(fresh[0])
            self.source.pools[POOL].clear()
            self.source.pools[POOL].update(
                {name: dict(content) for name, content in fresh[1].items()})
            self.dest.pools[POOL].clear()
            self.migration = objects.Migration(
                self.context, id=7, source_compute='source',
                dest_compute='dest', dest_host='192.0.2.2')
            self.migration.save = mock.Mock()
            self.instance.migration_context = objects.MigrationContext(
                migration_id=7)
            self.assertLess(after, 100)
        return after

    def test_until_confirmed(self):
        self.assertGreater(self.crash_everywhere(
            ['offer', 'move', 'accept', 'confirm']), 15)
        self.assertEqual(
            {state.OFFER, state.PACK, state.INTENT, state.EXPECT, state.TAKE,
             state.VERIFY, state.CONFIRM}, self.steps)

    def test_until_reverted(self):
        self.assertGreater(self.crash_everywhere(
            ['offer', 'move', 'accept', 'abandon']), 15)
        self.assertEqual([], leftovers.on_host(self.load(), 'dest'))
