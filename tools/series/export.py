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

"""The series as others take it: mails for git am, a quilt directory."""

import pathlib
import shutil

from . import compose
from . import topics
from .mail import MAIL
from .project import Project


def export(project: Project) -> str:
    """Write dist/series (git am), dist/topics and dist/quilt.

    In tree/, the branch topic/NAME of each topic stands on those below it.
    """
    dist = project.root / 'dist'
    series, quilt = dist / 'series', dist / 'quilt' / 'patches'
    git = compose.workshop(project)
    tip = compose.compose(git, project)
    for folder in (series, dist / 'topics', dist / 'quilt'):
        shutil.rmtree(folder, ignore_errors=True)
    names = _mails(git, series, 1, f'base..{tip}')
    quilt.mkdir(parents=True)
    for name in names:
        shutil.copy(series / name, quilt)
    (quilt / 'series').write_text(''.join(name + '\n' for name in names))
    said = [f'{len(names)} patches in {series} and {quilt}']
    commits = ['base', *compose.commits(git, tip)]
    for topic in topics.load(project, compose.patches(project)):
        below, end = commits[topic.begin - 1], commits[topic.end]
        _mails(git, dist / 'topics' / topic.name, topic.begin,
               f'{below}..{end}')
        _branch(project, git, f'topic/{topic.name}', end)
        said.append(f'{topic.begin:4} to {topic.end}: {topic.name}: '
                    f'{topic.title}\n{"":10}{topic.description}')
    return '\n'.join(said)


def _mails(git, folder, first, commits):
    """Write a mail a commit, numbered from the first; returns their names."""
    said = git.out('format-patch', *MAIL, '--full-index', '--binary',
                   '--start-number', first, '--output-directory', folder,
                   commits)
    return [pathlib.Path(mail).name for mail in said.splitlines()]


def _branch(project, git, name, commit):
    """Bring a branch of tree/ to a commit; git refuses the one in use."""
    if git.path == project.tree and git.resolve(
            'refs/heads/' + name) != commit:
        git.run('branch', '--quiet', '--no-track', '--force', name, commit,
                env=compose.BASE_IDENTITY)


def version(project: Project) -> str:
    """The version of a package with the series applied (PEP 440)."""
    count = len(compose.patches(project))
    return f'{project.version}+{project.local_version}.{count}'
