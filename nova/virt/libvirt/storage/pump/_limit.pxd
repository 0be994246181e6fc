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

"""A limit of bandwidth, which may be changed while it holds."""

from posix.time cimport clock_gettime
from posix.time cimport CLOCK_MONOTONIC
from posix.time cimport timespec

from nova.virt.libvirt.storage.pump cimport _thread as th

cdef enum:
    # How long nobody looks at cancel or at a new limit, and how much of what
    # was slept too long is made up for.
    MAX_SLEEP_NS = 20 * 1000 * 1000
    # Sent at a time under a limit, so that a low one doesn't come in jerks.
    LIMITED_PIECE = 65536

cdef struct limit_t:
    # Bytes a second, 0 for no limit; written by any thread.
    long long bandwidth
    # The sending thread's: when the last piece was due, and its bytes.
    double last_due
    size_t last_piece


cdef inline double seconds_now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + t.tv_nsec / 1e9


cdef inline long limit_delay(limit_t *self, size_t nbytes) noexcept nogil:
    # Nanoseconds after which to ask again, or 0: nbytes may go now, and count.
    cdef long long bandwidth = th.load(&self.bandwidth)
    cdef double now = seconds_now()
    cdef double due = self.last_due
    if bandwidth:
        due += <double>self.last_piece / bandwidth
    if due > now:
        return <long>min((due - now) * 1e9 + 1, <double>MAX_SLEEP_NS)
    # Longer ago there was nothing to send: that is not made up for.
    self.last_due = due if now - due < MAX_SLEEP_NS / 1e9 else now
    self.last_piece = nbytes
    return 0
