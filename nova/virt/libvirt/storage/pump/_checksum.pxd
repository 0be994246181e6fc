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

"""A checksum of a content that doesn't see how zeroes came.

A polynomial over the content's 32-bit words modulo the prime 2^61 - 1,
evaluated at a random key (Carter and Wegman, 1979: for contents of n words
that differ, at most n in 2^61 keys agree, whoever chose the contents). It is
used rather than a hash because a run of zeroes costs one exponentiation.

Bytes are folded in as they come, by one thread; a block of 32 that isn't
complete waits in tail.
"""

from libc.stdint cimport uint32_t
from libc.stdint cimport uint64_t
from libc.string cimport memcpy
from libc.string cimport memset

cdef extern from "<endian.h>" nogil:
    uint32_t le32toh(uint32_t word)

cdef extern from *:
    """
    #define PUMP_PRIME ((1ULL << 61) - 1)
    """
    ctypedef unsigned long long uint128_t "unsigned __int128"
    const uint64_t PRIME "PUMP_PRIME"

cdef enum:
    BLOCK = 32

cdef struct checksum_t:
    uint64_t power[9]           # key^0 .. key^8
    uint64_t value
    unsigned char tail[BLOCK]   # the bytes of a block not yet complete
    size_t tailed
    uint64_t length


# Perhaps PRIME itself instead of 0, which is as good until the end.
cdef inline uint64_t reduce_61(uint128_t x) noexcept nogil:
    cdef uint64_t y = <uint64_t>(x & PRIME) + <uint64_t>(x >> 61)
    return (y & PRIME) + (y >> 61)


cdef inline void checksum_init(checksum_t *self, uint64_t key) noexcept nogil:
    cdef int i
    memset(self, 0, sizeof(checksum_t))
    self.power[0] = 1
    for i in range(1, 9):
        self.power[i] = reduce_61(
            <uint128_t>self.power[i - 1] * (key % PRIME))


cdef inline void checksum_blocks(checksum_t *self,
                                 const unsigned char *data,
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
        value = reduce_61(total)
        data += BLOCK
        count -= 1
    self.value = value


cdef inline void checksum_data(checksum_t *self, const unsigned char *data,
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
        checksum_blocks(self, self.tail, 1)
        self.tailed = 0
    n = nbytes // BLOCK
    checksum_blocks(self, data, n)
    self.tailed = nbytes - n * BLOCK
    memcpy(self.tail, data + n * BLOCK, self.tailed)


cdef inline void checksum_hole(checksum_t *self,
                               uint64_t nbytes) noexcept nogil:
    cdef uint64_t n, square
    cdef unsigned char zeroes[BLOCK]
    memset(zeroes, 0, BLOCK)
    if self.tailed:
        n = min(<uint64_t>(BLOCK - self.tailed), nbytes)
        checksum_data(self, zeroes, n)
        nbytes -= n
    n = nbytes // BLOCK
    self.length += n * BLOCK
    square = self.power[8]
    while n:
        if n & 1:
            self.value = reduce_61(<uint128_t>self.value * square)
        square = reduce_61(<uint128_t>square * square)
        n >>= 1
    checksum_data(self, zeroes, nbytes % BLOCK)


cdef inline uint64_t checksum_value(checksum_t *self) noexcept nogil:
    cdef checksum_t last = self[0]
    if last.tailed:
        memset(last.tail + last.tailed, 0, BLOCK - last.tailed)
        checksum_blocks(&last, last.tail, 1)
    # The length goes in as one more word.
    return reduce_61((<uint128_t>last.value + last.length)
                     * last.power[1]) % PRIME
