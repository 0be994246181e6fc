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

import importlib.util
import os
import subprocess
import sys
import threading
from unittest import mock

import ddt
import fixtures
from oslo_serialization import jsonutils

from nova import exception
from nova import test
from nova.tests.unit.virt.libvirt.storage.pump import ends
from nova.virt.libvirt.storage.pump import process
from nova.virt.libvirt.storage.pump import transfer as pump

MIB = 1 << 20

# The worker on a libvirt that is played. A volume's name is the path of a
# file: of the content or, of a destination, of what was sent to it when.
PLAYED = """
import importlib.util, os, sys, time, types

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

ends = load('ends', %(ends)r)

log = open(os.devnull, 'w')

def note(*what):
    log.write(' '.join(map(str, what)) + '\\n')

class Stream(ends.StubStream):
    def send(self, stream, data, nbytes):
        note('sent', time.monotonic(), nbytes)
        return nbytes

class Volume:
    def __init__(self, path):
        self.name = path
    def path(self):
        return self.name
    def infoFlags(self, flags):
        return self.info()
    def info(self):
        return [0, 0, os.path.getsize(self.name)
                if not self.name.endswith('.log') else 1 << 40]
    def upload(self, stream, offset, length, flags):
        global log
        log = open(self.name, 'w', buffering=1)
        while len([name for name in os.listdir(os.path.dirname(self.name))
                   if name.endswith('.log')]) < %(together)d:
            time.sleep(0.01)

class Connection:
    def storagePoolLookupByName(self, name):
        return self
    def storageVolLookupByName(self, name):
        return Volume(name)
    def newStream(self, flags):
        return Stream()

libvirt = types.ModuleType('libvirt')
libvirt.libvirtError = type('libvirtError', (Exception,), {})
libvirt.registerErrorHandler = lambda handler, context: None
libvirt.VIR_CRED_AUTHNAME = 2
libvirt.VIR_CRED_PASSPHRASE = 5
libvirt.VIR_CRED_REALM = 8

def open_auth(uri, auth, flags):
    credentials, callback, opaque = auth
    # what SASL's SCRAM asks for; nobody is here to be asked
    assert {2, 5} <= set(credentials)
    assert callback([], opaque) == 0 and callback([[5, None]], opaque) < 0
    return Connection()

libvirt.openAuth = open_auth
libvirt.VIR_STORAGE_VOL_GET_PHYSICAL = 1
libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM = 1
sys.modules['libvirt'] = libvirt
worker = load('worker', %(worker)r)

class Job(worker.Job):
    def set_bandwidth(self, bandwidth):
        super().set_bandwidth(bandwidth)
        while self.copy is None:
            time.sleep(0.01)
        note('bandwidth', self.copy.bandwidth)

worker.Job = Job
worker.main()
"""


