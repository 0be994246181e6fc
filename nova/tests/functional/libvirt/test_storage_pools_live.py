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
"""An instance whose disks are in storage pools moves while it runs."""

import contextlib
import os
from unittest import mock

import fixtures
import oslo_messaging

from nova import exception
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_hosts
from nova.tests.functional.api import client
from nova.tests.functional.libvirt import storage_pools
from nova.tests.functional.libvirt import test_storage_pools_moves as moves
from nova.tests.functional.libvirt import test_storage_pools_transition
from nova.virt.libvirt import config
from nova.virt.libvirt.storage.live import by_hand

ALL, VOLUMES = moves.ALL, moves.VOLUMES


class LiveTestBase(moves.MovesTestBase):

    def setUp(self):
        super().setUp()
        self.migrations = self.useFixture(
            libvirt_hosts.Migrations(self.connections))

    def stored_disks(self, host, server):
        """Return what a guest is started from: by device, type of source."""
        domain = self.connections[host].lookupByUUIDString(server['id'])
        guest = config.LibvirtConfigGuest()
        guest.parse_str(domain.XMLDesc(fakelibvirt.VIR_DOMAIN_XML_INACTIVE))
        return {disk.target_dev: disk.source_type for disk in guest.devices
                if isinstance(disk, config.LibvirtConfigGuestDisk)}

    def assert_moved(self, server, host, other, **disks):
        server = self.api.get_server(server['id'])
        self.assertEqual(('ACTIVE', host), (
            server['status'], server['OS-EXT-SRV-ATTR:host']))
        records = self.records(server)
        self.assertEqual(
            {(host, 'ready', None, None)},
            {(record.host, record.state, record.next, record.previous)
             for record in records.values()})
        self.assertEqual(
            {'volume'}, set(self.stored_disks(host, server).values()))
        self.assertEqual(VOLUMES, self.volumes(host, server))
        self.assert_written(host, server)
        self.assert_nothing_left(server, other)

    def fail_to_migrate(self, server):
        """Let a migration fail; the guest runs on, and Nova says ERROR."""
        self._live_migrate(server, 'error', 'ERROR', host='compute2',
                           wait_for_fault_key=False)
        self.api.post_server_action(
            server['id'], {'os-resetState': {'state': 'active'}})
        self._wait_for_server_parameter(server, {
            'OS-EXT-STS:task_state': None, 'status': 'ACTIVE'})

    def die_before_it_tells(self, server):
        """Kill the source when it has cleaned up, and start it again."""
        manager = self.computes['compute1'].manager
        with mock.patch(
                'nova.compute.rpcapi.ComputeAPI.'
                'post_live_migration_at_destination',
                side_effect=oslo_messaging.MessagingTimeout()
        ), mock.patch.object(
                # What Nova does when it fails
                manager, '_post_live_migration_update_host',
                manager._post_live_migration):
            self.api.post_server_action(server['id'], {'os-migrateLive': {
                'host': 'compute2', 'block_migration': 'auto'}})
            self._wait_for_migration_status(server, ['error'])
        self.restart_compute_service('compute1')
        self._wait_for_server_parameter(server, {
            'OS-EXT-STS:task_state': None,
            'OS-EXT-SRV-ATTR:host': 'compute1'})

    def assert_untold(self, server):
        """Nothing starts it where it was, or destroys its disks."""
        before = self.records(server)
        for action in (
                {'reboot': {'type': 'HARD'}},
                {'rebuild': {'imageRef': storage_pools.IMAGE}},
                {'migrate': {'host': 'compute2'}}, {'rescue': {}},
                {'shelve': None}):
            self.api.post_server_action(
                server['id'], {'os-resetState': {'state': 'active'}})
            self.stdlog.delete_stored_logs()
            with contextlib.suppress(client.OpenStackApiException):
                self.api.post_server_action(server['id'], action)
            self._wait_for_server_parameter(
                server, {'OS-EXT-STS:task_state': None})
            self.assertIn('settle_live_migration', self.stdlog.logger.output,
                          action)
            self.assertEqual(
                [record.obj_to_primitive() for record in before.values()],
                [record.obj_to_primitive()
                 for record in self.records(server).values()], action)
            self.assert_no_guest('compute1', server)
            self.assertTrue(self.connections['compute2'].lookupByUUIDString(
                server['id']).isActive())

    def settle(self, server):
        """Do what an operator does then."""
        self.api.post_server_action(
            server['id'], {'os-resetState': {'state': 'active'}})
        self.assertRaises(
            exception.NoMigrationToSettle, by_hand.end, self.context,
            server['id'], False)
        self.assertEqual(
            'compute2', by_hand.end(self.context, server['id'], True))

    def assert_stayed(self, server):
        """Check that it runs on where it was, and nothing is left over."""
        self.assert_moved(server, 'compute1', 'compute2')
        self.assert_ready('compute1', server, **ALL)


