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
"""What libvirt does with exports: the fake beside a real daemon.

For the latter set NOVA_TEST_LIBVIRT_URI, and NOVA_TEST_LIBVIRT_EXPORTS to
``server:/directory``. The server exports three directories below that, which
are the user's who runs the test, and who isn't root: trusting
(no_root_squash), squashing (root_squash) and readonly (ro). Each has a GiB.
NOVA_TEST_LIBVIRT_NFS_VERSION says by which version of the protocol, e.g. 4.2.
"""

import os

import fixtures
from oslo_utils import units
from oslo_utils import uuidutils

from nova import exception
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.unit.virt.libvirt.storage import test_conformance
from nova.virt.libvirt.storage.pool import config
from nova.virt.libvirt.storage.pool import pool as storage_pool

EXPORTS = os.environ.get('NOVA_TEST_LIBVIRT_EXPORTS')
VERSION = os.environ.get('NOVA_TEST_LIBVIRT_NFS_VERSION', '4.2')

POOL = ("<pool type='netfs' xmlns:fs='http://libvirt.org/schemas/storagepool/"
        "fs/1.0'><name>%s</name><source><host name='%s'/>"
        "<dir path='%s'/><format type='nfs'/></source><target><path>%s</path>"
        "</target><fs:mount_opts><fs:option name='nfsvers=%s'/>"
        "</fs:mount_opts></pool>")
MIB = units.Mi


class Conformance:
    """To be mixed with what provides libvirt, conn, export() and user."""

    def setUp(self):
        super().setUp()
        self.provide()
        self.useFixture(fakelibvirt.LibvirtModuleFixture(self.libvirt))
        self.useFixture(nova_fixtures.PrivsepFixture())

    def start(self, export):
        """:returns: a StoragePool over one of the exports"""
        name = 'test-%s' % uuidutils.generate_uuid()
        server, directory = self.source
        self.raw = self.conn.storagePoolDefineXML(POOL % (
            name, server, os.path.join(directory, export),
            '/mnt/' + name, VERSION), 0)
        self.addCleanup(self._remove, self.raw)
        self.raw.build(0)
        self.raw.create(0)
        self.export(export)
        return storage_pool.StoragePool(self.conn, name, 'elsewhere')

    def _remove(self, raw):
        if raw.isActive():
            for volume in raw.listAllVolumes(0):
                volume.delete(0)
            raw.destroy()
        raw.undefine()

    def volume(self, pool):
        wanted = config.LibvirtConfigStorageVolume()
        wanted.name, wanted.capacity = 'v', 4 * MIB
        wanted.allocation, wanted.target_format = 0, 'raw'
        return pool.create(wanted)

    def write(self, volume):
        with volume.libvirt_errors():
            stream = self.conn.newStream(0)
            volume.raw.upload(stream, 0, 1, 0)
            stream.send(b'x')
            stream.finish()

    def test_trusting(self):
        pool = self.start('trusting')
        pool.adopt()
        volume = self.volume(pool)
        self.write(volume)
        volume.resize(8 * MIB)
        self.assertEqual(8 * MIB, volume.physical())
        self.assertLess(volume.info().allocation, MIB)
        volume.delete()
        self.assertEqual([], pool.volumes())

    def test_squashing(self):
        """The file is made as its owner, and opened as root."""
        pool = self.start('squashing')
        volume = self.volume(pool)
        for function in (lambda: self.write(volume),
                         lambda: volume.resize(8 * MIB)):
            e = self.assertRaises(exception.StorageVolumeError, function)
            self.assertIn('Permission denied', str(e))
        volume.delete()
        e = self.assertRaises(exception.StoragePoolNotExported, pool.adopt)
        self.assertIn('export it with no_root_squash', str(e))
        self.assertEqual([], pool.volumes())

    def test_squashing_who_is_not_the_owner(self):
        pool = self.start('squashing')
        self.be_user(self.user + 1)
        e = self.assertRaises(exception.StoragePoolNotExported, pool.adopt)
        self.assertIn('own it', str(e))

    def test_read_only(self):
        e = self.assertRaises(exception.StoragePoolNotExported,
                              self.start('readonly').adopt)
        self.assertIn('export it read-write', str(e))

    def be_user(self, number):
        self.useFixture(fixtures.MonkeyPatch('os.geteuid', lambda: number))


class FakeTestCase(Conformance, test.NoDBTestCase):

    user = 64060
    source = ('server', '/exports')

    def provide(self):
        self.libvirt = fakelibvirt
        self.conn = fakelibvirt.Connection('qemu:///system')
        self.be_user(self.user)

    def export(self, name):
        self.raw.owner = self.user
        self.raw.squashes_root = name == 'squashing'
        self.raw.read_only = name == 'readonly'


class DaemonTestCase(Conformance, test.NoDBTestCase):

    user = os.geteuid()

    def provide(self):
        test_conformance.connect(
            self, EXPORTS, 'NOVA_TEST_LIBVIRT_URI and '
            'NOVA_TEST_LIBVIRT_EXPORTS name no exports')
        server, _colon, directory = EXPORTS.partition(':')
        self.source = (server, directory)

    def export(self, name):
        """That is the server's part."""
