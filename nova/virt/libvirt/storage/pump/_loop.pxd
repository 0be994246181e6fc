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

"""The copy itself: two threads, a ring between them, an end on either side.

Nothing here needs the GIL. The first failure wins; it stops both threads.
"""

from libc.stdlib cimport calloc
from libc.stdlib cimport free
from libc.string cimport memset
from posix.time cimport nanosleep
from posix.time cimport timespec

from nova.virt.libvirt.storage.pump cimport _libvirt as lv
from nova.virt.libvirt.storage.pump cimport _thread as th
from nova.virt.libvirt.storage.pump._checksum cimport checksum_data
from nova.virt.libvirt.storage.pump._checksum cimport checksum_hole
from nova.virt.libvirt.storage.pump._checksum cimport checksum_t
from nova.virt.libvirt.storage.pump._end cimport end_t
from nova.virt.libvirt.storage.pump._end cimport error_t
from nova.virt.libvirt.storage.pump._limit cimport limit_delay
from nova.virt.libvirt.storage.pump._limit cimport limit_t
from nova.virt.libvirt.storage.pump._limit cimport LIMITED_PIECE
from nova.virt.libvirt.storage.pump._ring cimport ring_emptied
from nova.virt.libvirt.storage.pump._ring cimport ring_end
from nova.virt.libvirt.storage.pump._ring cimport ring_filled
from nova.virt.libvirt.storage.pump._ring cimport ring_free
from nova.virt.libvirt.storage.pump._ring cimport ring_init
from nova.virt.libvirt.storage.pump._ring cimport ring_slot_to_empty
from nova.virt.libvirt.storage.pump._ring cimport ring_slot_to_fill
from nova.virt.libvirt.storage.pump._ring cimport ring_stop
from nova.virt.libvirt.storage.pump._ring cimport ring_stopped
from nova.virt.libvirt.storage.pump._ring cimport ring_t
from nova.virt.libvirt.storage.pump._ring cimport slot_t

cdef enum side_t:
    SOURCE = 0
    DESTINATION = 1

cdef enum failure_t:
    NONE = 0
    FAILED = 1          # an end says so; the error is its own
    SHORT = 2           # the source ended before the length
    LONG = 3            # the source gave more than the length
    STUCK = 4           # a call came back without progress and without error
    BROKEN = 5          # a call says that it did more than it was asked to
    CANCELLED = 6
    NO_THREAD = 7

cdef struct copy_t:
    end_t source
    end_t destination
    bint has_destination
    bint sparse
    long long length
    ring_t ring
    char *zeroes

    # The receiving thread's, and when that has ended anybody's.
    long long received
    checksum_t checksum

    # Written by the calling thread, read by any.
    long long data_sent
    long long holes_sent

    limit_t limit

    th.pthread_mutex_t lock     # for all that follows
    bint over                   # no failure counts any more
    failure_t failure           # the first one
    side_t side
    const char *operation
    error_t error


cdef inline int copy_init(copy_t *self, size_t slot_size,
                          size_t slots) noexcept nogil:
    # -1 without memory. The copy has come zeroed, and copy_free() follows in
    # either case.
    th.pthread_mutex_init(&self.lock, NULL)
    self.zeroes = <char *>calloc(1, slot_size)
    if ring_init(&self.ring, slot_size, slots) < 0 or self.zeroes == NULL:
        return -1
    return 0


cdef inline void copy_free(copy_t *self) noexcept nogil:
    ring_free(&self.ring)
    free(self.zeroes)
    th.pthread_mutex_destroy(&self.lock)


cdef inline void fail(copy_t *self, failure_t failure, side_t side,
                      const char *operation) noexcept nogil:
    cdef end_t *end = (&self.source if side == SOURCE else &self.destination)
    cdef error_t error
    memset(&error, 0, sizeof(error_t))
    if failure == FAILED:
        end.last_error(end.stream, &error)
        error.message[sizeof(error.message) - 1] = 0
    th.pthread_mutex_lock(&self.lock)
    if self.failure == NONE and not self.over:
        self.failure = failure
        self.side = side
        self.operation = operation
        self.error = error
    th.pthread_mutex_unlock(&self.lock)
    ring_stop(&self.ring)


cdef inline failure_t without_progress(int answer) noexcept nogil:
    return FAILED if answer == -1 else STUCK


# -- the receiving thread ---------------------------------------------------

cdef inline int receive_slot(copy_t *self, slot_t *slot) noexcept nogil:
    # Fills the slot as far as it goes; returns 0 at the stream's end, 1 if a
    # hole comes next, 2 if the slot is full, -1 after fail().
    cdef size_t room
    cdef int n
    slot.length = 0
    slot.hole = 0
    while slot.length < self.ring.slot_size:
        if ring_stopped(&self.ring):
            return -1
        room = self.ring.slot_size - slot.length
        n = self.source.recv(self.source.stream, slot.data + slot.length,
                             room, lv.VIR_STREAM_RECV_STOP_AT_HOLE)
        if n == 0:
            return 0
        if n == -3:
            return 1
        if n < 0:
            fail(self, without_progress(n), SOURCE, b"receive")
            return -1
        if <size_t>n > room:
            fail(self, BROKEN, SOURCE, b"receive")
            return -1
        slot.length += n
        self.received += n
        if self.received > self.length:
            fail(self, LONG, SOURCE, b"receive")
            return -1
    return 2


