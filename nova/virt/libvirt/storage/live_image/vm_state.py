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
"""The state of a guest in a qcow2 file; knows neither Nova nor libvirt.

Reads what an overlay is, and writes a new one over it that holds one internal
snapshot, whose state of the virtual machine is a migration stream of QEMU's.
The format is QEMU's docs/interop/qcow2.txt. In the overlay itself nothing is
allocated: the disk at the moment of the snapshot is its backing file's.
"""

import errno
import os
import struct
import typing as ty

CLUSTER = 1 << 16
# An L2 table has one cluster, and its entries 8 bytes.
_ENTRIES = CLUSTER // 8
_COVERED = _ENTRIES * CLUSTER
# A refcount has 2 bytes.
_REFCOUNTS = CLUSTER // 2
_MAGIC = b'QFI\xfb'
_HEADER = '>4sIQIIQIIQQIIQQQQII'
# In version 2 it ends before the last six numbers.
_HEADER_2 = struct.calcsize('>4sIQIIQIIQQIIQ')
_BACKING_FORMAT = 0xE2792ACA
#: Longer names of backing files QEMU doesn't read.
LONGEST_BACKING = 1023
# Where the kernel can't copy from this file to that one.
_NO_COPY = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_CHUNK = 1 << 20


class Backing(ty.NamedTuple):
    """The backing file of an overlay.

    :ivar path: as it is to stand in the header
    :ivar format: raw or qcow2
    """
    path: str
    format: str


class Stream(ty.NamedTuple):
    """A migration stream in a file.

    :ivar path: of the file
    :ivar offset: of its first byte there
    :ivar length: in bytes
    """
    path: str
    offset: int
    length: int


class Overlay(ty.NamedTuple):
    """What a qcow2 file is.

    :ivar capacity: of the disk, in bytes
    :ivar backing: its Backing; None if it has no backing file
    """
    capacity: int
    backing: Backing | None


