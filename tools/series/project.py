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

from collections.abc import Iterator
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
    signed_off: bool = False

    @classmethod
    def load(cls, root: pathlib.Path) -> 'Project':
        data = tomllib.loads((root / 'tools' / 'series.toml').read_text())
        return cls(root=root.absolute(), **data['base'], **data['series'])

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
    def release(self) -> str:
        return f'{self.name}-{self.version}'

    @property
    def sdist_name(self) -> str:
        return f'{self.release}.tar.gz'

    @property
    def cache(self) -> pathlib.Path:
        top = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
        return pathlib.Path(top).expanduser() / f'{self.name}-series'

    def sdist(self) -> pathlib.Path:
        """The base's source distribution, fetched once.

        It is put in the cache whole and proven, or not at all.

        :raises: SeriesError if it can't be had or isn't the pinned one
        """
        path = self.cache / self.sdist_name
        if not path.exists():
            self._fetch(path)
        self._prove(path)
        return path

    def _fetch(self, path):
        """pip finds it, so that its index, mirror or proxy is used."""
        print('fetching', path.name, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            done = subprocess.run(
                [_python_with_pip(scratch), '-m', 'pip', 'download',
                 '--no-deps', '--no-binary', self.name, '--dest', scratch,
                 f'{self.name}=={self.version}'],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            fresh = pathlib.Path(scratch, path.name)
            if done.returncode or not fresh.exists():
                raise SeriesError(
                    f'pip could not fetch {path.name}:\n'
                    f"{done.stdout.rstrip()}\nmend the connection or pip's "
                    f'settings, or put the file into {path.parent} by hand')
            self._prove(fresh)
            os.replace(fresh, path)

    def _prove(self, path):
        with open(path, 'rb') as f:
            found = hashlib.file_digest(f, 'sha256').hexdigest()
        if found != self.sha256:
            raise SeriesError(
                f'{path} is not the pinned one:\n  found    {found}\n'
                f'  expected {self.sha256}\nremove it if a download broke; if '
                'it comes so again, whoever serves it has changed it: do not '
                'use it')


def _python_with_pip(scratch):
    """This Python, or one made beside it where it has no pip (Debian's)."""
    if not subprocess.run([sys.executable, '-m', 'pip', '--version'],
                          capture_output=True).returncode:
        return sys.executable
    try:
        venv.create(scratch + '/venv', with_pip=True)
    except subprocess.CalledProcessError:
        raise SeriesError(f'{sys.executable} has neither pip nor ensurepip; '
                          'install python3-venv') from None
    return scratch + '/venv/bin/python'


@contextlib.contextmanager
def locked(project: Project) -> Iterator[None]:
    """One command at a time in a repository.

    The lock goes with the process, however that ends.
    """
    handle = os.open(project.root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'another command works in {project.root}, waiting for it',
                  flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
