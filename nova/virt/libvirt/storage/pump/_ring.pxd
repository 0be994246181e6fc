# cython: cdivision=True
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

"""The ring of slots between the receiving thread and the sending one.

The receiving thread holds one slot at a time, the sending one as many as it
has taken; a slot is its own until it says that it has filled or emptied it,
and the ring's lock hands over what stands in it. The memory of a copy is
slot_count * slot_size, however far one side is ahead.
"""

from libc.stdlib cimport calloc
from libc.stdlib cimport free

from nova.virt.libvirt.storage.pump cimport _thread as th

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t nbytes)

cdef enum:
    # What O_DIRECT asks of memory.
    ALIGNMENT = 4096

cdef struct slot_t:
    char *data
    long long skip      # bytes that stand at the destination, before it
    size_t start        # where its data begins
    size_t length       # bytes of data; 0: the slot is a hole
    long long hole      # bytes

cdef struct ring_t:
    slot_t *slots
    size_t slot_size
    size_t slot_count
    th.pthread_mutex_t lock
    th.pthread_cond_t changed
    # Slots filled, taken and emptied since the start: all only grow.
    size_t filled
    size_t taken        # the sending thread's alone
    size_t emptied
    bint ended          # nothing more will be filled
    long long stopped   # nobody shall wait; read without the lock


cdef inline int ring_init(ring_t *self, size_t slot_size,
                          size_t slot_count) noexcept nogil:
    # -1 without memory. The ring has come zeroed, and ring_free() follows in
    # either case.
    cdef size_t i
    th.pthread_mutex_init(&self.lock, NULL)
    th.pthread_cond_init(&self.changed, NULL)
    self.slots = <slot_t *>calloc(slot_count, sizeof(slot_t))
    if self.slots == NULL:
        return -1
    self.slot_size = slot_size
    self.slot_count = slot_count
    for i in range(slot_count):
        if posix_memalign(<void **>&self.slots[i].data, ALIGNMENT,
                          slot_size) != 0:
            self.slots[i].data = NULL
            return -1
    return 0


cdef inline void ring_free(ring_t *self) noexcept nogil:
    cdef size_t i
    for i in range(self.slot_count):
        free(self.slots[i].data)
    free(self.slots)
    th.pthread_cond_destroy(&self.changed)
    th.pthread_mutex_destroy(&self.lock)


cdef inline bint ring_stopped(ring_t *self) noexcept nogil:
    return th.load(&self.stopped)


cdef inline void ring_stop(ring_t *self) noexcept nogil:
    # Wakes up both sides; from any thread.
    th.pthread_mutex_lock(&self.lock)
    th.store(&self.stopped, True)
    th.pthread_cond_broadcast(&self.changed)
    th.pthread_mutex_unlock(&self.lock)


# -- the receiving thread's side --------------------------------------------

cdef inline slot_t *ring_slot_to_fill(ring_t *self) noexcept nogil:
    # Waits for one; NULL when the ring was stopped.
    th.pthread_mutex_lock(&self.lock)
    while (not ring_stopped(self)
           and self.filled - self.emptied == self.slot_count):
        th.pthread_cond_wait(&self.changed, &self.lock)
    cdef bint stopped = ring_stopped(self)
    th.pthread_mutex_unlock(&self.lock)
    return NULL if stopped else &self.slots[self.filled % self.slot_count]


cdef inline void ring_filled(ring_t *self) noexcept nogil:
    th.pthread_mutex_lock(&self.lock)
    self.filled += 1
    th.pthread_cond_broadcast(&self.changed)
    th.pthread_mutex_unlock(&self.lock)


cdef inline void ring_end(ring_t *self) noexcept nogil:
    th.pthread_mutex_lock(&self.lock)
    self.ended = True
    th.pthread_cond_broadcast(&self.changed)
    th.pthread_mutex_unlock(&self.lock)


# -- the sending thread's side ----------------------------------------------

cdef inline slot_t *ring_slot_to_take(ring_t *self) noexcept nogil:
    # Waits for one; NULL when the ring was stopped, or at the end.
    th.pthread_mutex_lock(&self.lock)
    while (not ring_stopped(self) and not self.ended
           and self.filled == self.taken):
        th.pthread_cond_wait(&self.changed, &self.lock)
    cdef bint none = ring_stopped(self) or self.filled == self.taken
    th.pthread_mutex_unlock(&self.lock)
    return NULL if none else &self.slots[self.taken % self.slot_count]


cdef inline void ring_taken(ring_t *self) noexcept nogil:
    self.taken += 1


cdef inline size_t ring_held(ring_t *self) noexcept nogil:
    # How many slots have been taken and not emptied.
    return self.taken - self.emptied


cdef inline slot_t *ring_slot_to_empty(ring_t *self) noexcept nogil:
    # The one that has been held for the longest time.
    return &self.slots[self.emptied % self.slot_count]


cdef inline void ring_emptied(ring_t *self) noexcept nogil:
    th.pthread_mutex_lock(&self.lock)
    self.emptied += 1
    th.pthread_cond_broadcast(&self.changed)
    th.pthread_mutex_unlock(&self.lock)
