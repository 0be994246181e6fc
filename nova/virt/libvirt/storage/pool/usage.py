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

import os
import typing as ty

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.virt.libvirt import host as libvirt_host
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def pool_names() -> list[str]:
    """The pools in which this host is configured to make disks."""
    return sorted({CONF.libvirt.storage_disks_pool,
                   *CONF.libvirt.storage_pool_mapping.values()})


def has_volumes(guest_config) -> bool:
    """Whether a LibvirtConfigGuest has disks in storage pools."""
    return any(device.root_name == 'disk' and device.source_type == 'volume'
               for device in guest_config.devices)


class Volumes:
    """The volumes that are the disks of a host's guests.

    :param get_connection: returns a libvirt.virConnect; called only if there
        is something to look up
    :param host: its name, for messages
    :param many: whether so many volumes will be asked for that it is better
        to list each pool once; what is made later is not found then
    """

    def __init__(self, get_connection: ty.Callable, host: str,
                 many: bool = False):
        self._get_connection = get_connection
        self._host = host
        self._many = many
        self._listed: dict[str, dict[str, storage_pool.StorageVolume]] = {}

    def get(self, pool: str, volume: str) -> storage_pool.StorageVolume:
        """:raises: exception.StorageVolumeNotFound,
            exception.StoragePoolError
        """
        storage = storage_pool.StoragePool(
            self._get_connection(), pool, self._host)
        if not self._many:
            return storage.volume(volume)
        if pool not in self._listed:
            self._listed[pool] = {v.name: v for v in storage.volumes()}
        try:
            return self._listed[pool][volume]
        except KeyError:
            raise exception.StorageVolumeNotFound(
                pool=pool, volume=volume, host=self._host)

    def disk_info(self, disk) -> dict:
        """What the driver wants to know of a guest's disk.

        :param disk: a LibvirtConfigGuestDisk, its source_type ``volume``
        :returns: type (the format which the guest is told), path,
            virt_disk_size, disk_size and over_committed_disk_size (bytes),
            backing_file (empty if there is none), pool and volume (names)
        :raises: exception.StorageVolumeNotFound,
            exception.StoragePoolError
        """
        config = self.get(disk.source_pool, disk.source_volume).config()
        size = _virtual_size(config, disk)
        backing = ''
        # Only in a format that has them: of a raw disk, libvirt would tell
        # what the guest has written there.
        if (disk.driver_format != 'raw' and
                config.backing_store is not None and
                config.target_format == disk.driver_format):
            backing = config.backing_store.path or ''
        return {
            'type': disk.driver_format,
            'path': config.target_path,
            'virt_disk_size': size,
            'backing_file': backing,
            'disk_size': config.allocation,
            'over_committed_disk_size': max(0, size - config.allocation),
            'pool': disk.source_pool,
            'volume': disk.source_volume,
        }


def _virtual_size(config, disk):
    if (config.target_format == disk.driver_format and
            config.encryption is None):
        # LUKS is called raw with an encryption.
        return config.capacity
    if disk.driver_format == 'raw' and config.target_format == 'iso':
        # A config drive, most often. libvirt reads no size in it.
        return config.physical
    # A refresh took the content for something else: then the capacity is
    # what that something says.
    LOG.warning('Volume %(volume)s of storage pool %(pool)s is %(ours)s, but '
                'libvirt takes it for %(theirs)s. Its guest may have written '
                'such a header; it is not acted upon.',
                {'volume': disk.source_volume, 'pool': disk.source_pool,
                 'ours': disk.driver_format,
                 'theirs': config.target_format})
    return config.physical


def get_local_info(conn, host: str) -> dict[str, int]:
    """What this host's pools hold; pools of one file system count once.

    :returns: total, free and used, in bytes
    :raises: exception.StoragePoolError, exception.StoragePoolInactive
    """
    sizes = {}
    for name in pool_names():
        pool = storage_pool.StoragePool(conn, name, host)
        info = pool.info()
        if info.state != libvirt_host.libvirt.VIR_STORAGE_POOL_RUNNING:
            # It would count as one of 0 bytes.
            raise exception.StoragePoolInactive(pool=name, host=host)
        path = pool.config().target_path
        try:
            device = os.stat(path).st_dev
            # libvirt looks at the file system only when it makes or deletes
            # a volume; guests fill it in between.
            free = libvirt_utils.get_fs_info(path)['free']
        except OSError as e:
            LOG.debug('Storage pool %(pool)s is judged by libvirt alone: '
                      '%(error)s', {'pool': name, 'error': e})
            device, free = name, info.available
        sizes[device] = (info.capacity, free)
    total = sum(capacity for capacity, _free in sizes.values())
    free = sum(free for _capacity, free in sizes.values())
    return {'total': total, 'free': free, 'used': total - free}
