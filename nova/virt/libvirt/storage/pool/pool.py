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
import errno
import functools
import os
import typing as ty

from oslo_log import log as logging
from oslo_utils import units
import tenacity

import nova.conf
from nova import exception
import nova.privsep.storage
from nova import utils
from nova.virt.libvirt import host as libvirt_host
from nova.virt.libvirt.storage.pool import config as storage_config

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Pools whose volumes are files of one directory. Logical and rbd pools make
# no volume from another one, or serve no <disk type='volume'>; all others
# can't make volumes.
SUPPORTED_TYPES = ('dir', 'fs', 'netfs')

# A pool that holds not even the smallest flavors was not meant for disks.
MIN_CAPACITY = units.Gi

# "pool has asynchronous jobs running": a volume is being made, copied into or
# out of. A volume that is made takes seconds, a copy may take hours.
REFRESH_TIMEOUT = 10  # seconds
START_TIMEOUT = 3  # seconds
REFRESH_INTERVAL = 0.2  # seconds


class PoolInfo(ty.NamedTuple):
    """Sizes are in bytes."""
    state: int
    capacity: int
    allocation: int
    available: int


class VolumeInfo(ty.NamedTuple):
    """Sizes are in bytes."""
    type: int
    capacity: int
    allocation: int


def _wrap(obj):
    return utils.tpool_wrap(
        obj, autowrap=libvirt_host.Host._get_libvirt_proxy_classes(
            libvirt_host.libvirt))


def pool_name_for(disk_name: str) -> str:
    """The pool in which this host makes a disk.

    :param disk_name: e.g. ``disk`` or ``disk.eph0``
    """
    name = disk_name.removesuffix('.rescue')
    if name == 'disk.swap':
        kind = 'swap'
    elif name == 'disk.config':
        kind = 'config'
    elif name == 'disk.local' or name.startswith('disk.eph'):
        kind = 'ephemeral'
    else:
        kind = 'root'
    return CONF.libvirt.storage_pool_mapping.get(
        kind, CONF.libvirt.storage_disks_pool)


def _directory_pool(name, path):
    config = storage_config.LibvirtConfigStoragePool()
    config.type = 'dir'
    config.name = name
    config.target_path = path
    # libvirt makes the directory as root; Nova puts images there and links
    # legacy disks into it.
    config.permissions = _permissions(0o755)
    return config


def _permissions(mode):
    permissions = storage_config.LibvirtConfigStoragePermissions()
    permissions.mode = mode
    permissions.owner = os.geteuid()
    permissions.group = os.getegid()
    return permissions


def disks_pool_config() -> 'storage_config.LibvirtConfigStoragePool':
    """The pool for disks as it is made if there is none."""
    return _directory_pool(CONF.libvirt.storage_disks_pool,
                           os.path.join(CONF.instances_path, 'disks'))


def base_images_pool_config() -> 'storage_config.LibvirtConfigStoragePool':
    """The pool over the image cache as it is made if there is none."""
    return _directory_pool(
        CONF.libvirt.storage_base_images_pool, os.path.join(
            CONF.instances_path, CONF.image_cache.subdirectory_name))


def ensure_pools(conn, host: str) -> None:
    """Make or adopt all pools that this host is configured to use.

    :param conn: a libvirt.virConnect
    :param host: its name, for messages
    :raises: exception.StoragePoolError or one of its subclasses
    """
    base_images = base_images_pool_config()
    _check_place(StoragePool.ensure(conn, base_images, host), base_images)
    StoragePool.ensure(conn, disks_pool_config(), host)
    for name in set(CONF.libvirt.storage_pool_mapping.values()):
        pool = StoragePool(conn, name, host)
        if not pool.exists():
            raise exception.StoragePoolNotFound(pool=name, host=host)
        pool.adopt()


def list_pools(conn, host: str) -> list['StoragePool']:
    """All storage pools that libvirt knows, active or not.

    :param conn: a libvirt.virConnect
    :param host: its name, for messages
    """
    # The name is part of the handle: asking for it takes no call.
    with StoragePool(conn, '*', host)._errors():
        return [StoragePool(conn, raw.name(), host)
                for raw in conn.listAllStoragePools(0)]


