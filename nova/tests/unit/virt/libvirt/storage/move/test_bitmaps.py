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
"""Dirty bitmaps in real images, and their checkpoints on a fake guest."""

import os
import random
import shutil
import subprocess
import types
from unittest import mock

import ddt
import fixtures
from lxml import etree
from oslo_concurrency import processutils
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova.objects import instance as instance_obj
import nova.privsep.qemu
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt import images
from nova.virt.libvirt import config as guest_config
from nova.virt.libvirt.storage.move import bitmaps

KIB, MIB = 1 << 10, 1 << 20


def run(*command):
    return subprocess.run(command, check=True, capture_output=True,
                          text=True).stdout


def users_of(path):
    """The command lines that have a path in them, of what runs here."""
    found = []
    for process in os.scandir('/proc'):
        if process.name.isdigit():
            try:
                with open(os.path.join(process.path, 'cmdline')) as f:
                    found.append(f.read())
            except OSError:
                continue    # it has ended
    return [line for line in found if path in line]


class Item:
    """A disk whose file is here."""

    def __init__(self, path, dev='vda', pool='pool', format='qcow2'):
        self.source = mock.Mock(path=path)
        self.source.name = os.path.basename(path)
        self.source.pool.name = pool
        self.record = types.SimpleNamespace(format=format)
        self.device = guest_config.LibvirtConfigGuestDisk()
        self.device.target_dev = dev
        self.device.source_pool = pool
        self.device.source_volume = self.source.name
        if os.path.exists(path):
            self.measure()

    def measure(self):
        self.length = os.path.getsize(self.source.path)


class BitmapsTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fakelibvirt.LibvirtFixture())
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.instance = instance_obj.Instance(uuid=uuids.instance)
        self.guest = mock.Mock()
        self.guest.is_active.return_value = True
        self.guest.delete_checkpoints.return_value = []
        self.jobs = {}
        self.guest.get_block_device.side_effect = (
            lambda disk: types.SimpleNamespace(
                get_job_info=lambda: self.jobs.get(disk)))
        self.host = mock.Mock()
        self.host.get_guest.return_value = self.guest
        self.bitmaps = bitmaps.Bitmaps(self.host, self.instance)

    def image(self, name='disk', size='64M', options='compat=1.1', **kwargs):
        path = os.path.join(self.folder, name)
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', options, path,
            size)
        return Item(path, **kwargs)

    def begin(self, *items):
        """Begin, and be QEMU; returns the checkpoint as (device, what)."""
        self.guest.get_config.return_value.devices = [
            item.device for item in items] + [
                guest_config.LibvirtConfigGuestInterface()]
        self.bitmaps.begin(items)
        if not self.guest.create_checkpoint.called:
            return None
        root = etree.fromstring(self.guest.create_checkpoint.call_args.args[0])
        self.name = root.findtext('name')
        for disk, item in zip(root.iter('disk'), items):
            if (disk.get('checkpoint') == 'bitmap' and
                    not self.guest.create_checkpoint.side_effect):
                self.assertEqual(self.name, disk.get('bitmap'))
                self.add_bitmap(item, self.name)
        return [(disk.get('name'), disk.get('checkpoint'))
                for disk in root.iter('disk')]

    def add_bitmap(self, item, name):
        run('qemu-img', 'bitmap', '--add', '-f', 'qcow2', item.source.path,
            name)

    def write(self, item, *commands):
        subprocess.run(
            ['qemu-io', '-f', 'qcow2', item.source.path], check=True,
            text=True, input='\n'.join(commands), stdout=subprocess.DEVNULL)

    def left(self, item):
        info = jsonutils.loads(run('qemu-img', 'info', '--output=json', '-f',
                              'qcow2', item.source.path))
        return [bitmap['name'] for bitmap in
                info['format-specific']['data'].get('bitmaps', ())]


