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
"""A disk's way from one host's storage pool to another's.

Cold migration and resize of an instance whose disks are volumes. The source
does the work: it reaches the destination's libvirt, makes new volumes there
and streams the disks into them (pump.py). Of a peer's libvirt the storage API
alone is used, so that a URI which reaches no more than that is enough.

In order: the destination makes its offer in prep_resize (arrival.py); the
source checks everything that can be checked while the guest still runs
(departure.py); with the guest off it copies (transfer.py); the destination
compares checksums and takes the disks over (arrival.py). Until a confirm or
revert the source's volume is the disk's ``previous``. What both ends know is
in moves.py, how it is undone in undo.py; here is what the driver calls on the
source.

A disk's record is ``building`` from before its first byte on the destination
until the destination has found it whole. What is still ``building`` is undone
by abandon() on the source, whenever that comes.
"""

import contextlib

from oslo_log import log as logging
from oslo_serialization import jsonutils

from nova.compute import vm_states
import nova.conf
from nova import objects
from nova.objects import fields
from nova.virt import driver
from nova.virt.libvirt.storage.move import copy as transfer
from nova.virt.libvirt.storage.move import precheck as departure
from nova.virt.libvirt.storage.move import state as moves
from nova.virt.libvirt.storage.move import undo
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def is_pool_backed(disks, block_device_info):
    """Whether an instance migrates by volumes.

    :param disks: its InstanceDisks
    """
    records = [record for _name, record in disks.items()]
    if not records:
        # Without any local disk there is nothing that SSH were needed for.
        return (CONF.libvirt.images_type == 'libvirt-storage' and
                not driver.block_device_info_get_image(block_device_info) and
                not driver.block_device_info_get_ephemerals(
                    block_device_info) and
                not driver.swap_is_usable(
                    driver.block_device_info_get_swap(block_device_info)))
    return any(record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE
               for record in records)


def prepare(virt_driver, context, instance, block_device_info):
    """Check a migration of volumes, while the guest runs.

    :param virt_driver: the LibvirtDriver
    :returns: an Outgoing, or None if the instance migrates another way
    :raises: InstanceFaultRollback
    """
    disks = metadata.InstanceDisks.from_block_device_info(
        instance, block_device_info or {})
    if not is_pool_backed(disks, block_device_info):
        return None
    # Of a migration that was neither confirmed nor reverted.
    settle(context, instance, disks)
    migration = objects.Migration.get_by_id_and_instance(
        context, instance.migration_context.migration_id, instance.uuid)
    outgoing = Outgoing(
        context, virt_driver._host, virt_driver.job_tracker, instance,
        migration, disks, virt_driver._uri(),
        migration.dest_compute == CONF.host, virt_driver.get_host_ip_addr())
    outgoing.check()
    return outgoing


class Outgoing:
    """An instance's disks on their way out of this host.

    :param host: the Host of this compute
    :param job_tracker: the driver's InstanceJobTracker: a copy ends when the
        server is deleted
    :param disks: the instance's InstanceDisks
    :param local_uri: URI of this host's libvirt
    :param same_host: whether destination and source are one compute
    :param address: under which the destination reaches this host's libvirt
    """

    def __init__(self, context, host, job_tracker, instance, migration, disks,
                 local_uri, same_host, address):
        self.migration = migration
        self.job_tracker = job_tracker
        self.departure = departure.Departure(
            context, host, instance, migration, disks, local_uri, same_host,
            address)
        self._exit = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._exit.close()

    def check(self):
        """Check all that can be known before the guest is powered off.

        Leaves the connection to the peer open: what follows stands in a
        with statement over this object.

        :raises: InstanceFaultRollback; the guest runs on
        """
        with contextlib.ExitStack() as stack:
            self.departure.check(stack)
            self._exit = stack.pop_all()

    def run(self, directory):
        """Copy the disks; the guest is off.

        :param directory: where the instance's files are on this host
        :returns: what finish_migration gets as disk_info
        :raises: StorageTransferError and others
        """
        if self.departure.peer is not None:
            transfer.Transfer(self.departure, self.job_tracker).run(directory)
        return jsonutils.dumps([])


def abandon(context, host, instance, migration, disks):
    """On the source: make its volumes the disks again.

    After a revert the destination has deleted its volumes. Those of a copy
    that was cut off by a crash of this compute are deleted from here.

    :param migration: the Migration, which says where the destination is
    :param disks: the instance's InstanceDisks
    """
    before = dict(instance.system_metadata)
    _restore_swap(instance, disks)
    # After a revert the records are the source's again, unless the
    # destination took its disks for shared because its directory is: on one
    # and the same host, for example.
    places = _extras(instance, migration)
    for name, record in disks.items():
        if not undo.is_of(instance, migration, record) or (
                record.backend != fields.LibvirtDiskBackend.LIBVIRT_STORAGE):
            continue
        place, previous = (record.pool, record.volume), record.previous
        # One that is made anew may not have got its place yet.
        if moves.is_copied(name) or place != (previous.pool, previous.volume):
            places.append(place)
    undo.restore(disks, instance, migration)
    if undo.names_left(instance):
        undo.delete_left(host.get_connection(), instance, disks)
        places += [place for place in undo.left(
            instance, migration.dest_compute) if place not in places]
    undo.delete_at_peer(None, host, instance, migration, places)
    disks.save(context)
    if instance.system_metadata != before:
        instance.save()


