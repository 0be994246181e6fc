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

"""Which volumes of a host are an instance's, and deleting them.

An instance's disks are in the pools that its records name. Clean-up often runs
without the records, and nova.conf may have named other pools when the
disks were made: so every pool of the host is looked at, and what belongs to
the instance is told by the prefix of a volume's name.
"""

import dataclasses
import re

from oslo_log import log as logging

from nova.compute import instance_actions
from nova.compute import task_states
import nova.conf
import nova.context
from nova import exception
from nova import objects
from nova.objects import fields
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# The name of what is an instance's.
OWNED = re.compile(
    r'(?P<uuid>[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})_.+')

# E.g. disk.rescue, or disk.rescue.1 where that was taken
_RESCUE_NAME = re.compile(r'\.rescue(\.\d+)?$')

# Its disks go with it, wherever it is. What is deleted softly keeps them.
_DELETING = (task_states.DELETING,)

# So do those of what is made, or taken in, here and given up.
_DESTROYING = (task_states.SHELVING, task_states.SHELVING_OFFLOADING,
               task_states.SPAWNING, task_states.RESIZE_REVERTING)


@dataclasses.dataclass(frozen=True)
class Place:
    """A pool of this host in which an instance's volumes may be.

    :ivar pool: the StoragePool
    :ivar is_configured: whether this host is configured to make disks there
    :ivar is_on_record: whether the instance's records name it
    """
    pool: storage_pool.StoragePool
    is_configured: bool = False
    is_on_record: bool = False

    def is_there(self) -> bool:
        """Whether the pool is there; one that is on record has to be."""
        return self.is_on_record or self.pool.exists()

    def volumes(self, instance_uuid, rescue=False):
        """The instance's volumes in the pool.

        :param rescue: True for the disks of its rescue only
        :returns: list of StorageVolume
        :raises: exception.StoragePoolError if there may be some, and the pool
            can't be read
        """
        prefix = '%s_' % instance_uuid
        try:
            return [volume for volume in self.pool.volumes()
                    if volume.name.startswith(prefix) and (
                        not rescue or _RESCUE_NAME.search(volume.name))]
        except exception.StoragePoolError as e:
            if self.is_on_record or self.is_configured and not isinstance(
                    e, exception.StoragePoolNotFound):
                raise
            # It was never used, or was stopped since it was listed.
            LOG.debug('Storage pool %(pool)s is passed over: %(error)s',
                      {'pool': self.pool.name, 'error': e})
            return []


def pools_on_record(disks) -> set[str]:
    """Names of the pools of this host that an instance's records name.

    :param disks: its InstanceDisks, None if they aren't known
    """
    try:
        records = [record for _name, known in (disks.items() if disks else ())
                   for record in (known, known.previous) if record]
        left = disks.leftovers if disks else ()
    except exception.InvalidDiskMetadata as e:
        LOG.warning('The pools of the instance are looked for without its '
                    'records: %s', e, instance=disks.instance)
        return set()
    return {pool for host, pool in (
        *((record.host, record.pool) for record in records),
        *((host, pool) for host, pool, _volume in left))
        if host == CONF.host and pool}


def places(connection, disks=None) -> list[Place]:
    """Where an instance's disks can be on this host.

    :param connection: to the host's libvirt
    :param disks: the instance's InstanceDisks, if they are known
    :returns: the configured pools, those on record, and all active ones whose
        volumes can be disks
    """
    configured, recorded = set(setup.pool_names()), pools_on_record(disks)
    return [Place(storage_pool.StoragePool(connection, name, CONF.host),
                  name in configured, name in recorded)
            for name in sorted(configured | recorded | _active(connection))]


def _active(connection):
    """Names of the active pools that disks may have been made in.

    Other than by nova.conf and by records: settings change.
    """
    names = set()
    try:
        for pool in storage_pool.list_pools(connection, CONF.host):
            if pool.name == CONF.libvirt.storage_base_images_pool:
                continue
            try:
                if pool.is_active() and pool.kind().holds_disks:
                    names.add(pool.name)
            except exception.StoragePoolError as e:
                LOG.debug('Storage pool %(pool)s is passed over: %(error)s',
                          {'pool': pool.name, 'error': e})
    except exception.StoragePoolError as e:
        # libvirt's storage driver is a daemon of its own, that a host without
        # storage pools need not run.
        LOG.debug('The storage pools can not be listed: %s', e)
    return names


def has_pools(connection) -> bool:
    """Whether a host has any pool in which it may keep disks.

    :param connection: to the host's libvirt
    """
    return any(place.pool.exists() for place in places(connection))


