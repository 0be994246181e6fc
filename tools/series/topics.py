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

"""The topics of the series: runs of commits that are reviewed together.

``tools/topics.toml`` has them in order. Each begins with the commit whose
subject it gives as ``first``, and ends before the next one's.
"""

import dataclasses
import re
import tomllib

from . import SeriesError
from .mail import Patch
from .project import Project

PLACE = 'tools/topics.toml'
KEYS = {'name', 'title', 'description', 'first'}


@dataclasses.dataclass(frozen=True)
class Topic:
    """One topic.

    :ivar begin: the number of its first commit, from 1
    :ivar end: the number of its last commit
    """
    name: str
    title: str
    description: str
    begin: int
    end: int


def load(project: Project, series: list[Patch]) -> list[Topic]:
    """The topics in order; none if the project has no file of them.

    :raises: SeriesError if a commit has no topic, or they are out of order
    """
    if not (project.root / PLACE).exists() or not series:
        return []
    try:
        told = tomllib.loads((project.root / PLACE).read_text())['topic']
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise SeriesError(f'{PLACE} has no list of topics: {error}') from None
    subjects = [patch.subject for patch in series]
    faults, begins = [], []
    for entry in told:
        name = f"{PLACE}: topic {entry.get('name')}"
        if set(entry) != KEYS:
            faults.append(f'{name} must have {", ".join(sorted(KEYS))}')
        elif not re.fullmatch('[a-z0-9]+(-[a-z0-9]+)*', entry['name']):
            faults.append(f'{name}: small letters, digits and hyphens alone')
        elif subjects.count(entry['first']) != 1:
            faults.append(f"{name}: {subjects.count(entry['first'])} commits "
                          f"have the subject {entry['first']!r}; give that of "
                          'its first commit')
        else:
            begins.append(subjects.index(entry['first']) + 1)
    if not faults and begins[:1] != [1]:
        faults.append(f'{PLACE}: {subjects[0]!r} has no topic; the first one '
                      'must begin with it')
    if not faults and begins != sorted(set(begins)):
        faults.append(f'{PLACE}: the topics begin with commits '
                      f'{", ".join(map(str, begins))}; list them in order')
    names = [entry.get('name') for entry in told]
    if len(set(names)) < len(names):
        faults.append(f'{PLACE}: two topics have one name')
    if faults:
        raise SeriesError('\n'.join(faults))
    return [Topic(entry['name'], entry['title'], entry['description'], begin,
                  end)
            for entry, begin, end in zip(
                told, begins, [n - 1 for n in begins[1:]] + [len(series)])]
