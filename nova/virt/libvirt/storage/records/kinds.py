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
"""What the records of disks say by the disks' names."""

from nova.virt.libvirt.storage import disk_kinds

# What of() may return.
ALL = tuple(sorted(kind.name for kind in disk_kinds.ALL))

# Nothing of the guest's is lost when they are made anew.
REMADE = frozenset(kind.name for kind in disk_kinds.ALL if kind.is_remade)

_REMADE_BY_MOVE = frozenset(
    kind.name for kind in disk_kinds.ALL if not kind.is_copied)


def of(disk_name):
    """Return a disk's kind: all ephemeral disks of a host are in one pool."""
    return disk_name.rstrip('0123456789')


def is_copied(disk_name):
    """Whether a move copies a disk, rather than making it anew."""
    return disk_name not in _REMADE_BY_MOVE
