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

"""What was read of a volume before, and what has changed since."""

import os
from unittest import mock

import ddt
from oslo_serialization import jsonutils

from nova import exception
from nova.tests.unit.virt.libvirt.storage.pump import test_nbd
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.pump import worker

MIB = 1 << 20
KEY = 77


@ddt.ddt
class KnownTestCase(test_nbd.WorkerTestCase):
    def setUp(self):
        super().setUp()
        self.content = bytearray(os.urandom(2 * MIB) + bytes(2 * MIB))
        self.volume = self.source(bytes(self.content))
        self.known = pump.Known(4 * MIB, pump.read_table(
            self.volume, 4 * MIB, key=KEY))

    def write(self, at, data):
        self.content[at:at + len(data)] = data
        self.source(bytes(self.content))

    def read(self, changed, length=4 * MIB):
        result, known = pump.read_again(
            self.volume, length, self.known, changed, key=KEY)
        self.assertEqual(length, result.length)
        return result, known

    def checksum(self, length=4 * MIB):
        return pump.read(self.volume, length, key=KEY).checksum

    @ddt.data([], [(0, 1)], [(65530, 10), (3 * MIB, 100)], [(0, 4 * MIB)])
    def test_nothing_has_changed(self, changed):
        result, known = self.read(changed)
        self.assertEqual((0, [], self.checksum(), self.known), (
            result.data, list(result.changed), result.checksum, known))

    def test_what_has_changed_is_read(self):
        self.write(65530, b'0123456789')
        self.write(3 * MIB, b'new')
        result, known = self.read([(65530, 10), (3 * MIB, 3)])
        self.assertEqual(self.checksum(), result.checksum)
        self.assertEqual([[0, 131072], [3 * MIB, 65536]], result.changed)
        self.known = known
        self.assertEqual(self.checksum(), self.read([])[0].checksum)

    def test_nothing_else_is(self):
        before = self.checksum()
        self.write(65536, b'unseen')
        self.assertEqual(before, self.read([(0, 65536)])[0].checksum)

    def test_less_is_there_than_was(self):
        # An image was made longer than it came to be.
        del self.content[2 * MIB + 700:]
        self.write(2 * MIB + 500, b'the end')
        result, _known = self.read([(2 * MIB + 500, 7)], 2 * MIB + 700)
        self.assertEqual(self.checksum(2 * MIB + 700), result.checksum)

    def test_verified(self):
        self.write(100, b'new')
        pump.verify_known(self.volume, 4 * MIB, self.checksum(), self.known,
                          [(100, 3)], key=KEY)

    def _verify_in_vain(self, checksum):
        e = self.assertRaises(
            exception.StorageTransferMismatch, pump.verify_known, self.volume,
            4 * MIB, checksum, self.known, [], key=KEY)
        self.assertIn(self.volume.name, str(e))

    def test_not_what_was_sent(self):
        self._verify_in_vain(self.checksum() ^ 1)

    def test_changed_where_nobody_said_so(self):
        self.write(100, b'new')
        self._verify_in_vain(self.checksum())

    @ddt.data(('short', 0), ('libvirt', 50))
    @ddt.unpack
    def test_volume_is_not_what_it_was(self, kind, code):
        error = exception.StorageTransferError(
            volume='v', where='w', side='source', operation='receive',
            reason='r', length=1, transferred=0)
        error.kind, error.code = kind, code
        with mock.patch.object(pump, 'read_again', autospec=True,
                               side_effect=error):
            self._verify_in_vain(1)

    def test_while_a_guest_uses_it(self):
        # What it has appended is not read.
        table = pump.read_table(self.volume, 4 * MIB, key=KEY, room=8 * MIB)
        self.assertEqual(self.known.table + bytes(512), table)
        self.content += b'more'
        self.source(bytes(self.content))
        self.assertRaises(
            exception.StorageTransferError, pump.read_table, self.volume,
            4 * MIB, key=KEY, room=8 * MIB)
        self.assertEqual(table, pump.read_table(
            self.volume, 4 * MIB, key=KEY, room=8 * MIB, in_use=True))

    def test_nothing_is_synced_that_a_guest_uses(self):
        with mock.patch.object(pump.process, 'WorkerProcess') as process:
            process.return_value.run.return_value = {
                'data': 0, 'holes': 5, 'checksum': 1, 'physical': 5,
                'allocation': 0}
            pump.read_table(self.volume, 5, key=KEY, in_use=True)
        self.assertTrue(process.call_args.kwargs['in_use'])

    @ddt.data((4 * MIB, [], []), (4 * MIB, [0], [(0, 65536)]),
              (4 * MIB, [5, 6, 63], [(5 << 16, 2 << 16), (63 << 16, 65536)]),
              # over the pieces that are compared, and with larger blocks
              (200 * MIB, [1023, 1024], [(1023 << 16, 2 << 16)]),
              (300 << 30, [1, (300 << 30 >> 17) - 1], [
                  (1 << 17, 1 << 17), ((300 << 30) - (1 << 17), 1 << 17)]))
    @ddt.unpack
    def test_what_differs(self, length, blocks, differs):
        size = 65536 if length < 256 << 30 else 131072
        table = bytearray(os.urandom(8) * (length // size))
        known = pump.Known(length, bytes(table))
        for block in blocks:
            table[block * 8 + 3] ^= 1
        self.assertEqual(differs, known.differs_from(bytes(table)))

    @ddt.data(b'', b'12345678')
    def test_what_differs_from_no_table(self, table):
        self.assertRaises(ValueError, self.known.differs_from, table)

    def test_request_waits_for_nobody(self):
        # Nova's thread would, in a write to a pipe that is full.
        self.assertLess(len(jsonutils.dumps(
            [((1 << 62) - 1, (1 << 62) - 1)] * worker.MOST_CHANGED)), 60000)

    def test_ranges_that_are_joined(self):
        ranges = [(n << 20, 65536) for n in range(100)]
        self.assertEqual(ranges, worker.joined(ranges, 100))
        for most in (99, 50, 1):
            found = worker.joined(ranges, most)
            self.assertLessEqual(len(found), most)
            for start, length in ranges:
                self.assertTrue(any(
                    first <= start and start + length <= first + n
                    for first, n in found))
        self.assertEqual([(0, 65536 * 3), (1 << 20, 1)], worker.joined(
            [(0, 65536), (131072, 65536), (1 << 20, 1)], 2))
