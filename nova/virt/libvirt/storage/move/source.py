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
does the work: it has new volumes made on the destination, by the compute
service there or through its libvirt (transport.py), and sends the disks into
them (pump/transfer.py). Of a peer's libvirt the storage API alone is used, so
that a URI which reaches no more than that is enough.

In order: the destination makes its offer in prep_resize (destination.py); the
source checks everything that can be checked while the guest still runs
(precheck.py) and may send disks while the guest writes to them (ahead.py);
with the guest off it copies what there is then (copy.py); the destination
compares checksums and takes the disks over (destination.py). Until a confirm
or revert the source's volume is the disk's ``previous``. What both ends know
is in state.py, how it is undone in undo.py; here is what the driver calls on
the source.

A disk's record is ``building`` from before its first byte on the destination
until the destination has found it whole. What is still ``building`` is undone
by abandon() on the source, whenever that comes.
"""

import contextlib
import os
import shutil
import time

from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_utils import excutils

from nova.compute import task_states
from nova.compute import vm_states
import nova.conf
from nova import exception
from nova import objects
from nova.objects import fields
from nova.virt import driver
from nova.virt.libvirt.storage.move import ahead
from nova.virt.libvirt.storage.move import copy as transfer
from nova.virt.libvirt.storage.move import precheck as departure
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.move import undo
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import keeping
from nova.virt.libvirt.storage.records import kinds
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import lifecycle
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# What a hard reboot asks.
is_running = transfer.is_running


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
    return any(record.is_in_pool for record in records)


def prepare(here, context, instance, block_device_info):
    """Check a migration of volumes, while the guest runs.

    :param here: the state.ThisHost
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
    outgoing = Outgoing(state.Move(
        context, here, instance, migration, disks))
    outgoing.check()
    outgoing.send_ahead()
    return outgoing


class Outgoing:
    """An instance's disks on their way out of this host.

    :param move: a Move
    """

    def __init__(self, move):
        self.migration = move.migration
        self.departure = departure.Departure(move)
        self._transfer = None
        self._exit = contextlib.ExitStack()
        self._since = 0.0

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
            # From the first pass on: the guest may still run then.
            stack.enter_context(
                transfer.running(self.departure.instance))
            self._exit = stack.pop_all()
        if self.departure.peer is not None:
            self._transfer = transfer.Transfer(self.departure)
        self._since = time.monotonic()

    def send_ahead(self):
        """Send what is worth it of the disks while the guest runs.

        :raises: InstanceFaultRollback; the guest runs on. Others if somebody
            deletes the instance.
        """
        if self._transfer is None:
            return
        first = ahead.FirstPass(self._transfer)
        self._exit.callback(first.close)
        try:
            first.run()
        except Exception as e:
            with excutils.save_and_reraise_exception() as ctxt:
                self._exit.close()
                if self.is_wanted():
                    ctxt.reraise = False
                    raise exception.InstanceFaultRollback(e)
        self._since = time.monotonic()

    def is_wanted(self) -> bool:
        """Whether the instance runs on here if it can't be moved.

        It does unless somebody deletes it.
        """
        move = self.departure.move
        try:
            return objects.Instance.get_by_uuid(
                move.context, move.instance.uuid
            ).task_state == task_states.RESIZE_MIGRATING
        except exception.InstanceNotFound:
            return False

    def set_directory_aside(self) -> str:
        """Give the instance's directory the name that a revert expects.

        :returns: its path then
        """
        directory = libvirt_utils.get_instance_path(self.departure.instance)
        aside = directory + '_resize'
        if os.path.exists(aside):
            shutil.rmtree(aside)
        os.rename(directory, aside)
        return aside

    def run(self, directory):
        """Copy the disks; the guest is off.

        :param directory: where the instance's files are on this host
        :returns: what finish_migration gets as disk_info
        :raises: StorageTransferError and others
        """
        if self._transfer is not None:
            since = time.monotonic()
            self._transfer.run(directory)
            now = time.monotonic()
            LOG.info('The server has been down for %(down).1f s by now, '
                     '%(copied).1f s of them to copy its disks',
                     {'down': now - self._since, 'copied': now - since},
                     instance=self.departure.instance)
        return jsonutils.dumps([])


def abandon(context, host, instance, migration, disks):
    """On the source: make its volumes the disks again.

    After a revert the destination has deleted its volumes. Those of a copy
    that was cut off by a crash of this compute are deleted from here.

    :param migration: the Migration, which says where the destination is
    :param disks: the instance's InstanceDisks
    """
    # After a revert the records are the source's again, unless the
    # destination took its disks for shared because its directory is: on one
    # and the same host, for example.
    _restore_swap(disks)
    places = [(record.pool, record.volume)
              for record in disks.extras.values()
              if record.is_building and
              record.migration_id in (None, migration.id)]
    for name, record in disks.items():
        if not undo.is_of(migration, record) or not (
                record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE or
                record.came_into_ceph):
            continue
        place, previous = (record.pool, record.volume), record.previous
        # One that is made anew may not have got its place yet.
        if kinds.is_copied(name) or place != (previous.pool, previous.volume):
            places.append(place)
    undo.restore(disks, migration)
    if disks.leftovers:
        leftovers.delete(host.get_connection(), disks)
        left = leftovers.on_host(disks, migration.dest_compute)
        # What the destination keeps on purpose, it deletes itself.
        kept_there = keeping.copies(disks, left)
        places += [place for place in left
                   if place not in places and place not in kept_there]
    undo.delete_at_peer(None, host, disks, migration, places)
    disks.save(context)


