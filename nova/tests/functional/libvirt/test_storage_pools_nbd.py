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
"""An instance whose disks go from one compute service to the other, over NBD.

Played are qemu-nbd and the pump; ports are opened on loopback addresses.
"""

import fixtures

from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_hosts
from nova.tests.functional.libvirt import test_storage_pools_moves as moves


class NbdTestBase(moves.MovesTestBase):
    transport = 'nbd'
    network = '127.0.0.%d'

    def setUp(self):
        super().setUp()
        self.exports = self.useFixture(libvirt_hosts.Exports())
        self.pump.exports = self.exports
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pump.transfer.nbd_missing',
            lambda: None))
        # Who asks for the libvirt of another host finds none.
        self.peers = dict(fakelibvirt.PEERS)
        fakelibvirt.PEERS.clear()

    def assert_closed(self, number=4):
        """Check that what was opened is closed, and how many that were."""
        self.assertEqual(number, len(self.exports.made))
        for found in self.exports.made:
            self.assertFalse(found.is_open or found.has_key)


class TestMovesOverNbd(NbdTestBase):

    def test_migrate_and_confirm(self):
        server = self.boot_with_all()
        server = self._migrate_server(server)
        self.assertEqual('compute2', server['OS-EXT-SRV-ATTR:host'])
        self.assert_waits(server)
        # disk, disk.eph0, disk.config
        self.assert_closed(3)
        self.assertEqual({'127.0.0.2'},
                         {found.address for found in self.exports.made})
        self._confirm_resize(server)
        self.assert_settled(server, 'compute2', 'compute1')
        self._reboot_server(server, hard=True)
        self.assert_settled(server, 'compute2', 'compute1')
        self.assert_deleted(server)

    def test_migrate_and_revert(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.write('compute2', server, 'disk.eph0', b'lost')
        self._revert_resize(server)
        self.assert_settled(server, 'compute1', 'compute2')
        self.assert_deleted(server)

    def test_resize(self):
        server = self.boot_with_all()
        self._resize_server(
            server, self.flavor(disk=3, ephemeral=1, swap=128))
        self.assert_waits(server)
        self._confirm_resize(server)
        self.assert_settled(server, 'compute2', 'compute1')


class TestRefusalsOverNbd(NbdTestBase):
    # An error on a host is none of the API.
    CAST_AS_CALL = False

    def test_copy_that_fails(self):
        server = self.boot_with_all()

        def fail(destination):
            if len(self.exports.made) == 2:
                raise fakelibvirt.make_libvirtError(
                    fakelibvirt.libvirtError, 'cut')

        self.pump.fail = fail
        self._migrate_server_that_fails(server)
        self.assert_settled(server, 'compute1', 'compute2')
        self.assert_closed(len(self.exports.made))
        self.pump.fail = lambda destination: None
        self._migrate_server(server)
        self.assert_waits(server)

    def _migrate_server_that_fails(self, server):
        self.api.post_server_action(
            server['id'], {'migrate': {'host': 'compute2'}})
        self.wait_for_refusal(server)

    def test_destination_that_takes_nothing_in(self):
        server = self.boot_with_all()
        self.set_option('compute2', 'storage_migration_transport', 'libvirt')
        self._migrate_server_that_fails(server)
        self.assert_settled(server, 'compute1', 'compute2')
        self.assert_closed(0)
        # The libvirt of compute2 can be reached.
        fakelibvirt.PEERS.update(self.peers)
        self.set_option('compute1', 'storage_migration_transport', 'auto')
        self._migrate_server(server)
        self.assert_waits(server)
        self.assert_closed(0)
