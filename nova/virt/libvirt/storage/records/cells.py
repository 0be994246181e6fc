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
"""An instance of which two cells have a copy: a resize moves it between them.

Each cell has records of the disks that its own copy has. In a pool that hosts
of both use, the disks of the other one have the same prefix.
"""

from oslo_log import log as logging

from nova.compute import task_states
import nova.conf
from nova import exception
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.records import keeping
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def is_arriving(instance) -> bool:
    """Whether this host makes the disks of an instance of another cell.

    It is hidden until both cells have it.

    :param instance: the Instance
    """
    return ('task_state' in instance and
            instance.task_state == task_states.RESIZE_FINISH and
            'host' in instance and instance.host != CONF.host and
            'hidden' in instance and bool(instance.hidden))


def has_two(instance) -> bool:
    """Whether another cell has a copy of an instance, too.

    :param instance: the Instance
    """
    if is_arriving(instance):
        # It comes without its migration context.
        return True
    try:
        move = instance.migration_context
        return move is not None and move.is_cross_cell_move()
    except exception.NovaException as e:
        LOG.debug('No move of the instance is known: %s', e,
                  instance=instance)
        return False


def of_the_other(context, connection, disks) -> set[tuple[str, str]]:
    """What may be a disk of an instance that another host has.

    Be it of the other cell's copy, or one that is evacuated.

    :param context: an admin's
    :param connection: this host's libvirt
    :param disks: the InstanceDisks, of this cell's copy; read if it has none
    :returns: set of (pool, volume)
    :raises: exception.StoragePoolError, exception.InvalidDiskMetadata; then
        nothing may be deleted
    """
    if not disks.has_mappings:
        disks = metadata.InstanceDisks.load(context, disks.instance)
    own = {(record.pool, record.volume) for _name, known in disks.items()
           for record in (known, known.previous, known.next)
           if record is not None and record.host == CONF.host and (
               # one volume that both hosts see
               record is not known.next or record.is_building) and not (
                   record is known and known.is_where_it_was)}
    # What is noted as left may be gone, and its name the other's by now.
    places = {(volume.pool.name, volume.name) for volume in
              ownership.get_volumes(connection, disks.instance.uuid,
                                    disks=disks)}
    return {place for place in places - own
            if not keeping.is_private(connection, place[0])}
