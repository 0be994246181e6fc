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
"""Pools over volume groups."""

import os
import subprocess
from unittest import mock

import fixtures
from oslo_concurrency import processutils
from oslo_utils import units

from nova import exception
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.pool import clearing
from nova.virt.libvirt.storage.pool import config
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import usage
from nova.virt.libvirt.storage.pool import volume as storage_volume
from nova.virt.libvirt.storage.pool import volume_group


class LogicalPoolTestCase(base.PoolsTestCase):

    def setUp(self):
        super().setUp()
        self.raw = self.add_pool('vg-pool', '/dev/vg', kind='logical')
        self.group = self.conn.volume_group('vg')
        self.stub_out('nova.privsep.fs.lvorigins', self.group.lvorigins)
        self.stub_out('nova.privsep.fs.vginfo', self.group.vginfo)
        self.pool = self.pool('vg-pool')

    @staticmethod
    def wanted(capacity=48 * units.Mi, allocation=0, name='v'):
        made = config.LibvirtConfigStorageVolume()
        made.name, made.capacity = name, capacity
        made.allocation = allocation
        return made


class AdoptTestCase(LogicalPoolTestCase):

    def test_adopt(self):
        self.pool.adopt()

    def test_full_of_disks(self):
        self.pool.create(self.wanted(100 * units.Gi))
        self.pool.adopt()

    def test_full_of_what_libvirt_does_not_see(self):
        """A thin pool, for one, takes all of a group as a rule."""
        self.group.make('thin', 100 * units.Gi)
        self.group.inactive.add('thin')
        e = self.assertRaises(exception.StoragePoolTaken, self.pool.adopt)
        for part in ('Use a volume group of its own', 'vg-pool', 'host here',
                     '0 bytes are left'):
            self.assertIn(part, str(e)[:200])


class ExtendedTestCase(LogicalPoolTestCase):
    """Of a volume group that nobody has told libvirt about."""

    def setUp(self):
        super().setUp()
        self.flags(group='libvirt', storage_disks_pool='vg-pool')

    def extend(self):
        self.group.capacity += 50 * units.Gi
        self.group.make('of an operator', 10 * units.Gi)

    def test_extended(self):
        self.extend()
        self.assertEqual(100 * units.Gi, self.raw.info()[1])
        self.assertEqual(
            (self.pool.name, 150 * units.Gi, 140 * units.Gi),
            usage.measure(self.pool))
        self.assertEqual(
            {'total': 150 * units.Gi, 'free': 140 * units.Gi,
             'used': 10 * units.Gi},
            usage.LocalInfo('here').get(self.conn))

    def test_offered_to_a_peer(self):
        """See move/destination.py."""
        self.extend()
        self.assertEqual(
            (150 * units.Gi, 10 * units.Gi, 140 * units.Gi),
            self.pool.info()[1:])

    def test_asks_for_the_source_by_name(self):
        with mock.patch('nova.privsep.fs.vginfo', autospec=True,
                        side_effect=self.group.vginfo) as mock_vginfo:
            self.pool.info()
        mock_vginfo.assert_called_once_with('vg')

    def test_small_group_that_was_extended(self):
        self.group.capacity = units.Mi
        self.pool.refresh()
        self.assertRaises(exception.StoragePoolTooSmall, self.pool.adopt)
        self.group.capacity = 2 * units.Gi
        self.pool.adopt()

    def test_of_another_host(self):
        self.pool.host = 'there'
        with mock.patch('nova.privsep.fs.vginfo', side_effect=AssertionError):
            self.assertEqual(100 * units.Gi, self.pool.info().available)

    def test_pool_that_is_off(self):
        self.raw.destroy()
        with mock.patch('nova.privsep.fs.vginfo', side_effect=AssertionError):
            self.assertFalse(self.pool.info().is_running)

    def test_directory(self):
        self.add_pool('files')
        files = base.pool.StoragePool(self.conn, 'files', 'here')
        with mock.patch('nova.privsep.fs.vginfo', side_effect=AssertionError):
            files.info()

    def test_no_answer(self):
        """As libvirt has it then, and the log doesn't fill up."""
        self.extend()
        for answer in (
                {'side_effect': processutils.ProcessExecutionError(
                    stderr='  no dm')},
                {'side_effect': OSError(2, 'no vgs')},
                {'return_value': ('', '')},
                {'return_value': (' x|y', '')}):
            with self.subTest(str(answer)), mock.patch(
                    'nova.privsep.fs.vginfo', **answer), mock.patch.object(
                        volume_group.LOG, 'warning') as mock_warning:
                for _n in range(3):
                    self.assertEqual(100 * units.Gi,
                                     self.pool.info().available)
                mock_warning.assert_called_once()
            # It answers again, and may fail anew.
            self.assertEqual(140 * units.Gi, self.pool.info().available)

    @mock.patch('time.monotonic', return_value=1000.0)
    def test_silence(self, mock_time):
        """A disk of the group doesn't answer, and so no command ends.

        The report of the host goes on nevertheless, and such commands don't
        pile up.
        """
        self.addCleanup(volume_group._silent.clear)
        self.extend()
        with mock.patch('nova.privsep.fs.vginfo',
                        side_effect=subprocess.TimeoutExpired('vgs', 30)
                        ) as mock_vginfo:
            for _n in range(3):
                self.assertEqual(100 * units.Gi, self.pool.info().available)
            mock_vginfo.assert_called_once_with('vg')
        self.assertEqual(100 * units.Gi, self.pool.info().available)
        mock_time.return_value += volume_group.PAUSE
        self.assertEqual(140 * units.Gi, self.pool.info().available)


