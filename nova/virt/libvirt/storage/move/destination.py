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

from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
import nova.privsep.qemu
from nova.virt import images
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.move import base_image as storage_base
from nova.virt.libvirt.storage.move import guest_files as files
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import state as moves
from nova.virt.libvirt.storage.move import undo
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def offer(connection, instance, migration, disks):
    """Check that this host can take an instance's volumes, and say so.

    The offer goes with the instance to the source: the migration's id ('m'),
    who is to own the volumes ('o': user and group id), which kinds of disks
    go to which pool ('p'), and in the order of these pools the bytes that are
    free ('f') and the file system that it is in, as a number ('d'). Nothing
    is left here if the source makes no use of it.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks
    :raises: MigrationPreCheckError, with which another host is tried
    """
    undo.delete_left(connection, instance, disks)
    pools = {}
    for kind in _kinds_that_may_come(disks):
        pools.setdefault(storage_pool.pool_name_for(kind), []).append(kind)
    if not pools:
        return
    pools.setdefault(storage_pool.pool_name_for(files.NAME), []).append(
        files.NAME)
    for pool_name in pools:
        if (pool_name == CONF.libvirt.storage_disks_pool and
                CONF.libvirt.images_type == 'libvirt-storage'):
            pool = storage_pool.StoragePool.ensure(
                connection, storage_pool.disks_pool_config(), CONF.host)
        else:
            pool = storage_pool.StoragePool(connection, pool_name, CONF.host)
        moves.check_pool(pool)
    if not os.access(CONF.instances_path, os.W_OK):
        raise exception.MigrationPreCheckError(reason=_(
            "%(directory)s of host %(host)s isn't writable") % {
                'directory': CONF.instances_path, 'host': CONF.host})
    pools.setdefault(CONF.libvirt.storage_base_images_pool, []).append(
        storage_base.NAME)
    free, file_systems = zip(*[_file_system(connection, name, number)
                               for number, name in enumerate(pools)])
    value = jsonutils.dumps(
        {'m': migration.id, 'o': [os.geteuid(), os.getegid()], 'p': pools,
         'f': free, 'd': [file_systems.index(f) for f in file_systems]},
        separators=(',', ':'))
    if len(value) > moves.MAX_VALUE:
        raise exception.MigrationPreCheckError(reason=_(
            "the names of host %(host)s's storage pools are too long to be "
            "told: %(value)s") % {'host': CONF.host, 'value': value})
    instance.system_metadata[moves.OFFER] = value
    instance.save()


def _file_system(connection, pool_name, number):
    """Say how much room a pool's file system has, and which one it is.

    libvirt says what it was when it last looked, at the pool's refresh.

    :param number: of the pool among those that are asked for
    :returns: bytes, None if libvirt alone knows; a value that pools in one
        file system share
    """
    pool = storage_pool.StoragePool(connection, pool_name, CONF.host)
    try:
        path = pool.config().target_path
        return (libvirt_utils.get_fs_info(path)['free'],
                ('device', _device_of(path)))
    except (exception.StoragePoolError, OSError, TypeError):
        return None, number


def _device_of(path):
    return os.stat(path).st_dev


def _kinds_that_may_come(disks):
    """Return the kinds of an instance's disks that may come as volumes.

    On a source with pools, files become volumes just before they travel; of
    disks that aren't on record yet, even the names are known there only.
    """
    records = disks.items()
    if CONF.libvirt.images_type == 'libvirt-storage':
        if not records:
            return moves.KINDS
        travel = metadata.FILE_BACKENDS + (
            fields.LibvirtDiskBackend.LIBVIRT_STORAGE,)
    else:
        travel = (fields.LibvirtDiskBackend.LIBVIRT_STORAGE,)
    return sorted({moves.kind_of(name) for name, record in records
                   if record.backend in travel})


