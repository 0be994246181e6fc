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
"""A copy of a disk that this host has kept: the source sends what differs.

It is never trusted unread. A checksum of each of its blocks, under a key that
the source has chosen just now, tells what stands in it.
"""

import base64
import collections
import contextlib
import os
import stat
import threading
import time
import zlib

import nova.conf
from nova import exception
from nova.i18n import _
import nova.privsep.path
from nova.virt.libvirt.storage.intake import held
from nova.virt.libvirt.storage.pump import transfer as pump

CONF = nova.conf.CONF

# Bytes of a table that go in one answer, and tables that wait to be fetched.
_PIECE = 1 << 20
_MOST_TABLES = 8


def prepare(path: str, length: int, room: int, mode: int) -> None:
    """Let a file have no more than a disk's bytes, and be this user's.

    :param path: of the file; no guest uses it
    :param length: bytes that the source has: what follows reads as zeroes
    :param room: bytes that it is to have in the end
    :param mode: its permissions
    :raises: exception.StorageIntakeError if it is no plain file
    """
    with contextlib.closing(held.HeldFile(path)) as file:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise exception.StorageIntakeError(host=CONF.host, reason=_(
                "delete %s: it is no plain file, and can't be gone on from") %
                path)
        owner = (os.geteuid(), os.getegid())
        if (found.st_uid, found.st_gid) != owner:
            # A guest has used it since it was made. The daemon that may do
            # that can't be given the file, so no link is to lead it away.
            nova.privsep.path.chown(path, *owner, follow_symlinks=False)
        file.chmod(mode)
        if found.st_size > length:
            file.truncate(length)
        file.truncate(room)


def read(volume: 'pump.Volume', room: int, key: int) -> bytes:
    """Read a volume of this host for its table, packed for the way.

    :param room: bytes of it
    :param key: for the checksums
    :raises: exception.StorageIntakeError if that takes longer than the source
        waits for it; as pump.read_table()
    """
    # To be sure, half of that.
    seconds = CONF.long_rpc_timeout / 2
    deadline = time.monotonic() + seconds
    try:
        table = pump.read_table(
            volume, room, key=key,
            stall_timeout=CONF.libvirt.storage_migration_stall_timeout,
            cancelled=lambda: time.monotonic() > deadline)
    except exception.StorageTransferCancelled:
        raise exception.StorageIntakeError(host=CONF.host, reason=_(
            "raise [DEFAULT]/long_rpc_timeout, as %(volume)s could not be "
            "read in %(seconds)d seconds") % {
                'volume': volume, 'seconds': seconds})
    # Of a disk most blocks are zeroes, whose checksums are, too.
    return zlib.compress(table, 1)


def unpack(data: bytes, room: int) -> bytes:
    """On the source: the table in what read() returned.

    :param room: bytes of the volume, which say how long it can be
    :raises: exception.StorageIntakeError
    """
    most = (room >> 16) * 8 + 8
    unpacker = zlib.decompressobj()
    try:
        table = unpacker.decompress(data, most + 1)
    except zlib.error as e:
        raise exception.StorageIntakeError(host=CONF.host, reason=_(
            "see the log of the destination's nova-compute, whose table of "
            "what it has kept can't be read: %s") % e)
    if not unpacker.eof:
        raise exception.StorageIntakeError(host=CONF.host, reason=_(
            "see the log of the destination's nova-compute, whose table of "
            "what it has kept is too long"))
    return table


class Tables:
    """What sources are fetching, a piece at a time."""

    def __init__(self):
        self._lock = threading.Lock()
        self._found: collections.OrderedDict = collections.OrderedDict()

    def add(self, place, table: bytes) -> None:
        """Keep a table; the oldest one goes where there are too many."""
        with self._lock:
            self._found[place] = table
            while len(self._found) > _MOST_TABLES:
                self._found.popitem(last=False)

    def piece(self, place, at: int) -> str:
        """Return what begins at a byte, in base64; '' if there is nothing."""
        with self._lock:
            table = self._found.get(place, b'')
        return base64.b64encode(table[max(at, 0):][:_PIECE]).decode()

    def forget(self, place) -> None:
        with self._lock:
            self._found.pop(place, None)
