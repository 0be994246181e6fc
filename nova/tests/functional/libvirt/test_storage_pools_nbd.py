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

import os
import typing as ty
from unittest import mock

import fixtures

from nova import exception
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_hosts
from nova.tests.functional.libvirt import storage_pools
from nova.tests.functional.libvirt import test_storage_pools_moves as moves
from nova.virt.libvirt.storage.pump import transfer as pump


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


class TestFailedResizeOverNbd(NbdTestBase):

    # An error on a host is none of the API.
    CAST_AS_CALL = False

    def test_migrate_afterwards(self):
        """The disk has grown, and to libvirt it is a raw file yet."""
        server = self.boot()
        # compute1 has the guest defined.
        self.start_compute('compute3')
        fakelibvirt.PEERS.clear()
        with mock.patch(moves.TestEvacuationFails.XML,
                        side_effect=exception.InternalError('no')):
            self.api.post_server_action(server['id'], {'resize': {
                'flavorRef': self.flavor(disk=3)}})
            server = self.wait_for_failure(server)
        self._reboot_server(server, hard=True)
        self.assertEqual(3 << 30, self.records(server)['disk'].size)
        host = server['OS-EXT-SRV-ATTR:host']
        self.api.post_server_action(server['id'], {'migrate': {
            'host': 'compute2' if host == 'compute3' else 'compute3'}})
        self._wait_for_state_change(server, 'VERIFY_RESIZE')
        self._confirm_resize(server)
        self.assertEqual(3 << 30, self.records(server)['disk'].size)


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


class WarmCopy:
    """Plays the pump's, which sends what differs from what it knows.

    :cvar pump: the played one
    :cvar known: what the copies were told, by the volume's suffix
    """
    pump: ty.Any = None
    known: dict[str, ty.Any] = {}

    def __init__(self, source, destination, length, key=None, sparse=True,
                 known=None, find_holes=False):
        self.source, self.destination = source, destination
        self.length, self.key = length, key or pump.new_key()
        self.known[source.name.partition('_')[2]] = known

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def first(self, watch, bandwidth, changed=None):
        watch.on_start(libvirt_hosts.NO_PROCESS)
        self.pump.exports.connect(self.destination)
        watch.progress(0)
        return self._send(self.length)

    def rest(self, length, watch, bandwidth, changed=None):
        watch.on_end(libvirt_hosts.NO_PROCESS)
        return self._send(length)

    def _send(self, length):
        content = self.pump._read(self.source, length)
        # What is there isn't blank: holes are sent as holes.
        path = self.pump.exports.made[
            self.destination.port - 1001].order.path
        room = os.path.getsize(path)
        os.truncate(path, 0)
        os.truncate(path, room)
        self.pump.exports.write(self.destination, content)
        return pump.Result(
            data=length, holes=0, key=self.key, physical=length,
            checksum=self.pump._sum(content, self.key), allocation=None,
            seconds=0.1)


class TestKeptCopies(NbdTestBase):
    """Servers that come back to a host which has kept their disks."""

    def setUp(self):
        super().setUp()
        for host in ('compute1', 'compute2'):
            self.set_option(host, 'storage_migration_keep_copies', 1)
        played = type('Played', (WarmCopy,), {'pump': self.pump, 'known': {}})
        self.known = played.known
        for name, value in (
                ('move.ahead._KEPT_LEAST', 1),
                ('pump.transfer.WarmCopy', played),
                ('pump.transfer.read_table', self._read_table),
                ('pool.mounts.is_local', lambda path: True)):
            self.useFixture(fixtures.MonkeyPatch(
                'nova.virt.libvirt.storage.' + name, value))

    def _read_table(self, volume, length, *, key, **watch):
        return b'%d' % self.pump._sum(self.pump._read(volume, length), key)

    def assert_into_copies(self):
        """Check that what the host has kept was read, and written over."""
        self.assertEqual({'disk', 'disk.config', 'disk.eph0'},
                         set(self.known))
        for known in self.known.values():
            self.assertGreater(known.length, 0)
            self.assertTrue(known.table)
        self.known.clear()

    def test_there_and_back(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.assertEqual({}, self.known)
        self._confirm_resize(server)
        copies = ['disk', 'disk.config', 'disk.eph0']
        self.assertEqual(copies, self.volumes('compute1', server))
        self.write('compute2', server, 'disk.eph0', b'changed')
        self._migrate_server(server)
        self.assert_into_copies()
        self.assertEqual(b'changed' + (b'written' * 100)[7:], self.content(
            'compute1', server, 'disk.eph0', 700, storage_pools.GUEST))
        self._confirm_resize(server)
        self.assert_ready('compute1', server, **moves.ALL)
        self.assertEqual(copies, self.volumes('compute2', server))
        self.assert_closed(6)

    def test_after_a_revert(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.write('compute2', server, 'disk.eph0', b'lost')
        self._revert_resize(server)
        self.assert_ready('compute1', server, **moves.ALL)
        self.assertEqual(['disk', 'disk.config', 'disk.eph0'],
                         self.volumes('compute2', server))
        self._migrate_server(server)
        self.assert_into_copies()
        self.assert_waits(server)
