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
"""Which record each disk of an instance gets; never looks into a disk.

What becomes of the record of a disk, none meaning that there was none:

=====================  ==============  ======================================
operation              function        the record afterwards
=====================  ==============  ======================================
hard reboot, start,    take_up()       none: ready, as the guest's definition
before any move                        or disk.info says; others stay
disks are to be made:  begin()         none: building, or ready if it is an
spawn, rebuild,                        image of Ceph that is there; ready and
evacuation, rescue,                    there: stays, of this host; ready and
on arrival                             not there: building; building: what
                                       there is on this host is deleted, and
                                       it is building again. Another host's,
                                       not there, is noted as left
they are made          finished()      ready, with its size
cold migration and     arrived()       of this host, previous: what it was
resize, on arrival
revert, destination    destroyed()     previous
revert, source         went_back()     previous; none if it was made for the
                                       other flavor
evacuation that has    take_back()     another host's: ready, of this host, as
failed, on its source                  the guest's definition says
live migration,        moved()         of this host, no previous
on arrival
rebuild, shelve,       destroyed(),    none; another host's stays
delete, clean-up       forget()
=====================  ==============  ======================================

The compute service may be killed between begin() and finished(): a guest
never starts from a disk that is building.
"""

import functools
import os

from oslo_log import log as logging
from oslo_utils import units

from nova.compute import task_states
import nova.conf
from nova import exception
from nova.objects import fields
from nova.virt import driver
from nova.virt.libvirt.storage.records import cells
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import kinds
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage.records import unrecorded
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

READY = fields.LibvirtDiskState.READY
BUILDING = fields.LibvirtDiskState.BUILDING

# The driver's name for it.
REMADE = kinds.REMADE

# All local disks are destroyed, and none of them is another host's.
DESTROYING = frozenset((
    task_states.REBUILDING, task_states.SHELVING,
    task_states.SHELVING_OFFLOADING))


def of_instance(instance, block_device_info) -> 'metadata.InstanceDisks':
    """The records that came along with a call of the compute manager."""
    return metadata.InstanceDisks.from_block_device_info(
        instance, block_device_info or {})


def of_new_disks(context, instance, block_device_info):
    """The records of an instance whose disks are going to be made.

    A rebuild has taken the old disks off the record, but in a copy of the
    mappings: what it brings along says still what it has destroyed.

    :returns: the InstanceDisks
    """
    if _task_state(instance) == task_states.REBUILD_SPAWNING:
        return metadata.InstanceDisks.load(context, instance)
    return of_instance(instance, block_device_info)


def local_disks(disk_mapping: dict) -> list[tuple[str, dict]]:
    """Name and disk_info mapping of the disks that Nova itself makes."""
    return [(name, mapping) for name, mapping in disk_mapping.items()
            if name == 'disk' or name.startswith('disk.')]


def attach(disks: 'metadata.InstanceDisks', disk_mapping: dict) -> None:
    """Let the image backends see the records.

    :param disk_mapping: ``disk_info['mapping']``
    """
    for name, mapping in local_disks(disk_mapping):
        record = disks.get(name)
        if record is not None:
            mapping['metadata'] = record


def unrescued(disks: 'metadata.InstanceDisks') -> None:
    """Take the disks of a rescue off the record."""
    for name, _record in disks.items():
        if name.endswith('.rescue'):
            disks.clear(name)


def take_up(disks, disk_mapping, guest_config, configured,
            block_device_info) -> None:
    """Record the disks that were made, or came, where no records are kept.

    :param disks: the InstanceDisks; the caller saves them
    :param disk_mapping: ``disk_info['mapping']``; gets the records attached
    :param guest_config: the guest's LibvirtConfigGuest, None without one
    :param configured: the image backend that this host would use now
    :raises: exception.DiskBeingCopied if a move has not finished with a disk
    """
    refuse_half_copied(disks)
    for name, _record in disks.items():
        if name.endswith('.rescue') and name not in disk_mapping:
            disks.clear(name)  # the rescue is over
    for name, _mapping in local_disks(disk_mapping):
        record = disks.get(name)
        if record is not None and not (
                _is_outdated(record) and
                unrecorded.in_guest(guest_config, disks.instance, name)):
            continue
        record = unrecorded.made_before_records(
            disks.instance, name, guest_config, configured)
        if record is not None:
            record.size = size_of(disks.instance, name, block_device_info)
            disks.set(name, record)
            if record.is_in_pool:
                # An evacuation has failed that was to replace it.
                leftovers.forget(
                    disks, CONF.host, [(record.pool, record.volume)])
    attach(disks, disk_mapping)


