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
"""Disks that a move takes into a Ceph pool, out of one, or into another one.

The source does it, with a connection of its own: it has a storage pool over
the Ceph pool that the destination has, whatever each calls theirs. What goes
into Ceph is converted to a raw image there, without the base image that it may
have had. What leaves it becomes a file on this host for as long as it is on
its way, since an image can be read as no volume of libvirt. Between two Ceph
pools, of one cluster or of two, QEMU reads the one and writes the other.
"""

import contextlib
import os
import threading

from oslo_log import log as logging
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.move import ceph_images
from nova.virt.libvirt.storage.move import convert
from nova.virt.libvirt.storage.move import item
from nova.virt.libvirt.storage.move import peers
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.pool import ceph_bytes
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import sharing
from nova.virt.libvirt.storage.pool import usage
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import leftovers

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

RAW = fields.LibvirtDiskFormat.RAW
QCOW2 = fields.LibvirtDiskFormat.QCOW2

_SECTOR = 512  # bytes
# What qemu-img has read at most, and not written yet: 8 times 2 MiB.
_READ_AHEAD = 16 << 20
# Of a disk that is read, bytes that are progress; qemu-img reads more at once.
_PROGRESS = 32 << 10


class CephPoolThere(peers.PeerPool):
    """The destination's pool over Ceph, by a pool of this host over the same.

    :param name: of the pool on the destination
    :param host: name of the destination
    :param pool: the StoragePool of this host
    :param originals: names of the images that stay until the move is
        confirmed. By its name, a copy is told from what stays where it is.
    """

    def __init__(self, name, host, pool, originals=()):
        self.name = name
        self.host = host
        self._pool = pool
        self._originals = frozenset(originals)

    def check(self):
        self._pool.ceph().check()
        return self._pool.config().type

    def available(self, wanted):
        return self._pool.ceph().sizes()[1]

    def refresh(self):
        pass

    def has(self, name, refresh=False):
        return self._pool.find(name) is not None

    def free_name(self, wanted, taken=()):
        return ceph_bytes.free_name(
            self._pool, wanted, self._originals.union(taken),
            ceph_images.timeout())

    def is_shared(self, here, instance):
        return False

    def create(self, name, length, mode):
        ceph_bytes.create(self._pool, name, length, ceph_images.timeout())

    def probe(self, instance):
        """Make an image and delete it: this host may be let look alone.

        :param instance: whose prefix the image gets
        :raises: exception.StorageCephError
        """
        name = sharing.probe_name(instance.uuid)
        ceph_bytes.create(self._pool, name, 1 << 20, ceph_images.timeout())
        ceph_bytes.delete(self._pool, name, ceph_images.timeout())

    def image(self, name):
        """The CephImage of that name."""
        return ceph_images.image(self._pool, name)


