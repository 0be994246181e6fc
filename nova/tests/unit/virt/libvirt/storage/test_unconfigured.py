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
from nova.tests.fixtures import ceph
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage.records import test_lifecycle
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage import unconfigured


@ddt.ddt
class UnconfiguredTestCase(test_lifecycle.RecordsTestCase):

    def setUp(self):
        super().setUp()
        self.flags(images_rbd_pool='pool', images_volume_group='vg',
                   group='libvirt')
        self.ceph = self.patch('nova.storage.rbd_utils.RBDDriver').return_value
        self.ceph.exists.return_value = True
        self.ceph.cleanup_volumes.side_effect = self.cleans_up
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
        self.get_connection = mock.Mock(return_value=self.connection)
        self.instance.ephemeral_key_uuid = None
        self.instance.task_state, self.instance.host = None, 'here'
        self.migrations = self.patch(
            'nova.objects.MigrationList.get_by_filters', return_value=[])

    def patch(self, target, **kwargs):
        return self.useFixture(fixtures.MockPatch(target, **kwargs)).mock

    def cleans_up(self, wanted):
        self.ceph.exists.return_value = False

    def removes(self, paths):
        self.removed += paths
        for path in paths:
            if os.path.basename(path) in self.volumes:
                self.volumes.remove(os.path.basename(path))

    def define_pool(self):
        return self.connection.storagePoolDefineXML(
            "<pool type='logical'><name>p</name><source><name>vg</name>"
            "</source><target><path>/dev/vg</path></target></pool>")

    def delete(self, configured, disks=None, has_pools=False, **more):
        self.flags(images_type=configured, group='libvirt')
        return unconfigured.delete(
            self.get_connection, imagebackend.Backend(True), self.instance,
            self.disks(self.record(format='raw', **more))
            if disks is None else disks, has_pools)

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

    def test_image_that_somebody_has_open(self):
        """Nova's own driver says nothing of that after its last try."""
        self.ceph.cleanup_volumes.side_effect = None
        self.assertFalse(self.delete('qcow2', backend='rbd'))
        for told in ('has snapshots', 'rbd status',
                     'rbd rm pool/%s_disk' % self.instance.uuid):
            self.assertIn(told, self.stdlog.logger.output)

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

    @ddt.data(('lvm', 'other', None, True), ('lvm', 'here', None, False),
              ('libvirt-storage', 'other', None, False),
              ('lvm', 'other', task_states.DELETING, False),
              ('lvm', 'other', 'deleted', False))
    @ddt.unpack
    def test_logical_volume_that_another_host_has(
            self, backend, host, state, is_kept):
        """The group may be one and the same, and the guest run there."""
        name = '%s_disk' % self.instance.uuid
        self.volumes += [name, name + '.local']
        if state == 'deleted':
            self.instance.deleted = True
        else:
            self.instance.task_state = state
        values = {'pool': 'p', 'volume': name} if backend != 'lvm' else {}
        self.assertTrue(self.delete(
            'qcow2', backend=backend, host=host, **values))
        self.assertEqual(['another_disk', *([name] if is_kept else [])],
                         self.volumes)
        self.assertEqual(is_kept, 'lvremove vg/%s' % name
                         in self.stdlog.logger.output)

    def test_logical_volumes_and_a_record_that_cant_be_read(self):
        """It may say that another host has them."""
        self.volumes.append('%s_disk' % self.instance.uuid)
        self.assertFalse(self.delete('qcow2', backend='libvirt-storage'))
        self.instance.task_state = task_states.DELETING
        self.assertTrue(self.delete('qcow2', backend='libvirt-storage'))
        self.assertEqual(1, len(self.volumes))

    def test_logical_volumes_that_a_pool_shows(self):
        """What of them is kept is for those to say who know of pools."""
        self.volumes.append('%s_disk' % self.instance.uuid)
        pool = self.define_pool()
        pool.create()
        self.assertTrue(self.delete('libvirt-storage', self.disks()))
        self.assertEqual(2, len(self.volumes))
        pool.destroy()
        pool.undefine()
        self.assertTrue(self.delete('libvirt-storage', self.disks()))
        self.assertEqual(1, len(self.volumes))

    @ddt.data((None, True), ('configured', False), ('recorded', False))
    @ddt.unpack
    def test_logical_volumes_of_a_pool_that_is_off(self, why, is_deleted):
        """Those who know of pools look into it if it is one for disks."""
        self.volumes.append('%s_disk' % self.instance.uuid)
        self.define_pool()
        if why == 'configured':
            self.flags(storage_disks_pool='p', group='libvirt')
        disks = self.disks(self.record(
            backend='libvirt-storage', pool='p',
            volume='%s_disk' % self.instance.uuid)
        ) if why == 'recorded' else self.disks()
        self.assertTrue(self.delete('libvirt-storage', disks))
        self.assertEqual(1 if is_deleted else 2, len(self.volumes))
        # Or nobody would delete them.
        self.assertEqual(is_deleted, ownership.delete_volumes(
            self.connection, self.instance, disks=disks))

    @ddt.data((3, 'not supported', False, True),
              (38, 'Failed to connect to virtstoraged', False, True),
              (38, 'Failed to connect to virtstoraged', True, False))
    @ddt.unpack
    def test_logical_volumes_and_no_storage_driver(
            self, code, message, has_pools, is_deleted):
        """A pool may show them, if it isn't a host that has none."""
        self.volumes.append('%s_disk' % self.instance.uuid)
        with mock.patch.object(
                self.connection, 'listAllStoragePools',
                side_effect=libvirt_storage.error(code, message)):
            self.assertEqual(is_deleted, self.delete(
                'qcow2', self.disks(), has_pools))
        self.assertEqual(1 if is_deleted else 2, len(self.volumes))
        self.assertEqual(not is_deleted,
                         message in self.stdlog.logger.output)

    def test_logical_volumes_and_no_libvirt(self):
        self.volumes.append('%s_disk' % self.instance.uuid)
        self.get_connection.side_effect = exception.HypervisorUnavailable()
        self.assertFalse(self.delete('qcow2', self.disks()))
        self.assertEqual(2, len(self.volumes))
        self.volumes.pop()
        self.assertTrue(self.delete('qcow2', self.disks()))

    def test_encrypted_volume_whose_mapping_is_not_open(self):
        """The host was restarted."""
        self.instance.ephemeral_key_uuid = uuids.key
        close = self.patch('nova.virt.libvirt.storage.dmcrypt.delete_volume')
        name = '%s_disk' % self.instance.uuid
        self.volumes.append(name)
        self.assertTrue(self.delete('qcow2', self.disks()))
        close.assert_called_once_with(name + '-dmcrypt')
        self.assertEqual(1, len(self.volumes))

    def test_encrypted_volume_that_a_pool_shows(self):
        """An open mapping would keep it in use for ever."""
        self.instance.ephemeral_key_uuid = uuids.key
        close = self.patch('nova.virt.libvirt.storage.dmcrypt.delete_volume')
        name = '%s_disk' % self.instance.uuid
        self.volumes.append(name)
        self.define_pool().create()
        self.assertTrue(self.delete('libvirt-storage', self.disks()))
        close.assert_called_once_with(name + '-dmcrypt')
        self.assertEqual([], self.removed)

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


