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
"""The soak: what it draws and tells, and some minutes of it.

`lab/soak` runs for as long as one likes; these are the ten minutes that belong
to all scenarios, half of them here and half in test_cloud_soak.
"""

import contextlib
import json
import os
import pathlib
import tempfile
import threading
import unittest
import unittest.mock

from lab.cloud import server
from lab.endurance import cloud
from lab.endurance import moves
from lab.endurance import oracle
from lab.endurance import plan
from lab.endurance import report
from lab.endurance import servers
from lab.errors import LabError

MINUTES = 5
SEED = 14


class TestPlan(unittest.TestCase):

    def drawn(self, seed):
        draw = plan.Draw(seed)
        return [(draw.one(moves.FAULTS), draw.seconds(0, 9), draw.number(1, 9))
                for _number in range(50)]

    def test_seed(self):
        self.assertEqual(self.drawn(1), self.drawn(1))
        self.assertNotEqual(self.drawn(1), self.drawn(2))

    def test_all_faults_come(self):
        draw = plan.Draw(SEED)
        self.assertEqual(set(moves.FAULTS), {
            draw.one(moves.FAULTS) for _number in range(500)})

    def test_all_operations_are_there(self):
        for name in [*servers.OPERATIONS, 'evacuate']:
            self.assertTrue(callable(getattr(servers.Subject, name)), name)

    def test_shortened(self):
        steps = [plan.Step(1, 'one', 'write'), plan.Step(1, 'two', 'write'),
                 plan.Step(2, 'two', 'rescue', fault='cut link'),
                 plan.Step(3, '-', 'dead host')]
        self.assertEqual([steps[0], steps[2], steps[3]],
                         plan.shortened(steps, 'one'))

    def test_limit(self):
        limit = plan.Limit(2, None)
        self.assertEqual([False, False, True], [
            limit.reached(done) for done in range(3)])
        self.assertTrue(plan.Limit(None, 0).reached(1))


class TestHappening(unittest.TestCase):

    def faults(self, *names, place='host-a'):
        return [cloud.Fault(unittest.mock.Mock(), name, place, 0, 0)
                for name in names]

    def test_all_faults_can_be_done(self):
        """Each one's name leads to something, and that is undone."""
        for place, weights in (('host-a', cloud.FAULTS),
                               ('ctl', cloud.CONTROL_FAULTS)):
            for name in sorted(set(weights) - {'none'}):
                fault, = self.faults(name, place=place)
                machine = unittest.mock.MagicMock()
                fault.machine, fault.cloud.get.return_value = machine, ''
                with self.subTest(name), contextlib.ExitStack() as stack:
                    fault._begin(stack)
                    self.assertTrue(machine.mock_calls or
                                    fault.cloud.method_calls)

    def test_places_have_theirs_at_the_same_time(self):
        both, seen = threading.Barrier(2, timeout=10), []
        with unittest.mock.patch.object(
                cloud.Fault, '_begin', lambda *_args: both.wait()), \
                unittest.mock.patch.object(cloud.Host, 'wait_ready'), \
                cloud.Happening([
                    self.faults('cut link', 'none', 'fill pool'),
                    self.faults('pause glance', 'kill glance', place='ctl')],
                    seen.append) as happening:
            self.assertTrue(happening.lasts() or len(seen) == 4)
        self.assertFalse(happening.lasts())
        self.assertEqual(4, len(seen))

    def test_a_fault_that_can_not_be_undone_is_told(self):
        """As a compute that does not start again."""
        with unittest.mock.patch.object(
                cloud.Fault, '_begin', side_effect=LabError('no such')), \
                self.assertRaisesRegex(servers.Lost, 'kill libvirtd.*no such'):
            with cloud.Happening([self.faults('kill libvirtd')], str):
                pass


