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

import itertools
import os
import subprocess
import sys
import time
from unittest import mock

import fixtures

from nova import exception
from nova import test
from nova.virt.libvirt.storage.move import convert

NAMES = {'volume': 'v', 'where': 'w', 'length': 10, 'operation': 'convert',
         'side': 'source'}


# Runs a program in a thread, as nova-compute does.
SERVICE = '''
import threading
from nova.virt.libvirt.storage.move import convert
threading.Thread(target=convert.run, args=(["sleep", "60"], {
    "on_start": lambda pid: print(pid, flush=True), "on_end": print,
    "cancelled": lambda: False, "stall_timeout": 60}, {})).start()
'''


def _is_running(pid):
    try:
        with open('/proc/%d/stat' % pid) as f:
            # One that nobody has waited for has ended, too.
            return f.read().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


class ConvertTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.watch = {'on_start': mock.Mock(), 'on_end': mock.Mock(),
                      'cancelled': mock.Mock(return_value=False),
                      'stall_timeout': 60}
        self.stub_out('nova.virt.libvirt.storage.move.convert._INTERVAL',
                      0.01)

    def run_it(self, *command, **kwargs):
        try:
            return convert.run(list(command), self.watch, NAMES, **kwargs)
        finally:
            (pid,), _kwargs = self.watch['on_start'].call_args
            self.watch['on_end'].assert_called_once_with(pid)
            # It has ended, and was waited for.
            self.assertFalse(os.path.exists('/proc/%d' % pid))

    def test_it_ends_well(self):
        self.assertEqual(0, self.run_it('true'))

    def test_what_it_says_is_told(self):
        e = self.assertRaises(
            exception.StorageTransferError, self.run_it,
            'sh', '-c', 'echo No space left >&2; exit 1')
        self.assertIn('failed on the source', str(e))
        self.assertIn('there is room for w: No space left', str(e))
        self.assertIn('convert', str(e))

    def test_exit_code_that_is_no_error(self):
        self.assertEqual(1, self.run_it('false', good=(0, 1)))

    def test_cancelled(self):
        """Nobody waits for what it would have done."""
        self.watch['cancelled'].side_effect = [False, True]
        self.assertRaises(exception.StorageTransferCancelled, self.run_it,
                          'sleep', '600')

    def test_stalled(self):
        """It neither reads nor writes, for whatever reason."""
        self.watch['stall_timeout'] = 0.05
        self.flags(host='here')
        e = self.assertRaises(exception.StorageTransferStalled, self.run_it,
                              'sleep', '600')
        self.assertIn('no progress', str(e))
        # The other host has no part in this.
        self.assertIn('Check that Ceph answers host here', str(e))
        self.assertNotIn('network', str(e))

    def test_progress(self):
        """As long as it does, it may take its time."""
        self.watch['stall_timeout'] = 0.05
        for done in (itertools.count(), itertools.repeat(None)):
            self.stub_out('nova.virt.libvirt.storage.move.convert._done',
                          lambda pid, done=done: next(done))
            self.watch['on_end'].reset_mock()
            self.watch['cancelled'].side_effect = [False] * 30 + [True]
            self.assertRaises(exception.StorageTransferCancelled,
                              self.run_it, 'sleep', '600')

    def test_progress_that_is_told(self):
        """As qemu-img -p tells it, of the bytes that there are."""
        self.watch['progress'] = mock.Mock()
        self.watch['stall_timeout'] = 0.5
        self.stub_out('nova.virt.libvirt.storage.move.convert._done',
                      lambda pid: 0)
        self.assertEqual(0, self.run_it(
            'sh', '-c', 'for p in 00.00 25.00 50.00 75.00; do '
            'printf "    ($p/100%%)\\r"; sleep .3; done'))
        self.assertEqual([mock.call(part) for part in (2, 5, 7)],
                         self.watch['progress'].mock_calls)

    def test_next_to_nothing_is_no_progress(self):
        """Whoever waits for a silent Ceph still wakes up now and then."""
        self.watch['stall_timeout'] = 0.5
        done = itertools.count()
        self.stub_out('nova.virt.libvirt.storage.move.convert._done',
                      lambda pid: next(done))
        self.watch['cancelled'].side_effect = [False] * 900 + [True]
        self.assertRaises(exception.StorageTransferStalled,
                          self.run_it, 'sleep', '600', least=1000)

    def test_what_it_has_done(self):
        before = convert._done(os.getpid())
        with open(__file__) as f:
            f.read()
        self.assertGreater(convert._done(os.getpid()), before)
        self.assertIsNone(convert._done(1 << 30))

    def test_no_such_program(self):
        e = self.assertRaises(exception.StorageTransferError, self.run_it,
                              '/nowhere/qemu-img')
        self.assertIn('/nowhere/qemu-img: not found', str(e))

    def test_service_has_ended_before(self):
        """The kernel was asked too late to end what it has started."""
        path = os.path.join(self.useFixture(fixtures.TempDir()).path, 'made')
        self.stub_out('os.getpid', lambda: 1)
        self.assertRaises(exception.StorageTransferError, convert.run,
                          ['touch', path], self.watch, NAMES)
        self.assertFalse(os.path.exists(path))

    def test_nothing_can_be_started(self):
        self.stub_out('nova.virt.libvirt.storage.move.convert._ENDED_WITH_US',
                      ('/nowhere/setpriv',))
        e = self.assertRaises(
            exception.StorageTransferError, convert.run,
            ['true'], self.watch, NAMES)
        self.assertIn('No such file', str(e))
        self.watch['on_start'].assert_not_called()

    def test_service_is_killed(self):
        """What it has started must not go on alone."""
        service = subprocess.Popen(
            [sys.executable, '-c', SERVICE], stdout=subprocess.PIPE)
        self.addCleanup(service.stdout.close)
        self.addCleanup(service.wait)
        self.addCleanup(service.kill)
        pid = int(service.stdout.readline())
        service.kill()
        self._wait_until(lambda: not _is_running(pid))

    def _wait_until(self, condition):
        until = time.monotonic() + 10
        while not condition():
            self.assertLess(time.monotonic(), until)
            time.sleep(.01)
