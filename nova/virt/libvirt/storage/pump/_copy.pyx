# cython: language_level=3, boundscheck=False, wraparound=False
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
"""Copy from one libvirt stream to another; knows nothing of Nova.

Python's side: it takes streams and files, starts the copy without the GIL and
raises what came of it. The rest is told in parts, each a file of its own:
_loop.pxd has the copy and its two threads, _ring.pxd what lies between them,
_end.pxd what either end must do, _stream.pxd, _update.pxd and _file.pxd the
ends that there are, _checksum.pxd and _limit.pxd what their names say. All is
inline code, so that this is one extension that can be loaded by its path,
without Nova.

The process must not have registered a libvirt event loop: with one, packets
are read as they come and pile up in memory (see transfer.py).
"""

from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.pycapsule cimport PyCapsule_IsValid
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc
from libc.stdlib cimport free
from libc.stdlib cimport realloc
from libc.string cimport memcpy
from libc.string cimport memset

from nova.virt.libvirt.storage.pump cimport _libvirt as lv
from nova.virt.libvirt.storage.pump cimport _loop as loop
from nova.virt.libvirt.storage.pump cimport _thread as th
from nova.virt.libvirt.storage.pump._checksum cimport checksum_data
from nova.virt.libvirt.storage.pump._checksum cimport checksum_hole
from nova.virt.libvirt.storage.pump._checksum cimport checksum_init
from nova.virt.libvirt.storage.pump._checksum cimport checksum_t
from nova.virt.libvirt.storage.pump._checksum cimport checksum_value
from nova.virt.libvirt.storage.pump._checksum cimport PRIME
from nova.virt.libvirt.storage.pump._end cimport end_t
from nova.virt.libvirt.storage.pump._end cimport NBD_ERRORS
from nova.virt.libvirt.storage.pump._file cimport file_end
from nova.virt.libvirt.storage.pump._file cimport file_t
from nova.virt.libvirt.storage.pump._stream cimport stream_end
from nova.virt.libvirt.storage.pump._table cimport CHANGED
from nova.virt.libvirt.storage.pump._table cimport STANDS
from nova.virt.libvirt.storage.pump._table cimport table_begin
from nova.virt.libvirt.storage.pump._table cimport table_t
from nova.virt.libvirt.storage.pump._update cimport update_abort
from nova.virt.libvirt.storage.pump._update cimport update_end
from nova.virt.libvirt.storage.pump._update cimport update_t

# A stream's packet holds at most 262,120 bytes (libvirt's RPC: the payload of
# VIR_NET_MESSAGE_LEGACY_PAYLOAD_MAX less the header), and a read of a file
# gives one of those and one of 24: a slot puts the two together. Larger slots
# measured slower.
DEF_SLOT_SIZE = 262144
DEF_SLOTS = 16

# Of a table, in bytes. Smaller blocks than these hardly send less when a guest
# writes at random.
MIN_BLOCK = 65536
MAX_TABLE = 32 << 20
# Of all slots together, where blocks are large.
MAX_SLOTS = 16 << 20


class PumpError(Exception):
    """A copy failed.

    :ivar side: 'source' or 'destination'
    :ivar operation: what was being done there
    :ivar reason: 'libvirt' (or the end's own error), 'nbd', 'short', 'long',
        'stuck', 'broken', 'cancelled', 'thread'; see failure_t in _loop.pxd
    :ivar code: libvirt's virErrorNumber, for 'nbd' errno; 0 if there is none
    :ivar domain: libvirt's virErrorDomain
    :ivar message: libvirt's or libnbd's message
    :ivar transferred: bytes that had come from the source, holes included
    """

    def __init__(self, side, operation, reason, code, domain, message,
                 transferred):
        super().__init__("%s: %s: %s (%s code %d, domain %d) after %d bytes" %
                         (side, operation, message or reason,
                          'nbd' if reason == 'nbd' else 'libvirt', code,
                          domain, transferred))
        self.side = side
        self.operation = operation
        self.reason = reason
        self.code = code
        self.domain = domain
        self.message = message
        self.transferred = transferred


_REASONS = {loop.FAILED: 'libvirt', loop.SHORT: 'short', loop.LONG: 'long',
            loop.STUCK: 'stuck', loop.BROKEN: 'broken',
            loop.CANCELLED: 'cancelled', loop.NO_THREAD: 'thread'}


cdef object _reason(loop.copy_t *copy):
    if copy.failure == loop.FAILED and copy.error.domain == NBD_ERRORS:
        return 'nbd'
    return _REASONS[copy.failure]


