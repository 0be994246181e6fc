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
"""Servers with disks in pools migrate live.

LAB_LIVE_MOVES is the number of moves there and back; 50 are a soak.
"""

import contextlib
import os
import pathlib
import statistics
import subprocess
import unittest

from lab import config
from lab.machine import Machine
from lab.tests import cloud_case
from lab.tests.live_case import LiveCase
from lab.tests.live_case import OTHER
from lab.tests.live_case import POOL
from lab.tests import test_cloud_moves
from lab.tests import test_cloud_pool

load_tests = cloud_case.only_in_full


class TestLive(LiveCase):
    """Each host has pools of its own: the disks are copied."""

    def test_there_and_back(self):
        moves = int(os.environ.get('LAB_LIVE_MOVES', '6'))
        server, said = self.writing_server()
        first = self.allocation(server, 'host-a')
        took = []
        for number in range(1, moves + 1):
            here = server.host
            before = self.allocation(server, here)
            took.append(self.live(server, OTHER[here]))
            after = self.allocation(server, OTHER[here])
            said = self.assert_here(server, OTHER[here], said)
            self.assert_no_growth(before, after)
            print('move %d of %d: %.1f s, %d MiB, written %d times' % (
                number, moves, took[-1], sum(after.values()) >> 20,
                said.written))
        print('median %.1f s; %d MiB at first, %d at last' % (
            statistics.median(took), sum(first.values()) >> 20,
            sum(after.values()) >> 20))

    def test_paused(self):
        server, said = self.writing_server()
        server.api.pause_server(server.id)
        server.wait('PAUSED')
        self.live(server, 'host-b', 'PAUSED')
        self.assertEqual(['host-b'], self.runs_on(server))
        server.api.unpause_server(server.id)
        server.wait('ACTIVE')
        server.stay_awake()
        said = self.assert_here(server, 'host-b', said)
        self.assert_moves(server, said, ['host-a'])

    def test_raw_disks(self):
        self.set_options({'storage_raw_files': 'true'})
        self.addCleanup(self.set_options, {'storage_raw_files': 'false'})
        self.cloud.set_images_type(self.images_type, use_cow_images='false')
        self.addCleanup(self.cloud.set_images_type, self.images_type)
        server, said = self.writing_server()
        self.assertEqual({'raw'}, {
            kind for _type, _name, kind in self.sources(server).values()})
        before = self.allocation(server, 'host-a')
        self.live(server, 'host-b')
        self.assert_no_growth(before, self.allocation(server, 'host-b'))
        said = self.assert_here(server, 'host-b', said)
        self.assert_moves(server, said, ['host-a'])

    def test_vfat_config_drive(self):
        """The guest may write to it, so that it is copied like a disk."""
        # Nova mounts it to fill it.
        if 'vfat' not in pathlib.Path('/proc/filesystems').read_text() and (
                subprocess.run(['sh', '-c', 'modprobe -nq vfat']).returncode):
            self.skipTest("the kernel of this machine mounts no vfat")
        for host in config.HOSTS:
            self.cloud.set(host, 'DEFAULT', 'config_drive_format', 'vfat')
            self.addCleanup(self.cloud.set, host, 'DEFAULT',
                            'config_drive_format', 'iso9660')
        server, said = self.writing_server()
        self.assertEqual('vfat', said.config['format'])
        said = self.assert_moves(server, said)

    def test_unshelved(self):
        """Its base is a snapshot that the destination can't have."""
        server, said = self.server()
        server.shelve()
        server.unshelve()
        said = server.testimony(after=said)
        server.command('fill', 'raw', 4, 'beta', 'vdb', 64)
        server.command('keep-writing', 256)
        said = server.look()
        home = server.host
        self.live(server, OTHER[home])
        said = self.assert_here(server, OTHER[home], said)
        self.assert_moves(server, said, [home])

    def test_base_image_that_glance_has_lost(self):
        own = self.copy_image('lost')
        server, said = self.writing_server(image='lost')
        self.cloud.conn.image.delete_image(own.id)
        self.live(server, 'host-b')
        said = self.assert_here(server, 'host-b', said)
        server.hard_reboot()
        self.assert_kept(server.testimony(after=said))

    def test_two_at_once(self):
        one, first = self.writing_server(name='one')
        two, second = self.writing_server(name='two')
        self.begin(one)
        self.begin(two)
        for server, said in ((one, first), (two, second)):
            self.assertEqual('host-b', self.settled(server).compute_host)
            self.assert_here(server, 'host-b', said)

    def test_no_room(self):
        """Refused before anything has happened."""
        server, said = self.writing_server()
        self.b.fill(POOL, leave=4 << 20)
        try:
            with contextlib.suppress(Exception):
                self.begin(server)
            self.settled(server)
        finally:
            self.b.free(POOL)
        said = self.assert_here(server, 'host-a', said)
        self.assert_moves(server, said)


