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

"""The image backend whose disks are volumes of storage pools over Ceph.

libvirt takes no volume of an rbd pool as the disk of a guest, copies none from
an image, and streams none. So the pool says where Ceph is, the guest is given
a network disk, and the rest is what ``images_type = rbd`` has always done; see
:mod:`nova.virt.libvirt.storage.pool.ceph`. The names are the same, too: a disk
of the one backend becomes one of the other by its record alone.
"""

import os

from oslo_log import log as logging

from nova.compute import task_states
import nova.conf
from nova import exception
from nova.objects import fields
from nova.virt.image import model as imgmodel
from nova.virt import images
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage.move import offer
from nova.virt.libvirt.storage.pool import ceph as ceph_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.records import cells
from nova.virt.libvirt.storage.records import kinds
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def bound_to(get_connection):
    """Return the image backends whose disks are in the pools of one host.

    :param get_connection: gives the connection to that host's libvirt
    :returns: by the backend that is on record. A disk that isn't on record yet
        is of the first, or of the second if its pool is over Ceph.
    """
    volumes = image.LibvirtStorage.bound_to(get_connection)
    images = type('LibvirtStorageRbd', (LibvirtStorageRbd, volumes), {})
    is_ceph: dict[str, bool] = {}

    def new(cls, instance=None, disk_name=None, path=None,
            disk_info_mapping=None):
        if (cls is volumes and disk_name is not None and
                not (disk_info_mapping or {}).get('metadata') and
                _is_on_ceph(get_connection, disk_name, is_ceph)):
            cls = images
        return object.__new__(cls)

    volumes.__new__ = staticmethod(new)
    return {volumes.RECORDED_AS: volumes, images.RECORDED_AS: images}


def _is_on_ceph(get_connection, disk_name, known):
    """Whether a disk's pool is over Ceph; asked once for each pool."""
    name = setup.pool_name_for(disk_name)
    if name not in known:
        try:
            known[name] = setup.pool_of(
                get_connection(), disk_name).kind().is_ceph
        except exception.StoragePoolError as e:
            LOG.debug('The type of storage pool %(pool)s is not known: '
                      '%(error)s', {'pool': name, 'error': e})
            return False
    return known[name]


