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
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova import objects
from nova.tests.unit.virt.libvirt.storage.live import test_plan
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.live import receive
from nova.virt.libvirt.storage.live import settle

POOL, BASES = two_hosts.POOL, two_hosts.BASES
BASE = imagecache.get_cache_fname(uuids.image)


class ReceiveTestCase(test_plan.PlanTestCase):
    """What dest does with what source has planned."""

    def setUp(self):
        super().setUp()
        self.flags(host='source')
        self.local.get_address = lambda: '192.0.2.1'
        self.configs = []
        create = two_hosts.Pool.create

        def created(pool, config):
            self.configs.append(config)
            return create(pool, config)

        self.stub_out(two_hosts.__name__ + '.Pool.create', created)
        self.stub_out(two_hosts.__name__ + '.Pool.refresh',
                      lambda pool, timeout=None: None)
        self.available = {}
        self.stub_out(
            'nova.virt.libvirt.storage.pool.usage.measure',
            lambda pool: ('device', 1 << 40, self.available.get(
                pool.name, 1 << 40)))
        self.stub_out(
            'nova.virt.libvirt.imagebackend._get_base_format',
            lambda path: 'raw')
        self.instance.host = 'source'

    def plan(self):
        found = super().plan()
        self.guests = {'source': 0}
        return found

    def receiver(self):
        self.flags(host='dest')
        local = mock.Mock(wraps=self.local, uri='dest:///')
        local.get_connection.side_effect = lambda: self.dest
        local.get_guest_config = lambda instance: (
            mock.sentinel.guest if 'dest' in self.guests else None)
        local.host = two_hosts.FakeHost(self.dest, self.source)
        return receive.Receiver(
            local, self.context, self.load(), self.data)

    def receive(self):
        self.cached = mock.Mock(return_value='/cache/' + BASE)
        self.receiver().receive(self.cached)
        return {disk.name: disk for disk in self.data.disks}


