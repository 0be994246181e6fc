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
"""The start of an instance whose image has a memory, for the driver."""

import os

from nova.compute import vm_states
import nova.conf
from nova.i18n import _
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.live_image import boot
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import store
from nova.virt.libvirt.storage.pool import setup

CONF = nova.conf.CONF


def open_store(image_api) -> store.Store:
    """The memories in Glance, and in the image cache of this host."""
    return store.Store(image_api, os.path.join(
        imagecache.ImageCacheManager().cache_dir, 'live'))


class Spawn:
    """One instance's start from the memory of its image."""

    def __init__(self, live: boot.LiveBoot):
        self._live = live

    def define(self, own: str, root) -> str:
        """Put the memory into the root disk.

        :param own: the XML that the driver would start the instance with
        :param root: the Image of the root disk, which was made just now
        :returns: the XML to define the guest with
        :raises: exception.LiveImageUnusable, OSError
        """
        self._live.write_root(root)
        self._own = own
        self._xml = self._live.define(own)
        return self._xml

    def launch(self, guest, make_config_drive, pause: bool) -> None:
        """Let the defined guest go on.

        :param make_config_drive: makes the last of its disks, before it is
            given all that it has not had when it was saved
        :param pause: whether it is to stay paused, as it comes
        :raises: exception.LiveImageUnusable
        """
        self._live.start(guest, self._xml)
        make_config_drive()
        self._live.give_devices(guest, self._own)
        if not pause:
            guest.resume()


def _check_pool(host):
    """Nothing but an overlay can hold a memory.

    :raises: memory_file.Unusable, before anything is fetched or made;
        exception.StoragePoolError
    """
    pool = setup.pool_of(host.get_connection(), 'disk')
    if not pool.kind().has_overlays:
        raise memory_file.Unusable(_(
            'root disks are made in storage pool %s there, which holds no '
            'overlays; it takes one of files') % pool.name)
    if not CONF.use_cow_images:
        raise memory_file.Unusable(_('use_cow_images is not set there'))


def prepare(host, image_api, context, instance) -> Spawn | None:
    """Fetch the memory that an instance is to go on from, and check it.

    :param host: the Host
    :returns: None if its image has none, or it is built for another reason,
        such as being rebuilt or unshelved
    :raises: exception.LiveImageUnusable, exception.StoragePoolError; what the
        image API raises
    """
    memory_id = instance.system_metadata.get('image_' + store.MEMORY_ID)
    if not memory_id or instance.vm_state != vm_states.BUILDING:
        return None
    with boot.unusable(instance):
        if not CONF.libvirt.live_images:
            raise memory_file.Unusable(
                _('[libvirt]/live_images is not set there'))
        if CONF.libvirt.images_type != 'libvirt-storage':
            raise memory_file.Unusable(
                _('[libvirt]/images_type is not libvirt-storage there'))
        _check_pool(host)
        disk = image_api.get(context, instance.image_ref)
        if disk['properties'].get(store.MEMORY_ID) != memory_id:
            raise memory_file.Unfit(_('the image was changed meanwhile'))
        memories = open_store(image_api)
        memories.check(disk, memory_id, instance.project_id)
        path = memories.fetch(memory_id)
    live = boot.LiveBoot(host, instance, path)
    live.check_host()
    return Spawn(live)
