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
"""Servers that move from one Ceph pool into another, and back."""

import signal
import time
import unittest

from lab import ceph
from lab.machine import Machine
from lab.tests import cloud_case
from lab.tests import test_cloud_ceph

#: The Ceph pool of host-a. That of host-b is ceph.DISKS.
OTHER = 'volumes'
#: What each host calls its pool over the Ceph pool of the other one.
OVER_CEPH = 'lab-ceph'
COPIES = [name + '.1' for name in test_cloud_ceph.DISKS]


class BetweenCase(test_cloud_ceph.MovingCase):
    """libvirt's pools have one name on both hosts, and hold no same disk.

    :cvar more: options of [libvirt] on host-a, beside Nova's defaults
    """

    more = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.ceph.run('ceph', 'osd', 'pool', 'create', OTHER, '8', '8')
        cls.ceph.run('rbd', 'pool', 'init', OTHER)
        cls._allow('rbd')
        cls.undefine('host-a', ceph.POOL)
        cls.define('host-a', ceph.Ceph.pool_xml(ceph.POOL, OTHER))
        cls.define('host-a', ceph.Ceph.pool_xml(OVER_CEPH, ceph.DISKS))
        cls.define('host-b', ceph.Ceph.pool_xml(OVER_CEPH, OTHER))
        cls._restart()
        cls._set(**cls.more)

    @classmethod
    def _allow(cls, profile):
        """What Nova may do in the pool of host-b; in the others it may all."""
        caps = ', '.join(
            ['profile %s pool=%s' % (profile, ceph.DISKS),
             *('profile rbd pool=' + name for name in (ceph.IMAGES, OTHER))])
        cls.ceph.run('ceph', 'auth', 'caps', 'client.' + ceph.USER,
                     'mon', 'profile rbd', 'osd', caps, 'mgr', caps)

    @classmethod
    def _set(cls, **options):
        cls.cloud.set_many('host-a', {
            ('libvirt', 'storage_migration_' + name): value
            for name, value in options.items()})

    @classmethod
    def tearDownClass(cls):
        cls._set(bandwidth=0, stall_timeout=60)
        cls.undefine('host-b', OVER_CEPH)
        cls.undefine('host-a', OVER_CEPH)
        cls.undefine('host-a', ceph.POOL)
        cls.define('host-a', ceph.Ceph.pool_xml(ceph.POOL, ceph.DISKS))
        cls._restart()
        super().tearDownClass()

    @classmethod
    def _restart(cls):
        # Which Ceph pool it is, they have asked.
        for host in ('host-a', 'host-b'):
            cls.cloud.set_many(host, {
                ('libvirt', 'storage_migration_bandwidth'): 0})

    def lies(self, server, host):
        """libvirt lists the images of the other pool, too."""
        return [path for path in super().lies(server, host)
                if not path.startswith('volume ' + OVER_CEPH)]

    def of(self, server, pool):
        """Which images of a Ceph pool are the server's."""
        return [name.removeprefix(server.id + '_')
                for name in self.ceph.images(pool) if server.id in name]

    def assert_in(self, server, pool, expected, other):
        self.assertEqual(expected, self.of(server, pool))
        self.assertEqual([], self.of(server, other))
        for name in expected:
            image = '%s_%s' % (server.id, name)
            self.assertEqual([], self.ceph.snapshots(image, pool))
        self.assertEqual({'libvirt-storage-rbd'}, set(self.records(server)))

    def assert_on_a(self, server):
        self.assert_in(server, OTHER, list(test_cloud_ceph.DISKS), ceph.DISKS)

    def assert_on_b(self, server):
        self.assert_in(server, ceph.DISKS, COPIES, OTHER)

    def assert_can_revert(self, server):
        self.assertEqual(list(test_cloud_ceph.DISKS), self.of(server, OTHER))


