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

"""Run git so that its output depends on nothing but its input."""

import os
import pathlib
import subprocess

from . import SeriesError

# What a user or a system may have set changes diffs; none of it counts here.
PINNED = {
    'GIT_CONFIG_NOSYSTEM': '1', 'GIT_CONFIG_GLOBAL': os.devnull,
    'GIT_ATTR_NOSYSTEM': '1', 'GIT_TERMINAL_PROMPT': '0',
    'GIT_ADVICE': '0', 'LC_ALL': 'C', 'TZ': 'UTC',
}
UNSET = ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE', 'GIT_DIFF_OPTS',
         'GIT_EXTERNAL_DIFF', 'GIT_AUTHOR_NAME', 'GIT_AUTHOR_EMAIL',
         'GIT_AUTHOR_DATE', 'GIT_COMMITTER_NAME', 'GIT_COMMITTER_EMAIL',
         'GIT_COMMITTER_DATE')
CONFIG = ('core.quotePath=true', 'core.autocrlf=false', 'core.fileMode=true',
          'core.attributesFile=' + os.devnull, 'core.hooksPath=' + os.devnull,
          'diff.algorithm=myers', 'diff.noprefix=false', 'i18n.commitEncoding=utf-8',
          'diff.mnemonicPrefix=false', 'diff.renames=false',
          'diff.suppressBlankEmpty=false', 'diff.indentHeuristic=true',
          'diff.interHunkContext=0', 'apply.whitespace=nowarn', 'gc.auto=0',
          'safe.directory=*', 'commit.gpgSign=false')


class Git:
    """One repository.

    :param path: its work tree, or its git directory if bare
    """

    def __init__(self, path: pathlib.Path, bare: bool = False):
        self.path = pathlib.Path(path)
        self.dir = self.path if bare else self.path / '.git'

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
        full = {k: v for k, v in os.environ.items() if k not in UNSET}
        full.update(PINNED, **(env or {}))
        try:
            done = subprocess.run(
                [*command, *map(str, args)], input=stdin, env=full,
                cwd=self.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except FileNotFoundError as error:
            raise SeriesError('there is no %s; make ready installs what is '
                              'missing' % error.filename) from None
        if check and done.returncode:
            raise SeriesError('git %s failed in %s:\n%s' % (
                ' '.join(map(str, args)), self.path,
                (done.stderr + done.stdout).decode(errors='replace').strip()))
        return done

    def out(self, *args, **kwargs) -> str:
        return self.run(*args, **kwargs).stdout.decode(
            errors='surrogateescape').strip('\n')

    def resolve(self, name: str) -> str | None:
        """The object a name stands for, None if there is none."""
        return self.out('rev-parse', '-q', '--verify', name + '^{object}',
                        check=False) or None

    def entries(self, tree: str, *paths) -> dict[str, tuple[str, str]]:
        """Path -> (mode, blob) of all files in a tree."""
        found = {}
        for line in self.run('ls-tree', '-r', '-z', tree, '--',
                             *paths).stdout.split(b'\0'):
            if line:
                meta, name = line.split(b'\t', 1)
                mode, _kind, blob = meta.decode().split()
                found[os.fsdecode(name)] = (mode, blob)
        return found

    def changes(self, old: str, new: str) -> dict[str, str]:
        """Path -> A, M, D or T, between two commits or trees."""
        fields = self.run('diff-tree', '-r', '-z', '--no-renames', '--name-status',
                          old, new).stdout.split(b'\0')
        return {os.fsdecode(path): status.decode()
                for status, path in zip(fields[0::2], fields[1::2])}
