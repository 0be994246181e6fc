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

from oslo_utils.fixture import uuidsentinel

from nova.compute import task_states
from nova import context
from nova import exception
from nova import objects
from nova import test
from nova.tests.unit import fake_instance
from nova.virt.libvirt.storage.move import cancel


class CancelTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.context = context.get_admin_context()
        self.instance = fake_instance.fake_instance_obj(
            self.context, uuid=uuidsentinel.instance,
            task_state=task_states.RESIZE_MIGRATING)
        self.migration = objects.Migration(
            self.context, id=7, status='migrating', source_compute='a')
        self.mapping = objects.InstanceMapping(
            cell_mapping=objects.CellMapping(uuid=uuidsentinel.cell))
        self.found = {}
        for name, value in (
                ('InstanceMapping.get_by_instance_uuid', self.mapping),
                ('Instance.get_by_uuid', self.instance),
                ('Migration.get_by_instance_and_status', self.migration)):
            self.found[name] = self.patch_to(
                'nova.objects.' + name, value)
        cell = self.patch_to('nova.context.target_cell', None)
        cell.return_value = mock.MagicMock()
        cell.return_value.__enter__.return_value = mock.sentinel.cell
        self.save = self.patch_to('nova.objects.Migration.save', None)

    def patch_to(self, name, value):
        patcher = mock.patch(name, return_value=value)
        self.addCleanup(patcher.stop)
        return patcher.start()

    def request(self):
        return cancel.request(self.context, uuidsentinel.instance)

    def test_request(self):
        self.assertIs(self.migration, self.request())
        self.save.assert_called_once_with()
        self.assertTrue(cancel.is_requested(self.migration))
        self.found['Migration.get_by_instance_and_status'
                   ].assert_called_once_with(
            mock.sentinel.cell, uuidsentinel.instance, 'migrating')

    def test_state_was_reset(self):
        """Only then does the API let a hard reboot meet a copy that runs."""
        self.instance.task_state = None
        self.request()
        self.assertTrue(cancel.is_requested(self.migration))

    def test_nothing_is_copied(self):
        self.instance.task_state = task_states.RESIZE_FINISH
        self.found['Migration.get_by_instance_and_status'].side_effect = (
            exception.MigrationNotFoundByStatus(
                instance_id=uuidsentinel.instance, status='migrating'))
        e = self.assertRaises(exception.NoCopyToCancel, self.request)
        self.assertIn('resize_finish', str(e))
        self.save.assert_not_called()
        self.assertFalse(cancel.is_requested(self.migration))

    def test_instance_has_no_cell(self):
        self.mapping.cell_mapping = None
        self.assertRaises(exception.InstanceNotFound, self.request)
