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
"""Disks in Ceph pools, and moves between hosts that see them, or don't."""

from unittest import mock

import ddt
import fixtures
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova import objects
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.move import ceph_images
from nova.virt.libvirt.storage.move import item
from nova.virt.libvirt.storage.move import offer
from nova.virt.libvirt.storage.move import source
from nova.virt.libvirt.storage.pool import kinds as pool_kinds
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import lifecycle

POOL, BASES = two_hosts.POOL, two_hosts.BASES


@ddt.ddt
class OnCephTestCase(test_move.OutgoingTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.kinds._KINDS',
            {**pool_kinds._KINDS, 'rbd': pool_kinds._KINDS['rbd']._replace(
                holds_disks=True)}))
        self.nvram = False
        self.stub_out(
            'nova.virt.libvirt.storage.move.guest_files.has_nvram',
            lambda host, instance: self.nvram)
        for daemon in (self.source, self.dest):
            self.put_on_ceph(daemon)
        for name, record in self.disks.items():
            record.backend = 'libvirt-storage-rbd'
            self.disks.set(name, record)
        self.disks.save(self.context)
        self.saves.clear()

    @staticmethod
    def put_on_ceph(daemon, ceph='cluster/nova'):
        daemon.types[POOL], daemon.ceph[POOL] = 'rbd', ceph

    def take_off_ceph(self, daemon):
        del daemon.types[POOL], daemon.ceph[POOL]

    def offered(self):
        self.make_offer()
        self.disks = self.load()
        self.saves.clear()

    def test_offer(self):
        self.offered()
        pools = offer.load(self.instance).pools
        self.assertEqual('cluster/nova', pools[POOL].ceph)
        self.assertNotIn('files', pools[POOL].kinds)
        # That pool takes no streams.
        self.assertIn('files', pools[BASES].kinds)
        # An older source doesn't know it.
        told = jsonutils.loads(self.instance.migration_context.driver_info)
        self.assertNotIn('ceph', told['pools'][BASES])

    def test_offer_to_disks_of_images_type_rbd(self):
        for name, record in self.disks.items():
            record.backend, record.pool, record.volume = 'rbd', None, None
            self.disks.set(name, record)
        self.disks.save(self.context)
        self.offered()
        self.assertEqual('cluster/nova', offer.load(
            self.instance).pools[POOL].ceph)

    def test_nothing_travels(self):
        """Not even a connection is made."""
        self.offered()
        self.stub_out('nova.virt.libvirt.storage.move.transport.reach', None)
        before = self.places()
        self.assertEqual([], jsonutils.loads(self.move()))
        self.assertEqual([], self.copies)
        self.assertEqual(before, self.places())
        self.assertEqual([], self.saves)

    def test_ceph_is_silent(self):
        """It isn't waited for; the guest waits for its disk."""
        self.offered()
        asked = []

        def check(names=()):
            asked.extend(names)
            raise exception.StorageCephError(
                pool=POOL, host='source', reason='timed out', code=110)

        self.stub_out('nova.tests.unit.virt.libvirt.storage.move.two_hosts.'
                      'Pool.ceph', lambda pool: mock.Mock(
                          identity='cluster/nova', check=check))
        self.assertIn('Check that Ceph answers host source', self.refused())
        self.assertIn(self.volume_name('disk'), asked)

    def test_firmware_travels(self):
        self.nvram = True
        self.offered()
        outgoing = self.outgoing()
        outgoing.check()
        self.assertIsNotNone(outgoing.departure.peer)
        self.assertEqual([], outgoing.departure.items)
        here, there = outgoing.departure.pool_of_files()
        self.assertEqual((BASES, BASES), (here.name, there.name))
        with outgoing:
            pass

    def test_pools_that_are_streamed_to(self):
        """No peer is asked whether Ceph takes streams: it would refuse."""
        self.offered()
        self.assertEqual([BASES], offer.load(self.instance).streamed_to)

    def test_disk_that_is_made_anew(self):
        """It is what the destination's pool makes of it."""
        record = self.disks.get('disk.swap')
        for kind, backend in (('rbd', 'libvirt-storage-rbd'),
                              ('dir', 'libvirt-storage')):
            there = mock.Mock()
            there.check.return_value = kind
            found = item.RemadeDisk('disk.swap', there, record).new_record()
            self.assertEqual((backend, 'raw'), (found.backend, found.format))

    def test_image_is_gone(self):
        self.offered()
        self.source.pools[POOL].clear()
        self.assertRaises(exception.InstanceFaultRollback,
                          self.outgoing().check)

    def test_one_host(self):
        self.migration.dest_compute = 'source'
        self.flags(host='dest')
        self.offered()
        self.assertEqual([], jsonutils.loads(self.move(same_host=True)))

    def test_other_ceph_pool(self):
        self.put_on_ceph(self.dest, 'cluster/other')
        self.offered()
        text = self.refused()
        for part in ('cluster/nova', 'cluster/other', 'same Ceph pool'):
            self.assertIn(part, text)

    def test_what_the_api_shows(self):
        """Advice and both Ceph pools; a fault's details are cut."""
        here = uuids.cluster + '/nova'
        there = uuids.other_cluster + '/volumes'
        self.put_on_ceph(self.source, here)
        self.put_on_ceph(self.dest, there)
        self.offered()
        text = self.refused()
        shown = text[text.index('Migration pre-check error'):][:200]
        for part in ('same Ceph pool', here, there):
            self.assertIn(part, shown)

    def test_into_ceph(self):
        self.take_off_ceph(self.source)
        for name, record in self.disks.items():
            record.backend = 'libvirt-storage'
            self.disks.set(name, record)
        self.disks.save(self.context)
        self.offered()
        self.assertIn('no Ceph pool', self.refused())

    def test_unfinished(self):
        record = self.disks.get('disk')
        record.state = 'building'
        self.disks.set('disk', record)
        self.disks.save(self.context)
        self.offered()
        e = self.assertRaises(exception.InstanceFaultRollback,
                              self.outgoing().check)
        self.assertIn('hard reboot', str(e))

    def test_confirm(self):
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.load',
            lambda cls, context, instance: self.load())
        images = dict(self.source.pools[POOL])
        self.flags(host='dest')
        lifecycle.arrived(self.disks, [])
        self.disks.save(self.context)
        self.assertEqual('source', self.disks.get('disk').previous.host)
        self.flags(host='source')
        source.confirm(self.context, self.source, self.instance)
        self.assertEqual(
            {('dest', 'ready', None)},
            {(record.host, record.state, record.previous)
             for _name, record in self.load().items()})
        self.assertEqual(images, self.source.pools[POOL])
        self.assertEqual([], self.load().leftovers)

    def came_into_ceph(self):
        """As the destination has left it: the originals are the source's."""
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.load',
            lambda cls, context, instance: self.load())
        self.take_off_ceph(self.source)
        for name, record in self.disks.items():
            before = record.obj_clone()
            before.backend = 'libvirt-storage'
            record.previous, record.host = before, 'dest'
            record.migration_id = 7
            self.disks.set(name, record)
        self.disks.save(self.context)
        self.disks = self.load()

    def test_confirm_of_what_came_into_ceph(self):
        """The originals go, the images stay."""
        self.came_into_ceph()
        images = dict(self.dest.pools[POOL])
        source.confirm(self.context, self.source, self.instance)
        self.assertEqual(
            {('dest', 'libvirt-storage-rbd', None)},
            {(record.host, record.backend, record.previous)
             for _name, record in self.load().items()})
        self.assertEqual({}, self.source.pools[POOL])
        self.assertEqual(images, self.dest.pools[POOL])
        self.assertEqual([], self.load().leftovers)

    @ddt.data((False, {'disk.swap'}), (True, {'disk.local', 'disk.swap'}))
    @ddt.unpack
    def test_made_here_for_a_flavor_that_is_given_up(
            self, has_eph, expected):
        """No disk that was sent by a compute without records, too."""
        self.flags(host='dest')
        record = self.disks.get('disk')
        record.previous, record.host = record.obj_clone(), 'dest'
        self.disks.set('disk', record)
        for name in ('disk.config', 'disk.local', 'disk.swap'):
            made = record.obj_clone()
            made.previous, made.volume = None, self.volume_name(name)
            self.disks.set(name, made)
        self.assertEqual([], ceph_images.made_here(self.disks))
        self.instance.old_flavor = objects.Flavor(
            swap=0, ephemeral_gb=0 if has_eph else 1)
        self.assertEqual(
            {(POOL, self.volume_name(name)) for name in expected},
            set(ceph_images.made_here(self.disks)))

    def test_originals_are_none_of_the_disks(self):
        self.came_into_ceph()
        self.assertEqual(
            {(POOL, self.volume_name(name)) for name, _r in
             self.disks.items()},
            evacuation.old_copies(self.instance, self.disks))
        self.flags(host='dest')
        self.assertEqual(
            set(), evacuation.old_copies(self.instance, self.disks))

    def test_evacuation_of_what_was_copied_out_of_ceph(self):
        """Other hosts see what it was before the move."""
        record = self.disks.get('disk')
        self.assertEqual(set(), lifecycle._originals(self.disks))
        record.previous = record.obj_clone()
        record.backend, record.host = 'libvirt-storage', 'dest'
        self.disks.set('disk', record)
        self.assertEqual(set(), lifecycle._originals(self.disks))
        self.instance.task_state = 'rebuild_spawning'
        self.assertEqual({self.volume_name('disk')},
                         lifecycle._originals(self.disks))

    @ddt.data('rebuild_spawning', 'resize_finish')
    def test_names_of_originals_in_another_ceph_pool(self, task_state):
        """What is made anew gets none of them: by its name it is known."""
        self.instance.task_state = task_state
        record = self.disks.get('disk')
        record.previous = record.obj_clone()
        self.disks.set('disk', record)
        self.assertEqual(set(), lifecycle._originals(self.disks))
        record.volume = self.volume_name('disk.1')
        self.disks.set('disk', record)
        self.assertEqual({self.volume_name('disk')},
                         lifecycle._originals(self.disks))

    @ddt.data((0, 'dest'), (0, 'source'), (1, 'dest'))
    @ddt.unpack
    def test_confirm_when_the_swap_is_gone(self, swap, dest):
        """Whichever host, no record names it; of a swap that is, one does."""
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.load',
            lambda cls, context, instance: self.load())
        self.instance.flavor = objects.Flavor(root_gb=1, swap=swap)
        images = set(self.source.pools[POOL])
        self.flags(host=dest)
        lifecycle.arrived(self.disks, [])
        self.disks.clear('disk.swap')
        self.disks.save(self.context)
        self.flags(host='source')
        source.confirm(self.context, self.source, self.instance)
        lost = set() if swap else {self.volume_name('disk.swap')}
        self.assertEqual(images - lost, set(self.source.pools[POOL]))
        self.assertEqual([], self.load().leftovers)

    def test_revert(self):
        self.flags(host='dest')
        lifecycle.arrived(self.disks, [])
        self.flags(host='source')
        self.instance.flavor = objects.Flavor(root_gb=0)
        lifecycle.went_back(self.disks)
        self.assertEqual(
            {('source', 'ready')},
            {(record.host, record.state)
             for _name, record in self.disks.items()})
