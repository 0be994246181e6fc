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

"""A cloud on libvirt's modular daemons, where somebody has compiled them.

Peers come to virtproxyd, which passes them on; nova-compute is a client of
virtqemud on its own host.
"""

from lab import modular
from lab.tests import cloud_case
from lab.tests import live_case
from lab.tests import test_cloud_nbd
from lab.tests import test_modular

MODULAR = {**cloud_case.SERIES, 'host_root': modular.RELEASE, 'modular': True}

load_tests = cloud_case.only_in_full


class ModularCase:
    """Both hosts have them, or a skip."""

    lab = MODULAR
    rate = None

    @classmethod
    def setUpClass(cls):
        test_modular.skip_unless_built()
        super().setUpClass()


class TestServers(ModularCase, live_case.LiveCase):

    rate = 2

    def test_reboots(self):
        server, before = self.server()
        server.hard_reboot()
        said = server.testimony(after=before)
        self.assert_kept(said)
        server.stop()
        server.start()
        self.assert_kept(server.testimony(after=said))
        server.delete()
        self.assert_nothing_left(server)

    def test_cold(self):
        server, before = self.server()
        said = self.assert_goes(server, before)
        server.migrate('host-b')
        self.assert_kept(server.testimony(after=said))
        server.confirm()
        self.assert_nothing_left(server, 'host-a')

    def test_live(self):
        server, said = self.writing_server()
        self.assert_moves(server, said)

    def test_virtstoraged(self):
        """It ends on both hosts, on one in the midst of a copy."""
        server, said = self.server()
        server.api.migrate_server(server.id, host='host-b')
        self.wait_middle(server, 30)
        for host in (self.b, self.a):
            host.kill('virtstoraged')
            # As its socket's unit does.
            host.restart('virtstoraged')
        said = self.assert_stayed(server, said)
        self.assert_goes(server, said)


class TestNbd(ModularCase, test_cloud_nbd.NbdCase):
    """Nobody comes to virtproxyd."""

    def test_cold(self):
        server, before = self.server()
        self.assert_goes(server, before)
        self.assert_nothing_open()
        self.assertIn('over NBD', self.service_log('host-a'))