class TestAfterwards(LiveCase):
    """What is done to a server that has come by live migration."""

    def moved(self):
        server, said = self.writing_server()
        self.live(server, 'host-b')
        return server, self.assert_here(server, 'host-b', said)

    def assert_started(self, server, before, host='host-b', after=None):
        """It has been started, with all that it had before.

        :param after: what its guest has said last, if not what it said before
        """
        said = server.testimony(after=after or before)
        self.assert_kept(said)
        self.assertEqual(before.config['files'], said.config['files'])
        self.assertEqual({'volume'}, {
            kind for kind, _name, _format in self.sources(server).values()})
        self.assert_on_record(server, host)
        return said

    def test_reboots(self):
        server, said = self.moved()
        server.soft_reboot()
        said = self.assert_started(server, said)
        self.live(server, 'host-a')
        server.command('keep-writing', 256)
        said = self.assert_here(server, 'host-a', said)
        server.hard_reboot()
        said = self.assert_started(server, said, 'host-a')
        server.stop()
        server.start()
        self.assert_started(server, said, 'host-a')

    def test_snapshot(self):
        server, said = self.moved()
        image = server.snapshot('snapshot-of-' + server.id)
        self.addCleanup(self.cloud.conn.image.delete_image, image.id)
        said = self.assert_here(server, 'host-b', said)
        copy = self.boot('copy', image=image.name)
        self.assert_data(copy.testimony(), data=test_cloud_moves.DATA)
        self.assert_moves(server, said, ['host-a'])

    def test_cold_migration(self):
        server, said = self.moved()
        server.migrate('host-a')
        said = server.testimony(after=said)
        self.assert_kept(said)
        server.revert()
        said = self.assert_started(server, said)
        server.migrate('host-a')
        said = server.testimony(after=said)
        server.confirm()
        self.assert_on_record(server, 'host-a')
        self.assert_nothing_left(server, 'host-b')
        self.live(server, 'host-b')
        server.command('keep-writing', 256)
        self.assert_here(server, 'host-b', said)

    def test_rescue(self):
        server, said = self.moved()
        server.rescue()
        rescued = server.testimony(after=said)
        (other,) = rescued.others.values()
        self.assertEqual(said.ranges['data']['sha256'],
                         other['ranges']['data']['sha256'])
        server.unrescue()
        # The rescue had a config drive of its own.
        self.assert_started(server, said, after=rescued)
        server.command('keep-writing', 256)
        self.assert_moves(server, server.look(), ['host-a'])

    def test_resize(self):
        server, said = self.moved()
        server.resize('lab.medium.disks')
        said = server.testimony(after=said)
        self.assert_kept(said)
        server.confirm()
        home = server.host
        self.assert_nothing_left(server, OTHER[home])
        server.command('keep-writing', 256)
        said = server.look()
        self.assert_moves(server, said, [OTHER[home]])

    def lose_b(self, server):
        """Let host-b die with a server's guest."""
        self.b.kill('nova-compute')
        with server.domain('host-b') as domain:
            domain.destroy()

    def test_evacuate(self):
        """Its host dies with its disks: it starts over from its image."""
        server, _said = self.moved()
        self.lose_b(server)
        with self.cloud.forced_down('host-b'):
            server.api.evacuate_server(server.id, host='host-a')
            # It has settled a moment before the API says where.
            self.wait_for(
                lambda: self.settled(server).compute_host == 'host-a', 30,
                'the server on host-a')
            found = self.settled(server)
            if found.status == 'SHUTOFF':
                server.start()
            server._awake = False
            self.assert_on_record(server, 'host-a')
        self.wait_for(lambda: not server.left_on('host-b'), 60,
                      'a clean host-b')
        said = server.testimony()
        self.assertEqual(1, said.boot)
        server.command('fill', 'data', 12, 'alpha')
        server.command('fill', 'raw', 4, 'beta', 'vdb', 64)
        server.command('keep-writing', 256)
        self.assert_moves(server, server.look())

    def test_evacuation_is_cut_off(self):
        """Its host is back with its disks, and nobody else has them."""
        server, said = self.moved()
        self.lose_b(server)
        with self.cloud.forced_down('host-b'):
            server.api.evacuate_server(server.id, host='host-a')
            self.wait_for(
                lambda: server.get().task_state == 'rebuild_spawning', 30,
                'the server on its way')
            self.a.kill('nova-compute')
            self.assertEqual('host-b', server.host)
        self.cloud.start_compute('host-a')
        server.api.reset_server_state(server.id, 'active')
        server.hard_reboot()
        said = server.testimony(after=said)
        self.assert_data(said, data=test_cloud_moves.DATA)
        self.assert_on_record(server, 'host-b')
        server.command('keep-writing', 256)
        self.assert_moves(server, server.look(), ['host-a'])


