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
"""What a destination lets the source of a migration have done."""

import base64
from concurrent import futures
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from unittest import mock
import zlib

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

import nova.conf
from nova import exception
from nova import objects
from nova import test
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.intake import export
from nova.virt.libvirt.storage.intake import intake
from nova.virt.libvirt.storage.intake import kept
from nova.virt.libvirt.storage.intake import keys
from nova.virt.libvirt.storage.intake import reaper
from nova.virt.libvirt.storage.intake import volumes
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF

POOL, BASES = two_hosts.POOL, two_hosts.BASES


class IntakeTestBase(two_hosts.TwoHostsTestCase):
    """The destination's service; disk is on its way to it."""

    def setUp(self):
        super().setUp()
        self.flags(host='dest', state_path=self.useFixture(
            fixtures.TempDir()).path)
        self.flags(storage_migration_transport='nbd', group='libvirt')
        self.stub_out('nova.virt.libvirt.storage.pool.setup.pool_names',
                      lambda: [POOL])
        self.instance.host = 'source'
        self.instance.flavor = objects.Flavor(memory_mb=4096)
        self.migration.status = 'migrating'
        self.migration.migration_type = 'migration'
        self.get_instance = self.useFixture(fixtures.MockPatch(
            'nova.objects.Instance.get_by_uuid', autospec=True,
            side_effect=lambda context, uuid, **kwargs: self.instance)).mock
        self.useFixture(fixtures.MockPatch(
            'nova.objects.Migration.get_by_id_and_instance', autospec=True,
            side_effect=self._migration))
        self.stub_out('nova.objects.BlockDeviceMappingList.'
                      'get_by_instance_uuid',
                      lambda *args, **kwargs: self.bdms)
        self.exports = []
        self.useFixture(fixtures.MockPatchObject(
            export, 'Export', side_effect=self._export))
        self.useFixture(fixtures.MockPatchObject(
            export, 'obstacle', return_value=None))
        self.guests, self.running = set(), set()
        self.intake = intake.Intake(
            lambda: self.dest, lambda: '127.0.0.1',
            self._has_guest, 'uri')
        self.name = self.volume_name('disk')
        self.on_its_way('disk')

    def on_its_way(self, name, **values):
        record = self.disks.get(name)
        record.host, record.state, record.migration_id = 'dest', 'building', 7
        for key, value in values.items():
            setattr(record, key, value)
        self.disks.set(name, record)
        self.disks.save(self.context)

    def _has_guest(self, instance, running=False):
        return instance.uuid in (self.running if running else self.guests)

    def _migration(self, context, migration_id, instance_uuid):
        if (migration_id, instance_uuid) != (7, uuids.instance):
            raise exception.MigrationNotFoundForInstance(
                migration_id=migration_id, instance_id=instance_uuid)
        return self.migration

    def _export(self, order, address):
        found = mock.Mock(order=order, address=address, port=49216, key='key')
        found.is_running.return_value = True
        self.exports.append(found)
        return found

    def ask(self, what, migration_id=7, instance=None, host='source',
            **arguments):
        return self.intake.handle(
            self.context, instance or self.instance,
            objects.Migration(id=migration_id),
            dict(arguments, do=what, host=host))

    def refused(self, *args, **kwargs):
        """Check that a request is refused, in the log, and nothing done."""
        before = list(self.dest.log)
        e = self.assertRaises(exception.StorageIntakeRefused,
                              self.ask, *args, **kwargs)
        self.assertEqual(before, self.dest.log)
        self.assertIn('Refused for migration 7', self.stdlog.logger.output)
        self.assertIn(e.kwargs['reason'], self.stdlog.logger.output)
        return str(e)

    def create(self, **arguments):
        self.ask('create', **dict(dict(
            pool=POOL, volume=self.name, length=1000, mode=0o644),
            **arguments))

    def open(self, **arguments):
        return self.ask('open', **dict(dict(
            pool=POOL, volume=self.name, connections=1, aes=False),
            **arguments))

    def place(self):
        return {'pool': POOL, 'volume': self.name}


