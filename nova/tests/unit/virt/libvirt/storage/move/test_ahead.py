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
"""Disks that are sent while their guest writes to them."""

from concurrent import futures
import threading
from unittest import mock

import ddt
import fixtures
from oslo_utils import units

from nova.compute import task_states
from nova import exception
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import test_transport
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.move import cancel
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.move import peer_service
from nova.virt.libvirt.storage.move import take_up
from nova.virt.libvirt.storage.pump import transfer as pump

POOL = two_hosts.POOL
MIB = 1 << 20


class WarmCopy:
    """Plays the pump's, and what its worker and the destination do.

    :cvar test: the AheadTestCase
    """
    test = None

    def __init__(self, source, export, length, key=None, sparse=True,
                 known=None, find_holes=False):
        self.source, self.length, self.key = source, length, key or 5
        self.test.known.append((key, known))
        self.is_volume = isinstance(export, pump.Volume)
        self.pool, self.name = (
            export[1:] if self.is_volume else self.test.opened[export.port])
        self.content = self.is_open = None

    def __enter__(self):
        self.is_open = True
        return self

    def __exit__(self, *error):
        self.is_open = False
        self.test.done.append('worker ends')

    def _pass(self, what, length, watch):
        watch.on_start(1234)
        self.test.done.append('%s of %s' % (what, self.name.split('_')[1]))
        for error in self.test.errors.pop(what, ()):
            raise error
        for part in (0, *self.test.parts, 1):
            watch.progress(int(part * length))
        if watch.cancelled():
            raise exception.StorageTransferCancelled(
                volume='v', where='w', length=1, transferred=0)
        there = self.test.dest.pools[self.pool][self.name]
        if self.is_volume and what == 'rest':
            # It is cut, or grows.
            there['length'] = length
        self.test.assertLessEqual(length, there['length'])
        here = self.test.source.pools[self.source.pool][self.source.name]
        there['content'] = here['content']
        watch.on_end(1234)
        return pump.Result(
            data=10, holes=length - 10, key=self.key,
            checksum=two_hosts.checksum_of(here['content']),
            physical=there['length'], allocation=None, seconds=1,
            changed=[(0, 10)] if what == 'rest' else self.test.sent)

    def first(self, watch, bandwidth, changed=None):
        self.test.differs.append(changed)
        return self._pass('first', self.length, watch)

    def rest(self, length, watch, bandwidth, changed=None):
        self.test.assertTrue(self.is_open)
        self.test.told.append((self.source.name, changed))
        return self._pass('rest', length, watch)


class AheadTestBase(test_transport.MoveTestBase):

    def setUp(self):
        super().setUp()
        # The other host's RPC is a call, during which this is that host.
        self.flags(storage_migration_precopy=0,
                   storage_migration_parallel_disks=1, group='libvirt')
        self.done, self.errors, self.known, self.told = [], {}, [], []
        self.differs, self.sent, self.parts = [], None, ()
        self.bitmaps = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.move.bitmaps.Bitmaps',
            autospec=True)).mock.return_value
        self.bitmaps.changed.return_value = None
        self.runs = True
        self.guest = mock.Mock()
        self.guest.is_active.side_effect = lambda: self.runs
        self.guest.get_config.return_value.os_nvram = None
        self.host.get_guest = lambda instance: self.guest
        self.stub_out('nova.virt.libvirt.storage.pump.transfer.WarmCopy',
                      type('Played', (WarmCopy,), {'test': self}))
        self.stub_out('nova.objects.Instance.get_by_uuid',
                      lambda *args, **kwargs: self.instance)
        self.instance.task_state = task_states.RESIZE_MIGRATING
        del self.answers['close']
        self.read_table = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pump.transfer.read_table',
            autospec=True, return_value=b'12345678')).mock
        self.verify_known = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pump.transfer.verify_known',
            autospec=True)).mock
        self.cut = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.intake.export.cut',
            autospec=True, side_effect=self._cut)).mock

    def _cut(self, path, length):
        found = self.dest.pools[POOL][path.rpartition('/')[2]]
        self.assertLessEqual(length, found['length'])
        found['length'] = length

    def write(self, name='disk', length=None):
        """What the guest does."""
        found = self.source.pools[POOL][self.volume_name(name)]
        found['content'] += ', and more'
        found['length'] = length or found['length']

    def begin(self):
        outgoing = self.outgoing()
        outgoing.check()
        outgoing.send_ahead()
        return outgoing

    def requests(self, what):
        """What the destination was asked for by such a request."""
        return [call.args[3] for call in self.rpc.call_args_list
                if call.args[3]['do'] == what]

    def accept(self):
        """Take the disks over; what is read of them in all."""
        self.flags(host='dest')
        self.verified = []

        def verify(volume, *args, **kwargs):
            self.verified.append(volume.name.split('_')[1])

        with mock.patch.object(pump, 'verify', new=verify):
            destination.accept(
                self.context, self.instance, self.load(), self.dest,
                'dest:///', self.cache_base, self.intake.verify)
        return self.verified

    def go_on(self, outgoing):
        self.runs = False
        with outgoing:
            outgoing.run(self.directory)

    def arrived(self):
        self.assertEqual(test_move.ON_THE_WAY, self.places())
        there, here = self.dest.pools[POOL], self.source.pools[POOL]
        for name in test_move.COPIED:
            volume = self.volume_name(name)
            expected = self.load().get(name).expected
            for field in ('content', 'length'):
                self.assertEqual(here[volume][field], there[volume][field])
            self.assertEqual(
                (here[volume]['length'],
                 two_hosts.checksum_of(here[volume]['content'])),
                (expected.length, expected.checksum))

    def broken(self):
        return exception.StorageTransferError(
            volume='v', where='w', length=1, transferred=0, reason='broken',
            side='destination', operation='send')

    def assert_untouched(self):
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual([], self.ours(self.dest))
        self.nothing_of_a_move()


