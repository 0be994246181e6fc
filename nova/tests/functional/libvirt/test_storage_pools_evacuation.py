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

"""Evacuations of instances whose last move is not over.

An operator has reset their state, for only then can they be evacuated.
"""

from unittest import mock

import ddt
import fixtures

from nova import exception
from nova import objects
from nova.tests.functional.libvirt import storage_pools
from nova.tests.functional.libvirt import test_storage_pools_live
from nova.tests.functional.libvirt import test_storage_pools_shared

LAUNCH = 'guest.Guest.launch'
# Before anything else can fail
XML = 'driver.LibvirtDriver._get_guest_xml'


class UnfinishedTestBase(test_storage_pools_shared.SharedTestBase):

    HOSTS: tuple[str, ...] = ('compute1', 'compute2', 'compute3')
    SHARING: tuple[str, ...] = ()

    def setUp(self):
        super().setUp()
        if 'compute3' in self.HOSTS:
            self.start_compute('compute3')
        for host in self.HOSTS:
            self.define_pool(
                host, 'pool', self.shared if host in self.SHARING else
                self.useFixture(fixtures.TempDir()).path)

    def undefine(self, host, server):
        self.connections[host].lookupByUUIDString(server['id']).undefine()

    def reset_state(self, server):
        self.api.post_server_action(
            server['id'], {'os-resetState': {'state': 'active'}})

    def move(self, server, host='compute2'):
        """Migrate a server, and don't confirm that."""
        self.api.post_server_action(
            server['id'], {'migrate': {'host': host}})
        server = self._wait_for_state_change(server, 'VERIFY_RESIZE')
        self.write_root(server)
        self.reset_state(server)
        return server

    def evacuate_to(self, server, host, status='finished', state='ACTIVE'):
        """:param status: of a migration, whichever it is

        :param state: ``SHUTOFF`` unless another evacuation has failed before
        """
        return self._evacuate_server(
            server, {'host': host}, expected_host=host,
            expected_state=state, expected_migration_status=status)


class TestOnOneHost(UnfinishedTestBase):
    """A resize has left two disks on one host."""

    HOSTS = ('compute1', 'compute2')

    def resize(self):
        self.flags(allow_resize_to_same_host=True)
        server = self.boot()
        (service,) = self.api.get_services(
            host='compute2', binary='nova-compute')
        self.api.put_service(service['id'], {'status': 'disabled'})
        self.api.post_server_action(server['id'], {'resize': {
            'flavorRef': self.flavor(memory_mb=600)}})
        server = self._wait_for_state_change(server, 'VERIFY_RESIZE')
        self.api.put_service(service['id'], {'status': 'enabled'})
        self.write_root(server)
        return server

    def come_back_to_its_disk(self, server):
        self.come_back('compute1')
        self._reboot_server(server, hard=True)
        self.assertEqual('compute1', self.records(server)['disk'].host)
        self.assert_has_root(server)

    def test_evacuation_fails(self):
        server = self.resize()
        self.reset_state(server)
        self.go_down('compute1')
        server = self.fail_to_evacuate(server, 'compute2', XML)
        self.come_back_to_its_disk(server)

    def test_evacuation_is_cut_off(self):
        server = self.resize()
        self.reset_state(server)
        self.go_down('compute1')
        with mock.patch('nova.virt.libvirt.driver.LibvirtDriver._cleanup'):
            server = self.fail_to_evacuate(server, 'compute2', LAUNCH)
        self.come_back_to_its_disk(server)

    def test_confirming_and_evacuation_fail(self):
        server = self.resize()
        with mock.patch('nova.network.neutron.API.setup_networks_on_host',
                        side_effect=exception.InternalError('timeout')):
            self.api.post_server_action(server['id'], {'confirmResize': None})
            server = self.wait_for_failure(server)
        self.reset_state(server)
        self.go_down('compute1')
        server = self.fail_to_evacuate(server, 'compute2', XML)
        self.come_back_to_its_disk(server)


