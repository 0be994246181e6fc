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
import itertools
import time
from unittest import mock

import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import api as compute_api
from nova.compute import task_states
from nova.compute import vm_states
from nova import context
from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt.storage import bulk
from nova.virt.libvirt.storage.move import readiness
from nova.virt.libvirt.storage import report

READY = {readiness.STAT: readiness.READY}
BOTH = bulk.Means(live=True, hard_reboot=True)
LIVE = bulk.Means(live=True)
REBOOT = bulk.Means(hard_reboot=True)


class Cloud:
    """Instances, hosts and what they do with a request.

    :ivar asked: what was asked of the API: (what, name of the instance, host)
    :ivar takes: names of hosts on which legacy disks come into pools
    :ivar keeps: names of hosts that legacy disks come to as such
    """

    def __init__(self):
        self.instances, self.lines, self.faults = {}, {}, []
        self.nodes, self.asked, self.takes = [], [], set()
        self.keeps = set()
        self.names = {}
        self.sleeps = iter(())
        self.api = mock.create_autospec(compute_api.API, instance=True)
        self.api.live_migrate.side_effect = self.live_migrate
        self.api.reboot.side_effect = self.reboot

    def add_host(self, name, stats=READY, free=1):
        self.nodes.append(objects.ComputeNode(
            host=name, stats=stats, free_disk_gb=free))
        if stats:
            self.takes.add(name)

    def add(self, name, host='a', backend='qcow2', **state):
        uuid = getattr(uuids, name)
        self.names[uuid] = name
        self.instances[uuid] = objects.Instance(
            uuid=uuid, host=host, **{
                'vm_state': vm_states.ACTIVE, 'task_state': None,
                'locked': False, **state})
        self.instances[uuid].refresh = self.sleep
        self.lines[uuid] = [report.DiskLine(host, uuid, 'disk', backend)]
        return self.instances[uuid]

    def sleep(self):
        next(self.sleeps, lambda: None)()

    def arrive(self, instance):
        self.lines[instance.uuid] = [report.DiskLine(
            instance.host, instance.uuid, 'disk', 'libvirt-storage')]

    def fail(self, instance, text):
        self.faults.append(objects.InstanceFault(
            id=len(self.faults), instance_uuid=instance.uuid, message=text))

    def live_migrate(self, _context, instance, block_migration,
                     disk_over_commit, host_name, force=None, async_=False):
        self.asked.append(('live', self.names[instance.uuid], host_name))
        if not self.takes & {host_name or 'b'}:
            self.fail(instance, 'no room on %s' % host_name)
            return
        instance.host = host_name or 'b'
        if instance.host not in self.keeps:
            self.arrive(instance)

    def reboot(self, _context, instance, reboot_type):
        self.asked.append((
            reboot_type, self.names[instance.uuid], instance.host))
        if instance.host in self.takes:
            self.arrive(instance)

    def disks(self, _context, host=None):
        return [line for lines in self.lines.values() for line in lines
                if host in (None, line.host)]


class BulkTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.cloud = Cloud()
        self.said = []
        cell = objects.CellMapping(uuid=uuids.cell, database_connection='',
                                   transport_url='none://')
        for name, value in (
                ('bulk.report.disks', self.cloud.disks),
                ('bulk.report.disks_of',
                 lambda _context, i: self.cloud.lines[i.uuid])):
            self.stub_out('nova.virt.libvirt.storage.' + name, value)
        for name, value in (
                ('InstanceMapping.get_by_instance_uuid',
                 lambda _context, uuid: objects.InstanceMapping(
                     instance_uuid=uuid, cell_mapping=cell)),
                ('Instance.get_by_uuid', self._instance),
                ('ComputeNodeList.get_all',
                 lambda _context: self.cloud.nodes),
                ('InstanceFaultList.get_by_instance_uuids',
                 lambda _context, found: [
                     fault for fault in self.cloud.faults
                     if fault.instance_uuid in found]),
                ('MigrationList.get_in_progress_by_instance',
                 lambda *arguments: [])):
            self.stub_out(
                'nova.objects.' + name,
                lambda _cls, *args, value=value, **kwargs: value(
                    *args, **kwargs))
        self.clock = itertools.count()
        self.useFixture(fixtures.MockPatchObject(
            bulk, 'time', mock.Mock(
                spec=time, monotonic=lambda: next(self.clock))))

    def _instance(self, _context, uuid, expected_attrs):
        if uuid not in self.cloud.instances:
            raise exception.InstanceNotFound(instance_id=uuid)
        return self.cloud.instances[uuid]

    def run_it(self, means, **arguments):
        self.mover = bulk.Mover(context.get_admin_context, self.cloud.api,
                                means, self.said.append)
        result = self.mover.run(**arguments)
        self.text = '\n'.join(self.said)
        return result


