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

"""The commands that take a cloud."""

import unittest

from lab import config
from lab.machine import Machine
from lab.tests import cloud_case
from lab.tests.test_commands import run


class TestCloudCommands(cloud_case.CloudTestCase):

    lab = cloud_case.SERIES
    images_type = 'libvirt-storage'

    def test_set_ctl(self):
        """The API obeys at once, the computes go on as they are."""
        def flavors():
            return len(self.cloud.conn.compute.get('/flavors').json()[
                'flavors'])

        computes = [Machine(host).service('nova-compute').pid
                    for host in config.HOSTS]
        several = flavors()
        self.assertGreater(several, 1)
        self.addCleanup(self.cloud.reset, config.CONTROL)
        run(self, 'set', 'ctl', 'api', 'max_limit', '1')
        self.assertEqual(1, flavors())
        self.assertEqual('1', self.cloud.get('ctl', 'api', 'max_limit'))
        run(self, 'status')
        self.cloud.reset(config.CONTROL)
        self.assertEqual(several, flavors())
        self.assertEqual(computes, [
            Machine(host).service('nova-compute').pid
            for host in config.HOSTS])

    def test_set_host(self):
        """One compute tells the scheduler something else."""
        def reserved(host):
            found = next(self.cloud.conn.compute.hypervisors(
                hypervisor_hostname_pattern=host, details=True))
            (provider,) = self.cloud.conn.placement.resource_providers(
                name=found.name)
            return self.cloud.conn.placement.get(
                '/resource_providers/%s/inventories/MEMORY_MB' % provider.id
            ).json()['reserved']

        before = reserved('host-b')
        self.addCleanup(self.cloud.set, 'host-a', 'DEFAULT',
                        'reserved_host_memory_mb', 512)
        run(self, 'set', 'host-a', 'DEFAULT', 'reserved_host_memory_mb', '77')
        self.assertEqual((77, before), (reserved('host-a'),
                                        reserved('host-b')))

    def test_status_restart_openstack(self):
        run(self, 'openstack', 'flavor', 'show', 'lab.small')
        run(self, 'openstack', 'flavor', 'show', 'none', status=1)
        run(self, 'fault', 'ctl', 'kill', 'placement')
        self.assertRegex(run(self, 'status', status=1),
                         '✗ +ctl +placement +has ended')
        run(self, 'restart', 'ctl', 'placement')
        run(self, 'logs', 'ctl', 'placement', '-n', '1')
        self.cloud.wait_computes()
        self.assertRegex(run(self, 'restart', 'ctl', 'none', status=1),
                         'error: ctl has no daemon none; it has .*nova-api')
        run(self, 'status')


load_tests = cloud_case.only_in_full

if __name__ == '__main__':
    unittest.main()
