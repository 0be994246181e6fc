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

import os
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova.compute import task_states
from nova import exception
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_storage
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
        self.removed = []
        self.remove = self.patch(
            'nova.virt.libvirt.storage.lvm.remove_volumes',
            side_effect=self.removes)
        self.volumes = ['another_disk']
        self.list_volumes = self.patch(
            'nova.virt.libvirt.storage.lvm.list_volumes',
            side_effect=lambda group: list(self.volumes))
        self.useFixture(fakelibvirt.LibvirtModuleFixture())
        self.connection = fakelibvirt.Connection('qemu:///system')
        self.instance.ephemeral_key_uuid = None
        self.instance.task_state, self.instance.host = None, 'here'
        self.migrations = self.patch(
            'nova.objects.MigrationList.get_by_filters', return_value=[])

    def patch(self, target, **kwargs):
        return self.useFixture(fixtures.MockPatch(target, **kwargs)).mock

    def removes(self, paths):
        self.removed += paths
        for path in paths:
            if os.path.basename(path) in self.volumes:
                self.volumes.remove(os.path.basename(path))

    def delete(self, configured, disks=None, **more):
        self.flags(images_type=configured, group='libvirt')
        return unconfigured.delete(
            self.connection, imagebackend.Backend(True), self.instance,
            self.disks(self.record(format='raw', **more))
            if disks is None else disks)

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
            ['/dev/vg/%s_disk' % self.instance.uuid] * times, self.removed)

    @ddt.data('flat', 'qcow2')
    def test_others_are_not_its_business(self, backend):
        self.assertTrue(self.delete('raw', backend=backend))
        self.assertEqual([], self.removed + self.ceph.mock_calls)

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
        self.assertEqual(1, len(self.removed))

    def test_what_is_gone(self):
        self.ceph.exists.return_value = False
        self.assertTrue(self.delete('qcow2', backend='rbd'))
        self.ceph.cleanup_volumes.assert_not_called()

    def test_pool_that_is_not_configured_any_more(self):
        self.flags(images_rbd_pool='', group='libvirt')
        self.assertFalse(self.delete('qcow2', backend='rbd'))
        self.assertIn('images_rbd_pool', self.stdlog.logger.output)

    @ddt.data(('libvirt-storage', True), ('qcow2', True), ('lvm', False))
    @ddt.unpack
    def test_logical_volumes_without_a_record(self, configured, is_deleted):
        """It went when they couldn't be deleted, or is another host's."""
        names = ['%s_%s' % (self.instance.uuid, name)
                 for name in ('disk', 'disk.local')]
        self.volumes += names
        self.assertTrue(self.delete(configured, self.disks()))
        self.assertEqual(['another_disk', *([] if is_deleted else names)],
                         self.volumes)

    def test_logical_volumes_that_a_pool_shows(self):
        """What of them is kept is for those to say who know of pools."""
        self.volumes.append('%s_disk' % self.instance.uuid)
        pool = self.connection.storagePoolDefineXML(
            "<pool type='logical'><name>p</name><source><name>vg</name>"
            "</source><target><path>/dev/vg</path></target></pool>")
        self.assertTrue(self.delete('libvirt-storage', self.disks()))
        self.assertEqual(2, len(self.volumes))
        pool.undefine()
        self.assertTrue(self.delete('libvirt-storage', self.disks()))
        self.assertEqual(1, len(self.volumes))

    def test_logical_volumes_and_no_storage_driver(self):
        self.volumes.append('%s_disk' % self.instance.uuid)
        with mock.patch.object(
                self.connection, 'listAllStoragePools',
                side_effect=libvirt_storage.error(3, 'not supported')):
            self.assertTrue(self.delete('qcow2', self.disks()))
        self.assertEqual(1, len(self.volumes))

    def test_encrypted_volume_whose_mapping_is_not_open(self):
        """The host was restarted."""
        self.instance.ephemeral_key_uuid = uuids.key
        close = self.patch('nova.virt.libvirt.storage.dmcrypt.delete_volume')
        name = '%s_disk' % self.instance.uuid
        self.volumes.append(name)
        self.assertTrue(self.delete('qcow2', self.disks()))
        close.assert_called_once_with(name + '-dmcrypt')
        self.assertEqual(1, len(self.volumes))

    @ddt.data(('images_volume_group', None), ('task', 'resize_reverting'))
    @ddt.unpack
    def test_logical_volumes_are_left_alone(self, what, value):
        self.volumes.append('%s_disk' % self.instance.uuid)
        if what == 'task':
            self.instance.task_state = value
        else:
            self.flags(group='libvirt', **{what: value})
        self.assertTrue(self.delete('qcow2', self.disks()))
        self.assertEqual(2, len(self.volumes))

    def test_lvm_does_not_answer(self):
        self.list_volumes.side_effect = OSError('no lvs')
        self.assertFalse(self.delete('qcow2', self.disks()))
        self.assertIn('no lvs', self.stdlog.logger.output)