def refuse_half_copied(disks):
    """Refuse to act on disks whose copy isn't whole.

    They are whole where they came from: to make one anew, or to call it
    unfinished, would be to lose it.

    :raises: exception.DiskBeingCopied
    """
    for name, record in disks.items():
        if (record.is_building and record.migration_id is not None and
                record.previous is not None and kinds.is_copied(name)):
            raise exception.DiskBeingCopied(
                instance_uuid=disks.instance.uuid, disk=name,
                migration=record.migration_id, dest=record.host,
                source=record.previous.host)


def _is_outdated(record):
    """Whether a compute without records may have brought a disk here since.

    It leaves the record as another host's, and may have converted the disk.
    """
    return (record.host != CONF.host and not record.is_building and
            record.backend in metadata.FILE_BACKENDS)


def begin(disks, disk_mapping, guest_config, image_of, configured,
          block_device_info, suffix='', stale=()) -> list[str]:
    """Record the disks that are going to be made, as ``building``.

    A disk on record as ready, and there, stays what it is. One that was
    begun and never finished is made anew.

    :param image_of: gives the Image of a disk's name and disk_info mapping
    :param suffix: ``.rescue`` if only the disks of a rescue are made
    :param stale: (pool, volume) of old copies on this host. One that has the
        name of another host's disk is not that disk.
    :returns: the names of those that are there
    :raises: exception.StorageImageOfAnotherCell if one that is to be made on
        Ceph is there as the disk of an instance of another cell
    """
    there = []
    take_up(disks, disk_mapping, guest_config, configured, block_device_info)
    # By a compute that keeps no records. Another cell sends none: what has
    # the name of a disk here is its own.
    is_sent = (not disks.items() and
               _task_state(disks.instance) == task_states.RESIZE_FINISH and
               not cells.is_arriving(disks.instance))
    brought = brought_by_resize(disks.instance)
    for name, mapping in local_disks(disk_mapping):
        if suffix and not name.endswith(suffix):
            continue
        record = disks.get(name)
        if record is not None:
            is_old = record.host != CONF.host and (
                record.pool, record.volume) in stale
            image, is_there = _look_for(record, is_old, functools.partial(
                image_of, name, {**mapping, 'metadata': record}))
            if is_there:
                if record.host != CONF.host:
                    # Evacuated, and on storage that both hosts see.
                    evacuation.take_over(disks, name, record)
                there.append(name)
                continue
            if image is not None:
                _discard(image, record)
        image = image_of(name, {
            **{key: value for key, value in mapping.items()
               if key != 'metadata'},
            'is_sent': is_sent and name not in brought,
            # names that can't be had though no volume has them
            'taken': (leftovers.names(disks) | _originals(disks) |
                      _elsewhere(disks.instance, record))})
        fresh = image.metadata(
            size_of(disks.instance, name, block_device_info))
        if (name.startswith('disk.config') and
                not fresh.is_in_pool):
            fresh.format = fields.LibvirtDiskFormat.RAW
        if (record is None and not suffix and
                fresh.backend == fields.LibvirtDiskBackend.RBD and
                image.exists()):
            if cells.is_arriving(disks.instance):
                # It has that disk yet, and no other name can be had.
                raise exception.StorageImageOfAnotherCell(
                    volume='%s_%s' % (disks.instance.uuid, name),
                    host=CONF.host)
            # Made before records were, and here no guest tells of it: the
            # instance is evacuated, or an older compute has sent it.
            fresh.state = READY
            there.append(name)
        if record is not None and record.host != CONF.host:
            # It was evacuated, or has failed to take the instance in.
            evacuation.replace(disks, record, fresh)
        elif record is not None:
            # Made anew after a move: the other host's is still kept.
            fresh.previous = record.previous
            fresh.migration_id = record.migration_id
        disks.set(name, fresh)
    attach(disks, disk_mapping)
    return there


