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
from unittest import mock

import ddt
import fixtures

from nova import exception
from nova import objects
from nova.objects import fields
from nova import test
from nova.tests.unit.virt.libvirt.storage.live import test_settle
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.live import file_systems
from nova.virt.libvirt.storage.live import offer
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.pool import setup

POOL = two_hosts.POOL
KINDS = ('disk', 'disk.eph', 'disk.swap', 'disk.config')


@ddt.ddt
class OfferTestCase(test_settle.LiveTestCase):

    def setUp(self):
        super().setUp()
        self.flags(host='dest')
        self.make_probes = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.sharing.make_probes',
            return_value=[[POOL, 'one'], ['other', 'two']])).mock

    def make(self):
        return offer.make(self.dest, self.instance, self.load(), '192.0.2.2')

    def test_make(self):
        self.assertEqual({
            'dst_storage_pools': dict.fromkeys(KINDS, POOL),
            'dst_storage_probes': {POOL: ['one'], 'other': ['two']},
            'dst_storage_address': '192.0.2.2', 'dst_takes_legacy': True,
            'dst_takes_links': False},
            self.make())
        # A pool into which nothing comes may be as sick as it likes.
        self.assertEqual({POOL}, self.make_probes.call_args.kwargs.get(
            'pool_names'))

    def _have_files(self, *names):
        for name in names:
            record = self.disks.get(name)
            record.backend = fields.LibvirtDiskBackend.FLAT
            record.pool = record.volume = None
            self.disks.set(name, record)
        self.disks.save(self.context)

    def _probe(self, directory):
        """Have a probe in the pool, which is a real directory."""
        with open(os.path.join(directory, 'one'), 'w'):
            pass
        self.make_probes.return_value = [[POOL, 'one']]
        self.stub_out(two_hosts.__name__ + '.Pool.directory',
                      lambda pool: directory)
        self.stub_out(two_hosts.__name__ + '.Pool.volume',
                      lambda pool, name: mock.Mock(
                          path=os.path.join(directory, name)))

    def test_takes_links(self):
        self._probe(self.useFixture(fixtures.TempDir(
            rootdir=offer.CONF.instances_path)).path)
        before = os.listdir(offer.CONF.instances_path)
        self._have_files('disk')
        self.assertTrue(self.make()['dst_takes_links'])
        self.assertEqual(before, os.listdir(offer.CONF.instances_path))
        # Nobody asks who makes legacy disks.
        self.flags(images_type='qcow2', group='libvirt')
        self.assertFalse(self.make()['dst_takes_links'])

    def test_no_link_is_tried_without_files(self):
        self._probe(self.useFixture(fixtures.TempDir(
            rootdir=offer.CONF.instances_path)).path)
        link = self.useFixture(fixtures.MockPatch(
            'os.link', side_effect=os.link)).mock
        self.assertFalse(self.make()['dst_takes_links'])
        link.assert_not_called()
        # Nothing is on record: what it has is found on the source.
        self.load = dict
        self.assertTrue(self.make()['dst_takes_links'])
        link.assert_called_once()

    def test_a_pool_is_looked_up_once(self):
        self._have_files('disk')
        looked_up = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.setup.receiving_pool',
            side_effect=setup.receiving_pool)).mock
        self.make()
        looked_up.assert_called_once_with(self.dest, POOL, 'dest')

    @ddt.data(errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES)
    def test_takes_no_links(self, number):
        self._probe(self.useFixture(fixtures.TempDir()).path)
        self.useFixture(fixtures.MockPatch(
            'os.link', side_effect=OSError(number, 'no link')))
        self._have_files('disk')
        self.assertFalse(self.make()['dst_takes_links'])

    def test_pool_without_files_takes_no_links(self):
        self._probe(self.useFixture(fixtures.TempDir()).path)
        self.stub_out(two_hosts.__name__ + '.Pool.directory',
                      lambda pool: None)
        self._have_files('disk')
        self.assertFalse(self.make()['dst_takes_links'])

    def test_on_ceph(self):
        """What it is takes the place of a probe."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.kinds._KINDS',
            {**kinds._KINDS,
             'rbd': kinds._KINDS['rbd']._replace(holds_disks=True)}))
        self.dest.types[POOL] = 'rbd'
        self.dest.ceph[POOL] = 'cluster/nova'
        self.make_probes.return_value = [['other', 'two']]
        self.assertEqual({POOL: ['cluster/nova'], 'other': ['two']},
                         self.make()['dst_storage_probes'])

    def test_host_makes_legacy_disks(self):
        self.flags(images_type='qcow2', group='libvirt')
        self.assertFalse(self.make()['dst_takes_legacy'])
        self._have_files(*test_settle.NAMES)
        self.assertEqual({}, self.make())

    def test_pool_is_inactive(self):
        self.dest.inactive.add(POOL)
        error = self.assertRaises(
            exception.MigrationPreCheckError, self.make)
        self.assertIn('start storage pool', str(error))
        self.make_probes.assert_not_called()

    def test_probe_cant_be_made(self):
        # Another host is tried.
        self.make_probes.side_effect = exception.StoragePoolError(
            pool=POOL, host='dest', reason='read-only', code=38)
        error = self.assertRaises(
            exception.MigrationPreCheckError, self.make)
        self.assertIn('read-only', str(error))

    @ddt.data(True, False)
    def test_ceph_is_away_once_the_probes_are_there(self, must_come):
        remove = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.sharing.remove_probes')).mock
        self.stub_out(two_hosts.__name__ + '.Pool.ceph', mock.Mock(
            side_effect=exception.StorageCephError(
                pool='other', host='dest', ceph='nova', reason='it is away',
                code=errno.ETIMEDOUT)))
        if must_come:
            error = self.assertRaises(
                exception.MigrationPreCheckError, self.make)
            self.assertIn('it is away', str(error))
        else:
            self.stub_out('nova.virt.libvirt.storage.records.metadata.'
                          'LibvirtDiskMetadata.is_in_pool', False)
            self.assertEqual({}, self.make())
        remove.assert_called_once_with(
            self.dest, self.make_probes.return_value)

    def test_pool_takes_no_disks(self):
        self.dest.types[POOL] = 'logical'
        error = self.assertRaises(
            exception.MigrationPreCheckError, self.make)
        self.assertIn('logical', str(error))

    def test_withdraw(self):
        remove = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.sharing.remove_probes')).mock
        offer.withdraw(self.dest, objects.LibvirtLiveMigrateData())
        remove.assert_not_called()
        offer.withdraw(
            self.dest, objects.LibvirtLiveMigrateData(**self.make()))
        remove.assert_called_once_with(
            self.dest, [(POOL, 'one'), ('other', 'two')])


@ddt.ddt
class FileSystemsTestCase(test.NoDBTestCase):

    MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:35 / /mnt/my\\040pools rw shared:2 - nfs4 server:/export rw
41 40 0:36 / /mnt/my\\040pools/a rw - fuse.glusterfs server:/vol rw
42 22 0:37 / /mnt/b rw - xfs /dev/sdb rw
43 22 0:38 / /mnt/b rw master:7 - ceph 192.0.2.1:/ rw
44 22 0:39 / /mnt/dépôt rw - nfs4 server:/export rw
"""

    @ddt.data(('/var/lib/nova', 'ext4'), ('/mnt/my pools/disk', 'nfs4'),
              ('/mnt/my pools/a/disk', 'fuse.glusterfs'),
              ('/mnt/my pools/ab', 'nfs4'), ('/mnt/b', 'ceph'),
              ('/mnt/bc', 'ext4'), ('/mnt/dépôt/disk', 'nfs4'))
    @ddt.unpack
    def test_type_of(self, path, expected):
        self.useFixture(fixtures.MonkeyPatch(
            'builtins.open', fixtures_open(self.MOUNTS)))
        self.assertEqual(expected, file_systems.type_of(path))

    @ddt.data(('nfs', 9_000_000, True), ('ext4', 9_000_000, False),
              ('fuse.glusterfs', 9_000_000, True),
              ('fuse.sshfs', 9_000_000, False), ('', 9_000_000, True),
              ('ext4', 10_008_000, True))
    @ddt.unpack
    def test_is_shared(self, kind, version, expected):
        daemon = two_hosts.Daemon('source')
        daemon.version = version
        self.assertEqual(expected, file_systems.is_shared(kind, daemon))


def fixtures_open(content):
    return mock.mock_open(read_data=content)
