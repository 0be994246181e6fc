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

"""Killed at any step, a command leaves the old state or the new one.

Every step of a command that touches anything is a git command, a move, a copy
or a removal; each in turn is the one before which the process ends.
"""

import contextlib
import itertools
import os
import pathlib
import shutil
from unittest import mock

from . import base
from . import test_topics
from series import check
from series import compose
from series import git as series_git
from series import save
from series import SeriesError
from series.git import Git


class Killed(BaseException):
    pass


STEPS = ((series_git.Git, 'run'), (os, 'replace'), (os, 'rename'),
         (pathlib.Path, 'unlink'), (pathlib.Path, 'mkdir'),
         (pathlib.Path, 'rmdir'), (shutil, 'copy2'), (shutil, 'rmtree'))


@contextlib.contextmanager
def killed_before(step):
    """End the process before its Nth step.

    :returns: a list that is empty as long as nothing was killed
    """
    count, killed = itertools.count(1), []

    def wrap(function):
        def wrapped(*args, **kwargs):
            if killed or next(count) == step:
                killed.append(function)
                raise Killed
            return function(*args, **kwargs)
        return wrapped

    with contextlib.ExitStack() as stack:
        for owner, name in STEPS:
            stack.enter_context(mock.patch.object(
                owner, name, wrap(getattr(owner, name))))
        try:
            yield killed
        except Killed:
            pass


class TestKilled(base.ProjectTest):

    def at_each_step(self, project, command):
        """Yield a copy of a project per step at which a command was killed."""
        for step in itertools.count(1):
            root = self.top / 'killed'
            shutil.copytree(project.root, root, symlinks=True)
            here = type(project).load(root)
            with killed_before(step) as killed:
                command(here)
            if killed:
                with self.subTest(step=step):
                    yield here
            shutil.rmtree(root)
            if not killed:
                self.assertGreater(step, 10)
                return

    def test_save(self):
        git = self.tree()
        self.commit(git, {'nova/new.py': b'1\n', 'doc/new.rst': b'2\n'})
        save.save(self.project)
        old = self.contents()
        self.commit(git, {'nova/a.py': b'5\n'})
        git.run('reset', '--quiet', '--hard', 'base', worktree=True)
        self.commit(git, {'nova/newer.py': b'3\n', 'doc/new.rst': b'4\n'})
        head = self.commit(git, {'nova/newer.py': b'3\n5\n'})
        found = set()
        for here in self.at_each_step(self.project, save.save):
            save.finish(here)  # as each command does first
            now = self.contents(here)
            self.assertEqual(head, Git(here.tree).resolve('HEAD'))
            if now != old:
                self.assertEqual([], check.check(here))
            found.add(now == old)
            save.save(here)
            self.assertEqual([], check.check(here))
        self.assertEqual({True, False}, found)

    def test_new_tree(self):
        self.commit(self.tree(), {'nova/a.py': b'1\n', 'nova/b.py': b'2\n'})
        save.save(self.project)
        shutil.rmtree(self.project.tree)
        for here in self.at_each_step(self.project, compose.make_tree):
            if here.tree.exists():
                self.assertEqual([], check.check(here))
            compose.make_tree(here)
            self.assertEqual([], check.check(here))

    def test_tree_that_moves_on(self):
        git = self.tree()
        head = self.commit(git, {'nova/a.py': b'1\n'})
        save.save(self.project)
        self.pull()
        for here in self.at_each_step(self.project, compose.make_tree):
            git = Git(here.tree)
            compose.make_tree(here)
            self.assertEqual([], check.check(here))
            self.assertTrue(git.out('for-each-ref', '--contains', head,
                                    'refs/series/kept'))

    def test_checkout_cut_off_by_a_killed_git_and_work_done_since(self):
        git = self.tree()
        self.commit(git, {'nova/a.py': b'1\n'})
        save.save(self.project)
        git.run('update-ref', compose.MOVING, 'HEAD')
        (git.dir / 'index.lock').touch()
        (git.path / 'nova/a.py').unlink()
        (git.path / 'nova/b.py').write_bytes(b'mine\n')
        with mock.patch('builtins.print') as said:
            compose.make_tree(self.project)
        self.assertEqual(b'1\n', (git.path / 'nova/a.py').read_bytes())
        kept = said.call_args.args[-1]
        self.assertEqual('mine', git.out('show', kept + ':nova/b.py'))
        self.assertIsNone(git.resolve(compose.MOVING))

    def test_work_committed_since_a_checkout_was_cut_off(self):
        git = self.tree()
        there = self.commit(git, {'nova/a.py': b'1\n'})
        save.save(self.project)
        git.run('update-ref', compose.MOVING, there)
        head = self.commit(git, {'nova/a.py': b'2\n'})
        for files in ({}, {'nova/new.py': b'mine\n'}):
            with self.subTest(files), mock.patch('builtins.print') as said:
                git.run('update-ref', compose.MOVING, there)
                git.run('reset', '--quiet', '--hard', head, worktree=True)
                for name, content in files.items():
                    (git.path / name).write_bytes(content)
                compose.make_tree(self.project)
                kept = said.call_args.args[-1]
                self.assertEqual('2', git.out('show', kept + ':nova/a.py'))
                for name in files:
                    self.assertEqual('mine', git.out('show', f'{kept}:{name}'))
                self.assertEqual(there, git.resolve('HEAD'))

    def test_tree_that_ends_with_a_topic_and_save(self):
        """The later commits are never lost, whenever a command is killed."""
        git = self.tree()
        for number in '12':
            self.commit(git, {'nova/new.py': number.encode(), f'doc/{number}': b'x'},
                        f'{number}\n\nWhy.\n')
        save.save(self.project)
        test_topics.write(self.project, ('low', '1'), ('high', '2'))

        def whole(here):
            git = Git(here.root / 'tree')
            compose.make_tree(here, '')
            return git.out('log', '--format=%s', 'base..').split()

        for topic in ('low', ''):
            for here in self.at_each_step(
                    self.project, lambda here: compose.make_tree(here, topic)):
                try:
                    save.save(here)
                except SeriesError as error:
                    self.assertRegex(str(error), 'make tree first|no commit')
                self.assertEqual(['2', '1'], whole(here))
            compose.make_tree(self.project, 'low')
        self.commit(git, {'nova/between.py': b'1'}, 'Between\n\nWhy.\n')
        for here in self.at_each_step(self.project, save.save):
            save.finish(here)
            save.save(here)
            self.assertEqual(['2', 'Between', '1'], whole(here))

    def pull(self):
        """The repository changes as a pull would change it."""
        other = self.new_project('other')
        self.commit(self.tree(other), {'nova/new.py': b'2\n'})
        save.save(other)
        shutil.rmtree(self.project.patches)
        for name in ('patches', 'nova'):
            shutil.copytree(other.root / name, self.project.root / name)
