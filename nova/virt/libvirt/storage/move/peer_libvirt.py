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
"""The destination of a move, asked through its libvirt."""

import contextlib

from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import peers
from nova.virt.libvirt.storage.move import room
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import sharing
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import leftovers


class LibvirtPeer(peers.Peer):
    """A host's libvirt, as the destination of a move.

    :param connection: a libvirt.virConnect
    :param uri: where that leads to
    :param host: the host's name
    :param owner: user and group id of Nova there, whose the volumes will be;
        None if none is made
    """

    def __init__(self, connection, uri, host, owner=None):
        self.connection = connection
        self.where = uri
        self.host = host
        self.owner = owner

    def pool(self, name):
        return LibvirtPool(self, name)

    def takes_holes(self):
        return not room.is_reserved(self.connection)

    def room_ahead(self, length, most):
        # What has holes grows as it is written to.
        return (length if self.takes_holes() else
                room.to_grow(length, most))

    def target(self, pool_name, volume_name):
        # libvirt can't be asked to end an upload: it ends with the process
        # that sends it.
        return contextlib.nullcontext(peers.Target(
            pump.Volume(self.where, pool_name, volume_name)))

    def delete(self, places, instance):
        return leftovers.delete_volumes(
            self.connection, self.host, places, instance)


class LibvirtPool(peers.PeerPool):
    """A storage pool of another host's libvirt."""

    def __init__(self, of: LibvirtPeer, name: str):
        self.name = name
        self.host = of.host
        self._peer = of
        self._pool = storage_pool.StoragePool(of.connection, name, of.host)

    def check(self):
        return state.check_pool(self._pool)

    def available(self, wanted):
        return room.measured(self._pool, wanted)

    def refresh(self):
        self._pool.refresh()

    def has(self, name, refresh=False):
        return self._pool.find(name, refresh) is not None

    def free_name(self, wanted, taken=()):
        return self._pool.free_name(wanted, taken)

    def is_shared(self, here, instance):
        return sharing.is_same(here, self._pool, instance)

    def create(self, name, length, mode):
        state.create_volume(
            self._pool, name, length, self._peer.owner, mode,
            length if room.is_reserved(self._peer.connection) else 0)


@contextlib.contextmanager
def connected(host, address, host_name, owner=None):
    """Connect to a peer's libvirt for the time of a with statement.

    :param host: the nova.virt.libvirt.host.Host of this compute
    :param address: the peer's IP address or host name
    :param host_name: its name as a compute
    :param owner: as LibvirtPeer has it
    :raises: exception.MigrationPreCheckError
    """
    uri = peer.uri_of(address)
    with peer.connected(host, uri) as connection:
        found = LibvirtPeer(connection, uri, host_name, owner)
        # On one and the same host nothing has far to go.
        found.takes_ahead = True
        yield found
