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
"""Where an instance's disks are when a live migration has ended, or may have.

While it goes on, each disk has two records: what it is, and ``next``, what it
will be. Where the disk is then is where libvirt has defined the guest; it
never has on two hosts. A is the source, B the destination:

moment: record / next
    before: ready@A / -
    B is about to make the first volume: ready@A / building@B (ready@B where
        both see one volume)
    QEMU copies, the guest moves: ready@A / building@B (or ready@B)
    A has cleaned up, or B has the guest: ready@B / -
    rolled back on B: ready@A / - (what B couldn't delete is noted as left)

killed: who goes on
    B, while it makes volumes: A rolls back; else A, when it next reads the
        records, notes the volumes as left, and B deletes them before the
        next migration to it
    A, while QEMU copies, and back in time: A. libvirt has gone on; A ends that
        when it starts, and notes B's volumes as left when it next reads the
        records
    A, and asked to end or start the guest while libvirt is at it: A ends
        the migration before
    A, and back too late: no one. The record and its next stay until an
        operator has looked on B and runs nova-manage libvirt
        settle_live_migration; there is no guest on A
    libvirt on A, when all has been sent and the guest isn't undefined yet: no
        one, until an operator settles it; A has a guest that is paused or off,
        because it has migrated
    the link between both libvirts, when all has been sent: no one, until an
        operator settles it, if A can't resume the guest; it stays paused
    A as a whole: no one, until an operator settles it; A has a guest that is
        off, and nothing says why. No third host starts the instance either
    post-copy, when the link is lost: no one, until an operator settles it; the
        guest is on B
    A, before it has cleaned up: B has the guest and takes the records over;
        A's volumes are noted as left
    A, when it has cleaned up and before it has told B: no one. The instance is
        A's and its disks are B's until an operator settles it
    B, before it has taken over: A did, or B when it next reads the records
"""

import time

from oslo_log import log as logging

from nova.compute import power_state
from nova.compute import task_states
import nova.conf
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
from nova.virt.libvirt import migration as libvirt_migrate
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import lifecycle
from nova.virt.libvirt.storage.records import metadata

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# How often, and at which intervals in seconds, libvirt is asked whether it has
# ended a migration.
_LOOKS, _POLL = 60, 0.5

MADE = fields.LibvirtLiveMigrateDiskWay.MADE

# Statuses of a live migration for which its destination may have something.
UNDER_WAY = ('accepted', 'queued', 'preparing', 'running',
             'running (post-copy)', 'post-migrating')


# Those that one may have whose source was killed at the end; a service that
# starts makes it an error.
_MAY_HAVE_ENDED = ('running', 'running (post-copy)', 'error')


def going(disks):
    """Name and record of the disks that have a next place.

    :param disks: the instance's InstanceDisks
    """
    return [(name, record) for name, record in disks.items()
            if record.next is not None]


def promote(disks) -> None:
    """Let each disk be what was its next: the guest runs there.

    Where it was copied from is noted as left.

    :param disks: the instance's InstanceDisks; the caller saves them
    """
    for name, record in going(disks):
        coming = record.next.obj_clone()
        if coming.is_building:
            leftovers.note_disk(disks, record)
        leftovers.note_original(disks, record)
        coming.state = fields.LibvirtDiskState.READY
        disks.set(name, coming)
        leftovers.forget(
            disks, coming.host, [(coming.pool, coming.volume)])


def settle(context, host, disks) -> None:
    """Find out how a live migration has ended of which nobody has told.

    :param host: the Host of this compute
    :param disks: the instance's InstanceDisks
    :raises: exception.DisksMayBeElsewhere if no guest is here, and there may
        be one on the other host
    """
    moving = going(disks)
    if not moving:
        _refuse_untold(context, host, disks)
        return
    instance = disks.instance
    try:
        guest = host.get_guest(instance)
    except exception.InstanceNotFound:
        guest = None
    record, coming = moving[0][1], moving[0][1].next
    if guest is not None and record.host == CONF.host and (
            _may_have_gone(host, guest)):
        LOG.warning('What libvirt has here may be no more than what a live '
                    'migration leaves; destroy and undefine it once the guest '
                    'is seen on host %s', coming.host, instance=instance)
        guest = None
    if guest is None:
        # Of an instance that is evacuated, the third host knows less yet.
        if record.host == CONF.host or coming.host != CONF.host and (
                instance.task_state == task_states.REBUILD_SPAWNING):
            raise _elsewhere(instance, moving)
        return
    if coming.host == CONF.host and record.host != CONF.host:
        if _runs_with(guest, moving):
            LOG.info('The disks have come in a live migration',
                     instance=instance)
            promote(disks)
    elif record.host == CONF.host and not _is_moving(guest):
        LOG.warning('The live migration to host %s has failed; what it has '
                    'of the disks goes before the next one',
                    coming.host, instance=instance)
        evacuation.forget_next(disks)
    disks.save(context)


