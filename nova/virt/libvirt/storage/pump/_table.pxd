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

"""A checksum for each block of a content, from which the whole's follows.

The values are those of _checksum.pxd over blocks of one size, the last one as
if zeroes followed it: a block of zeroes has 0, and a content that grows by a
hole keeps its values. What is added goes on from where the last piece ended.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memset

from nova.virt.libvirt.storage.pump._checksum cimport BLOCK
from nova.virt.libvirt.storage.pump._checksum cimport checksum_data
from nova.virt.libvirt.storage.pump._checksum cimport checksum_hole
from nova.virt.libvirt.storage.pump._checksum cimport checksum_init
from nova.virt.libvirt.storage.pump._checksum cimport checksum_t
from nova.virt.libvirt.storage.pump._checksum cimport PRIME
from nova.virt.libvirt.storage.pump._checksum cimport reduce_61
from nova.virt.libvirt.storage.pump._checksum cimport uint128_t

cdef enum mark_t:
    STANDS = 1          # its value is known: its bytes need not be read
    CHANGED = 2         # its value is another one than before this pass

cdef struct table_t:
    uint64_t *values
    unsigned char *marks    # of each block
    size_t block_size       # bytes; a multiple of BLOCK
    size_t block            # the number of the one that isn't complete
    checksum_t state        # of its bytes so far
    bint changed            # a value is another one than it was


cdef inline void table_begin(table_t *self, uint64_t key) noexcept nogil:
    # A pass over the content from its start on.
    self.block = 0
    self.changed = False
    checksum_init(&self.state, key)


cdef inline void table_close_block(table_t *self) noexcept nogil:
    cdef uint64_t value = self.state.value % PRIME
    if self.values[self.block] != value:
        self.values[self.block] = value
        self.marks[self.block] |= CHANGED
        self.changed = True
    self.block += 1
    self.state.value = 0
    self.state.length = 0


cdef inline size_t table_missing(table_t *self) noexcept nogil:
    # How many bytes complete the block that has begun.
    return self.block_size - self.state.length


cdef inline void table_data(table_t *self, const char *data,
                            size_t nbytes) noexcept nogil:
    cdef size_t n
    while nbytes:
        n = min(nbytes, table_missing(self))
        checksum_data(&self.state, <const unsigned char *>data, n)
        data += n
        nbytes -= n
        if self.state.length == self.block_size:
            table_close_block(self)


cdef inline void table_hole(table_t *self, uint64_t nbytes) noexcept nogil:
    cdef uint64_t n
    while nbytes:
        n = min(nbytes, <uint64_t>table_missing(self))
        if self.state.length or n < self.block_size:
            checksum_hole(&self.state, n)
            if self.state.length == self.block_size:
                table_close_block(self)
        elif self.values[self.block]:
            table_close_block(self)
        else:
            # not read-write: memory of zeroes takes up none
            self.block += 1
        nbytes -= n


cdef inline uint64_t times_power(uint64_t value, uint64_t key,
                                 uint64_t nbytes) noexcept nogil:
    # The value when so many bytes of zeroes have followed, rounded up.
    cdef checksum_t state
    checksum_init(&state, key)
    state.value = value
    checksum_hole(&state, (nbytes + BLOCK - 1) // BLOCK * BLOCK)
    return state.value


cdef inline uint64_t table_end(table_t *self,
                               uint64_t length) noexcept nogil:
    # Closes the last block; returns checksum_value() of the whole.
    cdef uint64_t key = self.state.power[1]
    cdef uint64_t value = 0, last = 0
    cdef uint64_t power = times_power(1, key, self.block_size)
    cdef uint64_t rest = self.state.length
    cdef size_t i, complete = self.block
    if rest:
        checksum_hole(&self.state, -rest % BLOCK)
        last = self.state.value
        if self.state.length < self.block_size:
            checksum_hole(&self.state, table_missing(self))
        table_close_block(self)
    for i in range(complete):
        value = reduce_61(<uint128_t>value * power + self.values[i])
    if rest:
        value = reduce_61(<uint128_t>times_power(value, key, rest) + last)
    return reduce_61((<uint128_t>value + length) * key) % PRIME
