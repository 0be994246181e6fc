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
import oslo_messaging as messaging
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova.compute import task_states
import nova.conf
from nova import context
from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt.storage.records import lifecycle as records
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF

# A qcow2 header which names a file of the host as its backing file.
HOSTILE = (b'QFI\xfb' + (3).to_bytes(4, 'big') + (104).to_bytes(8, 'big') +
           (11).to_bytes(4, 'big')).ljust(104, b'\0') + b'/etc/passwd'


class RecordsTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.images.qemu_img_info', mock.Mock(
                side_effect=AssertionError('looked into a disk'))))
        self.flags(instances_path=self.useFixture(fixtures.TempDir()).path,
                   host='here')
        self.context = context.get_admin_context()
        self.instance = objects.Instance(
            uuid=uuids.instance, flavor=objects.Flavor(
                root_gb=7, ephemeral_gb=3, swap=5))
        self.dir = libvirt_utils.get_instance_path(self.instance)
        os.mkdir(self.dir)
        self.saves = []
        self.stub_out(
            'nova.objects.BlockDeviceMappingList._save_driver_info',
            lambda cls, c, i, infos: self.saves.append(infos))
        self.mapping = {
            'root': {'dev': 'vda'}, 'disk': {'dev': 'vda'},
            'disk.swap': {'dev': 'vdb'}, 'disk.config': {'dev': 'vdd'},
            '/dev/vdc': {'dev': 'vdc'}, 'unit': 0}

    def disks(self, *stored):
        root = objects.BlockDeviceMapping(
            id=1, uuid=uuids.root, instance_uuid=uuids.instance,
            source_type='image', destination_type='local', boot_index=0,
            guest_format=None, driver_info=None)
        swap = objects.BlockDeviceMapping(
            id=2, uuid=uuids.swap, instance_uuid=uuids.instance,
            source_type='blank', destination_type='local', boot_index=-1,
            guest_format='swap', driver_info=None)
        for bdm, record in zip((root, swap), stored):
            bdm.driver_info = metadata.dumps(record, bdm.uuid)
        self.bdms = [root, swap]
        for bdm in self.bdms:
            bdm.obj_reset_changes()
        return metadata.InstanceDisks.from_bdms(self.instance, self.bdms)

    def record(self, **kwargs):
        return metadata.LibvirtDiskMetadata(**{
            'backend': 'flat', 'format': 'raw', 'size': 7 * units.Gi,
            'state': 'ready', 'host': 'here', **kwargs})

    def write(self, name, content=b'x', info=None):
        path = os.path.join(self.dir, name)
        with open(path, 'wb') as f:
            f.write(content)
        if info:
            with open(os.path.join(self.dir, 'disk.info'), 'w') as f:
                f.write(jsonutils.dumps({path: info}))
        return path

    def guest(self, name, source_type, driver_format, **kwargs):
        disk = vconfig.LibvirtConfigGuestDisk()
        disk.source_type = source_type
        disk.driver_format = driver_format
        for key, value in kwargs.items():
            setattr(disk, key, value)
        if source_type == 'file':
            disk.source_path = os.path.join(self.dir, name)
        config = vconfig.LibvirtConfigGuest()
        config.devices = [vconfig.LibvirtConfigGuestInterface(), disk]
        return config


