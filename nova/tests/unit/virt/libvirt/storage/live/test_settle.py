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
"""Each row of the table of settle.py, and whoever is killed in it."""

from unittest import mock

import ddt
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import power_state
from nova.compute import task_states
from nova import exception
from nova import objects
from nova.objects import fields
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt import config as guest_config
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt.storage.live import settle
from nova.virt.libvirt.storage.records import evacuation

POOL = two_hosts.POOL
TYPE = fields.MigrationType
NAMES = ['disk', 'disk.config', 'disk.eph0', 'disk.swap']


class LiveTestCase(two_hosts.TwoHostsTestCase):
    """An instance that runs on host source, on its way to host dest."""

    def setUp(self):
        super().setUp()
        self.instance.task_state = task_states.MIGRATING
        self.instance.host = 'source'
        # of the instance, as Nova has them
        self.moves = []
        self.stub_out('nova.objects.MigrationList.get_by_filters',
                      lambda cls, context, filters: self.moves)
        # by host, the job of the guest that is there
        self.guests = {'source': fakelibvirt.VIR_DOMAIN_JOB_NONE}
        # why they are off or paused, if they are
        self.off = self.paused = None
        self.stored, self.of_ceph = POOL, None
        self.abort = mock.Mock()
        self.stub_out(
            'nova.virt.libvirt.storage.live.settle.libvirt', fakelibvirt)
        self.sleeps = 0
        self.stub_out(
            'nova.virt.libvirt.storage.live.settle.time.sleep', self.sleep)
        self.host.get_guest = self.get_guest
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.load',
            lambda cls, context, instance: self.load())

    def sleep(self, seconds):
        self.sleeps += 1
        if self.sleeps == 3 and self.guests.get('source') in (
                fakelibvirt.VIR_DOMAIN_JOB_FAILED,
                fakelibvirt.VIR_DOMAIN_JOB_CANCELLED):
            self.guests['source'] = fakelibvirt.VIR_DOMAIN_JOB_NONE

    def get_guest(self, instance):
        if two_hosts.CONF.host not in self.guests:
            raise exception.InstanceNotFound(instance_id=instance.uuid)
        guest = mock.Mock(spec=libvirt_guest.Guest)
        guest.is_active.return_value = self.off is None
        guest.get_power_state.return_value = (
            power_state.RUNNING if self.paused is None else power_state.PAUSED)
        guest.get_state_reason.return_value = (
            self.off if self.off is not None else self.paused or
            fakelibvirt.VIR_DOMAIN_PAUSED_MIGRATION)
        guest.get_job_info.return_value = libvirt_guest.JobInfo(
            type=self.guests[two_hosts.CONF.host])
        guest.abort_job = self.abort
        devices = []
        for name in NAMES:
            disk = guest_config.LibvirtConfigGuestDisk()
            disk.source_type, disk.source_pool = 'volume', self.stored
            disk.source_volume = self.volume_name(name)
            if self.of_ceph is not None:
                disk.source_type = 'network'
                disk.source_name = self.of_ceph(name)
            devices.append(disk)
        guest.get_all_devices.side_effect = (
            lambda from_persistent_config: devices)
        return guest

    def begin(self, state='building'):
        """Have what dest has on record before it makes the first volume."""
        disks = self.load()
        for name, record in disks.items():
            coming = record.obj_clone()
            coming.host, coming.state, coming.next = 'dest', state, None
            coming.previous = coming.migration_id = None
            record.next = coming
            disks.set(name, record)
        disks.save(self.context)

    def copy(self):
        """Make the volumes on dest."""
        for name in NAMES:
            self.dest.pools[POOL][self.volume_name(name)] = {'length': 1}

    def move_guest(self):
        self.guests = {'dest': fakelibvirt.VIR_DOMAIN_JOB_NONE}

    def move(self, source, dest, migration_type=TYPE.LIVE_MIGRATION,
             status='error'):
        self.moves.append(objects.Migration(
            id=len(self.moves) + 1, source_compute=source, dest_compute=dest,
            migration_type=migration_type, status=status))

    def settle(self, host):
        self.flags(host=host)
        settle.settle(self.context, self.host, self.load())

    def assert_disks(self, host, going=None):
        self.assertEqual(
            {(host, 'ready', going)},
            {(record.host, record.state,
              record.next and (record.next.host, record.next.state))
             for _name, record in self.load().items()})


