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
import io
import os
import shutil
import stat
import tarfile
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova.tests.unit.virt.libvirt.storage.move import test_move
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.move import destination as arrival
from nova.virt.libvirt.storage.move import guest_files as files
from nova.virt.libvirt.storage.move import source as migration
from nova.virt.libvirt.storage.pool import access
from nova.virt.libvirt import utils as libvirt_utils

POOL = two_hosts.POOL
TPM = 'swtpm/%s/tpm2/tpm2-00.permall' % uuids.instance


def write(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as f:
        f.write(content)


def read(path):
    with open(path, 'rb') as f:
        return f.read()


class FilesTestCase(test_move.OutgoingTestCase):
    """A guest that has a TPM, UEFI firmware and a console."""

    def setUp(self):
        super().setUp()
        self.make_offer()
        self.instance.id = 1
        self.nvram = 'instance-00000001_VARS.fd'
        write(os.path.join(libvirt_utils.VTPM_DIR, uuids.instance, 'tpm2',
                           'tpm2-00.permall'), b'the state of a TPM')
        write(os.path.join(libvirt_utils.VTPM_DIR, uuids.instance, 'tpm2',
                           '.lock'), b'')
        self.host.nvram = os.path.join(files.NVRAM_DIR, self.nvram)
        write(self.host.nvram, b'variables' * 1000)
        write(os.path.join(self.directory, 'console.log'), b'it boots')
        # Each host has directories of its own; these are the destination's.
        self.there = libvirt_utils.get_instance_path(self.instance)
        self.nvram_there = os.path.join(self.directory, 'there')

    def accept(self):
        self.flags(host='dest')
        with mock.patch.object(files, 'NVRAM_DIR', self.nvram_there):
            arrival.accept(self.context, self.instance, self.load(),
                           self.dest, 'dest:///', mock.Mock())
        self.flags(host='source')

    def noted(self):
        return self.load().leftovers


@ddt.ddt
class MoveTestCase(FilesTestCase):

    def test_all_of_it(self):
        self.move()
        self.assertEqual(['disk', 'disk.config', 'disk.eph0', 'files'],
                         self.ours(self.dest))
        self.accept()
        tpm = os.path.join(self.there, TPM)
        self.assertEqual(b'the state of a TPM', read(tpm))
        self.assertEqual(0o600, stat.S_IMODE(os.stat(tpm).st_mode))
        self.assertEqual(b'it boots', read(
            os.path.join(self.there, 'console.log')))
        self.assertEqual(b'variables' * 1000, read(
            os.path.join(self.nvram_there, self.nvram)))
        self.assertEqual(['console.log', 'swtpm'],
                         sorted(os.listdir(self.there)))
        # Nothing of the volumes is left that carried it.
        self.assertNotIn('files', self.ours(self.dest))
        self.assertNotIn('files', self.ours(self.source))
        self.assertEqual([], self.noted())
        self.assertTrue(files.has_tpm(self.instance))

    def test_secret_while_on_the_way(self):
        modes = {}
        create = two_hosts.Pool.create

        def note(pool, config):
            modes[pool.daemon.name, config.name] = config.permissions.mode
            return create(pool, config)

        self.stub_out(
            'nova.tests.unit.virt.libvirt.storage.move.two_hosts.Pool.create',
            note)
        outgoing = self.outgoing()
        with mock.patch.object(outgoing.departure, '_probe'):
            outgoing.check()
        with outgoing:
            outgoing.run(self.directory)
        name = self.volume_name('files')
        self.assertEqual((0o600, 0o600), (modes['source', name],
                                          modes['dest', name]))

    def test_tpm_whose_swtpm_was_broken_into(self):
        """Nothing is read, or given away, that a link leads to."""
        secret = os.path.join(self.directory, 'secret')
        write(secret, b'not of the TPM')
        state = os.path.join(libvirt_utils.VTPM_DIR, uuids.instance, 'tpm2')
        os.symlink(secret, os.path.join(state, 'file'))
        os.symlink(os.path.dirname(secret), os.path.join(state, 'folder'))
        os.mkfifo(os.path.join(state, 'fifo'))
        self.move()
        self.accept()
        self.assertEqual([os.path.basename(TPM)], os.listdir(
            os.path.dirname(os.path.join(self.there, TPM))))
        # A revert gives to swtpm what is here.
        self.assertEqual(['.lock', os.path.basename(TPM)], sorted(os.listdir(
            os.path.dirname(os.path.join(self.directory, TPM)))))
        self.assertIn('tpm2/fifo (prw', self.stdlog.logger.output)

    @ddt.data('tpm', 'nvram')
    def test_longer_than_they_can_be(self, kind):
        path = {'tpm': os.path.join(libvirt_utils.VTPM_DIR, TPM.removeprefix(
            'swtpm/')), 'nvram': self.host.nvram}[kind]
        write(path, b'x' * 10000)
        with mock.patch.object(files, '_MAX_FILE', 9999):
            e = self.assertRaises(exception.UnsafeDiskContent, self.move)
        self.assertIn(os.path.basename(path), str(e))
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual([], self.noted())

    def test_source_can_go_back(self):
        self.move()
        self.accept()
        # The TPM's for _finish_revert_migration_vtpm(), the firmware's here.
        self.assertEqual(b'the state of a TPM', read(
            os.path.join(self.directory, TPM)))
        os.unlink(self.host.nvram)
        files.restore_nvram(self.instance, self.directory)
        self.assertEqual(b'variables' * 1000, read(self.host.nvram))
        self.assertNotIn('nvram', os.listdir(self.directory))

    def test_firmware_stays_where_it_is_on_one_host(self):
        self.migration.dest_compute = 'source'
        self.move(same_host=True)
        content = self.source.pools[POOL][self.volume_name('files.1')]
        with tarfile.open(fileobj=io.BytesIO(content['content'])) as tar:
            self.assertEqual([TPM, 'console.log'], tar.getnames())

    @ddt.data(True, False)
    def test_tpm_that_nova_can_not_see(self, has_tpm):
        found = access.Obstacle(
            '/var/lib/libvirt', 'drwxr-x--- root:root', 'x')
        if not has_tpm:
            shutil.rmtree(os.path.join(libvirt_utils.VTPM_DIR, uuids.instance))
        with mock.patch.object(access, 'obstacle', autospec=True,
                               return_value=found):
            if not has_tpm:
                self.move()
                return
            e = self.assertRaises(exception.InstanceFaultRollback,
                                  self.outgoing().check)
        for part in ('drwxr-x--- root:root',
                     'setfacl -m u:%s:x /var/lib/libvirt' % access.user()):
            self.assertIn(part, str(e)[:200])
        self.assertEqual([], self.copies)

    def test_nothing_beside_the_disks(self):
        os.rename(libvirt_utils.VTPM_DIR, libvirt_utils.VTPM_DIR + '.away')
        self.host.nvram = None
        os.unlink(os.path.join(self.directory, 'console.log'))
        self.move()
        self.assertEqual(['disk', 'disk.config', 'disk.eph0'],
                         self.ours(self.dest))
        self.assertEqual([], os.listdir(self.directory))

    def test_guest_that_was_never_started(self):
        os.unlink(self.host.nvram)
        self.move()
        self.accept()
        self.assertFalse(os.path.exists(self.nvram_there))

    def test_long_console_log(self):
        write(os.path.join(self.directory, 'console.log'),
              b'a' * 5000 + b'b' * (100 << 10))
        self.move()
        self.accept()
        self.assertEqual(b'b' * (100 << 10), read(
            os.path.join(self.there, 'console.log')))

    def test_server_without_local_disks(self):
        for name, _record in self.disks.items():
            self.disks.clear(name)
        self.disks.save(self.context)
        self.make_offer()
        self.move()
        self.assertEqual(['files'], self.ours(self.dest))
        self.assertTrue(arrival.is_due(self.instance, self.load()))
        self.accept()
        self.assertFalse(arrival.is_due(self.instance, self.load()))
        self.assertTrue(files.has_tpm(self.instance))

    def copied(self):
        return [copy[0].name for copy in self.copies]

    def move_with(self, spawn):
        """Copy one disk at a time, with what this makes of a thread."""
        self.flags(storage_migration_parallel_disks=1, group='libvirt')
        outgoing = self.outgoing()
        outgoing.check()
        self.stub_out('nova.thread_pool_factory.spawn_on', spawn)
        outgoing.run(self.directory)
        # Each disk has all of the bandwidth.
        self.assertEqual(1, outgoing._transfer.parallel)

    def test_beside_the_disks(self):
        """On a thread that doesn't go on with a disk."""
        files = [self.volume_name('files')]
        future = mock.Mock()
        future.cancel.return_value = False

        def spawn(executor, work, *args):
            work(*args)
            self.assertEqual(files, self.copied())
            return future

        self.move_with(spawn)
        future.result.assert_called_once_with()
        self.assertEqual(
            files + [self.volume_name(name) for name in (
                'disk', 'disk.config', 'disk.eph0')], self.copied())

    def test_no_thread_for_what_goes_beside_the_disks(self):
        self.move_with(lambda executor, work, *args: mock.Mock())
        self.assertIn(self.volume_name('files'), self.copied())

    def test_copy_fails(self):
        self.copy_error = exception.InternalError('pump')
        self.assertRaises(exception.InternalError, self.move)
        self.assertEqual([], self.ours(self.dest))
        self.assertNotIn('files', self.ours(self.source))
        self.assertEqual([], self.noted())
        self.assertEqual(b'the state of a TPM', read(
            os.path.join(self.directory, TPM)))

    def test_no_room_for_them(self):
        """The error says where."""
        path = os.path.join(self.directory, 'files.tar')
        os.symlink('/dev/full', path)
        e = self.assertRaises(OSError, self.move)
        self.assertEqual((errno.ENOSPC, path), (e.errno, e.filename))

    def test_compute_is_killed_in_the_midst_of_copying(self):
        class Killed(BaseException):
            pass

        self.copy_error = Killed()
        with mock.patch('nova.virt.libvirt.storage.move.copy.Transfer'
                        '.delete_created'), mock.patch(
                'nova.virt.libvirt.storage.move.copy.Transfer.restore'
                ), mock.patch('nova.virt.libvirt.storage.move.copy.Transfer'
                              '._delete_packed'):
            self.assertRaises(Killed, self.move)
        self.assertIn('files', self.ours(self.source))
        self.assertIn('files', self.ours(self.dest))
        migration.abandon(self.context, self.host, self.instance,
                          self.migration, self.load())
        self.assertEqual([], self.ours(self.dest))
        self.assertEqual(sorted(test_move.AT_SOURCE),
                         self.ours(self.source))
        self.assertEqual(test_move.AT_SOURCE, self.places())
        self.nothing_of_a_move()

    def test_destination_is_killed_while_unpacking(self):
        self.move()
        with mock.patch.object(files, 'unpack', side_effect=OSError('full')):
            self.assertRaises(OSError, self.accept)
        self.flags(host='source')
        self.assertTrue(arrival.is_due(self.instance, self.load()))
        self.accept()
        self.assertTrue(files.has_tpm(self.instance))

    def test_volume_stays_on_the_destination(self):
        self.move()
        self.dest.fail['delete'] = exception.InternalError('busy')
        self.accept()
        self.assertEqual([(POOL, self.volume_name('files'))],
                         self.left('dest'))


@ddt.ddt
class UnpackTestCase(FilesTestCase):
    """Nothing but these files, wherever the tar comes from."""

    def unpack(self, *members):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode='w') as tar:
            for member in members:
                tar.addfile(member, io.BytesIO(b'x' * member.size))
        self.unpack_tar(content.getvalue())

    def unpack_tar(self, content):
        volume = mock.Mock(content={'content': content})
        volume.physical.return_value = len(content)
        with mock.patch.object(files, 'NVRAM_DIR', self.nvram_there):
            files.unpack(self.instance, volume, self.there)

    def member(self, name, size=1, **kwargs):
        member = tarfile.TarInfo(name)
        member.size = size
        for key, value in kwargs.items():
            setattr(member, key, value)
        return member

    @ddt.data(
        '/etc/passwd', '../console.log', 'swtpm/../x', 'disk', 'nvram/../x',
        'swtpm/%s/../../x' % uuids.instance, 'swtpm/%s/..' % uuids.instance,
        'swtpm/%s/x' % uuids.other, 'swtpm/%s//x' % uuids.instance,
        'console.log\n', 'nvram/.x', 'libvirt.xml')
    def test_name(self, name):
        e = self.assertRaises(exception.InvalidDiskInfo, self.unpack,
                              self.member(name))
        self.assertIn(uuids.instance, str(e))

    @ddt.data(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
              tarfile.FIFOTYPE, tarfile.DIRTYPE)
    def test_type(self, kind):
        self.assertRaises(
            exception.InvalidDiskInfo, self.unpack, self.member(
                'console.log', size=0, type=kind, linkname='/etc/passwd'))

    def test_size(self):
        with mock.patch.object(files, '_MAX_FILE', 4):
            self.assertRaises(exception.InvalidDiskInfo, self.unpack,
                              self.member('console.log', size=5))

    def test_more_than_there_can_be(self):
        # It would all be in memory on its way to the file.
        with mock.patch.object(files, '_MAX_PACK', 4096):
            self.assertIn('4096', str(self.assertRaises(
                exception.InvalidDiskInfo, self.unpack,
                self.member('console.log', size=5000))))
        self.assertFalse(os.path.exists(self.there))

    def test_files_that_are_longer_than_they_look(self):
        # A sparse one takes up 512 bytes there, whatever it is here.
        member = self.member('swtpm/%s/tpm2/x' % uuids.instance, size=0,
                             type=tarfile.GNUTYPE_SPARSE)
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        # One piece of no bytes, and the length with the hole.
        header[386:410] = b'%011o\0%011o\0' % (1 << 20, 0)
        header[482:495] = b'\0%011o\0' % (1 << 20)
        header[148:156] = b' ' * 8
        header[148:156] = b'%06o\0 ' % sum(header)
        self.assertRaises(exception.InvalidDiskInfo, self.unpack_tar,
                          bytes(header) + bytes(10240))

    def test_too_many_files(self):
        with mock.patch.object(files, '_MAX_FILES', 3):
            self.assertRaises(exception.InvalidDiskInfo, self.unpack, *(
                self.member('swtpm/%s/tpm2/%d' % (uuids.instance, number))
                for number in range(4)))

    def test_firmware_of_another_guest(self):
        self.unpack(self.member('nvram/instance-00000002_VARS.fd'),
                    self.member('nvram/%s' % self.nvram))
        self.assertEqual([self.nvram], os.listdir(self.nvram_there))

    def test_tpm_of_a_move_that_is_given_up(self):
        with mock.patch.object(libvirt_utils, 'restore_vtpm_dir') as restore:
            files.restore_tpm(self.instance)
            restore.assert_not_called()
            saved = os.path.join(self.there, 'swtpm', uuids.instance)
            os.makedirs(saved)
            files.restore_tpm(self.instance)
        restore.assert_called_once_with(saved)

    @ddt.data(None, '/var/lib/nova/instances/disks/of-another-server')
    def test_variables_in_qcow2(self, backing_file):
        """libvirt has QEMU open what their header names."""
        name = 'instance-00000001_VARS.qcow2'
        look = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.content.look_at_qcow2')).mock
        look.return_value.backing_file = backing_file
        come = self.member('nvram/' + name)
        if backing_file:
            self.assertRaises(
                exception.UnsafeDiskContent, self.unpack, come)
            self.assertFalse(os.path.exists(self.nvram_there))
        else:
            self.unpack(come)
            self.assertEqual([name], os.listdir(self.nvram_there))
        look.assert_called_once_with(
            os.path.join(self.there, 'nvram', name))

    def test_no_room_for_it(self):
        """The error says where."""
        path = os.path.join(self.there, TPM)
        os.makedirs(os.path.dirname(path))
        os.symlink('/dev/full', path)
        e = self.assertRaises(OSError, self.unpack, self.member(TPM))
        self.assertEqual((errno.ENOSPC, path), (e.errno, e.filename))

    def test_console_log_that_is_there(self):
        write(os.path.join(self.there, 'console.log'), b'newer')
        self.unpack(self.member('console.log'))
        self.assertEqual(b'newer', read(
            os.path.join(self.there, 'console.log')))