class TestLiveMigration(LiveTestBase):

    def test_there_and_back(self):
        server = self.boot_with_all()
        config_drive = self.content(
            'compute1', server, 'disk.config', 1 << 20)
        sizes = {name: record.size
                 for name, record in self.records(server).items()}
        self._live_migrate(server, host='compute2')
        self.assert_moved(server, 'compute2', 'compute1')
        self.assertEqual(sizes, {
            name: record.size
            for name, record in self.records(server).items()})
        # The overlay has come as one, and the config drive was sent.
        volume = self.config_of('compute2', server, 'disk')
        self.assertEqual(os.path.join(
            self.directories['compute2'], '_base', moves.BASE),
            volume.backing_store.path)
        self.assertEqual(config_drive, self.content(
            'compute2', server, 'disk.config', 1 << 20))
        (params,) = self.migrations.params
        self.assertEqual(3, len(params['migrate_disks']))
        self.write('compute2', server, 'disk', b'back ')
        self._live_migrate(server, host='compute1')
        self.assertEqual(b'back ', self.content(
            'compute1', server, 'disk', 5, storage_pools.GUEST))
        self.write('compute1', server, 'disk', b'roote')
        self.assert_moved(server, 'compute1', 'compute2')

    def test_guest_runs_on_with_files_and_shows_volumes(self):
        server = self.boot_with_all()
        self._live_migrate(server, host='compute2')
        domain = self.connections['compute2'].lookupByUUIDString(server['id'])
        self.assertNotIn('backingStore', domain.XMLDesc(0))
        self.assertIn("type='file'", domain.XMLDesc(0))
        # Whatever is done to it next finds its disks.
        self._reboot_server(server, hard=True)
        self.assert_ready('compute2', server, **ALL)
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_ready('compute1', server, **ALL)
        self.assert_written('compute1', server)
        self.assert_nothing_left(server, 'compute2')

    def test_snapshot_and_rescue_afterwards(self):
        server = self.boot_with_all()
        self._live_migrate(server, host='compute2')
        self._snapshot_server(server, 'snapshot')
        self._wait_for_server_parameter(
            server, {'OS-EXT-STS:task_state': None})
        self.api.post_server_action(
            server['id'], {'rescue': {'rescue_image_ref':
                                      storage_pools.IMAGE}})
        self._wait_for_state_change(server, 'RESCUE')
        self.api.post_server_action(server['id'], {'unrescue': None})
        self._wait_for_state_change(server, 'ACTIVE')
        self.assert_ready('compute2', server, **ALL)

    def test_without_cow(self):
        self.flags(use_cow_images=False)
        server = self.boot_with_all()
        self._live_migrate(server, host='compute2')
        self.assert_moved(server, 'compute2', 'compute1')

    def test_raw_files(self):
        self.flags(use_cow_images=False)
        self.flags(storage_raw_files=True, group='libvirt')
        server = self.boot_with_all()
        self._live_migrate(server, host='compute2')
        self.assert_moved(server, 'compute2', 'compute1')
        self.assertEqual('raw', self.records(server)['disk'].format)

    def test_base_image_that_glance_has_lost(self):
        server = self.boot_with_all()
        self.lose_image()
        self._live_migrate(server, host='compute2')
        self.assert_moved(server, 'compute2', 'compute1')
        with open(os.path.join(self.directories['compute2'], '_base',
                               moves.BASE), 'rb') as f:
            self.assertEqual(storage_pools.CONTENT, f.read())

    def test_base_image_that_glance_may_have_for_others(self):
        server = self.boot_with_all()
        self.lose_image(roles=['service'])
        self._live_migrate(server, host='compute2')
        self.assert_moved(server, 'compute2', 'compute1')
        self.assertFalse(os.path.exists(os.path.join(
            self.directories['compute2'], '_base', moves.BASE)))

    def test_failure_in_the_midst(self):
        server = self.boot_with_all()

        def fail(domain):
            # The other host has it on record, and its volumes.
            records = self.records(server)
            self.assertEqual(
                {('compute1', 'ready', 'compute2', 'building')},
                {(record.host, record.state, record.next.host,
                  record.next.state) for record in records.values()})
            self.assertEqual(VOLUMES, self.volumes('compute2', server))
            raise self.migrations.error(1, 'No space left on device')

        self.migrations.during = fail
        self.fail_to_migrate(server)
        self.assert_stayed(server)
        self.migrations.during = lambda domain: None
        self._live_migrate(server, host='compute2')
        self.assert_moved(server, 'compute2', 'compute1')

    def test_abort(self):
        server = self.boot_with_all()

        def abort(domain):
            domain._job_type = fakelibvirt.VIR_DOMAIN_JOB_CANCELLED
            raise self.migrations.error(78, 'canceled by client')

        self.migrations.during = abort
        self.fail_to_migrate(server)
        self.assert_stayed(server)

    def test_config_drive_cant_be_sent(self):
        server = self.boot_with_all()

        def fail(volume):
            raise moves.exception.StorageTransferStalled(
                volume=volume.name, where='there', seconds=60,
                transferred=0, length=1)

        self.pump.fail = fail
        self.fail_to_migrate(server)
        self.assertEqual([], self.migrations.params)
        self.assert_stayed(server)

    def test_destination_is_killed_before_it_cleans_up(self):
        server = self.boot_with_all()
        driver = self.computes['compute2'].manager.driver
        real = driver._local_disks.abandon_live
        driver._local_disks.abandon_live = lambda *args: None
        self.migrations.during = self._fail
        self.fail_to_migrate(server)
        self.assertEqual(VOLUMES, self.volumes('compute2', server))
        # The directory is there as well.
        os.mkdir(self.instance_path('compute2', server))
        driver._local_disks.abandon_live = real
        self.migrations.during = lambda domain: None
        self._live_migrate(server, host='compute2')
        self.assert_moved(server, 'compute2', 'compute1')
        self.assertEqual([], self.leftovers(server))

    def test_destination_is_killed_before_it_is_ready(self):
        """Nothing has moved yet, and there is nothing to find out."""
        server = self.boot_with_all()
        driver = self.computes['compute2'].manager.driver
        patches = mock.patch.multiple(
            driver, plug_vifs=mock.Mock(side_effect=OSError('killed')),
            rollback_live_migration_at_destination=mock.DEFAULT)
        with patches:
            self._live_migrate(server, 'failed', 'ACTIVE', host='compute2',
                               wait_for_fault_key=False)
        self.assertEqual(VOLUMES, self.volumes('compute2', server))
        self.assertEqual(
            {('compute1', 'ready', None)},
            {(record.host, record.state, record.next)
             for record in self.records(server).values()})
        # Its next look for what is left over finds them.
        self.assertEqual({'compute2'}, {
            host for host, _pool, _volume in self.leftovers(server)})
        self._live_migrate(server, host='compute2')
        self.assert_moved(server, 'compute2', 'compute1')

    def _fail(self, domain):
        raise self.migrations.error(1, 'I/O error')

    def leftovers(self, server):
        instance = moves.objects.Instance.get_by_uuid(
            self.context, server['id'])
        return storage_pools.metadata.InstanceDisks.load(
            self.context, instance).leftovers

    def test_rollback_comes_when_the_server_has_come_after_all(self):
        """The source doesn't wait for it, nor does who tries again."""
        server = self.boot_with_all()
        driver = self.computes['compute2'].manager.driver
        rollback, late = driver.rollback_live_migration_at_destination, []
        driver.rollback_live_migration_at_destination = (
            lambda *args, **kwargs: late.append((args, kwargs)))
        self.migrations.during = self._fail
        self.fail_to_migrate(server)
        driver.rollback_live_migration_at_destination = rollback
        ((args, kwargs),) = late

        def roll_back(domain):
            with self.hosts.on('compute2'):
                rollback(*args, **kwargs)

        # While QEMU copies into the volumes, and when it has.
        self.migrations.during = roll_back
        self._live_migrate(server, host='compute2')
        roll_back(None)
        self.assert_moved(server, 'compute2', 'compute1')
        self.assertTrue(self.connections['compute2'].lookupByUUIDString(
            server['id']).isActive())
        self.assertEqual([], self.leftovers(server))

    def _receive_late(self, server):
        """Have compute2 hang before anything is on record.

        :returns: a function that has it go on
        """
        disks = self.computes['compute2'].manager.driver._local_disks
        late = []

        def hang(*args):
            late.extend(args)
            raise oslo_messaging.MessagingTimeout('its pool is silent')

        with mock.patch.object(disks, 'receive_live', hang):
            self._live_migrate(server, 'failed', 'ACTIVE', host='compute2',
                               wait_for_fault_key=False)

        def go_on(domain=None):
            with self.hosts.on('compute2'):
                self.assertRaisesRegex(
                    exception.MigrationError, 'was over', disks.receive_live,
                    *late)

        return go_on

    def test_destination_is_ready_when_the_server_goes_elsewhere(self):
        self.start_compute('compute3')
        server = self.boot_with_all()
        self.migrations.during = self._receive_late(server)
        self._live_migrate(server, host='compute3')
        self.assert_moved(server, 'compute3', 'compute1')
        self.assertEqual([], self.volumes('compute2', server))

    def test_destination_is_ready_when_the_server_has_gone_elsewhere(self):
        self.start_compute('compute3')
        server = self.boot_with_all()
        go_on = self._receive_late(server)
        self._live_migrate(server, host='compute3')
        go_on()
        self.assert_moved(server, 'compute3', 'compute1')
        self.assertEqual([], self.volumes('compute2', server))

    def test_source_is_killed_before_it_cleans_up(self):
        server = self.boot_with_all()
        driver = self.computes['compute1'].manager.driver
        real = driver._local_disks.leave
        driver._local_disks.leave = lambda *args: False
        self._live_migrate(server, host='compute2')
        driver._local_disks.leave = real
        self.assertEqual(VOLUMES, self.volumes('compute1', server))
        self.assertEqual({'compute1'}, {
            host for host, _pool, _volume in self.leftovers(server)})
        self._live_migrate(server, host='compute1')
        self.assert_moved(server, 'compute1', 'compute2')
        self.assertEqual([], self.leftovers(server))

    def _cut_off(self, server):
        """Have both computes die in a migration; libvirt goes on with it.

        :returns: the domain that it is about to move
        """
        drivers = [compute.manager.driver._local_disks
                   for compute in self.computes.values()]
        with contextlib.ExitStack() as stack:
            for disks in drivers:
                for name in ('stayed_live', 'abandon_live'):
                    stack.enter_context(mock.patch.object(disks, name))
            self.migrations.during = self._fail
            self.fail_to_migrate(server)
        domain = self.connections['compute1'].lookupByUUIDString(server['id'])
        domain._job_type = fakelibvirt.VIR_DOMAIN_JOB_UNBOUNDED
        return domain

    def test_hard_reboot_while_libvirt_is_at_it(self):
        server = self.boot_with_all()
        domain = self._cut_off(server)

        def abort():
            domain._job_type = fakelibvirt.VIR_DOMAIN_JOB_CANCELLED

        domain.abortJob = abort
        self._reboot_server(server, hard=True)
        self.assert_ready('compute1', server, **ALL)
        self.assertEqual({'compute2'}, {
            host for host, _pool, _volume in self.leftovers(server)})

    def test_hard_reboot_as_libvirt_has_moved_it(self):
        """Whatever is asked to end the guest finds none."""
        server = self.boot_with_all()
        domain = self._cut_off(server)

        def move():
            domain._job_type = fakelibvirt.VIR_DOMAIN_JOB_COMPLETED
            type(domain).destroy(domain)
            domain.undefine()

        domain.abortJob = domain.destroy = move
        self.assertRaises(
            client.OpenStackApiException, self.api.post_server_action,
            server['id'], {'reboot': {'type': 'HARD'}})
        self.assertIn('settle_live_migration', self.stdlog.logger.output)
        self.assert_no_guest('compute1', server)

    def test_delete_afterwards(self):
        server = self.boot_with_all()
        self._live_migrate(server, host='compute2')
        self.assert_deleted(server)

    def test_source_is_killed_before_it_has_told(self):
        server = self.boot_with_all()
        self.die_before_it_tells(server)
        self.assert_untold(server)
        self.settle(server)
        self.assert_moved(server, 'compute2', 'compute1')
        self._reboot_server(server, hard=True)
        self.assert_moved(server, 'compute2', 'compute1')


