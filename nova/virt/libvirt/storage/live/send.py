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
"""What the source of a live migration does just before the guest moves.

Disks over a base image that the destination can't have take over what they
have of it. Those that the guest only reads, which QEMU doesn't copy, are sent
to the destination and read back there.
"""

import filecmp
import threading

from oslo_log import log as logging
from oslo_utils import fileutils
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage.live import plan
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import room
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import stream
from nova.virt.libvirt.storage.pump import transfer as pump

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

WAY = fields.LibvirtLiveMigrateDiskWay

# Seconds between two looks at a job.
_POLL = 0.5

# What ends the work of a Sender, by the UUID of its instance. Nobody is told
# that a migration is aborted whose Sender has just ended: hence the lock.
_aborts: dict[str, threading.Event] = {}
_lock = threading.Lock()


def abort(guest) -> bool:
    """End what is done for a guest before QEMU copies its disks.

    :param guest: the Guest
    :returns: False if nothing is done: libvirt has the migration, or nobody
    """
    with _lock:
        event = _aborts.get(guest.uuid)
        if event is not None:
            event.set()
    return event is not None


class Sender:
    """An instance's disks on their way out of this host.

    :param local: the LocalHost
    :param disks: the instance's InstanceDisks, as they are on record now
    :param data: the LibvirtLiveMigrateData with the destination's places
    """

    def __init__(self, local, disks, data):
        self._local = local
        self._instance = disks.instance
        self._disks = disks
        self._data = data
        self._aborted = threading.Event()

    def send(self) -> bool:
        """Make all ready for QEMU to copy the rest.

        :returns: False if abort() has ended it
        :raises: exception.MigrationError, exception.StorageTransferError and
            others; the guest runs on
        """
        with _lock:
            _aborts[self._instance.uuid] = self._aborted
        try:
            self._send_all()
        except Exception as e:
            if not self._aborted.is_set():
                raise
            LOG.info('The migration was aborted before QEMU copied the disks: '
                     '%s', e, instance=self._instance)
        finally:
            # Who aborts it later has to ask libvirt.
            with _lock:
                del _aborts[self._instance.uuid]
        return not self._aborted.is_set()

    def _send_all(self):
        guest = self._local.host.get_guest(self._instance)
        for disk in self._data.disks:
            if disk.way == WAY.MIRROR and disk.base is None and (
                    disk.format == fields.LibvirtDiskFormat.QCOW2):
                self._make_independent(guest, disk)
                if self._aborted.is_set():
                    return
        sent = [disk for disk in self._data.disks if disk.way == WAY.SEND]
        if not sent:
            return
        uri = peer.uri_of(self._data.dst_storage_address)
        with peer.connected(self._local.host, uri) as connection:
            for disk in sent:
                self._send(disk, connection, uri)
                if self._aborted.is_set():
                    return

    def _backing_file(self, disk):
        path = plan.path_of(self._local, self._disks, disk.name)
        return content.look_at_qcow2(path, disk.size).backing_file

    def _make_independent(self, guest, disk):
        """Let a disk take over what it has of its base image."""
        backing = self._backing_file(disk)
        if not backing:
            return
        LOG.info('Disk %(name)s takes over what it has of %(base)s, which '
                 "the destination can't have",
                 {'name': disk.name, 'base': backing},
                 instance=self._instance)
        device = guest.get_block_device(disk.dev)
        device.rebase(None)
        while not device.is_job_complete():
            if self._aborted.wait(_POLL):
                # It keeps its base image, and what it has taken over.
                device.abort_job()
                return
        if self._backing_file(disk):
            raise exception.MigrationError(reason=_(
                'disk %(name)s still depends on %(base)s') % {
                    'name': disk.name, 'base': backing})

    def _send(self, disk, connection, uri):
        record = self._disks.get(disk.name)
        there = storage_pool.StoragePool(
            connection, disk.pool, 'the destination')
        is_sparse = room.is_sparse(connection, state.check_pool(there))
        if record.volume is None:
            self._send_file(disk, there.volume(disk.volume), is_sparse)
        else:
            self._send_volume(disk, record, uri, is_sparse)
        LOG.info('Disk %(name)s was sent as volume %(volume)s: %(size)d '
                 'bytes', {'name': disk.name, 'volume': disk.volume,
                           'size': disk.size}, instance=self._instance)

    def _send_volume(self, disk, record, uri, is_sparse):
        target = pump.Volume(uri, disk.pool, disk.volume)
        stall_timeout = CONF.libvirt.storage_migration_stall_timeout
        result = pump.copy(
            pump.Volume(self._local.uri, record.pool, record.volume), target,
            disk.size, sparse=is_sparse, cancelled=self._aborted.is_set,
            bandwidth=CONF.libvirt.storage_migration_bandwidth * units.Mi,
            stall_timeout=stall_timeout)
        pump.verify(target, disk.size, result.checksum, key=result.key,
                    stall_timeout=stall_timeout)

    def _send_file(self, disk, volume, is_sparse):
        """Send a file of the instance directory; it is small."""
        path = plan.path_of(self._local, self._disks, disk.name)
        came_back = path + '.sent'
        try:
            stream.upload_file(volume, path, is_sparse)
            stream.download_file(volume, came_back)
            if not filecmp.cmp(path, came_back, shallow=False):
                raise exception.StorageTransferMismatch(
                    volume=disk.volume, where='the destination',
                    reason=_('it is not what was sent'))
        finally:
            fileutils.delete_if_exists(came_back)
