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
"""What a source may rely on, whichever way it asks its destination."""

import socket
from unittest import mock

import fixtures
import oslo_messaging as messaging

import nova.conf
from nova import exception
from nova import objects
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.intake import export
from nova.virt.libvirt.storage.intake import intake
from nova.virt.libvirt.storage.move import peer_libvirt
from nova.virt.libvirt.storage.move import peer_service
from nova.virt.libvirt.storage.move import peers
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pump import transfer as pump

CONF = nova.conf.CONF

POOL = two_hosts.POOL


class PeerContract:
    """The tests of each Peer; a subclass has make_peer()."""

    def setUp(self):
        super().setUp()
        self.peer = self.make_peer()
        self.pool = self.peer.pool(POOL)
        self.there = self.dest.pools[POOL]
        self.name = self.volume_name('disk')

    def on_its_way(self, name='disk', **values):
        """Have it on record that a disk comes to dest."""
        record = self.disks.get(name)
        record.previous = record.obj_clone()
        record.host, record.state, record.migration_id = 'dest', 'building', 7
        for key, value in values.items():
            setattr(record, key, value)
        self.disks.set(name, record)
        self.disks.save(self.context)

    def here(self):
        return storage_pool.StoragePool(self.source, POOL, CONF.host)

    def test_is_a_peer(self):
        self.assertIsInstance(self.peer, peers.Peer)
        self.assertIsInstance(self.pool, peers.PeerPool)
        self.assertEqual((POOL, 'dest'), (self.pool.name, self.pool.host))

    def test_pool(self):
        self.assertEqual('dir', self.pool.check())
        self.assertTrue(self.peer.is_sparse('dir'))
        self.assertFalse(self.peer.is_sparse('logical'))
        self.assertEqual(1 << 40, self.pool.available(1000))

    def test_pool_that_is_off(self):
        self.dest.inactive.add(POOL)
        e = self.assertRaises(exception.MigrationPreCheckError,
                              self.pool.check)
        self.assertIn('start storage pool %s on host dest' % POOL, str(e))

    def test_names(self):
        self.assertEqual(self.name, self.pool.free_name(self.name))
        self.there[self.name] = {'length': 1, 'allocation': 1}
        self.pool.refresh()
        self.assertEqual(self.name + '.2', self.pool.free_name(
            self.name, {self.name + '.1'}))

    def test_base_image(self):
        pool = self.peer.pool(two_hosts.BASES)
        name = imagecache.get_cache_fname(self.instance.image_ref)
        self.assertFalse(pool.has(name, refresh=True))
        self.dest.pools[pool.name][name] = {'length': 1, 'allocation': 1}
        self.assertTrue(pool.has(name))

    def test_distinct_pools(self):
        self.assertFalse(self.pool.is_shared(self.here(), self.instance))
        self.assertEqual({}, self.there)

    def test_shared_pool(self):
        self.dest.pools[POOL] = self.source.pools[POOL]
        before = sorted(self.source.pools[POOL])
        self.assertTrue(self.pool.is_shared(self.here(), self.instance))
        self.assertEqual(before, sorted(self.source.pools[POOL]))

    def test_create_and_delete(self):
        self.on_its_way()
        self.note_left('dest', self.name + '.5')
        self.pool.create(self.name, 1000, 0o600)
        self.assertEqual(1000, self.there[self.name]['length'])
        self.assertRaises(exception.StorageVolumeExists,
                          self.pool.create, self.name, 5, 0o600)
        self.assertEqual([], self.peer.delete(
            [(POOL, self.name), (POOL, self.name + '.5')], self.instance))
        self.assertEqual({}, self.there)

    def test_what_can_not_be_deleted(self):
        self.on_its_way()
        self.pool.create(self.name, 1000, 0o600)
        self.dest.fail['delete'] = exception.StorageVolumeError(
            volume=self.name, pool=POOL, host='dest', reason='no', code=38)
        self.assertEqual([(POOL, self.name)], self.peer.delete(
            [(POOL, self.name)], self.instance))


