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

import nova.conf
from nova import exception
from nova.virt.libvirt.storage import moves
from nova.virt.libvirt.storage import peer
from nova.virt.libvirt.storage import pool as storage_pool

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


def delete_left(connection, instance):
    """Delete what an earlier try has left on this host and couldn't undo.

    Only what is noted by name: what else is here is never touched.

    :param connection: this host's libvirt
    """
    places = left(instance, CONF.host)
    still = delete_volumes(connection, CONF.host, places, instance)
    forget_left(instance, CONF.host, set(places) - set(still))


def restore(disks, instance):
    """Make the source's copies the disks again; the caller saves both.

    :param disks: the instance's InstanceDisks
    """
    for name, record in disks.items():
        if record.previous is not None and record.previous.host == CONF.host:
            disks.set(name, record.previous)
    for key in list(instance.system_metadata):
        if key.startswith((moves.OFFER, moves.COPY, moves.MOVED, moves.SWAP)):
            del instance.system_metadata[key]


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
