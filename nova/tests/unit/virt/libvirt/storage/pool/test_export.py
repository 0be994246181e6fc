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
"""Pools over directories that a server exports."""

from unittest import mock

from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova import exception
from nova import objects
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.tests.unit.virt.libvirt.storage.pool import test_mounts
from nova.virt.libvirt.storage.pool import export
from nova.virt.libvirt.storage.pool import sharing


class ExportTestCase(test_mounts.MountedPoolTestCase):
    """What a server exports may be nobody's to write."""

    def assert_refused(self, *parts):
        e = self.assertRaises(
            exception.StoragePoolNotExported, self.nfs.adopt)
        for part in ('pool nfs', 'host here', '/export of server server',
                     *parts):
            self.assertIn(part, str(e)[:200])
        self.assertEqual([], self.raw.listVolumes())

    def test_trusting(self):
        self.nfs.adopt()
        self.assertEqual([], self.raw.listVolumes())

    def test_root_is_nobody(self):
        """Only the first byte of a disk would tell."""
        self.raw.squashes_root = True
        self.raw.owner = 64060
        with mock.patch('os.geteuid', return_value=64060):
            self.assert_refused('export it with no_root_squash')

    def test_directory_of_root(self):
        self.raw.squashes_root = True
        self.assert_refused('have user', 'own it')

    def test_read_only(self):
        self.raw.read_only = True
        self.assert_refused('export it read-write')

    def test_full(self):
        """Whoever makes a disk will say so."""
        self.conn.file_system.capacity = 2 * units.Gi
        with mock.patch.object(libvirt_storage.FileSystem, 'take',
                               side_effect=OSError(28, 'full')):
            self.nfs.adopt()
        self.assertEqual([], self.raw.listVolumes())

    def test_other_error(self):
        with mock.patch.object(
                self.raw, 'createXML',
                side_effect=libvirt_storage.system_error('no', 5)):
            self.assertRaises(exception.StorageVolumeError, self.nfs.adopt)

    def test_left_by_a_service_that_was_killed(self):
        self.nfs.create(self.disk(export._NAME % 'here'))
        self.nfs.adopt()
        self.assertEqual([], self.raw.listVolumes())

    def test_directory_is_not_tried_out(self):
        raw = self.add_pool('plain')
        with mock.patch.object(raw, 'createXML', side_effect=AssertionError):
            self.pool('plain').adopt()


class TwoHostsTestCase(test_mounts.MountedPoolTestCase):

    def setUp(self):
        super().setUp()
        self.there = self.connection()
        self.there.file_system = self.conn.file_system
        self.instance = objects.Instance(uuid=uuids.instance)

    def test_one_export_is_one_pool(self):
        """Wherever it is mounted."""
        raw = self.add_pool('nfs', test_mounts.PATH, kind='netfs',
                            conn=self.there)
        there = base.pool.StoragePool(self.there, 'nfs', 'there')
        self.assertTrue(sharing.is_same(self.nfs, there, self.instance))
        self.raw.refresh()
        raw.refresh()
        self.assertEqual(([], []),
                         (self.raw.listVolumes(), raw.listVolumes()))

    def test_two_exports(self):
        self.there.file_system = libvirt_storage.FileSystem()
        self.add_pool('nfs', test_mounts.PATH, kind='netfs', conn=self.there)
        there = base.pool.StoragePool(self.there, 'nfs', 'there')
        self.assertFalse(sharing.is_same(self.nfs, there, self.instance))
