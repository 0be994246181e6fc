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


@ddt.ddt
class ChecksumTestCase(base.PumpExtensionTestCase):
    KEY = 0x0123456789abcdef

    def reference(self, content):
        """The polynomial, spelt out in Python's integers."""
        prime = (1 << 61) - 1
        value = 0
        padded = content + bytes(-len(content) % 32)
        for i in range(0, len(padded), 4):
            word = int.from_bytes(padded[i:i + 4], 'little')
            value = (value * self.KEY + word) % prime
        # the length, then once more by the key
        return value, len(content)

    @ddt.data(b'', b'A', b'A' * 31, b'A' * 32, b'A' * 33, bytes(range(256)))
    def test_is_the_polynomial(self, content):
        prime = (1 << 61) - 1
        value, length = self.reference(content)
        self.assertEqual((value + length) * self.KEY % prime,
                         self._pump.checksum([content], self.KEY))

    def test_doesnt_see_how_zeroes_came(self):
        data = b'A' * 37
        forms = ([data + bytes(1000) + data], [data, 1000, data],
                 [data, 999, b'\0', data], [data, bytes(3), 997, data],
                 [data, 1, 1, 998, data])
        self.assertEqual(1, len({self._pump.checksum(form, self.KEY)
                                 for form in forms}))

    @ddt.data([b'A', 1], [1, b'A'], [b'A', b'A'], [b'B'], [1], [2],
              [b'A' * 32], [b'A' * 32, 32], [32, b'A' * 32])
    def test_sees_a_difference(self, parts):
        self.assertNotEqual(self._pump.checksum([b'A'], self.KEY),
                            self._pump.checksum(parts, self.KEY))

    def test_sees_a_bit(self):
        content = bytearray(b'x' * 1000)
        sums = {self._pump.checksum([bytes(content)], self.KEY)}
        for i in range(8000):
            content[i // 8] ^= 1 << i % 8
            sums.add(self._pump.checksum([bytes(content)], self.KEY))
            content[i // 8] ^= 1 << i % 8
        self.assertEqual(8001, len(sums))

    def test_another_key_gives_another_checksum(self):
        self.assertNotEqual(self._pump.checksum([b'A'], self.KEY),
                            self._pump.checksum([b'A'], self.KEY + 1))
