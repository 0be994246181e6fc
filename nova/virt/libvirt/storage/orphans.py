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
"""Volumes, and directories, on a host that none of its instances has.

A host that was away when an instance was confirmed, or deleted on another
host, keeps volumes which nobody asks it to delete any more, and the instance's
directory. They are told by the UUID that their names begin with; only what is
certain is ever deleted.
"""

import enum
import typing as ty

from oslo_log import log as logging
from oslo_serialization import jsonutils

from nova.compute import task_states
from nova.compute import vm_states
import nova.conf
from nova import exception
from nova.i18n import _
from nova import objects
from nova.virt.libvirt.storage import instance_directories as directories
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import sharing
from nova.virt.libvirt.storage.records import keeping
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Instances that are asked for in one message.
_AT_ONCE = 200

# Seconds after which nobody looks for a probe any more: each is the matter of
# one call between hosts.
_PROBE_AGE = 3600

_MOVING = (*task_states.resizing_states, task_states.RESIZE_CONFIRMING,
           task_states.RESIZE_REVERTING, task_states.MIGRATING)


class Kind(enum.Enum):
    """Why a volume is there. Only what is left over is deleted."""
    LEFT_OVER = 'left over'
    MOVE = 'wanted by a move'
    REVERT = 'kept for revert'
    KEPT = 'kept for the next move'
    UNKNOWN = 'unknown'


class Orphan(ty.NamedTuple):
    """A volume, or a directory, whose instance is not on this host.

    :ivar pool: name of the storage pool; None of a directory
    :ivar volume: the volume's name; the directory's path
    :ivar instance_uuid: whose it was
    :ivar kind: a Kind
    """
    pool: str | None
    volume: str
    instance_uuid: str
    kind: Kind


class Unread(ty.NamedTuple):
    """A storage pool, or instances_path, that was passed over, and why."""
    pool: str
    reason: str


def find(context, connection, own,
         unread: list[Unread] | None = None) -> list[Orphan]:
    """List the volumes and directories of instances not on this host.

    :param context: an admin's
    :param connection: this host's libvirt
    :param own: UUIDs of the instances that are, or are about to be, here
    :param unread: gets the pools that are off or can't be read, if given
    :returns: sorted by pool and volume
    """
    unread = [] if unread is None else unread
    return sorted(_find(context, connection, own, _directories(unread),
                        unread),
                  key=lambda orphan: (orphan.pool or '', orphan.volume))


def _find(context, connection, own, of_instances,
          unread) -> ty.Iterator[Orphan]:
    """Find them, one instance after the other."""
    by_uuid: dict[str, list[tuple[str | None, str]]] = {}
    for path, uuid in of_instances:
        if uuid not in own:
            by_uuid.setdefault(uuid, []).append((None, path))
    for pool in storage_pool.list_pools(connection, CONF.host):
        for uuid, name in _owned(context, pool, own, unread):
            by_uuid.setdefault(uuid, []).append((pool.name, name))
    elsewhere = _elsewhere(context, [
        uuid for uuid, places in by_uuid.items()
        if not any(pool is None or sharing.is_probe(volume)
                   for pool, volume in places)])
    for uuid, places in by_uuid.items():
        kinds = (_unknown if uuid in elsewhere else
                 _kinds_of(context, connection, uuid))
        for place in places:
            yield Orphan(*place, uuid, kinds(place))


def _owned(context, pool, own, unread) -> list[tuple[str, str]]:
    """UUID and name of what is in a pool, of instances not on this host."""
    matches = [ownership.OWNED.fullmatch(name)
               for name in _names(pool, unread)]
    found = [(match['uuid'], match.string) for match in matches
             if match and match['uuid'] not in own]
    if not found or not pool.kind().is_ceph:
        return found
    # Of what is every host's, or another cloud's, that which nobody has.
    gone = _deleted(context, sorted({uuid for uuid, _name in found}))
    return [(uuid, name) for uuid, name in found if uuid in gone]


