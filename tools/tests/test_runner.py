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

"""The runner counts truly, and says what a machine lacks."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

from runner import counting
from runner import machine
from runner import newer_python
from runner import notes
from runner import stages

TESTS = '''
import os, unittest

class TestAll(unittest.TestCase):
    def test_good(self):
        pass

    def test_bad(self):
        self.assertEqual(1, 2, 'the text of the failure')

    @unittest.skip('why')
    def test_skipped(self):
        pass

    @unittest.expectedFailure
    def test_bad_as_expected(self):
        self.fail()
'''
DIES = '''

class TestDies(unittest.TestCase):
    def test_dies(self):
        os.write(2, b'last words')
        os.abort()
'''


class RunnerTest(unittest.TestCase):

    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.top = pathlib.Path(scratch.name)
        self.tally = counting.Tally()
        self.said = io.StringIO()
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(contextlib.redirect_stdout(self.said))

    def sums(self):
        return self.tally.sums()


class TestStestr(RunnerTest):

    def run_tests(self, text, pattern='.'):
        (self.top / 'tests').mkdir()
        (self.top / 'tests/__init__.py').touch()
        (self.top / 'tests/test_x.py').write_text(text)
        counting.stestr(self.tally, 'x', self.top, [
            '--test-path', './tests', '--top-dir', '.'], [
            '--concurrency', '1', pattern], env={'PYTHONPATH': ''})

    def test_sums(self):
        self.run_tests(TESTS)
        self.assertEqual((2, 1, 1), self.sums())
        self.assertEqual(1, self.tally.report())
        self.assertIn('the text of the failure', self.said.getvalue())
        self.assertEqual('2 passed, 1 failed, 1 skipped',
                         self.said.getvalue().splitlines()[-1])

    def test_worker_that_dies(self):
        self.run_tests(TESTS + DIES, 'test_dies')
        self.assertEqual(0, self.tally.passed)
        self.assertEqual(1, self.tally.failed)
        self.assertEqual(1, self.tally.report())
        # What it died of, and where it was.
        for words in 'last words', 'Fatal Python error: Aborted', 'in test_dies':
            self.assertIn(words, self.said.getvalue())

    def test_module_that_can_not_be_imported(self):
        self.run_tests('import no_such_module')
        self.assertEqual(1, self.tally.report())
        self.assertIn('no_such_module', self.said.getvalue())

    def test_pattern_that_finds_nothing(self):
        self.run_tests(TESTS, 'no such test')
        self.assertEqual((0, 1, 0), self.sums())


class TestTally(RunnerTest):

    def test_skipped_stage(self):
        with mock.patch.dict(os.environ, CI=''):
            self.tally.skip('lab', 'no root')
        self.tally.add('x', True)
        self.assertEqual(0, self.tally.report())
        self.assertEqual(['lab skipped: no root',
                          '1 passed, 0 failed, 1 skipped'],
                         self.said.getvalue().splitlines())

    def test_skipped_stage_in_ci(self):
        with mock.patch.dict(os.environ, CI='true'):
            self.tally.skip('lab', 'no root')
        self.assertEqual((0, 1, 0), self.sums())

    def test_nothing_run_is_no_success(self):
        self.assertEqual(1, self.tally.report())

    def test_command(self):
        self.assertFalse(counting.command(
            self.tally, 'x', ['sh', '-c', 'echo why; exit 3'], self.top))
        self.assertEqual([('x', 'why\n')], self.tally.failures)


class TestMachine(RunnerTest):

    def setUp(self):
        super().setUp()
        self.listing = self.top / 'bindep.txt'
        self.listing.write_text('# comment\nno-such-package [platform:dpkg]\n')
        # Also where there is no dpkg.
        for name in ('dpkg-query', 'apt-get'):
            (self.top / name).write_text('#!/bin/sh\nexit 1\n')
            (self.top / name).chmod(0o755)
        path = mock.patch.dict(os.environ, PATH='%s:%s' % (
            self.top, os.environ['PATH']))
        path.start()
        self.addCleanup(path.stop)

    @mock.patch('os.geteuid', return_value=1000)
    def test_not_root_gets_the_command(self, _geteuid):
        with self.assertRaisesRegex(
                machine.NotReady, 'sudo apt-get install .* no-such-package'):
            machine.system(self.listing, self.top / 'log')

    @mock.patch('os.geteuid', return_value=0)
    def test_root_installs_and_keeps_daemons_down(self, _geteuid):
        policy = self.top / 'policy-rc.d'
        (self.top / 'apt-get').write_text('#!/bin/sh\necho "$@"\n')
        with mock.patch.object(machine, 'POLICY', policy):
            machine.system(self.listing, self.top / 'log')
        self.assertIn('exit 101', policy.read_text())
        self.assertIn('wrote %s' % policy, self.said.getvalue())
        self.assertRegex((self.top / 'log').read_text(),
                         '(?s)\nupdate.*\ninstall -y .* no-such-package')

    def test_failed_step_shows_the_end_of_its_log(self):
        with open(self.top / 'log', 'w') as out, self.assertRaisesRegex(
                machine.NotReady, '(?s)failed .*why'):
            machine.step('x', ['sh', '-c', 'echo why; exit 1'], out)


class TestStages(RunnerTest):

    def git(self, tree, *arguments):
        subprocess.run(['git', '-c', 'user.name=x', '-c', 'user.email=x@y',
                        *arguments], cwd=tree, check=True)

    def test_tests_of_a_module_and_of_a_test(self):
        folder = self.top / 'nova/tests/unit/virt'
        folder.mkdir(parents=True)
        (folder / 'test_a.py').touch()
        (folder.parent / 'test_exception.py').touch()
        self.assertEqual(
            ['nova.tests.unit.test_exception', 'nova.tests.unit.virt.test_a'],
            stages.tests_of(self.top, [
                'nova/virt/a.py', 'nova/virt/b.py', 'nova/exception.py',
                'nova/tests/unit/virt/test_a.py', 'doc/a.py', 'setup.py',
                'nova/tests/unit/virt/fake.py']))

    def test_tests_of_a_module_without_its_own(self):
        folder = self.top / 'nova/tests/unit/virt'
        (folder / 'x').mkdir(parents=True)
        for name in ('test_a.py', 'test_b.py', 'fake.py', 'x/test_x.py'):
            (folder / name).touch()
        self.assertEqual(
            ['nova.tests.unit.virt.test_a', 'nova.tests.unit.virt.test_b'],
            stages.tests_of(self.top, ['nova/virt/c.py', 'nova/gone/d.py'],
                            of_package=True))

    def test_tests_that_import_what_they_share(self):
        folder = self.top / 'nova/tests/unit/virt'
        folder.mkdir(parents=True)
        (folder / 'test_a.py').write_text(
            'from nova.tests.fixtures import fake as fake_x\n')
        (folder / 'test_b.py').write_text(
            'from nova.tests.unit.virt import base\n')
        (folder / 'test_c.py').write_text(
            'from nova.tests.fixtures import fake_too\n')
        for path, test in (('nova/tests/fixtures/fake.py', 'test_a'),
                           ('nova/tests/unit/virt/base.py', 'test_b')):
            self.assertEqual(
                ['nova.tests.unit.virt.' + test],
                stages.tests_of(self.top, [path], of_package=True))
            self.assertEqual([], stages.tests_of(self.top, [path]))

    def test_functional_tests(self):
        folder = self.top / 'nova/tests/functional/libvirt'
        folder.mkdir(parents=True)
        for name, text in (
                ('base', ''), ('test_a', 'from {} import base\n'),
                ('test_b', 'from {} import test_a as a\n'),
                ('test_c', 'from {} import base_too\n')):
            (folder / (name + '.py')).write_text(
                text.format('nova.tests.functional.libvirt'))
        for files, tests in (
                (['base.py', 'gone.py', 'test_gone.py'], ['a']),
                (['test_a.py'], ['a', 'b']), (['../../unit/test_d.py'], [])):
            self.assertEqual(
                ['nova.tests.functional.libvirt.test_' + name
                 for name in tests],
                stages.functional_tests_of(self.top, [
                    os.path.normpath('nova/tests/functional/libvirt/' + name)
                    for name in files]))

    def test_start_of_an_interpreter(self):
        """A test that changes what it has read changes nobody else's."""
        done = subprocess.run(
            [sys.executable, '-c', 'import io, yaml\n'
             'for text in ("a: [1]", "a: [1]", io.StringIO("a: [2]")):\n'
             '    read = yaml.safe_load(text)\n'
             '    print(read["a"])\n'
             '    read["a"].append("x")\n'],
            env={**os.environ, **stages.ENVIRONMENT}, stdout=subprocess.PIPE,
            text=True, check=True)
        self.assertEqual('[1]\n[1]\n[2]\n', done.stdout)

    def test_each_of_a_commit_of_documents(self):
        self.git(self.top, 'init', '--quiet')
        for text in ('one\n', 'two\n', 'two \n'):
            (self.top / 'x.rst').write_text(text)
            self.git(self.top, 'add', 'x.rst')
            self.git(self.top, 'commit', '--quiet', '-m', text)
        stages._one_commit(self.tally, self.top, '', False)
        self.assertEqual((0, 1, 0), self.sums())
        self.assertIn('trailing whitespace', self.tally.failures[0][1])
        self.git(self.top, 'checkout', '--quiet', 'HEAD^')
        stages._one_commit(self.tally, self.top, '', False)
        self.assertEqual((1, 1, 0), self.sums())

    def test_each_of_a_range(self):
        tree = self.top / 'tree'
        tree.mkdir()
        self.git(tree, 'init', '--quiet')
        for name in ('base', 'one', 'two', 'three', 'four'):
            (tree / 'name').write_text(name)
            self.git(tree, 'add', 'name')
            self.git(tree, 'commit', '--quiet', '-m', name)
        self.git(tree, 'tag', 'base', 'HEAD~4')
        seen = []

        def one(tally, work, title, everything):
            seen.append((work / 'name').read_text())
            tally.add(title, seen[-1] != 'two', 'why ' + seen[-1])

        with mock.patch.multiple(stages, ROOT=self.top, TREE=tree,
                                 _one_commit=one), (
                mock.patch.dict(stages._git.__kwdefaults__, cwd=tree)), (
                contextlib.redirect_stdout(io.StringIO())) as told:
            stages.each(self.tally, False, 2, 3)
            during = told.getvalue()
            self.assertEqual(1, self.tally.report())
        self.assertEqual(['two', 'three'], seen)
        for note, number, result in zip(self.tally.notes, (2, 3), (
                'two: 0 passed, 1', 'three: 1 passed, 0'), strict=True):
            self.assertRegex(note, f'--   {number} .* {result} failed')
        # What has failed is told before the next commit, and once.
        before, _three = during.split('--   3', 1)
        self.assertIn('why two', before)
        self.assertEqual(1, told.getvalue().count('why two'))
        self.assertEqual([], list((self.top / 'build').iterdir()))

    def test_lab_without_root(self):
        with mock.patch('os.geteuid', return_value=1000), (
                mock.patch.dict(os.environ, CI='')):
            stages.lab(self.tally)
        self.assertEqual((0, 0, 1), self.sums())

    def test_lab_at_one_level(self):
        (self.top / 'lab/tests').mkdir(parents=True)
        for level, releases in (('hosts', ['trixie']), ('cloud', [])):
            with mock.patch.multiple(
                    stages, ROOT=self.top, _no_lab=lambda: None), (
                    mock.patch.object(stages, '_on_release')) as on, (
                    mock.patch.object(stages.counting, 'command',
                                      return_value=False)) as command, (
                    mock.patch.dict(os.environ, LAB_LEVEL=level,
                                    LAB_SCENARIOS='fast')):
                stages.lab(self.tally)
            command.assert_called_once()
            self.assertEqual('lab %s ready' % level, command.call_args[0][1])
            self.assertEqual(releases, [c[0][1] for c in on.call_args_list])

    def test_lab_on_a_release_without_a_root(self):
        """The reason isn't the log that follows it."""
        command = self.top / 'lab' / 'lab'
        command.parent.mkdir()
        command.write_text('#!/bin/sh\necho "error: no mirror" >&2\n'
                           'echo "  E: the log" >&2\nexit 3\n')
        command.chmod(0o755)
        with mock.patch.object(stages, 'ROOT', self.top):
            with mock.patch.dict(os.environ, CI=''):
                stages._on_release(
                    self.tally, 'trixie', {'LAB_NAME': 'x'}, False)
            self.assertEqual((0, 0, 1), self.sums())
            self.assertEqual(['lab hosts trixie skipped: no mirror'],
                             self.tally.notes)
            with mock.patch.dict(os.environ, CI='true'):
                stages._on_release(
                    self.tally, 'trixie', {'LAB_NAME': 'x'}, False)
        self.assertEqual((0, 1, 1), self.sums())

    def test_newer_python_without_a_root(self):
        command = self.top / 'lab' / 'lab'
        command.parent.mkdir()
        command.write_text('#!/bin/sh\necho "error: no mirror" >&2\nexit 3\n')
        command.chmod(0o755)
        with mock.patch.object(stages, 'ROOT', self.top), (
                mock.patch.object(stages, '_no_lab', return_value=None)), (
                mock.patch.dict(os.environ, CI='')):
            stages.newer_python(self.tally)
        self.assertEqual((0, 0, 1), self.sums())
        self.assertEqual(['unit on trixie skipped: no mirror'],
                         self.tally.notes)

    def test_copy_for_the_newer_python(self):
        """What git knows or could know, as it is in the checkout."""
        tree, copy = self.top / 'tree', self.top / 'copy'
        tree.mkdir()
        subprocess.run(['git', 'init', '-q', tree], check=True)
        (tree / '.gitignore').write_text('*.so\n')
        for name in ('known', 'gone', 'new', 'built.so'):
            (tree / name).write_text(name)
        subprocess.run(['git', 'add', 'known', 'gone'], cwd=tree, check=True)
        (tree / 'gone').unlink()
        (tree / 'known').write_text('changed')
        newer_python._copy(tree, copy)
        self.assertEqual(['.gitignore', 'known', 'new'],
                         sorted(path.name for path in copy.iterdir()))
        self.assertEqual('changed', (copy / 'known').read_text())

    def test_notes(self):
        good = self.top / 'x-0123456789abcdef.yaml'
        good.write_text('---\nfeatures:\n  - |\n    Text: more.\n')
        bad = self.top / 'x-0123.yaml'
        bad.write_text('---\nfeature: x\nfixes:\n  - a: b\n')
        self.assertEqual([], notes.faults(str(good)))
        self.assertEqual(3, len(notes.faults(str(bad))))