def _look_for(record, is_old, open_image):
    """Look for a disk on record.

    An instance is evacuated to hosts, too, that lack the pool or the volume
    group of its disk. There it is made anew, as on one that has an empty one.
    On Ceph it isn't lost, and a host that lacks Ceph can't have it.

    :param is_old: whether what has its name here is none of the disks
    :param open_image: gives its Image
    :returns: that, None if this host can have none; whether it is there
    :raises: exception.StoragePoolError and others if that can't be told
    """
    try:
        image = open_image()
        return image, (record.state == READY and not is_old and
                       image.exists())
    except exception.StoragePoolNotFound:
        lacking = fields.LibvirtDiskBackend.LIBVIRT_STORAGE
        if record.host == CONF.host or record.backend != lacking:
            raise
    except RuntimeError:
        # There is no images_volume_group.
        lacking = fields.LibvirtDiskBackend.LVM
        if record.host == CONF.host or record.backend != lacking:
            raise
    return None, False


def _originals(disks):
    """Names on Ceph of what disks were before they were copied from there.

    All hosts see them, and none of them is the disk of an evacuated instance.
    Nor has a disk in another Ceph pool such a name, see came_into_ceph.
    """
    is_evacuated = (
        _task_state(disks.instance) == task_states.REBUILD_SPAWNING)
    return {record.previous.volume for _name, record in disks.items()
            if record.previous is not None and record.previous.is_on_ceph and (
                record.came_into_ceph or
                is_evacuated and not record.is_on_ceph)}


def _elsewhere(instance, record):
    """The names of other hosts' volumes, in place of which one is made."""
    if record is not None and evacuation.is_replacing(instance, record):
        record = record.previous
    if (record is None or record.host == CONF.host or
            record.backend != fields.LibvirtDiskBackend.LIBVIRT_STORAGE):
        return set()
    return {known.volume for known in (
        record, record.previous if record.has_original else record)}


def _discard(image, record):
    """Drop what an earlier try has left of a disk."""
    if not record.is_building or (
            record.host != CONF.host and not record.is_everywhere):
        return
    if record.is_in_pool:
        image.delete()
    elif image.exists():
        image.discard()


def discard_unfinished(disks, image_of) -> dict:
    """Make room for the disks that were begun and are made anew.

    :returns: their Images by name
    """
    images = {name: image_of(name, {'metadata': disks.get(name)})
              for name in disks.building()}
    for name, image in images.items():
        _discard(image, disks.get(name))
    return images


def forget_unfinished(disks, image_of, names) -> None:
    """Drop disks that were begun and are wanted no more, and their records.

    :param names: of the disks
    """
    for name in names:
        record = disks.get(name)
        _discard(image_of(name, {'metadata': record}), record)
        disks.clear(name)


def finished(disks, image_of, suffix='') -> None:
    """Note that the disks are there which :func:`begin` has recorded.

    :param suffix: ``.rescue`` if only the disks of a rescue were made; what
        was left unfinished of the others still is
    """
    measure(disks, image_of)
    if not suffix:
        for name, record in _of_flavor(disks):
            _note_size(disks, name, record,
                       size_of(disks.instance, name, None))
    disks.mark(READY, [name for name, _record in disks.items()
                       if name.endswith('.rescue') == bool(suffix)])


def _of_flavor(disks):
    """Name and record of the disks that have the flavor's sizes.

    An ephemeral disk with a mapping has the size that the mapping says, and a
    logical volume isn't resized.
    """
    found = [(name, disks.get(name)) for name in ('disk', 'disk.local')]
    return [(name, record) for name, record in found if record is not None and
            record.backend != fields.LibvirtDiskBackend.LVM]


