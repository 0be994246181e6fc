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
"""Which way disks go, and what is said where there is none."""

import contextlib

import ddt
import oslo_messaging as messaging
from oslo_utils import units

import nova.conf
from nova import exception
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import test_peers
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.move import peer_libvirt
from nova.virt.libvirt.storage.move import peer_service
from nova.virt.libvirt.storage.move import source
from nova.virt.libvirt.storage.move import undo
from nova.virt.libvirt.storage.pump import transfer as pump

CONF = nova.conf.CONF

POOL = test_peers.POOL


@ddt.ddt
class TransportTestCase(test_peers.ServicePeerBase,
                        test_move.OutgoingTestCase):

    def setUp(self):
        super().setUp()
        self.make_peer()
        self.use('auto')
        self.make_offer()

    def use(self, transport):
        self.flags(storage_migration_transport=transport, group='libvirt')

    def peer(self):
        outgoing = self.outgoing()
        outgoing.check()
        with outgoing:
            return outgoing.departure.peer

    @ddt.data('auto', 'nbd')
    def test_over_nbd(self, transport):
        self.use(transport)
        self.assertIsInstance(self.peer(), peer_service.ServicePeer)
        # No libvirt of a peer
        self.assertEqual([], self.host.uris)

    def test_by_libvirt(self):
        self.use('libvirt')
        self.assertIsInstance(self.peer(), peer_libvirt.LibvirtPeer)
        self.rpc.assert_not_called()

    def answer_too_old(self):
        self.answers['greet'] = exception.UnsupportedRPCVersion(
            api='take_in_disks', required='6.6')

    def test_what_can_not_go_over_nbd_goes_by_libvirt(self):
        self.answer_too_old()
        self.assertIsInstance(self.peer(), peer_libvirt.LibvirtPeer)
        self.assertIn('can not go to host dest by nbd',
                      self.stdlog.logger.output)

    def test_nbd_alone(self):
        self.use('nbd')
        self.answer_too_old()
        self.assertIn('upgrade the compute service on host dest',
                      self.refused())
        self.assertEqual([], self.host.uris)

    def test_no_way(self):
        self.answer_too_old()
        self.host.peer = ValueError('no trust')
        told = self.refused()
        self.assertIn('choose another host, or mend one of the two ways',
                      told)
        self.assertIn('Over NBD: upgrade the compute service', told)
        self.assertIn('no trust', told)

    def test_destination_that_is_set_to_libvirt(self):
        self.use('nbd')
        with self._set_to_libvirt():
            self.assertIn('storage_migration_transport', self.refused())

    @contextlib.contextmanager
    def _set_to_libvirt(self):
        answer = {'obstacle': None, 'aes': True}
        self.use('libvirt')
        answer['obstacle'] = self.intake.obstacle()
        self.use('nbd')
        self.answers['greet'] = answer
        yield

    def test_same_host(self):
        self.migration.dest_compute = 'source'
        outgoing = self.outgoing(same_host=True)
        outgoing.check()
        self.assertIsInstance(outgoing.departure.peer,
                              peer_libvirt.LibvirtPeer)
        self.assertEqual(([], []), (self.asked(), self.host.uris))


class MoveTestBase(test_peers.ServicePeerBase, test_move.OutgoingTestCase):
    """A move over NBD, of which the pump is played."""

    def setUp(self):
        super().setUp()
        self.make_peer()
        self.flags(storage_migration_transport='nbd', group='libvirt')
        self.make_offer()
        self.opened = {}
        self.answers['close'] = ()

    def take_in_disks(self, context, instance, migration, request):
        if request['do'] == 'open':
            port = 49216 + len(self.opened)
            self.opened[port] = (request['pool'], request['volume'])
            return {'address': '192.0.2.2', 'port': port,
                    'username': 'nova', 'key': 'key %d' % port}
        if request['do'] == 'connected':
            return
        return super().take_in_disks(context, instance, migration, request)

    def pump_copy(self, source_, export, length, **kwargs):
        if isinstance(export, pump.Volume):
            return super().pump_copy(source_, export, length, **kwargs)
        pool, name = self.opened[export.port]
        self.assertEqual('key %d' % export.port, export.key)
        return super().pump_copy(
            source_, pump.Volume('qemu+tls://192.0.2.2/system', pool, name),
            length, **kwargs)


