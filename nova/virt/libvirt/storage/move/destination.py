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
"""The destination's half of a move of volumes.

Before the source does anything: what this host can take (offer()). When all
disks are here: whether they are what was sent (accept()).
"""

import os
import time

from oslo_concurrency import processutils
from oslo_log import log as logging
from oslo_utils import strutils
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
import nova.privsep.qemu
import nova.privsep.storage
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.move import ceph_images
from nova.virt.libvirt.storage.move import item
from nova.virt.libvirt.storage.move import offer as storage_offer
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import room
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.move import transport
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import keeping
from nova.virt.libvirt.storage.records import kinds
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import lifecycle
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def offer(connection, instance, migration, disks):
    """Check that this host can take an instance's volumes, and say so.

    The offer goes with the instance's MigrationContext to the source. Nothing
    is left here if the source makes no use of it.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks
    :raises: MigrationPreCheckError, with which another host is tried
    """
    if disks.leftovers and not _was_to_be_evacuated(instance, disks):
        leftovers.delete(connection, disks, keep=keeping.staying(
            connection, disks, for_move=True))
        disks.save(instance._context)
    pools = {}
    for kind in _kinds_that_may_come(connection, disks):
        pools.setdefault(setup.pool_name_for(kind), []).append(kind)
    if not pools:
        return
    pools.setdefault(_pool_of_files(connection), []).append(
        item.GuestFiles.NAME)
    for pool_name in pools:
        pool = setup.receiving_pool(connection, pool_name, CONF.host)
        state.check_pool(pool)
        pool.check_mounted()
    if not os.access(CONF.instances_path, os.W_OK):
        raise exception.MigrationPreCheckError(reason=_(
            "let the user of nova-compute write to %(directory)s of host "
            "%(host)s") % {
                'directory': CONF.instances_path, 'host': CONF.host})
    pools.setdefault(CONF.libvirt.storage_base_images_pool, []).append(
        item.BaseImage.NAME)
    there = [setup.pool_named(connection, name) for name in pools]
    free, file_systems = zip(*[_file_system(pool, number)
                               for number, pool in enumerate(there)])
    storage_offer.save(instance, storage_offer.Offer(
        migration_id=migration.id, owner=[os.geteuid(), os.getegid()],
        pools={name: storage_offer.OfferedPool(
            kinds=sorted(of_pool), free=free[number],
            file_system=file_systems.index(file_systems[number]),
            ceph=state.ceph_of(there[number]))
               for number, (name, of_pool) in enumerate(pools.items())},
        preallocates=preallocates()))


def _pool_of_files(connection):
    """Return the name of the pool for what is no disk."""
    return state.file_pool(connection, setup.pool_name_for(
        item.GuestFiles.NAME)).name


def _file_system(pool, number):
    """Say how much room a pool's file system has, and which one it is.

    libvirt says what it was when it last looked, at the pool's refresh.

    :param pool: a StoragePool of this host
    :param number: of the pool among those that are asked for
    :returns: bytes, None if libvirt alone knows; a value that pools in one
        file system share
    """
    try:
        path = pool.directory()
        images = pool.ceph()
        if images is not None:
            return images.sizes()[1], ('ceph', images.identity)
        if path is None:
            return pool.info().available, number
        return (libvirt_utils.get_fs_info(path)['free'],
                ('device', _device_of(path)))
    except (exception.StoragePoolError, OSError):
        return None, number


def _device_of(path):
    return os.stat(path).st_dev


def _was_to_be_evacuated(instance, disks):
    """Whether an instance is here, and no disk of it is on record here.

    An evacuation from here has failed, then: what it was to replace is noted
    as left, and is still the disks.
    """
    return 'host' in instance and instance.host == CONF.host and not any(
        record.host == CONF.host for _name, record in disks.items())


