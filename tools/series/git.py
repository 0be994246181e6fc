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

"""Running git so that nobody's settings change what comes out."""

import os
import pathlib
import subprocess
from typing import NamedTuple

from . import SeriesError

EMPTY_TREE = '4b825dc642cb6eb9a060e54bf8d69288fbee4904'
EMPTY_BLOB = 'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
NO_FILE = '000000'  # the mode that git gives a file that isn't there
# No other GIT_* variable of the caller counts.
ENVIRONMENT = {
    'GIT_CONFIG_NOSYSTEM': '1', 'GIT_CONFIG_GLOBAL': os.devnull,
    'GIT_ATTR_NOSYSTEM': '1', 'GIT_TERMINAL_PROMPT': '0',
    'GIT_ADVICE': '0', 'LC_ALL': 'C', 'TZ': 'UTC'}
# What a repository's own settings could change.
CONFIG = (
    'core.quotePath=true', 'core.autocrlf=false', 'core.fileMode=true',
    'core.attributesFile=' + os.devnull, 'core.hooksPath=' + os.devnull,
    'diff.algorithm=myers', 'diff.noprefix=false', 'diff.renames=false',
    'diff.mnemonicPrefix=false', 'diff.suppressBlankEmpty=false',
    'diff.indentHeuristic=true', 'diff.interHunkContext=0',
    'i18n.commitEncoding=utf-8', 'log.showSignature=false', 'gc.auto=0',
    'apply.whitespace=nowarn', 'safe.directory=*', 'commit.gpgSign=false')


class File(NamedTuple):
    """A file in a commit, or what a commit does to it.

    :ivar status: A, M, D or T
    """
    status: str
    mode: str
    blob: str


def run_tool(command: list, **kwargs) -> subprocess.CompletedProcess:
    """Run a command that the system has to have."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, **kwargs)
    except FileNotFoundError as error:
        raise SeriesError(f'there is no {error.filename}; make ready installs '
                          'what is missing') from None


def identity(name: str, email: str, date: str) -> dict[str, str]:
    """The environment in which a commit is somebody's, at some time."""
    return {f'GIT_{role}_{field}': value for role in ('AUTHOR', 'COMMITTER')
            for field, value in (
                ('NAME', name), ('EMAIL', email), ('DATE', date))}


class Git:
    """One repository.

    :param path: its work tree, or its git directory if bare
    """

    def __init__(self, path: pathlib.Path, bare: bool = False):
        self.path = path
        self.dir = path if bare else path / '.git'

    def run(self, *args, stdin: bytes | None = None, check: bool = True,
            env: dict | None = None, worktree: bool = False,
            ) -> subprocess.CompletedProcess:
        """Run one command.

        :param worktree: run it in the work tree, not on the git directory
        :raises: SeriesError with what git said, if check
        """
        command = ['git']
        for setting in CONFIG:
            command += ['-c', setting]
        if not worktree:
            command += ['--git-dir', str(self.dir)]
        caller = {name: value for name, value in os.environ.items()
                  if not name.startswith('GIT_')}
        done = run_tool(
            [*command, *map(str, args)], input=stdin, cwd=self.path,
            env={**caller, **ENVIRONMENT, **(env or {})},
            stderr=subprocess.PIPE)
        if check and done.returncode:
            said = os.fsdecode(done.stderr + done.stdout).strip()
            raise SeriesError(f'git {" ".join(map(str, args))} failed in '
                              f'{self.path}:\n{said}')
        return done

    def out(self, *args, **kwargs) -> str:
        return os.fsdecode(self.run(*args, **kwargs).stdout).strip('\n')

    def resolve(self, name: str) -> str | None:
        """The object a name stands for, None if there is none."""
        return self.out('rev-parse', '-q', '--verify', name + '^{object}',
                        check=False) or None

    def changes(self, *trees: str, of: str = 'diff-tree',
                env: dict | None = None) -> dict[str, File]:
        """Path -> what became of it, between two commits or trees."""
        fields = self.out(of, '--raw', '-r', '-z', '--no-abbrev',
                          '--no-renames', *trees, env=env).split('\0')
        found = {}
        for what, path in zip(fields[0::2], fields[1::2]):
            _old_mode, mode, _old_blob, blob, status = what.split()
            found[path] = File(status, mode, blob)
        return found

    def files(self, tree: str) -> dict[str, File]:
        """Path -> file of all that is in a tree."""
        return self.changes(EMPTY_TREE, tree)

    def tracked(self, env: dict | None = None) -> dict[str, File]:
        """Path -> file of all that is in the index."""
        return self.changes('--cached', EMPTY_TREE, of='diff-index', env=env)