class IntakeTestCase(IntakeTestBase):

    def test_greet(self):
        self.assertEqual(
            {'obstacle': mock.ANY, 'aes': intake.cpu_has_aes(),
             'cuts': True, 'reads': True, 'keeps': False},
            self.ask('greet'))
        self.flags(storage_migration_keep_copies=1, group='libvirt')
        with mock.patch('nova.virt.libvirt.storage.pool.mounts.is_local',
                        return_value=True):
            with mock.patch('nova.virt.libvirt.utils.get_fs_info',
                            return_value={'free': 5}):
                self.assertTrue(self.ask('greet')['keeps'])

    def test_host_that_takes_nothing_in(self):
        self.create()
        self.flags(storage_migration_transport='libvirt', group='libvirt')
        self.assertIn('storage_migration_transport',
                      self.ask('greet')['obstacle'])
        self.assertRaises(exception.StorageIntakeError, self.open)
        self.assertEqual([], self.exports)

    def test_a_disk_s_way(self):
        self.assertEqual([], self.ask('names', pool=POOL))
        self.create()
        self.assertEqual({'address': '127.0.0.1', 'port': 49216,
                          'username': 'nova', 'key': 'key'}, self.open())
        (found,) = self.exports
        self.assertEqual('/disks/' + self.name, found.order.path)
        self.assertIn('migration 7 from host source', found.order.what)
        self.ask('connected', **self.place())
        found.connected.assert_called_once_with()
        found.end.assert_not_called()
        self.ask('close', **self.place())
        found.end.assert_called_once_with()
        self.ask('close', **self.place())
        found.end.assert_called_once_with()

    def test_close_with_less_than_was_made(self):
        # The length is known when the guest is off.
        self.create()
        self.open()
        (found,) = self.exports
        with mock.patch.object(export, 'cut', autospec=True) as cut:
            cut.side_effect = lambda *args: found.end.assert_called_once_with()
            self.ask('close', length=700, **self.place())
            # An answer may be lost.
            self.ask('close', length=700, **self.place())
            self.assertEqual([mock.call('/disks/' + self.name, 700)] * 2,
                             cut.call_args_list)
            self.refused('close', length='700', **self.place())
            self.on_its_way('disk', state='ready')
            self.refused('close', length=0, **self.place())
            self.assertEqual(2, cut.call_count)

    def test_aes_if_both_have_it(self):
        with mock.patch.object(intake, 'cpu_has_aes', autospec=True,
                               return_value=True):
            self.create()
            self.open(aes=True)
        self.assertTrue(self.exports[0].order.has_aes)

    def test_names_are_the_server_s(self):
        """Also those of files that libvirt doesn't know."""
        with mock.patch.object(two_hosts.Pool, 'file_names', return_value={
                self.name, uuids.other + '_disk', uuids.instance, 'a'}):
            self.assertEqual([self.name], self.ask('names', pool=POOL))
            self.refused('names', pool='other')
            self.migration.status = 'finished'
            self.migration.save()
            self.refused('names', pool=POOL)

    def test_base_image(self):
        fname = 'ab' * 20
        with mock.patch('nova.virt.libvirt.imagecache.get_cache_fname',
                        return_value=fname):
            self.assertFalse(self.ask('has', pool=BASES, name=fname))
            self.dest.pools[BASES][fname] = {'length': 5, 'allocation': 5}
            self.assertTrue(self.ask('has', pool=BASES, name=fname))
            self.refused('has', pool=BASES, name='other')
            self.assertEqual([], self.ask('names', pool=BASES))
            coming = '%s.%s' % (fname, uuids.instance)
            self.dest.pools[BASES][coming] = {'length': 5, 'allocation': 5}
            self.assertEqual([coming], self.ask('names', pool=BASES))

    def test_pool_whose_volumes_are_no_files(self):
        self.dest.types[POOL] = 'logical'
        e = self.assertRaises(exception.MigrationPreCheckError, self.ask,
                              'look', pool=POOL)
        self.assertIn('of type logical', str(e))

    def test_pool_that_is_not_mounted(self):
        self.dest.unmounted.add(POOL)
        with mock.patch('nova.virt.libvirt.utils.get_fs_info',
                        autospec=True) as get_fs_info:
            e = self.assertRaises(exception.StoragePoolNotMounted, self.ask,
                                  'look', pool=POOL)
        self.assertIn('nothing', str(e))
        get_fs_info.assert_not_called()

    def test_delete_ends_the_export_first(self):
        self.create()
        self.open()
        self.exports[0].end.side_effect = lambda: self.assertIn(
            self.name, self.dest.pools[POOL])
        self.assertEqual([], self.ask('delete', places=[[POOL, self.name]]))
        self.exports[0].end.assert_called_once_with()
        self.assertEqual({}, self.dest.pools[POOL])

    def test_delete_of_what_is_being_handed_over(self):
        self.create()
        with self.intake.handing_over(self.instance):
            self.assertIn('being taken over', self.refused(
                'delete', places=[[POOL, self.name]]))
        self.assertIn(self.name, self.dest.pools[POOL])

    def test_delete_of_what_was_handed_over_since(self):
        """It was on its way when it was asked for, and is a disk now."""
        self.create()
        self.open()
        # as the hand-over does, which closes it, too
        self.exports[0].end.side_effect = lambda: self.on_its_way(
            'disk', state='ready')
        self.assertIn('may be a disk', str(self.assertRaises(
            exception.StorageIntakeRefused, self.ask, 'delete',
            places=[[POOL, self.name]])))
        self.assertIn(self.name, self.dest.pools[POOL])

    def test_what_is_made_here_of_a_server_that_came_once(self):
        """Such a disk is on no migration's record either."""
        self.create()
        self.on_its_way('disk', migration_id=None, previous=None)
        self.instance.host = 'dest'
        self.migration.status = 'confirmed'
        self.assertIn('may be a disk', self.refused(
            'delete', places=[[POOL, self.name]]))
        self.assertEqual([self.name], list(self.dest.pools[POOL]))

    def test_leftovers_may_be_deleted(self):
        left = '%s_disk.7' % self.instance.uuid
        self.dest.pools[POOL][left] = {'length': 5, 'allocation': 5}
        self.note_left('dest', left)
        self.migration.status = 'error'
        self.assertEqual([], self.ask('delete', places=[[POOL, left]]))
        self.assertEqual({}, self.dest.pools[POOL])

    def test_disk_that_the_source_of_once_calls_left(self):
        self.create()
        self.on_its_way('disk', state='ready', previous=None,
                        migration_id=None)
        self.instance.host = 'dest'
        self.migration.status = 'confirmed'
        self.note_left('dest', self.name)
        self.assertIn('may be a disk', self.refused(
            'delete', places=[[POOL, self.name]]))
        self.assertEqual([self.name], list(self.dest.pools[POOL]))

    def test_disk_of_a_guest_that_runs(self):
        """The source writes the records."""
        self.create()
        self.running.add(self.instance.uuid)
        self.assertIn('guest runs', self.refused(
            'delete', places=[[POOL, self.name]]))
        self.assertEqual([self.name], list(self.dest.pools[POOL]))

    def test_disk_of_another_server_that_is_on_record(self):
        """The source writes the records."""
        others = '%s_disk' % uuids.other
        self.dest.pools[POOL][others] = {'length': 5, 'allocation': 5}
        self.note_left('dest', others)
        for what, arguments in (
                ('delete', {'places': [[POOL, others]]}),
                ('create', dict(self.place(), length=5, mode=0o644))):
            e = self.assertRaises(exception.InvalidDiskMetadata,
                                  self.ask, what, **arguments)
            self.assertIn('none of the instance', str(e))
        self.assertEqual([others], list(self.dest.pools[POOL]))

    def test_hand_over_closes_all(self):
        self.create()
        self.open()
        self.intake.close(objects.Instance(uuid=uuids.other))
        self.exports[0].end.assert_not_called()
        self.intake.close(self.instance)
        self.exports[0].end.assert_called_once_with()

    def test_opened_while_it_is_handed_over(self):
        self.create()
        with self.intake.handing_over(self.instance):
            self.assertIn('being taken over',
                          self.refused('open', **self.place(),
                                       connections=1, aes=False))
        self.assertEqual([], self.exports)
        # That may have failed: then it is tried again.
        self.open()
        with self.intake.handing_over(objects.Instance(uuid=uuids.other)):
            self.exports[0].end.assert_not_called()
        with self.intake.handing_over(self.instance):
            self.exports[0].end.assert_called_once_with()

    def test_opened_by_what_was_checked_before_the_hand_over(self):
        self.create()
        made = self._export

        def late(order, address):
            self.on_its_way('disk', state='ready')
            return made(order, address)

        export.Export.side_effect = late
        self.assertIn('not on record', self.refused(
            'open', **self.place(), connections=1, aes=False))
        (found,) = self.exports
        found.start.assert_not_called()
        found.end.assert_called_once_with()

    def test_server_that_does_not_start(self):
        self.create()
        made = self._export

        def failing(order, address):
            found = made(order, address)
            found.start.side_effect = exception.StorageIntakeError(
                host='dest', reason='it does not start')
            return found

        export.Export.side_effect = failing
        self.assertRaises(exception.StorageIntakeError, self.open)
        export.Export.side_effect = made
        self.open()

    def test_others_do_not_wait_for_a_server_to_start(self):
        self.on_its_way('disk.eph0')
        eph0 = self.volume_name('disk.eph0')
        self.create()
        self.create(volume=eph0)
        go_on, starts, made = threading.Event(), [], self._export

        def slow(order, address):
            found = made(order, address)
            if not starts:
                found.start.side_effect = lambda: go_on.wait(60)
            starts.append(order.path)
            return found

        export.Export.side_effect = slow
        with futures.ThreadPoolExecutor() as executor:
            try:
                first = executor.submit(self.open)
                while not starts:
                    time.sleep(0.01)
                others = [
                    executor.submit(self.open, volume=eph0),
                    executor.submit(self.intake.look_after),
                    executor.submit(self.intake.close,
                                    objects.Instance(uuid=uuids.other))]
                _done, waiting = futures.wait(others, 20)
                self.assertEqual(set(), waiting)
                self.assertFalse(first.done())
                self.refused('open', **self.place(), connections=1,
                             aes=False)
            finally:
                go_on.set()
        for found in (first, *others):
            found.result()

    def test_hand_over_of_what_does_not_close(self):
        self.create()
        self.open()
        self.exports[0].end.side_effect = exception.StorageIntakeError(
            host='dest', reason='it does not end')
        for _n in range(2):
            self.assertRaises(exception.StorageIntakeError,
                              self.intake.close, self.instance)

    def test_what_has_ended_by_itself(self):
        self.create()
        self.open()
        self.intake.look_after()
        self.exports[0].end.assert_not_called()
        self.exports[0].is_running.return_value = False
        self.intake.look_after()
        self.exports[0].end.assert_called_once_with()
        self.open()

    def _outlives(self):
        # A source that is broken into goes on writing, to a file that is
        # deleted: nobody sees what fills the pool.
        self.create()
        self.open()
        with mock.patch(
                'nova.objects.Migration.get_by_id', side_effect=(
                    lambda context, migration_id: self.migration)):
            self.intake.look_after()
            self.exports[0].end.assert_not_called()
            yield
            self.intake.look_after()
        self.exports[0].end.assert_called_once_with()

    def test_what_outlives_its_migration(self):
        for _open in self._outlives():
            self.migration.status = 'error'

    def test_what_outlives_its_server(self):
        for _open in self._outlives():
            self.get_instance.side_effect = exception.InstanceNotFound(
                instance_id=uuids.instance)

    def test_what_may_not_have_outlived_its_migration(self):
        self.create()
        self.open()
        with mock.patch('nova.objects.Migration.get_by_id',
                        side_effect=TypeError('no database')):
            self.intake.look_after()
        self.exports[0].end.assert_not_called()
        self.assertIn('no database', self.stdlog.logger.output)

    def test_opened_under_one_name_after_the_other(self):
        # Each is a process with its memory, and a port.
        self.create()
        self.open()
        self.on_its_way('disk.eph0')
        self.create(volume=self.volume_name('disk.eph0'))
        self.open(volume=self.volume_name('disk.eph0'))
        self.exports[0].end.assert_not_called()
        self.name = self.volume_name('disk') + '.1'
        self.on_its_way('disk', volume=self.name)
        self.create()
        self.open()
        self.exports[0].end.assert_called_once_with()
        self.exports[1].end.assert_not_called()

    def test_more_volumes_than_a_server_can_have(self):
        with mock.patch.object(volumes, '_MOST_VOLUMES', 3):
            for number in range(3):
                name = '%s.%d' % (self.name, number)
                self.on_its_way('disk', volume=name)
                self.create(volume=name)
            self.on_its_way('disk', volume=self.name)
            self.assertIn('3 volumes', self.refused(
                'create', length=1000, mode=0o644, **self.place()))
            self.dest.pools[POOL].popitem()
            self.create()

    def test_report_of_the_host_with_what_does_not_close(self):
        self.on_its_way('disk.eph0')
        self.create()
        self.create(volume=self.volume_name('disk.eph0'))
        self.open()
        self.open(volume=self.volume_name('disk.eph0'))
        for found in self.exports:
            found.is_running.return_value = False
        self.exports[0].end.side_effect = exception.StorageIntakeError(
            host='dest', reason='it does not end')
        self.intake.look_after()
        self.assertIn('it does not end', self.stdlog.logger.output)
        self.exports[1].end.assert_called_once_with()
        # Nobody takes the disk over nevertheless.
        self.assertRaises(exception.StorageIntakeError,
                          self.intake.close, self.instance)

    def test_port_that_answers(self):
        address, port = self.ask('reach')
        with socket.create_connection((address, port), timeout=5) as found:
            self.assertEqual(b'', found.recv(1))


