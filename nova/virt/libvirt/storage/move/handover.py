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
"""A second look at disks that have come, right before their guest starts.

The source writes to them by streams of libvirt. libvirt can neither tell
whether one is still open nor end it: a peer that is broken into can go on
writing to a disk that has been verified. What QEMU opens, a disk's header
decides; so headers and lengths are compared again as late as possible.

What remains: what such a peer writes behind the header, or when the guest has
started. It had the disk, and could have changed all of that before.
"""

import hashlib
import typing as ty

from oslo_log import log as logging
import tenacity

import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
import nova.privsep.storage
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.move import base_image
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.records import kinds

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# The first cluster of qcow2, which holds header and names, in most files.
HEADER_LENGTH = 65536
# Seconds in which a libvirt that has died is usually started again
_LIBVIRT_IS_BACK = 30


class Header(ty.NamedTuple):
    """What must stay as it is: length in bytes, digest of the first block."""
    length: int
    digest: bytes


class Arrival(ty.NamedTuple):
    """A disk that was taken over just now.

    :ivar name: of the disk
    :ivar before: its record while it was not verified yet
    :ivar header: its Header when it was
    """
    name: str
    before: ty.Any
    header: Header


def arriving(disks) -> dict:
    """The records, by disk, of what destination.accept() will look at.

    :param disks: the instance's InstanceDisks
    """
    return {name: record.obj_clone() for name, record in disks.items()
            if record.previous is not None and record.is_building and
            record.host == CONF.host and kinds.is_copied(name)}


def look(connection, records) -> list[Arrival]:
    """Look at what has been taken over, for look_again().

    :param connection: this host's libvirt
    :param records: what arriving() has returned before
    """
    return [Arrival(name, record, _header(_volume(connection, record)))
            for name, record in records.items()]


def look_again(context, get_connection: ty.Callable, disks,
               arrivals) -> None:
    """Compare disks with what they were when they were taken over.

    One that differs is not verified any more: a hard reboot compares all of
    it, and copies it again from the source.

    :param get_connection: connects to this host's libvirt
    :param disks: the instance's InstanceDisks; saved if one differs
    :raises: exception.StorageTransferMismatch, exception.UnsafeDiskContent
    """
    try:
        for arrival in arrivals:
            _look_again_at(get_connection, arrival, disks)
    except Exception:
        for arrival in arrivals:
            disks.set(arrival.name, arrival.before)
        disks.save(context)
        raise


# A disk that has grown can't be compared with what was sent: better wait.
@tenacity.retry(
    retry=tenacity.retry_if_exception_type((
        exception.HypervisorUnavailable, exception.StoragePoolError,
        exception.StorageVolumeError)),
    reraise=True, stop=tenacity.stop_after_delay(_LIBVIRT_IS_BACK),
    wait=tenacity.wait_fixed(1))
def _look_again_at(get_connection, arrival, disks):
    _compare(_volume(get_connection(), arrival.before), arrival, disks)


def _volume(connection, record):
    return storage_pool.StoragePool(
        connection, record.pool, CONF.host).volume(record.volume)


def _header(volume):
    try:
        start = nova.privsep.storage.read_start(volume.path, HEADER_LENGTH)
    except (OSError, ValueError) as e:
        # Root may not read there. A raw disk has no header that matters, and
        # qcow2 has been read before, or was refused.
        LOG.debug('Only the length of volume %(volume)s is compared: '
                  '%(error)s', {'volume': volume.name, 'error': e})
        start = b''
    return Header(volume.physical(), hashlib.sha256(start).digest())


def _compare(volume, arrival, disks):
    is_qcow2 = arrival.before.format == fields.LibvirtDiskFormat.QCOW2
    # This host may have let it grow since, and has that on record.
    most = max(arrival.before.size or 0,
               disks.get(arrival.name).size or 0)
    if is_qcow2:
        # Even if it has grown, which alters its header.
        info = image_cache.look_at_overlay(volume.path, most)
        # There are other users' images, too.
        if info.backing_file and not base_image.is_kept(
                disks.instance, arrival.name, info.backing_file):
            raise exception.UnsafeDiskContent(path=volume.path, reason=_(
                "it depends on %s, which is not the server's base image") %
                info.backing_file)
        has_grown = info.virtual_size > arrival.before.size
    else:
        length = volume.physical()
        has_grown = length > arrival.header.length
        # A logical volume is rounded up, and no stream makes it longer.
        if has_grown and length > most and volume.pool.kind().is_directory:
            raise exception.StorageTransferMismatch(
                volume=volume.name, where=CONF.host,
                reason=_("it has %(is)d bytes, and %(most)d are on record") % {
                    'is': length, 'most': most})
    if not has_grown and _header(volume) != arrival.header:
        raise exception.StorageTransferMismatch(
            volume=volume.name, where=CONF.host,
            reason=_("it was written to after it had been verified"))