@ddt.ddt
class TestReceive(ReceiveTestCase):

    def test_distinct_pools(self):
        self.plan()
        found = self.receive()
        self.assertEqual(test_plan.test_settle.NAMES, self.ours(self.dest))
        self.assert_disks('source', ('dest', 'building'))
        self.assertEqual(
            (POOL, self.volume_name('disk'),
             '/dest/%s/%s' % (POOL, self.volume_name('disk'))),
            (found['disk'].pool, found['disk'].volume, found['disk'].path))
        sizes = {config.name: (config.capacity, config.target_format)
                 for config in self.configs}
        self.assertEqual((1 << 30, 'raw'), sizes[self.volume_name('disk')])
        self.assertEqual((100, 'raw'), sizes[self.volume_name('disk.config')])
        self.cached.assert_not_called()
        # of what is sent, the plan has the length of the file
        self.assertEqual(100, self.load().get('disk.config').next.size)

    def test_on_record_before_it_is_there(self):
        self.plan()
        self.dest.fail['create'] = exception.StorageVolumeError(
            pool=POOL, volume='v', host='dest', reason='full', code=1)
        self.assertRaises(exception.StorageVolumeError, self.receive)
        self.assert_disks('source', ('dest', 'building'))
        self.assertEqual(1, len(self.saves))

    def _give_up(self, *args):
        """The source waits no longer, and has all rolled back."""
        settle.abandon(self.context, self.dest, self.load())
        return '/cache/' + BASE

    def test_given_up_while_the_image_is_fetched(self):
        self.as_overlay('disk', BASE)
        self.plan()
        error = self.assertRaises(
            exception.MigrationError, self.receiver().receive, self._give_up)
        self.assertIn('host source', str(error))
        # Nothing would name them.
        self.assertEqual([], self.ours(self.dest))
        self.assert_disks('source')
        self.assertEqual(test_plan.test_settle.NAMES, self.ours(self.source))

    def test_given_up_and_an_error(self):
        self.as_overlay('disk', BASE)
        self.plan()
        with mock.patch.object(
                receive.Receiver, '_create_to_be_sent',
                side_effect=exception.NovaException('no room')):
            error = self.assertRaises(
                exception.NovaException, self.receiver().receive,
                self._give_up)
        self.assertEqual('no room', str(error))
        self.assertEqual([], self.ours(self.dest))

    def test_given_up_and_the_server_has_come_since(self):
        """The second migration may have got the same names."""
        self.as_overlay('disk', BASE)
        self.plan()

        def come(*args):
            disks = self.load()
            settle.promote(disks)
            disks.save(self.context)
            return '/cache/' + BASE

        self.receiver().receive(come)
        self.assertEqual(test_plan.test_settle.NAMES, self.ours(self.dest))

    def test_given_up_in_a_pool_that_both_hosts_see(self):
        """A volume that was found there is the guest's disk."""
        self.source.pools[POOL]['probe'] = {'length': 1}
        self.plan()
        self.dest.pools[POOL] = self.source.pools[POOL]
        receiver = self.receiver()
        with mock.patch.object(receiver, '_find', side_effect=self._give_up):
            receiver.receive(mock.Mock())
        self.assertEqual([*test_plan.test_settle.NAMES, 'probe'],
                         self.ours(self.source))
        self.assert_disks('source')

    def test_given_up_and_deleted(self):
        self.as_overlay('disk', BASE)
        self.plan()

        def delete():
            self.bdms = []
            return '/cache/' + BASE

        self.assertRaises(
            exception.MigrationError, self.receiver().receive, delete)
        self.assertEqual([], self.ours(self.dest))

    def test_names_that_are_taken(self):
        self.plan()
        self.dest.pools[POOL][self.volume_name('disk')] = {'length': 7}
        self.note_left('third', self.volume_name('disk.swap'))
        found = self.receive()
        self.assertEqual(
            (self.volume_name('disk.1'), self.volume_name('disk.swap.1')),
            (found['disk'].volume, found['disk.swap'].volume))
        # What failed deletes its own, and no more.
        settle.abandon(self.context, self.dest, self.load())
        self.assertEqual(['disk'], self.ours(self.dest))

    def test_overlay(self):
        self.as_overlay('disk', BASE)
        self.plan()
        self.receive()
        (config,) = [config for config in self.configs
                     if config.name == self.volume_name('disk')]
        self.assertEqual(
            ('qcow2', '1.1', '/cache/' + BASE, 'raw'),
            (config.target_format, config.compat, config.backing_store.path,
             config.backing_store.format))
        self.cached.assert_called_once_with()

    def test_image_cant_be_had(self):
        self.as_overlay('disk', BASE)
        self.plan()
        receiver = self.receiver()
        self.assertRaises(
            exception.StorageBaseImageMissing, receiver.receive,
            mock.Mock(side_effect=exception.ImageNotFound(image_id='x')))

    def test_image_that_glance_has_lost(self):
        self.as_overlay('disk', BASE)
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        self.plan()
        taken = self.useFixture(test_plan.fixtures.MockPatch(
            'nova.virt.libvirt.storage.move.base_image.take')).mock
        self.receive()
        ((source, target, _length, _kwargs),) = self.copies
        self.assertEqual(
            ('qemu+tls://192.0.2.1/system', BASES, BASE), source)
        self.assertEqual('dest:///', target.uri)
        taken.assert_called_once()

    def test_image_that_came_otherwise(self):
        """All servers that share the image cache would run with it."""
        self.as_overlay('disk', BASE)
        self.image_error = exception.ImageNotFound(image_id=uuids.image)
        self.plan()
        taken = self.useFixture(test_plan.fixtures.MockPatch(
            'nova.virt.libvirt.storage.move.base_image.take')).mock
        self.stub_out(
            'nova.virt.libvirt.storage.pump.transfer.verify', mock.Mock(
                side_effect=exception.StorageTransferMismatch(
                    volume='v', where='here', reason='a test')))
        self.assertRaises(exception.StorageTransferMismatch, self.receive)
        taken.assert_not_called()
        self.assertEqual({}, self.dest.pools[BASES])

    def test_shared_pool(self):
        self.source.pools[POOL]['probe'] = {'length': 1}
        self.plan()
        self.dest.pools[POOL] = self.source.pools[POOL]
        self.receive()
        self.assertEqual([], self.configs)
        self.assert_disks('source', ('dest', 'ready'))

    @ddt.data(('raw', 'raw', True), (None, 'raw', True),
              ('raw', 'qcow2', False), ('raw', None, False))
    @ddt.unpack
    def test_overlay_in_a_shared_pool(self, wanted, found, is_taken):
        """Its header says for good what it is over.

        :param wanted: format of the base image, as the header has it
        :param found: that of what this host has there
        """
        self.as_overlay('disk', BASE)
        self.source.pools[POOL]['probe'] = {'length': 1}
        self.plan()
        self.dest.pools[POOL] = self.source.pools[POOL]
        path = os.path.join(two_hosts.CONF.instances_path, '_base', BASE)
        self.useFixture(test_plan.fixtures.MockPatch(
            'nova.virt.libvirt.storage.image_cache.look_at_overlay',
            side_effect=lambda at: mock.Mock(
                backing_file=path if at.endswith('_disk') else None,
                backing_file_format=wanted)))
        self.stub_out('nova.virt.libvirt.imagebackend._get_base_format',
                      lambda of: found if of == path else None)
        if found:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, 'w'):
                pass
        if is_taken:
            self.receive()
        else:
            e = self.assertRaises(
                exception.MigrationPreCheckError, self.receive)
            self.assertIn('has %s there' % (found or 'nothing'), str(e))
        self.cached.assert_called_once_with()

    def test_overlay_in_a_shared_pool_that_root_may_not_read(self):
        self.as_overlay('disk', BASE)
        self.source.pools[POOL]['probe'] = {'length': 1}
        self.plan()
        self.dest.pools[POOL] = self.source.pools[POOL]
        self.useFixture(test_plan.fixtures.MockPatch(
            'nova.virt.libvirt.storage.image_cache.look_at_overlay',
            side_effect=PermissionError('squashed')))
        self.receive()
        self.assert_disks('source', ('dest', 'ready'))

    def _files(self):
        """All disks are files that both hosts see."""
        self.as_files()
        self.plan()
        self.linked = self.useFixture(test_plan.fixtures.MockPatch(
            'nova.privsep.storage.link_over')).mock

    def test_files_that_both_hosts_see(self):
        self.flags(preallocate_images='space')
        allocate = self.useFixture(test_plan.fixtures.MockPatch(
            'nova.privsep.storage.allocate')).mock
        self._files()
        found = self.receive()
        self.assertEqual(
            [mock.call(os.path.join(
                two_hosts.CONF.instances_path, uuids.instance, name),
                '/disks/' + found[name].volume) for name in found],
            self.linked.call_args_list)
        self.assert_disks('source', ('dest', 'building'))
        # They have their room.
        allocate.assert_not_called()

    def test_files_are_rolled_back(self):
        """One of two names goes, also if the instance is deleted."""
        self._files()
        self.receive()
        settle.abandon(self.context, self.dest, self.load())
        self.assertEqual([], self.ours(self.dest))
        self.assert_disks('source')
        self.assertEqual([], self.load().leftovers)

    def test_files_of_a_deleted_instance_are_rolled_back(self):
        self._files()
        self.receive()
        disks = mock.Mock(has_mappings=False, instance=self.instance)
        settle.abandon(self.context, self.dest, disks, self.data.disks)
        self.assertEqual([], self.ours(self.dest))

    def test_files_have_arrived(self):
        self._files()
        self.receive()
        self.assertTrue(settle.arrived(disks := self.load(), None))
        disks.save(self.context)
        self.assert_disks('dest')
        self.assertEqual({'libvirt-storage'}, {
            record.backend for _name, record in self.load().items()})
        # Nothing but names is left, which no pool has.
        self.assertEqual([], self.load().leftovers)

    def test_overlay_that_both_hosts_see(self):
        self._files()
        disk = {disk.name: disk for disk in self.data.disks}['disk']
        record = self.disks.get('disk')
        disk.format = record.format = 'qcow2'
        self.disks.set('disk', record)
        self.disks.save(self.context)
        info = self.useFixture(test_plan.fixtures.MockPatch(
            'nova.virt.libvirt.storage.content.look_at_qcow2')).mock
        info.return_value.backing_file = os.path.join(
            two_hosts.CONF.instances_path, '_base', BASE)
        checked = self.useFixture(test_plan.fixtures.MockPatch(
            'nova.virt.libvirt.storage.image_cache.checked_base',
            return_value='/cache/' + BASE)).mock
        self.receiver().check()
        self.receive()
        self.assertEqual('/cache/' + BASE, self.configs[0].backing_store.path)
        checked.side_effect = exception.NovaException(
            '/etc/passwd is no base image')
        error = self.assertRaises(
            exception.MigrationPreCheckError, self.receiver().check)
        self.assertIn('/etc/passwd', str(error))

    @ddt.data(FileNotFoundError('no such file'),
              ValueError('it is not a regular file'))
    def test_file_that_is_not_here(self, error):
        """A symbolic link could name any file of this host."""
        self._files()
        self.file_bytes.side_effect = error
        refused = self.assertRaises(
            exception.MigrationPreCheckError, self.receiver().check)
        self.assertIn('choose another host', str(refused))
        self.assertIn(str(error), str(refused))
        self.assertRaises(exception.MigrationPreCheckError, self.receive)
        self.assertEqual([], self.configs)

    def test_preallocated(self):
        self.flags(preallocate_images='space')
        allocate = self.useFixture(test_plan.fixtures.MockPatch(
            'nova.privsep.storage.allocate')).mock
        self.plan()
        self.receive()
        self.assertEqual({1 << 30}, {
            call.args[1] for call in allocate.call_args_list})


