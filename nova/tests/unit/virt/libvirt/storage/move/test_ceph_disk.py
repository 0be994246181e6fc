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
"""Disks that become images of a Ceph pool on their way, or were such."""

import os
from unittest import mock

import ddt
from oslo_utils import units

import nova.conf
from nova import exception
from nova.tests.unit.virt.libvirt.storage.move import test_ceph_images
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.move import ceph_disk
from nova.virt.libvirt.storage.move import offer
from nova.virt.libvirt.storage.move import source
from nova.virt.libvirt.storage.records import leftovers

CONF = nova.conf.CONF

POOL, BASES = two_hosts.POOL, two_hosts.BASES
CEPH, OVER_CEPH = test_ceph_images.CEPH, test_ceph_images.OVER_CEPH
COPIED = test_ceph_images.COPIED
MODULE = 'nova.virt.libvirt.storage.move.ceph_disk.'


class ConvertedTestCase(test_ceph_images.CephTestCase):

    def setUp(self):
        super().setUp()
        self.commands, self.fails, self.exit_code = [], None, 0
        self.patience = []
        self.readable, self.stays_silent = True, False
        self.stub_out(MODULE + 'convert.run', self.run_program)
        for name in ('create', 'free_name', 'measure'):
            self.stub_out(MODULE + 'ceph_bytes.' + name,
                          getattr(self, name))
        self.stub_out('os.access', lambda path, mode: self.readable)
        self.stub_out(
            'nova.virt.libvirt.storage.move.guest_files.has_nvram',
            lambda host, instance: False)
        self.stub_out('nova.virt.libvirt.storage.pool.usage.measure',
                      lambda pool: (1, 1 << 40, self.source.available))

    def settle(self):
        """What a hard reboot on the destination ends with."""
        self.instance.vm_state = 'error'
        self.disks = self.load()
        self.disks.mark('ready')    # Swap is made anew.
        source.settle(self.context, self.instance, self.disks)

    # What librbd and qemu-img do

    def create(self, pool, name, size, timeout):
        pool.daemon.did('create', name)
        if name in pool.volumes_by_name:
            raise exception.StorageVolumeExists(
                volume=name, pool=pool.name, host=pool.host)
        pool.volumes_by_name[name] = {'length': size, 'allocation': 0}

    @staticmethod
    def free_name(pool, wanted, taken, timeout):
        return pool.free_name(wanted, taken)

    @staticmethod
    def measure(image, timeout):
        return image.content['length'], image.content['allocation']

    def at(self, path):
        """What is at a path, or at what qemu-img calls an image."""
        name = os.path.basename(path.partition(':')[0])
        for volumes in self.source.pools.values():
            if name in volumes:
                return volumes[name]
        self.fail('nothing is at ' + path)

    def run_program(self, command, watch, names, good=(0,), least=0):
        self.commands.append(command)
        self.patience.append(watch['stall_timeout'])
        source, target = map(self.at, command[-2:])
        if self.fails and command[1] == self.fails:
            self.answers = not self.stays_silent
            raise exception.StorageTransferError(
                reason='no room', transferred=0, **names)
        if command[1] == 'convert':
            target.update(content=source['content'],
                          allocation=source['allocation'])
            return 0
        self.assertIn(self.exit_code, good)
        return self.exit_code


