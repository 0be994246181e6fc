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

"""The virtual environments in which the cloud's services run.

They live beside the lab's state and outlast "down": making them takes about
two minutes. Nova has one of its own, so that what it imports is Nova's
requirements alone; Neutron has one because most labs need none.
"""

import concurrent.futures
import fcntl
import hashlib
import os
import pathlib
import subprocess
import sys

from ..errors import LabError

# SQLAlchemy 2.1 fails Nova 34.0.0's own database tests.
SERVICES = (
    'SQLAlchemy<2.1', 'keystone==30.0.0', 'glance==33.0.0',
    'openstack-placement==16.0.0', 'python-openstackclient', 'osc-placement',
    'PyMySQL', 'python-memcached', 'pymemcache', 'uwsgi')
NOVA = (
    'SQLAlchemy<2.1', 'nova==34.0.0', 'libvirt-python', 'PyMySQL',
    'python-memcached', 'pymemcache', 'uwsgi')
NETWORK = ('SQLAlchemy<2.1', 'neutron==29.0.0', 'PyMySQL',
           'python-memcached', 'pymemcache', 'uwsgi')


class VenvError(LabError):
    """pip failed; names the log and its last lines."""


def ensure(folder: pathlib.Path, step, network: bool = False) -> None:
    """Make the environments unless they are there.

    :param folder: holds "services", "nova" and "network"
    :param step: the lab's context manager for a step with elapsed time
    :param network: Neutron's too
    :raises VenvError: what pip said
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [(name, wanted) for name, wanted in (
            ('services', SERVICES), ('nova', NOVA),
            *([('network', NETWORK)] if network else []))
            if not _there(folder / name, wanted)]
        if not missing:
            return
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for done in [pool.submit(_make, folder / name, wanted, step)
                         for name, wanted in missing]:
                done.result()


def ensure_one(folder: pathlib.Path, name: str, wanted, step) -> None:
    """Make another environment beside these unless it is there.

    :param wanted: what pip installs into it
    :param step: see ensure()
    :raises VenvError: what pip said
    """
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _there(folder / name, wanted):
            _make(folder / name, wanted, step)


def _sum(wanted):
    return hashlib.sha256(repr((wanted, sys.version_info[:2])).encode()).hexdigest()


def _there(path, wanted):
    stamp, script = path / 'requirements.sha256', path / 'bin/pip'
    return (stamp.exists() and stamp.read_text() == _sum(wanted) and
            # Its commands name their interpreter: one that was moved has
            # none.
            script.exists() and str(path) in script.read_text()[:500])


def _make(path, wanted, step):
    log = path.with_name(path.name + '.log')
    with step('virtual environment: %s' % path.name), open(log, 'w') as out:
        pip = [path / 'bin/python', '-m', 'pip', 'install', '--quiet',
               '--disable-pip-version-check']
        for command in (
                [sys.executable, '-m', 'venv', '--clear', path],
                [*pip, '--upgrade', 'pip', 'setuptools', 'wheel'],
                [*pip, *wanted]):
            done = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, 'PYTHONWARNINGS': 'ignore'})
            if done.returncode:
                raise VenvError('%s failed' % (
                    ' '.join(map(str, command[:6]))), log)
        (path / 'requirements.sha256').write_text(_sum(wanted))
