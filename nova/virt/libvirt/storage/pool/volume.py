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
"""One volume of a storage pool, as libvirt and this host know it."""

import contextlib
import functools
import typing as ty

from oslo_concurrency import processutils
from oslo_log import log as logging
import tenacity

import nova.conf
from nova import exception
import nova.privsep.fs
import nova.privsep.storage
from nova.virt.libvirt.storage import lvm
from nova.virt.libvirt.storage.pool import clearing
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import errors
from nova.virt.libvirt.storage.pool import snapshots

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

BUSY_TIMEOUT = 3  # seconds
BUSY_INTERVAL = 0.2  # seconds
EXTEND_TRIES = 3


class VolumeInfo(ty.NamedTuple):
    """Sizes are in bytes."""
    type: int
    capacity: int
    allocation: int


# udev, for one, opens each device that was written to when it is closed.
@tenacity.retry(
    retry=tenacity.retry_if_exception(errors.is_in_use), reraise=True,
    stop=tenacity.stop_after_delay(BUSY_TIMEOUT),
    wait=tenacity.wait_fixed(BUSY_INTERVAL))
def _delete(raw):
    raw.delete(0)


class StorageVolume:
    """A volume of a storage pool.

    :ivar pool: the StoragePool
    :ivar raw: the libvirt.virStorageVol
    """

    def __init__(self, pool, raw):
        self.pool = pool
        self.raw = raw

    def libvirt_errors(self):
        """Turn libvirt's errors into Nova's, which name this volume."""
        return self.pool.libvirt_errors(self.name)

    @functools.cached_property
    def name(self) -> str:
        return self.raw.name()

    @property
    def path(self) -> str:
        """Where the volume is on the pool's host."""
        with self.libvirt_errors():
            return self.raw.path()

    @property
    def key(self) -> str:
        with self.libvirt_errors():
            return self.raw.key()

    def config(self) -> 'storage_config.LibvirtConfigStorageVolume':
        """The volume's XML, parsed.

        Format and backing store are what libvirt takes the content for.
        """
        with self.libvirt_errors():
            return storage_config.LibvirtConfigStorageVolume.from_xml(
                self.raw.XMLDesc(0))

    def info(self) -> VolumeInfo:
        """Type and sizes; libvirt looks at the volume's file for them."""
        with self.libvirt_errors():
            return VolumeInfo(*self.raw.info())

    def physical(self) -> int:
        """The length of the volume's file in bytes, which a byte copy takes.

        On this host libvirt isn't asked, see :meth:`file_bytes`.
        """
        return self.file_bytes()[0]

    def file_bytes(self) -> tuple[int, int]:
        """The length of the volume's file, and what of it is allocated.

        Whenever libvirt tells a volume's sizes or XML, it opens the backing
        file that it has found in the header at the last refresh, and fails if
        it can't. The guest writes the header of a raw disk: so for this host's
        volumes the file system is asked, by the path alone. And of a logical
        volume that has grown libvirt learns at the next refresh.

        :returns: (length, allocation) in bytes
        """
        if self.pool.host == CONF.host:
            try:
                return self._local_bytes()
            except (OSError, ValueError, exception.VolumeBDMPathNotFound,
                    processutils.ProcessExecutionError) as e:
                # Root may not look there. Or libvirt knows why it is gone.
                LOG.debug('Volume %(volume)s of storage pool %(pool)s is '
                          'judged by libvirt: %(error)s',
                          {'volume': self.name, 'pool': self.pool.name,
                           'error': e})
        with self.libvirt_errors():
            return self._length_to_libvirt(), self.raw.info()[2]

    def _local_bytes(self):
        path = self.path
        try:
            return nova.privsep.storage.file_bytes(path)
        except ValueError:
            if not self.pool.kind().is_volume_group:
                raise
        length = lvm.get_volume_size(path)
        return length, length

    def _length_to_libvirt(self):
        return self.raw.infoFlags(libvirt.VIR_STORAGE_VOL_GET_PHYSICAL)[2]

    def check_known_length(self) -> None:
        """Check that libvirt knows the volume's length, or have it look.

        It streams no more of a volume than it knows of.

        :raises: exception.StoragePoolError if it can't look now
        """
        with self.libvirt_errors():
            length = self._length_to_libvirt()
        if length != self.physical():
            self.pool.refresh()

    def resize(self, capacity: int, allocate: bool = False) -> None:
        """Give the volume another capacity.

        :param capacity: in bytes
        :param allocate: take the space from the pool now
        :raises: exception.InsufficientStoragePoolSpace,
            exception.StorageVolumeError
        """
        if not self.pool.kind().resizes:
            self._extend(capacity)
            return
        flags = libvirt.VIR_STORAGE_VOL_RESIZE_ALLOCATE if allocate else 0
        with self.libvirt_errors():
            self.raw.resize(capacity, flags)

    def _extend(self, capacity):
        """Let a logical volume grow: libvirt can't, and must be told."""
        before = self.physical()
        if capacity <= before:
            return
        snapshots.check(self)
        try:
            self._take_extents(capacity, capacity - before)
        except processutils.ProcessExecutionError as e:
            error = (exception.InsufficientStoragePoolSpace
                     if errors.lvm_is_full(e)
                     else exception.StorageVolumeError)
            raise error(pool=self.pool.name, volume=self.name,
                        host=self.pool.host, code=e.exit_code,
                        reason=(e.stderr or '').strip() or e) from e
        try:
            self.pool.refresh()
        except exception.StoragePoolError as e:
            # As long as a disk is copied into the pool. Guests and Nova ask
            # the device, and check_known_length() has it done before a move.
            LOG.warning('libvirt takes volume %(volume)s of storage pool '
                        '%(pool)s to be as small as it was, until the pool is '
                        'refreshed: %(error)s',
                        {'volume': self.name, 'pool': self.pool.name,
                         'error': e})

    # Nobody has the extents when LVM is asked for them: a volume that is made
    # in that moment may get some. If there are no others, libvirt says so.
    @tenacity.retry(
        retry=tenacity.retry_if_exception(errors.lvm_is_full),
        reraise=True, stop=tenacity.stop_after_attempt(EXTEND_TRIES))
    def _take_extents(self, capacity, length):
        nova.privsep.fs.lvextend(
            self.path, capacity, clearing.cleared_extents(self, length))

    def delete(self, is_clear: bool = False) -> None:
        """Delete the volume, whatever its guest has written to it.

        Where a new volume would show what this one holds, it is overwritten
        first. libvirt takes a raw disk with the header of a ploop image for
        ploop, hence for a directory, and fails to delete it: on this host its
        file is deleted without libvirt, which isn't asked what it takes it
        for: it would open what the header names. Already gone is fine.

        :param is_clear: it holds nothing of anybody's
        :raises: exception.StorageVolumeError, exception.StoragePoolError;
            exception.StoragePoolNotMounted if its file can't be reached now,
            which libvirt would take for gone;
            exception.StorageVolumeHasSnapshots if an operator's would go with
            it
        """
        self.pool.check_mounted()
        try:
            with contextlib.suppress(exception.StorageVolumeNotFound):
                snapshots.check(self)
                if not is_clear:
                    clearing.clear(self)
                with self.libvirt_errors():
                    _delete(self.raw)
        except exception.StorageVolumeError as e:
            if self.pool.host != CONF.host:
                raise
            if snapshots.is_gone(self):
                self.pool.refresh()
            elif errors.is_no_directory(e.__cause__):
                self._remove_file()
            else:
                raise

    def _remove_file(self):
        LOG.warning('libvirt takes volume %(volume)s of storage pool %(pool)s '
                    'for a directory, as its guest has written a ploop header '
                    'to it. Its file is deleted without libvirt.',
                    {'volume': self.name, 'pool': self.pool.name})
        try:
            nova.privsep.storage.remove(self.path)
        except OSError as e:
            raise exception.StorageVolumeError(
                pool=self.pool.name, volume=self.name, host=self.pool.host,
                reason=e, code=e.errno) from e
        try:
            # What isn't there can be deleted, and that takes no refresh.
            with contextlib.suppress(exception.StorageVolumeNotFound), (
                    self.libvirt_errors()):
                self.raw.delete(0)
        except exception.StorageVolumeError:
            self.pool.refresh()
