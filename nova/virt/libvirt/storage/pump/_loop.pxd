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

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc
from libc.stdlib cimport free
from libc.string cimport memcmp
from libc.string cimport memset
from posix.time cimport nanosleep
from posix.time cimport timespec

from nova.virt.libvirt.storage.pump cimport _libvirt as lv
from nova.virt.libvirt.storage.pump cimport _thread as th
from nova.virt.libvirt.storage.pump._checksum cimport checksum_data
from nova.virt.libvirt.storage.pump._checksum cimport checksum_hole
from nova.virt.libvirt.storage.pump._checksum cimport checksum_t
from nova.virt.libvirt.storage.pump._checksum cimport checksum_value
from nova.virt.libvirt.storage.pump._end cimport end_t
from nova.virt.libvirt.storage.pump._end cimport error_t
from nova.virt.libvirt.storage.pump._limit cimport limit_delay
from nova.virt.libvirt.storage.pump._limit cimport limit_t
from nova.virt.libvirt.storage.pump._limit cimport LIMITED_PIECE
from nova.virt.libvirt.storage.pump._ring cimport ring_emptied
from nova.virt.libvirt.storage.pump._ring cimport ring_end
from nova.virt.libvirt.storage.pump._ring cimport ring_filled
from nova.virt.libvirt.storage.pump._ring cimport ring_free
from nova.virt.libvirt.storage.pump._ring cimport ring_held
from nova.virt.libvirt.storage.pump._ring cimport ring_init
from nova.virt.libvirt.storage.pump._ring cimport ring_slot_to_empty
from nova.virt.libvirt.storage.pump._ring cimport ring_slot_to_fill
from nova.virt.libvirt.storage.pump._ring cimport ring_slot_to_take
from nova.virt.libvirt.storage.pump._ring cimport ring_stop
from nova.virt.libvirt.storage.pump._ring cimport ring_stopped
from nova.virt.libvirt.storage.pump._ring cimport ring_t
from nova.virt.libvirt.storage.pump._ring cimport ring_taken
from nova.virt.libvirt.storage.pump._ring cimport slot_t
from nova.virt.libvirt.storage.pump._table cimport STANDS
from nova.virt.libvirt.storage.pump._table cimport table_data
from nova.virt.libvirt.storage.pump._table cimport table_end
from nova.virt.libvirt.storage.pump._table cimport table_hole
from nova.virt.libvirt.storage.pump._table cimport table_t

cdef enum:
    # Zeroes are looked for in blocks of this size: smaller ones would cost a
    # packet for what they save.
    ZERO_BLOCK = 16384
    # Of a hole that was found, in bytes. While one grows, nothing shows that
    # the copy goes on.
    MAX_FOUND = 8 * 1024 * 1024

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
    bint find_holes     # send zeroes as holes
    long long length
    ring_t ring
    char *zeroes

    # The receiving thread's, and when that has ended anybody's.
    long long received
    checksum_t checksum
    table_t *table      # NULL: one checksum is enough
    uint64_t value      # the content's checksum, when all has come
    bint only_changes   # send what has another value than in the table
    long long bridge    # bytes of no change that go along after one
    long long bridging  # how many of them may still go along
    size_t room         # bytes of a slot that may be filled
    long long hole      # bytes of one that has come and isn't passed on yet
    long long skip      # bytes that stand at the destination, not told yet

    # The calling thread's: bytes sent from the slots that it holds.
    long long held
    long long found     # bytes of a hole that was found and isn't sent yet

    # Written by the calling thread, read by any.
    long long data_sent
    long long holes_sent
    long long unchanged     # the receiving thread writes this one

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
    self.room = slot_size
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
    if self.source.stop != NULL:
        self.source.stop(self.source.stream)
    if self.has_destination and self.destination.stop != NULL:
        self.destination.stop(self.destination.stream)


cdef inline failure_t without_progress(int answer) noexcept nogil:
    return FAILED if answer == -1 else STUCK


# -- the receiving thread ---------------------------------------------------

