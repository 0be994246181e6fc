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
"""Whether anybody opens a file of a host: inotify, which misses nothing."""

import collections
import ctypes
import os
import struct

_OPENED = 0x20  # IN_OPEN
_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Counts how often files are opened, whoever does it.

    :param paths: by name, of files of any kind, as seen from outside
    """

    def __init__(self, paths):
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._names = {}
        for name, path in paths.items():
            number = _libc.inotify_add_watch(
                self._fd, os.fsencode(path), _OPENED)
            if number < 0:
                raise OSError(ctypes.get_errno(), str(path))
            self._names[number] = name

    def opened(self):
        """:returns: how often since the last call, by name; without zeroes"""
        found = collections.Counter()
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return dict(found)
            while data:
                number, _mask, _cookie, length = struct.unpack_from(
                    '=iIII', data)
                found[self._names[number]] += 1
                data = data[16 + length:]

    def close(self):
        os.close(self._fd)
