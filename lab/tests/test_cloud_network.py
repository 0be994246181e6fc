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

"""Servers with a port: reached from the control plane, wherever they are."""

import unittest

from lab.tests import cloud_case
from lab.tests.cloud_case import CloudTestCase


class Scenarios:
    """Run by the classes below, each on a Nova of its own."""

    def server(self, name='server', **more):
        server = self.boot(name, network=True, **more)
        server.ping()
        return server

    def assert_reached(self, server, kept):
        server.ping()
        self.assertEqual(kept, server.ssh('cat', '/data/kept'))
        self.assertIn(server.id, server.ssh(
            'cat', '/config/openstack/latest/meta_data.json'))

    def test_migrate(self):
        """Boot, migrate cold, revert, migrate, confirm, hard reboot."""
        server = self.server()
        other = self.server('other', host='host-b')
        address = server.address
        (interface,) = server.look().interfaces.values()
        self.assertEqual(address, interface['address'])
        server.ssh('echo %s >/data/kept; sync' % server.id)
        host_key = server.ssh('cat /data/host-key | sha256sum')
        server.ssh('ping', '-c', '2', '-W', '5', other.address)

        server.migrate('host-b')
        self.assert_reached(server, server.id)
        server.revert()
        self.assertEqual('host-a', server.host)
        self.assert_reached(server, server.id)
        server.migrate('host-b')
        server.confirm()
        server.hard_reboot()
        self.assert_reached(server, server.id)
        server.ssh('ping', '-c', '2', '-W', '5', other.address)
        self.assertEqual(address, server.address)
        self.assertEqual(host_key,
                         server.ssh('cat /data/host-key | sha256sum'))
        self.assert_nothing_left(server, 'host-a')


class TestNetwork(Scenarios, CloudTestCase):
    """The series, disks in storage pools; no SSH between the hosts."""

    lab = {**cloud_case.SERIES, 'network': 'ovs'}
    images_type = 'libvirt-storage'


class TestNetworkStock(Scenarios, CloudTestCase):
    """Stock Nova."""

    lab = {**cloud_case.STOCK, 'network': 'ovs'}

    def test_live_migrate(self):
        server = self.server()
        server.ssh('echo %s >/data/kept; sync' % server.id)
        server.live_migrate('host-b')
        self.assert_reached(server, server.id)


load_tests = cloud_case.only_in_full

if __name__ == '__main__':
    unittest.main()
