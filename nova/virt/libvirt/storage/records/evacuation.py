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
"""What an instance's records mean on a host to which it is evacuated."""

from oslo_log import log as logging

from nova.compute import task_states
import nova.conf
import nova.context
from nova import exception
from nova import objects
from nova.objects import fields
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.records import keeping
from nova.virt.libvirt.storage.records import kinds
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import unrecorded

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def forget_move(disks):
    """Let nothing be left of a move but the disks where they are.

    What had come beside the disks, or was kept beside them, is noted as left.

    :param disks: the instance's InstanceDisks; the caller saves them
    """
    for name, record in disks.extras.items():
        leftovers.note(disks, record.host, [(record.pool, record.volume)])
        disks.set_extra(name, None)
    for name, record in disks.items():
        if record.migration_id is not None and record.previous is None:
            record.migration_id = record.expected = None
            disks.set(name, record)


def _is_half_copied(name, record):
    """Whether a disk is still what it was before a move.

    What is building was never booted from.
    """
    return (record.is_building and record.previous is not None and
            kinds.is_copied(name))


def is_replacing(instance, record):
    """Whether an evacuation which isn't over has brought a disk.

    Its previous is the disk until the instance is with the new one.
    """
    return (record.previous is not None and record.previous.is_replaced and
            'host' in instance and record.host != instance.host)


def replace(disks, record, fresh):
    """Have a disk made anew, on the host that an instance is evacuated to.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param record: of the disk, with its host
    :param fresh: the record of the new one
    """
    if _is_left(disks.instance, record):
        fresh.previous = _as_replaced(record)
    else:
        fresh.previous = record.previous
        fresh.migration_id = record.migration_id
        leftovers.note_disk(disks, record)


def take_over(disks, name, record):
    """Take over a disk that the host which is left sees as well.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param record: of the disk, with its host
    """
    if _is_left(disks.instance, record):
        _keep_copies(disks, name, record)
        record.previous = _as_replaced(record.obj_clone())
        record.migration_id = None
    record.host = CONF.host
    disks.set(name, record)


def _as_replaced(record):
    record.state = fields.LibvirtDiskState.REPLACED
    return record


def _keep_copies(disks, name, record):
    """Have nobody delete what has a disk's name, and may be the disk now.

    Where hosts have distinct pools, a copy that a move has left has the name
    of the disk. This host sees one of the two.
    """
    place = record.pool, record.volume
    copies = [host for host, *left in disks.leftovers
              if tuple(left) == place and
              host not in (CONF.host, record.host)]
    for host in copies:
        leftovers.forget(disks, host, [place])
    if record.kept_copy is not None and record.is_where_it_was:
        copies.append(record.kept_copy.host)
    for host in copies:
        LOG.warning('Disk %(name)s may be from before the last migration: '
                    'volume %(volume)s in storage pool %(pool)s is either '
                    "host %(host)s's or what host %(source)s has kept. No "
                    'copy is deleted.',
                    {'name': name, 'volume': record.volume,
                     'pool': record.pool, 'host': record.host,
                     'source': host}, instance=disks.instance)


def _is_left(instance, record):
    """Whether this is the disk of the host that an evacuation leaves."""
    return ('task_state' in instance and 'host' in instance and
            instance.task_state == task_states.REBUILD_SPAWNING and
            instance.host != CONF.host and not record.is_building and
            record.is_in_pool and record.next is None)


def give_up(disks):
    """Have disks be what they were before an evacuation from this host.

    Not if that has succeeded since the caller got the instance: what was cast
    to this host while it was cut off comes late.

    :param disks: the instance's InstanceDisks; the caller saves them
    """
    instance = disks.instance
    replacing = [(name, record) for name, record in disks.items()
                 if is_replacing(instance, record) and
                 instance.host == CONF.host]
    if replacing and objects.Instance.get_by_uuid(
            nova.context.get_admin_context(), instance.uuid,
            expected_attrs=[]).host == CONF.host:
        for name, record in replacing:
            restore(disks, name, record)


