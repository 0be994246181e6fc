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

import os
import pathlib
import re
import shutil
import subprocess
import sys

from . import counting

ROOT = pathlib.Path(__file__).resolve().parents[2]
TREE = ROOT / 'tree'

# Nova's unit tests that the series can affect.
UNIT = ['nova.tests.unit.' + name for name in (
    'virt.libvirt', 'virt.test_block_device', 'virt.test_fake',
    'virt.test_imagecache', 'virt.test_virt_drivers', 'objects',
    'db.main', 'compute.test_compute_mgr', 'compute.test_api', 'conf',
    'test_conf', 'test_block_device', 'privsep', 'cmd.test_status',
    'cmd.test_manage', 'conductor.tasks.test_cross_cell_migrate',
    'notifications')]
# As tox.ini of Nova sets them for its unit tests.
ENVIRONMENT = {
    'LANGUAGE': 'en_US', 'LC_ALL': 'C.UTF-8', 'OS_STDOUT_CAPTURE': '1',
    'OS_STDERR_CAPTURE': '1', 'OS_TEST_TIMEOUT': '300',
    'PYTHONDONTWRITEBYTECODE': '1', 'OS_DEBUG': '',
    # Native threads, the compute service's default.
    'OS_NOVA_DISABLE_EVENTLET_PATCHING': 'True'}


def touched(tree: pathlib.Path, since: str = 'base') -> list[str]:
    """Files that differ from a commit and are still there."""
    out = subprocess.run(
        ['git', 'diff', '--name-only', '--diff-filter=d', since],
        cwd=tree, stdout=subprocess.PIPE, text=True, check=True).stdout
    return out.split()


def tools(tally):
    counting.stestr(tally, 'tools', ROOT,
                    ['--test-path', 'tools/tests', '--top-dir', 'tools', []],
                    env={'PYTHONPATH': str(ROOT / 'tools')})


def style(tally, tree=TREE, since='base'):
    files = [f for f in touched(tree, since) if f.endswith('.py')
             and not f.startswith(('doc/', 'releasenotes/', 'tools/'))]
    if files:
        counting.command(tally, 'pep8', [
            sys.executable, '-m', 'flake8', *files], tree)
    counting.command(tally, 'mypy', [
        sys.executable, '-m', 'mypy', '--no-error-summary'], tree)
    sources = [f for f in touched(tree, since)
               if f.endswith(('.pyx', '.pxd'))]
    if sources:
        counting.command(tally, 'cython', [
            sys.executable, '-m', 'pycodestyle', '--max-line-length=79',
            '--ignore=E225,E226,E227,E999,E211,E402,W503,W504', *sources], tree)
    counting.command(tally, 'tools pep8', [
        sys.executable, '-m', 'pycodestyle', '--max-line-length=90',
        '--ignore=W503,W504', 'tools', *(['lab'] if (ROOT / 'lab').is_dir() else [])],
        ROOT)


def unit(tally):
    counting.stestr(tally, 'unit', TREE, [
        ['--concurrency', str(os.cpu_count()), counting.modules(UNIT)]],
        env=ENVIRONMENT)


def functional(tally):
    counting.stestr(tally, 'functional', TREE, [
        '--test-path', './nova/tests/functional',
        ['--concurrency', str(os.cpu_count()),
         counting.modules(['nova.tests.functional.libvirt'])]],
        env={**ENVIRONMENT, 'OS_TEST_TIMEOUT': '600'})


def lab(tally):
    entry = ROOT / 'lab' / 'test'
    if not entry.exists():
        return
    if os.geteuid() != 0 or not shutil.which('unshare'):
        tally.skip('lab', 'it makes namespaces, which takes root')
        return
    counting.command(tally, 'lab prepare', [ROOT / 'lab/prepare'], ROOT)
    counting.stestr(tally, 'lab', ROOT, [
        '--test-path', 'lab/tests', '--top-dir', '.',
        ['--concurrency', '1', *_lab_selection()]])


def _lab_selection():
    wanted = os.environ.get('LAB_TESTS', '')
    return [wanted] if wanted else []


def each(tally, everything):
    """Test every commit alone, in a checkout of its own."""
    work = ROOT / 'build' / 'each'
    subprocess.run(['git', 'worktree', 'remove', '--force', work], cwd=TREE,
                   stderr=subprocess.DEVNULL)
    commits = subprocess.run(
        ['git', 'rev-list', '--reverse', 'base..HEAD'], cwd=TREE, check=True,
        stdout=subprocess.PIPE, text=True).stdout.split()
    subprocess.run(['git', 'worktree', 'add', '--quiet', '--detach', work,
                    'base'], cwd=TREE, check=True)
    try:
        for commit in commits:
            subprocess.run(['git', 'checkout', '--quiet', commit], cwd=work,
                           check=True)
            _one_commit(tally, work, commit[:12], everything)
    finally:
        subprocess.run(['git', 'worktree', 'remove', '--force', work],
                       cwd=TREE)


def _one_commit(tally, work, name, everything):
    files = touched(work, 'HEAD^')
    sources = [f for f in files if f.endswith('.py') and
               f.startswith('nova/')]
    if (work / 'setup.py').read_text().count('ext_modules'):
        counting.command(tally, name + ' build', [
            sys.executable, 'setup.py', '--quiet', 'build_ext', '--inplace'],
            work, env={'PBR_VERSION': '34.0.0'})
    if sources:
        counting.command(tally, name + ' pep8', [
            sys.executable, '-m', 'flake8', *sources], work)
        counting.command(tally, name + ' import', [
            sys.executable, '-c', 'import importlib, sys\n'
            'for name in sys.argv[1:]: importlib.import_module(name)',
            *(_module(f) for f in sources if '/tests/' not in f and
              '/migrations/' not in f)], work)
    tests = UNIT if everything else sorted({
        test for f in sources for test in _tests_of(work, f)})
    if tests:
        counting.stestr(tally, name, work, [
            ['--concurrency', str(os.cpu_count()), counting.modules(tests)]],
            env=ENVIRONMENT)


def _module(path):
    return re.sub(r'(/__init__)?\.py$', '', path).replace('/', '.')


def _tests_of(work, path):
    """The unit tests of a module: its own, or those that it is."""
    if path.startswith('nova/tests/unit/'):
        if path.rpartition('/')[2].startswith('test_'):
            yield _module(path)
        return
    folder, _slash, name = path.removeprefix('nova/').rpartition('/')
    test = 'nova/tests/unit/%s/test_%s' % (folder, name)
    if (work / test).exists():
        yield _module(test)
