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
import fcntl
import os
import platform
import subprocess
import sys

import ddt
import fixtures

from nova.tests.unit.virt.libvirt.storage.pump import base
from nova.tests.unit.virt.libvirt.storage.pump import ends

StubStream = ends.StubStream

# System calls by machine.
SYSCALLS = {'sync_file_range': {'x86_64': 277, 'aarch64': 84},
            'fsync': {'x86_64': 74, 'aarch64': 82}}

# What a directory says to lseek() and read(): tmpfs has another word.
OF_A_DIRECTORY = (os.strerror(errno.EISDIR), os.strerror(errno.EINVAL))

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


@ddt.ddt
class FileTestCase(base.PumpExtensionTestCase):
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

    def open_direct(self):
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except OSError as e:
            self.skipTest('this file system knows no O_DIRECT: %s' % e)
        self.addCleanup(os.close, fd)
        return fd

    def is_direct(self, fd):
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)

    @ddt.data(
        [b'A'], [b'A' * 511], [b'A' * 4096, b'B'], [1], [1 << 20, b'A' * 4096],
        [b'A' * 4096, 1 << 20, b'B' * 5000, 1 << 20, b'C'],
        [b'AB' * 500000])
    def test_direct(self, parts):
        # At its end, and at that of a slot.
        _fd, length = self.write(parts)
        with open(self.path, 'rb') as f:
            content = f.read()
        for size in (4096, 262144):
            fd = self.open_direct()
            destination = StubStream()
            self.copy(self._pump.File(fd, length, direct=True), destination,
                      length, slot_size=size)
            self.assertEqual(content, destination.written)
            self.assertTrue(self.is_direct(fd))

    def test_direct_where_that_is_impossible(self):
        # No device reads 1000 bytes, or from there on.
        _fd, length = self.write([b'AB' * 50000])
        fd = self.open_direct()
        destination = StubStream()
        self.copy(self._pump.File(fd, length, direct=True), destination,
                  length, slot_size=1000)
        self.assertEqual(b'AB' * 50000, destination.written)

    def test_direct_of_a_part(self):
        self.write([b'AB' * 50000])
        destination = StubStream()
        self.copy(self._pump.File(self.open_direct(), 5001, direct=True),
                  destination, 5001)
        self.assertEqual((b'AB' * 2501)[:5001], destination.written)

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
        self.assertIn(e.message, OF_A_DIRECTORY)

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
        fd, _length = self.write([b'A'])
        e = self.assertRaises(TypeError, self._pump.Copy, StubStream([b'A']),
                              self._pump.File(fd, 1), 1)
        self.assertIn('nothing can be sent', str(e))

    def test_each_keeps_its_own_error(self):
        directory = os.open(os.path.dirname(self.path), os.O_RDONLY)
        self.addCleanup(os.close, directory)
        files = [self._pump.File(fd, 10) for fd in (directory, -1)]
        found = [ends.end_of(f) for f in files]
        buffer = ctypes.create_string_buffer(10)
        for end in found:
            self.assertEqual(-1, end.recv(end.stream, buffer, 10, 1))
        messages = []
        for end in found:
            error = ends.CError()
            end.last_error(end.stream, ctypes.byref(error))
            messages.append(error.message.decode())
        self.assertIn(messages[0], OF_A_DIRECTORY)
        self.assertEqual(os.strerror(errno.EBADF), messages[1])
