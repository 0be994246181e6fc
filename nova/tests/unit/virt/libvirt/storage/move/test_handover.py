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

from nova import exception
from nova import objects
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.unit.virt.libvirt.storage import test_content
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage.move import handover
from nova.virt.libvirt.storage.records import metadata

GIB = 1 << 30


@ddt.ddt
class HandoverTestCase(test.NoDBTestCase):
    """Disks that have come, in files of their own."""

    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.directory = self.useFixture(fixtures.TempDir()).path
        self.flags(host='dest', instances_path=self.directory)
        self.stub_out('nova.virt.libvirt.storage.pool.pool.StoragePool',
                      lambda connection, name, host: mock.Mock(
                          volume=self.volume))
        self.get_connection = mock.Mock()
        self.sleep = mock.Mock()
        self.stub_out('tenacity.nap.time.sleep', self.sleep)
        self.info = mock.Mock(
            snapshots=[], encrypted=None, virtual_size=GIB, backing_file=None,
            format_specific={'data': {}})
        self.stub_out('nova.virt.images.privileged_qemu_img_info',
                      lambda path, format: self.info)
        self.saved = mock.Mock()
        self.disks = metadata.InstanceDisks(
            objects.Instance(uuid=uuids.instance, image_ref=uuids.image), {},
            mock.Mock(driver_info=None))
        self.disks.save = self.saved

    def volume(self, name):
        path = os.path.join(self.directory, name)
        volume = mock.Mock(path=path)
        volume.name = name
        volume.physical = lambda: os.path.getsize(path)
        return volume

    def come(self, name, data, **kwargs):
        """A disk comes, is verified and looked at the first time."""
        with open(os.path.join(self.directory, name), 'wb') as f:
            f.write(data)
        record = metadata.LibvirtDiskMetadata(**{
            'backend': 'libvirt-storage', 'format': 'raw', 'size': len(data),
            'state': 'building', 'host': 'dest', 'pool': 'a-pool',
            'volume': name, **kwargs})
        record.previous = record.obj_clone()
        record.previous.host = 'source'
        self.disks.set(name, record)
        came = handover.arriving(self.disks)
        self.disks.mark('ready')
        self.arrivals = handover.look(None, came)
        self.assertEqual([name], [arrival.name for arrival in self.arrivals])

    def come_as_qcow2(self):
        self.come('disk', test_content.header(), format='qcow2', size=GIB)

    def write(self, name, data, at=0):
        with open(os.path.join(self.directory, name), 'r+b') as f:
            f.seek(at)
            f.write(data)

    def look_again(self):
        handover.look_again(
            mock.sentinel.context, self.get_connection, self.disks,
            self.arrivals)

    def grow(self, size):
        """This host has let the disk grow, and has that on record."""
        record = self.disks.get('disk')
        record.size = size
        self.disks.set('disk', record)
        if record.format == 'qcow2':
            self.info.virtual_size = size
            self.write('disk', size.to_bytes(8, 'big'), 24)
        else:
            os.truncate(os.path.join(self.directory, 'disk'), size)

    def refused(self, expected=exception.StorageTransferMismatch):
        error = self.assertRaises(expected, self.look_again)
        # A hard reboot compares all of it, and copies it again.
        self.assertTrue(self.disks.get('disk').is_building)
        self.assertEqual('source', self.disks.get('disk').previous.host)
        self.saved.assert_called_once_with(mock.sentinel.context)
        return str(error)

    def accepted(self):
        self.look_again()
        self.assertEqual([], self.disks.building())
        self.saved.assert_not_called()

    def test_nothing_has_come(self):
        for kwargs in ({'state': 'ready'}, {'host': 'source'}):
            record = metadata.LibvirtDiskMetadata(**{
                'backend': 'libvirt-storage', 'format': 'raw', 'size': 1,
                'state': 'building', 'host': 'dest', 'pool': 'a-pool',
                'volume': 'disk', **kwargs})
            record.previous = record.obj_clone()
            self.disks.set('disk', record)
            self.assertEqual({}, handover.arriving(self.disks))

    @ddt.data(
        exception.HypervisorUnavailable(),
        exception.StoragePoolError(pool='p', host='h', reason='r', code=38))
    def test_libvirt_is_restarted(self, error):
        """What this host has let grow is not what was sent any more."""
        self.come('disk', b'x' * 100000)
        self.grow(200000)
        self.get_connection.side_effect = [error, error, None]
        self.accepted()
        self.assertEqual(2, self.sleep.call_count)

    def test_libvirt_stays_away(self):
        self.come('disk', b'x' * 100000)
        self.get_connection.side_effect = exception.HypervisorUnavailable()
        with mock.patch('time.monotonic', side_effect=range(0, 1000, 10)):
            self.refused(exception.HypervisorUnavailable)

    def test_raw(self):
        self.come('disk', b'x' * 100000)
        self.accepted()

    @ddt.data(0, 65535)
    def test_raw_was_written_to(self, at):
        self.come('disk', b'x' * 100000)
        self.write('disk', b'y', at)
        told = self.refused()
        self.assertIn('after it had been verified', told)
        self.assertIn('hard reboot', told)

    def test_raw_has_shrunk(self):
        self.come('disk', b'x' * 100000)
        os.truncate(os.path.join(self.directory, 'disk'), 99999)
        self.refused()

    def test_raw_was_grown_here(self):
        # A file system on the whole of the disk grows along.
        self.come('disk', b'x' * 100000)
        self.write('disk', b'y', 1024)
        self.grow(200000)
        self.accepted()

    def test_raw_has_grown_by_itself(self):
        # The guest would have more than its flavor.
        self.come('disk', b'x' * 100000)
        os.truncate(os.path.join(self.directory, 'disk'), 100001)
        self.assertIn('100001', self.refused())

    def test_raw_has_grown_further_than_here(self):
        self.come('disk', b'x' * 100000)
        self.grow(200000)
        os.truncate(os.path.join(self.directory, 'disk'), 200001)
        self.refused()

    def test_raw_out_of_reach(self):
        with mock.patch('nova.privsep.storage.read_start',
                        side_effect=PermissionError):
            self.come('disk', b'x' * 100000)
            self.accepted()

    def test_qcow2(self):
        self.come_as_qcow2()
        self.accepted()

    def test_qcow2_of_which_the_header_was_written(self):
        self.come_as_qcow2()
        self.write('disk', b'\1', 100)
        self.refused()

    def test_qcow2_was_grown_here(self):
        self.come_as_qcow2()
        self.grow(2 * GIB)
        self.accepted()

    @ddt.data(GIB, 2 * GIB)
    def test_qcow2_has_grown_further_than_here(self, size):
        self.come_as_qcow2()
        self.grow(size)
        self.info.virtual_size = size + 1
        self.write('disk', (size + 1).to_bytes(8, 'big'), 24)
        self.assertIn(str(size + 1), self.refused(exception.UnsafeDiskContent))

    def test_qcow2_that_can_not_be_read(self):
        self.come_as_qcow2()
        with mock.patch.object(content, 'look_at_qcow2',
                               side_effect=OSError(5, 'no answer')):
            self.refused(OSError)

    def test_qcow2_has_got_a_data_file(self):
        # Also where it has grown.
        self.come_as_qcow2()
        self.grow(2 * GIB)
        self.write('disk', test_content.header(
            features=test_content.DATA_FILE))
        self.assertIn('data', self.refused(exception.UnsafeDiskContent))

    def test_qcow2_has_got_a_backing_file(self):
        self.come_as_qcow2()
        self.grow(2 * GIB)
        self.info.backing_file = '/etc/shadow'
        self.refused(exception.BaseImageMisplaced)

    def lay_over(self, image_id):
        self.info.backing_file = os.path.join(
            self.directory, '_base', imagecache.get_cache_fname(image_id))

    def test_qcow2_over_the_image_cache(self):
        self.lay_over(uuids.image)
        self.come_as_qcow2()
        self.accepted()

    def test_qcow2_was_laid_over_another_image(self):
        """Which may be anybody's."""
        self.lay_over(uuids.image)
        self.come_as_qcow2()
        # A header that has not grown is compared.
        self.grow(2 * GIB)
        self.accepted()
        self.lay_over(uuids.other)
        self.refused(exception.UnsafeDiskContent)
