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

"""Make the test guest's disk image from Debian's cloud kernel and busybox.

The image has a partition table (Glance and Nova refuse raw data whose boot
sector is none), a FAT partition with SYSLINUX for BIOS and UEFI, kernel and
initramfs, and an ext4 partition which the guest grows to the end of its disk at every boot.
"""

import fcntl
import hashlib
import pathlib
import shutil
import subprocess

from ..errors import LabError

HERE = pathlib.Path(__file__).resolve().parent
MIB = 1 << 20
SIZE = 56 * MIB             # of the whole image
BOOT = (1 * MIB, 39 * MIB)  # offset and size of the FAT partition
DATA = (40 * MIB, 15 * MIB)
MODULES = (
    'button', 'evdev', 'virtio_pci', 'virtio_blk', 'virtio_net', 'ata_piix',
    'sd_mod', 'sr_mod', 'virtio_scsi', 'virtio-rng', 'nls_cp437', 'nls_ascii',
    'nls_utf8', 'vfat', 'isofs', 'crc32c_generic', 'ext4', 'efivarfs')
PROGRAMS = ('/usr/sbin/resize2fs', '/usr/sbin/e2fsck', '/usr/sbin/blkid',
            '/usr/bin/fallocate', '/usr/sbin/dropbear', '/usr/bin/dropbearkey')
OURS = ('init', 'network')  # scripts, beside this file
ACCOUNTS = {'passwd': 'root:x:0:0:root:/root:/bin/sh\n', 'group': 'root:x:0:\n',
            'shadow': 'root:*:19000:0:99999:7:::\n', 'shells': '/bin/sh\n'}
KERNEL_PACKAGE = 'linux-image-cloud-amd64'
# tsc, timer and mitigations: seconds of the boot under emulation.
#: SYSLINUX for UEFI, where firmware looks for it.
EFI = {'BOOTX64.EFI': '/usr/lib/SYSLINUX.EFI/efi64/syslinux.efi',
       'ldlinux.e64': '/usr/lib/syslinux/modules/efi64/ldlinux.e64'}
COMMAND_LINE = ('console=ttyS0 panic=-1 quiet loglevel=1 tsc=unstable '
                'no_timer_check mitigations=off random.trust_cpu=on')
SYSLINUX = """\
DEFAULT l
PROMPT 0
TIMEOUT 0
LABEL l
 KERNEL /vmlinuz
 INITRD /initrd
 APPEND %s
""" % COMMAND_LINE


class GuestError(LabError):
    """The guest image could not be made; says which step and why."""


def run(*argv, cwd=None, input=None, **kwargs):
    argv = [str(word) for word in argv]
    done = subprocess.run(
        argv, cwd=cwd, input=input, capture_output=True, **kwargs)
    if done.returncode:
        raise GuestError('guest image: "%s" ended with %d: %s' % (
            ' '.join(argv), done.returncode,
            done.stderr.decode(errors='replace').strip()[-500:]))
    return done.stdout