class LibvirtPeerTestCase(PeerContract, two_hosts.TwoHostsTestCase):

    def make_peer(self):
        return peer_libvirt.LibvirtPeer(
            self.dest, 'qemu+tls://192.0.2.2/system', 'dest', [42, 43])

    def test_target(self):
        with self.peer.target(POOL, self.name) as target:
            self.assertEqual(
                ('qemu+tls://192.0.2.2/system', POOL, self.name), target.end)

    def test_connection_is_closed(self):
        with peer_libvirt.connected(self.host, '192.0.2.2', 'dest') as found:
            self.assertEqual('qemu+tls://192.0.2.2/system', found.where)
            self.assertFalse(self.dest.closed)
        self.assertTrue(self.dest.closed)

    def test_room_is_measured_anew_if_it_seems_too_little(self):
        self.dest.available = 10
        self.assertEqual(10, self.pool.available(10))
        self.assertEqual(0, self.dest.refreshes)
        self.assertEqual(10, self.pool.available(11))
        self.assertEqual(1, self.dest.refreshes)

    def test_file_that_libvirt_does_not_know_of(self):
        self.assertFalse(self.pool.has(self.name))
        self.assertEqual(0, self.dest.refreshes)
        self.assertFalse(self.pool.has(self.name, refresh=True))
        self.assertEqual(1, self.dest.refreshes)


class ServicePeerBase(two_hosts.TwoHostsTestCase):
    """RPC to dest is a call of its intake."""

    def setUp(self):
        self.answers = {}
        super().setUp()

    def make_peer(self):
        self.flags(state_path=self.useFixture(fixtures.TempDir()).path)
        self.flags(storage_migration_transport='nbd', group='libvirt')
        self.stub_out('nova.virt.libvirt.storage.pool.setup.pool_names',
                      lambda: [POOL])
        self.instance.host = 'source'
        self.migration.status = 'migrating'
        self.migration.migration_type = 'resize'
        self.instance.flavor = objects.Flavor(memory_mb=512)
        for name, found in (
                ('Instance.get_by_uuid', self.instance),
                ('Migration.get_by_id_and_instance', self.migration),
                ('BlockDeviceMappingList.get_by_instance_uuid', self.bdms)):
            self.useFixture(fixtures.MockPatch(
                'nova.objects.' + name, return_value=found))
        self.useFixture(fixtures.MockPatchObject(
            export, 'obstacle', return_value=None))
        self.missing = self.useFixture(fixtures.MockPatchObject(
            pump, 'nbd_missing', return_value=None)).mock
        self.intake = intake.Intake(
            lambda: self.dest, lambda: '127.0.0.1',
            lambda instance, running=False: False)
        self.rpc = self.useFixture(fixtures.MockPatch(
            'nova.compute.rpcapi.ComputeAPI.take_in_disks',
            side_effect=self.take_in_disks)).mock
        return peer_service.ServicePeer(
            self.context, self.instance, self.migration)

    def take_in_disks(self, context, instance, migration, request):
        found = self.answers.get(request['do'])
        if isinstance(found, Exception):
            raise found
        if found is not None:
            return found
        self.flags(host='dest')
        try:
            return self.intake.handle(context, instance, migration, request)
        finally:
            self.flags(host='source')

    def asked(self):
        return [call.args[3]['do'] for call in self.rpc.call_args_list]