cdef inline int receive_data(copy_t *self, slot_t *slot) noexcept nogil:
    # Adds to the slot what comes next; returns 1 for that, 0 at the stream's
    # end, -3 if a hole comes next, -1 after fail().
    cdef size_t room = self.room - slot.length
    cdef int n
    if ring_stopped(&self.ring):
        return -1
    n = self.source.recv(self.source.stream, slot.data + slot.length, room,
                         lv.VIR_STREAM_RECV_STOP_AT_HOLE)
    if n == 0 or n == -3:
        return n
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
    return 1


cdef inline int receive_slot(copy_t *self, slot_t *slot) noexcept nogil:
    # Fills the slot as far as it goes; returns 0 at the stream's end, 1 if a
    # hole comes next, 2 if the slot is full, -1 after fail().
    cdef int n
    slot.length = 0
    slot.hole = 0
    while slot.length < self.ring.slot_size:
        n = receive_data(self, slot)
        if n == 0:
            return 0
        if n == -3:
            return 1
        if n < 0:
            return -1
    return 2


cdef inline int receive_hole(copy_t *self, long long *hole) noexcept nogil:
    cdef int n = self.source.recv_hole(self.source.stream, hole, 0)
    if n < 0:
        fail(self, without_progress(n), SOURCE, b"receive a hole")
        return -1
    if hole[0] <= 0:
        fail(self, STUCK, SOURCE, b"receive a hole")
        return -1
    if hole[0] > self.length - self.received:
        fail(self, LONG, SOURCE, b"receive a hole")
        return -1
    self.received += hole[0]
    return 0


cdef inline void account_data(copy_t *self, slot_t *slot) noexcept nogil:
    if self.table != NULL:
        table_data(self.table, slot.data, slot.length)
    else:
        checksum_data(&self.checksum, <unsigned char *>slot.data, slot.length)


cdef inline void account_hole(copy_t *self, slot_t *slot) noexcept nogil:
    if self.table != NULL:
        table_hole(self.table, slot.hole)
    else:
        checksum_hole(&self.checksum, slot.hole)


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
            account_data(self, slot)
            ring_filled(&self.ring)
        if what == 0:
            break
        if what == 1:
            slot = ring_slot_to_fill(&self.ring)
            if slot == NULL or receive_hole(self, &slot.hole) < 0:
                return NULL
            slot.length = 0
            account_hole(self, slot)
            ring_filled(&self.ring)
    if self.received < self.length:
        fail(self, SHORT, SOURCE, b"receive")
        return NULL
    self.value = (checksum_value(&self.checksum) if self.table == NULL else
                  table_end(self.table, self.received))
    ring_end(&self.ring)
    return NULL


# -- the receiving thread, where most stands at the destination -------------

cdef inline void stands(copy_t *self, long long nbytes) noexcept nogil:
    self.skip += nbytes
    th.add(&self.unchanged, nbytes)


cdef inline bint is_known(copy_t *self, size_t block) noexcept nogil:
    # The last block, too, unless it is whole: its value is that of more bytes.
    return (<long long>(block + 1) * <long long>self.table.block_size <=
            self.length and self.table.marks[block] & STANDS)


