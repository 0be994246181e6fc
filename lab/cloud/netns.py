#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""Use the network of a namespace from a process outside it.

A socket belongs to the namespace in which it was made, whoever uses it
afterwards. So a thread enters the namespace for as long as it takes to connect
and the control plane needs no address in the machine's own network.
"""

import contextlib
import ctypes
import os

import requests.adapters
import urllib3.connection
import urllib3.connectionpool

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


def _setns(fd):
    if _libc.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), 'setns')


@contextlib.contextmanager
def inside(path):
    """The calling thread is in a network namespace.

    :param path: of the namespace, /run/netns/NAME or /proc/PID/ns/net
    """
    home = os.open('/proc/thread-self/ns/net', os.O_RDONLY)
    try:
        there = os.open(path, os.O_RDONLY)
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


class Adapter(requests.adapters.HTTPAdapter):
    """Makes the connections of a requests session in a namespace.

    :param path: of the namespace
    """

    def __init__(self, path, **kwargs):
        self._path = str(path)
        super().__init__(**kwargs)

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, **kwargs)
        namespace = self._path

        class Connection(urllib3.connection.HTTPConnection):
            def _new_conn(self):
                with inside(namespace):
                    return super()._new_conn()

        class Pool(urllib3.connectionpool.HTTPConnectionPool):
            ConnectionCls = Connection

        self.poolmanager.pool_classes_by_scheme = {
            **self.poolmanager.pool_classes_by_scheme, 'http': Pool}