@ddt.ddt
class MoveTestCase(MoveTestBase):

    def test_where_a_disk_is_taken_back(self):
        """By the host that it came from alone, which still has it."""
        record = self.disks.get('disk')
        record.previous = record.obj_clone()
        record.previous.host = 'third'
        record.host, record.state, record.migration_id = 'dest', 'building', 7
        self.disks.set('disk', record)
        undo.restore(self.disks, self.migration)
        self.assertEqual('dest', self.disks.get('disk').host)
        record.previous.host = 'source'
        undo.restore(self.disks, self.migration)
        self.assertEqual('source', self.disks.get('disk').host)

    def test_move(self):
        self.move()
        self.assertEqual({name: ('building', 'dest', name, 'source')
                          for name in test_move.AT_SOURCE}, self.places())
        self.assertEqual(test_move.COPIED, self.ours(self.dest))
        self.assertEqual([], self.host.uris)
        asked = self.asked()
        self.assertEqual([3, 3, 3], [asked.count(what) for what in (
            'open', 'connected', 'close')])
        for name in test_move.COPIED:
            self.assertIsNone(self.load().get(name).expected.address)

    @ddt.data('raw', 'qcow2')
    def test_disk_of_a_flavor_without_a_size(self, disk_format):
        """What it may be sent, the destination judges by the record."""
        length = 3 * units.Gi
        record = self.disks.get('disk')
        record.size, record.format = 0, disk_format
        self.disks.set('disk', record)
        self.disks.save(self.context)
        self.source.pools[POOL][self.volume_name('disk')].update(
            length=length)
        self.move()
        self.assertEqual(
            length, self.dest.pools[POOL][self.volume_name('disk')]['length'])
        self.assertEqual(length, self.load().get('disk').size)

    def come_wrong(self, transport):
        self.flags(storage_migration_transport=transport, group='libvirt')
        self.move()
        self.dest.pools[POOL][self.volume_name('disk')]['content'] = 'bad'
        self.flags(host='dest')
        self.copies.clear()
        return self.accept()

    def accept(self):
        return destination.accept(
            self.context, self.instance, self.load(), self.dest, 'dest:///',
            self.cache_base)

    def test_disk_that_is_done_at_once(self):
        def copy(*args, progress, **kwargs):
            return self.pump_copy(
                *args, **kwargs,
                progress=lambda done: [progress(0), progress(2 * done)])

        self.stub_out('nova.virt.libvirt.storage.pump.transfer.copy', copy)
        self.move()
        self.assertNotIn('connected', self.asked())
        self.assertEqual(3, self.asked().count('close'))

    def test_disk_that_has_come_wrong(self):
        e = self.assertRaises(exception.StorageTransferMismatch,
                              self.come_wrong, 'nbd')
        # It would be by libvirt.
        self.assertEqual([], self.copies)
        name = self.volume_name('disk')
        self.assertIn('write volume %s in storage pool %s of host source over '
                      'it, then hard reboot' % (name, POOL), str(e))
        here = self.dest.pools[POOL][name]
        here['content'] = self.source.pools[POOL][name]['content']
        self.assertTrue(self.accept())

    def test_disk_that_has_come_wrong_if_libvirt_is_allowed(self):
        self.assertTrue(self.come_wrong('auto'))
        source_ = self.copies[0][0]
        self.assertEqual('qemu+tls://192.0.2.1/system', source_.uri)

    def test_volume_whose_making_got_no_answer(self):
        take_in_disks, lost = self.rpc.side_effect, []

        def lose(context, instance, migration, request):
            found = take_in_disks(context, instance, migration, request)
            if request['do'] == 'create' and not lost:
                lost.append(request['volume'])
                raise messaging.MessagingTimeout('no reply')
            return found

        self.rpc.side_effect = lose
        self.assertRaises(exception.StorageIntakeError, self.move)
        self.assertEqual(lost, [name for _pool, name in self.left('dest')])
        self.make_offer()
        self.assertEqual([], self.ours(self.dest))

    def test_copy_that_fails(self):
        self.copy_error = exception.StorageTransferCancelled(
            volume='v', where='w', length=1, transferred=0)
        self.assertRaises(exception.StorageTransferCancelled, self.move)
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual([], self.ours(self.dest))
        self.nothing_of_a_move()
        self.assertEqual([], self.host.uris)

    def test_copy_that_fails_where_the_destination_has_an_error(self):
        """What a service hasn't expected, RPC raises here as it is."""
        self.copy_error = exception.StorageTransferCancelled(
            volume='v', where='w', length=1, transferred=0)
        self.answers['delete'] = FileNotFoundError(2, 'it is not there')
        self.assertRaises(exception.StorageTransferCancelled, self.move)
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual(test_move.COPIED, self.ours(self.dest))
        # The destination deletes them at its next chance.
        self.assertEqual(
            sorted((POOL, self.volume_name(name))
                   for name in test_move.COPIED), sorted(self.left('dest')))

    def test_destination_that_falls_silent(self):
        self.copy_error = exception.StorageTransferCancelled(
            volume='v', where='w', length=1, transferred=0)
        self.answers['delete'] = exception.StorageIntakeError(
            host='dest', reason='it is gone')
        self.assertRaises(exception.StorageTransferCancelled, self.move)
        self.assertEqual(test_move.AT_SOURCE, self.places())
        # once, and the next offer deletes them
        self.assertEqual(1, self.asked().count('delete'))
        self.assertEqual(test_move.COPIED, sorted(
            volume.split('_')[1] for _pool, volume in self.left('dest')))
        self.answers.pop('delete')
        self.make_offer()
        self.assertEqual([], self.ours(self.dest))

    def test_source_was_killed(self):
        self.move()
        self.disks = self.load()
        self.migration.status = 'error'
        source.abandon(self.context, self.host, self.instance,
                       self.migration, self.disks)
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual([], self.host.uris)

    def test_auto_deletes_by_what_is_there(self):
        self.flags(storage_migration_transport='auto', group='libvirt')
        self.answers['delete'] = exception.UnsupportedRPCVersion(
            api='take_in_disks', required='6.6')
        self.dest.pools[POOL]['it'] = {'length': 1, 'allocation': 1}
        undo.delete_at_peer(None, self.host, self.disks, self.migration,
                            [(POOL, 'it')])
        self.assertEqual({}, self.dest.pools[POOL])
        self.assertEqual([], self.left('dest'))
