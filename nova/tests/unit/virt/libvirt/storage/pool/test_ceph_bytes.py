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

from oslo_utils import units

from nova import exception
from nova.tests.fixtures import ceph
from nova.tests.unit.virt.libvirt.storage.pool import test_ceph
from nova.virt.libvirt.storage.pool import ceph_bytes

TIMEOUT = 30
SIZE = 9 * units.Mi + 1


class BytesTestCase(test_ceph.CephPoolTestCase):

    def image(self, content, size=SIZE, name='i'):
        self.images[name] = ceph.StoredImage(size, content)
        return self.pool.volume(name)

    def digest(self, *args, key=7):
        return ceph_bytes.digest(self.image(*args), key, TIMEOUT)

    def test_create(self):
        ceph_bytes.create(self.pool, 'i', 1000001, TIMEOUT)
        self.assertEqual(1000001, self.images['i'].size)

    def test_what_is_there_stays(self):
        kept = self.add_image()
        self.assertRaises(exception.StorageVolumeExists, ceph_bytes.create,
                          self.pool, 'i', 1, TIMEOUT)
        self.assertIs(kept, self.images['i'])

    def free_name(self, taken=()):
        return ceph_bytes.free_name(self.pool, 'i', taken, TIMEOUT)

    def test_free_name(self):
        self.assertEqual('i', self.free_name())
        self.assertEqual('i.1', self.free_name(['i']))
        self.add_image('i')
        self.add_image('i.2')
        self.assertEqual('i.1', self.free_name())
        self.assertEqual('i.3', self.free_name(['i.1']))

    def test_delete(self):
        self.add_image()
        ceph_bytes.delete(self.pool, 'i', TIMEOUT)
        self.assertEqual({}, self.images)
        ceph_bytes.delete(self.pool, 'i', TIMEOUT)

    def test_delete_while_it_is_watched(self):
        image = self.add_image()
        image.watchers = 1
        waited = []

        def wait(seconds):
            waited.append(seconds)
            image.watchers = 0

        self.stub_out('nova.virt.libvirt.storage.pool.ceph_bytes.'
                      '_remove.retry.sleep', wait)
        ceph_bytes.delete(self.pool, 'i', TIMEOUT)
        self.assertEqual(({}, 1), (self.images, len(waited)))

    def test_delete_of_what_has_snapshots(self):
        self.add_image().snapshots['s'] = ceph.Snapshot(b'', 1)
        self.assertRaises(exception.StorageImageBusy, ceph_bytes.delete,
                          self.pool, 'i', TIMEOUT)
        self.assertIn('i', self.images)

    def test_measure(self):
        """Of objects that are there; the last one may be a short one."""
        self.assertEqual(
            (SIZE, 5 * units.Mi + 1),
            ceph_bytes.measure(self.image(
                bytes(4 * units.Mi) + b'a' * 4 * units.Mi + b'b'), TIMEOUT))
        self.assertEqual((SIZE, 0),
                         ceph_bytes.measure(self.image(b''), TIMEOUT))

    def test_digest(self):
        size, found = self.digest(b'a' + bytes(5 * units.Mi) + b'b')
        self.assertEqual(SIZE, size)
        self.assertLess(found, 1 << 56)
        self.assertEqual((SIZE, found), self.digest(
            b'a' + bytes(5 * units.Mi) + b'b'))

    def test_each_byte_counts(self):
        last = bytes(SIZE - 1) + b'b'
        found = {self.digest(*args) for args in (
            (b'',), (b'a',), (b'b',), (b'\0a',), (last,),
            (bytes(4 * units.Mi) + b'a',), (b'', SIZE + 1))}
        self.assertEqual(7, len(found))

    def test_key(self):
        self.assertNotEqual(self.digest(b'a'), self.digest(b'a', key=8))

    def test_written_zeroes_are_holes(self):
        self.assertEqual(self.digest(b'a'),
                         self.digest(b'a' + bytes(8 * units.Mi)))

    def test_no_such_image(self):
        image = self.image(b'')
        del self.images['i']
        self.assertRaises(exception.StorageVolumeNotFound,
                          ceph_bytes.digest, image, 7, TIMEOUT)

    def test_silence(self):
        """The fake fails where Ceph would be waited for without an end."""
        image = self.image(b'')
        self.ceph.keeps_silent = True
        for call in (lambda: ceph_bytes.digest(image, 7, TIMEOUT),
                     lambda: ceph_bytes.measure(image, TIMEOUT),
                     lambda: ceph_bytes.create(self.pool, 'n', 1, TIMEOUT),
                     lambda: ceph_bytes.delete(self.pool, 'i', TIMEOUT),
                     self.free_name):
            self.assertRaises(exception.StorageCephError, call)