def _kinds_that_may_come(connection, disks):
    """Return the kinds of an instance's disks that may come as volumes.

    On a source with pools, files become volumes just before they travel; of
    disks that aren't on record yet, even the names are known there only.
    """
    records = disks.items()
    travel = metadata.POOL_BACKENDS
    if CONF.libvirt.images_type == 'libvirt-storage':
        if not records:
            return kinds.ALL
        travel += metadata.FILE_BACKENDS + (fields.LibvirtDiskBackend.LVM,)
    return sorted({kinds.of(name) for name, record in records
                   if record.backend in travel or
                   _is_taken_over(connection, name, record)})


def _is_taken_over(connection, name, record):
    """Whether a disk of images_type rbd may be one of a pool of this host."""
    if (record.backend != fields.LibvirtDiskBackend.RBD or
            CONF.libvirt.images_type != 'libvirt-storage'):
        return False
    pool = setup.pool_of(connection, name)
    return pool.exists() and pool.kind().is_ceph


def accept(context, instance, disks, connection, local_uri, cache_base,
           verify_known=None):
    """Compare the volumes that came with what was sent, and take them over.

    Does nothing for disks that are taken over already, so that a hard reboot
    can finish what a failure of finish_migration left.

    :param disks: the instance's InstanceDisks
    :param connection: this host's libvirt
    :param local_uri: its URI
    :param cache_base: makes sure that the base image of an overlay is in this
        host's image cache, and returns its path
    :param verify_known: compares a disk by what was read of it before, given
        the instance and the record; returns False if all has to be read
    :returns: whether the instance has volumes
    :raises: StorageTransferMismatch and others; the source has its copy, and
        calling this again tries it again
    """
    came, images = [], []
    extras = disks.extras
    for extra in item.EXTRAS:
        if extra.NAME in extras:
            _take_extra(context, disks, connection, local_uri, extra)
    if leftovers.on_host(disks, CONF.host):
        leftovers.delete(connection, disks)
        disks.save(context)
    for name, record in disks.items():
        if (record.previous is None or record.host != CONF.host or
                not record.is_building or not kinds.is_copied(name)):
            continue
        if record.is_on_ceph:
            ceph_images.verify(
                instance, record, setup.pool_named(connection, record.pool))
            came.append(name)
            continue
        try:
            _verify(instance, record, local_uri, verify_known)
        except exception.StorageTransferMismatch as e:
            _copy_again(instance, record, connection, local_uri, e)
        pool = storage_pool.StoragePool(connection, record.pool, CONF.host)
        pool.check_mounted()
        volume = pool.volume(record.volume)
        room.give_back(connection, volume, instance)
        if not pool.kind().is_directory:
            # Of a file the verification has seen to that.
            nova.privsep.storage.sync(volume.path)
        if record.format == fields.LibvirtDiskFormat.QCOW2:
            images.append((volume, record.size))
        elif pool.kind().is_directory:
            # A logical volume is rounded up.
            content.look_at_raw(volume.path, volume.physical(), record.size)
        _reserve(connection, instance, record)
        came.append(name)
    # Another header is no longer what was sent: if something else fails, or
    # this compute is killed, that is found again. So last, and the root disk,
    # which alone has a base image, behind all others.
    for volume, size in reversed(images):
        _adopt_base(volume, instance, cache_base, size)
    for name in came:
        record = disks.get(name)
        record.state = fields.LibvirtDiskState.READY
        record.expected = None
        disks.set(name, record)
    if came:
        disks.save(context)
    return any(record.is_in_pool for _name, record in disks.items())


def is_due(instance, disks):
    """Whether something has come that accept() hasn't seen.

    :param disks: the instance's InstanceDisks
    """
    return bool(disks.building()) or any(
        extra.NAME in disks.extras for extra in item.EXTRAS)


