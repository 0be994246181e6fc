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
"""Legacy instances on hosts that have got storage pools since."""

import os

from nova.tests.functional.libvirt import storage_pools

DISKS = ('disk', 'disk.config', 'disk.eph0', 'disk.swap')
# Overlays over the image and over what was generated
MOVED = {'disk': 'qcow2', 'disk_eph0': 'qcow2', 'disk_swap': 'qcow2',
         'disk_config': 'raw'}


class TransitionTestBase(storage_pools.StoragePoolsTestBase):

    images_types = {'compute1': 'qcow2'}

    def setUp(self):
        super().setUp()
        self.start_compute('compute1')
        self.start_compute('compute2')
        self.flags(force_config_drive=True)

    def boot_legacy(self):
        server = self.boot(ephemeral=1, swap=64)
        self.assertEqual(
            {'disk': 'qcow2', 'disk.eph0': 'qcow2', 'disk.swap': 'qcow2',
             'disk.config': 'flat'},
            {name: record.backend
             for name, record in self.records(server).items()})
        for name in ('disk', 'disk.eph0'):
            with open(self.legacy_path(server, name), 'r+b') as f:
                f.seek(1 << 20)
                f.write(b'written to ' + name.encode())
        return server

    def legacy_path(self, server, name):
        return os.path.join(self.instance_path('compute1', server), name)

    def upgrade(self):
        self.set_option('compute1', 'images_type', 'libvirt-storage')
        self.restart_compute_service('compute1')

    def assert_moved(self, host, server, **formats):
        self.assert_ready(host, server, **dict(MOVED, **formats))
        for name in ('disk', 'disk.eph0'):
            expected = b'written to ' + name.encode()
            volume = self.raw_pool(host).storageVolLookupByName(
                '%s_%s' % (server['id'], name))
            self.assertEqual(
                expected, volume._file().read(1 << 20, len(expected)))

    def assert_no_legacy_names(self, server):
        for name in DISKS:
            self.assertFalse(os.path.lexists(self.legacy_path(server, name)))


class TestTransition(TransitionTestBase):

    def test_at_hard_reboot(self):
        server = self.boot_legacy()
        paths = {path for _format, path in self.guest_disks(
            'compute1', server).values()}
        self.assertEqual(
            {self.legacy_path(server, name) for name in DISKS}, paths)
        before = {name: os.stat(self.legacy_path(server, name)).st_ino
                  for name in DISKS}
        self.upgrade()
        self.assertIn(server['id'], self.stdlog.logger.output)
        self._reboot_server(server, hard=True)
        self.assert_moved('compute1', server)
        self.assert_no_legacy_names(server)
        after = {name: os.stat(os.path.join(
            self.directories['compute1'], 'disks',
            '%s_%s' % (server['id'], name))).st_ino for name in DISKS}
        self.assertEqual(before, after)
        self._reboot_server(server, hard=True)
        self.assert_moved('compute1', server)
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_host_without_pools_keeps_legacy_disks(self):
        """Without pools chosen, a hard reboot changes nothing."""
        server = self.boot_legacy()
        before = self.guest_disks('compute1', server)
        self._reboot_server(server, hard=True)
        self.assertEqual(before, self.guest_disks('compute1', server))
        self._delete_server(server)
        self.assertFalse(os.path.exists(
            self.instance_path('compute1', server)))

    def test_on_cold_migration(self):
        server = self.boot_legacy()
        self.upgrade()
        server = self._migrate_server(server)
        self.assertEqual('compute2', server['OS-EXT-SRV-ATTR:host'])
        # The swap is made anew, as that host makes it.
        self.assert_moved('compute2', server)
        # What was generated on the other host can't be had here.
        self.assertIsNone(self.config_of(
            'compute2', server, 'disk.eph0').backing_store)
        self._confirm_resize(server)
        self.assert_moved('compute2', server)
        self.assert_nothing_left(server, 'compute1')
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_revert_of_the_migration(self):
        server = self.boot_legacy()
        self.upgrade()
        self._migrate_server(server)
        self._revert_resize(server)
        self.assert_moved('compute1', server)
        self.assert_no_legacy_names(server)
        self.assert_nothing_left(server, 'compute2')
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_back_by_shelving(self):
        """No other way leads from a pool to a host without pools."""
        self.flags(shelved_offload_time=0)
        server = self.boot('compute2', ephemeral=1, swap=64)
        self._shelve_server(server)
        self.assert_nothing_left(server, 'compute2')
        service = self.computes['compute2'].service_ref
        self.api.put_service(service.uuid, {'status': 'disabled'})
        server = self._unshelve_server(server)
        self.assertEqual('compute1', server['OS-EXT-SRV-ATTR:host'])
        paths = {path for _format, path in self.guest_disks(
            'compute1', server).values()}
        self.assertEqual(
            {self.legacy_path(server, name) for name in DISKS}, paths)
        self.assertEqual(
            {'qcow2', 'flat'}, {record.backend for record in
                                self.records(server).values()})
        self._delete_server(server)
        self.assertFalse(os.path.exists(
            self.instance_path('compute1', server)))

    def test_rescue_of_a_legacy_server_after_the_upgrade(self):
        server = self.boot_legacy()
        self.upgrade()
        self._rescue_server(server)
        self._unrescue_server(server)
        self._reboot_server(server, hard=True)
        self.assert_moved('compute1', server)
        self._delete_server(server)
        self.assert_nothing_left(server)


class TestRefusedTransition(TransitionTestBase):

    CAST_AS_CALL = False

    def test_refused_migration_leaves_the_guest_running(self):
        server = self.boot_legacy()
        self.upgrade()
        fs = self.connections['compute2'].file_system
        fs.taken = fs.capacity - fs.used - 4096
        before = self.guest_disks('compute1', server)
        self.api.post_server_action(
            server['id'], {'migrate': {'host': 'compute2'}})
        self.wait_for_refusal(server)
        # It runs with what it was started with, by either name.
        self.assertEqual(before, self.guest_disks('compute1', server))
        self.assert_nothing_left(server, 'compute2')
        self._reboot_server(server, hard=True)
        self.assert_moved('compute1', server)
        self.assert_no_legacy_names(server)