@ddt.ddt
class PassesTests:
    """Of both ways; a subclass has assert_closed() and forget_instance()."""

    def test_progress_counts_both(self):
        told = []
        self.migration.save.side_effect = lambda: told.append(
            (self.migration.disk_processed, self.migration.disk_total,
             self.instance.progress))
        self.go_on(self.begin())
        self.assertEqual([(1700, 3400, 50), (3400, 3400, 100)], told)

    @ddt.data(-1, 1)
    def test_disks_that_are_not_worth_it(self, least):
        self.flags(storage_migration_precopy=least, group='libvirt')
        outgoing = self.begin()
        self.assertEqual(([], []), (self.done, self.saves))
        self.go_on(outgoing)
        self.assertEqual(3, len(self.copies))
        self.arrived()

    def test_what_qemu_has_noted(self):
        noted = {'disk': [(0, 5)], 'disk.eph0': None, 'disk.config': []}
        self.bitmaps.changed.side_effect = lambda item: noted[item.name]
        outgoing = self.begin()
        self.assertEqual(
            [mock.call.begin(mock.ANY)], self.bitmaps.method_calls)
        # One that could not be noted is read as a whole.
        self.go_on(outgoing)
        self.assertEqual(
            {self.volume_name(name): noted[name] for name in test_move.COPIED},
            dict(self.told))
        self.assertTrue(self.bitmaps.end.called)
        self.arrived()

    def test_what_is_flattened_with_the_guest_off(self):
        # Nothing of its base image is data, so it was sent ahead.
        self.lay_over('disk.eph0', 'ephemeral_1')
        self.bitmaps.changed.return_value = [(0, 5)]
        self.go_on(self.begin())
        self.assertEqual([self.volume_name('disk.eph0')], self.flattened)
        self.assertEqual(
            {self.volume_name(name): None if name == 'disk.eph0' else [(0, 5)]
             for name in test_move.COPIED}, dict(self.told))
        self.arrived()

    def test_image_is_looked_at_once_its_bitmap_is_gone(self):
        # Else what is gone would be removed, and a failure be logged.
        self.lay_over('disk.eph0', 'ephemeral_1')
        outgoing, events = self.begin(), []

        def look(path, size):
            events.append('look')
            return self.qemu_img_info(path, 'qcow2')

        self.stub_out('nova.virt.libvirt.storage.content.look_at_qcow2', look)
        self.bitmaps.changed.side_effect = (
            lambda item: events.append('changed')
            if item.name == 'disk.eph0' else [])
        self.go_on(outgoing)
        self.assertEqual('changed', events[-2])
        self.assertEqual('look', events[-1])

    def test_guest_that_was_off_when_its_host_had_crashed(self):
        # Its host can't have it grow with a bitmap that was never closed.
        name = self.volume_name('disk.eph0')
        self.lay_over('disk.eph0', 'ephemeral_1')
        self.source.pools[POOL][name]['bitmaps'] = [
            'nova-move-old', 'backup']
        remove = self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu.remove_dirty_bitmap')).mock
        self.move()
        self.assertEqual(
            [mock.call('/disks/' + name, 'nova-move-old')],
            remove.mock_calls)

    def test_nothing_is_noted(self):
        self.flags(storage_migration_dirty_bitmaps=False, group='libvirt')
        self.go_on(self.begin())
        self.bitmaps.begin.assert_not_called()
        self.arrived()

    def test_it_is_noted_before_anything_is_sent(self):
        self.bitmaps.begin.side_effect = lambda items: self.done.append(
            'noted %d' % len(items))
        self.begin().__exit__(None, None, None)
        self.assertEqual('noted 3', self.done[0])
        self.bitmaps.end.assert_called_once_with()

    def test_some_are_worth_it(self):
        self.flags(storage_migration_precopy=1, group='libvirt')
        self.source.pools[POOL][self.volume_name('disk.eph0')].update(
            length=2 * MIB, allocation=MIB)
        outgoing = self.begin()
        self.assertEqual(['first of disk.eph0'], self.done)
        self.go_on(outgoing)
        self.assertEqual(2, len(self.copies))
        self.arrived()

    def test_guest_is_off(self):
        self.runs = False
        self.go_on(self.begin())
        self.assertEqual([], self.done)
        self.arrived()

    def test_first_pass_fails(self):
        self.errors['first'] = [self.broken()]
        outgoing = self.begin()
        self.assert_untouched()
        self.assertIn('has not noticed', self.stdlog.logger.output)
        self.go_on(outgoing)
        self.assertEqual(3, len(self.copies))
        self.arrived()

    def test_cancelled_in_the_first_pass(self):
        self.migration.status = cancel.CANCELLING
        e = self.assertRaises(exception.InstanceFaultRollback, self.begin)
        self.assertIsInstance(e.inner_exception,
                              exception.StorageTransferCancelled)
        self.assert_untouched()

    def test_hard_reboot_in_the_first_pass(self):
        """An operator has reset the server's state: the copy goes on."""
        found = []

        def look():
            disks = self.load()
            self.assertTrue(disks.get('disk').is_building)
            found.append(test_move.migration.unfinished(
                self.context, self.instance, disks))

        self.migration.save.side_effect = look
        outgoing = self.begin()
        self.migration.save.side_effect = None
        look()
        self.assertEqual([None, None], found)
        self.go_on(outgoing)
        self.assertFalse(test_move.migration.is_running(self.instance))
        self.arrived()

    @ddt.data(True, False)
    def test_deleted_in_the_first_pass(self, is_gone):
        self.migration.status = cancel.CANCELLING
        if is_gone:
            self.stub_out(
                'nova.objects.Instance.get_by_uuid', mock.Mock(
                    side_effect=exception.InstanceNotFound(instance_id='i')))
            self.forget_instance()
        else:
            self.instance.task_state = task_states.DELETING
        self.assertRaises(exception.StorageTransferCancelled, self.begin)

    def test_rest_fails(self):
        outgoing = self.begin()
        self.write()
        self.errors['rest'] = [self.broken()]
        self.go_on(outgoing)
        ((source, _target, length, _kwargs),) = self.copies
        self.assertEqual((self.volume_name('disk'), 1000),
                         (source.name, length))
        self.assertIn('could not be: ', self.stdlog.logger.output)
        # zeroes are not written to what is new
        self.assertEqual(1, self.dest.log.count(
            'delete ' + self.volume_name('disk')))
        self.arrived()

    def test_copy_fails_after_the_first_pass(self):
        outgoing = self.begin()
        self.errors['rest'] = [self.broken()]
        self.copy_error = self.broken()
        self.assertRaises(exception.StorageTransferError, self.go_on,
                          outgoing)
        self.assert_untouched()
        self.assertEqual(3, self.done.count('worker ends'))

    @ddt.data('guest_files.pack', 'copy.Transfer.choose_names',
              'copy.Transfer.save_building')
    def test_what_comes_between_the_passes_fails(self, what):
        outgoing = self.begin()
        self.stub_out('nova.virt.libvirt.storage.move.' + what,
                      mock.Mock(side_effect=self.broken()))
        self.assertRaises(exception.StorageTransferError, self.go_on,
                          outgoing)
        self.assert_untouched()

    def test_cancelled_in_the_second_pass(self):
        outgoing = self.begin()
        self.migration.status = cancel.CANCELLING
        self.assertRaises(exception.StorageTransferCancelled, self.go_on,
                          outgoing)
        self.assertEqual([], self.copies)
        self.assert_untouched()

    def test_power_off_fails(self):
        # The driver has the disks back then, as after a restart.
        outgoing = self.begin()
        with outgoing:
            pass
        self.assertEqual(3, self.done.count('worker ends'))
        self.assert_closed()
        self.assertEqual(test_move.ON_THE_WAY['disk'], self.places()['disk'])
        test_move.migration.abandon(
            self.context, self.host, self.instance, self.migration,
            self.load())
        self.assert_untouched()

    def test_restarted_in_the_first_pass(self):
        self.begin()
        self.assertEqual(3, len(self.ours(self.dest)))
        test_move.migration.abandon(
            self.context, self.host, self.instance, self.migration,
            self.load())
        self.assert_untouched()