def has_volumes(connection, instance_uuid, ignored=(), named=()) -> bool:
    """Whether an instance has volumes here, whoever has made them.

    :param connection: to the host's libvirt
    :param instance_uuid: UUID of the instance
    :param ignored: (pool name, volume name) of those which don't count
    :param named: names of the pools that its disks are in, on any host
    :raises: exception.StoragePoolError if there may be some, and the pool
        can't be read
    """
    prefix = '%s_' % instance_uuid
    return any(name.startswith(prefix) and
               (place.pool.name, name) not in ignored
               for place in places(connection) if place.is_there()
               for name in _names_in(place, named))


def _names_in(place, named):
    try:
        return place.pool.file_names()
    except exception.StoragePoolError as e:
        if place.is_configured or place.pool.name in named:
            raise
        # It is any operator's.
        LOG.debug('Storage pool %(pool)s is passed over: %(error)s',
                  {'pool': place.pool.name, 'error': e})
        return set()


def get_volumes(connection, instance_uuid, rescue=False, disks=None):
    """Return the volumes which belong to an instance.

    :param connection: to the host's libvirt
    :param instance_uuid: UUID of the instance
    :param rescue: True for the disks of its rescue only
    :param disks: the instance's InstanceDisks, if they are known
    :return: An iterator over StorageVolume. Those of the other pools are
        returned even if one can't be read.
    :raises: exception.StoragePoolError at the end, if there was such a pool
    """
    unread = None
    for place in places(connection, disks):
        try:
            yield from place.volumes(instance_uuid, rescue)
        except exception.StoragePoolError as e:
            unread = unread or e
    if unread:
        raise unread


def find(pool, name: str):
    """Look a volume up which libvirt may not know of yet.

    :param pool: the StoragePool
    :returns: its StorageVolume, None if there is no such volume or pool
    """
    try:
        return pool.find(name, refresh=True)
    except exception.StoragePoolNotFound:
        return None


def names_of(pool, instance_uuid, disk_name: str) -> list[str]:
    """Names of the volumes that may be, or have been, a disk of an instance.

    :param pool: the StoragePool
    :param disk_name: e.g. ``disk.swap``; its volume may be ``.1`` and so on
    :raises: exception.StoragePoolError
    """
    return sorted(volume.name for volume in pool.volumes()
                  if is_named_after(volume.name, instance_uuid, disk_name))


def is_named_after(volume: str, instance_uuid, disk_name: str) -> bool:
    """Whether a volume has the name of a disk, or that with a number.

    :param volume: its name
    :param disk_name: e.g. ``disk.swap``; its volume may be ``.1`` and so on
    """
    return re.fullmatch(r'%s(\.\d+)?' % re.escape(
        '%s_%s' % (instance_uuid, disk_name)), volume) is not None


def delete_volume(volume, instance=None) -> bool:
    """Delete a volume of ours; an error must not hide another one.

    :param volume: the StorageVolume
    :returns: whether it is gone
    """
    try:
        volume.delete()
        return True
    except Exception as e:
        LOG.error('Volume %(volume)s is left over in storage pool %(pool)s of '
                  'host %(host)s: %(error)s',
                  {'volume': volume.name, 'pool': volume.pool.name,
                   'host': volume.pool.host, 'error': e}, instance=instance)
        return False


def delete_named(pool, name: str, instance=None) -> bool:
    """Delete a volume by its name.

    :param pool: the StoragePool
    :returns: whether it is gone; it may have been before
    """
    try:
        images = pool.ceph()
        if images is not None:
            # Whoever asks has more to do than to wait for it.
            images.check([name])
        volume = pool.volume(name)
    except exception.StorageVolumeNotFound:
        return True
    except Exception as e:
        LOG.error('Volume %(volume)s may be left over in storage pool '
                  '%(pool)s of host %(host)s: %(error)s',
                  {'volume': name, 'pool': pool.name, 'host': pool.host,
                   'error': e}, instance=instance)
        return False
    return delete_volume(volume, instance)


def has_gone_with_images(instance) -> bool:
    """Whether another host has an instance's images of Ceph, or will have.

    An image is the disk whichever host the instance is on: one that cleans up
    behind it has nothing to delete.

    :param instance: the Instance, as the caller has it
    """
    return (instance.host != CONF.host or
            instance.task_state == task_states.RESIZE_REVERTING or
            instance.task_state not in _DELETING and _is_evacuated(instance))


def is_elsewhere(instance) -> bool:
    """Whether an instance is another host's, which may have its disks.

    It was evacuated from here, or an evacuation to here has failed.

    :param instance: the Instance, as the caller has it
    """
    return ('host' in instance and instance.host != CONF.host and
            not is_going(instance))


def is_going(instance) -> bool:
    """Whether an instance is deleted, or is about to be.

    :param instance: the Instance, as the caller has it
    """
    return ('deleted' in instance and instance.deleted or
            instance.task_state in _DELETING)


