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

import os
import threading
import time
from unittest import mock

import ddt
import fixtures
import futurist
import oslo_messaging as messaging
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units
import tenacity

from nova.compute import task_states
import nova.conf
from nova import exception
from nova import objects
from nova.objects import fields
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.move import cancel
from nova.virt.libvirt.storage.move import destination as arrival
from nova.virt.libvirt.storage.move import guest_files as files
from nova.virt.libvirt.storage.move import offer
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import source as migration
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.records import kinds
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import lifecycle
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF

POOL = two_hosts.POOL
AT_SOURCE = {name: ('ready', 'source', name, None)
             for name in ('disk', 'disk.config', 'disk.eph0', 'disk.swap')}
ON_THE_WAY = {name: ('building', 'dest', name, 'source')
              for name in AT_SOURCE}
COPIED = ['disk', 'disk.config', 'disk.eph0']


class OutgoingTestCase(two_hosts.TwoHostsTestCase):
    def take_volume_groups(self):
        self.dest.types[POOL] = 'logical'

    def setUp(self):
        super().setUp()
        self.jobs = mock.Mock()
        self.cache_base = mock.Mock()
        self.version = 76
        self.stub_out(
            'nova.objects.Service.get_by_host_and_binary',
            lambda *args: mock.Mock(version=self.version))

    def outgoing(self, same_host=False):
        self.assertEqual(same_host, self.migration.dest_compute == 'source')
        return migration.Outgoing(state.Move(
            self.context, state.ThisHost(
                self.host, 'qemu:///system', '192.0.2.1', self.jobs),
            self.instance, self.migration, self.disks))

    def move(self, same_host=False):
        outgoing = self.outgoing(same_host)
        outgoing.check()
        with outgoing:
            return outgoing.run(self.directory)

    def nothing_of_a_move(self):
        disks = self.load()
        self.assertEqual([], disks.leftovers)
        self.assertEqual({}, disks.extras)
        self.assertEqual({None}, {r.migration_id for _n, r in disks.items()})
        self.assertEqual({None}, {r.expected for _n, r in disks.items()})
        self.assertEqual({}, self.instance.system_metadata)

    def only_swap_is_kept(self):
        """What waits for confirm or revert beside the disks."""
        disks = self.load()
        self.assertEqual({'disk.swap'}, set(disks.extras))
        self.assertEqual([], disks.leftovers)
        self.assertEqual({None}, {r.expected for _n, r in disks.items()})
        self.assertEqual({}, self.instance.system_metadata)

    def delete_left(self):
        disks = self.load()
        leftovers.delete(self.source, disks)
        disks.save(self.context)

    def not_confirmed(self):
        """A resize on one host that failed at its end; the server runs on."""
        self.migration.dest_compute = 'source'
        self.move(same_host=True)
        arrival.accept(self.context, self.instance, self.load(), self.source,
                       'qemu:///system', self.cache_base)
        disks = self.load()
        disks.mark('ready')
        disks.save(self.context)
        self.saves.clear()
        self.migration = objects.Migration(
            self.context, id=8, source_compute='source', dest_compute='dest',
            dest_host='192.0.2.2')

    def refused(self):
        """Check that the check refuses and leaves everything as it is."""
        before = [sorted(self.source.pools[POOL]),
                  sorted(self.dest.pools.get(POOL, ()))]
        e = self.assertRaises(exception.InstanceFaultRollback,
                              self.outgoing().check)
        self.assertEqual(before, [sorted(self.source.pools[POOL]),
                                  sorted(self.dest.pools.get(POOL, ()))])
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual([], self.saves)
        self.assertEqual([], self.copies)
        return str(e)


