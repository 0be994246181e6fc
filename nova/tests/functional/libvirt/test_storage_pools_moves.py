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
"""An instance whose disks are in storage pools, on its way between hosts."""

import os
from unittest import mock

import ddt
import fixtures

from nova.cmd import manage
from nova.compute import instance_actions
from nova import exception
from nova import objects
from nova.tests.functional.libvirt import storage_pools
from nova.virt.libvirt.storage.move import precheck

BASE = storage_pools.BASE
ALL = {'disk': 'qcow2', 'disk_eph0': 'qcow2', 'disk_swap': 'qcow2',
       'disk_config': 'qcow2'}
VOLUMES = ['disk', 'disk.config', 'disk.eph0', 'disk.swap']
# What an evacuated server gets has other names than what it had.
EVACUATED = {name: (image_format, name.replace('_', '.') + '.1')
             for name, image_format in ALL.items()}
EVACUATED_VOLUMES = [name + '.1' for name in VOLUMES]


class MovesTestBase(storage_pools.StoragePoolsTestBase):

    def setUp(self):
        super().setUp()
        self.start_compute('compute1')
        self.start_compute('compute2')
        self.flags(force_config_drive=True)

    def boot_with_all(self):
        """Boot a server on compute1 that has written to its disks."""
        server = self.boot(ephemeral=1, swap=64)
        self.write('compute1', server, 'disk', b'rooted' * 100)
        self.write('compute1', server, 'disk.eph0', b'written' * 100)
        return server

    def assert_written(self, host, server, suffix=''):
        for name, content in (('disk', b'rooted'), ('disk.eph0', b'written')):
            self.assertEqual(content * 100, self.content(
                host, server, name + suffix, len(content) * 100,
                storage_pools.GUEST))

    def assert_waits(self, server, source='compute1', dest='compute2'):
        """Check a server which waits for confirm or revert."""
        self.assert_ready(dest, server, **ALL)
        self.assert_written(dest, server)
        self.assertEqual(VOLUMES, self.volumes(source, server))
        self.assertEqual(VOLUMES, self.volumes(dest, server))
        for name, record in self.records(server).items():
            self.assertEqual(
                (source, record.volume),
                (record.previous.host, record.previous.volume))
        self.assertTrue(os.path.isdir(
            self.instance_path(source, server) + '_resize'))
        self.assertTrue(os.path.isdir(self.instance_path(dest, server)))

    def assert_settled(self, server, host, other):
        """Check a server that is on a host, with nothing on another one."""
        self.assert_ready(host, server, **ALL)
        self.assert_written(host, server)
        self.assertEqual(VOLUMES, self.volumes(host, server))
        self.assert_nothing_left(server, other)
        self.assertEqual(
            {None},
            {record.previous for record in self.records(server).values()})
        self.assertEqual({}, self.system_metadata(server))
        # What is left of the base image's way, the probes, the packed files
        self.assertEqual([], self.files(other))

    def assert_deleted(self, server):
        self._delete_server(server)
        self.assert_nothing_left(server)
        for host in self.connections:
            self.assertEqual([], self.files(host))