def untold(context, disks) -> str | None:
    """Where a live migration has ended of which only the disks know.

    Its source has cleaned up, and was killed before it told the destination,
    which would have put itself on record as the instance's host.

    :param disks: the instance's InstanceDisks, none of which is going()
    :returns: name of the host that has the guest; None if there is none
    """
    instance = disks.instance
    # A cold migration, or an evacuation, has more on record.
    hosts = {record.host for _name, record in disks.items()
             if record.is_in_pool and not record.is_building and
             record.previous is None and record.migration_id is None}
    if not hosts or 'host' not in instance or hosts == {instance.host}:
        return None
    moves = objects.MigrationList.get_by_filters(
        context.elevated(), {'instance_uuid': instance.uuid})
    # Since the last of them the instance has not left.
    came = max((move.id for move in moves
                if move.dest_compute == instance.host and
                move.source_compute != instance.host), default=0)
    return next((
        move.dest_compute for move in moves
        if move.migration_type == fields.MigrationType.LIVE_MIGRATION and
        move.source_compute == instance.host and move.id > came and
        move.dest_compute in hosts - {instance.host} and
        move.status in _MAY_HAVE_ENDED), None)


def _refuse_untold(context, host, disks):
    """Refuse to start an instance, or destroy its disks, where it was."""
    there = untold(context, disks)
    if there is None or there == CONF.host:
        return
    try:
        # A source that has cleaned up has none any more.
        host.get_guest(disks.instance)
    except exception.InstanceNotFound:
        raise _elsewhere(disks.instance, [
            (name, record) for name, record in disks.items()
            if record.host == there and record.is_in_pool])


def is_open(host, disks) -> bool:
    """Whether a guest here may be leaving, or may run on another host.

    Nobody but the migration, or an operator, may let it go on then.

    :param host: the Host of this compute
    :param disks: the instance's InstanceDisks
    :raises: exception.InvalidDiskMetadata; what the Host raises if libvirt
        doesn't answer
    """
    if not any(record.host == CONF.host for _name, record in going(disks)):
        return False
    try:
        guest = host.get_guest(disks.instance)
    except exception.InstanceNotFound:
        return False
    return _may_have_gone(host, guest) or guest.is_active() and (
        _is_moving(guest))


def _runs_with(guest, moving):
    """Whether libvirt will start a guest with the volumes that have come."""
    volumes, images = set(), set()
    for disk in guest.get_all_devices(from_persistent_config=True):
        kind = getattr(disk, 'source_type', None)
        if kind == 'volume':
            volumes.add((disk.source_pool, disk.source_volume))
        elif kind == 'network':
            images.add((disk.source_name or '').rpartition('/')[2])
    return all(record.next.volume in images if record.next.is_on_ceph else
               (record.next.pool, record.next.volume) in volumes
               for _name, record in moving)


def _may_have_gone(host, guest):
    """Whether a guest that isn't running here may run on the other host.

    A libvirt that was killed when all had been sent leaves it to others to
    find out how that has ended, and the guest paused; if it has heard of the
    end, it leaves a definition. So does a host that goes down, for which no
    reason is known, and a QEMU that dies when libvirt has, which is a crash to
    libvirt when it is back (9.0). A start of any of them boots the old copies.
    A guest whose post-copy has begun is on the other host.
    """
    reason = guest.get_state_reason()
    if not guest.is_active():
        return reason in (libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED,
                          libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN,
                          libvirt.VIR_DOMAIN_SHUTOFF_CRASHED,
                          libvirt.VIR_DOMAIN_SHUTOFF_DAEMON)
    if guest.get_power_state(host) != power_state.PAUSED:
        return False
    if reason in (libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
                  libvirt_migrate.PAUSED_API_ERROR):
        return not _is_moving(guest)
    return reason in (libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
                      libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED)