@ddt.ddt
class CheckTestCase(OutgoingTestCase):
    def setUp(self):
        super().setUp()
        self.make_offer()

    def test_leaves_the_connection_open_until_the_end(self):
        outgoing = self.outgoing()
        outgoing.check()
        self.assertEqual(['qemu+tls://192.0.2.2/system'], self.host.uris)
        self.assertEqual((5, 3), self.dest.keepalive)
        self.assertFalse(self.dest.closed)
        with outgoing:
            pass
        self.assertTrue(self.dest.closed)

    def test_connection_is_closed_when_refused(self):
        self.dest.inactive.add(POOL)
        self.refused()
        self.assertTrue(self.dest.closed)

    def test_old_destination(self):
        self.version = 75
        self.assertIn('too old', self.refused())
        self.assertEqual([], self.host.uris)

    def test_no_offer(self):
        self.instance.migration_context.driver_info = None
        self.assertIn('no offer', self.refused())

    def test_offer_of_an_earlier_migration(self):
        self.migration.id = 8
        self.assertIn('no offer', self.refused())

    def test_kind_of_disk_that_wasnt_offered(self):
        offer.save(self.instance, offer.Offer(7, [1, 2], {
            POOL: offer.OfferedPool(['disk', 'disk.eph', 'files'], None, 0)}))
        self.assertIn('disk.config', self.refused())

    def test_peer_refuses(self):
        self.host.peer = ValueError('Unable to read TLS confirmation')
        text = self.refused()
        for part in ('qemu+tls://192.0.2.2/system', 'TLS confirmation',
                     'certificate', 'log'):
            self.assertIn(part, text)

    def test_peer_doesnt_answer(self):
        self.stub_out('nova.virt.libvirt.storage.'
                      'move.peer._CONNECT_TIMEOUT', 0.1)
        answer = threading.Event()
        self.addCleanup(answer.set)
        attempts = []

        def connect(uri):
            attempts.append(uri)
            answer.wait()
            return self.dest

        self.host.connect_to_peer = connect
        for _n in range(4):
            self.assertIn('no answer', self.refused())
        # No thread is given to a fifth one.
        self.assertIn('still unanswered', self.refused())
        self.assertEqual(4, len(attempts))
        # Nobody waits for them any longer, so they are closed.
        answer.set()
        for _n in range(1000):
            if self.dest.closed and not peer._hanging.total():
                break
            time.sleep(0.01)
        self.assertTrue(self.dest.closed)
        with self.outgoing() as outgoing:
            outgoing.check()
        self.assertEqual(5, len(attempts))

    def test_peer_goes_at_once(self):
        self.dest.setKeepAlive = mock.Mock(side_effect=ValueError('reset'))
        self.assertIn('reset', self.refused())
        self.assertTrue(self.dest.closed)

    def test_unexpected_error(self):
        self.stub_out('nova.virt.images.get_info', mock.Mock(
            side_effect=ValueError('no Keystone')))
        self.lay_over('disk', imagecache.get_cache_fname(uuids.image))
        self.assertIn('no Keystone', self.refused())

    @ddt.data('192.0.2.2/system?pkipath=/tmp', 'a b', '', 'x' * 254, 'h\n',
              '-a', 'a@b', '[::1', 'ssh+x://a', 'a%b', '..', 'a:1')
    def test_address_that_is_none(self, address):
        self.migration.dest_host = address
        self.assertIn('neither an IP address', self.refused())
        self.assertEqual([], self.host.uris)

    @ddt.data(('compute-2.example.org', 'compute-2.example.org'),
              ('2001:db8::2', '[2001:db8::2]'), ('198.51.100.7',) * 2)
    @ddt.unpack
    def test_address(self, address, in_uri):
        self.migration.dest_host = address
        with self.outgoing() as outgoing:
            outgoing.check()
        self.assertEqual(['qemu+tls://%s/system' % in_uri], self.host.uris)

    def test_pool_inactive(self):
        self.dest.inactive.add(POOL)
        text = self.refused()
        self.assertIn('inactive', text)
        self.assertIn('host dest', text)

    def test_pool_gone(self):
        del self.dest.pools[POOL]
        self.assertIn("doesn't exist", self.refused())

    @ddt.data('disk')
    def test_pool_of_a_type_that_holds_no_disks(self, pool_type):
        self.dest.types[POOL] = pool_type
        text = self.refused()
        self.assertIn('is of type %s' % pool_type, text)
        self.assertIn('dir, fs, netfs, logical, rbd in nova.conf', text)
        self.assertEqual([], self.dest.log)

    def test_too_little_room_counts_what_is_allocated(self):
        # half of 1000, 600 and 100 bytes; swap doesn't travel
        self.dest.available = 849
        text = self.refused()
        self.assertIn('849 bytes available and 850', text)
        self.assertEqual(1, self.dest.refreshes)

    def test_room_that_libvirt_does_not_know_is_taken(self):
        self.free['/dest/' + POOL] = 849
        self.make_offer()
        self.assertIn('849 bytes available and 850', self.refused())

    def test_room_of_two_pools_in_one_file_system(self):
        self.lay_over('disk', imagecache.get_cache_fname(uuids.image), 500)
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        for pool in (POOL, two_hosts.BASES):
            self.devices['/dest/' + pool] = 5
        self.make_offer()
        # each of them fits in, at 850 and 500 bytes
        self.dest.available = 1349
        text = self.refused()
        self.assertIn('1349 bytes available and 1350', text)
        self.assertIn('%s, %s' % (two_hosts.BASES, POOL), text)

    def test_room_of_what_the_destination_fetches(self):
        name = imagecache.get_cache_fname(uuids.image)
        self.lay_over('disk', name, 500)
        for pool in (POOL, two_hosts.BASES):
            self.devices['/dest/' + pool] = 5
        self.make_offer()
        self.dest.available = 1349
        text = self.refused()
        self.assertIn('1349 bytes available and 1350', text)
        self.assertIn('%s, %s' % (two_hosts.BASES, POOL), text)
        # It has it already.
        self.dest.pools[two_hosts.BASES][name] = {}
        with self.outgoing() as outgoing:
            outgoing.check()

    @ddt.data('source', 'dest')
    def test_room_of_what_the_destination_fetches_is_not_known(self, host):
        # It needs no pool to fetch an image.
        self.lay_over('disk', imagecache.get_cache_fname(uuids.image), 500)
        getattr(self, host).inactive.add(two_hosts.BASES)
        self.dest.available = 850
        with self.outgoing() as outgoing:
            outgoing.check()

    def test_room_that_libvirt_alone_knows(self):
        self.free['/dest/' + POOL] = OSError('no such directory')
        self.make_offer()
        self.dest.available = 849
        self.assertIn('849 bytes available and 850', self.refused())

    def test_just_enough_room(self):
        self.dest.available = 850
        with self.outgoing() as outgoing:
            outgoing.check()
        self.assertEqual(0, self.dest.refreshes)

    def test_room_in_a_volume_group_is_the_whole_length(self):
        # that of swap, too, though it is made anew: 1000 + 600 + 400 + 100
        self.take_volume_groups()
        self.dest.available = 2099
        self.assertIn('2099 bytes available and 2100', self.refused())

    def test_room_in_a_volume_group_for_the_new_flavor(self):
        """When the disks have come it would be too late."""
        self.take_volume_groups()
        self.instance.new_flavor = objects.Flavor(root_gb=1, ephemeral_gb=0)
        self.dest.available = units.Gi + 1099
        self.assertIn('and %d are needed' % (units.Gi + 1100), self.refused())
        self.dest.available += 1
        with self.outgoing() as outgoing:
            outgoing.check()

    def test_volume_group_takes_no_qcow2(self):
        """As bytes it would go there, and could never grow."""
        self.take_volume_groups()
        self.lay_over('disk', imagecache.get_cache_fname(uuids.image), 300)
        text = self.refused()
        self.assertIn('choose another host: disk disk is of format qcow2',
                      text)
        self.assertIn('%s of host dest' % POOL, text)
        self.assertEqual([], self.dest.log)

    def test_room_where_the_destination_reserves_it(self):
        # swap, which is made anew, counts: 1000 + 600 + 400 + 100
        self.flags(preallocate_images='space')
        self.make_offer()
        self.dest.available = 2099
        self.assertIn('2099 bytes available and 2100', self.refused())

    @ddt.data(('raw', 300), ('qcow2', 500))
    @ddt.unpack
    def test_room_of_what_is_flattened(self, base_format, growth):
        # What is compressed in the base image isn't any more afterwards.
        self.lay_over('disk', 'snapshot', 300, length=500)
        self.source.pools[POOL][self.volume_name('disk')]['base_format'] = (
            base_format)
        self.dest.available = 849 + growth
        self.assertIn('%d bytes available and %d' % (
            849 + growth, 850 + growth), self.refused())
        self.dest.available += 1
        with self.outgoing() as outgoing:
            outgoing.check()

    def test_no_room_to_flatten(self):
        self.lay_over('disk', 'snapshot', 200)
        self.lay_over('disk.eph0', 'ephemeral_1', 100)
        self.source.available = 299
        text = self.refused()
        self.assertIn('host source has 299 bytes available and 300', text)
        self.assertIn(POOL, text)
        self.source.available = 300
        with self.outgoing() as outgoing:
            outgoing.check()

    def test_no_room_to_flatten_in_pools_of_one_file_system(self):
        departure = self.outgoing().departure
        for name in ('fast', 'slow'):
            pool = mock.Mock()
            pool.name = name
            departure.items.append(
                mock.Mock(growth=200, source=mock.Mock(pool=pool)))
        with mock.patch('nova.virt.libvirt.storage.pool.usage.measure',
                        return_value=(1, 1000, 399)):
            e = self.assertRaises(exception.InstanceFaultRollback,
                                  departure._check_room_here)
        self.assertIn('fast, slow of host source has 399 bytes available and '
                      '400', str(e))
        with mock.patch('nova.virt.libvirt.storage.pool.usage.measure',
                        side_effect=[(1, 1000, 200), (2, 1000, 200)]):
            departure._check_room_here()

    def test_room_to_flatten_and_copy_in_one_pool(self):
        self.lay_over('disk', 'snapshot', 300)
        self.dest.pools = self.source.pools
        self.dest.available = 850 + 2 * 300 - 1
        self.assertIn('and %d are' % (850 + 2 * 300), self.refused())

    def test_base_image_is_gone(self):
        self.lay_over('disk', 'snapshot')
        del self.source.pools[two_hosts.BASES]['snapshot']
        self.assertIn('snapshot', self.refused())

    def test_base_image_that_libvirt_does_not_know_yet(self):
        # It says what it saw when it last looked.
        self.lay_over('disk', imagecache.get_cache_fname(uuids.image))
        config = mock.Mock(backing_store=mock.Mock(path='/there/_base/old'))
        with mock.patch.object(two_hosts.Volume, 'config',
                               return_value=config), (
                self.outgoing()) as outgoing:
            outgoing.check()

    @ddt.data({'state': 'building'}, {'host': 'other'}, {'backend': 'flat'})
    def test_disk_that_isnt_in_order(self, change):
        record = self.disks.get('disk.eph0')
        for name, value in change.items():
            setattr(record, name, value)
        e = self.assertRaises(exception.InstanceFaultRollback,
                              self.outgoing().check)
        self.assertIn('disk.eph0', str(e))

    def is_ploop(self, *names):
        """Which disks have such a header; those that were looked at."""
        self.seen = []

        def is_ploop(path):
            self.seen.append(path.rpartition('_')[2])
            return self.seen[-1] in names

        self.stub_out('nova.virt.libvirt.storage.content.is_ploop', is_ploop)

    def test_disk_with_a_ploop_header(self):
        self.is_ploop('disk.eph0')
        self.assertIn('ploop', self.refused())

    def test_ploop_header_of_a_disk_that_nova_reads_itself(self):
        self.is_ploop('disk.eph0')
        with mock.patch('os.access', return_value=True):
            self.outgoing().check()

    def test_ploop_header_where_a_guest_writes_none(self):
        self.disks.get('disk').format = 'qcow2'
        self.is_ploop('disk')
        self.outgoing().check()
        self.assertEqual({'disk.eph0', 'disk.config'}, set(self.seen))

    def test_libvirt_is_asked_about_no_raw_disk(self):
        # It would open what the guest has named in the header.
        self.is_ploop()
        with mock.patch.object(two_hosts.Volume, 'info',
                               side_effect=AssertionError), \
                mock.patch.object(two_hosts.Volume, 'config',
                                  side_effect=AssertionError):
            self.outgoing().check()

    def test_overlay_over_something_foreign(self):
        self.disks.get('disk').format = 'qcow2'
        self.source.pools[POOL][self.volume_name('disk')]['base'] = (
            '/etc/shadow')
        e = self.assertRaises(exception.InstanceFaultRollback,
                              self.outgoing().check)
        self.assertIn('/etc/shadow', str(e))

    def probe(self):
        with self.outgoing() as outgoing:
            outgoing.check()
        for daemon in (self.source, self.dest):
            self.assertEqual([], [name for name in daemon.pools[POOL]
                                  if 'probe' in name])
        return outgoing.departure._shared[POOL, POOL]

    def test_probe_of_distinct_pools(self):
        self.assertFalse(self.probe())
        # one probe, though four disks are in that pool
        self.assertEqual(2, len(self.source.log))

    def test_probe_of_a_shared_pool(self):
        self.dest.pools = self.source.pools
        self.assertTrue(self.probe())

    def test_probe_that_the_destination_refuses_for_another_reason(self):
        self.dest.fail['create'] = exception.InternalError('read-only')
        self.assertIn('read-only', self.refused())


