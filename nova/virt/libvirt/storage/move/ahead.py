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
import typing as ty

from oslo_log import log as logging
from oslo_utils import units

import nova.conf
from nova import exception
from nova.objects import fields
from nova.virt.libvirt.storage.move import peers
from nova.virt.libvirt.storage.pump import transfer as pump

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# An image of qcow2 needs as much beside the guest's data: a share of its
# virtual size for its tables, and bytes for those of a small one.
_TABLES_SHARE = 64
_TABLES_LEAST = 16 * units.Mi


@dataclasses.dataclass
class Ahead:
    """A disk of which the first pass is done.

    :ivar copy: the pump's WarmCopy
    :ivar target: what it writes to
    :ivar exit: closes both
    """
    copy: pump.WarmCopy
    target: peers.Target
    exit: contextlib.ExitStack


class FirstPass:
    """The first pass of the disks that are worth it.

    :param transfer: a copy.Transfer, which will send the rest
    """

    def __init__(self, transfer):
        self._transfer = transfer
        self._departure = transfer.departure
        self._bandwidth = pump.Bandwidth(
            CONF.libvirt.storage_migration_precopy_bandwidth * units.Mi)
        # names that were there before
        self._targets: list[tuple[ty.Any, str | None]] = []

    def run(self) -> None:
        """Send the disks, one after the other: the guest is using them.

        :raises: StorageTransferCancelled, and exception.NovaException if the
            destination can't be reached any more
        """
        items = self._items()
        if not items:
            return
        instance = self._transfer.instance
        LOG.info('Copying %(number)d disks while the server runs',
                 {'number': len(items)}, instance=instance)
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
        least = CONF.libvirt.storage_migration_precopy
        if least < 0 or not self._departure.peer.takes_ahead or (
                not self._guest_runs()):
            return []
        # What is made independent of its base image changes altogether.
        return [item for item in self._transfer.items
                if item.source and item.length and not item.growth and
                item.allocation >= least * units.Mi]

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
            transfer.choose_names(items)
            transfer.save_building(items)
            stack.callback(transfer.delete_created, created)
            for item in items:
                item.ahead_length = item.length
                transfer.create(item, _room(item))
                created.append((item.pool.name, item.target))
            stack.callback(self.close)
            with transfer.reporting():
                for item in items:
                    self._send(item)
            stack.pop_all()

    def _forget_names(self):
        for item, target in self._targets:
            item.target = target

    def _send(self, item):
        def progress(done):
            item.ahead_done = done

        transfer, peer = self._transfer, self._departure.peer
        with contextlib.ExitStack() as stack:
            target = stack.enter_context(
                peer.target(item.pool.name, item.target))
            copy = stack.enter_context(pump.WarmCopy(
                transfer.volume(item), target.end, item.length,
                sparse=peer.takes_holes()))
            result = copy.first(
                pump.Watch(**transfer.watch(item, target, progress)),
                self._bandwidth)
            item.ahead = Ahead(copy, target, stack.pop_all())
        LOG.info('Copied volume %(volume)s while the server runs: %(data)d '
                 'bytes of data in %(seconds).1f s', {
                     'volume': item.source.name, 'data': result.data,
                     'seconds': result.seconds}, instance=transfer.instance)


def _room(item):
    """How many bytes the volume there must have for what may come yet."""
    record = getattr(item, 'record', None)
    if record is None or record.format != fields.LibvirtDiskFormat.QCOW2:
        return item.length
    size = record.size or 0
    return max(item.length, size + size // _TABLES_SHARE + _TABLES_LEAST)