class VolumesTestCase(LogicalPoolTestCase):

    def test_volume_has_all_of_its_space(self):
        """With less it would be a snapshot that is lost when it is full."""
        volume = self.pool.create(self.wanted())
        device = self.group.devices['v']
        self.assertIsNone(device.room)
        for offset in range(0, 48 * units.Mi, units.Mi):
            device.write(offset, b'data')
        self.pool.refresh()
        self.assertEqual(48 * units.Mi, volume.info().allocation)

    def test_copy_has_all_of_its_space(self):
        images = self.add_pool('images')
        self.add_volume(images, 'small', 8 * units.Mi)
        self.add_volume(images, 'large', 64 * units.Mi)
        for name, expected in (('small', 48), ('large', 64)):
            with self.subTest(name):
                copy = self.pool.create_from(
                    self.wanted(name='copy of ' + name),
                    base.pool.StoragePool(
                        self.conn, 'images', 'here').volume(name))
                self.assertIsNone(
                    self.group.devices['copy of ' + name].room)
                self.assertEqual(expected * units.Mi, copy.info().capacity)

    def test_device_is_not_everybodys_to_read(self):
        """libvirt would give its node the mode and owner of a file."""
        with mock.patch.object(self.raw, 'createXML', autospec=True,
                               wraps=self.raw.createXML) as mock_create:
            for permissions in (None, base.pool.permissions(0o644)):
                wanted = self.wanted(units.Mi)
                wanted.permissions = permissions
                self.pool.create(wanted).delete()
                self.assertNotIn('<permissions>',
                                 mock_create.call_args.args[0])

    def test_name_that_libvirt_does_not_list(self):
        self.group.make('v', units.Gi)
        self.group.inactive.add('v')
        self.assertRaises(exception.StorageVolumeNotFound,
                          self.pool.volume, 'v')
        self.assertRaises(exception.StorageVolumeExists,
                          self.pool.create, self.wanted())

    def test_group_is_full(self):
        e = self.assertRaises(
            exception.InsufficientStoragePoolSpace, self.pool.create,
            self.wanted(101 * units.Gi))
        self.assertIn('no room for volume v', str(e))
        self.assertEqual({}, self.group.devices)


class OldBlocksTestCase(LogicalPoolTestCase):

    def fill(self, volume):
        device = self.group.devices[volume.name]
        for offset in range(0, device.length, units.Mi):
            device.write(offset + 5000, b'secret')

    def secrets(self, name='v'):
        """The MiB of a volume that show what another one held."""
        device = self.group.devices[name]
        return [offset // units.Mi
                for offset in range(0, device.length, units.Mi)
                if device.read(offset + 5000, 6) == b'secret']

    def next_volume(self):
        volume = self.pool.create(self.wanted(10 * units.Mi))
        self.fill(volume)
        volume.delete()
        self.assertEqual({}, self.group.devices)
        return self.pool.create(self.wanted(10 * units.Mi))