def _deleted(context, uuids) -> set[str]:
    """Those instances that are deleted, and were on no other host then."""
    found = set()
    context = context.elevated(read_deleted='only')
    for start in range(0, len(uuids), _AT_ONCE):
        found.update(
            instance.uuid for instance in objects.InstanceList.get_by_filters(
                context, {'uuid': uuids[start:start + _AT_ONCE],
                          'deleted': True, 'soft_deleted': False},
                expected_attrs=[])
            if instance.host in (None, CONF.host))
    return found


def _elsewhere(context, uuids) -> set[str]:
    """Those instances that other hosts have, with no word of this one.

    In a pool that hosts share, nearly all are such: many are asked for at
    once, and none of them again.
    """
    found, here = set(), jsonutils.dumps(CONF.host)
    for start in range(0, len(uuids), _AT_ONCE):
        asked = uuids[start:start + _AT_ONCE]
        mappings = objects.BlockDeviceMappingList.bdms_by_instance_uuid(
            context, asked)
        for instance in objects.InstanceList.get_by_filters(
                context, {'uuid': asked, 'deleted': False},
                expected_attrs=[]):
            if CONF.host not in (instance.host, instance.node) and not any(
                    here in (bdm.driver_info or '')
                    for bdm in mappings.get(instance.uuid, ())):
                found.add(instance.uuid)
    return found


def _unknown(place):
    return Kind.UNKNOWN


def sweep(context, connection, own,
          tried: list[tuple[Orphan, bool]] | None = None,
          unread: list[Unread] | None = None,
          with_directories: bool = True) -> list[Orphan]:
    """Delete what is certainly left over, each with a log line.

    :param context: as for find(), as are the others
    :param tried: gets what was tried to delete, and whether it is gone, one
        by one, if given
    :param with_directories: whether to look in instances_path, too
    :returns: what is gone
    """
    tried = [] if tried is None else tried
    unread = [] if unread is None else unread
    of_instances = _directories(unread) if with_directories else []
    # What is known of an instance is as new as can be: a move may begin.
    for orphan in _find(context, connection, own, of_instances, unread):
        if orphan.kind is Kind.LEFT_OVER:
            tried.append((orphan, bool(delete(connection, [orphan]))))
    return [orphan for orphan, is_gone in tried if is_gone]


def delete(connection, orphans: list[Orphan]) -> list[Orphan]:
    """Delete those that are certainly left over, each with a log line.

    :param connection: this host's libvirt
    :param orphans: what find() has just returned
    :returns: what is gone
    """
    gone = []
    for orphan in orphans:
        if orphan.kind is not Kind.LEFT_OVER:
            continue
        if orphan.pool is None:
            LOG.warning('Deleting directory %(path)s: it is left over of '
                        'instance %(uuid)s',
                        {'path': orphan.volume, 'uuid': orphan.instance_uuid})
            if directories.delete(orphan.volume):
                gone.append(orphan)
            continue
        LOG.warning('Deleting volume %(volume)s from storage pool %(pool)s: '
                    'it is left over of instance %(uuid)s',
                    {'volume': orphan.volume, 'pool': orphan.pool,
                     'uuid': orphan.instance_uuid})
        if not leftovers.delete_volumes(
                connection, CONF.host, [(orphan.pool, orphan.volume)], None):
            gone.append(orphan)
    return gone


def _directories(unread):
    try:
        return directories.find()
    except OSError as e:
        LOG.warning('Directories that are left over are not looked for: %s', e)
        unread.append(Unread(CONF.instances_path, str(e)))
    return []


def _names(pool, unread):
    try:
        if pool.kind().is_ceph:
            pool.ceph().check()
            return sorted(pool.file_names())
        if pool.is_active():
            return [volume.name for volume in pool.volumes()]
        unread.append(Unread(pool.name, _('it is not active')))
    except exception.StoragePoolError as e:
        LOG.warning('Volumes that are left over are not looked for: %s', e)
        unread.append(Unread(pool.name, str(e)))
    return []


