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
"""What a destination reads of a disk before all of it has come.

While the guest still runs on the source, the first pass is read here for the
checksums of its blocks. With the guest off it is enough to read what the
second pass has written; the checksum of the whole follows from both.

Nothing is taken for granted by this: where the checksum isn't that of what was
sent, all of the disk is read.
"""

import collections
import threading
import typing as ty
import zlib

from oslo_log import log as logging
from oslo_utils import excutils

import nova.conf
from nova import exception
from nova import thread_pool_factory
from nova.virt.libvirt.storage.intake import kept
from nova.virt.libvirt.storage.pump import transfer as pump

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Disks of which what was read is kept, 32 MiB at most of each.
_MOST = 16
# Seconds for the last of it when the disk is verified: to read it all takes
# longer. The source doesn't wait for what is little.
_PATIENCE = 10


class Reading:
    """A disk of which what stands in it is known, or soon will be.

    :param volume: the pump's Volume of this host
    :param room: bytes of it
    :param key: for the checksums
    :param packed: its table as kept.read() returns it, if that was read

    :ivar done: bytes that have been read
    :ivar error: what has kept it from being read; None if nothing
    :ivar closed: bytes that the disk has in the end, and what was written
        since it was read; None before it was closed
    """

    def __init__(self, volume: pump.Volume, room: int, key: int,
                 packed: bytes | None = None):
        self.volume = volume
        self.room = room
        self.key = key
        self.done = 0
        self.error: Exception | None = None
        self.closed: tuple[int, pump.Ranges] | None = None
        self._packed = packed
        self._ended = threading.Event()
        self._ended.set()
        self._is_given_up = False

    def begin(self, changed: pump.Ranges | None) -> None:
        """Read it on a thread of its own.

        :param changed: (offset, length) of what was written since it was
            read; None: all has to be read
        """
        self._ended.clear()
        self.done = 0
        try:
            thread_pool_factory.spawn_on(
                thread_pool_factory.ExecutorType.STORAGE_MIGRATION, self._run,
                changed)
        except Exception:
            with excutils.save_and_reraise_exception():
                self._ended.set()

    def _run(self, changed):
        try:
            self._packed = zlib.compress(self._read(changed), 1)
        except Exception as e:
            LOG.info('%(volume)s could not be read while its guest runs: '
                     '%(error)s', {'volume': self.volume, 'error': e})
            self._packed, self.error = None, e
        finally:
            self._ended.set()

    def _read(self, changed):
        watch = {
            'stall_timeout': CONF.libvirt.storage_migration_stall_timeout,
            'cancelled': lambda: self._is_given_up,
            'progress': self._progress}
        if self._packed is None or changed is None:
            return pump.read_table(self.volume, self.room, key=self.key,
                                   **watch)
        _result, known = pump.read_again(
            self.volume, self.room, self._known(), changed, key=self.key,
            **watch)
        return known.table

    def _progress(self, done):
        self.done = done

    def _known(self):
        return pump.Known(self.room, kept.unpack(self._packed, self.room))

    @property
    def is_over(self) -> bool:
        return self._ended.is_set()

    def is_that(self, length: int, key: int) -> bool:
        """Whether it is of a disk as it was closed.

        :param length: bytes
        :param key: of the checksums
        """
        return self.closed is not None and (
            (self.key, self.closed[0]) == (key, length))

    def wait(self, seconds: float) -> None:
        """Wait until it is over, or for so long."""
        self._ended.wait(seconds)

    def known(self) -> pump.Known | None:
        """What was read; None if that isn't known."""
        if not self.is_over or self._packed is None:
            return None
        return self._known()

    def give_up(self) -> None:
        """Have it end soon, if it is under way."""
        self._is_given_up = True


class Readings:
    """What is known of the disks that come, by place."""

    def __init__(self):
        self._lock = threading.Lock()
        self._found: collections.OrderedDict[ty.Any, Reading] = (
            collections.OrderedDict())

    def put(self, place, reading: Reading) -> None:
        """Keep what was read; the oldest one goes where there are too many.

        :raises: ValueError if the place is being read
        """
        with self._lock:
            self._check_over(place)
            self._keep(place, reading)

    def _keep(self, place, reading):
        self._found[place] = reading
        self._found.move_to_end(place)
        while len(self._found) > _MOST:
            _place, oldest = self._found.popitem(last=False)
            oldest.give_up()

    def begin(self, place, reading: Reading,
              changed: pump.Ranges | None) -> None:
        """Read a disk, or of one that is known what was written since.

        :raises: ValueError if it is being read
        """
        with self._lock:
            self._check_over(place)
            before = self._found.get(place)
            if before is not None and changed is not None and (
                    (before.room, before.key) == (reading.room, reading.key)):
                reading = before
            self._keep(place, reading)
            # Nobody else may find it over.
            reading.begin(changed)

    def _check_over(self, place):
        if place in self._found and not self._found[place].is_over:
            raise ValueError('%s is being read' % (place,))

    def get(self, place) -> Reading | None:
        with self._lock:
            return self._found.get(place)

    def close(self, place, length: int, changed: pump.Ranges) -> None:
        """Nobody writes to a disk any more.

        :param length: bytes that it has
        :param changed: (offset, length) of what was written since it was read
        """
        found = self.get(place)
        if found is not None:
            found.closed = (length, changed)

    def reopen(self, place) -> None:
        """Somebody may write to a disk: what was said at its end is old."""
        found = self.get(place)
        if found is not None:
            found.closed = None

    def forget(self, place) -> None:
        """Nothing is known of a disk."""
        with self._lock:
            found = self._found.pop(place, None)
        if found is not None:
            found.give_up()

    def verify(self, place, length: int, checksum: int, key: int) -> bool:
        """Compare a disk with what was sent by as little reading as will do.

        :param length: bytes that were sent
        :param checksum: of them, under key
        :returns: False if all of it has to be read to know; what was known of
            it is forgotten
        :raises: as pump.verify_known(), but StorageTransferMismatch
        """
        found, known = self.get(place), None
        if found is not None and found.is_that(length, key):
            found.wait(_PATIENCE)
            known = found.known()
        self.forget(place)
        if known is None:
            return False
        try:
            pump.verify_known(
                found.volume, length, checksum, known, found.closed[1],
                key=key,
                stall_timeout=CONF.libvirt.storage_migration_stall_timeout)
        except exception.StorageTransferMismatch as e:
            # What could not be had on disk, no second reading makes good.
            LOG.warning('All of %(volume)s is read, as it is not what was '
                        'sent by what is known of it: %(error)s',
                        {'volume': found.volume, 'error': e})
            return False
        return True
