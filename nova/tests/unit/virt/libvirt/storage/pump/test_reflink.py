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
"""What has changed in a file whose blocks another one shares."""

import ctypes
import os
import random
from unittest import mock

import ddt
import fixtures

from nova import test
from nova.virt.libvirt.storage.pump import reflink

MIB = 1 << 20
# FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
PUNCH = 3
#: Where files can be cloned: a mount of XFS or Btrfs, which a test run may
#: name; by default where temporary files are.
FOLDER = os.environ.get('NOVA_TEST_REFLINK')


def folder_of(case):
    """A directory in which files can be cloned; skips the test otherwise."""
    path = case.useFixture(fixtures.TempDir(rootdir=FOLDER)).path
    with open(os.path.join(path, 'probe'), 'w+b') as file:
        file.write(b'probe')
        file.flush()
        found = reflink.clone(file.fileno(), [path])
    if found is None:
        if FOLDER:
            raise AssertionError('files in %s can not be cloned' % FOLDER)
        case.skipTest('%s is on no file system that clones files' % path)
    found.close()
    return path


@ddt.ddt
class DifferencesTestCase(test.NoDBTestCase):
    """By where two files lie: (offset, place, length, flags)."""

    @ddt.data(
        ([], [], []),
        ([(0, 50, 100, 0)], [(0, 50, 100, 1)], []),
        # the same blocks in another number of pieces
        ([(0, 50, 100, 0)], [(0, 50, 40, 0), (40, 90, 60, 1)], []),
        ([(0, 50, 100, 0)], [(0, 50, 40, 0), (40, 91, 60, 1)], [(40, 60)]),
        ([(0, 50, 100, 0)], [(0, 50, 40, 0), (40, 200, 10, 0),
                             (50, 100, 50, 0)], [(40, 10)]),
        ([(0, 50, 100, 0)], [(20, 70, 80, 0)], [(0, 20)]),
        ([(20, 70, 80, 0)], [(0, 50, 100, 0)], [(0, 20)]),
        ([(0, 50, 10, 0), (90, 140, 10, 0)], [], [(0, 10), (90, 10)]),
        ([], [(0, 50, 10, 0), (10, 70, 10, 0)], [(0, 20)]),
        # beyond the end
        ([(0, 50, 100, 0)], [(0, 50, 100, 0), (100, 200, 10, 0)], []),
        ([(80, 50, 100, 0)], [(80, 51, 100, 0)], [(80, 20)]),
        # A place that says nothing of the content, in either of them.
        ([(0, 50, 100, 0x4)], [(0, 50, 100, 0)], [(0, 100)]),
        ([(0, 50, 100, 0)], [(0, 50, 100, 0x8)], [(0, 100)]),
        ([], [(0, 50, 100, 0x2)], [(0, 100)]),
        # What is reserved reads as zeroes, and is written to in its place.
        ([], [(0, 50, 100, 0x800)], []),
        ([(0, 50, 100, 0x800)], [(0, 50, 100, 0)], [(0, 100)]),
        ([(0, 50, 100, 0)], [(0, 50, 100, 0x800)], [(0, 100)]),
        ([(0, 50, 100, 0x200)], [(0, 50, 100, 0x200)], [(0, 100)]),
        # shared, last, merged: as good as any
        ([(0, 50, 100, 0x2001)], [(0, 50, 100, 0x1000)], []))
    @ddt.unpack
    def test_differences(self, before, after, expected):
        self.assertEqual(expected,
                         reflink.differences(before, after, 100))

    @ddt.data(0x2, 0x4, 0x8, 0x80, 0x100, 0x200, 0x400)
    def test_flags_that_say_nothing(self, flag):
        self.assertTrue(flag & reflink.EXTENT_SAYS_NOTHING)

    def test_by_each_byte(self):
        chance = random.Random(3)

        def places(length):
            found, at = [], 0
            while at < length:
                at += chance.choice((0, 0, 5))
                size = chance.randrange(1, 30)
                found.append((at, chance.choice((0, 100)) + at, size,
                              chance.choice((0, 0, 0x4, 0x800))))
                at += size
            return found

        def spelt(found, length):
            says = [None] * (length + 100)
            for offset, place, size, flags in found:
                for n in range(size):
                    if flags != 0x800:
                        says[offset + n] = object() if flags else place + n
            return says[:length]

        for _n in range(300):
            length = chance.randrange(1, 200)
            one, other = places(length), places(length)
            expected = [n for n, (a, b) in enumerate(zip(
                spelt(one, length), spelt(other, length))) if a != b]
            self.assertEqual(expected, [
                start + n for start, size in reflink.differences(
                    one, other, length) for n in range(size)])


