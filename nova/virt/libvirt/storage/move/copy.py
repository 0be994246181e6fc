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
"""How an instance's disks are copied, with the guest off."""

import contextlib
import os
import threading
import time
import typing as ty

from oslo_log import log as logging
from oslo_utils import units

from nova.compute import utils as compute_utils
import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
import nova.privsep.qemu
from nova import thread_pool_factory
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.move import bitmaps
from nova.virt.libvirt.storage.move import cancel
from nova.virt.libvirt.storage.move import guest_files as files
from nova.virt.libvirt.storage.move import item as storage_item
from nova.virt.libvirt.storage.move import offer
from nova.virt.libvirt.storage.move import room
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.move import transport
from nova.virt.libvirt.storage.move import undo
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import stream as upload
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Seconds between two reports of progress.
_REPORT_INTERVAL = 5
# How many names are tried for a volume, where files are in the way.
_NAMES_TRIED = 4

# UUIDs of the instances that this process copies now.
_running: set[str] = set()


def is_running(instance):
    """Whether this compute service copies an instance's disks now."""
    return instance.uuid in _running


@contextlib.contextmanager
def running(instance):
    """Let it be known within that an instance's disks are copied."""
    _running.add(instance.uuid)
    try:
        yield
    finally:
        _running.discard(instance.uuid)


