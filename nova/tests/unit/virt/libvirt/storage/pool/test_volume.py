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
import errno
from unittest import mock

from nova import exception
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.unit.virt.libvirt.storage.pool import test_pool
from nova.virt.libvirt.storage.pool import pool
from nova.virt.libvirt.storage.pool import volume


class TestVolume(test_pool.PoolTestCase):

    def setUp(self):
        super().setUp()
        self.define()
        self.raw = mock.Mock()
        self.raw.name.return_value = 'v'
        self.volume = volume.StorageVolume(pool.StoragePool(
            self.daemon, 'nova-disks-pool', 'host-a'), self.raw)

    def test_sizes(self):
        self.raw.info.return_value = [0, 9, 3]
        self.raw.infoFlags.return_value = [0, 9, 5]
        self.assertEqual(volume.VolumeInfo(0, 9, 3), self.volume.info())
        self.assertEqual(5, self.volume.physical())
        self.raw.infoFlags.assert_called_once_with(
            fakelibvirt.VIR_STORAGE_VOL_GET_PHYSICAL)

    def test_resize(self):
        self.volume.resize(8)
        self.volume.resize(9, allocate=True)
        self.assertEqual([mock.call(8, 0), mock.call(9, 1)],
                         self.raw.resize.mock_calls)

    def test_delete(self):
        self.volume.delete()
        self.raw.delete.side_effect = test_pool.error(
            fakelibvirt.VIR_ERR_NO_STORAGE_VOL)
        self.volume.delete()
        self.raw.delete.side_effect = test_pool.error(
            fakelibvirt.VIR_ERR_OPERATION_INVALID, 'in use')
        e = self.assertRaises(exception.StorageVolumeError,
                              self.volume.delete)
        self.assertIn('in use (error code 55)', str(e))

    def delete_ploop(self, **remove):
        # libvirt takes such a file for a directory
        self.raw.path.return_value = '/i/disks/v'
        self.raw.delete.side_effect = test_pool.error(
            fakelibvirt.VIR_ERR_SYSTEM_ERROR, 'Not a directory')
        with mock.patch('nova.privsep.storage.remove', **remove) as removed:
            try:
                self.volume.delete()
            finally:
                self.removed = removed.mock_calls

    def test_delete_with_a_ploop_header(self):
        self.flags(host='host-a')
        self.delete_ploop()
        self.assertEqual([mock.call('/i/disks/v')], self.removed)
        # Which would have libvirt open what the header names.
        self.raw.info.assert_not_called()
        self.raw.XMLDesc.assert_not_called()
        self.daemon.pools['nova-disks-pool'].refresh.assert_called_once_with(0)

    def test_delete_fails(self):
        self.flags(host='host-a')
        self.raw.delete.side_effect = test_pool.error(
            fakelibvirt.VIR_ERR_SYSTEM_ERROR, 'x', errno.EIO)
        with mock.patch('nova.privsep.storage.remove') as removed:
            self.assertRaises(
                exception.StorageVolumeError, self.volume.delete)
        removed.assert_not_called()
        self.raw.info.assert_not_called()

    def test_delete_with_a_ploop_header_fails(self):
        self.flags(host='host-a')
        e = self.assertRaises(
            exception.StorageVolumeError, self.delete_ploop,
            side_effect=OSError(errno.EROFS, 'Read-only file system'))
        self.assertIn('Read-only', str(e))

    def test_delete_with_a_ploop_header_on_another_host(self):
        self.flags(host='host-b')
        e = self.assertRaises(
            exception.StorageVolumeError, self.delete_ploop)
        self.assertIn('Not a directory', str(e))
        self.assertEqual([], self.removed)
