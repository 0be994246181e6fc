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
"""Warm copies from a file system on which files can be cloned."""

import ctypes
import os
import random

from nova.tests.unit.virt.libvirt.storage.pump import test_nbd
from nova.tests.unit.virt.libvirt.storage.pump import test_reflink
from nova.virt.libvirt.storage.pump import transfer as pump

MIB = 1 << 20
# FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
PUNCH = 3


class WarmCopyTestCase(test_nbd.WorkerTestCase):
    """Both passes, of which the second one reads what has changed."""

    def setUp(self):
        super().setUp()
        self.destination = self.folder
        self.folder = test_reflink.folder_of(self)

    def serve(self, length, content=b''):
        self.folder, folder = self.destination, self.folder
        try:
            return super().serve(length, content)
        finally:
            self.folder = folder

    def test_only_what_has_changed_is_read(self):
        source = self.source(os.urandom(16 * MIB), 32 * MIB)
        with pump.WarmCopy(source, self.serve(32 * MIB), 32 * MIB,
                           clones=[self.folder]) as copy:
            copy.first()
            with open(source.name, 'r+b') as file:
                for at in (MIB, 5 * MIB + 7, 20 * MIB):
                    file.seek(at)
                    file.write(b'new')
            result = copy.rest(32 * MIB)
        self.assertEqual(3 * 65536, result.data)
        self.assertGreater(result.spared, 31 * MIB)
        with open(source.name, 'rb') as file:
            content = file.read()
        self.assertEqual(content, self.copied(len(content)))
        self.assertEqual(result.checksum, pump.read(
            source, len(content), key=result.key).checksum)

    def test_a_guest_at_random(self):
        chance = random.Random(9)
        source = self.source(os.urandom(8 * MIB), 16 * MIB)

        def write(_done=0):
            with open(source.name, 'r+b') as file:
                for _n in range(5):
                    length = chance.choice((512, 4096, 70000))
                    file.seek(chance.randrange(16 * MIB - length))
                    if chance.random() < .3:
                        file.flush()
                        ctypes.CDLL(None).fallocate(
                            file.fileno(), PUNCH, ctypes.c_long(file.tell()),
                            ctypes.c_long(length))
                    else:
                        file.write(chance.choice((
                            bytes(length), chance.randbytes(length))))

        export = self.serve(24 * MIB)
        with pump.WarmCopy(source, export, 16 * MIB,
                           clones=[self.folder]) as copy:
            copy.first(pump.Watch(progress=write), bandwidth=16 * MIB)
            write()
            with open(source.name, 'ab') as file:
                file.write(b'and more')
            length = os.path.getsize(source.name)
            result = copy.rest(length)
        self.assertGreater(result.spared, 0)
        with open(source.name, 'rb') as file:
            content = file.read()
        self.assertEqual(content, self.copied(len(content)))
        pump.verify(source, length, result.checksum, key=result.key)
