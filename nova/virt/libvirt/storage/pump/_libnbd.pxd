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

# The names of libnbd which the pump uses; declarations only.
# https://libguestfs.org/libnbd.3.html
#
# Each call takes the handle's lock: a handle belongs to one thread at a time.
# All return -1 (NULL) on error, of which nbd_get_error() and nbd_get_errno()
# know until the thread's next call.

from libc.stdint cimport int64_t
from libc.stdint cimport uint64_t

cdef extern from "<libnbd.h>" nogil:
    struct nbd_handle:
        pass
    ctypedef struct nbd_completion_callback:
        pass
    # Without one a request is asked about by its cookie.
    const nbd_completion_callback NBD_NULL_COMPLETION
    enum:
        LIBNBD_TLS_REQUIRE

    const char *nbd_get_error()
    int nbd_get_errno()

    nbd_handle *nbd_create()
    void nbd_close(nbd_handle *handle)
    int nbd_set_export_name(nbd_handle *handle, const char *name)
    int nbd_set_tls(nbd_handle *handle, int tls)
    int nbd_set_tls_username(nbd_handle *handle, const char *username)
    int nbd_set_tls_psk_file(nbd_handle *handle, const char *path)
    int nbd_aio_connect_tcp(nbd_handle *handle, const char *host,
                            const char *port)
    int nbd_aio_disconnect(nbd_handle *handle, unsigned int flags)
    int nbd_aio_get_fd(nbd_handle *handle)

    # Neither sending, nor in the middle of an answer.
    int nbd_aio_is_ready(nbd_handle *handle)
    int nbd_aio_is_closed(nbd_handle *handle)
    int nbd_aio_is_dead(nbd_handle *handle)
    # Goes on with what is under way for at most so many milliseconds: 1 if
    # something has happened, 0 if not.
    int nbd_poll(nbd_handle *handle, int timeout)

    int64_t nbd_get_size(nbd_handle *handle)
    int nbd_is_read_only(nbd_handle *handle)
    int nbd_can_flush(nbd_handle *handle)
    int nbd_can_zero(nbd_handle *handle)

    # Return a cookie.
    int64_t nbd_aio_pwrite(nbd_handle *handle, const void *data, size_t count,
                           uint64_t offset, nbd_completion_callback callback,
                           unsigned int flags)
    int64_t nbd_aio_zero(nbd_handle *handle, uint64_t count, uint64_t offset,
                         nbd_completion_callback callback, unsigned int flags)
    int64_t nbd_aio_flush(nbd_handle *handle, nbd_completion_callback callback,
                          unsigned int flags)
    # 1 if it has been done, and then it is forgotten; 0 if not yet; -1 if it
    # has failed.
    int nbd_aio_command_completed(nbd_handle *handle, uint64_t cookie)
