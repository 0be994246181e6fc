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

"""Topics: a tree that ends with one, what is saved from it, what is exported."""

import shutil
from unittest import mock

import hypothesis
from hypothesis import strategies as st

from . import base
from . import test_round_trip
from series import check
from series import compose
from series import export
from series import save
from series import SeriesError
from series import topics
from series.git import Git

TOPIC = """
[[topic]]
name = "%s"
title = "Title"
description = "Text."
first = "%s"
"""


def write(project, *told):
    (project.root / topics.PLACE).write_text(''.join(
        TOPIC % pair for pair in told))


class TopicsTest(base.ProjectTest):
    """Two topics of two commits: 1, 2; 3, 4."""

    def setUp(self):
        super().setUp()
        self.git = self.tree()
        a = base.BASE['nova/a.py']
        self.commit(self.git, {'nova/new.py': b'1\n'}, 'One\n\nWhy.\n')
        self.two = self.commit(self.git, {'nova/a.py': b'x\n' + a, 'nova/new.py':
                                          b'1\n2\n'}, 'Two\n\nWhy.\n')
        self.commit(self.git, {'nova/new.py': None, 'nova/newer.py': b'3\n'},
                    'Three\n\nWhy.\n')
        self.commit(self.git, {'nova/newer.py': b'3\n4\n', 'nova/a.py':
                               b'x\n' + a + b'y\n'}, 'Four\n\nWhy.\n')
        save.save(self.project)
        write(self.project, ('low', 'One'), ('high', 'Three'))

    def subjects(self, tip='HEAD'):
        return self.git.out('log', '--reverse', '--format=%s',
                            f'base..{tip}').split('\n')


class TestTree(TopicsTest):

    def setUp(self):
        super().setUp()
        self.saved = self.contents()
        self.said = compose.make_tree(self.project, 'low')

    def test_ends_with_the_topic_and_back(self):
        self.assertRegex(self.said, 'the end of topic low')
        self.assertEqual(['One', 'Two'], self.subjects())
        self.assertFalse((self.git.path / 'nova/newer.py').exists())
        self.assertEqual([], check.check(self.project))
        compose.make_tree(self.project)
        self.assertEqual(['One', 'Two'], self.subjects())
        compose.make_tree(self.project, '')
        self.assertEqual(['One', 'Two', 'Three', 'Four'], self.subjects())
        self.assertEqual([], check.check(self.project))

    def test_new_tree(self):
        shutil.rmtree(self.project.tree)
        compose.make_tree(self.project, 'low')
        self.assertEqual(['One', 'Two'], self.subjects())
        save.save(self.project)
        self.assertEqual(self.saved, self.contents())

    def test_unknown_topic(self):
        with self.assertRaisesRegex(SeriesError, "topic 'x'.*low, high"):
            compose.make_tree(self.project, 'x')

    def test_save_of_nothing_new(self):
        save.save(self.project)
        self.assertEqual(self.saved, self.contents())

    def test_save_keeps_the_later_commits(self):
        self.commit(self.git, {'nova/low.py': b'1\n'}, 'More\n\nWhy.\n')
        with self.assertRaisesRegex(SeriesError, 'not in the repository'):
            compose.make_tree(self.project, '')
        for _twice in range(2):
            self.assertRegex(save.save(self.project), 'after topic low are')
            self.assertEqual([], check.check(self.project))
            self.assertEqual(['One', 'Two', 'More'], self.subjects())
        compose.make_tree(self.project, '')
        self.assertEqual(['One', 'Two', 'More', 'Three', 'Four'],
                         self.subjects())
        self.assertEqual([], check.check(self.project))

    def test_save_of_fewer_commits_than_the_topic_had(self):
        self.git.run('reset', '--quiet', '--soft', 'HEAD^', worktree=True)
        self.git.run('commit', '--quiet', '--amend', '--no-edit', worktree=True)
        save.save(self.project)
        self.assertEqual([], check.check(self.project))
        compose.make_tree(self.project, '')
        self.assertEqual(['One', 'Three', 'Four'], self.subjects())

    def test_later_commit_that_has_become_empty_goes(self):
        self.commit(self.git, {'nova/new.py': None, 'nova/newer.py': b'3\n'},
                    'Moved down\n\nWhy.\n')
        write(self.project, ('low', 'One'), ('high', 'Four'))
        with mock.patch('builtins.print') as said:
            save.save(self.project)
        self.assertIn('(Three) has nothing left', said.call_args.args[0])
        self.assertEqual([], check.check(self.project))
        compose.make_tree(self.project, '')
        self.assertEqual(['One', 'Two', 'Moved down', 'Four'], self.subjects())

    def test_later_commits_that_do_not_apply(self):
        self.commit(self.git, {'nova/newer.py': b'other\n'}, 'Clash\n\nWhy.\n')
        with self.assertRaisesRegex(
                SeriesError, r'(?s)nothing is saved.*\(Three\).*newer') as caught:
            save.save(self.project)
        self.assertEqual(self.saved, self.contents())
        rebase = str(caught.exception).partition('--onto HEAD ')[2].split()
        self.git.run('rebase', '--onto', 'HEAD', rebase[0], rebase[1][:-1],
                     worktree=True, check=False)
        self.git.run('checkout', '--theirs', 'nova/newer.py', worktree=True)
        self.git.run('add', 'nova/newer.py', worktree=True)
        self.git.run('rebase', '--continue', worktree=True,
                     env={'GIT_EDITOR': 'true'})
        self.git.run('update-ref', '-d', compose.PARTIAL + 'low')
        save.save(self.project)
        self.assertEqual(['One', 'Two', 'Clash', 'Three', 'Four'],
                         self.subjects())
        self.assertEqual([], check.check(self.project))

    def test_repository_that_moved_on(self):
        other = self.new_project('other')
        for name in ('patches', 'nova'):
            shutil.copytree(self.project.root / name, other.root / name)
        git = self.tree(other)
        self.commit(git, {'nova/newer.py': b'5\n'}, 'Five\n\nWhy.\n')
        save.save(other)
        for name in ('patches', 'nova'):
            shutil.rmtree(self.project.root / name)
            shutil.copytree(other.root / name, self.project.root / name)
        compose.make_tree(self.project)
        self.assertEqual(['One', 'Two'], self.subjects())
        before = self.contents()
        save.save(self.project)
        self.assertEqual(before, self.contents())