@ddt.ddt
class RefusalTestCase(IntakeTestBase):
    """What a source has no right to, with whatever it has of Nova's."""

    def test_migration_to_another_host(self):
        self.migration.dest_compute = 'third'
        self.assertIn('goes to host third', self.refused('greet'))

    def test_migration_of_another_source(self):
        self.assertIn("another host's", self.refused('greet', host='third'))
        self.refused('greet', host=None)

    def test_migration_of_another_instance(self):
        self.assertRaises(
            exception.MigrationNotFoundForInstance, self.ask, 'greet',
            instance=objects.Instance(uuid=uuids.other))
        self.assertRaises(exception.MigrationNotFoundForInstance,
                          self.ask, 'greet', migration_id=8)
        self.assertIn("Refused for migration 7: greet: it is none of this "
                      "server's", self.stdlog.logger.output)

    def test_migration_of_another_kind(self):
        self.migration.migration_type = 'live-migration'
        self.refused('greet')

    @ddt.data('post-migrating', 'finished', 'confirmed', 'reverted', 'error')
    def test_migration_that_is_over(self, status):
        self.migration.status = status
        for what in ('greet', 'reach'):
            self.assertIn('is ' + status, self.refused(what))
        self.refused('look', pool=POOL)
        self.refused('open', connections=1, aes=True, **self.place())
        self.refused('create', length=1, mode=0o644, **self.place())

    def test_instance_that_has_come(self):
        self.create()
        self.instance.host = 'dest'
        self.refused('open', connections=1, aes=True, **self.place())

    def test_unknown_request(self):
        for what in ('', 'start', '_open', None, 'handle'):
            self.refused(what)

    @ddt.data('other-pool', '../etc', '', 5, None)
    def test_other_pools(self, pool):
        self.refused('look', pool=pool)
        self.refused('create', pool=pool, volume=self.name, length=1,
                     mode=0o644)

    @ddt.data('%s_disk' % uuids.other, '/etc/passwd', '../x', 'x', '', None,
              '%s_' % uuids.instance, '%s_../x' % uuids.instance,
              '%s_a/b' % uuids.instance, '%s_disk\n' % uuids.instance)
    def test_other_volumes(self, name):
        self.dest.pools[POOL][name] = {'length': 5, 'allocation': 5}
        for what in ('create', 'open', 'connected', 'close'):
            self.refused(what, pool=POOL, volume=name, length=1, mode=0o644,
                         connections=1, aes=True)
        self.refused('probe', pool=POOL, name=name)
        self.refused('delete', places=[[POOL, name]])

    def test_what_is_not_on_record_as_coming(self):
        for name in ('disk.eph0', 'disk.new'):
            volume = self.volume_name(name)
            self.refused('create', pool=POOL, volume=volume, length=1,
                         mode=0o644)
            self.refused('open', pool=POOL, volume=volume, connections=1,
                         aes=True)

    def test_what_comes_by_another_migration(self):
        self.on_its_way('disk', migration_id=6)
        self.refused('create', length=1, mode=0o644, **self.place())

    def test_what_another_migration_has_opened(self):
        """The source of an earlier one ends and deletes nothing of it."""
        self.create()
        self.open()
        self.on_its_way('disk', migration_id=8)
        for what in ('connected', 'close'):
            self.assertIn('by migration 8',
                          self.refused(what, **self.place()))
        self.refused('delete', places=[[POOL, self.name]])
        self.assertEqual([mock.call.start()], self.exports[0].mock_calls)
        # What has no migration on record is made anew, and this one's.
        self.on_its_way('disk', migration_id=None)
        self.ask('close', **self.place())
        self.exports[0].end.assert_called_once_with()

    def test_what_comes_to_another_host(self):
        """What has its name here is kept, and none of that migration's."""
        self.on_its_way('disk', host='third')
        self.refused('create', length=1, mode=0o644, **self.place())
        self.dest.pools[POOL][self.name] = {'length': 5, 'allocation': 5}
        self.refused('open', connections=1, aes=True, **self.place())
        self.refused('delete', places=[[POOL, self.name]])
        self.assertIn(self.name, self.dest.pools[POOL])

    def test_disk_that_was_taken_over(self):
        self.create()
        self.on_its_way('disk', state='ready')
        self.refused('open', connections=1, aes=True, **self.place())
        self.refused('delete', places=[[POOL, self.name]])

    def test_lengths(self):
        # It may have held the memory that its server was started with.
        longest = 2 * 1000 + (1 << 30) + (4096 << 20)
        self.create(length=longest)
        self.dest.pools[POOL].clear()
        for length in (longest + 1, 1 << 60, -1, '5', None, True):
            self.refused('create', length=length, mode=0o644, **self.place())

    def test_modes(self):
        for mode in (0o777, 0o4755, None):
            self.refused('create', length=5, mode=mode, **self.place())

    def test_what_is_there_is_not_touched(self):
        there = self.dest.pools[POOL]
        there[self.name] = {'length': 5, 'allocation': 5}
        self.assertRaises(exception.StorageVolumeExists, self.create)
        self.assertEqual({'length': 5, 'allocation': 5}, there[self.name])

    def test_opened_twice(self):
        self.create()
        self.open()
        self.assertIn('open already', self.refused(
            'open', connections=1, aes=True, **self.place()))

    @ddt.data(0, 9, 10000, None, '1')
    def test_connections(self, connections):
        self.create()
        self.refused('open', connections=connections, aes=True,
                     **self.place())
        self.assertEqual([], self.exports)

    def test_connected_without_open(self):
        self.refused('connected', **self.place())

    def test_too_many_places(self):
        self.assertIn('201 places', self.refused(
            'delete', places=[[POOL, self.name]] * 201))

    def test_ports_that_nobody_comes_to(self):
        with mock.patch.object(intake, '_REACH_TIMEOUT', .5):
            for _n in range(4):
                self.ask('reach')
            self.assertIn('still wait', self.refused('reach'))
            self._wait_for_ports()
            self.ask('reach')
            # Later its thread would find the real limit, and wait for 15 s.
            self._wait_for_ports()

    def _wait_for_ports(self):
        deadline = time.monotonic() + 30
        while self.intake._reaching:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(.05)

    def test_malformed_places(self):
        for places in (None, 'x', [[POOL]], [[POOL, 5]], [5], [[[], {}]]):
            self.refused('delete', places=places)