def _note_size(disks, name, record, size):
    """Note how much a disk has grown. None ever shrinks.

    That of a legacy host may be larger than its flavor says.

    :param size: in bytes; 0 if that isn't known
    """
    if size > (record.size or 0):
        record.size = size
        disks.set(name, record)


def note_grown(disks, image_of) -> None:
    """Note the sizes of disks that grew for a flavor, and then that failed.

    The instance has its old flavor again.

    :param disks: the instance's InstanceDisks; the caller saves them
    :param image_of: gives the Image of a disk's name and disk_info mapping
    :raises: exception.StorageVolumeError, UnsafeDiskContent and others if a
        disk can't be looked at
    """
    for name, record in _of_flavor(disks):
        if record.is_in_pool and not record.is_building:
            image = image_of(name, {'metadata': record})
            _note_size(disks, name, record,
                       image.get_disk_size(record.volume))


def measure(disks, image_of) -> None:
    """Put the sizes on record which are known once the disks are there."""
    for name, record in disks.items():
        if record.size or record.backend not in metadata.FILE_BACKENDS:
            continue
        image = image_of(name, {'metadata': record})
        try:
            record.size = libvirt_utils.get_disk_size(
                image.path, record.format)
        except exception.DiskNotFound:
            continue  # no config drive, for example
        disks.set(name, record)


def destroyed(disks) -> None:
    """Forget the disks which this host has just destroyed.

    Another host's stay on record: an instance that was moved away is cleaned
    up here while it runs there. On a revert what was kept for it is the disk
    again; an image on Ceph that was made for the new flavor hasn't been
    destroyed yet: see ceph_images.made_here().
    """
    try:
        if is_destroying(disks.instance):
            evacuation.give_up(disks)
        own = [(name, record) for name, record in disks.items()
               if record.host == CONF.host]
    except exception.InvalidDiskMetadata as error:
        if is_destroying(disks.instance):
            disks.clear()
        else:
            LOG.warning('The records of destroyed disks are kept: %s', error,
                        instance=disks.instance)
        return
    reverting = _task_state(disks.instance) == task_states.RESIZE_REVERTING
    for name, record in own:
        if evacuation.is_replacing(disks.instance, record):
            evacuation.restore(disks, name, record, is_deleted=True)
        elif reverting and record.previous is not None:
            disks.set(name, record.previous)
        else:
            if is_destroying(disks.instance):
                if record.has_original:
                    _note_kept(disks, record.previous)
                if record.next is not None and record.next.is_building:
                    _note_kept(disks, record.next)
            disks.clear(name)


def is_destroying(instance) -> bool:
    """Whether what is done to an instance destroys all of its disks."""
    return _task_state(instance) in DESTROYING


def _note_kept(disks, other):
    """Have another host delete what it has of a disk.

    It has kept that for a revert, or was to get the disk in a live migration,
    and has died. Nothing else names it when the disk is gone.
    """
    if other.host != CONF.host and other.is_in_pool:
        leftovers.note(disks, other.host, [(other.pool, other.volume)])


def _task_state(instance):
    return instance.task_state if 'task_state' in instance else None


def forget(context, disks) -> None:
    """Take destroyed disks off the record, where there still is one."""
    destroyed(disks)
    try:
        disks.save(context)
    except exception.BDMNotFound:
        LOG.debug('The mappings of destroyed disks are deleted already',
                  instance=disks.instance)


def moved(disks, guest_config) -> None:
    """Note that the disks are this host's now, and there is no way back.

    The guest runs here already, so that a broken record is only logged.

    :param guest_config: its LibvirtConfigGuest
    """
    try:
        unrecorded.take_files_up(disks, guest_config)
    except exception.InvalidDiskMetadata as error:
        LOG.error('%s', error, instance=disks.instance)
        return
    for name, record in disks.items():
        if record.host != CONF.host:
            record.host, record.previous = CONF.host, None
            record.migration_id = record.expected = None
            disks.set(name, record)


