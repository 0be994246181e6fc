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

import shutil

import hypothesis
from hypothesis import strategies as st

from . import base
from series import check
from series import compose
from series import save
from series import SeriesError

LINES = st.lists(st.binary(max_size=12).map(
    lambda b: b.replace(b'\0', b'') + b'\n'), max_size=8).map(b''.join)
CONTENT = st.one_of(LINES, st.just(b''), st.binary(max_size=40))
OWNED = [name for name in base.BASE if name.startswith(('nova/', 'doc/'))]


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
    """Commits as dicts of changes: path -> content, mode or None."""
    state, commits, added = dict(base.BASE), [], 0
    for number in range(draw(st.integers(1, 5))):
        files = {}
        for kind in draw(st.lists(st.sampled_from(
                ['add', 'edit', 'delete', 'mode', 'rename']), max_size=4)):
            there = [n for n in OWNED if n in state and n not in files]
            if kind in ('add', 'rename') or not there:
                name = 'nova/new %d-\xe9.py' % added
                added += 1
                files[name] = (draw(CONTENT), draw(
                    st.sampled_from([0o644, 0o755])))
            if not there:
                continue
            name = draw(st.sampled_from(there))
            if kind == 'edit':
                files[name] = state[name] = draw(edits(state[name]))
            elif kind == 'mode':
                files[name] = (state[name], 0o755)
            elif kind in ('delete', 'rename'):
                files[name] = None
                del state[name]
        commits.append((files, 'Commit %d \xfc\n\nWhy %s.\n\nChange-Id: I%d\n' % (
            number, draw(st.sampled_from(['not', 'else\n\nA list:\n\n* x'])), number)))
    return commits


class TestRoundTrip(base.ProjectTest):

    @hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=list(
        hypothesis.HealthCheck))
    @hypothesis.given(histories())
    def test_generated_histories(self, history):
        shutil.rmtree(self.project.root / 'tree', ignore_errors=True)
        for root in ('patches', *self.project.roots):
            shutil.rmtree(self.project.root / root, ignore_errors=True)
        git = self.tree()
        for files, message in history:
            self.commit(git, files, message)
        save.save(self.project)
        saved = self.contents()
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
        finally:
            shutil.rmtree(again.root)

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


class TestRefusals(base.ProjectTest):

    def test_file_added_by_one_commit_and_changed_by_another(self):
        git = self.tree()
        self.commit(git, {'nova/new.py': b'1\n'}, 'Add new\n\nWhy.\n')
        self.commit(git, {'nova/new.py': b'2\n'}, 'Change new\n\nWhy.\n')
        with self.assertRaisesRegex(
                SeriesError, r'Change new.*nova/new\.py.*Add new'):
            save.save(self.project)

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
