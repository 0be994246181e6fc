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

from nova.compute import task_states
from nova import exception
from nova.tests.unit.virt.libvirt.storage.records import test_lifecycle
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage import unconfigured


@ddt.ddt
class UnconfiguredTestCase(test_lifecycle.RecordsTestCase):

    def setUp(self):
        super().setUp()
        self.flags(images_rbd_pool='pool', images_volume_group='vg',
                   group='libvirt')
        self.ceph = self.patch('nova.storage.rbd_utils.RBDDriver').return_value
        self.ceph.exists.return_value = True
        self.patch('os.path.exists', return_value=True)
        self.remove = self.patch(
            'nova.virt.libvirt.storage.lvm.remove_volumes')
        self.instance.ephemeral_key_uuid = None
        self.instance.task_state, self.instance.host = None, 'here'
        self.migrations = self.patch(
            'nova.objects.MigrationList.get_by_filters', return_value=[])

    def patch(self, target, **kwargs):
        return self.useFixture(fixtures.MockPatch(target, **kwargs)).mock

    def delete(self, configured, **more):
        self.flags(images_type=configured, group='libvirt')
        return unconfigured.delete(
            imagebackend.Backend(True), self.instance,
            self.disks(self.record(format='raw', **more)))

    @ddt.data(('libvirt-storage', 'here', 1), ('qcow2', 'here', 1),
              ('rbd', 'here', 0), ('qcow2', 'other', 0))
    @ddt.unpack
    def test_image_of_ceph(self, configured, host, times):
        self.assertTrue(self.delete(configured, backend='rbd', host=host))
        self.assertEqual(times, self.ceph.cleanup_volumes.call_count)
        for call in self.ceph.cleanup_volumes.mock_calls:
            [wanted] = call.args
            name = '%s_disk' % self.instance.uuid
            self.assertEqual([name], [
                found for found in (name, name + '.local', 'another_disk')
                if wanted(found)])

    @ddt.data(('libvirt-storage', 'here', 1), ('lvm', 'here', 0),
              ('qcow2', 'other', 0))
    @ddt.unpack
    def test_logical_volume(self, configured, host, times):
        self.assertTrue(self.delete(configured, backend='lvm', host=host))
        self.assertEqual(
            [mock.call(['/dev/vg/%s_disk' % self.instance.uuid])] * times,
            self.remove.mock_calls)

    @ddt.data('flat', 'qcow2')
    def test_others_are_not_its_business(self, backend):
        self.assertTrue(self.delete('raw', backend=backend))
        self.assertEqual([], self.remove.mock_calls + self.ceph.mock_calls)

    def test_what_cant_be_deleted(self):
        self.remove.side_effect = exception.VolumesNotRemoved(reason='busy')
        self.assertFalse(self.delete('qcow2', backend='lvm'))
        self.assertIn('busy', self.stdlog.logger.output)

    def test_record_that_cant_be_read(self):
        """An instance can be deleted all the same."""
        self.assertTrue(self.delete('qcow2', backend='libvirt-storage'))
        self.assertIn('set it to NULL', self.stdlog.logger.output)

    def test_revert(self):
        """The source has the same image."""
        self.instance.task_state = task_states.RESIZE_REVERTING
        self.assertTrue(self.delete('qcow2', backend='rbd'))
        self.ceph.cleanup_volumes.assert_not_called()

    def test_evacuation_that_goes_on(self):
        """The other host is about to start with the same image."""
        self.migrations.return_value = [mock.Mock(status='accepted')]
        self.assertTrue(self.delete('qcow2', backend='rbd'))
        self.ceph.cleanup_volumes.assert_not_called()
        self.assertTrue(self.delete('qcow2', backend='lvm'))
        self.remove.assert_called_once()

    def test_what_is_gone(self):
        self.ceph.exists.return_value = False
        self.assertTrue(self.delete('qcow2', backend='rbd'))
        self.ceph.cleanup_volumes.assert_not_called()

    def test_pool_that_is_not_configured_any_more(self):
        self.flags(images_rbd_pool='', group='libvirt')
        self.assertFalse(self.delete('qcow2', backend='rbd'))
        self.assertIn('images_rbd_pool', self.stdlog.logger.output)
