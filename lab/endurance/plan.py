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
"""What is done in which order: drawn from a seed, told, shortened.

Knows neither a cloud nor hosts; the same seed draws the same steps as long as
each step comes to the same end.
"""

import dataclasses
import random
import time


#: Between the faults that a step has met.
SEVERAL = '; '
#: Name of a step that is a fault for all.
FAULT = 'fault'


@dataclasses.dataclass
class Step:
    """One operation on one server, or one move between two hosts.

    :ivar number: of the round
    :ivar subject: which server, or "-"
    :ivar name: of the operation
    :ivar detail: its argument, in words
    :ivar fault: what happened meanwhile, in words; '' for nothing
    :ivar outcome: "done", "refused: REASON" or "failed: REASON"
    """
    number: int
    subject: str
    name: str
    detail: str = ''
    fault: str = ''
    outcome: str = ''

    def __str__(self):
        text = '%4d %-8s %s' % (self.number, self.subject, self.name)
        if self.detail:
            text += ' ' + self.detail
        if self.fault:
            text += (': ' if self.name == FAULT else ', meanwhile: '
                     ) + self.fault
        return text + (' -> ' + self.outcome if self.outcome else '')


def shortened(steps: list[Step], subject: str) -> list[Step]:
    """The steps that a failure of one subject can come from.

    Those of the subject itself, and the faults, which are everybody's.

    :param subject: as in Step.subject
    """
    return [step for step in steps
            if step.subject in (subject, '-') or step.fault]


class Draw:
    """Random choices from a seed.

    :param seed: an integer
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._random = random.Random(seed)

    def one(self, weighted: dict):
        """Choose one of the keys; the values are their weights."""
        names = sorted(weighted)
        return self._random.choices(
            names, [weighted[name] for name in names])[0]

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def seconds(self, least: float, most: float) -> float:
        return self._random.uniform(least, most)

    def number(self, least: int, most: int) -> int:
        return self._random.randint(least, most)


class Limit:
    """How long to go on.

    :param steps: rounds at most; None: no limit
    :param minutes: at most; None: no limit
    """

    def __init__(self, steps: int | None, minutes: float | None):
        self.steps = steps
        self._until = (None if minutes is None else
                       time.monotonic() + minutes * 60)

    def reached(self, done: int) -> bool:
        """:param done: rounds so far"""
        return (self.steps is not None and done >= self.steps or
                self._until is not None and time.monotonic() > self._until)
