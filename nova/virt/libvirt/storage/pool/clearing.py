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
"""That nobody reads what another instance has written.

A volume group gives the blocks of a deleted volume to the next one as they
are. So what Nova has made is written to its end before a guest sees it,
whoever had the blocks before; and what an instance has written is overwritten
when its disk is deleted, as [libvirt]/volume_clear says.

A disk that grows gets no blocks but those that were overwritten before: the
guest can be started however the operation ends, or this service.
"""

from oslo_utils import units

import nova.conf
import nova.privsep.fs
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import stream

CONF = nova.conf.CONF

# Behind the name of a volume that is about to grow. It is the instance's, so
# what a service that was killed has left goes with the others.
_ROOM = '.room'


def clear_rest(volume, begin: int) -> None:
    """Overwrite what is behind the content of a new volume.

    :param volume: a StorageVolume
    :param begin: where its content ends, in bytes
    :raises: exception.StorageVolumeError
    """
    if volume.pool.kind().keeps_blocks:
        stream.write_zeroes(volume, begin, volume.physical())


def cleared_extents(volume, length: int) -> list[str]:
    """Overwrite what a volume of a volume group is to grow by.

    :param volume: a StorageVolume
    :param length: bytes that it gets
    :returns: which extents those are, for LVM; nobody has them
    :raises: exception.InsufficientStoragePoolSpace,
        exception.StorageVolumeError, processutils.ProcessExecutionError
    """
    wanted = storage_config.LibvirtConfigStorageVolume()
    wanted.name, wanted.capacity = volume.name + _ROOM, length
    left = volume.pool.find(wanted.name)
    if left is not None:
        left.delete(is_clear=True)
    room = volume.pool.create(wanted)
    try:
        stream.write_zeroes(room, 0, room.physical())
        return nova.privsep.fs.lvextents(room.path)
    finally:
        room.delete(is_clear=True)


def clear(volume) -> None:
    """Overwrite a volume that is about to be deleted.

    :param volume: a StorageVolume
    :raises: exception.StorageVolumeError
    """
    how = CONF.libvirt.volume_clear
    if how == 'none' or not volume.pool.kind().keeps_blocks:
        return
    length = volume.physical()
    if CONF.libvirt.volume_clear_size:
        length = min(length, CONF.libvirt.volume_clear_size * units.Mi)
    if how == 'shred' and volume.pool.host == CONF.host:
        nova.privsep.fs.clear(volume.path, length, shred=True)
    else:
        # On another host there is nobody to do more than that.
        stream.write_zeroes(volume, 0, length)
