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


"""Hosts of which only some share a pool, or share it by another name."""

import os
from unittest import mock

import fixtures
from oslo_concurrency import processutils

from nova import exception
from nova.tests.functional.libvirt import storage_pools
from nova.tests.functional.libvirt import test_storage_pools_moves
from nova.virt import images


class SharedTestBase(test_storage_pools_moves.MovesTestBase):

    CAST_AS_CALL = False

    def setUp(self):
        super().setUp()
        self.shared = self.useFixture(fixtures.TempDir()).path
        self.stub_out('nova.virt.libvirt.storage.pool.mounts.is_local',
                      lambda path: not path.startswith(self.shared))

    def define_pool(self, host, name, path):
        """Have a host's root disks in a pool of a directory."""
        self.connections[host].storagePoolDefineXML(
            '<pool type="dir"><name>%s</name><target><path>%s</path></target>'
            '</pool>' % (name, path))
        self.raw_pool(host, name).create()
        self.set_option(host, 'storage_pool_mapping', {'root': name})

    def root_file(self, server):
        record = self.records(server)['disk']
        pool = self.raw_pool(record.host, record.pool)
        pool.refresh()
        return pool.storageVolLookupByName(record.volume)._file()

    def write_root(self, server):
        self.root_file(server).write(storage_pools.GUEST, b'needed')

    def assert_has_root(self, server):
        self.assertEqual(
            b'needed', self.root_file(server).read(storage_pools.GUEST, 6))

    def go_down(self, host):
        self.computes[host].stop()
        self.force_down(host, True)

    def come_back(self, host):
        self.restart_compute_service(host)
        self.force_down(host, False)

    def fail_to_evacuate(self, server, host, what='guest.Guest.launch'):
        with mock.patch('nova.virt.libvirt.' + what,
                        side_effect=exception.InternalError('no memory')):
            return self._evacuate_server(
                server, {'host': host}, expected_state='ERROR',
                expected_migration_status='failed')


class TestPartlyShared(SharedTestBase):
    """compute1 and compute3 share a pool, compute2 has its own."""

    def setUp(self):
        super().setUp()
        self.start_compute('compute3')
        own = self.useFixture(fixtures.TempDir()).path
        for host in self.connections:
            self.define_pool(host, 'pool', own if host == 'compute2' else
                             self.shared)

    def test_moved_on_to_a_host_that_shares_with_the_first(self):
        """The host that is back asks where it was evacuated to alone."""
        server = self.boot()
        self.go_down('compute1')
        server = self._evacuate_server(
            server, {'host': 'compute2'}, expected_host='compute2')
        self.api.post_server_action(
            server['id'], {'migrate': {'host': 'compute3'}})
        server = self._wait_for_state_change(server, 'VERIFY_RESIZE')
        self.api.post_server_action(server['id'], {'confirmResize': None})
        self._wait_for_state_change(server, 'SHUTOFF')
        self._start_server(server)
        self.write_root(server)
        # When the host starts, its libvirt looks at what is in the pool.
        self.raw_pool('compute1', 'pool').refresh()
        self.come_back('compute1')
        self.sweep('compute1')
        self.assert_has_root(server)
        # What it had itself is gone.
        self.assertEqual(
            ['disk.1'], self.volumes('compute1', server, 'pool'))

    def test_base_image_in_another_format(self):
        """The host that gets the server has it as it came from Glance."""
        server = self.boot()
        base = os.path.join(
            self.directories['compute3'], '_base', storage_pools.BASE)
        os.makedirs(os.path.dirname(base), exist_ok=True)
        processutils.execute('qemu-img', 'create', '-f', 'qcow2', base, '1G')
        self.go_down('compute1')
        self._evacuate_server(
            server, {'host': 'compute3'}, expected_host='compute3')
        self.assertEqual(['disk'], self.volumes('compute3', server, 'pool'))
        info = images.qemu_img_info(
            os.path.join(self.shared, server['id'] + '_disk'), 'qcow2')
        self.assertEqual((base, 'qcow2'), (
            info.backing_file, info.backing_file_format))

    def evacuate_again(self, server):
        server = self._evacuate_server(
            server, {'host': 'compute3'}, expected_host='compute3',
            expected_state='ACTIVE')
        self.come_back('compute1')
        for host in self.computes:
            self.sweep(host)
        self.assert_has_root(server)
        self.assertEqual(['disk'], self.volumes('compute3', server, 'pool'))
        self.assertEqual([], self.volumes('compute2', server, 'pool'))

    def test_evacuation_that_failed_before(self):
        server = self.boot()
        self.write_root(server)
        self.go_down('compute1')
        server = self.fail_to_evacuate(server, 'compute2')
        self.evacuate_again(server)

    def test_evacuation_that_was_cut_off_before(self):
        """As if that host had died, too."""
        server = self.boot()
        self.write_root(server)
        self.go_down('compute1')
        server = self.fail_to_evacuate(
            server, 'compute2', 'driver.LibvirtDriver._create_image')
        self.evacuate_again(server)

    def test_evacuations_that_fail(self):
        server = self.boot()
        self.write_root(server)
        self.raw_pool('compute3', 'pool').refresh()
        self.go_down('compute1')
        for host in ('compute2', 'compute3'):
            server = self.fail_to_evacuate(server, host)
        self.come_back('compute1')
        self._reboot_server(server, hard=True)
        self.assert_has_root(server)
        self.assertEqual(['disk'], self.volumes('compute1', server, 'pool'))


class TestSharedByAnotherName(SharedTestBase):

    def setUp(self):
        super().setUp()
        for host in self.connections:
            self.define_pool(host, 'pool-' + host, self.shared)

    def test_evacuation(self):
        server = self.boot()
        self.write_root(server)
        self.raw_pool('compute2', 'pool-compute2').refresh()
        self.go_down('compute1')
        self._evacuate_server(server, expected_state='ERROR',
                              expected_migration_status='failed')
        self.assertIn('Give the storage pool of disk disk one name',
                      self.stdlog.logger.output)
        self.come_back('compute1')
        self._reboot_server(server, hard=True)
        self.assert_has_root(server)
        self.assertEqual(
            ['disk'], self.volumes('compute1', server, 'pool-compute1'))
