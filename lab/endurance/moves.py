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
"""Level hosts: moves between two real daemons, faults in most of them.

Nova's own code on both sides (lab/tests/mover.py), no cloud and no guest.
After each fault the source is whole and the destination empty, at once or
after the next offer; in the end the move goes through, and back.
"""

import contextlib
import signal
import threading
import time

import psutil

from . import plan
from . import report
from ..tests import test_moves

#: Weights of the faults; seconds until they come are drawn, too.
FAULTS = {'kill worker': 3, 'kill source libvirtd': 2,
          'kill destination libvirtd': 3, 'kill source compute': 3,
          'kill destination compute': 2, 'kill both computes': 1,
          'pause destination libvirtd': 1, 'pause source libvirtd': 1,
          'pause worker': 1, 'cut link': 1, 'slow link': 1,
          'fill destination pool': 2, 'stop destination pool': 2,
          'stop source pool': 1, 'clock of destination': 1, 'none': 1}
FILES = {'disk': 3, 'disk.eph0': 3, 'neither': 6}
MIB = test_moves.MIB
#: As there, and smaller, so that a round takes little time: holes within and
#: at both ends, an odd size, a file that is no multiple of a block.
SIZES = {'disk': (4 * MIB, 10 * MIB, MIB + 7), 'disk.eph0': (0, 3 * MIB, 1),
         'disk.config': (400000, 0, 0)}
# MiB a second, and seconds: how long the copy of a round takes at that rate.
RATE, LAST = 3, 2
# Faults in a round, one attempt after the other.
ATTEMPTS = 4
# How a move ends when nothing happens to it.
CONFIRM_EVERY = 10


class Trouble(Exception):
    """What the oracle found.

    :ivar steps: those of the round
    """
    steps: list[plan.Step] = []


class Moves:
    """The two hosts, and moves between them.

    :param draw: plan.Draw
    :param say: called with each step
    """

    def __init__(self, draw: plan.Draw, say):
        self.draw, self.say = draw, say
        self.case = test_moves.MovesTest()
        self.case.foreign = {}
        self.moved = 0

    def once(self, number: int) -> list[plan.Step]:
        """One round: attempts with faults, and one that goes through.

        :raises: Trouble
        """
        case, steps = self.case, []
        case.foreign = {}
        case.make(SIZES)
        detail = ''
        taken = self.draw.one(FILES)
        if taken != 'neither':
            detail = 'beside a foreign volume named ' + taken
            case.put_foreign(taken, known=self.draw.chance(.5))
        with self._oracle(steps):
            for _attempt in range(self.draw.number(1, ATTEMPTS)):
                steps.append(plan.Step(number, '-', 'move', detail))
                self._attempt(steps[-1])
                self.say(steps[-1])
            steps.append(plan.Step(number, '-', 'move, revert, move, confirm',
                                   detail))
            case.assert_goes()
            self.moved += 2
            steps[-1].outcome = 'done'
        return steps

    def in_a_row(self, number: int) -> list[plan.Step]:
        """A move to which nothing happens, of the instance that is there.

        :raises: Trouble
        """
        case = self.case
        confirm = number % CONFIRM_EVERY == 0
        steps = [plan.Step(number, '-', 'move, ' + (
            'confirm' if confirm else 'revert'))]
        if number % CONFIRM_EVERY == 1:
            case.foreign = {}
            case.make(SIZES)
        with self._oracle(steps):
            case.dest('offer')
            case.source('move')
            if confirm:
                case.dest('accept')
                case.assert_there()
                case.source('confirm')
                case.assertEqual({}, case.files(case.a))
            else:
                case.take_and_revert()
                case.assert_back()
            self.moved += 1
            steps[-1].outcome = 'done'
        self.say(steps[-1])
        return steps

    @contextlib.contextmanager
    def _oracle(self, steps):
        """Whatever is wrong is told with the steps that it came from."""
        try:
            yield
        except (AssertionError, test_moves.StepFailed) as error:
            trouble = Trouble('%s%s' % (
                'the next try: ' if isinstance(error, test_moves.StepFailed)
                else '', error))
            trouble.steps = steps
            raise trouble from error

    def _attempt(self, step):
        case, fault = self.case, self.draw.one(FAULTS)
        after = self.draw.seconds(0, LAST)
        if fault != 'none':
            step.fault = '%s after %.2f s' % (fault, after)
        try:
            if fault == 'clock of destination':
                self._with_wrong_clock()
            else:
                case.begin(rate=RATE)
                with self._fault(fault, after):
                    case.source.answer()
            step.outcome = 'done'
            self.moved += 1
        except test_moves.StepFailed as error:
            step.outcome = 'failed: %s' % str(error)[:300]
        self._clean_up(step, fault)
        case.assert_back()

    def _with_wrong_clock(self):
        """What a clock that is wrong does: certificates aren't valid yet."""
        case = self.case
        case.dest('offer')
        case.b.certificate('not-yet-valid')
        try:
            case.source('move')
        finally:
            case.b.certificate('good')
        raise AssertionError('a certificate that is not valid was taken')

    def _clean_up(self, step, fault):
        case = self.case
        if step.outcome == 'done':
            try:
                if fault == 'kill destination compute':
                    case.dest.begin('accept')
                    time.sleep(self.draw.seconds(0, .5))
                    case.dest.kill()
                case.take_and_revert()
                return
            except test_moves.StepFailed as error:
                # It was full at the end, and the destination has seen it.
                step.outcome = 'refused: %s' % str(error)[:300]
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
        elif name in ('kill source compute', 'kill both computes'):
            case.source.kill()
            if name == 'kill both computes':
                case.dest.kill()
            # Nobody is left to answer.
            case.source.answer = _dead_once(case.source)
        elif verb == 'kill' and 'libvirtd' in name:
            host.kill('libvirtd')
            host.restart('libvirtd')
            host.wait_ready()
        with contextlib.ExitStack() as stack:
            if name == 'pause worker':
                stack.enter_context(_paused(case.workers(case.a)))
            elif name == 'pause source libvirtd':
                stack.enter_context(_paused_for(host, self.draw.seconds(1, 8)))
            elif verb == 'pause':
                stack.enter_context(host.paused('libvirtd'))
            elif verb == 'cut':
                stack.enter_context(case.b.link.as_cut())
            elif verb == 'slow':
                stack.enter_context(case.b.link.slowed('20mbit'))
            elif verb == 'fill':
                case.b.fill(test_moves.mover.DISKS)
                stack.callback(case.b.free, test_moves.mover.DISKS)
            elif verb == 'stop':
                stack.enter_context(_stopped(case, host))
            yield