class TestSharedPools(LiveTestBase):
    """What both hosts see stays where it is."""

    def setUp(self):
        super().setUp()
        self.shared = self.useFixture(fixtures.TempDir()).path
        self.file_system = 'nfs4'
        self.stub_out(
            'nova.virt.libvirt.storage.live.file_systems.type_of',
            lambda path: self.file_system)

    def share(self, name, kinds):
        """Have a pool that both hosts see, for some kinds of disks."""
        for host, connection in self.connections.items():
            connection.storagePoolDefineXML(
                '<pool type="dir"><name>%s</name><target><path>%s</path>'
                '</target></pool>' % (name, self.shared))
            self.raw_pool(host, name).create()
            self.set_option(host, 'storage_pool_mapping',
                            dict.fromkeys(kinds, name))

    def assert_shared(self, server, host, *names):
        self.assertEqual(
            list(names), self.volumes('compute1', server, 'shared'))
        self.assertEqual(
            {(host, 'ready', None)},
            {(record.host, record.state, record.next)
             for record in self.records(server).values()})

    def boot_shared(self, *kinds):
        self.share('shared', kinds)
        return self.boot(ephemeral=1, swap=64)

    def test_all(self):
        server = self.boot_shared('root', 'ephemeral', 'swap', 'config')
        self._live_migrate(server, host='compute2')
        self.assert_shared(server, 'compute2', *VOLUMES)
        (params,) = self.migrations.params
        self.assertNotIn('migrate_disks', params)
        self.assertEqual(0, params['flags'] & self.migrations.INCREMENTAL)
        self._live_migrate(server, host='compute1')
        self.assert_shared(server, 'compute1', *VOLUMES)
        self.assert_deleted(server)

    def test_failure(self):
        server = self.boot_shared('root', 'ephemeral', 'swap', 'config')

        def fail(domain):
            raise self.migrations.error(1, 'I/O error')

        self.migrations.during = fail
        self.fail_to_migrate(server)
        self.assert_shared(server, 'compute1', *VOLUMES)

    def test_guest_runs_there_and_nobody_has_told(self):
        """The link is cut at the very end; QEMU there holds the disks."""
        server = self.boot_shared('root', 'ephemeral', 'swap', 'config')

        def lose(domain):
            params = self.migrations.params[-1]
            guest = self.connections['compute2'].createXML(
                params['destination_xml'], 0)
            guest.persistent_xml = params['persistent_xml']
            domain._state = fakelibvirt.VIR_DOMAIN_PAUSED
            domain.state = lambda flags=0: [
                domain._state, fakelibvirt.VIR_DOMAIN_PAUSED_MIGRATION]
            domain.isActive = lambda: 1
            raise self.migrations.error(38, 'end of file while reading')

        self.migrations.during = lose
        self._live_migrate(server, 'error', 'ERROR', host='compute2',
                           wait_for_fault_key=False)
        self.assertTrue(self.connections['compute2'].lookupByUUIDString(
            server['id']).isActive())
        self.assertEqual(
            {('compute1', 'compute2')},
            {(record.host, record.next.host)
             for record in self.records(server).values()})
        instance = moves.objects.Instance.get_by_uuid(
            self.context, server['id'])
        with self.hosts.on('compute1'):
            self.assertRaises(
                exception.DisksMayBeElsewhere,
                self.computes['compute1'].manager.driver.unpause, instance)

    def test_source_is_killed_before_it_has_told(self):
        server = self.boot_shared('root', 'ephemeral', 'swap', 'config')
        self.die_before_it_tells(server)
        self.assert_untold(server)
        self.settle(server)
        self._reboot_server(server, hard=True)
        self.assert_shared(server, 'compute2', *VOLUMES)

    def test_root_alone(self):
        server = self.boot_shared('root')
        self._live_migrate(server, host='compute2')
        self.assert_shared(server, 'compute2', 'disk')
        (params,) = self.migrations.params
        self.assertEqual(2, len(params['migrate_disks']))
        self.assertEqual(VOLUMES[1:], self.volumes('compute2', server))
        self.assertEqual([], self.volumes('compute1', server))

    def test_file_system_that_libvirt_takes_for_local(self):
        server = self.boot_shared('root')
        self.file_system = 'ext4'
        self.assertRaises(
            client.OpenStackApiException,
            self._live_migrate, server, host='compute2')
        self.assertIn('migrate the server cold', self.stdlog.logger.output)
        self.assertEqual([], self.migrations.params)
        self.assert_shared(server, 'compute1', 'disk')


