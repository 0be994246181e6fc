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

"""Which base images the volumes of a host's storage pools need."""

import os

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import usage

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def in_use(conn, host: str, cache_dir: str) -> set[str]:
    """Names of the images in the image cache that volumes are laid over.

    All volumes count, whoever owns them: a copy that is kept until a resize
    is confirmed is that of an instance which is on another host by now. So do
    the volumes of active pools which this host isn't configured to use, for
    it may have been.

    A backing file outside the image cache is ignored. That of a raw volume is
    what its guest has written, and can keep an image from being removed, but
    no more than that.

    :param conn: a libvirt.virConnect
    :param host: its name, for messages
    :param cache_dir: the directory of the image cache
    :returns: file names
    :raises: exception.StoragePoolError, exception.StorageVolumeError if a
        pool that this host uses can't be read: then nobody knows
    """
    names = set()
    cache_dir = os.path.realpath(cache_dir)
    for pool in _pools(conn, host):
        for volume in pool.volumes():
            try:
                backing = volume.config().backing_store
            except exception.StorageVolumeNotFound:
                continue  # deleted since the pool was listed
            if backing is None or not backing.path:
                continue
            directory, name = os.path.split(backing.path)
            if os.path.realpath(directory) == cache_dir:
                names.add(name)
    return names


def _pools(conn, host):
    ours = usage.pool_names()
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
            if pool.config().type not in storage_pool.SUPPORTED_TYPES:
                continue
            if not pool.is_active():
                if pool.name in ours:
                    raise exception.StoragePoolInactive(
                        pool=pool.name, host=host)
                continue
        except exception.StoragePoolNotFound:
            continue  # undefined since
        yield pool


def cache_changed(conn, host: str) -> None:
    """Let libvirt know that images came or went.

    It is no error if that isn't possible: who needs an image as a volume
    looks again.
    """
    try:
        storage_pool.StoragePool(
            conn, CONF.libvirt.storage_base_images_pool, host).refresh()
    except exception.StoragePoolError as e:
        LOG.warning('The storage pool over the image cache could not be '
                    'refreshed: %s', e)
