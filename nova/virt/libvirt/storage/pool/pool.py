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
"""A storage pool and its volumes over one libvirt connection.

Knows nothing of instances. Every call goes to the libvirt daemon and blocks
until it has answered. What lists return is wrapped as Host wraps what single
calls return, so that no call blocks the hub where there is one.
"""

import contextlib
import inspect
import os
import typing as ty

from oslo_log import log as logging
from oslo_utils import units
import tenacity

import nova.conf
from nova import exception
from nova.i18n import _
import nova.privsep.storage
from nova import utils
from nova.virt.libvirt.storage.pool import access
from nova.virt.libvirt.storage.pool import ceph as ceph_pool
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import errors
from nova.virt.libvirt.storage.pool import export
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.pool import mounts
from nova.virt.libvirt.storage.pool import volume as storage_volume
from nova.virt.libvirt.storage.pool import volume_group

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


# A pool that holds not even the smallest flavors was not meant for disks.
MIN_CAPACITY = units.Gi

# "pool has asynchronous jobs running": a volume is being made, copied into or
# out of. A volume that is made takes seconds, a copy may take hours.
REFRESH_TIMEOUT = 10  # seconds
COPY_TIMEOUT = 6 * 3600  # seconds
START_TIMEOUT = 3  # seconds
REFRESH_INTERVAL = 0.2  # seconds


class PoolInfo(ty.NamedTuple):
    """Sizes are in bytes."""
    state: int
    capacity: int
    allocation: int
    available: int

    @property
    def is_running(self) -> bool:
        """Whether the sizes mean anything: of a stopped pool they are 0."""
        return self.state == libvirt.VIR_STORAGE_POOL_RUNNING


def _wrap(obj):
    """Wrap what a list returned as Host wraps what a single call returns."""
    return utils.tpool_wrap(obj, autowrap=tuple(
        cls for name, cls in inspect.getmembers(libvirt, inspect.isclass)
        if name.startswith('vir')))


def permissions(mode):
    """Permissions with which a directory or file is Nova's own.

    :param mode: a number, e.g. 0o755
    """
    owned = storage_config.LibvirtConfigStoragePermissions()
    owned.mode = mode
    owned.owner = os.geteuid()
    owned.group = os.getegid()
    return owned


def list_pools(conn, host: str) -> list['StoragePool']:
    """All storage pools that libvirt knows, active or not.

    :param conn: a libvirt.virConnect
    :param host: its name, for messages
    """
    # The name is part of the handle: asking for it takes no call.
    with StoragePool(conn, '*', host).libvirt_errors():
        return [StoragePool(conn, raw.name(), host)
                for raw in conn.listAllStoragePools(0)]


def has_lost_storage(conn) -> bool:
    """Whether no storage call on a connection will be answered any more.

    A modular daemon of libvirt connects to virtstoraged once for each of its
    clients, at the client's first storage call, and keeps to that connection
    when virtstoraged has ended and is back.

    :param conn: to this host's libvirt
    """
    # Takes no lock of any pool.
    return _is_lost(conn.getStoragePoolCapabilities)


def has_lost_secrets(conn) -> bool:
    """Whether no key of Ceph will be had on a connection any more.

    It is as with virtstoraged. A host without pools over Ceph is not asked,
    and needs no virtsecretd.

    :param conn: to this host's libvirt
    """
    return ceph_pool.CephPool.has_asked_for_secrets and _is_lost(
        conn.numOfSecrets)


def _is_lost(call):
    try:
        call()
    except libvirt.libvirtError as error:
        # Any other code is of a first call, which is tried again.
        return (error.get_error_domain() == libvirt.VIR_FROM_RPC and
                error.get_error_code() == libvirt.VIR_ERR_INTERNAL_ERROR)
    return False


