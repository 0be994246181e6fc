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

"""What is run, in which order; works in the venv."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

from . import counting
from . import machine
from . import newer_python as newer_python_
from . import sanitizer
from .progress import Line

ROOT = pathlib.Path(__file__).resolve().parents[2]
TREE = ROOT / 'tree'
TESTS = tomllib.loads((ROOT / 'tools/series.toml').read_text())['tests']
UNIT = 'nova.tests.unit.'
FUNCTIONAL = 'nova.tests.functional.'
PUMP = 'virt/libvirt/storage/pump'
# Where an interpreter finds what it does first in Nova's tests.
START = 'runner/start'
ENVIRONMENT = {**TESTS['environment'],
               'PYTHONPATH': str(ROOT / 'tools' / START)}
# Exit status of lab/lab prepare where a root of Debian can't be had.
NO_ROOT = 3
WORKERS = ['--concurrency', str(os.cpu_count())]


def test(tally):
    for stage in (tools, style, unit, functional_fast, lab):
        stage(tally)


def tools(tally):
    counting.stestr(tally, 'tools', ROOT,
                    ['--test-path', 'tools/tests', '--top-dir', 'tools'],
                    WORKERS, env={'PYTHONPATH': str(ROOT / 'tools')})


def style(tally, tree=TREE, since='base', title=''):
    """Nova's own pep8 and mypy configuration, on what the series touches."""
    files = touched(tree, since)
    python = [f for f in files if f.endswith('.py')
              and not f.startswith(('doc/', 'releasenotes/', 'tools/'))]
    cython = [f for f in files if f.endswith(('.pyx', '.pxd'))]
    notes = [f for f in files if f.startswith('releasenotes/notes/')]
    if python:
        counting.command(tally, title + 'pep8', [
            sys.executable, '-m', 'flake8', *python], tree)
    if cython:
        counting.command(tally, title + 'cython-lint', [
            pathlib.Path(sys.executable).with_name('cython-lint'),
            '--max-line-length=79', *cython], tree)
    if notes:
        counting.command(tally, title + 'notes', [
            sys.executable, ROOT / 'tools/runner/notes.py', *notes], tree)
    if python:
        counting.command(tally, title + 'mypy', [
            sys.executable, '-m', 'mypy'], tree)
    if tree == TREE:
        counting.command(tally, 'pycodestyle', [
            sys.executable, '-m', 'pycodestyle', '--max-line-length=99',
            *(
                folder for folder in ('tools', 'lab')
                if (ROOT / folder).is_dir())], ROOT)
        _ci_style(tally)


def _ci_style(tally):
    """What runs elsewhere only: the DevStack plugin and the Zuul jobs."""
    scripts = [ROOT / '.ci/run', *sorted((ROOT / 'devstack').glob('*'))]
    counting.command(tally, 'shellcheck', ['shellcheck', *scripts], ROOT)
    counting.command(tally, 'yamllint', [
        'yamllint', '--strict', ROOT / '.zuul.d'], ROOT)


def unit(tally):
    names = [UNIT + name for name in TESTS['unit']]
    names += tests_of(TREE, touched(TREE, 'base'))
    counting.stestr(tally, 'unit', TREE, [], [
        *WORKERS, counting.modules(names)], env=ENVIRONMENT)


def newer_python(tally):
    """The unit stage on the next Debian's Python, compiled there."""
    title = 'unit on %s' % newer_python_.RELEASE
    if reason := _no_lab():
        tally.skip(title, reason)
        return
    try:
        python = newer_python_.prepare(ROOT, TREE, NO_ROOT)
    except newer_python_.Unavailable as error:
        tally.skip(title, str(error))
        return
    except machine.NotReady as error:
        tally.add(title + ' ready', False, str(error))
        return
    names = [UNIT + name for name in TESTS['unit']]
    names += tests_of(TREE, touched(TREE, 'base'))
    counting.stestr(tally, title, TREE, [], [
        *WORKERS, counting.modules(names)], env={
            **ENVIRONMENT, 'PYTHONPATH': newer_python_.TOOLS + START},
        python=python)


def functional(tally):
    _functional(tally, 'functional', TREE,
                [FUNCTIONAL + name for name in TESTS['functional']])


def functional_fast(tally):
    """Some of the functional tests, that have a bit of everything."""
    _functional(tally, 'functional', TREE,
                [FUNCTIONAL + name for name in TESTS['functional_fast']])


def _functional(tally, title, tree, names):
    counting.stestr(tally, title, tree, [
        '--test-path', './nova/tests/functional', '--top-dir', '.'], [
        *WORKERS, counting.modules(names)],
        env={**ENVIRONMENT, 'OS_TEST_TIMEOUT': '600'})


