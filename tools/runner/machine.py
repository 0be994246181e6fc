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

"""What a run needs on a machine: system packages, a venv, built extensions."""

import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

from .progress import Line

POLICY = pathlib.Path('/usr/sbin/policy-rc.d')


class NotReady(Exception):
    """What is missing and the command that mends it."""


def packages(listing: pathlib.Path) -> list[str]:
    """Names of the Debian packages in a bindep file."""
    return [line.split()[0] for line in listing.read_text().splitlines()
            if line.strip() and not line.startswith('#')]


def missing(wanted: list[str]) -> list[str]:
    """Those of these Debian packages that are not installed."""
    done = subprocess.run(
        ['dpkg-query', '-W', '-f', '${Package} ${db:Status-Status}\n', *wanted],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    there = {line.split()[0] for line in done.stdout.splitlines()
             if line.endswith(' installed')}
    return [name for name in wanted if name not in there]


def system(listing: pathlib.Path, log: pathlib.Path) -> None:
    """Install the system packages that are missing.

    :raises: NotReady where this process may not, with the command to run
    """
    if not shutil.which('dpkg-query') or not shutil.which('apt-get'):
        print('note: no Debian: see that what bindep.txt lists is installed')
        return
    lacking = missing(packages(listing))
    if not lacking:
        return
    install = ['apt-get', 'install', '-y', '--no-install-recommends', *lacking]
    if os.geteuid() != 0:
        raise NotReady('system packages are missing; run this, then again '
                       'what you ran:\n  sudo apt-get update && sudo %s' %
                       ' '.join(install))
    if not POLICY.exists():
        POLICY.write_text('#!/bin/sh\nexit 101\n')
        POLICY.chmod(0o755)
        print('wrote %s, so that no daemon of a package starts by itself; '
              'remove it when you want them to' % POLICY)
    with open(log, 'w') as out:
        env = {'DEBIAN_FRONTEND': 'noninteractive'}
        step('apt update', ['apt-get', 'update'], out, env)
        step('apt install', install, out, env)


def venv(root: pathlib.Path, tree: pathlib.Path, log: pathlib.Path) -> None:
    """Make .venv/ with all that Nova and its tests need, once."""
    path, tools = root / '.venv', root / 'tools'
    limits = tools / 'constraints.txt'
    files = [file for file in (
        tree / 'requirements.txt', tree / 'test-requirements.txt',
        tools / 'requirements.txt', root / 'lab' / 'requirements.txt')
        if file.exists()]
    stamp = path / 'requirements.sha256'
    sums = hashlib.sha256(b'\0'.join(
        [sys.version.encode(), str(path).encode(),
         *(f.read_bytes() for f in [limits, *files])])).hexdigest()
    if stamp.exists() and stamp.read_text() == sums:
        return
    with open(log, 'w') as out:
        # What is there is brought up to date in place: a lab may run from it.
        step('venv', [sys.executable, '-m', 'venv', *(
            [] if _same_python(path) else ['--clear']), path], out)
        pip = [path / 'bin/python', '-m', 'pip', 'install',
               '--disable-pip-version-check', '--progress-bar', 'off']
        step('pip itself', [*pip, '--upgrade', 'pip'], out)
        step('pip install', [*pip, '-c', limits, *(
            argument for file in files for argument in ('-r', file))], out)
    stamp.write_text(sums)


def _same_python(path):
    try:
        return subprocess.run(
            [path / 'bin/python', '-c', 'import sys; print(sys.version)'],
            capture_output=True, text=True).stdout.strip() == sys.version
    except OSError:
        return False


def extensions(python: pathlib.Path, tree: pathlib.Path,
               log: pathlib.Path) -> None:
    """Compile the series' extensions in a tree, if it has any."""
    sources = list(tree.glob('nova/**/*.pyx'))
    if not sources or 'ext_modules' not in (tree / 'setup.py').read_text():
        return
    newest = max(f.stat().st_mtime for f in [
        *sources, *tree.glob('nova/**/*.pxd'), tree / 'setup.py'])
    built = list(tree.glob('nova/**/*.so'))
    if built and min(f.stat().st_mtime for f in built) > newest:
        return
    with open(log, 'w') as out:
        step('extensions',
             [python, 'setup.py', '--quiet', 'build_ext', '--inplace'],
             out, {'PBR_VERSION': version(tree)}, tree)


def version(tree: pathlib.Path) -> str:
    """The version of the source distribution that a tree was made of."""
    return re.search(r'^Version: (\S+)$', (tree / 'PKG-INFO').read_text(),
                     re.M).group(1)


def step(title, command, out, env=None, cwd=None):
    """Run a program; its line shows the last that it said.

    :param out: a file for all that it says
    :raises: NotReady with the end of that, if it fails
    """
    command = list(map(str, command))
    out.write('+ %s\n' % ' '.join(command))
    out.flush()
    with Line(title) as line, subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=cwd,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})}) as process:
        while True:
            try:
                process.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                line.text = _tail(out, 1)[:60]
        line.text = 'failed' if process.returncode else 'done'
    if process.returncode:
        raise NotReady('%s failed (log: %s):\n%s' % (
            ' '.join(command)[:200], out.name, _tail(out, 30)))


def _tail(out, number):
    text = pathlib.Path(out.name).read_text(errors='replace').rstrip()
    return '\n'.join(text.splitlines()[-number:])
