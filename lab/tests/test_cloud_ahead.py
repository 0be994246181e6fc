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
"""Moves by libvirt whose disks are sent while the guest runs."""

from lab.tests.ahead_case import AheadTests
from lab.tests.cloud_case import only_in_full
from lab.tests.test_cloud_moves import MovesCase

load_tests = only_in_full


class TestAhead(AheadTests, MovesCase):
    """By libvirt's streams."""
    more = {'storage_migration_transport': ('libvirt', 'libvirt'),
            **AheadTests.more}

    def assert_nothing_open(self):
        self.wait_for(lambda: not self.workers(self.a), 20, 'no worker')

    def test_destination_compute_is_killed(self):
        """The source goes on; the destination takes over when it is back."""
        server, before = self.writing()
        written = server.look().written
        self.b.kill('nova-compute')
        self.cloud.start_compute('host-b')
        self.assert_sent_twice(server, before, written)

    def test_destination_libvirtd_is_killed(self):
        server, said = self.writing()
        self.b.kill('libvirtd')
        self.b.restart('libvirtd')
        self.b.wait_ready()
        said = self.assert_never_off(server, said)
        server.command('stop-writing')
        self.assert_goes(server, said)

    def test_worker_is_killed(self):
        server, said = self.writing()
        pids = self.wait_for(lambda: self.workers(self.a))
        self.a.run(['kill', *map(str, pids)])
        self.assert_never_off(server, said)