@ddt.ddt
class SettleTestCase(LiveTestCase):

    def test_nothing_to_settle(self):
        self.host.get_guest = mock.Mock()
        self.settle('source')
        self.host.get_guest.assert_not_called()
        self.assertEqual([], self.saves)

    @ddt.data(fakelibvirt.VIR_DOMAIN_JOB_BOUNDED,
              fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED,
              fakelibvirt.VIR_DOMAIN_JOB_FAILED,
              fakelibvirt.VIR_DOMAIN_JOB_CANCELLED)
    def test_libvirt_is_still_at_it(self, job):
        # With or without the compute service that has begun it. One that is
        # cancelled has no job once it has ended.
        self.begin()
        self.copy()
        self.guests = {'source': job}
        self.settle('source')
        self.assert_disks('source', ('dest', 'building'))
        self.assertEqual([], self.left('dest'))

    @ddt.data(fakelibvirt.VIR_DOMAIN_JOB_NONE,
              fakelibvirt.VIR_DOMAIN_JOB_COMPLETED)
    def test_it_has_failed_and_nobody_rolled_back(self, job):
        self.begin()
        self.copy()
        self.guests = {'source': job}
        self.settle('source')
        self.assert_disks('source')
        # The other host deletes them, which knows whether they are in use.
        self.assertEqual(4, len(self.left('dest')))
        self.assertEqual(NAMES, self.ours(self.dest))
        self.assertIn('has failed', self.stdlog.logger.output)
        # Twice comes to the same.
        self.settle('source')
        self.assertEqual(4, len(self.left('dest')))

    def test_failed_with_a_shared_pool(self):
        self.begin('ready')
        self.settle('source')
        self.assert_disks('source')
        self.assertEqual([], self.load().leftovers)

    def test_guest_has_gone_and_nobody_knows_where(self):
        # The source's service was dead when libvirt ended the migration.
        self.begin()
        self.copy()
        self.move_guest()
        e = self.assertRaises(
            exception.DisksMayBeElsewhere, self.settle, 'source')
        self.assert_disks('source', ('dest', 'building'))
        text = e.format_message()
        for word in ('host dest', 'settle_live_migration', uuids.instance,
                     '--moved', '--not-moved', self.volume_name('disk')):
            self.assertIn(word, text)

    @ddt.data(fakelibvirt.VIR_DOMAIN_SHUTOFF_MIGRATED,
              fakelibvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN,
              fakelibvirt.VIR_DOMAIN_SHUTOFF_CRASHED,
              fakelibvirt.VIR_DOMAIN_SHUTOFF_DAEMON)
    def test_nothing_has_undefined_the_guest(self, reason):
        # A hard reboot would start the definition, with the old copies:
        # libvirt was killed, or the host went down, or QEMU and libvirt.
        self.begin()
        self.copy()
        self.off = reason
        self.assertRaises(
            exception.DisksMayBeElsewhere, self.settle, 'source')
        self.assert_disks('source', ('dest', 'building'))
        self.assertEqual([], self.left('dest'))

    @ddt.data((fakelibvirt.VIR_DOMAIN_PAUSED_MIGRATION,
               fakelibvirt.VIR_DOMAIN_JOB_NONE),
              (fakelibvirt.VIR_DOMAIN_PAUSED_API_ERROR,
               fakelibvirt.VIR_DOMAIN_JOB_NONE),
              (fakelibvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
               fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED),
              (fakelibvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED,
               fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED))
    @ddt.unpack
    def test_libvirt_left_a_paused_guest(self, reason, job):
        # Killed when all of it was there, or post-copy: it may run there.
        self.begin()
        self.copy()
        self.paused, self.guests = reason, {'source': job}
        self.assertRaises(
            exception.DisksMayBeElsewhere, self.settle, 'source')
        self.assert_disks('source', ('dest', 'building'))
        self.assertIn('destroy and undefine', self.stdlog.logger.output)
        self.assertTrue(self.is_open())

    def is_open(self):
        self.flags(host='source')
        return settle.is_open(self.host, self.load())

    def test_is_open(self):
        self.paused = fakelibvirt.VIR_DOMAIN_PAUSED_MIGRATION
        self.assertFalse(self.is_open())
        self.begin()
        self.assertTrue(self.is_open())
        self.paused = fakelibvirt.VIR_DOMAIN_PAUSED_USER
        self.assertFalse(self.is_open())
        self.guests = {'source': fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED}
        self.assertTrue(self.is_open())
        self.guests = {}
        self.assertFalse(self.is_open())

    def check_stays(self, host='source'):
        self.flags(host=host)
        settle.check_stays(
            self.context, self.host, self.instance, self.load)

    def test_what_libvirt_left_is_not_ended(self):
        # Off, it would be as a guest whose migration has failed.
        self.begin()
        self.copy()
        self.paused = fakelibvirt.VIR_DOMAIN_PAUSED_MIGRATION
        error = self.assertRaises(
            exception.DisksMayBeElsewhere, self.check_stays)
        self.assertIn('host dest', error.format_message())
        self.assert_disks('source', ('dest', 'building'))

    @ddt.data(None, fakelibvirt.VIR_DOMAIN_PAUSED_USER)
    def test_any_other_guest_may_be_ended(self, paused):
        self.begin()
        self.paused = paused
        self.check_stays()
        self.assert_disks('source', ('dest', 'building'))

    def test_guest_that_goes_nowhere_may_be_ended(self):
        self.paused = fakelibvirt.VIR_DOMAIN_PAUSED_MIGRATION
        self.check_stays()

    def test_guest_that_comes_may_be_ended(self):
        self.begin()
        self.copy()
        self.guests['dest'] = fakelibvirt.VIR_DOMAIN_JOB_NONE
        self.paused = fakelibvirt.VIR_DOMAIN_PAUSED_MIGRATION
        self.check_stays('dest')
        self.assert_disks('source', ('dest', 'building'))

    @ddt.data(task_states.REBUILDING, task_states.SHELVING,
              task_states.SHELVING_OFFLOADING)
    def test_disks_of_a_guest_that_may_be_elsewhere_stay(self, task_state):
        # Where both hosts see them they are the guest's, and so are the
        # volumes of Cinder that a second one would get.
        self.begin('ready')
        self.instance.task_state = task_state
        self.off = fakelibvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN
        self.assertRaises(exception.DisksMayBeElsewhere, self.check_stays)
        self.move_guest()
        error = self.assertRaises(
            exception.DisksMayBeElsewhere, self.check_stays)
        self.assertIn('settle_live_migration', error.format_message())
        self.assert_disks('source', ('dest', 'ready'))
        # Elsewhere they may go.
        self.check_stays('third')
        # One that runs here is here.
        self.guests, self.off = {
            'source': fakelibvirt.VIR_DOMAIN_JOB_NONE}, None
        self.check_stays()

    def test_disks_of_a_guest_that_goes_nowhere_may_go(self):
        self.instance.task_state = task_states.REBUILDING
        self.guests = {}
        self.check_stays()

    def test_disks_of_a_broken_record_may_go(self):
        """A rebuild is what gets rid of it."""
        self.instance.task_state = task_states.REBUILDING
        self.guests = {}
        self.bdms[0].driver_info = 'broken'
        self.check_stays()
        self.assertIn('can not be used', self.stdlog.logger.output)

    def test_no_guest_to_be_ended(self):
        self.begin()
        self.move_guest()
        self.check_stays()

    def _be_at_it(self, then):
        """libvirt migrates the guest, and Nova knows nothing of that.

        :param then: called when it is asked to end that
        """
        self.begin()
        self.copy()
        self.guests = {'source': fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED}
        self.abort.side_effect = then

    def _cancelled(self):
        self.guests = {'source': fakelibvirt.VIR_DOMAIN_JOB_CANCELLED}

    def _end_moving(self):
        self.flags(host='source')
        settle.end_moving(self.host, self.load())

    def test_migration_is_ended_before_the_guest_is(self):
        self._be_at_it(then=self._cancelled)
        self._end_moving()
        self.abort.assert_called_once_with()
        self.settle('source')
        self.assert_disks('source')
        self.assertEqual(4, len(self.left('dest')))
        # There is no other one.
        self._end_moving()
        self.abort.assert_called_once_with()

    @ddt.data((fakelibvirt.VIR_DOMAIN_JOB_FAILED, 3),
              (fakelibvirt.VIR_DOMAIN_JOB_CANCELLED, 3),
              (fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED, 0),
              (fakelibvirt.VIR_DOMAIN_JOB_NONE, 0), (None, 0))
    @ddt.unpack
    def test_wait_until_ended(self, job, sleeps):
        # The next migration would be taken for the one that was cancelled.
        self.flags(host='source')
        self.guests = {} if job is None else {'source': job}
        settle.wait_until_ended(self.host, self.instance)
        self.assertEqual(sleeps, self.sleeps)

    def test_wait_until_ended_in_vain(self):
        self.flags(host='source')
        self.guests = {'source': fakelibvirt.VIR_DOMAIN_JOB_CANCELLED}
        self.sleeps = 3
        error = self.assertRaises(
            exception.MigrationPreCheckError, settle.wait_until_ended,
            self.host, self.instance)
        self.assertIn('host source', str(error))

    def test_migration_has_come_to_its_end_meanwhile(self):
        # To "destroy" the guest succeeds: there is none. What would be
        # started then is the second one.
        def gone():
            self.move_guest()
            raise fakelibvirt.make_libvirtError(
                fakelibvirt.libvirtError, 'no job is active',
                error_code=fakelibvirt.VIR_ERR_OPERATION_INVALID)

        self._be_at_it(then=gone)
        self._end_moving()
        self.assertRaises(
            exception.DisksMayBeElsewhere, self.settle, 'source')
        self.guests = {'source': fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED}
        self.assertRaises(exception.DisksMayBeElsewhere, self.check_stays)
        self.assert_disks('source', ('dest', 'building'))

    def test_migration_that_can_not_be_ended(self):
        self._be_at_it(then=None)
        # It isn't on the other host yet, which is no place to look.
        for act in (self._end_moving, self.check_stays):
            error = self.assertRaises(exception.LiveMigrationNotEnded, act)
            for word in ('domjobabort', 'host source', 'host dest'):
                self.assertIn(word, str(error))
        self.assert_disks('source', ('dest', 'building'))

    @ddt.data(fakelibvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
              fakelibvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED)
    def test_post_copy_is_not_ended(self, reason):
        self._be_at_it(then=None)
        self.paused = reason
        self._end_moving()
        self.assertRaises(exception.DisksMayBeElsewhere, self.check_stays)
        self.abort.assert_not_called()

    def test_guest_that_libvirt_moves_may_be_ended_here(self):
        self._be_at_it(then=self._cancelled)
        self.check_stays()
        self.abort.assert_called_once_with()

    def test_other_jobs_go_on(self):
        # A backup, of a guest that goes nowhere.
        self.guests = {'source': fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED}
        self._end_moving()
        self.check_stays()
        self.abort.assert_not_called()

    def clean_up(self):
        """The source is killed before it tells the destination."""
        self.begin()
        self.copy()
        self.move_guest()
        self.move('source', 'dest')
        disks = self.load()
        settle.promote(disks)
        disks.save(self.context)

    @ddt.data('source', 'third')
    def test_source_has_not_told(self, host):
        self.clean_up()
        # What an operator may have tried since
        self.move('source', 'third')
        self.move('source', 'third', TYPE.MIGRATION)
        self.move('source', 'third', TYPE.EVACUATION)
        error = self.assertRaises(
            exception.DisksMayBeElsewhere, self.settle, host)
        for word in ('host dest', '%s/%s' % (POOL, self.volume_name('disk'))):
            self.assertIn(word, str(error))
        self.assert_disks('dest')

    @ddt.data(task_states.REBUILDING, task_states.SHELVING)
    def test_source_has_not_told_and_destroys(self, task_state):
        self.clean_up()
        self.instance.task_state = task_state
        self.assertRaises(exception.DisksMayBeElsewhere, self.check_stays)
        # Where the guest is it may be ended.
        self.check_stays('dest')

    def test_guest_is_where_it_was(self):
        """An older compute has the disks on record where they are not."""
        self.clean_up()
        self.guests = {'source': fakelibvirt.VIR_DOMAIN_JOB_NONE}
        self.off = fakelibvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN
        self.settle('source')
        self.instance.task_state = task_states.REBUILDING
        self.check_stays()

    @ddt.data(('running', True), ('running (post-copy)', True),
              ('failed', False), ('cancelled', False), ('accepted', False),
              ('completed', False))
    @ddt.unpack
    def test_status(self, status, may_have_ended):
        self.clean_up()
        self.moves[0].status = status
        self.assertEqual('dest' if may_have_ended else None,
                         settle.untold(self.context, self.load()))

    def test_disks_in_no_pool(self):
        self.clean_up()
        disks = self.load()
        for name, record in disks.items():
            record.backend = fields.LibvirtDiskBackend.RBD
            disks.set(name, record)
        self.assertIsNone(settle.untold(self.context, disks))

    def test_source_has_not_told_is_settled(self):
        self.clean_up()
        self.settle('dest')
        self.instance.host = 'dest'
        self.assertIsNone(settle.untold(self.context, self.load()))

    @ddt.data(
        # It came back, or was somewhere else.
        (('dest', 'source', TYPE.LIVE_MIGRATION, 'completed'),),
        (('dest', 'source', TYPE.EVACUATION, 'done'),),
        (('source', 'third', TYPE.MIGRATION, 'confirmed'),
         ('third', 'source', TYPE.MIGRATION, 'confirmed')))
    def test_source_has_told_of_an_earlier_one(self, later):
        """Whoever has given these disks away, it was no live migration."""
        self.clean_up()
        for move in later:
            self.move(*move)
        self.assertIsNone(settle.untold(self.context, self.load()))

    @ddt.data({'state': 'building'}, {'migration_id': 7}, {'previous': True})
    def test_other_moves(self, values):
        """A live migration has failed before them."""
        self.clean_up()
        disks = self.load()
        for name, record in disks.items():
            for key, value in values.items():
                setattr(record, key, record.obj_clone() if value is True
                        else value)
            disks.set(name, record)
        self.assertIsNone(settle.untold(self.context, disks))

    def test_on_no_host(self):
        self.clean_up()
        self.instance.host = None
        self.assertIsNone(settle.untold(self.context, self.load()))

    def test_refuse_to_guess(self):
        self.begin()
        self.flags(host='source')
        error = self.assertRaises(
            exception.DisksMayBeElsewhere, settle.refuse_to_guess,
            self.load())
        self.assertIn('host dest', error.format_message())
        self.bdms = []
        self.assertRaises(exception.InstanceNotFound, settle.refuse_to_guess,
                          self.load())

    def test_it_is_paused_for_the_switch(self):
        self.begin()
        self.copy()
        self.paused = fakelibvirt.VIR_DOMAIN_PAUSED_MIGRATION
        self.guests = {'source': fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED}
        self.settle('source')
        self.assert_disks('source', ('dest', 'building'))

    @ddt.data('running', 'paused')
    def test_it_has_failed_and_the_guest_is_as_before(self, was):
        # RUNNING_MIGRATED has the number of PAUSED_MIGRATION.
        self.begin()
        self.copy()
        if was == 'paused':
            self.paused = fakelibvirt.VIR_DOMAIN_PAUSED_USER
        self.settle('source')
        self.assert_disks('source')

    @ddt.data(fakelibvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
              fakelibvirt.VIR_DOMAIN_SHUTOFF_DESTROYED)
    def test_guest_was_ended_here(self, reason):
        self.begin()
        self.copy()
        self.off = reason
        self.settle('source')
        self.assert_disks('source')
        self.assertEqual(4, len(self.left('dest')))

    def test_destination_was_killed_before_it_took_over(self):
        self.begin()
        self.copy()
        self.move_guest()
        self.settle('dest')
        self.assert_disks('dest')
        self.assertEqual(4, len(self.left('source')))

    def test_destination_takes_over_what_was_never_confirmed(self):
        disks = self.load()
        for name, record in disks.items():
            record.migration_id, record.previous = 5, record.obj_clone()
            record.previous.host = 'first'
            disks.set(name, record)
        disks.save(self.context)
        self.begin()
        self.copy()
        self.move_guest()
        self.settle('dest')
        self.assertEqual(4, len(self.left('first')))
        self.assertEqual(4, len(self.left('source')))
        self.assertEqual([None] * 4, [
            record.previous for _name, record in self.load().items()])

    def test_guest_on_the_destination_is_not_the_one(self):
        # It waits for the source's, or is of other disks.
        self.begin()
        self.guests['dest'] = fakelibvirt.VIR_DOMAIN_JOB_NONE
        self.stored = 'other'
        self.settle('dest')
        self.assert_disks('source', ('dest', 'building'))

    @ddt.data(('other', False), ('nova', True))
    @ddt.unpack
    def test_guest_with_images_of_ceph(self, of_ceph, has_come):
        self.begin()
        disks = self.load()
        for name, record in disks.items():
            record.next.backend = 'libvirt-storage-rbd'
            disks.set(name, record)
        disks.save(self.context)
        self.guests['dest'] = fakelibvirt.VIR_DOMAIN_JOB_NONE
        self.of_ceph = {
            'nova': lambda name: 'nova/' + self.volume_name(name),
            'other': lambda name: 'nova/x_' + name}[of_ceph]
        self.settle('dest')
        self.assertEqual(
            {'dest' if has_come else 'source'},
            {record.host for _name, record in self.load().items()})

    def test_no_guest_on_the_destination(self):
        self.begin()
        self.settle('dest')
        self.assert_disks('source', ('dest', 'building'))

    def test_evacuation(self):
        # The source has lost its power, maybe when the guest had gone: in a
        # pool that they share, a third host would start its disks again.
        self.begin('ready')
        self.instance.task_state = task_states.REBUILD_SPAWNING
        self.move_guest()
        error = self.assertRaises(
            exception.DisksMayBeElsewhere, self.settle, 'third')
        self.assertIn('host dest', error.format_message())
        self.assert_disks('source', ('dest', 'ready'))
        # The destination knows what it has.
        self.guests = {}
        self.settle('dest')

    def test_third_host(self):
        self.begin()
        self.settle('third')
        self.assert_disks('source', ('dest', 'building'))