class TestWays(BulkTestCase):

    def test_live_by_the_schedulers_choice(self):
        """Where any other host does, the one with pools needs no search."""
        self.cloud.add_host('a', {})
        self.cloud.add_host('b')
        self.cloud.add('one')
        result = self.run_it(LIVE)
        self.assertEqual(bulk.Result(moved=1), result)
        self.assertEqual([('live', 'one', None)], self.cloud.asked)
        self.assertIn(', is on b', self.text)
        call = self.cloud.api.live_migrate.call_args
        self.assertIsNone(call.kwargs['block_migration'])
        self.assertIsNone(call.kwargs['force'])

    def test_never_sent_to_a_host_without_pools(self):
        """It would arrive there with legacy disks."""
        self.cloud.add_host('a')
        self.cloud.add_host('b', {}, free=9)
        self.cloud.add_host('c', {readiness.STAT: 'pool is off'}, free=8)
        self.cloud.add_host('d', free=1)
        self.cloud.add_host('e', free=3)
        self.cloud.takes.remove('e')
        self.cloud.add('one')
        self.assertEqual(bulk.Result(moved=1), self.run_it(BOTH))
        self.assertEqual([('live', 'one', 'e'), ('live', 'one', 'd')],
                         self.cloud.asked)
        self.assertIs(False, self.cloud.api.live_migrate.call_args.kwargs[
            'force'])

    def test_one_migration_in_vain_is_enough(self):
        """Where legacy disks stay such, nothing else is sent to."""
        self.cloud.add_host('a')
        self.cloud.add_host('b', free=9)
        self.cloud.add_host('c', free=8)
        self.cloud.add_host('d', {})
        self.cloud.keeps.add('b')
        for name in ('one', 'two'):
            self.cloud.add(name)
        self.assertEqual(bulk.Result(moved=1, failed=1), self.run_it(LIVE))
        self.assertEqual([('live', 'one', 'b'), ('live', 'two', 'c')],
                         self.cloud.asked)

    def test_scheduler_does_not_choose_one_in_vain_again(self):
        self.cloud.add_host('a')
        self.cloud.add_host('b')
        self.cloud.keeps.add('b')
        for name in ('one', 'two'):
            self.cloud.add(name)
        self.assertEqual(bulk.Result(later=1, failed=1), self.run_it(LIVE))
        self.assertEqual([('live', 'one', None)], self.cloud.asked)
        self.assertIn('legacy disks have come as such to b', self.text)

    def test_reboot_where_one_has_come_in_vain(self):
        self.cloud.add_host('a', {})
        self.cloud.add_host('b', free=9)
        self.cloud.add_host('c')
        self.cloud.keeps.add('b')
        self.cloud.add('one', host='c')
        self.assertEqual(bulk.Result(moved=1), self.run_it(BOTH))
        self.assertEqual([('live', 'one', 'b'), ('HARD', 'one', 'b')],
                         self.cloud.asked)

    def test_reboot_only_where_it_is_allowed(self):
        self.cloud.add_host('a')
        self.cloud.add('one')
        result = self.run_it(LIVE)
        self.assertEqual((bulk.Result(later=1), []),
                         (result, self.cloud.asked))
        self.assertIn('no other host', self.text)
        self.assertIn('--hard-reboot is not given', self.text)
        self.assertEqual(bulk.Result(moved=1), self.run_it(BOTH))
        self.assertEqual([('HARD', 'one', 'a')], self.cloud.asked)

    def test_reboot_after_destinations_have_refused(self):
        self.cloud.add_host('a')
        self.cloud.add_host('b')
        self.cloud.takes.remove('b')
        self.cloud.add('one')
        result = self.run_it(LIVE)
        self.assertEqual(bulk.Result(failed=1), result)
        self.assertIn('no room on None', self.text)
        self.assertEqual(bulk.Result(moved=1), self.run_it(BOTH))
        self.assertEqual('HARD', self.cloud.asked[-1][0])

    def test_no_reboot_of_one_that_a_migration_has_broken(self):
        self.cloud.add_host('a')
        self.cloud.add_host('b')

        def break_it(_context, instance, **arguments):
            instance.vm_state = vm_states.ERROR

        self.cloud.api.live_migrate.side_effect = break_it
        self.cloud.add('one')
        self.assertEqual(bulk.Result(failed=1), self.run_it(BOTH))
        self.assertFalse(self.cloud.api.reboot.called)

    def test_no_reboot_on_a_host_without_pools(self):
        """It would be for nothing."""
        self.cloud.add_host('a', {})
        self.cloud.add('one')
        self.assertEqual(bulk.Result(later=1), self.run_it(REBOOT))
        self.assertEqual([], self.cloud.asked)
        self.assertIn('images_type', self.text)

    def test_one_reboot_in_vain_is_enough(self):
        self.cloud.add_host('a')
        self.cloud.takes.clear()
        for name in ('one', 'two', 'three'):
            self.cloud.add(name)
        result = self.run_it(REBOOT)
        self.assertEqual(bulk.Result(failed=1, later=2), result)
        self.assertEqual(1, len(self.cloud.asked))
        self.assertIn('the log of nova-compute on a says why', self.text)
        self.assertIn('has moved nothing before', self.text)

    def test_states(self):
        self.cloud.add_host('a')
        self.cloud.add_host('b')
        for state, asked in (
                (vm_states.ACTIVE, ['live']), (vm_states.PAUSED, ['live']),
                (vm_states.STOPPED, []), (vm_states.SUSPENDED, []),
                (vm_states.RESCUED, []), (vm_states.ERROR, []),
                (vm_states.RESIZED, []), (vm_states.SHELVED, [])):
            del self.cloud.asked[:]
            self.cloud.add('one', vm_state=state)
            self.run_it(BOTH)
            self.assertEqual(asked, [a[0] for a in self.cloud.asked], state)

    def test_paused_and_locked_are_not_rebooted(self):
        self.cloud.add_host('a')
        self.cloud.add('one', vm_state=vm_states.PAUSED)
        self.cloud.add('two', locked=True)
        self.assertEqual(bulk.Result(later=2), self.run_it(BOTH))
        self.assertEqual([], self.cloud.asked)
        self.assertIn('locked', self.text)

    def test_api_refuses(self):
        self.cloud.add_host('a')
        self.cloud.add_host('b')
        self.cloud.api.live_migrate.side_effect = (
            exception.OperationNotSupportedForVTPM(
                instance_uuid='one', operation='live-migration'))
        self.cloud.add('one')
        self.assertEqual(bulk.Result(failed=1), self.run_it(LIVE))
        self.assertIn('refused: ', self.text)

    def test_backends(self):
        self.cloud.add_host('a')
        self.cloud.add_host('b')
        for name, backend in (
                ('one', 'libvirt-storage'), ('two', 'lvm'), ('three', 'rbd'),
                ('four', report.BROKEN), ('five', report.NO_RECORD),
                ('six', 'flat')):
            self.cloud.add(name, backend=backend)
        self.assertEqual(bulk.Result(moved=2, failed=1, stay=2),
                         self.run_it(LIVE))
        self.assertEqual(['five', 'six'],
                         [name for _way, name, _host in self.cloud.asked])
        self.assertIn('stays on lvm', self.text)


