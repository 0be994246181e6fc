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
"""Servers of an older Nova, on hosts that go over to the present series.

Those of stock Nova, and those of the series' first version in the midst of
their moves. A lab of stock Nova that is up is used, and runs the series
afterwards: one test takes it, the others bring up labs of their own.
"""

import concurrent.futures
import contextlib
import json
import time
import unittest

from lab.cloud import database
from lab import config
from lab.host import Host
from lab.tests import cloud_case
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import GIB
from lab.tests.cloud_case import SERIES
from lab.tests.cloud_case import STOCK
from lab.tests import earlier

load_tests = cloud_case.only_in_full

DATA = ('alpha', 12)
EPHEMERAL = ('beta', 4)
WRITE = 'boot 1: fill data 12 alpha\nboot 1: fill raw 4 beta vdb 64\n'

FLAT = {'vda': ('flat', 'raw'), 'vdb': ('flat', 'raw'),
        'vdc': ('flat', 'raw'), 'disk.config': ('flat', 'raw')}
QCOW2 = {'vda': ('qcow2', 'qcow2'), 'vdb': ('qcow2', 'qcow2'),
         'vdc': ('qcow2', 'qcow2'), 'disk.config': ('flat', 'raw')}


class TestUpgrade(CloudTestCase):
    """Flat and qcow2 disks, with ephemeral disk, swap and config drive."""

    lab = STOCK

    def setUp(self):
        # Another test may have upgraded the cloud.
        type(self).cloud = cloud_case.cloud_for(self.lab)
        super().setUp()

    def boot_all(self, *names):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda name: self.boot(
                name, flavor='lab.small.disks', script=WRITE), names))

    def assert_well(self, server, before, size=GIB, swap=True):
        said = server.testimony(after=before)
        self.assert_data(said, data=DATA, raw=EPHEMERAL)
        self.assertEqual(size, said.own['bytes'])
        if swap:
            self.assertEqual({'vdc': True}, said.swap)
        self.assertEqual(server.id, said.config['uuid'])
        return said

    def assert_on_record(self, server, kind):
        found = database.records(self.cloud, server.id)
        self.assertEqual(set(kind), set(found))
        for name, record in found.items():
            if name != 'vdc':  # swap is made anew by each host
                self.assertEqual(
                    kind[name], (record['backend'], record['format']))
        self.assertEqual({('ready', server.host)}, {
            (record['state'], record['host']) for record in found.values()})

    def test_old_beside_new(self):
        """The first host is upgraded before the second."""
        self.cloud.set_images_type('flat', use_cow_images='false')
        (flat,) = self.boot_all('flat')
        self.cloud.set_images_type('qcow2')
        (qcow2,) = self.boot_all('qcow2')
        first = {server.id: server.testimony() for server in (flat, qcow2)}
        self.cloud.upgrade(hosts=['host-a'])
        for server, kind in ((flat, FLAT), (qcow2, QCOW2)):
            self.assertEqual(first[server.id].boot_id, server.look().boot_id)
            self.assertEqual({None}, set(
                database.mappings(self.cloud, server.id).values()))
            server.hard_reboot()
            said = self.assert_well(server, first[server.id])
            self.assert_on_record(server, kind)
            before = database.mappings(self.cloud, server.id)
            server.migrate('host-b')
            # Stock Nova makes qcow2 of each raw disk, of a new swap as well
            # though it is qcow2 already.
            first[server.id] = self.assert_well(
                server, said, swap=server is qcow2)
            server.confirm()
            self.assertEqual(before, database.mappings(
                self.cloud, server.id))
        self.cloud.upgrade(hosts=['host-b'])
        for server in (flat, qcow2):
            server.hard_reboot()
            self.assert_well(server, first[server.id], swap=server is qcow2)
            self.assert_on_record(server, QCOW2)

    def test_upgrade(self):
        self.cloud.set_images_type('flat', use_cow_images='false')
        (flat,) = self.boot_all('flat')
        self.cloud.set_images_type('qcow2')
        qcow2, stopped = self.boot_all('qcow2', 'stopped')
        first = {server.id: server.testimony() for server in (
            flat, qcow2, stopped)}
        stopped.stop()
        self.cloud.upgrade()
        stopped.start()
        self.assert_well(stopped, first[stopped.id])
        self.assert_on_record(stopped, QCOW2)
        for server, kind in ((flat, FLAT), (qcow2, QCOW2)):
            self.assertEqual(first[server.id].boot_id, server.look().boot_id)
            server.hard_reboot()
            said = self.assert_well(server, first[server.id])
            self.assert_on_record(server, kind)
            server.migrate('host-b')
            said = self.assert_well(server, said)
            server.revert()
            said = self.assert_well(server, said)
            self.assert_on_record(server, kind)
            server.resize('lab.medium.disks')
            said = self.assert_well(server, said, 2 * GIB)
            server.confirm()
            self.assert_nothing_left(server, 'host-a')
            self.assert_on_record(server, kind)
            first[server.id] = said

        # The configuration changes under running servers.
        for images_type, cow in (('qcow2', 'false'), ('flat', 'true')):
            self.cloud.set_images_type(images_type, use_cow_images=cow)
            for server, kind in ((flat, FLAT), (qcow2, QCOW2)):
                server.hard_reboot()
                said = self.assert_well(
                    server, first[server.id], 2 * GIB)
                here = server.host
                server.migrate('host-a' if here == 'host-b' else 'host-b')
                first[server.id] = self.assert_well(server, said, 2 * GIB)
                server.confirm()
                self.assert_on_record(server, kind)
                self.assert_nothing_left(server, here)