def _extras(instance, migration):
    """Return where what came beside the disks is on the destination."""
    moved_by = moves.moved_by(instance)
    if moved_by is None or moved_by != migration.id:
        return []
    expected = [jsonutils.loads(value)
                for key, value in instance.system_metadata.items()
                if key.startswith(moves.COPY)]
    return [tuple(e['at']) for e in expected if 'at' in e]


def settle(context, instance, disks):
    """Let the disks be where they are: there is no way back any longer.

    An instance whose resize has failed on its destination runs on there after
    a hard reboot, and can't be reverted or confirmed. The copies that were
    kept for that must never be taken for its disks again.

    :param disks: the instance's InstanceDisks
    """
    moved = moves.moved_by(instance)
    kept = [(name, record) for name, record in disks.items()
            if record.previous is not None and not record.is_building]
    if (moved is None and not kept) or (
            # Started with its host: it may be reverted yet.
            instance.vm_state == vm_states.RESIZED):
        return
    for name, record in kept:
        before, record.previous = record.previous, None
        disks.set(name, record)
        if before.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE:
            undo.note_left(instance, before.host,
                           [(before.pool, before.volume)])
    for key in (moves.MOVED, moves.SWAP):
        instance.system_metadata.pop(key, None)
    instance.save()
    disks.save(context)


def unfinished(context, instance):
    """Return the Migration that has copied an instance's disks from here.

    An instance that is still on this host then is one for which Nova has
    failed between the copy and the destination's part.

    :returns: a Migration, or None
    """
    migration_id = moves.moved_by(instance)
    if migration_id is None:
        return None
    migration = objects.Migration.get_by_id(context, migration_id)
    is_from_here = (migration.source_compute == CONF.host and
                    migration.dest_compute != CONF.host)
    return migration if is_from_here else None


def _restore_swap(instance, disks):
    """Have the source's swap on record, if its mapping was deleted since."""
    value = instance.system_metadata.get(moves.SWAP)
    if value is None or disks.get('disk.swap') is not None:
        return
    pool, volume, disk_format, size = jsonutils.loads(value)
    disks.set('disk.swap', metadata.LibvirtDiskMetadata(
        backend=fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
        format=disk_format, size=size, state=fields.LibvirtDiskState.READY,
        host=CONF.host, pool=pool, volume=volume))


def confirm(context, connection, instance):
    """On the source: delete the copies that were kept for a revert.

    Only those whose successors the destination has found to be whole.
    """
    if not instance.system_metadata.pop(moves.MOVED, None):
        return
    disks = metadata.InstanceDisks.load(context, instance)
    done_with = set()
    swap = instance.system_metadata.pop(moves.SWAP, None)
    if swap is not None:
        done_with.add(tuple(jsonutils.loads(swap)[:2]))
    for name, record in disks.items():
        previous = record.previous
        if previous is None or previous.host != CONF.host:
            continue
        if record.is_building and moves.is_copied(name):
            LOG.error('Volume %(volume)s in pool %(pool)s is kept, as its '
                      'copy on host %(host)s was not verified',
                      {'volume': previous.volume, 'pool': previous.pool,
                       'host': record.host}, instance=instance)
            continue
        done_with.add((previous.pool, previous.volume))
        # Whatever becomes of the volume: it is the disk no longer.
        record.previous = None
        disks.set(name, record)
    # Noted before nothing else names them: this compute may be killed.
    undo.note_left(instance, CONF.host, done_with)
    instance.save()
    disks.save(context)
    undo.delete_left(connection, instance, disks)
    instance.save()


def kept(disks):
    """Return what must stay when a revert deletes this host's volumes.

    :returns: set of (pool, volume). In a pool which both hosts use, or on
        one and the same host, that is the copy to which is reverted; in
        distinct pools old and new have one name.
    """
    records = [record for _name, record in disks.items()]
    previous = {(r.previous.pool, r.previous.volume) for r in records
                if r.previous is not None}
    swap = disks.instance.system_metadata.get(moves.SWAP)
    if swap is not None:
        previous.add(tuple(jsonutils.loads(swap)[:2]))
    return previous - {(r.pool, r.volume) for r in records}
