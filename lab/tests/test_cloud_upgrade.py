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
"""Servers made by stock Nova, on hosts that go over to the series.

A lab of stock Nova that is up is used, and runs the series afterwards: one
test takes it, the other brings up one of its own.
"""

import concurrent.futures
import unittest

from lab.cloud import database
from lab.tests import cloud_case
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import GIB
from lab.tests.cloud_case import STOCK

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


if __name__ == '__main__':
    unittest.main()
