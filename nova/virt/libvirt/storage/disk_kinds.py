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
"""The local disks of an instance, by their names."""

import typing as ty


class DiskKind(ty.NamedTuple):
    """A kind of disk; all of one kind are made in one pool of a host.

    :ivar name: what names of its disks begin with, e.g. ``disk.eph``
    :ivar mapped_as: what [libvirt]/storage_pool_mapping calls it
    :ivar is_remade: whether it is made from the flavor and the metadata alone,
        so that nothing of the guest's is lost when it is made anew
    :ivar is_copied: whether a move copies it, rather than making it anew
    """
    name: str
    mapped_as: str
    is_remade: bool = False
    is_copied: bool = True


# The first that fits counts. The config drive travels: what is in it may have
# been injected once only.
ALL = (
    DiskKind('disk.swap', 'swap', is_remade=True, is_copied=False),
    DiskKind('disk.config', 'config', is_remade=True),
    DiskKind('disk.local', 'ephemeral'),
    DiskKind('disk.eph', 'ephemeral'),
    DiskKind('disk', 'root'),
)


def of_disk(disk_name: str) -> DiskKind:
    """The kind of a disk; what is none goes where root disks go.

    :param disk_name: e.g. ``disk``, ``disk.eph0`` or ``disk.config.rescue``
    """
    return next((kind for kind in ALL if disk_name.startswith(kind.name)),
                ALL[-1])
