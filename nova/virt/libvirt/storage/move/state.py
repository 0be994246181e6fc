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
"""What both ends of a move of volumes have to agree on.

The source and the destination are two compute services, and all that they say
to each other goes with the instance: in its system_metadata, whose values have
at most 255 characters.
"""

import dataclasses
import typing as ty

from oslo_serialization import jsonutils

from nova import exception
from nova.i18n import _
from nova.objects import fields
from nova.virt.libvirt.storage.pool import config as storage_config

# Keys of instance.system_metadata. The destination's offer:
OFFER = 'libvirt_storage_offer'
# what a disk's copy must be found to be, by the disk's name;
COPY = 'libvirt_storage_copy_'
# that there are volumes which wait for confirm or revert: the migration's id,
# and the address of the source's libvirt;
MOVED = 'libvirt_storage_moved'
# the source's swap volume, whose mapping a resize may do away with;
SWAP = 'libvirt_storage_swap'
# what couldn't be undone yet.
LEFT = 'libvirt_storage_left_'
MAX_VALUE = 255

# Pool types which libvirt can stream into. A new file reads as zeroes and so
# may have holes; on a block device what lies under a hole stays.
FILE_POOLS = ('dir', 'fs', 'netfs')
BLOCK_POOLS = ('logical', 'disk')

# The local disks of an instance, by kind_of().
KINDS = ('disk', 'disk.config', 'disk.eph', 'disk.local', 'disk.swap')


@dataclasses.dataclass
class Item:
    """One volume on its way.

    :ivar name: of the disk, or of what else it is
    :ivar record: the disk's record on this host, None if it is no disk
    :ivar source: its StorageVolume, None if it isn't copied
    :ivar pool: the destination's StoragePool
    :ivar target: the volume's name there, once chosen
    :ivar sparse: whether the destination may leave holes
    :ivar length: bytes of the source (physical, not virtual)
    :ivar allocation: bytes which that takes up
    :ivar growth: bytes that come in addition when it is flattened
    :ivar done: bytes copied
    :ivar result: the pump's Result
    """
    name: str
    record: ty.Any
    source: ty.Any
    pool: ty.Any
    target: str | None = None
    sparse: bool = True
    length: int = 0
    allocation: int = 0
    growth: int = 0
    done: int = 0
    result: ty.Any = None

    def __post_init__(self):
        if self.source:
            self.measure()

    def measure(self):
        self.length = self.source.physical()
        self.allocation = min(self.source.info().allocation, self.length)


def moved_by(instance):
    """Return the id of the Migration that has copied an instance's volumes.

    :returns: None if there is none that waits for its end
    """
    value = instance.system_metadata.get(MOVED)
    return jsonutils.loads(value)[0] if value else None


def is_copied(disk_name):
    """Whether a disk is copied, rather than made anew."""
    return disk_name != 'disk.swap'


def create_volume(pool, name, length, owner, mode=0o644):
    """Make the volume on the destination that the bytes go to.

    :param pool: StoragePool there
    :param length: bytes of the file, whatever its format is
    :param owner: user and group id of Nova there: the user may have another
        number than on the source
    :returns: StorageVolume
    """
    config = storage_config.LibvirtConfigStorageVolume()
    config.name = name
    config.capacity = length
    config.allocation = 0
    config.target_format = fields.LibvirtDiskFormat.RAW
    config.permissions = storage_config.LibvirtConfigStoragePermissions()
    config.permissions.mode = mode
    config.permissions.owner, config.permissions.group = owner
    return pool.create(config)


def kind_of(disk_name):
    """All ephemeral disks of a host are in one pool."""
    return disk_name.rstrip('0123456789')


def check_pool(pool):
    """Check that a pool is there, active, and of a type that takes streams.

    :returns: its type
    """
    if not pool.exists():
        reason = _("storage pool %(pool)s doesn't exist on host %(host)s; "
                   "define and start it there")
    elif not pool.is_active():
        reason = _("storage pool %(pool)s of host %(host)s is inactive; "
                   "start it there")
    else:
        pool_type = pool.config().type
        if pool_type in FILE_POOLS + BLOCK_POOLS:
            return pool_type
        reason = _("storage pool %(pool)s of host %(host)s is of type "
                   "%(type)s, and this host can copy into: %(types)s")
        raise exception.MigrationPreCheckError(reason=reason % {
            'pool': pool.name, 'host': pool.host, 'type': pool_type,
            'types': ', '.join(FILE_POOLS + BLOCK_POOLS)})
    raise exception.MigrationPreCheckError(
        reason=reason % {'pool': pool.name, 'host': pool.host})
