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
"""Images of a Ceph pool that a move has made out of files."""

from unittest import mock

import ddt

from nova import exception
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.move import source
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata

POOL = two_hosts.POOL
CEPH, OVER_CEPH = 'cluster/nova', 'over-ceph'
COPIED = ['disk', 'disk.config', 'disk.eph0']


def silent(*args):
    raise exception.StorageCephError(
        pool=OVER_CEPH, host='source', reason='timed out', code=110)


class CephTestCase(test_move.OutgoingTestCase):
    """The destination's pool is over Ceph, and the source has one, too."""

    def setUp(self):
        super().setUp()
        self.answers, self.tried = True, []
        for name in ('delete', 'digest'):
            self.stub_out('nova.virt.libvirt.storage.pool.ceph_bytes.' + name,
                          getattr(self, name))
        self.stub_out('nova.virt.libvirt.storage.pool.ceph.CephImage',
                      lambda pool, ceph, name: two_hosts.Volume(pool, name))
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.load',
            lambda cls, context, instance: self.load())
        self.stub_out('nova.tests.unit.virt.libvirt.storage.move.two_hosts.'
                      'Pool.ceph', self.ceph_of)

    def put_on_ceph(self):
        self.dest.types[POOL], self.dest.ceph[POOL] = 'rbd', CEPH
        self.source.types[OVER_CEPH] = 'rbd'
        self.source.ceph[OVER_CEPH] = CEPH
        # Both see the same images, whatever they call the pool.
        self.source.pools[OVER_CEPH] = self.dest.pools[POOL]
        self.offered()

    def offered(self):
        self.make_offer()
        self.disks = self.load()
        self.saves.clear()

    def ceph_of(self, pool):
        identity = pool.daemon.ceph.get(pool.name)
        check = mock.Mock() if self.answers else silent
        return identity and mock.Mock(
            identity=identity, check=check, sizes=lambda: (1 << 40, 1 << 38))

    def delete(self, pool, name, timeout):
        self.tried.append(name)
        pool.ceph().check()
        pool.volumes_by_name.pop(name, None)

    @staticmethod
    def digest(image, key, timeout):
        if image.name not in image.pool.volumes_by_name:
            raise exception.StorageVolumeNotFound(
                volume=image.name, pool=image.pool.name, host='dest')
        return (image.content['length'],
                two_hosts.checksum_of(image.content.get('content')))

    def images(self):
        return self.ours(self.dest)

    def accept(self):
        self.flags(host='dest')
        try:
            destination.accept(
                self.context, self.instance, self.load(), self.dest,
                'dest:///', self.cache_base)
        finally:
            self.flags(host='source')

    def assert_stayed(self):
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual({'libvirt-storage'}, {
            record.backend for _name, record in self.load().items()})

    def give_back(self):
        """The destination's part of a revert."""
        self.flags(host='dest')
        self.instance.task_state = 'resize_reverting'
        self.instance.host = 'dest'
        disks = self.load()
        try:
            return destination.give_back(
                self.dest, self.instance, disks, source.kept(disks))
        finally:
            self.flags(host='source')


