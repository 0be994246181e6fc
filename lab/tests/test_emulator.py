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
"""What the lab does about QEMU's loss of memory, and that it helps."""

import os
import subprocess
import unittest

from lab.cloud import cloud
from lab import emulator
from lab.guest import image
from lab import stores

RAM = '{"qom-type":"memory-backend-ram","id":"pc.ram","size":%d}'


class TestWrapper(unittest.TestCase):

    def arguments(self, *given):
        """What QEMU gets of libvirt's arguments."""
        text = emulator.WRAPPER.replace(
            emulator.REAL, 'printf "%s\\0"')
        return subprocess.run(
            ['bash', '-c', text, 'bash', *given], check=True, text=True,
            stdout=subprocess.PIPE).stdout.split('\0')[:-1]

    def test_both_sizes(self):
        """The guest's memory and the object that it lies in agree."""
        for given, expected in (
                ('128', '131080k'), ('size=131072k', 'size=131080k'),
                ('size=131072k,slots=16', 'size=131080k,slots=16')):
            self.assertEqual(
                ['-m', expected, '-object', RAM % (131080 << 10)],
                self.arguments('-m', given, '-object', RAM % (128 << 20)))

    def test_all_else_is_as_it_was(self):
        """What libvirt asks QEMU before there is a guest, too."""
        given = ['-name', 'guest=a b,debug-threads=on', '', '-machine',
                 'none', '-object',
                 '{"id":"other","size":134217728}', '-smp', '1']
        self.assertEqual(given, self.arguments(*given))


@unittest.skipUnless(os.environ.get('LAB_SCENARIOS') == 'all',
                     'LAB_SCENARIOS=all has it')
class TestStores(unittest.TestCase):

    def test_nothing_is_lost(self):
        processors = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(processors)})
        self.addCleanup(os.sched_setaffinity, 0, processors)
        image.ensure(cloud.GUEST)
        self.assertEqual((10, 0, 0), stores.run(
            cloud.GUEST / 'vmlinuz', 10, stores.MEMORY + emulator.MORE))


if __name__ == '__main__':
    unittest.main()
