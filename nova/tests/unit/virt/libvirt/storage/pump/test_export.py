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

import contextlib
import ctypes
import errno
import importlib
import os
import signal
import socket
import time

import ddt
import fixtures

from nova.tests.unit.virt.libvirt.storage.pump import base
from nova.tests.unit.virt.libvirt.storage.pump import ends
from nova.tests.unit.virt.libvirt.storage.pump import nbd_servers

MIB = 1 << 20
KEY = '0123456789abcdef' * 4

# Not time.sleep(): the callbacks run in threads which eventlet doesn't know.
USLEEP = ctypes.CDLL(None).usleep


class ExportTestCase(base.PumpExtensionTestCase):
    def setUp(self):
        super().setUp()
        try:
            self._nbd = importlib.import_module(
                'nova.virt.libvirt.storage.pump._nbd')
        except ImportError:
            self.skipTest('the pump was built without libnbd')
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(self.folder, 'volume')

    def connect(self, server, **kwargs):
        connection = self._nbd.Connection('127.0.0.1', server.port, '',
                                          **kwargs)
        self.addCleanup(connection.close)
        return connection

    def refused(self, server, **kwargs):
        return self.assertRaises(self._nbd.NbdError, self.connect, server,
                                 **kwargs)

    def export(self, connection, **kwargs):
        return self._nbd.Export(connection, **kwargs)


def content_of(parts):
    return b''.join(bytes(p) if isinstance(p, int) else p for p in parts)


@ddt.ddt
class QemuNbdTestCase(ExportTestCase):
    """Into a real server, over TLS."""

    def setUp(self):
        super().setUp()
        self.psk_file = os.path.join(self.folder, 'keys.psk')
        self.write_key(self.psk_file, KEY)

    def write_key(self, path, key):
        with open(path, 'w') as f:
            f.write('nova:%s\n' % key)
        return path

    def serve(self, *parts, **kwargs):
        with open(self.path, 'wb') as f:
            for part in parts:
                if isinstance(part, int):
                    f.truncate(f.seek(part, os.SEEK_CUR))
                else:
                    f.write(part)
        return nbd_servers.QemuNbd(
            self, self.path, *nbd_servers.QemuNbd.tls(self.folder),
            *kwargs.get('options', ()))

    def connect(self, server, **kwargs):
        return super().connect(server, **{
            'username': 'nova', 'psk_file': self.psk_file, **kwargs})

    def into(self, server, connection):
        """Return what stands in the file when the server has ended."""
        connection.close()
        self.assertEqual(0, server.process.wait())
        with open(self.path, 'rb') as f:
            return f.read()

    @ddt.data(
        [b'A'], [b'A' * 511], [b'A' * 4096, b'B'], [MIB], [4096, b'A'],
        [b'A' * 4096, MIB, b'B' * 70000, 3 * MIB, b'C'], [bytes(100000)],
        [bytes(65536), b'A' * 65536, bytes(131072), b'B', bytes(70000)],
        [b'AB' * 50000] * 30)
    def test_content_arrives(self, parts):
        content = content_of(parts)
        for blank in (True, False):
            server = self.serve(len(content) if blank else
                                b'\xff' * len(content))
            connection = self.connect(server)
            copy = self.copy(ends.StubStream(parts),
                             self.export(connection, blank=blank),
                             len(content))
            self.assertTrue(connection.is_open)
            found = self.into(server, connection)
            self.assertEqual(content, found[:len(content)])
            self.assertEqual(
                self._pump.checksum(parts, 0x1234567890abcdef), copy.checksum)
            self.assertEqual(len(content), copy.transferred)

    def test_no_room_is_taken_by_zeroes(self):
        server = self.serve(b'\xff' * (8 * MIB))
        connection = self.connect(server)
        parts = [b'A' * MIB, 3 * MIB, bytes(3 * MIB), b'B' * MIB]
        self.copy(ends.StubStream(parts), self.export(connection), 8 * MIB)
        self.assertEqual(content_of(parts), self.into(server, connection))
        self.assertLess(os.stat(self.path).st_blocks * 512, 3 * MIB)

    def test_two_copies_over_one_connection(self):
        server = self.serve(2 * MIB)
        connection = self.connect(server)
        for letter in (b'A', b'B'):
            self.copy(ends.StubStream([letter * MIB]),
                      self.export(connection), MIB)
        self.assertEqual(b'B' * MIB + bytes(MIB),
                         self.into(server, connection))

    def test_size(self):
        self.assertEqual(3 * MIB, self.connect(self.serve(3 * MIB)).size)

    def test_key_is_needed_to_connect_alone(self):
        server = self.serve(MIB)
        connection = self.connect(server)
        os.unlink(self.psk_file)
        self.copy(ends.StubStream([b'A' * MIB]), self.export(connection), MIB)
        self.assertEqual(b'A' * MIB, self.into(server, connection))

    def test_who_has_no_key_is_refused(self):
        server = self.serve(MIB)
        other = self.write_key(os.path.join(self.folder, 'other'), 'ab' * 32)
        for kwargs, text in (
                ({'psk_file': other}, 'TLS'), ({'username': 'eve'}, 'eve'),
                ({'psk_file': ''}, 'TLS'), ({'psk_file': '/gone'}, '/gone')):
            self.assertIn(text, self.refused(server, **kwargs).message)
        # and the server is there for who has it
        self.assertEqual(MIB, self.connect(server).size)

    def test_read_only(self):
        e = self.refused(self.serve(MIB, options=['-r']))
        self.assertEqual(errno.EROFS, e.code)

    @ddt.data(signal.SIGKILL, signal.SIGTERM)
    def test_killed_in_the_middle(self, number):
        server = self.serve(64 * MIB)
        connection = self.connect(server)
        source = ends.StubStream(
            [os.urandom(MIB)] * 64,
            wait=lambda call: call == 20 and os.kill(server.process.pid,
                                                     number))
        e = self.fails(source, self.export(connection), 64 * MIB)
        self.assertEqual(('destination', 'nbd'), (e.side, e.reason))
        self.assertTrue(e.message)
        self.assertFalse(connection.is_open)

    def stop(self, server):
        os.kill(server.process.pid, signal.SIGSTOP)

    def test_cancel_though_the_server_is_silent(self):
        server = self.serve(64 * MIB)
        cancelled = []

        def wait(call):
            if call == 5:
                self.stop(server)
            elif call == 14:
                # The other thread waits for answers by then.
                USLEEP(300000)
                cancelled.append(time.monotonic())
                copy.cancel()

        copy = self._pump.Copy(
            ends.StubStream([os.urandom(MIB)] * 64, wait=wait),
            self.export(self.connect(server)), 64 * MIB)
        e = self.assertRaises(self._pump.PumpError, copy.run)
        self.assertLess(time.monotonic() - cancelled[0], 0.1)
        self.assertEqual('cancelled', e.reason)

    def test_source_fails_though_the_server_is_silent(self):
        server = self.serve(64 * MIB)
        source = ends.StubStream(
            [os.urandom(MIB)] * 64, fail_at=12,
            wait=lambda call: call == 5 and self.stop(server))
        e = self.fails(source, self.export(self.connect(server)), 64 * MIB)
        self.assertEqual('source', e.side)

    def test_nothing_is_left_behind(self):
        def count():
            with open('/proc/self/status') as f:
                threads = [line for line in f if line.startswith('Threads')]
            return threads, len(os.listdir('/proc/self/fd'))

        parts = [b'A' * MIB, MIB, b'B' * MIB]
        server = self.serve(4 * MIB, options=['-t'])
        before = None
        for n in range(12):
            connection = self.connect(server)
            source = ends.StubStream(parts, fail_at=n % 3 and 1)
            with contextlib.suppress(self._pump.PumpError):
                self.copy(source, self.export(connection), 3 * MIB)
            with contextlib.suppress(self._nbd.NbdError):
                self.connect(server, username='eve')
            connection.close()
            before = before or count()
        self.assertEqual(before, count())