def accept(context, instance, disks, connection, local_uri, cache_base):
    """Compare the volumes that came with what was sent, and take them over.

    Does nothing for disks that are taken over already, so that a hard reboot
    can finish what a failure of finish_migration left.

    :param disks: the instance's InstanceDisks
    :param connection: this host's libvirt
    :param local_uri: its URI
    :param cache_base: makes sure that the base image of an overlay is in this
        host's image cache, and returns its path
    :returns: whether the instance has volumes
    :raises: StorageTransferMismatch and others; the source has its copy, and
        calling this again tries it again
    """
    came = []
    if moves.COPY + storage_base.NAME in instance.system_metadata:
        _take_base(instance, connection, local_uri)
    if moves.COPY + files.NAME in instance.system_metadata:
        _take_files(instance, disks, connection, local_uri)
    for name, record in disks.items():
        if (record.previous is None or record.host != CONF.host or
                not record.is_building or not moves.is_copied(name)):
            continue
        try:
            _verify(instance, name, local_uri, record.pool, record.volume)
        except exception.StorageTransferMismatch as e:
            _copy_again(instance, name, record, connection, local_uri, e)
        if record.format == fields.LibvirtDiskFormat.QCOW2:
            volume = storage_pool.StoragePool(
                connection, record.pool, CONF.host).volume(record.volume)
            _adopt_base(volume, instance, cache_base)
        came.append(name)
    if came:
        disks.mark(fields.LibvirtDiskState.READY, came)
        disks.save(context)
        for name in came:
            instance.system_metadata.pop(moves.COPY + name, None)
        instance.save()
    return any(record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE
               for _name, record in disks.items())


def is_due(instance, disks):
    """Whether something has come that accept() hasn't seen.

    :param disks: the instance's InstanceDisks
    """
    return bool(disks.building()) or (
        moves.COPY + files.NAME in instance.system_metadata)


def _take_base(instance, connection, local_uri):
    pool = storage_base.pool(connection)
    name = storage_base.name_on_the_way(instance)
    if storage_base.is_cached(instance):
        # An earlier call has put it there, or somebody was faster.
        undo.note_left(instance, CONF.host, undo.delete_volumes(
            connection, CONF.host, [(pool.name, name)], instance))
    else:
        _verify(instance, storage_base.NAME, local_uri, pool.name, name)
        storage_base.take(instance, pool.volume(name))
    del instance.system_metadata[moves.COPY + storage_base.NAME]
    instance.save()


def _take_files(instance, disks, connection, local_uri):
    key = moves.COPY + files.NAME
    pool_name, name = jsonutils.loads(instance.system_metadata[key])['at']
    _verify(instance, files.NAME, local_uri, pool_name, name)
    pool = storage_pool.StoragePool(connection, pool_name, CONF.host)
    files.unpack(instance, pool.volume(name),
                 libvirt_utils.get_instance_path(instance))
    del instance.system_metadata[key]
    undo.note_left(instance, CONF.host, [(pool_name, name)])
    instance.save()
    undo.delete_left(connection, instance, disks)
    instance.save()


def _verify(instance, name, local_uri, pool_name, volume_name):
    expected = instance.system_metadata.get(moves.COPY + name)
    if not expected:
        raise exception.StorageTransferMismatch(
            volume=volume_name, where=CONF.host,
            reason=_("nothing is known of its checksum"))
    expected = jsonutils.loads(expected)
    start = time.monotonic()
    pump.verify(
        pump.Volume(local_uri, pool_name, volume_name), expected['length'],
        expected['checksum'], key=expected['key'],
        stall_timeout=CONF.libvirt.storage_migration_stall_timeout)
    LOG.info('Volume %(volume)s is what was sent (verified in %(seconds).1f '
             's)', {'volume': volume_name,
                    'seconds': time.monotonic() - start}, instance=instance)