@ddt.ddt
class TestCheck(ReceiveTestCase):

    def refused(self, *words):
        error = self.assertRaises(
            exception.MigrationPreCheckError, self.receiver().check)
        for word in words:
            self.assertIn(word, str(error))

    def test_check(self):
        self.plan()
        self.receiver().check()
        self.assertEqual([], self.dest.log)

    @ddt.data(('name', '../disk'), ('name', 'disk.eph9'), ('size', 0),
              ('format', 'vmdk'), ('format', 'qcow2'), ('base', 'x'),
              ('base', BASE))
    @ddt.unpack
    def test_nothing_is_taken_on_trust(self, field, value):
        self.plan()
        disk = {disk.name: disk for disk in self.data.disks}['disk.eph0']
        setattr(disk, field, value)
        self.refused(field, 'dest')
        # Nor is what was found to be right before.
        error = self.assertRaises(
            exception.MigrationPreCheckError, self.receive)
        self.assertIn(field, str(error))
        self.assertEqual([], self.dest.log)
        self.assert_disks('source')

    @ddt.data(('base', imagecache.get_cache_fname(uuids.another)),
              ('name', '../disk'), ('format', 'vmdk'))
    @ddt.unpack
    def test_image_of_somebody_else(self, field, value):
        """Nor is a record, which its source may have written."""
        self.as_overlay('disk', BASE)
        self.plan()
        disk = {disk.name: disk for disk in self.data.disks}['disk']
        if field != 'base':
            disk.base = None
        setattr(disk, field, value)
        receiver = self.receiver()
        known = receiver._disks.get
        record = known('disk')
        if field == 'format':
            record.format = value
        with mock.patch.object(
                receiver._disks, 'get', side_effect=lambda name: (
                    record if name == disk.name else known(name))):
            error = self.assertRaises(
                exception.MigrationPreCheckError, receiver.check)
        self.assertIn('because of its %s:' % field, str(error))

    def test_file_does_not_go_into_ceph(self):
        """Whatever a source says that knows no Ceph pools."""
        self.plan()
        self.dest.types[POOL] = 'rbd'
        self.refused('pool', 'dest')

    def test_guest_is_here(self):
        # Nothing may be deleted that it runs with.
        self.plan()
        self.note_left('dest', self.volume_name('disk'))
        self.copy()
        self.guests['dest'] = 0
        self.refused('dest', 'settle_live_migration')
        self.assertEqual([], self.dest.log)

    @ddt.data('preparing', 'error')
    def test_request_that_comes_late(self, status):
        """By then the server may be on its way to another host."""
        self.plan()
        self.data.migration = objects.Migration(id=7, status='preparing')
        with mock.patch.object(
                objects.Migration, 'get_by_id', return_value=objects.Migration(
                    id=7, status=status)) as get:
            if status == 'preparing':
                self.receive()
            else:
                e = self.assertRaises(exception.MigrationError, self.receive)
                self.assertIn('was over (error)', str(e))
        self.assertEqual(7, get.call_args.args[1])
        self.assertEqual(status == 'preparing', all(
            record.next for _name, record in self.load().items()))

    def test_what_has_changed_since_it_was_read_stays(self):
        """To list a pool can take minutes."""
        self.plan()

        def file_names(pool):
            disk = (disks := self.load()).get('disk')
            disk.size += 1
            disks.set('disk', disk)
            disks.save(self.context)
            return set()

        size = self.load().get('disk').size
        with mock.patch.object(receive.storage_pool.StoragePool,
                               'file_names', file_names):
            self.receive()
        self.assertLess(size, self.load().get('disk').size)

    def test_leftovers_of_an_earlier_one(self):
        self.plan()
        self.begin()
        self.copy()
        settle.evacuation.forget_next(disks := self.load())
        disks.save(self.context)
        directory = os.path.join(
            two_hosts.CONF.instances_path, uuids.instance)
        os.mkdir(directory)
        self.receiver().check()
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual([], self.load().leftovers)
        self.assertFalse(os.path.exists(directory))

    def _leave_directory(self, *names):
        """Have the directory of a migration of which no disk was left."""
        self.plan()
        directory = os.path.join(
            two_hosts.CONF.instances_path, uuids.instance)
        os.mkdir(directory)
        for name in names:
            with open(os.path.join(directory, name), 'w'):
                pass
        self.receiver().check()
        return directory

    def test_directory_without_leftovers(self):
        # As it is in pools that both hosts see: a volume is the same one.
        directory = self._leave_directory('console.log', 'disk.info')
        self.assertFalse(os.path.exists(directory))
        self.assertIn('Removing', self.stdlog.logger.output)

    def test_directory_with_disks_stays(self):
        self.assertTrue(os.path.exists(self._leave_directory('disk.eph0')))

    def test_directory_that_both_see(self):
        self.plan()
        self.note_left('dest', self.volume_name('disk'))
        self.data.is_shared_instance_path = True
        directory = os.path.join(
            two_hosts.CONF.instances_path, uuids.instance)
        os.mkdir(directory)
        self.receiver().check()
        self.assertTrue(os.path.exists(directory))

    def test_directory_of_a_server_that_is_here(self):
        self.plan()
        self.instance.host = 'dest'
        directory = os.path.join(
            two_hosts.CONF.instances_path, uuids.instance)
        os.mkdir(directory)
        self.receiver().check()
        self.assertTrue(os.path.exists(directory))

    def test_no_room(self):
        self.plan()
        self.available[POOL] = 1000
        self.refused('make room', '1000 bytes', '1050 are needed')
        self.available[POOL] = 1050
        self.receiver().check()