class TestMoves(MovesTestBase):

    def test_migrate_and_confirm(self):
        server = self.boot_with_all()
        server = self._migrate_server(server)
        self.assertEqual('compute2', server['OS-EXT-SRV-ATTR:host'])
        self.assert_waits(server)
        # without SSH, and the swap made anew
        self.assertEqual(
            {'disk', 'disk.eph0', 'disk.config', 'files'},
            {source.name.split('_', 1)[1]
             for source, _destination in self.pump.copied} | {'files'})
        self.assertFalse([command for command in self.programs.executed
                          if command[0] in ('ssh', 'scp', 'rsync')])
        volume = self.config_of('compute2', server, 'disk')
        self.assertEqual(
            (1 << 30, os.path.join(
                self.directories['compute2'], '_base', BASE), 'raw'),
            (volume.capacity, volume.backing_store.path,
             volume.backing_store.format))
        self._confirm_resize(server)
        self.assert_settled(server, 'compute2', 'compute1')
        self._reboot_server(server, hard=True)
        self.assert_settled(server, 'compute2', 'compute1')
        self.assert_deleted(server)

    def test_migrate_and_revert(self):
        server = self.boot_with_all()
        before = {name: record.obj_to_primitive()
                  for name, record in self.records(server).items()}
        self._migrate_server(server)
        self.write('compute2', server, 'disk.eph0', b'lost')
        server = self._revert_resize(server)
        self.assertEqual('compute1', server['OS-EXT-SRV-ATTR:host'])
        self.assert_settled(server, 'compute1', 'compute2')
        after = {name: record.obj_to_primitive()
                 for name, record in self.records(server).items()}
        for records in (before, after):
            # Nobody has asked for it before it was to be moved.
            del records['disk.config']['nova_object.data']['size']
        self.assertEqual(before, after)
        self.assert_deleted(server)

    def test_there_and_back_again(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self._confirm_resize(server)
        self._migrate_server(server)
        self.assert_waits(server, 'compute2', 'compute1')
        self._confirm_resize(server)
        self.assert_settled(server, 'compute1', 'compute2')
        self.assert_deleted(server)

    def test_resize(self):
        server = self.boot_with_all()
        self._resize_server(
            server, self.flavor(disk=3, ephemeral=1, swap=128))
        self.assert_waits(server)
        self.assertEqual(
            (3 << 30, 1 << 30),
            (self.config_of('compute2', server, 'disk').capacity,
             self.config_of('compute1', server, 'disk').capacity))
        records = self.records(server)
        self.assertEqual((3 << 30, 128 << 20), (
            records['disk'].size, records['disk.swap'].size))
        self._confirm_resize(server)
        self.assert_settled(server, 'compute2', 'compute1')
        self.assert_deleted(server)

    def test_resize_of_the_ephemeral_disk(self):
        """One that is the flavor's, as the server was booted with none."""
        server = self.boot()
        for ephemeral in (1, 2):
            self._resize_server(
                server, self.flavor(disk=3, ephemeral=ephemeral))
            self._confirm_resize(server)
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assertEqual((2 << 30, 2 << 30), (
            self.records(server)['disk.local'].size,
            self.config_of('compute2', server, 'disk.local').capacity))
        self.assert_deleted(server)

    def test_revert_of_a_resize_that_does_away_with_swap(self):
        server = self.boot_with_all()
        self._resize_server(server, self.flavor(disk=3, ephemeral=1))
        self.assertNotIn('disk.swap', self.records(server))
        self.assertEqual(['disk', 'disk.config', 'disk.eph0'],
                         self.volumes('compute2', server))
        self._revert_resize(server)
        self.assert_settled(server, 'compute1', 'compute2')
        self.assertEqual(64 << 20, self.records(server)['disk.swap'].size)
        self.assert_deleted(server)

    def test_confirm_of_a_resize_that_does_away_with_swap(self):
        server = self.boot_with_all()
        self._resize_server(server, self.flavor(disk=3, ephemeral=1))
        self._confirm_resize(server)
        self.assertEqual(['disk', 'disk.config', 'disk.eph0'],
                         self.volumes('compute2', server))
        self.assert_nothing_left(server, 'compute1')
        self.assertEqual({}, self.system_metadata(server))
        self.assert_deleted(server)

    def test_stopped_server(self):
        server = self.boot_with_all()
        server = self._stop_server(server)
        self._migrate_server(server)
        self.assert_waits(server)
        server = self._revert_resize_of_stopped(server)
        self.assert_settled(server, 'compute1', 'compute2')

    def _revert_resize_of_stopped(self, server):
        self.api.post_server_action(server['id'], {'revertResize': None})
        return self._wait_for_state_change(server, 'SHUTOFF')

    def test_without_cow(self):
        self.flags(use_cow_images=False)
        self._test_moves(ALL)

    def test_raw_files(self):
        self.flags(use_cow_images=False)
        self.flags(storage_raw_files=True, group='libvirt')
        self._test_moves(dict.fromkeys(ALL, 'raw'))

    def _test_moves(self, disks):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.assert_ready('compute2', server, **disks)
        self.assert_written('compute2', server)
        self._confirm_resize(server)
        self.assert_nothing_left(server, 'compute1')
        self.assert_deleted(server)

    def test_delete_while_it_waits(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.assert_deleted(server)

    def test_base_image_that_glance_has_lost(self):
        server = self.boot_with_all()
        self.lose_image()
        self._migrate_server(server)
        self.assert_waits(server)
        with open(os.path.join(
                self.directories['compute2'], '_base', BASE), 'rb') as f:
            self.assertEqual(storage_pools.CONTENT, f.read())
        self._confirm_resize(server)
        self.assert_settled(server, 'compute2', 'compute1')
        self.assert_deleted(server)

    def test_base_image_that_glance_may_have_for_others(self):
        """Nobody takes the source's for it, so the disk comes without."""
        server = self.boot_with_all()
        self.lose_image(roles=['service'])
        self._migrate_server(server)
        self.assert_waits(server)
        self.assertFalse(os.path.exists(os.path.join(
            self.directories['compute2'], '_base', BASE)))
        self._confirm_resize(server)
        self.assert_settled(server, 'compute2', 'compute1')
        self.assert_deleted(server)

    def test_evacuate(self):
        server = self.boot_with_all()
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        server = self._evacuate_server(
            server, expected_host='compute2')
        self.assert_evacuated(server)

    def assert_evacuated(self, server):
        records = self.records(server)
        self.assertEqual(
            {('compute2', 'ready', None)},
            {(record.host, record.state, record.previous)
             for record in records.values()})
        self.assertEqual(
            EVACUATED_VOLUMES, self.volumes('compute2', server))
        self.assertEqual(VOLUMES, self.volumes('compute1', server))
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self.assert_nothing_left(server, 'compute1')
        self.assertEqual(
            EVACUATED_VOLUMES, self.volumes('compute2', server))
        self.assert_deleted(server)


class TestLargerThanFlavor(MovesTestBase):

    def test_migrate_again(self):
        """As a resize of a legacy disk that has failed leaves it."""
        server = self.boot()
        self.raw_pool('compute1').storageVolLookupByName(
            server['id'] + '_disk').resize(3 << 30)
        instance = objects.Instance.get_by_uuid(self.context, server['id'])
        disks = storage_pools.metadata.InstanceDisks.load(
            self.context, instance)
        record = disks.get('disk')
        record.size = 3 << 30
        disks.set('disk', record)
        disks.save(self.context)
        for _time in range(2):
            self._migrate_server(server)
            self._confirm_resize(server)
        self._migrate_server(server)
        self._revert_resize(server)
        self.assertEqual(3 << 30, self.records(server)['disk'].size)


@ddt.ddt
class TestEvacuationFails(MovesTestBase):
    """The host that was left is back, and has all of the disks."""

    # An error on a host is none of the API.
    CAST_AS_CALL = False

    def evacuate(self, server, failing):
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        with mock.patch(failing, side_effect=exception.InternalError('no')):
            self._evacuate_server(
                server, expected_state='ERROR', expected_migration_status=(
                    'pre-migrating' if failing == self.AT_THE_END else
                    'failed'))
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)

    XML = 'nova.virt.libvirt.driver.LibvirtDriver._get_guest_xml'
    LAUNCH = 'nova.virt.libvirt.guest.Guest.launch'
    # With the guest started
    AFTERWARDS = ('nova.compute.manager.ComputeManager.'
                  '_update_scheduler_instance_info')
    AT_THE_END = ('nova.compute.resource_tracker.ResourceTracker.'
                  'finish_evacuation')

    @ddt.data(XML, LAUNCH, AFTERWARDS, AT_THE_END)
    def test_reboot_and_move(self, failing):
        server = self.boot_with_all()
        self.evacuate(server, failing)
        self.assert_no_guest('compute2', server)
        self._reboot_server(server, hard=True)
        self.assert_ready('compute1', server, **ALL)
        self.assert_written('compute1', server)
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_ready('compute2', server, **ALL)
        self.assert_written('compute2', server)
        self.assert_deleted(server)

    @ddt.data(XML, LAUNCH)
    def test_move(self, failing):
        server = self.boot_with_all()
        self.evacuate(server, failing)
        self.api.post_server_action(
            server['id'], {'os-resetState': {'state': 'active'}})
        self._migrate_server(server)
        self.assert_written('compute2', server)

    @ddt.data(XML, LAUNCH)
    def test_evacuate_again(self, failing):
        server = self.boot_with_all()
        self.evacuate(server, failing)
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        self._evacuate_server(server, expected_host='compute2',
                              expected_state='ACTIVE')
        self.assert_ready('compute2', server, **EVACUATED)

    def test_evacuate_to_where_an_unshelve_has_failed(self):
        """What was begun there isn't the disk."""
        server = self.boot_with_all()
        self._shelve_server(server, expected_state='SHELVED_OFFLOADED')
        with mock.patch(self.XML, side_effect=exception.InternalError('no')):
            self.api.post_server_action(
                server['id'], {'unshelve': {'host': 'compute2'}})
            self._wait_for_action_fail_completion(
                server, instance_actions.UNSHELVE,
                'compute_unshelve_instance')
        self.write('compute2', server, 'disk', b'stale')
        self.api.post_server_action(
            server['id'], {'unshelve': {'host': 'compute1'}})
        server = self._wait_for_state_change(server, 'ACTIVE')
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        self._evacuate_server(server, expected_host='compute2')
        volume = self.raw_pool('compute2').storageVolLookupByName(
            self.records(server)['disk'].volume)
        self.assertNotEqual(
            b'stale', volume._file().read(storage_pools.GUEST, 5))


@ddt.ddt
class TestStaleDisks(MovesTestBase):
    """What a host has kept is no disk of an instance that comes to it."""

    # An error on a host is none of the API.
    CAST_AS_CALL = False

    LAUNCH = TestEvacuationFails.LAUNCH
    DELETE = 'nova.virt.libvirt.storage.pool.ownership.delete_volume'
    # What spawn does when it has failed
    CLEANUP = 'nova.virt.libvirt.driver.LibvirtDriver._cleanup'

    def evacuate(self, server, source, dest, status='done'):
        self.computes[source].stop()
        self.force_down(source, True)
        return self._evacuate_server(server, expected_host=dest,
                                     expected_migration_status=status)

    def unshelve(self, server, host):
        self.api.post_server_action(server['id'], {'unshelve': {'host': host}})

    def fail_to_unshelve(self, server, host):
        self.unshelve(server, host)
        self._wait_for_action_fail_completion(
            server, instance_actions.UNSHELVE, 'compute_unshelve_instance')
        self._wait_for_server_parameter(
            server, {'OS-EXT-STS:task_state': None})

    def undefine(self, host, server):
        self.connections[host].lookupByUUIDString(server['id']).undefine()

    def spoil(self, host, server):
        for name in self.volumes(host, server):
            self.write(host, server, name, b'stale!')

    def assert_fresh(self, host, server):
        volume = self.raw_pool(host).storageVolLookupByName(
            self.records(server)['disk'].volume)
        self.assertNotIn(
            volume._file().read(storage_pools.GUEST, 6),
            (b'rooted', b'stale!'))

    def restart_without_pool(self, host):
        pool = self.raw_pool(host)
        pool.destroy()
        with mock.patch.object(pool, 'create', side_effect=(
                storage_pools.libvirt_storage.error(38, 'no such device'))):
            self.restart_compute_service(host)
        pool.create()
        self.force_down(host, False)

    def test_evacuated_from_and_back_to(self):
        server = self.boot_with_all()
        server = self.evacuate(server, 'compute1', 'compute2')
        self.restart_without_pool('compute1')
        self.assertEqual(VOLUMES, self.volumes('compute1', server))
        self._run_periodics()  # The host can take instances again.
        # That is the first one's; the helper looks at no other.
        server = self.evacuate(server, 'compute2', 'compute1', 'completed')
        self.assert_fresh('compute1', server)
        self.assertEqual(
            {'%s_%s.2' % (server['id'], name) for name in VOLUMES},
            {record.volume for record in self.records(server).values()})

    def test_evacuated_there_and_back(self):
        """Notes of what is gone don't pile up."""
        server = self.boot_with_all()
        server = self.evacuate(server, 'compute1', 'compute2')
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self.assert_nothing_left(server, 'compute1')
        server = self.evacuate(server, 'compute2', 'compute1', 'completed')
        self.assert_ready('compute1', server, **ALL)
        instance = objects.Instance.get_by_uuid(self.context, server['id'])
        disks = storage_pools.metadata.InstanceDisks.load(
            self.context, instance)
        self.assertEqual(
            {('compute2', '%s_%s' % (server['id'], name))
             for name in EVACUATED_VOLUMES},
            {(host, volume) for host, _pool, volume in disks.leftovers})

    def test_evacuated_from_is_swept(self):
        server = self.boot_with_all()
        server = self.evacuate(server, 'compute1', 'compute2')
        self.restart_without_pool('compute1')
        self.sweep('compute1')
        self.assertEqual([], self.volumes('compute1', server))
        self.assert_ready('compute2', server, **EVACUATED)

    @ddt.data('unshelve', 'evacuate')
    def test_spawn_has_failed(self, then):
        server = self.boot_with_all()
        self._shelve_server(server, expected_state='SHELVED_OFFLOADED')
        with mock.patch(self.LAUNCH, side_effect=exception.InternalError(
                'no')), mock.patch(self.DELETE, return_value=False):
            self.fail_to_unshelve(server, 'compute2')
        self.assertEqual(VOLUMES, self.volumes('compute2', server))
        self.spoil('compute2', server)
        if then == 'unshelve':
            self.unshelve(server, 'compute2')
        else:
            self.unshelve(server, 'compute1')
        server = self._wait_for_state_change(server, 'ACTIVE')
        if then == 'evacuate':
            self.evacuate(server, 'compute1', 'compute2')
        self.assert_fresh('compute2', server)

    def test_spawn_was_cut_off(self):
        """The disks were made, and the service was killed."""
        server = self.boot_with_all()
        self._shelve_server(server, expected_state='SHELVED_OFFLOADED')
        with mock.patch(self.LAUNCH, side_effect=exception.InternalError(
                'no')), mock.patch(self.CLEANUP):
            self.fail_to_unshelve(server, 'compute2')
        self.undefine('compute2', server)
        self.spoil('compute2', server)
        self.unshelve(server, 'compute1')
        server = self._wait_for_state_change(server, 'ACTIVE')
        self.evacuate(server, 'compute1', 'compute2')
        self.assert_fresh('compute2', server)

    def test_rebuild_has_failed(self):
        server = self.boot_with_all()
        with mock.patch(self.LAUNCH, side_effect=exception.InternalError(
                'no')), mock.patch(self.DELETE, return_value=False):
            self.api.post_server_action(server['id'], {'rebuild': {
                'imageRef': storage_pools.IMAGE}})
            self.wait_for_failure(server)
        self.spoil('compute1', server)
        self.api.post_server_action(
            server['id'], {'reboot': {'type': 'HARD'}})
        self._wait_for_action_fail_completion(
            server, instance_actions.REBOOT, 'compute_reboot_instance')
        server = self._rebuild_server(server, storage_pools.IMAGE)
        self.assert_fresh('compute1', server)
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_nothing_left(server, 'compute1')

    @ddt.data(False, True)
    def test_evacuation_has_failed(self, was_cut_off):
        server = self.boot_with_all()
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        fault = self.CLEANUP if was_cut_off else self.DELETE
        with mock.patch(self.LAUNCH, side_effect=exception.InternalError(
                'no')), mock.patch(fault, return_value=False):
            server = self._evacuate_server(
                server, expected_state='ERROR',
                expected_migration_status='failed')
        if was_cut_off:
            self.undefine('compute2', server)
        self.spoil('compute2', server)
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self._reboot_server(server, hard=True)
        self.assert_written('compute1', server)
        self.evacuate(server, 'compute1', 'compute2')
        self.assert_fresh('compute2', server)


class TestEvacuationToLegacy(MovesTestBase):
    """The host that is left has no pools yet."""

    images_types = {'compute2': 'qcow2'}

    def test_evacuate(self):
        server = self.boot_with_all()
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        server = self._evacuate_server(server, expected_host='compute2')
        self.assertEqual(
            {'disk': 'qcow2', 'disk.eph0': 'qcow2', 'disk.swap': 'qcow2',
             'disk.config': 'flat'},
            {name: record.backend
             for name, record in self.records(server).items()})
        self.assertEqual(VOLUMES, self.volumes('compute1', server))
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self.assert_nothing_left(server, 'compute1')
        self._reboot_server(server, hard=True)
        self._delete_server(server)
        self.assert_nothing_left(server, 'compute1')


class TestEvacuationOfSharedRoots(MovesTestBase):
    """Root disks are in a pool that both hosts see, and no others."""

    # An error on a host is none of the API.
    CAST_AS_CALL = False

    def setUp(self):
        super().setUp()
        shared = self.useFixture(fixtures.TempDir()).path
        for host, connection in self.connections.items():
            connection.storagePoolDefineXML(
                '<pool type="dir"><name>shared</name><target><path>%s</path>'
                '</target></pool>' % shared)
            self.raw_pool(host, 'shared').create()
            self.set_option(host, 'storage_pool_mapping', {'root': 'shared'})

    def root(self, host, server):
        volume = self.raw_pool(host, 'shared').storageVolLookupByName(
            '%s_disk' % server['id'])
        return volume._file()

    def test_guest_does_not_start(self):
        server = self.boot(ephemeral=1, swap=64)
        self.root('compute1', server).write(storage_pools.GUEST, b'rooted')
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        with mock.patch('nova.virt.libvirt.guest.Guest.launch',
                        side_effect=exception.InternalError('no memory')):
            self._evacuate_server(server, expected_state='ERROR',
                                  expected_migration_status='failed')
        # What is new is made anew, and what is there is the server's only one.
        server = self._evacuate_server(
            server, expected_host='compute2', expected_state='ACTIVE')
        self.assertEqual(['disk'], self.volumes('compute2', server, 'shared'))
        self.assertEqual(b'rooted', self.root('compute2', server).read(
            storage_pools.GUEST, 6))
        self.assertEqual(
            EVACUATED_VOLUMES[1:], self.volumes('compute2', server))
        self.assertEqual(
            {('compute2', 'ready')}, {
                (record.host, record.state)
                for record in self.records(server).values()})
        # Whose instances share storage deletes nothing when it is back, but
        # what is noted as left.
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self.stub_out('nova.virt.libvirt.storage.pool.mounts.is_local',
                      lambda path: True)
        self.sweep('compute1')
        self.assertEqual(['disk'], self.volumes('compute1', server, 'shared'))
        self.assertEqual([], self.volumes('compute1', server))
        self.assertEqual(
            EVACUATED_VOLUMES[1:], self.volumes('compute2', server))

    def test_source_is_back(self):
        """Its guest has never ended; what it has was noted as replaced."""
        server = self.boot(ephemeral=1, swap=64)
        self.write('compute1', server, 'disk.eph0', b'written')
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        with mock.patch('nova.virt.libvirt.driver.LibvirtDriver.'
                        '_get_guest_xml',
                        side_effect=exception.InternalError('no')):
            self._evacuate_server(server, expected_state='ERROR',
                                  expected_migration_status='failed')
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self.api.post_server_action(
            server['id'], {'os-resetState': {'state': 'active'}})
        self.flags(allow_resize_to_same_host=True)
        (service,) = self.api.get_services(
            host='compute2', binary='nova-compute')
        self.api.put_service(service['id'], {'status': 'disabled'})
        self.api.post_server_action(server['id'], {'resize': {
            'flavorRef': self.flavor(ephemeral=1, swap=64, memory_mb=600)}})
        server = self._wait_for_state_change(server, 'VERIFY_RESIZE')
        self.assertEqual({'compute1'}, {
            record.host for record in self.records(server).values()})
        self._revert_resize(server)
        self.assertEqual(VOLUMES[1:], self.volumes('compute1', server))
        self.assertEqual(b'written', self.content(
            'compute1', server, 'disk.eph0', 7, storage_pools.GUEST))


@ddt.ddt
class TestCutOff(MovesTestBase):
    """What was cut off is ended by what an operator has at hand."""

    # An error on a host is none of the API.
    CAST_AS_CALL = False

    def test_arrival_has_failed(self):
        """Swap and config drive were to be made, and no guest was defined."""
        server = self.boot_with_all()
        with mock.patch.object(
                self.computes['compute2'].driver, '_get_guest_xml',
                side_effect=exception.InternalError('no XML')):
            self.api.post_server_action(server['id'], {'migrate': {
                'host': 'compute2'}})
            server = self.wait_for_failure(server)
        self.api.post_server_action(
            server['id'], {'reboot': {'type': 'HARD'}})
        server = self._wait_for_state_change(server, 'ACTIVE')
        self.assert_ready('compute2', server, **ALL)
        self.assert_written('compute2', server)

    @ddt.data((False, ['disk', 'disk.config', 'disk.swap']),
              (True, ['disk', 'disk.config', 'disk.local', 'disk.swap']))
    @ddt.unpack
    def test_resize_has_not_begun_its_new_disks(self, is_killed, expected):
        server = self.boot()
        self.write('compute1', server, 'disk', b'rooted')
        compute = self.computes['compute2'].manager
        set_flavor = compute._set_instance_info

        def accept(*args):
            if is_killed:
                # Otherwise the server has the old flavor again.
                compute._set_instance_info = mock.Mock()
            raise exception.InternalError('no Glance')

        with mock.patch('nova.virt.libvirt.storage.move.destination.accept',
                        side_effect=accept):
            self.api.post_server_action(server['id'], {'resize': {
                'flavorRef': self.flavor(ephemeral=1, swap=64)}})
            server = self.wait_for_failure(server)
        compute._set_instance_info = set_flavor
        for _again in range(2):
            self._reboot_server(server, hard=True)
            self.assertEqual(expected, self.volumes('compute2', server))
        self.assertEqual({'ready'}, {
            record.state for record in self.records(server).values()})
        self.assertEqual(b'rooted', self.content(
            'compute2', server, 'disk', 6, storage_pools.GUEST))

    def test_revert_is_cut_off_on_the_destination(self):
        server = self.boot_with_all()
        server = self._migrate_server(server)
        with mock.patch(
                'nova.virt.libvirt.storage.pool.ownership.delete_volumes',
                side_effect=exception.InternalError('killed')):
            self.api.post_server_action(server['id'], {'revertResize': None})
            self.wait_for_failure(server)
        # Nothing boots from what may be half deleted.
        self.api.post_server_action(
            server['id'], {'reboot': {'type': 'HARD'}})
        self._wait_for_action_fail_completion(
            server, instance_actions.REBOOT, 'compute_reboot_instance')
        server = self.api.get_server(server['id'])
        self.assertEqual(('ERROR', 'compute2'), (
            server['status'], server['OS-EXT-SRV-ATTR:host']))
        self.assertIn('--keep-nvram) and evacuate the server there',
                      server['fault']['message'])

        self.connections['compute1'].lookupByUUIDString(
            server['id']).undefine()
        self.computes['compute2'].stop()
        self.force_down('compute2', True)
        # The migration that was to be reverted stays in error.
        server = self._evacuate_server(
            server, {'host': 'compute1'}, expected_host='compute1',
            expected_state='ACTIVE', expected_migration_status='error')
        self.assert_ready('compute1', server, **ALL)
        self.assert_written('compute1', server)
        self.restart_compute_service('compute2')
        self.force_down('compute2', False)
        self.assert_nothing_left(server, 'compute2')
        self._reboot_server(server, hard=True)
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_settled(server, 'compute2', 'compute1')


class TestRefusedMoves(MovesTestBase):
    """What can't go runs on where it is, and says why."""

    # An error on a host is none of the API.
    CAST_AS_CALL = False

    def migrate(self, server):
        self.api.post_server_action(
            server['id'], {'migrate': {'host': 'compute2'}})

    def assert_refused(self, server, *words):
        self.wait_for_refusal(server)
        self.assert_settled(server, 'compute1', 'compute2')
        self.assert_told(server, *words)

    def test_pool_is_not_there(self):
        server = self.boot_with_all()
        self.set_option('compute2', 'images_type', 'qcow2')
        pool = self.raw_pool('compute2')
        pool.destroy()
        pool.undefine()
        self.migrate(server)
        self.assert_refused(
            server, 'nova-disks-pool', 'define and start storage pool')

    def test_pool_is_inactive(self):
        server = self.boot_with_all()
        self.set_option('compute2', 'images_type', 'qcow2')
        self.raw_pool('compute2').destroy()
        self.migrate(server)
        self.assert_refused(server, 'nova-disks-pool', 'inactive')

    def test_too_little_space(self):
        server = self.boot_with_all()
        fs = self.connections['compute2'].file_system
        fs.taken = fs.capacity - fs.used - 4096
        self.migrate(server)
        self.assert_refused(server, 'bytes available', 'make room')
        fs.taken = 0
        self.migrate(server)
        self._wait_for_state_change(server, 'VERIFY_RESIZE')
        self.assert_waits(server)

    def test_old_service_version(self):
        server = self.boot_with_all()
        service = objects.Service.get_by_compute_host(
            self.context, 'compute2')
        service.version = precheck.MIN_COMPUTE - 1
        with mock.patch.object(service, '_check_minimum_version'):
            service.save()
        self.migrate(server)
        self.assert_refused(server, 'too old', 'compute2')

    def test_unreachable_libvirt(self):
        server = self.boot_with_all()
        storage_pools.fakelibvirt.PEERS.pop(
            storage_pools.URI % '192.0.2.2')
        self.migrate(server)
        self.assert_refused(server, "can't be reached")

    def test_cancelled_copy(self):
        server = self.boot_with_all()
        self.flags(storage_migration_parallel_disks=1, group='libvirt')
        self.stub_out(
            'nova.virt.libvirt.storage.move.copy._REPORT_INTERVAL', 0)
        commands = manage.LibvirtCommands()
        output = self.useFixture(fixtures.StringStream('stdout')).stream
        self.useFixture(fixtures.MonkeyPatch('sys.stdout', output))
        returned = []

        def cancel(volume):
            if not returned:
                returned.append(commands.cancel_move(server['id']))

        self.pump.fail = cancel
        self.migrate(server)
        self.assert_refused(server, 'was cancelled')
        self.assertEqual([0], returned)
        # Nothing is copied any more.
        self.assertEqual(3, commands.cancel_move(server['id']))
        self.migrate(server)
        self._wait_for_state_change(server, 'VERIFY_RESIZE')
        self.assert_waits(server)

    def test_failed_copy(self):
        server = self.boot_with_all()

        def fail(volume):
            if volume.name.endswith('disk.eph0'):
                raise exception.StorageTransferStalled(
                    volume=volume.name, where='there', seconds=60,
                    transferred=0, length=1)

        self.pump.fail = fail
        self.migrate(server)
        self.assert_refused(server, 'no progress for 60 seconds')
        self.pump.fail = lambda volume: None
        self.migrate(server)
        self._wait_for_state_change(server, 'VERIFY_RESIZE')
        self.assert_waits(server)
