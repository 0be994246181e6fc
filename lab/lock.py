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

"""One command at a time, on the whole machine.

The lock is a UNIX socket's name in the abstract name space (unix(7)): the kernel
gives it back when its holder ends, however it ends, it leaves no file, and
whoever finds it taken can ask it for its holder's process id.
"""

import contextlib
import os
import pathlib
import socket
import struct
import textwrap

from . import config
from .errors import LabError

_here = {'socket': None, 'depth': 0}


def _address() -> str:
    return '\0nova-lab/%s' % config.NAME


def holder() -> int | None:
    """The process that holds the lock, if any."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(_address())
        except OSError:
            return None
        return struct.unpack('3i', probe.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def describe(pid: int) -> str:
    """A process as a user recognises it, in one line."""
    proc = pathlib.Path('/proc/%d' % pid)
    try:
        words = (proc / 'cmdline').read_bytes().decode(
            errors='replace').replace('\0', ' ')
        return '"%s" in %s (pid %d)' % (
            textwrap.shorten(words, 120, placeholder=' ...'),
            os.readlink(proc / 'cwd'), pid)
    except OSError:
        return 'pid %d' % pid


@contextlib.contextmanager
def held():
    """Hold the lab's lock; a holder may take it again.

    :raises: LabError that names the holder
    """
    if not _here['depth']:
        mine = socket.socket(socket.AF_UNIX)
        try:
            mine.bind(_address())
        except OSError:
            mine.close()
            pid = holder()
            raise LabError(
                'another command has the lab "%s": %s. Wait for it, or end '
                'it.' % (config.NAME, describe(pid) if pid else
                         'it has just ended, try again')) from None
        mine.listen(8)
        _here['socket'] = mine
    _here['depth'] += 1
    try:
        yield
    finally:
        _here['depth'] -= 1
        if not _here['depth']:
            _here['socket'].close()
