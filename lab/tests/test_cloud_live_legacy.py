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
"""Legacy servers come into pools while they run, and by the bulk command."""

import unittest

from lab.cloud import database
from lab.tests import cloud_case
from lab.tests.live_case import LiveCase

load_tests = cloud_case.only_in_full


class LegacyCase(LiveCase):
    """Both hosts keep legacy disks until a scenario says otherwise."""

    images_type = 'qcow2'
    made_with = {}

    def setUp(self):
        super().setUp()
        self.cloud.set_images_type(self.images_type, **self.made_with)

    def legacy_server(self, **more):
        server, said = self.writing_server(**more)
        self.assertEqual({'file'}, self.kinds(server))
        return server, said

    def begun_slowly(self):
        """A legacy server that is on its way into the pool of host-b."""
        self.set_options({'live_migration_bandwidth': 4})
        self.addCleanup(self.set_options, {'live_migration_bandwidth': 0})
        server, said = self.legacy_server()
        self.pools_on('host-b')
        self.begin(server)
        return server, said

    def kill_destination(self, server):
        """Have libvirt die there; back when nothing is under way."""
        self.b.kill('libvirtd')
        self.b.restart('libvirtd')
        self.b.wait_ready()
        self.recovered(server)

    def kinds(self, server):
        return {kind for kind, _name, _format in
                self.sources(server).values()}

    def pools_on(self, *hosts):
        for host in hosts:
            if self.cloud.get(host, 'libvirt', 'images_type') != (
                    'libvirt-storage'):
                self.cloud.set(host, 'libvirt', 'images_type',
                               'libvirt-storage')

    def wait_ready(self, *hosts):
        """Until each host has told the database that it takes volumes."""
        for host in hosts:
            self.wait_for(lambda: 'libvirt_storage' in self.stats(host), 90,
                          'the readiness of ' + host)

    def stats(self, host):
        return database.query(
            self.cloud, "SELECT stats FROM compute_nodes WHERE deleted = 0 "
            "AND host = '%s'" % host)[0][0] or ''

    def migrate_disks(self, *words, status=0):
        done = self.cloud.manage('libvirt', 'migrate_disks', *words,
                                 check=False, timeout=600)
        print(done.stdout)
        self.assertNotIn('Traceback', done.stdout + done.stderr)
        self.assertEqual(status, done.returncode, done.stdout + done.stderr)
        return done.stdout


class TestTransition(LegacyCase):
    """Instances' directories aren't shared: each disk is copied."""

    def test_into_pools_and_on(self):
        server, said = self.legacy_server()
        self.pools_on('host-a', 'host-b')
        self.live(server, 'host-b')
        said = self.assert_here(server, 'host-b', said)
        self.assert_moves(server, said)
        server.hard_reboot()
        self.assert_kept(server.testimony(after=said))
        self.assertEqual({'volume'}, self.kinds(server))

    def test_from_a_host_without_pools(self):
        server, said = self.legacy_server()
        self.pools_on('host-b')
        self.live(server, 'host-b')
        said = self.assert_here(server, 'host-b', said)
        self.pools_on('host-a')
        self.assert_moves(server, said, ['host-a'])

    def test_rollback(self):
        server, said = self.begun_slowly()
        self.wait_for(lambda: self.arrived(server) >= 2 << 20,
                      what='the middle of the copy')
        self.kill_destination(server)
        self.assertEqual(['host-a'], self.runs_on(server))
        self.assertEqual('host-a', server.host)
        after = server.look()
        self.assertEqual(said.boot_id, after.boot_id)
        self.assert_kept(after)
        self.assertEqual({'file'}, self.kinds(server))
        self.set_options({'live_migration_bandwidth': 0})
        self.live(server, 'host-b')
        self.assert_here(server, 'host-b', said)


class TestFlatTransition(TestTransition):
    """Raw files, made beside a base image."""

    images_type = 'flat'
    made_with = {'use_cow_images': 'false'}
    test_rollback = None


