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
"""The life of an instance whose disks are in storage pools, on one host."""

import os
from unittest import mock

from nova.tests.fixtures import libvirt_storage
from nova.tests.functional.api import client
from nova.tests.functional.libvirt import storage_pools

BASE = storage_pools.BASE
VOLUME_GROUP = (
    "<pool type='logical'><name>nova-disks-pool</name><source><name>vg</name>"
    "</source><target><path>/dev/vg</path></target></pool>")


class TestOnOneHost(storage_pools.StoragePoolsTestBase):

    def setUp(self):
        super().setUp()
        self.start_compute()

    def boot_with_all(self):
        self.flags(force_config_drive=True)
        return self.boot(ephemeral=1, swap=64)

    ALL = {'disk': 'qcow2', 'disk_eph0': 'qcow2', 'disk_swap': 'qcow2',
           'disk_config': 'qcow2'}

    def test_boot(self):
        server = self.boot()
        self.assert_ready('compute1', server, disk='qcow2')
        self.assertEqual(['disk'], self.volumes('compute1', server))
        volume = self.config_of('compute1', server, 'disk')
        self.assertEqual(
            (1 << 30, os.path.join(
                self.directories['compute1'], '_base', BASE), 'raw'),
            (volume.capacity, volume.backing_store.path,
             volume.backing_store.format))
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_boot_with_all_disks(self):
        server = self.boot_with_all()
        self.assert_ready('compute1', server, **self.ALL)
        self.assertEqual(
            ['disk', 'disk.config', 'disk.eph0', 'disk.swap'],
            self.volumes('compute1', server))
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_boot_without_cow(self):
        self.flags(use_cow_images=False)
        server = self.boot_with_all()
        self.assert_ready('compute1', server, **self.ALL)
        volume = self.config_of('compute1', server, 'disk')
        self.assertEqual((1 << 30, 'qcow2', None), (
            volume.capacity, volume.target_format, volume.backing_store))
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_boot_of_raw_files(self):
        self.flags(use_cow_images=False)
        self.flags(storage_raw_files=True, group='libvirt')
        server = self.boot_with_all()
        self.assert_ready(
            'compute1', server, **dict.fromkeys(self.ALL, 'raw'))
        volume = self.config_of('compute1', server, 'disk')
        self.assertEqual((1 << 30, 'raw', None), (
            volume.capacity, volume.target_format, volume.backing_store))
        self.assertEqual(
            storage_pools.CONTENT[:512],
            self.content('compute1', server, 'disk'))
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_failed_boot_leaves_nothing(self):
        self.connections['compute1'].file_system.capacity = 2 << 20
        self.flags(use_cow_images=False, preallocate_images='space')
        self.flags(storage_raw_files=True, group='libvirt')
        server = self._create_server(
            image_uuid=storage_pools.IMAGE, flavor_id=self.flavor(),
            networks='none', expected_state='ERROR')
        self.assert_nothing_left(server)
        self._delete_server(server)
        self.assertEqual([], self.files('compute1'))

    def test_hard_reboot(self):
        server = self.boot_with_all()
        before = self.records(server)
        self.write('compute1', server, 'disk.eph0', b'of the guest')
        self._reboot_server(server, hard=True)
        self.assert_ready('compute1', server, **self.ALL)
        self.assertEqual(
            {name: record.obj_to_primitive()
             for name, record in before.items()},
            {name: record.obj_to_primitive()
             for name, record in self.records(server).items()})
        self.assertEqual(b'of the guest', self.content(
            'compute1', server, 'disk.eph0', 12, storage_pools.GUEST))

    def test_hard_reboot_that_is_refused(self):
        """Its guest runs on, and the action says why."""
        server = self.boot()
        pool = self.connections['compute1'].storage['nova-disks-pool']
        pool.destroy()
        with mock.patch.object(pool, 'create', side_effect=(
                libvirt_storage.error(38, 'cannot open directory'))):
            # What is cast to a compute is a call in tests.
            self.assertRaises(
                client.OpenStackApiException, self.api.post_server_action,
                server['id'], {'reboot': {'type': 'HARD'}})
            event = self._wait_for_instance_action_event(
                server, 'reboot', 'compute_reboot_instance', 'error')
        self.assertIn('nova-disks-pool', event['details'])
        self._wait_for_state_change(server, 'ACTIVE')
        guest = self.connections['compute1'].lookupByUUIDString(server['id'])
        self.assertTrue(guest.isActive())

    def test_reverted_resize_leaves_nothing(self):
        self.flags(allow_resize_to_same_host=True)
        server = self.boot()
        before = self.volumes('compute1', server)
        self._resize_server(server, self.flavor(ephemeral=1, swap=64))
        self.assertLess({*before, 'disk.swap'},
                        set(self.volumes('compute1', server)))
        self._revert_resize(server)
        self.assertEqual(before, self.volumes('compute1', server))
        self._reboot_server(server, hard=True)
        self.assert_ready('compute1', server, disk='qcow2')

    def test_header_that_the_guest_has_written_is_not_believed(self):
        self.flags(use_cow_images=False, allow_resize_to_same_host=True)
        self.flags(storage_raw_files=True, group='libvirt')
        server = self.boot()
        self.write('compute1', server, 'disk',
                   storage_pools.libvirt_storage.qcow2_header(
                       1 << 40, '/etc/passwd', 'raw'), offset=0)
        self.raw_pool('compute1').refresh()
        self._reboot_server(server, hard=True)
        self.assert_ready('compute1', server, disk='raw')
        self._resize_server(server, self.flavor(disk=2))
        self.assertEqual(2 << 30, self.records(server)['disk'].size)

    def test_rescue(self):
        server = self.boot_with_all()
        self._rescue_server(server)
        rescue = {'disk.rescue': 'qcow2', 'disk.config.rescue': 'qcow2'}
        self.assertEqual(
            {'disk', 'disk.eph0', 'disk.swap', 'disk.config', *rescue},
            set(self.volumes('compute1', server)))
        records = self.records(server)
        self.assertEqual(
            rescue, {name: records[name].format for name in rescue})
        self.assertIn(('qcow2', 'disk.rescue'),
                      self.guest_disks('compute1', server).values())
        self._unrescue_server(server)
        self.assertEqual(
            ['disk', 'disk.config', 'disk.eph0', 'disk.swap'],
            self.volumes('compute1', server))
        self.assert_ready('compute1', server, **self.ALL)
        # and once more, with what the first time has left
        self._rescue_server(server)
        self._unrescue_server(server)
        self.assert_ready('compute1', server, **self.ALL)

    def test_delete_while_rescued(self):
        server = self.boot_with_all()
        self._rescue_server(server)
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_rebuild(self):
        server = self.boot_with_all()
        self.write('compute1', server, 'disk', b'x' * 4096)
        self._rebuild_server(server, storage_pools.IMAGE)
        self.assert_ready('compute1', server, **self.ALL)
        self.assertEqual(
            ['disk', 'disk.config', 'disk.eph0', 'disk.swap'],
            self.volumes('compute1', server))
        self.assertEqual(bytes(512), self.raw_pool('compute1')
            .storageVolLookupByName(server['id'] + '_disk')
            ._file().read(1 << 20, 512).ljust(512, b'\0'))

    def test_shelve_and_unshelve(self):
        server = self.boot_with_all()
        self.flags(shelved_offload_time=0)
        server = self._shelve_server(server)
        self.assert_nothing_left(server)
        self.assertEqual([None], list(
            {bdm.driver_info for bdm in self.mappings(server)}))
        server = self._unshelve_server(server)
        self.assert_ready('compute1', server, **self.ALL)
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_resize_on_the_same_host(self):
        self.flags(allow_resize_to_same_host=True)
        server = self.boot_with_all()
        old = self.records(server)
        self._resize_server(
            server, self.flavor(disk=2, ephemeral=1, swap=128))
        new = {name: record for name, record in self.records(server).items()}
        self.assertEqual(2 << 30, new['disk'].size)
        self.assertEqual(128 << 20, new['disk.swap'].size)
        for name in ('disk', 'disk.eph0', 'disk.config'):
            self.assertEqual(old[name].volume, new[name].previous.volume)
            self.assertNotEqual(old[name].volume, new[name].volume)
        self.assertEqual(
            2 << 30, self.config_of('compute1', server, 'disk.1').capacity)
        self.assertEqual(
            1 << 30, self.config_of('compute1', server, 'disk').capacity)
        return server

    def test_confirm_on_the_same_host(self):
        server = self.test_resize_on_the_same_host()
        self._confirm_resize(server)
        records = self.records(server)
        self.assertEqual({None}, {r.previous for r in records.values()})
        self.assertEqual(
            sorted(r.volume.removeprefix(server['id'] + '_')
                   for r in records.values()),
            self.volumes('compute1', server))
        self.assertEqual({}, self.system_metadata(server))
        self._delete_server(server)
        self.assert_nothing_left(server)

    def test_revert_on_the_same_host(self):
        server = self.test_resize_on_the_same_host()
        self._revert_resize(server)
        self.assert_ready('compute1', server, **self.ALL)
        self.assertEqual(
            ['disk', 'disk.config', 'disk.eph0', 'disk.swap'],
            self.volumes('compute1', server))
        self.assertEqual(64 << 20, self.records(server)['disk.swap'].size)
        self.assertEqual({}, self.system_metadata(server))
        self._delete_server(server)
        self.assert_nothing_left(server)