class TestOperate(unittest.TestCase):

    def operate(self, outcomes, recovers):
        """:returns: steps, and names since the server was known to run"""
        subject = unittest.mock.Mock()
        subject.write.side_effect = outcomes
        subject.recover.side_effect = recovers
        happening = unittest.mock.Mock()
        happening.lasts.side_effect = lambda: (
            subject.write.call_count < len(outcomes))
        told = []
        with unittest.mock.patch.object(cloud, 'PAUSE', 0), \
                unittest.mock.patch.object(cloud.servers, 'Subject'):
            since = cloud.Soak(unittest.mock.Mock(), None, 0, str)._operate(
                1, subject, ['write'] * 9, happening, told)
        return [step.outcome for step in told], since

    def test_goes_on(self):
        """After a failure it is brought back, and the next one is tried."""
        bad = LabError('refused')
        self.assertEqual(
            (['done', 'failed: refused', 'done'], ['write']),
            self.operate([None, bad, None], [None]))
        self.assertEqual(
            (['failed: refused', 'failed: refused'], ['write'] * 2),
            self.operate([bad, bad], [LabError('not yet')]))

    def test_what_is_lost_is_judged_at_the_end(self):
        self.assertEqual(
            (['failed: refused'], ['write']),
            self.operate([LabError('refused'), None],
                         [servers.Lost('gone')]))

    def test_waits_for_nothing(self):
        """A server that stays as it is has failed, soon without a task."""
        subject = servers.Subject(None, 'one')
        found = unittest.mock.Mock(status='ACTIVE', task_state='migrating')
        with unittest.mock.patch('time.monotonic') as now:
            for now.return_value in range(0, 200, 2):
                subject._watch(found)
            found.task_state = None
            for now.return_value in range(200, 221, 2):
                subject._watch(found)
            # Nobody has waited meanwhile.
            for now.return_value in range(230, 251, 2):
                subject._watch(found)
            now.return_value = 252
            self.assertRaises(server.ServerError, subject._watch, found)
            found.task_state = 'powering-off'
            for now.return_value in range(252, 313, 2):
                subject._watch(found)
            now.return_value = 314
            self.assertRaises(server.ServerError, subject._watch, found)


class TestRound(unittest.TestCase):

    def once(self, **more):
        """:returns: Soak, of one server, and whether it was Lost"""
        with unittest.mock.patch.object(cloud.servers, 'Subject'):
            soak = cloud.Soak(unittest.mock.Mock(), plan.Draw(SEED), 1, str)
        subject = soak.subjects[0]
        subject.configure_mock(name='one', **more)
        with unittest.mock.patch.object(
                cloud, 'EVACUATION', 0), unittest.mock.patch.object(
                cloud.Fault, 'come_and_go', lambda _fault, say: say()), \
                unittest.mock.patch.object(soak, '_wait_services'), \
                unittest.mock.patch.object(cloud.oracle, 'check') as check:
            try:
                return soak.once(1), check
            except servers.Lost as lost:
                self.assertEqual('one', lost.subject)
                return lost.steps, check

    def test_goes_through_without_a_fault(self):
        steps, check = self.once()
        self.assertGreaterEqual(
            sum(step.name == plan.FAULT for step in steps), 3 * cloud.LEAST)
        self.assertIn(steps[-1].name, cloud.AFTER)
        self.assertEqual(('without a fault', 'done'), (
            steps[-1].detail, steps[-1].outcome))
        check.assert_called_once()

    def test_does_not_go_through(self):
        """That is a complaint, whatever it says."""
        steps, _check = self.once(**{
            name + '.side_effect': LabError('no host') for name in cloud.AFTER
        })
        self.assertEqual('failed: no host', steps[-1].outcome)

    def test_the_same_from_the_same_seed(self):
        first, second = ([str(step) for step in self.once()[0]
                          if step.name == plan.FAULT] for _one in range(2))
        self.assertEqual(sorted(first), sorted(second))


class TestRun(unittest.TestCase):

    def run_(self, keep_going):
        """Three rounds, of which the second loses a server."""
        lost, told = servers.Lost('one is gone'), []
        lost.subject, lost.steps = 'one', [plan.Step(2, 'one', 'write')]

        def once(number):
            if number == 2:
                raise lost
            return [plan.Step(number, '-', plan.FAULT, fault='cut link'),
                    plan.Step(number, 'one', 'live_migrate', outcome='done')]

        with unittest.mock.patch.object(cloud, 'Soak') as soak, \
                unittest.mock.patch.object(oracle, 'memory', dict):
            soak.return_value.once.side_effect = once
            result = cloud.run(None, 1, plan.Limit(3, None), 1, told.append,
                               keep_going)
        return result, told, soak.return_value

    def test_ends_with_the_first_complaint(self):
        result, told, soak = self.run_(False)
        self.assertEqual((1, 1, 'one is gone'), (
            result.faults, result.moves, result.complaint))
        self.assertEqual(['   1          1 faults so far, 1 moves went '
                          'through'], told)
        soak.end.assert_not_called()

    def test_keeps_going(self):
        result, told, soak = self.run_(True)
        self.assertEqual((2, 2, 'one is gone', 5), (
            result.faults, result.moves, result.complaint, len(result.steps)))
        self.assertEqual('   2 one      one is gone', told[1])
        soak.make_anew.assert_called_once_with('one')
        soak.end.assert_called_once_with()


