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
"""Which file systems libvirt takes for shared; knows no pools.

It refuses to live migrate a guest that writes to a file on any other file
system, unless it copies the file.
"""

import os

from nova.virt.libvirt.storage.pool import mounts

# Of virFileIsSharedFSType in libvirt's src/util/virfile.c, as /proc calls
# them.
SHARED = frozenset((
    'nfs', 'nfs4', 'gfs2', 'ocfs2', 'afs', 'cifs', 'smb3', 'smbfs', 'ceph',
    'gpfs', 'acfs', 'fuse.glusterfs', 'fuse.quobyte'))

# Since then qemu.conf can name directories that are shared.
_CONFIGURABLE = 10_008_000


def type_of(path: str) -> str:
    """The type of the file system that a file is on.

    :returns: as /proc/self/mountinfo has it; empty if that is not known
    """
    return mounts.type_at(os.path.realpath(path))


def is_shared(kind: str, connection) -> bool:
    """Whether libvirt may take a file system for shared.

    :param kind: what type_of() returns
    :param connection: this host's libvirt
    """
    return (not kind or kind in SHARED or
            connection.getLibVersion() >= _CONFIGURABLE)
