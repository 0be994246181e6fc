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

import contextlib
import unittest

from lab import ceph
from lab.host import Host
from lab.tests import cloud_case
from lab.tests import test_cloud_ceph
from lab.tests import test_cloud_servers

#: The Ceph pool of host-a. That of host-b is ceph.DISKS.
OTHER = 'volumes'
#: What each host calls its pool over the Ceph pool of the other one.
OVER_CEPH = 'lab-ceph'
COPIES = [name + '.1' for name in test_cloud_ceph.DISKS]


class TestBetweenCephPools(test_cloud_ceph.CephTestCase):
    """libvirt's pools have one name on both hosts, and hold no same disk."""

    assert_kept = test_cloud_servers.Scenarios.assert_kept

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.ceph.run('ceph', 'osd', 'pool', 'create', OTHER, '8', '8')
        cls.ceph.run('rbd', 'pool', 'init', OTHER)
        caps = ', '.join('profile rbd pool=' + name
                         for name in (ceph.DISKS, ceph.IMAGES, OTHER))
        cls.ceph.run('ceph', 'auth', 'caps', 'client.' + ceph.USER,
                     'mon', 'profile rbd', 'osd', caps, 'mgr', caps)
        cls._undefine('host-a', ceph.POOL)
        cls._define('host-a', ceph.POOL, OTHER)
        cls._define('host-a', OVER_CEPH, ceph.DISKS)
        cls._define('host-b', OVER_CEPH, OTHER)
        cls._restart()

    @classmethod
    def tearDownClass(cls):
        cls._undefine('host-b', OVER_CEPH)
        cls._undefine('host-a', OVER_CEPH)
        cls._undefine('host-a', ceph.POOL)
        cls._define('host-a', ceph.POOL, ceph.DISKS)
        cls._restart()
        super().tearDownClass()

    @classmethod
    def _restart(cls):
        # Which Ceph pool it is, they have asked.
        for host in ('host-a', 'host-b'):
            cls.cloud.set_many(host, {
                ('libvirt', 'storage_migration_bandwidth'): 0})

    @staticmethod
    def _define(host, name, of_ceph):
        with contextlib.closing(Host(host).connect()) as connection:
            pool = connection.storagePoolDefineXML(
                ceph.Ceph.pool_xml(name, of_ceph))
            pool.create()
            pool.setAutostart(1)

    @staticmethod
    def _undefine(host, name):
        with contextlib.closing(Host(host).connect()) as connection:
            pool = connection.storagePoolLookupByName(name)
            pool.destroy()
            pool.undefine()

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

    def server(self, **more):
        server = self.boot(flavor=self.flavor,
                           script=test_cloud_servers.WRITE, **more)
        return server, server.testimony()

    def test_there_and_back(self):
        server, before = self.server()
        disks = list(test_cloud_ceph.DISKS)
        self.assert_in(server, OTHER, disks, ceph.DISKS)
        server.migrate('host-b')
        there = server.testimony(after=before)
        self.assert_kept(there)
        self.assertEqual({'vdc': True}, there.swap)
        # What a revert would bring back.
        self.assertEqual(disks, self.of(server, OTHER))
        server.confirm()
        self.assert_in(server, ceph.DISKS, COPIES, OTHER)
        self.assert_nothing_left(server, 'host-a')
        server.hard_reboot()
        there = server.testimony(after=there)
        server.migrate('host-a')
        back = server.testimony(after=there)
        self.assert_kept(back)
        self.assertEqual(before.own['bytes'], back.own['bytes'])
        server.confirm()
        self.assert_in(server, OTHER, disks, ceph.DISKS)
        self.assert_nothing_left(server, 'host-b')

    def test_resize_and_revert(self):
        server, before = self.server()
        server.resize('lab.medium.disks')
        there = server.testimony(after=before)
        self.assertEqual('host-b', server.host)
        self.assertEqual(2 * before.own['bytes'], there.own['bytes'])
        self.assert_kept(there)
        server.command('fill', 'late', 4, 'gamma')
        server.revert()
        back = server.testimony(after=there)
        self.assert_kept(back)
        self.assertNotIn('late', back.ranges)
        self.assertEqual(before.own['bytes'], back.own['bytes'])
        self.assert_in(server, OTHER, list(test_cloud_ceph.DISKS),
                       ceph.DISKS)
        self.assert_nothing_left(server, 'host-b')

    def test_no_way_to_the_other_pool(self):
        """Refused while the guest runs, with the names of both."""
        server, before = self.server()
        self._undefine('host-a', OVER_CEPH)
        try:
            server.api.migrate_server(server.id, host='host-b')
            found = server.wait('ACTIVE')
        finally:
            self._define('host-a', OVER_CEPH, ceph.DISKS)
        self.assertEqual('host-a', found.compute_host)
        self.assertEqual(before.boot_id, server.look().boot_id)
        log = self.service_log('host-a')
        for name in (OTHER, ceph.DISKS):
            self.assertRegex(
                log, 'choose a host with the same Ceph pool.*/%s ' % name)
        self.assertEqual([], self.of(server, ceph.DISKS))
        server.migrate('host-b')
        self.assert_kept(server.testimony(after=before))


load_tests = cloud_case.only_in_full

if __name__ == '__main__':
    unittest.main()
