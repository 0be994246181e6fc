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
"""What a destination has kept of disks, and what differs from it here.

No copy that was kept is trusted unread. While the destination reads it, this
host reads the disk: neither waits for the other, nor for other disks. What
the guest writes meanwhile is found by the second pass, as what it writes
during the first one.
"""

from concurrent import futures
import dataclasses
import typing as ty

from oslo_log import log as logging
from oslo_utils import units

import nova.conf
from nova import exception
from nova import thread_pool_factory
from nova.virt.libvirt.storage.pump import transfer as pump

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Seconds between two questions whether to go on.
_INTERVAL = 0.5
# The first pass has read a smaller disk before a process has started to.
_WORTH_READING = 256 * units.Mi


@dataclasses.dataclass(frozen=True)
class Found:
    """What the destination has of a disk.

    :ivar key: of the checksums
    :ivar known: what stands in its copy
    :ivar differs: (offset, length) in bytes of what may stand here instead;
        None if that isn't known
    """
    key: int
    known: pump.Known
    differs: pump.Ranges | None


class TakeUps:
    """The copies of a move's disks which the destination has kept.

    :param transfer: a copy.Transfer
    :param room: says of an item how many bytes its volume there has to have
    """

    def __init__(self, transfer, room: ty.Callable[[ty.Any], int]):
        self._transfer = transfer
        self._room = room
        self._waiting: list[ty.Any] = []
        self._begun: dict[ty.Any, _TakeUp] = {}

    def begin(self, items) -> None:
        """Have copies be what is written to; doesn't wait for that.

        :param items: disks whose records say that they are coming
        """
        # What takes longest should not come last.
        self._waiting = sorted(items, key=lambda item: -item.allocation)
        self._more()

    def _more(self):
        most = CONF.libvirt.storage_migration_parallel_disks
        while self._waiting and len(self._begun) < most:
            self._begin(self._waiting[0])

    def _begin(self, item):
        self._waiting.remove(item)
        self._begun[item] = _TakeUp(self._transfer, item, self._room(item))

    def wait(self, item) -> Found | None:
        """Wait for one of them.

        :returns: None if what was kept is of no use
        :raises: exception.StorageTransferCancelled,
            exception.InstanceNotFound
        """
        if item not in self._begun:
            self._begin(item)
        found = None
        try:
            found = self._begun[item].wait()
        except (exception.InstanceNotFound,
                exception.StorageTransferCancelled):
            raise
        except exception.NovaException as e:
            LOG.warning('All of volume %(volume)s is copied, as what the '
                        'destination has kept of it is of no use: %(error)s',
                        {'volume': item.source.name, 'error': e},
                        instance=self._transfer.instance)
        self._begun.pop(item).give_up()
        self._more()
        return found

    def close(self) -> None:
        """Give up what is under way; as often as wanted."""
        self._waiting = []
        while self._begun:
            self._begun.popitem()[1].give_up()


class _TakeUp:
    """One disk, which both ends read from now on."""

    def __init__(self, transfer, item, room):
        self._transfer, self._item, self._room = transfer, item, room
        self._key = pump.new_key()
        self._is_given_up = False
        self._there = _spawn(self._take_up)
        # A block device is read through libvirt, which would be twice.
        self._here = (_spawn(self._read) if
                      item.allocation >= _WORTH_READING and
                      not item.finds_holes() else None)

    def _take_up(self):
        item = self._item
        return item.pool.take_up(
            item.target, (item.length, self._room), item.mode, self._key)

    def _read(self):
        transfer, item = self._transfer, self._item
        return pump.read_table(
            transfer.volume(item), item.length, key=self._key,
            room=self._room, in_use=True,
            stall_timeout=CONF.libvirt.storage_migration_stall_timeout,
            **transfer.watch_worker(item, lambda: self._is_given_up))

    def wait(self):
        try:
            known = pump.Known(
                self._room, self._result(self._there, self._take_up))
        except Exception:
            self.give_up()
            raise
        return Found(self._key, known, self._differs(known))

    def _differs(self, known):
        if self._here is None or self._here.cancel():
            return None
        try:
            return known.differs_from(self._result(self._here, self._read))
        except (exception.InstanceNotFound,
                exception.StorageTransferCancelled):
            raise
        except (exception.NovaException, ValueError) as e:
            LOG.info('All of volume %(volume)s is read once more, as it is '
                     'not known what differs from the copy that was kept: '
                     '%(error)s',
                     {'volume': self._item.source.name, 'error': e},
                     instance=self._transfer.instance)
            return None

    def _result(self, future, ask):
        """Wait for what takes as long as a disk is read; may be cancelled."""
        while True:
            try:
                return future.result(timeout=_INTERVAL)
            except futures.TimeoutError:
                if future.done():
                    return future.result()
                if future.cancel():
                    # It has got no thread, and may not for long.
                    return ask()
            self._transfer.check_cancelled(self._item)

    def give_up(self):
        self._is_given_up = True
        for future in (self._there, self._here):
            if future is not None:
                future.cancel()


def _spawn(function):
    return thread_pool_factory.spawn_on(
        thread_pool_factory.ExecutorType.STORAGE_MIGRATION, function)
