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
"""Disks that are sent while the guest runs, and then what has changed."""

import re
import time

from lab import config


class AheadTests:
    """The tests of either way; with a MovesCase.

    That has assert_nothing_open(): that nobody writes to host-b any more.
    """

    rate = None
    more = {'storage_migration_precopy': (0, 1024),
            'storage_migration_precopy_bandwidth': (3, 0)}

    def writing(self):
        """A server on host-a whose guest writes, on its way to host-b."""
        server, said = self.server()
        server.command('keep-writing', 256)
        self.begin(server)
        self.wait_middle(server, 40)
        self.assert_runs(server)
        return server, said

    def checkpoints(self, server):
        with server.domain('host-a') as domain:
            return [one.getName() for one in domain.listAllCheckpoints()]

    def assert_runs(self, server):
        with server.domain('host-a') as domain:
            self.assertTrue(domain.isActive())

    def assert_never_off(self, server, said):
        """It has run on host-a all the time; nothing of it is on host-b."""
        found = self.settled(server)
        self.assertEqual(('ACTIVE', 'host-a'),
                         (found.status, found.compute_host))
        now = server.look()
        self.assertEqual(said.boot_id, now.boot_id)
        self.assert_kept(now)
        self.wait_for(lambda: not server.left_on('host-b'), 30,
                      'a clean host-b: %s' % server.left_on('host-b'))
        self.assert_nothing_open()
        return now

    def assert_goes_off(self, server, before):
        """It comes to host-b; returns what its guest says there."""
        there = self.assert_went(server, before)
        self.assert_nothing_open()
        return there

    def assert_sent_twice(self, server, before, written):
        """It comes to host-b, and is sent in two passes.

        :param written: what its guest had written while it was sent
        """
        there = self.assert_goes_off(server, before)
        self.assertGreaterEqual(there.written, written)
        log = self.service_log('host-a')
        for text in ('while the server runs: ', 'Copied the rest of volume',
                     'The server has been down for'):
            self.assertIn(text, log)
        self.assertNotIn('could not be: ', log)
        # Of the disk that the guest writes to QEMU has said what.
        read = re.findall(r'Copied the rest of volume \S+_disk: \d+ of (\d+) '
                          r'bytes in \S+ s; (\d+) may have changed', log)
        self.assertLess(int(read[-1][1]), int(read[-1][0]) / 2)
        server.revert()
        back = server.testimony(after=there)
        self.assert_kept(back)
        self.assertEqual([], self.checkpoints(server))
        self.assert_nothing_left(server, 'host-b')

    def test_guest_writes(self):
        server, before = self.writing()
        self.assert_sent_twice(server, before, server.look().written)

    def test_source_compute_is_killed(self):
        server, said = self.writing()
        self.a.kill('nova-compute')
        time.sleep(1)
        self.assert_nothing_open()
        self.assert_runs(server)
        # What QEMU notes goes on, until somebody ends it.
        self.assertEqual(1, len(self.checkpoints(server)))
        self.cloud.start_compute('host-a')
        said = self.assert_never_off(server, said)
        self.assertEqual([], self.checkpoints(server))
        server.command('stop-writing')
        self.assert_goes(server, said)

    def test_server_is_deleted(self):
        server, _said = self.writing()
        server.delete()
        for host in config.HOSTS:
            self.wait_for(lambda: not server.left_on(host), 60,
                          'a clean %s: %s' % (host, server.left_on(host)))
        self.assert_nothing_open()
