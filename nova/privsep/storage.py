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

"""Put files into the directory of a storage pool.

libvirt makes the pool's directory and its volumes, as root if it likes, so
that the compute service needs a privilege to work in it.
"""

import errno
import os
import stat
import struct

from oslo_concurrency import processutils
from oslo_utils import fileutils

import nova.privsep

# Bytes that are copied at once.
_CHUNK = 1 << 20


def _beside(target: str) -> str:
    """Where a file waits until it takes the name of the target."""
    return os.path.join(os.path.dirname(target),
                        '.%s.incoming' % os.path.basename(target))


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@nova.privsep.sys_admin_pctxt.entrypoint
def link_over(source: str, target: str) -> None:
    """Give a file a second name in place of the file that has it now.

    The target's name never vanishes: rename(2) swaps the file below it.

    :param source: the file's path
    :param target: the path, on the same file system, to put it at
    :raises: OSError, with errno EXDEV across file systems, EPERM, EOPNOTSUPP
        or EMLINK where hard links don't work
    """
    incoming = _beside(target)
    fileutils.delete_if_exists(incoming)
    try:
        os.link(source, incoming, follow_symlinks=False)
        os.rename(incoming, target)
    finally:
        fileutils.delete_if_exists(incoming)
    _sync_directory(os.path.dirname(target))


