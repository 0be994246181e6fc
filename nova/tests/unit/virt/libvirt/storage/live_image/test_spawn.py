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

from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import vm_states
from nova import exception
from nova import objects
from nova import test
from nova.tests.unit.virt.libvirt.storage.live_image import test_definition
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import spawn
from nova.virt.libvirt.storage.pool import kinds


@ddt.ddt
class SpawnTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.flags(live_images=True, images_type='libvirt-storage',
                   group='libvirt')
        self.instance = objects.Instance(
            uuid=test_definition.OWN, image_ref=uuids.disk,
            project_id='project', vm_state=vm_states.BUILDING,
            system_metadata={'image_img_live_memory_id': uuids.memory})
        self.glance = mock.Mock()
        self.disk = {'id': uuids.disk, 'properties': {
            'img_live_memory_id': uuids.memory}}
        self.glance.get.return_value = self.disk
        self.store = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.live_image.store.Store')
        ).mock.return_value
        self.live = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.live_image.boot.LiveBoot')).mock
        self.host = mock.Mock()
        self.pool_of = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.setup.pool_of')).mock
        self.pool_of.return_value.kind.return_value = kinds.of_type('dir')

    def _prepare(self):
        return spawn.prepare(
            self.host, self.glance, mock.sentinel.context, self.instance)

    def test_prepare(self):
        self._prepare()
        self.glance.get.assert_called_once_with(
            mock.sentinel.context, uuids.disk)
        self.assertEqual(
            [mock.call.check(self.disk, uuids.memory, 'project'),
             mock.call.fetch(uuids.memory)], self.store.mock_calls)
        self.live.assert_called_once_with(
            self.host, self.instance, self.store.fetch.return_value)
        self.live.return_value.check_host.assert_called_once_with()

    @ddt.data(True, False)
    def test_launch(self, pause):
        live = self.live.return_value
        spawned = self._prepare()
        calls = mock.Mock()
        for name in ('write_root', 'define', 'start', 'give_devices'):
            calls.attach_mock(getattr(live, name), name)
        live.define.return_value = 'made'
        self.assertEqual('made', spawned.define('own', mock.sentinel.root))
        spawned.launch(calls.guest, calls.config_drive, pause)
        self.assertEqual(
            [mock.call.write_root(mock.sentinel.root),
             mock.call.define('own'),
             mock.call.start(calls.guest, 'made'),
             mock.call.config_drive(),
             mock.call.give_devices(calls.guest, 'own'),
             *([] if pause else [mock.call.guest.resume()])],
            calls.mock_calls)

    def test_image_without_memory(self):
        self.instance.system_metadata = {}
        self.assertIsNone(self._prepare())

    @ddt.data(vm_states.ACTIVE, vm_states.SHELVED_OFFLOADED,
              vm_states.RESIZED, vm_states.ERROR)
    def test_no_new_instance(self, vm_state):
        """Its disk is another by now, or the image is."""
        self.instance.vm_state = vm_state
        self.assertIsNone(self._prepare())

    @ddt.data({'live_images': False}, {'images_type': 'qcow2'})
    def test_host_that_starts_none(self, flags):
        """It isn't booted in place of that."""
        self.flags(group='libvirt', **flags)
        error = self.assertRaises(exception.LiveImageUnusable, self._prepare)
        self.assertIn(next(iter(flags)), str(error))
        self.store.fetch.assert_not_called()

    @ddt.data('logical', 'rbd')
    def test_root_disk_in_no_file(self, kind):
        """Before the memory is fetched, and with the right advice."""
        self.pool_of.return_value.name = 'fast'
        self.pool_of.return_value.kind.return_value = kinds.of_type(kind)
        error = self.assertRaises(exception.LiveImageUnusable, self._prepare)
        self.assertIn('storage pool fast', str(error))
        self.assertNotIn('use_cow_images', str(error))
        self.pool_of.assert_called_once_with(
            self.host.get_connection.return_value, 'disk')
        self.store.fetch.assert_not_called()

    def test_root_disk_that_is_a_copy(self):
        self.flags(use_cow_images=False)
        error = self.assertRaises(exception.LiveImageUnusable, self._prepare)
        self.assertIn('use_cow_images', str(error))
        self.store.fetch.assert_not_called()

    @ddt.data({}, {'img_live_memory_id': uuids.other})
    def test_image_was_changed(self, properties):
        self.disk['properties'] = properties
        self.assertRaises(exception.LiveImageUnusable, self._prepare)
        self.store.fetch.assert_not_called()

    def test_check_fails(self):
        self.store.check.side_effect = memory_file.Unfit('forged')
        error = self.assertRaises(exception.LiveImageUnfit, self._prepare)
        self.assertIn('forged', str(error))
        self.store.fetch.assert_not_called()
