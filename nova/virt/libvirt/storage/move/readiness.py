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
from oslo_utils import versionutils

import nova.conf
from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import objects
from nova.virt.libvirt.storage.intake import export
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import peer_service
from nova.virt.libvirt.storage.move import room
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.move import transport
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage import report

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# In ComputeNode.stats of a host whose images_type is libvirt-storage: READY,
# or what is in the way.
STAT = 'libvirt_storage'
READY = 'ready'
# Likewise: the ways by which disks can come, e.g. "nbd,libvirt".
WAYS = 'libvirt_storage_ways'
# Likewise: the pools whose volumes are block devices, e.g. "fast,large".
DEVICES = 'libvirt_storage_devices'

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
        self._closed: dict[str, str | None] = {}
        self._devices: list[str] = []

    def stats(self) -> dict[str, str]:
        """Look at the pools, and at the ways by which a peer would come.

        What changes is logged.

        :returns: for the compute node's stats; nothing without pools
        """
        if CONF.libvirt.images_type != 'libvirt-storage':
            return {}
        try:
            self._look_at_version()
            ways = self._open_ways() if self._check_pools() else []
            found = READY
        except exception.NovaException as e:
            found, ways = e.format_message(), []
        if found != self._told:
            if found != READY:
                LOG.warning("Volumes can't come to this host by cold "
                            "migration or resize: %s", found)
            elif self._told is not None:
                LOG.info('Volumes can come to this host again')
            self._told = found
        return {STAT: found, WAYS: ','.join(ways),
                DEVICES: ','.join(self._devices)}

    def _look_at_version(self):
        if self._looked_at_version:
            return
        connection = self._host.get_connection()
        if room.is_reserved(connection):
            version = connection.getLibVersion()
            LOG.warning('libvirt %(version)s of this host, as all from '
                        '%(faulty)s, ends or answers nobody when a disk '
                        'becomes full in an upload. Nova takes the room '
                        'beforehand; whoever else uploads has to leave some. '
                        'Upgrade libvirt to 12.7.',
                        {'faulty': room.FAULTY_VERSIONS,
                         'version': versionutils.convert_version_to_str(
                             version)})
        self._looked_at_version = True

    def _check_pools(self):
        """:returns: whether disks have to travel to come to one of them"""
        has_others = False
        connection = self._host.get_connection()
        types = {}
        for name in setup.pool_names():
            pool = storage_pool.StoragePool(connection, name, CONF.host)
            types[name] = state.check_pool(pool)
            pool.check_access()
            pool.check_mounted()
            # asks Ceph, if it is over Ceph
            has_others = state.ceph_of(pool) is None or has_others
        of_types = {name: kinds.of_type(pool_type)
                    for name, pool_type in types.items()}
        self._devices = [name for name, kind in of_types.items()
                         if not kind.is_directory and not kind.is_ceph]
        return has_others

    def _open_ways(self):
        """Look which of the configured ways disks can come by.

        :raises: exception.NovaException if there is none
        """
        checks = {transport.NBD: self._check_export,
                  transport.LIBVIRT: self._check_connection}
        closed: dict[str, ty.Any] = {}
        for way in transport.ways():
            try:
                checks[way]()
                closed[way] = None
            except exception.NovaException as e:
                closed[way] = e
        found = [way for way, error in closed.items() if error is None]
        if not found:
            raise next(iter(closed.values()))
        for way, error in closed.items():
            said = error and error.format_message()
            if said and said != self._closed.get(way):
                LOG.info("Volumes can't come to this host by %(way)s: "
                         "%(error)s", {'way': way, 'error': said})
            self._closed[way] = said
        return found

    def _check_export(self):
        if self._devices:
            raise exception.MigrationPreCheckError(reason=_(
                "let disks come by libvirt, with "
                "[libvirt]/storage_migration_transport = auto or libvirt: the "
                "volumes of storage pool %(pool)s of host %(host)s are no "
                "files, which alone come over NBD") % {
                    'pool': ', '.join(self._devices), 'host': CONF.host})
        export.check(self._get_address())
        # What can't be sent back is no way either.
        peer_service.check_pump()

    def _check_connection(self):
        if time.monotonic() < self._connected + _CONNECTED_FOR:
            return
        with peer.connected(self._host, peer.uri_of(self._get_address())):
            self._connected = time.monotonic()


def hosts_with_pools(context: 'nova_context.RequestContext') -> set[str]:
    """List the hosts that keep new disks in storage pools.

    :raises: exception.CellTimeout if a cell's database doesn't answer
    """
    return {node.host for node in report.of_all_cells(
        context, objects.ComputeNodeList.get_all)
        if STAT in (node.stats or {})}


def hosts_not_ready(
        context: 'nova_context.RequestContext') -> list[tuple[str, str]]:
    """List the hosts with pools that can't take volumes, with the reason.

    :raises: exception.CellTimeout if a cell's database doesn't answer
    """
    nodes = {node.host: node.stats or {} for node in report.of_all_cells(
        context, objects.ComputeNodeList.get_all)}
    found = [(host, stats[STAT]) for host, stats in nodes.items()
             if stats.get(STAT, READY) != READY]
    return sorted(found + _hosts_apart(nodes))


def pools_of_devices(
        context: 'nova_context.RequestContext') -> set[tuple[str, str]]:
    """List the pools whose volumes are block devices, as (host, pool).

    :raises: exception.CellTimeout if a cell's database doesn't answer
    """
    return {(node.host, pool) for node in report.of_all_cells(
        context, objects.ComputeNodeList.get_all)
        for pool in (node.stats or {}).get(DEVICES, '').split(',') if pool}


def _hosts_apart(nodes):
    """List the hosts which have no way in common with another one."""
    alone = {host: stats[WAYS] for host, stats in sorted(nodes.items())
             if stats.get(WAYS) and ',' not in stats[WAYS]}
    apart = []
    for host, way in alone.items():
        other = next((other for other in alone if alone[other] != way), None)
        if other:
            apart.append((host, _(
                "disks come by %(way)s alone, and to host %(other)s by "
                "%(theirs)s alone: see nova-compute's log for what keeps the "
                "other way closed, or set "
                "[libvirt]/storage_migration_transport") % {
                    'way': way, 'other': other, 'theirs': alone[other]}))
    return apart