def settle(context, instance, disks):
    """Let the disks be where they are: there is no way back any longer.

    An instance whose resize has failed on its destination runs on there after
    a hard reboot, and can't be reverted or confirmed. The copies that were
    kept for that must never be taken for its disks again.

    :param disks: the instance's InstanceDisks
    """
    kept = [(name, record) for name, record in disks.items()
            if record.previous is not None and not record.is_building]
    if not kept and not disks.extras or (
            # Started with its host: it may be reverted yet.
            instance.vm_state == vm_states.RESIZED):
        return
    for name, record in kept:
        before = record.previous if record.has_original else None
        record.previous = None
        disks.set(name, record)
        if before is not None:
            leftovers.note(disks, before.host, [(before.pool, before.volume)])
    evacuation.forget_move(disks)
    disks.save(context)


def unfinished(context, instance, disks=None):
    """Return the Migration that has copied an instance's disks from here.

    An instance that is still on this host then is one for which Nova has
    failed between the copy and the destination's part; or this service was
    killed while it copied. A copy that runs is none of these.

    :param disks: the instance's InstanceDisks, read if None
    :returns: a Migration, or None
    """
    if disks is None:
        disks = metadata.InstanceDisks.load(context, instance)
    migration_id, cut_off = state.moved_by(disks), None
    if migration_id is None and not transfer.is_running(instance):
        migration_id = cut_off = _interrupted(disks)
    if migration_id is None:
        return None
    migration = objects.Migration.get_by_id(context, migration_id)
    # On one and the same host what is whole is accepted.
    is_from_here = (migration.source_compute == CONF.host and
                    (cut_off or migration.dest_compute != CONF.host))
    return migration if is_from_here else None


def _interrupted(disks):
    """Return the id of the Migration that has begun to copy disks of here."""
    for _name, record in disks.items():
        if (record.is_building and record.previous is not None and
                record.previous.host == CONF.host):
            return record.migration_id
    return None


def _restore_swap(disks):
    """Have the source's swap on record, if its mapping was deleted since."""
    kept = disks.extras.get(metadata.SWAP)
    if kept is not None and disks.get(metadata.SWAP) is None:
        record = kept.obj_clone()
        record.migration_id = None
        disks.set(metadata.SWAP, record)


def confirm(context, connection, instance):
    """On the source: delete the copies that were kept for a revert.

    Only those whose successors the destination has found to be whole.
    """
    disks = metadata.InstanceDisks.load(context, instance)
    if _forget_others(disks):
        disks.save(context)
    _delete_lost_swap(context, connection, disks)
    if state.moved_by(disks) is None:
        return
    done_with = set()
    for name, record in disks.extras.items():
        if record.host == CONF.host:
            done_with.add((record.pool, record.volume))
        disks.set_extra(name, None)
    for name, record in disks.items():
        previous = record.previous
        if previous is None or previous.host != CONF.host:
            continue
        if record.is_building and kinds.is_copied(name):
            LOG.error('Volume %(volume)s in pool %(pool)s is kept, as its '
                      'copy on host %(host)s was not verified',
                      {'volume': previous.volume, 'pool': previous.pool,
                       'host': record.host}, instance=instance)
            continue
        done_with.add((previous.pool, previous.volume))
        # Whatever becomes of the volume: it is the disk no longer.
        record.previous = record.migration_id = None
        disks.set(name, record)
    # Noted before nothing else names them: this compute may be killed.
    leftovers.note(disks, CONF.host, done_with)
    disks.save(context)
    leftovers.delete(connection, disks,
                     keep=keeping.staying(connection, disks))
    disks.save(context)


def _forget_others(disks):
    """Let disks that stay on Ceph be the destination's alone.

    :returns: whether that has changed a record
    """
    changed = False
    for name, record in disks.items():
        if (record.is_on_ceph and record.previous is not None and
                not record.came_into_ceph):
            record.previous = None
            disks.set(name, record)
            changed = True
    return changed


def _delete_lost_swap(context, connection, disks):
    """Delete the swap disk of a flavor whose successor has none.

    One that was sent was noted then.
    """
    if (disks.get(metadata.SWAP) is not None or
            metadata.SWAP in disks.extras or
            lifecycle.size_of(disks.instance, metadata.SWAP, None)):
        return
    leftovers.note_swap(connection, disks)
    if leftovers.on_host(disks, CONF.host):
        # Noted before it is deleted: this compute may be killed.
        disks.save(context)
        leftovers.delete(connection, disks,
                         keep=keeping.staying(connection, disks))
        disks.save(context)


def kept(disks):
    """Return what must stay when a revert deletes this host's volumes.

    :returns: set of (pool, volume). In a pool which both hosts use, or on
        one and the same host, that is the copy to which is reverted; in
        distinct pools old and new have one name.
    """
    records = [record for _name, record in disks.items()]
    previous = {(r.previous.pool, r.previous.volume) for r in records
                if r.previous is not None}
    swap = disks.extras.get(metadata.SWAP)
    if swap is not None:
        previous.add((swap.pool, swap.volume))
    return previous - {(r.pool, r.volume) for r in records}
