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
"""How a move of volumes is undone, on whichever host that is."""

from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_utils import uuidutils
import tenacity

from nova.compute import task_states
import nova.conf
from nova import exception
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import state as moves
from nova.virt.libvirt.storage.pool import pool as storage_pool

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Seconds for which a peer's daemon that isn't there is waited for.
_PEER_IS_BACK = 8


def delete_volume(volume, instance):
    """Delete a volume that we have made; an error must not hide another.

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


def delete_volumes(connection, host, places, instance):
    """Delete volumes by name; one that isn't there is gone.

    :param host: name of the host for messages
    :param places: iterable of (pool, volume)
    :returns: list of those that couldn't be deleted
    """
    left = []
    for pool_name, name in places:
        pool = storage_pool.StoragePool(connection, pool_name, host)
        try:
            volume = pool.volume(name)
        except exception.StorageVolumeNotFound:
            continue
        except Exception as e:
            LOG.error('Volume %(volume)s in storage pool %(pool)s of host '
                      '%(host)s: %(error)s',
                      {'volume': name, 'pool': pool_name, 'host': host,
                       'error': e}, instance=instance)
            left.append((pool_name, name))
            continue
        if not delete_volume(volume, instance):
            left.append((pool_name, name))
    return left


def note_left(instance, host, places):
    """Note volumes which a host is to delete at its next chance.

    :param places: iterable of (pool, volume)
    """
    for place in places:
        instance.system_metadata[
            moves.LEFT + uuidutils.generate_uuid()[:8]] = (
                jsonutils.dumps([host, *place]))


def left(instance, host):
    """Return what is noted as left on a host, as list of (pool, volume)."""
    return [place for _key, where, place in _notes(instance) if where == host]


def names_left(instance):
    """Return the names of all volumes that are noted as left anywhere.

    Nothing new may have such a name: it would be deleted as what is left.
    """
    return {place[1] for _key, _where, place in _notes(instance)}


def _notes(instance):
    for key, value in list(instance.system_metadata.items()):
        if key.startswith(moves.LEFT):
            where, *place = jsonutils.loads(value)
            yield key, where, tuple(place)


def forget_left(instance, host, places):
    """Take volumes that are gone, or in use, off the notes.

    :param places: iterable of (pool, volume)
    """
    for key, where, place in _notes(instance):
        if where == host and place in places:
            del instance.system_metadata[key]


def delete_left(connection, instance, disks):
    """Delete what an earlier try has left on this host and couldn't undo.

    Only what is noted by name: what else is here is never touched.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks: what has become one of them
        since it was noted is no longer left
    """
    places = set(left(instance, CONF.host))
    in_use = {(record.pool, record.volume) for _name, known in disks.items()
              for record in (known, known.previous)
              if record is not None and record.host == CONF.host}
    still = delete_volumes(connection, CONF.host, places - in_use, instance)
    forget_left(instance, CONF.host, places - set(still))


def is_of(instance, migration, record):
    """Whether a disk's ``previous`` is where a migration has taken it from.

    It may be of an earlier one, which was never confirmed nor reverted; what
    has been written since would be lost.
    """
    return record.previous is not None and (
        record.previous.host == CONF.host) and (
        record.is_building or moves.moved_by(instance) == migration.id)


def restore(disks, instance, migration):
    """Make the source's copies the disks again; the caller saves both.

    :param disks: the instance's InstanceDisks
    :param migration: the Migration which is undone
    """
    for name, record in disks.items():
        if is_of(instance, migration, record):
            disks.set(name, record.previous)
    _forget_move(instance)


def _forget_move(instance):
    for key in list(instance.system_metadata):
        if key.startswith((moves.OFFER, moves.COPY, moves.MOVED, moves.SWAP)):
            del instance.system_metadata[key]


def _is_half_copied(name, record):
    """Whether a disk is still what it was before a move.

    What is building was never booted from.
    """
    return (record.is_building and record.previous is not None and
            moves.is_copied(name))


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
    places = set(left(instance, CONF.host))
    for name, record in disks.items():
        previous = record.previous
        if record.host == CONF.host:
            if record.is_building:
                places.add((record.pool, record.volume))
        elif (previous is not None and previous.host == CONF.host and
                not _is_half_copied(name, record)):
            places.add((previous.pool, previous.volume))
    return {place for place in places if place[1] is not None}


def after_evacuation(instance, disks):
    """On the destination of an evacuation: end moves that nobody ends now.

    The caller saves the records. Old copies are noted as left.

    :param disks: the instance's InstanceDisks
    :returns: old_copies(); none unless it is evacuated
    """
    if instance.task_state != task_states.REBUILD_SPAWNING or all(
            record.host == CONF.host and record.previous is None
            for _name, record in disks.items()):
        return set()
    places = old_copies(instance, disks)
    for name, record in disks.items():
        previous = record.previous
        if _is_half_copied(name, record):
            LOG.warning('The copy of disk %(name)s on host %(copy)s was not '
                        'found whole; the disk is volume %(volume)s in '
                        'storage pool %(pool)s of host %(host)s',
                        {'name': name, 'copy': record.host,
                         'volume': previous.volume, 'pool': previous.pool,
                         'host': previous.host}, instance=instance)
            disks.set(name, previous)
        elif (record.host != CONF.host and previous is not None and
                previous.host == CONF.host):
            # Else a later failure would bring it back.
            record.previous = None
            disks.set(name, record)
    unknown = places - set(left(instance, CONF.host))
    for pool_name, name in sorted(unknown):
        LOG.warning('Volume %(volume)s in storage pool %(pool)s is an old '
                    'copy of the disk or half of one, and is not used; it '
                    'goes when this server is sent to this host again, or is '
                    'deleted. Save it before, if its content is needed',
                    {'volume': name, 'pool': pool_name}, instance=instance)
    note_left(instance, CONF.host, unknown)
    _forget_move(instance)
    instance.save()
    return places


def delete_at_peer(connection, host, instance, migration, places):
    """Delete the destination's volumes of a move that has failed.

    What can't be deleted is noted, for the destination's next offer.

    :param connection: to the destination's libvirt, which may have been cut
        by what made the move fail; None if there is none
    :param places: list of (pool, volume)
    """
    if not places:
        return
    wanted = set(places)
    dest = migration.dest_compute
    if dest == CONF.host:
        connection = host.get_connection()
    if connection is not None:
        places = delete_volumes(connection, dest, places, instance)
    if places and dest != CONF.host:
        try:
            places = _delete_anew(host, instance, migration, places)
        except exception.NovaException as e:
            LOG.error('%s', e, instance=instance)
    forget_left(instance, dest, wanted)
    for place in places:
        LOG.error('Volume %(volume)s is left over in storage pool %(pool)s of '
                  'host %(host)s; it goes when this server is sent to that '
                  'host again, or must be deleted there',
                  {'volume': place[1], 'pool': place[0], 'host': dest},
                  instance=instance)
    note_left(instance, dest, places)


# A daemon that has died is usually started again within seconds.
@tenacity.retry(
    retry=tenacity.retry_if_exception_type(exception.MigrationPreCheckError),
    reraise=True, stop=tenacity.stop_after_delay(_PEER_IS_BACK),
    wait=tenacity.wait_fixed(1))
def _delete_anew(host, instance, migration, places):
    with peer.connected(
            host, peer.uri_of(migration.dest_host)) as connection:
        return delete_volumes(connection, migration.dest_compute, places,
                              instance)
