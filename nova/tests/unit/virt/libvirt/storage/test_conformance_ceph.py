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

"""Holds the fake of Ceph against a real one.

For the latter set NOVA_TEST_CEPH_CONF to a configuration with which
client.nova can log in, and may do all in two Ceph pools, nova and images.
"""

import contextlib
import os
import tempfile
import types

from oslo_concurrency import processutils
from oslo_utils import units
from oslo_utils import uuidutils

from nova import exception
from nova.storage import rbd_utils
from nova import test
from nova.tests.fixtures import ceph
from nova.virt.libvirt.storage.pool import ceph as ceph_pool
from nova.virt.libvirt.storage.pool import ceph_bytes

CONF = os.environ.get('NOVA_TEST_CEPH_CONF')
# What ceph_bytes.digest() says of 5 MiB, with key 7: without data, and with
# some at 1 MiB.
EMPTY, DIGEST = 11279659504155660, 16355868300795793


class Conformance:
    """To be mixed with what provides Ceph."""

    def setUp(self):
        super().setUp()
        self.provide()
        self.flags(group='libvirt', rbd_destroy_volume_retries=1,
                   rbd_destroy_volume_retry_interval=0)
        self.driver = rbd_utils.RBDDriver(
            pool='nova', user='nova', ceph_conf=CONF or '/nowhere')
        self.rbd = rbd_utils.rbd
        self.name = 'test-' + uuidutils.generate_uuid()
        self.create()

    def create(self, size=2 * units.Mi):
        with rbd_utils.RADOSClient(self.driver) as client:
            rbd_utils.rbd.RBD().create(client.ioctx, self.name, size)
        self.addCleanup(self._remove, self.name)

    def _remove(self, *names):
        for name in names:
            with contextlib.suppress(self.rbd.ImageNotFound):
                with self.open(name) as image:
                    for snapshot in image.list_snaps():
                        if image.is_protected_snap(snapshot['name']):
                            image.unprotect_snap(snapshot['name'])
                        image.remove_snap(snapshot['name'])
                with rbd_utils.RADOSClient(self.driver) as client:
                    rbd_utils.rbd.RBD().remove(client.ioctx, name)

    def open(self, name=None, **kwargs):
        return rbd_utils.RBDVolumeProxy(
            self.driver, name or self.name, **kwargs)

    def remove(self):
        with rbd_utils.RADOSClient(self.driver) as client:
            rbd_utils.rbd.RBD().remove(client.ioctx, self.name)

    def test_image(self):
        self.assertEqual(2 * units.Mi, self.driver.size(self.name))
        self.driver.resize(self.name, 3 * units.Mi + 1)
        self.assertEqual(3 * units.Mi + 1, self.driver.size(self.name))
        with rbd_utils.RADOSClient(self.driver) as client:
            self.assertIn(self.name, rbd_utils.rbd.RBD().list(client.ioctx))
        self.remove()
        self.assertFalse(self.driver.exists(self.name))

    def test_bytes(self):
        """What ceph_bytes reads of an image made by rbd import."""
        name, content = self.name + '-bytes', bytes(5 * units.Mi) + b'data'
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self.driver.import_image(file.name, name)
        self.addCleanup(self._remove, name)
        extents = []
        with self.open(name, read_only=True) as image:
            image.diff_iterate(
                0, len(content), None,
                lambda *extent: extents.append(extent))
            self.assertEqual(b'\0data', image.read(len(content) - 5, 5))
        ((offset, length, exists),) = extents
        self.assertTrue(exists)
        self.assertLessEqual(offset, 5 * units.Mi)
        self.assertEqual(len(content), offset + length)

    def pool(self):
        """What ceph_bytes takes for a StoragePool."""
        pool = types.SimpleNamespace(name='pool', host='here')
        found = ceph_pool.CephPool(None, pool, types.SimpleNamespace(
            source=types.SimpleNamespace(name='nova')))
        # Its pool's XML is none of this.
        found.driver = self.driver
        pool.ceph = lambda: found
        return pool

    def test_content(self):
        """Two hosts with one image come to one digest."""
        pool, name = self.pool(), self.name + '-content'
        self.addCleanup(self._remove, name)
        ceph_bytes.create(pool, name, 5 * units.Mi, 30)
        e = self.assertRaises(exception.StorageVolumeExists,
                              ceph_bytes.create, pool, name, 1, 30)
        self.assertEqual(17, e.kwargs['code'])
        self.assertEqual(name + '.1', ceph_bytes.free_name(pool, name, (), 30))
        image = ceph_pool.CephImage(pool, pool.ceph(), name)
        self.assertEqual((5 * units.Mi, 0), ceph_bytes.measure(image, 30))
        self.assertEqual((5 * units.Mi, EMPTY),
                         ceph_bytes.digest(image, 7, 30))
        ceph_bytes.delete(pool, name, 30)
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(units.Mi) + b'data' + bytes(4 * units.Mi - 4))
            file.flush()
            self.driver.import_image(file.name, name)
        self.assertEqual((5 * units.Mi, DIGEST),
                         ceph_bytes.digest(image, 7, 30))
        ceph_bytes.delete(pool, name, 30)
        ceph_bytes.delete(pool, name, 30)
        self.assertRaises(exception.StorageVolumeNotFound,
                          ceph_bytes.measure, image, 30)

    def test_no_such_image(self):
        e = self.assertRaises(self.rbd.ImageNotFound,
                              self.driver.size, 'no-' + self.name)
        self.assertEqual(2, e.errno)
        self.remove()
        self.assertRaises(self.rbd.ImageNotFound, self.remove)

    def test_name_is_taken(self):
        e = self.assertRaises(self.rbd.ImageExists, self.create)
        self.assertEqual(17, e.errno)

    def test_no_such_pool(self):
        driver = rbd_utils.RBDDriver(
            pool='nowhere', user='nova', ceph_conf=CONF or '/nowhere')
        e = self.assertRaises(rbd_utils.rados.ObjectNotFound,
                              driver.exists, self.name)
        self.assertIsInstance(e, rbd_utils.rados.Error)
        self.assertEqual(2, e.errno)

    def test_snapshots(self):
        with self.open() as image:
            image.create_snap('s')
            self.assertRaises(self.rbd.ImageExists, image.create_snap, 's')
            image.resize(4 * units.Mi)
            image.rollback_to_snap('s')
            self.assertEqual(2 * units.Mi, image.size())
        self.assertRaises(self.rbd.ImageHasSnapshots, self.remove)
        # The driver says nothing, and leaves it.
        self.driver.destroy_volume(self.name)
        self.assertTrue(self.driver.exists(self.name))

    def test_snapshot_of_a_resize_goes_with_it(self):
        self.flags(group='libvirt', rbd_destroy_volume_retries=2)
        self.driver.create_snap(self.name, 'nova-resize')
        self.driver.destroy_volume(self.name)
        self.assertFalse(self.driver.exists(self.name))

    def test_clone(self):
        child = 'child-of-' + self.name
        self.driver.create_snap(self.name, 's')
        location = {'url': 'rbd://%s/nova/%s/s' % (
            self.driver.get_fsid(), self.name)}
        self.assertRaises(self.rbd.InvalidArgument, self.driver.clone,
                          location, child)
        with self.open() as image:
            image.protect_snap('s')
            self.assertRaises(self.rbd.ImageBusy, image.remove_snap, 's')
        self.driver.clone(location, child)
        self.addCleanup(self._remove, child, self.name)
        self.assertRaises(self.rbd.ImageExists, self.driver.clone,
                          location, child)
        self.assertEqual(['nova', self.name, 's'],
                         list(self.driver.parent_info(child)))
        with self.open() as image:
            self.assertRaises(self.rbd.ImageBusy, image.unprotect_snap, 's')
        self.driver.flatten(child)
        with self.open(child) as image:
            self.assertRaises(self.rbd.ImageNotFound, image.parent_info)
        with self.open() as image:
            image.unprotect_snap('s')

    def test_import(self):
        name = 'import-of-' + self.name
        self.addCleanup(self._remove, name)
        with tempfile.NamedTemporaryFile() as f:
            f.write(b'x' * 5000)
            f.flush()
            self.driver.import_image(f.name, name)
            self.assertEqual(5000, self.driver.size(name))
            e = self.assertRaises(processutils.ProcessExecutionError,
                                  self.driver.import_image, f.name, name)
        self.assertEqual(17, e.exit_code)

    def test_room(self):
        info = self.driver.get_pool_info()
        self.assertGreater(info['total'], 0)
        self.assertGreaterEqual(info['total'], info['free'])


class TestFake(Conformance, test.NoDBTestCase):

    def provide(self):
        self.cluster = self.useFixture(ceph.CephFixture()).cluster

    def test_in_use(self):
        image = self.cluster.pools['nova'][self.name]
        image.watchers = 1
        self.assertRaises(self.rbd.ImageBusy, self.remove)
        image.watchers = 0


class TestReal(Conformance, test.NoDBTestCase):

    def provide(self):
        if not CONF:
            self.skipTest('NOVA_TEST_CEPH_CONF names no Ceph')

    def test_in_use(self):
        with self.open():
            self.assertRaises(self.rbd.ImageBusy, self.remove)
