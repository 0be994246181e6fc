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
import tomllib

from . import SeriesError
from .mail import Patch
from .project import Project

PLACE = 'tools/topics.toml'


@dataclasses.dataclass
class Topic:
    """One topic.

    :ivar first: the subject of its first commit
    :ivar begin: the number of that commit, from 1
    :ivar end: the number of its last commit
    """
    name: str
    title: str
    description: str
    first: str
    begin: int = 0
    end: int = 0


def load(project: Project, series: list[Patch]) -> list[Topic]:
    """The topics in order; none if the project has no file of them.

    :raises: SeriesError if a commit has no topic, or they are out of order
    """
    if not (project.root / PLACE).exists() or not series:
        return []
    try:
        topics = [Topic(**entry) for entry in tomllib.loads(
            (project.root / PLACE).read_text())['topic']]
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise SeriesError(f'{PLACE}: each [[topic]] has name, title, '
                          f'description and first: {error}') from None
    subjects = [patch.subject for patch in series]
    for topic in topics:
        count = subjects.count(topic.first)
        if count != 1:
            raise SeriesError(
                f'{PLACE}: topic {topic.name}: {count} commits have the '
                f'subject {topic.first!r}; give that of its first commit')
        topic.begin = subjects.index(topic.first) + 1
    begins = [topic.begin for topic in topics]
    if begins[:1] != [1]:
        raise SeriesError(f'{PLACE}: {subjects[0]!r} has no topic; the first '
                          'one must begin with it')
    if begins != sorted(set(begins)):
        raise SeriesError(f'{PLACE}: the topics begin with commits '
                          f'{begins}; list them in order, each once')
    if len({topic.name for topic in topics}) < len(topics):
        raise SeriesError(f'{PLACE}: two topics have one name')
    for topic, after in zip(topics, [*begins[1:], len(series) + 1]):
        topic.end = after - 1
    return topics