class KeptTestCase(IntakeTestBase):
    """What is still here of a disk, for its source to go on from."""

    def setUp(self):
        super().setUp()
        self.dest.pools[POOL][self.name] = {'length': 900, 'allocation': 900}
        self.keeps = self.useFixture(fixtures.MockPatchObject(
            volumes.keeping, 'is_possible', return_value=True)).mock
        self.prepare = self.useFixture(fixtures.MockPatchObject(
            kept, 'prepare', autospec=True)).mock
        self.table = b'T' * 100 + os.urandom(3 << 20)
        self.read_table = self.useFixture(fixtures.MockPatchObject(
            kept.pump, 'read_table', autospec=True,
            return_value=self.table)).mock

    def arguments(self, **more):
        return {**self.place(), 'length': 800, 'room': 1000, 'mode': 0o644,
                'key': 77, **more}

    def test_take_up(self):
        found = self.ask('take_up', **self.arguments())
        path = '/disks/' + self.name
        self.prepare.assert_called_once_with(path, 800, 1000, 0o644)
        # All of it is read, not what it was to have once.
        self.read_table.assert_called_once_with(
            pump.Volume('uri', POOL, self.name), 1000, key=77,
            stall_timeout=mock.ANY, cancelled=mock.ANY)
        data = b''
        while piece := self.ask('table', at=len(data), **self.place()):
            data += base64.b64decode(piece)
        self.assertEqual(found['bytes'], len(data))
        self.assertEqual(self.table, kept.unpack(data, 1 << 40))
        # When it is open, the source has it.
        self.open()
        self.assertEqual('', self.ask('table', at=0, **self.place()))

    def test_reading_that_takes_too_long(self):
        self.flags(long_rpc_timeout=60)
        now = time.monotonic()

        def read(*args, cancelled, **kwargs):
            for later, expected in ((29, False), (32, True)):
                with mock.patch('time.monotonic', return_value=now + later):
                    self.assertIs(expected, cancelled())
            raise exception.StorageTransferCancelled(
                volume='v', where='w', length=1, transferred=0)

        self.read_table.side_effect = read
        e = self.assertRaises(exception.StorageIntakeError, self.ask,
                              'take_up', **self.arguments())
        self.assertIn('long_rpc_timeout', str(e))

    def test_taken_up_twice_at_once(self):
        goes_on, begun = threading.Event(), threading.Event()
        self.addCleanup(goes_on.set)

        def read(*args, **kwargs):
            begun.set()
            goes_on.wait(30)
            return self.table

        self.read_table.side_effect = read
        with futures.ThreadPoolExecutor() as executor:
            first = executor.submit(self.ask, 'take_up', **self.arguments())
            self.assertTrue(begun.wait(30))
            self.assertIn('being read', self.refused(
                'take_up', **self.arguments()))
            goes_on.set()
            first.result()
        self.ask('take_up', **self.arguments())

    def test_table_that_is_too_long(self):
        data = zlib.compress(bytes(1 << 20))
        e = self.assertRaises(exception.StorageIntakeError, kept.unpack,
                              data, 65536)
        self.assertIn('too long', str(e))
        self.assertEqual(bytes(8), kept.unpack(zlib.compress(bytes(8)), 1))
        self.assertRaises(exception.StorageIntakeError, kept.unpack,
                          b'no zlib', 65536)

    def test_refused(self):
        self.assertIn('being taken over', self._refused_in_hand_over())
        for arguments in ({'length': 1001}, {'length': 0}, {'length': None},
                          {'room': 1 << 50}, {'mode': 0o4755}, {'key': 0},
                          {'key': (1 << 61) - 1}, {'volume': 'other'},
                          {'pool': 'other'}):
            self.refused('take_up', **self.arguments(**arguments))
        self.open()
        self.assertIn('is open', self.refused('take_up', **self.arguments()))
        self.on_its_way('disk', state='ready')
        self.refused('take_up', **self.arguments())
        self.refused('table', at=0, **self.place())
        self.prepare.assert_not_called()

    def test_refused_where_no_copies_are_kept(self):
        self.keeps.return_value = False
        self.assertIn('keeps no copies in pool %s' % POOL, self.refused(
            'take_up', **self.arguments()))
        self.keeps.assert_called_once_with(self.dest, POOL)
        self.prepare.assert_not_called()

    def test_too_many_are_open(self):
        self.intake._exports.update({
            (self.instance.uuid, POOL, str(n)): mock.Mock()
            for n in range(intake._MOST_EXPORTS)})
        with mock.patch.object(self.intake, '_end_others'):
            self.assertIn('open already', self.refused(
                'open', connections=1, aes=False, **self.place()))

    def test_refused_where_its_guest_is(self):
        """All else that is known of the disk may be the source's word."""
        self.guests.add(self.instance.uuid)
        for what, arguments in (
                ('take_up', self.arguments()),
                ('open', {**self.place(), 'connections': 1, 'aes': False}),
                ('close', {**self.place(), 'length': 1})):
            self.assertIn('its guest is on this host',
                          self.refused(what, **arguments))
        self.prepare.assert_not_called()
        self.assertEqual([], self.exports)

    def _refused_in_hand_over(self):
        with self.intake.handing_over(self.instance):
            return self.refused('take_up', **self.arguments())

    def test_what_is_kept_for_a_revert(self):
        # By another disk: the same volume can't be both.
        record = self.disks.get('disk.eph0')
        record.previous = record.obj_clone()
        record.previous.host, record.previous.volume = 'dest', self.name
        self.disks.set('disk.eph0', record)
        self.disks.save(self.context)
        self.assertIn('is disk disk.eph0',
                      self.refused('take_up', **self.arguments()))

    def test_volume_that_is_gone(self):
        del self.dest.pools[POOL][self.name]
        self.assertRaises(exception.StorageVolumeNotFound, self.ask,
                          'take_up', **self.arguments())

    def test_hand_over_waits_for_a_change(self):
        goes_on, begun, order = threading.Event(), threading.Event(), []

        def prepare(*args):
            begun.set()
            goes_on.wait(30)
            order.append('changed')

        def take_over():
            with self.intake.handing_over(self.instance):
                order.append('taken over')

        self.prepare.side_effect = prepare
        with futures.ThreadPoolExecutor() as executor:
            changed = executor.submit(
                self.ask, 'take_up', **self.arguments())
            self.assertTrue(begun.wait(30))
            taken = executor.submit(take_over)
            self.assertEqual(set(), futures.wait([taken], 0.3)[0])
            goes_on.set()
            for found in (changed, taken):
                found.result()
        self.assertEqual(['changed', 'taken over'], order)


