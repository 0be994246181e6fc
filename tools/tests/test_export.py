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

"""What is exported builds the tree elsewhere: by git am, and by quilt."""

import os
import shutil
import subprocess

from . import base
from series import compose
from series import export
from series import save
from series.git import Git


class TestExport(base.ProjectTest):

    def setUp(self):
        super().setUp()
        self.git = self.tree()
        a = base.BASE['nova/a.py']
        self.commit(self.git, {'nova/a.py': b'x\n' + a, 'nova/new.py': b'1\n',
                               'nova/empty/__init__.py': b''})
        self.commit(self.git, {
            'nova/a.py': b'x\n' + a.replace(b'line 20\n', b'\xff\n'),
            'nova/b.py': base.BASE['nova/b.py'] + b' more',
            'nova/tool.sh': (b'#!/bin/sh', 0o755), 'doc/page.rst': None},
            '[PATCH 1/2] Subject as of a mail\n\nBody.\n')
        self.commit(self.git, {
            'nova/new.py': b'1\n2\n3', 'nova/empty/__init__.py': None,
            'nova/passing.py': b'x\n', 'nova/tool.sh': (b'#!/bin/sh', 0o644)})
        self.commit(self.git, {'nova/new.py': b'0\n2\n3\n', 'nova/passing.py':
                               None, 'nova/passed.py': b'x\ny\n'})
        save.save(self.project)
        export.export(self.project)
        self.dist = self.project.root / 'dist'
        self.work = self.top / 'work'
        self.other = Git(self.work)
        subprocess.run(['git', 'clone', '--quiet', self.git.path, self.work],
                       check=True)
        self.other.run('reset', '--quiet', '--hard', self.git.resolve('base'),
                       worktree=True)

    def test_git_am(self):
        self.other.run(
            '-c', 'user.name=x', '-c', 'user.email=x@y', 'am', '--quiet',
            *sorted((self.dist / 'series').glob('*')), worktree=True)
        self.assertEqual(self.git.resolve('HEAD^{tree}'),
                         self.other.resolve('HEAD^{tree}'))

    def test_quilt(self):
        if not shutil.which('quilt'):
            self.skipTest('quilt is not installed: make ready')
        done = subprocess.run(
            ['quilt', '--quiltrc', '-', 'push', '-a', '--fuzz=0'],
            cwd=self.work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**os.environ, 'QUILT_PATCHES': str(
                self.dist / 'quilt' / 'patches')})
        self.assertEqual(0, done.returncode, done.stdout)
        self.assertNotRegex(done.stdout, 'offset|fuzz')
        shutil.rmtree(self.work / '.pc')
        self.other.run('add', '--all', '--force', worktree=True)
        self.assertEqual(self.git.resolve('HEAD^{tree}'),
                         self.other.out('write-tree'))

    def test_without_a_tree(self):
        before = {p.name: p.read_bytes() for p in (
            self.dist / 'series').iterdir()}
        shutil.rmtree(self.project.tree)
        export.export(self.project)
        self.assertEqual(before, {p.name: p.read_bytes() for p in (
            self.dist / 'series').iterdir()})

    def test_version_counts_the_commits(self):
        self.assertEqual('1.0+test.4', export.version(self.project))
        self.assertEqual(4, len(compose.patches(self.project)))
