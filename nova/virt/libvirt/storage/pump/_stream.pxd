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

"""A libvirt stream as an end of a copy."""

from libc.string cimport strncpy

from nova.virt.libvirt.storage.pump cimport _libvirt as lv
from nova.virt.libvirt.storage.pump._end cimport end_t
from nova.virt.libvirt.storage.pump._end cimport error_t


cdef inline int stream_recv(void *stream, char *data, size_t nbytes,
                            unsigned int flags) noexcept nogil:
    return lv.virStreamRecvFlags(<lv.virStreamPtr>stream, data, nbytes, flags)


cdef inline int stream_recv_hole(void *stream, long long *length,
                                 unsigned int flags) noexcept nogil:
    return lv.virStreamRecvHole(<lv.virStreamPtr>stream, length, flags)


cdef inline int stream_send(void *stream, const char *data,
                            size_t nbytes) noexcept nogil:
    return lv.virStreamSend(<lv.virStreamPtr>stream, data, nbytes)


cdef inline int stream_send_hole(void *stream, long long length,
                                 unsigned int flags) noexcept nogil:
    return lv.virStreamSendHole(<lv.virStreamPtr>stream, length, flags)


cdef inline int stream_finish(void *stream) noexcept nogil:
    return lv.virStreamFinish(<lv.virStreamPtr>stream)


cdef inline int stream_abort(void *stream) noexcept nogil:
    return lv.virStreamAbort(<lv.virStreamPtr>stream)


cdef inline void stream_last_error(void *stream,
                                   error_t *error) noexcept nogil:
    # libvirt keeps it for the thread, not for the stream.
    cdef lv.virError *last = lv.virGetLastError()
    if last == NULL:
        return
    error.code = last.code
    error.domain = last.domain
    if last.message != NULL:
        strncpy(error.message, last.message, sizeof(error.message) - 1)


cdef inline void stream_end(end_t *end, void *stream) noexcept nogil:
    end.stream = stream
    end.recv = stream_recv
    end.recv_hole = stream_recv_hole
    end.send = stream_send
    end.settle = NULL
    end.send_hole = stream_send_hole
    end.skip = NULL
    end.pass_over = NULL
    end.finish = stream_finish
    end.abort = stream_abort
    end.stop = NULL
    end.last_error = stream_last_error
