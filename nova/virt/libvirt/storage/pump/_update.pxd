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

"""A volume of libvirt's that has content, as the destination of a copy.

What changes is uploaded in pieces, each by a stream of its own that begins
where the piece does: within a stream libvirt can leave nothing out. A hole
would cut the file off.
"""

from nova.virt.libvirt.storage.pump cimport _libvirt as lv
from nova.virt.libvirt.storage.pump._end cimport end_t
from nova.virt.libvirt.storage.pump._stream cimport stream_last_error

cdef struct update_t:
    lv.virConnectPtr connection
    lv.virStorageVolPtr volume
    lv.virStreamPtr stream      # of the piece that is under way, or NULL
    long long offset            # where the next byte goes


cdef inline int update_begin(update_t *self) noexcept nogil:
    self.stream = lv.virStreamNew(self.connection, 0)
    if self.stream == NULL:
        return -1
    return lv.virStorageVolUpload(self.volume, self.stream, self.offset, 0, 0)


cdef inline int update_end_piece(update_t *self) noexcept nogil:
    if self.stream == NULL:
        return 0
    if lv.virStreamFinish(self.stream) < 0:
        return -1
    lv.virStreamFree(self.stream)
    self.stream = NULL
    return 0


cdef inline int update_send(void *stream, const char *data,
                            size_t nbytes) noexcept nogil:
    cdef update_t *self = <update_t *>stream
    cdef int n
    if self.stream == NULL and update_begin(self) < 0:
        return -1
    n = lv.virStreamSend(self.stream, data, nbytes)
    if n > 0:
        self.offset += n
    return n


cdef inline int update_skip(void *stream, long long length) noexcept nogil:
    cdef update_t *self = <update_t *>stream
    if update_end_piece(self) < 0:
        return -1
    self.offset += length
    return 0


cdef inline int update_finish(void *stream) noexcept nogil:
    return update_end_piece(<update_t *>stream)


cdef inline int update_abort(void *stream) noexcept nogil:
    # The error has been told: to free a stream resets it.
    cdef update_t *self = <update_t *>stream
    if self.stream == NULL:
        return 0
    lv.virStreamAbort(self.stream)
    lv.virStreamFree(self.stream)
    self.stream = NULL
    return 0


cdef inline void update_end(end_t *end, update_t *self) noexcept nogil:
    # Nothing can be received from it, and no hole be left.
    end.stream = self
    end.recv = NULL
    end.recv_hole = NULL
    end.send = update_send
    end.settle = NULL
    end.send_hole = NULL
    end.skip = update_skip
    end.pass_over = NULL
    end.finish = update_finish
    end.abort = update_abort
    end.stop = NULL
    end.last_error = stream_last_error
