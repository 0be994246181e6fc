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
from oslo_utils import units

import nova.conf
from nova import exception
from nova import objects
from nova import test
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt import fake
from nova.virt.libvirt import config as guest_config
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import usage

CONF = nova.conf.CONF

OVERLAY = '5c9c2d23-9be7-4b6a-8f5f-52f0a4a2c001_disk'
PATH = '/nowhere/pools/nova-disks-pool/'
OVERLAY_XML = """
<volume>
  <name>%s</name><capacity>%d</capacity>
  <target><format type='qcow2'/></target>
  <backingStore><path>%s</path><format type='raw'/></backingStore>
</volume>""" % (OVERLAY, units.Gi, PATH + 'base')


def disk(volume, fmt, dev='vda', pool='nova-disks-pool'):
    conf = guest_config.LibvirtConfigGuestDisk()
    conf.source_type = 'volume'
    conf.source_pool, conf.source_volume = pool, volume
    conf.driver_format, conf.target_dev, conf.target_bus = fmt, dev, 'virtio'
    return conf


class UsageTestCase(base.PoolsTestCase):
    """A pool with an overlay, a raw disk, and one that says it is qcow2."""

    def setUp(self):
        super().setUp()
        self.disks = self.add_pool('nova-disks-pool')
        self.add_volume(self.disks, 'base', units.Gi)
        self.overlay = self.disks.createXML(OVERLAY_XML, 0)
        self.add_volume(self.disks, 'raw', 64 * units.Mi)
        self.add_volume(self.disks, 'lies', 64 * units.Mi)
        # Its guest writes, and libvirt believes it.
        self.conn.file_system.open(PATH + 'lies').write(
            0, libvirt_storage.qcow2_header(7 * units.Gi, '/etc/passwd'))
        self.disks.refresh(0)
        self.allocated = self.overlay.info()[2]


class DiskInfoTestCase(UsageTestCase):

    def setUp(self):
        super().setUp()
        self.volumes = usage.Volumes(lambda: self.conn, 'host-a')

    def test_overlay(self):
        self.assertEqual({
            'type': 'qcow2',
            'path': PATH + OVERLAY,
            'virt_disk_size': units.Gi,
            'disk_size': self.allocated,
            'over_committed_disk_size': units.Gi - self.allocated,
            'backing_file': PATH + 'base',
            'pool': 'nova-disks-pool',
            'volume': OVERLAY,
        }, self.volumes.disk_info(disk(OVERLAY, 'qcow2')))

    def test_raw(self):
        info = self.volumes.disk_info(disk('raw', 'raw'))
        self.assertEqual('raw', info['type'])
        self.assertEqual(64 * units.Mi, info['virt_disk_size'])
        self.assertEqual(0, info['disk_size'])
        self.assertEqual('', info['backing_file'])

    def test_guest_written_header_is_not_believed(self):
        info = self.volumes.disk_info(disk('lies', 'raw'))
        self.assertEqual('raw', info['type'])
        self.assertEqual(64 * units.Mi, info['virt_disk_size'])
        self.assertEqual('', info['backing_file'])

    @mock.patch('nova.privsep.storage.file_bytes',
                return_value=(64 * units.Mi, 4096))
    def test_libvirt_looks_into_no_raw_disk(self, mock_bytes):
        """It may fail to, or open what the guest has named there."""
        for name in ('XMLDesc', 'info', 'infoFlags'):
            self.useFixture(fixtures.MockPatchObject(
                libvirt_storage.StorageVol, name,
                side_effect=AssertionError))
        volumes = usage.Volumes(lambda: self.conn, CONF.host)
        info = volumes.disk_info(disk('lies', 'raw'))
        self.assertEqual((64 * units.Mi, 4096), (
            info['virt_disk_size'], info['disk_size']))
        mock_bytes.assert_called_once_with(PATH + 'lies')

    @mock.patch.object(usage.LOG, 'warning')
    def test_another_header_over_a_qcow2_disk(self, mock_warning):
        """libvirt has not looked again since it was made as raw, say."""
        info = self.volumes.disk_info(disk('raw', 'qcow2'))
        self.assertEqual('qcow2', info['type'])
        self.assertEqual('', info['backing_file'])
        mock_warning.assert_called_once()

    def test_missing(self):
        exc = self.assertRaises(exception.StorageVolumeNotFound,
                                self.volumes.disk_info, disk('gone', 'raw'))
        for word in ('gone', 'nova-disks-pool', 'host-a'):
            self.assertIn(word, str(exc))
        self.assertRaises(exception.StoragePoolNotFound,
                          self.volumes.disk_info,
                          disk('raw', 'raw', pool='other'))

    def test_the_pool_is_not_listed(self):
        with mock.patch.object(
                libvirt_storage.StoragePool, 'listAllVolumes') as mock_list:
            self.volumes.disk_info(disk('raw', 'raw'))
        mock_list.assert_not_called()