def give_back(connection, instance, disks, keep, is_copy=False):
    """Delete this host's volumes of an instance whose move is reverted.

    The records name the source's volumes before the first one is deleted:
    what is left of the others is never booted from.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks
    :param keep: (pool, volume) of what stays
    :param is_copy: whether the instance goes back to another cell
    :returns: False if something is left and should be tried again
    """
    places = [(record.pool, record.volume) for _name, record in disks.items()
              if record.host == CONF.host and record.backend ==
              fields.LibvirtDiskBackend.LIBVIRT_STORAGE]
    staying = keeping.given_back(connection, disks)
    images = ceph_images.made_here(disks)
    places += images
    if places:
        lifecycle.destroyed(disks)
        leftovers.note(disks, CONF.host, places)
        disks.save(instance._context)
    is_gone = ownership.delete_volumes(
        connection, instance, keep={*keep, *staying}, disks=disks,
        is_copy=is_copy)
    if leftovers.delete_volumes(connection, CONF.host, images, instance):
        is_gone = False
    if places and is_gone:
        leftovers.forget(disks, CONF.host, set(places) - staying)
        disks.save(instance._context)
    return is_gone


def give_files_back(connection, disks):
    """Delete the volumes which files have become whose move is reverted.

    Both hosts see the files, so that nobody deletes disks here; the other one
    has those that were sent.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks, which are saved
    """
    own = [record for _name, record in disks.items()
           if record.host == CONF.host]
    if any(record.migration_id is not None or record.previous is not None and
           record.previous.is_in_pool for record in own):
        return    # Volumes were sent.
    places = [(record.pool, record.volume) for record in own
              if record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE]
    if places:
        lifecycle.destroyed(disks)
        leftovers.note(disks, CONF.host, places)
        disks.save(disks.instance._context)
        leftovers.delete(connection, disks)
        disks.save(disks.instance._context)


def _take_extra(context, disks, connection, local_uri, extra):
    """Take over what has come beside the disks.

    Done twice it comes to the same.

    :param extra: its class of item.EXTRAS
    """
    instance, record = disks.instance, disks.extras[extra.NAME]
    if not extra.is_here(context, instance):
        _verify(instance, record, local_uri)
        volume = storage_pool.StoragePool(
            connection, record.pool, CONF.host).volume(record.volume)
        room.give_back(connection, volume, instance)
        extra.take(instance, volume)
    disks.set_extra(extra.NAME, None)
    # Noted before nothing else names it: this compute may be killed.
    leftovers.note(disks, CONF.host, [(record.pool, record.volume)])
    disks.save(context)


def _verify(instance, record, local_uri, verify_known=None):
    expected = record.expected
    if expected is None:
        raise exception.StorageTransferMismatch(
            volume=record.volume, where=CONF.host,
            reason=_("nothing is known of its checksum"))
    start = time.monotonic()
    is_known = verify_known is not None and verify_known(instance, record)
    if not is_known:
        pump.verify(
            pump.Volume(local_uri, record.pool, record.volume),
            expected.length, expected.checksum, key=expected.key,
            stall_timeout=CONF.libvirt.storage_migration_stall_timeout)
    LOG.info('Volume %(volume)s is what was sent (verified in %(seconds).1f '
             's%(known)s)', {
                 'volume': record.volume,
                 'seconds': time.monotonic() - start,
                 'known': ', after most of it before' if is_known else ''},
             instance=instance)


def preallocates():
    """Whether disks get all of their space on this host at once."""
    return strutils.to_slug(CONF.preallocate_images) == 'space'


def _reserve(connection, instance, record):
    """Allocate what the copy has left out: only what was written travels.

    As the image backends do it when they make a disk.
    """
    if not preallocates() or not record.size:
        return
    pool = storage_pool.StoragePool(connection, record.pool, CONF.host)
    if not pool.kind().sparse:
        return
    path = pool.volume(record.volume).path
    if not os.access(path, os.W_OK):
        return
    try:
        # Not the length of the file: of qcow2 it is another one.
        nova.privsep.storage.allocate(path, record.size)
    except (OSError, processutils.ProcessExecutionError) as e:
        LOG.warning('No space is reserved for volume %(volume)s in storage '
                    'pool %(pool)s, as preallocate_images says: %(error)s',
                    {'volume': record.volume, 'pool': record.pool,
                     'error': e}, instance=instance)


