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

One thread receives into a ring of slots, the calling thread sends from it, so
that the network's two halves overlap and memory stays at slots * slot_size.
Everything between the first and the last packet runs without the GIL. Holes
pass as holes. The checksum is of the content alone: it doesn't see whether
zeroes came as data or as a hole, so that both sides can be compared whatever
their file systems make of them.

The process must not have registered a libvirt event loop: with one, packets
are read as they come and pile up in memory (see transfer.py).
"""

from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.pycapsule cimport PyCapsule_IsValid
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uint32_t
from libc.stdint cimport uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc
from libc.stdlib cimport free
from libc.stdlib cimport malloc
from libc.string cimport memcpy
from libc.string cimport memset
from libc.string cimport strncpy
from posix.time cimport clock_gettime
from posix.time cimport CLOCK_MONOTONIC
from posix.time cimport nanosleep
from posix.time cimport timespec

from nova.virt.libvirt.storage.pump cimport _libvirt as lv

cdef extern from "<endian.h>" nogil:
    uint32_t le32toh(uint32_t word)

cdef extern from *:
    ctypedef unsigned long long uint128_t "unsigned __int128"

# A stream's packet holds at most 262,120 bytes (libvirt's RPC: the payload of
# VIR_NET_MESSAGE_LEGACY_PAYLOAD_MAX less the header), and a read of a file
# gives one of those and one of 24: a slot puts the two together. Larger slots
# measured slower.
DEF_SLOT_SIZE = 262144
DEF_SLOTS = 16

# How long a bandwidth limit may sleep before it looks at cancel again.
cdef long MAX_SLEEP_NS = 20 * 1000 * 1000


# -- ends of the copy -------------------------------------------------------

cdef struct error_t:
    int code            # virErrorNumber, 0 if it isn't libvirt's
    int domain          # virErrorDomain
    char message[1024]

# What the copy asks of an end. Each function returns as libvirt's function of
# that name does; last_error is called at once after a failure, on the thread
# which saw it. Handed over as a capsule named "nova.pump.end" by who wants to
# be an end without being a virStream.
cdef struct end_t:
    void *stream
    int (*recv)(void *stream, char *data, size_t nbytes,
                unsigned int flags) noexcept nogil
    int (*recv_hole)(void *stream, long long *length,
                     unsigned int flags) noexcept nogil
    int (*send)(void *stream, const char *data, size_t nbytes) noexcept nogil
    int (*send_hole)(void *stream, long long length,
                     unsigned int flags) noexcept nogil
    int (*finish)(void *stream) noexcept nogil
    int (*abort)(void *stream) noexcept nogil
    void (*last_error)(error_t *error) noexcept nogil


cdef int _lv_recv(void *stream, char *data, size_t nbytes,
                  unsigned int flags) noexcept nogil:
    return lv.virStreamRecvFlags(<lv.virStreamPtr>stream, data, nbytes, flags)


cdef int _lv_recv_hole(void *stream, long long *length,
                       unsigned int flags) noexcept nogil:
    return lv.virStreamRecvHole(<lv.virStreamPtr>stream, length, flags)


cdef int _lv_send(void *stream, const char *data,
                  size_t nbytes) noexcept nogil:
    return lv.virStreamSend(<lv.virStreamPtr>stream, data, nbytes)


cdef int _lv_send_hole(void *stream, long long length,
                       unsigned int flags) noexcept nogil:
    return lv.virStreamSendHole(<lv.virStreamPtr>stream, length, flags)


cdef int _lv_finish(void *stream) noexcept nogil:
    return lv.virStreamFinish(<lv.virStreamPtr>stream)


cdef int _lv_abort(void *stream) noexcept nogil:
    return lv.virStreamAbort(<lv.virStreamPtr>stream)


cdef void _lv_last_error(error_t *error) noexcept nogil:
    cdef lv.virError *last = lv.virGetLastError()
    if last == NULL:
        return
    error.code = last.code
    error.domain = last.domain
    if last.message != NULL:
        strncpy(error.message, last.message, sizeof(error.message) - 1)


# -- a file of this host as an end ------------------------------------------

cdef extern from *:
    """
    #define _FILE_OFFSET_BITS 64
    #include <errno.h>
    #include <fcntl.h>
    #include <string.h>
    #include <sys/types.h>
    #include <unistd.h>
    static int pump_errno(void) { return errno; }
    static int pump_no_data(void) { return errno == ENXIO; }
    static int pump_again(void) { return errno == EINTR; }
    static long long pump_seek_data(int fd, long long offset)
    { return lseek(fd, offset, SEEK_DATA); }
    static long long pump_seek_hole(int fd, long long offset)
    { return lseek(fd, offset, SEEK_HOLE); }
    static long long pump_size(int fd)
    { return lseek(fd, 0, SEEK_END); }
    static int pump_read(int fd, char *data, size_t nbytes, long long offset)
    { return pread(fd, data, nbytes, offset); }
    static int pump_sync_range(int fd, long long offset, long long nbytes)
    {
        if (sync_file_range(fd, offset, nbytes, SYNC_FILE_RANGE_WAIT_BEFORE |
                            SYNC_FILE_RANGE_WRITE |
                            SYNC_FILE_RANGE_WAIT_AFTER) == 0)
            return 0;
        /* It can't do that there; fsync() follows. */
        return (errno == EINVAL || errno == ESPIPE || errno == ENOSYS) ? 0
                                                                       : -1;
    }
    static const char *pump_message(int number) { return strerror(number); }
    """
    int pump_errno() nogil
    bint pump_no_data() nogil
    bint pump_again() nogil
    long long pump_seek_data(int fd, long long offset) nogil
    long long pump_seek_hole(int fd, long long offset) nogil
    long long pump_size(int fd) nogil
    int pump_read(int fd, char *data, size_t nbytes, long long offset) nogil
    int pump_sync_range(int fd, long long offset, long long nbytes) nogil
    int fsync(int fd) nogil
    const char *pump_message(int number) nogil

# VIR_ERR_SYSTEM_ERROR and VIR_FROM_STORAGE: what libvirt's own error would be
cdef enum:
    SYSTEM_ERROR = 38
    FROM_STORAGE = 18

# How much is read between two waits for the disk. A single fsync() of a huge
# file would show no progress for minutes.
cdef long long SYNC_STEP = 8 * 1024 * 1024

cdef struct file_t:
    int fd
    bint sync           # have on disk what is read
    long long synced    # up to here it is
    long long length    # how much of it is read
    long long offset
    long long data_end  # there is data from offset up to here

# The last failure, of the reading thread or of finish after its end.
cdef int _file_errno = 0
cdef bint _file_unsynced = False


cdef int _file_failed(bint unsynced=False) noexcept nogil:
    global _file_errno, _file_unsynced
    _file_errno = pump_errno()
    _file_unsynced = unsynced
    return -1


cdef long long _next_data(file_t *self) noexcept nogil:
    # Where data begins at or after offset, or the end.
    cdef long long end = min(pump_size(self.fd), self.length)
    cdef long long data = pump_seek_data(self.fd, self.offset)
    if data < 0:
        return max(end, self.offset) if pump_no_data() else -1
    return min(data, end)


cdef int _file_recv(void *stream, char *data, size_t nbytes,
                    unsigned int flags) noexcept nogil:
    cdef file_t *self = <file_t *>stream
    cdef long long start
    cdef int n
    if self.sync and self.offset - self.synced >= SYNC_STEP:
        if pump_sync_range(self.fd, self.synced,
                           self.offset - self.synced) < 0:
            return _file_failed(True)
        self.synced = self.offset
    if self.offset >= self.data_end:
        start = _next_data(self)
        if start < 0:
            return _file_failed()
        if start > self.offset:
            return -3
        self.data_end = pump_seek_hole(self.fd, self.offset)
        if self.data_end < 0:
            # At its end, or beyond it if it was truncated.
            return 0 if pump_no_data() else _file_failed()
        self.data_end = min(self.data_end, self.length)
        if self.offset >= self.data_end:
            return 0
    nbytes = min(nbytes, <size_t>(self.data_end - self.offset))
    n = pump_read(self.fd, data, nbytes, self.offset)
    while n < 0 and pump_again():
        n = pump_read(self.fd, data, nbytes, self.offset)
    if n < 0:
        return _file_failed()
    self.offset += n
    return n


cdef int _file_recv_hole(void *stream, long long *length,
                         unsigned int flags) noexcept nogil:
    cdef file_t *self = <file_t *>stream
    cdef long long start = _next_data(self)
    if start < 0:
        return _file_failed()
    length[0] = start - self.offset
    self.offset = start
    return 0


cdef int _file_send(void *stream, const char *data,
                    size_t nbytes) noexcept nogil:
    return -1


cdef int _file_send_hole(void *stream, long long length,
                         unsigned int flags) noexcept nogil:
    return -1


cdef int _file_finish(void *stream) noexcept nogil:
    # Reports as well what could not be written before it was opened here.
    cdef file_t *self = <file_t *>stream
    if self.sync and fsync(self.fd) < 0:
        return _file_failed(True)
    return 0


cdef int _file_abort(void *stream) noexcept nogil:
    return 0


cdef void _file_last_error(error_t *error) noexcept nogil:
    error.code = SYSTEM_ERROR
    error.domain = FROM_STORAGE
    snprintf(error.message, sizeof(error.message), b"%s%s",
             b"not on disk: " if _file_unsynced else b"",
             pump_message(_file_errno))


cdef class File:
    """A file of this host as the source of a copy.

    Reading it here spares the daemon and this process a copy of each byte
    through a socket. Holes are what the file system says they are.

    :param fd: open for reading; the caller closes it after the copy
    :param length: bytes of it that are read
    :param sync: have on disk, too, what was read, whoever has written it; a
        failure of that is one of the copy
    """

    cdef file_t _file
    cdef end_t _end
    cdef readonly object _o

    def __cinit__(self, int fd, long long length, *, bint sync=False):
        self._file.fd = fd
        self._file.length = length
        self._file.sync = sync
        self._end.stream = &self._file
        self._end.recv = _file_recv
        self._end.recv_hole = _file_recv_hole
        self._end.send = _file_send
        self._end.send_hole = _file_send_hole
        self._end.finish = _file_finish
        self._end.abort = _file_abort
        self._end.last_error = _file_last_error
        self._o = PyCapsule_New(&self._end, b"nova.pump.end", NULL)


# -- checksum ---------------------------------------------------------------

# A polynomial over the content's 32-bit words modulo the prime 2^61 - 1,
# evaluated at a random key (Carter and Wegman, 1979: for contents of n words
# that differ, at most n in 2^61 keys agree, whoever chose the contents). It is
# used rather than a hash because a run of zeroes costs one exponentiation.
cdef uint64_t PRIME = (1ULL << 61) - 1
cdef enum:
    BLOCK = 32

cdef struct checksum_t:
    uint64_t power[9]           # key^0 .. key^8
    uint64_t value
    unsigned char tail[BLOCK]   # the bytes of a block not yet complete
    size_t tailed
    uint64_t length


cdef inline uint64_t _reduce(uint128_t x) noexcept nogil:
    cdef uint64_t y = <uint64_t>(x & PRIME) + <uint64_t>(x >> 61)
    return (y & PRIME) + (y >> 61)


cdef void _checksum_init(checksum_t *self, uint64_t key) noexcept nogil:
    cdef int i
    memset(self, 0, sizeof(checksum_t))
    self.power[0] = 1
    for i in range(1, 9):
        self.power[i] = _reduce(<uint128_t>self.power[i - 1] * (key % PRIME))


cdef void _checksum_blocks(checksum_t *self, const unsigned char *data,
                           size_t count) noexcept nogil:
    cdef uint32_t word[8]
    cdef uint128_t total
    cdef uint64_t value = self.value
    cdef uint64_t p1 = self.power[1], p2 = self.power[2], p3 = self.power[3]
    cdef uint64_t p4 = self.power[4], p5 = self.power[5], p6 = self.power[6]
    cdef uint64_t p7 = self.power[7], p8 = self.power[8]
    while count:
        memcpy(word, data, BLOCK)
        total = <uint128_t>value * p8
        total += <uint128_t>le32toh(word[0]) * p7
        total += <uint128_t>le32toh(word[1]) * p6
        total += <uint128_t>le32toh(word[2]) * p5
        total += <uint128_t>le32toh(word[3]) * p4
        total += <uint128_t>le32toh(word[4]) * p3
        total += <uint128_t>le32toh(word[5]) * p2
        total += <uint128_t>le32toh(word[6]) * p1
        total += le32toh(word[7])
        value = _reduce(total)
        data += BLOCK
        count -= 1
    self.value = value


cdef void _checksum_data(checksum_t *self, const unsigned char *data,
                         size_t nbytes) noexcept nogil:
    cdef size_t n
    self.length += nbytes
    if self.tailed:
        n = min(BLOCK - self.tailed, nbytes)
        memcpy(self.tail + self.tailed, data, n)
        self.tailed += n
        data += n
        nbytes -= n
        if self.tailed < BLOCK:
            return
        _checksum_blocks(self, self.tail, 1)
        self.tailed = 0
    n = nbytes // BLOCK
    _checksum_blocks(self, data, n)
    self.tailed = nbytes - n * BLOCK
    memcpy(self.tail, data + n * BLOCK, self.tailed)


cdef void _checksum_hole(checksum_t *self, uint64_t nbytes) noexcept nogil:
    cdef uint64_t n, square
    cdef unsigned char zeroes[BLOCK]
    memset(zeroes, 0, BLOCK)
    if self.tailed:
        n = min(<uint64_t>(BLOCK - self.tailed), nbytes)
        _checksum_data(self, zeroes, n)
        nbytes -= n
    n = nbytes // BLOCK
    self.length += n * BLOCK
    square = self.power[8]
    while n:
        if n & 1:
            self.value = _reduce(<uint128_t>self.value * square)
        square = _reduce(<uint128_t>square * square)
        n >>= 1
    _checksum_data(self, zeroes, nbytes % BLOCK)


cdef uint64_t _checksum_value(checksum_t *self) noexcept nogil:
    cdef checksum_t last = self[0]
    if last.tailed:
        memset(last.tail + last.tailed, 0, BLOCK - last.tailed)
        _checksum_blocks(&last, last.tail, 1)
    # The length goes in as one more word.
    return _reduce((<uint128_t>last.value + last.length)
                   * last.power[1]) % PRIME


# -- the copy ---------------------------------------------------------------

cdef enum side_t:
    SOURCE = 0
    DESTINATION = 1

cdef enum failure_t:
    NONE = 0
    LIBVIRT = 1         # a libvirt call failed, the error is libvirt's
    SHORT = 2           # the source ended before the length
    LONG = 3            # the source gave more than the length
    STUCK = 4           # a call came back without progress and without error
    CANCELLED = 5
    NO_THREAD = 6

cdef struct slot_t:
    char *data
    size_t length       # bytes of data; 0: the slot is a hole
    long long hole      # bytes

cdef struct copy_t:
    end_t source
    end_t destination
    bint has_destination
    bint sparse
    long long length
    long long bandwidth

    slot_t *slots
    size_t slot_size
    size_t slot_count
    char *zeroes
    # Slots filled and slots emptied since the start: both only grow.
    size_t filled
    size_t emptied
    bint ended
    bint stopped
    lv.pthread_mutex_t lock
    lv.pthread_cond_t changed

    long long received
    long long data_sent
    long long holes_sent
    double next_send
    checksum_t checksum

    failure_t failure   # the first one wins
    side_t side
    const char *operation
    error_t error


cdef double _now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + t.tv_nsec / 1e9


cdef void _fail(copy_t *self, failure_t failure, side_t side,
                const char *operation) noexcept nogil:
    cdef error_t error
    memset(&error, 0, sizeof(error_t))
    if failure == LIBVIRT:
        if side == SOURCE:
            self.source.last_error(&error)
        else:
            self.destination.last_error(&error)
    lv.pthread_mutex_lock(&self.lock)
    if self.failure == NONE:
        self.failure = failure
        self.side = side
        self.operation = operation
        self.error = error
    self.stopped = True
    lv.pthread_cond_broadcast(&self.changed)
    lv.pthread_mutex_unlock(&self.lock)


cdef slot_t *_free_slot(copy_t *self) noexcept nogil:
    lv.pthread_mutex_lock(&self.lock)
    while (not self.stopped
           and self.filled - self.emptied == self.slot_count):
        lv.pthread_cond_wait(&self.changed, &self.lock)
    cdef bint stopped = self.stopped
    lv.pthread_mutex_unlock(&self.lock)
    return NULL if stopped else &self.slots[self.filled % self.slot_count]


cdef void _slot_filled(copy_t *self) noexcept nogil:
    lv.pthread_mutex_lock(&self.lock)
    self.filled += 1
    lv.pthread_cond_broadcast(&self.changed)
    lv.pthread_mutex_unlock(&self.lock)


cdef slot_t *_full_slot(copy_t *self) noexcept nogil:
    lv.pthread_mutex_lock(&self.lock)
    while (not self.stopped and not self.ended
           and self.filled == self.emptied):
        lv.pthread_cond_wait(&self.changed, &self.lock)
    cdef bint none = self.stopped or self.filled == self.emptied
    lv.pthread_mutex_unlock(&self.lock)
    return NULL if none else &self.slots[self.emptied % self.slot_count]


cdef void _slot_emptied(copy_t *self) noexcept nogil:
    lv.pthread_mutex_lock(&self.lock)
    self.emptied += 1
    lv.pthread_cond_broadcast(&self.changed)
    lv.pthread_mutex_unlock(&self.lock)


cdef int _receive_slot(copy_t *self, slot_t *slot) noexcept nogil:
    # Fills the slot as far as it goes; returns 0 at the stream's end, 1 if a
    # hole comes next, 2 if the slot is full, -1 after _fail().
    cdef int n
    slot.length = 0
    slot.hole = 0
    while slot.length < self.slot_size:
        if self.stopped:
            return -1
        n = self.source.recv(self.source.stream, slot.data + slot.length,
                             self.slot_size - slot.length,
                             lv.VIR_STREAM_RECV_STOP_AT_HOLE)
        if n == 0:
            return 0
        if n == -3:
            return 1
        if n < 0 or <size_t>n > self.slot_size - slot.length:
            _fail(self, LIBVIRT if n == -1 else STUCK, SOURCE, b"receive")
            return -1
        slot.length += n
        self.received += n
        if self.received > self.length:
            _fail(self, LONG, SOURCE, b"receive")
            return -1
    return 2


cdef int _receive_hole(copy_t *self, slot_t *slot) noexcept nogil:
    if self.source.recv_hole(self.source.stream, &slot.hole, 0) < 0:
        _fail(self, LIBVIRT, SOURCE, b"receive a hole")
        return -1
    if slot.hole <= 0:
        _fail(self, STUCK, SOURCE, b"receive a hole")
        return -1
    if slot.hole > self.length - self.received:
        _fail(self, LONG, SOURCE, b"receive a hole")
        return -1
    slot.length = 0
    self.received += slot.hole
    return 0


cdef void *_receive_all(void *arg) noexcept nogil:
    cdef copy_t *self = <copy_t *>arg
    cdef slot_t *slot
    cdef int what
    while True:
        slot = _free_slot(self)
        if slot == NULL:
            return NULL
        what = _receive_slot(self, slot)
        if what < 0:
            return NULL
        if slot.length:
            _checksum_data(&self.checksum, <unsigned char *>slot.data,
                           slot.length)
            _slot_filled(self)
        if what == 0:
            break
        if what == 1:
            slot = _free_slot(self)
            if slot == NULL or _receive_hole(self, slot) < 0:
                return NULL
            _checksum_hole(&self.checksum, slot.hole)
            _slot_filled(self)
    if self.received < self.length:
        _fail(self, SHORT, SOURCE, b"receive")
        return NULL
    lv.pthread_mutex_lock(&self.lock)
    self.ended = True
    lv.pthread_cond_broadcast(&self.changed)
    lv.pthread_mutex_unlock(&self.lock)
    return NULL


cdef int _wait_turn(copy_t *self, size_t nbytes) noexcept nogil:
    # Holds nbytes back until the bandwidth limit lets them go.
    cdef double now, wait
    cdef timespec t
    while True:
        if self.stopped:
            return -1
        now = _now()
        wait = self.next_send - now
        if wait <= 0:
            break
        t.tv_sec = 0
        t.tv_nsec = min(<long>(wait * 1e9) + 1, MAX_SLEEP_NS)
        nanosleep(&t, NULL)
    self.next_send = now + <double>nbytes / self.bandwidth
    return 0


cdef int _send_data(copy_t *self, const char *data,
                    size_t nbytes) noexcept nogil:
    # 65,536 at a time under a limit, so that a low one doesn't come in jerks.
    cdef size_t piece
    cdef int n
    while nbytes:
        if self.stopped:
            return -1
        piece = nbytes
        if self.bandwidth:
            piece = min(piece, <size_t>65536)
            if _wait_turn(self, piece) < 0:
                return -1
        n = self.destination.send(self.destination.stream, data, piece)
        if n <= 0 or <size_t>n > piece:
            _fail(self, LIBVIRT if n == -1 else STUCK, DESTINATION, b"send")
            return -1
        data += n
        nbytes -= n
        self.data_sent += n
    return 0


cdef int _send_hole(copy_t *self, long long nbytes) noexcept nogil:
    cdef size_t piece
    if self.sparse:
        if self.destination.send_hole(self.destination.stream, nbytes, 0) < 0:
            _fail(self, LIBVIRT, DESTINATION, b"send a hole")
            return -1
        self.holes_sent += nbytes
        return 0
    # What can't take a hole may hold old content there.
    while nbytes:
        piece = min(<size_t>nbytes, self.slot_size)
        if _send_data(self, self.zeroes, piece) < 0:
            return -1
        nbytes -= piece
    return 0


cdef void _send_all(copy_t *self) noexcept nogil:
    cdef slot_t *slot
    while True:
        slot = _full_slot(self)
        if slot == NULL:
            return
        if not self.has_destination:
            self.data_sent += slot.length
            self.holes_sent += slot.hole
        elif slot.length:
            if _send_data(self, slot.data, slot.length) < 0:
                return
        elif _send_hole(self, slot.hole) < 0:
            return
        _slot_emptied(self)


cdef void _finish(copy_t *self) noexcept nogil:
    # The source first: its error must keep the destination from being closed
    # as if it were whole.
    if self.source.finish(self.source.stream) < 0:
        _fail(self, LIBVIRT, SOURCE, b"finish")
    elif (self.has_destination
          and self.destination.finish(self.destination.stream) < 0):
        _fail(self, LIBVIRT, DESTINATION, b"finish")


cdef void _run(copy_t *self) noexcept nogil:
    cdef lv.pthread_t receiver
    if lv.pthread_create(&receiver, NULL, _receive_all, self) != 0:
        _fail(self, NO_THREAD, SOURCE, b"start")
    else:
        _send_all(self)
        lv.pthread_join(receiver, NULL)
        if not self.stopped:
            _finish(self)
    if self.failure != NONE:
        self.source.abort(self.source.stream)
        if self.has_destination:
            self.destination.abort(self.destination.stream)


# -- Python's side ----------------------------------------------------------

class PumpError(Exception):
    """A copy failed.

    :ivar side: 'source' or 'destination'
    :ivar operation: what was being done there
    :ivar reason: 'libvirt', 'short', 'long', 'stuck', 'cancelled', 'thread'
    :ivar code: libvirt's virErrorNumber, 0 where the error isn't libvirt's
    :ivar domain: libvirt's virErrorDomain
    :ivar message: libvirt's message
    :ivar transferred: bytes that had come from the source, holes included
    """

    def __init__(self, side, operation, reason, code, domain, message,
                 transferred):
        super().__init__("%s: %s: %s (libvirt code %d, domain %d) after %d "
                         "bytes" % (side, operation, message or reason, code,
                                    domain, transferred))
        self.side = side
        self.operation = operation
        self.reason = reason
        self.code = code
        self.domain = domain
        self.message = message
        self.transferred = transferred


_REASONS = {LIBVIRT: 'libvirt', SHORT: 'short', LONG: 'long', STUCK: 'stuck',
            CANCELLED: 'cancelled', NO_THREAD: 'thread'}


cdef int _take_end(object stream, end_t *end) except -1:
    cdef object capsule = getattr(stream, '_o', stream)
    if PyCapsule_IsValid(capsule, b"nova.pump.end"):
        end[0] = (<end_t *>PyCapsule_GetPointer(capsule, b"nova.pump.end"))[0]
        return 0
    if not PyCapsule_IsValid(capsule, b"virStreamPtr"):
        raise TypeError("not a libvirt stream: %r" % (stream,))
    end.stream = PyCapsule_GetPointer(capsule, b"virStreamPtr")
    end.recv = _lv_recv
    end.recv_hole = _lv_recv_hole
    end.send = _lv_send
    end.send_hole = _lv_send_hole
    end.finish = _lv_finish
    end.abort = _lv_abort
    end.last_error = _lv_last_error
    return 0


cdef class Copy:
    """One copy between two blocking streams, each opened by its owner.

    :param source: a libvirt.virStream on which a download has been started
    :param destination: a libvirt.virStream on which an upload has been
        started, or None to read and checksum the source alone
    :param length: bytes (holes included) which must come, no more, no less
    :param sparse: pass holes on as holes; else as zeroes. Only a new volume
        may be given holes, since what lies under them stays.
    :param bandwidth: bytes a second, holes not counted; 0: no limit
    :param key: of the checksum, any number but 0 modulo 2^61 - 1
    :param slot_size: bytes
    :param slots: how many slots the ring has; at least 2
    """

    cdef copy_t _copy
    cdef object _streams
    cdef bint _ran

    def __cinit__(self, source, destination, long long length, *,
                  bint sparse=True, long long bandwidth=0, uint64_t key=1,
                  size_t slot_size=DEF_SLOT_SIZE, size_t slots=DEF_SLOTS):
        cdef size_t i
        lv.pthread_mutex_init(&self._copy.lock, NULL)
        lv.pthread_cond_init(&self._copy.changed, NULL)
        if length <= 0 or bandwidth < 0 or slot_size == 0 or slots < 2:
            raise ValueError("length, bandwidth, slot_size or slots is out "
                             "of range")
        if key % PRIME == 0:
            raise ValueError("the key must not be 0 modulo 2^61 - 1")
        self._streams = (source, destination)
        _take_end(source, &self._copy.source)
        if destination is not None:
            _take_end(destination, &self._copy.destination)
            self._copy.has_destination = True
        self._copy.length = length
        self._copy.sparse = sparse
        self._copy.bandwidth = bandwidth
        self._copy.slot_size = slot_size
        _checksum_init(&self._copy.checksum, key)
        self._copy.zeroes = <char *>calloc(1, slot_size)
        self._copy.slots = <slot_t *>calloc(slots, sizeof(slot_t))
        if self._copy.zeroes == NULL or self._copy.slots == NULL:
            raise MemoryError()
        self._copy.slot_count = slots
        for i in range(slots):
            self._copy.slots[i].data = <char *>malloc(slot_size)
            if self._copy.slots[i].data == NULL:
                raise MemoryError()

    def __dealloc__(self):
        cdef size_t i
        if self._copy.slots != NULL:
            for i in range(self._copy.slot_count):
                free(self._copy.slots[i].data)
        free(self._copy.slots)
        free(self._copy.zeroes)
        lv.pthread_cond_destroy(&self._copy.changed)
        lv.pthread_mutex_destroy(&self._copy.lock)

    def run(self):
        """Copy all of it, then finish both streams; once only.

        On failure both streams are aborted.

        :raises: PumpError
        """
        if self._ran:
            raise RuntimeError("a copy runs once")
        self._ran = True
        with nogil:
            _run(&self._copy)
        if self._copy.failure != NONE:
            raise PumpError(
                'source' if self._copy.side == SOURCE else 'destination',
                (<bytes>self._copy.operation).decode(),
                _REASONS[self._copy.failure],
                self._copy.error.code, self._copy.error.domain,
                (<bytes>self._copy.error.message).decode(errors='replace'),
                self._copy.received)

    def cancel(self):
        """Make run() stop at its next packet; from any thread.

        A libvirt call that doesn't come back isn't ended by this: who must
        be sure ends the process.
        """
        with nogil:
            _fail(&self._copy, CANCELLED, SOURCE, b"cancel")

    @property
    def transferred(self):
        """Bytes sent on so far, holes included."""
        return self._copy.data_sent + self._copy.holes_sent

    @property
    def data(self):
        """Bytes sent on so far as data."""
        return self._copy.data_sent

    @property
    def holes(self):
        """Bytes passed on so far as holes."""
        return self._copy.holes_sent

    @property
    def checksum(self):
        """Of what was received so far, as an int; final after run()."""
        return _checksum_value(&self._copy.checksum)


def checksum(parts, uint64_t key):
    """Checksum of a content as Copy computes it.

    :param parts: an iterable of bytes objects and of ints, the latter
        lengths of holes
    :param key: as for Copy
    :returns: int
    """
    cdef checksum_t state
    cdef bytes data
    _checksum_init(&state, key)
    for part in parts:
        if isinstance(part, int):
            _checksum_hole(&state, part)
        else:
            data = part
            _checksum_data(&state, <const unsigned char *><char *>data,
                           len(data))
    return _checksum_value(&state)