class Transfer:
    """The copy of what a Departure has checked.

    :param departure: a Departure whose connection is still open
    """

    def __init__(self, departure):
        self.departure = departure
        self.here = departure.move.here
        self.job_tracker = self.here.job_tracker
        self.context = departure.context
        self.instance = departure.instance
        self.migration = departure.migration
        self.disks = departure.disks
        self.items = departure.items
        self.bitmaps = bitmaps.Bitmaps(self.here.host, self.instance)
        self._lock = threading.Lock()
        # By item, what qemu-img says of it with the guest off.
        self._infos: dict[ty.Any, ty.Any] = {}
        self._taken = leftovers.names(self.disks)
        self._errors = []
        # (pool, volume) of what may be on the destination.
        self._unanswered: list[tuple[str, str]] = []
        # How many disks are copied at the same time.
        self.parallel = 1
        self._started = self._reported = 0.0
        self._before = 0

    def run(self, directory):
        """Copy the disks.

        On failure the records are as they were and what was made on the
        destination is gone, or an error is in the log.

        :param directory: the instance's directory on this host
        :raises: StorageTransferError and others
        """
        self._look_again()
        self._read_bitmaps()
        self._measure()
        # What could not be deleted after a first pass, too.
        self._taken |= leftovers.names(self.disks)
        with contextlib.ExitStack() as stack:
            # Pushed first, so done last: until the volumes are gone the
            # records say where they are.
            stack.callback(self.restore)
            # What has been sent ahead is there already.
            created = [(item.pool.name, item.target) for item in self.items
                       if item.ahead]
            stack.callback(self.delete_created, created)
            self._pack_files(stack, directory)
            self.choose_names(self.items)
            self.save_building(self.items)
            for item in self.items:
                if item.source and not item.ahead:
                    self.create(item, item.length)
                    created.append((item.pool.name, item.target))
            self._copy_all()
            self._save_expectations()
            stack.pop_all()

    def restore(self):
        """Let the records say what they said before."""
        undo.restore(self.disks, self.migration)
        self.disks.save(self.context)
        self.instance.progress = 0
        self.instance.save()

    def _pack_files(self, stack, directory):
        """Have what travels beside the disks in a volume, too."""
        departure = self.departure
        path = files.pack(departure.host, self.instance, directory,
                          departure.same_host)
        if path is None:
            return
        here, there = departure.pool_of_files()
        name = here.free_name('%s_%s' % (self.instance.uuid, files.NAME))
        # Known by name before it is there: this compute may be killed.
        leftovers.note(self.disks, CONF.host, [(here.name, name)])
        self.disks.save(self.context)
        volume = state.create_volume(
            here, name, os.path.getsize(path), (os.geteuid(), os.getegid()),
            0o600)
        item = storage_item.GuestFiles(files.NAME, there, volume)
        item.sparse = departure.peer.is_sparse(there.check())
        stack.callback(self._delete_packed, item)
        upload.upload_file(volume, path)
        os.unlink(path)
        item.measure()
        self.items.append(item)

    def _delete_packed(self, item):
        if ownership.delete_volume(item.source, self.instance):
            leftovers.forget(self.disks, CONF.host,
                             [(item.source.pool.name, item.source.name)])

    def _look_again(self):
        """Refuse what QEMU has written into a header since the check.

        What a header names is read and written as root from here on.
        """
        for item in self.items:
            if item.source and item.flattenable():
                self._infos[item] = image_cache.look_at_overlay(
                    item.source.path, item.record.size)

    def _read_bitmaps(self):
        """Learn what the guest has written since the disks were sent ahead."""
        for item in self.items:
            if item.ahead is not None:
                item.ahead.changed = self.bitmaps.changed(item)
                if item in self._infos:
                    # Its bitmap is gone.
                    self._infos[item] = image_cache.look_at_overlay(
                        item.source.path, item.record.size)
        self.bitmaps.end()

    def _measure(self):
        """Let the disks' files be what travels, and take their sizes.

        The guest has written until it was off: what the check has seen may
        have grown.
        """
        for item in self.items:
            if not item.source:
                continue
            if item.flattenable():
                self._flatten(item)
            item.measure()

    def _flatten(self, item):
        """Free an overlay of a base image that the destination can't have."""
        path, info = item.source.path, self._infos[item]
        bitmaps.forget(item.source, info, self.instance)
        if not info.backing_file or item.keeps_base:
            return
        LOG.info('Making volume %(volume)s independent of base image '
                 "%(base)s, which host %(host)s can't have",
                 {'volume': item.source.name, 'base': info.backing_file,
                  'host': self.migration.dest_compute},
                 instance=self.instance)
        with compute_utils.disk_ops_semaphore:
            nova.privsep.qemu.flatten_image(
                path, fields.LibvirtDiskFormat.QCOW2)
        if item.ahead is not None:
            # Of that no bitmap tells.
            item.ahead.changed = None

    def choose_names(self, items):
        """Choose names that nothing has: what is there is never touched."""
        refreshed = set()
        for item in items:
            if item.target is not None:
                continue
            if item.pool.name not in refreshed and (
                    self.departure.is_shared(item)):
                # It doesn't know what this host has made there.
                item.pool.refresh()
                refreshed.add(item.pool.name)
            item.target = self._free_name(item)

    def _free_name(self, item):
        return item.pool.free_name(
            '%s_%s' % (self.instance.uuid, item.name), self._taken)

    def save_building(self, items):
        """Save where the disks go, before there is anything."""
        # Saved with the next report of progress.
        offer.forget_old(self.instance)
        for item in items:
            self._note_building(item)
        swap = next((item.record for item in items
                     if item.name == metadata.SWAP), None)
        if swap is not None:
            # A resize that does away with swap deletes mapping and record.
            kept = swap.obj_clone()
            kept.migration_id = self.migration.id
            self.disks.set_extra(metadata.SWAP, kept)
        self.disks.save(self.context)

    def _note_building(self, item):
        record = item.new_record()
        record.host = self.migration.dest_compute
        record.pool, record.volume = item.pool.name, item.target
        record.state = fields.LibvirtDiskState.BUILDING
        record.migration_id = self.migration.id
        record.expected = None
        item.put(self.disks, record)

    def create(self, item, length):
        """Make a volume on the destination.

        libvirt knows nothing of a file that was put into a pool since its
        last refresh, and refuses to make another one: that stays, too.

        :param length: bytes
        """
        for tries_left in reversed(range(_NAMES_TRIED)):
            try:
                return item.pool.create(item.target, length, item.mode)
            except exception.InsufficientStoragePoolSpace:
                raise
            except exception.StorageVolumeError as e:
                if not tries_left or not item.may_be_renamed:
                    raise
                LOG.warning('Trying another name: %s', e,
                            instance=self.instance)
            except exception.NovaException:
                # It may have been made all the same.
                self._unanswered.append((item.pool.name, item.target))
                raise
            self._rename(item)

    def _rename(self, item):
        self._taken.add(item.target)
        item.target = self._free_name(item)
        record = item.on_record(self.disks)
        record.volume = item.target
        item.put(self.disks, record)
        self.disks.save(self.context)

    def delete_created(self, created):
        """Delete what was made on the destination.

        :param created: list of (pool, volume)
        """
        undo.delete_at_peer(
            self.departure.peer, self.departure.host, self.disks,
            self.migration, [*created, *self._unanswered])

    def _copy_all(self):
        """Copy several disks at a time; the first error ends the others."""
        disks = [item for item in self.items if item.source]
        # What is small takes its time, too: the disks don't wait for it.
        beside = [item for item in disks
                  if isinstance(item, storage_item.GuestFiles)]
        disks = [item for item in disks if item not in beside]
        errors = self._errors

        def work(waiting):
            while True:
                with self._lock:
                    if not waiting or errors:
                        return
                    item = waiting.pop(0)
                try:
                    self._copy(item)
                except Exception as e:
                    with self._lock:
                        errors.append(e)

        # of all disks together
        self._bandwidth = pump.Bandwidth(
            CONF.libvirt.storage_migration_bandwidth * units.Mi)
        self.parallel = max(1, min(
            CONF.libvirt.storage_migration_parallel_disks, len(disks)))
        threads = [beside] * len(beside) + [disks] * (self.parallel - 1)
        with self.reporting():
            futures = [thread_pool_factory.spawn_on(
                thread_pool_factory.ExecutorType.STORAGE_MIGRATION, work,
                waiting) for waiting in threads]
            work(disks)
            # If that never got a thread
            work(beside)
            for future in futures:
                # One that never got a thread has nothing left to do.
                if not future.cancel():
                    future.result()
            if errors:
                raise errors[0]

    def _cancelled(self):
        return bool(self._errors) or cancel.is_requested(self.migration)

    def check_cancelled(self, item):
        """:raises: exception.StorageTransferCancelled"""
        self._report()
        if self._cancelled():
            raise exception.StorageTransferCancelled(
                volume=item.source.name, where=self.departure.peer.where,
                length=item.length, transferred=item.length)

    def volume(self, item):
        """The pump's name for what an item is copied from."""
        return pump.Volume(self.here.uri, item.source.pool.name,
                           item.source.name)

    def watch(self, item, target, progress):
        """The keywords of a pump.Watch over a copy.

        :param target: the peers.Target that is written to
        :param progress: called with the bytes done
        """
        is_connected = item.ahead is not None

        def moved(done):
            nonlocal is_connected
            # One that is done already is closed next.
            if not is_connected and 0 < done < item.length:
                is_connected = True
                target.connected()
            progress(done)
            self._report()

        return {
            **self.watch_worker(item),
            # Holes of a block device are written there as zeroes.
            'stall_timeout': room.stall_timeout(
                item.length, item.is_streamed and not item.sparse and
                self.departure.peer.takes_holes()),
            'progress': moved}

    def watch_worker(self, item, is_given_up=lambda: False):
        """Those of them that are about who reads an item.

        :param is_given_up: whether nobody waits for it any more
        """
        def started(pid):
            LOG.info('Process %(pid)d copies volume %(volume)s',
                     {'pid': pid, 'volume': item.source.name},
                     instance=self.instance)
            self.job_tracker.add_job(self.instance, pid)

        return {
            'cancelled': lambda: is_given_up() or self._cancelled(),
            'on_start': started,
            'on_end': lambda pid: self.job_tracker.remove_job(
                self.instance, pid)}

    def _copy(self, item):
        if item.ahead is not None:
            try:
                return self._copy_rest(item)
            except exception.StorageTransferCancelled:
                raise
            except exception.NovaException as e:
                LOG.warning('All of volume %(volume)s is copied, as its rest '
                            'could not be: %(error)s',
                            {'volume': item.source.name, 'error': e},
                            instance=self.instance)
            self._make_anew(item)
        item.send(self)

    def _copy_rest(self, item):
        """Send what differs from what was sent while the guest was running."""
        ahead = item.ahead
        watch = self.watch(item, ahead.target, item.set_done)
        item.ahead = None
        with ahead.exit:
            item.result = ahead.copy.rest(
                item.length, pump.Watch(**watch), self._bandwidth,
                ahead.changed)
            ahead.target.length = item.length
            if ahead.is_read:
                ahead.target.changed = item.result.changed
        item.done = item.length
        LOG.info('Copied the rest of volume %(volume)s: %(data)d of '
                 '%(length)d bytes in %(seconds).1f s; %(read)d may have '
                 'changed',
                 {'volume': item.source.name, 'data': item.result.data,
                  'length': item.length, 'seconds': item.result.seconds,
                  'read': item.length if ahead.changed is None else
                  sum(length for _start, length in ahead.changed)},
                 instance=self.instance)

    def _make_anew(self, item):
        """Have an empty volume in the place of one that was written to."""
        self.delete_at_peer(item)
        item.pool.create(item.target, item.length, item.mode)

    def delete_at_peer(self, item):
        """Delete an item's volume on the destination, and nothing else.

        :raises: exception.StorageIntakeError if that can't be done
        """
        place = (item.pool.name, item.target)
        if self.departure.peer.delete([place], self.instance):
            raise exception.StorageIntakeError(
                host=item.pool.host, reason=_(
                    "see the log of nova-compute there: volume %(volume)s in "
                    "storage pool %(pool)s could not be deleted") % {
                        'volume': item.target, 'pool': item.pool.name})

    def copy_all_of(self, item):
        """Send what a volume of this host holds."""
        takes_holes = self.departure.peer.takes_holes()
        LOG.info('Copying volume %(volume)s (%(length)d bytes, %(allocation)d '
                 'allocated) to pool %(pool)s at %(where)s as %(target)s',
                 {'volume': item.source.name, 'length': item.length,
                  'allocation': item.allocation, 'pool': item.pool.name,
                  'where': self.departure.peer.where, 'target': item.target},
                 instance=self.instance)
        with self.departure.peer.target(
                item.pool.name, item.target) as target:
            watch = self.watch(item, target, item.set_done)
            item.result = pump.copy(
                self.volume(item), target.end, item.length,
                sparse=takes_holes, find_holes=item.finds_holes(),
                bandwidth=self._bandwidth, **watch)
            watch['progress'](item.length)
        LOG.info('Copied volume %(volume)s, read %(how)s: %(data)d bytes of '
                 'data in %(seconds).1f s, %(rate).1f MiB/s',
                 {'volume': item.source.name,
                  'how': 'directly' if item.result.direct else
                  'through libvirt', 'data': item.result.data,
                  'seconds': item.result.seconds,
                  'rate': (item.result.data / units.Mi /
                           max(item.result.seconds, 0.001))},
                 instance=self.instance)

    @contextlib.contextmanager
    def reporting(self):
        """Report progress within, and at the end of what goes well."""
        self._started = self._reported = time.monotonic()
        self._before = self._done()
        yield
        self._report(last=True)

    def _done(self):
        return sum(item.done + item.ahead_done for item in self.items)

    def _report(self, last=False):
        """Say how far it is, where users and operators look for it."""
        now = time.monotonic()
        with self._lock:
            if not last and now - self._reported < _REPORT_INTERVAL:
                return
            self._reported = now
        total = sum(item.length + item.ahead_length for item in self.items
                    if item.source)
        done = self._done()
        rate = (done - self._before) / units.Mi / max(
            now - self._started, 0.001)
        LOG.info('Copied %(done)d of %(total)d bytes of the disks, '
                 '%(rate).1f MiB/s (holes included)',
                 {'done': done, 'total': total, 'rate': rate},
                 instance=self.instance)
        self.instance.progress = round(done * 100 / total) if total else 100
        self.migration.disk_total = total
        self.migration.disk_processed = done
        self.migration.disk_remaining = total - done
        try:
            self.instance.save()
            self.migration.save()
        except exception.InstanceNotFound:
            raise
        except Exception as e:
            # The copy needs neither conductor nor database.
            LOG.warning('The progress could not be saved: %s', e,
                        instance=self.instance)

    def _save_expectations(self):
        """Let the destination know what it must find."""
        for item in self.items:
            if isinstance(item, storage_item.GuestFiles):
                self._delete_packed(item)
            if item.source:
                record = item.on_record(self.disks)
                record.expected = metadata.LibvirtDiskExpected(
                    length=item.length, checksum=item.result.checksum,
                    key=item.result.key,
                    address=(self.here.address
                             if transport.LIBVIRT in transport.ways()
                             else None))
                item.put(self.disks, record)
        self.disks.save(self.context)
