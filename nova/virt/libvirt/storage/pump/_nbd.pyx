# cython: language_level=3, boundscheck=False, wraparound=False
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
"""Exports of NBD servers as destinations of the pump's copies.

An extension of its own: where libnbd isn't there the rest of the pump is built
and works. _export.pxd has what it does without Python.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.string cimport memset

from nova.virt.libvirt.storage.pump cimport _libnbd as nbd
from nova.virt.libvirt.storage.pump._end cimport end_t
from nova.virt.libvirt.storage.pump._end cimport error_t
from nova.virt.libvirt.storage.pump._export cimport connection_close
from nova.virt.libvirt.storage.pump._export cimport connection_flush
from nova.virt.libvirt.storage.pump._export cimport connection_leave
from nova.virt.libvirt.storage.pump._export cimport connection_open
from nova.virt.libvirt.storage.pump._export cimport connection_t
from nova.virt.libvirt.storage.pump._export cimport export_end
from nova.virt.libvirt.storage.pump._export cimport export_t
from nova.virt.libvirt.storage.pump._export cimport nbd_error


class NbdError(Exception):
    """A connection could not be made.

    :ivar code: errno, 0 where libnbd gives none
    :ivar message: libnbd's message
    """

    def __init__(self, code, message):
        super().__init__('%s (errno %d)' % (message, code))
        self.code = code
        self.message = message


cdef class Connection:
    """A connection to one export, with TLS and a pre-shared key.

    Of one thread at a time. Only copies of it that have failed close it by
    themselves.

    :param host: name or address
    :param port: number
    :param name: of the export
    :param username: to which the key belongs
    :param psk_file: path; it is read once, here. Empty: without TLS.
    :param timeout: seconds that connecting may take in all
    :raises: NbdError
    """

    cdef connection_t _connection

    def __cinit__(self, str host, int port, str name, *, str username='',
                  str psk_file='', double timeout=10):
        cdef error_t error
        cdef int failed
        cdef bytes c_host = host.encode(), c_port = b'%d' % port
        cdef const char *c_host_p = c_host
        cdef const char *c_port_p = c_port
        memset(&error, 0, sizeof(error))
        self._connection.handle = nbd.nbd_create()
        self._set(self._connection.handle != NULL)
        self._set(nbd.nbd_set_export_name(self._connection.handle,
                                          name.encode()) == 0)
        if psk_file:
            self._set(nbd.nbd_set_tls(self._connection.handle,
                                      nbd.LIBNBD_TLS_REQUIRE) == 0)
            self._set(nbd.nbd_set_tls_username(self._connection.handle,
                                               username.encode()) == 0)
            self._set(nbd.nbd_set_tls_psk_file(self._connection.handle,
                                               psk_file.encode()) == 0)
        with nogil:
            failed = connection_open(&self._connection, c_host_p, c_port_p,
                                     timeout, &error)
        if failed:
            self._raise(&error)

    cdef int _set(self, bint done) except -1:
        cdef error_t error
        if not done:
            memset(&error, 0, sizeof(error))
            nbd_error(&error)
            self._raise(&error)
        return 0

    cdef int _raise(self, error_t *error) except -1:
        raise NbdError(error.code,
                       (<bytes>error.message).decode(errors='replace'))

    def __dealloc__(self):
        with nogil:
            connection_close(&self._connection)

    @property
    def size(self):
        """Bytes that the export has."""
        return self._connection.size

    @property
    def is_open(self):
        return self._connection.handle != NULL

    def flush(self, double timeout=10):
        """Have the server flush, between two copies.

        It knows by that that somebody is there.

        :param timeout: seconds that this may take
        :raises: NbdError
        """
        cdef error_t error
        cdef int failed
        memset(&error, 0, sizeof(error))
        with nogil:
            failed = connection_flush(&self._connection, timeout, &error)
        if failed:
            self._raise(&error)

    def close(self, double timeout=2):
        """Take leave of the server; what was flushed stands in any case.

        :param timeout: seconds that this may take
        """
        with nogil:
            connection_leave(&self._connection, timeout)


cdef class Export:
    """The export of a connection as the destination of one copy.

    A copy that ends well leaves the connection open: another copy over it may
    follow. All has been flushed by then.

    :param connection: used by this copy alone while that runs
    :param blank: it reads as zeroes before the first write, as a new file
        does: zeroes need not be sent
    """

    cdef export_t _export
    cdef end_t _end
    cdef Connection _connection
    cdef readonly object _o

    def __cinit__(self, Connection connection not None, *, bint blank=False):
        self._connection = connection
        self._export.connection = &connection._connection
        self._export.blank = blank
        export_end(&self._end, &self._export)
        self._o = PyCapsule_New(&self._end, b"nova.pump.end", NULL)