@ddt.ddt
class TestTakeUp(RecordsTestCase):

    def take_up(self, disks, guest=None):
        records.take_up(disks, self.mapping, guest, 'qcow2', {})
        disks.save(self.context)

    def test_all_disks_in_one_save(self):
        for name in ('disk', 'disk.swap', 'disk.config'):
            self.write(name)
        disks = self.disks()
        self.take_up(disks)
        self.assertEqual([{uuids.root, uuids.swap}],
                         [set(infos) for infos in self.saves])
        self.assertEqual(
            [('disk', 'ready', 7 * units.Gi), ('disk.config', 'ready', 0),
             ('disk.swap', 'ready', 5 * units.Mi)],
            [(name, r.state, r.size) for name, r in disks.items()])
        self.assertIs(disks.get('disk'), self.mapping['disk']['metadata'])
        self.assertNotIn('metadata', self.mapping['root'])

    def test_disk_that_is_noted_as_left(self):
        """An evacuation has failed, and its destination's records went."""
        volume, disks = uuids.instance + '_disk', self.disks()
        other = ('there', 'p', volume)
        disks.leftovers = [('here', 'p', volume), other]
        self.take_up(disks, self.guest(
            'disk', 'volume', 'qcow2', source_pool='p', source_volume=volume))
        self.assertEqual(volume, disks.get('disk').volume)
        self.assertEqual([other], disks.leftovers)

    def test_second_time_nothing_is_saved(self):
        self.write('disk')
        self.take_up(self.disks())
        again = metadata.InstanceDisks.from_bdms(self.instance, self.bdms)
        self.saves.clear()
        self.take_up(again)
        self.assertEqual([], self.saves)

    def test_record_wins_over_guest_and_file(self):
        self.write('disk', HOSTILE, info='qcow2')
        disks = self.disks(self.record())
        self.take_up(disks, self.guest('disk', 'file', 'qcow2'))
        self.assertEqual('raw', self.mapping['disk']['metadata'].format)

    @ddt.data(
        ({'host': 'old'}, 'qcow2'), ({'host': 'here'}, 'raw'),
        ({'host': 'old', 'state': 'building'}, 'raw'),
        ({'host': 'old', 'backend': 'rbd'}, 'raw'))
    @ddt.unpack
    def test_disk_that_an_older_compute_has_brought(self, stored, expected):
        # Bug 2038898: it has made qcow2 of a raw disk on the way.
        disks = self.disks(self.record(**stored))
        self.take_up(disks, self.guest('disk', 'file', 'qcow2'))
        self.assertEqual(expected, self.mapping['disk']['metadata'].format)
        self.assertEqual('here' if expected == 'qcow2' else stored['host'],
                         disks.get('disk').host)

    def test_record_of_another_host_and_no_guest(self):
        self.write('disk', HOSTILE, info='qcow2')
        disks = self.disks(self.record(host='old'))
        self.take_up(disks)
        self.assertEqual('raw', self.mapping['disk']['metadata'].format)
        self.assertEqual([], self.saves)

    def test_disks_of_a_rescue_that_is_over(self):
        disks = self.disks(self.record())
        disks.set('disk.rescue', self.record())
        self.take_up(disks)
        self.assertIsNone(disks.get('disk.rescue'))

    def test_broken_record_touches_nothing(self):
        self.write('disk')
        disks = self.disks()
        self.bdms[0].driver_info = '{'
        self.assertRaises(exception.InvalidDiskMetadata, self.take_up, disks)
        self.assertEqual([], self.saves)