@ddt.ddt
class IntoCephTestCase(ConvertedTestCase):

    def setUp(self):
        super().setUp()
        self.put_on_ceph()

    def test_whole_move(self):
        self.move()
        self.assertEqual(COPIED, self.images())
        self.assertEqual([], self.copies)
        for name in COPIED:
            record = self.load().get(name)
            self.assertEqual(
                ('building', 'dest', 'libvirt-storage-rbd', 'raw', POOL),
                (record.state, record.host, record.backend, record.format,
                 record.pool))
            self.assertEqual(
                ('ready', 'source', 'libvirt-storage'),
                (record.previous.state, record.previous.host,
                 record.previous.backend))
        self.accept()
        self.assertEqual({'ready'}, {
            self.load().get(name).state for name in COPIED})
        self.assertEqual(['disk', 'disk.config', 'disk.eph0', 'disk.swap'],
                         self.ours(self.source))
        source.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.ours(self.source))
        self.assertEqual(COPIED, self.images())
        self.assertEqual([], self.load().leftovers)

    def test_nothing_is_tried_for_ever(self):
        """As librbd's cache would, with a guest off."""
        self.move()
        for command in self.commands:
            if command[1] == 'convert':
                self.assertEqual('none', command[command.index('-t') + 1])

    def test_swap_is_made_anew_there(self):
        self.move()
        record = self.load().get('disk.swap')
        self.assertEqual(('building', 'libvirt-storage-rbd', 'raw'),
                         (record.state, record.backend, record.format))
        self.assertNotIn('disk.swap', self.images())

    def test_qcow2(self):
        """Its base image comes with it, and it is raw afterwards."""
        self.lay_over('disk', 'base')
        self.stub_out('nova.virt.libvirt.storage.image_cache.checked_base',
                      lambda path: path)
        base = os.path.join(CONF.instances_path, '_base', 'base')
        os.mkdir(os.path.dirname(base))
        with open(base, 'wb') as f:
            f.write(b'base')
        self.move()
        convert = next(command for command in self.commands
                       if command[-2].endswith(self.volume_name('disk')))
        self.assertIn('qcow2', convert)
        record = self.load().get('disk')
        self.assertEqual(('raw', 'qcow2'),
                         (record.format, record.previous.format))
        self.assertEqual([], self.flattened)

    def test_ceph_is_waited_for_so_long(self):
        self.flags(storage_migration_stall_timeout=33, group='libvirt')
        self.move()
        for command in self.commands:
            self.assertIn(':rados_osd_op_timeout=33', command[-1])
        self.assertEqual({33}, set(self.patience))

    def test_bandwidth_is_that_of_all_disks(self):
        """And as long as the last of what was read is written, it waits."""
        self.flags(storage_migration_bandwidth=4,
                   storage_migration_parallel_disks=2,
                   storage_migration_stall_timeout=33, group='libvirt')
        self.move()
        self.assertEqual(['%d' % (2 * units.Mi)] * 3, [
            command[command.index('-r') + 1] for command in self.commands
            if command[1] == 'convert'])
        self.assertEqual([33 + 8, 33] * 3, self.patience)

    def test_name_is_taken(self):
        """What has it is never touched."""
        kept = {'length': 1, 'allocation': 0, 'content': 'kept'}
        self.dest.pools[POOL][self.volume_name('disk')] = kept
        self.move()
        self.assertEqual(self.volume_name('disk.1'),
                         self.load().get('disk').volume)
        self.assertEqual('kept', kept['content'])

    @ddt.data('convert', 'compare')
    def test_failure(self, what):
        self.fails = what
        error = self.assertRaises(exception.StorageTransferError, self.move)
        self.assertIn('failed on the destination', str(error))
        self.assertEqual([], self.images())
        self.assert_stayed()
        self.nothing_of_a_move()
        # libvirt there would call them gone.
        self.assertEqual([], self.dest.log)

    def test_content_differs(self):
        self.exit_code = 1
        self.assertRaises(exception.StorageTransferMismatch, self.move)
        self.assertEqual([], self.images())
        self.assert_stayed()

    def test_ceph_is_silent_in_the_end_too(self):
        """The destination deletes what is left, when it can."""
        self.fails, self.stays_silent = 'convert', True
        self.assertRaises(exception.StorageTransferError, self.move)
        self.assert_stayed()
        self.assertEqual(
            {(POOL, self.volume_name(name)) for name in self.images()},
            set(self.left('dest')))
        self.assertEqual([], self.dest.log)
        self.answers, self.fails = True, None
        self.offered()
        self.assertEqual([], self.images())

    def refused_with(self, *parts):
        text = self.refused()
        for part in ('choose a host with the same Ceph pool', 'no Ceph pool',
                     CEPH, *parts):
            self.assertIn(part, text)
        self.assertEqual([], self.commands)

    def test_no_pool_here(self):
        self.source.ceph[OVER_CEPH] = 'other/nova'
        self.refused_with('no active storage pool over cluster/nova')

    def test_pool_here_is_off(self):
        self.source.inactive.add(OVER_CEPH)
        self.refused_with('no active storage pool over cluster/nova')

    def test_unreadable(self):
        self.readable = False
        self.refused_with("nova can't read /disks/")

    def test_unfinished(self):
        record = self.disks.get('disk')
        record.state = 'building'
        self.disks.set('disk', record)
        self.disks.save(self.context)
        e = self.assertRaises(exception.InstanceFaultRollback,
                              self.outgoing().check)
        self.assertIn('hard reboot', str(e))

    def test_same_host(self):
        self.migration.dest_compute = 'source'
        outgoing = self.outgoing(same_host=True)
        e = self.assertRaises(exception.InstanceFaultRollback,
                              outgoing.check)
        self.assertIn('On one host', str(e))

    def test_nothing_may_be_made_there(self):
        """Its user may look alone: found out while the guest runs."""
        def may_not(pool, name, size, timeout):
            raise exception.StorageCephError(
                pool=pool.name, host='source', code=1,
                reason='[errno 1] RBD permission error')

        self.stub_out(MODULE + 'ceph_bytes.create', may_not)
        text = self.refused()
        for part in ('Check that Ceph answers host source', OVER_CEPH,
                     'permission error'):
            self.assertIn(part, text)

    def test_what_was_made_to_find_out_is_gone(self):
        self.checked_items()
        self.assertEqual(1, len(self.tried))
        self.assertEqual([], self.images())

    def test_no_room(self):
        told = offer.load(self.instance)
        object.__setattr__(told.pools[POOL], 'free', 10)
        offer.save(self.instance, told)
        self.assertIn('make room', self.refused())

    def test_streams(self):
        """Of the pools that are offered Ceph's takes none."""
        self.assertNotIn(POOL, offer.load(self.instance).streamed_to)
        self.assertIn(BASES, offer.load(self.instance).streamed_to)

    def test_nothing_goes_ahead(self):
        self.assertEqual({False}, {
            item.is_streamed for item in self.checked_items()
            if item.source})

    def checked_items(self):
        outgoing = self.outgoing()
        outgoing.check()
        with outgoing:
            return outgoing.departure.items