@ddt.ddt
class ChangedTestCase(BitmapsTestCase):

    def test_what_is_written(self):
        item = self.image()
        self.write(item, 'write -P 1 0 8M')
        item.measure()
        self.assertEqual([('vda', 'bitmap')], self.begin(item))
        before = item.length
        self.write(item, 'write -P 2 1M 4k', 'write -P 3 32M 64k')
        changed = self.bitmaps.changed(item)
        # Header and tables, one of the old clusters, and what is new.
        self.assertLess(sum(length for _start, length in changed), MIB)
        self.assertEqual(item.length, sum(changed[-1]))
        self.assertLessEqual(changed[-1][0], before)
        self.assertEqual([], self.left(item))

    @ddt.data(('64k', 1), ('64k', 2), ('2M', 3), ('4k', 4))
    @ddt.unpack
    def test_all_else_is_as_it_was(self, cluster, seed):
        chance = random.Random(seed)
        base = os.path.join(self.folder, 'base')
        with open(base, 'wb') as f:
            f.write(chance.randbytes(48 * MIB))
        item = self.image(options='compat=1.1,cluster_size=%s,backing_fmt=raw,'
                                  'backing_file=%s' % (cluster, base))

        def write(times):
            self.write(item, *(chance.choice((
                'write -P %d %%d %%d' % chance.randrange(1, 255),
                'write -P %d %%d %%d' % chance.randrange(1, 255),
                'write -z %d %d', 'write -zu %d %d', 'discard %d %d')) % (
                    chance.randrange(0, 62 * MIB) // 512 * 512,
                    chance.choice((512, 4096, 70144, MIB)))
                for _n in range(times)))

        write(80)
        item.measure()
        self.begin(item)
        # A file is read to where it ended when it was measured.
        sent = item.length
        copy = os.path.join(self.folder, 'copy')
        shutil.copy(item.source.path, copy)
        os.truncate(copy, sent)
        write(12)
        changed = self.bitmaps.changed(item)
        self.assertLess(sum(length for _start, length in changed),
                        item.length)
        with open(item.source.path, 'rb') as now, open(copy, 'r+b') as then:
            for start, length in changed:
                now.seek(start)
                then.seek(start)
                then.write(now.read(length))
        run('cmp', item.source.path, copy)
        run('qemu-img', 'check', '-q', '-f', 'qcow2', item.source.path)

    def test_what_was_not_sent(self):
        # It has grown since it was measured, and before it was noted.
        item = self.image()
        self.write(item, 'write -P 1 0 1M')
        item.measure()
        sent = item.length
        self.write(item, 'write -P 2 1M 1M')
        self.begin(item)
        changed = self.bitmaps.changed(item)
        self.assertEqual((sent, item.length),
                         (changed[-1][0], sum(changed[-1])))

    def test_compressed_clusters(self):
        item = self.image()
        self.write(item, *('write -c -P %d %dk 64k' % (n + 1, 64 * n)
                           for n in range(16)))
        item.measure()
        self.begin(item)
        changed = self.bitmaps.changed(item)
        self.assertEqual([(0, item.length)], changed)

    def test_guest_was_killed(self):
        # QEMU stores a bitmap when it ends.
        item = self.image()
        self.begin(item)
        run('qemu-img', 'bitmap', '--remove', '-f', 'qcow2', item.source.path,
            self.name)
        self.assertIsNone(self.bitmaps.changed(item))
        self.assertIn('no bitmap', self.stdlog.logger.output)

    def never_close(self, item):
        """Be a QEMU that is killed."""
        with subprocess.Popen(
                ['qemu-io', '-f', 'qcow2', item.source.path], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
            guest.stdin.write('write -P 1 0 1M\n')
            guest.stdin.flush()
            self.assertIn('wrote', guest.stdout.readline())
            guest.kill()

    def test_bitmap_that_was_never_closed(self):
        item = self.image()
        self.begin(item)
        self.never_close(item)
        self.assertIsNone(self.bitmaps.changed(item))
        self.assertEqual([], self.left(item))

    def test_those_of_a_guest_that_is_off(self):
        """Its host has crashed in a move, and it is moved before it runs."""
        item = self.image()
        for name in 'nova-move-old', 'backup':
            self.add_bitmap(item, name)
        self.never_close(item)
        run('qemu-img', 'bitmap', '--remove', '-f', 'qcow2',
            item.source.path, 'backup')
        grow = ('qemu-img', 'resize', '-q', '-f', 'qcow2', item.source.path,
                '128M')
        self.assertRaises(subprocess.CalledProcessError, run, *grow)
        self.forget(item)
        run(*grow)
        self.assertEqual([], self.left(item))

    def forget(self, item):
        bitmaps.forget(
            item.source, images.privileged_qemu_img_info(
                item.source.path, format='qcow2'), self.instance)

    def test_those_of_others_stay(self):
        item = self.image()
        for name in 'nova-move-old', 'backup':
            self.add_bitmap(item, name)
        self.forget(item)
        self.assertEqual(['backup'], self.left(item))

    def test_they_can_not_be_removed(self):
        item = self.image()
        self.add_bitmap(item, 'nova-move-old')
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu.remove_dirty_bitmap',
            side_effect=processutils.ProcessExecutionError('busy')))
        self.forget(item)
        self.assertIn('busy', self.stdlog.logger.output)

    def test_those_of_moves_that_were_cut_off(self):
        item = self.image()
        self.add_bitmap(item, 'nova-move-old')
        self.add_bitmap(item, 'backup')
        self.begin(item)
        self.assertIsNotNone(self.bitmaps.changed(item))
        self.assertEqual(['backup'], self.left(item))

    def test_bitmap_that_was_disabled(self):
        # It has missed what was written since.
        item = self.image()
        self.begin(item)
        run('qemu-img', 'bitmap', '--disable', '-f', 'qcow2',
            item.source.path, self.name)
        self.write(item, 'write -P 1 0 1M')
        self.assertIsNone(self.bitmaps.changed(item))
        self.assertEqual([], self.left(item))

    def test_it_is_not_begun(self):
        self.assertIsNone(self.bitmaps.changed(self.image()))

    def test_it_can_not_be_read(self):
        item = self.image()
        self.begin(item)
        os.rename(item.source.path, item.source.path + '-')
        self.assertIsNone(self.bitmaps.changed(item))
        self.assertIn('is not known', self.stdlog.logger.output)

    @ddt.data(processutils.ProcessExecutionError('no qemu-nbd'),
              exception.InvalidDiskInfo(reason='too much'))
    def test_it_is_removed_though_it_can_not_be_read(self, error):
        item = self.image()
        self.begin(item)
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu.read_dirty_bitmap', side_effect=error))
        self.assertIsNone(self.bitmaps.changed(item))
        self.assertEqual([], self.left(item))

    def test_nobody_uses_an_image_that_was_read(self):
        # QEMU's lock would keep the next one from it.
        item = self.image()
        self.begin(item)
        nova.privsep.qemu.read_dirty_bitmap(item.source.path, self.name)
        self.assertEqual([], users_of(item.source.path))

    def test_reading_fails(self):
        # The server of the bitmap has nobody to serve.
        item = self.image()
        self.begin(item)
        map_ = nova.privsep.qemu._map
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu._map', side_effect=[
                map_(item.source.path), exception.InvalidDiskInfo(reason='')]))
        self.assertIsNone(self.bitmaps.changed(item))
        self.assertEqual([], self.left(item))
        self.assertEqual([], users_of(item.source.path))

    def test_program_that_does_not_end(self):
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu._SECONDS_TO_RUN', .1))
        e = self.assertRaises(processutils.ProcessExecutionError,
                              nova.privsep.qemu._run, 'sleep', '600')
        self.assertEqual(-9, e.exit_code)

    def test_server_that_does_not_end(self):
        # As long as it runs, its lock keeps QEMU from the image.
        item = self.image()
        self.begin(item)
        map_ = nova.privsep.qemu._map

        def stop(*image):
            if '--image-opts' not in image:
                return map_(*image)
            subprocess.check_call(['pkill', '-STOP', '-f', '--', (
                '--bitmap.*' + item.source.path)])
            raise exception.InvalidDiskInfo(reason='')

        self.useFixture(fixtures.MockPatch('nova.privsep.qemu._map', new=stop))
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu._SECONDS_TO_END', 1))
        self.assertIsNone(self.bitmaps.changed(item))
        self.assertEqual([], users_of(item.source.path))

    def test_more_than_can_be_told(self):
        # oslo.privsep ends for all when an answer has 100 MiB.
        item = self.image()
        self.write(item, *('write %dk 64k' % at
                           for at in (*range(0, 8192, 128),
                                      *range(64, 8192, 128))))
        item.measure()
        self.begin(item)
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu._MOST_MAPPED', 8192))
        self.assertIsNone(self.bitmaps.changed(item))
        self.assertEqual([], self.left(item))
        self.assertIn('is in too many pieces', self.stdlog.logger.output)


