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
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import sharing

DISKS = 'nova-disks-pool'


@ddt.ddt
class SharingTestCase(base.PoolsTestCase):
    """This host, and another one."""

    def setUp(self):
        super().setUp()
        self.instance = objects.Instance(uuid=uuids.instance)
        self.here = self.add_pool(DISKS)
        self.other = self.connection()

    def share(self):
        self.other.file_system = self.conn.file_system

    def is_same(self):
        self.add_pool(DISKS, conn=self.other)
        same = sharing.is_same(
            self.pool(DISKS), self.pool(DISKS, self.other), self.instance)
        self.assertEqual([], self.here.listVolumes())
        self.assertEqual({}, self.other.file_system.files)
        return same

    def test_two_connections(self):
        self.assertFalse(self.is_same())

    def test_two_connections_to_one(self):
        self.share()
        self.assertTrue(self.is_same())

    def test_two_connections_other_pool_is_off(self):
        self.add_pool('off', conn=self.other, active=False)
        self.assertRaises(
            exception.StoragePoolInactive, sharing.is_same, self.pool(DISKS),
            self.pool('off', self.other), self.instance)
        self.assertEqual([], self.here.listVolumes())

    def make(self, **kwargs):
        return sharing.make_probes(self.conn, uuids.instance, **kwargs)

    def find(self, probes):
        return sharing.find_probes(self.other, probes)

    @ddt.data('off', 'not mounted')
    def test_probes_that_can_not_be_seen(self, fault):
        """Whoever asks would delete the disks."""
        self.add_pool(DISKS, conn=self.other)
        probes = self.make()
        self.share()
        error = exception.StoragePoolError(
            pool=DISKS, host='here', code=1, reason=fault)
        with mock.patch.object(
                storage_pool.StoragePool,
                'start' if fault == 'off' else 'check_mounted',
                autospec=True, side_effect=error):
            self.assertIs(error, self.assertRaises(
                exception.StoragePoolError, self.find, probes))
            self.assertFalse(self.find([]))
        self.assertTrue(self.find(probes))

    def test_probes(self):
        self.add_pool(DISKS, conn=self.other)
        probes = self.make()
        self.assertEqual([DISKS], [pool for pool, _name in probes])
        self.assertTrue(sharing.is_probe(probes[0][1]))
        self.assertFalse(sharing.is_probe(self.instance.uuid + '_disk'))
        self.assertFalse(self.find(probes))
        self.assertFalse(self.find([]))
        self.assertFalse(self.find(None))  # an old compute service
        self.share()
        self.assertTrue(self.find(probes))
        sharing.remove_probes(self.conn, probes)
        self.assertEqual([], self.here.listVolumes())
        sharing.remove_probes(self.conn, probes)

    def test_pool_that_nova_conf_no_longer_names(self):
        """What would be deleted there may be another host's disk."""
        self.add_volume(self.here, '%s_disk' % uuids.instance)
        self.add_pool('somebodys')
        self.share()
        self.add_pool('other-name', path='/nowhere/pools/' + DISKS,
                      conn=self.other)
        self.flags(group='libvirt', storage_disks_pool='new')
        probes = self.make()
        self.assertEqual([DISKS], [pool for pool, _name in probes])
        self.assertTrue(self.find(probes))

    def test_pool_that_is_off_is_started(self):
        self.here.destroy()
        self.assertEqual([DISKS], [pool for pool, _name in self.make()])

    def test_pool_that_takes_no_volume(self):
        """Then nothing can be told, and nothing may be deleted."""
        self.flags(group='libvirt', storage_pool_mapping={'swap': 'swaps'})
        swaps = self.add_pool('swaps')
        with mock.patch.object(swaps, 'createXML',
                               side_effect=lambda *a: swaps.build(0)):
            self.assertRaises(exception.StorageVolumeError, self.make)
            self.assertEqual([], self.here.listVolumes())
            # Where none is deleted, it is nobody's concern.
            probes = self.make(pool_names={DISKS})
        self.assertEqual([DISKS], [pool for pool, _name in probes])

    def test_only_some_pools(self):
        self.flags(group='libvirt', storage_pool_mapping={'swap': 'swaps'})
        self.add_pool('swaps', active=False)
        self.add_volume(self.add_pool('former'), '%s_disk' % uuids.instance)
        self.assertEqual([DISKS], [
            pool for pool, _name in self.make(pool_names={DISKS})])
        self.assertFalse(self.pool('swaps').is_active())
        self.assertEqual([], self.make(pool_names=set()))


class TakenNameTestCase(SharingTestCase):
    """What another host has made libvirt knows of when it looks again."""

    def test_new_volume(self):
        self.share()
        theirs = self.add_pool(DISKS, conn=self.other)
        self.add_volume(theirs, 'disk')
        pool = self.pool(DISKS)
        create = storage_pool.StoragePool.create

        def looked_at_meanwhile(*args):
            try:
                return create(*args)
            finally:
                # by who has to measure the pool, say
                pool.refresh()

        with mock.patch.object(storage_pool.StoragePool, 'create',
                               looked_at_meanwhile):
            self.assertRaises(exception.StorageVolumeError,
                              state.create_volume, pool, 'disk', 5, (0, 0))
        self.assertEqual(['disk'], theirs.listVolumes())
        self.assertEqual(['disk'], self.here.listVolumes())
        self.assertEqual(1, len(self.conn.file_system.files))
