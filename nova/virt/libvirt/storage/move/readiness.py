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
"""Whether a host can take volumes of its peers, as far as it can see itself.

The answer goes with the compute node's stats into the database, because no
command that runs elsewhere can find it out.
"""

import time
import typing as ty

from oslo_log import log as logging

import nova.conf
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import room
from nova.virt.libvirt.storage.move import state as moves
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage import report

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# In ComputeNode.stats of a host whose images_type is libvirt-storage: READY,
# or what is in the way.
STAT = 'libvirt_storage'
READY = 'ready'

# Seconds for which a connection that worked is taken to work on.
_CONNECTED_FOR = 600


class Readiness:
    """What a compute service knows of its own host.

    :param host: the Host of this compute
    :param get_address: gives the address under which peers know this host
    """

    def __init__(self, host, get_address: ty.Callable[[], str]):
        self._host = host
        self._get_address = get_address
        self._connected = float('-inf')
        self._told: str | None = None
        self._looked_at_version = False

    def stats(self) -> dict[str, str]:
        """Look at the pools, and connect to oneself as a peer would.

        What changes is logged.

        :returns: for the compute node's stats; nothing without pools
        """
        if CONF.libvirt.images_type != 'libvirt-storage':
            return {}
        try:
            self._look_at_version()
            self._check_pools()
            self._check_connection()
            found = READY
        except exception.NovaException as e:
            found = e.format_message()
        if found != self._told:
            if found != READY:
                LOG.warning("Volumes can't come to this host by cold "
                            "migration or resize: %s", found)
            elif self._told is not None:
                LOG.info('Volumes can come to this host again')
            self._told = found
        return {STAT: found}

    def _look_at_version(self):
        if self._looked_at_version:
            return
        connection = self._host.get_connection()
        if room.is_reserved(connection):
            LOG.warning('libvirt %d on this host ends, or answers nobody, '
                        'when a disk becomes full in an upload. Upgrade it to '
                        '12.7; until then leave room in the storage pools.',
                        connection.getLibVersion())
        self._looked_at_version = True

    def _check_pools(self):
        connection = self._host.get_connection()
        for name in setup.pool_names():
            pool = storage_pool.StoragePool(connection, name, CONF.host)
            if moves.check_pool(pool) in moves.FILE_POOLS:
                pool.check_access()

    def _check_connection(self):
        if time.monotonic() < self._connected + _CONNECTED_FOR:
            return
        with peer.connected(self._host, peer.uri_of(self._get_address())):
            self._connected = time.monotonic()


def hosts_not_ready(
        context: 'nova_context.RequestContext') -> list[tuple[str, str]]:
    """List the hosts with pools that can't take volumes, with the reason.

    :raises: exception.CellTimeout if a cell's database doesn't answer
    """
    return sorted(
        (node.host, node.stats[STAT])
        for node in report.of_all_cells(
            context, objects.ComputeNodeList.get_all)
        if (node.stats or {}).get(STAT, READY) != READY)
