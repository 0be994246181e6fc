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
import os
from unittest import mock

import ddt
import fixtures
from oslo_concurrency import processutils
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova import objects
import nova.privsep.storage
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt.storage.pool import config
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import volume as storage_volume
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage import transition
from nova.virt.libvirt import utils as libvirt_utils


class Crash(BaseException):
    """The process is gone: nothing catches it."""


class FakeDisks:
    """Records as the database has them: what isn't saved dies with us."""

    def __init__(self, database):
        self.database = database
        self.records = {
            name: record.obj_clone() for name, record in database.items()}
        self.saves = 0
        self.leftovers = []

    def items(self):
        return list(self.records.items())

    def set(self, name, record):
        self.records[name] = record

    def save(self, context):
        self.saves += 1
        self.database.clear()
        self.database.update({
            name: record.obj_clone() for name, record in self.records.items()})


class TransitionTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.PrivsepFixture())
        top = self.useFixture(fixtures.TempDir()).path
        self.instance_dir = os.path.join(top, 'instance')
        self.base_dir = os.path.join(top, '_base')
        for path in (self.instance_dir, self.base_dir):
            os.mkdir(path)
        self.useFixture(fakelibvirt.LibvirtModuleFixture())
        self.flags(instances_path=top, host='here')
        self.conn = fakelibvirt.Connection('qemu:///system')
        self.conn.file_system = libvirt_storage.RealFileSystem()
        self.pool = storage_pool.StoragePool.ensure(
            self.conn, setup.disks_pool_config(), 'here')
        self.directory = self.pool.config().target_path
        self.mock_create = self.useFixture(fixtures.MockPatchObject(
            self.pool, 'create', wraps=self.pool.create)).mock
        self.instance = objects.Instance(
            uuid=uuids.instance, system_metadata={})
        self.database = {}
        self.content = {}

    @property
    def made(self):
        """The configurations of the volumes that were made"""
        return [call.args[0] for call in self.mock_create.call_args_list]

    def legacy(self, name, content=None, backend='flat', format='raw',
               state='ready'):
        content = content or ('I am %s' % name).encode() * 100
        with open(os.path.join(self.instance_dir, name), 'wb') as f:
            f.write(content)
        self.content[name] = content
        self.database[name] = metadata.LibvirtDiskMetadata(
            backend=backend, format=format, size=len(content), state=state,
            host='here', pool=None, volume=None, previous=None, unmapped=None)

    def transition(self, **kwargs):
        """What a compute service has after a start: only what was saved."""
        self.disks = FakeDisks(self.database)
        return transition.Transition(
            mock.sentinel.context, self.instance, self.disks,
            lambda name: self.pool, self.instance_dir, self.base_dir,
            **kwargs)

    def assert_moved(self):
        for name, content in self.content.items():
            record = self.database[name]
            self.assertEqual('libvirt-storage', record.backend)
            self.assertEqual('ready', record.state)
            self.assertEqual('nova-disks-pool', record.pool)
            self.assertEqual(len(content), record.size)
            with open(self.pool.volume(record.volume).path, 'rb') as f:
                self.assertEqual(content, f.read())
            self.assertFalse(os.path.lexists(
                os.path.join(self.instance_dir, name)))
        self.assertEqual(
            {record.volume for record in self.database.values()},
            set(os.listdir(self.directory)))

    def assert_legacy(self):
        for name, content in self.content.items():
            record = self.database[name]
            self.assertEqual('flat', record.backend)
            self.assertIsNone(record.volume)
            with open(os.path.join(self.instance_dir, name), 'rb') as f:
                self.assertEqual(content, f.read())
        self.assertEqual([], os.listdir(self.directory))

    def no_hard_links(self, code=errno.EXDEV):
        self.useFixture(fixtures.MockPatchObject(
            nova.privsep.storage, 'link_over',
            side_effect=OSError(code, os.strerror(code))))