class TestMigrateDisks(LegacyCase):
    """nova-manage libvirt migrate_disks."""

    def test_without_one_reboot(self):
        """A cloud that runs ends with all servers in pools."""
        one, first = self.legacy_server(name='one')
        two, second = self.legacy_server(name='two')
        self.pools_on('host-b')
        self.wait_ready('host-b')
        told = self.migrate_disks('--host', 'host-a', '--dry-run', '--live',
                                  status=3)
        self.assertIn(one.id, told)
        self.assertEqual({'file'}, self.kinds(one))
        self.migrate_disks('--host', 'host-a', '--live', '--max', '1',
                           status=1)
        self.migrate_disks('--host', 'host-a', '--live', '--max', '1')
        self.migrate_disks('--live')
        for server, said in ((one, first), (two, second)):
            server.stay_awake()
            self.assert_here(server, 'host-b', said)

    def test_hard_reboot(self):
        running, said = self.legacy_server(name='running')
        stopped, _said = self.legacy_server(name='stopped')
        stopped.stop()
        told = self.migrate_disks('--hard-reboot', status=3)
        self.assertIn('host host-a keeps no disks in storage pools', told)
        self.pools_on('host-a', 'host-b')
        self.wait_ready('host-a')
        told = self.migrate_disks(status=3)
        self.assertIn('--hard-reboot is not given', told)
        told = self.migrate_disks('--hard-reboot', status=3)
        self.assertIn('its disks move when it is started', told)
        said = running.testimony(after=said)
        self.assert_kept(said)
        self.assertEqual({'volume'}, self.kinds(running))
        self.assertEqual('SHUTOFF', stopped.get().status)
        stopped.start()
        self.migrate_disks('--hard-reboot')
        self.assertEqual({'volume'}, self.kinds(stopped))

    def test_no_destination_takes_it(self):
        """Refused, it is rebooted only if that is allowed."""
        server, said = self.legacy_server()
        self.pools_on('host-a', 'host-b')
        self.wait_ready('host-a', 'host-b')
        self.b.fill('nova-disks-pool', leave=1 << 20)
        try:
            self.migrate_disks('--live', status=2)
            self.assertEqual(said.boot_id, server.look().boot_id)
            self.migrate_disks('--live', '--hard-reboot')
        finally:
            self.b.free('nova-disks-pool')
        said = server.testimony(after=said)
        self.assert_kept(said)
        self.assertEqual(('host-a', {'volume'}),
                         (server.host, self.kinds(server)))


class TestSharedInstances(LegacyCase):
    """Both hosts see all instances' directories, on a shared file system."""

    mount = '/var/lib/nova/shared'
    instances = mount + '/instances'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.share(cls.mount)
        (cls.folder / 'instances').mkdir(exist_ok=True)
        (cls.folder / 'instances').chmod(0o777)
        for host in (cls.a, cls.b):
            cls.forget_pools(host)
            cls.cloud.set(host.name, 'DEFAULT', 'instances_path',
                          cls.mount + '/instances')

    @classmethod
    def tearDownClass(cls):
        for host in (cls.a, cls.b):
            cls.forget_pools(host)
            cls.cloud.set(host.name, 'DEFAULT', 'instances_path',
                          '/var/lib/nova/instances')
        cls.cloud.set_images_type('qcow2')
        cls.unshare()
        super().tearDownClass()

    def assert_here(self, server, host, before, **more):
        said = super().assert_here(server, host, before, copied=False)
        # It has one directory, which no host may take from the other.
        self.assertTrue((self.folder / 'instances' / server.id).is_dir())
        return said

    def names(self, server):
        """How many names each file of the instance directory has."""
        return {path.name: path.stat().st_nlink for path in (
            self.folder / 'instances' / server.id).glob('disk*')
            if path.name != 'disk.info'}

    def test_link(self):
        """The files become volumes by second names; nothing is copied."""
        server, said = self.legacy_server()
        self.assertEqual({1}, set(self.names(server).values()))
        self.pools_on('host-a', 'host-b')
        self.live(server, 'host-b')
        said = self.assert_here(server, 'host-b', said)
        self.assertEqual({}, self.names(server))
        self.assertEqual({'volume'}, self.kinds(server))
        self.assert_moves(server, said)

    def test_rollback(self):
        """One of two names goes, and the guest goes on with the other."""
        server, said = self.begun_slowly()
        self.newest_migration(server)
        self.assertEqual({2}, set(self.names(server).values()))
        self.kill_destination(server)
        # The destination has cut the console that both hosts see, and bindfs
        # appends nothing to it any more: the guest is heard after the move.
        self.assertEqual(['host-a'], self.runs_on(server))
        self.assertEqual({'file'}, self.kinds(server))
        self.assertEqual({1}, set(self.names(server).values()))
        self.set_options({'live_migration_bandwidth': 0})
        self.live(server, 'host-b')
        self.assert_here(server, 'host-b', said)


if __name__ == '__main__':
    unittest.main()