class PrepareTestCase(OutgoingTestCase):
    def prepare(self):
        here = state.ThisHost(
            self.host, 'qemu:///system', '192.0.2.1', self.jobs)
        self.instance.migration_context.migration_id = self.migration.id
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.'
            'from_block_device_info',
            classmethod(lambda cls, instance, info: self.load()))
        with mock.patch('nova.objects.Migration.get_by_id_and_instance',
                        return_value=self.migration) as get:
            outgoing = migration.prepare(
                here, self.context, self.instance, None)
        if outgoing is not None:
            get.assert_called_once_with(
                self.context, self.migration.id, uuids.instance)
        return outgoing

    def test_prepare(self):
        self.make_offer()
        with self.prepare() as outgoing:
            self.assertEqual(4, len(outgoing.departure.items))
            self.assertEqual('192.0.2.1', outgoing.departure.move.here.address)
        self.assertEqual(AT_SOURCE, self.places())

    def test_disks_outside_of_pools(self):
        for name, record in self.disks.items():
            record.backend = fields.LibvirtDiskBackend.FLAT
            self.disks.set(name, record)
        self.disks.save(self.context)
        self.assertIsNone(self.prepare())

    def test_what_an_earlier_migration_has_left(self):
        self.make_offer()
        self.not_confirmed()
        self.instance.vm_state = 'active'
        self.make_offer()
        with self.prepare():
            pass
        self.assertEqual({None}, {p[3] for p in self.places().values()})
        self.assertEqual(4, len(self.left('source')))


