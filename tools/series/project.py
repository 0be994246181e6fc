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

import dataclasses
import os
import pathlib
import subprocess
import sys
import tomllib

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
    option_pattern: str
    notes: str
    context_lines: int

    @classmethod
    def load(cls, root: pathlib.Path) -> 'Project':
        with open(root / 'tools' / 'series.toml', 'rb') as f:
            data = tomllib.load(f)
        series = data['series']
        return cls(root=root, **data['base'], **{
            **series, 'roots': tuple(series['roots'])})

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
        with is used.

        :raises: SeriesError if it can't be had or isn't the pinned one
        """
        path = self.cache / self.sdist_name
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            print('fetching', self.sdist_name, flush=True)
            done = subprocess.run(
                [sys.executable, '-m', 'pip', 'download', '--quiet',
                 '--no-deps', '--no-binary', ':all:', '--dest', self.cache,
                 '%s==%s' % (self.name, self.version)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode or not path.exists():
                raise SeriesError('pip could not fetch %s:\n%s' % (
                    self.sdist_name, done.stdout))
        found = _sha256(path)
        if found != self.sha256:
            raise SeriesError(
                '%s is not the pinned one:\n  found    %s\n  expected %s\n'
                'remove it if the download broke; tools/series.toml has the '
                'expected sum' % (path, found, self.sha256))
        return path


def _sha256(path: pathlib.Path) -> str:
    import hashlib
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
