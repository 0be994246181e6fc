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

"""libvirt's modular daemons, which Debian doesn't ship: compiled once.

From the source of the release's own libvirt, whose libraries and drivers they
use. Kept beside the roots.
"""

import pathlib
import re
import shutil
import subprocess

from . import roots

RELEASE = 'trixie'
FOLDER = roots.FOLDER / (RELEASE + '-modular')
_STAMP = FOLDER / 'version'
#: In the order of their start; virtproxyd, which listens, comes last.
DAEMONS = ('virtsecretd', 'virtnodedevd', 'virtnetworkd', 'virtnwfilterd',
           'virtstoraged', 'virtqemud', 'virtproxyd')
FRONT = 'virtproxyd'
PACKAGES = (
    'gcc', 'libacl1-dev', 'libattr1-dev', 'libblkid-dev', 'libc6-dev',
    'libcap-ng-dev', 'libglib2.0-dev', 'libgnutls28-dev', 'libjson-c-dev',
    'libnl-3-dev', 'libnl-route-3-dev', 'libnuma-dev', 'libpcap0.8-dev',
    'libpciaccess-dev', 'libsasl2-dev', 'libtirpc-dev', 'libudev-dev',
    'libxml2-dev', 'libxml2-utils', 'meson', 'ninja-build', 'pkg-config',
    'python3', 'python3-docutils', 'xsltproc', 'xz-utils')
_OPTIONS = (
    'auto_features=disabled', 'driver_interface=disabled',
    'driver_libvirtd=enabled', 'driver_network=enabled',
    'driver_qemu=enabled', 'driver_remote=enabled', 'driver_secrets=enabled',
    'host_validate=disabled', 'polkit=disabled', 'remote_default_mode=legacy',
    'sasl=enabled', 'secdriver_apparmor=disabled', 'selinux=disabled',
    'storage_dir=enabled', 'storage_fs=enabled', 'tests=disabled',
    'docs=disabled', 'udev=enabled', 'libnl=enabled', 'libpcap=enabled',
    'pciaccess=enabled', 'json_c=enabled', 'numactl=enabled',
    'capng=enabled', 'attr=enabled', 'qemu_user=libvirt-qemu',
    'qemu_group=kvm')
_BUILD = '''
mount --rbind /dev "$1/dev"; mount -t proc proc "$1/proc"
exec chroot "$1" /bin/sh -euc '
# One that was broken off goes on.
if [ "$(cat /src/lab-version 2>/dev/null)" != %(version)s ]; then
rm -rf /src; mkdir /src; cd /src
tar -x --strip-components=1 -f /source.tar.xz
meson setup b --buildtype=release -Dprefix=/usr \
    -Dlibdir=lib/x86_64-linux-gnu -Dsysconfdir=/etc -Dlocalstatedir=/var \
    -Drunstatedir=/run %(options)s
echo %(version)s > lab-version
fi
cd /src
nice ninja -C b -j2 %(targets)s
strip %(built)s
rm -rf /binaries; mkdir /binaries; cp %(built)s /binaries'
'''


def path(name: str) -> pathlib.Path:
    return FOLDER / name


def are_built() -> bool:
    """Whether ensure() has compiled them already, for some version."""
    return _STAMP.exists()


def ensure(progress) -> None:
    """Compile them unless they are there; takes some minutes.

    :raises: roots.Unavailable
    """
    with roots.one_maker(FOLDER.name):
        version = _version()
        if not are_built() or _STAMP.read_text() != version:
            _make(version, progress)


def _make(version, progress):
    build = roots.ensure(RELEASE, progress, RELEASE + '-build', PACKAGES)
    with progress.step('modular daemons of libvirt %s' % version):
        _fetch(version, build / 'source.tar.xz')
        _compile(build, version)
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(build / 'binaries', FOLDER)
    _STAMP.write_text(version)
    shutil.rmtree(build)


def _version() -> str:
    """Of the release's libvirt, without what Debian adds."""
    told = subprocess.run(
        ['dpkg-query', '--admindir=%s' % (
            roots.path(RELEASE) / 'var/lib/dpkg'), '-W', '-f', '${Version}',
         'libvirt0'], check=True, stdout=subprocess.PIPE, text=True).stdout
    return re.sub(r'-[^-]*$', '', told)


def _fetch(version, target):
    done = subprocess.run(
        ['/usr/lib/apt/apt-helper', 'download-file',
         '%s/pool/main/libv/libvirt/libvirt_%s.orig.tar.xz' % (
             roots.mirror().rstrip('/'), version), target],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL)
    if done.returncode:
        raise roots.Unavailable('the source of libvirt %s is not to be had '
                                'from the mirror of the machine\'s apt' %
                                version)


def _compile(build, version):
    log = roots.FOLDER / (RELEASE + '-build.log')
    names = {'targets': ' '.join('src/' + name for name in DAEMONS),
             'built': ' '.join('b/src/' + name for name in DAEMONS),
             'options': ' '.join('-D' + option for option in _OPTIONS),
             'version': version}
    with open(log, 'a') as out:
        done = subprocess.run(
            ['unshare', '--mount', '--propagation', 'private', 'sh', '-euc',
             _BUILD % names, 'sh', build], stdout=out,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise roots.Unavailable('libvirt\'s modular daemons could not be '
                                'compiled', log)