@ddt.ddt
class RunTestCase(OutgoingTestCase):
    def setUp(self):
        super().setUp()
        self.make_offer()

    def test_moves(self):
        self.assertEqual('[]', self.move())
        self.assertEqual(ON_THE_WAY, self.places())
        self.assertEqual(COPIED, self.ours(self.dest))
        for name in COPIED:
            self.assertEqual(
                'content of ' + name, self.dest.pools[POOL][
                    self.volume_name(name)]['content'])
        # the source still has all of it
        self.assertEqual(sorted(AT_SOURCE), self.ours(self.source))
        self.assertEqual(100, self.instance.progress)
        self.assertEqual((1700, 1700, 0), (self.migration.disk_total,
                                           self.migration.disk_processed,
                                           self.migration.disk_remaining))

    def test_directory_is_set_aside(self):
        self.flags(instances_path=self.directory)
        path = libvirt_utils.get_instance_path(self.instance)
        os.mkdir(path)
        with open(os.path.join(path, 'console.log'), 'w'):
            pass
        # Of a migration that has failed.
        os.makedirs(os.path.join(path + '_resize', 'old'))
        self.assertEqual(
            path + '_resize', self.outgoing().set_directory_aside())
        self.assertEqual(['console.log'], os.listdir(path + '_resize'))
        self.assertFalse(os.path.exists(path))

    def test_is_wanted(self):
        get = self.useFixture(fixtures.MockPatch(
            'nova.objects.Instance.get_by_uuid')).mock
        outgoing = self.outgoing()
        for task_state, expected in (
                (task_states.RESIZE_MIGRATING, True),
                (task_states.DELETING, False)):
            get.return_value.task_state = task_state
            self.assertIs(expected, outgoing.is_wanted())
        get.side_effect = exception.InstanceNotFound(
            instance_id=self.instance.uuid)
        self.assertIs(False, outgoing.is_wanted())

    def test_disk_that_has_grown_since_the_check(self):
        outgoing = self.outgoing()
        outgoing.check()
        self.source.pools[POOL][self.volume_name('disk')].update(
            length=1234, allocation=1200)
        with outgoing:
            outgoing.run(self.directory)
        self.assertEqual(1234, self.copies[0][2])
        self.assertEqual(1234, self.dest.pools[POOL][
            self.volume_name('disk')]['length'])

    def test_records_are_saved_once_and_before_the_first_byte(self):
        self.stub_out(
            'nova.virt.libvirt.storage.pump.transfer.copy', mock.Mock(
                side_effect=lambda *a, **k: (
                    self.assertEqual(1, len(self.saves)),
                    self.assertEqual(ON_THE_WAY, self.places())) and
                self.pump_copy(*a, **k)))
        self.move()
        # the intent, and what the destination must find
        self.assertEqual(2, len(self.saves))

    @ddt.data(True, False)
    def test_overlay_over_a_generated_file_system(self, is_overlay):
        # Its base on the destination would have another UUID.
        self.lay_over('disk.eph0', 'ephemeral_1', 300)
        volume = self.volume_name('disk.eph0')
        if not is_overlay:
            del self.source.pools[POOL][volume]['base']
        self.move()
        self.assertEqual([volume] if is_overlay else [], self.flattened)
        self.assertIn('disk.eph0', self.ours(self.dest))

    @ddt.data(True, False)
    def test_root_over_another_image(self, same_host):
        # It was unshelved: its snapshot is gone from Glance.
        self.lay_over('disk', imagecache.get_cache_fname(uuids.snapshot), 300)
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        if same_host:
            self.migration.dest_compute = 'source'
        self.move(same_host)
        self.assertEqual([self.volume_name('disk')], self.flattened)
        self.assertEqual(3, len(self.copies))
        if not same_host:
            self.assertNotIn('base', self.dest.pools[POOL][
                self.volume_name('disk')])

    @ddt.data(True, False)
    def test_header_that_was_written_since_the_check(self, is_refused):
        """By a QEMU that was broken into: root would read what it names."""
        self.lay_over('disk.eph0', 'ephemeral_1', 300)
        outgoing = self.outgoing()
        outgoing.check()
        if is_refused:
            self.stub_out(
                'nova.virt.libvirt.storage.content.look_at_qcow2',
                mock.Mock(side_effect=exception.UnsafeDiskContent(
                    path='/disks/disk', reason='why')))
            expected = exception.UnsafeDiskContent
        else:
            self.content_at(self.volume_name('disk.eph0'))['base'] = '/secret'
            expected = exception.BaseImageMisplaced
        with outgoing:
            self.assertRaises(expected, outgoing.run, self.directory)
        self.assertEqual([], self.flattened)
        self.assertEqual([], self.copies)

    def test_root_over_its_image(self):
        self.lay_over('disk', imagecache.get_cache_fname(uuids.image), 300)
        self.move()
        self.assertEqual([], self.flattened)

    def test_how_the_pump_is_called(self):
        self.flags(storage_migration_bandwidth=3,
                   storage_migration_stall_timeout=17, group='libvirt')
        self.move()
        source, destination, length, kwargs = self.copies[0]
        self.assertEqual(('qemu:///system', POOL, self.volume_name('disk')),
                         source)
        self.assertEqual(('qemu+tls://192.0.2.2/system', POOL,
                          self.volume_name('disk')), destination)
        self.assertEqual(1000, length)
        self.assertEqual((3 << 20, 17, True),
                         (kwargs['bandwidth'].total, kwargs['stall_timeout'],
                          kwargs['sparse']))
        self.assertEqual(1, len({c[3]['bandwidth'] for c in self.copies}))
        self.jobs.add_job.assert_called_with(self.instance, 1234)
        self.jobs.remove_job.assert_called_with(self.instance, 1234)

    def test_from_a_volume_group(self):
        """Of a block device zeroes alone tell what was never written."""
        self.source.types[POOL] = 'logical'
        self.move()
        self.assertEqual([True] * 3, [c[3]['find_holes']
                                      for c in self.copies])
        # It may have grown, and no more of it is streamed than libvirt knows.
        for name in ('disk', 'disk.eph0', 'disk.config'):
            self.assertIn('look at ' + self.volume_name(name),
                          self.source.log)

    def test_from_a_volume_group_that_libvirt_can_not_look_at(self):
        self.source.types[POOL] = 'logical'
        self.source.fail['look at'] = exception.StoragePoolError(
            pool=POOL, host='source', code=1, reason='asynchronous jobs')
        self.assertIn('asynchronous jobs', self.refused())

    @ddt.data(('dir', 5), ('logical', 5 + (1 << 39) // (32 << 20)))
    @ddt.unpack
    def test_patience_while_a_hole_is_overwritten(self, pool_type, expected):
        """libvirt is silent for as long as it writes zeroes."""
        self.flags(group='libvirt', storage_migration_stall_timeout=5)
        self.source.pools[POOL][self.volume_name('disk')]['length'] = 1 << 39
        self.dest.available = 4 << 40
        self.dest.types[POOL] = pool_type
        self.make_offer()
        self.move()
        self.assertEqual(expected, max(c[3]['stall_timeout']
                                       for c in self.copies))

    def test_to_a_volume_group(self):
        """Holes needn't travel, and nothing old is behind the content."""
        self.take_volume_groups()
        self.dest.extent = 512
        zeroes = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.stream.write_zeroes')).mock
        self.flags(preallocate_images='space')
        record = self.disks.get('disk.swap')
        record.format = 'qcow2'
        self.disks.set('disk.swap', record)
        self.disks.save(self.context)
        self.make_offer()
        self.move()
        self.assertEqual([True] * 3, [c[3]['sparse'] for c in self.copies])
        self.assertEqual([False] * 3, [c[3]['find_holes']
                                       for c in self.copies])
        self.assertEqual(
            {self.volume_name('disk'): (1000, 1024),
             self.volume_name('disk.eph0'): (600, 1024),
             self.volume_name('disk.config'): (100, 512)},
            {call.args[0].name: call.args[1:] for call in zeroes.mock_calls})
        # It is made anew there.
        self.assertEqual('raw', self.load().get('disk.swap').format)
        self.assertEqual('qcow2', self.load().get('disk.swap').previous.format)

    def test_room_is_reserved_where_a_full_disk_ends_libvirt(self):
        self.dest.version = 11_003_000
        self.move()
        self.assertEqual([False] * 3, [c[3]['sparse'] for c in self.copies])
        for name, length in (('disk', 1000), ('disk.eph0', 600),
                             ('disk.config', 100)):
            self.assertEqual(
                length, self.dest.allocated[self.volume_name(name)])

    def test_room_is_reserved_for_what_travels_beside_the_disks(self):
        self.dest.version = 11_003_000
        fname = imagecache.get_cache_fname(uuids.image)
        self.lay_over('disk', fname, 50)
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        with open(os.path.join(self.directory, 'console.log'), 'w') as f:
            f.write('booted')
        self.move()
        self.assertEqual({False}, {c[3]['sparse'] for c in self.copies})
        lengths = {c[1].name: c[2] for c in self.copies}
        self.assertEqual(5, len(lengths))
        self.assertIn(self.volume_name('files'), lengths)
        self.assertIn('%s.%s' % (fname, uuids.instance), lengths)
        self.assertEqual(lengths, {
            name: self.dest.allocated[name] for name in lengths})

    @ddt.data((True, 'directly'), (False, 'through libvirt'))
    @ddt.unpack
    def test_log_says_how_a_volume_was_read(self, direct, how):
        self.direct = direct
        self.move()
        self.assertEqual(3, self.stdlog.logger.output.count(
            ', read %s: ' % how))

    def test_what_exists_on_the_destination_is_left_alone(self):
        foreign = {'length': 5, 'allocation': 5, 'content': 'foreign'}
        self.dest.pools[POOL][self.volume_name('disk')] = dict(foreign)
        self.move()
        self.assertEqual(foreign, self.dest.pools[POOL][
            self.volume_name('disk')])
        self.assertEqual('disk.1', self.places()['disk'][2])

    def hide(self, *names):
        """Have files on the destination that its libvirt knows nothing of."""
        hidden = {self.volume_name(name) for name in names}
        create = two_hosts.Pool.create

        def create_or_fail(pool, config):
            if pool.daemon is self.dest and config.name in hidden:
                raise exception.StorageVolumeError(
                    volume=config.name, pool=pool.name, host=pool.host,
                    reason='File exists', code=38)
            return create(pool, config)

        self.stub_out(
            'nova.tests.unit.virt.libvirt.storage.move.two_hosts.Pool.create',
            create_or_fail)

    def test_file_that_libvirt_doesnt_know_of(self):
        self.hide('disk', 'disk.1')
        self.move()
        self.assertEqual(dict(ON_THE_WAY, disk=(
            'building', 'dest', 'disk.2', 'source')), self.places())
        self.assertEqual({'disk.2', *COPIED[1:]}, set(self.ours(self.dest)))

    def test_files_everywhere(self):
        self.hide('disk', *('disk.%d' % n for n in range(1, 9)))
        e = self.assertRaises(exception.StorageVolumeError, self.move)
        self.assertIn('File exists', str(e))
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual([], self.ours(self.dest))

    def test_name_of_what_is_left(self):
        # On the third host of a shared pool it would be deleted as such.
        self.note_left('other', self.volume_name('disk'))
        self.move()
        self.assertEqual('disk.1', self.places()['disk'][2])

    def test_shared_pool_is_looked_at_anew(self):
        # What one host makes, the other's libvirt doesn't know of.
        self.dest.pools = self.source.pools
        self.move()
        self.assertEqual(1, self.dest.refreshes)
        self.assertEqual('disk.swap.1', self.places()['disk.swap'][2])

    @ddt.data(True, False)
    def test_shared_pool_and_same_host(self, same_host):
        if same_host:
            self.migration.dest_compute = 'source'
        else:
            self.dest.pools = self.source.pools
        self.move(same_host)
        self.assertEqual(
            sorted(AT_SOURCE) + ['disk.1', 'disk.config.1', 'disk.eph0.1'],
            sorted(AT_SOURCE) + [name for name in self.ours(self.source)
                                 if name not in AT_SOURCE])
        self.assertEqual('disk.1', self.places()['disk'][2])

    @ddt.data(1, 2, 5)
    def test_disks_at_once(self, parallel):
        self.flags(storage_migration_parallel_disks=parallel,
                   group='libvirt')
        self.move()
        self.assertEqual(3, len(self.copies))

    def failed(self, error):
        e = self.assertRaises(type(error), self.move)
        self.assertIs(error, e)
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual(sorted(AT_SOURCE), self.ours(self.source))
        self.assertIsNone(state.moved_by(self.load()))
        self.assertTrue(self.dest.closed)

    def test_progress_that_cant_be_saved(self):
        self.stub_out(
            'nova.virt.libvirt.storage.move.copy._REPORT_INTERVAL', 0)
        self.migration.save.side_effect = messaging.MessagingTimeout
        self.move()
        self.assertEqual(ON_THE_WAY, self.places())
        self.assertIn('progress could not be saved',
                      self.stdlog.logger.output)

    def test_server_that_is_gone(self):
        self.stub_out(
            'nova.virt.libvirt.storage.move.copy._REPORT_INTERVAL', 0)
        error = exception.InstanceNotFound(instance_id=uuids.instance)
        self.migration.save.side_effect = error
        self.failed(error)

    def test_no_thread_is_free(self):
        queued = []

        def spawn_on(executor_type, work, *args):
            queued.append(futurist.Future())
            return queued[-1]

        self.stub_out('nova.thread_pool_factory.spawn_on', spawn_on)
        self.stub_out('nova.virt.libvirt.storage.move.peer._connect',
                      lambda host, uri: self.dest)
        self.move()
        self.assertEqual(3, len(self.copies))
        self.assertEqual([True], [future.cancelled() for future in queued])

    def test_progress_after_a_failure(self):
        self.instance.progress = 50
        self.copy_error = exception.InternalError('pump')
        self.failed(self.copy_error)
        self.assertEqual(0, self.instance.progress)

    def test_copy_fails(self):
        self.flags(storage_migration_parallel_disks=1, group='libvirt')
        self.copy_error = exception.InternalError('pump')
        self.failed(self.copy_error)
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual(1, len(self.copies))

    @ddt.data(False, True)
    def test_libvirt_here_dies_while_it_copies(self, same_host):
        # What was made on the destination is gone, or on record.
        if same_host:
            self.migration.dest_compute = 'source'

        def copy(*args, **kwargs):
            self.host.local = exception.HypervisorUnavailable(host='source')
            raise exception.InternalError('pump')

        self.stub_out('nova.virt.libvirt.storage.pump.transfer.copy', copy)
        self.assertRaises(exception.InternalError, self.move, same_host)
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual(
            {(POOL, self.volume_name(name)) for name in self.ours(self.source)
             if name not in AT_SOURCE},
            {place for place in self.left('source')
             if not place[1].endswith('files')})

    def _cancelled(self, asked=True):
        """Move, and let an operator ask for the end of the first copy."""
        self.flags(storage_migration_parallel_disks=1, group='libvirt')
        self.stub_out(
            'nova.virt.libvirt.storage.move.copy._REPORT_INTERVAL', 0)
        self.migration.status = 'migrating'

        def save():
            # It brings what others have written to the row.
            if asked and self.copies:
                self.migration.status = cancel.CANCELLING

        self.migration.save.side_effect = save
        pump_copy = self.pump_copy

        def copy(source, destination, length, *, cancelled, **kwargs):
            self.assertFalse(cancelled())
            result = pump_copy(source, destination, length, **kwargs)
            if cancelled():
                raise exception.StorageTransferCancelled(
                    volume=source.name, where='x', transferred=length // 2,
                    length=length)
            return result

        self.stub_out('nova.virt.libvirt.storage.pump.transfer.copy', copy)
        self.move()

    def test_operator_cancels(self):
        e = self.assertRaises(
            exception.StorageTransferCancelled, self._cancelled)
        self.assertIn('was cancelled', str(e))
        self.assertEqual(1, len(self.copies))
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual(sorted(AT_SOURCE), self.ours(self.source))
        self.assertEqual([], self.ours(self.dest))
        self.nothing_of_a_move()
        self.assertEqual(0, self.instance.progress)
        self.assertTrue(self.dest.closed)
        # The job is off the list of what deleting the server has to end.
        self.assertEqual(self.jobs.add_job.call_count,
                         self.jobs.remove_job.call_count)
        # What the compute manager does next: nothing is left to be undone.
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(AT_SOURCE, self.places())

    def test_nobody_cancels(self):
        self._cancelled(asked=False)
        self.assertEqual(ON_THE_WAY, self.places())

    def test_second_volume_cant_be_created(self):
        error = exception.InternalError('full')
        create = two_hosts.Pool.create

        def fail_at_second(pool, config):
            if config.name.endswith('disk.config'):
                raise error
            return create(pool, config)

        self.stub_out(
            'nova.tests.unit.virt.libvirt.storage.move.two_hosts.Pool.create',
            fail_at_second)
        self.failed(error)
        self.assertEqual([], self.ours(self.dest))

    def test_records_cant_be_saved(self):
        error = exception.InternalError('no conductor')
        save = mock.Mock(side_effect=[error, None])
        self.stub_out('nova.objects.BlockDeviceMappingList._save_driver_info',
                      lambda cls, c, i, infos: save())
        self.failed(error)
        self.assertEqual([], self.ours(self.dest))

    def test_restored_records_that_cant_be_saved_at_once(self):
        self.copy_error = exception.InternalError('pump')
        save = mock.Mock(side_effect=[
            None, messaging.MessagingTimeout, None])
        self.stub_out('nova.objects.BlockDeviceMappingList._save_driver_info',
                      lambda cls, c, i, infos: save(infos))
        self.assertRaises(messaging.MessagingTimeout, self.move)
        # The driver goes on with the same mappings.
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(3, save.call_count)
        self.assertEqual(save.mock_calls[1], save.mock_calls[2])

    def test_volumes_cant_be_deleted_after_a_failure(self):
        self.copy_error = exception.InternalError('pump')
        self.dest.fail['delete'] = exception.InternalError('gone')
        # the probe's volume, too, stays
        self.stub_out('nova.virt.libvirt.storage.'
                      'move.precheck.Departure._probe',
                      lambda departure, here, there: None)
        self.failed(self.copy_error)
        self.assertEqual(COPIED, self.ours(self.dest))
        self.assertEqual([(POOL, self.volume_name(name)) for name in COPIED],
                         self.left('dest'))
        # the destination's next offer removes them, and nothing else
        self.dest.fail.clear()
        self.dest.pools[POOL]['foreign'] = {}
        self.make_offer()
        self.assertEqual(['foreign'], self.ours(self.dest))
        self.assertEqual([], self.left('dest'))
        self.disks = self.load()
        # and the next try succeeds
        self.copy_error = None
        self.dest.closed = False
        self.move()
        self.assertEqual(ON_THE_WAY, self.places())


@ddt.ddt
class EndTestCase(OutgoingTestCase):
    def setUp(self):
        super().setUp()
        self.make_offer()
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.load',
            lambda *args: self.load())

    def accept(self):
        self.flags(host='dest')
        disks = self.load()
        try:
            arrival.accept(self.context, self.instance, disks, self.dest,
                           'dest:///', self.cache_base)
        finally:
            self.flags(host='source')

    def test_accept(self):
        self.move()
        self.saves.clear()
        self.accept()
        self.assertEqual(
            dict(ON_THE_WAY, **{n: ('ready', 'dest', n, 'source')
                                for n in COPIED}), self.places())
        self.assertEqual(1, len(self.saves))
        self.only_swap_is_kept()

    def test_accept_what_was_flattened(self):
        self.lay_over('disk', imagecache.get_cache_fname(uuids.snapshot), 300)
        self.move()
        self.accept()
        self.assertEqual('ready', self.places()['disk'][0])
        # There need be no base image.
        self.cache_base.assert_not_called()

    def longer_than_its_record(self):
        """What a source sends that doesn't keep to what is on record."""
        self.move()
        record = self.disks.get('disk.eph0')
        record.size -= 1
        self.disks.set('disk.eph0', record)
        self.disks.save(self.context)

    def test_accept_a_raw_file_that_is_longer_than_its_record(self):
        """The guest would see all of it, more than its flavor gives."""
        self.longer_than_its_record()
        e = self.assertRaises(exception.UnsafeDiskContent, self.accept)
        self.assertIn('600 bytes, and 599 are on record', str(e))
        self.assertEqual(ON_THE_WAY['disk.eph0'], self.places()['disk.eph0'])

    def test_accept_a_logical_volume_that_is_longer_than_its_record(self):
        """It is rounded up to whole extents."""
        self.take_volume_groups()
        self.make_offer()
        self.longer_than_its_record()
        self.stub_out('nova.privsep.storage.sync', lambda path: None)
        self.accept()
        self.assertEqual('ready', self.places()['disk.eph0'][0])

    def test_accept_a_raw_file_that_was_a_logical_volume(self):
        """A source says so if a disk has more than its flavor gives."""
        record = self.disks.get('disk.eph0')
        record.size -= 1
        self.disks.set('disk.eph0', record)
        self.disks.save(self.context)
        self.move()
        self.assertEqual(600, self.load().get('disk.eph0').size)
        self.accept()
        self.assertEqual('ready', self.places()['disk.eph0'][0])
        before = self.load().get('disk.eph0').previous
        self.assertEqual(599, before.size)

    def test_accept_a_raw_file_whose_size_is_not_on_record(self):
        record = self.disks.get('disk.config')
        record.size = 0
        self.disks.set('disk.config', record)
        self.disks.save(self.context)
        self.move()
        self.accept()
        self.assertEqual('ready', self.places()['disk.config'][0])

    @ddt.data('none', 'space')
    def test_reservation(self, preallocate):
        self.flags(preallocate_images=preallocate)
        self.move()
        self.stub_out('os.access', lambda path, mode: True)
        with mock.patch('nova.privsep.storage.allocate') as allocate:
            self.accept()
        self.assertEqual(
            [mock.call('/disks/' + self.volume_name(name), length)
             for name, length in (('disk', 1000), ('disk.config', 100),
                                  ('disk.eph0', 600))]
            if preallocate == 'space' else [], allocate.mock_calls)

    def test_reservation_that_fails(self):
        self.flags(preallocate_images='space')
        self.move()
        self.stub_out('os.access', lambda path, mode: True)
        with mock.patch('nova.privsep.storage.allocate',
                        side_effect=OSError('full')):
            self.accept()
        self.assertEqual('ready', self.places()['disk'][0])
        self.assertIn('No space is reserved', self.stdlog.logger.output)

    def test_hard_reboot_while_it_is_copied(self):
        # An operator has reset its state (F9).
        errors = []

        def copy(*args, **kwargs):
            disks = self.load()
            self.assertIsNone(migration.unfinished(
                self.context, self.instance, disks))
            errors.append(self.assertRaises(
                exception.DiskBeingCopied, lifecycle.take_up, disks, {}, None,
                'libvirt-storage', {}))
            return self.pump_copy(*args, **kwargs)

        self.stub_out('nova.virt.libvirt.storage.pump.transfer.copy', copy)
        self.move()
        for part in ('migration 7', 'host dest', 'Wait', 'host source'):
            self.assertIn(part, str(errors[0]))
        for word in ('rebuild', 'delete'):
            self.assertNotIn(word, str(errors[0]))

    def test_hard_reboot_after_the_copy_on_one_host_was_killed(self):
        self.migration.dest_compute = 'source'
        self.test_hard_reboot_after_the_copy_was_killed(same_host=True)

    def test_hard_reboot_after_the_copy_was_killed(self, same_host=False):
        self.move(same_host)
        disks = self.load()
        record = disks.get('disk')
        record.expected = None
        disks.set('disk', record)
        with mock.patch('nova.objects.Migration.get_by_id',
                        return_value=self.migration) as get:
            self.assertIs(self.migration, migration.unfinished(
                self.context, self.instance, disks))
        get.assert_called_once_with(self.context, 7)

    @mock.patch('nova.privsep.storage.sync')
    def test_devices_are_on_the_disk_before_the_source_may_go(self, sync):
        self.take_volume_groups()
        self.stub_out('nova.virt.libvirt.storage.pool.stream.write_zeroes',
                      mock.Mock())
        self.make_offer()
        self.move()
        self.accept()
        self.assertEqual(
            {'/disks/' + self.volume_name(name) for name in COPIED},
            {call.args[0] for call in sync.mock_calls})

    @mock.patch('nova.privsep.storage.sync')
    def test_files_are_on_the_disk_when_they_are_verified(self, sync):
        self.move()
        self.accept()
        sync.assert_not_called()

    def test_accept_where_nothing_is_mounted(self):
        """The copy has filled the directory below."""
        self.move()
        self.dest.unmounted.add(POOL)
        self.assertRaises(exception.StoragePoolNotMounted, self.accept)
        self.assertEqual({'disk', 'disk.eph0', 'disk.config', 'disk.swap'},
                         set(self.load().building()))

    def test_accept_twice_verifies_once(self):
        self.move()
        self.accept()
        self.stub_out('nova.virt.libvirt.storage.pump.transfer.verify', None)
        self.accept()

    def test_accept_what_was_changed_on_the_way(self):
        self.move()
        self.dest.pools[POOL][self.volume_name('disk.eph0')]['content'] = ''
        self.accept()
        # from the source, which has it still
        self.assertEqual(
            [('qemu+tls://192.0.2.1/system', POOL,
              self.volume_name('disk.eph0')),
             ('dest:///', POOL, self.volume_name('disk.eph0')), 600],
            list(self.copies[-1][:3]))
        self.assertEqual('content of disk.eph0', self.dest.pools[POOL][
            self.volume_name('disk.eph0')]['content'])
        self.assertEqual('ready', self.places()['disk.eph0'][0])

    @mock.patch('nova.privsep.storage.sync')
    def test_accept_in_a_volume_group_what_was_changed(self, sync):
        """The source alone knows whether it has holes, and which."""
        self.flags(group='libvirt', storage_migration_stall_timeout=5)
        self.take_volume_groups()
        self.stub_out('nova.virt.libvirt.storage.pool.stream.write_zeroes',
                      mock.Mock())
        self.source.pools[POOL][self.volume_name('disk.eph0')]['length'] = (
            1 << 39)
        self.dest.available = 4 << 40
        self.make_offer()
        self.move()
        self.dest.pools[POOL][self.volume_name('disk.eph0')]['content'] = ''
        self.accept()
        again = self.copies[-1][3]
        self.assertEqual((True, 5 + (1 << 39) // (32 << 20)),
                         (again['find_holes'], again['stall_timeout']))

    def test_accept_what_cant_be_copied_again(self):
        self.move()
        volume = self.volume_name('disk.eph0')
        self.dest.pools[POOL][volume]['content'] = ''
        self.copy_error = exception.InternalError('no route')
        e = self.assertRaises(exception.StorageTransferMismatch, self.accept)
        for part in ('no route', 'it differs', 'hard reboot', 'host source',
                     volume):
            self.assertIn(part, str(e))
        self.assertEqual(ON_THE_WAY['disk.eph0'], self.places()['disk.eph0'])
        self.assertEqual(sorted(AT_SOURCE), self.ours(self.source))
        # as the hard reboot does
        self.copy_error = None
        self.accept()
        self.assertEqual('ready', self.places()['disk.eph0'][0])

    def test_accept_overlay_beside_what_cant_be_copied_again(self):
        """Its header is this host's last of all: only then it differs."""
        base = imagecache.get_cache_fname(uuids.image)
        self.lay_over('disk', base)
        self.move()
        here = self.cache_base.return_value = '/here/_base/' + base
        self.stub_out('nova.virt.libvirt.imagebackend._get_base_format',
                      lambda path: 'raw')

        def rewrite(path, *args):
            self.content_at(path).update(content='other header', base=here)

        self.stub_out('nova.privsep.qemu.rewrite_backing_file', rewrite)
        volumes = self.dest.pools[POOL]
        sent = dict(volumes[self.volume_name('disk.eph0')])
        volumes[self.volume_name('disk.eph0')]['content'] = ''
        self.copy_error = exception.InternalError('over NBD alone')
        self.assertRaises(exception.StorageTransferMismatch, self.accept)
        # What was wrong with the other one is mended.
        volumes[self.volume_name('disk.eph0')] = sent
        self.accept()
        self.assertEqual('ready', self.places()['disk'][0])
        self.assertEqual(here, volumes[self.volume_name('disk')]['base'])

    def test_accept_on_one_host_what_was_changed(self):
        self.migration.dest_compute = 'source'
        self.move(same_host=True)
        self.source.pools[POOL][self.volume_name('disk.1')]['content'] = ''
        arrival.accept(self.context, self.instance, self.load(), self.source,
                       'qemu:///system', self.cache_base)
        self.assertEqual(
            (('qemu:///system', POOL, self.volume_name('disk')),
             ('qemu:///system', POOL, self.volume_name('disk.1'))),
            self.copies[-1][:2])
        self.assertEqual('ready', self.places()['disk'][0])

    def test_accept_without_a_checksum(self):
        self.move()
        disks = self.load()
        disks.get('disk').expected = None
        disks.set('disk', disks.get('disk'))
        disks.save(self.context)
        self.assertRaises(exception.StorageTransferMismatch, self.accept)

    def test_confirm(self):
        self.move()
        self.accept()
        migration.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.ours(self.source))
        self.assertEqual(COPIED, self.ours(self.dest))
        self.assertEqual({None}, {p[3] for p in self.places().values()})
        self.nothing_of_a_move()

    def test_confirm_twice(self):
        self.test_confirm()
        self.saves.clear()
        migration.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.saves)

    def test_confirm_when_a_volume_cant_be_deleted(self):
        self.move()
        self.accept()
        self.source.fail['delete'] = exception.InternalError('busy')
        migration.confirm(self.context, self.source, self.instance)
        # It is no disk any longer: nothing may put it back.
        self.assertEqual({None}, {p[3] for p in self.places().values()})
        self.assertEqual(
            {(POOL, self.volume_name(name)) for name in AT_SOURCE},
            set(self.left('source')))
        self.assertEqual({'dest'}, {r.host for _n, r in self.load().items()})
        # The next time it is sent here, it goes.
        self.source.fail.clear()
        self.delete_left()
        self.assertEqual([], self.ours(self.source))
        self.nothing_of_a_move()

    def forget_swap(self):
        """As a resize to a flavor without swap: its mapping is deleted."""
        disks = self.load()
        disks.clear('disk.swap')
        disks.save(self.context)

    def test_confirm_when_the_swap_is_gone(self):
        self.move()
        self.accept()
        self.forget_swap()
        migration.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.ours(self.source))
        self.nothing_of_a_move()

    def test_revert_when_the_swap_is_gone(self):
        self.move()
        self.accept()
        self.forget_swap()
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(AT_SOURCE, self.places())
        self.nothing_of_a_move()

    def test_kept_swap_while_reverting_on_one_host(self):
        self.migration.dest_compute = 'source'
        self.move(same_host=True)
        self.forget_swap()
        self.assertIn((POOL, self.volume_name('disk.swap')),
                      migration.kept(self.load()))

    def test_confirm_keeps_what_wasnt_verified(self):
        self.move()
        migration.confirm(self.context, self.source, self.instance)
        self.assertEqual(COPIED, self.ours(self.source))

    def test_confirm_on_one_host(self):
        self.migration.dest_compute = 'source'
        self.move(same_host=True)
        disks = self.load()
        disks.mark('ready', COPIED)
        disks.save(self.context)
        migration.confirm(self.context, self.source, self.instance)
        self.assertEqual(['disk.1', 'disk.config.1', 'disk.eph0.1'],
                         self.ours(self.source))

    def test_nothing_to_confirm(self):
        migration.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.saves)
        self.assertEqual(sorted(AT_SOURCE), self.ours(self.source))

    def test_revert(self):
        self.move()
        self.accept()
        # by destroy() there
        self.dest.pools[POOL].clear()
        disks = self.load()
        for name, record in disks.items():
            disks.set(name, record.previous)
        disks.save(self.context)
        uris = len(self.host.uris)
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual(sorted(AT_SOURCE), self.ours(self.source))
        self.assertEqual(uris, len(self.host.uris))
        self.nothing_of_a_move()

    def test_revert_where_the_destination_keeps_its_disks(self):
        # its instance directory is shared, so it was told not to
        self.move()
        self.accept()
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual([], self.ours(self.dest))

    def test_revert_on_one_host(self):
        # where Nova destroys no disk, for source and destination share it
        self.migration.dest_compute = 'source'
        self.move(same_host=True)
        disks = self.load()
        swap = disks.get('disk.swap')
        swap.volume = self.volume_name('disk.swap.1')
        disks.set('disk.swap', swap)
        disks.save(self.context)
        self.source.pools[POOL][swap.volume] = {
            'length': 1, 'allocation': 1, 'content': ''}
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual(sorted(AT_SOURCE), self.ours(self.source))

    def test_kept_while_reverting(self):
        self.move()
        self.assertEqual(set(), migration.kept(self.load()))

    def test_kept_while_reverting_on_one_host(self):
        self.migration.dest_compute = 'source'
        self.move(same_host=True)
        self.assertEqual({(POOL, self.volume_name(name))
                          for name in AT_SOURCE},
                         migration.kept(self.load()))

    def test_restart_of_the_source_in_the_midst_of_copying(self):
        self.move()         # as far as it was, no accept
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual([], self.ours(self.dest))

    @ddt.data('source', 'dest')
    def test_abandon_what_an_earlier_migration_has_left(self, dest):
        self.not_confirmed()
        self.migration.dest_compute = dest
        places, volumes = self.places(), self.ours(self.source)
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(places, self.places())
        self.assertEqual(volumes, self.ours(self.source))

    def test_settle(self):
        self.not_confirmed()
        self.instance.vm_state = 'error'
        migration.settle(self.context, self.instance, self.load())
        self.assertEqual(
            {'disk': ('ready', 'source', 'disk.1', None),
             'disk.config': ('ready', 'source', 'disk.config.1', None),
             'disk.eph0': ('ready', 'source', 'disk.eph0.1', None),
             'disk.swap': ('ready', 'source', 'disk.swap.1', None)},
            self.places())
        self.assertIsNone(state.moved_by(self.load()))
        self.assertEqual({}, self.load().extras)
        # It goes at the next chance, and what is in use does not.
        self.delete_left()
        self.assertEqual(['disk.1', 'disk.config.1', 'disk.eph0.1'],
                         self.ours(self.source))
        self.nothing_of_a_move()

    def test_settle_what_may_be_reverted_yet(self):
        self.not_confirmed()
        self.instance.vm_state = 'resized'
        places = self.places()
        migration.settle(self.context, self.instance, self.load())
        self.assertEqual(places, self.places())

    def test_nothing_to_settle(self):
        migration.settle(self.context, self.instance, self.load())
        self.assertEqual([], self.saves)

    def test_what_is_left_has_become_a_disk_again(self):
        place = (POOL, self.volume_name('disk'))
        self.note_left('source', place[1])
        self.delete_left()
        self.assertIn('disk', self.ours(self.source))
        self.assertEqual([], self.left('source'))

    def test_unfinished(self):
        with mock.patch('nova.objects.Migration.get_by_id',
                        return_value=self.migration) as get:
            self.assertIsNone(migration.unfinished(
                self.context, self.instance))
            get.assert_not_called()
            self.move()
            self.assertIs(self.migration, migration.unfinished(
                self.context, self.instance))
            get.assert_called_once_with(self.context, 7)
            self.flags(host='dest')
            self.assertIsNone(migration.unfinished(
                self.context, self.instance))
            self.flags(host='source')
            self.migration.dest_compute = 'source'
            self.assertIsNone(migration.unfinished(
                self.context, self.instance))

    def test_source_is_killed_when_all_is_copied(self):
        with open(os.path.join(self.directory, 'console.log'), 'w') as f:
            f.write('Welcome')
        self.move()
        self.assertIn('files', self.ours(self.dest))
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual(sorted(AT_SOURCE), self.ours(self.source))
        self.nothing_of_a_move()

    def test_source_is_killed_while_it_confirms(self):
        self.move()
        self.accept()
        self.source.fail['delete'] = KeyboardInterrupt()
        self.assertRaises(KeyboardInterrupt, migration.confirm, self.context,
                          self.source, self.instance)
        self.assertEqual(
            {(POOL, self.volume_name(name)) for name in AT_SOURCE},
            set(self.left('source')))

    def test_disks_of_another_kind_are_none_of_the_peer(self):
        # Brought by SSH, or shared: reverted without libvirt's help.
        disks = self.load()
        for name, record in disks.items():
            record.backend = fields.LibvirtDiskBackend.RBD
            record.previous = record.obj_clone()
            record.host, record.state = 'dest', 'building'
            disks.set(name, record)
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, disks)
        self.assertEqual([], self.host.uris)

    def test_peer_is_started_again(self):
        self.move()
        connect = self.host.connect_to_peer
        self.host.connect_to_peer = mock.Mock(
            side_effect=[ValueError('refused'), ValueError('refused'),
                         connect('')])
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual([], self.ours(self.dest))
        self.nothing_of_a_move()

    def test_restart_of_the_source_while_the_peer_is_gone(self):
        self.move()
        self.host.peer = ValueError('no route')
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.move.undo._delete_anew.retry.stop',
            tenacity.stop_after_attempt(2)))
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual(3, len(self.left('dest')))

    def test_cross_cell_resize_is_reverted(self):
        # It went by way of Glance: no offer, no copy, and the destination is
        # in a cell that this host knows nothing of.
        self.instance.system_metadata.clear()
        self.migration.cross_cell_move = True
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual(sorted(AT_SOURCE), self.ours(self.source))
        self.assertEqual([], self.host.uris)

    def test_nothing_to_abandon(self):
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual([], self.saves)
        self.assertEqual([], self.host.uris)