def restore(disks, name, record, is_deleted=False):
    """Have a disk be what an evacuation was to replace.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param record: of the disk that the evacuation has brought
    :param is_deleted: whether that is, unless it is on Ceph: there only an
        instance of this host has its disks deleted
    """
    if not record.is_where_it_was:
        if record.is_on_ceph:
            leftovers.note(disks, record.host, [(record.pool, record.volume)])
        elif not is_deleted:
            leftovers.note_disk(disks, record)
    disks.set(name, record.previous)


def refuse_other_names(get_connection, disks):
    """Refuse to make a disk anew whose pool is here, by another name.

    :param get_connection: gives this host's libvirt
    :param disks: the instance's InstanceDisks
    :raises: exception.StoragePoolNamedOtherwise,
        exception.StoragePoolError if that can't be told
    """
    for name, record in disks.items():
        if (not is_replacing(disks.instance, record) or
                record.backend != fields.LibvirtDiskBackend.LIBVIRT_STORAGE or
                record.pool == record.previous.pool):
            continue
        place = record.pool, record.previous.volume
        if place in leftovers.on_host(disks, CONF.host):
            continue
        connection = get_connection()
        pool = storage_pool.StoragePool(connection, record.pool, CONF.host)
        if not keeping.is_private(connection, pool.name) and (
                ownership.find(pool, record.previous.volume) is not None):
            raise exception.StoragePoolNamedOtherwise(
                pool=pool.name, host=CONF.host, disk=name,
                volume=record.previous.volume, other=record.previous.pool,
                source=record.previous.host)


def is_copy(coming, host):
    """Whether a host has begun to make a volume for a live migration.

    :param coming: the ``next`` of a disk's record, None without
    """
    return (coming is not None and coming.host == host and
            coming.is_building)


def forget_next(disks, host=None):
    """Let a live migration be over that has brought the disks nowhere.

    Copies that it has begun are noted as left. A volume that both hosts see
    is the disk.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param host: the destination, if another migration may have begun since,
        to another host; None for any
    """
    for name, record in disks.items():
        coming = record.next
        if coming is None or host not in (None, coming.host):
            continue
        record.next = None
        if coming.is_building:
            leftovers.note(
                disks, coming.host, [(coming.pool, coming.volume)])
        disks.set(name, record)


def find_unsettled(context, instance, disks):
    """Look for an evacuation of which the records may not tell how it ended.

    It is the last migration that has changed anything, and the records name
    the disks of one other host.

    :param disks: the instance's InstanceDisks
    :returns: the Migration, None if there is none
    """
    hosts = _hosts(disks)
    if len(hosts) != 1 or CONF.host in hosts:
        return None
    migrations = objects.MigrationList.get_by_filters(
        context, {'instance_uuid': instance.uuid})
    last = max((migration for migration in migrations
                if not _has_changed_nothing(migration)),
               key=lambda migration: migration.id, default=None)
    return last if last is not None and (
        last.migration_type == fields.MigrationType.EVACUATION) else None


def has_come(last, disks):
    """Whether an evacuation has brought an instance here that left no trace.

    An older compute doesn't know the records, which go on to name the disks
    of the host that was left.

    :param last: what find_unsettled() has found
    :param disks: the instance's InstanceDisks
    """
    return (last is not None and last.status in ('done', 'completed') and
            last.dest_compute == CONF.host and
            last.source_compute in _hosts(disks))


def has_failed(last, disks):
    """Whether an instance is still here that was to be evacuated from here.

    The destination has its disks on record as those that it was to make.

    :param last: what find_unsettled() has found
    :param disks: the instance's InstanceDisks
    """
    return (last is not None and last.status in ('failed', 'error') and
            last.source_compute == CONF.host and
            last.dest_compute in _hosts(disks))


def _hosts(disks):
    return {known.host for _name, record in disks.items()
            for known in (record, record.previous)
            if known is record or known is not None and
            not is_replacing(disks.instance, record)}


def _has_changed_nothing(migration):
    """Whether a migration was refused, or has only just begun."""
    if migration.migration_type == fields.MigrationType.LIVE_MIGRATION:
        return migration.status in ('accepted', 'queued')
    # Once it has begun to copy, the records say so.
    return migration.migration_type in (
        fields.MigrationType.MIGRATION, fields.MigrationType.RESIZE) and (
            migration.status in ('accepted', 'pre-migrating', 'migrating',
                                 'failed', 'error'))