@ddt.ddt
class TestBackInTime(UnfinishedTestBase):
    """A host is back, and an evacuation from it was cut off."""

    HOSTS = ('compute1', 'compute2')

    @ddt.data(('accepted', 'rebuilding'), ('pre-migrating', None),
              ('pre-migrating', 'rebuild_spawning'))
    @ddt.unpack
    def test_its_disks_stay(self, status, task_state):
        server = self.boot()
        self.write_root(server)
        self.go_down('compute1')
        with mock.patch('nova.compute.manager.ComputeManager.'
                        '_rebuild_default_impl',
                        side_effect=exception.InternalError('killed')):
            self._evacuate_server(
                server, {'host': 'compute2'}, expected_state='ERROR',
                expected_migration_status='failed')
        (migration,) = objects.MigrationList.get_by_filters(
            self.context, {'instance_uuid': server['id']})
        migration.status = status
        migration.save()
        instance = objects.Instance.get_by_uuid(self.context, server['id'])
        instance.task_state = task_state
        instance.save()
        self.come_back('compute1')
        self.reset_state(server)
        self._reboot_server(server, hard=True)
        self.assert_has_root(server)

    def test_rebuild_afterwards(self):
        """It is not taken for the evacuation."""
        server = self.boot()
        self.write_root(server)
        self.force_down('compute1', True)
        server = self.fail_to_evacuate(server, 'compute2', XML)
        (migration,) = objects.MigrationList.get_by_filters(
            self.context, {'instance_uuid': server['id']})
        migration.status = 'accepted'
        migration.save()
        self.force_down('compute1', False)
        self._rebuild_server(server, storage_pools.IMAGE)
        self.assertNotEqual(
            b'needed', self.root_file(server).read(storage_pools.GUEST, 6))


class TestOnTwoHosts(UnfinishedTestBase):
    """A move has left a disk on each of two hosts that share nothing."""

    def test_evacuation_fails(self):
        server = self.move(self.boot())
        self.go_down('compute2')
        server = self.fail_to_evacuate(server, 'compute3', XML)
        self.come_back('compute2')
        self._reboot_server(server, hard=True)
        self.assertEqual('compute2', self.records(server)['disk'].host)
        self.assert_has_root(server)

    def test_evacuation_fails_and_then_to_the_first(self):
        """Its disk is the one of before the move."""
        server = self.move(self.boot())
        self.go_down('compute2')
        server = self.fail_to_evacuate(server, 'compute3', XML)
        self.undefine('compute1', server)
        server = self.evacuate_to(server, 'compute1')
        self.assertNotEqual(
            b'needed',
            self.root_file(server).read(storage_pools.GUEST, 6))
        self.assertNotEqual(
            '%s_disk' % server['id'], self.records(server)['disk'].volume)

    def test_other_disk_is_noted_in_the_end(self):
        server = self.move(self.boot())
        self.go_down('compute2')
        server = self.evacuate_to(server, 'compute3', state='SHUTOFF')
        self.come_back('compute2')
        self.undefine('compute1', server)
        for host in self.HOSTS:
            self.sweep(host)
        for host in ('compute1', 'compute2'):
            self.assertEqual([], self.volumes(host, server, 'pool'))

    def fail_to_arrive(self):
        """The whole disk is on compute1, and the server on compute2."""
        server = self.boot()
        self.write_root(server)
        with mock.patch('nova.virt.libvirt.storage.move.destination.accept',
                        side_effect=exception.InternalError('no Glance')):
            self.api.post_server_action(
                server['id'], {'migrate': {'host': 'compute2'}})
            server = self.wait_for_failure(server)
        self.go_down('compute2')
        with mock.patch('nova.virt.libvirt.' + XML,
                        side_effect=exception.InternalError('no memory')):
            return self._evacuate_server(
                server, {'host': 'compute3'}, expected_state='ERROR',
                expected_migration_status='error')

    def test_disk_that_has_not_arrived(self):
        server = self.fail_to_arrive()
        self.undefine('compute1', server)
        self.sweep('compute1')
        server = self.evacuate_to(server, 'compute1', 'error')
        self.assert_has_root(server)

    def test_revert_was_cut_off(self):
        server = self.boot()
        self.write_root(server)
        self.api.post_server_action(
            server['id'], {'migrate': {'host': 'compute2'}})
        server = self._wait_for_state_change(server, 'VERIFY_RESIZE')
        with mock.patch(
                'nova.virt.libvirt.storage.pool.ownership.delete_volumes',
                side_effect=exception.InternalError('killed')):
            self.api.post_server_action(server['id'], {'revertResize': None})
            server = self.wait_for_failure(server)
        self.go_down('compute2')
        with mock.patch('nova.virt.libvirt.' + XML,
                        side_effect=exception.InternalError('no memory')):
            server = self._evacuate_server(
                server, {'host': 'compute3'}, expected_state='ERROR',
                expected_migration_status='error')
        self.undefine('compute1', server)
        self.sweep('compute1')
        volume = self.raw_pool('compute1', 'pool').storageVolLookupByName(
            '%s_disk' % server['id'])
        self.assertEqual(
            b'needed', volume._file().read(storage_pools.GUEST, 6))

    def test_rescue_after_an_evacuation_that_failed(self):
        """Nobody has rebooted it before."""
        server = self.boot()
        self.go_down('compute1')
        server = self.fail_to_evacuate(server, 'compute2', XML)
        self.come_back('compute1')
        self.api.post_server_action(server['id'], {'rescue': {
            'rescue_image_ref': storage_pools.IMAGE}})
        self._wait_for_state_change(server, 'RESCUE')
        self.assertIn(('qcow2', 'disk'),
                      self.guest_disks('compute1', server).values())


