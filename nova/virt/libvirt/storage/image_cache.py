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

"""The base images that disks are laid over: where, and which are needed."""

import os

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.objects import fields
import nova.privsep.qemu
import nova.privsep.storage
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def checked_base(path: str, cache_dir: str | None = None) -> str:
    """Check that a backing file is a base image that Nova itself keeps.

    Compared are places and not spellings: the image cache may be reached by a
    symbolic link. Where its path has changed, older disks are still laid over
    images in the former directory, which bears a mark.

    :param path: the absolute path that the disk's header names
    :param cache_dir: the image cache's directory, if it isn't that of this
        host's settings
    :returns: the path, normalized
    :raises: exception.BaseImageMisplaced
    """
    if cache_dir is None:
        cache_dir = os.path.join(
            CONF.instances_path, CONF.image_cache.subdirectory_name)
    path = os.path.normpath(path)
    directory = os.path.realpath(os.path.dirname(path))
    if not os.path.isabs(path) or (
            directory != os.path.realpath(cache_dir) and
            not _is_marked(directory)):
        raise exception.BaseImageMisplaced(
            file=path, cache=cache_dir, host=CONF.host, mark=setup.CACHE_MARK)
    return path


def look_at_overlay(path: str, size: int = 0):
    """Refuse a qcow2 file that QEMU, or root, had better not open.

    :param path: of the file on this host
    :param size: bytes of virtual size that it may have at most, 0 for any
    :returns: what qemu-img says of it, an imageutils.QemuImgInfo; its
        backing file, if it has one, is a base image that Nova itself keeps
    :raises: exception.UnsafeDiskContent, exception.BaseImageMisplaced
    """
    info = content.look_at_qcow2(path, size)
    if info.backing_file:
        checked_base(info.backing_file)
    return info


def lay_over(volume, info, base: str, base_format: str, instance) -> None:
    """Have an overlay's header name the base image as this host has it.

    Two caches have one content under one name; the directory may differ, and
    with force_raw_images the format. Under another format's name the guest
    would get the bytes of the file for those of the image.

    :param volume: the StorageVolume; nobody uses it
    :param info: what qemu-img says of it, an imageutils.QemuImgInfo
    :param base: path of the base image
    :param base_format: its format
    """
    if (base, base_format) == (info.backing_file, info.backing_file_format):
        return
    LOG.info('Base image of volume %(volume)s: %(base)s (%(format)s) instead '
             'of %(old)s (%(old_format)s)',
             {'volume': volume.name, 'base': base, 'format': base_format,
              'old': info.backing_file,
              'old_format': info.backing_file_format}, instance=instance)
    nova.privsep.qemu.rewrite_backing_file(
        volume.path, fields.LibvirtDiskFormat.QCOW2, base, base_format)
    try:
        # libvirt would go on to look for the base image where the other host
        # has it, and fail whenever it is asked about the volume.
        volume.pool.refresh()
    except exception.NovaException as e:
        LOG.warning('Storage pool %(pool)s could not be refreshed after the '
                    'base image of volume %(volume)s was renamed: %(error)s',
                    {'pool': volume.pool.name, 'volume': volume.name,
                     'error': e}, instance=instance)


def _is_marked(directory):
    return os.path.isfile(os.path.join(directory, setup.CACHE_MARK))


def in_use(conn, host: str, cache_dir: str) -> set[str]:
    """Names of the images in the image cache that volumes are laid over.

    All volumes count, whoever owns them: a copy that is kept until a resize
    is confirmed is that of an instance which is on another host by now. So do
    the volumes of pools which this host isn't configured to use, for it may
    have been. Of those that are off, what can be read counts.

    A backing file outside the image cache is ignored. That of a raw volume is
    what its guest has written, and can keep an image from being removed, but
    no more than that: libvirt isn't asked about a volume, as it might fail, or
    open what the guest has named.

    :param conn: a libvirt.virConnect
    :param host: its name, for messages
    :param cache_dir: the directory of the image cache
    :returns: file names
    :raises: exception.StoragePoolError if a pool that this host uses, or a
        file there, can't be read, so that the answer is not known
    """
    names = set()
    cache_dir = os.path.realpath(cache_dir)
    for backing in _backing_files(conn, host):
        directory, name = os.path.split(backing)
        if os.path.realpath(directory) == cache_dir:
            names.add(name)
    return names


def _backing_files(conn, host):
    ours = setup.pool_names()
    try:
        pools = storage_pool.list_pools(conn, host)
    except exception.StoragePoolError as e:
        if CONF.libvirt.images_type == 'libvirt-storage':
            raise
        # libvirt's storage driver is a daemon of its own, that a host
        # without storage pools need not run.
        LOG.debug('No storage pools: %s', e)
        return
    for pool in pools:
        if pool.name == CONF.libvirt.storage_base_images_pool:
            continue
        try:
            if not pool.kind().holds_disks:
                continue
            is_active = pool.is_active()
            if not is_active and pool.name in ours:
                raise exception.StoragePoolInactive(pool=pool.name, host=host)
        except exception.StoragePoolNotFound:
            continue  # undefined since
        try:
            yield from pool.backing_files().values()
        except exception.StoragePoolError as e:
            if is_active and (pool.name in ours or _may_hold_disks(pool)):
                raise
            # It may be any operator's, and be gone for good.
            LOG.debug('Storage pool %(pool)s is passed over: %(error)s',
                      {'pool': pool.name, 'error': e})


def _may_hold_disks(pool):
    """Whether a pool has volumes of instances, as libvirt saw it last."""
    try:
        return any(ownership.OWNED.fullmatch(volume.name)
                   for volume in pool.volumes())
    except exception.StoragePoolError:
        return True


def cache_changed(conn, host: str) -> None:
    """Let libvirt know that images came or went.

    It is no error if that isn't possible, for instance while an image is
    copied: whoever needs one as a volume looks again.
    """
    try:
        storage_pool.StoragePool(
            conn, CONF.libvirt.storage_base_images_pool, host).refresh(
                timeout=0)
    except exception.StoragePoolError as e:
        LOG.info('The storage pool over the image cache could not be '
                 'refreshed: %s', e)