def _elsewhere(instance, moving):
    places = [record.next or record for _name, record in moving]
    return exception.DisksMayBeElsewhere(
        instance_uuid=instance.uuid, host=CONF.host, dest=places[0].host,
        volumes=', '.join('%s/%s' % (place.pool, place.volume)
                          for place in places))


def refuse_to_guess(disks):
    """Leave it to an operator where a guest is.

    :param disks: the instance's InstanceDisks
    :raises: exception.DisksMayBeElsewhere; exception.InstanceNotFound if
        there are no records, as it was deleted
    """
    moving = going(disks)
    if not moving:
        raise exception.InstanceNotFound(instance_id=disks.instance.uuid)
    raise _elsewhere(disks.instance, moving)


def _is_moving(guest):
    """Whether libvirt goes on with a migration, whoever has begun it.

    One that has failed or was cancelled may be cleared up yet: then its job is
    gone.
    """
    return guest.get_job_info().type not in (
        libvirt.VIR_DOMAIN_JOB_NONE, libvirt.VIR_DOMAIN_JOB_COMPLETED)


def wait_until_ended(host, instance) -> None:
    """Wait until libvirt has cleared up after a migration that didn't succeed.

    A cancelled one can take many seconds to end. Who begins the next one
    before that reads the job of the other, and takes it for cancelled.

    :param host: the Host of this compute
    :raises: exception.MigrationPreCheckError if it takes too long
    """
    if not _is_ending(host, instance):
        return
    LOG.info('Waiting for libvirt, which is still ending a migration',
             instance=instance)
    if not _comes_true(lambda: not _is_ending(host, instance)):
        raise exception.MigrationPreCheckError(reason=_(
            'try again later, or restart libvirt on host %(host)s: it is '
            'still ending a migration of the server that has failed or was '
            'cancelled') % {'host': CONF.host})


def _is_ending(host, instance):
    """Whether libvirt clears up after a migration that didn't succeed."""
    try:
        guest = host.get_guest(instance)
    except exception.InstanceNotFound:
        return False
    return guest.is_active() and guest.get_job_info().type in (
        libvirt.VIR_DOMAIN_JOB_FAILED, libvirt.VIR_DOMAIN_JOB_CANCELLED)


def _comes_true(condition):
    """Wait for what libvirt does; returns whether that was long enough."""
    for _look in range(_LOOKS):
        if condition():
            return True
        time.sleep(_POLL)
    return False


def end_moving(host, disks) -> None:
    """Have libvirt end a migration that no compute service is at any more.

    To be called before the guest is ended for another reason: libvirt, which
    has gone on by itself, may be done with it in between, and what is started
    then is a second guest.

    :param host: the Host of this compute
    :param disks: the instance's InstanceDisks
    :raises: exception.LiveMigrationNotEnded if libvirt doesn't end it
    """
    moving = going(disks)
    if not moving or moving[0][1].host != CONF.host:
        return
    guest = _moving_guest(host, disks.instance)
    if guest is None:
        return
    LOG.warning('libvirt is at a live migration to host %s that Nova has '
                'given up: ending it', moving[0][1].next.host,
                instance=disks.instance)
    try:
        guest.abort_job()
    except libvirt.libvirtError as e:
        LOG.warning('The live migration can not be ended, or has ended: %s',
                    e, instance=disks.instance)
    if not _comes_true(
            lambda: _moving_guest(host, disks.instance) is None):
        raise exception.LiveMigrationNotEnded(
            instance_uuid=disks.instance.uuid, host=CONF.host,
            dest=moving[0][1].next.host)


def _moving_guest(host, instance):
    """The guest if libvirt is about to move it, and can still be stopped."""
    try:
        guest = host.get_guest(instance)
    except exception.InstanceNotFound:
        return None
    is_moving = guest.is_active() and _is_moving(guest)
    return guest if is_moving and not _may_have_gone(host, guest) else None