@nova.privsep.sys_admin_pctxt.entrypoint
def copy_over(source: str, target: str) -> None:
    """Copy a file, holes kept, in place of the file at the target.

    What is at the target stays until the copy is whole and on the disk.

    :param source: the file's path
    :param target: the path to put the copy at
    :raises: processutils.ProcessExecutionError if cp fails (a full disk)
    """
    incoming = _beside(target)
    # A cp that outlives whoever began it may still write to its file.
    fileutils.delete_if_exists(incoming)
    try:
        processutils.execute('cp', '--sparse=always', '--reflink=auto',
                             '--preserve=mode,ownership', '--no-dereference',
                             source, incoming)
        fd = os.open(incoming, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(incoming, target)
    finally:
        fileutils.delete_if_exists(incoming)
    _sync_directory(os.path.dirname(target))


@nova.privsep.sys_admin_pctxt.entrypoint
def copied_bytes(target: str) -> int:
    """How much of a copy under way has arrived.

    :param target: the path that :func:`copy_over` was given
    :returns: allocated bytes, 0 if no copy is under way
    """
    try:
        # stat(2): st_blocks counts units of 512 bytes
        return os.stat(_beside(target), follow_symlinks=False).st_blocks * 512
    except FileNotFoundError:
        return 0


@nova.privsep.sys_admin_pctxt.entrypoint
def same_file(one: str, other: str) -> bool:
    """Whether two paths are names of one file.

    :returns: False also if either is missing or a symbolic link to the other
    """
    try:
        a = os.stat(one, follow_symlinks=False)
        b = os.stat(other, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


@nova.privsep.sys_admin_pctxt.entrypoint
def file_bytes(path: str) -> tuple[int, int]:
    """A regular file's length and what of it is allocated.

    :returns: (length, allocation) in bytes
    :raises: OSError; ValueError if it isn't a regular file
    """
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError('%s is not a regular file' % path)
    return found.st_size, found.st_blocks * 512


@nova.privsep.sys_admin_pctxt.entrypoint
def read_start(path: str, length: int) -> bytes:
    """Read the first bytes of a regular file or block device.

    Nothing else is opened: to open a character device can do something.

    :param length: bytes to read at most
    :raises: OSError; ValueError if it is neither
    """
    fd = os.open(path, os.O_PATH)
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ValueError('%s is neither a file nor a block device' % path)
        # The same one, whatever the path leads to by now.
        with open('/proc/self/fd/%d' % fd, 'rb', buffering=0) as f:
            return f.read(length)
    finally:
        os.close(fd)


@nova.privsep.sys_admin_pctxt.entrypoint
def allocate(path: str, size: int) -> None:
    """Allocate blocks to a file, whose length stays.

    Where there is no room for all of it, nothing is allocated: ext4 would give
    what it has left, and keep that from all others.

    :param size: bytes from the file's begin
    :raises: processutils.ProcessExecutionError where there is no room, or
        the file system can't
    """
    missing = size - os.stat(path).st_blocks * 512
    there = os.statvfs(path)
    if missing > there.f_bavail * there.f_frsize:
        raise processutils.ProcessExecutionError(
            cmd='fallocate', exit_code=1, stderr=os.strerror(errno.ENOSPC))
    processutils.execute('fallocate', '-n', '-l', size, path,
                         env_variables={'LC_ALL': 'C'})


@nova.privsep.sys_admin_pctxt.entrypoint
def write_over(source: str, target: str, sparse: bool) -> None:
    """Write a file's content to the begin of another one that is there.

    The target stays the file that it is, with its owner, mode and at least
    its length.

    :param sparse: leave out what is zeroes, as the target reads so already
    :raises: processutils.ProcessExecutionError (a full disk)
    """
    processutils.execute(
        'dd', 'if=%s' % source, 'of=%s' % target, 'bs=1M', 'status=none',
        'iflag=nofollow', 'oflag=nofollow',
        'conv=nocreat,notrunc' + (',sparse' if sparse else ''),
        env_variables={'LC_ALL': 'C'})


@nova.privsep.sys_admin_pctxt.entrypoint
def sync(path: str) -> None:
    """Have all that was written to a file or device on the disk.

    :raises: OSError
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@nova.privsep.sys_admin_pctxt.entrypoint
def dig_holes(path: str) -> None:
    """Give back the blocks of a file that hold nothing but zeroes.

    :raises: processutils.ProcessExecutionError where the file system can't
    """
    processutils.execute('fallocate', '--dig-holes', path)


@nova.privsep.sys_admin_pctxt.entrypoint
def wipe(path: str, offset: int, length: int, mode: int) -> None:
    """As :func:`unprivileged_wipe`, of a file that may not be nova's."""
    unprivileged_wipe(path, offset, length, mode)


# This function is deliberately not wrapped in a privsep entrypoint
def unprivileged_wipe(path: str, offset: int, length: int, mode: int) -> None:
    """Let a part of a file read as zeroes, and then others read the file.

    Its blocks are given back where the file system can do that. The file may
    be in use, but for that part.

    :param offset: of the part's first byte
    :param length: of the part, in bytes
    :param mode: the permissions that the file gets when all that is on the
        disk, a number, e.g. 0o644
    :raises: OSError
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        try:
            processutils.execute('fallocate', '--punch-hole', '-o', offset,
                                 '-l', length, path)
        except processutils.ProcessExecutionError:
            for begin in range(offset, offset + length, _CHUNK):
                _write_all(fd, bytes(min(_CHUNK, offset + length - begin)),
                           begin)
        os.fsync(fd)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _write_all(fd, data, position):
    while data:
        count = os.pwrite(fd, data, position)
        data, position = data[count:], position + count


@nova.privsep.sys_admin_pctxt.entrypoint
def names_in(directory: str) -> list[str]:
    """List a directory.

    :raises: OSError
    """
    return os.listdir(directory)


@nova.privsep.sys_admin_pctxt.entrypoint
def backing_files(directory: str) -> dict[str, str]:
    """What the qcow2 headers of a directory's files name as backing file.

    Nothing but these headers is read, and nothing that they name is opened.
    The guest writes the header of a raw disk: this asks for no format.

    :returns: name of the file -> path as the header has it
    :raises: OSError if the directory or one of its files can't be read
    """
    found = {}
    for name in os.listdir(directory):
        try:
            backing = _backing_file(os.path.join(directory, name))
        except FileNotFoundError:
            continue
        if backing:
            found[name] = backing
    return found


def _backing_file(path):
    if not os.path.isfile(path) or os.path.islink(path):
        return None
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), 'rb') as f:
        header = f.read(20)
        if len(header) < 20 or header[:4] != b'QFI\xfb':
            return None
        # QEMU's docs/interop/qcow2.txt: both are big-endian, and a name has
        # at most 1023 bytes.
        offset, length = struct.unpack_from('>QI', header, 8)
        if not offset or length > 1023:
            return None
        name = os.pread(f.fileno(), length, offset).decode(
            errors='replace') if offset < 1 << 62 else ''
        # A guest may have written it: no path has a null.
        return name if '\0' not in name else None


@nova.privsep.sys_admin_pctxt.entrypoint
def remove(path: str) -> None:
    """Remove one name of a file; already gone is fine.

    :raises: OSError
    """
    fileutils.delete_if_exists(path)


@nova.privsep.sys_admin_pctxt.entrypoint
def copy_as(source: str, target: str, uid: int, gid: int, most: int) -> bool:
    """Copy a file, for its new owner alone; what was at the target goes.

    :param most: bytes that it may have
    :returns: False if there is no such file
    :raises: OSError, of a full disk for example; with errno EFBIG if it is
        longer
    """
    return _copy_as(source, target, uid, gid, most)


@nova.privsep.sys_admin_pctxt.entrypoint
def copy_as_its_directory(source: str, target: str, most: int) -> bool:
    """Copy a file, for the owner of the directory that it comes to.

    :param most: bytes that it may have
    :returns: False if there is no such file
    :raises: OSError, of a full disk for example; with errno EFBIG if it is
        longer
    """
    fileutils.ensure_tree(os.path.dirname(target), mode=0o755)
    owner = os.stat(os.path.dirname(target))
    return _copy_as(source, target, owner.st_uid, owner.st_gid, most)


def _copy_as(source, target, uid, gid, most):
    # QEMU may write to both directories, and put a link there at any moment.
    try:
        read = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as e:
        if e.errno == errno.ELOOP:
            return False
        raise
    with open(read, 'rb') as given:
        if not stat.S_ISREG(os.fstat(read).st_mode):
            return False
        incoming = _beside(target)
        fileutils.delete_if_exists(incoming)
        try:
            write = os.open(
                incoming, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(write, 'wb') as taken:
                # It may grow while it is copied.
                while chunk := given.read(_CHUNK):
                    if taken.tell() + len(chunk) > most:
                        raise OSError(
                            errno.EFBIG, os.strerror(errno.EFBIG), source)
                    taken.write(chunk)
                os.fchown(write, uid, gid)
            os.rename(incoming, target)
        finally:
            fileutils.delete_if_exists(incoming)
    return True


@nova.privsep.sys_admin_pctxt.entrypoint
def take_tree(path: str, uid: int, gid: int) -> None:
    """Give a directory and what is in it to another user.

    Whoever had it may put a link there at any moment, and chown(2) by path
    would follow that. From here on nobody else can write to it.

    :param path: the directory
    :raises: OSError
    """
    for _root, folders, names, fd in os.fwalk(path):
        os.fchown(fd, uid, gid)
        os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & 0o755)
        for name in folders + names:
            os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)
