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

"""What is saved composes to the same; what is composed saves to the same."""

import collections
import itertools
import re
import shutil

import hypothesis
from hypothesis import strategies as st

from . import base
from series import check
from series import compose
from series import export
from series import save
from series import SeriesError

LINES = st.lists(st.binary(max_size=12).map(
    lambda b: b.replace(b'\0', b'') + b'\n'), max_size=8).map(b''.join)
CONTENT = st.one_of(LINES, st.just(b''), st.binary(max_size=40))
MODE = st.sampled_from([0o644, 0o755])
BASE = base.BASE
OWNED = [name for name in BASE if name.startswith(('nova/', 'doc/'))]


@st.composite
def edits(draw, content):
    """Lines put in, taken out or changed anywhere in a file."""
    lines = content.splitlines(keepends=True)
    for _n in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines)))
        lines[at:at + draw(st.integers(0, 3))] = draw(LINES).splitlines(
            keepends=True)
    return b''.join(lines)


@st.composite
def histories(draw):
    """Commits as dicts of changes: path -> content and mode, or None.

    Files of the base and files of earlier commits are changed alike; what was
    deleted may come again, also as a folder.
    """
    state = {name: (BASE[name], 0o644) for name in OWNED}
    commits, gone = [], []
    for number in range(draw(st.integers(1, 6))):
        files = {}

        def put(name, content, mode):
            taken = [n for n in (*state, *files) if n == name
                     or n.startswith(name + '/') or name.startswith(n + '/')]
            if not taken:
                files[name] = state[name] = content, mode

        for kind in draw(st.lists(st.sampled_from(
                ['add', 'edit', 'edit', 'delete', 'mode', 'rename', 'folder',
                 'again']), max_size=5)):
            fresh = 'nova/new %d-\xe9.py' % draw(st.integers(0, 99))
            there = sorted(n for n in state if n not in files)
            if kind == 'add' or not there:
                put(fresh, draw(CONTENT), draw(MODE))
                continue
            if kind == 'again':
                if gone:
                    put(draw(st.sampled_from(gone)), draw(CONTENT), draw(MODE))
                continue
            # Mostly what the series adds, which is what there is less of.
            name = draw(st.sampled_from(
                [n for n in there if n not in BASE] * 3 + there))
            content, mode = state[name]
            if kind == 'edit':
                files[name] = state[name] = draw(edits(content)), mode
            elif kind == 'mode':
                files[name] = state[name] = content, draw(MODE)
            else:
                files[name] = None
                del state[name]
                gone.append(name)
            if kind == 'rename':
                put(fresh, draw(st.sampled_from([content, content + b'x\r\n'])),
                    mode)
            elif kind == 'folder' and name not in BASE:
                files[name + '/x.py'] = state[name + '/x.py'] = content, mode
        commits.append((files, 'Commit %d \xfc\n\nWhy %s.\n\nChange-Id: I%d\n' % (
            number, draw(st.sampled_from(['not', 'else\n\nA list:\n\n* x'])), number)))
    return commits


