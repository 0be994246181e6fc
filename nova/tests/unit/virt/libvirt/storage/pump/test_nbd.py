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

import errno
import os
import signal
import socket
import time
from unittest import mock

import ddt
import fixtures
from oslo_serialization import jsonutils

from nova import exception
from nova import test
from nova.tests.unit.virt.libvirt.storage.pump import ends
from nova.tests.unit.virt.libvirt.storage.pump import nbd_servers
from nova.tests.unit.virt.libvirt.storage.pump import test_worker
from nova.virt.libvirt.storage.pump import nbd
from nova.virt.libvirt.storage.pump import process
from nova.virt.libvirt.storage.pump import transfer as pump

MIB = 1 << 20


class ExportTestCase(test.NoDBTestCase):
    EXPORT = pump.Export('::1', 10809, 'disk', 'nova', '42' * 32)

    def test_key_is_in_no_log(self):
        job = pump.Job(pump.Volume('qemu:///system', 'pool', 'name'),
                       self.EXPORT, 5)
        for text in (str(self.EXPORT), repr(self.EXPORT), '%r' % [job],
                     str(job)):
            self.assertNotIn('42' * 32, text)
            self.assertIn('nbds://[::1]:10809/disk', text)

    def test_may_be_sent_as_it_is(self):
        self.assertEqual(self.EXPORT, pump.Export(*jsonutils.loads(
            jsonutils.dumps(self.EXPORT))))

    def test_keys(self):
        self.assertEqual('nova:%s\n' % ('42' * 32), self.EXPORT.psk)
        self.assertEqual(32, len(bytes.fromhex(pump.Export.new_key())))
        self.assertNotEqual(pump.Export.new_key(), pump.Export.new_key())

    def test_built_without_libnbd(self):
        nbd.missing.cache_clear()
        self.addCleanup(nbd.missing.cache_clear)
        with mock.patch('importlib.import_module',
                        side_effect=ImportError('libnbd.so.0')), \
                mock.patch.object(nbd.LOG, 'info') as log:
            self.assertIn('libnbd.so.0', pump.nbd_missing())
            self.assertIn('libnbd.so.0', pump.nbd_missing())
            log.assert_called_once()
            e = self.assertRaises(
                exception.StoragePumpMissing, pump.copy,
                pump.Volume('qemu:///system', 'pool', 'name'), self.EXPORT, 5)
        self.assertIn('of libnbd', str(e))


class PlayedTestCase(test.NoDBTestCase):
    """The worker, with a played libvirt at its source."""

    def setUp(self):
        super().setUp()
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(self.folder, 'destination')
        self.told = []
        path = os.path.join(self.folder, 'played.py')
        with open(path, 'w') as f:
            f.write(self.played())
        self.stub_out('nova.virt.libvirt.storage.pump.process._WORKER', path)

    def played(self):
        return test_worker.PLAYED % {
            'ends': ends.__file__, 'worker': process._WORKER, 'together': 1}

    def source(self, content=b'', length=None, name='source'):
        path = os.path.join(self.folder, name)
        with open(path, 'wb') as f:
            f.write(content)
            f.truncate(length or len(content))
        return pump.Volume('qemu:///system', 'pool', path)


class WorkerTestCase(PlayedTestCase):
    """The same, and a real server at its destination."""

    def setUp(self):
        super().setUp()
        if pump.nbd_missing():
            self.skipTest('the pump was built without libnbd')
        self.key = pump.Export.new_key()

    def serve(self, length, content=b''):
        export = pump.Export('127.0.0.1', 0, '', 'nova', self.key)
        with open(os.path.join(self.folder, 'keys.psk'), 'w') as f:
            f.write(export.psk)
        with open(self.path, 'wb') as f:
            f.write(content)
            f.truncate(length)
        self.server = nbd_servers.QemuNbd(
            self, self.path, *nbd_servers.QemuNbd.tls(self.folder))
        return export._replace(port=self.server.port)

    def copied(self, length):
        self.assertEqual(0, self.server.process.wait())
        with open(self.path, 'rb') as f:
            return f.read(length)

    def fails(self, cls, *args, **kwargs):
        return self.assertRaises(cls, pump.copy, *args,
                                 progress=self.told.append, **kwargs)