class AheadTestCase(PassesTests, AheadTestBase):
    """Over NBD."""

    def assert_closed(self):
        self.assertEqual(3, self.asked().count('close'))

    def test_both_passes(self):
        outgoing = self.begin()
        self.assertEqual(['first of disk', 'first of disk.config',
                          'first of disk.eph0'], self.done)
        self.assertEqual(3, self.asked().count('connected'))
        self.assertNotIn('close', self.asked())
        self.assertEqual(0, self.guest.poweroff.call_count)
        self.write()
        del self.done[:]
        self.go_on(outgoing)
        self.assertEqual(3, len([d for d in self.done if 'rest' in d]))
        self.assertEqual([], self.copies)
        # before the destination is told to close
        self.assertEqual(3, self.done.count('worker ends'))
        self.assertEqual([3, 3, 3, 3], [self.asked().count(what) for what in (
            'create', 'open', 'connected', 'close')])
        self.arrived()
        self.assertIn('The server has been down for',
                      self.stdlog.logger.output)

    def test_image_that_grows(self):
        record = self.disks.get('disk')
        record.format = 'qcow2'
        self.disks.set('disk', record)
        outgoing = self.begin()
        there = self.dest.pools[POOL][self.volume_name('disk')]
        self.assertGreater(there['length'], 16 * MIB)
        self.write(length=5 * MIB)
        self.go_on(outgoing)
        self.assertEqual([], self.copies)
        self.arrived()

    def test_destination_does_not_know_it(self):
        self.answers['greet'] = {'obstacle': None, 'aes': True}
        self.go_on(self.begin())
        self.assertEqual([], self.done)
        self.arrived()

    def test_destination_is_lost_in_the_first_pass(self):
        self.errors['first'] = [self.broken()]
        outgoing = self.outgoing()
        outgoing.check()
        lost = exception.StorageIntakeError(host='dest', reason='is lost')
        self.answers.update(delete=lost, greet=lost, close=lost)
        e = self.assertRaises(exception.InstanceFaultRollback,
                              outgoing.send_ahead)
        self.assertIs(lost, e.inner_exception)
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual(3, len(self.left('dest')))

    def forget_instance(self):
        self.answers.update(look={'type': 'dir', 'free': 1 << 40},
                            has=False, probe=(), names=[], create=(),
                            close=(), delete=())
        self.answers['greet'] = {'obstacle': None, 'aes': True, 'cuts': True}
        self.answers['reach'] = ['127.0.0.1', 1]
        self.stub_out('socket.create_connection', mock.Mock())

    def test_destination_is_lost_between_the_passes(self):
        self.rpc.side_effect = self._lost_when_all_is_read
        e = self.assertRaises(exception.InstanceFaultRollback, self.begin)
        self.assertIn('is lost', str(e.inner_exception))
        self.assertEqual(test_move.AT_SOURCE, self.places())

    def _lost_when_all_is_read(self, context, instance, migration, request):
        if request['do'] == 'greet' and self.done:
            raise exception.StorageIntakeError(host='dest', reason='is lost')
        return self.take_in_disks(context, instance, migration, request)


