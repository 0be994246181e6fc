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
"""The operator's commands, as they are, beside servers of all kinds.

Unit tests of a command run in a process in which other modules have imported
what it lacks.
"""

import json
import re
import unittest

from lab.tests import cloud_case

# Of UpgradeCommands._upgrade_checks, in its order.
CHECKS = ('Cells v2', 'Placement API', 'Cinder API',
          'Policy File JSON to YAML Migration', 'Older than N-1 computes',
          'hw_machine_type unset', 'Service User Token Configuration',
          'Libvirt disks in storage pools', 'Libvirt hosts with storage pools')


class TestManage(cloud_case.CloudTestCase):

    lab = cloud_case.SERIES
    images_type = 'libvirt-storage'

    def servers(self):
        """One of each kind that has local disks, by kind."""
        found = {'overlay': self.boot('overlay', flavor='lab.small.disks')}
        found['off'] = self.boot('off', host='host-b')
        found['off'].stop()
        found['moved'] = self.boot('moved')
        found['moved'].migrate('host-b')
        # A host whose servers are made on legacy disks.
        self.cloud.set('host-a', 'libvirt', 'images_type', 'qcow2')
        try:
            found['legacy'] = self.boot('legacy')
        finally:
            self.cloud.set_images_type(self.images_type)
        found['shelved'] = self.boot('shelved', host='host-b')
        found['shelved'].shelve()
        return found

    def manage(self, *words, status=0, **more):
        done = self.cloud.manage(*words, check=False, **more)
        told = done.stdout + done.stderr
        self.assertEqual(status, done.returncode, told)
        self.assertNotIn('Traceback', told)
        return done.stdout

    def test_commands(self):
        servers = self.servers()
        with self.subTest('nova-status upgrade check'):
            told = self.manage('upgrade', 'check', program='nova-status',
                               status=1)
            results = dict(re.findall(
                r'\| Check: (.*?) +\|\n\| Result: (\w+)', told))
            self.assertEqual(list(CHECKS), list(results), told)
            self.assertEqual('Warning', results[CHECKS[-2]], told)
            # The table breaks its lines at some hyphens.
            self.assertIn(servers['legacy'].id,
                          re.sub(r' *\|\n\| *', '', told))
            self.assertEqual('Success', results[CHECKS[-1]], told)
        with self.subTest('list_disks'):
            # Without a log file the log is on standard output too.
            told = self.manage('libvirt', 'list_disks', '--json', status=3)
            lines = json.loads(told.splitlines()[-1])
            backends = {line['instance_uuid']: line['backend']
                        for line in lines if line['disk'] == 'disk'}
            for kind in ('overlay', 'off', 'moved'):
                self.assertEqual('libvirt-storage',
                                 backends[servers[kind].id], kind)
            self.assertNotEqual('libvirt-storage',
                                backends.get(servers['legacy'].id))
            told = self.manage('libvirt', 'list_disks', '--legacy', status=3)
            self.assertIn(servers['legacy'].id, told)
            self.assertNotIn(servers['overlay'].id, told)
            told = self.manage('libvirt', 'list_disks', '--host', 'host-b')
            self.assertIn(servers['off'].id, told)
            self.assertNotIn(servers['legacy'].id, told)
        with self.subTest('machine types'):
            server = servers['off']
            self.assertRegex(self.manage(
                'libvirt', 'get_machine_type', server.id), 'pc')
            self.manage('libvirt', 'update_machine_type', server.id,
                        'pc-i440fx-7.2', '--force')
            self.assertIn('pc-i440fx-7.2', self.manage(
                'libvirt', 'get_machine_type', server.id))
            self.assertIn('No instances', self.manage(
                'libvirt', 'list_unset_machine_type'))
        with self.subTest('as nova, on a host'):
            told = self.manage('libvirt', 'list_disks', '--host', 'host-a',
                               place='host-a', status=3)
            self.assertIn(servers['overlay'].id, told)


if __name__ == '__main__':
    unittest.main()
