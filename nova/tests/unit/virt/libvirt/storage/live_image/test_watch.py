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

import os
import threading
import time
from unittest import mock

import fixtures
from oslo_utils import units

from nova.compute import power_state
from nova import test
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import watch


SIZE = units.Mi


class WatchTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(self.folder, 'memory')
        self.free = units.Gi
        self.stub_out('nova.virt.libvirt.utils.get_fs_info',
                      lambda folder: {'free': self.free})
        self.useFixture(fixtures.MockPatchObject(watch, 'POLL', 0.001))
        self.guest = mock.Mock()
        self.guest.abort_job.__name__ = 'abort_job'
        self.guest.pause.__name__ = 'pause'
        self._is(power_state.RUNNING)

    def _is(self, state):
        self.polled = threading.Event()

        def get_power_state(_host):
            self.polled.set()
            return state
        self.guest.get_power_state.side_effect = get_power_state

    def _wait_for_polls(self):
        for _poll in range(3):
            self.polled.clear()
            self.assertTrue(self.polled.wait(20))

    def _watch(self, limit=100):
        return watch.Watch(self.guest, mock.sentinel.host, limit, None,
                           self.path, SIZE)

    def test_pause(self):
        with self._watch() as watched:
            self._wait_for_polls()
            self._is(power_state.PAUSED)
            # It isn't asked any more then.
            self.assertTrue(self.polled.wait(20))
            time.sleep(0.1)
        self.assertGreater(watched.pause(), 0.1)
        self.guest.pause.assert_not_called()

    def test_no_pause(self):
        with self._watch() as watched:
            self._wait_for_polls()
        self.assertEqual(0, watched.pause())

    def test_guest_that_can_not_be_asked(self):
        with self._watch() as watched:
            self.guest.get_power_state.side_effect = OSError('gone')
            time.sleep(0.05)
            self._is(power_state.PAUSED)
            self.assertTrue(self.polled.wait(20))
            time.sleep(0.01)
        self.assertGreater(watched.pause(), 0)

    def _write(self, length):
        with open(self.path, 'wb') as f:
            f.truncate(length)

    def _called(self):
        return [name for name, _args, _kwargs in self.guest.mock_calls
                if name != 'get_power_state']

    def test_guest_that_changes_its_memory(self):
        with self._watch():
            self._write(2 * SIZE)
            self._wait_for_polls()
            self.guest.pause.assert_not_called()
            self._write(2 * SIZE + 1)
            self._wait_for_polls()
        self.assertEqual(['pause'], self._called())

    def test_no_room(self):
        """For other guests, whose disks may be there."""
        self._write(1)
        self.free = memory_file.RESERVE
        with self._watch():
            self._wait_for_polls()
            self.guest.abort_job.assert_not_called()
            self.free -= 1
            self._wait_for_polls()
            self._write(2 * SIZE + 1)
            self._wait_for_polls()
        self.assertEqual(['abort_job'], self._called())

    def test_action_that_fails(self):
        """libvirt may be held up by another call for a moment."""
        self.guest.pause.side_effect = [OSError('lock')] * 3 + [None]
        self.guest.abort_job.side_effect = [OSError('busy'), None]
        with self._watch():
            self._write(2 * SIZE + 1)
            for _polls in range(3):
                self._wait_for_polls()
            self.assertEqual(['pause'] * 4, self._called())
            self.free = 0
            for _polls in range(3):
                self._wait_for_polls()
        self.assertEqual(['pause'] * 4 + ['abort_job'] * 2, self._called())
        for text in ('twice its size: pause', 'pause has failed and is tried '
                     'again: lock', 'abort_job has failed and is tried again: '
                     'busy'):
            self.assertEqual(1, self.stdlog.logger.output.count(text), text)

    def test_limits(self):
        with self._watch(limit=0.1):
            while not self.guest.abort_job.called:
                time.sleep(0.01)
        self.assertEqual(
            ['pause', 'abort_job'],
            [name for name, _args, _kwargs in self.guest.mock_calls
             if name != 'get_power_state'])