def check_stays(context, host, instance, load) -> None:
    """Refuse to end or resume a guest that may run on the other host.

    Once it is off, it is as one whose migration has failed: started again.
    A guest that is off, or not here, may be stopped again: nothing happens to
    it. But its disks, which it may use on the other host where both see them,
    mustn't be deleted, and nothing may take its place. A guest that libvirt is
    about to move stays here.

    :param host: the Host of this compute
    :param load: returns the instance's InstanceDisks; called in doubt alone
    :raises: exception.DisksMayBeElsewhere, exception.InvalidDiskMetadata,
        exception.LiveMigrationNotEnded
    """
    is_to_go = lifecycle.is_destroying(instance)
    was_moving = _moving_guest(host, instance) is not None
    if was_moving:
        end_moving(host, load())
    try:
        guest = host.get_guest(instance)
        may_be_off = is_to_go or was_moving or (
            guest.get_power_state(host) == power_state.PAUSED)
        is_left = may_be_off and _may_have_gone(host, guest)
    except exception.InstanceNotFound:
        is_left = is_to_go or was_moving
    if is_left:
        try:
            disks = load()
            moving = going(disks)
        except exception.InvalidDiskMetadata as e:
            if not is_to_go:
                raise
            LOG.error('%s', e, instance=instance)
            return
        if not moving:
            _refuse_untold(context, host, disks)
        elif moving[0][1].host == CONF.host:
            raise _elsewhere(instance, moving)


def clear_way(connection, disks) -> None:
    """Delete what earlier migrations to this host have left.

    :param connection: this host's libvirt, which has no guest of it
    :param disks: the instance's InstanceDisks; the caller saves them
    """
    if disks.leftovers:
        leftovers.delete(connection, disks)


def is_overtaken(context, instance, data) -> bool:
    """On the destination: whether it is too late to roll a migration back.

    The source doesn't wait for it, and whoever has asked for the migration
    may have tried again: what is here then is not what has failed.

    :param data: the LibvirtLiveMigrateData of the migration that has failed
    """
    context = context.elevated()
    try:
        if objects.Instance.get_by_uuid(
                context, instance.uuid, expected_attrs=[]
        ).host == CONF.host:
            return True
    except exception.InstanceNotFound:
        return False
    if 'migration' not in data:
        return False
    return any(
        migration.id > data.migration.id and
        migration.dest_compute == CONF.host
        for migration in objects.MigrationList.get_by_filters(context, {
            'instance_uuid': instance.uuid, 'status': list(UNDER_WAY),
            'migration_type': fields.MigrationType.LIVE_MIGRATION}))


def abandon(context, connection, disks, planned=()) -> None:
    """On the destination: delete what was made for a migration that failed.

    By name: in a pool that both hosts see the running guest's disks have the
    same prefix. The source may be at something else with the instance already:
    what it has put on record while the volumes went stays.

    :param connection: this host's libvirt, which has no guest of it
    :param disks: the instance's InstanceDisks
    :param planned: LibvirtLiveMigrateDiskInfo of the disks; counts if the
        instance was deleted in the meantime, and its records with it
    """
    if not disks.has_mappings:
        uuid = disks.instance.uuid
        leftovers.delete_volumes(
            connection, CONF.host,
            [(disk.pool, disk.volume) for disk in planned
             if disk.way in MADE and disk.volume is not None and
             disk.volume.startswith(uuid + '_')], disks.instance)
        return
    evacuation.forget_next(disks, CONF.host)
    disks.save(context)
    before = set(leftovers.on_host(disks, CONF.host))
    clear_way(connection, disks)
    gone = before - set(leftovers.on_host(disks, CONF.host))
    if gone:
        disks = metadata.InstanceDisks.load(context, disks.instance)
        leftovers.forget(disks, CONF.host, gone)
        disks.save(context)


def arrived(disks, guest_config) -> bool:
    """On the destination: the guest runs here, and there is no way back.

    A broken record is only logged.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param guest_config: the guest's LibvirtConfigGuest
    :returns: whether all records can be read
    """
    try:
        promote(disks)
    except exception.InvalidDiskMetadata as error:
        LOG.error('%s', error, instance=disks.instance)
        return False
    lifecycle.moved(disks, guest_config)
    return True


def leave(context, connection, disks) -> None:
    """On the source: let the disks be the destination's and delete these.

    :param connection: this host's libvirt, which has no guest of it
    :param disks: the instance's InstanceDisks
    """
    promote(disks)
    # On record before nothing else names them: this compute may be killed.
    disks.save(context)
    clear_way(connection, disks)
    disks.save(context)