class IntoCeph(item.Disk):
    """A disk that becomes an image of the destination's Ceph pool.

    Its length is what the guest sees: that is what the image holds.
    """
    is_streamed = False

    def measure(self):
        path = self.source.path
        length, allocation = self.source.file_bytes()
        if self.record.format == QCOW2:
            info = image_cache.look_at_overlay(path, self.record.size)
            if info.backing_file:
                # All of it comes along.
                allocation += os.stat(info.backing_file).st_blocks * 512
            length = info.virtual_size
        # QEMU reads whole sectors.
        self.length = -(-length // _SECTOR) * _SECTOR
        self.allocation = min(allocation, self.length)

    def flattenable(self):
        # It is converted, which reads its base image.
        return False

    def reserved(self):
        # No space is reserved there.
        return self.allocation

    def send(self, transfer):
        """Write the image, and compare it with the disk.

        :param transfer: the copy.Transfer
        """
        image = self.pool.image(self.target)
        watch = transfer.watch(self, peers.Target(None), self.set_done)
        names = {'volume': self.source.name, 'length': self.length,
                 'where': image.key, 'side': 'destination'}
        LOG.info('Converting volume %(volume)s (%(length)d bytes, '
                 '%(allocation)d allocated) to image %(image)s of Ceph',
                 {'volume': self.source.name, 'length': self.length,
                  'allocation': self.allocation, 'image': image.key},
                 instance=transfer.instance)
        path, source = _path(image), self._source_path()
        rate = _rate(transfer)
        # When all is read it only writes, of which its files don't tell.
        patience = watch['stall_timeout'] + (
            -(-_READ_AHEAD // rate) if rate else 0)
        # librbd's cache would try for ever what Ceph doesn't answer.
        convert.run(
            ['qemu-img', 'convert', '-p', '-n', '--target-is-zero', '-t',
             'none', *_limit(rate), '-f', self.record.format, '-O', RAW,
             source, path],
            {**watch, 'stall_timeout': patience},
            {**names, 'operation': 'qemu-img convert'},
            least=_PROGRESS)
        if convert.run(
                ['qemu-img', 'compare', '-f', self.record.format, '-F', RAW,
                 source, path],
                watch, {**names, 'operation': 'qemu-img compare'}, (0, 1)):
            raise exception.StorageTransferMismatch(
                volume=self.target, where=image.key,
                reason=_("its content differs"))
        key = pump.new_key()
        length, checksum = ceph_bytes.digest(
            image, key, ceph_images.timeout())
        if length != self.length:
            raise exception.StorageTransferMismatch(
                volume=self.target, where=image.key,
                reason=_("its size is %(is)d instead of %(wanted)d bytes") % {
                    'is': length, 'wanted': self.length})
        self.result = pump.Result(
            data=self.allocation, holes=self.length - self.allocation,
            checksum=checksum, key=key, physical=length, allocation=None,
            seconds=0)
        watch['progress'](self.length)

    def _source_path(self):
        return self.source.path


class BetweenCephPools(IntoCeph):
    """A disk that is an image of a Ceph pool, and becomes one of another."""

    def measure(self):
        length, self.allocation = ceph_bytes.measure(
            self.source, ceph_images.timeout())
        self.length = -(-length // _SECTOR) * _SECTOR

    def _source_path(self):
        return _path(self.source)


class OutOfCeph(item.Disk):
    """A disk that was an image of a Ceph pool, and becomes a volume.

    :ivar spool: the StoragePool of this host for its file on the way
    """
    is_streamed = False
    spool = None
    # Several disks are copied at once, and have their records in one place.
    _noting = threading.Lock()

    def measure(self):
        length, self.allocation = ceph_bytes.measure(
            self.source, ceph_images.timeout())
        self.length = -(-length // _SECTOR) * _SECTOR

    def send(self, transfer):
        """Send the image, by way of a file.

        :param transfer: the copy.Transfer
        """
        image, length = self.source, self.length
        with self._file(transfer) as volume:
            convert.run(
                ['qemu-img', 'convert', '-t', 'writeback',
                 *_limit(_rate(transfer)), '-f', RAW, '-O', RAW,
                 _path(image), volume.path],
                transfer.watch(self, peers.Target(None), self.set_done),
                {'volume': image.name, 'length': length, 'where': volume.path,
                 'side': 'source', 'operation': 'qemu-img convert'})
            try:
                self.source, self.is_streamed = volume, True
                super().send(transfer)
            finally:
                self.source, self.is_streamed = image, False

    @contextlib.contextmanager
    def _file(self, transfer):
        """A volume on this host, for as long as it takes."""
        disks, instance = transfer.disks, transfer.instance
        with self._noting:
            place = (self.spool.name, self.spool.free_name(
                '%s_%s.out' % (instance.uuid, self.name),
                leftovers.names(disks)))
            # Known by name before it is there: this compute may be killed.
            leftovers.note(disks, CONF.host, [place])
            disks.save(transfer.context)
        volume = state.create_volume(
            self.spool, place[1], self.length, (os.geteuid(), os.getegid()),
            0o600)
        try:
            yield volume
        finally:
            if ownership.delete_volume(volume, instance):
                with self._noting:
                    leftovers.forget(disks, CONF.host, [place])
                    disks.save(transfer.context)


def item_of(name, there, record, volume, connection):
    """The Item of a disk that is converted.

    :param there: PeerPool of the destination
    :param record: the disk's record on this host
    :param volume: StorageVolume or CephImage of this host
    :param connection: this host's libvirt
    """
    if isinstance(there, CephPoolThere):
        kind = BetweenCephPools if record.is_on_ceph else IntoCeph
        return kind(name, there, record, volume)
    found = OutOfCeph(name, there, record, volume)
    found.spool = state.file_pool(connection, record.pool)
    return found


def check_room(items) -> None:
    """Check that there is room for the files of what leaves Ceph.

    They may all be there at once.

    :param items: list of Item
    :raises: exception.MigrationPreCheckError
    """
    files = [item for item in items if isinstance(item, OutOfCeph)]
    if not files:
        return
    pool, total = files[0].spool, sum(item.allocation for item in files)
    _device, _total, available = usage.measure(pool)
    if total > available:
        raise exception.MigrationPreCheckError(reason=_(
            "make room first: storage pool %(pool)s of host %(host)s has "
            "%(available)d bytes available and %(total)d are needed for the "
            "disks on their way out of Ceph") % {
                'pool': pool.name, 'host': CONF.host, 'available': available,
                'total': total})


def _path(image):
    """What qemu-img calls an image that it mustn't wait for."""
    return '%s:rados_osd_op_timeout=%d' % (image.path, ceph_images.timeout())


def _rate(transfer):
    """A disk's part of the bandwidth, in bytes a second; 0: no limit."""
    return (CONF.libvirt.storage_migration_bandwidth * units.Mi //
            transfer.parallel)


def _limit(rate):
    return ['-r', '%d' % rate] if rate else []
