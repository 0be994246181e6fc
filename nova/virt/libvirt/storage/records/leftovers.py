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
"""Volumes that must be deleted yet, and their deletion; by name alone.

What a host couldn't delete, or mustn't yet, is noted in the instance's
records, with the host that is to do it. What isn't noted is never touched.
"""

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.objects import fields
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def note(disks, host, places):
    """Note volumes which a host is to delete at its next chance.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param places: iterable of (pool, volume)
    """
    disks.leftovers = [*disks.leftovers,
                       *((host, pool, volume) for pool, volume in places)]


def note_disk(disks, record):
    """Note the volume that a disk was, for its host to delete.

    What all hosts see, or is no volume, isn't noted.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param record: of the disk, with its host
    """
    if record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE:
        note(disks, record.host, [(record.pool, record.volume)])


def note_original(disks, record):
    """Note what a disk was before a move that was never confirmed.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param record: of the disk; may have no previous
    """
    kept = record.kept_copy
    if kept is not None:
        note(disks, kept.host, [(kept.pool, kept.volume)])


def note_own(disks):
    """Note what this host has begun to make, and can't delete now.

    :param disks: the instance's InstanceDisks; the caller saves them
    """
    try:
        for _name, record in disks.items():
            if record.host == CONF.host and not record.is_where_it_was:
                note_disk(disks, record)
    except exception.InvalidDiskMetadata as e:
        LOG.warning('%s', e, instance=disks.instance)


def note_swap(connection, disks):
    """Note the swap disk of a flavor which the instance doesn't have now.

    The compute manager deletes its mapping first, and so its record. What
    can't be looked for stays until the instance is deleted.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks; the caller saves them
    """
    if disks.get(metadata.SWAP) is not None:
        return
    pool = setup.pool_of(connection, metadata.SWAP)
    try:
        names = ownership.names_of(
            pool, disks.instance.uuid, metadata.SWAP)
    except exception.StoragePoolNotFound:
        return
    except exception.StoragePoolError as e:
        LOG.warning('If there is a swap disk of the former flavor, it stays '
                    'until the instance is deleted: %s', e,
                    instance=disks.instance)
        return
    note(disks, CONF.host, [(pool.name, name) for name in names])


def note_undeleted(connection, disks, keep=()):
    """Note what a rebuild or a shelve was to delete, and couldn't.

    It would be taken for the disk of an instance that is evacuated to this
    host, or to another one that sees it: the guest would go on with what was
    done away with.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks; the caller saves them. Broken
        ones are done away with.
    :param keep: (pool, volume) of those which were to stay
    """
    try:
        left = {(record.pool, record.volume) for _name, record in disks.items()
                if record.host == CONF.host and
                record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE and
                not record.is_where_it_was and
                _may_be_there(connection, record.pool, record.volume)}
    except exception.InvalidDiskMetadata:
        disks.clear()
        left = set()
    has_gone = ownership.has_gone_with_images(disks.instance)
    try:
        for volume in ownership.get_volumes(
                connection, disks.instance.uuid, disks=disks):
            place = volume.pool.name, volume.name
            if place not in keep and not (
                    volume.pool.kind().is_ceph and has_gone):
                left.add(place)
    except exception.NovaException as e:
        LOG.error('What else is left of the disks on this host is not known: '
                  '%s', e, instance=disks.instance)
    note(disks, CONF.host, sorted(left))


def _may_be_there(connection, pool_name, name):
    """Whether a volume is in its pool, or that can't be told."""
    try:
        return storage_pool.StoragePool(connection, pool_name, CONF.host).find(
            name, refresh=True) is not None
    except exception.NovaException:
        return True


def _kind_of(connection, pool_name):
    """The PoolKind of a pool, which tells what else may be seen in it."""
    try:
        return storage_pool.StoragePool(
            connection, pool_name, CONF.host).kind()
    except exception.NovaException:
        # Then nothing can be deleted there, either.
        return kinds.of_type(None)


def _outside_of_pools(disks, kind):
    """Names of an instance's disks that Nova makes itself, and no pool has.

    A pool over the same volume group, or Ceph pool, shows them all the same.

    :param kind: PoolKind of the pool that is looked into
    """
    return {'%s_%s' % (disks.instance.uuid, name)
            for name, record in disks.items()
            if kind.is_ceph and
            record.backend == fields.LibvirtDiskBackend.RBD or
            kind.is_volume_group and
            record.backend == fields.LibvirtDiskBackend.LVM and
            record.host == CONF.host}


def on_host(disks, host):
    """Return what is noted as left on a host, as list of (pool, volume)."""
    return [(pool, volume) for where, pool, volume in disks.leftovers
            if where == host]


def names(disks):
    """Return the names of all volumes that are noted as left anywhere.

    Nothing new may have such a name: it would be deleted as what is left.
    """
    return {volume for _host, _pool, volume in disks.leftovers}


def forget(disks, host, places):
    """Take volumes that are gone, or in use, off the notes.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param places: iterable of (pool, volume)
    """
    gone = {(host, pool, volume) for pool, volume in places}
    disks.leftovers = [left for left in disks.leftovers if left not in gone]


def forget_gone(connection, disks):
    """Take off the notes what this host has no more.

    One from which an instance was evacuated deletes what it has when it is
    back, and notes are the new host's to make.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks; the caller saves them
    """
    forget(disks, CONF.host, [
        (pool_name, name) for pool_name, name in on_host(disks, CONF.host)
        if not _may_be_there(connection, pool_name, name)])


def delete(connection, disks, keep=frozenset()):
    """Delete what an earlier try has left on this host and couldn't undo.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks; the caller saves them. What
        has become a disk since it was noted is no longer left.
    :param keep: set of (pool, volume) which stay for now, and noted
    """
    places = set(on_host(disks, CONF.host)) - keep
    known = [record for _name, disk in disks.items()
             for record in (disk, disk.previous) if record is not None]
    in_use = {(record.pool, record.volume) for record in known
              if record.host == CONF.host}
    on_ceph = {(record.pool, record.volume) for record in known
               if record.is_on_ceph}
    for pool in {pool for pool, _name in places}:
        kind = _kind_of(connection, pool)
        outside = _outside_of_pools(disks, kind)
        in_use |= {place for place in places if place[0] == pool and (
            kind.is_ceph and place in on_ceph or place[1] in outside)}
    still = delete_volumes(
        connection, CONF.host, places - in_use, disks.instance)
    forget(disks, CONF.host, places - set(still))


def delete_volumes(connection, host, places, instance):
    """Delete volumes by name; one that isn't there is gone.

    :param host: name of the host for messages
    :param places: iterable of (pool, volume)
    :returns: list of those that couldn't be deleted
    """
    return [(pool_name, name) for pool_name, name in places
            if not ownership.delete_named(
                storage_pool.StoragePool(connection, pool_name, host), name,
                instance)]


def refuse_given_back(connection, disks):
    """Refuse disks that a revert, cut off since, has given back.

    They are whole on the host from which they came. What has their names
    here may be gone in a moment, or is half gone.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks
    :raises: exception.DiskGivenBack
    """
    left = on_host(disks, CONF.host)
    for name, record in disks.items():
        if (record.host == CONF.host or record.is_building or
                record.backend != fields.LibvirtDiskBackend.LIBVIRT_STORAGE):
            continue
        if (record.pool, record.volume) in left or not ownership.find(
                storage_pool.StoragePool(connection, record.pool, CONF.host),
                record.volume):
            raise exception.DiskGivenBack(
                instance_uuid=disks.instance.uuid, disk=name,
                host=CONF.host, source=record.host, pool=record.pool,
                volume=record.volume)
