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
"""The first pass of a move's disks, while their guest writes to them.

With the guest off copy.py sends what differs by then. Whatever goes wrong here
changes nothing for the guest: the disks are copied as if nothing had been
tried, unless the destination can't be reached any more.
"""

import contextlib
import dataclasses
import time
import typing as ty

from oslo_log import log as logging
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
from nova.virt.libvirt.storage.move import peers
from nova.virt.libvirt.storage.move import take_up
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import keeping
from nova.virt.libvirt.storage.records import leftovers

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# An image of qcow2 needs as much beside the guest's data: a share of its
# virtual size for its tables, and bytes for those of a small one.
_TABLES_SHARE = 64
_TABLES_LEAST = 16 * units.Mi

# Less than so many bytes are sent anew in a fraction of the time that both
# hosts take to compare them.
_KEPT_LEAST = 8 * units.Mi

# Seconds between two questions how far the destination has read: at first and
# at most, and by what they grow, as that is lost when it has ended in between.
_FIRST_INTERVAL, _INTERVAL, _GROWTH = 0.05, 0.5, 1.25

# Bytes that the destination has read before a guest has shut down.
_READ_SOON = 256 * units.Mi

# A disk of so many bytes is read there while the last third of it comes, which
# takes longer; what was read of it may still be on its way.
_EARLY_LEAST = units.Gi
_EARLY = 2 / 3
_ON_ITS_WAY = 64 * units.Mi


@dataclasses.dataclass
class Ahead:
    """A disk of which the first pass is done.

    :ivar copy: the pump's WarmCopy
    :ivar target: what it writes to
    :ivar exit: closes both
    :ivar is_read: whether the destination reads what was sent
    :ivar to_read: bytes of that
    :ivar changed: what may have changed since, in bytes of its file; None if
        that isn't known
    """
    copy: pump.WarmCopy
    target: peers.Target
    exit: contextlib.ExitStack
    is_read: bool = False
    to_read: int = 0
    changed: pump.Ranges | None = None


