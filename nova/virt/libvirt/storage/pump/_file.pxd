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

"""A file of this host as the source of a copy."""

from libc.stdio cimport snprintf

from nova.virt.libvirt.storage.pump._end cimport end_t
from nova.virt.libvirt.storage.pump._end cimport error_t

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <string.h>
    #include <sys/types.h>
    #include <unistd.h>
    static int pump_errno(void) { return errno; }
    static long long pump_seek_data(int fd, long long offset)
    { return lseek(fd, offset, SEEK_DATA); }
    static long long pump_seek_hole(int fd, long long offset)
    { return lseek(fd, offset, SEEK_HOLE); }
    static long long pump_size(int fd)
    { return lseek(fd, 0, SEEK_END); }
    static int pump_read(int fd, char *data, size_t nbytes, long long offset)
    {
        int n;
        do
            n = pread(fd, data, nbytes, offset);
        while (n < 0 && errno == EINTR);
        return n;
    }
    static int pump_drop_direct(int fd)
    {
        int flags = fcntl(fd, F_GETFL);
        return flags < 0 ? -1 : fcntl(fd, F_SETFL, flags & ~O_DIRECT);
    }
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
    long long pump_seek_data(int fd, long long offset) nogil
    long long pump_seek_hole(int fd, long long offset) nogil
    long long pump_size(int fd) nogil
    int pump_read(int fd, char *data, size_t nbytes, long long offset) nogil
    int pump_drop_direct(int fd) nogil
    int pump_sync_range(int fd, long long offset, long long nbytes) nogil
    int fsync(int fd) nogil
    const char *pump_message(int number) nogil
    # Beyond the last data of a file.
    enum:
        NO_DATA "ENXIO"
        EINVAL

cdef enum:
    # VIR_ERR_SYSTEM_ERROR and VIR_FROM_STORAGE: what libvirt's own error
    # would be
    SYSTEM_ERROR = 38
    FROM_STORAGE = 18
    # How much is read between two waits for the disk. A single fsync() of a
    # huge file would show no progress for minutes.
    SYNC_STEP = 8 * 1024 * 1024
    # O_DIRECT reads in multiples of the device's blocks, the last one, too.
    DIRECT_STEP = 4096

cdef struct file_t:
    int fd
    bint direct         # it was opened with O_DIRECT
    bint sync           # have on disk what is read
    long long synced    # up to here it is
    long long length    # how much of it is read
    long long offset
    long long data_end  # there is data from offset up to here
    long long hole_end  # there was a hole up to here, though a guest may write
    int error           # errno of the last failure
    bint unsynced       # it was one of having it on disk


cdef inline int file_failed(file_t *self, bint unsynced) noexcept nogil:
    self.error = pump_errno()
    self.unsynced = unsynced
    return -1


cdef inline long long file_next_data(file_t *self) noexcept nogil:
    # Where data begins at or after offset, or the end.
    cdef long long end = min(pump_size(self.fd), self.length)
    cdef long long data = pump_seek_data(self.fd, self.offset)
    if data < 0:
        return max(end, self.offset) if pump_errno() == NO_DATA else -1
    return min(data, end)


cdef inline int file_read(file_t *self, char *data, size_t nbytes,
                          size_t room) noexcept nogil:
    # Reads nbytes, and beyond them as far as there is room if that must be.
    cdef size_t whole = (nbytes + DIRECT_STEP - 1) // DIRECT_STEP * DIRECT_STEP
    cdef int n
    if self.direct:
        n = pump_read(self.fd, data, min(whole, room), self.offset)
        if n >= 0:
            return min(<size_t>n, nbytes)
        if pump_errno() != EINVAL or pump_drop_direct(self.fd) < 0:
            return -1
        # Blocks are larger here, or what is read doesn't begin with one.
        self.direct = False
    return pump_read(self.fd, data, nbytes, self.offset)


cdef inline int file_recv(void *stream, char *data, size_t nbytes,
                          unsigned int flags) noexcept nogil:
    cdef file_t *self = <file_t *>stream
    cdef long long start
    cdef int n
    if self.sync and self.offset - self.synced >= SYNC_STEP:
        if pump_sync_range(self.fd, self.synced,
                           self.offset - self.synced) < 0:
            return file_failed(self, True)
        self.synced = self.offset
    if self.offset >= self.data_end:
        start = file_next_data(self)
        if start < 0:
            return file_failed(self, False)
        if start > self.offset:
            self.hole_end = start
            return -3
        self.data_end = pump_seek_hole(self.fd, self.offset)
        if self.data_end < 0:
            # At its end, or beyond it if it was truncated.
            if pump_errno() == NO_DATA:
                return 0
            return file_failed(self, False)
        if self.data_end <= self.offset:
            # A guest has discarded it since: zeroes are read.
            self.data_end = min(self.offset + DIRECT_STEP,
                                pump_size(self.fd))
        self.data_end = min(self.data_end, self.length)
        if self.offset >= self.data_end:
            return 0
    n = file_read(self, data,
                  min(nbytes, <size_t>(self.data_end - self.offset)), nbytes)
    if n < 0:
        return file_failed(self, False)
    self.offset += n
    return n


cdef inline int file_recv_hole(void *stream, long long *length,
                               unsigned int flags) noexcept nogil:
    cdef file_t *self = <file_t *>stream
    # What file_recv() has found: a guest that writes there meanwhile is heard
    # of when all is read again.
    cdef long long start = self.hole_end
    if start <= self.offset:
        start = file_next_data(self)
    if start < 0:
        return file_failed(self, False)
    length[0] = start - self.offset
    self.offset = start
    return 0


cdef inline int file_pass_over(void *stream, long long length) noexcept nogil:
    (<file_t *>stream).offset += length
    return 0


cdef inline int file_finish(void *stream) noexcept nogil:
    # Reports as well what could not be written before it was opened here.
    cdef file_t *self = <file_t *>stream
    if self.sync and fsync(self.fd) < 0:
        return file_failed(self, True)
    return 0


cdef inline int file_abort(void *stream) noexcept nogil:
    return 0


cdef inline void file_last_error(void *stream, error_t *error) noexcept nogil:
    cdef file_t *self = <file_t *>stream
    error.code = SYSTEM_ERROR
    error.domain = FROM_STORAGE
    snprintf(error.message, sizeof(error.message), b"%s%s",
             b"not on disk: " if self.unsynced else b"",
             pump_message(self.error))


cdef inline void file_end(end_t *end, file_t *self) noexcept nogil:
    # Nothing can be sent to it.
    end.stream = self
    end.recv = file_recv
    end.recv_hole = file_recv_hole
    end.send = NULL
    end.settle = NULL
    end.send_hole = NULL
    end.skip = NULL
    end.pass_over = file_pass_over
    end.finish = file_finish
    end.abort = file_abort
    end.stop = NULL
    end.last_error = file_last_error