def is_making(instance) -> bool:
    """Whether this host was to make an instance's disks, and gives them up.

    One from which the instance is being evacuated isn't.

    :param instance: the Instance, as the caller has it
    """
    return (instance.task_state == task_states.SPAWNING or
            instance.task_state == task_states.REBUILD_SPAWNING and (
                instance.host != CONF.host or not _is_evacuated(instance)))


def has_stayed(instance, is_starting=False) -> bool:
    """Whether an instance is this host's that was to be evacuated from here.

    A compute service that starts destroys the guests of evacuations which are
    done or not over. Those that were cut off stay so, and the instance has
    its disks here alone.

    :param instance: the Instance, as the caller has it
    :param is_starting: whether this compute service starts: what its task
        state says was cut off, too
    """
    return ('host' in instance and instance.host == CONF.host and
            not is_going(instance) and bool(_evacuations(instance)) and
            (is_starting or _may_be_evacuated(instance)))


def _may_be_evacuated(instance):
    """Whether what is done to an instance now may be its evacuation."""
    if instance.task_state not in task_states.rebuild_states:
        return instance.task_state not in _DESTROYING
    # A rebuild where it is has the same states.
    return next((
        action.action for action in
        objects.InstanceActionList.get_by_instance_uuid(
            nova.context.get_admin_context(), instance.uuid)
        if action.action in (instance_actions.EVACUATE,
                             instance_actions.REBUILD)),
        None) == instance_actions.EVACUATE


def _is_evacuated(instance):
    """Whether another host starts it with its disks, in place of this one.

    It is this host's until that is done, in a rebuild as well, and whatever
    an operator has set its state to. A migration that is done stays so until
    this compute service is restarted; the instance may be back.
    """
    found = _evacuations(instance)
    return bool(found - {'done'}) and _may_be_evacuated(instance) or (
        bool(found) and
        objects.Instance.get_by_uuid(
            nova.context.get_admin_context(read_deleted='yes'),
            instance.uuid, expected_attrs=[]).host != CONF.host)


def _evacuations(instance):
    """What the compute service takes for an evacuation when it starts.

    :returns: set of the states of those from here
    """
    context = nova.context.get_admin_context(read_deleted='yes')
    return {migration.status
            for migration in objects.MigrationList.get_by_filters(context, {
                'instance_uuid': instance.uuid, 'source_compute': CONF.host,
                'migration_type': fields.MigrationType.EVACUATION,
                'status': ['accepted', 'pre-migrating', 'done']})}


def _of_other_kinds(connection, disks):
    """Records of this host's disks whose pool can't have them any more."""
    if disks is None:
        return
    try:
        records = [known for _name, record in disks.items()
                   for known in (record, record.previous)
                   if known is not None and known.is_in_pool and
                   known.host == CONF.host]
    except exception.InvalidDiskMetadata:
        return
    for record in records:
        pool = storage_pool.StoragePool(connection, record.pool, CONF.host)
        try:
            if pool.kind().is_ceph != record.is_on_ceph:
                yield record
        except exception.StoragePoolError as e:
            LOG.debug('%s', e)


def delete_volumes(connection, instance, rescue=False, keep=(),
                   disks=None, is_copy=False) -> bool:
    """Delete an instance's volumes on this host.

    :param connection: to the host's libvirt
    :param instance: the instance
    :param rescue: True to delete the disks of its rescue only
    :param keep: (pool name, volume name) of those which stay
    :param disks: the instance's InstanceDisks, if they are known
    :param is_copy: whether another cell has the instance with images of its
        own, which are in keep; then those here go, wherever it is
    :return: False if something is left and should be tried again
    """
    complete, has_gone = True, False if is_copy else None
    for record in _of_other_kinds(connection, disks):
        LOG.error('Volume %(volume)s is left over: storage pool %(pool)s of '
                  'host %(host)s is another one than that which it was made '
                  'in', {'volume': record.volume, 'pool': record.pool,
                         'host': CONF.host}, instance=instance)
        complete = False
    try:
        for volume in get_volumes(connection, instance.uuid, rescue, disks):
            if (volume.pool.name, volume.name) in keep:
                continue
            if volume.pool.kind().is_ceph:
                if has_gone is None:
                    has_gone = has_gone_with_images(instance)
                if has_gone:
                    continue
            LOG.info('Deleting volume %(volume)s from storage pool %(pool)s',
                     {'volume': volume.name, 'pool': volume.pool.name},
                     instance=instance)
            complete = delete_volume(volume, instance) and complete
    except exception.NovaException as e:
        LOG.error('It is not known whether volumes of the instance are left; '
                  'it will be tried later: %s', e, instance=instance)
        complete = False
    return complete