class StoragePool:
    """A storage pool.

    :param conn: a libvirt.virConnect, maybe wrapped
    :param name: the pool's name
    :param host: the name of the host that the connection leads to
    """

    def __init__(self, conn, name: str, host: str):
        self._conn = conn
        self.name = name
        self.host = host
        self._kind: kinds.PoolKind | None = None
        self._ceph: ceph_pool.CephPool | None = None

    @classmethod
    def ensure(cls, conn, config: 'storage_config.LibvirtConfigStoragePool',
               host: str) -> 'StoragePool':
        """Adopt the pool of that name, or make it.

        Two services that do so at once both get the pool.

        :param config: the pool as it is made if there is none
        :raises: exception.StoragePoolError or one of its subclasses
        """
        pool = cls(conn, config.name, host)
        if not pool.exists():
            pool._make(config)
        pool.adopt()
        return pool

    def _make(self, config):
        self._refuse_taken_path(config.target_path)
        with self.libvirt_errors():
            try:
                made = self._conn.storagePoolDefineXML(config.to_xml(), 0)
            except libvirt.libvirtError:
                if self.exists():
                    return  # another service was faster
                raise
            LOG.info('Made storage pool %(pool)s in %(path)s',
                     {'pool': self.name, 'path': config.target_path})
            try:
                made.build(0)
            except libvirt.libvirtError:
                # A service that adopts the pool starts it as soon as the
                # directory is there.
                if not made.isActive():
                    raise
            made.setAutostart(1)

    def _refuse_taken_path(self, path):
        with self.libvirt_errors():
            others = [_wrap(other) for other in
                      self._conn.listAllStoragePools(0)]
            for other in others:
                config = storage_config.LibvirtConfigStoragePool.from_xml(
                    other.XMLDesc(0))
                if config.name != self.name and config.target_path and (
                        os.path.realpath(config.target_path) ==
                        os.path.realpath(path)):
                    raise exception.StoragePoolConflict(
                        pool=self.name, host=self.host, path=path,
                        other=config.name)

    def adopt(self) -> None:
        """Check that the pool can hold disks, and start it if it is off.

        :raises: exception.StoragePoolUnsupported,
            exception.StoragePoolNotMounted, exception.StoragePoolTooSmall,
            exception.StoragePoolTaken,
            exception.StoragePoolForbidden, exception.StorageCephError,
            exception.StoragePoolError
        """
        if not self.kind().holds_disks:
            raise exception.StoragePoolUnsupported(
                pool=self.name, host=self.host, type=self.config().type,
                supported=', '.join(kinds.DISK_TYPES))
        images = self.ceph()
        if images is not None:
            # libvirt waits longer, and Nova may not reach what it does.
            images.check()
            LOG.info('Storage pool %(pool)s is over Ceph pool %(ceph)s',
                     {'pool': self.name, 'ceph': images.identity})
        self.start()
        info = self.info()
        if info.capacity < MIN_CAPACITY:
            raise exception.StoragePoolTooSmall(
                pool=self.name, host=self.host, capacity=info.capacity,
                minimum=MIN_CAPACITY)
        if (self.kind().keeps_blocks and info.available < MIN_CAPACITY and
                not self.volumes()):
            raise exception.StoragePoolTaken(
                pool=self.name, host=self.host, available=info.available)
        self.check_access()
        if self.kind().is_remote:
            export.check(self)

    def check_access(self, needed: int = os.X_OK) -> None:
        """Check that this process may use files in the pool's directory.

        A pool that isn't a directory has none to be checked.

        :param needed: as for os.access(); to make files takes os.W_OK too
        :raises: exception.StoragePoolForbidden
        """
        path = self.directory()
        if path is None:
            return
        found = access.obstacle(path, needed)
        if found:
            raise exception.StoragePoolForbidden(
                pool=self.name, host=self.host, user=access.user(),
                **found._asdict())

    def start(self) -> None:
        """Start the pool if it is off.

        :raises: exception.StoragePoolError if it can't be started,
            exception.StoragePoolNotMounted if it should have been long ago
        """
        pool = self._lookup()
        with self.libvirt_errors():
            if not pool.isActive():
                LOG.info('Starting storage pool %s', self.name)
                _start(pool)
        self.check_mounted()

    def check_mounted(self) -> None:
        """Check that what libvirt has mounted for the pool is still there.

        Of another host nothing is known.

        :raises: exception.StoragePoolNotMounted
        """
        if self.host != CONF.host or not self.kind().is_mounted:
            return
        config = self.config()
        path = os.path.realpath(config.target_path or '')
        try:
            found = mounts.source_at(path)
        except OSError as e:
            LOG.debug('What is mounted at %(path)s is not known: %(error)s',
                      {'path': path, 'error': e})
            return
        if found is None or self.kind().is_remote and (
                found.rstrip('/') not in {
                    name.rstrip('/')
                    for name in mounts.sources_of(config.source)}):
            raise exception.StoragePoolNotMounted(
                pool=self.name, host=self.host, path=path,
                found=found or _('nothing'))

    @contextlib.contextmanager
    def libvirt_errors(self, volume: str | None = None):
        """Turn libvirt's errors into Nova's.

        :param volume: the volume that is acted upon
        """
        try:
            yield
        except libvirt.libvirtError as error:
            code = error.get_error_code()
            names = {'pool': self.name, 'host': self.host, 'volume': volume,
                     'code': code, 'reason': error.get_error_message() or
                     str(error)}
            if code == libvirt.VIR_ERR_NO_STORAGE_POOL:
                raise exception.StoragePoolNotFound(**names) from error
            if code == libvirt.VIR_ERR_NO_STORAGE_VOL:
                raise exception.StorageVolumeNotFound(**names) from error
            if code == libvirt.VIR_ERR_STORAGE_VOL_EXIST or (
                    volume and errors.says(error, kinds.NAME_IS_TAKEN)):
                raise exception.StorageVolumeExists(**names) from error
            if 'is not active' in names['reason']:
                raise exception.StoragePoolInactive(**names) from error
            if errors.is_full(error):
                raise exception.InsufficientStoragePoolSpace(
                    **names) from error
            if volume is None:
                raise exception.StoragePoolError(**names) from error
            raise exception.StorageVolumeError(**names) from error

    def _lookup(self):
        with self.libvirt_errors():
            return self._conn.storagePoolLookupByName(self.name)

    def exists(self) -> bool:
        """Whether the connection's host knows a pool of that name."""
        try:
            self._lookup()
        except exception.StoragePoolNotFound:
            return False
        return True

    def is_active(self) -> bool:
        """Whether the pool is started."""
        pool = self._lookup()
        with self.libvirt_errors():
            return bool(pool.isActive())

    def config(self) -> 'storage_config.LibvirtConfigStoragePool':
        """The pool's XML, parsed."""
        pool = self._lookup()
        with self.libvirt_errors():
            return storage_config.LibvirtConfigStoragePool.from_xml(
                pool.XMLDesc(0))

    def kind(self) -> kinds.PoolKind:
        """What libvirt can do with a pool of this type."""
        if self._kind is None:
            self._kind = kinds.of_type(self.config().type)
        return self._kind

    def ceph(self) -> ceph_pool.CephPool | None:
        """The Ceph pool that this one is over; None if it is over none.

        Of another host's pools libvirt alone is asked.
        """
        if self.host != CONF.host or not self.kind().is_ceph:
            return None
        if self._ceph is None:
            self._ceph = ceph_pool.CephPool(self._conn, self, self.config())
        return self._ceph

    def directory(self) -> str | None:
        """The directory in which volumes are files; None if they are none.

        The path of another pool, such as /dev/VG, is in a file system that
        has nothing to do with it.
        """
        config = self.config()
        return (config.target_path if kinds.of_type(config.type).is_directory
                else None)

    def info(self) -> PoolInfo:
        """State and sizes of the pool.

        They are of its last refresh or change; of a volume group of this host,
        which LVM is asked for, they are of now.
        """
        pool = self._lookup()
        with self.libvirt_errors():
            info = PoolInfo(*pool.info())
        if (info.is_running and self.host == CONF.host and
                self.kind().is_volume_group):
            return volume_group.measured(self, info)
        return info

    def refresh(self, timeout: float | None = None) -> None:
        """Let libvirt look at every file of the pool anew.

        Costs a probe of each file, in which libvirt believes what a guest has
        written to its raw disk, and opens the file that is named there. What
        it finds is a guess, see LibvirtStorage. So of a pool for disks this is
        for what can be had in no other way: to measure one that libvirt takes
        for full before a disk is refused; to see what another host has made in
        a shared one; to have libvirt forget a file that it couldn't delete, or
        the path of a base image on another host; and to list a directory that
        root may not list.

        :param timeout: for how many seconds to wait for the end of jobs;
            REFRESH_TIMEOUT if None
        :raises: exception.StoragePoolError if volumes are being made or
            copied for longer than that
        """
        pool = self._lookup()
        if self.kind().is_ceph:
            # It opens each image, and nobody reads what it finds.
            return
        if timeout is None:
            timeout = REFRESH_TIMEOUT
        with self.libvirt_errors():
            _refresh.retry_with(
                stop=tenacity.stop_after_delay(timeout))(pool)

    def volumes(self) -> list['storage_volume.StorageVolume']:
        """All volumes, by one call."""
        images: ty.Any = self.ceph()
        if images is not None:
            return images.images()
        pool = self._lookup()
        with self.libvirt_errors():
            return [storage_volume.StorageVolume(self, _wrap(volume))
                    for volume in pool.listAllVolumes(0)]

    def file_names(self) -> set[str]:
        """Names of all that is in the pool's directory.

        libvirt knows only what it has made or looked for; its looking, a
        refresh, interprets every file. This interprets none.
        """
        images = self.ceph()
        if images is not None:
            return images.names()
        try:
            return set(nova.privsep.storage.names_in(
                self.config().target_path))
        except (OSError, TypeError) as e:
            # A directory that not even root may list here.
            LOG.debug('Storage pool %(pool)s is refreshed, as its directory '
                      'can not be listed: %(error)s',
                      {'pool': self.name, 'error': e})
            self.refresh()
            return {volume.name for volume in self.volumes()}

    def names_in_directory(self) -> set[str]:
        """Names of all files in the pool's directory, without a refresh.

        Others that see it make files there of which libvirt doesn't know.

        :returns: the empty set if the pool is no directory, or one that can't
            be listed. libvirt makes no file in place of another.
        """
        path = self.directory()
        if path is None:
            return set()
        try:
            return set(nova.privsep.storage.names_in(path))
        except OSError as e:
            LOG.debug('The directory of storage pool %(pool)s can not be '
                      'listed: %(error)s', {'pool': self.name, 'error': e})
            return set()

    def backing_files(self) -> dict[str, str]:
        """What the pool's files name as backing files, whoever wrote that.

        :returns: name of the file -> path that its header has
        :raises: exception.StoragePoolError if not all of them can be read
        """
        path = self.directory()
        if path is None:
            return {}
        self.check_mounted()
        try:
            found = nova.privsep.storage.backing_files(path)
            # A relative path is one from the overlay's directory.
            return {name: os.path.join(path, backing)
                    for name, backing in found.items()}
        except OSError as e:
            raise exception.StoragePoolError(
                pool=self.name, host=self.host, reason=e, code=e.errno) from e

    def volume(self, name: str) -> 'storage_volume.StorageVolume':
        """The volume of that name.

        :raises: exception.StorageVolumeNotFound
        """
        images: ty.Any = self.ceph()
        if images is not None:
            return images.get(name)
        pool = self._lookup()
        with self.libvirt_errors(name):
            return storage_volume.StorageVolume(
                self, pool.storageVolLookupByName(name))

    def find(self, name: str,
             refresh: bool = False
             ) -> 'storage_volume.StorageVolume | None':
        """The volume of that name, None if there is none.

        :param refresh: look for one that libvirt doesn't know of yet
        """
        try:
            return self.volume(name)
        except exception.StorageVolumeNotFound:
            if not refresh:
                return None
        self.refresh()
        return self.find(name)

    def free_name(self, wanted: str,
                  taken: ty.Container[str] = ()) -> str:
        """A name for a new volume: the one wanted, or that with a number.

        libvirt can't rename a volume: a copy that is kept for a while keeps
        its name, too. What stands in a pool is never written over.

        :param wanted: e.g. ``<uuid of the instance>_disk.eph0``
        :param taken: names that can't be had though no volume has them
        :returns: wanted, else wanted.1, wanted.2 ...
        """
        name, suffix = wanted, 0
        while True:
            try:
                self.volume(name)
            except exception.StorageVolumeNotFound:
                if name not in taken:
                    return name
            suffix += 1
            name = '%s.%d' % (wanted, suffix)

    def create(self, config: 'storage_config.LibvirtConfigStorageVolume'
               ) -> 'storage_volume.StorageVolume':
        """Make a volume; it is Nova's to write unless config says otherwise.

        A device is root's, whatever config says.

        :raises: exception.StorageVolumeExists,
            exception.InsufficientStoragePoolSpace,
            exception.StorageVolumeError
        """
        pool = self._lookup()
        self.check_mounted()
        if not self.kind().sparse:
            config.allocation = config.capacity
        with self.libvirt_errors(config.name):
            return storage_volume.StorageVolume(self, pool.createXML(
                self._with_permissions(config).to_xml(), 0))

    def create_from(
            self, config: 'storage_config.LibvirtConfigStorageVolume',
            source: 'storage_volume.StorageVolume',
    ) -> 'storage_volume.StorageVolume':
        """Make a volume as a copy of another; libvirt converts the format.

        libvirt interprets the source in the format that it takes it to be
        of: the caller has to know that this is right.

        :raises: as :meth:`create` does
        """
        pool = self._lookup()
        self.check_mounted()
        if not self.kind().sparse:
            # libvirt takes the larger capacity by itself.
            config.capacity = max(config.capacity or 0,
                                  source.info().capacity)
            config.allocation = config.capacity
        with self.libvirt_errors(config.name):
            return storage_volume.StorageVolume(self, pool.createXMLFrom(
                self._with_permissions(config).to_xml(), source.raw, 0))

    def _with_permissions(self, config):
        if not self.kind().is_directory:
            # udev says whose a device is: not everybody's to read.
            config.permissions = None
        elif config.permissions is None:
            config.permissions = permissions(0o644)
        return config


# A service that has defined the pool may not have made its directory yet.
@tenacity.retry(
    retry=tenacity.retry_if_exception(errors.is_libvirt_error), reraise=True,
    stop=tenacity.stop_after_delay(START_TIMEOUT),
    wait=tenacity.wait_fixed(REFRESH_INTERVAL))
def _start(pool):
    if not pool.isActive():
        pool.create(0)


@tenacity.retry(
    retry=tenacity.retry_if_exception(errors.is_busy), reraise=True,
    wait=tenacity.wait_fixed(REFRESH_INTERVAL))
def _refresh(pool):
    pool.refresh(0)
