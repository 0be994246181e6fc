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

"""The unit tests on the Python of the next Debian.

In a root of its own (lab/roots.py): what is compiled and installed there goes
by that release's compiler, libvirt and Python alone.
"""

import pathlib
import shutil
import subprocess

from . import machine

RELEASE = 'trixie'
NAME = 'trixie-python'
PACKAGES = ('gcc', 'genisoimage', 'git', 'libc6-dev', 'libnbd-dev',
            'libssl-dev', 'libvirt-dev', 'nbdkit', 'pkg-config',
            'python3-dev', 'python3-venv', 'qemu-utils')
PYTHON = '/venv/bin/python'
# In that root, the project's own.
TOOLS = '/src-tools/'


class Unavailable(Exception):
    """Why there is no such root."""


def prepare(project: pathlib.Path, tree: pathlib.Path, no_root: int) -> tuple:
    """Make root, environment and extension; the tree's files are copied.

    :param no_root: exit status of lab/lab where the root can't be had
    :returns: the command that is the interpreter; it runs in the copy
    :raises: Unavailable, machine.NotReady
    """
    done = subprocess.run(
        [project / 'lab/lab', 'root', RELEASE, NAME, *PACKAGES],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)
    if done.returncode == no_root:
        raise Unavailable(done.stderr.strip().splitlines()[0].removeprefix(
            'error: '))
    if done.returncode:
        raise machine.NotReady(done.stderr)
    root = pathlib.Path(done.stdout.strip().splitlines()[-1])
    enter = (str(project / 'tools/runner/in_root.sh'), str(root))
    log = project / 'build/log/newer-python.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    _copy(tree, root / 'src')
    _copy(project / 'tools', root / 'src-tools')
    with open(log, 'w') as out:
        pip = [*enter, PYTHON, '-m', 'pip', 'install', '--quiet',
               '--disable-pip-version-check']
        if not (root / 'venv').exists():
            machine.step('venv', [*enter, 'python3', '-m', 'venv', '/venv'],
                         out)
        machine.step('pip install', [
            *pip, '-c', TOOLS + 'constraints.txt', '-r',
            'requirements.txt', '-r', 'test-requirements.txt', '-r',
            TOOLS + 'requirements.txt'], out)
        machine.step('extensions', [
            *enter, PYTHON, 'setup.py', '--quiet', 'build_ext', '--inplace'],
            out, {'PBR_VERSION': machine.version(tree)})
    return (*enter, PYTHON)


def _copy(source, target):
    """Copy what git knows of a checkout, as it is now."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    names = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others',
         '--exclude-standard'], cwd=source, check=True,
        stdout=subprocess.PIPE, text=True).stdout.split('\0')
    for name in filter(None, names):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