@ddt.ddt
class ReadTestCase(IntakeTestBase):
    """What is read of a disk before all of it has come."""

    def setUp(self):
        super().setUp()
        self.create()
        self.open()
        self.read_table = self.useFixture(fixtures.MockPatchObject(
            kept.pump, 'read_table', autospec=True,
            return_value=bytes(8))).mock
        self.verify_known = self.useFixture(fixtures.MockPatchObject(
            kept.pump, 'verify_known', autospec=True)).mock
        self.useFixture(fixtures.MockPatchObject(
            export, 'cut', autospec=True))
        self.record = self.disks.get('disk').obj_clone()
        self.record.expected = metadata.LibvirtDiskExpected(
            length=900, checksum=5, key=77)

    def read(self, **arguments):
        return self.ask('read', **{**self.place(), 'room': 1000, 'key': 77,
                                   'changed': None, **arguments})

    def has_read(self):
        while not (found := self.ask('has_read', **self.place()))['ended']:
            time.sleep(.01)
        return found

    def close(self, **arguments):
        self.ask('close', **self.place(), **arguments)

    def test_a_disk_s_way(self):
        self.read()
        self.assertEqual({'done': 0, 'ended': True}, self.has_read())
        self.read_table.assert_called_once_with(
            pump.Volume('uri', POOL, self.name), 1000, key=77,
            stall_timeout=60, cancelled=mock.ANY, progress=mock.ANY)
        self.close(length=900, changed=[[0, 10]])
        self.assertTrue(self.intake.verify(self.instance, self.record))
        self.assertEqual(
            (900, 5, pump.Known(1000, bytes(8)), [(0, 10)]),
            self.verify_known.call_args.args[1:])

    @ddt.data({}, {'length': 900})
    def test_closed_by_who_does_not_know_of_it(self, arguments):
        self.read()
        self.has_read()
        self.close(**arguments)
        self.assertFalse(self.intake.verify(self.instance, self.record))

    def test_deleted(self):
        self.read()
        self.has_read()
        self.close(length=900, changed=[])
        self.ask('delete', places=[[POOL, self.name]])
        self.assertFalse(self.intake.verify(self.instance, self.record))

    def test_failure(self):
        self.read_table.side_effect = exception.NovaException('it is bad')
        self.read()
        e = self.assertRaises(exception.StorageIntakeError, self.has_read)
        self.assertIn('it is bad', str(e))

    def test_refused(self):
        self.refused('has_read', **self.place())
        for arguments in ({'room': 1 << 50}, {'room': -1}, {'room': None},
                          {'key': 0}, {'key': (1 << 61) - 1},
                          {'volume': 'other'}, {'pool': 'other'},
                          {'changed': 5}, {'changed': [5]},
                          {'changed': [[0]]}, {'changed': [[0, -1]]},
                          {'changed': [[0, 1 << 62]]},
                          {'changed': [[True, 1]]},
                          {'changed': [['0', '1']]},
                          {'changed': [[0, 1]] * 9000}):
            self.refused('read', **{**self.place(), 'room': 1000, 'key': 77,
                                    **arguments})
        self.refused('close', length=900, changed=[[]], **self.place())
        with self.intake.handing_over(self.instance):
            self.refused('read', room=1000, key=77, **self.place())
        self.on_its_way('disk', state='ready')
        self.refused('read', room=1000, key=77, **self.place())
        self.read_table.assert_not_called()

    def test_refused_while_it_is_read(self):
        goes_on = threading.Event()
        self.addCleanup(goes_on.set)
        self.read_table.side_effect = lambda *args, **kwargs: goes_on.wait(30)
        self.read()
        self.assertIn('being read', self.refused(
            'read', room=1000, key=77, **self.place()))


class PrepareTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'kept')
        with open(self.path, 'wb') as f:
            f.write(b'A' * 1000)

    def content(self):
        with open(self.path, 'rb') as f:
            return f.read()

    def test_what_is_beyond_the_disk_reads_as_zeroes(self):
        kept.prepare(self.path, 700, 1200, 0o600)
        self.assertEqual(b'A' * 700 + bytes(500), self.content())
        self.assertEqual(0o600, os.stat(self.path).st_mode & 0o777)
        kept.prepare(self.path, 1300, 1400, 0o644)
        self.assertEqual(b'A' * 700 + bytes(700), self.content())

    def test_file_of_another_user(self):
        found = os.stat(self.path)
        with mock.patch('nova.privsep.path.chown', autospec=True) as chown, (
                mock.patch('os.geteuid', return_value=found.st_uid + 1)):
            kept.prepare(self.path, 1000, 1000, 0o644)
        chown.assert_called_once_with(
            self.path, found.st_uid + 1, os.getegid(), follow_symlinks=False)

    def test_file_that_another_host_swaps(self):
        outside = self.path + '.outside'
        with open(outside, 'wb') as f:
            f.write(b's' * 1000)
        os.chmod(outside, 0o600)

        def swap(*args, **kwargs):
            os.rename(self.path, self.path + '.away')
            os.symlink(outside, self.path)

        with mock.patch('nova.privsep.path.chown', side_effect=swap), (
                mock.patch('os.geteuid', return_value=os.geteuid() + 1)):
            kept.prepare(self.path, 700, 1200, 0o644)
        self.assertEqual(b's' * 1000, self.content())
        self.assertEqual(0o600, os.stat(outside).st_mode & 0o777)
        self.path += '.away'
        self.assertEqual(b'A' * 700 + bytes(500), self.content())
        self.assertEqual(0o644, os.stat(self.path).st_mode & 0o777)

    def test_no_plain_file(self):
        os.link(self.path, self.path + '.too')
        e = self.assertRaises(exception.StorageIntakeError, kept.prepare,
                              self.path, 1, 1, 0o644)
        self.assertIn('no plain file', str(e))
        os.unlink(self.path + '.too')
        os.rename(self.path, self.path + '.too')
        os.symlink(self.path + '.too', self.path)
        self.assertRaises(exception.StorageIntakeError, kept.prepare,
                          self.path, 1, 1, 0o644)
        self.assertEqual(b'A' * 1000, self.content())


