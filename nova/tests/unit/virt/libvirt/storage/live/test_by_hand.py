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

import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import power_state
from nova import exception
from nova.network import model as network_model
from nova import objects
from nova.tests.unit.virt.libvirt.storage.live import test_settle
from nova.virt.libvirt.storage.live import by_hand


class ByHandTestCase(test_settle.LiveTestCase):

    def setUp(self):
        super().setUp()
        self.begin()
        self.copy()
        self.instance.task_state = None
        self.instance.host = 'source'
        self.instance.info_cache = None
        self.neutron = self.useFixture(
            fixtures.MockPatch('nova.network.neutron.API')).mock.return_value
        mapping = objects.InstanceMapping(
            cell_mapping=objects.CellMapping(uuid=uuids.cell))
        for name, value in (
                ('objects.InstanceMapping.get_by_instance_uuid', mapping),
                ('objects.Instance.get_by_uuid', self.instance)):
            self.stub_out('nova.' + name, mock.Mock(return_value=value))
        self.mapping = mapping
        self.node = self.useFixture(fixtures.MockPatch(
            'nova.objects.ComputeNode.get_first_node_by_host_for_old_compat',
            return_value=mock.Mock(hypervisor_hostname='node', id=9))).mock
        cell = self.useFixture(fixtures.MockPatch(
            'nova.context.target_cell')).mock
        cell.return_value.__enter__.return_value = self.context
        self.stub_out(
            'nova.virt.libvirt.storage.records.metadata.InstanceDisks.load',
            lambda cls, context, instance: self.load())

    def end(self, moved):
        return by_hand.end(self.context, uuids.instance, moved)

    def test_moved(self):
        self.instance.power_state = power_state.NOSTATE
        self.assertEqual('dest', self.end(True))
        # Else the API refuses to migrate it until it is looked at.
        self.assertEqual(power_state.RUNNING, self.instance.power_state)
        self.assert_disks('dest')
        self.assertEqual(4, len(self.left('source')))
        self.assertEqual(('dest', 'node', 9), (
            self.instance.host, self.instance.node,
            self.instance.compute_id))
        self.instance.save.assert_called_once_with()

    def test_not_moved(self):
        self.assertEqual('source', self.end(False))
        self.assert_disks('source')
        self.assertEqual(4, len(self.left('dest')))
        self.instance.save.assert_not_called()
        # A start goes on as ever.
        self.guests = {}
        self.settle('source')

    def _have_port(self):
        self.instance.info_cache = objects.InstanceInfoCache(
            network_info=network_model.NetworkInfo(
                [network_model.VIF(id=uuids.port)]))

    def test_ports_move(self):
        # They are bound to the source until somebody says otherwise, and the
        # guest on the destination has no network.
        self._have_port()

        def start(context, instance, migration):
            self.assertEqual(('source', 'dest'), (
                migration.source_compute, migration.dest_compute))
            self.assert_disks('source', ('dest', 'building'))

        self.neutron.migrate_instance_start.side_effect = start
        self.neutron.setup_networks_on_host.side_effect = (
            exception.PortBindingDeletionFailed(port_id='p', host='source'))
        self.assertEqual('dest', self.end(True))
        self.neutron.migrate_instance_start.assert_called_once()
        self.neutron.setup_networks_on_host.assert_called_once_with(
            self.context, self.instance, host='source', teardown=True)
        self.assertIn('host source', self.stdlog.logger.output)

    def test_ports_can_not_move(self):
        self._have_port()
        self.neutron.migrate_instance_start.side_effect = (
            exception.PortBindingActivationFailed(port_id='p', host='dest'))
        self.assertRaises(
            exception.PortBindingActivationFailed, self.end, True)
        self.assert_disks('source', ('dest', 'building'))
        self.assertEqual('source', self.instance.host)

    def test_ports_stay(self):
        self._have_port()
        self.end(False)
        self.assertEqual([], self.neutron.mock_calls)

    def test_cut_off(self):
        # The instance and the disks are in two tables.
        self.instance.save.side_effect = [
            exception.CellTimeout(), mock.DEFAULT, mock.DEFAULT]
        self.assertRaises(exception.CellTimeout, self.end, True)
        self.assert_disks('source', ('dest', 'building'))
        stored = [bdm.driver_info for bdm in self.bdms]
        with mock.patch.object(
                objects.BlockDeviceMappingList, 'save_driver_info',
                side_effect=exception.CellTimeout()):
            self.assertRaises(exception.CellTimeout, self.end, True)
        for bdm, driver_info in zip(self.bdms, stored):
            bdm.driver_info = driver_info
        self.assertEqual('dest', self.end(True))
        self.assert_disks('dest')
        self.assertEqual('dest', self.instance.host)

    def test_cut_off_after_the_ports(self):
        """What they have on the source goes the second time."""
        self._have_port()
        with mock.patch.object(
                objects.BlockDeviceMappingList, 'save_driver_info',
                side_effect=exception.CellTimeout()):
            stored = [bdm.driver_info for bdm in self.bdms]
            self.assertRaises(exception.CellTimeout, self.end, True)
        for bdm, driver_info in zip(self.bdms, stored):
            bdm.driver_info = driver_info
        self.assertEqual('dest', self.instance.host)
        self.end(True)
        self.assertEqual(
            [('source', 'dest')] * 2,
            [(call.args[2].source_compute, call.args[2].dest_compute)
             for call in self.neutron.migrate_instance_start.mock_calls])
        self.neutron.setup_networks_on_host.assert_called_once_with(
            self.context, self.instance, host='source', teardown=True)

    def test_not_moved_though_it_has_come(self):
        """The source has said so, and could not say so of the disks."""
        self.instance.host = 'dest'
        error = self.assertRaises(
            exception.NoMigrationToSettle, self.end, False)
        for word in ('host dest', '--moved'):
            self.assertIn(word, str(error))
        self.assert_disks('source', ('dest', 'building'))
        self.assertEqual('dest', self.end(True))
        self.assert_disks('dest')

    def test_source_has_not_told(self):
        """The disks are there, and the instance is not."""
        self.end(True)
        self.instance.host = 'source'
        self.instance.save.reset_mock()
        self.move('source', 'dest')
        self._have_port()
        error = self.assertRaises(
            exception.NoMigrationToSettle, self.end, False)
        for word in ('host dest', '--moved'):
            self.assertIn(word, str(error))
        self.assertEqual('dest', self.end(True))
        self.assert_disks('dest')
        self.assertEqual('dest', self.instance.host)
        self.instance.save.assert_called_once_with()
        self.neutron.migrate_instance_start.assert_called_once()
        # An evacuation that was refused has bound them to a third host.
        self.neutron.setup_instance_network_on_host.assert_called_once_with(
            self.context, self.instance, 'dest')
        self.neutron.setup_networks_on_host.assert_called_once_with(
            self.context, self.instance, host='source', teardown=True)
        self.assertRaises(exception.NoMigrationToSettle, self.end, True)

    def test_nothing_to_settle(self):
        self.end(False)
        e = self.assertRaises(exception.NoMigrationToSettle, self.end, True)
        self.assertIn('on its way', str(e))

    def test_another_operation_is_at_it(self):
        self.instance.task_state = 'migrating'
        e = self.assertRaises(exception.NoMigrationToSettle, self.end, True)
        # A source that is down for good never ends that.
        for word in ('migrating', 'host source', 'reset the state'):
            self.assertIn(word, str(e))
        self.assert_disks('source', ('dest', 'building'))

    def test_destination_has_no_compute(self):
        self.node.side_effect = exception.ComputeHostNotFound(host='dest')
        self.assertRaises(exception.ComputeHostNotFound, self.end, True)
        self.assert_disks('source', ('dest', 'building'))

    def test_instance_has_no_cell(self):
        self.mapping.cell_mapping = None
        self.assertRaises(exception.InstanceNotFound, self.end, True)