class FirstPass:
    """The first pass of the disks that are worth it.

    :param transfer: a copy.Transfer, which will send the rest
    """

    def __init__(self, transfer):
        self._transfer = transfer
        self._departure = transfer.departure
        self._bandwidth = pump.Bandwidth(
            CONF.libvirt.storage_migration_precopy_bandwidth * units.Mi)
        self._when = 'while the server runs'
        # names that were there before
        self._targets: list[tuple[ty.Any, str | None]] = []
        self._take_ups = take_up.TakeUps(transfer, self._room)
        # by item, what the destination has kept of it
        self._found: dict[ty.Any, take_up.Found] = {}
        # by item, how many bytes had come when the destination began to read
        self._begun: dict[ty.Any, int] = {}

    def run(self) -> None:
        """Send the disks, one after the other: the guest is using them.

        :raises: StorageTransferCancelled, and exception.NovaException if the
            destination can't be reached any more
        """
        items = self._items()
        if not items:
            return
        instance = self._transfer.instance
        LOG.info('Copying %(number)d disks %(when)s',
                 {'number': len(items), 'when': self._when},
                 instance=instance)
        try:
            self._send_all(items)
        except (exception.StorageTransferCancelled,
                exception.InstanceNotFound):
            raise
        except exception.NovaException as e:
            LOG.warning('The disks are copied when the server is off: what '
                        'could be done before has failed, which its guest '
                        'has not noticed: %s', e, instance=instance)
            # In vain the guest would be powered off.
            self._departure.check_peer()

    def close(self) -> None:
        """Give up what has been sent and was not followed by the rest."""
        self._take_ups.close()
        self._transfer.bitmaps.end()
        for item in self._transfer.items:
            ahead, item.ahead = item.ahead, None
            item.ahead_length = item.ahead_done = 0
            if ahead is None:
                continue
            try:
                ahead.exit.close()
            except exception.NovaException as e:
                LOG.warning('Volume %(volume)s may still be open: %(error)s',
                            {'volume': item.target, 'error': e},
                            instance=self._transfer.instance)

    def _items(self):
        if not self._departure.peer.takes_ahead:
            return []
        # What is made independent of its base image changes altogether.
        items = [item for item in self._transfer.items
                 if item.source and item.length and not item.growth and
                 item.is_streamed]
        least = CONF.libvirt.storage_migration_precopy
        if not self._guest_runs():
            self._when = 'for the first time'
            return [item for item in items if self._kept(item)]
        if least < 0:
            return []
        return [item for item in items
                if item.allocation >= least * units.Mi or self._kept(item)]

    def _kept(self, item):
        """What the destination still has of a disk, if that is worth it.

        :returns: the name of the volume, or None
        """
        if not self._departure.peer.keeps or item.allocation < _KEPT_LEAST:
            return None
        return keeping.copy_of(
            self._transfer.disks, self._transfer.migration.dest_compute,
            item.pool.name, item.name)

    def _guest_runs(self):
        try:
            return self._transfer.here.host.get_guest(
                self._transfer.instance).is_active()
        except exception.InstanceNotFound:
            return False

    def _send_all(self, items):
        transfer, created = self._transfer, []
        self._targets = [(item, item.target) for item in items]
        with contextlib.ExitStack() as stack:
            # As in Transfer: what is pushed first is done last.
            stack.callback(self._forget_names)
            stack.callback(transfer.restore)
            stack.callback(transfer.delete_created, created)
            kept = [item for item in items if self._choose_kept(item)]
            # They are there, though none of them may be taken up.
            created += [(item.pool.name, item.target) for item in kept]
            transfer.choose_names(items)
            transfer.save_building(items)
            stack.callback(self.close)
            if CONF.libvirt.storage_migration_dirty_bitmaps:
                # Before any of it is read.
                transfer.bitmaps.begin(items)
            for item in items:
                item.ahead_length = item.length
                if item not in kept:
                    self._create(item, created)
            self._take_ups.begin(kept)
            with transfer.reporting():
                for item in items:
                    if item in kept and not self._take_up(item):
                        created.remove((item.pool.name, item.target))
                        self._create(item, created)
                    self._have_read(item, self._send(item))
                self._wait_until_read(items)
            # Nobody may have spoken to it for long.
            self._departure.check_peer()
            stack.pop_all()

    def _choose_kept(self, item):
        """Have a disk go to what the destination has of it, if it has."""
        volume = self._kept(item)
        if volume is None:
            return False
        # Saved with the record that it is coming: it is left no longer.
        leftovers.forget(
            self._transfer.disks, self._transfer.migration.dest_compute,
            [(item.pool.name, volume)])
        item.target = volume
        return True

    def _create(self, item, created):
        self._transfer.create(item, self._room(item))
        created.append((item.pool.name, item.target))

    def _take_up(self, item):
        """Learn what the destination has kept of a disk.

        :returns: whether that is known; else it is gone
        """
        found = self._take_ups.wait(item)
        if found is None:
            self._transfer.delete_at_peer(item)
            return False
        self._found[item] = found
        return True

    def _forget_names(self):
        for item, target in self._targets:
            item.target = target

    def _room(self, item):
        """How long the volume there has to be."""
        return self._departure.peer.room_ahead(item.length, _most(item))

    def _send(self, item):
        transfer, peer = self._transfer, self._departure.peer
        found = self._found.get(item)
        is_early = (peer.reads and not found and
                    item.allocation >= _EARLY_LEAST)

        def progress(done):
            nonlocal is_early
            item.ahead_done = done
            if is_early and done >= _EARLY * item.length:
                is_early = False
                self._read_early(item, copy.key, done)

        with contextlib.ExitStack() as stack:
            target = stack.enter_context(
                peer.target(item.pool.name, item.target))
            copy = stack.enter_context(pump.WarmCopy(
                transfer.volume(item), target.end, item.length,
                found and found.key, sparse=peer.takes_holes(),
                known=found and found.known, find_holes=item.finds_holes()))
            result = copy.first(
                pump.Watch(**transfer.watch(item, target, progress)),
                self._bandwidth, found and found.differs)
            # It stays open, also what was too little for that until now.
            target.connected()
            item.ahead = Ahead(copy, target, stack.pop_all())
        LOG.info('Copied volume %(volume)s %(when)s: %(data)d bytes of data '
                 'in %(seconds).1f s%(kept)s', {
                     'volume': item.source.name, 'data': result.data,
                     'when': self._when, 'seconds': result.seconds, 'kept':
                     ', into a copy that was kept there' if found else ''},
                 instance=transfer.instance)
        return result

    def _read_early(self, item, key, done):
        """Have the destination read what has come, while more comes."""
        try:
            item.pool.read(item.target, self._room(item), key)
        except exception.NovaException as e:
            LOG.debug('Volume %(volume)s is read when all of it has come: '
                      '%(error)s', {'volume': item.target, 'error': e},
                      instance=self._transfer.instance)
            return
        self._begun[item] = max(0, done - _ON_ITS_WAY)

    def _have_read(self, item, result):
        """Have the destination read it now, and not when the server is off."""
        if not self._departure.peer.reads:
            return
        if item in self._found and result.changed == []:
            # It has read all of it to say what it has.
            item.ahead.is_read = True
            return
        try:
            changed = self._changed(item, result)
            item.pool.read(item.target, self._room(item), result.key, changed)
            item.ahead.is_read = True
            item.ahead.to_read = (
                item.allocation if changed is None else
                sum(length for _start, length in changed))
        except exception.NovaException as e:
            self._is_not_read(item, e)

    def _changed(self, item, result):
        """What was written since the destination has read a disk.

        :returns: (offset, length) in bytes; None if it has read nothing
        """
        begun = self._begun.pop(item, None)
        if begun is None:
            return result.changed
        try:
            self._follow(item, is_all_wanted=True)
        except exception.StorageIntakeError as e:
            LOG.debug('All of volume %(volume)s is read anew: %(error)s',
                      {'volume': item.target, 'error': e},
                      instance=self._transfer.instance)
            return None
        return [(begun, item.length - begun)]

    def _is_not_read(self, item, error):
        if isinstance(error, (exception.InstanceNotFound,
                              exception.StorageTransferCancelled)):
            raise error
        item.ahead.is_read = False
        LOG.info('Host %(host)s reads all of volume %(volume)s when the '
                 'server is off: %(error)s',
                 {'host': item.pool.host, 'volume': item.target,
                  'error': error}, instance=self._transfer.instance)

    def _wait_until_read(self, items):
        """Wait for what the destination will not have read soon enough.

        It waits for the rest of it itself, before it verifies.
        """
        begun = time.monotonic()
        for item in items:
            if item.ahead.is_read and item.ahead.to_read > _READ_SOON:
                try:
                    self._follow(item)
                except exception.NovaException as e:
                    self._is_not_read(item, e)
        LOG.debug('The destination has read the disks in %.1f s',
                  time.monotonic() - begun, instance=self._transfer.instance)

    def _follow(self, item, is_all_wanted=False):
        """Wait until the destination has read a disk.

        :param is_all_wanted: it may not go on with the last of it
        """
        stall_timeout = CONF.libvirt.storage_migration_stall_timeout
        before, since = -1, time.monotonic()
        interval, soon = _FIRST_INTERVAL, self._room(item) - _READ_SOON
        while True:
            done, has_ended = item.pool.has_read(item.target)
            if has_ended or done >= soon and not is_all_wanted:
                return
            self._transfer.check_cancelled(item)
            now = time.monotonic()
            if done > before:
                before, since = done, now
            elif now - since > stall_timeout:
                raise exception.StorageIntakeError(
                    host=item.pool.host, reason=_(
                        "it has read nothing for %d seconds") % stall_timeout)
            time.sleep(interval)
            interval = min(_GROWTH * interval, _INTERVAL)


def _most(item):
    """How many bytes an item may have when its guest is off."""
    record = getattr(item, 'record', None)
    if record is None or record.format != fields.LibvirtDiskFormat.QCOW2:
        return item.length
    size = record.size or 0
    return max(item.length, size + size // _TABLES_SHARE + _TABLES_LEAST)
