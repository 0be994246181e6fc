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
from unittest import mock

import ddt
import fixtures
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
import tenacity

import nova.conf
from nova import exception
from nova.tests.unit.virt.libvirt.storage import two_hosts
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import arrival
from nova.virt.libvirt.storage import files
from nova.virt.libvirt.storage import migration
from nova.virt.libvirt.storage import moves
from nova.virt.libvirt.storage import undo

CONF = nova.conf.CONF

POOL = two_hosts.POOL
AT_SOURCE = {name: ('ready', 'source', name, None)
             for name in ('disk', 'disk.config', 'disk.eph0', 'disk.swap')}
ON_THE_WAY = {name: ('building', 'dest', name, 'source')
              for name in AT_SOURCE}
COPIED = ['disk', 'disk.config', 'disk.eph0']


class OutgoingTestCase(two_hosts.TwoHostsTestCase):
    def setUp(self):
        super().setUp()
        self.jobs = mock.Mock()
        self.version = 75
        self.stub_out(
            'nova.objects.Service.get_by_host_and_binary',
            lambda *args: mock.Mock(version=self.version))

    def outgoing(self, same_host=False):
        return migration.Outgoing(
            self.context, self.host, self.jobs, self.instance,
            self.migration, self.disks, 'qemu:///system', same_host)

    def move(self, same_host=False):
        outgoing = self.outgoing(same_host)
        outgoing.check()
        with outgoing:
            return outgoing.run(self.directory)

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
        self.version = 74
        self.assertIn('too old', self.refused())
        self.assertEqual([], self.host.uris)

    def test_no_offer(self):
        del self.instance.system_metadata[moves.OFFER]
        self.assertIn('no offer', self.refused())

    def test_offer_of_an_earlier_migration(self):
        self.migration.id = 8
        self.assertIn('no offer', self.refused())

    def test_kind_of_disk_that_wasnt_offered(self):
        self.instance.system_metadata[moves.OFFER] = jsonutils.dumps(
            {'m': 7, 'o': [1, 2], 'p': {POOL: ['disk', 'disk.eph', 'files']},
             'f': [None]})
        self.assertIn('disk.config', self.refused())

    def test_peer_refuses(self):
        self.host.peer = ValueError('Unable to read TLS confirmation')
        text = self.refused()
        for part in ('qemu+tls://192.0.2.2/system', 'TLS confirmation',
                     'certificate', 'log'):
            self.assertIn(part, text)

    def test_peer_doesnt_answer(self):
        self.stub_out('nova.virt.libvirt.storage.peer._CONNECT_TIMEOUT', 0.1)
        answer = threading.Event()
        self.addCleanup(answer.set)
        self.host.connect_to_peer = lambda uri: answer.wait()
        self.assertIn('no answer', self.refused())

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

    def test_pool_of_a_type_without_streams(self):
        self.dest.types[POOL] = 'rbd'
        text = self.refused()
        self.assertIn('rbd', text)
        self.assertIn('dir, fs, netfs', text)

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

    def test_room_on_a_block_device_is_the_whole_length(self):
        self.dest.types[POOL] = 'logical'
        self.dest.available = 1699
        self.assertIn('1699 bytes available and 1700', self.refused())

    @ddt.data({'state': 'building'}, {'host': 'other'}, {'backend': 'flat'})
    def test_disk_that_isnt_in_order(self, change):
        record = self.disks.get('disk.eph0')
        for name, value in change.items():
            setattr(record, name, value)
        e = self.assertRaises(exception.InstanceFaultRollback,
                              self.outgoing().check)
        self.assertIn('disk.eph0', str(e))

    def test_disk_with_a_ploop_header(self):
        self.source.pools[POOL][self.volume_name('disk.eph0')]['type'] = 5
        self.assertIn('ploop', self.refused())

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

    def test_records_are_saved_once_and_before_the_first_byte(self):
        self.stub_out(
            'nova.virt.libvirt.storage.pump.copy', mock.Mock(
                side_effect=lambda *a, **k: (
                    self.assertEqual(1, len(self.saves)),
                    self.assertEqual(ON_THE_WAY, self.places())) and
                self.pump_copy(*a, **k)))
        self.move()
        self.assertEqual(1, len(self.saves))

    @ddt.data(True, False)
    def test_overlay_over_a_generated_file_system(self, is_overlay):
        # Its base on the destination would have another UUID.
        record = self.disks.get('disk.eph0').obj_clone()
        record.format = 'qcow2'
        self.disks.set('disk.eph0', record)
        volume = self.source.pools[POOL][self.volume_name('disk.eph0')]
        info = mock.Mock(backing_file='/_base/ephemeral_1' if is_overlay
                         else None)
        with mock.patch(
                'nova.virt.images.privileged_qemu_img_info',
                return_value=info) as look, mock.patch(
                'nova.privsep.qemu.flatten_image') as flatten:
            self.move()
        self.assertEqual('qcow2', look.call_args.kwargs['format'])
        self.assertEqual(int(is_overlay), flatten.call_count)
        self.assertIn(COPIED[-1], self.ours(self.dest))
        self.assertIsNotNone(volume)

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
                         (kwargs['bandwidth'], kwargs['stall_timeout'],
                          kwargs['sparse']))
        self.jobs.add_job.assert_called_with(self.instance, 1234)
        self.jobs.remove_job.assert_called_with(self.instance, 1234)

    def test_no_holes_on_a_block_device(self):
        self.dest.types[POOL] = 'logical'
        self.move()
        self.assertEqual([False] * 3, [c[3]['sparse'] for c in self.copies])

    def test_what_exists_on_the_destination_is_left_alone(self):
        foreign = {'length': 5, 'allocation': 5, 'content': 'foreign'}
        self.dest.pools[POOL][self.volume_name('disk')] = dict(foreign)
        self.move()
        self.assertEqual(foreign, self.dest.pools[POOL][
            self.volume_name('disk')])
        self.assertEqual('disk.1', self.places()['disk'][2])

    def test_name_of_what_is_left(self):
        # On the third host of a shared pool it would be deleted as such.
        undo.note_left(self.instance, 'other',
                       [(POOL, self.volume_name('disk'))])
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
        self.assertNotIn(moves.MOVED, self.instance.system_metadata)
        self.assertTrue(self.dest.closed)

    def test_copy_fails(self):
        self.flags(storage_migration_parallel_disks=1, group='libvirt')
        self.copy_error = exception.InternalError('pump')
        self.failed(self.copy_error)
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual(1, len(self.copies))

    def test_second_volume_cant_be_created(self):
        error = exception.InternalError('full')
        create = two_hosts.Pool.create

        def fail_at_second(pool, config):
            if config.name.endswith('disk.config'):
                raise error
            return create(pool, config)

        self.stub_out(
            'nova.tests.unit.virt.libvirt.storage.two_hosts.Pool.create',
            fail_at_second)
        self.failed(error)
        self.assertEqual([], self.ours(self.dest))

    def test_records_cant_be_saved(self):
        error = exception.InternalError('no conductor')
        save = mock.Mock(side_effect=[error, None])
        self.stub_out('nova.objects.BlockDeviceMappingList._save_driver_info',
                      staticmethod(lambda c, i, infos: save()))
        self.failed(error)
        self.assertEqual([], self.ours(self.dest))

    def test_volumes_cant_be_deleted_after_a_failure(self):
        self.copy_error = exception.InternalError('pump')
        self.dest.fail['delete'] = exception.InternalError('gone')
        # the probe's volume, too, stays
        self.stub_out('nova.virt.libvirt.storage.departure.Departure._probe',
                      lambda departure, here, there: None)
        self.failed(self.copy_error)
        self.assertEqual(COPIED, self.ours(self.dest))
        left = sorted(jsonutils.loads(value) for key, value
                      in self.instance.system_metadata.items()
                      if key.startswith(moves.LEFT))
        self.assertEqual([['dest', POOL, self.volume_name(name)]
                          for name in COPIED], left)
        # the destination's next offer removes them, and nothing else
        self.dest.fail.clear()
        self.dest.pools[POOL]['foreign'] = {}
        self.make_offer()
        self.assertEqual(['foreign'], self.ours(self.dest))
        self.assertEqual([], [key for key in self.instance.system_metadata
                              if key.startswith(moves.LEFT)])
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
            'nova.virt.libvirt.storage.metadata.InstanceDisks.load',
            lambda *args: self.load())

    def accept(self):
        self.flags(host='dest')
        disks = self.load()
        try:
            arrival.accept(self.context, self.instance, disks, self.dest,
                           'dest:///')
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
        self.assertEqual({moves.MOVED, moves.SWAP},
                         set(self.instance.system_metadata))

    def test_accept_twice_verifies_once(self):
        self.move()
        self.accept()
        self.stub_out('nova.virt.libvirt.storage.pump.verify', None)
        self.accept()

    def test_accept_what_was_changed_on_the_way(self):
        self.move()
        self.dest.pools[POOL][self.volume_name('disk.eph0')]['content'] = ''
        self.assertRaises(exception.StorageTransferMismatch, self.accept)
        self.assertEqual(ON_THE_WAY, self.places())

    def test_accept_without_a_checksum(self):
        self.move()
        del self.instance.system_metadata[moves.COPY + 'disk']
        self.assertRaises(exception.StorageTransferMismatch, self.accept)

    def test_confirm(self):
        self.move()
        self.accept()
        migration.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.ours(self.source))
        self.assertEqual(COPIED, self.ours(self.dest))
        self.assertEqual({None}, {p[3] for p in self.places().values()})
        self.assertEqual({}, self.instance.system_metadata)

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
            set(undo.left(self.instance, 'source')))
        self.assertEqual({'dest'}, {r.host for _n, r in self.load().items()})
        # The next time it is sent here, it goes.
        self.source.fail.clear()
        undo.delete_left(self.source, self.instance)
        self.assertEqual([], self.ours(self.source))
        self.assertEqual({}, self.instance.system_metadata)

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
        self.assertEqual({}, self.instance.system_metadata)

    def test_revert_when_the_swap_is_gone(self):
        self.move()
        self.accept()
        self.forget_swap()
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual({}, self.instance.system_metadata)

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
        self.stub_out(
            'nova.virt.libvirt.storage.metadata.InstanceDisks.load', None)
        migration.confirm(self.context, self.source, self.instance)

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
        self.assertEqual({}, self.instance.system_metadata)

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

    def test_peer_is_started_again(self):
        self.move()
        connect = self.host.connect_to_peer
        self.host.connect_to_peer = mock.Mock(
            side_effect=[ValueError('refused'), ValueError('refused'),
                         connect('')])
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual({}, self.instance.system_metadata)

    def test_restart_of_the_source_while_the_peer_is_gone(self):
        self.move()
        self.host.peer = ValueError('no route')
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.undo._delete_anew.retry.stop',
            tenacity.stop_after_attempt(2)))
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual(AT_SOURCE, self.places())
        self.assertEqual(3, len(self.instance.system_metadata))

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
    def test_offer(self):
        self.make_offer()
        self.assertEqual(
            {'m': 7, 'o': [os.geteuid(), os.getegid()],
             'p': {POOL: ['disk', 'disk.config', 'disk.eph', 'disk.swap',
                          'files'],
                   two_hosts.BASES: ['base']},
             'f': [1 << 40, 1 << 40]},
            jsonutils.loads(self.instance.system_metadata[moves.OFFER]))
        self.instance.save.assert_called_once_with()

    def test_many_ephemeral_disks_fit_in(self):
        for n in range(1, 30):
            self.add_disk('disk.eph%d' % n, 10)
        self.make_offer()
        self.assertLessEqual(
            len(self.instance.system_metadata[moves.OFFER]), 255)

    def refused(self):
        e = self.assertRaises(exception.MigrationPreCheckError,
                              self.make_offer)
        self.assertNotIn(moves.OFFER, self.instance.system_metadata)
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
        self.assertIn("isn't writable", self.refused())

    def test_names_too_long(self):
        self.stub_out('nova.virt.libvirt.storage.pool.pool_name_for',
                      lambda name: name + 'x' * 100)
        for kind in (*moves.KINDS, files.NAME):
            self.dest.pools[kind + 'x' * 100] = {}
        self.assertIn('too long', self.refused())

    def set_backend(self, backend):
        for name, record in self.disks.items():
            record.backend = backend
            self.disks.set(name, record)
        self.disks.save(self.context)

    def offered(self):
        self.make_offer()
        return jsonutils.loads(
            self.instance.system_metadata[moves.OFFER])['p']

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
        self.assertEqual([*moves.KINDS, files.NAME], self.offered()[POOL])

    def refuses_nothing(self):
        self.dest.pools.clear()
        self.make_offer()
        self.assertEqual({}, self.instance.system_metadata)
        self.instance.save.assert_not_called()

    @ddt.data('lvm', 'rbd', 'ploop')
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
        record = self.disks.get('disk')
        record.format = 'qcow2'
        self.disks.set('disk', record)
        self.disks.save(self.context)
        self.fname = imagecache.get_cache_fname(uuids.image)
        self.way = '%s.%s' % (self.fname, uuids.instance)
        self.source.pools[two_hosts.BASES][self.fname] = {
            'length': 50, 'allocation': 50, 'content': 'the base'}
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        self.stub_out('nova.virt.libvirt.storage.arrival._adopt_base',
                      lambda volume, instance: None)

    def bases(self):
        return sorted(self.dest.pools[two_hosts.BASES])

    def accept(self):
        self.flags(host='dest')
        return arrival.accept(self.context, self.instance, self.load(),
                              self.dest, 'dest:///')

    def test_travels_under_another_name_until_verified(self):
        self.move()
        self.assertEqual([self.way], self.bases())
        self.assertEqual(4, len(self.copies))
        self.stub_out('os.rename', lambda old, new: (
            self.assertEqual('/disks/' + self.way, old),
            self.assertEqual(os.path.join(
                CONF.instances_path, '_base', self.fname), new)))
        self.assertTrue(self.accept())
        self.assertEqual({moves.MOVED, moves.SWAP},
                         set(self.instance.system_metadata))

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

    def test_glance_has_it(self):
        self.image_error = None
        self.move()
        self.assertEqual([], self.bases())

    def test_destination_has_it(self):
        self.dest.pools[two_hosts.BASES][self.fname] = {}
        self.move()
        self.assertEqual([self.fname], self.bases())

    def test_raw_disk_needs_none(self):
        self.disks.get('disk').format = 'raw'
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
        self.stub_out('nova.virt.libvirt.imagebackend._get_base_format',
                      lambda path: 'raw')

    def adopt(self, backing_file):
        inspect = mock.Mock(return_value=mock.Mock(backing_file=backing_file))
        self.stub_out('nova.virt.images.privileged_qemu_img_info', inspect)
        pool = two_hosts.Pool(self.source, POOL, 'source')
        arrival._adopt_base(pool.volume(self.volume_name('disk')),
                            self.instance)
        inspect.assert_called_once_with(
            '/disks/' + self.volume_name('disk'), format='qcow2')

    def base(self, directory):
        return os.path.join(
            directory, imagecache.get_cache_fname(uuids.image))

    def test_no_base(self):
        self.adopt(None)
        self.rewrite.assert_not_called()

    def test_same_path(self):
        self.adopt(self.base('/here/_base'))
        self.rewrite.assert_not_called()

    def test_other_path(self):
        self.adopt(self.base('/there/_base'))
        self.rewrite.assert_called_once_with(
            '/disks/' + self.volume_name('disk'), 'qcow2',
            self.base('/here/_base'), 'raw')

    @ddt.data('/etc/passwd', '/here/_base/other', 'json:{}', 'nbd://x')
    def test_foreign(self, path):
        self.assertRaises(exception.InvalidDiskInfo, self.adopt, path)
        self.rewrite.assert_not_called()

    def test_relative(self):
        self.assertRaises(exception.InvalidDiskInfo, self.adopt,
                          self.base(''))
