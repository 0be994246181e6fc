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
"""Servers whose disks are in a Ceph pool, on real Ceph."""

import contextlib
import time
import unittest

from lab import ceph
from lab import config
from lab.host import Host
from lab.machine import Machine
from lab.tests import cloud_case
from lab.tests import test_cloud_servers
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import GIB
from lab.tests.cloud_case import SERIES
from lab.tests.cloud_case import STOCK

DISKS = ('disk', 'disk.config', 'disk.eph0', 'disk.swap')
RESIZE = 'nova-resize'


class CephTestCase(CloudTestCase):

    lab = {**SERIES, 'storage': 'ceph'}
    images_type = 'libvirt-storage'
    flavor = 'lab.small.disks'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.ceph = ceph.Ceph()

    def lies(self, server, host):
        """libvirt of each host lists all images."""
        return [path for path in super().lies(server, host)
                if not path.startswith('volume ' + ceph.POOL)]

    def assert_nothing_left(self, server, *host_names):
        for host in host_names or config.HOSTS:
            self.assertEqual([], self.lies(server, host), host)
        if not host_names:
            self.assertEqual([], self.images(server))

    def images(self, server):
        return [name.removeprefix(server.id + '_')
                for name in self.ceph.images() if server.id in name]

    def assert_whole(self, server):
        self.assertEqual(list(DISKS), self.images(server))
        for name in DISKS:
            self.assertEqual([], self.ceph.snapshots(
                '%s_%s' % (server.id, name)), name)

    def records(self, server):
        """What `nova-manage libvirt list_disks` says of its disks."""
        # It doesn't end with 0 where a disk is in no pool.
        said = self.cloud.manage('libvirt', 'list_disks', check=False).stdout
        return sorted(line.split('|')[4].strip()
                      for line in said.splitlines() if server.id in line)


class MovingCase(CephTestCase):
    """Each host keeps disks elsewhere; a move takes them there.

    Subclasses say where a server's disks have to be.
    """

    assert_kept = test_cloud_servers.Scenarios.assert_kept

    def assert_on_a(self, server):
        raise NotImplementedError

    def assert_on_b(self, server):
        raise NotImplementedError

    def assert_can_revert(self, server):
        """host-a has what a revert would bring back."""
        raise NotImplementedError

    @staticmethod
    def define(host, xml):
        with contextlib.closing(Host(host).connect()) as connection:
            pool = connection.storagePoolDefineXML(xml)
            pool.create()
            pool.setAutostart(1)

    @staticmethod
    def undefine(host, name):
        with contextlib.closing(Host(host).connect()) as connection:
            pool = connection.storagePoolLookupByName(name)
            pool.destroy()
            pool.undefine()

    def server(self, host='host-a'):
        server = self.boot(flavor=self.flavor, host=host,
                           script=test_cloud_servers.WRITE)
        return server, server.testimony()

    def check_there_and_back(self):
        server, before = self.server()
        self.assert_on_a(server)
        server.migrate('host-b')
        there = server.testimony(after=before)
        self.assert_kept(there)
        self.assertEqual({'vdc': True}, there.swap)
        self.assert_can_revert(server)
        server.confirm()
        self.assert_on_b(server)
        self.assert_nothing_left(server, 'host-a')
        server.hard_reboot()
        there = server.testimony(after=there)
        server.migrate('host-a')
        back = server.testimony(after=there)
        self.assert_kept(back)
        self.assertEqual(before.own['bytes'], back.own['bytes'])
        server.confirm()
        self.assert_on_a(server)
        self.assert_nothing_left(server, 'host-b')

    def check_resize_and_revert(self):
        server, before = self.server()
        server.resize('lab.medium.disks')
        there = server.testimony(after=before)
        self.assertEqual('host-b', server.host)
        self.assertEqual(2 * before.own['bytes'], there.own['bytes'])
        back = self.revert(server, there)
        self.assertEqual(before.own['bytes'], back.own['bytes'])
        self.assert_on_a(server)
        self.assert_nothing_left(server, 'host-b')

    def revert(self, server, there):
        """Revert a move; what the guest has written since is gone.

        :param there: its testimony since the move
        :returns: that since the revert
        """
        self.assert_kept(there)
        server.command('fill', 'late', 4, 'gamma')
        server.revert()
        back = server.testimony(after=there)
        self.assert_kept(back)
        self.assertNotIn('late', back.ranges)
        return back


