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

import shutil

from . import compose
from .project import Project


def export(project: Project) -> str:
    """Write dist/series (git am) and dist/quilt (quilt push -a)."""
    with compose.workshop(project) as git:
        return _export(git, project)


def _export(git, project):
    tip = compose.compose(git, project)
    dist = project.root / 'dist'
    series, quilt = dist / 'series', dist / 'quilt' / 'patches'
    for folder in (series, dist / 'quilt'):
        shutil.rmtree(folder, ignore_errors=True)
    series.mkdir(parents=True)
    quilt.mkdir(parents=True)
    names = git.out(
        'format-patch', '--zero-commit', '--no-signature', '--full-index',
        '--binary', '--no-renames', '--keep-subject', '--output-directory',
        series, 'base..%s' % tip).splitlines()
    for name in names:
        shutil.copy(name, quilt)
    (quilt / 'series').write_text(''.join(
        '%s\n' % name.rpartition('/')[2] for name in names))
    return '%d patches in %s and %s' % (len(names), series, quilt)


def version(project: Project) -> str:
    """The version of a package with the series applied (PEP 440)."""
    return '%s+%s.%d' % (project.version, project.local_version,
                         len(compose.patches(project)))