@ddt.ddt
class OfferTestCase(two_hosts.TwoHostsTestCase):
    def test_pool_that_holds_no_disks_is_not_offered(self):
        # Where new disks are made otherwise, the pool isn't adopted.
        self.flags(images_type='qcow2', group='libvirt')
        self.dest.types[POOL] = 'disk'
        e = self.assertRaises(exception.MigrationPreCheckError,
                              self.make_offer)
        self.assertIn('is of type disk', str(e))

    def test_pool_that_is_not_mounted_is_not_offered(self):
        self.dest.unmounted.add(POOL)
        e = self.assertRaises(exception.StoragePoolNotMounted,
                              self.make_offer)
        self.assertIn('nothing is mounted', str(e))

    def test_offer(self):
        self.make_offer()
        self.assertEqual(
            offer.Offer(
                migration_id=7, owner=[os.geteuid(), os.getegid()], pools={
                    POOL: offer.OfferedPool(
                        ['disk', 'disk.config', 'disk.eph', 'disk.swap',
                         'files'], 1 << 40, 0),
                    two_hosts.BASES: offer.OfferedPool(
                        ['base'], 1 << 40, 1)}),
            offer.load(self.instance))
        self.instance.save.assert_called_once_with()
        self.assertEqual({}, self.instance.system_metadata)

    def test_offer_of_an_older_destination(self):
        self.instance.system_metadata['libvirt_storage_offer'] = (
            '{"m":7,"o":[1,2],"p":{"a":["disk","files"],"b":["base"]},'
            '"f":[5,null],"d":[0,0]}')
        self.assertEqual(
            offer.Offer(7, [1, 2], {
                'a': offer.OfferedPool(['disk', 'files'], 5, 0),
                'b': offer.OfferedPool(['base'], None, 0)}),
            offer.load(self.instance))

    def refused(self):
        e = self.assertRaises(exception.MigrationPreCheckError,
                              self.make_offer)
        self.assertIsNone(offer.load(self.instance))
        return str(e)

    def test_inactive_pool(self):
        self.dest.inactive.add(POOL)
        self.assertIn('inactive', self.refused())

    def test_missing_pool_is_made(self):
        self.dest.pools.clear()
        self.make_offer()
        self.assertIn(POOL, self.dest.pools)

    def test_missing_pool_isnt_made_on_a_host_with_another_backend(self):
        self.flags(images_type='qcow2', group='libvirt')
        self.dest.pools.clear()
        self.assertIn("doesn't exist", self.refused())

    def test_directory_not_writable(self):
        self.stub_out('os.access', lambda path, mode: False)
        self.assertIn('nova-compute write to', self.refused())

    def test_a_pool_of_a_long_name_for_each_kind_of_disk(self):
        # More than a value of system_metadata holds (F2)
        self.stub_out('nova.virt.libvirt.storage.pool.setup.pool_name_for',
                      lambda name: name.ljust(60, 'x'))
        for kind in (*kinds.ALL, files.NAME):
            self.dest.pools[kind.ljust(60, 'x')] = {}
        self.make_offer()
        for kind in ('disk', 'disk.config', 'disk.eph', 'disk.swap',
                     files.NAME):
            self.assertEqual(kind.ljust(60, 'x'),
                             offer.load(self.instance).pool_for(kind))

    def set_backend(self, backend):
        for name, record in self.disks.items():
            record.backend = backend
            self.disks.set(name, record)
        self.disks.save(self.context)

    def offered(self):
        self.make_offer()
        return {name: pool.kinds for name, pool
                in offer.load(self.instance).pools.items()}

    @ddt.data('flat', 'qcow2')
    def test_legacy_disks_that_become_volumes_on_the_source(self, backend):
        self.set_backend(backend)
        self.assertEqual(
            ['disk', 'disk.config', 'disk.eph', 'disk.swap', 'files'],
            self.offered()[POOL])

    def test_disks_that_are_not_on_record(self):
        for name, _record in self.disks.items():
            self.disks.clear(name)
        self.disks.save(self.context)
        self.assertEqual([*kinds.ALL, files.NAME], self.offered()[POOL])

    def refuses_nothing(self):
        self.dest.pools.clear()
        self.make_offer()
        self.assertIsNone(offer.load(self.instance))
        self.instance.save.assert_not_called()

    @ddt.data('rbd', 'ploop')
    def test_disks_that_stay_legacy_need_no_pool(self, backend):
        self.set_backend(backend)
        self.refuses_nothing()

    def test_legacy_disks_need_no_pool_on_a_legacy_host(self):
        self.set_backend('qcow2')
        self.flags(images_type='qcow2', group='libvirt')
        self.refuses_nothing()