@ddt.ddt
class RealWorkerTestCase(test.NoDBTestCase):
    """The real processes, which are told and tell."""

    def setUp(self):
        super().setUp()
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.worker = process._WORKER

    def play(self, together=1):
        path = os.path.join(self.folder, 'played.py')
        with open(path, 'w') as f:
            f.write(PLAYED % {'ends': ends.__file__, 'worker': self.worker,
                              'together': together})
        self.stub_out('nova.virt.libvirt.storage.pump.process._WORKER', path)
        return path

    def content(self, name, content):
        path = os.path.join(self.folder, name)
        with open(path, 'wb') as f:
            f.write(content)
        return path

    def job(self, name, nbytes):
        path = self.content(name, os.urandom(nbytes))
        return pump.Job(
            pump.Volume('qemu:///system', 'pool', path),
            pump.Volume('qemu+tls://dest/system', 'pool', path + '.log'),
            nbytes)

    def log(self, name):
        with open(os.path.join(self.folder, name + '.log')) as f:
            return [line.split() for line in f]

    def run_both(self, jobs, bandwidth):
        results = []
        threads = [threading.Thread(
            target=lambda job=job: results.append(job.run(
                bandwidth=bandwidth))) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(jobs), len(results))

    def test_copy(self):
        self.play()
        job = self.job('a', 3 * MIB + 5)
        result = job.run()
        self.assertEqual(3 * MIB + 5, result.data)
        self.assertEqual(
            3 * MIB + 5, sum(int(line[2]) for line in self.log('a')))
        read = pump.read(job.source, job.length, key=job.key)
        self.assertEqual(result.checksum, read.checksum)

    def test_two_copies_have_one_bandwidth_together(self):
        # Both begin to send at the same time.
        self.play(together=2)
        self.run_both([self.job('a', MIB // 2), self.job('b', MIB // 2)],
                      pump.Bandwidth(MIB))
        sent = [(float(line[1]), int(line[2])) for name in 'ab'
                for line in self.log(name) if line[0] == 'sent']
        self.assertEqual(MIB, sum(nbytes for _when, nbytes in sent))
        times = [when for when, _nbytes in sent]
        # Of each the first piece may go at once, and that may be noted late.
        limited = MIB - 4 * 65536
        self.assertGreaterEqual(max(times) - min(times), 0.95 * limited / MIB)

    def test_when_one_ends_the_other_has_more(self):
        self.play(together=2)
        self.run_both([self.job('a', 2 * MIB), self.job('b', 65536)],
                      pump.Bandwidth(2 * MIB))
        told = [line[1] for line in self.log('a') if line[0] == 'bandwidth']
        self.assertEqual(str(2 * MIB), told[-1])

    def test_one_that_fails_leaves_its_part_to_the_other(self):
        self.play()
        gone = pump.Job(pump.Volume('qemu:///system', 'pool', self.folder),
                        None, MIB)
        shared = pump.Bandwidth(10)
        parts = []
        with shared.shared(parts.append):
            self.assertRaises(exception.StorageTransferError, gone.run,
                              bandwidth=shared)
        self.assertEqual([10, 5, 10], parts)

    def start(self, *pieces):
        """Start a worker and say these pieces of JSON lines to it."""
        path = self.play()
        worker = subprocess.Popen(
            [sys.executable, '-I', path], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE)
        self.addCleanup(worker.stdout.close)
        for piece in pieces:
            worker.stdin.write(piece)
            worker.stdin.flush()
        return worker

    def request(self, job, **more):
        return jsonutils.dump_as_bytes({
            'extension': pump.extension_path(), 'source': job.source,
            'destination': job.destination, 'length': job.length,
            'sparse': True, 'key': 5, 'interval': 0.01, 'bandwidth': 0,
            'warm': False,
            **more}) + b'\n'

    @ddt.data(1, 20, 400)
    def test_lines_come_in_any_pieces(self, size):
        text = self.request(self.job('a', MIB), bandwidth=1) + (
            b'{"bandwidth": 7}\n{"bandwidth": 1073741824}\n')
        worker = self.start(*[text[i:i + size]
                              for i in range(0, len(text), size)])
        out = worker.stdout.read()
        worker.stdin.close()
        self.assertEqual(0, worker.wait())
        self.assertIn(b'"result"', out)
        self.assertIn(['bandwidth', '1073741824'], self.log('a'))

    def test_ends_with_its_parent(self):
        worker = self.start(self.request(self.job('a', MIB), bandwidth=1))
        self.assertIn(b'transferred', worker.stdout.readline())
        worker.stdin.close()
        self.assertNotIn(b'"result"', worker.stdout.read())
        worker.wait()

    def test_parent_goes_before_it_has_asked(self):
        worker = self.start(b'{"source": ')
        worker.stdin.close()
        self.assertEqual(1, worker.wait())


@ddt.ddt
class LocalFileTestCase(test.NoDBTestCase):
    """When the worker reads a volume's file, and not through libvirt."""

    def setUp(self):
        super().setUp()
        spec = importlib.util.spec_from_file_location(
            'worker', process._WORKER)
        self.module = importlib.util.module_from_spec(spec)
        self.libvirt = mock.Mock(libvirtError=ValueError)
        with mock.patch.dict(sys.modules, libvirt=self.libvirt):
            spec.loader.exec_module(self.module)
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'volume')
        with open(self.path, 'wb') as f:
            f.write(b'12345')

    def file(self, uri='qemu:///system', length=5, path=None):
        self.end = end = self.module.End('source', uri, 'pool', 'volume')
        end.volume = mock.Mock()
        end.volume.path.return_value = path or self.path
        end.volume.infoFlags.return_value = [0, 7, 7]
        end.volume.info.return_value = [0, 7, 4096]
        fd = end.file(length)
        if fd is not None:
            self.addCleanup(os.close, fd)
        return fd

    def test_local(self):
        self.assertEqual(b'12345', os.read(self.file(), 10))

    @ddt.data('qemu+tls://dest/system', 'qemu+unix:///system?socket=/run/x',
              'qemu:///system?socket=/run/x', 'test://dest/default')
    def test_another_host_or_another_file_system(self, uri):
        self.assertIsNone(self.file(uri))

    def test_libvirt_is_not_asked(self):
        # It would open what the guest has named in the disk's header.
        self.file()
        found = os.stat(self.path)
        self.assertEqual((5, found.st_blocks * 512), self.end.sizes())
        os.truncate(self.path, 6)
        self.assertEqual(6, self.end.sizes()[0])
        self.end.volume.infoFlags.assert_not_called()
        self.end.volume.info.assert_not_called()

    def test_sizes_of_a_stream(self):
        self.file('qemu+tls://dest/system')
        self.assertEqual((7, 4096), self.end.sizes())

    def written(self, code, domain, message):
        """What is told of a copy if libvirt answers so afterwards."""
        error = self.libvirt.libvirtError()
        error.get_error_code = lambda: code
        error.get_error_domain = lambda: domain
        error.get_error_message = lambda: message
        end = self.module.End(
            'destination', 'qemu+tls://dest/system', 'pool', 'volume')
        end.volume = mock.Mock()
        end.volume.path.return_value = '/disks/volume'
        end.volume.infoFlags.side_effect = error
        return end.sizes_written(5, 4)

    def test_header_that_libvirt_cant_follow(self):
        # Else such a disk could be moved nowhere.
        self.assertEqual((5, 4), self.written(
            38, 18, "cannot stat file '/aaa': File name too long"))

    @ddt.data((38, 7, 'Cannot recv data'), (50, 18, 'no storage vol'),
              (38, 18, "cannot stat file '/disks/volume': No such file"))
    @ddt.unpack
    def test_copy_that_is_gone(self, code, domain, message):
        self.assertRaises(self.module.Failure, self.written, code, domain,
                          message)

    @ddt.data(('/disks/volume', (256 << 10) + 50 * (12 << 10)),
              ('/dev/vg/volume', 32 << 20))
    @ddt.unpack
    def test_what_costs_as_much_as_a_stream(self, path, expected):
        self.file('qemu+tls://dest/system')
        self.end.volume.path.return_value = path
        self.end.pool.numOfVolumes.return_value = 50
        self.assertEqual(expected, self.end.bridge())

    def test_device_is_not_cut(self):
        self.libvirt.VIR_STORAGE_VOL_BLOCK = 1
        self.file('qemu+tls://dest/system')
        self.end.volume.info.return_value = [1, 7, 7]
        self.end.fit(5)
        self.end.volume.upload.assert_not_called()

    def test_sizes_differ(self):
        self.assertIsNone(self.file(length=4))

    def test_what_is_no_plain_file(self):
        self.assertIsNone(self.file(path=os.path.dirname(self.path)))
        self.assertIsNone(self.file(path='/dev/null', length=0))
        os.symlink(self.path, self.path + '.link')
        self.assertIsNone(self.file(path=self.path + '.link'))

    @ddt.data((5, None, 'file', True), (9, None, 'block', True),
              (9, None, 'file', False), (4, None, 'block', False),
              (9, ['uri', 'pool', 'v'], 'block', False))
    @ddt.unpack
    def test_volume_that_is_verified_may_be_a_longer_device(
            self, physical, destination, kind, expected):
        self.libvirt.VIR_STORAGE_VOL_BLOCK = 1
        request = {'length': 5, 'destination': destination, 'sparse': True,
                   'bandwidth': 0, 'key': 7, 'interval': 1, 'extension': None,
                   'source': ['uri', 'pool', 'v'], 'warm': False}
        job = self.module.Job(request, iter(()))
        volume = (self.libvirt.openAuth.return_value.storagePoolLookupByName
                  .return_value.storageVolLookupByName.return_value)
        volume.infoFlags.return_value = [0, 0, physical]
        volume.info.return_value = [int(kind == 'block'), physical, physical]
        with mock.patch.object(
                job, 'run_copy', return_value=[]), mock.patch.object(
                self.module, 'load_pump'), mock.patch.object(
                self.module, 'say') as say:
            job.copy = mock.Mock(data=5)
            if expected:
                job.run()
                say.assert_called_once()
            else:
                self.assertRaises(self.module.Failure, job.run)

    @ddt.data(({}, True), ({'destination': ['uri', 'pool', 'v']}, False))
    @ddt.unpack
    def test_synced_where_it_is_verified(self, request, sync):
        job = self.module.Job({
            'length': 5, 'destination': None, 'sparse': True, 'bandwidth': 0,
            'key': 7, 'interval': 1, **request}, iter(()))
        source = mock.Mock()
        source.file.return_value = 3
        extension = mock.Mock(PumpError=ValueError)
        with mock.patch.object(job, 'start'):
            job.run_copy(extension, source,
                         mock.Mock() if request else None, 5, table=None)
        extension.File.assert_called_once_with(3, 5, sync=sync, direct=False)

    def test_failure_of_its_own(self):
        """The message says where it was."""
        job = mock.Mock()
        job.run.side_effect = TypeError('direct')
        with mock.patch.object(self.module, 'messages',
                               return_value=iter([{}])), \
                mock.patch.object(self.module, 'Job', return_value=job), \
                mock.patch.object(self.module, 'say') as say, \
                mock.patch('os._exit'):
            self.module.main()
        report = say.call_args.kwargs['error']
        self.assertEqual('TypeError: direct', report['message'])
        self.assertEqual('source', report['side'])

    def test_not_novas_to_read(self):
        with mock.patch('os.open', side_effect=PermissionError):
            self.assertIsNone(self.file())

    def test_imports_neither_nova_nor_oslo(self):
        """Its start time hangs on what it imports."""
        with open(process._WORKER) as f:
            lines = [line for line in f if line.startswith(('import',
                                                            'from'))]
        names = {line.split()[1].split('.')[0] for line in lines}
        self.assertEqual({'libvirt'},
                         {n for n in names
                          if n not in sys.stdlib_module_names})