class TestReport(unittest.TestCase):

    def test_faults(self):
        """Servers which meet one fault together don't make more of it."""
        result = report.Result('cloud', 7, steps=[
            plan.Step(1, 'one', 'write', fault='cut link (a) after 1.0 s'),
            plan.Step(1, 'two', 'write', fault='cut link (a) after 1.0 s'),
            plan.Step(2, 'one', 'write', fault='cut link (b) after 2.0 s'),
            plan.Step(3, 'one', 'write')], complaint='lost', subject='two')
        self.assertEqual(2, result.faults)
        self.assertEqual({'cut link (a)': 1, 'cut link (b)': 1},
                         result.kinds())
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, 'soak.json')
            report.write([result], path)
            told, = json.loads(path.read_text())
        self.assertEqual((7, 2, 'lost'), (
            told['seed'], told['faults'], told['complaint']))
        self.assertEqual(3, len(told['shortened']))

    def test_steps_of_a_cloud(self):
        """Its faults are steps of their own, between the operations."""
        result = report.Result('cloud', 7, steps=[
            plan.Step(1, '-', plan.FAULT, fault='cut link (a) after 1.0 s'),
            plan.Step(1, 'one', 'write', outcome='done'),
            plan.Step(1, '-', plan.FAULT, fault='cut link (a) after 2.0 s'),
            plan.Step(2, '-', plan.FAULT, fault='cut link (a) after 1.0 s')])
        self.assertEqual((3, {'cut link (a)': 3}, {'write': 1}, {'done': 1}), (
            result.faults, result.kinds(), result.counts(),
            result.outcomes()))

    def test_of_several_labs(self):
        """Their faults add up, and a complaint names its seed."""
        results = [
            report.Result('hosts', 7, moves=2, steps=[
                plan.Step(1, '-', 'move', fault='cut link after 1.0 s')]),
            report.Result('hosts', 8, moves=3, complaint='lost', steps=[
                plan.Step(1, '-', 'move', fault='cut link after 1.0 s'),
                plan.Step(2, '-', 'move', fault='fill pool after 2.0 s')])]
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, 'soak.json')
            report.write(results, path)
            told = json.loads(path.read_text())
            report.write_told(told, path)
            self.assertEqual(told, json.loads(path.read_text()))
        self.assertEqual(
            ['2 runs, 3 faults, 5 moves went through, 1 complaints',
             '  faults: cut link 2, fill pool 1', '  seed 8: lost'],
            report.sum_lines(told))

    def judged(self, *samples):
        result = report.Result('hosts', 1, memory={
            'a service': [mib << 10 for mib in samples]})
        result.judge_memory()
        return result.complaint

    def test_memory(self):
        # It takes more at first, and is killed now and then.
        self.assertEqual('', self.judged(*range(90, 140, 5), *[150] * 20,
                                         80, *[150] * 9))
        self.assertIn('a service takes', self.judged(*range(100, 300, 5)))
        self.assertEqual('', self.judged(100, 200, 300))


class TestOracle(unittest.TestCase):

    def test_of_deleted_servers(self):
        """Whatever pool it lies in."""
        alive, gone = ('%s%s' % (letter * 8, '-1111' * 3 + '-' + '2' * 12)
                       for letter in 'ab')
        with tempfile.TemporaryDirectory() as folder:
            for path in ('instances/disks/%s_disk' % alive,
                         'soak-swap/%s_disk.swap' % gone):
                path = pathlib.Path(folder, path)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            with unittest.mock.patch.object(
                    oracle.Machine, 'path', return_value=folder):
                found = oracle.nobody_s({alive})
        self.assertEqual({'soak-swap/%s_disk.swap' % gone},
                         set(sum(found.values(), [])))


class TestMoves(unittest.TestCase):

    @unittest.skipUnless(os.environ.get('LAB_SCENARIOS') == 'all',
                         'takes %d minutes' % MINUTES)
    def test_moves(self):
        result = moves.run(SEED, plan.Limit(None, MINUTES), print)
        self.assertEqual('', result.complaint, '\n'.join(
            report.lines(result)))
        self.assertGreater(result.faults, 3)


if __name__ == '__main__':
    unittest.main()