@contextlib.contextmanager
def _paused(workers):
    """They stand still; who waits for them gives up."""
    for worker in workers:
        worker.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            worker.signal(signal.SIGCONT)


@contextlib.contextmanager
def _paused_for(host, seconds):
    """A host's own libvirt answers nothing for a while."""
    host.pause('libvirtd')
    timer = threading.Timer(seconds, host.resume, ['libvirtd'])
    timer.start()
    try:
        yield
    finally:
        timer.join()


@contextlib.contextmanager
def _stopped(case, host):
    with case.pool(host) as pool:
        pool.destroy()
    try:
        yield
    finally:
        with case.pool(host) as pool:
            if not pool.isActive():
                pool.create()


def _dead_once(compute):
    """The next answer is that it was killed; then it answers as ever."""
    def answer():
        del compute.answer
        raise test_moves.StepFailed('killed')
    return answer


def run(seed: int, limit: plan.Limit, say, in_a_row: int = 0) -> report.Result:
    """Go on until the limit or the first trouble.

    :param say: called with each step
    :param in_a_row: so many moves without a fault come first
    """
    result = report.Result('hosts', seed)
    start, rounds = time.monotonic(), 0
    moves = Moves(plan.Draw(seed), say)
    case = type(moves.case)
    try:
        case.setUpClass()
        for number in range(1, in_a_row + 1):
            result.steps += moves.in_a_row(number)
            _sample(result, moves.case)
        while not limit.reached(rounds):
            rounds += 1
            result.steps += moves.once(rounds)
            _sample(result, moves.case)
    except Trouble as trouble:
        result.complaint, result.subject = str(trouble), '-'
        result.steps += trouble.steps
    finally:
        result.moves = moves.moved
        result.judge_memory()
        result.seconds = time.monotonic() - start
        case.doClassCleanups()
    return result


def _sample(result, case):
    for name, compute in (('mover on host-a', case.source),
                          ('mover on host-b', case.dest)):
        with contextlib.suppress(psutil.Error):
            services = [process for process in psutil.Process(
                compute.process.pid).children(True)
                if test_moves.mover.__name__ in process.cmdline()]
            if services:
                # The first ones are what it was started by.
                result.memory.setdefault(name, []).append(
                    services[-1].memory_info().rss // 1024)
