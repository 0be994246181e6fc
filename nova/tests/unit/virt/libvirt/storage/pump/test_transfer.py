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

import os
import textwrap
import time
from unittest import mock

import ddt
import fixtures
from oslo_serialization import jsonutils

from nova import exception
from nova import test
from nova.virt.libvirt.storage.pump import process
from nova.virt.libvirt.storage.pump import transfer as pump

SOURCE = pump.Volume('qemu:///system', 'nova-disks-pool', 'uuid_disk')
DESTINATION = pump.Volume('qemu+tls://dest/system', 'nova-disks-pool',
                          'uuid_disk')

PREAMBLE = """
import json, os, signal, sys, time
request = json.loads(sys.stdin.readline())
def say(**message):
    print(json.dumps(message), flush=True)
def error(**kwargs):
    report = dict(side='destination', operation='send', reason='libvirt',
                  code=0, domain=0, message='', transferred=0)
    say(error=dict(report, **kwargs))
def result(**kwargs):
    say(result=dict(dict(data=60, holes=40, checksum=77, physical=100,
                         allocation=60), **kwargs))
"""


@ddt.ddt
class PumpTestCase(test.NoDBTestCase):
    """The parent's half, against worker processes that play a part."""

    def setUp(self):
        super().setUp()
        self.stub_out('nova.virt.libvirt.storage.pump.transfer.extension_path',
                      lambda: '/extension')
        self.progress = []
        self.pids = []
        self.ended = []

    def temp_path(self):
        return os.path.join(self.useFixture(fixtures.TempDir()).path, 'file')

    def worker(self, script):
        path = self.temp_path()
        with open(path, 'w') as f:
            f.write(PREAMBLE + textwrap.dedent(script))
        self.stub_out('nova.virt.libvirt.storage.pump.process._WORKER', path)

    def copy(self, script, **kwargs):
        self.worker(script)
        return pump.copy(SOURCE, DESTINATION, 100,
                         progress=self.progress.append,
                         on_start=self.pids.append, on_end=self.ended.append,
                         **kwargs)

    def fails(self, cls, script, **kwargs):
        e = self.assertRaises(cls, self.copy, script, **kwargs)
        self.assertEqual(self.pids, self.ended)
        self.assertRaises(ProcessLookupError, os.kill, self.pids[0], 0)
        return e

    def test_result(self):
        result = self.copy('''
            say(transferred=10)
            say(transferred=50)
            result()
            ''', key=5)
        self.assertEqual((60, 40, 77, 5, 100, 60, 100),
                         (result.data, result.holes, result.checksum,
                          result.key, result.physical, result.allocation,
                          result.length))
        self.assertEqual([10, 50, 100], self.progress)
        self.assertEqual(self.pids, self.ended)

    def test_request(self):
        path = self.temp_path()
        with mock.patch.dict(os.environ, {'OS_PASSWORD': 'secret',
                                          'KRB5CCNAME': '/ticket',
                                          'LIBVIRT_AUTH_FILE': '/auth'}):
            self.copy('''
                with open(%r, 'w') as f:
                    json.dump([request, sys.argv, dict(os.environ)], f)
                result()
                ''' % path, bandwidth=7, sparse=False, key=9)
        with open(path, 'rb') as f:
            request, argv, environ = jsonutils.load(f)
        self.assertEqual(
            {'source': list(SOURCE), 'destination': list(DESTINATION),
             'extension': '/extension', 'length': 100, 'sparse': False,
             'bandwidth': 7, 'key': 9, 'interval': 0.2, 'warm': False,
             'find_holes': False},
            request)
        self.assertEqual([process._WORKER], argv)
        self.assertNotIn('OS_PASSWORD', environ)
        self.assertEqual('/ticket', environ['KRB5CCNAME'])
        self.assertEqual('/auth', environ['LIBVIRT_AUTH_FILE'])

    def test_libvirt_error(self):
        e = self.fails(exception.StorageTransferError, '''
            error(code=49, domain=18, message="Storage pool not found",
                  operation='look up pool', transferred=30)
            ''')
        self.assertEqual((49, 18, 'destination', 30),
                         (e.code, e.domain, e.side, e.transferred))
        for text in ('uuid_disk', 'look up pool', 'qemu+tls://dest/system',
                     'Storage pool not found', 'code 49',
                     'define the storage pool', '30 of 100 bytes'):
            self.assertIn(text, str(e))

    def test_refused_connection_says_where_the_reason_is(self):
        e = self.fails(exception.StorageTransferError,
                       'error(code=38, operation="connect", '
                       'message="Unable to read TLS confirmation")')
        self.assertIn('log has the reason', str(e))

    @ddt.data('internal error: client socket is closed',
              'Cannot recv data: Connection reset by peer',
              'Cannot write data: Broken pipe',
              'End of file while reading data: Input/output error')
    def test_libvirt_of_the_destination_has_gone(self, message):
        e = self.fails(exception.StorageDestinationGone, '''
            error(code=38, operation="send", transferred=30, message=%r)
            ''' % message)
        self.assertEqual((38, 'destination', 'libvirt', 30),
                         (e.code, e.side, e.kind, e.transferred))
        for text in ('pool %s on host dest' % DESTINATION.pool, message,
                     'out of space', '30 of 100 bytes'):
            self.assertIn(text, str(e))

    def test_libvirt_of_the_source_has_gone(self):
        e = self.fails(exception.StorageTransferError, '''
            error(code=38, operation="receive", side="source",
                  message="Cannot recv data: Connection reset by peer")
            ''')
        self.assertNotIsInstance(e, exception.StorageDestinationGone)

    def test_libvirt_of_this_host_is_away(self):
        e = self.fails(exception.StorageTransferError,
                       'error(code=38, operation="connect", side="source", '
                       'message="Failed to connect socket")')
        self.assertIn('runs on this host', str(e))

    @ddt.data(('short', 'truncated'), ('long', 'grown'), ('stuck', 'neither'))
    @ddt.unpack
    def test_other_errors_say_what_happened(self, reason, text):
        e = self.fails(exception.StorageTransferError,
                       'error(reason=%r)' % reason)
        self.assertIn(text, str(e))

    def test_too_small_a_volume_afterwards(self):
        e = self.fails(exception.StorageTransferMismatch,
                       'result(physical=99)')
        self.assertIn('99 bytes of 100', str(e))

    def read_back(self, checksum):
        # half of the data has no room
        return '''
            if request['destination']:
                result(allocation=30)
            else:
                with open(%r, 'w') as f:
                    json.dump(request, f)
                result(checksum=%d)
            ''' % (self.read_path, checksum)

    def test_less_is_allocated_than_was_sent(self):
        self.read_path = self.temp_path()
        self.assertEqual(77, self.copy(self.read_back(77), key=5).checksum)
        self.assertEqual(2, len(set(self.pids)))
        with open(self.read_path, 'rb') as f:
            request = jsonutils.load(f)
        self.assertEqual(
            (list(DESTINATION), None, 100, 5),
            (request['source'], request['destination'], request['length'],
             request['key']))

    def test_full_though_libvirt_says_nothing(self):
        self.read_path = self.temp_path()
        e = self.fails(exception.StorageTransferMismatch, self.read_back(78))
        self.assertIn('has room', str(e))

    def test_stalled_without_a_word(self):
        e = self.fails(exception.StorageTransferStalled, 'time.sleep(600)',
                       stall_timeout=0.5)
        self.assertIn('[libvirt]/storage_migration_stall_timeout', str(e))

    def test_stalled_though_it_talks(self):
        start = time.monotonic()
        e = self.fails(exception.StorageTransferStalled, '''
            while True:
                say(transferred=10)
                time.sleep(0.05)
            ''', stall_timeout=0.5)
        self.assertLess(time.monotonic() - start, 30)
        self.assertEqual(10, e.transferred)

    def test_slow_but_moving_isnt_stalled(self):
        self.copy('''
            for i in range(1, 21):
                say(transferred=i)
                time.sleep(0.2)
            result()
            ''', stall_timeout=3)

    def test_cancelled(self):
        e = self.fails(exception.StorageTransferCancelled, '''
            say(transferred=10)
            time.sleep(600)
            ''', cancelled=lambda: bool(self.progress))
        self.assertEqual(10, e.transferred)

    def test_cancelled_though_the_worker_ignores_it(self):
        self.fails(exception.StorageTransferCancelled, '''
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            say(transferred=10)
            while True:
                time.sleep(1)
            ''', cancelled=lambda: bool(self.progress))

    @ddt.data('SIGKILL', 'SIGTERM')
    def test_killed_by_the_job_tracker_or_a_person(self, name):
        self.fails(exception.StorageTransferCancelled,
                   'os.kill(os.getpid(), signal.%s)' % name)

    def test_crashed(self):
        e = self.fails(exception.StorageTransferError,
                       'sys.exit("no libvirt here")')
        self.assertIn('status 1', str(e))
        self.assertIn('no libvirt here', str(e))

    def test_what_isnt_json_is_reported(self):
        e = self.fails(exception.StorageTransferError,
                       'print("corrupted heap", flush=True); os.abort()')
        self.assertIn('corrupted heap', str(e))

    def test_gone_before_the_request(self):
        self.worker('')
        with open(process._WORKER, 'w') as f:
            f.write('import os; os.close(0); os._exit(4)')
        self.assertRaises(exception.StorageTransferError, pump.copy, SOURCE,
                          DESTINATION, 100)

    def test_gone_when_the_bandwidth_changes(self):
        shared = pump.Bandwidth(100)

        def progress(transferred):
            with shared.shared(self.progress.append):
                pass

        self.worker('''
            os.close(0)
            say(transferred=10)
            result()
            ''')
        result = pump.copy(SOURCE, DESTINATION, 100, bandwidth=shared,
                           progress=progress)
        self.assertEqual(77, result.checksum)
        self.assertEqual([50, 100], self.progress)

    def test_error_in_progress_ends_the_worker(self):
        def broken(transferred):
            raise ValueError
        self.worker('say(transferred=10); time.sleep(600)')
        self.assertRaises(ValueError, pump.copy, SOURCE, DESTINATION, 100,
                          progress=broken, on_start=self.pids.append)
        self.assertRaises(ProcessLookupError, os.kill, self.pids[0], 0)

    def test_more_file_descriptors_than_select_knows(self):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < 1200:
            self.skipTest('the limit of open files is below 1200')
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE,
                        (soft, hard))
        files = [open(os.devnull) for _ in range(1100)]
        self.addCleanup(lambda: [f.close() for f in files])
        self.assertEqual(100, self.copy('result()').length)

    def test_what_is_copied_with_what_bandwidth(self):
        path = self.temp_path()
        self.worker('''
            with open(%r, 'w') as f:
                json.dump(request, f)
            result()
            ''' % path)
        job = pump.Job(SOURCE, DESTINATION, 100, sparse=False, key=3)
        result = job.run(pump.Watch(progress=self.progress.append),
                         pump.Bandwidth(8))
        with open(path, 'rb') as f:
            request = jsonutils.load(f)
        self.assertEqual((False, 3, 8), (
            request['sparse'], request['key'], request['bandwidth']))
        self.assertEqual((100, 3), (result.length, result.key))
        self.assertEqual([100], self.progress)

    def test_unknown_keyword(self):
        self.assertRaises(TypeError, self.copy, '', colour='red')

    def test_negative_length(self):
        self.assertRaises(ValueError, pump.copy, SOURCE, DESTINATION, -1)

    def test_verify(self):
        self.worker('result(checksum=request["key"] * 2)')
        result = pump.verify(DESTINATION, 100, 10, key=5)
        self.assertEqual(10, result.checksum)
        e = self.assertRaises(exception.StorageTransferMismatch, pump.verify,
                              DESTINATION, 100, 11, key=5)
        self.assertIn('uuid_disk', str(e))
        self.assertIn('000000000000000b', str(e))

    @ddt.data("reason='short'", "reason='long'", 'code=50')
    def test_verify_what_is_not_there_or_of_another_length(self, error):
        self.worker('error(side="source", %s)' % error)
        self.assertRaises(exception.StorageTransferMismatch, pump.verify,
                          DESTINATION, 100, 10, key=5)

    @ddt.data("reason='stuck'", 'code=38')
    def test_verify_what_cant_be_read(self, error):
        self.worker('error(side="source", %s)' % error)
        e = self.assertRaises(exception.StorageTransferError, pump.verify,
                              DESTINATION, 100, 10, key=5)
        self.assertNotIsInstance(e, exception.StorageTransferMismatch)

    def test_keys_differ_and_are_in_range(self):
        keys = {pump.new_key() for _ in range(100)}
        self.assertEqual(100, len(keys))
        self.assertTrue(all(0 < key < (1 << 61) - 1 for key in keys))


class ExtensionTestCase(test.NoDBTestCase):
    @mock.patch('importlib.util.find_spec', return_value=None)
    def test_missing(self, mock_find):
        e = self.assertRaises(exception.StoragePumpMissing, pump.copy, SOURCE,
                              DESTINATION, 1)
        self.assertIn('pip install', str(e))