class ClearingTestCase(OldBlocksTestCase):
    """LVM gives blocks to the next volume as they are."""

    def test_deleted_volume_is_overwritten(self):
        self.next_volume()
        self.assertEqual([], self.secrets())

    def test_size(self):
        self.flags(group='libvirt', volume_clear_size=3)
        self.next_volume()
        # 10 MiB are 3 extents
        self.assertEqual([3, 4, 5, 6, 7, 8, 9, 10, 11], self.secrets())
        self.flags(group='libvirt', volume_clear_size=300)
        self.pool.volume('v').delete()
        self.next_volume()
        self.assertEqual([], self.secrets())

    def test_none(self):
        self.flags(group='libvirt', volume_clear='none')
        self.next_volume()
        self.assertEqual(12, len(self.secrets()))

    @mock.patch('nova.privsep.fs.clear', autospec=True)
    def test_shred(self, mock_clear):
        self.flags(group='libvirt', volume_clear='shred')
        self.next_volume()
        mock_clear.assert_called_once_with(
            '/dev/vg/v', 12 * units.Mi, shred=True)

    @mock.patch('nova.privsep.fs.clear', autospec=True)
    def test_shred_on_another_host(self, mock_clear):
        self.flags(group='libvirt', volume_clear='shred')
        self.pool.host = 'there'
        self.next_volume()
        self.assertEqual([], self.secrets())
        mock_clear.assert_not_called()

    def test_rest_of_a_new_volume(self):
        """Behind a short image, whatever volume_clear says."""
        self.flags(group='libvirt', volume_clear='none')
        volume = self.next_volume()
        clearing.clear_rest(volume, 2 * units.Mi)
        self.assertEqual([0, 1], self.secrets())
        clearing.clear_rest(volume, 12 * units.Mi)
        clearing.clear_rest(volume, 13 * units.Mi)

    def test_file_keeps_its_holes(self):
        self.add_pool('files')
        files = base.pool.StoragePool(self.conn, 'files', 'here')
        volume = files.create(self.wanted())
        with mock.patch.object(libvirt_storage.StorageVol, 'upload',
                               side_effect=AssertionError):
            clearing.clear_rest(volume, 0)
            volume.delete()

    def test_volume_that_is_open_for_a_moment(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.volume._delete.retry.sleep',
            lambda seconds: self.group.opened.clear()))
        volume = self.pool.create(self.wanted())
        self.group.opened.add('v')
        volume.delete()
        self.assertEqual({}, self.group.devices)

    def test_volume_that_is_open(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.volume._delete.retry.stop',
            base.pool.tenacity.stop_after_attempt(2)))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.volume._delete.retry.wait',
            base.pool.tenacity.wait_none()))
        volume = self.pool.create(self.wanted())
        self.group.opened.add('v')
        e = self.assertRaises(exception.StorageVolumeError, volume.delete)
        self.assertIn('in use', str(e))
        with mock.patch('nova.privsep.fs.lvorigins', side_effect=[
                self.group.lvorigins('vg'),
                processutils.ProcessExecutionError('no LVM')]):
            self.assertRaises(exception.StorageVolumeError, volume.delete)
        self.assertIsNotNone(self.pool.find('v'))
        self.group.opened.clear()
        volume.delete()
        self.assertEqual({}, self.group.devices)

    def test_gone_and_libvirt_is_not_told(self):
        """Nova's own lvremove takes volumes whose names libvirt knows."""
        for how in ('zero', 'none'):
            self.flags(volume_clear=how, group='libvirt')
            volume = self.pool.create(self.wanted())
            del self.group.devices['v']
            volume.delete()
            self.assertIsNone(self.pool.find('v'))

    def test_gone(self):
        volume = self.pool.create(self.wanted())
        del self.group.devices['v']
        self.pool.refresh()
        volume.delete()


