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

"""What a host's disks take of its storage pools.

Answers come from libvirt: a volume may be readable by root alone, and what
its first bytes say may be the guest's invention.
"""

import functools
import os
import typing as ty

from oslo_log import log as logging

from nova import exception
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import volume as storage_volume
from nova.virt.libvirt import utils as libvirt_utils

LOG = logging.getLogger(__name__)


class Volumes:
    """The volumes that are the disks of a host's guests.

    :param get_connection: returns a libvirt.virConnect; called only if there
        is something to look up
    :param host: its name, for messages
    """

    def __init__(self, get_connection: ty.Callable, host: str):
        self._get_connection = get_connection
        self._host = host

    def get(self, pool: str, volume: str) -> storage_volume.StorageVolume:
        """:raises: exception.StorageVolumeNotFound,
            exception.StoragePoolError
        """
        return storage_pool.StoragePool(
            self._get_connection(), pool, self._host).volume(volume)

    def disk_info(self, disk) -> dict:
        """What the driver wants to know of a guest's disk.

        :param disk: a LibvirtConfigGuestDisk, its source_type ``volume``
        :returns: type (the format which the guest is told), path,
            virt_disk_size, disk_size and over_committed_disk_size (bytes),
            backing_file (empty if there is none), pool and volume (names)
        :raises: exception.StorageVolumeNotFound,
            exception.StoragePoolError
        """
        volume = self.get(disk.source_pool, disk.source_volume)
        backing = ''
        if disk.driver_format == 'raw':
            # libvirt would tell what the guest has written there, or fail.
            size, allocation = volume.file_bytes()
        else:
            config = volume.config()
            size, allocation = _virtual_size(config, disk), config.allocation
            if (config.backing_store is not None and
                    config.target_format == disk.driver_format):
                backing = config.backing_store.path or ''
        return {
            'type': disk.driver_format,
            'path': volume.path,
            'virt_disk_size': size,
            'backing_file': backing,
            'disk_size': allocation,
            'over_committed_disk_size': max(0, size - allocation),
            'pool': disk.source_pool,
            'volume': disk.source_volume,
        }


def _virtual_size(config, disk):
    if config.target_format == disk.driver_format:
        return config.capacity
    # The capacity is then what that something says.
    LOG.warning('Volume %(volume)s of storage pool %(pool)s is %(ours)s, but '
                'libvirt takes it for %(theirs)s, which is not acted upon. A '
                'refresh of the pool makes libvirt look again.',
                {'volume': disk.source_volume, 'pool': disk.source_pool,
                 'ours': disk.driver_format,
                 'theirs': config.target_format})
    return config.physical


def measure(
    pool: storage_pool.StoragePool,
) -> tuple[int | str, int, int]:
    """How large a pool of this host is now.

    libvirt looks at the file system only when it makes or deletes a volume.
    Guests fill it in between, and operators let it grow.

    :returns: what the pools of one file system, or Ceph cluster, have in
        common; total and free bytes
    :raises: exception.StoragePoolInactive, exception.StoragePoolNotMounted,
        exception.StoragePoolError
    """
    info = pool.info()
    if not info.is_running:
        # It would count as one of 0 bytes.
        raise exception.StoragePoolInactive(pool=pool.name, host=pool.host)
    pool.check_mounted()
    images = pool.ceph()
    if images is not None:
        # Its size is that of the cluster, whichever of its pools that is.
        return (images.cluster, *images.sizes())
    path = pool.directory()
    if path is None:
        return pool.name, info.capacity, info.available
    try:
        return file_system(path)
    except OSError as e:
        LOG.debug('Storage pool %(pool)s is judged by libvirt alone: '
                  '%(error)s', {'pool': pool.name, 'error': e})
        return pool.name, info.capacity, info.available


def file_system(path: str) -> tuple[int, int, int]:
    """How large the file system of a directory is now.

    :returns: what its directories have in common; total and free bytes
    :raises: OSError
    """
    sizes = libvirt_utils.get_fs_info(path)
    return os.stat(path).st_dev, sizes['total'], sizes['free']


class LocalInfo:
    """What a host's pools hold; remembers what it was.

    :param host: its name, for messages
    """

    def __init__(self, host: str):
        self._host = host
        # Pool name -> device or name, and total bytes, when it was well
        self._known: dict[str, tuple[int | str, int]] = {}
        self._sick: set[str] = set()

    def get(self, conn) -> dict[str, int]:
        """What all pools hold; those of one file system count once.

        A pool that can't be asked counts as full, and as large as it was:
        the report of a host fails for no pool's sake.

        :param conn: a libvirt.virConnect
        :returns: total, free and used, in bytes
        """
        sizes: dict[int | str, tuple[int, int]] = {}
        for name in setup.pool_names():
            pool = storage_pool.StoragePool(conn, name, self._host)
            try:
                device, total, free = measure(pool)
                self._note_well(name)
            except exception.StoragePoolError as e:
                self._note_sick(name, e)
                device, total = self._known.get(name, (name, 0))
                free = 0
            self._known[name] = (device, total)
            # Of one file system, the pool that could be asked knows better.
            known_free = sizes.get(device, (0, 0))[1]
            sizes[device] = (total, max(free, known_free))
        total = sum(total for total, _free in sizes.values())
        free = sum(free for _total, free in sizes.values())
        return {'total': total, 'free': free, 'used': total - free}

    def _note_sick(self, name, error):
        if name not in self._sick:
            self._sick.add(name)
            LOG.warning('Storage pool %(pool)s counts as full: %(error)s',
                        {'pool': name, 'error': error})

    def _note_well(self, name):
        if name in self._sick:
            self._sick.discard(name)
            LOG.info('Storage pool %s is counted as it is again', name)


# One for each host that a process reports for, which is one.
_local_info = functools.cache(LocalInfo)


def get_local_info(conn, host: str) -> dict[str, int]:
    """What this host's pools hold: see :class:`LocalInfo`."""
    return _local_info(host).get(conn)


def overfull(wanted: ty.Mapping[str, int], measured: ty.Callable) -> list[
        tuple[list[str], int, int]]:
    """Where there is less room than is wanted.

    :param wanted: bytes by place: a pool's name, or a directory
    :param measured: called with each; returns what :func:`measure` does
    :returns: of each such file system the places in it, its free bytes, and
        how many are wanted there
    """
    free: dict[int | str, int] = {}
    places: dict[int | str, list[str]] = {}
    for place in sorted(wanted):
        device, _total, free[device] = measured(place)
        places.setdefault(device, []).append(place)
    sums = {device: sum(wanted[place] for place in found)
            for device, found in places.items()}
    return [(places[device], free[device], total)
            for device, total in sums.items() if total > free[device]]


def disk_devices(conn, host: str) -> set[int]:
    """The devices (st_dev) of the file systems that this host's pools are in.

    A pool that can't be looked at doesn't keep the others from being known.
    """
    devices = set()
    for name in setup.pool_names():
        pool = storage_pool.StoragePool(conn, name, host)
        try:
            path = pool.directory()
            if path is not None:
                devices.add(os.stat(path).st_dev)
        except (exception.StoragePoolError, OSError) as e:
            LOG.debug('Storage pool %(pool)s is passed over: %(error)s',
                      {'pool': name, 'error': e})
    return devices
