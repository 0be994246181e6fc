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

"""Where things lie, and the pinned base."""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import tomllib
import venv

from . import SeriesError


@dataclasses.dataclass(frozen=True)
class Project:
    """One repository of this shape.

    :ivar root: the repository's folder
    """
    root: pathlib.Path
    name: str
    version: str
    sha256: str
    local_version: str
    roots: tuple[str, ...]
    context_lines: int
    notes: str
    note_pattern: str
    exclude: tuple[str, ...]

    @classmethod
    def load(cls, root: pathlib.Path) -> 'Project':
        data = tomllib.loads((root / 'tools' / 'series.toml').read_text())
        return cls(root=root, **data['base'], **data['series'])

    @property
    def patches(self) -> pathlib.Path:
        return self.root / 'patches'

    @property
    def tree(self) -> pathlib.Path:
        return self.root / 'tree'

    @property
    def staging(self) -> pathlib.Path:
        """What a save has made ready and not yet put in place."""
        return self.root / '.series-staging'

    @property
    def sdist_name(self) -> str:
        return '%s-%s.tar.gz' % (self.name, self.version)

    @property
    def cache(self) -> pathlib.Path:
        top = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
        return pathlib.Path(top) / ('%s-series' % self.name)

    def sdist(self) -> pathlib.Path:
        """The base's source distribution, fetched once.

        pip finds it, so that whatever index, mirror or proxy pip is set up
        with is used. It is put in the cache whole and proven, or not at all.

        :raises: SeriesError if it can't be had or isn't the pinned one
        """
        path = self.cache / self.sdist_name
        if path.exists():
            self._prove(path)
            return path
        self.cache.mkdir(parents=True, exist_ok=True)
        print('fetching', self.sdist_name, flush=True)
        with tempfile.TemporaryDirectory(dir=self.cache) as scratch:
            done = subprocess.run(
                [_python_with_pip(scratch), '-m', 'pip', 'download',
                 '--no-deps', '--no-binary', self.name, '--dest', scratch,
                 '%s==%s' % (self.name, self.version)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            fresh = pathlib.Path(scratch) / self.sdist_name
            if done.returncode or not fresh.exists():
                raise SeriesError(
                    'pip could not fetch %s:\n%s\nmend the connection or '
                    "pip's settings, or put the file into %s by hand" % (
                        self.sdist_name, done.stdout.rstrip(), self.cache))
            self._prove(fresh)
            os.replace(fresh, path)
        return path

    def _prove(self, path):
        with open(path, 'rb') as f:
            found = hashlib.file_digest(f, 'sha256').hexdigest()
        if found != self.sha256:
            raise SeriesError(
                '%s is not the pinned one:\n  found    %s\n  expected %s\n'
                'remove it if a download broke; if it comes so again, whoever '
                'serves it has changed it: do not use it' % (
                    path, found, self.sha256))


def _python_with_pip(scratch):
    """This Python, or one made beside it where it has no pip (Debian's)."""
    if not subprocess.run([sys.executable, '-m', 'pip', '--version'],
                          capture_output=True).returncode:
        return sys.executable
    try:
        venv.create(scratch + '/venv', with_pip=True)
    except subprocess.CalledProcessError:
        raise SeriesError('%s has neither pip nor ensurepip; install '
                          'python3-venv' % sys.executable) from None
    return scratch + '/venv/bin/python'


@contextlib.contextmanager
def locked(project: Project):
    """One command at a time in a repository.

    The lock goes with the process, however that ends.
    """
    handle = os.open(project.root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print('another command works in %s, waiting for it' %
                  project.root, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