@ddt.ddt
class PlayedServerTestCase(ExportTestCase):
    """What a real server doesn't do on demand."""

    def serve(self, **conduct):
        server = nbd_servers.PlayedServer(self, **conduct)
        return server, self.connect(server)

    def test_what_is_asked_for(self):
        server, connection = self.serve()
        parts = [b'A' * 300000, 100 * MIB, bytes(100000), b'B' * 10]
        self.copy(ends.StubStream(parts), self.export(connection), 105257610)
        connection.close()
        self.assertEqual([
            [nbd_servers.WRITE, 0, 262144],
            [nbd_servers.WRITE, 262144, 300000 - 262144],
            [nbd_servers.ZERO, 300000, 32 * MIB],
            [nbd_servers.ZERO, 300000 + 32 * MIB, 32 * MIB],
            [nbd_servers.ZERO, 300000 + 64 * MIB, 32 * MIB],
            [nbd_servers.ZERO, 300000 + 96 * MIB, 4 * MIB],
            [nbd_servers.ZERO, 300000 + 100 * MIB, 65536],
            [nbd_servers.WRITE, 365536 + 100 * MIB, 34474],
            [nbd_servers.FLUSH, 0, 0], [nbd_servers.DISCONNECT, 0, 0]],
            server.log())

    def test_zeroes_are_left_out_where_they_are(self):
        server, connection = self.serve()
        parts = [bytes(MIB), 100 * MIB, b'B' * 10]
        self.copy(ends.StubStream(parts), self.export(connection, blank=True),
                  101 * MIB + 10)
        connection.close()
        self.assertEqual([
            [nbd_servers.WRITE, 101 * MIB, 10], [nbd_servers.FLUSH, 0, 0],
            [nbd_servers.DISCONNECT, 0, 0]], server.log())

    def test_many_requests_are_in_flight(self):
        # Without them each would wait for 0.2 s.
        server, connection = self.serve(hold=7)
        parts = [b'A' * 262144] * 256
        start = time.monotonic()
        self.copy(ends.StubStream(parts), self.export(connection), 64 * MIB)
        self.assertLess(time.monotonic() - start, 25)
        connection.close()
        self.assertEqual(258, len(server.log()))

    def test_many_small_requests(self):
        server, connection = self.serve(hold=20)
        # of each slot three requests
        parts = [(b'A' * 65536 + bytes(65536)) * 2] * 64
        self.copy(ends.StubStream(parts), self.export(connection), 16 * MIB)
        connection.close()
        self.assertEqual(258, len(server.log()))

    def test_flushed_now_and_then(self):
        server, connection = self.serve()
        parts = [b'A' * (8 * MIB)] * 65
        self.copy(ends.StubStream(parts), self.export(connection), 520 * MIB)
        connection.close()
        commands = [command for command, *_where in server.log()]
        self.assertEqual(
            [1024, 2049, 2082],
            [n for n, command in enumerate(commands)
             if command == nbd_servers.FLUSH])

    # 0 to 3 write, 4 flushes; whose answers come late
    @ddt.data((0, 0), (3, 0), (4, 0), (0, 8), (3, 8), (4, 8))
    @ddt.unpack
    def test_error(self, number, hold):
        server, connection = self.serve(hold=hold,
                                        errors=[(number, errno.ENOSPC)])
        e = self.fails(ends.StubStream([b'A' * 262144] * 4),
                       self.export(connection), MIB)
        self.assertEqual(('destination', 'nbd', errno.ENOSPC),
                         (e.side, e.reason, e.code))
        self.assertIn('No space left', e.message)
        self.assertFalse(connection.is_open)
        self.assertRaises(self._pump.PumpError, self.copy,
                          ends.StubStream([b'A']), self.export(connection), 1)

    def test_first_error_counts(self):
        _server, connection = self.serve(
            hold=8, errors=[(1, errno.EIO), (2, errno.ENOSPC)])
        e = self.fails(ends.StubStream([b'A' * 262144] * 4),
                       self.export(connection), MIB)
        self.assertEqual(errno.EIO, e.code)

    @ddt.data('close', 'garbage', 'stranger', 'long')
    def test_hostile(self, act):
        for at in (0, 5, 39):
            _server, connection = self.serve(act=act, at=at)
            e = self.fails(ends.StubStream([b'A' * 262144] * 39),
                           self.export(connection), 39 * 262144)
            self.assertEqual(('destination', 'nbd'), (e.side, e.reason))
            self.assertTrue(e.message)

    def test_leave_without_an_answer(self):
        _server, connection = self.serve(act='silent', at=0)
        start = time.monotonic()
        connection.close(timeout=0.2)
        self.assertLess(time.monotonic() - start, 2)

    @ddt.data((4, 'flush'), (64, 'zeroes'))
    @ddt.unpack
    def test_server_that_cannot(self, flag, what):
        server = nbd_servers.PlayedServer(
            self, flags=nbd_servers.FLAGS & ~flag)
        e = self.refused(server)
        self.assertEqual(errno.EOPNOTSUPP, e.code)
        self.assertIn(what, e.message)


