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
from oslo_utils import units

import nova.conf
import nova.privsep.storage
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.pool import stream

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Bytes in which a block device is overwritten at least.
_ZEROES_A_SECOND = 32 * units.Mi

# How much a disk may grow while it is sent ahead: a share of its length, and
# bytes for a small one. All of it is taken up, and given back later.
_GROWTH_SHARE = 4
_GROWTH_LEAST = 256 * units.Mi

FAULTY_VERSIONS = stream.FAULTY_VERSIONS


def is_reserved(connection) -> bool:
    """Whether copies to a libvirt need all their room at once.

    :param connection: a libvirt.virConnect to the destination
    """
    return stream.must_fit(connection)


def is_sparse(connection, pool_type: str) -> bool:
    """Whether a copy may travel with its holes.

    :param connection: a libvirt.virConnect to the destination
    :param pool_type: of the destination's pool
    """
    return kinds.of_type(pool_type).sparse and not is_reserved(connection)


def to_grow(length: int, most: int) -> int:
    """How much room is taken for a disk that its guest still writes to.

    One that needs more in the end is copied anew.

    :param length: bytes that it has now
    :param most: bytes that it may come to have
    """
    return min(most, length + max(length // _GROWTH_SHARE, _GROWTH_LEAST))


def stall_timeout(length: int, is_overwritten: bool) -> int:
    """How long a copy may show no progress.

    libvirt takes a hole of any length at once. Into a block device it then
    writes zeroes, and says nothing until it has done so.

    :param length: bytes of the copy
    :param is_overwritten: whether its holes are written as zeroes
    :returns: seconds
    """
    patience = CONF.libvirt.storage_migration_stall_timeout
    if is_overwritten:
        patience += length // _ZEROES_A_SECOND
    return patience


def measured(pool, wanted: int) -> int:
    """How many bytes libvirt takes a pool to have room for.

    Of a peer's pool nobody else can be asked; see usage.measure() for one of
    this host.

    :param pool: StoragePool
    :param wanted: bytes
    """
    available = pool.info().available
    if wanted > available:
        # libvirt measures at a refresh; since then somebody may have made
        # room.
        pool.refresh()
        available = pool.info().available
    return available


def give_back(connection, volume, instance) -> None:
    """Let a copy have the holes that it didn't travel with.

    A file system that can't is no reason to refuse the copy.

    :param connection: this host's libvirt
    :param volume: StorageVolume of this host that has been found right
    """
    if (not is_reserved(connection) or
            not kinds.of_type(volume.pool.config().type).sparse):
        return
    try:
        nova.privsep.storage.dig_holes(volume.path)
    except processutils.ProcessExecutionError as e:
        LOG.warning('Volume %(volume)s takes up its whole length in storage '
                    'pool %(pool)s: %(error)s',
                    {'volume': volume.name, 'pool': volume.pool.name,
                     'error': e}, instance=instance)