class TestRoundTrip(base.ProjectTest):

    @hypothesis.settings(max_examples=30, deadline=None, suppress_health_check=list(
        hypothesis.HealthCheck))
    @hypothesis.given(histories())
    def test_generated_histories(self, history):
        shutil.rmtree(self.project.root / 'tree', ignore_errors=True)
        for root in ('patches', *self.project.roots):
            shutil.rmtree(self.project.root / root, ignore_errors=True)
        git = self.tree()
        touched = []
        for files, message in history:
            before = git.resolve('HEAD')
            touched.append(set(git.changes(
                before, self.commit(git, files, message))))
        save.save(self.project)
        saved = self.contents()
        self.hold_to_form(git, touched)
        again = self.new_project('again')
        try:
            for name in saved:
                target = again.root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.project.root / name, target)
            other = self.tree(again)
            form = '--format=%T%n%an%n%ae%n%ad%n%B'
            self.assertEqual(git.out('log', form), other.out('log', form))
            save.save(again)
            self.assertEqual(saved, self.contents(again))
            # GNU patch takes no binary diff of the base, and says so.
            self.assertEqual([], [fault for fault in check.check(again) if not
                                  re.search('binary|GNU patch', fault)])
            export.export(again)
            other.run('reset', '--quiet', '--hard', 'base', worktree=True)
            mails = sorted((again.root / 'dist/series').glob('*'))
            if all(touched):  # git am takes no commit that does nothing
                other.run('am', '--quiet', '--keep-cr', *mails, worktree=True)
                self.assertEqual(git.out('log', form), other.out('log', form))
        finally:
            shutil.rmtree(again.root)

    def hold_to_form(self, git, touched):
        """The files at the end lie here, whole; the rest is hunks."""
        base_files = git.files('base')
        ours = {name: file for name, file in git.files('HEAD').items()
                if name not in base_files}
        self.assertEqual(set(ours), {
            name for name in save.own_files(self.project, self.project.root)
            if not name.startswith('patches/')})
        for name, file in ours.items():
            self.assertEqual(file.blob, git.out(
                'hash-object', '--no-filters', self.project.root / name))
        hunks = {path for patch in compose.patches(self.project)
                 for path, _section in patch.sections()}
        count = collections.Counter(itertools.chain(*touched))
        self.assertEqual({name for name in count
                          if name not in base_files and count[name] > 1},
                         hunks - set(base_files))

    def test_fixups_are_folded_before_they_are_saved(self):
        git = self.tree()
        self.commit(git, {'nova/new.py': b'1\n'}, 'Add new\n\nWhy.\n')
        self.commit(git, {'nova/a.py': b'2\n'}, 'Change a\n\nWhy.\n')
        self.commit(git, {'nova/new.py': b'3\n'}, 'fixup! Add new\n')
        with self.assertRaisesRegex(SeriesError, 'autosquash'):
            save.save(self.project)
        git.run('rebase', '--quiet', '-i', '--autosquash', 'base',
                worktree=True, env={'GIT_SEQUENCE_EDITOR': 'true'})
        save.save(self.project)
        self.assertEqual(b'3\n', (
            self.project.root / 'nova/new.py').read_bytes())
        self.assertEqual([], check.check(self.project))

    def test_saving_twice_changes_nothing(self):
        git = self.tree()
        self.commit(git, {'nova/a.py': b'x\n' + base.BASE['nova/a.py'],
                          'nova/new.py': b'1\n'})
        save.save(self.project)
        first = self.contents()
        save.save(self.project)
        self.assertEqual(first, self.contents())

    def test_what_a_commit_no_longer_adds_goes(self):
        git = self.tree()
        self.commit(git, {'nova/deep/down/new.py': b'1\n'})
        save.save(self.project)
        git.run('reset', '--quiet', '--hard', 'base', worktree=True)
        save.save(self.project)
        self.assertFalse((self.project.root / 'nova').exists())
        self.assertEqual([], list(self.project.patches.glob('*')))


class TestFilesOfSeveralCommits(base.ProjectTest):

    NEW = b''.join(b'new %d\n' % n for n in range(40))

    def setUp(self):
        super().setUp()
        self.git = self.tree()
        self.commit(self.git, {'nova/new.py': self.NEW, 'nova/once.py': b'1\n'})
        self.changed = self.NEW.replace(b'new 20\n', b'newer\n')
        self.commit(self.git, {'nova/new.py': self.changed}, 'Second\n\nWhy.\n')
        save.save(self.project)
        self.here = self.project.root / 'nova/new.py'

    def test_the_file_lies_here_and_what_changed_is_a_hunk(self):
        self.assertEqual(self.changed, self.here.read_bytes())
        first, second = compose.patches(self.project)
        self.assertEqual((['nova/new.py', 'nova/once.py'], b''),
                         (first.adds, first.diff))
        self.assertEqual([], second.adds)
        self.assertIn(b'\n@@ -18,7 +18,7 @@\n new 17\n', second.diff)
        self.assertEqual([], check.check(self.project))

    def test_edit_by_hand_where_a_later_patch_changed_it(self):
        self.here.write_bytes(self.changed.replace(b'newer', b'mine'))
        for call in (compose.make_tree, check.check):
            with self.assertRaisesRegex(
                    SeriesError, r'(?s)0002-Second.*nova/new\.py, line 18 \(hunk '
                    r'@@ \+18\).*mine.*newer.*git checkout'):
                call(self.project)

    def test_edit_by_hand_elsewhere_belongs_to_the_commit_that_adds(self):
        self.here.write_bytes(self.changed.replace(b'new 3\n', b'x\nmine\n'))
        compose.make_tree(self.project)
        self.assertEqual(self.NEW.replace(b'new 3\n', b'x\nmine\n'), self.git.run(
            'show', 'HEAD^:nova/new.py').stdout)
        self.assertRegex('\n'.join(check.check(self.project)),
                         r'0002-Second\.patch, line \d+: a save would')
        save.save(self.project)
        self.assertEqual([], check.check(self.project))

    def test_patch_of_a_file_that_none_adds(self):
        patch = next(self.project.patches.glob('0001-*'))
        patch.write_bytes(patch.read_bytes().replace(
            b'adds: nova/new.py\n', b''))
        with self.assertRaisesRegex(
                SeriesError, '0002-Second.patch changes nova/new.py, which no'):
            compose.make_tree(self.project)

    def test_binary_file_edited_by_hand(self):
        self.commit(self.git, {'nova/x.bin': b'\0' * 9})
        self.commit(self.git, {'nova/x.bin': b'\0' * 10}, 'Fourth\n\nWhy.\n')
        save.save(self.project)
        self.assertEqual([], check.check(self.project))
        (self.project.root / 'nova/x.bin').write_bytes(b'\0')
        with self.assertRaisesRegex(SeriesError, r'(?s)0004-Fourth.*nova/x\.bin'
                                    '.*git checkout'):
            compose.make_tree(self.project)


