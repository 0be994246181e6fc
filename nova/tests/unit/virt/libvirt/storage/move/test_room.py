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
from oslo_concurrency import processutils

from nova import test
from nova.virt.libvirt.storage.move import room


@ddt.ddt
class RoomTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.connection = mock.Mock()
        self.connection.getLibVersion.return_value = 11_003_000
        self.volume = mock.Mock(path='/disks/it')
        self.volume.pool.config.return_value.type = 'dir'

    @ddt.data((9_000_000, False), (10_000_000, False), (10_001_000, True),
              (11_003_000, True), (12_006_000, True), (12_007_000, False),
              (12_008_000, False))
    @ddt.unpack
    def test_versions(self, version, reserved):
        self.connection.getLibVersion.return_value = version
        self.assertEqual(reserved, room.is_reserved(self.connection))
        self.assertEqual(not reserved,
                         room.is_sparse(self.connection, 'dir'))
        self.assertFalse(room.is_sparse(self.connection, 'logical'))

    @ddt.data((1000, 500, 500), (1000, 1 << 40, 1000 + (256 << 20)),
              (8 << 30, 1 << 40, 10 << 30), (8 << 30, 9 << 30, 9 << 30))
    @ddt.unpack
    def test_to_grow(self, length, most, expected):
        self.assertEqual(expected, room.to_grow(length, most))

    @mock.patch('nova.privsep.storage.dig_holes')
    def test_give_back(self, mock_dig):
        room.give_back(self.connection, self.volume, None)
        mock_dig.assert_called_once_with('/disks/it')

    @mock.patch('nova.privsep.storage.dig_holes')
    def test_nothing_to_give_back(self, mock_dig):
        self.volume.pool.config.return_value.type = 'logical'
        room.give_back(self.connection, self.volume, None)
        self.volume.pool.config.return_value.type = 'dir'
        self.connection.getLibVersion.return_value = 9_000_000
        room.give_back(self.connection, self.volume, None)
        mock_dig.assert_not_called()

    @mock.patch('nova.privsep.storage.dig_holes')
    def test_file_system_that_can_not(self, mock_dig):
        mock_dig.side_effect = processutils.ProcessExecutionError(
            stderr='fallocate failed: Operation not supported')
        room.give_back(self.connection, self.volume, None)
        self.assertIn('takes up its whole length',
                      self.stdlog.logger.output)