@ddt.ddt
class CheckpointTestCase(BitmapsTestCase):

    def test_disks_that_take_none(self):
        other = Item('/nowhere', 'vde', format='raw')
        config_drive = self.image('disk.config', dev='hda')
        config_drive.device.source_device = 'cdrom'
        self.assertEqual(
            [('vda', 'bitmap'), ('vdb', 'no'), ('vdc', 'bitmap'),
             ('vde', 'no'), ('hda', 'no')],
            self.begin(self.image(),
                       self.image('old', options='compat=0.10', dev='vdb'),
                       self.image('eph0', dev='vdc'), other, config_drive))

    def test_disk_that_is_pulled_out_of_its_base(self):
        # No bitmap tells which clusters that fills.
        self.jobs['vda'] = mock.sentinel.job
        self.assertEqual(
            [('vda', 'no'), ('vdb', 'bitmap')],
            self.begin(self.image(), self.image('eph0', dev='vdb')))

    def test_guest_that_knows_its_disk_by_path(self):
        # as after a live migration
        item = self.image()
        item.device.source_pool = item.device.source_volume = None
        item.device.source_path = item.source.path
        self.assertEqual([('vda', 'bitmap')], self.begin(item))

    def test_nothing_to_note(self):
        self.assertIsNone(self.begin(Item('/nowhere', format='raw')))
        self.bitmaps.end()
        self.guest.delete_checkpoints.assert_not_called()

    def test_guest_is_off(self):
        self.guest.is_active.return_value = False
        self.assertIsNone(self.begin(self.image()))

    def test_refused(self):
        item = self.image()
        self.guest.create_checkpoint.side_effect = fakelibvirt.libvirtError(
            'no checkpoints here')
        self.begin(item)
        self.assertIn('no checkpoints here', self.stdlog.logger.output)
        self.assertIsNone(self.bitmaps.changed(item))
        # Who knows what it has done.
        self.bitmaps.end()
        self.guest.delete_checkpoints.assert_called_once()

    def test_end(self):
        item = self.image()
        self.begin(item)
        self.bitmaps.end()
        self.bitmaps.end()
        self.guest.delete_checkpoints.assert_called_once_with(self.name)
        self.assertIsNone(self.bitmaps.changed(item))

    def test_end_of_a_guest_that_has_ended(self):
        # Nobody will ask what it has written.
        item, other = self.image(), self.image('eph0', dev='vdb')
        self.add_bitmap(item, 'backup')
        self.begin(item, other)
        self.guest.is_active.return_value = False
        self.bitmaps.end()
        self.assertEqual(['backup'], self.left(item))
        self.assertEqual([], self.left(other))

    def test_end_of_a_guest_that_runs(self):
        # QEMU removes it.
        item = self.image()
        self.begin(item)
        self.bitmaps.end()
        self.assertEqual([self.name], self.left(item))

    @ddt.data(exception.InstanceNotFound(instance_id='i'),
              fakelibvirt.libvirtError('not now'))
    def test_end_fails(self, error):
        self.begin(self.image())
        self.guest.delete_checkpoints.side_effect = error
        self.bitmaps.end()

    def test_recover(self):
        other = mock.Mock()
        other.delete_checkpoints.side_effect = fakelibvirt.libvirtError('no')
        self.guest.delete_checkpoints.return_value = ['nova-move-x']
        self.host.list_guests.return_value = [other, self.guest]
        bitmaps.recover(self.host)
        self.host.list_guests.assert_called_once_with(only_running=False)
        self.guest.delete_checkpoints.assert_called_once_with('nova-move-')
        self.assertIn('nova-move-x', self.stdlog.logger.output)