@ddt.ddt
class TestBetweenHostsThatShare(UnfinishedTestBase):
    """What a third host was to make has another pool."""

    SHARING = ('compute1', 'compute2')

    @ddt.data(XML, LAUNCH, None)
    def test_back_to_the_first(self, fault):
        """The disk of the host that is down is there, too."""
        server = self.move(self.boot())
        self.go_down('compute2')
        if fault is not None:
            server = self.fail_to_evacuate(server, 'compute3', fault)
        self.undefine('compute1', server)
        server = self.evacuate_to(
            server, 'compute1', state='ACTIVE' if fault else 'SHUTOFF')
        self.come_back('compute2')
        self.sweep('compute2')
        self.assert_has_root(server)


class TestSharedWithTheFirst(UnfinishedTestBase):
    """Where the server is evacuated to, only what was kept is seen."""

    SHARING = ('compute1', 'compute3')

    def test_its_only_disk_is_no_leftover(self):
        server = self.move(self.boot())
        self.go_down('compute2')
        server = self.evacuate_to(server, 'compute3', state='SHUTOFF')
        volume = self.records(server)['disk'].volume
        self.sweep('compute1')
        self.undefine('compute1', server)
        self.sweep('compute1')
        self.api.post_server_action(
            server['id'], {'migrate': {'host': 'compute1'}})
        server = self._wait_for_state_change(server, 'VERIFY_RESIZE')
        self.raw_pool('compute3', 'pool').refresh()
        self.raw_pool('compute3', 'pool').storageVolLookupByName(volume)
        # Nor is that of the host which is down.
        self.come_back('compute2')
        self.sweep('compute2')

    def test_what_a_confirm_could_not_delete(self):
        """It has the name of the disk, and is taken for it."""
        server = self.boot()
        self.api.post_server_action(
            server['id'], {'migrate': {'host': 'compute2'}})
        server = self._wait_for_state_change(server, 'VERIFY_RESIZE')
        with mock.patch('nova.virt.libvirt.storage.pool.volume.StorageVolume.'
                        'delete', side_effect=exception.InternalError('busy')):
            self._confirm_resize(server)
        self.go_down('compute2')
        self.raw_pool('compute3', 'pool').refresh()
        server = self.evacuate_to(server, 'compute3', 'done', 'SHUTOFF')
        self.write_root(server)
        self.sweep('compute1')
        # A check of its own, before anything is moved
        self.api.post_server_action(
            server['id'], {'migrate': {'host': 'compute1'}})
        server = self._wait_for_state_change(server, 'VERIFY_RESIZE')
        self.assert_has_root(server)


class TestByAnotherName(UnfinishedTestBase):
    """One directory under as many names as there are hosts."""

    def define_pool(self, host, name, path):
        super().define_pool(host, '%s-%s' % (name, host), self.shared)

    def test_evacuation(self):
        server = self.move(self.boot())
        self.raw_pool('compute3', 'pool-compute3').refresh()
        self.go_down('compute2')
        self._evacuate_server(
            server, {'host': 'compute3'}, expected_state='ERROR',
            expected_migration_status='finished')
        self.undefine('compute1', server)
        self.sweep('compute1')
        self.come_back('compute2')
        self._reboot_server(server, hard=True)
        self.assert_has_root(server)


class TestLiveMigration(test_storage_pools_live.LiveTestBase,
                        UnfinishedTestBase):
    """A live migration follows on one that was never confirmed."""

    def test_disk_of_before_is_deleted(self):
        server = self.move(self.boot())
        self._live_migrate(server, host='compute3')
        self.undefine('compute1', server)
        self.sweep('compute1')
        self.assertEqual([], self.volumes('compute1', server, 'pool'))
        self.assert_has_root(server)