def fingerprint() -> str:
    """What the image depends on: sources of ours, not the kernel's version."""
    digest = hashlib.sha256()
    for path in (HERE / 'image.py', HERE / 'pattern.c',
                 *(HERE / name for name in OURS)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_made(folder: pathlib.Path) -> bool:
    stamp = pathlib.Path(folder) / 'fingerprint'
    return stamp.exists() and stamp.read_text() == fingerprint()


def ensure(folder: pathlib.Path) -> pathlib.Path:
    """Make the image unless the folder has it.

    :param folder: where guest.raw, guest.qcow2, vmlinuz and initrd are kept
    :returns: the folder
    :raises GuestError: a step failed; nothing of it is taken for an image
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / 'fingerprint'
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_made(folder):
            return folder
        stamp.unlink(missing_ok=True)
        made_of = fingerprint()  # a source may change while this goes on
        work = folder / 'work'
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        kernel = unpack_kernel(folder, work)
        _initramfs(kernel, work)
        _disk(work)
        for name in ('guest.raw', 'guest.qcow2', 'vmlinuz', 'initrd',
                     'pattern'):
            (work / name).replace(folder / name)
        shutil.rmtree(work)
        stamp.write_text(made_of)
    return folder


def unpack_kernel(folder, work):
    """Unpack Debian's kernel package; it need not be installed.

    :param folder: where the package is kept
    :param work: where vmlinuz comes
    :returns: the folder of its modules
    """
    lines = run('apt-cache', 'depends', KERNEL_PACKAGE).decode().split('\n')
    package = next((line.split()[1] for line in lines
                    if line.strip().startswith('Depends:')), None)
    if package is None:
        raise GuestError('guest image: apt knows no %s: run "apt-get update"'
                         % KERNEL_PACKAGE)
    # The package is kept, so that a changed init needs no network.
    found = sorted(folder.glob(package + '_*.deb'))
    if not found:
        # Root's own download: apt's sandbox user can't write here.
        run('apt-get', 'download', '-q', '-o', 'APT::Sandbox::User=root',
            package, cwd=folder)
        found = sorted(folder.glob(package + '_*.deb'))
    run('dpkg', '-x', found[-1], work / 'kernel')
    shutil.copy(next((work / 'kernel/boot').glob('vmlinuz-*')),
                work / 'vmlinuz')
    return next((work / 'kernel/lib/modules').iterdir())


def module_order(kernel, names=MODULES):
    """Modules and all they depend on, in order of loading."""
    files = {path.stem.replace('-', '_'): path
             for path in (kernel / 'kernel').rglob('*.ko')}
    order = []

    def want(name):
        path = files.get(name.replace('-', '_'))
        if path is None or path in order:
            return
        depends = run('modinfo', '-F', 'depends', path).decode().strip()
        for other in filter(None, depends.split(',')):
            want(other)
        order.append(path)

    for name in names:
        want(name)
    return order


def _libraries(program):
    for line in run('ldd', program).decode().split('\n'):
        for word in line.split():
            if word.startswith('/'):
                yield pathlib.Path(word)


def _initramfs(kernel, work):
    root = work / 'root'
    for folder in ('bin', 'sbin', 'etc', 'proc', 'sys', 'dev', 'lib/modules',
                   'lib64', 'root', 'usr/bin', 'usr/sbin'):
        (root / folder).mkdir(parents=True)
    shutil.copy('/bin/busybox', root / 'bin')
    modules = module_order(kernel)
    for path in modules:
        shutil.copy(path, root / 'lib/modules')
    (root / 'etc/modules').write_text(
        ''.join('%s\n' % path.stem for path in modules))
    for program in PROGRAMS:
        # /bin comes first in PATH and "busybox --install" leaves files alone.
        shutil.copy(program, root / 'bin')
        for library in _libraries(program):
            target = 'lib64' if library.name.startswith('ld-') else 'lib'
            shutil.copy(library, root / target / library.name)
    run('gcc', '-O2', '-static', '-o', work / 'pattern', HERE / 'pattern.c')
    shutil.copy(work / 'pattern', root / 'bin')
    for name, place in zip(OURS, ('init', 'bin/network'), strict=True):
        shutil.copy(HERE / name, root / place)
        (root / place).chmod(0o755)
    for name, content in ACCOUNTS.items():
        (root / 'etc' / name).write_text(content)
    names = '\n'.join(str(path.relative_to(root))
                      for path in sorted(root.rglob('*')))
    archive = run('/bin/busybox', 'cpio', '-o', '-H', 'newc', cwd=root,
                  input=names.encode())
    (work / 'initrd').write_bytes(run('gzip', '-6', '-n', input=archive))


def _disk(work):
    disk = work / 'guest.raw'
    with open(disk, 'wb') as file:
        file.truncate(SIZE)
    table = ('start=%d, size=%d, type=6, bootable\nstart=%d, size=%d, type=83\n'
             % tuple(value // 512 for value in BOOT + DATA))
    run('/usr/sbin/sfdisk', '-q', '--label', 'dos', disk,
        input=table.encode())
    run('/usr/sbin/mkfs.vfat', '-F', '16', '-n', 'LABBOOT', '--offset',
        BOOT[0] // 512, disk, BOOT[1] // 1024)
    run('/usr/sbin/mkfs.ext4', '-q', '-F', '-L', 'labdata', '-b', '4096',
        '-E', 'offset=%d,lazy_itable_init=1' % DATA[0], disk,
        '%dk' % (DATA[1] // 1024))
    (work / 'syslinux.cfg').write_text(SYSLINUX)
    run('syslinux', '--offset', BOOT[0], '--install', disk)
    with open(disk, 'r+b') as file:
        file.write(pathlib.Path('/usr/lib/syslinux/mbr/mbr.bin')
                   .read_bytes()[:440])
    run('mcopy', '-i', '%s@@%d' % (disk, BOOT[0]), work / 'vmlinuz',
        work / 'initrd', work / 'syslinux.cfg', '::/')
    boot = '%s@@%d' % (disk, BOOT[0])
    run('mmd', '-i', boot, '::/EFI', '::/EFI/BOOT')
    for name, path in EFI.items():
        run('mcopy', '-i', boot, path, '::/EFI/BOOT/' + name)
    run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', disk,
        work / 'guest.qcow2')
