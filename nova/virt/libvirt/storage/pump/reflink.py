# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.
"""What has changed in a file, where its file system shares blocks of files.

XFS and Btrfs give a file a clone that has the same blocks. Who writes to
either of them then gets new blocks for that, and those which both have can be
had by nobody else as long as they have them. So what lies at the same place in
both is what was there when the clone was made, and needn't be read to know it.

As worker.py, this is loaded by its path, and nothing of Nova is imported.
"""

import fcntl
import os
import struct

# linux/fs.h and linux/fiemap.h
FICLONE = 0x40049409
FS_IOC_FIEMAP = 0xc020660b
FIEMAP_FLAG_SYNC = 1
EXTENT_LAST = 0x1
# It reads as zeroes, as a hole does.
EXTENT_UNWRITTEN = 0x800
# UNKNOWN, DELALLOC, ENCODED, DATA_ENCRYPTED, NOT_ALIGNED, DATA_INLINE and
# DATA_TAIL: the place says nothing of the content.
EXTENT_SAYS_NOTHING = 0x78e

_HEADER = struct.Struct('=QQLLLL')
_EXTENT = struct.Struct('=QQQQQLLLL')
_AT_ONCE = 4096
# A file in more pieces is read: that takes no longer.
_MOST_EXTENTS = 500000
# Bytes that the file system keeps for others, whatever a guest writes.
_SPARE = 1 << 30


class Clone:
    """A file without a name: with the process it is gone.

    :param fd: its file descriptor, which is taken over
    """

    def __init__(self, fd: int):
        self._fd: int | None = fd

    def close(self) -> None:
        """Give back its blocks; as often as wanted."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def check_room(self) -> None:
        """Give it up if others need the room.

        What is written over in the file needs new room while there is a clone.
        """
        if self._fd is not None and _free(self._fd) < _SPARE:
            self.close()

    def changed(self, fd: int, length: int) -> list[tuple[int, int]] | None:
        """What may have changed in the file.

        :param fd: file descriptor of the file; nobody writes to it any more
        :param length: bytes that it has now
        :returns: (offset, length) in bytes, in order; None if nothing can be
            told
        """
        if self._fd is None or (
                os.fstat(fd).st_dev != os.fstat(self._fd).st_dev):
            return None
        try:
            return differences(extents(self._fd), extents(fd), length)
        except OSError:
            return None


def clone(fd: int, directories) -> Clone | None:
    """Clone a file that a guest may write to.

    :param fd: its file descriptor
    :param directories: paths, the first one that will do is taken: it has to
        be on the same file system and writable
    :returns: None if there can't be one, or too little room for a guest that
        writes all of the file anew
    """
    found = os.fstat(fd)
    for directory in directories:
        new = None
        try:
            new = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC,
                          0o600)
            if _free(new) >= found.st_blocks * 512 + _SPARE:
                fcntl.ioctl(new, FICLONE, fd)
                found_clone, new = Clone(new), None
                return found_clone
        except OSError:
            # Of another file system, one that can't do it, or not ours.
            continue
        finally:
            if new is not None:
                os.close(new)
    return None


def _free(fd):
    found = os.fstatvfs(fd)
    return found.f_bavail * found.f_frsize


def extents(fd: int) -> list[tuple[int, int, int, int]]:
    """Where a file lies.

    :returns: (offset, place, length, flags) of each piece, in bytes and in
        order
    :raises: OSError if the file system doesn't tell, or of too many pieces
    """
    found: list[tuple[int, int, int, int]] = []
    start = 0
    while len(found) <= _MOST_EXTENTS:
        data = bytearray(_HEADER.size + _AT_ONCE * _EXTENT.size)
        _HEADER.pack_into(data, 0, start, (1 << 63) - start, FIEMAP_FLAG_SYNC,
                          0, _AT_ONCE, 0)
        fcntl.ioctl(fd, FS_IOC_FIEMAP, data)
        count = _HEADER.unpack_from(data)[3]
        for number in range(count):
            offset, place, length, _a, _b, flags, *_c = _EXTENT.unpack_from(
                data, _HEADER.size + number * _EXTENT.size)
            found.append((offset, place, length, flags))
        if not count or found[-1][3] & EXTENT_LAST:
            return found
        start = found[-1][0] + found[-1][2]
    raise OSError('more than %d extents' % _MOST_EXTENTS)


_ZEROES, _UNKNOWN = object(), object()


def _pieces(found, bounds):
    # Of each piece between two bounds: its place, or one of the two above.
    waiting = iter(found)
    offset, place, length, flags = next(waiting, (bounds[-1], 0, 0, 0))
    for start in bounds[:-1]:
        while offset + length <= start and offset < bounds[-1]:
            offset, place, length, flags = next(
                waiting, (bounds[-1], 0, 0, 0))
        if flags & EXTENT_SAYS_NOTHING and start >= offset:
            yield _UNKNOWN
        elif flags & EXTENT_UNWRITTEN or start < offset:
            yield _ZEROES
        else:
            yield place + start - offset


def differences(before, after, length: int) -> list[tuple[int, int]]:
    """Where two files may have another content.

    :param before: extents() of the one
    :param after: extents() of the other
    :param length: bytes that are looked at
    :returns: (offset, length) in bytes, in order
    """
    bounds = sorted({0, length, *(
        min(bound, length) for offset, _place, size, _flags in
        (*before, *after) for bound in (offset, offset + size))})
    found: list[tuple[int, int]] = []
    for start, end, one, other in zip(
            bounds, bounds[1:], _pieces(before, bounds),
            _pieces(after, bounds)):
        if one is not _UNKNOWN and one == other:
            continue
        if found and sum(found[-1]) == start:
            start = found.pop()[0]
        found.append((start, end - start))
    return found
