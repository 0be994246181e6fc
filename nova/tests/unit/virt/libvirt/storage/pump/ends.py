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

"""Ends of a copy that do what no daemon does on demand.

Nothing of Nova is imported: a worker process can have these.
"""

import ctypes

RECV = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
                        ctypes.c_size_t, ctypes.c_uint)
RECV_HOLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p,
                             ctypes.POINTER(ctypes.c_longlong), ctypes.c_uint)
SEND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
                        ctypes.c_size_t)
SETTLE = ctypes.CFUNCTYPE(ctypes.c_longlong, ctypes.c_void_p,
                          ctypes.c_longlong)
SEND_HOLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p,
                             ctypes.c_longlong, ctypes.c_uint)
CLOSE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
SKIP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong)
STOP = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class CError(ctypes.Structure):
    _fields_ = [('code', ctypes.c_int), ('domain', ctypes.c_int),
                ('message', ctypes.c_char * 1024)]


LAST_ERROR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(CError))


class CEnd(ctypes.Structure):
    _fields_ = [('stream', ctypes.c_void_p), ('recv', RECV),
                ('recv_hole', RECV_HOLE), ('pass_over', SKIP), ('send', SEND),
                ('settle', SETTLE),
                ('send_hole', SEND_HOLE), ('skip', SKIP), ('finish', CLOSE),
                ('abort', CLOSE), ('stop', STOP), ('last_error', LAST_ERROR)]


def end_of(source):
    """Return the end that a source of a copy hands over."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype = ctypes.c_void_p
    pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return CEnd.from_address(pointer(source._o, b'nova.pump.end'))


class StubStream:
    """A stream in memory that does what a daemon won't do on demand.

    :param content: bytes and ints (lengths of holes), one packet or hole each
    :param fail_at: the call of recv or send, counted from 0, that fails
    :param take: bytes of each send that are taken, all by default
    :param keep: bytes of what was sent that must stay, unless fewer may
    """

    def __init__(self, content=(), fail_at=None, take=None, fail_finish=False,
                 fail_hole=False, fail_with=-1, wait=None, keep=None):
        self.packets = list(content)
        self.fail_at = fail_at
        self.take = take
        self.fail_finish = fail_finish
        self.fail_hole = fail_hole
        self.fail_with = fail_with
        self.wait = wait
        self.keep = keep
        self.calls = 0
        self.stopped = False
        self.passed = 0
        self.log = []
        self.written = b''
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.end = CEnd(None, RECV(self.recv), RECV_HOLE(self.recv_hole),
                        SKIP(self.pass_over), SEND(self.send),
                        SETTLE() if keep is None else SETTLE(self.settle),
                        SEND_HOLE(self.send_hole), SKIP(self.skip),
                        CLOSE(self.finish),
                        CLOSE(self.abort), STOP(self.stop),
                        LAST_ERROR(self.last_error))
        self._o = new(ctypes.addressof(self.end), b'nova.pump.end', None)

    def _fails(self):
        self.calls += 1
        if self.wait:
            self.wait(self.calls)
        return self.calls - 1 == self.fail_at

    def recv(self, stream, data, nbytes, flags):
        if self._fails():
            return self.fail_with
        if not self.packets:
            return 0
        if isinstance(self.packets[0], int):
            return -3
        packet = self.packets.pop(0)
        part, rest = packet[:nbytes], packet[nbytes:]
        if rest:
            self.packets.insert(0, rest)
        ctypes.memmove(data, part, len(part))
        return len(part)

    def recv_hole(self, stream, length, flags):
        if self.fail_hole:
            return -1
        length[0] = self.packets.pop(0)
        return 0

    def pass_over(self, stream, length):
        self.passed += length
        while length:
            packet = self.packets.pop(0)
            size = packet if isinstance(packet, int) else len(packet)
            if size > length:
                self.packets.insert(0, size - length if isinstance(
                    packet, int) else packet[length:])
                size = length
            length -= size
        return 0

    def send(self, stream, data, nbytes):
        if self._fails():
            return self.fail_with
        n = min(nbytes, self.take or nbytes)
        self.written += ctypes.string_at(data, n)
        self.log.append(n)
        return n

    def settle(self, stream, most):
        return min(self.keep, most)

    def stop(self, stream):
        self.stopped = True

    def send_hole(self, stream, length, flags):
        if self.fail_hole:
            return -1
        self.written += bytes(length)
        self.log.append(('hole', length))
        return 0

    def skip(self, stream, length):
        self.log.append(('skip', length))
        return 0

    def finish(self, stream):
        self.log.append('finish')
        return -1 if self.fail_finish else 0

    def abort(self, stream):
        self.log.append('abort')
        return 0

    def last_error(self, stream, error):
        error[0].code = 38
        error[0].domain = 18
        error[0].message = b'No space left'