class EndsTestCase(LiveTestCase):
    """What both hosts do when a migration ends as it should."""

    def leave(self):
        self.flags(host='source')
        settle.leave(self.context, self.source, self.load())

    def arrive(self):
        self.flags(host='dest')
        disks = self.load()
        settle.arrived(disks, None)
        disks.save(self.context)

    def abandon(self):
        self.flags(host='dest')
        settle.abandon(self.context, self.dest, self.load())

    def setUp(self):
        super().setUp()
        self.begin()
        self.copy()

    def test_success(self):
        self.move_guest()
        self.leave()
        self.assert_disks('dest')
        self.assertEqual([], self.ours(self.source))
        self.arrive()
        self.assert_disks('dest')
        self.assertEqual(NAMES, self.ours(self.dest))
        self.assertEqual([], self.load().leftovers)

    def test_source_was_killed_before_it_cleaned_up(self):
        self.move_guest()
        self.arrive()
        self.assert_disks('dest')
        self.assertEqual(NAMES, self.ours(self.source))
        self.assertEqual(4, len(self.left('source')))
        # Before the next migration to it.
        self.flags(host='source')
        settle.clear_way(self.source, self.load())
        self.assertEqual([], self.ours(self.source))

    def test_source_cant_delete(self):
        self.move_guest()
        self.source.fail['delete'] = exception.StorageVolumeError(
            volume='v', pool=POOL, host='source', reason='busy', code=1)
        self.leave()
        self.assert_disks('dest')
        self.assertEqual(4, len(self.left('source')))
        self.arrive()
        self.assertEqual(4, len(self.left('source')))

    def test_rollback(self):
        self.abandon()
        self.assert_disks('source')
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual(NAMES, self.ours(self.source))
        self.assertEqual([], self.load().leftovers)

    def test_rollback_of_an_instance_that_was_deleted(self):
        # Its records are gone. What the source says is not believed.
        self.bdms = []
        self.flags(host='dest')
        self.dest.pools[POOL]['other'] = {'length': 1}
        planned = [
            objects.LibvirtLiveMigrateDiskInfo(
                name=name, way=way, pool=POOL, volume=volume)
            for name, way, volume in (
                ('disk', 'mirror', self.volume_name('disk')),
                ('disk.config', 'send', self.volume_name('disk.config')),
                ('disk.swap', 'share', self.volume_name('disk.swap')),
                ('disk.eph0', 'mirror', 'other'), ('x', 'mirror', None))]
        settle.abandon(self.context, self.dest, self.load(), planned)
        self.assertEqual(['disk.eph0', 'disk.swap', 'other'],
                         self.ours(self.dest))
        self.assertEqual([], self.saves[1:])

    def test_rollback_cant_delete(self):
        self.dest.fail['delete'] = exception.StorageVolumeError(
            volume='v', pool=POOL, host='dest', reason='busy', code=1)
        self.abandon()
        self.assert_disks('source')
        self.assertEqual(4, len(self.left('dest')))

    def test_rollback_while_the_source_goes_on(self):
        # It is told to delete, and isn't waited for: the server's next hard
        # reboot, which may move its disks, can come first.
        delete = two_hosts.Volume.delete

        def delete_slowly(volume):
            disks = self.load()
            record = disks.get('disk')
            record.pool = 'another'
            disks.set('disk', record)
            disks.save(self.context)
            delete(volume)

        self.stub_out(two_hosts.__name__ + '.Volume.delete', delete_slowly)
        self.abandon()
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual('another', self.load().get('disk').pool)
        self.assert_disks('source')
        self.assertEqual([], self.load().leftovers)

    def test_rollback_twice(self):
        self.abandon()
        self.abandon()
        self.assert_disks('source')

    def _overtaken(self, host='source', **other):
        """Whether a rollback of migration 7 on dest comes too late."""
        self.flags(host='dest')
        data = objects.LibvirtLiveMigrateData(migration=self.migration)
        others = [objects.Migration(**{
            'id': 8, 'dest_compute': 'dest', 'status': 'preparing', **other})
        ] if other else []
        with mock.patch.object(
                objects.Instance, 'get_by_uuid',
                return_value=objects.Instance(host=host)), mock.patch.object(
                    objects.MigrationList, 'get_by_filters',
                    return_value=others) as get:
            found = settle.is_overtaken(self.context, self.instance, data)
            del data.migration
            self.assertEqual(
                host == 'dest',
                settle.is_overtaken(self.context, self.instance, data))
        if get.called:
            ((_context, filters),) = [call.args for call in get.mock_calls]
            self.assertEqual(
                (uuids.instance, 'live-migration'),
                (filters['instance_uuid'], filters['migration_type']))
            self.assertIn('running (post-copy)', filters['status'])
        return found

    def test_rollback_comes_too_late(self):
        # What would be destroyed and deleted is another migration's.
        self.assertFalse(self._overtaken())
        self.assertTrue(self._overtaken(host='dest'))
        self.assertTrue(self._overtaken(id=8))
        # An older one that was cut off is none, nor is one to elsewhere.
        self.assertFalse(self._overtaken(id=6))
        self.assertFalse(self._overtaken(dest_compute='third'))

    def test_late_rollback_of_an_earlier_one_to_elsewhere(self):
        """The server goes to a third host, which makes its volumes."""
        disks = self.load()
        for name, record in disks.items():
            record.next = record.obj_clone()
            record.next.host, record.next.state = 'third', 'building'
            record.next.next = None
            disks.set(name, record)
        disks.save(self.context)
        self.abandon()
        self.assertEqual(
            {'third'}, {record.next.host for _name, record in
                        self.load().items()})
        self.assertEqual([], self.load().leftovers)

    def test_rollback_of_a_deleted_instance_is_in_time(self):
        with mock.patch.object(
                objects.Instance, 'get_by_uuid',
                side_effect=exception.InstanceNotFound(instance_id='i')):
            self.assertFalse(settle.is_overtaken(
                self.context, self.instance,
                objects.LibvirtLiveMigrateData()))

    def _share(self):
        evacuation.forget_next(self.load())
        self.dest.pools = self.source.pools
        self.begin('ready')

    def test_success_in_a_shared_pool(self):
        self._share()
        self.move_guest()
        self.leave()
        self.arrive()
        self.assert_disks('dest')
        self.assertEqual(NAMES, self.ours(self.source))
        self.assertEqual([], self.load().leftovers)

    def test_rollback_in_a_shared_pool(self):
        self._share()
        self.abandon()
        self.assert_disks('source')
        self.assertEqual(NAMES, self.ours(self.source))
        self.assertEqual([], self.load().leftovers)

    def test_broken_record(self):
        self.bdms[0].driver_info = 'broken'
        self.arrive()
        self.assertIn('broken', self.bdms[0].driver_info)
        self.assertIn('not', self.stdlog.logger.output)