@ddt.ddt
class LibvirtAheadTestCase(PassesTests, AheadTestBase):
    """By libvirt's streams."""

    def setUp(self):
        super().setUp()
        self.flags(storage_migration_transport='libvirt', group='libvirt')
        self.addCleanup(self.rpc.assert_not_called)

    def assert_closed(self):
        pass

    def forget_instance(self):
        pass

    def grows(self, version=9_000_000, length=5 * MIB):
        record = self.disks.get('disk')
        record.format, record.size = 'qcow2', 1 << 40
        self.disks.set('disk', record)
        self.dest.version = version
        outgoing = self.begin()
        there = dict(self.dest.pools[POOL][self.volume_name('disk')])
        self.write(length=length)
        self.go_on(outgoing)
        self.arrived()
        return there['length'], self.dest.allocated[self.volume_name('disk')]

    def test_both_passes(self):
        outgoing = self.begin()
        self.assertEqual(['first of disk', 'first of disk.config',
                          'first of disk.eph0'], self.done)
        self.assertEqual(0, self.guest.poweroff.call_count)
        self.write()
        self.go_on(outgoing)
        self.assertEqual(3, len([d for d in self.done if 'rest' in d]))
        self.assertEqual([], self.copies)
        self.assertEqual(3, self.done.count('worker ends'))
        self.arrived()
        self.assertIn('The server has been down for',
                      self.stdlog.logger.output)

    def test_image_that_grows(self):
        self.assertEqual((1000, 0), self.grows())
        self.assertEqual([], self.copies)

    def test_room_is_taken_where_a_full_disk_ends_libvirt(self):
        # Of what it may grow by, too: that ends libvirt as well.
        room = 1000 + 256 * MIB
        self.assertEqual((room, room), self.grows(11_003_000))

    def test_raw_disk_has_its_room(self):
        self.dest.version = 11_003_000
        self.begin()
        self.assertEqual(1000, self.dest.allocated[self.volume_name('disk')])

    def test_nothing_is_read_there_before(self):
        self.go_on(self.begin())
        self.assertEqual(['disk', 'disk.config', 'disk.eph0'],
                         sorted(self.accept()))

    def test_same_host(self):
        self.migration.dest_compute = 'source'
        outgoing = self.outgoing(same_host=True)
        outgoing.check()
        outgoing.send_ahead()
        self.assertEqual([], self.done)

    def lose_destination(self, *args):
        self.dest.inactive.add(POOL)
        self.dest.fail['delete'] = self.broken()
        return self.broken()

    def assert_lost(self):
        e = self.assertRaises(exception.InstanceFaultRollback, self.begin)
        self.assertIn('start storage pool', str(e.inner_exception))
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual(3, len(self.left('dest')))

    def test_destination_is_lost_in_the_first_pass(self):
        self.errors['first'] = (self.lose_destination() for _n in range(1))
        self.assert_lost()

    def test_destination_is_lost_between_the_passes(self):
        self.migration.save.side_effect = self.lose_destination
        self.assert_lost()