cdef class File:
    """A file of this host as the source of a copy.

    Reading it here spares the daemon and this process a copy of each byte
    through a socket. Holes are what the file system says they are. It is the
    source of one copy only, and nothing can be sent to it.

    :param fd: open for reading; the caller closes it after the copy
    :param length: bytes of it that are read
    :param sync: have on disk, too, what was read, whoever has written it; a
        failure of that is one of the copy
    :param direct: it was opened with O_DIRECT; that is taken from it where it
        doesn't work
    """

    cdef file_t _file
    cdef end_t _end
    cdef readonly object _o

    def __cinit__(self, int fd, long long length, *, bint sync=False,
                  bint direct=False):
        self._file.fd = fd
        self._file.length = length
        self._file.sync = sync
        self._file.direct = direct
        file_end(&self._end, &self._file)
        self._o = PyCapsule_New(&self._end, b"nova.pump.end", NULL)


cdef class Update:
    """A volume of libvirt's that has content, as the destination of a copy.

    For copies of changes alone, which end it where its content ends or later:
    nothing cuts it off. It is the destination of one copy only.

    :param connection: the libvirt.virConnect that the volume is of
    :param volume: a libvirt.virStorageVol
    """

    cdef update_t _update
    cdef end_t _end
    cdef object _of
    cdef readonly object _o

    def __cinit__(self, connection, volume):
        self._of = (connection, volume)
        self._update.connection = <lv.virConnectPtr>PyCapsule_GetPointer(
            connection._o, b"virConnectPtr")
        self._update.volume = <lv.virStorageVolPtr>PyCapsule_GetPointer(
            volume._o, b"virStorageVolPtr")
        update_end(&self._end, &self._update)
        self._o = PyCapsule_New(&self._end, b"nova.pump.end", NULL)

    def __dealloc__(self):
        update_abort(&self._update)


cdef class Table:
    """A checksum for each block of a content.

    Copies fill it. It is of no use after one that has failed. Memory is taken
    up for blocks with data alone.

    :param length: bytes of the content
    :param key: of the checksums, as for Copy
    :param block_size: bytes; by default the least power of two, from 64 KiB
        on, with which the table takes up at most 32 MiB
    """

    cdef table_t _table
    cdef size_t _blocks
    cdef uint64_t _key
    cdef bint _filled

    def __cinit__(self, long long length, uint64_t key, *,
                  size_t block_size=0):
        if length <= 0 or block_size % 32 or key % PRIME == 0:
            raise ValueError("length, key or block_size is out of range")
        self._key = key
        self._table.block_size = block_size or MIN_BLOCK
        while not block_size and self._count(length) * 8 > MAX_TABLE:
            self._table.block_size *= 2
        self._blocks = self._count(length)
        self._table.values = <uint64_t *>calloc(self._blocks, 8)
        self._table.marks = <unsigned char *>calloc(self._blocks, 1)
        if self._table.values == NULL or self._table.marks == NULL:
            raise MemoryError()

    cdef size_t _count(self, long long length):
        return (length + self._table.block_size - 1) // self._table.block_size

    def __dealloc__(self):
        free(self._table.values)
        free(self._table.marks)

    cdef int _mark(self, blocks) except -1:
        # Let all stand but these ranges of blocks; None: nothing.
        cdef unsigned char *marks = <unsigned char *>calloc(self._blocks, 1)
        cdef size_t first, count
        if marks == NULL:
            raise MemoryError()
        free(self._table.marks)
        self._table.marks = marks
        if blocks is None:
            return 0
        memset(marks, STANDS, self._blocks)
        for first, count in blocks:
            if first < self._blocks:
                memset(marks + first, 0, min(count, self._blocks - first))
        return 0

    def grow(self, long long length):
        """Have room for a longer content; what is new counts as zeroes.

        :param length: bytes; if there is room for more, that stays
        """
        cdef size_t blocks = self._count(length)
        cdef uint64_t *values
        cdef unsigned char *marks
        if blocks <= self._blocks:
            return
        values = <uint64_t *>realloc(self._table.values, blocks * 8)
        if values == NULL:
            raise MemoryError()
        memset(values + self._blocks, 0, (blocks - self._blocks) * 8)
        self._table.values = values
        marks = <unsigned char *>realloc(self._table.marks, blocks)
        if marks == NULL:
            raise MemoryError()
        memset(marks + self._blocks, 0, blocks - self._blocks)
        self._table.marks = marks
        self._blocks = blocks

    @property
    def block_size(self):
        return self._table.block_size

    @property
    def filled(self):
        """Whether a copy, or load(), has filled it."""
        return self._filled

    @property
    def values(self):
        """The checksum of each block; for looking at few blocks."""
        return [self._table.values[i] for i in range(self._blocks)]

    @property
    def changed(self):
        """The blocks whose checksums the last copy has changed.

        :returns: list of (number of the first one, how many in a row)
        """
        cdef size_t i, begin = 0
        cdef bint within = False
        found = []
        for i in range(self._blocks):
            if bool(self._table.marks[i] & CHANGED) != within:
                if within:
                    found.append((begin, i - begin))
                begin = i
                within = not within
        if within:
            found.append((begin, self._blocks - begin))
        return found

    def dump(self):
        """Return the checksums as bytes, in this host's byte order."""
        return (<char *>self._table.values)[:self._blocks * 8]

    def load(self, bytes values not None):
        """Take the checksums of a content that somebody else has read.

        It is filled then.

        :param values: as dump() returns them, of a table of the same length,
            key and size of blocks
        """
        if <size_t>len(values) != self._blocks * 8:
            raise ValueError("%d bytes are no table of %d blocks" % (
                len(values), self._blocks))
        memcpy(self._table.values, <char *>values, len(values))
        self._filled = True


