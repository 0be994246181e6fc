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

"""Each fault is found, with its place."""

import dataclasses
import re
import shutil

from . import base
from series import check
from series import save
from series.git import Git


class TestCheck(base.ProjectTest):

    def setUp(self):
        super().setUp()
        self.git = self.tree()

    def saved(self, files, message='Subject\n\nBody.\n'):
        self.commit(self.git, files, message)
        save.save(self.project)
        return next(self.project.patches.glob('*-Subject.patch'), None)

    def faults(self):
        return '\n'.join(check.check(self.project))

    def test_clean(self):
        self.saved({'nova/a.py': b'1\n', 'nova/new.py': b'2\n',
                    'doc/page.rst': None})
        self.assertEqual('', self.faults())

    def test_edited_file_of_ours(self):
        self.saved({'nova/new.py': b'2\n'})
        (self.project.root / 'nova/new.py').write_bytes(b'3\n')
        self.assertRegex(self.faults(), r'nova/new\.py is not the same')

    def test_missing_file_of_ours(self):
        self.saved({'nova/new.py': b'2\n'})
        (self.project.root / 'nova/new.py').unlink()
        self.assertRegex(self.faults(), r'nova/new\.py, which is not in')

    def test_file_that_no_patch_adds(self):
        self.saved({'nova/new.py': b'2\n'})
        (self.project.root / 'nova/stray.py').write_bytes(b'')
        self.assertRegex(self.faults(), r'nova/stray\.py: no patch adds it')

    def test_hunk_with_an_offset(self):
        patch = self.saved({'nova/a.py': base.BASE['nova/a.py'].replace(
            b'line 20\n', b'ours\n')})
        patch.write_bytes(patch.read_bytes().replace(
            b'@@ -20,3 +20,3 @@', b'@@ -17,3 +17,3 @@'))
        self.assertRegex(self.faults(), r'0001-Subject\.patch, line \d+')

    def test_context(self):
        patch = self.saved({'nova/a.py': base.BASE['nova/a.py'].replace(
            b'line 20\n', b'ours\n')})
        text = patch.read_bytes().replace(b'@@ -20,3 +20,3 @@\n line 19\n',
                                          b'@@ -18,5 +18,5 @@\n line 17\n '
                                          b'line 18\n line 19\n')
        patch.write_bytes(text)
        self.assertRegex(self.faults(), r'line \d+ \(nova/a\.py\): 3 lines')

    def test_subject_and_body(self):
        self.saved({'nova/a.py': b'1\n'}, 'S' * 73 + '\n')
        self.assertRegex(self.faults(), r'(?s)73 characters.*no body')

    def test_import_of_what_a_later_commit_adds(self):
        self.saved({'nova/one.py': b'from nova import later\n'
                                   b'from nova import gone\n'
                                   b'import nova.more.deep\n'
                                   b'import os\n'
                                   b'from other import x\n'})
        self.saved({'nova/later.py': b'', 'nova/more/__init__.py': b'',
                    'nova/more/deep.py': b'',
                    'nova/__init__.py': b'try:\n    import os\n'
                                        b'except ImportError:\n'
                                        b'    gone = 2\n'},
                   'Other\n\nBody.\n')
        faults = self.faults()
        self.assertEqual(3, faults.count('0001-Subject.patch: nova/one.py'))
        self.assertRegex(faults, 'line 1: there is no later in nova yet')
        self.assertRegex(faults, 'line 2: there is no gone in nova yet')
        self.assertRegex(faults, 'line 3: there is no nova.more.deep yet')

    def test_import_from_a_package_that_has_all_of_a_module(self):
        self.saved({'nova/__init__.py': b'from nova.base import *\n',
                    'nova/base.py': b'there = 1\n',
                    'nova/one.py': b'def f():\n'
                                   b'    from nova import later\n'
                                   b'    from nova import there\n'})
        self.saved({'nova/later.py': b''}, 'Other\n\nBody.\n')
        self.assertEqual(
            ['line 2: there is no later in nova yet'],
            re.findall('line .* there is no .* yet', self.faults()))

    def test_imports_that_are_there(self):
        self.saved({'nova/first.py': b'import os\nNAME, other = 1, 2\n'
                                     b'def function():\n    pass\n'
                                     b'if NAME:\n    class Third:\n'
                                     b'        pass\n',
                    'nova/pump.pyx': b'cdef int x\n',
                    'nova/space/one.py': b''})
        self.saved({'nova/new.py': b'from nova.first import NAME, other, os\n'
                                   b'from nova.first import Third, function\n'
                                   b'from nova import pump, space\n'
                                   b'from nova.pump import anything\n'
                                   b'from nova.space import one\n'
                                   b'from nova.first import *\n'
                                   b'from .first import whatever\n'},
                   'Other\n\nBody.\n')
        self.assertEqual('', self.faults())

    def test_diff_text_in_the_message(self):
        for text in ('--- a/nova/b.py\n+++ b/nova/b.py', '@@ -1 +1 @@',
                     'diff --git a/x b/x', 'Index: x'):
            with self.subTest(text):
                self.saved({'nova/a.py': b'1\n'}, 'Subject\n\nSee\n\n    %s\n' %
                           text.replace('\n', '\n    '))
                self.assertRegex(self.faults(), 'reads like a diff')
                self.git.run('reset', '--quiet', '--hard', 'base',
                             worktree=True)

    def test_body_that_begins_like_a_header(self):
        self.saved({'nova/a.py': b'1\n'}, 'Subject\n\nFrom: the start.\n')
        self.assertRegex(self.faults(), 'for a header')

    def test_message_that_is_not_saved(self):
        self.saved({'nova/a.py': b'1\n'})
        self.git.run('commit', '--quiet', '--amend', '-m', 'Other\n\nBody.',
                     worktree=True)
        self.assertRegex(self.faults(), 'differ in number, message or author')

    def test_file_of_the_base_under_another_name(self):
        self.saved({'nova/new.py': b'1\n', 'nova/empty/__init__.py': b''})
        copy = self.project.root / 'copied.py'
        copy.write_bytes(base.BASE['nova/a.py'])
        Git(self.project.root).run('add', '--all', worktree=True)
        self.assertRegex(self.faults(),
                         r"copied\.py is the base's own file nova/a\.py")
        self.assertNotRegex(self.faults(), '__init__')

    def test_option_in_an_added_file(self):
        self.saved({'nova/new.py': b"\nX = [\n    cfg.StrOpt('x'),\n]\n"})
        self.assertRegex(self.faults(), r'nova/new\.py, line 3 \(cfg\.StrOpt')

    def test_file_added_by_two_commits(self):
        patch = self.saved({'nova/new.py': b'1\n'})
        patch.with_name('0002-Again.patch').write_bytes(patch.read_bytes())
        self.assertRegex(self.faults(), 'nova/new.py is added by patches/0001-'
                         'Subject.patch and by patches/0002-Again.patch')

    def test_file_deleted_by_a_later_commit_lies_here_again(self):
        self.saved({'nova/new.py': b'1\n'})
        self.commit(self.git, {'nova/new.py': None}, 'Second\n\nWhy.\n')
        save.save(self.project)
        self.assertEqual('', self.faults())
        (self.project.root / 'nova').mkdir()
        (self.project.root / 'nova/new.py').write_bytes(b'1\n')
        self.assertRegex(self.faults(), r'nova/new\.py: no patch adds it')

    def test_option_added_to_a_file_of_an_earlier_commit(self):
        self.saved({'nova/new.py': b'X = [\n]\n', 'nova/tests/x.py': b''})
        option = b"X = [\n    cfg.StrOpt('x'),\n]\n"
        self.commit(self.git, {'nova/new.py': option}, 'Second\n\nWhy.\n')
        save.save(self.project)
        self.assertRegex(self.faults(), r'0002-Second.*new\.py, line 2 \(cfg')
        self.assertNotRegex(self.faults(), '0001')

    def test_sizes(self):
        self.saved({'nova/new.py': b'1\n' * 601})
        self.saved({'nova/new.py': b'2\n'})
        self.saved({'nova/tests/x.py': b'1\n' * 1200})
        self.assertEqual(
            ['warning: patches/0001-Subject.patch inserts 601 lines, at most '
             '600 are wanted', 'median of inserted lines: 601'],
            check.sizes(self.project))
        self.assertEqual('', self.faults())

    def test_signed_off(self):
        self.saved({'nova/new.py': b'1\n'})
        self.saved({'nova/more.py': b'1\n'},
                   'Second\n\nWhy.\n\nSigned-off-by: A B <a@b>\n')
        self.project = dataclasses.replace(self.project, signed_off=True)
        self.assertRegex(self.faults(), r'\A\S*0001-\S*: no Signed-off-by.*\Z')

    def test_edited_patch_that_git_takes(self):
        patch = self.saved({'nova/a.py': base.BASE['nova/a.py'].replace(
            b'line 20\n', b'ours\n')})
        patch.write_bytes(patch.read_bytes().replace(b'+ours', b'+others'))
        self.assertRegex(self.faults(), r'nova/a\.py is not the same')

    def test_repository_without_a_tree(self):
        self.saved({'nova/new.py': b'1\n', 'nova/a.py': b'2\n'})
        shutil.rmtree(self.project.tree)
        self.assertEqual('', self.faults())

    def test_option_without_a_note(self):
        option = b"x = [\n    cfg.StrOpt('x'),\n]\n"
        self.saved({'nova/a.py': option})
        self.assertRegex(self.faults(), 'no release note')
        self.git.run('reset', '--quiet', '--hard', 'base', worktree=True)
        self.saved({'nova/a.py': option,
                    'releasenotes/notes/x-0123456789abcdef.yaml': b'---\n'})
        self.assertEqual('', self.faults())

    def test_binary_change_of_the_base(self):
        self.saved({'nova/bytes.bin': b'\0\1\2'})
        self.assertRegex(self.faults(), 'binary')

    def test_unsaved_commit(self):
        self.saved({'nova/a.py': b'1\n'})
        self.commit(self.git, {'nova/b.py': b'1\n'})
        self.assertRegex(self.faults(), r'nova/b\.py is not the same')

    def test_gap_in_the_numbers(self):
        patch = self.saved({'nova/a.py': b'1\n'})
        patch.rename(patch.with_name('0003-Subject.patch'))
        self.assertRegex(self.faults(), 'number 0001 is missing')
