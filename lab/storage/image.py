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

"""What the storage machine starts from: a kernel, an initramfs, packages.

The packages are unpacked and never installed: they are laid over the root that
the virtual machine shares with ctl.
"""

import fcntl
import hashlib
import pathlib
import shutil

from .. import packages
from ..guest import image as guest

HERE = pathlib.Path(__file__).resolve().parent
MODULES = ('virtio_ring', 'virtio', 'virtio_pci', 'fuse', 'virtiofs',
           'overlay', 'virtio_blk', 'virtio_net', 'crc32c_generic')
#: Of a merged /usr; packages still have files below the links.
LINKS = ('bin', 'sbin', 'lib', 'lib64')


def fingerprint() -> str:
    digest = hashlib.sha256(' '.join(packages.STORAGE_UNPACKED).encode())
    for path in (HERE / 'image.py', HERE / 'initramfs'):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def ensure(folder: pathlib.Path) -> pathlib.Path:
    """Make vmlinuz, initrd and extras/ unless the folder has them.

    :returns: the folder
    :raises: guest.GuestError; nothing of it is taken for whole then
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / 'fingerprint'
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == fingerprint():
            return folder
        stamp.unlink(missing_ok=True)
        work = folder / 'work'
        shutil.rmtree(work, ignore_errors=True)
        extras = work / 'extras'
        for name in LINKS:
            (extras / 'usr' / name).mkdir(parents=True)
            (extras / name).symlink_to('usr/' + name)
        (folder.parent / 'guest').mkdir(exist_ok=True)
        modules = guest.unpack_kernel(folder.parent / 'guest', work)
        version = modules.name
        shutil.move(modules, extras / 'usr/lib/modules' / version)
        guest.run('depmod', '-b', extras, version)
        for package in _download(folder / 'packages'):
            _unpack(package, extras)
        _initramfs(extras / 'usr/lib/modules' / version, work)
        for name in ('extras', 'vmlinuz', 'initrd'):
            target = folder / name
            if target.is_dir():
                shutil.rmtree(target)
            (work / name).rename(target)
        shutil.rmtree(work)
        stamp.write_text(fingerprint())
    return folder


def _download(folder):
    folder.mkdir(exist_ok=True)

    def found(name):
        return sorted(folder.glob(name + '_*.deb'))

    missing = [name for name in packages.STORAGE_UNPACKED if not found(name)]
    if missing:
        # Root's own download: apt's sandbox user can't write here.
        guest.run('apt-get', 'download', '-q', '-o',
                  'APT::Sandbox::User=root', *missing, cwd=folder)
    return [found(name)[-1] for name in packages.STORAGE_UNPACKED]


def _unpack(package, root):
    archive = guest.run('dpkg-deb', '--fsys-tarfile', package)
    guest.run('tar', '-x', '--keep-directory-symlink', '-C', root,
              input=archive)


def _initramfs(kernel, work):
    root = work / 'root'
    for name in ('bin', 'modules', 'proc', 'sys', 'dev', 'host', 'extras',
                 'new', 'memory'):
        (root / name).mkdir(parents=True)
    shutil.copy('/bin/busybox', root / 'bin')
    order = guest.module_order(kernel, MODULES)
    for path in order:
        shutil.copy(path, root / 'modules')
    (root / 'modules/order').write_text(
        ''.join(path.name + '\n' for path in order))
    shutil.copy(HERE / 'initramfs', root / 'init')
    (root / 'init').chmod(0o755)
    names = '\n'.join(str(path.relative_to(root))
                      for path in sorted(root.rglob('*')))
    archive = guest.run('/bin/busybox', 'cpio', '-o', '-H', 'newc', cwd=root,
                        input=names.encode())
    (work / 'initrd').write_bytes(
        guest.run('gzip', '-1', '-n', input=archive))