@ddt.ddt
class ImagesTestCase(CephTestCase):

    def setUp(self):
        super().setUp()
        self.put_on_ceph()
        self.send()

    def send(self):
        """What the source has done when it ends well."""
        disks = self.load()
        for name, record in disks.items():
            record.previous = record.obj_clone()
            record.backend, record.host = 'libvirt-storage-rbd', 'dest'
            record.state, record.migration_id = 'building', 7
            content = self.source.pools[POOL][record.volume]
            if name in COPIED:
                record.expected = metadata.LibvirtDiskExpected(
                    length=content['length'], key=5, address=None,
                    checksum=two_hosts.checksum_of(content['content']))
                self.dest.pools[POOL][record.volume] = dict(content)
            disks.set(name, record)
        disks.save(self.context)

    def test_accept(self):
        self.accept()
        for name in COPIED:
            record = self.load().get(name)
            self.assertEqual(('ready', None),
                             (record.state, record.expected))
            self.assertEqual('source', record.previous.host)

    @ddt.data(('content', 'other'), ('length', 999))
    def test_not_what_was_sent(self, change):
        self.dest.pools[POOL][self.volume_name('disk')].update([change])
        self.assertRaises(exception.StorageTransferMismatch, self.accept)
        self.assertTrue(self.load().get('disk').is_building)

    def test_image_is_gone(self):
        del self.dest.pools[POOL][self.volume_name('disk')]
        self.assertRaises(exception.StorageTransferMismatch, self.accept)

    def test_longer_than_its_record(self):
        """The guest would see all of it."""
        disks = self.load()
        record = disks.get('disk')
        record.size -= 1
        disks.set('disk', record)
        disks.save(self.context)
        self.assertRaises(exception.UnsafeDiskContent, self.accept)
        self.assertTrue(self.load().get('disk').is_building)

    def test_pool_that_is_none_of_ceph(self):
        """It was redefined, or the source makes something up."""
        del self.dest.ceph[POOL]
        e = self.assertRaises(exception.StorageTransferMismatch, self.accept)
        self.assertIn('%s is over no Ceph pool' % POOL, str(e))

    def test_nothing_is_expected(self):
        disks = self.load()
        record = disks.get('disk')
        record.expected = None
        disks.set('disk', record)
        disks.save(self.context)
        self.assertRaises(exception.StorageTransferMismatch, self.accept)

    def abandon(self):
        source.abandon(self.context, self.host, self.instance,
                       self.migration, self.load())

    def test_source_was_killed(self):
        self.abandon()
        self.assertEqual([], self.images())
        self.assert_stayed()
        self.assertEqual([], self.left('dest'))
        # libvirt there would call them gone.
        self.assertEqual([], self.host.uris)

    @ddt.data('answers', 'pool')
    def test_source_can_not_delete_them(self, lacks):
        """The destination does it, when it is the destination again."""
        if lacks == 'answers':
            self.answers = False
        else:
            self.source.ceph[OVER_CEPH] = 'other/nova'
        self.abandon()
        self.assert_stayed()
        self.assertEqual({(POOL, self.volume_name(name)) for name in COPIED},
                         set(self.left('dest')) -
                         {(POOL, self.volume_name('disk.swap'))})
        self.assertEqual(COPIED, self.images())
        self.assertEqual([], self.host.uris)
        # Nova lists no images that are left.
        said = self.stdlog.logger.output
        self.assertNotIn('list_disks', said)
        self.assertEqual(len(COPIED), said.count('rbd ls says'))
        # A Ceph that is silent is not waited for once more.
        self.assertEqual(1 if lacks == 'answers' else 0, len(self.tried))
        self.answers = True
        self.offered()
        self.assertEqual([], self.images())

    def test_what_is_a_disk_stays(self):
        """Where there is a directory now, a Ceph pool was once, or will be."""
        disks = self.load()
        for name, record in disks.items():
            record.previous.backend = 'libvirt-storage-rbd'
            disks.set(name, record.previous)
        leftovers.note(disks, 'dest', [(POOL, self.volume_name('disk'))])
        disks.save(self.context)
        self.abandon()
        self.assertEqual(([], COPIED), (self.tried, self.images()))
        self.assertEqual([], self.left('dest'))

    def test_revert(self):
        """The new flavor's disk goes, too; the source has no such pool."""
        self.accept()
        disks = self.load()
        disks.mark('ready', ['disk.swap'])
        disks.set('disk.local', metadata.LibvirtDiskMetadata(
            backend='libvirt-storage-rbd', format='raw', size=1,
            state='ready', host='dest', pool=POOL,
            volume=self.volume_name('disk.local')))
        disks.save(self.context)
        self.dest.pools[POOL][self.volume_name('disk.local')] = {}
        self.assertTrue(self.give_back())
        self.assertEqual([], self.images())
        self.assertEqual([], self.load().leftovers)
        self.assert_stayed()
        self.assertEqual(4, len(self.ours(self.source)))

    def test_revert_fails(self):
        """It is tried again, and what is left is on record."""
        self.accept()
        self.dest.fail['delete'] = exception.StorageImageBusy(
            pool=POOL, volume='v', host='dest', reason='r', code=None)
        self.assertFalse(self.give_back())
        self.assertEqual(COPIED, self.images())
        self.assertTrue({(POOL, self.volume_name(name)) for name in COPIED} <=
                        set(self.left('dest')))
        self.assert_stayed()