@ddt.ddt
class TestTransition(TransitionTestCase):

    def test_all_disks_move_in_two_saves(self):
        for name in ('disk', 'disk.eph0', 'disk.swap', 'disk.config'):
            self.legacy(name)
        moving = self.transition()
        self.assertTrue(moving.run())
        moving.finish()
        self.assert_moved()
        self.assertEqual(2, self.disks.saves)
        self.assertEqual('%s_disk.eph0' % uuids.instance,
                         self.database['disk.eph0'].volume)

    def test_a_second_time_nothing_is_done(self):
        self.legacy('disk')
        moving = self.transition()
        moving.run()
        moving.finish()
        again = self.transition()
        self.assertFalse(again.run())
        again.finish()
        self.assertEqual(0, self.disks.saves)
        self.assertEqual(1, len(self.made))
        self.assert_moved()

    def test_file_keeps_its_inode(self):
        self.legacy('disk')
        inode = os.stat(os.path.join(self.instance_dir, 'disk')).st_ino
        moving = self.transition()
        moving.run()
        moving.finish()
        path = self.pool.volume(self.database['disk'].volume).path
        self.assertEqual(inode, os.stat(path).st_ino)

    @ddt.data(errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
    def test_copied_where_hard_links_do_not_work(self, code):
        self.legacy('disk')
        self.no_hard_links(code)
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()

    def test_other_errors_of_link_are_none_of_these(self):
        self.legacy('disk')
        self.no_hard_links(errno.EIO)
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertIn(uuids.instance, str(e))
        self.assert_legacy()

    def test_pool_that_holds_no_files(self):
        """A path in /dev would be written to like any other."""
        self.legacy('disk')
        made = config.LibvirtConfigStoragePool()
        made.type, made.name, made.target_path = 'logical', 'vg', '/dev/vg'
        made.source = config.LibvirtConfigStoragePoolSource()
        made.source.name = 'vg'
        self.conn.storagePoolDefineXML(made.to_xml()).create(0)
        directory, self.pool = self.pool, storage_pool.StoragePool(
            self.conn, 'vg', 'here')
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertIn('name a pool that is a directory', str(e)[:200])
        self.assertEqual({}, self.conn.volume_group('vg').devices)
        self.pool = directory
        self.assert_legacy()

    def test_copy_needs_room(self):
        self.legacy('disk')
        self.no_hard_links()
        # What libvirt has seen at its last refresh may be long gone.
        with mock.patch.object(
                libvirt_utils, 'get_fs_info',
                return_value={'total': 9, 'used': 8, 'free': 1}) as mock_free:
            e = self.assertRaises(exception.DiskTransitionFailed,
                                  self.transition().run)
        mock_free.assert_called_once_with(self.directory)
        self.assertIn('1 bytes left', str(e))
        self.assert_legacy()

    def test_running_guests_disk_is_linked(self):
        self.legacy('disk')
        moving = self.transition(guest_is_off=False)
        moving.run()
        path = self.pool.volume(self.database['disk'].volume).path
        with open(os.path.join(self.instance_dir, 'disk'), 'r+b') as f:
            f.write(b'later')
        with open(path, 'rb') as f:
            self.assertEqual(b'later', f.read(5))

    def test_running_guests_disk_is_not_copied(self):
        self.legacy('disk')
        self.no_hard_links()
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition(guest_is_off=False).run)
        self.assertIn('hard reboot the instance first', str(e))
        self.assert_legacy()

    def test_failed_copy_of_the_last_disk_undoes_all(self):
        for name in ('disk', 'disk.eph0', 'disk.config'):
            self.legacy(name)
        self.no_hard_links()
        real = nova.privsep.storage.copy_over
        with mock.patch.object(
                nova.privsep.storage, 'copy_over', side_effect=[
                    mock.DEFAULT, mock.DEFAULT,
                    processutils.ProcessExecutionError('full')]) as copy:
            copy.side_effect = self._fail_third(real)
            self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assert_legacy()

    @staticmethod
    def _fail_third(real):
        calls = []

        def copy(source, target):
            calls.append(target)
            if len(calls) == 3:
                raise processutils.ProcessExecutionError('No space left')
            real(source, target)
        return copy

    def test_wrong_capacity_in_libvirt_is_refused(self):
        self.legacy('disk')
        with mock.patch.object(storage_volume.StorageVolume, 'physical',
                               return_value=7):
            e = self.assertRaises(exception.DiskTransitionFailed,
                                  self.transition().run)
        self.assertIn('7 bytes', str(e))
        self.assert_legacy()

    def test_size_on_record_is_mended(self):
        self.legacy('disk')
        self.database['disk'].size = 3
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()

    def test_missing_file_moves_nothing(self):
        self.legacy('disk')
        self.legacy('disk.eph0')
        os.unlink(os.path.join(self.instance_dir, 'disk.eph0'))
        del self.content['disk.eph0']
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertIn('disk.eph0', str(e))
        self.assertEqual([], self.made)

    @ddt.data(exception.InvalidDiskInfo(reason='no answer'),
              exception.DiskNotFound(location='no answer'),
              processutils.ProcessExecutionError('no answer'))
    def test_disk_that_cannot_be_inspected(self, error):
        with self._qcow2(None) as info:
            info.side_effect = error
            e = self.assertRaises(exception.DiskTransitionFailed,
                                  self.transition().run)
        self.assertIn('no answer', str(e))
        self.assertIn(uuids.instance, str(e))
        self.assertEqual([], self.made)
        self.assertEqual('qcow2', self.database['disk'].backend)

    def test_refusal_is_told_once(self):
        self.legacy('disk', state='building')
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertEqual(1, str(e).count(uuids.instance))

    def test_name_of_what_is_left_is_not_taken(self):
        self.legacy('disk')
        disks = FakeDisks(self.database)
        disks.leftovers = [
            ('here', 'nova-disks-pool', '%s_disk' % uuids.instance)]
        with mock.patch(__name__ + '.FakeDisks', return_value=disks):
            self.transition().run()
        self.assertEqual('%s_disk.1' % uuids.instance,
                         self.database['disk'].volume)

    def test_symbolic_link_is_not_followed(self):
        self.legacy('disk')
        path = os.path.join(self.instance_dir, 'disk')
        os.rename(path, path + '.real')
        os.symlink(path + '.real', path)
        self.assertRaises(exception.DiskTransitionFailed,
                          self.transition().run)
        self.assertEqual([], self.made)

    def test_half_made_disk_stays(self):
        self.legacy('disk', state='building')
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertIn('never finished', str(e))
        self.assertEqual([], self.made)

    @ddt.data('rbd', 'ploop')
    def test_with_a_disk_of_another_backend_all_stay(self, backend):
        self.legacy('disk', backend=backend)
        self.legacy('disk.config')
        self.assertFalse(self.transition().run())
        self.assertEqual([], self.made)

    def test_rescue_disks_stay(self):
        self.legacy('disk')
        self.legacy('disk.rescue')
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assertEqual('flat', self.database['disk.rescue'].backend)
        self.assertTrue(os.path.exists(
            os.path.join(self.instance_dir, 'disk.rescue')))

    def test_taken_name_gets_a_suffix(self):
        taken = '%s_disk' % uuids.instance
        with open(os.path.join(self.directory, taken), 'wb') as f:
            f.write(b'other')
        self.pool.refresh()
        self.legacy('disk')
        moving = self.transition()
        moving.run()
        self.assertEqual(taken + '.1', self.database['disk'].volume)
        self.assertEqual(5, self.pool.volume(taken).info().capacity)

    def test_taken_name_that_libvirt_does_not_know(self):
        taken = '%s_disk' % uuids.instance
        path = os.path.join(self.directory, taken)
        open(path, 'w').close()
        self.legacy('disk')
        self.transition().run()
        self.assertEqual(taken + '.1', self.database['disk'].volume)
        self.assertEqual(0, os.path.getsize(path))

    def test_guest_written_header_is_never_read(self):
        # A qcow2 header that names a file of the host as backing file.
        header = (b'QFI\xfb' + (3).to_bytes(4, 'big') +
                  (104).to_bytes(8, 'big') + (11).to_bytes(4, 'big'))
        self.legacy('disk', header.ljust(104, b'\0') + b'/etc/passwd')
        # Nor does libvirt look, in whose answers it would be followed.
        with mock.patch(
            'nova.privsep.qemu.privileged_qemu_img_info') as info, (
            mock.patch.object(
                storage_volume.StorageVolume, 'info')) as libvirt_info:
            moving = self.transition()
            moving.run()
            moving.finish()
        info.assert_not_called()
        libvirt_info.assert_not_called()
        self.assertEqual('raw', self.made[0].target_format)
        self.assertIsNone(self.made[0].backing_store)
        self.assert_moved()

    def test_base_by_another_spelling(self):
        link = self.base_dir + '-link'
        os.symlink(self.base_dir, link)
        moving = self.transition()
        disk = mock.Mock()
        for path in (self.base_dir + '/abc', link + '/abc',
                     self.instance_dir + '/../_base/abc'):
            self.assertEqual(os.path.normpath(path),
                             moving._checked_base(disk, path))

    def _qcow2(self, backing):
        self.legacy('disk', backend='qcow2', format='qcow2')
        return mock.patch(
            'nova.virt.libvirt.storage.content.look_at_qcow2',
            return_value=mock.Mock(
                virtual_size=len(self.content['disk']),
                backing_file=backing, backing_file_format='raw'))

    def test_content_that_is_not_safe(self):
        # It may have come from another host, by SSH.
        with self._qcow2(None) as look:
            look.side_effect = exception.UnsafeDiskContent(
                path='disk', reason='its data is in another file')
            e = self.assertRaises(exception.DiskTransitionFailed,
                                  self.transition().run)
        self.assertIn('another file', str(e))
        self.assertEqual([], self.made)

    def test_overlay_keeps_its_base(self):
        base = os.path.join(self.base_dir, 'abc')
        with open(base, 'wb'):
            pass
        with self._qcow2(base) as look:
            self.transition().run()
        look.assert_called_once_with(os.path.join(self.instance_dir, 'disk'))
        config = self.made[0]
        self.assertEqual(('qcow2', '1.1'),
                         (config.target_format, config.compat))
        self.assertEqual((base, 'raw'), (config.backing_store.path,
                                         config.backing_store.format))

    @ddt.data('/etc/passwd', 'json:{"file.filename":"/etc/passwd"}',
              'nbd://localhost/x', '../_base/../../etc/passwd')
    def test_base_outside_of_the_image_cache_is_refused(self, backing):
        with self._qcow2(backing):
            e = self.assertRaises(exception.DiskTransitionFailed,
                                  self.transition().run)
        self.assertIn('image cache', str(e))
        self.assertEqual([], self.made)

    def test_rescued_guest_goes_back_to_the_volume(self):
        self.legacy('disk')
        xml = os.path.join(self.instance_dir, 'unrescue.xml')
        with open(xml, 'w') as f:
            f.write("<domain><devices><disk type='file'><driver type='raw'/>"
                    "<source file='%s/disk' index='1'/></disk><disk "
                    "type='file'><source file='/other'/></disk></devices>"
                    "</domain>" % self.instance_dir)
        moving = self.transition()
        moving.run()
        moving.finish()
        with open(xml) as f:
            text = f.read()
        self.assertNotIn(self.instance_dir, text)
        self.assertIn('<disk type="volume"><driver type="raw"/><source '
                      'pool="nova-disks-pool" volume="%s_disk"/>' %
                      uuids.instance, text)
        self.assertIn('<disk type="file"><source file="/other"/>', text)

    def test_rescued_guest_by_another_instances_path(self):
        """It was rescued before that was spelled otherwise."""
        self.legacy('disk')
        xml = os.path.join(self.instance_dir, 'unrescue.xml')
        with open(xml, 'w') as f:
            f.write("<domain><devices><disk type='file'><source "
                    "file='/before/%s/disk'/></disk></devices></domain>" %
                    os.path.basename(self.instance_dir))
        moving = self.transition()
        moving.run()
        moving.finish()
        with open(xml) as f:
            self.assertIn('volume="%s_disk"' % uuids.instance, f.read())

    def test_file_stays_beside_the_volume_of_another_host(self):
        """An older compute has made it when the instance was evacuated."""
        self.legacy('disk')
        moving = self.transition()
        moving.run()
        for record in self.disks.records.values():
            record.host = 'dead'
        moving.finish()
        self.assertTrue(os.path.exists(
            os.path.join(self.instance_dir, 'disk')))

    def test_last_name_is_never_removed(self):
        self.legacy('disk')
        moving = self.transition()
        moving.run()
        os.unlink(self.pool.volume(self.database['disk'].volume).path)
        self.assertRaises(exception.StorageVolumeNotFound, moving.finish)
        self.assertTrue(os.path.exists(
            os.path.join(self.instance_dir, 'disk')))