class LibvirtStorageRbd(imagebackend.Rbd, image.LibvirtStorage):
    """A disk which is an image of the Ceph pool that a storage pool is over.

    What it does with an image is imagebackend.Rbd's, where the disk is and who
    reaches it is LibvirtStorage's.
    """

    RECORDED_AS = fields.LibvirtDiskBackend.LIBVIRT_STORAGE_RBD

    def __init__(self, *args, **kwargs):
        # Rbd's asks nova.conf where Ceph is.
        image.LibvirtStorage.__init__(self, *args, **kwargs)
        self.preallocate = False
        self.driver_io = None
        self._ceph = None

    def _get_new_format(self):
        return fields.LibvirtDiskFormat.RAW

    def _clone_or_import(self, context, image_id, *args, **kwargs):
        base = self._get_cached_path(imagecache.get_cache_fname(image_id))
        image_format = os.path.exists(base) and (
            imagebackend._get_base_format(base))
        if not image_format or image_format == fields.LibvirtDiskFormat.RAW:
            super()._clone_or_import(context, image_id, *args, **kwargs)
            return
        # Rbd would delete it, and overlays in files lie on it.
        try:
            self.clone(context, image_id)
            return
        except (exception.ImageNotFound, exception.ImageUnacceptable) as e:
            if CONF.workarounds.never_download_image_if_on_rbd:
                raise
            LOG.debug('Image %(image)s is not cloned: %(reason)s',
                      {'image': image_id, 'reason': e},
                      instance=self.instance)
        with self._scratch_file() as raw:
            images.convert_image(
                base, raw, self._inspect_base(base).file_format,
                fields.LibvirtDiskFormat.RAW)
            self.driver.import_image(raw, self.rbd_name)

    @property
    def ceph(self) -> ceph_pool.CephPool:
        """The Ceph pool that the disk is in."""
        if self._ceph is None:
            self._ceph = self._get_pool(self.pool_name).ceph()
        return self._ceph

    @property
    def driver(self):
        return self.ceph.driver

    @property
    def rbd_name(self):
        return self.volume_name

    @property
    def path(self):
        """What qemu-img calls the disk, whether or not it is there."""
        return ceph_pool.CephImage(
            None, self.ceph, self.volume_name).path

    @path.setter
    def path(self, path):
        """The record says where the disk is."""

    def exists(self):
        """Whether the disk is there and whole.

        :raises: exception.StorageCephError if Ceph doesn't say
        """
        if self.record is not None and self.record.is_building:
            # It was begun and never finished.
            return False
        return self._is_there()

    def _is_there(self):
        return self._get_pool(self.pool_name).find(
            self.volume_name) is not None

    def metadata(self, size):
        """Return a record for this disk if it were made now.

        :param size: as the other parameter of LibvirtStorage.metadata()
        """
        mapping = self.disk_info_mapping or {}
        taken = mapping.get('taken', ())
        is_evacuated = (
            self.instance.task_state == task_states.REBUILD_SPAWNING and
            self.instance.host != CONF.host)
        if ((is_evacuated or mapping.get('is_sent')) and
                self.volume_name not in taken and self._is_there()):
            # Evacuated from, or sent by, a host that had it on no record: it
            # is the disk.
            state, volume = fields.LibvirtDiskState.READY, self.volume_name
        else:
            state = fields.LibvirtDiskState.BUILDING
            volume = self._get_pool(self.pool_name).free_name(
                self.volume_name, taken)
        return metadata.LibvirtDiskMetadata(
            backend=self.RECORDED_AS, format=self._get_new_format(),
            size=size, state=state, host=CONF.host, pool=self.pool_name,
            volume=volume)

    def libvirt_info(self, *args, **kwargs):
        return imagebackend.Image.libvirt_info(self, *args, **kwargs)

    def _set_source(self, info):
        info.source_type = 'network'
        info.source_protocol = 'rbd'
        info.source_name = '%s/%s' % (self.ceph.name, self.volume_name)
        info.source_hosts = [host for host, _port in self.ceph.monitors]
        info.source_ports = [port for _host, port in self.ceph.monitors]
        if self.ceph.secret_uuid is not None:
            info.auth_secret_type = 'ceph'
            info.auth_secret_uuid = self.ceph.secret_uuid
            info.auth_username = self.ceph.user

    def get_model(self, connection):
        key = self.ceph.key()
        return imgmodel.RBDImage(
            self.rbd_name, self.ceph.name, self.ceph.user,
            key and key.encode(),
            ['%s:%s' % (ceph_pool.bracketed(host), port)
             for host, port in self.ceph.monitors])

    def _verify_size(self, base, size, is_new):
        # A disk stays as large as it is, whatever flavor it gets.
        if is_new:
            super()._verify_size(base, size, is_new)

    # What a revert of a resize goes back to

    def create_snap(self, name):
        # What this was converted from is kept until the resize is confirmed.
        # So is the image of the other cell, for whose instance it is made.
        if self.record is None or not (
                self.record.came_into_ceph or self.record.is_building):
            # One that a resize has left is of that time.
            self.remove_snap(name, ignore_errors=True)
            with self.ceph.errors(self.volume_name):
                super().create_snap(name)

    def remove_snap(self, name, ignore_errors=False):
        with self.ceph.errors(self.volume_name):
            super().remove_snap(name, ignore_errors)

    def rollback_to_snap(self, name):
        # The source of a move that is undone when its service starts has no
        # snapshot of it: the destination makes that. One in another cell has
        # an image of its own.
        if (self.instance.task_state == task_states.RESIZE_REVERTING and
                not self._was_copied() and
                not cells.has_two(self.instance)):
            with self.ceph.errors(self.volume_name):
                super().rollback_to_snap(name)

    def _was_copied(self):
        """Whether the guest has run with a copy outside of this Ceph pool."""
        told = offer.load(self.instance)
        pool = told and told.pools.get(told.pool_for(
            kinds.of(self.disk_name)))
        return pool is not None and pool.ceph != self.ceph.identity

    def discard(self):
        self.delete()