class NoServerTestCase(ExportTestCase):
    def test_nobody_listens(self):
        with socket.socket() as bound:
            bound.bind(('127.0.0.1', 0))
            self.port = bound.getsockname()[1]
            e = self.refused(self)
        self.assertEqual(errno.ECONNREFUSED, e.code)

    def test_nobody_answers(self):
        listening = socket.socket()
        self.addCleanup(listening.close)
        listening.bind(('127.0.0.1', 0))
        listening.listen()
        self.port = listening.getsockname()[1]
        start = time.monotonic()
        e = self.refused(self, timeout=0.3)
        self.assertLess(time.monotonic() - start, 5)
        self.assertEqual(errno.ETIMEDOUT, e.code)

    def test_nobody_takes_the_connection(self):
        # Its queue is full: not even TCP is answered.
        listening = socket.socket()
        self.addCleanup(listening.close)
        listening.bind(('127.0.0.1', 0))
        listening.listen(0)
        self.port = listening.getsockname()[1]
        for _n in range(4):
            other = socket.socket()
            other.setblocking(False)
            self.addCleanup(other.close)
            other.connect_ex(('127.0.0.1', self.port))
        self.assertEqual(errno.ETIMEDOUT, self.refused(self, timeout=.3).code)

    def test_no_export_without_a_connection(self):
        self.assertRaises(TypeError, self._nbd.Export, None)