class TestBetweenCephPools(BetweenCase):

    def test_there_and_back(self):
        self.check_there_and_back()

    def test_resize_and_revert(self):
        self.check_resize_and_revert()

    def test_no_way_to_the_other_pool(self):
        """Refused while the guest runs, with the names of both."""
        server, before = self.server()
        self.undefine('host-a', OVER_CEPH)
        try:
            server.api.migrate_server(server.id, host='host-b')
            found = server.wait('ACTIVE')
        finally:
            self.define('host-a', ceph.Ceph.pool_xml(OVER_CEPH, ceph.DISKS))
        self.assert_untouched(server, found, before)
        log = self.service_log('host-a')
        for name in (OTHER, ceph.DISKS):
            self.assertRegex(
                log, 'choose a host with the same Ceph pool.*/%s ' % name)
        server.migrate('host-b')
        self.assert_kept(server.testimony(after=before))

    def assert_untouched(self, server, found, before):
        self.assertEqual('host-a', found.compute_host)
        self.assertEqual(before.boot_id, server.look().boot_id)
        self.assertEqual([], self.of(server, ceph.DISKS))

    def test_may_not_write_to_the_other_pool(self):
        """That is found out while the guest runs, too."""
        server, before = self.server()
        self._allow('rbd-read-only')
        try:
            server.api.migrate_server(server.id, host='host-b')
            found = server.wait('ACTIVE')
        finally:
            self._allow('rbd')
        self.assert_untouched(server, found, before)
        self.assertRegex(self.service_log('host-a'),
                         'Check that Ceph answers host host-a.*%s' % OVER_CEPH)


class TestBetweenFaults(BetweenCase):
    """Something happens in the middle, and Ceph is slow."""

    more = {'bandwidth': 1, 'stall_timeout': 15}

    def begin(self):
        """A server whose disks are being copied."""
        server, before = self.server()
        server.api.migrate_server(server.id, host='host-b')
        self.wait_for(lambda: 'disk.1' in self.of(server, ceph.DISKS))
        self.wait_for(lambda: self.programs())
        return server, before

    def wait_for(self, condition, limit=90):
        until = time.monotonic() + limit
        while not condition():
            self.assertLess(time.monotonic(), until, condition)
            time.sleep(.2)

    @staticmethod
    def programs():
        """Command lines of what copies disks on host-a."""
        return Machine('host-a').run(
            ['pgrep', '-a', 'qemu-img'], check=False).stdout.splitlines()

    def goes_on(self, server, after):
        """The server stayed, and the next try succeeds."""
        self.assertEqual('host-a', server.host)
        self.assert_kept(after)
        self._set(bandwidth=0)
        try:
            server.migrate('host-b')
            self.assert_kept(server.testimony(after=after))
            server.confirm()
        finally:
            self._set(bandwidth=1)
        # What was made at first is gone, too.
        self.assertEqual(len(COPIES), len(self.of(server, ceph.DISKS)))
        self.assertEqual([], self.of(server, OTHER))

    def test_slow(self):
        """A copy may take its time."""
        server, before = self.server()
        server.command('fill', 'more', 48, 'gamma')
        server.migrate('host-b', limit=400)
        self.assert_kept(server.testimony(after=before))
        server.confirm()
        self.assert_on_b(server)

    def test_silence(self):
        server, before = self.begin()
        with self.ceph.silent():
            begun = time.monotonic()
            self.wait_for(lambda: not self.programs(), 60)
            self.assertLess(time.monotonic() - begun, 45)
        server.wait('ACTIVE', limit=180)
        self.goes_on(server, server.testimony(after=before))

    def test_service_is_killed(self):
        """And nothing but that; what it has started ends with it."""
        server, before = self.begin()
        Machine('host-a').service('nova-compute').process.signal(
            signal.SIGKILL)
        self.wait_for(lambda: not self.programs(), 20)
        self.cloud.start_compute('host-a')
        server.wait('ACTIVE', limit=180)
        self.goes_on(server, server.testimony(after=before))


load_tests = cloud_case.only_in_full

if __name__ == '__main__':
    unittest.main()