def _clusters(count: int, size: int = 1) -> int:
    return -(-count * size // CLUSTER)


class _Layout:
    """Which clusters of the file hold what, by their numbers."""

    def __init__(self, capacity, length):
        self._next = 1  # behind the header
        self.data_clusters = _clusters(length)
        # The state lies behind the disk, at the next L2 table.
        self.disk_tables = -(-capacity // _COVERED)
        self.state_tables = -(-self.data_clusters // _ENTRIES)
        self.l1_length = self.disk_tables + self.state_tables
        self.active_l1 = self._take(_clusters(self.disk_tables, 8))
        self.l1 = self._take(_clusters(self.l1_length, 8))
        self.snapshots = self._take(1)
        self.l2 = self._take(self.state_tables)
        self.data = self._take(self.data_clusters)
        self._count_references()

    def _take(self, count):
        first = self._next
        self._next += count
        return first

    def _count_references(self):
        """The blocks of refcounts count themselves, too."""
        used, self.blocks = self._next, 0
        while True:
            self.blocks += 1
            self.table_clusters = _clusters(self.blocks, 8)
            self.total = used + self.blocks + self.table_clusters
            if self.blocks * _REFCOUNTS >= self.total:
                break
        self.table = self._take(self.table_clusters)
        self.first_block = self._take(self.blocks)


def read(path: str) -> Overlay:
    """Read what an overlay is.

    For a file of which it is known that it was made as one: what somebody
    else has written is neither recognized nor to be trusted.

    :raises: OSError; ValueError if the header can't be read
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), 'rb') as f:
        begin = f.read(CLUSTER)
    try:
        magic, version, name, name_length, _bits, capacity = (
            struct.unpack_from('>4sIQIIQ', begin))
        if magic != _MAGIC or version not in (2, 3):
            raise ValueError('no qcow2 of version 2 or 3')
        if not name:
            return Overlay(capacity, None)
        position = _HEADER_2 if version == 2 else (
            struct.unpack_from('>I', begin, _HEADER_2 + 28)[0])
        kind = None
        while position < name and kind is None:
            extension, length = struct.unpack_from('>II', begin, position)
            position += 8
            if extension == _BACKING_FORMAT:
                kind = begin[position:position + length].decode()
            elif not extension:
                break
            position += -(-length // 8) * 8
        if kind is None:
            raise ValueError('its backing file has no format')
        return Overlay(capacity, Backing(
            begin[name:name + name_length].decode(), kind))
    except (struct.error, ValueError) as e:
        raise ValueError('%s is no overlay: %s' % (path, e)) from e


def write(target: str, stream: Stream, capacity: int, backing: Backing,
          name: str) -> Stream:
    """Write an overlay with a snapshot over a file that is there.

    :param target: path of the file, which keeps owner and mode
    :param stream: what a guest goes on from
    :param capacity: of the disk, in bytes; a multiple of 512
    :param backing: what the disk holds
    :param name: of the snapshot
    :returns: where the stream is in the file, in whole clusters. They are
        QEMU's to use for something else when the snapshot has been deleted,
        not before.
    :raises: OSError; ValueError if the name of the backing file is too long
        or the stream ends too early
    """
    path = backing.path.encode()
    if len(path) > LONGEST_BACKING:
        raise ValueError('the path of the backing file has %d bytes, more '
                         'than %d' % (len(path), LONGEST_BACKING))
    layout = _Layout(capacity, stream.length)
    with open(os.open(target, os.O_RDWR | os.O_NOFOLLOW), 'wb') as out:
        out.truncate(0)
        _put(out, 0, _header(layout, capacity, path, backing.format))
        _put(out, layout.l1, _table(
            layout.l2, layout.state_tables, bytes(8 * layout.disk_tables)))
        _put(out, layout.snapshots,
             _snapshot(layout, stream.length, capacity, name.encode()))
        _put(out, layout.l2, _table(layout.data, layout.data_clusters))
        _put(out, layout.table, _table(layout.first_block, layout.blocks))
        _put(out, layout.first_block, struct.pack('>H', 1) * layout.total)
        out.truncate(layout.total * CLUSTER)
        out.flush()
        _copy(stream, out.fileno(), layout.data * CLUSTER)
    return Stream(target, layout.data * CLUSTER,
                  layout.data_clusters * CLUSTER)


def _put(out, cluster, data):
    out.seek(cluster * CLUSTER)
    out.write(data)


def _table(first, count, before=b''):
    """Offsets of clusters that follow each other."""
    return before + struct.pack('>%dQ' % count, *(
        (first + number) * CLUSTER for number in range(count)))


def _header(layout, capacity, path, backing_format):
    kind = backing_format.encode()
    extensions = struct.pack('>II', _BACKING_FORMAT, len(kind)) + (
        kind.ljust(-(-len(kind) // 8) * 8, b'\0')) + bytes(8)
    length = struct.calcsize(_HEADER)
    header = struct.pack(
        _HEADER, _MAGIC, 3,
        length + len(extensions), len(path), CLUSTER.bit_length() - 1,
        capacity, 0, layout.disk_tables, layout.active_l1 * CLUSTER,
        layout.table * CLUSTER, layout.table_clusters,
        1, layout.snapshots * CLUSTER, 0, 0, 0, 4, length)
    return header + extensions + path


def _snapshot(layout, length, capacity, name):
    extra = struct.pack('>QQ', length, capacity)
    number = b'1'
    # Neither a date nor a clock of the guest's.
    return struct.pack(
        '>QIHHIIQII', layout.l1 * CLUSTER, layout.l1_length, len(number),
        len(name), 0, 0, 0, 0, len(extra)) + extra + number + name


def _copy(stream, fd, position):
    source = os.open(stream.path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        done = 0
        copy: ty.Callable = _copy_in_kernel
        while done < stream.length:
            try:
                count = copy(source, fd, stream.length - done,
                             stream.offset + done, position + done)
            except OSError as e:
                if e.errno not in _NO_COPY or copy is _copy_by_hand:
                    raise
                copy = _copy_by_hand
                continue
            if not count:
                raise ValueError('%s ends %d bytes too early' % (
                    stream.path, stream.length - done))
            done += count
    finally:
        os.close(source)


def _copy_in_kernel(source, target, count, start, position):
    return os.copy_file_range(source, target, min(count, 1 << 28), start,
                              position)


def _copy_by_hand(source, target, count, start, position):
    data = os.pread(source, min(count, _CHUNK), start)
    return os.pwrite(target, data, position)
