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

import json
import os
import pathlib
import tempfile
import unittest
import unittest.mock

from lab.endurance import moves
from lab.endurance import oracle
from lab.endurance import plan
from lab.endurance import report
from lab.endurance import servers

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
            ['2 runs, 3 faults, 5 copies went through, 1 complaints',
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
