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

import ddt

from nova.tests.unit.virt.libvirt.storage.pump import base
from nova.tests.unit.virt.libvirt.storage.pump import ends

KEY = 0x0123456789abcdef
PRIME = (1 << 61) - 1
MIB = 1 << 20


def content_of(parts):
    return b''.join(bytes(p) if isinstance(p, int) else p for p in parts)


def values_of(content, size):
    """The values of a table, spelt out in Python's integers."""
    values = []
    for start in range(0, len(content), size):
        block = content[start:start + size].ljust(size, b'\0')
        value = 0
        for i in range(0, size, 4):
            value = (value * KEY + int.from_bytes(
                block[i:i + 4], 'little')) % PRIME
        values.append(value)
    return values


@ddt.ddt
class TableTestCase(base.PumpExtensionTestCase):
    @ddt.data(
        [b'A'], [b'A' * 31], [b'A' * 64], [b'A' * 65], [b'A' * 95], [1], [64],
        [1000], [64, b'A' * 64, 640], [b'AB' * 70, 200, b'C' * 3, 5, b'D'],
        [100, b'A' * 100, 100, b'B' * 100, 28], [bytes(64), b'A', bytes(64)],
        [b'\xff' * 1000])
    def test_values_and_the_checksum_of_all(self, parts):
        content = content_of(parts)
        for size in (32, 64, 128):
            for slot_size in (7, 64, 1000):
                table = self._pump.Table(len(content), KEY, block_size=size)
                copy = self.copy(ends.StubStream(parts), None, len(content),
                                 table=table, slot_size=slot_size)
                self.assertEqual(values_of(content, size), table.values)
                self.assertEqual(self._pump.checksum(parts, KEY),
                                 copy.checksum)
                self.assertTrue(table.filled)

    def test_filled_by_each_copy_anew(self):
        table = self._pump.Table(200, KEY, block_size=32)
        for parts in ([b'A' * 200], [64, b'B' * 136], [200], [b'C' * 200]):
            self.copy(ends.StubStream(parts), None, 200, table=table)
            self.assertEqual(values_of(content_of(parts), 32), table.values)

    def test_what_somebody_else_has_read(self):
        parts = [b'A' * 100, 64, b'B' * 36]
        there = self._pump.Table(200, KEY, block_size=32)
        self.copy(ends.StubStream(parts), None, 200, table=there)
        here = self._pump.Table(200, KEY, block_size=32)
        self.assertFalse(here.filled)
        here.load(there.dump())
        self.assertTrue(here.filled)
        self.assertEqual(values_of(content_of(parts), 32), here.values)
        for values in (b'', bytes(48), there.dump() + bytes(8)):
            self.assertRaises(ValueError, here.load, values)
        self.assertRaises(TypeError, here.load, None)

    def test_of_a_copy_that_failed(self):
        table = self._pump.Table(200, KEY, block_size=32)
        self.copy(ends.StubStream([200]), None, 200, table=table)
        self.fails(ends.StubStream([b'A' * 100]), None, 200, table=table)
        self.assertFalse(table.filled)

    @ddt.data((1, 65536), (256 << 30, 65536), ((256 << 30) + 1, 131072),
              (1 << 40, 262144), (16 << 40, 4 << 20))
    @ddt.unpack
    def test_size_of_blocks(self, length, size):
        # Its memory is the kernel's promise: zeroes are written nowhere.
        table = self._pump.Table(length, KEY)
        self.assertEqual(size, table.block_size)
        self.assertLessEqual(-(-length // size) * 8, 32 * MIB)

    def test_a_huge_hole_takes_no_memory(self):
        def resident():
            with open('/proc/self/statm') as f:
                return int(f.read().split()[1]) * 4096

        table = self._pump.Table(16 << 40, KEY)
        before = resident()
        copy = self.copy(ends.StubStream([b'A', (16 << 40) - 2, b'B']), None,
                         16 << 40, table=table)
        self.assertLess(resident() - before, 20 * MIB)
        self.assertEqual(
            self._pump.checksum([b'A', (16 << 40) - 2, b'B'], KEY),
            copy.checksum)

    @ddt.data((0, KEY, 64), (1, 0, 64), (1, PRIME, 64), (1, KEY, 63))
    @ddt.unpack
    def test_out_of_range(self, length, key, block_size):
        self.assertRaises(ValueError, self._pump.Table, length, key,
                          block_size=block_size)

    def test_for_fewer_bytes(self):
        table = self._pump.Table(65536, KEY)
        self.assertRaises(ValueError, self._pump.Copy,
                          ends.StubStream([b'A']), None, 65537, table=table)