class SnapshotsTestCase(OldBlocksTestCase):
    """An operator's, which nobody has told libvirt of."""

    def setUp(self):
        super().setUp()
        self.volume = self.pool.create(self.wanted(10 * units.Mi))
        self.fill(self.volume)
        self.group.snapshot('backup', 'v')

    def refused(self, function, *args):
        e = self.assertRaises(exception.StorageVolumeHasSnapshots,
                              function, *args)
        self.assertIn('Look with lvs on host %s at logical volumes backup' %
                      self.pool.host, str(e))
        self.assertEqual({'v', 'backup'}, set(self.group.devices))
        self.assertEqual(12, len(self.secrets()))

    def test_delete(self):
        """LVM would delete the snapshot with it, and clearing spoil it."""
        self.refused(self.volume.delete)
        self.group.remove('backup')
        self.volume.delete()
        self.assertEqual({}, self.group.devices)

    def test_delete_on_another_host(self):
        self.pool.host = 'there'
        self.pool.refresh()
        self.refused(self.volume.delete)

    def test_snapshot_that_is_called_like_a_disk(self):
        self.pool.refresh()
        for host in ('here', 'there'):
            self.pool.host = host
            self.refused(self.pool.volume('backup').delete)

    def test_grow(self):
        with mock.patch('nova.privsep.fs.lvextend',
                        side_effect=AssertionError):
            self.refused(self.volume.resize, 20 * units.Mi)

    def test_sparse_volume_of_the_legacy_backend(self):
        """LVM makes it as a snapshot of what nobody sees."""
        volume = self.pool.create(self.wanted(name='sparse'))
        self.group.origins['sparse'] = '[sparse_vorigin]'
        volume.delete()
        self.assertEqual({'v', 'backup'}, set(self.group.devices))

    def test_others_are_deleted(self):
        self.pool.create(self.wanted(name='other')).delete()
        self.assertEqual({'v', 'backup'}, set(self.group.devices))

    def test_lvm_fails(self):
        with mock.patch('nova.privsep.fs.lvorigins', side_effect=(
                processutils.ProcessExecutionError(stderr='  no dm\n'))):
            e = self.assertRaises(exception.StorageVolumeError,
                                  self.volume.delete)
        self.assertIn('no dm', str(e))

    def test_files(self):
        self.add_pool('files')
        files = base.pool.StoragePool(self.conn, 'files', 'here')
        with mock.patch('nova.privsep.fs.lvorigins',
                        side_effect=AssertionError):
            files.create(self.wanted()).delete()


