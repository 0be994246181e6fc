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
import tenacity

from nova.compute import task_states
import nova.conf
from nova import exception
from nova import objects
from nova.virt.libvirt.storage.move import ceph_images
from nova.virt.libvirt.storage.move import peer_libvirt
from nova.virt.libvirt.storage.move import transport
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import keeping
from nova.virt.libvirt.storage.records import leftovers

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# What the driver calls.
old_copies = evacuation.old_copies
after_evacuation = evacuation.after_evacuation

# Seconds for which a peer's daemon that isn't there is waited for.
_PEER_IS_BACK = 8


def is_of(migration, record):
    """Whether a disk's ``previous`` is where a migration has taken it from.

    It may be of an earlier one, which was never confirmed nor reverted; what
    has been written since would be lost.
    """
    return record.previous is not None and (
        record.previous.host == CONF.host) and (
        record.is_building or record.migration_id == migration.id)


def restore(disks, migration):
    """Make the source's copies the disks again.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param migration: the Migration which is undone
    """
    for name, record in disks.items():
        if is_of(migration, record):
            disks.set(name, record.previous)
    for name in disks.extras:
        disks.set_extra(name, None)


def delete_at_peer(peer, host, disks, migration, places):
    """Delete the destination's volumes of a move that has failed.

    What can't be deleted is noted, for the destination's next offer; and so
    is what stays on purpose, to be written over by the next try.

    :param peer: the destination as a Peer, which may be out of reach for
        what made the move fail; None if there is none
    :param disks: the instance's InstanceDisks; the caller saves them
    :param places: list of (pool, volume)
    """
    if not places:
        return
    instance = disks.instance
    wanted = set(places)
    dest = migration.dest_compute
    staying = set()
    left, places = ceph_images.delete(host, disks, migration, places)
    if peer is not None and peer.keeps and _is_wanted(instance):
        staying = keeping.copies(disks, places)
        places = [place for place in places if place not in staying]
    if dest == CONF.host:
        peer = _this_host(host, instance)
    if peer is not None and places:
        places = peer.delete(places, instance)
    if places and dest != CONF.host and (peer is None or peer.may_be_cut):
        try:
            places = _delete_anew(host, instance, migration, places)
        except exception.NovaException as e:
            LOG.error('%s', e, instance=instance)
    leftovers.forget(disks, dest, wanted)
    for place in places:
        LOG.error('Volume %(volume)s is left over in storage pool %(pool)s of '
                  'host %(host)s, which deletes it later; nova-manage libvirt '
                  'list_disks --orphans there says whether it is gone',
                  {'volume': place[1], 'pool': place[0], 'host': dest},
                  instance=instance)
    for place in left:
        LOG.error('Image %(volume)s is left over in the Ceph pool of storage '
                  'pool %(pool)s of host %(host)s, which deletes it when the '
                  'server is moved to it again, or is deleted there; rbd ls '
                  'says whether it is gone',
                  {'volume': place[1], 'pool': place[0], 'host': dest},
                  instance=instance)
    leftovers.note(disks, dest, [*left, *places, *sorted(staying)])


def _this_host(host, instance):
    """This host as a Peer; None if its libvirt is away."""
    try:
        return peer_libvirt.LibvirtPeer(
            host.get_connection(), CONF.host, CONF.host)
    except exception.NovaException as e:
        LOG.error('%s', e, instance=instance)
        return None


def _is_wanted(instance):
    """Whether it may be moved once more; of no use if it is deleted."""
    if not keeping.is_on():
        return False
    try:
        return objects.Instance.get_by_uuid(
            instance._context, instance.uuid).task_state not in (
                task_states.DELETING, task_states.SOFT_DELETING)
    except exception.NovaException as e:
        LOG.debug('No copies are kept: %s', e, instance=instance)
        return False


# A daemon that has died is usually started again within seconds.
@tenacity.retry(
    retry=tenacity.retry_if_exception_type(exception.MigrationPreCheckError),
    reraise=True, stop=tenacity.stop_after_delay(_PEER_IS_BACK),
    wait=tenacity.wait_fixed(1))
def _delete_anew(host, instance, migration, places):
    return transport.delete_again(host, instance, migration, places)
