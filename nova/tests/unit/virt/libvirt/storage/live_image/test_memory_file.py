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
import shutil
import struct

import ddt
import fixtures
from oslo_serialization import jsonutils

from nova import test
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import vm_state

DESCRIPTION = memory_file.Description(
    domain='<domain>\u00e4</domain>', capacity=1 << 30, memory_mb=256,
    vcpus=1, qemu_version=7002000, length=100007)


def saved(stream, magic=b'LibvirtQemudSave', version=2, compression=0,
          xml=b'<domain/>\0'):
    """What libvirt 9.0, 11.3 and 12.8 write."""
    return struct.pack('<16s19I', magic, version, len(xml), 1, compression,
                       *[0] * 15) + xml + stream


@ddt.ddt
class MemoryFileTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(self.folder, 'memory')
        self.stream = os.urandom(DESCRIPTION.length)

    def _put(self, data):
        with open(self.path, 'wb') as f:
            f.write(data)

    def _keep(self):
        self._put(b'before' + self.stream + b'behind')
        kept = os.path.join(self.folder, 'kept')
        with open(kept, 'wb') as out, memory_file.Reader(
                DESCRIPTION, vm_state.Stream(
                    self.path, 6, len(self.stream))) as reader:
            shutil.copyfileobj(reader, out, 1000)
            self.assertEqual(reader.length, out.tell())
        return kept

    def test_there_and_back(self):
        kept = self._keep()
        description, stream = memory_file.read(kept)
        self.assertEqual(DESCRIPTION, description)
        self.assertEqual(0, stream.offset % 4096)
        with open(kept, 'rb') as f:
            f.seek(stream.offset)
            self.assertEqual(self.stream, f.read(stream.length))
            self.assertEqual(b'', f.read())

    def test_stream_that_shrinks_while_it_is_read(self):
        self._put(b'x' * 10)
        reader = memory_file.Reader(
            DESCRIPTION, vm_state.Stream(self.path, 0, 11))
        self.addCleanup(reader.close)
        self.assertRaises(OSError, reader.readall)

    def _cut(self, data):
        return data[:-1]

    def _long(self, data):
        return data + b'x'

    def _foreign(self, data):
        return b'QFI\xfb' + data[4:]

    def _newer(self, data):
        return data[:8] + struct.pack('>I', 2) + data[12:]

    def _empty(self, data):
        return b''

    def _huge(self, data):
        return data[:12] + struct.pack('>I', 1 << 30) + data[16:]

    @ddt.data(('_cut', '100006 bytes'), ('_long', '100008 bytes'),
              ('_foreign', 'no memory'), ('_newer', 'version 2'),
              ('_empty', 'no memory'), ('_huge', '1073741824 bytes'))
    @ddt.unpack
    def test_unusable(self, change, text):
        with open(self._keep(), 'rb') as f:
            data = f.read()
        self._put(getattr(self, change)(data))
        error = self.assertRaises(
            memory_file.Unusable, memory_file.read, self.path)
        self.assertIn(text, str(error))

    @ddt.data([], 'text', {'domain': '<domain/>'}, {
        'domain': '<domain/>', 'capacity': 'much', 'memory_mb': 1, 'vcpus': 1,
        'qemu_version': 1, 'length': 0})
    def test_bad_description(self, value):
        text = jsonutils.dump_as_bytes(value)
        self._put(struct.pack('>8sII', b'NOVALIVE', 1, len(text)) + text)
        self.assertRaises(memory_file.Unusable, memory_file.read, self.path)

    def test_find_stream(self):
        self._put(saved(b'QEVM' + self.stream))
        found = memory_file.find_stream(self.path)
        self.assertEqual(4 + len(self.stream), found.length)
        with open(self.path, 'rb') as f:
            f.seek(found.offset)
            self.assertEqual(b'QEVM', f.read(4))

    @ddt.data(({'magic': b'LibvirtQemudPart'}, 'another header'),
              ({'version': 3}, 'another header'),
              ({'compression': 3}, 'snapshot_image_format'),
              ({'stream': b'QEVx'}, 'no stream'))
    @ddt.unpack
    def test_no_stream(self, changes, text):
        self._put(saved(**{'stream': b'QEVM', **changes}))
        error = self.assertRaises(
            memory_file.Unusable, memory_file.find_stream, self.path)
        self.assertIn(text, str(error))

    def test_cut_header(self):
        self._put(saved(b'')[:50])
        self.assertRaises(
            memory_file.Unusable, memory_file.find_stream, self.path)