cdef int _take_end(object stream, end_t *end) except -1:
    cdef object capsule = getattr(stream, '_o', stream)
    if PyCapsule_IsValid(capsule, b"nova.pump.end"):
        end[0] = (<end_t *>PyCapsule_GetPointer(capsule, b"nova.pump.end"))[0]
        return 0
    if not PyCapsule_IsValid(capsule, b"virStreamPtr"):
        raise TypeError("not a libvirt stream: %r" % (stream,))
    stream_end(end, PyCapsule_GetPointer(capsule, b"virStreamPtr"))
    return 0


cdef class Copy:
    """One copy between two blocking streams, each opened by its owner.

    :param source: a libvirt.virStream on which a download has been started
    :param destination: a libvirt.virStream on which an upload has been
        started, or None to read and checksum the source alone
    :param length: bytes (holes included) which must come, no more, no less
    :param sparse: pass holes on as holes; else as zeroes. Only a new volume
        may be given holes, since what lies under them stays.
    :param bandwidth: bytes a second at most, holes not counted; 0: no limit
    :param key: of the checksum, any number but 0 modulo 2^61 - 1; not with a
        table, which has its own
    :param find_holes: send zeroes as holes, of a source that can't tell of
        any. Not with only_changes.
    :param table: a Table to fill, for as many bytes as the content has or
        more. Slots are no smaller than its blocks.
    :param only_changes: send the blocks alone whose checksums aren't those in
        the table: it tells what stands at the destination. Whatever became a
        hole is sent as one if sparse, which then is of a destination that
        makes zeroes of it. Without a destination the table alone changes.
    :param bridge: of a copy of changes: bytes at most which have not changed
        and are sent behind some that have, so that fewer pieces are left out
    :param blocks: of a copy of changes: (first, count) of the blocks that may
        have changed, of a file. No other one is read, but for a last one that
        isn't whole; by default each one is.
    :param slot_size: bytes
    :param slots: how many slots the ring has; at least 2
    """

    cdef loop.copy_t _copy
    cdef object _streams
    cdef Table _table
    cdef object _blocks
    cdef bint _made
    cdef bint _ran
    cdef bint _ended

    def __cinit__(self, source, destination, long long length, *,
                  bint sparse=True, long long bandwidth=0, uint64_t key=1,
                  bint find_holes=False, Table table=None,
                  bint only_changes=False, blocks=None, long long bridge=0,
                  size_t slot_size=DEF_SLOT_SIZE, size_t slots=DEF_SLOTS):
        if (length <= 0 or bandwidth < 0 or bridge < 0 or slot_size == 0 or
                slots < 2):
            raise ValueError("length, bandwidth, bridge, slot_size or slots "
                             "is out of range")
        if key % PRIME == 0:
            raise ValueError("the key must not be 0 modulo 2^61 - 1")
        self._streams = (source, destination)
        _take_end(source, &self._copy.source)
        if self._copy.source.recv == NULL:
            raise TypeError("nothing can be received from %r" % (source,))
        if destination is not None:
            _take_end(destination, &self._copy.destination)
            if self._copy.destination.send == NULL:
                raise TypeError("nothing can be sent to %r" % (destination,))
            if sparse and self._copy.destination.send_hole == NULL:
                raise TypeError("no hole can be sent to %r" % (destination,))
            self._copy.has_destination = True
        self._copy.length = length
        self._copy.sparse = sparse
        # else they would be sent as zeroes again
        self._copy.find_holes = find_holes and sparse
        self._copy.limit.bandwidth = bandwidth
        checksum_init(&self._copy.checksum, key)
        if table is not None:
            self._table = table
            self._copy.table = &table._table
            if table._count(length) > table._blocks:
                raise ValueError("the table is for fewer bytes")
            # whole blocks
            slot_size = max(slot_size, table._table.block_size)
            slot_size -= slot_size % table._table.block_size
            slots = max(2, min(slots, MAX_SLOTS // slot_size))
        if only_changes:
            if table is None or not table._filled:
                raise ValueError("what stands at the destination isn't known")
            if find_holes:
                raise ValueError("what has changed is sent as it is")
            if (self._copy.has_destination and
                    self._copy.destination.skip == NULL):
                raise TypeError("changes alone can't be sent to %r" % (
                    destination,))
            self._copy.only_changes = True
            self._copy.bridge = bridge
        if blocks is not None:
            if not only_changes:
                raise ValueError("all of it is sent")
            if self._copy.source.pass_over == NULL:
                raise TypeError("all of %r has to be read" % (source,))
            self._blocks = [(first, count) for first, count in blocks]
            if any(first < 0 or count < 0 for first, count in self._blocks):
                raise ValueError("blocks is out of range")
        self._made = True
        if loop.copy_init(&self._copy, slot_size, slots) < 0:
            raise MemoryError()

    def __dealloc__(self):
        if self._made:
            loop.copy_free(&self._copy)

    def run(self):
        """Copy all of it, then finish both streams; once only.

        On failure both streams are aborted.

        :raises: PumpError
        """
        if self._ran:
            raise RuntimeError("a copy runs once")
        self._ran = True
        cdef bint failed
        if self._table is not None:
            self._table._filled = False
            self._table._mark(self._blocks)
            table_begin(&self._table._table, self._table._key)
        with nogil:
            failed = loop.run(&self._copy)
        self._ended = True
        if self._table is not None:
            self._table._filled = not failed
        if failed:
            raise PumpError(
                'source' if self._copy.side == loop.SOURCE else 'destination',
                (<bytes>self._copy.operation).decode(),
                _reason(&self._copy), self._copy.error.code,
                max(self._copy.error.domain, 0),
                (<bytes>self._copy.error.message).decode(errors='replace'),
                self._copy.received)

    def cancel(self):
        """Make run() stop at its next packet; from any thread.

        When run() has finished both streams it comes too late, and nothing
        happens. A libvirt call that doesn't come back isn't ended by this: who
        must be sure ends the process.
        """
        with nogil:
            loop.fail(&self._copy, loop.CANCELLED, loop.SOURCE, b"cancel")

    @property
    def bandwidth(self):
        """Bytes a second at most, 0 for no limit; may be set meanwhile."""
        return th.load(&self._copy.limit.bandwidth)

    @bandwidth.setter
    def bandwidth(self, long long bandwidth):
        if bandwidth < 0:
            raise ValueError("bandwidth is out of range")
        th.store(&self._copy.limit.bandwidth, bandwidth)

    @property
    def transferred(self):
        """Bytes done so far, holes and what was unchanged included."""
        return self.data + self.holes + self.unchanged

    @property
    def data(self):
        """Bytes sent on so far as data."""
        return th.load(&self._copy.data_sent)

    @property
    def holes(self):
        """Bytes passed on so far as holes."""
        return th.load(&self._copy.holes_sent)

    @property
    def unchanged(self):
        """Bytes that stood at the destination already."""
        return th.load(&self._copy.unchanged)

    @property
    def checksum(self):
        """Of what was received, as an int; not before run() has ended."""
        if not self._ended:
            raise RuntimeError("the copy hasn't ended")
        return self._copy.value


def checksum(parts, uint64_t key):
    """Checksum of a content as Copy computes it.

    :param parts: an iterable of bytes objects and of ints, the latter
        lengths of holes
    :param key: as for Copy
    :returns: int
    """
    cdef checksum_t state
    cdef bytes data
    checksum_init(&state, key)
    for part in parts:
        if isinstance(part, int):
            checksum_hole(&state, part)
        else:
            data = part
            checksum_data(&state, <const unsigned char *><char *>data,
                          len(data))
    return checksum_value(&state)