@ddt.ddt
class TestBegin(RecordsTestCase):

    def test_made_anew_after_a_move(self):
        disks = self.disks(self.record(), self.record(
            state='building', previous=self.record(host='other')))
        self.write('disk')
        self.begin(disks)
        self.assertEqual(('building', 'here', 'other'), (
            disks.get('disk.swap').state, disks.get('disk.swap').host,
            disks.get('disk.swap').previous.host))

    def begin(self, disks, **kwargs):
        backend = imagebackend.Backend(True)
        self.there = records.begin(
            disks, self.mapping, None, lambda name, mapping: backend.by_name(
                self.instance, name,
                'raw' if name.startswith('disk.config') else None,
                disk_info_mapping=mapping), 'qcow2', {}, **kwargs)
        disks.save(self.context)

    def test_new_disks(self):
        disks = self.disks()
        self.begin(disks)
        self.assertEqual(
            [('disk', 'qcow2', 'qcow2'), ('disk.config', 'flat', 'raw'),
             ('disk.swap', 'qcow2', 'qcow2')],
            [(name, r.backend, r.format) for name, r in disks.items()])
        self.assertEqual(['disk', 'disk.config', 'disk.swap'],
                         disks.building())
        self.assertEqual([], self.there)
        self.assertEqual(1, len(self.saves))
        records.attach(disks, self.mapping)
        disks.mark('ready')
        disks.save(self.context)
        self.assertEqual(2, len(self.saves))

    def test_disk_that_is_there_stays_what_it_is(self):
        self.write('disk', HOSTILE)
        disks = self.disks(self.record())
        self.begin(disks)
        self.assertEqual(('flat', 'raw', 'ready'), (
            disks.get('disk').backend, disks.get('disk').format,
            disks.get('disk').state))
        self.assertEqual('building', disks.get('disk.swap').state)
        self.assertEqual(['disk'], self.there)

    def test_ready_is_not_trusted_without_the_disk(self):
        disks = self.disks(self.record())
        self.begin(disks)
        self.assertEqual(('qcow2', 'building'), (
            disks.get('disk').backend, disks.get('disk').state))

    def begin_without(self, error, **record):
        """On a host that can have no disk of the record's backend."""
        if record['backend'].startswith('libvirt-storage'):
            record.update(pool='disks', volume='%s_disk' % uuids.instance)
        disks = self.disks(self.record(**record))

        def image_of(name, mapping):
            if 'metadata' in mapping:
                raise error
            return imagebackend.Backend(True).by_name(
                self.instance, name, disk_info_mapping=mapping)

        self.assertEqual([], records.begin(
            disks, {'disk': {'dev': 'vda'}}, None, image_of, 'qcow2', {}))
        return disks.get('disk')

    NO_POOL = exception.StoragePoolNotFound(pool='disks', host='here')
    NO_GROUP = RuntimeError('You should specify images_volume_group')

    @ddt.data(('libvirt-storage', NO_POOL), ('lvm', NO_GROUP))
    @ddt.unpack
    def test_evacuated_to_a_host_that_lacks_the_pool(self, backend, error):
        record = self.begin_without(error, host='dead', backend=backend)
        self.assertEqual(('qcow2', 'building', 'here'),
                         (record.backend, record.state, record.host))

    @ddt.data(
        ('here', 'libvirt-storage', NO_POOL), ('here', 'lvm', NO_GROUP),
        # It isn't lost.
        ('dead', 'libvirt-storage-rbd', NO_POOL), ('dead', 'rbd', NO_GROUP),
        # It may be a pool that both hosts see.
        ('dead', 'libvirt-storage', exception.StoragePoolInactive(
            pool='disks', host='here')))
    @ddt.unpack
    def test_pool_that_should_be_here(self, host, backend, error):
        self.assertRaises(type(error), self.begin_without, error, host=host,
                          backend=backend)

    @ddt.data(('there', True), ('here', False))
    @ddt.unpack
    def test_begun_on_another_host(self, host, is_left):
        """An unshelve has failed there; an evacuation would find it."""
        volume = '%s_disk' % uuids.instance
        disks = self.disks(self.record(
            backend='libvirt-storage', pool='p', volume=volume, host=host,
            state='building'))
        image = mock.Mock()
        image.metadata.side_effect = lambda size: self.record(
            state='building', size=size)
        records.begin(disks, {'disk': {'dev': 'vda'}}, None,
                      lambda name, mapping: image, 'qcow2', {})
        self.assertEqual(('building', 'here'), (
            disks.get('disk').state, disks.get('disk').host))
        self.assertEqual([('there', 'p', volume)] if is_left else [],
                         [tuple(left) for left in disks.leftovers])
        self.assertEqual(is_left, not image.delete.called)

    def test_half_made_disk_is_made_anew(self):
        path = self.write('disk')
        disks = self.disks(self.record(state='building'))
        self.begin(disks)
        self.assertFalse(os.path.exists(path))
        self.assertEqual('building', disks.get('disk').state)

    @mock.patch('nova.storage.rbd_utils.RBDDriver')
    def test_unrecorded_image_on_ceph_is_kept(self, rbd_driver):
        """An evacuation that fails before the guest starts, and another."""
        self.flags(images_type='rbd', images_rbd_pool='pool', group='libvirt')
        names = ('disk', 'disk.swap')
        self.mapping.pop('disk.config')
        rbd_driver.return_value.exists.return_value = True
        disks = self.disks()
        for host in ('here', 'there'):
            self.flags(host=host)
            self.begin(disks)
            self.assertEqual(
                [('rbd', 'raw', 'ready', host)] * 2,
                [(r.backend, r.format, r.state, r.host)
                 for r in map(disks.get, names)])
            self.assertEqual(names, tuple(self.there))
        rbd_driver.return_value.remove_image.assert_not_called()

    @mock.patch('nova.storage.rbd_utils.RBDDriver')
    def test_image_on_ceph_of_another_cell(self, rbd_driver):
        self.flags(images_type='rbd', images_rbd_pool='pool', group='libvirt')
        rbd_driver.return_value.exists.return_value = True
        self.instance.task_state = task_states.RESIZE_FINISH
        self.instance.host, self.instance.hidden = 'there', True
        disks = self.disks()
        self.assertRaises(
            exception.StorageImageOfAnotherCell, self.begin, disks)
        self.assertIsNone(disks.get('disk'))
        # Within a cell nothing is hidden.
        self.instance.hidden = False
        self.begin(disks)
        self.assertEqual('ready', disks.get('disk').state)

    @mock.patch('nova.storage.rbd_utils.RBDDriver')
    def test_unrecorded_image_on_ceph_is_not_there(self, rbd_driver):
        self.flags(images_type='rbd', images_rbd_pool='pool', group='libvirt')
        rbd_driver.return_value.exists.return_value = False
        disks = self.disks()
        self.begin(disks)
        self.assertEqual('building', disks.get('disk').state)

    def test_evacuated_on_shared_storage(self):
        path = self.write('disk')
        disks = self.disks(self.record(host='other'))
        self.begin(disks)
        self.assertEqual(('here', 'ready'), (
            disks.get('disk').host, disks.get('disk').state))
        self.assertTrue(os.path.exists(path))

    @ddt.data(True, False)
    def test_made_anew_where_they_are_not(self, is_shared):
        """What the other host has left would pass for them some day."""
        taken = {}
        disks = self.disks(*[self.record(
            backend='libvirt-storage', host='other', pool='p',
            volume='%s_%s' % (uuids.instance, name))
            for name in ('disk', 'disk.swap')])

        def image_of(name, mapping):
            taken[name] = mapping.get('taken')
            image = mock.Mock()
            image.exists.return_value = is_shared and name == 'disk'
            image.metadata.return_value = self.record(
                backend='libvirt-storage', state='building', pool='p',
                volume='%s_%s' % (uuids.instance, name))
            return image

        records.begin(disks, self.mapping, None, image_of, 'qcow2', {})
        self.assertEqual('here', disks.get('disk.swap').host)
        left = {'%s_%s' % (uuids.instance, name)
                for name in ('disk', 'disk.swap')[is_shared:]}
        self.assertEqual({('other', 'p', volume) for volume in left},
                         {tuple(place) for place in disks.leftovers})
        self.assertEqual(left, taken['disk.swap'])

    @ddt.data(('here', 'ready'), ('other', 'building'))
    @ddt.unpack
    def test_old_copy_is_not_the_other_hosts_disk(self, host, state):
        path, volume = self.write('disk'), uuids.instance + '_disk'
        disks = self.disks(self.record(host=host, pool='p', volume=volume))
        self.begin(disks, stale={('p', volume)})
        self.assertEqual(('here', state), (
            disks.get('disk').host, disks.get('disk').state))
        self.assertTrue(os.path.exists(path))

    def test_old_copy_beside_the_disk_on_shared_storage(self):
        self.write('disk')
        volume = uuids.instance + '_disk'
        disks = self.disks(self.record(
            host='other', pool='p', volume=volume + '.1'))
        self.begin(disks, stale={('p', volume)})
        self.assertEqual(('here', 'ready', volume + '.1'), (
            disks.get('disk').host, disks.get('disk').state,
            disks.get('disk').volume))

    def test_rescue_makes_its_own_disks_alone(self):
        self.write('disk')
        self.mapping = {'disk': {}, 'disk.rescue': {},
                        'disk.config.rescue': {}}
        disks = self.disks(self.record())
        self.begin(disks, suffix='.rescue')
        self.assertEqual(['disk.config.rescue', 'disk.rescue'],
                         disks.building())

    @ddt.data(
        ('flat', 'raw', imagebackend.Flat),
        ('flat', 'qcow2', imagebackend.Flat),
        ('qcow2', 'qcow2', imagebackend.Qcow2),
        ('lvm', 'raw', imagebackend.Lvm), ('rbd', 'raw', imagebackend.Rbd),
        ('ploop', 'ploop', imagebackend.Ploop))
    @ddt.unpack
    def test_configuration_does_not_change_what_a_disk_is(
            self, backend, disk_format, expected):
        self.flags(images_volume_group='vg', images_rbd_pool='pool',
                   group='libvirt')
        self.useFixture(fixtures.MockPatch(
            'nova.storage.rbd_utils.RBDDriver'))
        self.instance.ephemeral_key_uuid = None
        self.write('disk', HOSTILE)
        record = self.record(backend=backend, format=disk_format)
        for images_type in ('qcow2', 'raw', 'lvm', 'rbd'):
            self.flags(images_type=images_type, group='libvirt')
            for cow in (True, False):
                image = imagebackend.Backend(cow).by_name(
                    self.instance, 'disk',
                    disk_info_mapping={'metadata': record})
                self.assertIsInstance(image, expected)
                self.assertEqual(disk_format, image.driver_format)

    def test_disk_info_is_written_and_not_read(self):
        path = self.write('disk', HOSTILE, info='qcow2')
        for _n in range(2):
            image = imagebackend.Backend(True).by_name(
                self.instance, 'disk', disk_info_mapping={
                    'metadata': self.record()})
            self.assertEqual('raw', image.driver_format)
        with open(os.path.join(self.dir, 'disk.info')) as f:
            self.assertEqual({path: 'raw'}, jsonutils.loads(f.read()))

    @ddt.data('raw', 'qcow2')
    def test_snapshot_takes_the_format_of_the_guest(self, disk_format):
        # There is no disk.info, and the disk itself isn't asked.
        path = self.write('disk', HOSTILE)
        image = imagebackend.Backend(True).by_libvirt_path(
            self.instance, path, disk_format, disk_format)
        self.assertEqual(disk_format, image.driver_format)