def arrived(disks, moved: list[dict]) -> None:
    """Note that the disks were brought to this host.

    What they were on the other host is kept for a revert.

    :param moved: type and path of the disks as the other host had them; it
        counts where an older compute service there keeps no records
    """
    for info in moved:
        name = os.path.basename(info['path'])
        record = disks.get(name)
        if info.get('type') in unrecorded.FILE_FORMATS and (
                record is None or
                unrecorded.is_replaced(disks, name, record, info)):
            unrecorded.replace_by_file(
                disks, name, record, info['type'],
                info.get('virt_disk_size'))
    for name, record in disks.items():
        if record.host != CONF.host:
            before = record.obj_clone()
            before.previous = before.migration_id = None
            record.previous = before
            record.migration_id = None
            record.host = CONF.host
            disks.set(name, record)


def adopt(disks) -> None:
    """Note that disks on Ceph are this host's, which runs the guest.

    All hosts see them. The destination of a move, or of an evacuation, was
    killed, or Ceph didn't answer, before that was on record.
    """
    for name, record in disks.items():
        if (record.is_everywhere and not record.is_building and
                record.host != CONF.host):
            record.host, record.migration_id = CONF.host, None
            disks.set(name, record)


def went_back(disks) -> None:
    """Note that the disks are again what they were on this host.

    What was made for the flavor that is given up goes with its host. On Ceph,
    or if that is this very host, it is noted as left on this one.
    """
    for name, record in disks.items():
        before = record.previous
        if record.host == CONF.host:
            if (name == 'disk.local' and record.is_in_pool and
                    _is_brought(disks.instance, name)):
                _leave(disks, name, record)
            continue
        if before is not None and before.host == CONF.host:
            disks.set(name, before)
        elif not record.is_everywhere or record.is_building or (
                _is_brought(disks.instance, name)):
            # Made on the other host: not here.
            _leave(disks, name, record)
    adopt(disks)
    for name, record in _of_flavor(disks):
        size = size_of(disks.instance, name, None)
        # A volume that has grown was another one.
        if size and (not record.is_in_pool or record.is_on_ceph):
            record.size = size
            disks.set(name, record)


def brought_by_resize(instance) -> set[str]:
    """The disks that only the new flavor of a resize has.

    :param instance: the Instance, with the new flavor
    :returns: names of disks that the guest has never had before
    """
    old = instance.old_flavor if 'old_flavor' in instance else None
    if not old:
        return set()
    return {name for name, size in (('disk.local', old.ephemeral_gb),
                                    ('disk.swap', old.swap)) if not size}


def _is_brought(instance, name):
    """Whether a flavor that is given up has brought a disk."""
    return name in ('disk.local', 'disk.swap') and not size_of(
        instance, name, None)


def _leave(disks, name, record):
    """Forget a disk; if it is there, it is for this host to delete."""
    if record.is_on_ceph or record.is_in_pool and record.host == CONF.host:
        leftovers.note(disks, CONF.host, [(record.pool, record.volume)])
    disks.clear(name)


def size_of(instance, name: str, block_device_info) -> int:
    """What a disk's size is by flavor and mappings, in bytes.

    :returns: 0 if neither of them says
    """
    flavor = instance.flavor
    ephemerals = driver.block_device_info_get_ephemerals(block_device_info)
    if name == 'disk':
        return flavor.root_gb * units.Gi
    if name == 'disk.local':
        return flavor.ephemeral_gb * units.Gi
    if name == 'disk.swap':
        swap = driver.block_device_info_get_swap(block_device_info)
        return (swap['swap_size'] or flavor.swap) * units.Mi
    if name.startswith('disk.eph') and not name.endswith('.rescue'):
        number = int(name.removeprefix('disk.eph'))
        if number < len(ephemerals):
            return ephemerals[number]['size'] * units.Gi
    return 0
