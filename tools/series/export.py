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
from .mail import MAIL
from .project import Project


def export(project: Project) -> str:
    """Write dist/series (git am) and dist/quilt (quilt push -a)."""
    dist = project.root / 'dist'
    series, quilt = dist / 'series', dist / 'quilt' / 'patches'
    git = compose.workshop(project)
    tip = compose.compose(git, project)
    for folder in (series, dist / 'quilt'):
        shutil.rmtree(folder, ignore_errors=True)
    mails = git.out('format-patch', *MAIL, '--full-index', '--binary',
                    '--output-directory', series, f'base..{tip}')
    quilt.mkdir(parents=True)
    names = [pathlib.Path(mail).name for mail in mails.splitlines()]
    for name in names:
        shutil.copy(series / name, quilt)
    (quilt / 'series').write_text(''.join(name + '\n' for name in names))
    return f'{len(names)} patches in {series} and {quilt}'


def version(project: Project) -> str:
    """The version of a package with the series applied (PEP 440)."""
    count = len(compose.patches(project))
    return f'{project.version}+{project.local_version}.{count}'
