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
"""Servers that move from a directory into a Ceph pool, and back."""

import contextlib
import time
import unittest

from lab import ceph
from lab.machine import Machine
from lab.tests import cloud_case
from lab.tests import test_cloud_ceph

#: What host-a calls its pool over Ceph; that for disks is a directory.
OVER_CEPH = 'lab-ceph'
SILENCE = 40  # seconds
#: As Ceph sets them. An OSD takes no one of them for less than those before.
RATIOS = {'nearfull': '0.85', 'backfillfull': '0.90', 'full': '0.95'}


class KindsCase(test_cloud_ceph.MovingCase):
    """host-a keeps disks in a directory, and reaches Ceph; host-b's are there.

    :cvar more: options of [libvirt] on host-a, beside Nova's defaults
    """

    more = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.undefine('host-a', ceph.POOL)
        cls.define('host-a', ceph.Ceph.pool_xml(OVER_CEPH))
        # It makes the directory.
        cls.cloud.set_many('host-a', {
            ('libvirt', 'storage_migration_bandwidth'): 0,
            **{('libvirt', key): value for key, value in cls.more.items()}})

    @classmethod
    def tearDownClass(cls):
        cls.undefine('host-a', ceph.POOL)
        cls.undefine('host-a', OVER_CEPH)
        cls.define('host-a', ceph.Ceph.pool_xml())
        cls.cloud.set_many('host-a', {
            ('libvirt', 'storage_migration_bandwidth'): 0,
            ('libvirt', 'storage_migration_stall_timeout'): 60})
        super().tearDownClass()

    def lies(self, server, host):
        over_ceph = OVER_CEPH if host == 'host-a' else ceph.POOL
        return [path for path in super(
            test_cloud_ceph.CephTestCase, self).lies(server, host)
            if not path.startswith('volume %s/' % over_ceph)]

    def volumes(self, server):
        return [path for path in self.lies(server, 'host-a')
                if path.startswith('volume ')]

    def assert_on_a(self, server):
        self.assertEqual([], self.images(server))
        self.assertEqual(
            ['volume %s/ID_%s' % (ceph.POOL, name)
             for name in test_cloud_ceph.DISKS], self.volumes(server))
        self.assertEqual({'libvirt-storage'}, set(self.records(server)))

    def assert_on_b(self, server):
        self.assert_whole(server)
        self.assertEqual([], self.volumes(server))
        self.assertEqual({'libvirt-storage-rbd'}, set(self.records(server)))

    def assert_can_revert(self, server):
        self.assertEqual(4, len(self.volumes(server)))

    def wait_for(self, condition, limit=90):
        until = time.monotonic() + limit
        while not condition():
            self.assertLess(time.monotonic(), until, condition)
            time.sleep(.2)


class TestKinds(KindsCase):

    def test_there_and_back(self):
        self.check_there_and_back()

    def test_revert_into_directory(self):
        self.check_resize_and_revert()

    def test_revert_into_ceph(self):
        server, before = self.server('host-b')
        server.migrate('host-a')
        self.revert(server, server.testimony(after=before))
        self.assert_on_b(server)
        self.assert_nothing_left(server, 'host-a')


class TestKindsPatience(KindsCase):

    more = {'storage_migration_bandwidth': 2}

    def test_silence_that_ends(self):
        """Of 40 s, which is less than a move waits for."""
        server, before = self.server()
        server.api.migrate_server(server.id, host='host-b')
        self.wait_for(lambda: 'disk' in self.images(server))
        with self.ceph.silent():
            time.sleep(SILENCE)
        found = server.wait('VERIFY_RESIZE', limit=300)
        self.assertEqual('host-b', found.compute_host)
        self.assert_kept(server.testimony(after=before))
        server.confirm()
        self.assert_on_b(server)
        self.assert_nothing_left(server, 'host-a')


class TestKindsFaults(KindsCase):
    """Something happens to Ceph in the middle."""

    # Ceph takes its time to find that it is full.
    more = {'storage_migration_bandwidth': 1,
            'storage_migration_stall_timeout': 15}

    def fails_in_the_middle(self, trouble):
        """The server stays where it is, and the next try succeeds."""
        server, before = self.server()
        server.api.migrate_server(server.id, host='host-b')
        self.wait_for(lambda: 'disk' in self.images(server))
        with trouble():
            # What has been under way is given up, though Ceph stays silent.
            found = server.wait('ACTIVE', limit=180)
            self.assertEqual('host-a', found.compute_host)
            said = server.testimony(after=before)
            self.assert_kept(said)
        self.cloud.set('host-a', 'libvirt', 'storage_migration_bandwidth', 0)
        try:
            server.migrate('host-b')
            there = server.testimony(after=said)
            self.assert_kept(there)
            server.confirm()
        finally:
            self.cloud.set('host-a', 'libvirt',
                           'storage_migration_bandwidth', 1)
        # What was made at first is gone, too.
        self.assertEqual(
            len(test_cloud_ceph.DISKS), len(self.images(server)))
        self.assert_nothing_left(server, 'host-a')

    def test_silence(self):
        self.fails_in_the_middle(self.ceph.silent)

    def test_silence_on_the_way_out(self):
        """What leaves Ceph is read from it, into a file of host-b."""
        def programs():
            return Machine('host-b').run(
                ['pgrep', '-a', 'qemu-img'], check=False).stdout

        server, before = self.server('host-b')
        options = [('libvirt', key) for key in self.more]
        self.cloud.set_many('host-b', {
            key: self.more[key[1]] for key in options})
        try:
            server.api.migrate_server(server.id, host='host-a')
            self.wait_for(programs)
            with self.ceph.silent():
                begun = time.monotonic()
                self.wait_for(lambda: not programs())
                self.assertLess(time.monotonic() - begun, 45)
            # Its own disk is there: it can't start before Ceph answers.
            self.assertEqual(
                'host-b', server.wait('ACTIVE', limit=180).compute_host)
            said = server.testimony(after=before)
            self.assert_kept(said)
        finally:
            self.cloud.set_many('host-b', dict(zip(options, (0, 60))))
        server.migrate('host-a')
        self.assert_kept(server.testimony(after=said))
        server.confirm()
        self.assert_on_a(server)
        self.assert_nothing_left(server, 'host-b')

    def test_full(self):
        @contextlib.contextmanager
        def full():
            try:
                for name in RATIOS:
                    self.ceph.run('ceph', 'osd', 'set-%s-ratio' % name,
                                  '0.0000001')
                yield
            finally:
                for name, ratio in RATIOS.items():
                    self.ceph.run('ceph', 'osd', 'set-%s-ratio' % name, ratio)

        self.fails_in_the_middle(full)


load_tests = cloud_case.only_in_full

if __name__ == '__main__':
    unittest.main()