class TestRefusals(base.ProjectTest):

    def test_file_outside_of_the_roots(self):
        git = self.tree()
        self.commit(git, {'tools/new.py': b'1\n'})
        with self.assertRaisesRegex(SeriesError, 'tools/new.py, outside'):
            save.save(self.project)

    def test_uncommitted_change_is_kept_and_named(self):
        git = self.tree()
        (git.path / 'nova/a.py').write_bytes(b'mine\n')
        (self.project.patches).mkdir(exist_ok=True)
        self._other_patch()
        with self.assertRaisesRegex(
                SeriesError, r'(?s)in no commit.*nova/a\.py.*make save'):
            compose.make_tree(self.project)
        self.assertEqual(b'mine\n', (git.path / 'nova/a.py').read_bytes())

    def test_unsaved_commit_is_kept_and_named(self):
        git = self.tree()
        head = self.commit(git, {'nova/a.py': b'mine\n'})
        self._other_patch()
        with self.assertRaisesRegex(SeriesError, 'make save'):
            compose.make_tree(self.project)
        self.assertEqual(head, git.resolve('HEAD'))

    def test_saved_tree_moves_on_and_the_old_one_has_a_name(self):
        git = self.tree()
        head = git.resolve('HEAD')
        self._other_patch()
        said = compose.make_tree(self.project)
        self.assertRegex(said, 'refs/series/kept/')
        self.assertEqual(head, git.resolve(said.split()[-1]))
        self.assertEqual(b'2\n', (git.path / 'nova/new.py').read_bytes())

    def _other_patch(self):
        """The repository changes as a pull would change it."""
        other = self.new_project('other')
        git = self.tree(other)
        self.commit(git, {'nova/new.py': b'2\n'})
        save.save(other)
        for name in ('patches', 'nova'):
            shutil.copytree(other.root / name, self.project.root / name,
                            dirs_exist_ok=True)

    def test_wrong_sum_shows_both(self):
        path = self.project.cache / self.project.sdist_name
        path.write_bytes(b'other')
        with self.assertRaisesRegex(
                SeriesError, '(?s)found +d9298a.*expected %s' %
                self.project.sha256):
            compose.make_tree(self.project)

    def test_patch_that_does_not_fit_shows_both_sides(self):
        git = self.tree()
        self.commit(git, {'nova/a.py': base.BASE['nova/a.py'].replace(
            b'line 20\n', b'ours\n')})
        save.save(self.project)
        patch = next(self.project.patches.glob('*'))
        patch.write_bytes(patch.read_bytes().replace(b'-line 20', b'-line XX'))
        with self.assertRaisesRegex(
                SeriesError, r'(?s)0001-Subject\.patch.*nova/a\.py.*line 20.*'
                             r'expects.*line XX'):
            compose.compose(git, self.project)

    def test_uncommitted_change_is_refused_though_nothing_else_changed(self):
        git = self.tree()
        (git.path / 'nova/untracked.py').write_bytes(b'mine\n')
        with self.assertRaisesRegex(SeriesError, r'\?\? nova/untracked\.py'):
            compose.make_tree(self.project)
        self.assertRegex(compose.make_tree(self.project, keep_work=True),
                         'as it is')

    def test_save_in_the_midst_of_a_rebase(self):
        git = self.tree()
        self.commit(git, {'nova/a.py': b'1\n'})
        before = self.contents()
        (git.dir / 'rebase-merge').mkdir()
        for call in (save.save, compose.make_tree):
            with self.assertRaisesRegex(SeriesError, 'rebase-merge'):
                call(self.project)
        self.assertEqual(before, self.contents())

    def test_save_of_another_base(self):
        git = self.tree()
        git.run('commit', '--quiet', '--amend', '-m', 'Other root',
                worktree=True)
        with self.assertRaisesRegex(SeriesError, 'stand on the base'):
            save.save(self.project)

    def test_other_base_of_the_same_content(self):
        git = self.tree()
        git.run('commit', '--quiet', '--amend', '-m', 'Other root',
                worktree=True)
        git.run('tag', '--force', 'base')
        self.commit(git, {'nova/new.py': b'1\n'})
        save.save(self.project)
        self.assertEqual([], check.check(self.project))

    def test_tag_base_on_something_else(self):
        git = self.tree()
        self.commit(git, {'nova/new.py': b'1\n'})
        git.run('tag', '--force', 'base')
        with self.assertRaisesRegex(SeriesError, 'tag base.*as it was'):
            save.save(self.project)