class ServicePeerTestCase(PeerContract, ServicePeerBase):

    def test_no_libvirt_of_the_peer(self):
        self.peer.check([POOL])
        self.assertEqual([], self.host.uris)

    def test_room_is_what_the_file_system_has(self):
        self.free['/dest/' + POOL] = 77
        self.assertEqual(77, self.pool.available(5))
        self.assertEqual(0, self.dest.refreshes)

    def test_pool_whose_volumes_are_no_files(self):
        self.dest.types[POOL] = 'logical'
        e = self.assertRaises(exception.MigrationPreCheckError,
                              self.peer.check, [POOL])
        self.assertIn('of type logical', str(e))

    def test_pool_is_asked_once(self):
        for _n in range(2):
            pool = self.peer.pool(POOL)
            pool.check()
            for name in ('disk', 'disk.eph0'):
                pool.free_name(self.volume_name(name))
        self.assertEqual(['look', 'names'], self.asked())
        pool.refresh()
        pool.free_name(self.name)
        self.peer.check([POOL])
        self.assertEqual(['names', 'greet', 'look', 'reach'],
                         self.asked()[2:])

    def test_without_libnbd(self):
        self.missing.return_value = 'libnbd is not installed'
        e = self.assertRaises(exception.MigrationPreCheckError,
                              self.peer.check, [])
        self.assertIn('install libnbd on host source', str(e))
        self.assertEqual([], self.asked())

    def test_old_compute_service(self):
        self.answers['greet'] = exception.UnsupportedRPCVersion(
            api='take_in_disks', required='6.6')
        e = self.assertRaises(exception.MigrationPreCheckError,
                              self.peer.check, [])
        self.assertIn('upgrade the compute service on host dest', str(e))

    def test_answers_that_make_no_sense(self):
        """Of a host that was broken into; another way may do."""
        for what, answer in (
                ('greet', 'yes'), ('greet', []), ('reach', 'there'),
                ('reach', ['127.0.0.1']), ('reach', [None, 'port'])):
            self.answers = {what: answer}
            self.assertRaises(exception.StorageIntakeError,
                              self.peer.check, [POOL])

    def test_host_that_takes_nothing_in(self):
        self.answers['greet'] = {'obstacle': 'no qemu-nbd', 'aes': True}
        e = self.assertRaises(exception.MigrationPreCheckError,
                              self.peer.check, [])
        self.assertIn('no qemu-nbd', str(e))

    def test_port_that_is_not_reached(self):
        with socket.socket() as found:
            found.bind(('127.0.0.1', 0))
            self.answers['reach'] = found.getsockname()
            e = self.assertRaises(exception.MigrationPreCheckError,
                                  self.peer.check, [])
        self.assertIn('check the firewall of host dest', str(e))

    def test_silent_service_is_asked_once(self):
        self.answers['greet'] = messaging.MessagingTimeout('60 s')
        for _n in range(2):
            e = self.assertRaises(exception.StorageIntakeError,
                                  self.peer.ask, 'greet')
            self.assertIn('nova-compute there', str(e))
        self.assertEqual([(POOL, 'x')], self.peer.delete(
            [(POOL, 'x')], self.instance))
        self.assertEqual(['greet'], self.asked())

    def test_other_driver(self):
        self.answers['greet'] = NotImplementedError()
        self.assertRaises(exception.StorageIntakeError,
                          self.peer.ask, 'greet')

    def open(self):
        self.answers.update(open={'address': '192.0.2.2', 'port': 49217,
                                  'username': 'nova', 'key': 'ab' * 32},
                            connected=(), close=())
        return self.peer.target(POOL, self.name)

    def test_target(self):
        with self.open() as target:
            self.assertEqual(
                ('192.0.2.2', 49217, '', 'nova', 'ab' * 32), target.end)
            self.assertEqual(['open'], self.asked())
            target.connected()
            self.assertEqual(['open', 'connected'], self.asked())
        self.assertEqual(['open', 'connected', 'close'], self.asked())
        request = self.rpc.call_args_list[0].args[3]
        self.assertEqual(
            {'do': 'open', 'host': 'source', 'pool': POOL,
             'volume': self.name, 'connections': pump.NBD_CONNECTIONS,
             'aes': False}, request)

    def test_target_that_is_longer_than_the_disk(self):
        with self.open() as target:
            target.length = 700
        self.assertEqual(
            {'do': 'close', 'host': 'source', 'pool': POOL,
             'volume': self.name, 'length': 700},
            self.rpc.call_args.args[3])

    def test_old_peer_does_not_cut(self):
        self.assertFalse(self.peer.takes_ahead)
        self.peer.check([])
        self.assertTrue(self.peer.takes_ahead)
        self.answers['greet'] = {'obstacle': None, 'aes': True}
        self.peer.check([])
        self.assertFalse(self.peer.takes_ahead)

    def test_both_have_aes(self):
        with mock.patch.object(intake, 'cpu_has_aes', autospec=True,
                               return_value=True):
            self.peer.check([])
        with self.open():
            pass
        self.assertTrue(self.rpc.call_args_list[-2].args[3]['aes'])

    def test_copy_that_fails(self):
        opened = self.open()
        self.answers['close'] = exception.StorageIntakeError(
            host='dest', reason='gone')

        def copy():
            with opened:
                raise ValueError('cut')

        self.assertEqual('cut', str(self.assertRaises(ValueError, copy)))
        self.assertEqual(['open', 'close'], self.asked())
        self.assertIn('may still be open', self.stdlog.logger.output)

    def test_what_may_still_be_open_has_not_arrived(self):
        opened = self.open()
        self.answers['close'] = exception.StorageIntakeError(
            host='dest', reason='gone')

        def copy():
            with opened:
                pass

        self.assertRaises(exception.StorageIntakeError, copy)
