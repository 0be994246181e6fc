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

from nova import test
from nova.virt.libvirt.storage.move import dirty


class ChangedRangesTestCase(test.NoDBTestCase):

    def test_bitmap_of_another_size(self):
        part = {'start': 0, 'length': 2, 'data': True, 'depth': 0}
        self.assertRaises(ValueError, dirty.changed_ranges, [part],
                          [dict(part, length=3)], 1, 9, 9)

    def test_no_more_than_dirty_clusters(self):
        # guest: 4 clusters of 10 bytes, in the file from behind
        mapping = [{'start': 10 * n, 'length': 10, 'data': True, 'depth': 0,
                    'offset': 100 - 10 * n} for n in range(4)] + [
                        {'start': 40, 'length': 10, **other} for other in (
                            {'data': False, 'depth': 0, 'offset': 40},
                            {'data': True, 'depth': 1, 'offset': 40},
                            {'data': True, 'depth': 0},
                            {'data': True, 'depth': 0, 'offset': 40,
                             'compressed': True})]
        noted = [{'start': 0, 'length': 11, 'data': True},
                 {'start': 11, 'length': 1, 'data': False},
                 {'start': 12, 'length': 13, 'data': True},
                 {'start': 25, 'length': 15, 'data': False},
                 {'start': 40, 'length': 40, 'data': True}]
        self.assertEqual(
            [(0, 100), (110, 5)],
            dirty.changed_ranges(mapping, noted, 10, 200, 115))
        self.assertEqual(
            [(0, 100), (105, 10)],
            dirty.changed_ranges(mapping, noted, 10, 105, 115))