@ddt.ddt
class ImagesOfDeletedTestCase(test_lifecycle.RecordsTestCase):
    """Images of Ceph that are tried again, when no record names them."""

    def setUp(self):
        super().setUp()
        self.flags(images_type='qcow2', images_rbd_pool='nova',
                   images_rbd_ceph_conf='/etc/ceph/ceph.conf',
                   rbd_destroy_volume_retries=1,
                   rbd_destroy_volume_retry_interval=0, group='libvirt')
        self.cluster = self.useFixture(ceph.CephFixture()).cluster
        self.images = self.cluster.pools['nova']
        self.name = '%s_disk' % self.instance.uuid
        for name in (self.name, self.name + '.local', 'another_disk'):
            self.images[name] = ceph.StoredImage(1)
        self.useFixture(fakelibvirt.LibvirtModuleFixture())
        self.connection = fakelibvirt.Connection('qemu:///system')
        self.get_connection = mock.Mock(return_value=self.connection)
        self.instance.deleted, self.instance.host = True, 'here'
        self.instance.task_state = None
        self.migrations = self.useFixture(fixtures.MockPatch(
            'nova.objects.MigrationList.get_by_filters',
            return_value=[])).mock

    def delete(self):
        return unconfigured.delete(
            self.get_connection, imagebackend.Backend(True), self.instance,
            self.disks(), True)

    def test_deleted(self):
        self.assertTrue(self.delete())
        self.assertEqual(['another_disk'], list(self.images))

    @ddt.data('watcher', 'snapshot')
    def test_still_busy(self, why):
        if why == 'watcher':
            self.images[self.name].watchers = 1
        else:
            self.images[self.name].snapshots['backup'] = ceph.Snapshot(b'', 1)
        self.assertFalse(self.delete())
        self.assertEqual([self.name, 'another_disk'], list(self.images))
        self.assertIn('rbd snap ls', self.stdlog.logger.output)
        self.assertIn('rbd rm nova/%s' % self.name,
                      self.stdlog.logger.output)

    @ddt.data({'deleted': False}, {'host': 'other'},
              {'task_state': task_states.RESIZE_REVERTING})
    def test_kept(self, values):
        self.instance.update(values)
        self.assertTrue(self.delete())
        self.assertEqual(3, len(self.images))
        self.assertEqual([], self.cluster.opened)

    def test_evacuation_that_goes_on(self):
        self.migrations.return_value = [mock.Mock(status='accepted')]
        self.assertTrue(self.delete())
        self.assertEqual(3, len(self.images))

    @ddt.data({'images_type': 'rbd'}, {'images_rbd_ceph_conf': ''})
    def test_not_asked_for(self, flags):
        """The driver does that, or this host has no Ceph."""
        self.flags(group='libvirt', **flags)
        self.assertTrue(self.delete())
        self.assertEqual([], self.cluster.opened)
        self.get_connection.assert_not_called()

    @ddt.data(('rbd', 'nova', True), ('rbd', 'other', False),
              ('logical', 'nova', False))
    @ddt.unpack
    def test_pool_that_shows_them(self, kind, source, is_kept):
        self.flags(storage_disks_pool='p', group='libvirt')
        self.connection.storagePoolDefineXML(
            "<pool type='%s'><name>p</name><source><name>%s</name></source>"
            "</pool>" % (kind, source))
        self.assertTrue(self.delete())
        self.assertEqual(3 if is_kept else 1, len(self.images))

    def test_no_such_pool(self):
        """Of a host whose storage pools are over another one."""
        self.flags(images_rbd_pool='rbd', group='libvirt')
        self.assertTrue(self.delete())

    def test_ceph_does_not_answer(self):
        self.cluster.answers = False
        self.assertFalse(self.delete())
        self.assertIn('error connecting', self.stdlog.logger.output)

    def test_no_libvirt(self):
        self.get_connection.side_effect = exception.HypervisorUnavailable()
        self.assertFalse(self.delete())
        self.assertEqual(3, len(self.images))