class TestOnAVolumeGroup(storage_pools.StoragePoolsTestBase):
    """The disks are logical volumes."""

    ALL = dict.fromkeys(
        ('disk', 'disk_eph0', 'disk_swap', 'disk_config'), 'raw')
    NAMES = ['disk', 'disk.config', 'disk.eph0', 'disk.swap']

    def setUp(self):
        super().setUp()
        self.flags(force_config_drive=True)
        self.start_compute()
        self.group = self.connections['compute1'].volume_group('vg')
        self.stub_out('nova.privsep.fs.lvorigins', self.group.lvorigins)
        self.stub_out('nova.privsep.fs.vginfo', self.group.vginfo)

    def _get_connection(self, *args, **kwargs):
        connection = super()._get_connection(*args, **kwargs)
        connection.storagePoolDefineXML(VOLUME_GROUP)
        return connection

    def boot_with_all(self):
        return self.boot(ephemeral=1, swap=64)

    def test_boot(self):
        server = self.boot_with_all()
        self.assert_ready('compute1', server, **self.ALL)
        self.assertEqual(self.NAMES, self.volumes('compute1', server))
        # None of them is a snapshot, and all are whole extents.
        self.assertEqual({None}, {
            device.room for device in self.group.devices.values()})
        self.assertEqual(1 << 30, self.config_of(
            'compute1', server, 'disk').capacity)
        self.assertEqual(
            storage_pools.CONTENT[:512],
            self.content('compute1', server, 'disk'))
        self._delete_server(server)
        self.assert_nothing_left(server)
        self.assertEqual({}, self.group.devices)

    def test_nothing_of_another_server(self):
        server = self.boot_with_all()
        for name in self.NAMES:
            self.write('compute1', server, name, b'secret')
        self.flags(volume_clear='none', group='libvirt')
        self._delete_server(server)
        server = self.boot_with_all()
        for name, device in self.group.devices.items():
            self.assertNotIn(b'secret', device.read(
                storage_pools.GUEST, 512), name)

    def test_hard_reboot_and_rescue(self):
        server = self.boot_with_all()
        self.write('compute1', server, 'disk', b'of the guest')
        self._reboot_server(server, hard=True)
        self._rescue_server(server)
        self.assertEqual(
            {*self.NAMES, 'disk.rescue', 'disk.config.rescue'},
            set(self.volumes('compute1', server)))
        self._unrescue_server(server)
        self.assert_ready('compute1', server, **self.ALL)
        self.assertEqual(self.NAMES, self.volumes('compute1', server))
        self.assertEqual(b'of the guest', self.content(
            'compute1', server, 'disk', 12, storage_pools.GUEST))

    def test_group_that_is_full(self):
        self.group.capacity = 512 << 20
        server = self._create_server(
            image_uuid=storage_pools.IMAGE, flavor_id=self.flavor(),
            networks='none', expected_state='ERROR')
        self.assertEqual({}, self.group.devices)
        self._delete_server(server)
