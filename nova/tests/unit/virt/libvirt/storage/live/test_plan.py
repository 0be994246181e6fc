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
from nova.tests.unit.virt.libvirt.storage.live import test_settle
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt import config as guest_config
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.live import plan
from nova.virt.libvirt.storage import operation
from nova.virt.libvirt import utils as libvirt_utils

POOL = two_hosts.POOL
DEVICES = {'disk': 'vda', 'disk.eph0': 'vdb', 'disk.swap': 'vdc',
           'disk.config': 'hda'}
KINDS = ('disk', 'disk.eph', 'disk.swap', 'disk.config')


class PlanTestCase(test_settle.LiveTestCase):
    """An instance on source is to be migrated to dest."""

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            two_hosts.__name__ + '.Pool.file_names',
            lambda pool: set(pool.volumes_by_name)))
        self.file_system = 'nfs'
        self.stub_out(
            'nova.virt.libvirt.storage.live.file_systems.type_of',
            lambda path: self.file_system)
        self.file_systems = {}
        self.stub_out(
            'nova.virt.libvirt.storage.pool.usage.file_system',
            lambda path: (self.file_systems.get(path, path), 1 << 40,
                          self.get_fs_info(path)['free']))
        self.sizes = {}
        self.devices = {}
        for name, dev in DEVICES.items():
            disk = guest_config.LibvirtConfigGuestDisk()
            disk.source_type, disk.source_pool = 'volume', POOL
            disk.source_volume = self.volume_name(name)
            disk.target_dev, disk.driver_format = dev, 'raw'
            disk.readonly = name == 'disk.config'
            self.devices[name] = disk
        self.guest = mock.Mock()
        self.guest.get_all_disks.side_effect = (
            lambda: list(self.devices.values()))
        self.guest.get_block_device.side_effect = lambda dev: mock.Mock(
            get_capacity=lambda: self.sizes.get(dev, 1 << 30))
        self.host.get_guest = lambda instance: self.guest
        self.local = operation.LocalHost(
            self.host, mock.Mock(), mock.Mock(), 'qemu:///system',
            lambda: '192.0.2.1')
        self.data = objects.LibvirtLiveMigrateData(
            dst_storage_pools=dict.fromkeys(KINDS, 'there'),
            dst_storage_probes={'there': ['probe']},
            dst_storage_address='192.0.2.2', dst_takes_legacy=False,
            is_shared_instance_path=False)

    def plan(self):
        plan.Plan(self.local, self.context, self.load(), self.data).make()
        return {disk.name: disk for disk in self.data.disks}

    def ways(self):
        return {name: disk.way for name, disk in self.plan().items()}

    def refused(self, *words):
        error = self.assertRaises(exception.MigrationPreCheckError, self.plan)
        for word in words:
            self.assertIn(word, str(error))
        self.assertFalse(self.data.has_planned_disks)

    def as_cdrom(self, base):
        self.as_overlay('disk', base)
        self.devices['disk'].readonly = True

    def as_files(self):
        """Have all disks in the instance directory, which both see."""
        directory = libvirt_utils.get_instance_path(self.instance)
        for name, device in self.devices.items():
            record = self.disks.get(name)
            record.backend, record.pool, record.volume = 'flat', None, None
            self.disks.set(name, record)
            device.source_type, device.source_pool = 'file', None
            device.source_volume = None
            device.source_path = os.path.join(directory, name)
        self.disks.save(self.context)
        self.data.dst_takes_legacy = self.data.dst_takes_links = True
        self.data.is_shared_instance_path = True
        self.file_bytes = self.useFixture(fixtures.MockPatch(
            'nova.privsep.storage.file_bytes', return_value=(100, 50))).mock

    def as_overlay(self, name, base, allocation=0):
        self.lay_over(name, base, allocation)
        self.devices[name].driver_format = 'qcow2'