class ReaperTestCase(two_hosts.TwoHostsTestCase):

    def setUp(self):
        super().setUp()
        self.flags(state_path=self.useFixture(fixtures.TempDir()).path)

    def test_nothing(self):
        reaper.reap()

    def test_keys(self):
        directory = keys.KeyDirectory()
        self.assertTrue(os.path.exists(directory.path))
        reaper.reap()
        self.assertEqual([], os.listdir(keys.root()))

    def test_process(self):
        if shutil.which(export.QEMU) is None:
            self.skipTest('%s is not installed' % export.QEMU)
        path = os.path.join(CONF.state_path, 'volume')
        with open(path, 'wb') as f:
            f.truncate(1 << 20)
        directory = keys.KeyDirectory()
        process = subprocess.Popen(
            [export.QEMU, '-b', '127.0.0.1', '-p', '0', '-f', 'raw',
             '--object', 'tls-creds-psk,id=tls,endpoint=server,dir=%s' %
             directory.path, '--tls-creds', 'tls', path],
            stderr=subprocess.DEVNULL)
        other = subprocess.Popen([sys.executable, '-c', 'input()',
                                  'dir=%s/x' % keys.root()],
                                 stdin=subprocess.PIPE)
        self.addCleanup(other.communicate)
        time.sleep(0.2)
        self.assertIsNone(process.poll())
        with mock.patch.object(reaper.os, 'geteuid',
                               return_value=os.geteuid() + 1):
            # One of another user, who can call it anything.
            reaper.reap()
        self.assertIsNone(process.poll())
        reaper.reap()
        self.assertEqual(-signal.SIGKILL, process.wait(5))
        self.assertIsNone(other.poll())