@ddt.ddt
class CopyTestCase(WorkerTestCase):
    """All of it, into a real server."""

    def test_copy(self):
        content = os.urandom(3 * MIB + 5) + bytes(MIB) + b'end'
        length = len(content)
        source = self.source(content)
        result = pump.copy(source, self.serve(length), length,
                           progress=self.told.append)
        self.assertEqual(content, self.copied(length))
        self.assertEqual((length, None),
                         (result.length, result.allocation))
        self.assertGreaterEqual(result.physical, length)
        self.assertEqual(length, self.told[-1])
        # The destination verifies what libvirt would have been sent.
        pump.verify(source, length, result.checksum, key=result.key)

    def test_holes_where_old_content_is(self):
        source = self.source(b'A', 4 * MIB)
        pump.copy(source, self.serve(4 * MIB, b'\xff' * 4 * MIB), 4 * MIB,
                  sparse=False)
        self.assertEqual(b'A' + bytes(4 * MIB - 1), self.copied(4 * MIB))

    def test_empty(self):
        result = pump.copy(self.source(), self.serve(512), 0,
                           progress=self.told.append)
        self.assertEqual((0, [0]), (result.length, self.told))
        self.copied(0)

    def test_too_small(self):
        e = self.fails(exception.StorageTransferError,
                       self.source(b'A' * MIB), self.serve(MIB - 512), MIB)
        self.assertEqual(('small', 'destination'), (e.kind, e.side))
        self.assertIn('1048064 of 1048576', str(e))
        self.assertEqual([], self.told)

    def test_wrong_key(self):
        export = self.serve(MIB)._replace(key='ab' * 32)
        e = self.fails(exception.StorageTransferError,
                       self.source(b'A' * MIB), export, MIB)
        self.assertEqual('nbd', e.kind)
        self.assertIn('(connect; ', str(e))
        self.assertIn('log of nova-compute on that host', str(e))
        self.assertNotIn('ab' * 32, str(e))

    def test_nobody_listens(self):
        with socket.socket() as bound:
            bound.bind(('127.0.0.1', 0))
            export = pump.Export('127.0.0.1', bound.getsockname()[1], '',
                                 'nova', self.key)
            e = self.fails(exception.StorageTransferError,
                           self.source(b'A' * MIB), export, MIB)
        self.assertEqual(('nbd', errno.ECONNREFUSED), (e.kind, e.code))
        self.assertIn('has started qemu-nbd', str(e))

    def test_cancelled_while_nobody_answers(self):
        with socket.socket() as listening:
            listening.bind(('127.0.0.1', 0))
            listening.listen()
            export = pump.Export('127.0.0.1', listening.getsockname()[1], '',
                                 'nova', self.key)
            asked = []

            def cancelled():
                asked.append(time.monotonic())
                return len(asked) > 20

            self.fails(exception.StorageTransferCancelled,
                       self.source(b'A' * MIB), export, MIB,
                       cancelled=cancelled)
            self.assertLess(time.monotonic() - asked[-1], 0.5)

    @ddt.data((signal.SIGKILL, exception.StorageTransferError),
              (signal.SIGSTOP, exception.StorageTransferStalled))
    @ddt.unpack
    def test_server_ends_in_the_middle(self, number, cls):
        # The first word comes when the connection stands.
        source = self.source(os.urandom(16 * MIB))
        export = self.serve(16 * MIB)

        def progress(done):
            if not self.told:
                os.kill(self.server.process.pid, number)
            self.told.append(done)

        e = self.assertRaises(cls, pump.copy, source, export, 16 * MIB,
                              bandwidth=4 * MIB, progress=progress,
                              stall_timeout=2)
        self.assertLess(e.transferred, 16 * MIB)
        self.assertIn('nbds://127.0.0.1', str(e))

    def test_bandwidth(self):
        start = time.monotonic()
        pump.copy(self.source(os.urandom(2 * MIB)), self.serve(2 * MIB),
                  2 * MIB, bandwidth=4 * MIB)
        self.assertGreater(time.monotonic() - start, 0.45)
        self.copied(0)
