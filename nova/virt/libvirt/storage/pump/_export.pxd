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

"""An NBD server's export as the destination of a copy.

One connection, with requests in flight: qemu-nbd does the TLS of all its
connections in one thread, so that more of them cost it more and bring
nothing. Requests are asked about by their cookies; there are no callbacks, and
so nothing here needs the GIL.

What is sent lies where the copy has it until it is answered.
"""

from libc.stdint cimport int64_t
from libc.stdio cimport snprintf
from libc.string cimport memcmp
from libc.string cimport strncpy

from nova.virt.libvirt.storage.pump cimport _libnbd as nbd
from nova.virt.libvirt.storage.pump cimport _thread as th
from nova.virt.libvirt.storage.pump._end cimport end_t
from nova.virt.libvirt.storage.pump._end cimport error_t
from nova.virt.libvirt.storage.pump._end cimport NBD_ERRORS
from nova.virt.libvirt.storage.pump._limit cimport seconds_now

cdef extern from *:
    """
    #include <errno.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/socket.h>
    static void pump_no_delay(int fd)
    {
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    }
    """
    void pump_no_delay(int fd) nogil
    enum:
        ECANCELED
        ECONNRESET
        EOPNOTSUPP
        EROFS
        ETIMEDOUT

cdef enum:
    # Of each kind together. The ring holds fewer slots, but a slot with zeroes
    # in it makes several.
    REQUESTS = 64
    # Zeroes are looked for in so much at a time.
    ZERO_PIECE = 65536
    # One request zeroes at most so much: a receiver may have to write them.
    ZERO_REQUEST = 32 * 1024 * 1024
    # Sent between two flushes. A single one at the end could be without an
    # answer for longer than a transfer may be without progress.
    FLUSH_EVERY = 256 * 1024 * 1024
    # How long nobody looks whether the copy was stopped, in ms.
    POLL = 20

cdef struct request_t:
    int64_t cookie
    long long before        # bytes of data sent before it

cdef struct connection_t:
    nbd.nbd_handle *handle  # NULL when it is closed
    long long size

cdef struct export_t:
    connection_t *connection
    bint blank              # reads as zeroes before the first write
    long long stopped       # read and written by any thread
    long long offset        # where the next byte goes
    long long sent          # bytes of data so far, zeroes among them
    long long unflushed     # bytes written since the last flush was sent
    int64_t flush           # cookie of the one in flight, or 0
    request_t requests[REQUESTS]    # a ring
    size_t first
    size_t count
    error_t error           # the first one


# -- the connection ---------------------------------------------------------

cdef inline void nbd_error(error_t *error) noexcept nogil:
    # At once and on the thread that failed: the next call forgets it.
    cdef const char *message = nbd.nbd_get_error()
    error.domain = NBD_ERRORS
    error.code = nbd.nbd_get_errno()
    if message != NULL:
        strncpy(error.message, message, sizeof(error.message) - 1)


cdef inline int set_error(error_t *error, int number,
                          const char *message) noexcept nogil:
    error.domain = NBD_ERRORS
    error.code = number
    snprintf(error.message, sizeof(error.message), b"%s", message)
    return -1


cdef inline int connection_check(connection_t *self,
                                 error_t *error) noexcept nogil:
    self.size = nbd.nbd_get_size(self.handle)
    if self.size < 0:
        nbd_error(error)
        return -1
    if nbd.nbd_is_read_only(self.handle) != 0:
        return set_error(error, EROFS, b"the export is read-only")
    if nbd.nbd_can_flush(self.handle) != 1:
        return set_error(error, EOPNOTSUPP, b"the server can't flush")
    if nbd.nbd_can_zero(self.handle) != 1:
        return set_error(error, EOPNOTSUPP, b"the server can't write zeroes")
    return 0


cdef inline int connection_open(connection_t *self, const char *host,
                                const char *port, double timeout,
                                error_t *error) noexcept nogil:
    # 0, or -1 with an error. The handle was made and told the rest.
    cdef double deadline = seconds_now() + timeout
    cdef int ready
    if nbd.nbd_aio_connect_tcp(self.handle, host, port) < 0:
        nbd_error(error)
        return -1
    while True:
        ready = nbd.nbd_aio_is_ready(self.handle)
        if ready > 0:
            break
        if ready < 0 or nbd.nbd_poll(self.handle, POLL) < 0:
            nbd_error(error)
            return -1
        if seconds_now() > deadline:
            return set_error(error, ETIMEDOUT, b"the server didn't answer "
                             b"TCP, TLS and NBD's greeting in time")
    pump_no_delay(nbd.nbd_aio_get_fd(self.handle))
    return connection_check(self, error)


