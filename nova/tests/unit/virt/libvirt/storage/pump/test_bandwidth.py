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

from nova import test
from nova.virt.libvirt.storage.pump import bandwidth


class BandwidthTestCase(test.NoDBTestCase):
    def setUp(self):
        super().setUp()
        self.told = []

    def teller(self, name):
        return lambda part: self.told.append((name, part))

    def run_three(self, total):
        shared = bandwidth.Bandwidth(total)
        with shared.shared(self.teller('a')):
            with shared.shared(self.teller('b')):
                with shared.shared(self.teller('c')):
                    pass
        return self.told

    def test_who_is_there_has_less_before_another_begins(self):
        self.assertEqual(
            [('a', 100),
             ('a', 50), ('b', 50),
             ('a', 33), ('b', 33), ('c', 33),
             ('a', 50), ('b', 50),
             ('a', 100)], self.run_three(100))

    def test_never_more_than_all(self):
        parts = {}
        for name, part in self.run_three(100):
            parts[name] = part
            if len(self.told) < 7:
                self.assertLessEqual(sum(parts.values()), 100)

    def test_no_limit(self):
        self.assertEqual([('a', 0), ('b', 0), ('c', 0)], self.run_three(0))

    def test_a_part_of_nothing_is_a_limit(self):
        self.assertEqual([('a', 2), ('a', 1), ('b', 1)],
                         self.run_three(2)[:3])
        self.assertNotIn(0, [part for _name, part in self.told])

    def test_one_that_fails_gives_its_part_back(self):
        shared = bandwidth.Bandwidth(10)
        with shared.shared(self.teller('a')):
            self.assertRaises(ZeroDivisionError, self.fails_within, shared)
        self.assertEqual([('a', 10), ('a', 5), ('b', 5), ('a', 10)],
                         self.told)

    def fails_within(self, shared):
        with shared.shared(self.teller('b')):
            raise ZeroDivisionError

    def test_negative(self):
        self.assertRaises(ValueError, bandwidth.Bandwidth, -1)
