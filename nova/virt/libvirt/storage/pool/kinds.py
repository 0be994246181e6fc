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
"""What libvirt can do with storage pools, by their type.

Nothing else in Nova compares the type of a pool.
"""

import errno
import os
import typing as ty


class PoolKind(ty.NamedTuple):
    """What can be done with pools of a type.

    :ivar holds_disks: whether the disks of guests can be its volumes
    :ivar takes_streams: whether a volume's content can be up- and downloaded
    :ivar is_directory: whether its volumes are files of one directory; else
        the path of the pool says nothing of its size
    :ivar is_mounted: whether libvirt mounts that directory's file system
    :ivar is_remote: whether a server keeps the files, which may trust neither
        root nor Nova's user
    :ivar sparse: whether a volume may take up less than its capacity, and
        what is not written of a new one reads as zeroes
    :ivar keeps_blocks: whether a new volume shows what deleted ones have held
    :ivar has_snapshots: whether there may be snapshots beside its volumes,
        which go with what they are of
    :ivar is_volume_group: whether LVM knows its size better than libvirt
    :ivar has_overlays: whether a volume can have a backing store
    :ivar resizes: whether libvirt gives a volume another capacity
    :ivar is_ceph: whether its volumes are images of a Ceph pool, which are
        librbd's to make, to find and to delete; all hosts see them
    """
    holds_disks: bool = False
    takes_streams: bool = False
    is_directory: bool = False
    is_mounted: bool = False
    is_remote: bool = False
    sparse: bool = False
    keeps_blocks: bool = False
    has_snapshots: bool = False
    is_volume_group: bool = False
    has_overlays: bool = False
    resizes: bool = False
    is_ceph: bool = False


_DIRECTORY = PoolKind(
    holds_disks=True, takes_streams=True, is_directory=True, sparse=True,
    has_overlays=True, resizes=True)

# Of a volume with less allocation than capacity, libvirt makes a snapshot of a
# volume group, which is lost when it is full; so logical volumes are thick.
# To an rbd pool there is no stream, libvirt learns of an image by opening all
# of them, and its errors don't say what is wrong; see ceph.py.
# All types that aren't here can't make volumes.
_KINDS = {
    'dir': _DIRECTORY,
    'fs': _DIRECTORY._replace(is_mounted=True),
    'netfs': _DIRECTORY._replace(is_mounted=True, is_remote=True),
    'logical': PoolKind(holds_disks=True, takes_streams=True,
                        keeps_blocks=True, has_snapshots=True,
                        is_volume_group=True),
    'disk': PoolKind(takes_streams=True, keeps_blocks=True),
    'rbd': PoolKind(holds_disks=True, sparse=True, is_ceph=True),
}

DISK_TYPES = tuple(name for name, kind in _KINDS.items() if kind.holds_disks)
FILE_TYPES = tuple(name for name, kind in _KINDS.items() if kind.is_directory)
# Of the disks of running guests: QEMU copies files, and Ceph's stay in place.
LIVE_TYPES = tuple(name for name, kind in _KINDS.items()
                   if kind.is_directory or kind.is_ceph)

# Of errors that have no code of their own, a part of the text: what
# createXMLFrom says of a name that is taken, what createXML does of that of a
# file which libvirt doesn't know, and what lvcreate does, also of a volume
# that libvirt doesn't list because it is inactive or invalid.
NAME_IS_TAKEN = ('already in use', 'volume target path',
                 'already exists in volume group')
# The last three are those of lvcreate and lvextend.
POOL_IS_FULL = (os.strerror(errno.ENOSPC), 'Not enough free space',
                # lvextend's, of extents that somebody has taken meanwhile.
                'No specified PVs have space',
                'insufficient free space', 'Insufficient free space',
                'nsufficient suitable')
# lvremove's, of a volume that somebody has open.
VOLUME_IS_BUSY = (' in use',)


def of_type(name: str | None) -> PoolKind:
    """What can be done with pools of a type: nothing if it isn't known.

    :param name: as in the pool's XML
    """
    return _KINDS.get(name or '', PoolKind())