class TestHostile(test_cloud_pool.TestHostile):
    """A header on every disk that the guest can write to."""

    raw = ('vda', 'vdb', 'vdc')
    test_in_place = test_moves = None

    def test_live(self):
        server, said = self.hostile_server()
        for host in ('host-b', 'host-a', 'host-b'):
            server.live_migrate(host)
            self.settle(server)
            after = server.look()
            self.assertEqual(said.boot_id, after.boot_id)
            self.assert_raw(server, after)
            # Nova says ACTIVE before the source has cleaned up.
            self.assert_soon(lambda: not server.left_on(OTHER[host]))
        server.hard_reboot()
        self.assert_goes_on(server, after)

    def settle(self, server):
        for host in config.HOSTS:
            Machine(host).run(['virsh', '-q', 'pool-refresh', POOL])


class TestSharedPool(LiveCase):
    """One directory, on a file system that libvirt takes for shared."""

    mount = '/var/lib/nova/shared'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.share(cls.mount)
        cls.use(cls.mount)

    @classmethod
    def tearDownClass(cls):
        cls.use(cls.instances + '/disks')
        cls.unshare()
        super().tearDownClass()

    def files(self, server):
        return sorted(path.name for path in self.folder.iterdir()
                      if server.id in path.name)

    def assert_volumes(self, server, host):
        for name, (kind, _volume, _format) in self.sources(
                server, inactive=True).items():
            self.assertEqual('volume', kind, name)

    def assert_here(self, server, host, before, **more):
        return super().assert_here(server, host, before, copied=False)

    def test_nothing_is_copied(self):
        server, said = self.writing_server()
        files = self.files(server)
        inodes = {path: (self.folder / path).stat().st_ino for path in files}
        for host in ('host-b', 'host-a'):
            self.live(server, host)
            said = self.assert_here(server, host, said)
            self.assertEqual(files, self.files(server))
            self.assertEqual(inodes, {
                path: (self.folder / path).stat().st_ino for path in files})
        server.hard_reboot()
        self.assert_kept(server.testimony(after=said))
        server.delete()
        self.assertEqual([], self.files(server))

    def test_rollback(self):
        """A failed one deletes nothing that the guest runs on."""
        self.set_options({'live_migration_bandwidth': 4})
        self.addCleanup(self.set_options, {'live_migration_bandwidth': 0})
        server, said = self.writing_server()
        files = self.files(server)
        self.begin(server)
        self.newest_migration(server)
        self.b.kill('libvirtd')
        self.b.restart('libvirtd')
        self.b.wait_ready()
        self.recovered(server)
        said = self.assert_here(server, 'host-a', said)
        self.assertEqual(files, self.files(server))
        # Its memory changes about as fast as that.
        self.set_options({'live_migration_bandwidth': 0})
        self.assert_moves(server, said)
        self.assertEqual(files, self.files(server))


if __name__ == '__main__':
    unittest.main()
