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

import unittest

from lab import ceph
from lab.tests import cloud_case
from lab.tests import test_cloud_ceph

#: The Ceph pool of host-a. That of host-b is ceph.DISKS.
OTHER = 'volumes'
#: What each host calls its pool over the Ceph pool of the other one.
OVER_CEPH = 'lab-ceph'
COPIES = [name + '.1' for name in test_cloud_ceph.DISKS]


class TestBetweenCephPools(test_cloud_ceph.MovingCase):
    """libvirt's pools have one name on both hosts, and hold no same disk."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.ceph.run('ceph', 'osd', 'pool', 'create', OTHER, '8', '8')
        cls.ceph.run('rbd', 'pool', 'init', OTHER)
        caps = ', '.join('profile rbd pool=' + name
                         for name in (ceph.DISKS, ceph.IMAGES, OTHER))
        cls.ceph.run('ceph', 'auth', 'caps', 'client.' + ceph.USER,
                     'mon', 'profile rbd', 'osd', caps, 'mgr', caps)
        cls.undefine('host-a', ceph.POOL)
        cls.define('host-a', ceph.Ceph.pool_xml(ceph.POOL, OTHER))
        cls.define('host-a', ceph.Ceph.pool_xml(OVER_CEPH, ceph.DISKS))
        cls.define('host-b', ceph.Ceph.pool_xml(OVER_CEPH, OTHER))
        cls._restart()

    @classmethod
    def tearDownClass(cls):
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
