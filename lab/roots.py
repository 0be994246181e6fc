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

"""Root directories of other releases of Debian, in which hosts run.

With it come other versions of libvirt and QEMU. Made once by mmdebstrap of the
packages that the machine's own apt reaches; the machine's Python is used.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

from . import config
from . import packages
from .errors import LabError

FOLDER = config.CACHE / 'roots'
RELEASES = ('bookworm', 'trixie', 'sid')
#: What hosts run, at either level; python3 brings what a Python links to.
PACKAGES = tuple(sorted(
    {*packages.HOSTS, *packages.SASL, *packages.SSH, *packages.OVS, 'acl',
     'conntrack', 'dosfstools', 'genisoimage', 'ipset', 'iptables',
     'iputils-ping', 'kmod', 'mtools', 'python3', 'psmisc'} - {'libvirt-dev', 'libvirt-daemon'}))
STAMP = 'lab-packages'
#: Minutes after which a mirror is as good as none.
LIMIT = 6


class Unavailable(LabError):
    """There is no such root, and none can be made from the machine's apt."""


def path(release: str) -> pathlib.Path:
    return FOLDER / release


def ensure(release: str, progress, name: str = '',
           wanted=PACKAGES) -> pathlib.Path:
    """Make the root of a release unless it is there.

    :param release: one of RELEASES
    :param name: of the root, where it isn't the one for hosts
    :param wanted: Debian packages
    :returns: the directory
    :raises: Unavailable
    """
    with one_maker(name or release):
        return _ensure(release, progress, name or release, wanted)


@contextlib.contextmanager
def one_maker(name):
    """Let labs that begin at the same time make a thing once."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / (name + '.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _ensure(release, progress, name, wanted):
    found = path(name)
    stamp = hashlib.sha256(repr(wanted).encode()).hexdigest()
    try:
        if (found / STAMP).read_text() == stamp:
            return found
    except FileNotFoundError:
        pass
    if missing := packages.missing(['mmdebstrap']):
        with progress.step('mmdebstrap'):
            try:
                packages.install(missing)
            except LabError as error:
                raise Unavailable('mmdebstrap can\'t be installed: %s' % error,
                                  error.log) from error
    with progress.step('root of Debian %s' % name):
        new = _make(release, name, wanted)
        (new / STAMP).write_text(stamp)
        shutil.rmtree(found, ignore_errors=True)
        new.rename(found)
    return found


def _make(release, name, wanted):
    source = mirror()
    _check_reach(source, release)
    new = FOLDER / (name + '.new')
    shutil.rmtree(new, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / (name + '.log')
    with open(log, 'w') as out:
        done = subprocess.run(
            # Its mounts are nobody else's, and go with it.
            ['timeout', '--kill-after=10', '%gm' % LIMIT,
             'unshare', '--mount', '--propagation', 'private',
             'mmdebstrap', '--verbose', '--mode=root', '--variant=minbase',
             '--aptopt=APT::Install-Recommends "false"',
             '--aptopt=Acquire::Retries "3"',
             *('--aptopt=' + line for line in _transport()),
             '--include=' + ','.join(wanted),
             # Nothing is installed there later.
             '--customize-hook=rm -rf "$1"/etc/apt/sources.list* '
             '"$1"/etc/apt/apt.conf.d/99mmdebstrap',
             release, new, source], stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'})
    if done.returncode:
        shutil.rmtree(new, ignore_errors=True)
        raise Unavailable(
            'the root of Debian %s could not be made by mmdebstrap%s' % (
                release, ' in %g minutes' % LIMIT
                if done.returncode in (124, 137) else ''), log)
    return new


def mirror() -> str:
    """From where the machine's own apt has its Debian.

    :raises: Unavailable
    """
    found = subprocess.run(
        ['apt-get', 'indextargets', '--format', '$(REPO_URI)',
         'Created-By: Packages', 'Origin: Debian', 'Label: Debian'],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True).stdout.split()
    if not found:
        raise Unavailable('apt has no list of packages of Debian, so that no '
                          'root can be made; apt-get update brings it')
    return found[0]


def _check_reach(source, release):
    target = FOLDER / 'InRelease'
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ['/usr/lib/apt/apt-helper', 'download-file', '%s/dists/%s/InRelease' % (
            source.rstrip('/'), release), target],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL)
    target.unlink(missing_ok=True)
    if done.returncode:
        raise Unavailable('the mirror of the machine\'s apt can\'t be reached '
                          'or has no %s' % release)


def _transport():
    """How the machine's apt reaches its mirror: proxies, certificates.

    And whether it takes one that hasn't been brought up to date for a while.
    """
    told = subprocess.run(
        ['apt-config', 'dump', 'Acquire'], stdout=subprocess.PIPE,
        text=True).stdout.splitlines()
    return [line for line in told if line.startswith(
        ('Acquire::http::', 'Acquire::https::', 'Acquire::Retries',
         'Acquire::Check-'))
        and '""' not in line]


def python() -> list[str]:
    """What a root needs of the machine to run this interpreter."""
    version = 'python%d.%d' % sys.version_info[:2]
    kept = [pathlib.Path(sys.prefix).resolve()]
    if sys.base_prefix == '/usr':
        kept += [pathlib.Path('/usr/bin', version),
                 pathlib.Path('/usr/lib', version)]
    else:
        kept.append(pathlib.Path(sys.base_prefix))
    if tree := os.environ.get('LAB_NOVA_TREE'):
        kept.append(pathlib.Path(tree).resolve())
    return sorted({str(each) for each in kept
                   if not each.is_relative_to(config.ROOT)})


def user(release: str, name: str) -> tuple[int, int]:
    """User and group id of a user of a root.

    :raises: KeyError
    """
    for line in (path(release) / 'etc/passwd').read_text().splitlines():
        fields = line.split(':')
        if fields[0] == name:
            return int(fields[2]), int(fields[3])
    raise KeyError(name)
