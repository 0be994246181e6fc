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

"""PEP 517 backend: compose the tree, then let its own backend build it."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from series import compose  # noqa: E402
from series import export  # noqa: E402
from series.git import Git  # noqa: E402
from series.project import Project  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _compose() -> tuple[Project, pathlib.Path]:
    """A fresh checkout of the series, apart from anybody's work."""
    project = Project.load(ROOT)
    work = pathlib.Path(tempfile.mkdtemp(prefix='series-build-'))
    git = Git(work)
    git.run('init', '--quiet', '-b', 'series', work)
    commit = compose.compose(git, project)
    git.run('update-ref', 'refs/heads/series', commit)
    git.run('reset', '--quiet', '--hard', commit, worktree=True)
    return project, work


def _build(what: str, directory: str) -> str:
    project, work = _compose()
    env = {**os.environ, 'PBR_VERSION': export.version(project)}
    code = ('import os, sys; from pbr import build; '
            'print(getattr(build, sys.argv[1])(sys.argv[2]))')
    try:
        done = subprocess.run(
            [sys.executable, '-c', code, what, os.path.abspath(directory)],
            cwd=work, env=env, stdout=subprocess.PIPE, text=True)
    finally:
        shutil.rmtree(work)
    if done.returncode:
        raise SystemExit('building failed:\n' + done.stdout)
    return done.stdout.split()[-1]


def build_wheel(wheel_directory, config_settings=None,
                metadata_directory=None):
    return _build('build_wheel', wheel_directory)


def build_sdist(sdist_directory, config_settings=None):
    return _build('build_sdist', sdist_directory)