def _check_place(pool, wanted):
    """Refuse an adopted base images pool that isn't over the image cache."""
    path = pool.config().target_path
    if os.path.realpath(path or '') != os.path.realpath(wanted.target_path):
        raise exception.StoragePoolMisplaced(
            pool=pool.name, host=pool.host, path=path,
            expected=wanted.target_path)


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
        libvirt = libvirt_host.libvirt
        self._refuse_taken_path(config.target_path)
        with self._errors():
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
                # Who adopts a pool whose directory is there starts it at once
                if not made.isActive():
                    raise
            made.setAutostart(1)

    def _refuse_taken_path(self, path):
        with self._errors():
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
            exception.StoragePoolTooSmall, exception.StoragePoolError
        """
        kind = self.config().type
        if kind not in SUPPORTED_TYPES:
            raise exception.StoragePoolUnsupported(
                pool=self.name, host=self.host, type=kind,
                supported=', '.join(SUPPORTED_TYPES))
        self._start()
        capacity = self.info().capacity
        if capacity < MIN_CAPACITY:
            raise exception.StoragePoolTooSmall(
                pool=self.name, host=self.host, capacity=capacity,
                minimum=MIN_CAPACITY)

    def _start(self):
        pool = self._lookup()
        with self._errors():
            if not pool.isActive():
                LOG.info('Starting storage pool %s', self.name)
                _start(pool)

    @contextlib.contextmanager
    def _errors(self, volume: str | None = None):
        """Turn libvirt's errors into Nova's.

        :param volume: the volume that is acted upon
        """
        libvirt = libvirt_host.libvirt
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
                    # what createXMLFrom says, as an internal error
                    volume and 'already in use' in names['reason']):
                raise exception.StorageVolumeExists(**names) from error
            if 'is not active' in names['reason']:
                raise exception.StoragePoolInactive(**names) from error
            if _is_full(error):
                raise exception.InsufficientStoragePoolSpace(
                    **names) from error
            if volume is None:
                raise exception.StoragePoolError(**names) from error
            raise exception.StorageVolumeError(**names) from error

    def _lookup(self):
        with self._errors():
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
        with self._errors():
            return bool(pool.isActive())

    def config(self) -> 'storage_config.LibvirtConfigStoragePool':
        """The pool's XML, parsed."""
        pool = self._lookup()
        with self._errors():
            return storage_config.LibvirtConfigStoragePool.from_xml(
                pool.XMLDesc(0))

    def info(self) -> PoolInfo:
        """State and sizes of the pool, as of its last refresh or change."""
        pool = self._lookup()
        with self._errors():
            return PoolInfo(*pool.info())

    def refresh(self) -> None:
        """Let libvirt look at every file of the pool anew.

        Costs a probe of each file. What it finds is a guess, see
        LibvirtStorage.

        :raises: exception.StoragePoolError if volumes are being made or
            copied for longer than REFRESH_TIMEOUT
        """
        pool = self._lookup()
        with self._errors():
            _refresh(pool)

    def volumes(self) -> list['StorageVolume']:
        """All volumes, by one call."""
        pool = self._lookup()
        with self._errors():
            return [StorageVolume(self, _wrap(volume))
                    for volume in pool.listAllVolumes(0)]

    def volume(self, name: str) -> 'StorageVolume':
        """The volume of that name.

        :raises: exception.StorageVolumeNotFound
        """
        pool = self._lookup()
        with self._errors(name):
            return StorageVolume(self, pool.storageVolLookupByName(name))

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

    def create(self, config: 'storage_config.LibvirtConfigStorageVolume',
               prealloc_metadata: bool = False) -> 'StorageVolume':
        """Make a volume; it is Nova's to write unless config says otherwise.

        :param prealloc_metadata: write all of a qcow2 volume's tables now
        :raises: exception.StorageVolumeExists,
            exception.InsufficientStoragePoolSpace,
            exception.StorageVolumeError
        """
        libvirt = libvirt_host.libvirt
        flags = (libvirt.VIR_STORAGE_VOL_CREATE_PREALLOC_METADATA
                 if prealloc_metadata else 0)
        pool = self._lookup()
        with self._errors(config.name):
            return StorageVolume(self, pool.createXML(
                self._with_permissions(config).to_xml(), flags))

    def create_from(
            self, config: 'storage_config.LibvirtConfigStorageVolume',
            source: 'StorageVolume') -> 'StorageVolume':
        """Make a volume as a copy of another; libvirt converts the format.

        libvirt interprets the source in the format that it takes it to be
        of: the caller has to know that this is right.

        :raises: as :meth:`create` does
        """
        pool = self._lookup()
        with self._errors(config.name):
            return StorageVolume(self, pool.createXMLFrom(
                self._with_permissions(config).to_xml(), source.raw, 0))

    @staticmethod
    def _with_permissions(config):
        if config.permissions is None:
            config.permissions = _permissions(0o644)
        return config