@ddt.ddt
class ReadAheadTestCase(AheadTestBase):
    """The destination reads what has come while the guest still runs."""

    def setUp(self):
        super().setUp()
        self.stub_out('nova.virt.libvirt.storage.move.ahead._READ_SOON', -1)

    def changed(self):
        return [request.get('changed') for request in self.requests('close')]

    def test_only_what_was_written_since_is_read_again(self):
        outgoing = self.begin()
        self.assertEqual(3, self.read_table.call_count)
        self.assertEqual([1000, 100, 600], [
            call.args[1] for call in self.read_table.call_args_list])
        self.write()
        self.go_on(outgoing)
        self.assertEqual([[[0, 10]]] * 3, self.changed())
        self.arrived()
        expected = self.load().get('disk').expected
        self.assertEqual([], self.accept())
        self.assertEqual(
            (1000, expected.checksum, pump.Known(1000, b'12345678'),
             [(0, 10)]), self.verify_known.call_args_list[0].args[1:])
        self.assertIn('after most of it before', self.stdlog.logger.output)

    def test_what_is_not_right_by_that_is_read_in_all(self):
        self.verify_known.side_effect = [
            None, exception.StorageTransferMismatch(
                volume='v', where='w', reason='its checksum is another'),
            None]
        self.go_on(self.begin())
        self.assertEqual(1, len(self.accept()))
        self.assertIn('its checksum is another', self.stdlog.logger.output)

    def test_destination_does_not_know_it(self):
        self.answers['greet'] = {'obstacle': None, 'aes': True, 'cuts': True}
        self.go_on(self.begin())
        self.assertEqual([None] * 3, self.changed())
        self.read_table.assert_not_called()
        self.assertEqual(3, len(self.accept()))

    def reads_of_a_large_one(self):
        """What the destination was asked to read of it, there or not."""
        self.source.pools[POOL][self.volume_name('disk.eph0')].update(
            length=units.Gi, allocation=units.Gi)
        self.parts = (.5, .75, .9)
        self.go_on(self.begin())
        self.assertEqual([[[0, 10]]] * 3, self.changed())
        self.arrived()
        self.assertEqual([], self.accept())
        return [request['changed'] for request in self.requests('read')
                if request['volume'] == self.volume_name('disk.eph0')]

    @mock.patch.object(pump, 'read_again', autospec=True)
    def test_large_one_is_read_while_the_last_of_it_comes(self, read_again):
        known = pump.Known(units.Gi, b'later')
        read_again.return_value = (mock.Mock(), known)
        later = [704 * MIB, 320 * MIB]
        self.assertEqual([None, [later]], self.reads_of_a_large_one())
        self.assertEqual(
            (pump.Known(units.Gi, b'12345678'), [tuple(later)]),
            read_again.call_args.args[2:4])
        self.assertEqual(known, self.verify_known.call_args.args[3])

    def test_large_one_that_can_not_be_read_so_early(self):
        take_in_disks, failed = self.rpc.side_effect, []

        def ask(context, instance, migration, request):
            if request['do'] == 'read' and not self.cut.called and (
                    request['room'] == units.Gi and not failed):
                failed.append(request)
                raise exception.StorageIntakeError(host='dest', reason='no')
            return take_in_disks(context, instance, migration, request)

        self.rpc.side_effect = ask
        self.assertEqual([None, None], self.reads_of_a_large_one())

    def test_large_one_of_which_the_early_reading_fails(self):
        self.read_table.side_effect = [
            b'12345678', b'12345678', exception.NovaException('it is bad'),
            b'12345678']
        self.assertEqual([None, None], self.reads_of_a_large_one())

    def test_destination_was_restarted(self):
        self.go_on(self.begin())
        self.intake._readings = type(self.intake._readings)()
        self.assertEqual(3, len(self.accept()))

    @ddt.data('read', 'has_read')
    def test_failure(self, what):
        self.answers[what] = exception.StorageIntakeError(
            host='dest', reason='the disk is slow')
        self.go_on(self.begin())
        self.assertEqual([None] * 3, self.changed())
        self.assertIn('reads all of volume', self.stdlog.logger.output)
        self.arrived()
        self.assertEqual(3, len(self.accept()))

    def test_one_fails(self):
        self.read_table.side_effect = [
            b'12345678', exception.NovaException('the disk is bad'),
            b'12345678']
        self.go_on(self.begin())
        self.assertEqual([[[0, 10]], None, [[0, 10]]], self.changed())
        self.assertEqual(['disk.config'], self.accept())

    def test_what_is_read_at_once_is_not_waited_for(self):
        # Of a kept copy little has changed.
        slept = []
        self.stub_out('time.sleep', slept.append)
        self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.move.peer_service.ServicePool.has_read',
            side_effect=[(0, False), (5, True)] * 2 + [(5, False)] * 30 + [
                (5, True)]))
        self.begin()
        self.assertEqual([.05, .05, .05, .0625, .078125], slept[:5])
        self.assertEqual(.5, max(slept))

    @ddt.data((256, ['disk.eph0']), (1000, []), (-1, [
        'disk', 'disk.config', 'disk.eph0']))
    @ddt.unpack
    def test_what_is_read_soon_is_not_waited_for(self, soon, waited_for):
        self.stub_out('nova.virt.libvirt.storage.move.ahead._READ_SOON',
                      soon * MIB if soon > 0 else soon)
        self.source.pools[POOL][self.volume_name('disk.eph0')].update(
            length=1000 * MIB, allocation=1000 * MIB)
        with mock.patch.object(
                peer_service.ServicePool, 'has_read',
                # Nor is the last of what is much.
                return_value=(1000 * MIB - soon * MIB, soon < 0)) as asked:
            outgoing = self.begin()
        self.assertEqual(
            waited_for, [call.args[0].split('_')[1]
                         for call in asked.call_args_list])
        self.go_on(outgoing)
        self.assertEqual([[[0, 10]]] * 3, self.changed())
        self.arrived()

    def test_it_stalls(self):
        self.answers['has_read'] = {'done': 5, 'ended': False}
        clock = iter(range(0, 100000, 20))
        self.stub_out('time.sleep', lambda seconds: None)
        with mock.patch('time.monotonic', new=lambda: next(clock)):
            outgoing = self.begin()
        self.assertIn('read nothing for 60', self.stdlog.logger.output)
        self.go_on(outgoing)
        self.arrived()

    def test_cancelled(self):
        self.answers['has_read'] = {'done': 5, 'ended': False}

        def sleep(seconds):
            self.migration.status = cancel.CANCELLING

        self.stub_out('time.sleep', sleep)
        e = self.assertRaises(exception.InstanceFaultRollback, self.begin)
        self.assertIsInstance(e.inner_exception,
                              exception.StorageTransferCancelled)
        self.assert_untouched()

    def test_rest_fails(self):
        outgoing = self.begin()
        self.errors['rest'] = [self.broken()]
        self.go_on(outgoing)
        # One is made anew, and nothing known of it then.
        self.assertEqual(1, len(self.accept()))