class TestCeph(test_cloud_servers.Scenarios, CephTestCase):
    """The life of a server; no SSH, nothing is copied between hosts."""

    def assert_only_on(self, server, host, other):
        super().assert_only_on(server, host, other)
        self.assert_whole(server)

    def test_resize_revert(self):
        server, before = self.server()
        server.resize(self.bigger)
        there = server.testimony(after=before)
        self.assertEqual(2 * GIB, there.own['bytes'])
        server.command('fill', 'late', 4, 'gamma')
        self.assertEqual(
            [RESIZE], self.ceph.snapshots(server.id + '_disk'))
        server.revert()
        said = server.testimony(after=there)
        self.assertEqual(('host-a', GIB), (server.host, said.own['bytes']))
        self.assert_kept(said)
        self.assertNotIn('late', said.ranges)
        self.assert_only_on(server, 'host-a', 'host-b')

    def test_clone(self):
        """Of a raw image in the same cluster nothing is copied."""
        server = self.boot(image='guest-raw')
        parent = self.ceph.info(server.id + '_disk')['parent']
        self.assertEqual(
            (ceph.IMAGES, self.cloud.image('guest-raw').id),
            (parent['pool'], parent['image']))
        image = server.snapshot('clone-of-' + server.id)
        self.addCleanup(self.cloud.conn.image.delete_image, image.id)
        self.assertNotIn('parent', self.ceph.info(image.id, ceph.IMAGES))
        self.assertIn('snap', self.ceph.snapshots(image.id, ceph.IMAGES))

    def test_evacuate(self):
        """Its host dies: its disks go on elsewhere, as they are."""
        server, before = self.server()
        # What it is then brought back to: seen from outside, a server that
        # ran is ACTIVE before, in between and after.
        server.stop()
        Machine('host-a').kill('nova-compute')
        with self.cloud.forced_down('host-a'):
            server.api.evacuate_server(server.id, host='host-b')
            until = time.monotonic() + 180
            while (found := server.wait('SHUTOFF')).compute_host != 'host-b':
                self.assertLess(time.monotonic(), until, found.compute_host)
                time.sleep(1)
            server.start()
            said = server.testimony(after=before)
        self.assertEqual(2, said.boot)
        self.assert_kept(said)
        until = time.monotonic() + 90
        while self.lies(server, 'host-a') and time.monotonic() < until:
            time.sleep(1)
        self.assert_only_on(server, 'host-b', 'host-a')

    def test_no_way_to_the_other_host(self):
        """What moves is a record: libvirt isn't asked for anything."""
        server, before = self.server()
        self.cloud.set('host-a', 'libvirt', 'storage_migration_uri',
                       'qemu+tls://%s:1/system')
        try:
            server.migrate('host-b')
        finally:
            self.cloud.set('host-a', 'libvirt', 'storage_migration_uri',
                           'qemu+tls://%s/system')
        self.assert_kept(server.testimony(after=before))
        server.confirm()
        self.assert_only_on(server, 'host-b', 'host-a')


class TestTakeOver(CephTestCase):
    """A server of images_type = rbd, and back."""

    images_type = 'rbd'

    def legacy_server(self):
        self.cloud.set_images_type('rbd')
        server = self.boot(flavor=self.flavor,
                           script=test_cloud_servers.WRITE)
        before = server.testimony()
        self.cloud.set_images_type('libvirt-storage')
        return server, before

    assert_kept = test_cloud_servers.Scenarios.assert_kept

    def test_hard_reboot_and_back(self):
        server, before = self.legacy_server()
        server.hard_reboot()
        said = server.testimony(after=before)
        self.assert_kept(said)
        self.assertEqual({'libvirt-storage-rbd'}, set(self.records(server)))
        self.cloud.set_images_type('rbd')
        server.hard_reboot()
        self.assert_kept(server.testimony(after=said))
        self.assertEqual({'rbd'}, set(self.records(server)))
        self.assert_whole(server)

    def test_migrate(self):
        server, before = self.legacy_server()
        server.migrate('host-b')
        self.assert_kept(server.testimony(after=before))
        server.confirm()
        self.assertEqual({'libvirt-storage-rbd'}, set(self.records(server)))
        self.assert_whole(server)
        self.assert_nothing_left(server, 'host-a')

    def test_live_migrate(self):
        server, before = self.legacy_server()
        server.live_migrate('host-b')
        self.assertEqual(before.boot_id, server.look().boot_id)
        self.assertEqual({'libvirt-storage-rbd'}, set(self.records(server)))
        server.delete()
        self.assert_nothing_left(server)


class TestUpgrade(CephTestCase):
    """A cloud of stock Nova with images_type = rbd goes on with pools."""

    lab = {**STOCK, 'storage': 'ceph'}
    images_type = 'rbd'

    def test_upgrade(self):
        server = self.boot(flavor=self.flavor,
                           script=test_cloud_servers.WRITE)
        other = self.boot('other', flavor=self.flavor,
                          script=test_cloud_servers.WRITE)
        before, others = server.testimony(), other.testimony()
        self.cloud.upgrade('tree')
        self.cloud.set_images_type('libvirt-storage')
        self.assertEqual(before.boot_id, server.look().boot_id)
        server.hard_reboot()
        said = server.testimony(after=before)
        test_cloud_servers.Scenarios.assert_kept(self, said)
        self.assert_whole(server)
        self.assertEqual({'libvirt-storage-rbd'}, set(self.records(server)))
        other.migrate('host-b')
        test_cloud_servers.Scenarios.assert_kept(
            self, other.testimony(after=others))
        other.confirm()
        self.assert_whole(other)
        for each in (server, other):
            each.delete()
            self.assert_nothing_left(each)


load_tests = cloud_case.only_in_full

if __name__ == '__main__':
    unittest.main()
