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
"""Where the driver goes on from a memory in place of booting."""

from unittest import mock

import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova import context
from nova import objects
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.unit import fake_instance
from nova.virt import fake
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest


class DriverTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.LibvirtFixture())
        self.context = context.get_admin_context()
        self.driver = libvirt_driver.LibvirtDriver(
            fake.FakeVirtAPI(), False)
        self.driver._local_disks = self.disks = mock.Mock()
        self.driver._image_api = mock.Mock()
        self.instance = fake_instance.fake_instance_obj(self.context)
        self.instance.system_metadata = {}
        self.calls = mock.Mock()

    def _patch(self, name, **kwargs):
        return self.useFixture(fixtures.MockPatchObject(
            self.driver, name, **kwargs)).mock

    def _spawn(self):
        self._patch('_get_guest_xml', return_value='cold')
        self._patch('_create_image', return_value=(True, True))
        self._patch('_ensure_console_log_for_instance')
        self._patch('_allocate_mdevs', return_value=[])
        self._patch('plug_vifs')
        self._patch('_register_undefined_instance_details')
        self._patch('get_info', return_value=mock.Mock(state=1))
        self._patch('cpu_api')
        guest = self.calls.guest
        self.useFixture(fixtures.MockPatchObject(
            libvirt_guest.Guest, 'create', return_value=guest))
        self.disks.open.return_value.finish = (
            lambda _config_drive: self.calls.config_drive())
        self.driver.spawn(
            self.context, self.instance, objects.ImageMeta.from_dict({}), [],
            None, {}, network_info=[], block_device_info={})

    def test_live(self):
        live = self.calls.live
        live.launch.side_effect = lambda _guest, finish, _pause: finish()
        self.disks.live_boot.return_value = live
        self._spawn()
        self.disks.live_boot.assert_called_once_with(
            self.context, self.instance, self.driver._image_api)
        libvirt_guest.Guest.create.assert_called_once_with(
            live.define.return_value, self.driver._host)
        self.assertEqual(
            [mock.call.live.define(
                'cold', self.disks.open.return_value.image.return_value),
             mock.call.live.launch(self.calls.guest, mock.ANY, False),
             mock.call.config_drive(),
             mock.call.guest.sync_guest_time()], self.calls.mock_calls)

    def test_memory_that_can_not_be_had(self):
        """Before a disk is made, and nothing is booted."""
        self.disks.live_boot.side_effect = ValueError('unusable')
        self.assertRaises(ValueError, self._spawn)
        self.disks.open.assert_not_called()
        self.assertEqual([], self.calls.mock_calls)

    def test_cold(self):
        self.disks.live_boot.return_value = None
        self._spawn()
        self.assertEqual(
            [mock.call.config_drive(), mock.call.guest.launch(pause=False)],
            self.calls.mock_calls)

    def test_snapshot(self):
        self.driver._image_api.get.return_value = {'name': 'warm'}
        self.driver.live_snapshot(
            self.context, self.instance, uuids.image, mock.sentinel.states)
        self.disks.save_live.assert_called_once_with(
            self.context, self.instance, self.driver, self.driver._image_api,
            uuids.image, mock.ANY, mock.sentinel.states)
        metadata = self.disks.save_live.mock_calls[0].args[5]
        self.assertEqual(('warm', 'qcow2', self.instance.project_id), (
            metadata['name'], metadata['disk_format'],
            metadata['properties']['owner_id']))

    def test_recovers_at_start(self):
        for name in ('_validate_pinning_configuration',
                     '_validate_vtpm_configuration',
                     '_validate_mem_encryption_configuration',
                     '_register_all_undefined_instance_details'):
            self._patch(name)
        self.driver.process_instances_at_startup(
            self.context, [self.instance])
        self.disks.recover_live.assert_called_once_with(
            self.context, [self.instance], self.driver)