def take_back(disks, guest_config, configured):
    """Have the disks on record as a guest has them, where has_failed().

    What the destination has made is noted as left there.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param guest_config: the guest's LibvirtConfigGuest, as it is here; None
        without one
    :param configured: the image backend that this host would use now
    """
    for name, record in disks.items():
        own = unrecorded.made_before_records(
            disks.instance, name, guest_config, configured)
        if own is None:
            continue
        if record.is_everywhere and not record.is_building:
            own = record
            own.host = CONF.host
        elif record.is_building or (
                (record.pool, record.volume) != (own.pool, own.volume)):
            # Whole or not, it is none of the disks any more.
            leftovers.note_disk(disks, record)
        own.size = record.size
        disks.set(name, own)
        if own.is_in_pool:
            # A disk that both hosts don't see was noted as replaced.
            leftovers.forget(disks, CONF.host, [(own.pool, own.volume)])


def old_copies(instance, disks):
    """Return what is on this host of an instance and is none of its disks.

    That a volume has the name of a disk which another host has on record
    doesn't make it that disk. A host keeps the volume of a move which was
    not confirmed (a record's previous), or which couldn't be deleted (a
    note). Where the hosts have distinct pools, the disk has the same name on
    the other host. In a pool which both see, no two copies have one name:
    there a name that is returned here is never the disk's.

    :param disks: the instance's InstanceDisks
    :returns: set of (pool, volume)
    """
    places = set(leftovers.on_host(disks, CONF.host))
    for name, record in disks.items():
        previous = record.previous
        if record.is_on_ceph and not record.came_into_ceph:
            continue  # There is no copy of it: whoever has it, it is the disk.
        if is_copy(record.next, CONF.host):
            places.add((record.next.pool, record.next.volume))
        if record.host == CONF.host:
            if record.is_building:
                places.add((record.pool, record.volume))
        elif (previous is not None and previous.host == CONF.host and
                not _is_half_copied(name, record)):
            places.add((previous.pool, previous.volume))
    return {place for place in places if place[1] is not None}


def after_evacuation(instance, disks):
    """On the destination of an evacuation: end moves that nobody ends now.

    Old copies are noted as left.

    :param disks: the instance's InstanceDisks; the caller saves them
    :returns: old_copies(); none unless it is evacuated
    """
    if instance.task_state != task_states.REBUILD_SPAWNING or all(
            record.host == CONF.host and record.next is None and (
                record.previous is None or is_replacing(instance, record))
            for _name, record in disks.items()):
        return set()
    for name, record in disks.items():
        if is_replacing(instance, record) and record.host != CONF.host:
            # That host was to make it, and has failed.
            restore(disks, name, record)
    places = old_copies(instance, disks)
    forget_next(disks)
    for name, record in disks.items():
        previous = record.previous
        if is_replacing(instance, record):
            continue
        if _is_half_copied(name, record):
            LOG.warning('The copy of disk %(name)s on host %(copy)s was never '
                        'verified; the disk is volume %(volume)s in '
                        'storage pool %(pool)s of host %(host)s',
                        {'name': name, 'copy': record.host,
                         'volume': previous.volume, 'pool': previous.pool,
                         'host': previous.host}, instance=instance)
            if record.volume is not None and record.host != CONF.host:
                # Nothing else knows of it any longer.
                leftovers.note(
                    disks, record.host, [(record.pool, record.volume)])
            disks.set(name, previous)
        elif (record.host != CONF.host and previous is not None and
                previous.host == CONF.host):
            # Else a later failure would bring it back.
            record.previous = None
            disks.set(name, record)
    unknown = places - set(leftovers.on_host(disks, CONF.host))
    for pool_name, name in sorted(unknown):
        LOG.warning('Volume %(volume)s in storage pool %(pool)s is an old or '
                    'unfinished copy of a disk, and is not used. It is '
                    'deleted with the instance, or when the instance is sent '
                    'to this host again; save it before if you need it.',
                    {'volume': name, 'pool': pool_name}, instance=instance)
    leftovers.note(disks, CONF.host, unknown)
    forget_move(disks)
    return places
