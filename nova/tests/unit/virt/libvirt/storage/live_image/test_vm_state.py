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

import errno
import os
import subprocess
from unittest import mock

import ddt
import fixtures
from oslo_serialization import jsonutils

from nova import test
from nova.virt.libvirt.storage.live_image import vm_state

MIB = 1 << 20


@ddt.ddt
class VMStateTestCase(test.NoDBTestCase):
    """Held against the real qemu-img."""

    def setUp(self):
        super().setUp()
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.stream = os.path.join(self.folder, 'stream')
        self.base = os.path.join(self.folder, 'base')
        self.target = os.path.join(self.folder, 'disk')
        open(self.target, 'wb').close()

    def _img(self, *argv):
        return subprocess.run(
            ['qemu-img', *argv], check=True, capture_output=True,
            text=True).stdout

    def _write(self, length, capacity, offset=0, content=None):
        with open(self.stream, 'wb') as f:
            f.write(b'h' * offset)
            f.write(content or b'')
            f.truncate(offset + length)
        with open(self.base, 'wb') as f:
            f.write(b'base')
            f.truncate(capacity)
        return vm_state.write(
            self.target, vm_state.Stream(self.stream, offset, length),
            capacity, vm_state.Backing(self.base, 'raw'), 'live')

    def _check(self):
        # Ends with another code if anything is wrong, leaks included.
        return jsonutils.loads(self._img(
            'check', '--output=json', '-f', 'qcow2', self.target))

    @ddt.data(
        (0, MIB), (1, 512), (65535, MIB), (65536, MIB), (65537, MIB),
        (3 * MIB + 7, (512 << 20) + 512), (5 * MIB, 3 << 30),
        ((512 << 20) - 1, MIB), (512 << 20, MIB), ((512 << 20) + 1, MIB),
        # A second block of refcounts.
        ((2 << 30) - 7, MIB))
    @ddt.unpack
    def test_sizes(self, length, capacity):
        # Gigabytes of zeroes would tell no more.
        with mock.patch.object(vm_state, '_copy'):
            found = self._write(length, capacity, offset=92)
        self.assertEqual(self.target, found.path)
        # Whole clusters.
        self.assertEqual((0, 0), (found.offset % 65536, found.length % 65536))
        self.assertTrue(0 <= found.length - length < 65536)
        self.assertLess(found.offset + found.length,
                        os.path.getsize(self.target))
        self.assertEqual(0, self._check()['check-errors'])
        info = jsonutils.loads(self._img(
            'info', '--output=json', '-f', 'qcow2', self.target))
        self.assertEqual(capacity, info['virtual-size'])
        self.assertEqual(self.base, info['backing-filename'])
        self.assertEqual('raw', info['backing-filename-format'])
        self.assertEqual('1.1', info['format-specific']['data']['compat'])
        self.assertEqual([('1', 'live', length)], [
            (found['id'], found['name'], found['vm-state-size'])
            for found in info['snapshots']])

    def test_state_is_the_stream(self):
        """At the place where QEMU looks for it: behind the disk."""
        content = os.urandom(3 * MIB + 7)
        capacity = (512 << 20) + 512
        place = self._write(
            len(content), capacity, offset=1000, content=content)
        # By the guest's addresses of the snapshot's tables.
        self._img('snapshot', '-a', 'live', self.target)
        found = jsonutils.loads(self._img(
            'map', '--output=json', '-f', 'qcow2', self.target))
        self.assertEqual(capacity, found[-1]['start'] + found[-1]['length'])
        self._check()
        # The disk shows through, before and after the snapshot has gone.
        for _ in range(2):
            read = os.path.join(self.folder, 'read')
            self._img('convert', '-f', 'qcow2', '-O', 'raw', self.target,
                      read)
            with open(read, 'rb') as f:
                self.assertEqual(b'base\0\0', f.read(6))
            if _ == 0:
                self._img('snapshot', '-d', 'live', self.target)
                self._check()
        with open(self.target, 'rb') as f:
            f.seek(place.offset)
            self.assertEqual(content.ljust(place.length, b'\0'),
                             f.read(place.length))

    def test_what_was_there_is_gone(self):
        with open(self.target, 'wb') as f:
            f.write(b'x' * (5 * MIB))
        self._write(MIB, MIB)
        with open(self.target, 'rb') as f:
            self.assertNotIn(b'xx', f.read())

    @ddt.data(errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS)
    def test_file_systems_of_which_none_copies_to_the_other(self, code):
        content = os.urandom(MIB + 7)
        with mock.patch('os.copy_file_range',
                        side_effect=OSError(code, 'no')):
            self._write(len(content), MIB, 5, content)
        self._check()
        with open(self.target, 'rb') as f:
            self.assertIn(content, f.read())

    def test_full_disk_is_told(self):
        with mock.patch('os.copy_file_range',
                        side_effect=OSError(errno.ENOSPC, 'full')):
            self.assertRaises(OSError, self._write, MIB, MIB)

    def test_stream_that_ends_too_early(self):
        self._write(10, MIB)
        error = self.assertRaises(
            ValueError, vm_state.write, self.target,
            vm_state.Stream(self.stream, 0, 11), MIB,
            vm_state.Backing(self.base, 'raw'), 'live')
        self.assertIn('1 bytes too early', str(error))

    def test_symbolic_links_are_not_followed(self):
        os.unlink(self.target)
        os.symlink(self.base, self.target)
        self.assertRaises(OSError, self._write, 10, MIB)

    @ddt.data('0.10', '1.1')
    def test_read(self, compat):
        """What qemu-img has made, and what is made of it here."""
        self._img('create', '-f', 'raw', self.base, '3M')
        self._img('create', '-f', 'qcow2', '-o', 'compat=' + compat, '-b',
                  self.base, '-F', 'raw', self.target)
        expected = vm_state.Overlay(
            3 * MIB, vm_state.Backing(self.base, 'raw'))
        self.assertEqual(expected, vm_state.read(self.target))
        self._write(5, 3 * MIB)
        self.assertEqual(expected, vm_state.read(self.target))

    def test_read_without_a_backing_file(self):
        self._img('create', '-f', 'qcow2', self.target, '3M')
        self.assertEqual(vm_state.Overlay(3 * MIB, None),
                         vm_state.read(self.target))

    def test_read_without_the_format_of_the_backing_file(self):
        self._write(5, 3 * MIB)
        with open(self.target, 'r+b') as f:
            content = f.read(vm_state.CLUSTER)
            at = content.index(b'\xe2\x79\x2a\xca')
            f.seek(at)
            f.write(bytes(4))
        self.assertRaisesRegex(ValueError, 'has no format', vm_state.read,
                               self.target)

    @ddt.data(b'', b'QFI\xfb', b'raw' * 100, b'QFI\xfb\0\0\0\x09' * 30)
    def test_read_what_is_none(self, content):
        with open(self.target, 'wb') as f:
            f.write(content)
        self.assertRaisesRegex(ValueError, 'no overlay', vm_state.read,
                               self.target)

    def test_backing_name_that_qemu_does_not_read(self):
        self._write(10, MIB)
        self.assertRaises(
            ValueError, vm_state.write, self.target,
            vm_state.Stream(self.stream, 0, 10), MIB,
            vm_state.Backing('/' + 'b' * 1023, 'raw'), 'live')