cdef inline int receive_hole(copy_t *self, slot_t *slot) noexcept nogil:
    cdef int n = self.source.recv_hole(self.source.stream, &slot.hole, 0)
    if n < 0:
        fail(self, without_progress(n), SOURCE, b"receive a hole")
        return -1
    if slot.hole <= 0:
        fail(self, STUCK, SOURCE, b"receive a hole")
        return -1
    if slot.hole > self.length - self.received:
        fail(self, LONG, SOURCE, b"receive a hole")
        return -1
    slot.length = 0
    self.received += slot.hole
    return 0


cdef inline void *receive_all(void *arg) noexcept nogil:
    cdef copy_t *self = <copy_t *>arg
    cdef slot_t *slot
    cdef int what
    while True:
        slot = ring_slot_to_fill(&self.ring)
        if slot == NULL:
            return NULL
        what = receive_slot(self, slot)
        if what < 0:
            return NULL
        if slot.length:
            checksum_data(&self.checksum, <unsigned char *>slot.data,
                          slot.length)
            ring_filled(&self.ring)
        if what == 0:
            break
        if what == 1:
            slot = ring_slot_to_fill(&self.ring)
            if slot == NULL or receive_hole(self, slot) < 0:
                return NULL
            checksum_hole(&self.checksum, slot.hole)
            ring_filled(&self.ring)
    if self.received < self.length:
        fail(self, SHORT, SOURCE, b"receive")
        return NULL
    ring_end(&self.ring)
    return NULL


# -- the calling thread -----------------------------------------------------

cdef inline int wait_turn(copy_t *self, size_t nbytes) noexcept nogil:
    # Holds nbytes back until the limit lets them go.
    cdef timespec t
    while not ring_stopped(&self.ring):
        t.tv_sec = 0
        t.tv_nsec = limit_delay(&self.limit, nbytes)
        if t.tv_nsec == 0:
            return 0
        nanosleep(&t, NULL)
    return -1


cdef inline int send_data(copy_t *self, const char *data,
                          size_t nbytes) noexcept nogil:
    cdef size_t piece
    cdef int n
    while nbytes:
        if ring_stopped(&self.ring):
            return -1
        piece = nbytes
        if th.load(&self.limit.bandwidth):
            piece = min(piece, <size_t>LIMITED_PIECE)
            if wait_turn(self, piece) < 0:
                return -1
        n = self.destination.send(self.destination.stream, data, piece)
        if n <= 0:
            fail(self, without_progress(n), DESTINATION, b"send")
            return -1
        if <size_t>n > piece:
            fail(self, BROKEN, DESTINATION, b"send")
            return -1
        data += n
        nbytes -= n
        th.add(&self.data_sent, n)
    return 0


cdef inline int send_hole(copy_t *self, long long nbytes) noexcept nogil:
    cdef size_t piece
    cdef int n
    if self.sparse:
        n = self.destination.send_hole(self.destination.stream, nbytes, 0)
        if n < 0:
            fail(self, without_progress(n), DESTINATION, b"send a hole")
            return -1
        th.add(&self.holes_sent, nbytes)
        return 0
    # What can't take a hole may hold old content there.
    while nbytes:
        piece = min(<size_t>nbytes, self.ring.slot_size)
        if send_data(self, self.zeroes, piece) < 0:
            return -1
        nbytes -= piece
    return 0


cdef inline void send_all(copy_t *self) noexcept nogil:
    cdef slot_t *slot
    while True:
        slot = ring_slot_to_empty(&self.ring)
        if slot == NULL:
            return
        if not self.has_destination:
            th.add(&self.data_sent, slot.length)
            th.add(&self.holes_sent, slot.hole)
        elif slot.length:
            if send_data(self, slot.data, slot.length) < 0:
                return
        elif send_hole(self, slot.hole) < 0:
            return
        ring_emptied(&self.ring)


cdef inline void finish(copy_t *self) noexcept nogil:
    # The source first: its error must keep the destination from being closed
    # as if it were whole.
    cdef int n = self.source.finish(self.source.stream)
    if n < 0:
        fail(self, without_progress(n), SOURCE, b"finish")
        return
    if self.has_destination and not ring_stopped(&self.ring):
        n = self.destination.finish(self.destination.stream)
        if n < 0:
            fail(self, without_progress(n), DESTINATION, b"finish")


cdef inline bint settle(copy_t *self) noexcept nogil:
    # Whether it has failed; a cancel from now on comes too late.
    th.pthread_mutex_lock(&self.lock)
    self.over = True
    cdef bint failed = self.failure != NONE
    th.pthread_mutex_unlock(&self.lock)
    return failed


cdef inline bint run(copy_t *self) noexcept nogil:
    # Whether it has failed.
    cdef th.pthread_t receiver
    if th.pthread_create(&receiver, NULL, receive_all, self) != 0:
        fail(self, NO_THREAD, SOURCE, b"start")
    else:
        send_all(self)
        th.pthread_join(receiver, NULL)
        if not ring_stopped(&self.ring):
            finish(self)
    if not settle(self):
        return False
    self.source.abort(self.source.stream)
    if self.has_destination:
        self.destination.abort(self.destination.stream)
    return True