def _not_copied_again(record, mismatch):
    before = record.previous
    return exception.StorageTransferMismatch(
        volume=record.volume, where=CONF.host,
        reason=_("%(first)s; nothing copies it again over NBD alone: write "
                 "volume %(volume)s in storage pool %(pool)s of host %(host)s "
                 "over it, then hard reboot the server") % {
                     'first': mismatch.kwargs['reason'],
                     'volume': before.volume, 'pool': before.pool,
                     'host': before.host})


def _copy_again(instance, record, connection, local_uri, mismatch):
    """Fetch a disk that is not what was sent from the source once more.

    The source keeps it until a confirm, and an instance which is here already
    can't be sent back.

    :param record: the disk's record
    :param mismatch: what was found
    :raises: StorageTransferMismatch
    """
    expected = record.expected
    if expected is None or record.previous.host != CONF.host and (
            expected.address is None or
            transport.LIBVIRT not in transport.ways()):
        # A copy over NBD the source alone can begin.
        raise _not_copied_again(record, mismatch)
    LOG.warning('%s It is copied again.', mismatch, instance=instance)
    before = record.previous
    length = expected.length
    pool = storage_pool.StoragePool(connection, record.pool, CONF.host)
    try:
        leftovers.delete_volumes(
            connection, CONF.host, [(record.pool, record.volume)], instance)
        state.create_volume(
            pool, record.volume, length, (os.geteuid(), os.getegid()),
            allocation=length if room.is_reserved(connection) else 0)
        pump.copy(
            pump.Volume(local_uri if before.host == CONF.host else
                        peer.uri_of(expected.address),
                        before.pool, before.volume),
            pump.Volume(local_uri, record.pool, record.volume), length,
            sparse=not room.is_reserved(connection),
            # Whether its pool knows of holes there, the source can tell alone.
            find_holes=True,
            bandwidth=CONF.libvirt.storage_migration_bandwidth * units.Mi,
            stall_timeout=room.stall_timeout(length, not pool.kind().sparse))
        _verify(instance, record, local_uri)
    except exception.NovaException as e:
        raise exception.StorageTransferMismatch(
            volume=record.volume, where=CONF.host,
            reason=_("%(first)s; it could not be copied again from volume "
                     "%(volume)s in storage pool %(pool)s of host %(host)s: "
                     "%(again)s") % {
                         'first': mismatch.kwargs['reason'],
                         'volume': before.volume,
                         'pool': before.pool, 'host': before.host,
                         'again': e})


def _adopt_base(volume, instance, cache_base, size=0):
    """Look at what has come, and have its header name this host's base image.

    :param size: bytes of virtual size on record
    :raises: UnsafeDiskContent if the header names something which isn't in
        an image cache, or there is anything else wrong with it;
        StorageBaseImageMissing if this host can't have the base
    """
    info = content.look_at_qcow2(volume.path, size)
    if info.backing_file is None:
        return
    name = os.path.basename(info.backing_file)
    wanted = imagecache.get_cache_fname(instance.image_ref)
    if name != wanted or not os.path.isabs(info.backing_file):
        raise exception.UnsafeDiskContent(path=volume.path, reason=_(
            "it depends on %(file)s, which is not the base image %(wanted)s "
            "in an image cache") % {
                'file': info.backing_file, 'wanted': wanted})
    try:
        base = cache_base()
    except Exception as e:
        raise exception.StorageBaseImageMissing(
            volume=volume.name, image=instance.image_ref, host=CONF.host,
            reason=e) from e
    image_cache.lay_over(
        volume, info, base, imagebackend._get_base_format(base), instance)