class TestFile(TopicsTest):

    def faults(self, *told):
        write(self.project, *told)
        return '\n'.join(check.check(self.project))

    def test_faults(self):
        for told, fault in (
                ([('low', 'One'), ('high', 'Three')], '^$'),
                ([('low', 'Two')], "'One' has no topic"),
                ([('low', 'One'), ('b', 'Four'), ('c', 'Three')],
                 r'commits \[1, 4, 3\]; list them in order'),
                ([('low', 'One'), ('b', 'Other')], "0 commits.*'Other'"),
                ([('low', 'One'), ('low', 'Two')], 'two topics have one name'),
                ([('low', 'One'), ('b', 'One')], 'each once')):
            with self.subTest(told):
                self.assertRegex(self.faults(*told), fault)
        (self.project.root / topics.PLACE).write_text('[[topic]]\nname = "x"')
        self.assertRegex('\n'.join(check.check(self.project)),
                         'has name, title, description and first: .*missing')


class TestExport(TopicsTest):

    def test_branches_and_mails(self):
        said = export.export(self.project)
        self.assertRegex(said, '1 to 2: low(?s:.*)3 to 4: high')
        self.assertEqual(['One', 'Two'], self.subjects('topic/low'))
        self.assertEqual(['One', 'Two', 'Three', 'Four'],
                         self.subjects('topic/high'))
        dist = self.project.root / 'dist'
        for name, mails in (('low', ['0001-One', '0002-Two']),
                            ('high', ['0003-Three', '0004-Four'])):
            self.assertEqual(mails, sorted(
                path.stem for path in (dist / 'topics' / name).iterdir()))
        self.git.run('reset', '--quiet', '--hard', 'base', worktree=True)
        self.git.run('am', '--quiet', *sorted(dist.glob('topics/low/*')),
                     worktree=True)
        self.assertEqual(self.git.resolve('topic/low^{tree}'),
                         self.git.resolve('HEAD^{tree}'))


class TestGenerated(base.ProjectTest):

    @hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(
        hypothesis.HealthCheck))
    @hypothesis.given(test_round_trip.histories(), st.data())
    def test_later_commits_are_put_back_as_they_were(self, history, data):
        for name in ('tree', 'patches', *self.project.roots):
            shutil.rmtree(self.project.root / name, ignore_errors=True)
        git = self.tree()
        for files, message in history:
            self.commit(git, files, message)
        (self.project.root / topics.PLACE).unlink(missing_ok=True)
        save.save(self.project)
        before, trees = self.contents(), git.out('log', '--format=%T')
        first = data.draw(st.integers(0, len(history) - 1))
        told = [('low', 'Commit 0 \xfc')]
        if first:
            told.append(('high', 'Commit %d \xfc' % first))
        write(self.project, *told)
        before = self.contents()
        compose.make_tree(self.project, 'low')
        save.save(self.project)
        self.assertEqual(before, self.contents())
        git.run('commit', '--quiet', '--amend', '--allow-empty', '-m',
                'Commit 0 \xfc\n\nOther.', worktree=True)
        if first < 2:
            save.save(self.project)
            compose.make_tree(self.project, '')
            self.assertEqual(trees, git.out('log', '--format=%T'))
