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
"""The images of a Ceph pool that a move has made out of disks of another kind.

An image that was made for a move is deleted by who has made it: the source, by
a storage pool of its own over the same Ceph pool, or the destination. libvirt
on the destination is never asked to: it doesn't know of the image, and what it
doesn't know it calls gone.
"""

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage.move import offer
from nova.virt.libvirt.storage.pool import ceph as ceph_pool
from nova.virt.libvirt.storage.pool import ceph_bytes
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.records import lifecycle

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def pool_over(connection, identity: str):
    """The storage pool of this host that is over a Ceph pool.

    :param connection: this host's libvirt
    :param identity: of the Ceph pool, as CephPool.identity
    :returns: a StoragePool, None if there is none
    """
    for pool in storage_pool.list_pools(connection, CONF.host):
        try:
            ceph = pool.ceph() if pool.is_active() else None
            if ceph is not None and ceph.identity == identity:
                return pool
        except exception.StoragePoolError as e:
            LOG.debug('Storage pool %(pool)s is passed over: %(error)s',
                      {'pool': pool.name, 'error': e})
    return None


def timeout() -> int:
    """How many seconds Ceph may keep silent while a guest is off."""
    return CONF.libvirt.storage_migration_stall_timeout


def image(pool, name: str) -> ceph_pool.CephImage:
    """An image, which nobody is asked about: that could take for ever.

    :param pool: the StoragePool of this host
    """
    return ceph_pool.CephImage(pool, pool.ceph(), name)


def made_here(disks) -> list[tuple[str, str]]:
    """The images of this host that go when a move is reverted.

    Where the other host has the same Ceph pool these are what the new flavor
    has brought.

    :param disks: the instance's InstanceDisks
    :returns: list of (pool, volume)
    """
    records = {name: record for name, record in disks.items()
               if record.host == CONF.host and record.is_on_ceph}
    brought = lifecycle.brought_by_resize(disks.instance)
    came = any(record.came_into_ceph for record in records.values())
    return [(record.pool, record.volume) for name, record in records.items()
            if record.came_into_ceph or record.previous is None and (
                came or name in brought)]


def verify(instance, record, pool) -> None:
    """Compare an image that has come with what the record says of it.

    :param pool: the StoragePool of this host that it is in
    :raises: exception.StorageTransferMismatch, exception.StorageCephError;
        exception.UnsafeDiskContent if it has more than is on record
    """
    expected = record.expected
    if expected is None:
        raise exception.StorageTransferMismatch(
            volume=record.volume, where=CONF.host,
            reason=_("nothing is known of its checksum"))
    if pool.ceph() is None:
        raise exception.StorageTransferMismatch(
            volume=record.volume, where=CONF.host,
            reason=_("it should be an image, and storage pool %s is over no "
                     "Ceph pool") % pool.name)
    content.look_at_raw(record.volume, expected.length, record.size)
    try:
        found = ceph_bytes.digest(
            image(pool, record.volume), expected.key, timeout())
    except exception.StorageVolumeNotFound as e:
        raise exception.StorageTransferMismatch(
            volume=record.volume, where=CONF.host, reason=e)
    if found != (expected.length, expected.checksum):
        raise exception.StorageTransferMismatch(
            volume=record.volume, where=CONF.host,
            reason=_("its size or content differs"))
    LOG.info('Image %(image)s is what was sent', {'image': record.volume},
             instance=instance)


def delete(host, disks, migration,
           places) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """On the source: delete the images that a move has made.

    :param host: the Host of this compute, whose libvirt may be away
    :param disks: the instance's InstanceDisks. What is a disk now is passed
        over: a pool may have been another one when it was noted as left.
    :param migration: the Migration that has failed
    :param places: (pool, volume) on the destination
    :returns: those in pools over Ceph that couldn't be deleted, which only
        the destination may try again; and those in other pools
    """
    instance = disks.instance
    told = offer.load(instance) if places else None
    if told is None or told.migration_id != migration.id:
        return [], list(places)
    in_use = {known.volume for _name, record in disks.items()
              for known in (record, record.previous)
              if known is not None and known.is_on_ceph and
              not known.is_building}
    others, left = [], []
    pools: dict[str, storage_pool.StoragePool | None] = {}
    for name, volume in places:
        offered = told.pools.get(name)
        identity = offered and offered.ceph
        if not identity:
            others.append((name, volume))
            continue
        if volume in in_use:
            continue
        if identity not in pools:
            pools[identity] = _pool_over(host, identity, instance)
        if pools[identity] is None:
            left.append((name, volume))
            continue
        try:
            ceph_bytes.delete(pools[identity], volume, timeout())
        except Exception as e:
            # It must not hide another one.
            LOG.error('Image %(image)s is left over: %(error)s',
                      {'image': volume, 'error': e}, instance=instance)
            left.append((name, volume))
            if isinstance(e, exception.StorageCephError):
                # A guest is waiting; the others would take as long.
                pools[identity] = None
    return left, others


def _pool_over(host, identity, instance):
    try:
        return pool_over(host.get_connection(), identity)
    except Exception as e:
        # It must not hide another one.
        LOG.error('The images that a move has made are left over: %s', e,
                  instance=instance)
        return None