def _is_full(error):
    libvirt = libvirt_host.libvirt
    return (error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR and
            error.get_int1() == errno.ENOSPC) or (
        os.strerror(errno.ENOSPC) in (error.get_error_message() or '') or
        'Not enough free space' in (error.get_error_message() or ''))


def _is_libvirt_error(error):
    return isinstance(error, libvirt_host.libvirt.libvirtError)


def _is_busy(error):
    # VIR_ERR_INTERNAL_ERROR, which has no meaning of its own.
    return _is_libvirt_error(error) and (
        'asynchronous jobs running' in (error.get_error_message() or ''))


# A service that has defined the pool may not have made its directory yet.
@tenacity.retry(
    retry=tenacity.retry_if_exception(_is_libvirt_error), reraise=True,
    stop=tenacity.stop_after_delay(START_TIMEOUT),
    wait=tenacity.wait_fixed(REFRESH_INTERVAL))
def _start(pool):
    if not pool.isActive():
        pool.create(0)


@tenacity.retry(
    retry=tenacity.retry_if_exception(_is_busy), reraise=True,
    stop=tenacity.stop_after_delay(REFRESH_TIMEOUT),
    wait=tenacity.wait_fixed(REFRESH_INTERVAL))
def _refresh(pool):
    pool.refresh(0)


class StorageVolume:
    """A volume of a storage pool.

    :ivar pool: the StoragePool
    :ivar raw: the libvirt.virStorageVol
    """

    def __init__(self, pool: StoragePool, raw):
        self.pool = pool
        self.raw = raw

    def _errors(self):
        return self.pool._errors(self.name)

    @functools.cached_property
    def name(self) -> str:
        return self.raw.name()

    @property
    def path(self) -> str:
        """Where the volume is on the pool's host."""
        with self._errors():
            return self.raw.path()

    @property
    def key(self) -> str:
        with self._errors():
            return self.raw.key()

    def config(self) -> 'storage_config.LibvirtConfigStorageVolume':
        """The volume's XML, parsed.

        Format and backing store are what libvirt takes the content for.
        """
        with self._errors():
            return storage_config.LibvirtConfigStorageVolume.from_xml(
                self.raw.XMLDesc(0))

    def info(self) -> VolumeInfo:
        """Type and sizes; libvirt looks at the volume's file for them."""
        with self._errors():
            return VolumeInfo(*self.raw.info())

    def physical(self) -> int:
        """The length of the volume's file in bytes.

        A byte copy takes this; :meth:`info` has what is allocated.
        """
        with self._errors():
            return self.raw.infoFlags(
                libvirt_host.libvirt.VIR_STORAGE_VOL_GET_PHYSICAL)[2]

    def resize(self, capacity: int, allocate: bool = False) -> None:
        """Give the volume another capacity.

        :param capacity: in bytes
        :param allocate: take the space from the pool now
        """
        libvirt = libvirt_host.libvirt
        flags = libvirt.VIR_STORAGE_VOL_RESIZE_ALLOCATE if allocate else 0
        with self._errors():
            self.raw.resize(capacity, flags)

    def delete(self) -> None:
        """Delete the volume, whatever its guest has written to it.

        libvirt takes a raw disk with the header of a ploop image for ploop,
        hence for a directory, and fails to delete it: on this host its file
        is deleted without libvirt. Already gone is fine.

        :raises: exception.StorageVolumeError, exception.StoragePoolError
        """
        try:
            with contextlib.suppress(exception.StorageVolumeNotFound), (
                    self._errors()):
                self.raw.delete(0)
        except exception.StorageVolumeError:
            if self.pool.host != CONF.host or not self._is_taken_for_ploop():
                raise
            self._remove_file()

    def _is_taken_for_ploop(self):
        return self.info().type == libvirt_host.libvirt.VIR_STORAGE_VOL_PLOOP

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
        self.pool.refresh()