class BetweenCephPoolsTestCase(ConvertedTestCase):
    """Both hosts call their pool the same, and it isn't."""

    HERE = 'cluster/volumes'

    def setUp(self):
        super().setUp()
        self.source.types[POOL], self.source.ceph[POOL] = 'rbd', self.HERE
        for name, record in self.disks.items():
            record.backend = 'libvirt-storage-rbd'
            self.disks.set(name, record)
        self.disks.save(self.context)
        self.put_on_ceph()
        self.before = self.ours(self.source)

    def assert_stayed(self):
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual({None}, {
            record.previous for _name, record in self.load().items()})
        self.assertEqual(self.before, self.ours(self.source))

    def test_whole_move(self):
        self.move()
        self.assertEqual([], self.copies)
        copied = ['disk.1', 'disk.config.1', 'disk.eph0.1']
        self.assertEqual(copied, self.images())
        for command in self.commands:
            for path in command[-2:]:
                self.assertIn(':rados_osd_op_timeout=', path)
        for name in COPIED:
            record = self.load().get(name)
            self.assertEqual(
                ('building', 'dest', POOL, True),
                (record.state, record.host, record.pool,
                 record.came_into_ceph))
        self.accept()
        for name in COPIED:
            record = self.load().get(name)
            self.assertEqual(('ready', True),
                             (record.state, record.came_into_ceph))
        self.assertEqual(self.before, self.ours(self.source))
        source.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.ours(self.source))
        self.assertEqual(copied, self.images())
        self.assertEqual([], self.load().leftovers)

    def test_swap_is_made_anew_there(self):
        self.move()
        record = self.load().get('disk.swap')
        self.assertEqual(
            ('building', self.volume_name('disk.swap.1'), True),
            (record.state, record.volume, record.came_into_ceph))
        self.assertNotIn('disk.swap.1', self.images())

    def test_way_back_has_the_first_names(self):
        for name, record in self.disks.items():
            taken = self.source.pools[POOL].pop(record.volume)
            record.volume = self.volume_name(name + '.1')
            self.source.pools[POOL][record.volume] = taken
            self.disks.set(name, record)
        self.disks.save(self.context)
        self.move()
        self.assertEqual(COPIED, self.images())

    def test_revert(self):
        self.move()
        self.accept()
        self.assertTrue(self.give_back())
        self.assertEqual([], self.images())
        self.assert_stayed()

    def test_failure(self):
        self.fails = 'compare'
        self.assertRaises(exception.StorageTransferError, self.move)
        self.assertEqual([], self.images())
        self.assert_stayed()
        self.nothing_of_a_move()
        self.assertEqual([], self.dest.log)

    def test_source_was_killed(self):
        self.move()
        source.abandon(self.context, self.host, self.instance,
                       self.migration, self.load())
        self.assertEqual([], self.images())
        self.assert_stayed()

    def test_failed_there_and_rebooted(self):
        """The originals are the source's to delete."""
        self.move()
        self.accept()
        self.settle()
        self.assertEqual({(POOL, self.volume_name(name))
                          for name in self.before}, set(self.left('source')))
        leftovers.delete(self.source, self.disks)
        self.assertEqual([], self.ours(self.source))
        self.assertEqual(3, len(self.images()))

    def refused_with(self, *parts):
        text = self.refused()
        for part in ('choose a host with the same Ceph pool', self.HERE,
                     POOL, *parts):
            self.assertIn(part, text)
        self.assertEqual([], self.commands)

    def test_no_pool_here(self):
        self.source.ceph[OVER_CEPH] = 'other/nova'
        self.refused_with(CEPH, 'no active storage pool over cluster/nova')

    def test_one_pool_of_two_names(self):
        """No copy is made of what both hosts see."""
        self.source.ceph[POOL] = self.HERE = CEPH
        self.source.types['renamed'], self.source.ceph['renamed'] = (
            'rbd', CEPH)
        self.source.pools['renamed'] = self.source.pools[POOL]
        for name, record in self.disks.items():
            record.pool = 'renamed'
            self.disks.set(name, record)
        self.disks.save(self.context)
        self.saves.clear()
        self.refused_with('renamed', 'No disk moves within')

    def test_silent(self):
        self.fails, self.stays_silent = 'convert', True
        self.assertRaises(exception.StorageTransferError, self.move)
        self.assert_stayed()
        self.answers, self.fails = True, None
        self.offered()
        self.assertEqual([], self.images())