class LocalInfoTestCase(base.PoolsTestCase):

    def setUp(self):
        super().setUp()
        self.flags(group='libvirt', storage_pool_mapping={
            'swap': 'swaps', 'ephemeral': 'eph'})
        self.disks = self.add_pool('nova-disks-pool', path='/a')
        self.swaps = self.add_pool('swaps', path='/b')
        self.add_pool('eph', path='/c')
        self.local_info = usage.LocalInfo('here')

    def file_systems(self, **of_paths):
        """:param of_paths: path without its slash -> device, total and free"""
        def find(path):
            if path[1:] not in of_paths:
                raise PermissionError(path)
            return of_paths[path[1:]]

        self.stub_out('nova.virt.libvirt.utils.get_fs_info', lambda path: {
            'total': find(path)[1], 'free': find(path)[2]})
        self.stub_out('os.stat', lambda path: mock.Mock(
            st_dev=find(path)[0]))

    def get(self):
        info = self.local_info.get(self.conn)
        self.assertEqual(info['total'], info['used'] + info['free'])
        return info['total'], info['free']

    def test_pool_names(self):
        self.flags(group='libvirt', storage_pool_mapping={
            'swap': 'fast', 'ephemeral': 'nova-disks-pool'})
        self.assertEqual(['fast', 'nova-disks-pool'], setup.pool_names())

    def test_directories_out_of_reach_are_judged_by_libvirt(self):
        self.file_systems()
        self.assertEqual((300 * units.Gi, 300 * units.Gi), self.get())

    def test_one_file_system_counts_once(self):
        self.file_systems(a=(1, 9, 3), b=(1, 9, 3), c=(2, 7, 5))
        self.assertEqual((16, 8), self.get())

    def test_sizes_are_of_now(self):
        """libvirt's are of its last look at the file system."""
        self.file_systems(a=(1, 4, 3), b=(2, 1, 1), c=(3, 1, 1))
        self.assertEqual((6, 5), self.get())
        self.file_systems(a=(1, 14, 13), b=(2, 1, 1), c=(3, 1, 1))
        self.assertEqual((16, 15), self.get())

    def test_sick_pool_counts_as_full(self):
        self.file_systems(a=(1, 10, 6), b=(2, 20, 19), c=(3, 1, 1))
        self.assertEqual((31, 26), self.get())
        self.swaps.destroy()
        with mock.patch.object(usage.LOG, 'warning') as mock_warning:
            self.assertEqual((31, 7), self.get())
            self.assertEqual((31, 7), self.get())
        mock_warning.assert_called_once()
        self.assertIn('virsh pool-start',
                      str(mock_warning.call_args.args[1]['error']))
        self.swaps.create(0)
        self.assertEqual((31, 26), self.get())

    def test_sick_pool_beside_another_one(self):
        self.file_systems(a=(1, 10, 6), b=(1, 10, 6), c=(1, 10, 6))
        self.assertEqual((10, 6), self.get())
        self.disks.destroy()
        self.assertEqual((10, 6), self.get())

    def test_pool_that_was_never_well(self):
        self.file_systems(a=(1, 10, 6), c=(3, 1, 1))
        self.swaps.destroy()
        self.swaps.undefine()
        self.assertEqual((11, 7), self.get())

    def test_no_storage_driver(self):
        with mock.patch.object(
                self.conn, 'storagePoolLookupByName',
                side_effect=lambda name: self.disks._check_active(False)):
            self.assertEqual((0, 0), self.get())

    def test_what_is_known_outlives_a_call(self):
        self.file_systems(a=(1, 10, 6), b=(2, 20, 19), c=(3, 1, 1))
        usage._local_info.cache_clear()
        self.addCleanup(usage._local_info.cache_clear)
        before = usage.get_local_info(self.conn, 'here')
        self.swaps.destroy()
        after = usage.get_local_info(self.conn, 'here')
        self.assertEqual((before['total'], before['free'] - 19),
                         (after['total'], after['free']))

    def test_disk_devices(self):
        self.file_systems(a=(1, 0, 0), b=(2, 0, 0), c=(1, 0, 0))
        self.swaps.destroy()  # its directory is known nevertheless
        self.assertEqual({1, 2}, usage.disk_devices(self.conn, 'here'))
        self.swaps.undefine()
        self.assertEqual({1}, usage.disk_devices(self.conn, 'here'))

    def test_disk_devices_without_one_that_is_out_of_reach(self):
        """The image cache beside the others takes room nevertheless."""
        self.file_systems(a=(1, 0, 0), c=(3, 0, 0))
        self.assertEqual({1, 3}, usage.disk_devices(self.conn, 'here'))


class OverfullTestCase(test.NoDBTestCase):
    def overfull(self, **wanted):
        return usage.overfull(wanted, {
            'a': ('one', 100, 10), 'b': ('one', 100, 10),
            'c': ('two', 100, 10)}.get)

    def test_one_file_system_has_room_once(self):
        self.assertEqual([], self.overfull(a=5, b=5, c=10))
        self.assertEqual([(['a', 'b'], 10, 11)],
                         self.overfull(c=10, b=5, a=6))
        self.assertEqual([(['b'], 10, 11), (['c'], 10, 12)],
                         self.overfull(b=11, c=12))


