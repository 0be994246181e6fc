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
"""What becomes of volumes when something fails, or means ill."""

import random
import time
import unittest

from lab.host import both
from lab.host import Host
from lab.machine import Machine
from lab.cloud.server import ServerError
from lab.tests import cloud_case
from lab.tests import test_cloud_hostile
from lab.tests import test_cloud_servers
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import SERIES

POOL = 'nova-disks-pool'


class TestHostile(test_cloud_hostile.Scenarios, CloudTestCase):
    """Raw volumes; libvirt itself takes them for qcow2 after a refresh."""

    lab = SERIES
    images_type = 'libvirt-storage'
    options = {'use_cow_images': 'false'}
    raw_files = 'true'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.make_raw_files(cls.raw_files)
        cls.addClassCleanup(cls.make_raw_files, 'false')

    @classmethod
    def make_raw_files(cls, value):
        """Whether new disks without a base image are really raw."""
        key = ('libvirt', 'storage_raw_files')
        for host in both():
            now = cls.cloud.get(host.name, *key) or 'false'
            if now != value:
                cls.cloud.set(host.name, *key, value)

    def settle(self, server):
        """libvirt probes what lies in its pools."""
        for host in both():
            connection = host.connect()
            try:
                connection.storagePoolLookupByName(POOL).refresh()
            finally:
                connection.close()
            Machine(host.name).restart('libvirtd')
            host.wait_ready()
        # A compute that has lost its libvirt takes nothing until it has looked.
        self.assert_soon(lambda: all(
            service.status == 'enabled' for service in
            self.cloud.conn.compute.services(binary='nova-compute')))

    def assert_soon(self, condition, limit=90):
        until = time.monotonic() + limit
        while not condition():
            self.assertLess(time.monotonic(), until)
            time.sleep(1)


class TestHostileTransition(TestHostile):
    """Raw legacy disks that become volumes."""

    images_type = 'flat'
    later = ('libvirt-storage', {})
    pools = False
    raw_files = 'false'

    def become(self):
        super().become()
        self.pools = True

    def settle(self, server):
        if self.pools:
            super().settle(server)


class TestPoolWithoutCow(test_cloud_servers.TestPool):
    """Whole copies of the image."""

    options = {'use_cow_images': 'false'}


class TestDefault(CloudTestCase):
    """Hosts whose images_type is the default one."""

    lab = SERIES
    images_type = 'default'

    def warnings(self):
        return self.service_log('host-a').count('images_type = qcow2 is dep')

    def test_disks_are_in_pools(self):
        """With qcow2 they are files, and the service says so once."""
        server = self.boot(flavor='lab.small.disks')
        self.assertIn('volume nova-disks-pool/ID_disk',
                      self.lies(server, 'host-a'))
        before = self.warnings()
        self.cloud.set_images_type('qcow2')
        self.addCleanup(self.cloud.set_images_type, self.images_type)
        self.assertEqual(before + 1, self.warnings())
        server = self.boot('file', flavor='lab.small.disks')
        self.assertIn('disk', server.files_on('host-a'))
        self.assertNotIn('volume nova-disks-pool/ID_disk',
                         self.lies(server, 'host-a'))


class TestFaults(CloudTestCase):
    """What fails leaves nothing behind, and the next server works."""

    lab = SERIES
    images_type = 'libvirt-storage'

    def start(self, name):
        """A server on host-a, whatever becomes of it."""
        server = self.cloud.boot(
            name, flavor='lab.small.disks', host='host-a', wait=False)
        self.addCleanup(server.delete)
        return server

    def assert_next_works(self):
        server = self.boot('next', flavor='lab.small.disks')
        server.testimony()
        server.delete()
        self.assert_nothing_left(server)

    def test_full_pool(self):
        host = Host('host-a')
        host.fill(POOL, leave=512 << 10)
        try:
            server = self.start('full')
            with self.assertRaisesRegex(ServerError, 'ERROR'):
                server.wait('ACTIVE')
            self.assert_nothing_left(server)
        finally:
            host.free(POOL)
        self.assert_next_works()

    def test_libvirt_away(self):
        """It is found again, without a restart of the compute."""
        machine = Machine('host-a')
        before = self.boot(flavor='lab.small.disks')
        said = before.testimony()
        machine.stop('libvirtd')
        try:
            server = self.start('away')
            with self.assertRaises(ServerError):
                server.wait('ACTIVE', limit=30)
        finally:
            machine.restart('libvirtd')
            Host('host-a').wait_ready()
        server.delete()
        self.assert_nothing_left(server)
        before.hard_reboot()
        self.assertEqual(2, before.testimony(after=said).boot)
        self.assert_next_works()

    def test_compute_killed_in_spawn(self):
        """Nothing boots that is half made; what is left goes with it."""
        for _try in range(4):
            server = self.start('killed')
            self._kill_compute_after(
                server, 'networking', 'block_device_mapping', 'spawning')
            try:
                server.wait('ACTIVE', limit=60)
            except ServerError:
                server.delete()
            else:
                server.testimony()
                server.delete()
            self.assert_nothing_left(server)
        self.assert_next_works()

    def test_compute_killed_in_delete(self):
        for _try in range(3):
            server = self.boot(flavor='lab.small.disks')
            self.cloud.conn.compute.delete_server(server.id)
            self._kill_compute_after(server, 'deleting')
            server.delete()
            self.assert_nothing_left(server)

    def _kill_compute_after(self, server, *states):
        """Kill it some time after the server has got to a state."""
        until = time.monotonic() + 30
        while server.get().task_state not in states:
            self.assertLess(time.monotonic(), until)
            time.sleep(.05)
        time.sleep(random.uniform(0, 1.5))
        Machine('host-a').kill('nova-compute')
        self.cloud.start_compute('host-a')


load_tests = cloud_case.only_in_full


if __name__ == '__main__':
    unittest.main()
