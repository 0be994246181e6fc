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
"""Disks of images_type = rbd and disks of storage pools are the same."""

import fixtures

from nova import objects
from nova.objects import block_device as objects_bdm
from nova.tests.fixtures import ceph
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage import takeover

UUID = '11111111-2222-3333-4444-555555555555'


class TakeOverTestCase(base.PoolsTestCase):

    def setUp(self):
        super().setUp()
        self.flags(state_path=self.useFixture(fixtures.TempDir()).path)
        self.flags(group='libvirt', storage_disks_pool='ceph',
                   images_type='libvirt-storage', images_rbd_pool='nova')
        self.ceph = self.useFixture(ceph.CephFixture()).cluster
        self.conn.secretDefineXML(
            "<secret ephemeral='no' private='no'><uuid>%s</uuid></secret>" %
            base.SECRET).setValue(b'a key')
        self.add_pool('ceph', kind='rbd')
        self.disks = metadata.InstanceDisks(
            objects.Instance(uuid=UUID, id=1), {},
            objects_bdm.BlockDeviceMapping(id=1, uuid=UUID))
        for name in ('disk', 'disk.config'):
            self.ceph.pools['nova']['%s_%s' % (UUID, name)] = (
                ceph.StoredImage(1))
            self.disks.set(name, self.record('rbd'))

    @staticmethod
    def record(backend, host='here', **more):
        return metadata.LibvirtDiskMetadata(
            backend=backend, format='raw', size=1, state='ready', host=host,
            **more)

    def take_over(self):
        return takeover.take_over(self.conn, self.disks)

    def places(self):
        return {name: (record.backend, record.pool, record.volume)
                for name, record in self.disks.items()}

    LEGACY = dict.fromkeys(('disk', 'disk.config'), ('rbd', None, None))
    POOLED = {name: ('libvirt-storage-rbd', 'ceph', '%s_%s' % (UUID, name))
              for name in LEGACY}

    def test_there_and_back(self):
        self.assertTrue(self.take_over())
        self.assertEqual(self.POOLED, self.places())
        self.assertFalse(self.take_over())
        self.flags(group='libvirt', images_type='rbd')
        self.assertTrue(self.take_over())
        self.assertEqual(self.LEGACY, self.places())
        self.assertFalse(self.take_over())

    def test_other_images_type(self):
        self.flags(group='libvirt', images_type='qcow2')
        self.assertFalse(self.take_over())

    def test_other_ceph_pool(self):
        self.flags(group='libvirt', images_rbd_pool='images')
        self.assertFalse(self.take_over())
        self.assertEqual(self.LEGACY, self.places())

    def test_no_ceph_pool(self):
        self.add_pool('files')
        self.flags(group='libvirt', storage_disks_pool='files')
        self.assertFalse(self.take_over())
        self.assertEqual(self.LEGACY, self.places())

    def test_pool_that_is_on_ceph_no_more(self):
        self.add_pool('files')
        self.flags(group='libvirt', images_type='rbd')
        for name in self.LEGACY:
            self.disks.set(name, self.record(
                'libvirt-storage-rbd', pool='files',
                volume='%s_%s' % (UUID, name)))
        before = self.places()
        self.assertFalse(self.take_over())
        self.assertEqual(before, self.places())

    def test_disks_that_are_not_whole_or_of_a_rescue(self):
        others = {'disk.rescue': 'ready', 'disk.eph0': 'building'}
        for name, state in others.items():
            record = self.record('rbd')
            record.state = state
            self.disks.set(name, record)
            self.assertTrue(self.take_over())
            self.assertEqual(
                {**self.POOLED, name: ('rbd', None, None)}, self.places())
            self.disks.clear(name)
            for legacy in self.LEGACY:
                self.disks.set(legacy, self.record('rbd'))

    def test_all_or_none(self):
        del self.ceph.pools['nova'][UUID + '_disk.config']
        self.assertFalse(self.take_over())
        self.assertEqual(self.LEGACY, self.places())

    def test_ceph_is_out_of_reach(self):
        self.ceph.answers = False
        self.assertFalse(self.take_over())
        self.assertEqual(self.LEGACY, self.places())

    def test_disks_of_another_host(self):
        for name in self.LEGACY:
            self.disks.set(name, self.record('rbd', host='there'))
        self.assertFalse(self.take_over())

    def test_resize_that_may_be_reverted(self):
        """Its images would look like copies of what they were before."""
        for images_type, backend, place in (
                ('libvirt-storage', 'rbd', {}),
                ('rbd', 'libvirt-storage-rbd', {
                    'pool': 'ceph', 'volume': UUID + '_disk'})):
            self.flags(group='libvirt', images_type=images_type)
            self.disks.set('disk', self.record(
                backend, previous=self.record(backend, 'there', **place),
                **place))
            before = self.places()
            self.assertFalse(self.take_over())
            self.assertEqual(before, self.places())

    def test_one_that_was_taken_over_all_the_same(self):
        record = self.record(
            'libvirt-storage-rbd', pool='ceph', volume=UUID + '_disk',
            previous=self.record('rbd', 'there'))
        self.assertFalse(record.came_into_ceph)

    def test_name_that_rbd_does_not_know(self):
        self.flags(group='libvirt', images_type='rbd')
        place = ('ceph', UUID + '_disk.1')
        for name in self.LEGACY:
            self.disks.set(name, self.record(
                'libvirt-storage-rbd', pool=place[0], volume=place[1]))
        self.assertFalse(self.take_over())
        self.assertEqual({('libvirt-storage-rbd', *place)},
                         set(self.places().values()))