def _copy_again(instance, name, record, connection, local_uri, mismatch):
    """Fetch a disk that is not what was sent from the source once more.

    The source keeps it until a confirm, and a server which is here already
    can't be sent back.

    :param record: the disk's record
    :param mismatch: what was found
    :raises: StorageTransferMismatch
    """
    expected = instance.system_metadata.get(moves.COPY + name)
    if not expected:
        raise mismatch
    LOG.warning('%s It is copied again.', mismatch, instance=instance)
    before = record.previous
    length = jsonutils.loads(expected)['length']
    _migration, address = jsonutils.loads(
        instance.system_metadata[moves.MOVED])
    pool = storage_pool.StoragePool(connection, record.pool, CONF.host)
    try:
        undo.delete_volumes(connection, CONF.host,
                            [(record.pool, record.volume)], instance)
        moves.create_volume(pool, record.volume, length,
                            (os.geteuid(), os.getegid()))
        pump.copy(
            pump.Volume(local_uri if before.host == CONF.host else
                        peer.uri_of(address), before.pool, before.volume),
            pump.Volume(local_uri, record.pool, record.volume), length,
            sparse=moves.check_pool(pool) in moves.FILE_POOLS,
            bandwidth=CONF.libvirt.storage_migration_bandwidth * units.Mi,
            stall_timeout=CONF.libvirt.storage_migration_stall_timeout)
        _verify(instance, name, local_uri, record.pool, record.volume)
    except exception.NovaException as e:
        raise exception.StorageTransferMismatch(
            volume=record.volume, where=CONF.host,
            reason=_("%(first)s; it could not be copied again from volume "
                     "%(volume)s in storage pool %(pool)s of host %(host)s: "
                     "%(again)s When the cause is removed, a hard reboot of "
                     "the server tries it once more") % {
                         'first': mismatch.kwargs['reason'],
                         'volume': before.volume,
                         'pool': before.pool, 'host': before.host,
                         'again': e})


def _adopt_base(volume, instance, cache_base):
    """Make an overlay's header name its base in this host's image cache.

    Two caches have one content under one name; the directory may differ, and
    with force_raw_images the format. Under another format's name the guest
    would get the bytes of the file for those of the image.

    :raises: InvalidDiskInfo if the header names something which isn't in an
        image cache, or this host can't have the base
    """
    info = images.privileged_qemu_img_info(
        volume.path, format=fields.LibvirtDiskFormat.QCOW2)
    if info.backing_file is None:
        return
    name = os.path.basename(info.backing_file)
    wanted = imagecache.get_cache_fname(instance.image_ref)
    if name != wanted or not os.path.isabs(info.backing_file):
        raise exception.InvalidDiskInfo(reason=_(
            "volume %(volume)s depends on %(file)s, which is not the base "
            "image %(wanted)s in an image cache") % {
                'volume': volume.name, 'file': info.backing_file,
                'wanted': wanted})
    try:
        base = cache_base()
    except Exception as e:
        raise exception.InvalidDiskInfo(reason=_(
            "volume %(volume)s depends on image %(image)s, which is not in "
            "the image cache of host %(host)s and could not be fetched: "
            "%(error)s When the cause is removed, a hard reboot of the "
            "server tries it once more") % {
                'volume': volume.name, 'image': instance.image_ref,
                'host': CONF.host, 'error': e}) from e
    base_format = imagebackend._get_base_format(base)
    if (base, base_format) == (info.backing_file, info.backing_file_format):
        return
    LOG.info('Base image of volume %(volume)s: %(base)s (%(format)s) instead '
             'of %(old)s (%(old_format)s)',
             {'volume': volume.name, 'base': base, 'format': base_format,
              'old': info.backing_file,
              'old_format': info.backing_file_format}, instance=instance)
    nova.privsep.qemu.rewrite_backing_file(
        volume.path, fields.LibvirtDiskFormat.QCOW2, base, base_format)
    try:
        # Which base images are in use, the image cache is told by libvirt.
        volume.pool.refresh()
    except exception.NovaException as e:
        LOG.warning('Storage pool %(pool)s could not be refreshed after the '
                    'base image of volume %(volume)s was renamed: %(error)s',
                    {'pool': volume.pool.name, 'volume': volume.name,
                     'error': e}, instance=instance)
