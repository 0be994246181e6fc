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
"""Copies of disks that nobody needs any more, and that stay for a while.

The next move to their host sends no more than what differs. They are noted as
left over, and are deleted as such when their time is over, when there is no
room for the disks, or when their instance is deleted. Nothing is believed of
what is in them.
"""

import os
import time

import nova.conf
from nova import exception
from nova.virt.libvirt.storage.pool import kinds as pool_kinds
from nova.virt.libvirt.storage.pool import mounts
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.records import kinds
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF


def is_on() -> bool:
    """Whether this host is configured to let copies stay."""
    return (CONF.libvirt.storage_migration_keep_copies > 0 and
            CONF.libvirt.storage_migration_transport != 'libvirt')


def copies(disks, places) -> set[tuple[str, str]]:
    """Those of some places that may be copies of an instance's disks.

    :param disks: the instance's InstanceDisks
    :param places: iterable of (pool, volume)
    """
    if not is_on():
        return set()
    return {place for place in places if any(
        ownership.is_named_after(place[1], disks.instance.uuid, name)
        for name, _record in disks.items() if kinds.is_copied(name))}


def copy_of(disks, host: str, pool: str, name: str) -> str | None:
    """The volume that a host still has of a disk, None if there is none.

    :param disks: the instance's InstanceDisks
    :param pool: the name of the pool that it has to be in
    :param name: of the disk
    """
    return next((
        volume for where, volume in copies(
            disks, leftovers.on_host(disks, host))
        if where == pool and ownership.is_named_after(
            volume, disks.instance.uuid, name)), None)


def given_back(connection, disks) -> set[tuple[str, str]]:
    """The disks of this host that stay as copies when a move is reverted.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks
    :returns: set of (pool, volume)
    """
    places = {(record.pool, record.volume) for _name, record in disks.items()
              if record.host == CONF.host and record.previous is not None and
              record.previous.host != CONF.host}
    return {place for place in copies(disks, places)
            if is_possible(connection, place[0])}


def staying(connection, disks, for_move=False) -> set[tuple[str, str]]:
    """What of an instance's leftovers is not deleted yet on this host.

    A host that has the disks themselves needs no copies of them.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks
    :param for_move: its disks are about to come: there has to be room
    :returns: set of (pool, volume)
    """
    records = [record for name, record in disks.items()
               if kinds.is_copied(name)]
    if any(record.host == CONF.host for record in records):
        return set()
    places = leftovers.on_host(disks, CONF.host)
    wanted = sum(record.size or 0 for record in records) if for_move else 0
    return {place for place in copies(disks, places)
            if is_possible(connection, place[0], wanted)}


def is_possible(connection, pool_name: str, wanted: int = 0) -> bool:
    """Whether copies may stay in a pool of this host.

    :param connection: this host's libvirt
    :param wanted: bytes that have to be free
    """
    if not is_on():
        return False
    path = _private_directory(connection, pool_name)
    try:
        return path is not None and (
            wanted <= libvirt_utils.get_fs_info(path)['free'])
    except OSError:
        return False


def is_private(connection, pool_name: str) -> bool:
    """Whether a pool holds files, in a file system of this host alone.

    There, what is noted as left is no other host's disk of the same name.

    :param connection: this host's libvirt
    """
    return _private_directory(connection, pool_name) is not None


def _private_directory(connection, pool_name):
    pool = storage_pool.StoragePool(connection, pool_name, CONF.host)
    try:
        if pool.config().type not in pool_kinds.FILE_TYPES:
            return None
        path = os.path.realpath(pool.config().target_path)
        return path if mounts.is_local(path) else None
    except (exception.StoragePoolError, OSError):
        return None


def is_in_time(connection, place) -> bool:
    """Whether a copy on this host is to stay on.

    :param place: (pool, volume)
    """
    age = unchanged_for(connection, place)
    return (is_possible(connection, place[0]) and age is not None and
            age < CONF.libvirt.storage_migration_keep_copies * 3600)


def unchanged_for(connection, place) -> float | None:
    """Seconds since the last change of a volume, be it of its owner.

    :param place: (pool, volume)
    :returns: None if that can't be told
    """
    try:
        path = storage_pool.StoragePool(
            connection, place[0], CONF.host).volume(place[1]).path
        return time.time() - os.stat(path).st_ctime
    except (exception.NovaException, OSError):
        return None
