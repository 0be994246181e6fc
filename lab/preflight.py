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

"""What must hold before anything is touched."""

import os
import pathlib
import shutil

from . import config
from . import lock
from . import modular
from . import network
from .errors import LabError


def distribution() -> tuple[str, str]:
    """ID and version of /etc/os-release, see os-release(5)."""
    fields = {}
    try:
        for line in pathlib.Path('/etc/os-release').read_text().splitlines():
            key, _equals, value = line.partition('=')
            fields[key] = value.strip('"')
    except FileNotFoundError:
        pass
    return fields.get('ID', 'unknown'), fields.get('VERSION_ID', '')


def available_memory() -> int:
    """Bytes; MemAvailable of proc_meminfo(5)."""
    for line in pathlib.Path('/proc/meminfo').read_text().splitlines():
        if line.startswith('MemAvailable:'):
            return int(line.split()[1]) * 1024
    return 0


def check_user() -> None:
    """:raises: LabError where this process can't make namespaces"""
    if os.geteuid():
        raise LabError('the lab makes namespaces and mounts, which takes '
                       'root; run it with sudo')
    name, version = distribution()
    if (name, version) != ('debian', '12'):
        raise LabError('the lab is for Debian 12, this is %s %s' % (
            name, version))


def check(options, leftover: bool) -> None:
    """Refuse what can't succeed.

    :param leftover: there are remains of this lab, which `up` will remove
    :raises: LabError, one line
    """
    check_user()
    if options.modular and options.host_root != modular.RELEASE:
        raise LabError('modular daemons are compiled for Debian %s alone; add '
                       '--host-root %s' % (modular.RELEASE, modular.RELEASE))
    taken = network.existing()
    if taken and not leftover:
        raise LabError('the network namespace %s is in use%s; end that, or '
                       'choose another name with LAB_NAME' % (
                           config.netns(taken[0]), _user_of(taken[0])))
    need = config.NEEDED_MEMORY[options.level] + (
        options.memory and config.DISKS_IN_MEMORY) + (
        config.STORAGE_MEMORY if 'vm' in options.storage else 0) + (
        config.CEPH_MEMORY if 'ceph' in options.storage else 0)
    have = available_memory()
    if have < need:
        raise LabError('level %s takes %d MiB of memory, %d MiB are '
                       'available' % (options.level, need >> 20, have >> 20))
    need = config.NEEDED_DISK[options.level]
    have = shutil.disk_usage(config.ROOT).free
    if have < need:
        raise LabError('level %s takes %d MiB on the disk of %s, %d MiB are '
                       'free' % (options.level, need >> 20, config.ROOT,
                                 have >> 20))
    if not pathlib.Path('/dev/loop-control').exists():
        raise LabError('there is no /dev/loop-control: hosts keep '
                       '/var/lib/nova in a file (modprobe loop)')


def _user_of(machine: str) -> str:
    pids = network.pids(machine)
    return ' by %s' % lock.describe(pids[0]) if pids else ''