class ResizeTestCase(OldBlocksTestCase):

    def setUp(self):
        super().setUp()
        self.mock_extend = self.useFixture(fixtures.MockPatch(
            'nova.privsep.fs.lvextend', autospec=True,
            side_effect=self.extend)).mock
        self.stub_out('nova.privsep.fs.lvextents', lambda path: (
            self.group.extents(path.removeprefix('/dev/vg/'))))
        # What another instance has left, and nobody has overwritten.
        self.flags(group='libvirt', volume_clear='none')
        others = self.pool.create(self.wanted(64 * units.Mi, name='others'))
        self.volume = self.pool.create(self.wanted(10 * units.Mi))
        self.fill(others)
        others.delete()

    def extend(self, path, size, extents=()):
        self.group.extend(path.removeprefix('/dev/vg/'), size, extents)

    def test_grow(self):
        self.volume.resize(21 * units.Mi)
        self.mock_extend.assert_called_once_with(
            '/dev/vg/v', 21 * units.Mi, mock.ANY)
        self.assertEqual(
            [24 * units.Mi] * 2,
            [self.volume.physical(), self.volume.info().capacity])
        self.assertEqual([], self.secrets())
        self.assertEqual({'v'}, set(self.group.devices))

    def test_clearing_fails(self):
        """The guest can be started then, and must see nothing of others."""
        fault = libvirt_storage.system_error('no', 5)
        with mock.patch.object(libvirt_storage.Stream, 'finish',
                               side_effect=fault):
            self.assertRaises(exception.StorageVolumeError,
                              self.volume.resize, 21 * units.Mi)
        self.assertEqual([], self.secrets())
        self.assertEqual(12 * units.Mi, self.volume.physical())
        self.assertEqual({'v'}, set(self.group.devices))
        self.volume.resize(21 * units.Mi)
        self.assertEqual([], self.secrets())

    def test_killed(self):
        """A retry finishes, whichever step was the last one."""
        class Killed(BaseException):
            pass

        with mock.patch.object(storage_volume.StorageVolume, 'delete',
                               side_effect=Killed):
            self.assertRaises(Killed, self.volume.resize, 21 * units.Mi)
        self.assertEqual({'v', 'v.room'}, set(self.group.devices))
        self.assertEqual([], self.secrets())
        self.mock_extend.side_effect = Killed
        self.assertRaises(Killed, self.volume.resize, 21 * units.Mi)
        self.assertEqual({'v'}, set(self.group.devices))
        self.mock_extend.side_effect = self.extend
        self.volume.resize(21 * units.Mi)
        self.assertEqual(24 * units.Mi, self.volume.physical())
        self.assertEqual([], self.secrets())
        self.assertEqual({'v'}, set(self.group.devices))

    def test_no_room(self):
        self.group.capacity = 20 * units.Mi
        self.assertRaises(exception.InsufficientStoragePoolSpace,
                          self.volume.resize, 21 * units.Mi)
        self.mock_extend.assert_not_called()
        self.assertEqual({'v'}, set(self.group.devices))

    def test_extents_are_taken_meanwhile(self):
        """By a volume that is made just then: there are others."""
        told = ('  No free extents on physical volume "/dev/vda".\n  No '
                'specified PVs have space available.')
        taken = [processutils.ProcessExecutionError(stderr=told)] * 2

        def extend(path, size, extents=()):
            if taken:
                raise taken.pop()
            self.extend(path, size, extents)

        self.mock_extend.side_effect = extend
        self.volume.resize(21 * units.Mi)
        self.assertEqual(24 * units.Mi, self.volume.physical())
        self.assertEqual([], self.secrets())
        self.assertEqual({'v'}, set(self.group.devices))

    def test_large_enough(self):
        self.volume.resize(12 * units.Mi)
        self.mock_extend.assert_not_called()

    def test_pool_can_not_be_refreshed(self):
        """As long as a disk is copied into it, which may take hours."""
        def device(path):
            raise ValueError('%s is not a regular file' % path)

        self.stub_out('nova.privsep.storage.file_bytes', device)
        self.stub_out('nova.privsep.fs.blockdev_size', lambda path: (
            '%d\n' % self.group.devices[os.path.basename(path)].length, ''))
        busy = exception.StoragePoolError(
            pool='vg-pool', host='here', code=1,
            reason='pool has asynchronous jobs running')
        with mock.patch.object(base.pool.StoragePool, 'refresh',
                               side_effect=busy):
            self.volume.resize(21 * units.Mi)
            # It is that large now, whatever libvirt says.
            self.volume.resize(21 * units.Mi)
            self.mock_extend.assert_called_once()
            self.assertEqual([24 * units.Mi] * 2, [*self.volume.file_bytes()])
            self.assertRaises(exception.StoragePoolError,
                              self.volume.check_known_length)
        self.assertEqual(12 * units.Mi, self.volume.info().capacity)
        self.volume.check_known_length()
        self.assertEqual(24 * units.Mi, self.volume.info().capacity)
        with mock.patch.object(base.pool.StoragePool, 'refresh',
                               side_effect=AssertionError):
            self.volume.check_known_length()

    def test_failure(self):
        for told, expected in (
                ('  Insufficient free space: 900 extents needed, but only 7 '
                 'available', exception.InsufficientStoragePoolSpace),
                ('  No free extents on physical volume "/dev/vda".\n  No '
                 'specified PVs have space available.',
                 exception.InsufficientStoragePoolSpace),
                ('  Command failed', exception.StorageVolumeError)):
            self.mock_extend.side_effect = (
                processutils.ProcessExecutionError(stderr=told, exit_code=5))
            e = self.assertRaises(expected, self.volume.resize, units.Gi)
            self.assertIs(expected, type(e))
            self.assertIn(told.strip(), str(e))


class SizesTestCase(LogicalPoolTestCase):
    """/dev is a file system in memory."""

    def setUp(self):
        super().setUp()
        self.flags(group='libvirt', storage_disks_pool='vg-pool')
        self.stub_out('nova.virt.libvirt.utils.get_fs_info', lambda path: {
            'total': 12, 'used': 0, 'free': 12})
        self.stub_out('os.stat', lambda path: mock.Mock(st_dev=7))
        self.pool.create(self.wanted(units.Gi))

    def test_local_info(self):
        self.assertEqual(
            {'total': 100 * units.Gi, 'free': 99 * units.Gi,
             'used': units.Gi}, usage.LocalInfo('here').get(self.conn))

    def test_device_of_its_path_is_not_the_disks(self):
        self.assertEqual(set(), usage.disk_devices(self.conn, 'here'))

    def test_offer_of_a_move(self):
        self.add_pool('images', '/images')
        group, images = (setup.pool_named(self.conn, name)
                         for name in ('vg-pool', 'images'))
        self.assertEqual((99 * units.Gi, 1),
                         destination._file_system(group, 1))
        self.assertEqual((12, ('device', 7)),
                         destination._file_system(images, 2))

    @mock.patch('nova.privsep.storage.backing_files',
                side_effect=FileNotFoundError)
    def test_no_overlays_in_an_empty_group(self, mock_files):
        """Its directory is not there until there is a volume."""
        self.assertEqual({}, self.pool.backing_files())
