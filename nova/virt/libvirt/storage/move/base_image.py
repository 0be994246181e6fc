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

"""A base image which Glance no longer has, on its way between image caches.

An overlay needs the base image that it was made over. The destination of a
move fetches it from Glance; when it is gone there, the source sends its own
along with the disks.
"""

import os

from oslo_log import log as logging
from oslo_utils import uuidutils

import nova.conf
from nova import exception
from nova.objects import fields
from nova import utils
from nova.virt import images
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage import service_user

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# As a disk's name, among what is copied.
NAME = 'base'


def name_on_the_way(instance):
    """Return the volume's name until it is known to be whole.

    Nobody may take what is half there for the image.
    """
    return '%s.%s' % (imagecache.get_cache_fname(instance.image_ref),
                      instance.uuid)


def is_kept(instance, disk_name, backing_file):
    """Whether an overlay goes to another host as an overlay.

    The destination can have the instance's image alone. What is generated for
    ephemeral and swap disks, it would generate anew, with another UUID; and
    the snapshot that an instance was unshelved from is gone from Glance.
    """
    return disk_name == 'disk' and os.path.basename(backing_file) == (
        imagecache.get_cache_fname(instance.image_ref))


def find(context, instance, here, there):
    """Look for the base image that has to be sent.

    :param here: StoragePool over this host's image cache
    :param there: PeerPool over the destination's
    :returns: its StorageVolume, or None if the destination gets it otherwise
    :raises: StorageVolumeNotFound if no host has it; StoragePoolError if
        libvirt can't look for it in storage_pool.COPY_TIMEOUT seconds
    """
    if _is_available(context, instance.image_ref):
        return None
    LOG.info('Image %s is no longer available in Glance',
             instance.image_ref, instance=instance)
    name = imagecache.get_cache_fname(instance.image_ref)
    try:
        if there.has(name, refresh=True):
            return None
    except exception.StoragePoolError as e:
        # Another image is being copied there, say. What it has stays.
        LOG.info('Base image %(name)s is sent, whether or not host %(host)s '
                 'has it: %(error)s',
                 {'name': name, 'host': there.host, 'error': e},
                 instance=instance)
    try:
        return here.volume(name)
    except exception.StorageVolumeNotFound:
        # Images get into the cache without libvirt being told.
        LOG.info('Refreshing storage pool %(pool)s, so that libvirt learns of '
                 'base image %(name)s; a copy under way is waited for',
                 {'pool': here.name, 'name': name}, instance=instance)
        here.refresh(timeout=storage_pool.COPY_TIMEOUT)
        return here.volume(name)


def can_be_had(context, instance, here):
    """Whether any destination can get the base image, if only from here.

    :param here: StoragePool over this host's image cache
    """
    found, is_known = _ask_glance(context, instance)
    if found is context:
        return True
    if not is_known:
        return False
    name = imagecache.get_cache_fname(instance.image_ref)
    try:
        return ownership.find(here, name) is not None
    except exception.StoragePoolError as e:
        LOG.info("Base image %(name)s can't be sent now: %(error)s",
                 {'name': name, 'error': e}, instance=instance)
        return False


def growth_of(info) -> int:
    """How much an overlay grows that takes over all of its base image.

    :param info: what qemu-img says of the overlay
    :returns: bytes
    """
    raw = fields.LibvirtDiskFormat.RAW
    base_format = info.backing_file_format or raw
    base = images.privileged_qemu_img_info(
        info.backing_file, format=base_format)
    # What is compressed in the base isn't any more in the overlay.
    return base.disk_size if base_format == raw else base.virtual_size


def is_lost(context, instance):
    """Whether this host can get the base image from another host only."""
    return not is_cached(instance) and (
        _ask_glance(context, instance) == (None, True))


def room_to_fetch(instance, here, there):
    """How much room the destination needs to fetch the base image.

    :param here: StoragePool over this host's image cache
    :param there: PeerPool over the destination's
    :returns: bytes that it takes here; 0 if the destination has it, or if one
        of the pools can't say
    """
    name = imagecache.get_cache_fname(instance.image_ref)
    try:
        if there.has(name):
            return 0
        _length, allocation = here.volume(name).file_bytes()
    except exception.NovaException:
        return 0
    return allocation


def _is_available(context, image_id):
    """Whether the destination can fetch an image.

    Only an active one can be downloaded: one that was deactivated, say, is
    still shown to its owner.
    """
    try:
        image = images.get_info(context, image_id)
    except (exception.ImageNotFound, exception.ImageNotAuthorized):
        return False
    return image.get('status') == 'active'


def _ask_glance(context, instance):
    """Find who may fetch the base image, and whether that is all there is.

    What is in the image cache is every server's of that image. A source that
    was broken into could have its own content there, if its word were enough
    that Glance has lost the image. The request's context is the source's word
    as well, so Nova's own user is asked.

    :param context: the request's
    :returns: (a context or None, whether Glance is known to have the image or
        to have lost it: it shows users without the role admin what is theirs)
    """
    if _is_available(context, instance.image_ref):
        return context, True
    own = service_user.admin_context()
    # The ID is the source's word, too. The image API takes what has a slash
    # for the URL of another service, and would go there with Nova's token.
    if not own.auth_token or not uuidutils.is_uuid_like(instance.image_ref):
        return None, False
    if _is_available(own, instance.image_ref):
        return own, True
    return None, 'admin' in own.roles


def context_to_fetch(context, instance):
    """On the destination: find who may fetch the base image from Glance.

    :param context: the request's
    :returns: a context, or None
    """
    return _ask_glance(context, instance)[0]


def is_settled(context, instance) -> bool:
    """Whether a destination fetches the base image, or takes the source's.

    Where Glance may have it for others, it can do neither.
    """
    return _ask_glance(context, instance) != (None, False)


def is_refused(context, instance) -> bool:
    """On the destination: whether a base image that came isn't taken."""
    if _ask_glance(context, instance) == (None, True):
        return False
    LOG.warning('What has come of image %s along with the disks is not taken: '
                'Glance has it, or the user of [service_user] lacks the role '
                'admin, by which Nova could tell that Glance has lost it',
                instance.image_ref, instance=instance)
    return True


def _cached_path(instance):
    return os.path.join(imagecache.ImageCacheManager().cache_dir,
                        imagecache.get_cache_fname(instance.image_ref))


def is_cached(instance):
    """Whether the base image is in this host's image cache."""
    return os.path.exists(_cached_path(instance))


def take(instance, volume):
    """Put a base image that has come, and is whole, into the image cache.

    :param volume: its StorageVolume
    :raises: UnsafeDiskContent
    """
    content.look_at_base(volume.path)
    target = _cached_path(instance)
    name = os.path.basename(target)
    cache = imagecache.ImageCacheManager()

    @utils.synchronized(name, external=True, lock_path=cache.lock_path)
    def rename():
        if os.path.exists(target):
            volume.delete()
        else:
            os.rename(volume.path, target)

    rename()
    try:
        volume.pool.refresh()
    except exception.NovaException as e:
        # Whoever needs the image as a volume looks again.
        LOG.warning('The storage pool over the image cache could not be '
                    'refreshed after base image %(name)s was put there: '
                    '%(error)s', {'name': name, 'error': e},
                    instance=instance)
    LOG.info('Base image %s has come with the disks', name,
             instance=instance)


def pool(connection, name=None):
    """Return the StoragePool over this host's image cache."""
    return storage_pool.StoragePool(
        connection, name or CONF.libvirt.storage_base_images_pool, CONF.host)
