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

"""The image backend whose disks are volumes of libvirt storage pools.

What a disk is (which volume of which pool, in which format) is said by its
record, see :mod:`nova.virt.libvirt.storage.records.metadata`.
libvirt looks into the files of a pool when it refreshes the pool, and
believes a header which a guest has written to the start of its raw disk. So
whatever interprets the content of a volume is told the record's format, and
libvirt itself is asked to interpret it only when it is of the same opinion.
"""

import contextlib
import os

from oslo_concurrency import processutils
from oslo_log import log as logging
from oslo_utils import fileutils
from oslo_utils import strutils

from nova.compute import utils as compute_utils
import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
import nova.privsep.qemu
import nova.privsep.storage
from nova.virt.disk import api as disk_api
from nova.virt.image import model as imgmodel
from nova.virt import images
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.pool import access
from nova.virt.libvirt.storage.pool import clearing
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import stream as upload
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

RAW = fields.LibvirtDiskFormat.RAW
QCOW2 = fields.LibvirtDiskFormat.QCOW2

# Disks which are copies of an image. All others are generated.
_IMAGE_DISKS = ('disk', 'disk.rescue')


def record_of(disk):
    """Return a record for a volume which a guest runs with.

    :param disk: The LibvirtConfigGuestDisk, its source_type ``volume``.
    :return: A LibvirtDiskMetadata which says where the volume is and which
        format the guest is told.
    """
    return metadata.LibvirtDiskMetadata(
        backend=fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
        format=disk.driver_format, size=None,
        state=fields.LibvirtDiskState.READY, host=CONF.host,
        pool=disk.source_pool, volume=disk.source_volume)


