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

from unittest import mock

import ddt
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt.storage.records import keeping
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata

POOL = 'nova-disks-pool'


@ddt.ddt
class KeepingTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.flags(host='here')
        self.flags(storage_migration_keep_copies=2,
                   storage_migration_transport='auto', group='libvirt')
        self.disks = metadata.InstanceDisks.from_bdms(
            objects.Instance(uuid=uuids.instance), [
                objects.BlockDeviceMapping(
                    id=1, uuid=uuids.bdm, instance_uuid=uuids.instance,
                    source_type='image', destination_type='local',
                    boot_index=0, driver_info=None)])
        for name in ('disk', 'disk.config', 'disk.swap'):
            self.disks.set(name, metadata.LibvirtDiskMetadata(
                backend='libvirt-storage', format='qcow2', size=10,
                state='ready', host='there', pool=POOL,
                volume=self.name(name)))
        self.config = mock.Mock(type='dir', target_path='/disks')
        pool = mock.Mock()
        pool.config.side_effect = lambda: self.config
        self.stub_out('nova.virt.libvirt.storage.pool.pool.StoragePool',
                      lambda connection, name, host: pool)
        self.is_local = mock.Mock(return_value=True)
        self.stub_out('nova.virt.libvirt.storage.pool.mounts.is_local',
                      self.is_local)
        self.stub_out('nova.virt.libvirt.utils.get_fs_info',
                      lambda path: {'free': 20})

    @staticmethod
    def name(disk):
        return '%s_%s' % (uuids.instance, disk)

    def copy_of(self, disk, pool=POOL):
        return keeping.copy_of(self.disks, 'there', pool, disk)

    @ddt.data('disk', 'disk.1', 'disk.12')
    def test_named_after_a_disk(self, volume):
        leftovers.note(self.disks, 'there', [(POOL, self.name(volume))])
        self.assertEqual(self.name(volume), self.copy_of('disk'))
        self.assertIsNone(self.copy_of('disk.config'))
        self.assertIsNone(self.copy_of('disk', pool='other'))

    @ddt.data('disk.x', 'disk.1.1', 'disk1', 'disk.', 'disk.config', 'files',
              'disk.swap', 'disk.eph0')
    def test_named_otherwise(self, volume):
        leftovers.note(self.disks, 'there', [
            (POOL, self.name(volume)),
            (POOL, 'x' + self.name('disk')),
            (POOL, '%s_disk' % uuids.other)])
        self.assertIsNone(self.copy_of('disk'))

    def test_disk_that_is_made_anew(self):
        leftovers.note(self.disks, 'there', [(POOL, self.name('disk.swap'))])
        self.assertIsNone(self.copy_of('disk.swap'))

    @ddt.data({'storage_migration_keep_copies': 0},
              {'storage_migration_transport': 'libvirt'})
    def test_off(self, options):
        self.flags(group='libvirt', **options)
        leftovers.note(self.disks, 'there', [(POOL, self.name('disk'))])
        self.assertIsNone(self.copy_of('disk'))
        self.assertFalse(keeping.is_possible(None, POOL))

    def staying(self, **kwargs):
        return keeping.staying(mock.sentinel.connection, self.disks, **kwargs)

    def test_staying(self):
        place = (POOL, self.name('disk'))
        leftovers.note(self.disks, 'here', [
            place, (POOL, self.name('files'))])
        self.assertEqual({place}, self.staying())
        # 20 bytes are free for two disks of 10
        self.assertEqual({place}, self.staying(for_move=True))
        record = self.disks.get('disk')
        record.size = 11
        self.disks.set('disk', record)
        self.assertEqual({place}, self.staying())
        self.assertEqual(set(), self.staying(for_move=True))

    def test_staying_beside_the_disks(self):
        leftovers.note(self.disks, 'here', [(POOL, self.name('disk'))])
        record = self.disks.get('disk.config')
        record.host = 'here'
        self.disks.set('disk.config', record)
        self.assertEqual(set(), self.staying())

    @ddt.data('logical', 'rbd', exception.StoragePoolNotFound(
        pool=POOL, host='here', code=49, reason='gone'), OSError())
    def test_pools_where_nothing_is_kept(self, found):
        if isinstance(found, str):
            self.config.type = found
        elif isinstance(found, OSError):
            self.is_local.side_effect = found
        else:
            self.stub_out('nova.virt.libvirt.storage.pool.pool.StoragePool',
                          mock.Mock(return_value=mock.Mock(
                              config=mock.Mock(side_effect=found))))
        self.assertFalse(keeping.is_possible(None, POOL))

    def test_given_back(self):
        for name, host in (('disk', 'there'), ('disk.config', 'here')):
            record = self.disks.get(name)
            record.previous = record.obj_clone()
            record.host, record.previous.host = 'here', host
            self.disks.set(name, record)
        # What was on this host before needs no copy.
        self.assertEqual({(POOL, self.name('disk'))}, keeping.given_back(
            mock.sentinel.connection, self.disks))
