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
"""What a destination reads of a disk before all of it has come."""

import threading
from unittest import mock
import zlib

import ddt

from nova import exception
from nova import test
from nova.virt.libvirt.storage.intake import reading
from nova.virt.libvirt.storage.pump import transfer as pump

VOLUME = pump.Volume('uri', 'pool', 'name')
PLACE = ('uuid', 'pool', 'name')
ROOM, KEY = 1 << 20, 77
TABLE, LATER = b'1' * 128, b'2' * 128
CHANGED = [(0, 65536)]


@ddt.ddt
class ReadingsTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.readings = reading.Readings()
        self.pump = mock.Mock(
            read_table=mock.Mock(return_value=TABLE),
            read_again=mock.Mock(
                return_value=(None, pump.Known(ROOM, LATER))))
        for name in ('read_table', 'read_again', 'verify_known'):
            self.stub_out('nova.virt.libvirt.storage.pump.transfer.' + name,
                          getattr(self.pump, name))

    def reading(self, room=ROOM, key=KEY, packed=None):
        return reading.Reading(VOLUME, room, key, packed)

    def read(self, place=PLACE, changed=None, **kwargs):
        self.readings.begin(place, self.reading(**kwargs), changed)
        found = self.readings.get(place)
        self.assertTrue(found._ended.wait(30))
        return found

    def verify(self, length=1000, key=KEY):
        return self.readings.verify(PLACE, length, 5, key)

    def test_way_of_a_disk(self):
        self.assertEqual(pump.Known(ROOM, TABLE), self.read().known())
        self.pump.read_table.assert_called_once_with(
            VOLUME, ROOM, key=KEY, stall_timeout=60, cancelled=mock.ANY,
            progress=mock.ANY)
        self.readings.close(PLACE, 1000, CHANGED)
        self.assertTrue(self.verify())
        self.pump.verify_known.assert_called_once_with(
            VOLUME, 1000, 5, pump.Known(ROOM, TABLE), CHANGED, key=KEY,
            stall_timeout=60)
        # once
        self.assertFalse(self.verify())

    @ddt.data('nothing', 'still read', 'not closed', 'opened again',
              'another length', 'another key', 'failed', 'forgotten',
              'not what was sent')
    def test_all_has_to_be_read(self, why):
        if why == 'failed':
            self.pump.read_table.side_effect = exception.NovaException('bad')
        if why != 'nothing':
            found = self.read()
        if why != 'not closed':
            self.readings.close(PLACE, 1000, CHANGED)
        if why == 'still read':
            self.stub_out('nova.virt.libvirt.storage.intake.reading._PATIENCE',
                          .01)
            found._ended.clear()
        elif why == 'opened again':
            self.readings.reopen(PLACE)
        elif why == 'forgotten':
            self.readings.forget(PLACE)
        elif why == 'not what was sent':
            self.pump.verify_known.side_effect = (
                exception.StorageTransferMismatch(
                    volume='v', where='w', reason='its checksum'))
        self.assertFalse(self.verify(
            1001 if why == 'another length' else 1000,
            78 if why == 'another key' else KEY))
        self.assertEqual(why == 'not what was sent',
                         self.pump.verify_known.called)
        self.assertIsNone(self.readings.get(PLACE))

    def test_last_of_it_is_waited_for(self):
        goes_on = threading.Event()
        self.addCleanup(goes_on.set)
        self.pump.read_table.side_effect = lambda *args, **kwargs: (
            goes_on.wait(60) and TABLE)
        self.readings.begin(PLACE, self.reading(), None)
        self.readings.close(PLACE, 1000, CHANGED)
        wait = reading.Reading.wait

        def waiting(found, seconds):
            goes_on.set()
            wait(found, 60)

        with mock.patch.object(reading.Reading, 'wait', new=waiting):
            self.assertTrue(self.verify())

    def test_error_of_the_disk(self):
        self.read()
        self.readings.close(PLACE, 1000, CHANGED)
        self.pump.verify_known.side_effect = exception.StorageTransferError(
            volume='v', where='w', length=1, transferred=0, side='source',
            operation='finish', reason='not on disk')
        self.assertRaises(exception.StorageTransferError, self.verify)

    def test_no_thread(self):
        # As at the end of the service. It is not being read then.
        with mock.patch('nova.thread_pool_factory.spawn_on',
                        side_effect=RuntimeError('shut down')):
            self.assertRaises(RuntimeError, self.read)
        self.assertEqual(TABLE, self.read().known().table)

    def test_what_was_taken_up(self):
        self.readings.put(PLACE, self.reading(packed=zlib.compress(TABLE)))
        self.assertEqual(pump.Known(ROOM, LATER),
                         self.read(changed=CHANGED).known())
        self.pump.read_table.assert_not_called()
        self.pump.read_again.assert_called_once_with(
            VOLUME, ROOM, pump.Known(ROOM, TABLE), CHANGED, key=KEY,
            stall_timeout=60, cancelled=mock.ANY, progress=mock.ANY)

    @ddt.data({'room': ROOM + 1}, {'key': 78}, {'changed': None})
    def test_what_was_taken_up_and_is_read_anew(self, values):
        self.readings.put(PLACE, self.reading(packed=zlib.compress(TABLE)))
        found = self.read(**{'changed': CHANGED, **values})
        self.assertEqual(TABLE, found.known().table)

    def test_while_it_is_read(self):
        goes_on, asked = threading.Event(), []

        def read(*args, progress, cancelled, **kwargs):
            progress(500)
            asked.append(cancelled)
            goes_on.wait(30)
            return TABLE

        self.pump.read_table.side_effect = read
        self.addCleanup(goes_on.set)
        self.readings.begin(PLACE, self.reading(), None)
        found = self.readings.get(PLACE)
        while not asked:
            found._ended.wait(.01)
        self.assertEqual((500, False), (found.done, found.is_over))
        self.assertIsNone(found.known())
        self.assertRaises(ValueError, self.readings.begin, PLACE,
                          self.reading(), None)
        self.assertFalse(asked[0]())
        self.readings.forget(PLACE)
        self.assertTrue(asked[0]())
        # What is read anew is another one.
        self.readings.begin(PLACE, self.reading(), None)

    def test_failure(self):
        error = exception.NovaException('the disk is bad')
        self.pump.read_table.side_effect = error
        found = self.read()
        self.assertEqual((error, None), (found.error, found.known()))
        self.assertIn('the disk is bad', self.stdlog.logger.output)

    def test_oldest_goes(self):
        first = self.read()
        for number in range(16):
            self.read(place=number)
        self.assertIsNone(self.readings.get(PLACE))
        self.assertTrue(first._is_given_up)
        self.assertIsNotNone(self.readings.get(0))