cdef inline size_t room_to_known(copy_t *self) noexcept nogil:
    # How much of a slot is filled before a block comes that is known. What a
    # hole has begun with comes in any case.
    cdef size_t size = self.table.block_size
    cdef size_t block = self.table.block, room = 0
    if self.hole > 0:
        room = size * min(<long long>(self.ring.slot_size // size),
                          (self.hole + <long long>size - 1) // size)
        block += room // size
    while room < self.ring.slot_size and not is_known(self, block):
        room += size
        block += 1
    return min(room, self.ring.slot_size)


cdef inline int pass_known_over(copy_t *self) noexcept nogil:
    # The blocks that are known and come next; -1 after fail().
    cdef long long nbytes = 0
    if self.hole:
        return 0
    while is_known(self, self.table.block):
        self.table.block += 1
        nbytes += self.table.block_size
    if not nbytes:
        return 0
    if self.source.pass_over(self.source.stream, nbytes) < 0:
        fail(self, FAILED, SOURCE, b"pass over")
        return -1
    self.received += nbytes
    stands(self, nbytes)
    return 0


cdef inline int receive_blocks(copy_t *self, slot_t *slot) noexcept nogil:
    # Fills the slot with whole blocks, small holes among them as zeroes. Stops
    # before a block that is all hole, of which self.hole tells, or known;
    # returns 1 then, 0 at the stream's end, 2 if there is no more room, -1
    # after fail().
    cdef size_t size = self.table.block_size, n
    cdef int got
    slot.length = 0
    slot.hole = 0
    self.room = room_to_known(self)
    while slot.length < self.room:
        if self.hole:
            n = size - slot.length % size
            if n == size and self.hole >= <long long>size:
                return 1
            n = min(n, <size_t>self.hole)
            memset(slot.data + slot.length, 0, n)
            slot.length += n
            self.hole -= n
            continue
        got = receive_data(self, slot)
        if got == -3:
            got = receive_hole(self, &self.hole)
        elif got == 0:
            return 0
        if got < 0:
            return -1
    return 2


cdef inline bint goes_along(copy_t *self, long long nbytes) noexcept nogil:
    # Whether what stands at the destination is sent nevertheless: where each
    # piece costs, fewer and longer ones cost less.
    if nbytes > self.bridging:
        self.bridging = 0
        return False
    self.bridging -= nbytes
    return True


cdef inline bint has_changed(copy_t *self, slot_t *slot) noexcept nogil:
    # Leaves of the slot what there is from the first block that has changed up
    # to the last one, and what goes along; whether there is any.
    cdef size_t size = self.table.block_size
    cdef size_t at = 0, begin = 0, end = 0, n, length = slot.length
    while at < length:
        n = min(size, length - at)
        self.table.changed = False
        table_data(self.table, slot.data + at, n)
        if n < size:
            # the last one of all: its value is that with zeroes behind it
            self.value = table_end(self.table, self.received)
        if self.table.changed:
            if not end:
                begin = at
            end = at + n
        at += n
    if end:
        if goes_along(self, begin):
            begin = 0
        self.bridging = self.bridge
        if goes_along(self, length - end):
            end = length
    elif length and goes_along(self, length):
        end = length
    else:
        stands(self, length)
        return False
    stands(self, begin)
    slot.skip = self.skip
    slot.start = begin
    slot.length = end - begin
    self.skip = 0
    stands(self, length - end)
    return True


cdef inline int pass_hole_on(copy_t *self) noexcept nogil:
    # The blocks that are all hole: those that were no zeroes become such.
    cdef long long size = self.table.block_size, nbytes
    cdef slot_t *slot
    cdef bint zero
    while self.hole >= size:
        zero = self.table.values[self.table.block] == 0
        nbytes = 0
        while self.hole >= size and zero == (
                self.table.values[self.table.block] == 0):
            table_hole(self.table, size)
            nbytes += size
            self.hole -= size
        if not zero:
            self.bridging = self.bridge
        elif not goes_along(self, nbytes):
            stands(self, nbytes)
            continue
        slot = ring_slot_to_fill(&self.ring)
        if slot == NULL:
            return -1
        slot.skip = self.skip
        slot.length = 0
        slot.hole = nbytes
        self.skip = 0
        ring_filled(&self.ring)
    return 0


cdef inline void *receive_changes(void *arg) noexcept nogil:
    cdef copy_t *self = <copy_t *>arg
    cdef slot_t *slot
    cdef int what = 2
    while what:
        if pass_known_over(self) < 0:
            return NULL
        slot = ring_slot_to_fill(&self.ring)
        if slot == NULL:
            return NULL
        what = receive_blocks(self, slot)
        if what < 0:
            return NULL
        if has_changed(self, slot):
            ring_filled(&self.ring)
        if pass_hole_on(self) < 0:
            return NULL
    if self.received < self.length:
        fail(self, SHORT, SOURCE, b"receive")
        return NULL
    if self.length % <long long>self.table.block_size == 0:
        self.value = table_end(self.table, self.received)
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


cdef inline int send_found(copy_t *self) noexcept nogil:
    cdef long long nbytes = self.found
    self.found = 0
    return send_hole(self, nbytes) if nbytes else 0


cdef inline int send_parts(copy_t *self, slot_t *slot) noexcept nogil:
    # Sends what isn't zeroes. The slot's length becomes what was sent of it,
    # since that alone has to stay.
    cdef char *data = slot.data + slot.start
    cdef size_t at = 0, begin, n, length = slot.length
    slot.length = 0
    while at < length:
        begin = at
        while at < length:
            n = min(<size_t>ZERO_BLOCK, length - at)
            if memcmp(data + at, self.zeroes, n) == 0:
                break
            at += n
        if at > begin:
            if send_found(self) < 0:
                return -1
            if send_data(self, data + begin, at - begin) < 0:
                return -1
            slot.length += at - begin
        if at < length:
            at += n
            self.found += n
            if self.found >= MAX_FOUND and send_found(self) < 0:
                return -1
    return 0


cdef inline int send_slot(copy_t *self, slot_t *slot) noexcept nogil:
    if slot.length and self.find_holes:
        return send_parts(self, slot)
    if send_found(self) < 0:
        return -1
    if slot.length:
        return send_data(self, slot.data + slot.start, slot.length)
    return send_hole(self, slot.hole)


cdef inline long long settle(copy_t *self, long long most) noexcept nogil:
    # How many of the bytes sent must stay; -1 after fail().
    if not self.has_destination or self.destination.settle == NULL:
        return 0
    cdef long long kept = self.destination.settle(self.destination.stream,
                                                  most)
    if kept < 0:
        fail(self, FAILED if kept == -1 else STUCK, DESTINATION, b"send")
        return -1
    if kept > most:
        fail(self, BROKEN, DESTINATION, b"send")
        return -1
    return kept


cdef inline int give_back(copy_t *self) noexcept nogil:
    # Gives back the slots that need not stay. Half of them are for the
    # receiving thread in any case.
    cdef long long after
    cdef long long kept = settle(self, self.held)
    if kept < 0:
        return -1
    while ring_held(&self.ring):
        after = self.held - ring_slot_to_empty(&self.ring).length
        if kept > after:
            if ring_held(&self.ring) <= self.ring.slot_count // 2:
                return 0
            kept = settle(self, after)
            if kept < 0:
                return -1
        self.held = after
        ring_emptied(&self.ring)
    return 0


cdef inline void send_all(copy_t *self) noexcept nogil:
    cdef slot_t *slot
    while True:
        slot = ring_slot_to_take(&self.ring)
        if slot == NULL:
            if not ring_stopped(&self.ring):
                send_found(self)
            return
        if slot.skip and self.has_destination and self.destination.skip(
                self.destination.stream, slot.skip) < 0:
            fail(self, FAILED, DESTINATION, b"skip")
            return
        if not self.has_destination:
            th.add(&self.data_sent, slot.length)
            th.add(&self.holes_sent, slot.hole)
        elif send_slot(self, slot) < 0:
            return
        ring_taken(&self.ring)
        self.held += slot.length
        if give_back(self) < 0:
            return


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


cdef inline bint conclude(copy_t *self) noexcept nogil:
    # Whether it has failed; a cancel from now on comes too late.
    th.pthread_mutex_lock(&self.lock)
    self.over = True
    cdef bint failed = self.failure != NONE
    th.pthread_mutex_unlock(&self.lock)
    return failed


cdef inline bint run(copy_t *self) noexcept nogil:
    # Whether it has failed.
    cdef th.pthread_t receiver
    if th.pthread_create(&receiver, NULL,
                         receive_changes if self.only_changes else receive_all,
                         self) != 0:
        fail(self, NO_THREAD, SOURCE, b"start")
    else:
        send_all(self)
        th.pthread_join(receiver, NULL)
        if not ring_stopped(&self.ring):
            finish(self)
    if not conclude(self):
        return False
    self.source.abort(self.source.stream)
    if self.has_destination:
        self.destination.abort(self.destination.stream)
    return True
