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
"""Snapshots that an operator has made of logical volumes.

LVM deletes them with the volume that they are of, and loses them when that is
overwritten; libvirt doesn't ask. Nova itself makes none.
"""

import os

from oslo_concurrency import processutils

import nova.conf
from nova import exception
import nova.privsep.fs

CONF = nova.conf.CONF


def check(volume) -> None:
    """Refuse to change or delete a volume with which a snapshot would go.

    Also one that is a snapshot itself, whatever it is called.

    :param volume: a StorageVolume
    :raises: exception.StorageVolumeHasSnapshots, exception.StorageVolumeError
    """
    pool = volume.pool
    if not pool.kind().has_snapshots:
        return
    origins = _told(volume) if pool.host == CONF.host else _known(pool)
    found = [name for name, origin in origins if origin == volume.name or (
        origin and name == volume.name)]
    if found:
        raise exception.StorageVolumeHasSnapshots(
            pool=pool.name, host=pool.host, volume=volume.name,
            snapshots=', '.join(sorted(found)))


def is_gone(volume) -> bool:
    """Whether LVM has a volume no more that libvirt still knows.

    Nova's own lvremove may have taken it, or an operator's.

    :param volume: a StorageVolume of this host
    """
    try:
        return volume.pool.kind().has_snapshots and volume.name not in {
            name for name, _origin in _told(volume)}
    except exception.NovaException:
        return False


def _told(volume):
    """What LVM says now, as (name, name of its origin or '')."""
    pool = volume.pool
    try:
        told, _errors = nova.privsep.fs.lvorigins(pool.config().source.name)
    except processutils.ProcessExecutionError as e:
        raise exception.StorageVolumeError(
            pool=pool.name, volume=volume.name, host=pool.host,
            code=e.exit_code, reason=(e.stderr or '').strip() or e) from e
    lines = [line.strip().partition('|') for line in told.splitlines()]
    # In brackets: what LVM itself has made under a volume that is sparse.
    return [(name, '' if origin.startswith('[') else origin)
            for name, _bar, origin in lines]


def _known(pool):
    """What another host's libvirt has seen at its last refresh."""
    stores = [(volume.name, volume.config().backing_store)
              for volume in pool.volumes()]
    return [(name, os.path.basename(store.path or '') if store else '')
            for name, store in stores]