@ddt.ddt
class TestFinished(RecordsTestCase):

    def finish(self, disks, suffix=''):
        backend = imagebackend.Backend(True)
        self.images = {}

        def image_of(name, mapping):
            self.images[name] = backend.by_name(
                self.instance, name, disk_info_mapping=mapping)
            return self.images[name]

        records.finished(disks, image_of, suffix)
        disks.save(self.context)

    def test_rescue_finishes_its_own_disks_alone(self):
        disks = self.disks(self.record(state='building'))
        for name in ('disk.rescue', 'disk.config.rescue'):
            disks.set(name, self.record(state='building'))
        self.finish(disks, '.rescue')
        self.assertEqual(['disk'], disks.building())

    def test_spawn_finishes_all_in_one_save(self):
        disks = self.disks(self.record(state='building'),
                           self.record(state='building'))
        self.finish(disks)
        self.assertEqual([], disks.building())
        self.assertEqual(1, len(self.saves))

    def test_resized(self):
        disks = self.disks(self.record(size=units.Gi))
        self.finish(disks)
        self.assertEqual(7 * units.Gi, disks.get('disk').size)

    def test_ephemeral_disk_of_the_flavor_is_resized(self):
        disks = self.disks(self.record())
        for name in ('disk.local', 'disk.eph0'):
            disks.set(name, self.record(size=units.Gi))
        self.finish(disks)
        self.assertEqual((3 * units.Gi, units.Gi), (
            disks.get('disk.local').size, disks.get('disk.eph0').size))

    def test_larger_than_the_flavor(self):
        """As a resize of a legacy disk that has failed leaves it."""
        disks = self.disks(self.record(size=8 * units.Gi))
        self.finish(disks)
        self.assertEqual(8 * units.Gi, disks.get('disk').size)

    @ddt.data((8, 8), (2, 2), (1, 2))
    @ddt.unpack
    def test_grown_for_what_has_failed(self, is_, noted):
        disks = self.disks(self.record(
            backend='libvirt-storage', pool='p', size=2 * units.Gi,
            volume=self.instance.uuid + '_disk'))
        image = mock.Mock(get_disk_size=lambda volume: is_ * units.Gi)
        records.note_grown(disks, lambda name, mapping: image)
        self.assertEqual(noted * units.Gi, disks.get('disk').size)

    @ddt.data({'backend': 'lvm'}, {'root_gb': 0})
    def test_not_resized(self, given):
        self.instance.flavor.root_gb = given.pop('root_gb', 7)
        disks = self.disks(self.record(size=units.Gi, **given))
        self.finish(disks)
        self.assertEqual(units.Gi, disks.get('disk').size)