@ddt.ddt
class CloneTestCase(test.NoDBTestCase):

    def test_file_system_that_can_not(self):
        with open('/dev/null', 'rb') as file:
            self.assertIsNone(reflink.clone(file.fileno(), [
                '/proc', '/nowhere', '/dev/null']))

    def test_nothing_stays_open_of_what_can_not_be(self):
        folder = self.useFixture(fixtures.TempDir()).path
        before = os.listdir('/proc/self/fd')
        with open(os.path.join(folder, 'file'), 'wb') as file, \
                mock.patch('fcntl.ioctl', side_effect=OSError):
            self.assertIsNone(reflink.clone(file.fileno(), [folder]))
        self.assertEqual(len(before), len(os.listdir('/proc/self/fd')))
        self.assertEqual(['file'], os.listdir(folder))

    def test_too_little_room(self):
        folder = self.useFixture(fixtures.TempDir()).path
        with open(os.path.join(folder, 'file'), 'wb') as file, \
                mock.patch.object(reflink, '_free', return_value=1000), \
                mock.patch('fcntl.ioctl') as ioctl:
            self.assertIsNone(reflink.clone(file.fileno(), [folder]))
        ioctl.assert_not_called()

    def test_given_up_where_others_need_the_room(self):
        fd = os.open('/dev/null', os.O_RDONLY)
        clone = reflink.Clone(fd)
        with mock.patch.object(reflink, '_free', return_value=2 << 30):
            clone.check_room()
            os.fstat(fd)
        with mock.patch.object(reflink, '_free', return_value=1):
            clone.check_room()
            clone.check_room()
        self.assertRaises(OSError, os.fstat, fd)
        self.assertIsNone(clone.changed(0, 1))

    def test_of_another_file_system(self):
        with open('/proc/version') as file:
            clone = reflink.Clone(os.open('/dev/null', os.O_RDONLY))
            self.addCleanup(clone.close)
            self.assertIsNone(clone.changed(file.fileno(), 1))

    def test_file_system_that_does_not_tell_places(self):
        clone = reflink.Clone(os.open('/proc/version', os.O_RDONLY))
        self.addCleanup(clone.close)
        with open('/proc/uptime') as file:
            self.assertIsNone(clone.changed(file.fileno(), 1))

    def test_too_many_pieces(self):
        def ioctl(fd, number, data):
            count = 4096
            reflink._HEADER.pack_into(data, 0, 0, 0, 0, count, count, 0)

        with mock.patch('fcntl.ioctl', new=ioctl):
            self.assertRaises(OSError, reflink.extents, 0)

    def test_what_is_written(self):
        folder = folder_of(self)
        path = os.path.join(folder, 'disk')
        with open(path, 'w+b') as file:
            file.write(os.urandom(8 * MIB))
            file.truncate(16 * MIB)
            file.flush()
            fd = file.fileno()
            clone = reflink.clone(fd, ['/nowhere', folder])
            self.addCleanup(clone.close)
            self.assertEqual(['disk', 'probe'], sorted(os.listdir(folder)))
            self.assertEqual([], clone.changed(fd, 16 * MIB))
            os.pwrite(fd, b'x', 3 * MIB)
            os.pwrite(fd, b'x', 12 * MIB)
            ctypes.CDLL(None).fallocate(
                fd, PUNCH, ctypes.c_long(MIB), ctypes.c_long(65536))
            # What is reserved is written to in its place.
            ctypes.CDLL(None).fallocate(
                fd, 0, ctypes.c_long(14 * MIB), ctypes.c_long(65536))
            os.pwrite(fd, b'x', 14 * MIB + 9)
            found = clone.changed(fd, 16 * MIB)
            for at in (3 * MIB, 12 * MIB, MIB, 14 * MIB):
                self.assertTrue(any(
                    start <= at < start + length for start, length in found))
            self.assertLess(sum(length for _start, length in found), MIB)