class LibvirtStorage(imagebackend.Image):
    """A disk which is a volume of a storage pool.

    Use :meth:`bound_to` to get a class whose disks are on a host.
    """

    RECORDED_AS = fields.LibvirtDiskBackend.LIBVIRT_STORAGE

    _get_connection = None

    @classmethod
    def bound_to(cls, get_connection):
        """Return this class for the disks of one host.

        The signature of image backends has no place for the host.

        :param get_connection: Function which returns the connection to that
            host's libvirt, a libvirt.virConnect.
        :return: A subclass.
        """
        return type(cls.__name__, (cls,),
                    {'_get_connection': staticmethod(get_connection)})

    def __init__(self, instance=None, disk_name=None, path=None,
                 disk_info_mapping=None):
        """Describe a disk. Neither libvirt nor any file is touched.

        :param instance: The instance which owns the disk.
        :param disk_name: Name of the disk, e.g. ``disk`` or ``disk.eph0``.
        :param path: Path of the volume, if that is known already.
        :param disk_info_mapping: The disk's part of disk_info['mapping'], its
            record in ``metadata``.
        """
        self.instance = instance
        self.disk_name = disk_name
        super().__init__(path, 'volume', self._get_new_format(),
                         disk_info_mapping=disk_info_mapping)
        self.preallocate = (
            strutils.to_slug(CONF.preallocate_images) == 'space')
        if self.preallocate:
            self.driver_io = "native"

    def _get_new_format(self):
        if self.disk_name is None or CONF.libvirt.storage_raw_files and not (
                self._is_new_overlay()):
            return RAW
        # Its header is ours, whatever the guest writes.
        return QCOW2

    def _is_new_overlay(self):
        return self.disk_name in _IMAGE_DISKS and CONF.use_cow_images

    # Where the disk is

    def _get_pool(self, name):
        return storage_pool.StoragePool(
            self._get_connection(), name, CONF.host)

    def _kind(self):
        """Return what libvirt can do with the pool which the disk is in."""
        return self._get_pool(self.pool_name).kind()

    @property
    def pool_name(self):
        """Name of the pool which the disk is in."""
        if self.record is not None and self.record.pool:
            return self.record.pool
        return setup.pool_name_for(self.disk_name)

    @property
    def volume_name(self):
        """Name of the volume which the disk is."""
        if self.record is not None and self.record.volume:
            return self.record.volume
        return '%s_%s' % (self.instance.uuid, self.disk_name)

    def _get_volume(self):
        return self._get_pool(self.pool_name).volume(self.volume_name)

    @property
    def path(self):
        """Path of the volume on this host, or None if there is no volume."""
        if self._path is None:
            try:
                self._path = self._get_volume().path
            except exception.StorageVolumeNotFound:
                pass
        return self._path

    @path.setter
    def path(self, path):
        self._path = path

    def exists(self):
        """Whether the disk is there and whole."""
        if (self.record is not None and
                self.record.state == fields.LibvirtDiskState.BUILDING):
            # It was begun and never finished.
            return False
        try:
            self._get_volume()
        except exception.StorageVolumeNotFound:
            return self.record is not None and self._exists_unknown()
        return True

    def _exists_unknown(self):
        # The record says that there is a disk. Another host may have made it
        # in a pool that both see, and libvirt has not looked there since.
        pool = self._get_pool(self.pool_name)
        if self.volume_name not in pool.file_names():
            return False
        LOG.info('Refreshing storage pool %(pool)s, so that libvirt learns of '
                 'volume %(volume)s; a copy under way is waited for',
                 {'pool': self.pool_name, 'volume': self.volume_name},
                 instance=self.instance)
        pool.refresh(timeout=storage_pool.COPY_TIMEOUT)
        try:
            self._get_volume()
        except exception.StorageVolumeNotFound:
            return False
        return True

    def metadata(self, size):
        """Return a record for this disk if it were made now.

        :param size: Size of the disk in bytes.
        :return: A LibvirtDiskMetadata in state ``building``. Its volume has a
            name which nothing has in that pool.
        """
        pool_name = setup.pool_name_for(self.disk_name)
        pool = self._get_pool(pool_name)
        # While a resize is not confirmed, or in a pool which hosts share,
        # there is another disk of that name.
        volume_name = pool.free_name(
            '%s_%s' % (self.instance.uuid, self.disk_name),
            {*(self.disk_info_mapping or {}).get('taken', ()),
             *pool.names_in_directory()})
        return metadata.LibvirtDiskMetadata(
            backend=fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
            format=(self._get_new_format() if pool.kind().has_overlays
                    else RAW),
            size=size, state=fields.LibvirtDiskState.BUILDING, host=CONF.host,
            pool=pool_name, volume=volume_name)

    # How libvirt is told

    def libvirt_info(self, *args, **kwargs):
        info = super().libvirt_info(*args, **kwargs)
        # QEMU has no native I/O through the host's page cache.
        if info.driver_cache in ('none', 'directsync') and (
                not self._kind().sparse):
            # No write has to wait for blocks to be allocated.
            info.driver_io = 'native'
        return info

    def _set_source(self, info):
        info.source_type = 'volume'
        info.source_pool = self.pool_name
        info.source_volume = self.volume_name

    def get_model(self, connection):
        return imgmodel.LocalFileImage(self.path, self.driver_format)

    # How it comes into being

    def create_from_image(self, context, image_id, size, trusted_certs=None,
                          fallback_from_host=None, convert=True):
        if self.exists():
            backing_file = self.get_backing_file()
            if backing_file and os.path.basename(backing_file) == (
                    imagecache.get_cache_fname(image_id)):
                # It may not have come along with the disk.
                base = self.ensure_image_cached(
                    context, image_id, trusted_certs, fallback_from_host,
                    convert)
                image_cache.lay_over(
                    self._get_volume(), content.look_at_qcow2(self.path), base,
                    imagebackend._get_base_format(base), self.instance)
            self._grow(size)
            # A copy that has come from another host has holes.
            if size:
                self._preallocate(size)
            return

        base = self.ensure_image_cached(
            context, image_id, trusted_certs, fallback_from_host, convert)
        imagebackend._update_utime_ignore_eacces(base)
        base_info = self._inspect_base(base)
        self.verify_base_size(base, size, base_size=base_info.virtual_size)
        capacity = size or base_info.virtual_size
        if self.driver_format == QCOW2 and self._is_new_overlay():
            with self._created(self._create_overlay, base,
                               base_info.file_format, capacity):
                self._preallocate(capacity)
        else:
            with self._created(self._create_copy, base, base_info,
                               capacity) as volume:
                # qemu-img rounds the length of a raw image up.
                clearing.clear_rest(
                    volume, base_info.virtual_size
                    if base_info.file_format != RAW else os.path.getsize(base))
                # A conversion ignores the capacity that is asked for.
                self._grow(capacity)
                if self.driver_format == QCOW2:
                    self._preallocate(capacity)

    def create_from_func(self, func, size, cache_name=None, context=None):
        if self.exists():
            self._grow(size)
            # A copy that has come from another host has holes.
            if size:
                self._preallocate(size)
            return

        with self._scratch_file() as generated:
            func(target=generated)
            length = os.path.getsize(generated)
            with self._created(self._create_empty,
                               max(size or 0, length)) as volume:
                self._write(volume, generated, RAW)
                clearing.clear_rest(volume, length)
                self._grow(size)
                self._preallocate(size or length)

    @contextlib.contextmanager
    def _scratch_file(self):
        """Give the path of a file for what becomes the disk's content.

        The volume may be anybody's, so it is made elsewhere.
        """
        path = os.path.join(libvirt_utils.get_instance_path(self.instance),
                            self.volume_name + '.part')
        fileutils.ensure_tree(os.path.dirname(path))
        try:
            yield path
        finally:
            fileutils.delete_if_exists(path)

    def _write(self, volume, path, source_format):
        """Write an image to a new volume of the disk's format."""
        if self.driver_format == QCOW2:
            with compute_utils.disk_ops_semaphore:
                nova.privsep.qemu.fill_image(
                    path, source_format, volume.path, QCOW2)
            return
        if source_format == RAW:
            self._upload(volume, path)
            return
        with self._scratch_file() as converted:
            images.convert_image(path, converted, source_format, RAW)
            self._upload(volume, converted)

    def _upload(self, volume, path):
        # A hole gives back what was allocated to the volume. It is allocated
        # anew afterwards.
        upload.upload_file(volume, path, sparse=True)

    def _preallocate(self, size):
        # As nova alone it would fail in a directory or on a file that is not
        # nova's, as a disk isn't that has run where libvirt keeps no owners.
        if not self.preallocate or not self._kind().sparse:
            return
        try:
            nova.privsep.storage.allocate(self.path, size)
        except processutils.ProcessExecutionError as e:
            if 'not supported' not in (e.stderr or ''):
                raise
            LOG.warning("Volume %(volume)s of storage pool %(pool)s is not "
                        "preallocated: the pool's file system can't do so",
                        {'volume': self.volume_name, 'pool': self.pool_name},
                        instance=self.instance)

    def _ensure_cached(self, func, cache_name):
        known = os.path.exists(self._get_cached_path(cache_name))
        base = super()._ensure_cached(func, cache_name)
        if not known:
            image_cache.cache_changed(self._get_connection(), CONF.host)
        return base

    def _get_base_pool(self):
        return self._get_pool(CONF.libvirt.storage_base_images_pool)

    def _inspect_base(self, base):
        """Check an image in the image cache before a disk is made of it.

        :param base: Path of the image.
        :return: What qemu-img says of it, given its format.
        :raises: exception.InvalidDiskInfo if it is not safe to use
        """
        # NOTE(danms): We do this each time because additional safety
        # checks could have been added since we downloaded the image.
        content.look_at_base(base)
        info = images.qemu_img_info(
            base, format=imagebackend._get_base_format(base))
        if info.file_format == 'vmdk':
            images.check_vmdk_image('base', info)
        data = (info.format_specific or {}).get('data') or {}
        if info.backing_file is not None or data.get('data-file'):
            LOG.warning('Base image %s depends on another file', base)
            raise exception.InvalidDiskInfo(
                reason=_('Base image failed safety check'))
        return info

    @contextlib.contextmanager
    def _created(self, create, *args):
        """Create the volume, and remove it again if the rest fails.

        What an earlier try has left was deleted before this one began: what
        has the name now is another host's, and stays.

        :raises: exception.StorageVolumeExists and others
        """
        volume = create(*args)
        self._path = volume.path
        try:
            yield volume
        except BaseException:
            LOG.info('Removing volume %(volume)s from storage pool %(pool)s, '
                     'as it could not be finished',
                     {'volume': self.volume_name, 'pool': self.pool_name},
                     instance=self.instance)
            try:
                volume.delete()
            except exception.NovaException as e:
                LOG.warning('Volume %(volume)s of storage pool %(pool)s is '
                            'left over: %(error)s',
                            {'volume': self.volume_name,
                             'pool': self.pool_name, 'error': e},
                            instance=self.instance)
            raise

    def _get_config(self, capacity):
        config = storage_config.LibvirtConfigStorageVolume()
        config.name = self.volume_name
        config.capacity = capacity
        config.allocation = capacity if self.preallocate else 0
        config.target_format = self.driver_format
        if self.driver_format == QCOW2:
            config.compat = '1.1'
        return config

    def _create_empty(self, capacity):
        # Without qcow2's tables: QEMU takes all that they map for data, and a
        # live migration would copy the whole disk.
        return self._get_pool(self.pool_name).create(
            self._get_config(capacity))

    def make_private(self, base: str, base_format: str,
                     capacity: int) -> None:
        """Make an overlay anew, as a file that nova alone may read.

        Whoever has opened the one before, as anybody may, reads nothing that
        is written to it afterwards. QEMU may read it: libvirt gives it what a
        guest is started with.

        :param base: path of its base image
        :param base_format: that image's format
        :param capacity: of the disk, in bytes
        :raises: exception.StorageVolumeError, exception.StoragePoolError;
            there may be no disk then
        """
        self._get_volume().delete()
        self._create_overlay(base, base_format, capacity, mode=0o600)

    def _create_overlay(self, base, base_format, capacity, mode=None):
        config = self._get_config(capacity)
        if mode is not None:
            config.permissions = storage_pool.permissions(mode)
        # The blocks that the overlay will need are reserved afterwards:
        # qemu-img has no preallocation beside a backing file.
        config.allocation = 0
        config.backing_store = (
            storage_config.LibvirtConfigStorageBackingStore())
        config.backing_store.path = base
        config.backing_store.format = base_format
        return self._get_pool(self.pool_name).create(config)

    def _create_copy(self, base, base_info, capacity):
        source = self._find_base_volume(base)
        if source is None:
            return self._upload_copy(base, base_info, capacity)
        source_format = source.config().target_format
        if source_format == base_info.file_format:
            return self._get_pool(self.pool_name).create_from(
                self._get_config(capacity), source)
        # E.g. an ISO 9660 file system, which is raw to qemu.
        LOG.info('libvirt takes base image %(base)s for %(theirs)s, but it is '
                 '%(ours)s; converting it without libvirt',
                 {'base': base, 'theirs': source_format,
                  'ours': base_info.file_format}, instance=self.instance)
        return self._upload_copy(base, base_info, capacity)

    def _upload_copy(self, base, base_info, capacity):
        with self._created(self._create_empty, capacity) as volume:
            self._write(volume, base, base_info.file_format)
        return volume

    def _find_base_volume(self, base):
        """Return the base image's volume, which is copied fastest.

        :return: None if libvirt doesn't know it. While another image is
            copied, for hours perhaps, libvirt doesn't look for new ones.
        """
        pool = self._get_base_pool()
        name = os.path.basename(base)
        try:
            try:
                return pool.volume(name)
            except exception.StorageVolumeNotFound:
                # Images get into the cache without libvirt being told.
                pool.refresh(timeout=0)
                return pool.volume(name)
        except (exception.StoragePoolError,
                exception.StorageVolumeError) as e:
            LOG.info('Base image %(base)s is copied without libvirt: '
                     '%(error)s', {'base': base, 'error': e},
                     instance=self.instance)
            return None

    # What happens to it afterwards

    def _get_libvirt_format(self, volume):
        """Return the format which libvirt takes a volume to be of."""
        config = volume.config()
        libvirt_format = config.target_format
        if config.encryption is not None:
            # It calls LUKS raw, but insists on the key.
            libvirt_format = config.encryption.format or 'encrypted'
        if libvirt_format != self.driver_format:
            LOG.warning(
                'Volume %(volume)s of storage pool %(pool)s is %(ours)s, but '
                'libvirt takes it for %(theirs)s, which is not acted upon.',
                {'volume': volume.name, 'pool': self.pool_name,
                 'ours': self.driver_format, 'theirs': libvirt_format},
                instance=self.instance)
        return libvirt_format

    def get_disk_size(self, name):
        """Return the virtual size of the disk in bytes.

        :param name: Ignored, as the disk knows its volume.
        """
        volume = self._get_volume()
        if self.driver_format == RAW:
            # What libvirt calls the capacity may be read from a header that
            # the guest has written.
            return volume.physical()
        if self._get_libvirt_format(volume) != QCOW2:
            # To libvirt it is as large as its file.
            return content.look_at_qcow2(volume.path).virtual_size
        return volume.info().capacity

    def _grow(self, size):
        if size and size > self.get_disk_size(self.volume_name):
            self.resize_image(size)

    def resize_image(self, size):
        volume = self._get_volume()
        # libvirt resizes what it takes the content for. What a guest may have
        # written to its raw disk it isn't even asked about.
        if not self._kind().resizes or (
                self.driver_format == QCOW2 and
                self._get_libvirt_format(volume) == QCOW2):
            volume.resize(size)
        else:
            self._resize_file(volume.path, size)
        self._preallocate(size)
        if self.driver_format == RAW:
            self._resize_file_system(volume.path)

    def _resize_file(self, path, size):
        nova.privsep.qemu.resize_image(path, self.driver_format, size)

    def _resize_file_system(self, path):
        # As for legacy disks: a file system which fills the disk, without a
        # partition table, grows along.
        model = imgmodel.LocalFileImage(path, imgmodel.FORMAT_RAW)
        if not os.access(path, os.W_OK):
            # Nova doesn't read what a guest has written as root.
            LOG.warning('User %(user)s can not write to %(path)s, so a file '
                        'system on the whole disk is not grown with it. Its '
                        'guest can: resize2fs',
                        {'user': access.user(), 'path': path},
                        instance=self.instance)
            return
        if disk_api.is_image_extendable(model):
            try:
                disk_api.resize2fs(path, check_exit_code=[0])
            except processutils.ProcessExecutionError as e:
                LOG.debug('Resizing the file system with resize2fs has '
                          'failed with error: %s', e, instance=self.instance)

    def flatten(self):
        """Make the disk independent of its base image.

        That of a disk which is made from a temporary snapshot is gone soon.
        """
        if self.get_backing_file():
            with compute_utils.disk_ops_semaphore:
                nova.privsep.qemu.flatten_image(self.path, self.driver_format)

    def snapshot_extract(self, target, out_format):
        volume = self._get_volume()
        # Nothing but what nova has made is read along with it.
        self.get_backing_file()
        if out_format == 'iso':
            # ISO is just raw to qemu-img
            out_format = RAW
        images.convert_image(
            volume.path, target, self.driver_format, out_format,
            run_as_root=not os.access(volume.path, os.R_OK),
            compress=CONF.libvirt.snapshot_compression and
            out_format == QCOW2)

    def get_backing_file(self):
        """Return the path of the base image, which is nova's own.

        :return: None if the disk does not depend on any.
        :raises: exception.BaseImageMisplaced if there is a foreign backing
            file, exception.UnsafeDiskContent if there is another foreign file
        """
        if self.driver_format != QCOW2:
            return None
        # QEMU may have written the header, and root reads what it names.
        info = content.look_at_qcow2(self.path)
        if info.backing_file is None:
            return None
        try:
            return image_cache.checked_base(info.backing_file)
        except exception.BaseImageMisplaced as e:
            # Some callers swallow the error, so the log has it as well.
            LOG.error('Volume %(volume)s of storage pool %(pool)s can not be '
                      'used: %(error)s',
                      {'volume': self.volume_name, 'pool': self.pool_name,
                       'error': e}, instance=self.instance)
            raise

    def delete(self):
        """Delete the disk's volume. It is not an error if there is none."""
        try:
            self._get_volume().delete()
        except exception.StorageVolumeNotFound:
            pass