def _kinds_of(context, connection,
              uuid) -> ty.Callable[[tuple[str | None, str]], Kind]:
    """Return what tells the kind of what is at a place: (pool, volume)."""
    try:
        instance = objects.Instance.get_by_uuid(
            context.elevated(read_deleted='yes'), uuid)
    except exception.InstanceNotFound:
        # Purged from the database, or never of this cloud.
        return _unknown
    if instance.deleted:
        # An operator may have the guests of deleted instances kept.
        if _has_guest(connection, instance):
            return _unknown
        return lambda place: (
            Kind.LEFT_OVER if _is_for_this_host(connection, instance, place)
            else Kind.UNKNOWN)
    if CONF.host in (instance.host, instance.node):
        return _unknown
    try:
        disks = metadata.InstanceDisks.load(context, instance)
        return _by_records(connection, disks)
    except exception.InvalidDiskMetadata as e:
        LOG.warning('%s', e, instance=instance)
        return _unknown


def _is_for_this_host(connection, instance, place):
    """Whether no guest of another host may have what is at a place.

    That host may have been down while the instance was deleted.
    """
    pool, _volume = place
    return (pool is None or instance.host in (None, CONF.host) or
            not storage_pool.StoragePool(
                connection, pool, CONF.host).kind().is_directory or
            keeping.is_private(connection, pool))


def _has_guest(connection, instance):
    """Whether libvirt has, or may have, a guest of an instance here.

    An operator may have said of a live migration that it had not come, or
    have running_deleted_instance_action keep it.
    """
    try:
        return instance.uuid in {domain.UUIDString() for domain in
                                 connection.listAllDomains(0)}
    except Exception as e:
        LOG.warning('Volumes that may be left over are kept: %s', e,
                    instance=instance)
        return True


def _by_records(connection, disks):
    records = [record for _name, record in disks.items()]
    extras = list(disks.extras.values())
    # In a pool that hosts share this is the disk, whichever has it.
    disk_places = {(record.pool, record.volume) for record in records}
    disks_here = {(record.pool, record.volume) for record in records
                  if record.host == CONF.host}
    coming = [r.next for r in records if r.next]
    moving = {(record.pool, record.volume)
              for record in [*records, *extras, *coming]
              if record.is_building and record.host == CONF.host}
    kept = {(record.pool, record.volume)
            for record in [*(r.previous for r in records if r.previous),
                           *(r for r in extras if not r.is_building)]
            if record.host == CONF.host}
    left = set(leftovers.on_host(disks, CONF.host))
    copies = {place for place in keeping.copies(disks, left)
              if keeping.is_possible(connection, place[0])}

    def kind_of(place):
        if place[0] is None:
            return _kind_of_directory(disks.instance, place[1])
        if place in moving:
            return Kind.MOVE
        if place in kept:
            return Kind.REVERT
        if place in copies and keeping.is_in_time(connection, place):
            return Kind.KEPT
        is_left = place in left and (
            place not in disk_places or place not in disks_here and
            keeping.is_private(connection, place[0]))
        if _is_old_probe(connection, place) or is_left and not _has_guest(
                connection, disks.instance):
            return Kind.LEFT_OVER
        return Kind.UNKNOWN

    return kind_of


def _is_old_probe(connection, place):
    """Whether a service was killed before it deleted a probe."""
    if not sharing.is_probe(place[1]):
        return False
    age = keeping.unchanged_for(connection, place)
    return age is not None and age > _PROBE_AGE


def _kind_of_directory(instance, path):
    """Tell why the directory of an instance on another host is here.

    Never that it is left over: disks that are in no pool are in there, and
    this host may export the file system to that one.
    """
    if (instance.vm_state != vm_states.RESIZED and
            instance.task_state not in _MOVING):
        return Kind.UNKNOWN
    return (Kind.REVERT if directories.is_of_before_a_resize(path) else
            Kind.MOVE)