def lab(tally):
    """The scenarios on real hosts, in namespaces."""
    folder = ROOT / 'lab' / 'tests'
    if not folder.is_dir():
        return
    reason = _no_lab()
    if reason:
        tally.skip('lab', reason)
        return
    name = {'LAB_NAME': os.environ.get('LAB_NAME', 'test')}
    full = os.environ.get('LAB_SCENARIOS') == 'all'
    for level, pattern in (('hosts', r'^lab\.tests\.(?!test_cloud)'),
                           ('cloud', r'^lab\.tests\.test_cloud')):
        if os.environ.get('LAB_LEVEL', level) != level:
            continue
        title = 'lab ' + level
        if counting.command(tally, title + ' ready', [
                ROOT / 'lab/lab', 'prepare', '--level', level], ROOT,
                env=name):
            counting.stestr(tally, title, ROOT, [
                '--test-path', 'lab/tests', '--top-dir', '.'], [
                '--concurrency', '1', pattern], env=name)
        if level == 'hosts':
            # In full also on what comes after the next Debian.
            for release in ('trixie', *(['sid'] if full else [])):
                _on_release(tally, release, name, full)


def _on_release(tally, release, name, full):
    """The scenarios that libvirt's version matters to, on another Debian.

    :param full: all moves; else those that meet a full disk, or holes, which
        is where versions of libvirt and QEMU differ
    """
    title = 'lab hosts %s' % release
    env = {**name, 'LAB_HOST_ROOT': release}
    with Line(title + ' ready') as line:
        done = subprocess.run(
            [ROOT / 'lab/lab', 'prepare', '--level', 'hosts'], cwd=ROOT,
            env={**os.environ, **env}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        line.text = 'failed' if done.returncode else 'passed'
    if done.returncode == NO_ROOT:
        tally.skip(title, _reason(done.stdout))
    elif done.returncode:
        tally.add(title + ' ready', False, done.stdout)
    else:
        counting.stestr(tally, title, ROOT, [
            '--test-path', 'lab/tests', '--top-dir', '.'], [
            '--concurrency', '1',
            r'^lab\.tests\.(test_conformance\.|test_moves\.%s)' % (
                '' if full else 'Test(Room|Sizes)')], env=env)


def _reason(told):
    """What a command of the lab says it failed of; a log may follow."""
    lines = told.strip().splitlines()
    return next((line.removeprefix('error: ') for line in lines
                 if line.startswith('error: ')), lines[-1] if lines else '')


def _no_lab():
    """Why this machine can't run the lab; nothing if it can."""
    if os.geteuid():
        return 'it makes namespaces and mounts, which takes root'
    if not shutil.which('unshare') or subprocess.run(
            ['unshare', '--net', '--mount', '--pid', '--fork', 'true'],
            stderr=subprocess.DEVNULL).returncode:
        return 'this machine makes no namespaces (unshare fails)'


def each(tally, everything, first=1, last=None):
    """Test every commit alone, in order, in a checkout of its own.

    What fails is shown before the next one begins: all of them take hours.
    The result of each goes to the notes, which are shown at the end.

    :param everything: all unit tests, not just those of what it touches
    :param first: the number of the commit to begin with
    :param last: the number of the commit to end with
    """
    with _worktree('each', 'base') as work:
        commits = _git('rev-list', '--reverse', 'base..HEAD')
        for number, commit in enumerate(commits[first - 1:last], first):
            _git('checkout', '--quiet', '--force', commit, cwd=work)
            title = _git('log', '-1', f'--format=-- {number:3} %h %s',
                         cwd=work)[0]
            print(title, flush=True)
            before = tally.sums()
            _one_commit(tally, work, commit[:9] + ' ', everything)
            result = title + ': %d passed, %d failed, %d skipped' % tuple(
                now - then for now, then in zip(tally.sums(), before))
            print(result, flush=True)
            tally.show()
            tally.notes.append(result)


def sanitize(tally):
    """The pump's tests, with the pump compiled for each sanitizer."""
    with _worktree('sanitize', 'HEAD') as work:
        for kind in sanitizer.KINDS:
            _one_sanitizer(tally, work, kind)


def _one_sanitizer(tally, work, kind):
    title = kind.name + ' sanitizer'
    with tempfile.TemporaryDirectory() as folder:
        reports = pathlib.Path(folder)
        try:
            python = sanitizer.prepare(
                kind, work, reports, ROOT / 'build/log')
        except machine.NotReady as error:
            tally.add(title, False, str(error))
            return
        counting.stestr(tally, title, work, [
            '--test-path', UNIT.replace('.', '/') + PUMP, '--top-dir', '.'], [
            *WORKERS, *kind.leave_out], env={
                **ENVIRONMENT, **sanitizer.environment(python)})
        found = sanitizer.found(reports)
        tally.add(title + ' reports', not found, found)


@contextlib.contextmanager
def _worktree(name, commit):
    """A checkout of its own, in build/, for as long as it is used."""
    work = ROOT / 'build' / name
    _git('worktree', 'remove', '--force', work, check=False)
    shutil.rmtree(work, ignore_errors=True)
    _git('worktree', 'prune')
    _git('worktree', 'add', '--quiet', '--detach', work, commit)
    try:
        yield work
    finally:
        _git('worktree', 'remove', '--force', work)


def _one_commit(tally, work, title, everything):
    for built in work.glob('nova/**/*.so'):  # of a commit before this one
        if not built.with_name(built.name.split('.')[0] + '.pyx').exists():
            built.unlink()
    try:
        machine.extensions(pathlib.Path(sys.executable), work,
                           ROOT / 'build/log/extensions.log')
    except machine.NotReady as error:
        tally.add(title + 'extensions', False, str(error))
    counting.command(tally, title + 'white space', [
        'git', 'diff', '--check', 'HEAD^', 'HEAD'], work)
    style(tally, work, 'HEAD^', title)
    files = touched(work, 'HEAD^')
    imports = [_module(f) for f in files if f.startswith('nova/')
               and f.endswith('.py')
               and '/tests/' not in f and '/migrations/' not in f]
    if imports:
        counting.command(tally, title + 'import', [
            sys.executable, '-c', 'import importlib, sys\n'
            'for name in sys.argv[1:]: importlib.import_module(name)',
            *imports], work, env=ENVIRONMENT)
    names = tests_of(work, files, of_package=True)
    if everything:
        names += [UNIT + name for name in TESTS['unit']]
    if names:
        counting.stestr(tally, title + 'unit', work, [
            '--test-path', _common_folder(names), '--top-dir', '.'], [
            *WORKERS, counting.modules(names)], env=ENVIRONMENT)
    names = functional_tests_of(work, files)
    if names:
        _functional(tally, title + 'functional', work, names)


def touched(tree: pathlib.Path, since: str) -> list[str]:
    """Files that differ from a commit and are still there."""
    return _git('diff', '--name-only', '--diff-filter=d', since, cwd=tree)


def tests_of(tree: pathlib.Path, files: list[str],
             of_package: bool = False) -> list[str]:
    """The unit tests among files, and those of the modules among them.

    :param of_package: for a module without tests of its own name all tests of
        its package, and for what tests share those that import it
    """
    found = set()
    for path in map(pathlib.PurePath, files):
        if path.suffix != '.py' or path.parts[0] != 'nova':
            continue
        if path.parts[1] != 'tests':
            found |= _tests_of_module(tree, path, of_package)
        elif path.is_relative_to('nova/tests/unit') and path.name.startswith(
                'test_') and (tree / path).exists():
            found.add(path)
        elif of_package:
            found |= _tests_that_import(tree, path, UNIT)
    return sorted(_module(str(path)) for path in found)


def functional_tests_of(tree: pathlib.Path, files: list[str]) -> list[str]:
    """The functional tests among files, and those that import one of them.

    Not those that import a fixture, which nearly all of them do.
    """
    found = set()
    folder = _folder(FUNCTIONAL)
    for path in map(pathlib.PurePath, files):
        if path.suffix != '.py' or not path.is_relative_to(folder):
            continue
        found |= _tests_that_import(tree, path, FUNCTIONAL)
        if path.name.startswith('test_') and (tree / path).exists():
            found.add(path)
    return sorted(_module(str(path)) for path in found)


def _tests_of_module(tree, path, of_package):
    folder = _folder(UNIT).joinpath(*path.parts[1:-1])
    own = folder / ('test_' + path.name)
    if (tree / own).exists():
        return {own}
    return {folder / test.name for test in (tree / folder).glob('test_*.py')
            if of_package}


def _tests_that_import(tree, path, below):
    importing = re.compile(r'^from %s import %s\b' % (
        re.escape(_module(str(path.parent))), re.escape(path.stem)), re.M)
    return {pathlib.PurePath(test.relative_to(tree))
            for test in (tree / _folder(below)).rglob('test_*.py')
            if importing.search(test.read_text())}


def _common_folder(names):
    """Where to look for these tests: discovery imports all that is there."""
    paths = [name.replace('.', '/') for name in names]
    return './' + os.path.commonpath(map(os.path.dirname, paths))


def _folder(package):
    return pathlib.PurePath(package.replace('.', '/'))


def _module(path):
    return re.sub(r'(/__init__)?\.py$', '', path).replace('/', '.')


def _git(*arguments, cwd=TREE, check=True):
    return subprocess.run(
        ['git', *map(str, arguments)], cwd=cwd, check=check, text=True,
        stdout=subprocess.PIPE,
        stderr=None if check else subprocess.DEVNULL).stdout.splitlines()
