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

POLICY = pathlib.Path('/usr/sbin/policy-rc.d')
# SQLAlchemy 2.1 fails Nova 34.0.0's own database tests.
CONSTRAINTS = ('SQLAlchemy<2.1',)
# Beside what Nova's own requirement files name.
EXTRA = ('libvirt-python', 'Cython>=3.0', 'setuptools', 'wheel', 'pbr',
         'flake8', 'mypy', 'types-paramiko', 'types-requests', 'hypothesis', 'build')


class NotReady(Exception):
    """What is missing and the command that mends it."""


def packages(listing: pathlib.Path) -> list[str]:
    """Names of the Debian packages in a bindep file."""
    return [line.split()[0] for line in listing.read_text().splitlines()
            if line.strip() and not line.startswith('#')]


def system(listing: pathlib.Path, log: pathlib.Path) -> None:
    """Install the system packages that are missing.

    :raises: NotReady where this process may not, with the command to run
    """
    wanted = packages(listing)
    done = subprocess.run(
        ['dpkg-query', '-W', '-f', '${Package} ${db:Status-Status}\n', *wanted],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    there = {line.split()[0] for line in done.stdout.splitlines()
             if line.endswith(' installed')}
    missing = [name for name in wanted if name not in there]
    if not missing:
        return
    install = ['apt-get', 'install', '-y', '--no-install-recommends', *missing]
    if os.geteuid() != 0 or not shutil.which('apt-get'):
        raise NotReady('packages are missing; run: sudo %s' % ' '.join(install))
    if not POLICY.exists():
        POLICY.write_text('#!/bin/sh\nexit 101\n')
        POLICY.chmod(0o755)
        print('wrote %s: no daemon of a package starts by itself' % POLICY)
    with open(log, 'w') as out:
        for command in (['apt-get', 'update'], install):
            _call(command, out, env={'DEBIAN_FRONTEND': 'noninteractive'})


def venv(root: pathlib.Path, tree: pathlib.Path, log: pathlib.Path) -> None:
    """Make .venv/ with all that Nova and its tests need, once."""
    path = root / '.venv'
    files = [tree / 'requirements.txt', tree / 'test-requirements.txt']
    stamp = path / 'requirements.sha256'
    sums = hashlib.sha256(b''.join(f.read_bytes() for f in files) + repr(
        (EXTRA, CONSTRAINTS, sys.version)).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == sums:
        return
    with open(log, 'w') as out:
        _call([sys.executable, '-m', 'venv', '--clear', path], out)
        pip = [path / 'bin/python', '-m', 'pip', 'install', '--quiet',
               '--disable-pip-version-check']
        _call([*pip, '--upgrade', 'pip', 'setuptools', 'wheel'], out)
        _call([*pip, *CONSTRAINTS, *EXTRA,
               *(arg for f in files for arg in ('-r', f))], out)
    stamp.write_text(sums)


def extensions(root: pathlib.Path, tree: pathlib.Path,
               log: pathlib.Path) -> None:
    """Compile the series' extensions in the tree, if it has any."""
    sources = list(tree.glob('nova/**/*.pyx'))
    if not sources:
        return
    newest = max(f.stat().st_mtime for f in [
        *sources, *tree.glob('nova/**/*.pxd'), tree / 'setup.py'])
    built = list(tree.glob('nova/**/*.so'))
    if built and min(f.stat().st_mtime for f in built) > newest:
        return
    with open(log, 'w') as out:
        _call([root / '.venv/bin/python', 'setup.py', '--quiet', 'build_ext',
               '--inplace'], out, cwd=tree,
              env={'PBR_VERSION': nova_version(tree)})


def nova_version(tree: pathlib.Path) -> str:
    found = re.search(r'^Version: (\S+)$', (tree / 'PKG-INFO').read_text(),
                      re.M)
    assert found, 'PKG-INFO has no version'
    return found.group(1)


def _call(command, out, env=None, cwd=None):
    out.write('+ %s\n' % ' '.join(map(str, command)))
    out.flush()
    done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT,
                          stdin=subprocess.DEVNULL, cwd=cwd,
                          env={**os.environ, **(env or {})})
    if done.returncode:
        tail = pathlib.Path(out.name).read_text(
            errors='replace').splitlines()[-30:]
        raise NotReady('%s failed (log: %s):\n%s' % (
            ' '.join(map(str, command))[:200], out.name, '\n'.join(tail)))