@ddt.ddt
class TestPlan(PlanTestCase):

    def test_image_of_a_cdrom(self):
        """It is sent as it is, an overlay; the destination needs its base."""
        name = imagecache.get_cache_fname(uuids.image)
        self.as_cdrom(name)
        disk = self.plan()['disk']
        self.assertEqual((plan.WAY.SEND, name), (disk.way, disk.base))

    def test_image_of_a_cdrom_that_is_not_to_be_had(self):
        self.as_cdrom('another')
        self.refused('migrate the server cold', 'only reads')

    def test_distinct_pools(self):
        found = self.plan()
        self.assertEqual(
            {'disk': 'mirror', 'disk.eph0': 'mirror', 'disk.swap': 'mirror',
             'disk.config': 'send'},
            {name: disk.way for name, disk in found.items()})
        self.assertEqual(DEVICES, {
            name: disk.dev for name, disk in found.items()})
        # QEMU's size, and the length of the file.
        self.assertEqual((1 << 30, 100), (
            found['disk'].size, found['disk.config'].size))
        self.assertEqual(500, found['disk'].allocation)
        self.assertEqual('192.0.2.1', self.data.src_storage_address)
        self.assertEqual(['qemu+tls://192.0.2.2/system'], self.host.uris)

    def test_shared_pool(self):
        self.source.pools[POOL]['probe'] = {'length': 1}
        self.assertEqual(dict.fromkeys(DEVICES, 'share'), self.ways())
        self.assertEqual([], self.host.uris)

    def test_files_that_both_hosts_see(self):
        """They get second names: nothing is copied nor sent."""
        self.as_files()
        found = self.plan()
        self.assertEqual(
            dict.fromkeys(DEVICES, 'link'),
            {name: disk.way for name, disk in found.items()})
        self.assertEqual((1 << 30, 100), (
            found['disk'].size, found['disk.config'].size))
        self.assertEqual([], self.host.uris)
        self.assertEqual([], plan.devices_to_copy(self.guest, self.data))

    def test_overlay_that_both_hosts_see(self):
        """It stays over its base image, whatever that is."""
        self.as_files()
        record = self.disks.get('disk')
        record.format = self.devices['disk'].driver_format = 'qcow2'
        self.disks.set('disk', record)
        self.disks.save(self.context)
        found = self.plan()['disk']
        self.assertEqual(('link', 'qcow2', None, 1 << 30), (
            found.way, found.format, found.base, found.size))

    def test_files_on_what_libvirt_takes_for_no_shared_file_system(self):
        self.as_files()
        self.file_system = 'ext4'
        self.refused('migrate the server cold', 'ext4', 'both hosts share')

    @ddt.data(True, False)
    def test_files_that_can_not_be_linked(self, is_said):
        self.as_files()
        self.data.dst_takes_links = False
        if not is_said:
            del self.data.dst_takes_links
        self.refused('hard reboot the server', 'flat')

    def on_ceph(self, there='cluster/nova', pool=POOL):
        """Have all disks in a Ceph pool, and the destination's as told."""
        self.source.types[POOL] = 'rbd'
        self.source.ceph[POOL] = 'cluster/nova'
        self.useFixture(fixtures.MockPatchObject(
            two_hosts.Volume, 'key', create=True, new=property(
                lambda volume: 'nova/' + volume.name)))
        for name, device in self.devices.items():
            record = self.disks.get(name)
            record.backend = 'libvirt-storage-rbd'
            self.disks.set(name, record)
            device.source_type, device.source_pool = 'network', None
            device.source_volume = None
            device.source_name = 'nova/' + self.volume_name(name)
        self.disks.save(self.context)
        self.data.dst_storage_pools = dict.fromkeys(KINDS, pool)
        self.data.dst_storage_probes = {pool: [there]}

    def test_on_ceph(self):
        """It stays, whatever libvirt thinks of file systems."""
        self.on_ceph()
        self.file_system = 'ext4'
        self.assertEqual(dict.fromkeys(DEVICES, 'share'), self.ways())
        self.assertEqual([], self.host.uris)

    def test_outside_of_the_pools_on_ceph(self):
        self.assertFalse(plan.is_on_ceph(self.disks))
        for name, record in self.disks.items():
            record.backend, record.pool, record.volume = 'rbd', None, None
            self.disks.set(name, record)
        self.assertTrue(plan.is_on_ceph(self.disks))
        record.backend = 'flat'
        self.assertFalse(plan.is_on_ceph(self.disks))
        self.disks.clear()
        self.assertFalse(plan.is_on_ceph(self.disks))

    def test_guest_runs_with_another_image(self):
        self.on_ceph()
        self.devices['disk'].source_name = 'nova/other'
        self.refused('hard reboot the server', 'disk')

    @ddt.data(('cluster/other', POOL, 'cluster/other'),
              ('cluster/nova', 'another name', 'another name'),
              ('probe', POOL, 'no Ceph pool there'))
    @ddt.unpack
    def test_not_the_same_ceph_pool(self, there, pool, told):
        self.on_ceph(there, pool)
        self.refused('choose a host with the same Ceph pool',
                     'cluster/nova', told)

    def test_into_ceph(self):
        self.data.dst_storage_probes = {'there': ['cluster/nova']}
        self.refused('choose a host with the same Ceph pool',
                     'no Ceph pool', 'cluster/nova')

    def test_pool_of_another_kind_is_shared(self):
        self.source.pools[POOL]['probe'] = {'length': 1}
        self.data.dst_storage_pools['disk.swap'] = 'other'
        self.assertEqual(('share', 'mirror'), (
            self.ways()['disk'], self.ways()['disk.swap']))

    def test_shared_pool_on_a_file_system_that_is_none(self):
        self.source.pools[POOL]['probe'] = {'length': 1}
        self.file_system = 'ext4'
        self.refused('disk', 'ext4', 'migrate the server cold')
        # Since then an operator can tell libvirt.
        self.source.version = 10_008_000
        self.plan()

    @ddt.data(None, {})
    def test_destination_takes_no_pool_disks(self, pools):
        if pools is None:
            self.data = objects.LibvirtLiveMigrateData()
        else:
            self.data.dst_storage_pools = pools
        self.refused('choose another host', 'too old')

    def test_destination_has_no_pool_for_a_kind(self):
        del self.data.dst_storage_pools['disk.swap']
        self.refused('disk.swap')

    @ddt.data({'state': 'building'}, {'host': 'third'},
              {'backend': 'lvm', 'pool': None, 'volume': None},
              {'backend': 'qcow2', 'pool': None, 'volume': None})
    def test_disk_is_not_in_order(self, change):
        record = self.disks.get('disk.eph0')
        for name, value in change.items():
            setattr(record, name, value)
        self.disks.set('disk.eph0', record)
        self.disks.save(self.context)
        self.refused('disk.eph0', 'hard reboot the server')

    def test_guest_runs_with_another_format(self):
        self.devices['disk'].driver_format = 'qcow2'
        self.refused('hard reboot', 'runs as qcow2', 'record as raw')

    def test_guest_runs_with_another_volume(self):
        self.devices['disk'].source_volume = 'other'
        self.refused('hard reboot', self.volume_name('disk'))

    def test_guest_has_a_disk_that_is_not_on_record(self):
        disk = guest_config.LibvirtConfigGuestDisk()
        disk.source_type, disk.source_pool = 'volume', POOL
        disk.source_volume, disk.target_dev = 'more', 'vdx'
        self.devices['more'] = disk
        self.refused('vdx', POOL + '/more')

    def test_volume_group(self):
        self.source.types[POOL] = 'logical'
        self.refused('migrate the server cold', 'disk', POOL, 'logical')

    def test_tunnelled(self):
        self.flags(live_migration_tunnelled=True, group='libvirt')
        self.refused('live_migration_tunnelled')

    def test_destination_cant_be_reached(self):
        self.host.peer = Exception('no route')
        self.refused("can't be reached", 'no route')

    def test_another_migration_goes_on(self):
        self.begin()
        self.refused('try again', 'source')

    def test_overlay_over_the_servers_image(self):
        name = imagecache.get_cache_fname(uuids.image)
        self.as_overlay('disk', name)
        found = self.plan()
        self.assertEqual((name, 500), (
            found['disk'].base, found['disk'].allocation))

    def test_image_is_lost(self):
        self.as_overlay('disk', imagecache.get_cache_fname(uuids.image))
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        # The source has it.
        self.assertIsNotNone(self.plan()['disk'].base)

    def lose_cache(self):
        """Let the base image be in no storage pool of the source."""
        self.source.pools[two_hosts.BASES].clear()
        self.stub_out('nova.tests.unit.virt.libvirt.storage.move.two_hosts.'
                      'TwoHostsTestCase.content_at', lambda case, path: {
                          'base': '%s/_base/%s' % (
                              two_hosts.CONF.instances_path,
                              imagecache.get_cache_fname(uuids.image)),
                          'length': 4096, 'allocation': 4096})

    def test_image_is_lost_while_another_one_is_copied(self):
        self.as_overlay('disk', imagecache.get_cache_fname(uuids.image))
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        self.lose_cache()
        with mock.patch.object(two_hosts.Pool, 'find', side_effect=(
                exception.StoragePoolError(
                    pool='bases', host='source', code=1,
                    reason='asynchronous jobs running'))):
            self.assertIsNone(self.plan()['disk'].base)

    @ddt.data(exception.ImageNotFound, exception.ImageNotAuthorized)
    def test_image_that_the_destination_can_not_have(self, error):
        """Such as one that is private, for a request without a token."""
        self.as_overlay('disk', imagecache.get_cache_fname(uuids.image))
        self.image_error = error(image_id=uuids.image)
        self.lose_cache()
        found = self.plan()['disk']
        self.assertEqual((None, 'mirror'), (found.base, found.way))
        self.assertLess(500, found.allocation)

    def test_no_room_to_take_over_a_lost_image(self):
        self.as_overlay('disk', imagecache.get_cache_fname(uuids.image))
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        self.lose_cache()
        self.free['/disks'] = 0
        self.refused('make room', 'source')

    @ddt.data('disk.eph0', 'disk')
    def test_overlay_over_what_only_this_host_has(self, name):
        self.as_overlay(name, 'ephemeral_1_default', 4096)
        found = self.plan()
        self.assertEqual((None, 'mirror'), (found[name].base,
                                            found[name].way))
        # It takes over what is in its base.
        self.assertLess(4096, found[name].allocation)

    def test_no_room_in_directories_of_one_file_system(self):
        path_of = plan.path_of
        self.stub_out(
            plan.__name__ + '.path_of', lambda local, disks, name: path_of(
                local, disks, name).replace(
                    '/disks', '/fast' if name == 'disk' else '/slow'))
        self.as_overlay('disk', 'snapshot', 4096)
        self.as_overlay('disk.eph0', 'ephemeral_1_default', 4096)
        self.free.update({'/fast': 8191, '/slow': 8191})
        self.file_systems.update({'/fast': 1, '/slow': 1})
        self.refused('make room', '/fast, /slow', '8191', '8192')
        self.file_systems.clear()  # each has one of its own
        self.plan()

    def test_no_room_to_take_over_a_base(self):
        self.as_overlay('disk.eph0', 'ephemeral_1_default', 4096)
        self.free['/disks'] = 4095
        self.refused('make room', '4095', '4096', 'source')


class TestDevices(PlanTestCase):

    def test_devices_to_copy(self):
        self.plan()
        self.assertEqual({'vda', 'vdb', 'vdc'}, set(
            plan.devices_to_copy(self.guest, self.data)))
        self.assertEqual([500, 300, 200], list(
            plan.bytes_to_copy(self.data)))

    def test_a_disk_would_be_left_out(self):
        # Then the guest would go on with an empty volume.
        self.plan()
        self.data.disks = self.data.disks[1:]
        error = self.assertRaises(
            exception.MigrationError, plan.devices_to_copy, self.guest,
            self.data)
        self.assertIn('vda', str(error))

    def test_legacy(self):
        data = objects.LibvirtLiveMigrateData()
        self.assertEqual([], plan.planned(data))
        self.assertEqual([], plan.planned(None))
        self.assertEqual([], list(plan.bytes_to_copy(data)))