@ddt.ddt
class KeptTestCase(AheadTestBase):
    """The destination still has an old copy of the root disk."""

    def setUp(self):
        super().setUp()
        self.flags(storage_migration_keep_copies=24, group='libvirt')
        self.stub_out('nova.virt.libvirt.storage.move.ahead._KEPT_LEAST', 1)
        self.is_local = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.mounts.is_local',
            autospec=True, return_value=True)).mock
        self.free = 1 << 40
        self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.utils.get_fs_info',
            side_effect=lambda path: {'free': self.free}))
        self.name = self.volume_name('disk')
        self.dest.pools[POOL][self.name] = {
            'length': 900, 'allocation': 900, 'content': 'long ago'}
        self.note_left('dest', self.name)
        self.prepare = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.intake.kept.prepare', autospec=True,
            side_effect=self._prepare)).mock
        self.read_again = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pump.transfer.read_again',
            autospec=True, return_value=(
                None, pump.Known(1000, b'87654321')))).mock
        # The other host's RPC is a call, during which this is that host.
        self.in_a_thread = take_up._spawn
        self.spawn = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.move.take_up._spawn',
            side_effect=self._do_now)).mock

    def _do_now(self, function):
        future = futures.Future()
        try:
            future.set_result(function())
        except Exception as e:
            future.set_exception(e)
        return future

    def _worth_reading(self, answer):
        """Let the source read the disk, too."""
        self.stub_out('nova.virt.libvirt.storage.move.take_up._WORTH_READING',
                      1)

        def read(volume, length, **kwargs):
            if 'in_use' not in kwargs:
                return b'12345678'
            self.done.append('read here')
            self.assertEqual((self.name, 1000, 1000, True), (
                volume.name, length, kwargs['room'], kwargs['in_use']))
            return answer(**kwargs)

        self.read_table.side_effect = read

    def _prepare(self, path, length, room, mode):
        # Now it is on record as coming, and left no longer.
        self.assertEqual([], self.left('dest'))
        self.assertTrue(self.load().get('disk').is_building)
        self.dest.pools[POOL][self.name]['length'] = room

    def assert_sent_into_it(self):
        self.assertEqual(1, self.asked().count('take_up'))
        self.assertEqual(2, self.asked().count('create'))
        (_call,) = self.prepare.call_args_list
        self.assertEqual(('/disks/' + self.name, 1000, 1000, 0o644),
                         _call.args)
        key = self.read_table.call_args_list[0].kwargs['key']
        self.assertEqual((key, pump.Known(1000, b'12345678')), self.known[0])
        self.assertEqual([(None, None)], self.known[1:][:1])
        self.assertNotIn('delete ' + self.name, self.dest.log)

    def test_answer_that_comes_when_the_wait_ends(self):
        future = mock.Mock()
        future.done.return_value = True
        future.result.side_effect = [futures.TimeoutError, 'answer']
        self.assertEqual(
            'answer', take_up._TakeUp._result(None, future, None))

    def test_it_is_written_over(self):
        outgoing = self.begin()
        self.assert_sent_into_it()
        self.assertIn('into a copy that was kept', self.stdlog.logger.output)
        self.write()
        self.go_on(outgoing)
        self.assertEqual([], self.copies)
        self.arrived()

    @ddt.data((b'12345678', []), (b'12345679', [(0, 65536)]))
    @ddt.unpack
    def test_what_differs_is_sent(self, table, differs):
        self.bitmaps.begin.side_effect = lambda items: self.done.append(
            'noted')
        self._worth_reading(lambda **kwargs: table)
        outgoing = self.begin()
        self.assert_sent_into_it()
        self.assertEqual(['noted', 'read here', 'first of disk'],
                         self.done[:3])
        self.assertEqual([differs, None, None], self.differs)
        self.assertEqual(1, len({
            call.kwargs['key'] for call in self.read_table.call_args_list
            if call.args[0].name == self.name}))
        self.go_on(outgoing)
        self.arrived()

    def test_both_hosts_read_at_once(self):
        self.spawn.side_effect = self.in_a_thread
        both = threading.Barrier(2)
        self._worth_reading(lambda **kwargs: b'%d' % both.wait(60))
        ask = peer_service.ServicePool.take_up

        def read_there(*args):
            both.wait(60)
            return ask(*args)

        with mock.patch.object(peer_service.ServicePool, 'take_up',
                               new=read_there):
            self.begin()
        self.assertIn('read here', self.done)
        self.assert_sent_into_it()

    @ddt.data(b'', exception.StorageTransferStalled(
        volume='v', where='w', length=1, transferred=0, seconds=60))
    def test_what_differs_is_not_known(self, answer):
        def read(**kwargs):
            if answer:
                raise answer
            return answer

        self._worth_reading(read)
        outgoing = self.begin()
        self.assert_sent_into_it()
        self.assertIn('is read once more', self.stdlog.logger.output)
        self.assertEqual([None] * 3, self.differs)
        self.go_on(outgoing)
        self.arrived()

    def test_cancelled_while_the_disk_is_read(self):
        def read(on_start, on_end, cancelled, **kwargs):
            on_start(77)
            on_end(77)
            self.assertFalse(cancelled())
            self.migration.status = cancel.CANCELLING
            self.assertTrue(cancelled())
            raise exception.StorageTransferCancelled(
                volume='v', where='w', length=1, transferred=0)

        self._worth_reading(read)
        e = self.assertRaises(exception.InstanceFaultRollback, self.begin)
        self.assertIsInstance(e.inner_exception,
                              exception.StorageTransferCancelled)
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertIn((POOL, self.name), self.left('dest'))
        self.assertNotIn('delete', self.asked())

    def test_disk_is_read_for_a_copy_that_is_of_no_use(self):
        self.spawn.side_effect = self.in_a_thread
        given_up, begun = threading.Event(), threading.Event()

        def read(cancelled, **kwargs):
            begun.set()
            while not cancelled():
                self.assertFalse(given_up.wait(.01))
            given_up.set()
            raise exception.StorageTransferCancelled(
                volume='v', where='w', length=1, transferred=0)

        self._worth_reading(read)
        with mock.patch.object(
                peer_service.ServicePool, 'take_up',
                side_effect=lambda *args: begun.wait(60) and self.fail_now()):
            outgoing = self.begin()
        self.assertTrue(given_up.wait(60))
        self.assertEqual([(None, None)] * 3, self.known)
        self.go_on(outgoing)
        self.arrived()

    def fail_now(self):
        raise exception.StorageIntakeError(host='dest', reason='it is a pipe')

    def test_what_was_written_over_is_read_again(self):
        outgoing = self.begin()
        # It was all taken up and is read by the pieces that were sent.
        self.assertEqual([None] * 3, [
            request['changed'] for request in self.requests('read')])
        self.go_on(outgoing)
        self.assertEqual([], self.accept())

    def test_copy_to_which_nothing_is_sent_is_not_read_again(self):
        self.sent = []
        outgoing = self.begin()
        # A disk of which nothing was kept has been read by nobody.
        self.assertEqual(
            [self.volume_name('disk.config'), self.volume_name('disk.eph0')],
            [request['volume'] for request in self.requests('read')])
        self.go_on(outgoing)
        self.arrived()
        self.assertEqual([], self.accept())

    def test_small_disk(self):
        self.flags(storage_migration_precopy=1, group='libvirt')
        outgoing = self.begin()
        self.assertEqual(['first of disk'], self.done)
        self.go_on(outgoing)
        self.arrived()

    def test_guest_is_off(self):
        self.runs = False
        self.go_on(self.begin())
        self.assertEqual('first of disk', self.done[0])
        self.assertNotIn('while the server runs', self.stdlog.logger.output)
        self.arrived()

    def _not_taken_up(self):
        self.go_on(self.begin())
        self.assertNotIn('take_up', self.asked())
        self.assertEqual(self.name + '.1', self.load().get('disk').volume)

    def test_off(self):
        self.flags(storage_migration_keep_copies=0, group='libvirt')
        self._not_taken_up()

    def test_destination_does_not_know_it(self):
        self.answers['greet'] = {'obstacle': None, 'aes': True, 'cuts': True}
        self._not_taken_up()

    def test_too_little_to_be_compared(self):
        self.stub_out('nova.virt.libvirt.storage.move.ahead._KEPT_LEAST', MIB)
        self._not_taken_up()

    def test_destination_that_others_see_into(self):
        self.is_local.return_value = False
        self._not_taken_up()

    def test_what_a_failed_try_has_left(self):
        self.errors['first'] = [self.broken()]
        outgoing = self.begin()
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual(self.copies_of_all(), sorted(self.left('dest')))
        self.assertEqual(test_move.COPIED, self.ours(self.dest))
        self.assertNotIn('delete', self.asked())
        # Those that are copied anew are not in their way.
        self.go_on(outgoing)
        self.assertEqual(self.name + '.1', self.load().get('disk').volume)

    @ddt.data('names', 'create')
    def test_failure_before_it_is_taken_up(self, what):
        # Another one is kept as well, and that it is left is known then.
        eph0 = self.volume_name('disk.eph0')
        self.dest.pools[POOL][eph0] = dict(self.dest.pools[POOL][self.name])
        self.note_left('dest', eph0)
        self.prepare.side_effect = exception.StorageIntakeError(
            host='dest', reason='it is a pipe')
        self.answers[what] = exception.StorageIntakeError(
            host='dest', reason='it can not be had')
        self.begin()
        self.assertEqual(test_move.AT_SOURCE, self.places())
        # One that wasn't answered may be there.
        unanswered = {self.volume_name('disk.config')} & (
            {name for _pool, name in self.left('dest')}
            if what == 'create' else set())
        self.assertEqual(
            sorted((POOL, name) for name in [
                *self.dest.pools[POOL], *unanswered]
                if name in (self.name, eph0, *unanswered)),
            sorted(self.left('dest')))
        self.assertIn((POOL, eph0), self.left('dest'))

    def test_cancelled_while_the_copy_is_read(self):
        # For a quarter of an hour, perhaps.
        self.spawn.side_effect = self.in_a_thread
        done = threading.Event()
        self.addCleanup(done.set)

        def take_up(*args):
            self.migration.status = cancel.CANCELLING
            self.assertTrue(done.wait(60))

        with mock.patch('nova.virt.libvirt.storage.move.peer_service.'
                        'ServicePool.take_up', side_effect=take_up):
            e = self.assertRaises(exception.InstanceFaultRollback, self.begin)
            self.assertIsInstance(e.inner_exception,
                                  exception.StorageTransferCancelled)
            self.assertFalse(done.is_set())
        self.assertEqual(test_move.AT_SOURCE, self.places())

    def test_kept_copy_while_many_disks_are_copied(self):
        # It gets no thread.
        self.spawn.side_effect = lambda function: futures.Future()
        self._worth_reading(self.fail)
        outgoing = self.begin()
        self.assert_sent_into_it()
        self.go_on(outgoing)

    def test_server_that_is_deleted(self):
        self.instance.task_state = task_states.DELETING
        self.errors['first'] = [self.broken()]
        self.begin()
        self.assertEqual([], self.left('dest'))
        self.assertEqual({}, self.dest.pools[POOL])

    def copies_of_all(self):
        return [(POOL, self.volume_name(name)) for name in test_move.COPIED]

    def take_over(self):
        """What the destination does."""
        disks = self.load()
        for name, record in disks.items():
            record.state, record.expected = 'ready', None
            disks.set(name, record)
        disks.save(self.context)

    def test_confirm(self):
        self.go_on(self.begin())
        self.take_over()
        test_move.migration.confirm(self.context, self.source, self.instance)
        self.assertEqual(self.copies_of_all(), sorted(self.left('source')))
        self.assertEqual(test_move.COPIED, self.ours(self.source))
        self.assertEqual({None}, {
            record.previous for _name, record in self.load().items()})

    @ddt.data(True, False)
    def test_revert(self, is_local):
        self.go_on(self.begin())
        self.take_over()
        self.is_local.return_value = is_local
        self.flags(host='dest')
        deleted = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.ownership.delete_volumes',
            autospec=True, return_value=True)).mock
        disks = self.load()
        self.assertTrue(destination.give_back(
            self.dest, self.instance, disks, keep=()))
        wanted = self.copies_of_all() if is_local else []
        self.assertEqual(wanted, sorted(self.left('dest')))
        self.assertEqual(wanted, sorted(deleted.call_args.kwargs['keep']))

    @ddt.data(0, 24)
    def test_revert_leaves_to_the_destination_what_that_keeps(self, hours):
        self.flags(storage_migration_keep_copies=hours, group='libvirt')
        test_move.migration.abandon(self.context, self.host, self.instance,
                                    self.migration, self.load())
        self.assertEqual([(POOL, self.name)] if hours else [],
                         self.left('dest'))
        self.assertEqual(bool(hours), self.name in self.dest.pools[POOL])

    @ddt.data((True, 1, True), (True, 1 << 40, False), (False, 1, False))
    @ddt.unpack
    def test_offer_where_there_is_no_room(self, is_local, size, stays):
        self.is_local.return_value = is_local
        disks = self.load()
        record = disks.get('disk')
        record.size = size
        disks.set('disk', record)
        self.flags(host='dest')
        self.free = 1 << 39
        with mock.patch.object(destination, '_kinds_that_may_come',
                               return_value=[]):
            destination.offer(self.dest, self.instance, self.migration, disks)
        self.assertEqual([(POOL, self.name)] if stays else [],
                         self.left('dest'))
        self.assertEqual(stays, self.name in self.dest.pools[POOL])

    def test_confirm_where_others_see_into_the_pool(self):
        self.go_on(self.begin())
        self.take_over()
        self.is_local.return_value = False
        test_move.migration.confirm(self.context, self.source, self.instance)
        self.assertEqual([], self.left('source'))
        self.assertEqual([], self.ours(self.source))

    def test_left_on_another_host_or_of_another_disk(self):
        disks = self.load()
        disks.leftovers = [('other', POOL, self.name),
                           ('dest', 'other', self.name),
                           ('dest', POOL, self.name + '.eph1'),
                           ('dest', POOL, self.name + '_files')]
        disks.save(self.context)
        outgoing = self.begin()
        self.assertNotIn('take_up', self.asked())
        self.go_on(outgoing)

    def test_of_no_use(self):
        self.prepare.side_effect = exception.StorageIntakeError(
            host='dest', reason='it is a pipe')
        outgoing = self.begin()
        self.assertIn('it is a pipe', self.stdlog.logger.output)
        self.assertEqual(1, self.dest.log.count('delete ' + self.name))
        self.assertEqual(3, self.asked().count('create'))
        self.assertEqual([(None, None)] * 3, self.known)
        self.go_on(outgoing)
        self.arrived()

    @ddt.data((10, ''), (1 << 40, 'A' * 8000))
    @ddt.unpack
    def test_table_that_is_none(self, length, piece):
        self.answers['table'] = piece
        self.answers['take_up'] = {'bytes': length}
        self.go_on(self.begin())
        self.assertIn('it has forgotten', self.stdlog.logger.output)
        self.arrived()