@ddt.ddt
class BaseImageTestCase(OutgoingTestCase):
    def setUp(self):
        super().setUp()
        self.make_offer()
        self.fname = imagecache.get_cache_fname(uuids.image)
        self.way = '%s.%s' % (self.fname, uuids.instance)
        self.lay_over('disk', self.fname, 50)
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        self.stub_out('nova.virt.libvirt.storage.move.destination._adopt_base',
                      lambda *args: None)

    def bases(self):
        return sorted(self.dest.pools[two_hosts.BASES])

    def accept(self):
        self.flags(host='dest')
        return arrival.accept(self.context, self.instance, self.load(),
                              self.dest, 'dest:///', mock.Mock())

    def rename(self, old, new):
        self.dest.pools[two_hosts.BASES].pop(os.path.basename(old))
        os.makedirs(os.path.dirname(new))
        with open(new, 'w'):
            pass

    def test_travels_under_another_name_until_verified(self):
        self.move()
        self.assertEqual([self.way], self.bases())
        self.assertEqual(4, len(self.copies))
        self.stub_out('os.rename', lambda old, new: (
            self.assertEqual('/disks/' + self.way, old),
            self.assertEqual(os.path.join(
                CONF.instances_path, '_base', self.fname), new)))
        self.assertTrue(self.accept())
        self.only_swap_is_kept()

    @ddt.data(('user', 'token', 'admin'), ('nova', 'token', 'service'),
              ('nobody', 'token', 'admin'), ('nobody', 'token', 'service'),
              ('nobody', None, 'admin'))
    @ddt.unpack
    def test_source_that_makes_up_that_glance_has_lost_it(
            self, who, token, role):
        """Any server of that image would get the source's content."""
        self.move()
        self.own.auth_token, self.own.roles = token, [role]

        def get_info(ctxt, image_id):
            if who == 'user' or who == 'nova' and ctxt is self.own:
                return {'id': image_id, 'status': 'active'}
            raise exception.ImageNotAuthorized(image_id=image_id)

        self.stub_out('nova.virt.images.get_info', get_info)
        with mock.patch('os.rename') as mock_rename:
            self.accept()
        is_lost = (who, token, role) == ('nobody', 'token', 'admin')
        self.assertEqual(is_lost, mock_rename.called)
        if not is_lost:
            # Nothing of it stays.
            arrival.leftovers.delete(self.dest, self.load())
            self.assertEqual([], self.bases())

    @ddt.data((None, 'admin'), ('token', 'service'))
    @ddt.unpack
    def test_glance_may_have_it_for_others(self, token, role):
        """No destination would take what is sent as that image."""
        self.own.auth_token, self.own.roles = token, [role]
        self.move()
        self.assertEqual([], self.bases())
        self.assertEqual(['disk'], [
            os.path.basename(path).rpartition('_')[2]
            for path in self.flattened])

    @ddt.data(True, False)
    def test_accept_again(self, is_known):
        # A crash after it was put into the cache.
        self.move()
        self.stub_out('os.rename', self.rename)
        with mock.patch.object(metadata.InstanceDisks, 'save', side_effect=(
                exception.InternalError('killed'))):
            self.assertRaises(exception.InternalError, self.accept)
        self.assertEqual([], self.bases())
        if is_known:
            # libvirt has not looked since
            self.dest.pools[two_hosts.BASES][self.way] = {
                'length': 50, 'content': None}
        self.assertTrue(self.accept())
        self.assertEqual([], self.bases())
        self.only_swap_is_kept()

    def test_refresh_fails(self):
        self.move()
        self.stub_out('os.rename', self.rename)
        with mock.patch.object(two_hosts.Pool, 'refresh', side_effect=(
                exception.InternalError('asynchronous jobs'))):
            self.assertTrue(self.accept())
        self.assertIn('asynchronous jobs', self.stdlog.logger.output)
        self.only_swap_is_kept()

    def test_what_nobody_needs_cant_be_deleted(self):
        self.move()
        self.stub_out('os.path.exists', lambda path: True)
        self.dest.fail['delete'] = exception.InternalError('busy')
        self.assertTrue(self.accept())
        self.assertEqual([(two_hosts.BASES, self.way)],
                         self.left('dest'))

    def test_broken_on_the_way(self):
        self.move()
        self.dest.pools[two_hosts.BASES][self.way]['content'] = 'another'
        self.assertRaises(exception.StorageTransferMismatch, self.accept)
        self.assertEqual(ON_THE_WAY, self.places())

    def test_somebody_else_was_faster(self):
        self.move()
        self.stub_out('os.path.exists', lambda path: True)
        self.accept()
        self.assertEqual([], self.bases())

    @mock.patch('nova.privsep.storage.dig_holes')
    def test_holes_are_given_back(self, mock_dig):
        self.dest.version = 11_003_000
        self.move()
        self.stub_out('os.rename', self.rename)
        self.accept()
        mock_dig.assert_any_call('/disks/' + self.way)

    def test_glance_has_it(self):
        self.image_error = None
        self.move()
        self.assertEqual([], self.bases())

    @ddt.data('deactivated', 'pending_delete', 'queued', None)
    def test_glance_has_it_and_gives_it_to_nobody(self, status):
        self.image_error, self.image_status = None, status
        self.move()
        self.assertEqual([self.way], self.bases())

    def test_destination_has_it(self):
        self.dest.pools[two_hosts.BASES][self.fname] = {}
        self.move()
        self.assertEqual([self.fname], self.bases())

    def test_raw_disk_needs_none(self):
        self.disks.get('disk').format = 'raw'
        self.move()
        self.assertEqual([], self.bases())

    @ddt.data('another image', None)
    def test_disk_that_does_not_need_it(self, base):
        if base is None:
            del self.source.pools[POOL][self.volume_name('disk')]['base']
        else:
            self.lay_over('disk', base, 50)
        self.source.pools[two_hosts.BASES].pop(self.fname)
        self.move()
        self.assertEqual([], self.bases())

    def test_nowhere_to_be_had(self):
        self.source.pools[two_hosts.BASES].clear()
        e = self.assertRaises(exception.InstanceFaultRollback,
                              self.outgoing().check)
        self.assertIn(self.fname, str(e))

    def test_removed_when_a_copy_fails(self):
        self.copy_error = exception.InternalError('pump')
        self.assertRaises(exception.InternalError, self.move)
        self.assertEqual([], self.bases())


