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

import os
import struct
from unittest import mock

import ddt
import fixtures

import nova.conf
from nova import exception
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.virt.libvirt.storage import content

CONF = nova.conf.CONF

# Bits of the incompatible features of qcow2.
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << n
                                                       for n in range(5))


def header(version=3, backing_offset=0, crypt=0, snapshots=0, features=0):
    """The first cluster of a qcow2 file."""
    fixed = struct.pack(
        '>4sIQIIQIIQQIIQ', b'QFI\xfb', version, backing_offset, 0, 16, 1 << 30,
        crypt, 2, 0x30000, 0x10000, 1, snapshots, 0)
    if version == 2:
        # An extension: the format of the backing file is qcow2.
        return (fixed + struct.pack('>II', 0xe2792aca, 5) +
                b'qcow2\0\0\0').ljust(65536, b'\0')
    return (fixed + struct.pack('>QQQII', features, 0, 0, 4, 104)).ljust(
        65536, b'\0')


@ddt.ddt
class QCow2TestCase(test.NoDBTestCase):
    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'disk')
        self.info = mock.Mock(
            snapshots=[], encrypted=None, virtual_size=1 << 30,
            format_specific={'type': 'qcow2', 'data': {'compat': '1.1'}})
        self.qemu_img = self.useFixture(fixtures.MockPatch(
            'nova.virt.images.privileged_qemu_img_info',
            return_value=self.info)).mock

    def look(self, data, size=0):
        with open(self.path, 'wb') as f:
            f.write(data)
        return content.look_at_qcow2(self.path, size)

    @ddt.data({}, {'version': 2}, {'backing_offset': 512},
              {'features': DIRTY}, {'features': COMPRESSION})
    def test_accepted(self, fields):
        self.assertIs(self.info, self.look(header(**fields)))
        self.qemu_img.assert_called_once_with(self.path, format='qcow2')

    @ddt.data(
        ({'features': DATA_FILE}, 'data_file'),
        ({'features': EXTENDED_L2}, 'Unknown'),
        ({'features': 1 << 62}, 'Unknown'),
        ({'version': 4}, 'version'),
        ({'crypt': 1}, 'encrypted'),
        ({'crypt': 2}, 'encrypted'),
        ({'snapshots': 1}, 'internal snapshots'),
        ({'version': 2, 'snapshots': 1}, 'internal snapshots'),
        ({'version': 2, 'crypt': 1}, 'encrypted'))
    @ddt.unpack
    def test_refused_before_qemu_img_sees_it(self, fields, reason):
        e = self.assertRaises(exception.UnsafeDiskContent, self.look,
                              header(**fields))
        self.assertIn(reason, str(e))
        self.assertIn(self.path, str(e))
        # It would open what the header names.
        self.qemu_img.assert_not_called()

    @ddt.data(b'', b'QFI\xfb', b'\0' * 65536, b'x' * 65536)
    def test_no_qcow2(self, data):
        self.assertRaises(exception.UnsafeDiskContent, self.look, data)
        self.qemu_img.assert_not_called()

    @ddt.data(('snapshots', [{'id': '1'}]), ('encrypted', 'yes'),
              ('format_specific', {'data': {'data-file': '/etc/shadow'}}),
              ('format_specific', {'data': {'corrupt': True}}))
    @ddt.unpack
    def test_refused_as_qemu_understands_it(self, name, value):
        setattr(self.info, name, value)
        self.assertRaises(exception.UnsafeDiskContent, self.look, header())

    def noted(self, number):
        self.info.virtual_size = 1 << 40
        self.info.format_specific['data']['bitmaps'] = [
            {'name': 'a', 'flags': ['auto'], 'granularity': 65536}] * number

    def test_bitmaps(self):
        # 2 MiB each
        self.noted(128)
        self.look(header())

    def test_bitmaps_that_take_all_memory(self):
        # QEMU loads them when the guest is started, up to 65535.
        self.noted(129)
        self.assertIn('bitmaps', str(self.assertRaises(
            exception.UnsafeDiskContent, self.look, header())))

    @ddt.data(0, 1 << 30, 1 << 31)
    def test_size(self, size):
        self.look(header(), size)

    def test_too_large(self):
        e = self.assertRaises(exception.UnsafeDiskContent, self.look,
                              header(), (1 << 30) - 1)
        self.assertIn(str(1 << 30), str(e))

    def test_neither_file_nor_device(self):
        os.mkfifo(self.path)
        self.assertRaises(ValueError, content.look_at_qcow2, self.path)


class PloopTestCase(test.NoDBTestCase):
    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'disk')

    def test_is_ploop(self):
        for data, expected in ((b'WithouFreSpacExt'.ljust(512), True),
                               (header(), False), (b'', False)):
            with open(self.path, 'wb') as f:
                f.write(data)
            self.assertEqual(expected, content.is_ploop(self.path))

    def test_out_of_reach(self):
        self.assertFalse(content.is_ploop(self.path))
        os.mkfifo(self.path)
        self.assertFalse(content.is_ploop(self.path))


class BaseTestCase(test.NoDBTestCase):
    def setUp(self):
        super().setUp()
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'base')

    def look(self, data):
        with open(self.path, 'wb') as f:
            f.write(data)
        content.look_at_base(self.path)

    def test_raw(self):
        self.look(b'\0' * 65536)

    def test_qcow2(self):
        self.look(header())

    def test_backing_file(self):
        self.assertRaises(exception.UnsafeDiskContent, self.look,
                          header(backing_offset=512))

    def test_data_file(self):
        self.assertRaises(exception.UnsafeDiskContent, self.look,
                          header(features=DATA_FILE))

    def test_not_inspected(self):
        self.flags(disable_deep_image_inspection=True, group='workarounds')
        self.look(header(backing_offset=512))
