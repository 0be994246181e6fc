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

from unittest import mock

import ddt
import fixtures

from nova.compute import task_states
from nova import exception
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import test_transport
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.move import cancel
from nova.virt.libvirt.storage.pump import transfer as pump

POOL = two_hosts.POOL
MIB = 1 << 20


class WarmCopy:
    """Plays the pump's, and what its worker and the export do.

    :cvar test: the AheadTestCase
    """
    test = None

    def __init__(self, source, export, length, sparse=True):
        self.source, self.length = source, length
        self.pool, self.name = self.test.opened[export.port]
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
        watch.progress(0)
        watch.progress(length)
        if watch.cancelled():
            raise exception.StorageTransferCancelled(
                volume='v', where='w', length=1, transferred=0)
        there = self.test.dest.pools[self.pool][self.name]
        self.test.assertLessEqual(length, there['length'])
        here = self.test.source.pools[self.source.pool][self.source.name]
        there['content'] = here['content']
        watch.on_end(1234)
        return pump.Result(
            data=10, holes=length - 10, key=5,
            checksum=two_hosts.checksum_of(here['content']),
            physical=there['length'], allocation=None, seconds=1)

    def first(self, watch, bandwidth):
        return self._pass('first', self.length, watch)

    def rest(self, length, watch, bandwidth):
        self.test.assertTrue(self.is_open)
        return self._pass('rest', length, watch)


@ddt.ddt
class AheadTestCase(test_transport.MoveTestBase):

    def setUp(self):
        super().setUp()
        # The other host's RPC is a call, during which this is that host.
        self.flags(storage_migration_precopy=0,
                   storage_migration_parallel_disks=1, group='libvirt')
        self.done, self.errors = [], {}
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

    def assert_untouched(self):
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.assertEqual([], self.ours(self.dest))
        self.nothing_of_a_move()

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

    def test_progress_counts_both(self):
        told = []
        self.migration.save.side_effect = lambda: told.append(
            (self.migration.disk_processed, self.migration.disk_total,
             self.instance.progress))
        self.go_on(self.begin())
        self.assertEqual([(1700, 3400, 50), (3400, 3400, 100)], told)

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

    @ddt.data(-1, 1)
    def test_disks_that_are_not_worth_it(self, least):
        self.flags(storage_migration_precopy=least, group='libvirt')
        outgoing = self.begin()
        self.assertEqual(([], []), (self.done, self.saves))
        self.go_on(outgoing)
        self.assertEqual(3, len(self.copies))
        self.arrived()

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

    def test_destination_does_not_know_it(self):
        self.answers['greet'] = {'obstacle': None, 'aes': True}
        self.go_on(self.begin())
        self.assertEqual([], self.done)
        self.arrived()

    def test_by_libvirt(self):
        self.flags(storage_migration_transport='libvirt', group='libvirt')
        self.go_on(self.begin())
        self.assertEqual([], self.done)
        self.arrived()

    def broken(self):
        return exception.StorageTransferError(
            volume='v', where='w', length=1, transferred=0, reason='broken',
            side='destination', operation='send')

    def test_first_pass_fails(self):
        self.errors['first'] = [self.broken()]
        outgoing = self.begin()
        self.assert_untouched()
        self.assertIn('has not noticed', self.stdlog.logger.output)
        self.go_on(outgoing)
        self.assertEqual(3, len(self.copies))
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

    def test_cancelled_in_the_first_pass(self):
        self.migration.status = cancel.CANCELLING
        e = self.assertRaises(exception.InstanceFaultRollback, self.begin)
        self.assertIsInstance(e.inner_exception,
                              exception.StorageTransferCancelled)
        self.assert_untouched()

    @ddt.data(True, False)
    def test_deleted_in_the_first_pass(self, is_gone):
        self.migration.status = cancel.CANCELLING
        if is_gone:
            self.stub_out(
                'nova.objects.Instance.get_by_uuid', mock.Mock(
                    side_effect=exception.InstanceNotFound(instance_id='i')))
            self.take_in_disks_of_none()
        else:
            self.instance.task_state = task_states.DELETING
        self.assertRaises(exception.StorageTransferCancelled, self.begin)

    def take_in_disks_of_none(self):
        self.answers.update(look={'type': 'dir', 'free': 1 << 40},
                            has=False, probe=(), free_name='name', create=(),
                            close=(), delete=())
        self.answers['greet'] = {'obstacle': None, 'aes': True, 'cuts': True}
        self.answers['reach'] = ['127.0.0.1', 1]
        self.stub_out('socket.create_connection', mock.Mock())
        self.answers['free_name'] = self.volume_name('disk')

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
        self.assertEqual(3, self.asked().count('close'))
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
