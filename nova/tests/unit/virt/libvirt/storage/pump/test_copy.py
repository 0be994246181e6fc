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

import ctypes
import errno
import importlib
import os
import platform
import subprocess
import sys
import time

import ddt
import fixtures

from nova import test

# Not time.sleep(): the callbacks run in threads which eventlet doesn't know.
USLEEP = ctypes.CDLL(None).usleep

RECV = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
                        ctypes.c_size_t, ctypes.c_uint)
RECV_HOLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p,
                             ctypes.POINTER(ctypes.c_longlong), ctypes.c_uint)
SEND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
                        ctypes.c_size_t)
SEND_HOLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p,
                             ctypes.c_longlong, ctypes.c_uint)
CLOSE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class CError(ctypes.Structure):
    _fields_ = [('code', ctypes.c_int), ('domain', ctypes.c_int),
                ('message', ctypes.c_char * 1024)]


LAST_ERROR = ctypes.CFUNCTYPE(None, ctypes.POINTER(CError))


class CEnd(ctypes.Structure):
    _fields_ = [('stream', ctypes.c_void_p), ('recv', RECV),
                ('recv_hole', RECV_HOLE), ('send', SEND),
                ('send_hole', SEND_HOLE), ('finish', CLOSE), ('abort', CLOSE),
                ('last_error', LAST_ERROR)]