cdef inline int connection_flush(connection_t *self, double timeout,
                                 error_t *error) noexcept nogil:
    # 0, or -1 with an error. No copy runs.
    cdef double deadline = seconds_now() + timeout
    cdef int64_t cookie
    cdef int done = 0
    if self.handle == NULL:
        return set_error(error, ECONNRESET, b"the connection is closed")
    cookie = nbd.nbd_aio_flush(self.handle, nbd.NBD_NULL_COMPLETION, 0)
    if cookie < 0:
        nbd_error(error)
        return -1
    while True:
        done = nbd.nbd_aio_command_completed(self.handle, cookie)
        if done > 0:
            return 0
        if done < 0 or nbd.nbd_poll(self.handle, POLL) < 0:
            nbd_error(error)
            return -1
        if seconds_now() > deadline:
            return set_error(error, ETIMEDOUT, b"the server didn't answer a "
                             b"flush in time")


cdef inline void connection_close(connection_t *self) noexcept nogil:
    nbd.nbd_close(self.handle)      # NULL is as good
    self.handle = NULL


cdef inline void connection_leave(connection_t *self,
                                  double timeout) noexcept nogil:
    # Takes leave of the server, too, if that is possible in time.
    cdef double deadline = seconds_now() + timeout
    if self.handle != NULL and nbd.nbd_aio_disconnect(self.handle, 0) == 0:
        while (nbd.nbd_aio_is_closed(self.handle) == 0
               and nbd.nbd_aio_is_dead(self.handle) == 0
               and nbd.nbd_poll(self.handle, POLL) >= 0
               and seconds_now() < deadline):
            pass
    connection_close(self)


# -- requests ---------------------------------------------------------------

cdef inline int export_failed(export_t *self) noexcept nogil:
    if self.error.domain == 0:
        nbd_error(&self.error)
    return -1


cdef inline int export_set_error(export_t *self, int number,
                                 const char *message) noexcept nogil:
    if self.error.domain == 0:
        set_error(&self.error, number, message)
    return -1


cdef inline int export_answered(export_t *self) noexcept nogil:
    # Forgets the requests, from the oldest on, which have been done.
    cdef int done
    while self.count:
        done = nbd.nbd_aio_command_completed(
            self.connection.handle, self.requests[self.first].cookie)
        if done < 0:
            return export_failed(self)
        if done == 0:
            break
        self.first = (self.first + 1) % REQUESTS
        self.count -= 1
    if self.flush:
        done = nbd.nbd_aio_command_completed(self.connection.handle,
                                             self.flush)
        if done < 0:
            return export_failed(self)
        if done:
            self.flush = 0
    return 0


cdef inline int export_go_on(export_t *self, int timeout) noexcept nogil:
    # Sends what is left to be sent, and takes the answers that have come.
    if self.connection.handle == NULL:
        return export_set_error(self, ECONNRESET, b"the connection is closed")
    if th.load(&self.stopped):
        return export_set_error(self, ECANCELED, b"the copy was stopped")
    if (nbd.nbd_aio_is_dead(self.connection.handle) != 0
            or nbd.nbd_aio_is_closed(self.connection.handle) != 0):
        return export_set_error(self, ECONNRESET,
                                b"the server has closed the connection")
    if nbd.nbd_poll(self.connection.handle, timeout) < 0:
        # What the connection died of: its requests know no more than that.
        return export_failed(self)
    return export_answered(self)


cdef inline int export_add(export_t *self, int64_t cookie) noexcept nogil:
    # Returns when all of the request stands in the socket.
    cdef request_t *request
    if cookie < 0:
        return export_failed(self)
    request = &self.requests[(self.first + self.count) % REQUESTS]
    request.cookie = cookie
    request.before = self.sent
    self.count += 1
    while nbd.nbd_aio_is_ready(self.connection.handle) == 0:
        if export_go_on(self, POLL) < 0:
            return -1
    return 0


cdef inline int export_ready(export_t *self) noexcept nogil:
    # Waits until there is room for one more request.
    if export_go_on(self, 0) < 0:
        return -1
    while self.count == REQUESTS:
        if export_go_on(self, POLL) < 0:
            return -1
    return 0