@ddt.ddt
class TestDiscard(RecordsTestCase):
    """What an earlier try has left is not taken for a disk."""

    def discard(self, record, exists=True):
        image = mock.Mock()
        image.exists.return_value = exists
        disks = self.disks(record)
        self.assertEqual({'disk': image} if record.is_building else {},
                         records.discard_unfinished(
                             disks, lambda name, mapping: image))
        return image.discard.called

    def test_on_ceph(self):
        """Whichever host has begun it, its snapshots go with it."""
        image = mock.Mock()
        for host in ('here', 'other'):
            records._discard(image, self.record(
                backend='libvirt-storage-rbd', state='building', host=host))
        self.assertEqual(2, image.delete.call_count)
        records._discard(image, self.record(
            backend='libvirt-storage-rbd', host='other'))
        self.assertEqual(2, image.delete.call_count)

    @ddt.data('flat', 'qcow2', 'lvm', 'rbd', 'ploop')
    def test_begun_here(self, backend):
        self.assertTrue(self.discard(
            self.record(backend=backend, state='building')))

    @ddt.data(('flat', False), ('lvm', False), ('rbd', True))
    @ddt.unpack
    def test_begun_on_another_host(self, backend, expected):
        self.assertEqual(expected, self.discard(
            self.record(backend=backend, state='building', host='other')))

    def test_not_there(self):
        self.assertFalse(self.discard(
            self.record(state='building'), exists=False))

    def test_finished(self):
        self.assertFalse(self.discard(self.record()))

    def test_file(self):
        path = self.write('disk')
        for _n in range(2):
            imagebackend.Flat(self.instance, 'disk', disk_info_mapping={
                'metadata': self.record()}).discard()
            self.assertFalse(os.path.exists(path))

    @mock.patch('nova.virt.libvirt.storage.lvm.remove_volumes')
    @mock.patch('nova.virt.libvirt.storage.dmcrypt.delete_volume')
    def test_logical_volume(self, delete_volume, remove_volumes):
        self.flags(images_volume_group='vg', group='libvirt')
        self.instance.ephemeral_key_uuid = None
        name = '%s_disk' % uuids.instance
        imagebackend.Lvm(self.instance, 'disk').discard()
        delete_volume.assert_not_called()
        self.instance.ephemeral_key_uuid = uuids.key
        self.flags(enabled=True, group='ephemeral_storage_encryption')
        self.flags(fixed_key='ab' * 32, group='key_manager')
        imagebackend.Lvm(self.instance, 'disk').discard()
        delete_volume.assert_called_once_with(name + '-dmcrypt')
        self.assertEqual([mock.call(['/dev/vg/' + name])] * 2,
                         remove_volumes.mock_calls)

    @mock.patch('nova.storage.rbd_utils.RBDDriver')
    def test_rbd_images_are_recorded_as_raw(self, rbd_driver):
        rbd_driver.return_value.rbd_user = 'user'
        rbd_driver.return_value.ceph_conf = 'conf'
        rbd_driver.return_value.pool = 'pool'
        self.flags(images_rbd_pool='pool', images_rbd_ceph_conf='conf',
                   group='libvirt')
        record = imagebackend.Rbd(self.instance, 'disk').metadata(5)
        self.assertEqual(('rbd', 'raw', 5),
                         (record.backend, record.format, record.size))

    @mock.patch('nova.storage.rbd_utils.RBDDriver')
    def test_rbd_image(self, rbd_driver):
        self.flags(images_rbd_pool='pool', images_rbd_ceph_conf='conf',
                   group='libvirt')
        imagebackend.Rbd(self.instance, 'disk').discard()
        rbd_driver.return_value.remove_image.assert_called_once_with(
            '%s_disk' % uuids.instance)


