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
"""What a run came to: on the terminal, and in build/soak.json."""

import collections
import dataclasses
import json
import pathlib
import statistics

from .. import config
from . import plan

PATH = config.ROOT / 'build' / 'soak.json'
#: Samples of memory in a quarter of a run; of fewer nothing is concluded.
FEWEST = 4


@dataclasses.dataclass
class Result:
    """One run at one level.

    :ivar level: "cloud" or "hosts"
    :ivar memory: KiB of resident memory of each service, round by round
    :ivar moves: copies (hosts) or moves of servers (cloud) that have gone
        through
    :ivar complaint: what the oracle found; '' if nothing
    """
    level: str
    seed: int
    seconds: float = 0
    steps: list[plan.Step] = dataclasses.field(default_factory=list)
    memory: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    moves: int = 0
    complaint: str = ''
    subject: str = ''

    def _faults(self) -> list[str]:
        # Of a round in a cloud, all servers meet the same ones.
        return [fault for _number, told in sorted({
            (step.number, step.fault) for step in self.steps if step.fault})
            for fault in told.split(plan.SEVERAL)]

    @property
    def faults(self) -> int:
        return len(self._faults())

    def judge_memory(self) -> None:
        """Complain of a service that takes more and more, after its start."""
        for name, samples in sorted(self.memory.items()):
            quarter = len(samples) // 4
            if quarter < FEWEST or self.complaint:
                continue
            before = statistics.median(samples[quarter:2 * quarter])
            after = statistics.median(samples[-quarter:])
            if after > before * 1.3 and after - before > 32 << 10:
                self.complaint = '%s takes %d MiB, and took %d' % (
                    name, after // 1024, before // 1024)

    def kinds(self) -> dict[str, int]:
        """How many faults of each kind there were."""
        return dict(sorted(collections.Counter(
            fault.partition(' after ')[0] for fault in self._faults()
        ).items()))

    def counts(self) -> dict[str, int]:
        return dict(sorted(collections.Counter(
            step.name for step in self.steps
            if step.name != plan.FAULT).items()))

    def outcomes(self) -> dict[str, int]:
        return dict(sorted(collections.Counter(
            step.outcome.split(':')[0] for step in self.steps
            if step.name != plan.FAULT).items()))


def write(results: list[Result], path: pathlib.Path = PATH) -> None:
    """Write all runs of one command."""
    write_told([{
        'level': result.level, 'seed': result.seed,
        'seconds': round(result.seconds), 'steps': len(result.steps),
        'faults': result.faults, 'kinds': result.kinds(),
        'moves': result.moves, 'operations': result.counts(),
        'outcomes': result.outcomes(), 'memory': result.memory,
        'complaint': result.complaint,
        'shortened': [str(step) for step in plan.shortened(
            result.steps, result.subject)] if result.complaint else [],
    } for result in results], path)


def write_told(told: list[dict], path: pathlib.Path = PATH) -> None:
    """Write what runs have come to, each as in a file of this kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=1) + '\n')


def sum_lines(told: list[dict]) -> list[str]:
    """What a person is told of several runs at once.

    :param told: as in write_told()
    """
    kinds = collections.Counter()
    for one in told:
        kinds.update(one['kinds'])
    lines_ = ['%d runs, %d faults, %d moves went through, %d complaints' % (
        len(told), sum(one['faults'] for one in told),
        sum(one['moves'] for one in told),
        sum(bool(one['complaint']) for one in told))]
    lines_.append('  faults: ' + ', '.join(
        '%s %d' % pair for pair in sorted(kinds.items())))
    lines_ += ['  seed %d: %s' % (one['seed'], one['complaint'])
               for one in told if one['complaint']]
    return lines_


def lines(result: Result) -> list[str]:
    """What a person is told at the end."""
    told = ['%s: seed %d, %d steps, %d faults, %d s: %s' % (
        result.level, result.seed, len(result.steps), result.faults,
        result.seconds, result.complaint or 'nothing lost, nothing left')]
    told.append('  ' + ', '.join(
        '%s %d' % pair for pair in
        [*result.counts().items(), *result.outcomes().items()]))
    told.append('  faults: ' + ', '.join(
        '%s %d' % pair for pair in result.kinds().items()))
    if result.moves:
        told.append('  %d moves went through' % result.moves)
    for name, samples in sorted(result.memory.items()):
        told.append('  %s: %d MiB at first, %d MiB at last' % (
            name, samples[0] // 1024, samples[-1] // 1024))
    if result.complaint:
        told.append('  the steps that it can come from:')
        told += ['  ' + str(step) for step in plan.shortened(
            result.steps, result.subject)[-40:]]
    return told