class TestUpgradeInTheMidst(CloudTestCase):
    """Hosts of the first version are upgraded while servers move."""

    images_type = 'libvirt-storage'
    pool = 'nova-disks-pool'
    #: What the copy that the upgrade breaks off has in addition, MiB.
    more = ('gamma', 90)

    @classmethod
    def setUpClass(cls):
        cls.lab = {**SERIES, 'nova': str(earlier.tree(earlier.LANDED))}
        super().setUpClass()

    def set_rate(self, mib):
        for host in config.HOSTS:
            self.cloud.set(host, 'libvirt', 'storage_migration_bandwidth',
                           str(mib))

    def all(self, work, *servers):
        """Do something with servers, two at a time."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(work, servers))

    def boot_one(self, name):
        more = 'boot 1: fill more %d %s\n' % self.more[::-1]
        return self.boot(name, flavor='lab.small.disks',
                         script=WRITE + (more if name == 'copying' else ''))

    def assert_well(self, said, **more):
        self.assert_data(said, data=DATA, raw=EPHEMERAL, **more)

    def keys(self, server):
        """What moves have in the instance's system_metadata."""
        return sorted(key for key in database.system_metadata(
            self.cloud, server.id) if key.startswith('libvirt_storage'))

    def versions(self, server):
        """The versions of the records of a server's disks."""
        return {json.loads(info)['nova_object.version'] for info in
                database.mappings(self.cloud, server.id).values() if info}

    def arrived(self, server):
        """Bytes of the root disk that lie on host-b."""
        path = Host('host-b').path('/var/lib/nova/instances/disks/%s_disk' %
                                   server.id)
        return path.stat().st_blocks * 512 if path.exists() else -1

    def begin_to_copy(self, server):
        server.api.migrate_server(server.id, host='host-b')
        until = time.monotonic() + 90
        while self.arrived(server) < 2 << 20:
            if time.monotonic() > until:
                self.fail('no copy of %s begins: %s' % (
                    server.id, server.get()))
            time.sleep(.1)

    def break_off(self, server):
        """Break a copy off so that the source can't clean up."""
        self.begin_to_copy(server)
        with contextlib.closing(Host('host-b').connect()) as connection:
            pool = connection.storagePoolLookupByName(self.pool)
            pool.destroy()
            try:
                found = server.wait('ACTIVE', 'VERIFY_RESIZE')
            finally:
                pool.create()
        self.assertEqual(('ACTIVE', 'host-a'),
                         (found.status, found.compute_host))

    def test_upgrade(self):
        self.set_rate(1)
        confirmed, reverted, left, copying = servers = self.all(
            self.boot_one, 'confirmed', 'reverted', 'left', 'copying')
        self.all(lambda server: server.migrate('host-b'), confirmed, reverted)
        self.break_off(left)
        for server in (confirmed, reverted):
            self.assertIn('libvirt_storage_moved', self.keys(server))
        self.assertIn('libvirt_storage_left',
                      {key[:20] for key in self.keys(left)})
        self.assertNotEqual([], left.left_on('host-b'))
        before = {server.id: server.testimony() for server in servers}
        self.begin_to_copy(copying)
        self.cloud.upgrade()
        self.assertEqual({'1.0'}, set().union(*map(self.versions, (
            confirmed, reverted, left))))

        # What was begun before is ended by the new version.
        found = copying.wait('ACTIVE')
        self.assertEqual('host-a', found.compute_host)
        said = copying.testimony(after=before[copying.id])
        self.assert_well(said, more=self.more)
        self.assert_nothing_left(copying, 'host-b')
        self.set_rate(0)
        for server in (confirmed, left):
            self.assertEqual(before[server.id].boot_id,
                             server.look().boot_id)
        confirmed.confirm()
        self.assert_nothing_left(confirmed, 'host-a')
        reverted.revert()
        self.assert_well(reverted.testimony(after=before[reverted.id]))
        self.assert_nothing_left(reverted, 'host-b')
        for server in (copying, confirmed, reverted):
            self.assertEqual([], self.keys(server))

        self.all(self.reboots, confirmed, left)
        self.all(self.moves, *servers)

    def reboots(self, server):
        said = server.testimony()
        server.hard_reboot()
        self.assert_well(server.testimony(after=said))

    def moves(self, server):
        """Move it on; nothing of an old form is left then."""
        said, here = server.testimony(), server.host
        server.migrate('host-a' if here == 'host-b' else 'host-b')
        self.assert_well(server.testimony(after=said))
        server.confirm()
        self.assert_nothing_left(server, here)
        self.assertEqual([], self.keys(server))
        self.assertEqual({'1.2'}, self.versions(server))
        self.assertEqual({('ready', server.host, None)}, {
            (record['state'], record['host'], record['previous'])
            for record in database.records(self.cloud, server.id).values()})


if __name__ == '__main__':
    unittest.main()