cdef inline int export_flush(export_t *self) noexcept nogil:
    cdef int64_t cookie
    while self.flush:
        if export_go_on(self, POLL) < 0:
            return -1
    cookie = nbd.nbd_aio_flush(self.connection.handle,
                               nbd.NBD_NULL_COMPLETION, 0)
    if cookie < 0:
        return export_failed(self)
    self.flush = cookie
    self.unflushed = 0
    return 0


cdef inline int export_write(export_t *self, const char *data,
                             size_t nbytes) noexcept nogil:
    if export_ready(self) < 0 or export_add(self, nbd.nbd_aio_pwrite(
            self.connection.handle, data, nbytes, self.offset,
            nbd.NBD_NULL_COMPLETION, 0)) < 0:
        return -1
    self.unflushed += nbytes
    return export_flush(self) if self.unflushed >= FLUSH_EVERY else 0


cdef inline int export_zero(export_t *self, size_t nbytes) noexcept nogil:
    if export_ready(self) < 0:
        return -1
    return export_add(self, nbd.nbd_aio_zero(
        self.connection.handle, nbytes, self.offset, nbd.NBD_NULL_COMPLETION,
        0))


# -- the end ----------------------------------------------------------------

cdef inline bint is_zero(const char *data, size_t nbytes) noexcept nogil:
    # Data that isn't ends this at its first bytes as a rule.
    return data[0] == 0 and memcmp(data, data + 1, nbytes - 1) == 0


cdef inline int export_send(void *stream, const char *data,
                            size_t nbytes) noexcept nogil:
    # Takes as much as is all zeroes, or none of it.
    cdef export_t *self = <export_t *>stream
    cdef size_t piece = min(nbytes, <size_t>ZERO_PIECE), n = piece
    cdef bint zero = is_zero(data, piece)
    while n < nbytes:
        piece = min(nbytes - n, <size_t>ZERO_PIECE)
        if is_zero(data + n, piece) != zero:
            break
        n += piece
    if not zero:
        if export_write(self, data, n) < 0:
            return -1
    elif not self.blank and export_zero(self, n) < 0:
        return -1
    self.offset += n
    self.sent += n
    return n


cdef inline long long export_settle(void *stream,
                                    long long most) noexcept nogil:
    cdef export_t *self = <export_t *>stream
    cdef int timeout = 0
    while True:
        if export_go_on(self, timeout) < 0:
            return -1
        if not self.count:
            return 0
        if self.sent - self.requests[self.first].before <= most:
            return self.sent - self.requests[self.first].before
        timeout = POLL


cdef inline int export_send_hole(void *stream, long long length,
                                 unsigned int flags) noexcept nogil:
    cdef export_t *self = <export_t *>stream
    cdef size_t n
    if self.blank:
        self.offset += length
        return 0
    while length:
        n = min(length, <long long>ZERO_REQUEST)
        if export_zero(self, n) < 0:
            return -1
        self.offset += n
        length -= n
    return 0


cdef inline int export_skip(void *stream, long long length) noexcept nogil:
    (<export_t *>stream).offset += length
    return 0


cdef inline int export_finish(void *stream) noexcept nogil:
    # Each answer is waited for, and then the flush's: it covers no request
    # that wasn't answered when it was sent.
    cdef export_t *self = <export_t *>stream
    while self.count:
        if export_go_on(self, POLL) < 0:
            return -1
    if export_flush(self) < 0:
        return -1
    while self.flush:
        if export_go_on(self, POLL) < 0:
            return -1
    return 0


cdef inline int export_abort(void *stream) noexcept nogil:
    # Requests in flight point to memory of the copy, which goes.
    connection_close((<export_t *>stream).connection)
    return 0


cdef inline void export_stop(void *stream) noexcept nogil:
    th.store(&(<export_t *>stream).stopped, True)


cdef inline void export_last_error(void *stream,
                                   error_t *error) noexcept nogil:
    error[0] = (<export_t *>stream).error


cdef inline void export_end(end_t *end, export_t *self) noexcept nogil:
    # Nothing can be received from it.
    end.stream = self
    end.recv = NULL
    end.recv_hole = NULL
    end.send = export_send
    end.settle = export_settle
    end.send_hole = export_send_hole
    end.skip = export_skip
    end.pass_over = NULL
    end.finish = export_finish
    end.abort = export_abort
    end.stop = export_stop
    end.last_error = export_last_error