class OutOfCephTestCase(ConvertedTestCase):

    def setUp(self):
        super().setUp()
        self.source.types[POOL], self.source.ceph[POOL] = 'rbd', CEPH
        for name, record in self.disks.items():
            record.backend = 'libvirt-storage-rbd'
            self.disks.set(name, record)
        self.disks.save(self.context)
        self.offered()

    def spooled(self):
        return sorted(self.source.pools[BASES])

    def test_whole_move(self):
        self.move()
        self.assertEqual(COPIED, self.ours(self.dest))
        # By way of files of this host, which are gone.
        self.assertEqual({BASES}, {copy[0].pool for copy in self.copies})
        self.assertEqual([], self.spooled())
        self.assertEqual([], self.left('source'))
        self.accept()
        for name in COPIED:
            record = self.load().get(name)
            self.assertEqual(
                ('ready', 'dest', 'libvirt-storage', 'raw'),
                (record.state, record.host, record.backend, record.format))
            self.assertTrue(record.previous.is_on_ceph)
        self.assertEqual(4, len(self.ours(self.source)))
        source.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.ours(self.source))

    def test_length_that_is_no_multiple_of_a_sector(self):
        disk = mock.Mock(spec=ceph_disk.OutOfCeph, source=mock.sentinel.image)
        with mock.patch.object(ceph_disk.ceph_bytes, 'measure',
                               return_value=(1000, 512)):
            ceph_disk.OutOfCeph.measure(disk)
        # As long as the file that qemu-img makes of it.
        self.assertEqual((1024, 512), (disk.length, disk.allocation))

    def test_failure(self):
        self.fails = 'convert'
        error = self.assertRaises(exception.StorageTransferError, self.move)
        self.assertIn('failed on the source', str(error))
        self.assertEqual([], self.spooled())
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual([], self.load().leftovers)

    def test_failed_there_and_rebooted(self):
        self.move()
        self.accept()
        self.settle()
        self.assertEqual({(POOL, self.volume_name(name))
                          for name in test_move.AT_SOURCE},
                         set(self.left('source')))

    def test_copy_fails(self):
        self.copy_error = exception.StorageTransferError(
            volume='v', side='destination', reason='r', operation='o',
            where='w', transferred=0, length=1)
        self.assertRaises(exception.StorageTransferError, self.move)
        self.assertEqual([], self.spooled())
        self.assertEqual(test_move.AT_SOURCE, self.places())

    def test_no_room_here(self):
        self.source.available = 800
        self.assertIn('out of Ceph', self.refused())

    def test_revert(self):
        self.move()
        self.accept()
        self.assertTrue(self.give_back())
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual(4, len(self.ours(self.source)))

    def test_size_that_is_not_on_record(self):
        """By it the destination judges what it is sent."""
        record = self.disks.get('disk')
        record.size = 0
        self.disks.set('disk', record)
        self.disks.save(self.context)
        self.move()
        self.assertEqual(1024, self.load().get('disk').size)

    def test_room_in_a_volume_group(self):
        """There it takes up its whole length."""
        self.take_volume_groups()
        self.offered()
        self.dest.available = 1699
        self.assertIn('1699 bytes available', self.refused())

    def test_patience_while_a_hole_is_overwritten(self):
        """libvirt is silent for as long as it writes zeroes."""
        self.flags(group='libvirt', storage_migration_stall_timeout=5)
        self.source.pools[POOL][self.volume_name('disk')]['length'] = 1 << 39
        self.dest.available = 4 << 40
        self.take_volume_groups()
        self.offered()
        self.move()
        self.assertEqual(5 + (1 << 39) // (32 << 20), max(
            copy[3]['stall_timeout'] for copy in self.copies))
