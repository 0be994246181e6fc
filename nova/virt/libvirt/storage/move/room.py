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
"""Room on the destination that is taken before the first byte travels.

In libvirt 10.1 to 12.6 a write error in an upload, such as of a full disk,
ends the daemon or makes it spin for ever. There all blocks of a copy are
allocated when it is made, and it travels without holes: at a hole libvirt cuts
the file off, and with it what is allocated behind. The destination gives the
holes back when it has found the copy right.
"""

from oslo_concurrency import processutils
from oslo_log import log as logging

import nova.privsep.storage
from nova.virt.libvirt.storage.move import state as moves

LOG = logging.getLogger(__name__)

# By libvirt's news: "Fix virStream hole handling" of 10.1.0, "Fix stale
# virStream status" of 12.7.0. 9.0, 11.3 and 12.8 have been seen.
_SINCE = 10_001_000
_MENDED = 12_007_000


def is_reserved(connection) -> bool:
    """Whether copies to a libvirt need all their room at once.

    :param connection: a libvirt.virConnect to the destination
    """
    return _SINCE <= connection.getLibVersion() < _MENDED


def is_sparse(connection, pool_type: str) -> bool:
    """Whether a copy may travel with its holes.

    :param connection: a libvirt.virConnect to the destination
    :param pool_type: of the destination's pool
    """
    return pool_type in moves.FILE_POOLS and not is_reserved(connection)


def give_back(connection, volume, instance) -> None:
    """Let a copy have the holes that it didn't travel with.

    A file system that can't is no reason to refuse the copy.

    :param connection: this host's libvirt
    :param volume: StorageVolume that has been found right
    """
    if (not is_reserved(connection) or
            volume.pool.config().type not in moves.FILE_POOLS):
        return
    try:
        nova.privsep.storage.dig_holes(volume.path)
    except processutils.ProcessExecutionError as e:
        LOG.warning('Volume %(volume)s takes up its whole length in storage '
                    'pool %(pool)s: %(error)s',
                    {'volume': volume.name, 'pool': volume.pool.name,
                     'error': e}, instance=instance)