@ddt.ddt
class TestMoves(RecordsTestCase):

    def test_there_and_back(self):
        disks = self.disks(self.record(host='other', format='qcow2',
                                       backend='qcow2'))
        records.arrived(disks, [])
        here = disks.get('disk')
        self.assertEqual(('here', 'other'), (here.host, here.previous.host))
        here.backend = 'flat'
        self.flags(host='other')
        records.went_back(disks)
        back = disks.get('disk')
        self.assertEqual(('other', 'qcow2', None),
                         (back.host, back.backend, back.previous))

    def test_made_on_the_other_host_and_back(self):
        disks = self.disks(self.record())
        disks.set('disk.swap', self.record(host='other'))
        records.went_back(disks)
        self.assertEqual(['disk'], [name for name, _r in disks.items()])
        self.assertEqual([], disks.leftovers)

    @ddt.data(('disk.swap', 'other', 0, True), ('disk.local', 'here', 0, True),
              ('disk.local', 'here', 1, False),
              ('disk.eph0', 'here', 0, False))
    @ddt.unpack
    def test_made_on_ceph_and_back(self, name, host, size, is_left):
        """It is seen from here, whichever host has made it."""
        self.instance.flavor.ephemeral_gb = size
        self.instance.flavor.swap = size
        disks = self.disks(self.record())
        disks.set(name, self.ceph_record(host=host))
        records.went_back(disks)
        self.assertEqual(not is_left, disks.get(name) is not None)
        self.assertEqual([('here', 'p', 'v')] if is_left else [],
                         [tuple(left) for left in disks.leftovers])

    @ddt.data('disk', 'disk.eph0', 'disk.config', 'disk.local', 'disk.swap')
    def test_on_ceph_all_the_time(self, name):
        """That a move to this host has come was never on record."""
        self.instance.flavor.ephemeral_gb = self.instance.flavor.swap = 1
        disks = self.disks(self.record())
        disks.set(name, self.ceph_record(host='other', migration_id=7))
        records.went_back(disks)
        self.assertEqual([], disks.leftovers)
        self.assertEqual(('here', None), (
            disks.get(name).host, disks.get(name).migration_id))

    @ddt.data(('ready', 'libvirt-storage-rbd'), ('ready', 'rbd'),
              ('building', 'rbd'))
    @ddt.unpack
    def test_adopt(self, state, backend):
        disks = self.disks(self.record(host='other'))
        disks.set('disk.swap', self.record(
            backend=backend, host='other', state=state))
        records.adopt(disks)
        self.assertEqual(
            ('other', 'here' if state == 'ready' else 'other'),
            tuple(record.host for _name, record in disks.items()))

    @ddt.data(('here', 0, True), ('other', 0, False), ('here', 1, False))
    @ddt.unpack
    def test_made_on_one_host_and_back(self, host, size, is_left):
        """What another host has made in a pool of its own isn't here."""
        self.instance.flavor.ephemeral_gb = size
        disks = self.disks(self.record())
        disks.set('disk.local', self.record(
            backend='libvirt-storage', pool='p', volume='v', host=host))
        records.went_back(disks)
        self.assertEqual(bool(size), disks.get('disk.local') is not None)
        self.assertEqual([('here', 'p', 'v')] if is_left else [],
                         [tuple(left) for left in disks.leftovers])

    def ceph_record(self, **more):
        return self.record(backend='libvirt-storage-rbd', pool='p',
                           volume='v', **more)

    @ddt.data(({}, {'disk.local', 'disk.swap'}),
              ({'swap': 64}, {'disk.local'}),
              ({'ephemeral_gb': 1}, {'disk.swap'}), (None, set()))
    @ddt.unpack
    def test_brought_by_resize(self, old, expected):
        self.assertEqual(set(), records.brought_by_resize(self.instance))
        self.instance.old_flavor = old if old is None else objects.Flavor(
            **{'swap': 0, 'ephemeral_gb': 0, **old})
        self.assertEqual(expected, records.brought_by_resize(self.instance))

    def test_converted_by_an_older_compute(self):
        disks = self.disks(self.record(previous=self.record(host='there')))
        records.arrived(disks, [
            {'type': 'qcow2', 'path': '/disk', 'virt_disk_size': 7}])
        self.assertEqual(
            ('qcow2', 'qcow2', 7, 'here', None),
            tuple(getattr(disks.get('disk'), name) for name in (
                'backend', 'format', 'size', 'host', 'previous')))

    @ddt.data(('there', True), ('here', True), ('there', False))
    @ddt.unpack
    def test_made_anew_by_an_older_compute(self, host, has_come):
        """It was evacuated there, or reverted to it."""
        if has_come:
            self.write('disk')
        volume = '%s_disk' % uuids.instance
        disks = self.disks(self.record(
            backend='libvirt-storage', pool='p', volume=volume, host=host))
        records.arrived(disks, [
            {'type': 'qcow2', 'path': '/x/disk', 'virt_disk_size': 7}])
        record = disks.get('disk')
        self.assertEqual('here', record.host)
        self.assertEqual('qcow2' if has_come else 'libvirt-storage',
                         record.backend)
        self.assertEqual([(host, 'p', volume)] if has_come else [],
                         [tuple(left) for left in disks.leftovers])

    def test_live_migrated_by_an_older_compute(self):
        volume = '%s_disk' % uuids.instance
        disks = self.disks(self.record(
            backend='libvirt-storage', format='qcow2', pool='p',
            volume=volume, host='dead'))
        records.moved(disks, self.guest('disk', 'file', 'raw'))
        record = disks.get('disk')
        self.assertEqual(('flat', 'raw', 'here', None), (
            record.backend, record.format, record.host, record.volume))
        self.assertEqual([('dead', 'p', volume)],
                         [tuple(left) for left in disks.leftovers])

    def test_live_migrated_by_an_older_compute_back_to_its_host(self):
        """That was away when the server was evacuated to the older one."""
        volume = uuids.instance + '_disk'
        disks = self.disks(self.record(
            backend='libvirt-storage', pool='p', volume=volume))
        records.moved(disks, self.guest('disk', 'file', 'qcow2'))
        self.assertEqual(
            ('qcow2', None), (disks.get('disk').backend,
                              disks.get('disk').volume))
        self.assertEqual([('here', 'p', volume)],
                         [tuple(left) for left in disks.leftovers])

    def test_live_migrated_volume(self):
        volume = '%s_disk' % uuids.instance
        disks = self.disks(self.record(
            backend='libvirt-storage', pool='p', volume=volume, host='other'))
        records.moved(disks, self.guest(
            'disk', 'volume', 'raw', source_pool='p', source_volume=volume))
        self.assertEqual(('libvirt-storage', 'here', volume), tuple(
            getattr(disks.get('disk'), name)
            for name in ('backend', 'host', 'volume')))

    def test_from_an_older_compute(self):
        disks = self.disks()
        records.arrived(disks, [
            {'path': '/x/disk', 'type': 'raw', 'virt_disk_size': 9},
            {'path': '/x/disk.eph0', 'type': 'qcow2', 'virt_disk_size': 8}])
        self.assertEqual(
            [('disk', 'flat', 'raw', 9), ('disk.eph0', 'qcow2', 'qcow2', 8)],
            [(n, r.backend, r.format, r.size) for n, r in disks.items()])

    def test_back_from_a_move_that_an_earlier_one_went_before(self):
        disks = self.disks(self.record(previous=self.record(
            format='qcow2', backend='qcow2')))
        records.went_back(disks)
        self.assertEqual('raw', disks.get('disk').format)

    def test_destroyed_disks_of_this_host(self):
        disks = self.disks(self.record(), self.record(host='other'))
        records.destroyed(disks)
        disks.save(self.context)
        self.assertEqual(['disk.swap'], [n for n, _r in disks.items()])
        self.assertEqual([{uuids.root: None}], self.saves)

    @ddt.data(task_states.REBUILDING, task_states.SHELVING_OFFLOADING,
              task_states.DELETING, None)
    def test_destroyed_is_not_what_it_was_before(self, task_state):
        self.instance.task_state = task_state
        disks = self.disks(self.record(previous=self.record(host='other')))
        records.destroyed(disks)
        self.assertIsNone(disks.get('disk'))

    @ddt.data(
        ('libvirt-storage', 'other', task_states.REBUILDING, True),
        ('libvirt-storage', 'here', task_states.REBUILDING, False),
        ('flat', 'other', task_states.REBUILDING, False),
        ('libvirt-storage-rbd', 'other', task_states.REBUILDING, True),
        # An evacuation has failed: it may be the last copy.
        ('libvirt-storage', 'other', task_states.REBUILD_SPAWNING, False))
    @ddt.unpack
    def test_destroyed_here_and_kept_elsewhere(
            self, backend, host, task_state, is_left):
        """A resize has failed here, and the server is rebuilt."""
        self.instance.task_state = task_state
        volume = uuids.instance + '_disk'
        disks = self.disks(self.record(
            backend='libvirt-storage', pool='p', volume=volume,
            previous=self.record(backend=backend, host=host, **(
                {} if backend == 'flat' else {'pool': 'q', 'volume': volume})
            )))
        records.forget(self.context, disks)
        self.assertIsNone(disks.get('disk'))
        self.assertEqual([('other', 'q', volume)] if is_left else [],
                         [tuple(left) for left in disks.leftovers])

    @ddt.data(('_disk', False), ('_disk.1', True))
    @ddt.unpack
    def test_destroyed_on_ceph_and_kept_elsewhere(self, volume, is_left):
        """The original in another Ceph pool, but not the image itself."""
        self.instance.task_state = task_states.REBUILDING
        original = uuids.instance + '_disk'
        disks = self.disks(self.record(
            backend='libvirt-storage-rbd', pool='p',
            volume=uuids.instance + volume, previous=self.record(
                backend='libvirt-storage-rbd', host='other', pool='p',
                volume=original)))
        records.forget(self.context, disks)
        self.assertEqual([('other', 'p', original)] if is_left else [],
                         [tuple(left) for left in disks.leftovers])

    @ddt.data((task_states.REBUILDING, 'building', True),
              (task_states.SHELVING_OFFLOADING, 'building', True),
              # One volume that both hosts see: it was destroyed.
              (task_states.REBUILDING, 'ready', False),
              # Left behind by the guest; the disk is there.
              (None, 'building', False))
    @ddt.unpack
    def test_destroyed_here_and_begun_elsewhere(
            self, task_state, state, is_left):
        """The destination of a live migration has died, and made volumes."""
        self.instance.task_state = task_state
        volume = uuids.instance + '_disk'
        disks = self.disks(self.record(
            backend='libvirt-storage', pool='p', volume=volume,
            next=self.record(backend='libvirt-storage', host='other',
                             state=state, pool='q', volume=volume)))
        records.forget(self.context, disks)
        self.assertEqual([('other', 'q', volume)] if is_left else [],
                         [tuple(left) for left in disks.leftovers])

    @ddt.data((task_states.REBUILDING, 1), (task_states.SHELVING, 1),
              (task_states.RESIZE_REVERTING, 0), (None, 0))
    @ddt.unpack
    def test_destroyed_with_a_broken_record(self, task_state, saves):
        # The way out of a broken record is a rebuild; where a disk may be
        # another host's nothing is forgotten.
        self.instance.task_state = task_state
        disks = self.disks(self.record())
        self.bdms[0].driver_info = '{'
        records.forget(self.context, disks)
        self.assertEqual([{uuids.root: None}] * saves, self.saves)

    def test_destroyed_after_the_mappings(self):
        disks = self.disks(self.record())
        with mock.patch.object(
                objects.BlockDeviceMappingList, '_save_driver_info',
                side_effect=exception.BDMNotFound(id=1)) as save:
            records.forget(self.context, disks)
        save.assert_called_once()

    def test_destroyed_and_no_conductor(self):
        disks = self.disks(self.record())
        with mock.patch.object(
                objects.BlockDeviceMappingList, '_save_driver_info',
                side_effect=messaging.MessagingTimeout):
            self.assertRaises(messaging.MessagingTimeout, records.forget,
                              self.context, disks)

    def test_destroyed_on_the_way_back(self):
        # A revert: what was kept for it is the disk again.
        self.instance.task_state = task_states.RESIZE_REVERTING
        disks = self.disks(self.record(
            previous=self.record(host='other', size=6)))
        records.destroyed(disks)
        self.assertEqual(('other', 6, None), (
            disks.get('disk').host, disks.get('disk').size,
            disks.get('disk').previous))

    def test_size_after_a_revert_on_one_host(self):
        disks = self.disks(self.record(size=20 * units.Gi))
        records.went_back(disks)
        self.assertEqual(7 * units.Gi, disks.get('disk').size)

    def test_size_after_a_revert_of_a_disk_that_was_larger(self):
        disks = self.disks(self.record(
            backend='libvirt-storage', pool='p',
            volume=self.instance.uuid + '_disk',
            size=8 * units.Gi))
        records.went_back(disks)
        self.assertEqual(8 * units.Gi, disks.get('disk').size)

    def test_live_migrated_with_a_broken_record(self):
        disks = self.disks(self.record(host='other'))
        self.bdms[0].driver_info = '{'
        records.moved(disks, None)
        disks.save(self.context)
        self.assertEqual([], self.saves)
        self.assertIn('set it to NULL', self.stdlog.logger.output)

    def test_live_migrated(self):
        disks = self.disks(self.record(host='other'))
        records.moved(disks, None)
        self.assertEqual(('here', None), (disks.get('disk').host,
                                          disks.get('disk').previous))