@ddt.ddt
class AdoptBaseTestCase(two_hosts.TwoHostsTestCase):
    def setUp(self):
        super().setUp()
        self.flags(instances_path='/here')
        self.rewrite = self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu.rewrite_backing_file')).mock
        self.base_format = 'raw'
        self.stub_out('nova.virt.libvirt.imagebackend._get_base_format',
                      self.get_base_format)
        self.cache_base = mock.Mock(return_value=self.base('/here/_base'))

    def get_base_format(self, path):
        self.assertEqual(self.base('/here/_base'), path)
        # It wasn't there before.
        self.cache_base.assert_called_once_with()
        return self.base_format

    def adopt(self, backing_file, backing_format='raw'):
        inspect = mock.Mock(return_value=mock.Mock(
            backing_file=backing_file, backing_file_format=backing_format))
        self.stub_out('nova.virt.libvirt.storage.content.look_at_qcow2',
                      inspect)
        pool = two_hosts.Pool(self.source, POOL, 'source')
        arrival._adopt_base(pool.volume(self.volume_name('disk')),
                            self.instance, self.cache_base, 1000)
        inspect.assert_called_once_with(
            '/disks/' + self.volume_name('disk'), 1000)

    def base(self, directory):
        return os.path.join(
            directory, imagecache.get_cache_fname(uuids.image))

    def test_no_base(self):
        self.adopt(None)
        self.rewrite.assert_not_called()
        self.cache_base.assert_not_called()

    def test_same_path(self):
        self.adopt(self.base('/here/_base'))
        self.rewrite.assert_not_called()
        self.assertEqual(0, self.source.refreshes)

    def rewritten(self):
        self.rewrite.assert_called_once_with(
            '/disks/' + self.volume_name('disk'), 'qcow2',
            self.base('/here/_base'), self.base_format)
        # libvirt tells the image cache what it has seen
        self.assertEqual(1, self.source.refreshes)

    def test_other_path(self):
        self.adopt(self.base('/there/_base'))
        self.rewritten()

    @ddt.data(('qcow2', 'raw'), ('raw', 'qcow2'), (None, 'raw'))
    @ddt.unpack
    def test_other_format(self, in_header, in_cache):
        # force_raw_images isn't what it is, or was, on the source.
        self.base_format = in_cache
        self.adopt(self.base('/here/_base'), in_header)
        self.rewritten()

    @ddt.data(exception.ImageNotFound(image_id=uuids.image),
              OSError('No space left'))
    def test_base_is_not_to_be_had(self, error):
        self.cache_base.side_effect = error
        e = self.assertRaises(exception.StorageBaseImageMissing, self.adopt,
                              self.base('/there/_base'))
        for part in (str(error), uuids.image, CONF.host, 'hard reboot',
                     self.volume_name('disk')):
            self.assertIn(part, str(e))
        self.rewrite.assert_not_called()

    def test_refresh_fails(self):
        with mock.patch.object(two_hosts.Pool, 'refresh', side_effect=(
                exception.InternalError('asynchronous jobs'))):
            self.adopt(self.base('/there/_base'))
        self.assertIn('asynchronous jobs', self.stdlog.logger.output)

    @ddt.data('/etc/passwd', '/here/_base/other', 'json:{}', 'nbd://x')
    def test_foreign(self, path):
        self.assertRaises(exception.InvalidDiskInfo, self.adopt, path)
        self.rewrite.assert_not_called()

    def test_relative(self):
        self.assertRaises(exception.InvalidDiskInfo, self.adopt,
                          self.base(''))