@ddt.ddt
class TestCrash(TransitionTestCase):
    """The service dies after one step; the next call finishes the work."""

    def setUp(self):
        super().setUp()
        for name in ('disk', 'disk.eph0', 'disk.config'):
            self.legacy(name)
        with open(os.path.join(self.instance_dir, 'unrescue.xml'), 'w') as f:
            f.write("<domain><devices><disk type='file'>"
                    "<source file='%s/disk'/></disk></devices></domain>" %
                    self.instance_dir)

    def _name_that_counts(self, name):
        record = self.database[name]
        if record.backend == 'libvirt-storage':
            return self.pool.volume(record.volume).path
        return os.path.join(self.instance_dir, name)

    def _assert_no_disk_is_lost(self):
        for name, content in self.content.items():
            with open(self._name_that_counts(name), 'rb') as f:
                self.assertEqual(content, f.read())

    def _crash_after(self, step):
        real = getattr(transition.Transition, step)

        def crash(moving):
            real(moving)
            raise Crash()

        with mock.patch.object(transition.Transition, step, crash):
            moving = self.transition()
            try:
                moving.run()
                moving.finish()
            except Crash:
                return
        self.fail('%s is no step' % step)

    @ddt.data(*(transition.Transition.STEPS +
                transition.Transition.CLOSING_STEPS))
    def test_linked(self, step):
        self._crash_after(step)
        self._assert_no_disk_is_lost()
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()

    @ddt.data(*(transition.Transition.STEPS +
                transition.Transition.CLOSING_STEPS))
    def test_copied(self, step):
        self.no_hard_links()
        self._crash_after(step)
        self._assert_no_disk_is_lost()
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()

    def test_guest_wrote_on_after_a_copy_that_did_not_count(self):
        self.no_hard_links()
        self._crash_after('_check_volumes')
        self.content['disk'] = b'newer'.ljust(len(self.content['disk']))
        with open(os.path.join(self.instance_dir, 'disk'), 'wb') as f:
            f.write(self.content['disk'])
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()

    def test_volume_that_libvirt_forgot_the_making_of(self):
        # Killed within libvirt: the file is there, unknown to the pool until
        # it is started with the daemon.
        self._crash_after('_fill_volumes')
        raw = self.conn.storagePoolLookupByName(self.pool.name)
        raw.destroy()
        raw.create()
        moving = self.transition()
        moving.run()
        moving.finish()
        self.assert_moved()
