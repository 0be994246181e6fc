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
"""The driver's operations, with the mappings in a database."""

import itertools
from unittest import mock

import ddt
import fixtures
import oslo_messaging as messaging
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova.compute import task_states
from nova.compute import vm_states
from nova import context
from nova.db.main import api as db
from nova import exception
from nova import objects
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.virt import driver as virt_driver
from nova.virt import fake
from nova.virt.libvirt import driver
from nova.virt.libvirt.storage.records import metadata


@ddt.ddt
class TestRecordedDisks(test.TestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.LibvirtFixture())
        self.backend = self.useFixture(
            nova_fixtures.LibvirtImageBackendFixture())
        self.flags(host='here',
                   instances_path=self.useFixture(fixtures.TempDir()).path)
        self.context = context.RequestContext('user', 'project')
        self.context.auth_token = 'token'
        self.instance = objects.Instance(
            self.context, uuid=uuids.instance, project_id='project',
            flavor=objects.Flavor(
                root_gb=7, ephemeral_gb=0, swap=5, extra_specs={}),
            image_ref=uuids.image, vm_state=vm_states.BUILDING,
            task_state=task_states.SPAWNING, system_metadata={},
            config_drive='', host='here')
        self.instance.create()
        for values in (
            {'source_type': 'image', 'boot_index': 0,
             'image_id': uuids.image, 'device_name': '/dev/vda'},
            {'source_type': 'blank', 'guest_format': 'swap',
             'volume_size': 5, 'device_name': '/dev/vdb'},
        ):
            objects.BlockDeviceMapping(
                self.context, instance_uuid=self.instance.uuid,
                destination_type='local', **values).create()
        self.driver = driver.LibvirtDriver(fake.FakeVirtAPI(), False)
        for method in (
            # These read the mappings, as they do without records.
            '_build_device_metadata', '_register_undefined_instance_details',
            '_get_guest_xml', '_wait_for_running',
            '_get_existing_guest_config',
            '_get_all_assigned_mediated_devices', '_create_configdrive',
            '_get_instance_disk_info_from_config', '_reattach_instance_vifs',
            '_qemu_monitor_announce_self', '_create_images_and_backing',
            '_ensure_console_log_for_instance', 'destroy', 'get_info',
        ):
            self.patch(method)
        self.driver._get_existing_guest_config.return_value = None
        self.driver._build_device_metadata.return_value = None
        self.driver._get_guest_xml.return_value = '<domain/>'
        self.driver._get_all_assigned_mediated_devices.return_value = {}
        self.driver.get_info.return_value.state = 1
        self.patch('_create_image', side_effect=lambda *a, **k: (
            self.at_work.append(self.states()) or (True, True)))
        self.patch('_create_guest_with_network',
                   side_effect=self.create_guest)
        self.at_work = []
        self.saves = self.useFixture(
            nova_fixtures.fixtures.MockPatchObject(
                objects.BlockDeviceMappingList, '_save_driver_info',
                side_effect=self.save)
        ).mock

    def patch(self, method, **kwargs):
        patcher = mock.patch.object(self.driver, method, **kwargs)
        patcher.start()
        self.addCleanup(patcher.stop)

    def create_guest(self, *args, post_xml_callback=None, **kwargs):
        if post_xml_callback is not None:
            post_xml_callback()
        self.guest_started_with = self.states()

    def bdi(self):
        return virt_driver.get_block_device_info(
            self.instance, objects.BlockDeviceMappingList.get_by_instance_uuid(
                self.context, self.instance.uuid))

    def on_record(self):
        return metadata.InstanceDisks.load(self.context, self.instance)

    def states(self):
        with mock.patch.object(
                objects.BlockDeviceMappingList, 'get_by_instance_uuid',
                new=self.read):
            return {name: record.state
                    for name, record in self.on_record().items()}

    read = objects.BlockDeviceMappingList.get_by_instance_uuid
    save = objects.BlockDeviceMappingList._save_driver_info

    def put_on_record(self, **states):
        disks = self.on_record()
        for name, state in states.items():
            name = name.replace('_', '.')
            disks.set(name, metadata.LibvirtDiskMetadata(
                backend='flat', format='raw', state=state, host='here',
                size={'disk': 7 * units.Gi}.get(name, 5 * units.Mi)))
        disks.save(self.context)
        self.saves.reset_mock()

    def without_reads(self):
        return mock.patch.object(
            objects.BlockDeviceMappingList, 'get_by_instance_uuid',
            side_effect=AssertionError('one more round trip'))

    def spawn(self):
        bdi = self.bdi()
        with self.without_reads():
            self.driver.spawn(
                self.context, self.instance, self.instance.image_meta, [],
                None, {}, [], bdi)

    def hard_reboot(self):
        bdi = self.bdi()
        with self.without_reads():
            self.driver._hard_reboot(
                self.context, self.instance, [], objects.ShareMappingList(),
                bdi)

    def test_spawn_saves_twice_and_reads_nothing(self):
        self.spawn()
        building = {'disk': 'building', 'disk.swap': 'building'}
        ready = {'disk': 'ready', 'disk.swap': 'ready'}
        self.assertEqual([building], self.at_work)
        self.assertEqual(ready, self.guest_started_with)
        self.assertEqual(2, self.saves.call_count)

    def test_spawn_over_what_is_there(self):
        """Evacuated: if the guest can't start, its only disk isn't deleted."""
        create_guest = self.driver._create_guest_with_network
        self.spawn()
        self.assertTrue(
            create_guest.call_args.kwargs['cleanup_instance_disks'])
        disks = self.on_record()
        disks.clear('disk.swap')
        disks.save(self.context)
        self.backend.disks['disk'].exists.return_value = True
        self.spawn()
        self.assertEqual({'disk': 'ready', 'disk.swap': 'building'},
                         self.at_work[-1])
        self.assertFalse(
            create_guest.call_args.kwargs['cleanup_instance_disks'])

    def test_rebuild_begins_all_disks_anew(self):
        # destroy() was given a copy of these mappings.
        self.put_on_record(disk='ready', disk_swap='ready')
        bdi = self.bdi()
        disks = self.on_record()
        disks.clear()
        disks.save(self.context)
        self.instance.task_state = task_states.REBUILD_SPAWNING
        self.driver.spawn(self.context, self.instance,
                          self.instance.image_meta, [], None, {}, [], bdi)
        self.assertEqual([{'disk': 'building', 'disk.swap': 'building'}],
                         self.at_work)
        self.assertEqual({'disk': 'ready', 'disk.swap': 'ready'},
                         self.guest_started_with)

    def test_spawn_and_no_conductor(self):
        self.saves.side_effect = messaging.MessagingTimeout
        self.assertRaises(messaging.MessagingTimeout, self.spawn)
        self.assertEqual([], self.at_work)
        self.assertEqual({}, self.states())
        self.saves.side_effect = self.save
        self.spawn()
        self.assertEqual({'ready'}, set(self.states().values()))

    def test_spawn_and_no_conductor_at_its_end(self):
        def once(*args):
            self.saves.side_effect = messaging.MessagingTimeout
            return self.save(*args)

        self.saves.side_effect = once
        self.assertRaises(messaging.MessagingTimeout, self.spawn)
        self.assertEqual({'building'}, set(self.states().values()))
        # Never started, and the next try makes the disks anew.
        self.saves.side_effect = self.save
        for disk in self.backend.disks.values():
            disk.exists.return_value = True
        self.spawn()
        for name in ('disk', 'disk.swap'):
            self.backend.disks[name].discard.assert_called()
        self.assertEqual({'ready'}, set(self.guest_started_with.values()))

    def test_disk_usage_reads_once_and_saves_nothing(self):
        self.put_on_record(disk='ready', disk_swap='ready')
        domain = mock.Mock()
        domain.UUIDString.return_value = self.instance.uuid
        domain.XMLDesc.return_value = '<domain/>'
        with mock.patch.object(
            db, 'block_device_mapping_get_all_by_instance_uuids',
            side_effect=db.block_device_mapping_get_all_by_instance_uuids,
        ) as read, mock.patch.object(
                self.driver._host, 'list_instance_domains',
                return_value=[domain]), \
                self.without_reads():
            self.driver._get_instance_disk_info_from_config.return_value = []
            self.driver._get_disk_over_committed_size_total()
        # Nova's own read, of all instances at once.
        read.assert_called_once()
        self.driver._get_instance_disk_info_from_config.assert_called_once()
        self.saves.assert_not_called()

    def test_hard_reboot_of_recorded_disks_saves_nothing(self):
        self.put_on_record(disk='ready', disk_swap='ready')
        self.hard_reboot()
        self.saves.assert_not_called()

    @ddt.data('disk_swap', 'disk_config')
    def test_hard_reboot_makes_what_holds_nothing_of_the_guest(self, name):
        self.put_on_record(**{'disk': 'ready', 'disk_swap': 'ready',
                              name: 'building'})
        self.hard_reboot()
        self.assertEqual({'ready'}, set(self.guest_started_with.values()))
        self.assertEqual(
            name == 'disk_swap',
            self.backend.disks['disk.swap'].create_from_func.called
            if 'disk.swap' in self.backend.disks else False)
        self.driver._create_configdrive.assert_called_once()
        self.saves.assert_called_once()

    def test_hard_reboot_of_an_unfinished_root_disk(self):
        self.put_on_record(disk='building', disk_swap='building')
        error = self.assertRaises(exception.DiskNotFinished, self.hard_reboot)
        self.assertIn(self.instance.uuid, str(error))
        self.driver._create_guest_with_network.assert_not_called()
        self.assertEqual({'disk': 'building', 'disk.swap': 'building'},
                         self.states())

    def broken(self, kind):
        """Break a record in the database.

        :returns: the mapping's UUID and what is stored there
        """
        self.put_on_record(disk='ready', disk_swap='ready')
        bdms = self.read(self.context, self.instance.uuid)
        primitive = jsonutils.loads(bdms[0].driver_info)
        data = primitive['nova_object.data']
        if kind == 'version':
            primitive['nova_object.version'] = '1.3'
        elif kind == 'enum':
            data['backend'] = 'zfs'
        elif kind == 'type':
            data['size'] = ['many']
        elif kind == 'other disk':
            primitive['mapping'] = bdms[1].uuid
        text = jsonutils.dumps(primitive)
        if kind == 'truncated':
            text = text[:len(text) // 2]
        elif kind == 'huge':
            text = text.replace('here', 'h' * units.Mi)
        bdms[0].driver_info = text
        bdms.save_driver_info()
        self.saves.reset_mock()
        return bdms[0].uuid, text

    def power_on(self):
        self.driver.power_on(
            self.context, self.instance, [], self.bdi(),
            share_info=objects.ShareMappingList())

    def rescue(self):
        self.driver.rescue(
            self.context, self.instance, [], self.instance.image_meta, None,
            self.bdi(), objects.ShareMappingList())

    def migrate(self):
        self.driver.migrate_disk_and_power_off(
            self.context, self.instance, 'there', self.instance.flavor, [],
            self.bdi())

    def offer(self):
        self.driver.prepare_resize_at_dest(
            self.context, self.instance, self.instance.flavor,
            objects.Migration(id=1))

    def finish_migration(self):
        self.driver.finish_migration(
            self.context, objects.Migration(id=1, source_compute='there'),
            self.instance, '[]', [], self.instance.image_meta, True, {},
            self.bdi())

    def finish_revert(self):
        self.driver.finish_revert_migration(
            self.context, self.instance, [], objects.Migration(id=1),
            self.bdi())

    def live_migrate(self):
        self.driver.check_can_live_migrate_source(
            self.context, self.instance,
            objects.LibvirtLiveMigrateData(filename='x'), self.bdi())

    @ddt.data(*itertools.product(
        ('version', 'enum', 'type', 'truncated', 'other disk', 'huge'),
        ('spawn', 'hard_reboot', 'power_on', 'rescue', 'migrate', 'offer',
         'finish_migration', 'finish_revert', 'live_migrate')))
    @ddt.unpack
    def test_broken_record(self, kind, operation):
        mapping, text = self.broken(kind)
        for method in ('power_off', '_destroy', '_create_guest',
                       '_get_existing_domain_xml'):
            self.patch(method)
        self.driver._get_existing_domain_xml.return_value = '<domain/>'
        error = self.assertRaises(
            (exception.InvalidDiskMetadata, exception.InstanceFaultRollback,
             exception.MigrationPreCheckError), getattr(self, operation))
        # The guest runs on, and compute manager and conductor leave it ACTIVE.
        self.assertEqual(operation in ('migrate', 'offer'), isinstance(
            error, exception.InstanceFaultRollback))
        self.assertEqual(operation == 'live_migrate', isinstance(
            error, exception.MigrationPreCheckError))
        error = getattr(error, 'inner_exception', error)
        for part in (self.instance.uuid, mapping, 'set it to NULL'):
            self.assertIn(part, str(error))
        for method in ('destroy', '_destroy', 'power_off', '_create_image',
                       '_create_guest', '_create_guest_with_network'):
            getattr(self.driver, method).assert_not_called()
        self.saves.assert_not_called()
        self.assertEqual(text, self.read(
            self.context, self.instance.uuid)[0].driver_info)

    @ddt.data('version', 'truncated')
    def test_broken_record_set_to_null(self, kind):
        self.broken(kind)
        bdms = self.read(self.context, self.instance.uuid)
        bdms[0].driver_info = None
        bdms.save_driver_info()
        with mock.patch('os.path.exists', return_value=True):
            self.hard_reboot()
        self.assertEqual({'disk': 'ready', 'disk.swap': 'ready'},
                         self.states())

    def test_disks_are_on_record_before_a_migration(self):
        self.patch('power_off', side_effect=test.TestingException)
        with mock.patch('os.path.exists', return_value=True), \
            mock.patch.object(self.driver, '_is_path_shared_with'), \
                mock.patch.object(self, 'bdi', return_value=self.bdi()), \
                self.without_reads():
            self.assertRaises(test.TestingException, self.migrate)
        self.saves.assert_called_once()
        self.assertEqual({'disk': 'ready', 'disk.swap': 'ready'},
                         self.states())

    def test_migration_of_an_unfinished_disk_is_refused(self):
        self.put_on_record(disk='building', disk_swap='ready')
        self.patch('power_off')
        error = self.assertRaises(
            exception.InstanceFaultRollback, self.migrate)
        self.assertIn('never finished', str(error.inner_exception))
        self.driver.power_off.assert_not_called()

    def test_disks_of_a_live_migrated_guest(self):
        self.put_on_record(disk='ready', disk_swap='ready')
        self.flags(host='there')
        bdi = self.bdi()
        with self.without_reads():
            self.driver.post_live_migration_at_destination(
                self.context, self.instance, [], block_device_info=bdi)
        self.saves.assert_called_once()
        self.assertEqual({'there'}, {
            record.host for _name, record in self.on_record().items()})

    def test_disks_are_on_record_before_a_live_migration(self):
        bdi = self.bdi()
        with mock.patch.object(
                self.driver, '_is_shared_block_storage',
                side_effect=test.TestingException), \
            mock.patch('os.path.exists', return_value=True), \
                self.without_reads():
            self.assertRaises(
                test.TestingException,
                self.driver.check_can_live_migrate_source, self.context,
                self.instance, objects.LibvirtLiveMigrateData(filename='x'),
                bdi)
        self.saves.assert_called_once()
        self.assertEqual({'disk': 'ready', 'disk.swap': 'ready'},
                         self.states())