class TestLegacyDisks(test_storage_pools_transition.TransitionTestBase):
    """Files become volumes while their guest runs."""

    def setUp(self):
        super().setUp()
        self.migrations = self.useFixture(
            libvirt_hosts.Migrations(self.connections))

    def test_into_pools(self):
        server = self.boot_legacy()
        self._live_migrate(server, host='compute2')
        records = self.records(server)
        self.assertEqual(
            {('libvirt-storage', 'compute2', 'ready', None)},
            {(record.backend, record.host, record.state, record.next)
             for record in records.values()})
        self.assert_no_guest('compute1', server)
        self.assertFalse(os.path.exists(
            self.instance_path('compute1', server)))
        # What a host generates is no base image on another one.
        self.assertIsNotNone(
            self.config_of('compute2', server, 'disk').backing_store)
        self.assertIsNone(
            self.config_of('compute2', server, 'disk.eph0').backing_store)
        self._reboot_server(server, hard=True)
        self.assert_moved('compute2', server)

    def test_failure(self):
        server = self.boot_legacy()

        def fail(domain):
            raise self.migrations.error(1, 'I/O error')

        self.migrations.during = fail
        self._live_migrate(server, 'error', 'ERROR', host='compute2',
                           wait_for_fault_key=False)
        self.assertEqual({'compute1'}, {
            record.host for record in self.records(server).values()})
        self.assertEqual([], self.volumes('compute2', server))
        for name in test_storage_pools_transition.DISKS:
            self.assertTrue(os.path.exists(self.legacy_path(server, name)))
