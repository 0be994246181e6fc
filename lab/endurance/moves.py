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
"""Level hosts: moves between two real daemons, a fault in each.

Nova's own code on both sides (lab/tests/mover.py), no cloud and no guest.
After each fault the source is whole and the destination empty, at once or
after the next offer; then the move goes through, and back.
"""

import contextlib
import signal
import time

import psutil

from . import plan
from . import report
from ..tests import test_moves

#: Weights of the faults; seconds until they come are drawn, too.
FAULTS = {'kill worker': 3, 'kill source libvirtd': 2,
          'kill destination libvirtd': 3, 'kill source compute': 3,
          'pause destination libvirtd': 1, 'cut link': 1, 'slow link': 1,
          'fill destination pool': 2, 'none': 1}
FILES = {'disk': 3, 'disk.eph0': 3, 'neither': 6}
# Seconds. The copy of a round takes about as long at its rate.
LAST = 2.5


class Trouble(Exception):
    """What the oracle found."""


class Moves:
    """The two hosts, and moves between them.

    :param draw: plan.Draw
    """

    def __init__(self, draw: plan.Draw):
        self.draw = draw
        self.case = test_moves.MovesTest()
        self.case.foreign = {}

    def once(self, number: int) -> plan.Step:
        """One round: a move, a fault, and the next try.

        :raises: Trouble
        """
        case, fault = self.case, self.draw.one(FAULTS)
        after = self.draw.seconds(0, LAST)
        step = plan.Step(number, '-', 'move', fault=(
            '' if fault == 'none' else '%s after %.2f s' % (fault, after)))
        case.foreign = {}
        case.make(test_moves.SIZES)
        taken = self.draw.one(FILES)
        if taken != 'neither':
            step.detail = 'beside a foreign volume named ' + taken
            case.put_foreign(taken, known=self.draw.chance(.5))
        try:
            case.begin(rate=3)
            with self._fault(fault, after):
                try:
                    case.source.answer()
                    step.outcome = 'done'
                except test_moves.StepFailed as error:
                    step.outcome = 'failed: %s' % str(error)[:200]
            self._clean_up(step)
            case.assert_back()
            case.assert_goes()
        except AssertionError as error:
            raise Trouble('%s\n%s' % (step, error)) from error
        except test_moves.StepFailed as error:
            raise Trouble('%s\nthe next try: %s' % (step, error)) from error
        return step

    def _clean_up(self, step):
        case = self.case
        if step.outcome == 'done':
            try:
                case.take_and_revert()
                return
            except test_moves.StepFailed as error:
                # It was full at the end, and the destination has seen it.
                step.outcome = 'refused: %s' % str(error)[:200]
                case.dest('revert')
        case.dest('offer')
        case.source('abandon')

    @contextlib.contextmanager
    def _fault(self, name, after):
        """Let it happen; all is as before when the context ends."""
        case, verb = self.case, name.split(' ', 1)[0]
        host = case.a if 'source' in name else case.b
        time.sleep(after)
        if name == 'kill worker':
            for worker in case.workers(case.a):
                worker.signal(signal.SIGKILL)
        elif name == 'kill source compute':
            case.source.kill()
        elif verb == 'kill':
            host.kill('libvirtd')
            host.restart('libvirtd')
            host.wait_ready()
        if name == 'kill source compute':
            # Nobody is left to answer.
            case.source.answer = _dead_once(case.source)
        with contextlib.ExitStack() as stack:
            if verb == 'pause':
                stack.enter_context(host.paused('libvirtd'))
            elif verb == 'cut':
                stack.enter_context(case.b.link.as_cut())
            elif verb == 'slow':
                stack.enter_context(case.b.link.slowed('20mbit'))
            elif verb == 'fill':
                case.b.fill(test_moves.mover.DISKS)
                stack.callback(case.b.free, test_moves.mover.DISKS)
            yield


def _dead_once(compute):
    """The next answer is that it was killed; then it answers as ever."""
    def answer():
        del compute.answer
        raise test_moves.StepFailed('killed')
    return answer


def run(seed: int, limit: plan.Limit, say) -> report.Result:
    """Go on until the limit or the first trouble.

    :param say: called with each step
    """
    result = report.Result('hosts', seed)
    start = time.monotonic()
    moves = Moves(plan.Draw(seed))
    case = type(moves.case)
    try:
        case.setUpClass()
        while not limit.reached(len(result.steps)):
            step = moves.once(len(result.steps) + 1)
            result.steps.append(step)
            say(step)
            _sample(result, moves.case)
    except Trouble as trouble:
        result.complaint, result.subject = str(trouble), '-'
    finally:
        result.seconds = time.monotonic() - start
        case.doClassCleanups()
    return result


def _sample(result, case):
    for name, compute in (('mover on host-a', case.source),
                          ('mover on host-b', case.dest)):
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(compute.process.pid).children(True)
            if below:
                result.memory.setdefault(name, []).append(
                    below[-1].memory_info().rss // 1024)