class StubStream:
    """A stream in memory that does what a daemon won't do on demand.

    :param content: bytes and ints (lengths of holes), one packet or hole each
    :param fail_at: the call of recv or send, counted from 0, that fails
    :param take: bytes of each send that are taken, all by default
    """

    def __init__(self, content=(), fail_at=None, take=None, fail_finish=False,
                 fail_hole=False, fail_with=-1, wait=None):
        self.packets = list(content)
        self.fail_at = fail_at
        self.take = take
        self.fail_finish = fail_finish
        self.fail_hole = fail_hole
        self.fail_with = fail_with
        self.wait = wait
        self.calls = 0
        self.log = []
        self.written = b''
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.end = CEnd(None, RECV(self.recv), RECV_HOLE(self.recv_hole),
                        SEND(self.send), SEND_HOLE(self.send_hole),
                        CLOSE(self.finish), CLOSE(self.abort),
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

    def send(self, stream, data, nbytes):
        if self._fails():
            return self.fail_with
        n = min(nbytes, self.take or nbytes)
        self.written += ctypes.string_at(data, n)
        self.log.append(n)
        return n

    def send_hole(self, stream, length, flags):
        if self.fail_hole:
            return -1
        self.written += bytes(length)
        self.log.append(('hole', length))
        return 0

    def finish(self, stream):
        self.log.append('finish')
        return -1 if self.fail_finish else 0

    def abort(self, stream):
        self.log.append('abort')
        return 0

    def last_error(self, error):
        error[0].code = 38
        error[0].domain = 18
        error[0].message = b'No space left'


# System calls by machine.
SYSCALLS = {'sync_file_range': {'x86_64': 277, 'aarch64': 84},
            'fsync': {'x86_64': 74, 'aarch64': 82}}

# A process of its own, as a filter of system calls is for life.
REFUSED = """
import ctypes, importlib.machinery, importlib.util, struct, sys
extension, path, length, number, error = sys.argv[1:]
loader = importlib.machinery.ExtensionFileLoader('_copy', extension)
spec = importlib.util.spec_from_file_location(
    '_copy', extension, loader=loader)
_pump = importlib.util.module_from_spec(spec)
loader.exec_module(_pump)
# load the number; if it is ours, go on, else skip one; errno; allow
code = b''.join(struct.pack('HBBI', *instruction) for instruction in (
    (0x20, 0, 0, 0), (0x15, 0, 1, int(number)),
    (0x06, 0, 0, 0x00050000 | int(error)), (0x06, 0, 0, 0x7fff0000)))
class Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('code', ctypes.c_char_p)]
# PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP with SECCOMP_MODE_FILTER
prctl = ctypes.CDLL(None).prctl
if prctl(38, 1, 0, 0, 0) or prctl(
        22, 2, ctypes.byref(Program(4, code)), 0, 0):
    sys.exit(77)
with open(path) as f:
    try:
        _pump.Copy(_pump.File(f.fileno(), int(length), sync=True), None,
                   int(length)).run()
        print('done')
    except _pump.PumpError as e:
        print(e.side, e.operation, e.message, e.transferred, sep=', ')
"""


def content_of(parts):
    return b''.join(bytes(p) if isinstance(p, int) else p for p in parts)


class PumpExtensionTestCase(test.NoDBTestCase):
    def setUp(self):
        super().setUp()
        # Not at import: a tree which isn't built must fail here alone.
        self._pump = importlib.import_module(
            'nova.virt.libvirt.storage.pump._copy')

    def copy(self, source, destination, length, **kwargs):
        kwargs.setdefault('key', 0x1234567890abcdef)
        copy = self._pump.Copy(source, destination, length, **kwargs)
        copy.run()
        return copy

    def fails(self, source, destination, length, **kwargs):
        return self.assertRaises(self._pump.PumpError, self.copy, source,
                                 destination, length, **kwargs)


@ddt.ddt
class CopyTestCase(PumpExtensionTestCase):
    # Content by letter: data; by number: a hole of that many bytes.
    @ddt.data(
        [b'A'], [b'A' * 511], [b'A' * 512], [b'A' * 4096, b'B'], [1], [4096],
        [1 << 40], [4096, b'A'], [b'A', 4096], [4096, b'A', 8192],
        [b'A', 1, b'B', 1, b'C'], [b'A' * 100000, 7, b'B' * 3],
        [b'AB' * 5000] * 30)
    def test_content_and_holes_arrive(self, parts):
        length = sum(p if isinstance(p, int) else len(p) for p in parts)
        source, destination = StubStream(parts), StubStream()
        if length > 1 << 30:
            written = []
            destination.end.send_hole = SEND_HOLE(
                lambda s, n, f: written.append(n) or 0)
            copy = self.copy(source, destination, length)
            self.assertEqual([length], written)
        else:
            copy = self.copy(source, destination, length, slot_size=4096,
                             slots=3)
            self.assertEqual(content_of(parts), destination.written)
            self.assertEqual(
                [p for p in parts if isinstance(p, int)],
                [e[1] for e in destination.log if isinstance(e, tuple)])
        self.assertEqual('finish', destination.log[-1])
        self.assertEqual(['finish'], source.log)
        self.assertEqual(length, copy.transferred)
        self.assertEqual(self._pump.checksum(parts, 0x1234567890abcdef),
                         copy.checksum)

    def test_partial_sends_are_completed(self):
        parts = [b'abcdefghij' * 1000]
        destination = StubStream(take=7)
        self.copy(StubStream(parts), destination, 10000)
        self.assertEqual(parts[0], destination.written)

    def test_packets_are_put_together(self):
        parts = [b'A' * 4072, b'B' * 24] * 4
        destination = StubStream()
        self.copy(StubStream(parts), destination, 4096 * 4, slot_size=4096)
        self.assertEqual([4096] * 4 + ['finish'], destination.log)

    def test_holes_become_zeroes_where_old_content_may_be(self):
        parts = [5000, b'A' * 10, 300]
        destination = StubStream()
        copy = self.copy(StubStream(parts), destination, 5310, sparse=False,
                         slot_size=4096)
        self.assertEqual(content_of(parts), destination.written)
        self.assertNotIn('hole', str(destination.log))
        self.assertEqual(5310, copy.data)

    def test_reads_alone_without_destination(self):
        parts = [b'A' * 10000, 10000]
        copy = self.copy(StubStream(parts), None, 20000)
        self.assertEqual(self._pump.checksum(parts, 0x1234567890abcdef),
                         copy.checksum)
        self.assertEqual((10000, 10000), (copy.data, copy.holes))

    @ddt.data(0, 1, 5, 9)
    def test_error_of_the_source(self, packet):
        source = StubStream([b'A' * 10] * 10, fail_at=packet)
        destination = StubStream()
        e = self.fails(source, destination, 100, slot_size=10)
        self.assertEqual(('source', 'receive', 'libvirt', 38, 18,
                          'No space left', packet * 10),
                         (e.side, e.operation, e.reason, e.code, e.domain,
                          e.message, e.transferred))
        self.assertEqual('abort', source.log[-1])
        self.assertEqual('abort', destination.log[-1])
        self.assertNotIn('finish', destination.log)

    @ddt.data(0, 1, 5, 9)
    def test_error_of_the_destination(self, packet):
        source = StubStream([b'A' * 10] * 10)
        destination = StubStream(fail_at=packet)
        e = self.fails(source, destination, 100, slot_size=10)
        self.assertEqual(('destination', 'send', 'libvirt', 38),
                         (e.side, e.operation, e.reason, e.code))
        self.assertEqual('abort', source.log[-1])
        self.assertEqual('abort', destination.log[-1])
        self.assertEqual(b'A' * 10 * packet, destination.written)

    @ddt.data('source', 'destination')
    def test_error_in_a_hole(self, side):
        streams = {'source': StubStream([b'A', 10]),
                   'destination': StubStream()}
        streams[side].fail_hole = True
        e = self.fails(streams['source'], streams['destination'], 11)
        self.assertEqual((side, 'libvirt'), (e.side, e.reason))

    @ddt.data('source', 'destination')
    def test_error_of_finish(self, side):
        streams = {'source': StubStream([b'A']), 'destination': StubStream()}
        streams[side].fail_finish = True
        e = self.fails(streams['source'], streams['destination'], 1)
        self.assertEqual((side, 'finish', 38), (e.side, e.operation, e.code))
        if side == 'source':
            self.assertNotIn('finish', streams['destination'].log)

    @ddt.data(-2, 0)
    def test_a_send_that_takes_nothing_fails(self, value):
        e = self.fails(StubStream([b'A' * 10]),
                       StubStream(fail_at=0, fail_with=value), 10)
        self.assertEqual(('destination', 'stuck', 0),
                         (e.side, e.reason, e.code))

    def test_would_block_fails(self):
        e = self.fails(StubStream([b'A'], fail_at=0, fail_with=-2),
                       StubStream(), 1)
        self.assertEqual(('source', 'stuck'), (e.side, e.reason))

    @ddt.data([b'A' * 9], [], [b'A', 8], [9])
    def test_short_source(self, parts):
        destination = StubStream()
        e = self.fails(StubStream(parts), destination, 10)
        self.assertEqual(('source', 'short'), (e.side, e.reason))
        self.assertEqual('abort', destination.log[-1])

    @ddt.data([b'A' * 11], [b'A', 10], [11])
    def test_long_source(self, parts):
        destination = StubStream()
        e = self.fails(StubStream(parts), destination, 10)
        self.assertEqual(('source', 'long'), (e.side, e.reason))
        self.assertNotIn('finish', destination.log)

    def test_an_empty_hole_fails(self):
        e = self.fails(StubStream([b'A', 0]), StubStream(), 1)
        self.assertEqual(('source', 'stuck'), (e.side, e.reason))

    def test_cancel_stops_at_the_next_packet(self):
        destination = StubStream(
            wait=lambda call: call == 5 and copy.cancel())
        copy = self._pump.Copy(StubStream([b'A' * 10] * 1000), destination,
                               10000, slot_size=10)
        e = self.assertRaises(self._pump.PumpError, copy.run)
        self.assertEqual('cancelled', e.reason)
        self.assertEqual([10] * 5 + ['abort'], destination.log)

    def test_cancel_before_run(self):
        destination = StubStream()
        copy = self._pump.Copy(StubStream([b'A']), destination, 1)
        copy.cancel()
        e = self.assertRaises(self._pump.PumpError, copy.run)
        self.assertEqual('cancelled', e.reason)
        self.assertNotIn('finish', destination.log)

    def test_cancel_while_the_bandwidth_limit_sleeps(self):
        # the fourth packet is received while the second one has a minute to
        # wait
        source = StubStream([b'A' * 65536] * 16,
                            wait=lambda call: call == 4 and copy.cancel())
        copy = self._pump.Copy(source, StubStream(), 1 << 20, bandwidth=1024)
        start = time.monotonic()
        self.assertRaises(self._pump.PumpError, copy.run)
        self.assertLess(time.monotonic() - start, 30)

    def test_bandwidth_limit_holds_for_data_alone(self):
        source = StubStream([b'A' * 65536] * 8 + [1 << 40])
        start = time.monotonic()
        destination = StubStream()
        destination.end.send_hole = SEND_HOLE(lambda s, n, f: 0)
        self.copy(source, destination, (1 << 19) + (1 << 40),
                  bandwidth=1 << 20)
        # the last of eight pieces goes after seven eighths of half a second
        self.assertGreaterEqual(time.monotonic() - start, 0.43)

    def test_memory_is_bounded_by_the_ring(self):
        # the receiver may be ahead by the ring, and not by more
        ahead = []
        source = StubStream([b'A' * 10] * 100)
        destination = StubStream()
        destination.wait = lambda call: (
            USLEEP(1000), ahead.append(source.calls - call))
        self.copy(source, destination, 1000, slot_size=10, slots=4)
        self.assertLessEqual(max(ahead), 5)

    def test_runs_once(self):
        copy = self.copy(StubStream([b'A']), StubStream(), 1)
        self.assertRaises(RuntimeError, copy.run)

    @ddt.data({'length': 0}, {'length': -1}, {'bandwidth': -1},
              {'slot_size': 0}, {'slots': 1}, {'key': 0},
              {'key': (1 << 61) - 1})
    def test_parameters_out_of_range(self, kwargs):
        kwargs = dict({'length': 1}, **kwargs)
        self.assertRaises(ValueError, self._pump.Copy, StubStream(),
                          StubStream(), **kwargs)

    @ddt.data(None, object(), 'virStreamPtr')
    def test_refuses_what_is_no_stream(self, stream):
        self.assertRaises(TypeError, self._pump.Copy, stream, StubStream(), 1)


@ddt.ddt
class FileTestCase(PumpExtensionTestCase):
    """A file of this host as the source."""

    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.useFixture(fixtures.TempDir()).path,
                                 'volume')

    def write(self, parts):
        with open(self.path, 'wb') as f:
            for part in parts:
                if isinstance(part, int):
                    f.truncate(f.seek(part, os.SEEK_CUR))
                else:
                    f.write(part)
        fd = os.open(self.path, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        return fd, os.path.getsize(self.path)

    @ddt.data(
        [b'A'], [b'A' * 511], [b'A' * 4096, b'B'], [1], [1 << 20],
        [1 << 20, b'A' * 4096], [b'A' * 4096, 1 << 20],
        [b'A' * 4096, 1 << 20, b'B' * 5000, 1 << 20, b'C'],
        [b'AB' * 500000])
    def test_content_and_holes_arrive(self, parts):
        fd, length = self.write(parts)
        destination = StubStream()
        copy = self.copy(self._pump.File(fd, length), destination, length)
        with open(self.path, 'rb') as f:
            content = f.read()
        self.assertEqual(content, destination.written)
        self.assertEqual(self._pump.checksum([content], 0x1234567890abcdef),
                         copy.checksum)
        # What the file system keeps as holes travels as holes.
        self.assertLessEqual(
            copy.data, os.stat(self.path).st_blocks * 512)
        self.assertEqual(length, copy.data + copy.holes)

    def test_reads_alone(self):
        fd, length = self.write([b'A' * 70000, 1 << 20])
        self.assertEqual(
            self._pump.checksum([b'A' * 70000, 1 << 20], 5),
            self.copy(self._pump.File(fd, length), None, length,
                      key=5).checksum)

    @ddt.data([b'A' * 4096], [1 << 20], [b'A' * 4096, 1 << 20])
    def test_truncated(self, parts):
        fd, length = self.write(parts)
        os.truncate(self.path, length // 2)
        e = self.fails(self._pump.File(fd, length), StubStream(), length)
        self.assertEqual(('source', 'short'), (e.side, e.reason))

    def test_no_more_than_its_length(self):
        fd, length = self.write([b'A' * 8192])
        destination = StubStream()
        self.copy(self._pump.File(fd, 4096), destination, 4096)
        self.assertEqual(b'A' * 4096, destination.written)

    def test_cannot_be_read(self):
        fd = os.open(os.path.dirname(self.path), os.O_RDONLY)
        self.addCleanup(os.close, fd)
        e = self.fails(self._pump.File(fd, 10), StubStream(), 10)
        self.assertEqual(('source', 'libvirt', 38),
                         (e.side, e.reason, e.code))
        self.assertIn('directory', e.message)

    def spoil(self, fd):
        """Return a stream that makes fd one which fsync() refuses.

        What it is sent has been read to the end by then.
        """
        pipe = os.pipe()
        for end in pipe:
            self.addCleanup(os.close, end)
        return StubStream(wait=lambda call: os.dup2(pipe[0], fd))

    def test_sync(self):
        fd, length = self.write([b'A' * 100, 1 << 20, b'B' * (20 << 20), 9])
        copy = self.copy(self._pump.File(fd, length, sync=True), None, length)
        with open(self.path, 'rb') as f:
            self.assertEqual(
                self._pump.checksum([f.read()], 0x1234567890abcdef),
                copy.checksum)

    def test_sync_fails(self):
        fd, length = self.write([b'A' * 100])
        destination = self.spoil(fd)
        e = self.fails(self._pump.File(fd, length, sync=True), destination,
                       length)
        self.assertEqual(('source', 'finish', 'libvirt', 38),
                         (e.side, e.operation, e.reason, e.code))
        self.assertEqual('not on disk: Invalid argument', e.message)
        self.assertEqual('abort', destination.log[-1])

    def test_nothing_is_synced_unless_asked_for(self):
        fd, length = self.write([b'A' * 100])
        self.copy(self._pump.File(fd, length), self.spoil(fd), length)

    def refused(self, syscall, error):
        """Copy in a process to which a system call is refused.

        :returns: what it says; None if it was not refused the call
        """
        number = SYSCALLS[syscall].get(platform.machine())
        if number is None:
            self.skipTest('the number of %s is unknown here' % syscall)
        _fd, length = self.write([b'A' * (20 << 20)])
        result = subprocess.run(
            [sys.executable, '-c', REFUSED, self._pump.__file__, self.path,
             str(length), str(number), str(error)],
            stdout=subprocess.PIPE, text=True)
        if result.returncode == 77:
            self.skipTest('system calls can not be refused here')
        self.assertEqual(0, result.returncode)
        return result.stdout.strip()

    @ddt.data(errno.EIO, errno.ENOSPC, errno.EDQUOT)
    def test_range_cannot_be_written(self, error):
        self.assertEqual(
            'source, receive, not on disk: %s, 8388608' % os.strerror(error),
            self.refused('sync_file_range', error))

    @ddt.data(errno.EINVAL, errno.ESPIPE, errno.ENOSYS)
    def test_file_system_without_ranges(self, error):
        self.assertEqual('done', self.refused('sync_file_range', error))

    @ddt.data(errno.EIO, errno.EDQUOT)
    def test_rest_cannot_be_written(self, error):
        self.assertEqual(
            'source, finish, not on disk: %s, 20971520' % os.strerror(error),
            self.refused('fsync', error))

    def test_cannot_be_written(self):
        fd, length = self.write([b'A'])
        e = self.fails(StubStream([b'A']), self._pump.File(fd, 1), 1)
        self.assertEqual('destination', e.side)


@ddt.ddt
class ChecksumTestCase(PumpExtensionTestCase):
    KEY = 0x0123456789abcdef

    def reference(self, content):
        """The polynomial, spelt out in Python's integers."""
        prime = (1 << 61) - 1
        value = 0
        padded = content + bytes(-len(content) % 32)
        for i in range(0, len(padded), 4):
            word = int.from_bytes(padded[i:i + 4], 'little')
            value = (value * self.KEY + word) % prime
        # the length, then once more by the key
        return value, len(content)

    @ddt.data(b'', b'A', b'A' * 31, b'A' * 32, b'A' * 33, bytes(range(256)))
    def test_is_the_polynomial(self, content):
        prime = (1 << 61) - 1
        value, length = self.reference(content)
        self.assertEqual((value + length) * self.KEY % prime,
                         self._pump.checksum([content], self.KEY))

    def test_doesnt_see_how_zeroes_came(self):
        data = b'A' * 37
        forms = ([data + bytes(1000) + data], [data, 1000, data],
                 [data, 999, b'\0', data], [data, bytes(3), 997, data],
                 [data, 1, 1, 998, data])
        self.assertEqual(1, len({self._pump.checksum(form, self.KEY)
                                 for form in forms}))

    @ddt.data([b'A', 1], [1, b'A'], [b'A', b'A'], [b'B'], [1], [2],
              [b'A' * 32], [b'A' * 32, 32], [32, b'A' * 32])
    def test_sees_a_difference(self, parts):
        self.assertNotEqual(self._pump.checksum([b'A'], self.KEY),
                            self._pump.checksum(parts, self.KEY))

    def test_sees_a_bit(self):
        content = bytearray(b'x' * 1000)
        sums = {self._pump.checksum([bytes(content)], self.KEY)}
        for i in range(8000):
            content[i // 8] ^= 1 << i % 8
            sums.add(self._pump.checksum([bytes(content)], self.KEY))
            content[i // 8] ^= 1 << i % 8
        self.assertEqual(8001, len(sums))

    def test_another_key_gives_another_checksum(self):
        self.assertNotEqual(self._pump.checksum([b'A'], self.KEY),
                            self._pump.checksum([b'A'], self.KEY + 1))