class TestRun(BulkTestCase):

    def setUp(self):
        super().setUp()
        self.cloud.add_host('a')
        self.cloud.add_host('b')

    def test_nothing_to_do(self):
        self.cloud.add('one', backend='libvirt-storage')
        result = self.run_it(BOTH)
        self.assertEqual((bulk.Result(), 0, []),
                         (result, result.status(False), self.said))

    def test_limit_and_next_run(self):
        for name in ('one', 'two', 'three'):
            self.cloud.add(name)
        result = self.run_it(LIVE, limit=2)
        self.assertEqual((bulk.Result(moved=2, unreached=1), 1),
                         (result, result.status(True)))
        result = self.run_it(LIVE, limit=2)
        self.assertEqual((bulk.Result(moved=1), 0),
                         (result, result.status(True)))
        self.assertEqual(3, len(self.cloud.asked))

    def test_one_host(self):
        self.cloud.add('one')
        self.cloud.add('two', host='b')
        self.run_it(LIVE, host='b')
        self.assertEqual({'two'}, {name for _w, name, _h in self.cloud.asked})

    def test_dry_run(self):
        self.cloud.add('one')
        self.cloud.add('two', vm_state=vm_states.STOPPED)
        self.cloud.add('three', task_state=task_states.IMAGE_SNAPSHOT)
        result = self.run_it(BOTH, dry_run=True)
        self.assertEqual((bulk.Result(later=3), 3),
                         (result, result.status(False)))
        self.assertEqual([], self.cloud.asked)
        self.assertIn('live migration or else hard reboot would move: disk',
                      self.text)
        self.assertIn('its disks move when it is started', self.text)

    def test_status(self):
        for limited, numbers, status in (
                (False, {}, 0), (False, {'moved': 1}, 0),
                (False, {'stay': 1, 'moved': 1}, 0),
                (False, {'later': 1, 'moved': 1}, 3),
                (False, {'failed': 1, 'moved': 1}, 2),
                (True, {'failed': 1, 'moved': 1}, 1),
                (True, {'failed': 1}, 2),
                (True, {'moved': 1, 'unreached': 1, 'later': 1}, 1),
                (True, {'moved': 1, 'later': 1}, 3)):
            self.assertEqual(status, bulk.Result(**numbers).status(limited),
                             numbers)

    def test_deleted_meanwhile(self):
        self.cloud.add('one')
        self.cloud.instances.clear()
        self.assertEqual(bulk.Result(later=1), self.run_it(LIVE))

    def test_busy_with_something_else(self):
        self.cloud.add('one', task_state=task_states.IMAGE_SNAPSHOT)
        self.assertEqual(bulk.Result(later=1), self.run_it(LIVE))
        self.assertEqual([], self.cloud.asked)

    def test_goes_on_where_an_ended_run_has_been(self):
        """What that one has asked for is under way still."""
        instance = self.cloud.add('one', task_state=task_states.MIGRATING)

        def arrive():
            self.cloud.arrive(instance)
            instance.task_state = None

        self.cloud.sleeps = iter([lambda: None, arrive])
        self.assertEqual(bulk.Result(moved=1), self.run_it(LIVE))
        self.assertEqual([], self.cloud.asked)
        self.assertIn('moved meanwhile', self.text)

    def test_progress(self):
        migration = objects.Migration(
            disk_total=30 << 20, disk_remaining=10 << 20,
            memory_total=10 << 20, memory_remaining=5 << 20)
        self.stub_out(
            'nova.objects.MigrationList.get_in_progress_by_instance',
            lambda *arguments: [migration])
        instance = self.cloud.add('one', task_state=task_states.MIGRATING)
        self.clock = itertools.count(step=bulk.TOLD_EVERY)
        self.cloud.sleeps = iter(
            [lambda: None] * 3 +
            [lambda: setattr(instance, 'task_state', None)])
        self.run_it(LIVE)
        self.assertIn('15 of 40 MiB', self.text)

    def test_stalled(self):
        """Its compute has died: nobody will ever reset the task."""
        instance = self.cloud.add('one', task_state=task_states.MIGRATING)
        self.clock = itertools.count(step=bulk.STALLED // 2)
        self.assertEqual(bulk.Result(failed=1), self.run_it(BOTH))
        self.assertEqual((task_states.MIGRATING, []),
                         (instance.task_state, self.cloud.asked))
        self.assertIn('nothing has changed', self.text)

    def test_old_faults_are_not_told(self):
        instance = self.cloud.add('one')
        self.cloud.fail(instance, 'of last year')
        self.cloud.takes.remove('b')
        self.run_it(LIVE)
        self.assertNotIn('of last year', self.text)
        self.assertIn('no room', self.text)
