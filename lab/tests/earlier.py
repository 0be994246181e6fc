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
"""The series as an earlier commit of this repository has it."""

import os
import pathlib
import shutil
import subprocess
import sys
import unittest

from lab import config

#: The first version that landed: records of version 1.0, and what a move needs
#: beside them in the instance's system_metadata.
LANDED = '20de19f'


def tree(commit: str) -> pathlib.Path:
    """The checkout of Nova that a commit's own tool composes.

    It is made once, below .lab, and outlasts "down".

    :raises unittest.SkipTest: the history doesn't go back that far
    """
    git = ['git', '-C', str(config.ROOT)]
    if subprocess.run([*git, 'cat-file', '-e', commit + '^{commit}'],
                      stderr=subprocess.DEVNULL).returncode:
        raise unittest.SkipTest(
            'this repository has no commit %s: a shallow clone, or a copy '
            'without its history (git fetch --unshallow)' % commit)
    folder = config.CACHE / 'series' / commit
    if not folder.exists():
        fresh = folder.with_name('%s.%d' % (commit, os.getpid()))
        fresh.mkdir(parents=True)
        try:
            archive = subprocess.run([*git, 'archive', commit], check=True,
                                     stdout=subprocess.PIPE).stdout
            subprocess.run(['tar', '-x', '-C', fresh], input=archive,
                           check=True)
            # As "make tree" does.
            subprocess.run([sys.executable, '-m', 'series', 'tree'],
                           cwd=fresh, check=True, stdout=subprocess.DEVNULL,
                           env={**os.environ, 'PYTHONPATH': 'tools'})
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder / 'tree'