class DriverTestCase(UsageTestCase):
    """What the driver does with disks of type volume."""

    def setUp(self):
        super().setUp()
        self.useFixture(fakelibvirt.LibvirtFixture())
        self.drvr = libvirt_driver.LibvirtDriver(fake.FakeVirtAPI(), False)
        self.drvr._host = mock.Mock()
        self.drvr._host.get_connection.return_value = self.conn
        self.drvr._local_disks._local.host = self.drvr._host
        self.guest = guest_config.LibvirtConfigGuest()
        self.guest.name = 'instance-00000001'

    def test_disk_info(self):
        self.guest.add_device(disk(OVERLAY, 'qcow2'))
        self.guest.add_device(disk('raw', 'raw', dev='vdb'))
        infos = self.drvr._get_instance_disk_info_from_config(
            self.guest, None)
        self.assertEqual([OVERLAY, 'raw'], [i['volume'] for i in infos])

    def test_disk_info_skips_volumes_of_cinder(self):
        self.guest.add_device(disk('raw', 'raw', dev='vdb'))
        infos = self.drvr._get_instance_disk_info_from_config(
            self.guest, {'block_device_mapping': [
                {'mount_device': '/dev/vdb'}]})
        self.assertEqual([], infos)

    @mock.patch.object(objects.BlockDeviceMappingList,
                       'bdms_by_instance_uuid', return_value={})
    @mock.patch.object(objects.InstanceList, 'get_by_filters',
                       return_value=[])
    def test_over_commit(self, mock_instances, mock_bdms):
        domains = []
        for volumes in ((OVERLAY, 'raw'), ('gone',), (OVERLAY,)):
            guest = guest_config.LibvirtConfigGuest()
            guest.name, guest.virt_type = 'guest', 'qemu'
            for n, volume in enumerate(volumes):
                guest.add_device(disk(
                    volume, 'raw' if volume == 'raw' else 'qcow2',
                    dev='vd%s' % 'ab'[n]))
            domain = mock.Mock(spec=fakelibvirt.virDomain)
            domain.XMLDesc.return_value = guest.to_xml()
            domain.UUIDString.return_value = uuids.instance
            domain.name.return_value = guest.name
            domains.append(domain)
        self.drvr._host.list_instance_domains.return_value = domains

        # The one that is gone does not keep the others from being counted.
        self.assertEqual(
            2 * (units.Gi - self.allocated) + 64 * units.Mi,
            self.drvr._get_disk_over_committed_size_total())

    def test_local_gb(self):
        self.flags(images_type='libvirt-storage', group='libvirt')
        file_system = self.conn.file_system
        file_system.open(PATH + 'raw').allocate(64 * units.Mi)
        total, used = file_system.capacity, file_system.used
        self.assertEqual(
            {'total': total / units.Gi, 'free': (total - used) / units.Gi,
             'used': used / units.Gi}, self.drvr._get_local_gb_info())

    def _check_live_migration(self, *disks):
        instance = objects.Instance(id=1, uuid=uuids.instance)
        config = guest_config.LibvirtConfigGuest()
        for device in disks:
            config.add_device(device)
        self.drvr._host.get_guest.return_value = mock.Mock(
            spec=libvirt_guest.Guest,
            get_config=mock.Mock(return_value=config))
        # The check goes on after the refusal.
        with mock.patch.object(
                self.drvr, '_check_shared_storage_test_file',
                return_value=False), mock.patch.object(
                    self.drvr, '_is_shared_block_storage',
                    side_effect=test.TestingException):
            self.drvr.check_can_live_migrate_source(
                None, instance, objects.LibvirtLiveMigrateData(
                    filename='x'))

    def test_live_migration_is_refused(self):
        legacy = guest_config.LibvirtConfigGuestDisk()
        legacy.source_path, legacy.target_dev = '/x/disk.config', 'hda'
        for configured in ('libvirt-storage', 'qcow2'):
            self.flags(images_type=configured, group='libvirt')
            exc = self.assertRaises(
                exception.MigrationPreCheckError, self._check_live_migration,
                legacy, disk('raw', 'raw', dev='vdb'))
            for word in (uuids.instance, 'vdb', 'nova-disks-pool/raw'):
                self.assertIn(word, str(exc))

    def test_live_migration_of_legacy_disks_is_not_refused(self):
        for configured in ('libvirt-storage', 'qcow2'):
            self.flags(images_type=configured, group='libvirt')
            self.assertRaises(
                test.TestingException, self._check_live_migration,
                guest_config.LibvirtConfigGuestDisk())

    @mock.patch('nova.virt.libvirt.storage.records.lifecycle.of_instance')
    def test_live_migration_of_disks_that_are_volumes_on_record(self, records):
        # They were linked into the pool, the guest has the old paths.
        records.return_value.has_mappings = False
        records.return_value.items.return_value = [
            ('disk', mock.Mock(backend='libvirt-storage', pool='p',
                               volume='v', next=None))]
        exc = self.assertRaises(
            exception.MigrationPreCheckError, self._check_live_migration,
            guest_config.LibvirtConfigGuestDisk())
        self.assertIn('choose another host', str(exc))
