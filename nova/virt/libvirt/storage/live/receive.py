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
"""How the destination of a live migration makes room for an instance's disks.

Nothing that the source says is taken on trust but how large its disks are.
The volumes are on record before the first is made: whatever fails then,
settle.abandon() deletes them by their names.
"""

import os
import re
import shutil

from oslo_log import log as logging
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
import nova.privsep.storage
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.live import settle
from nova.virt.libvirt.storage.move import base_image
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import room
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import usage
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

WAY = fields.LibvirtLiveMigrateDiskWay
RAW = fields.LibvirtDiskFormat.RAW
QCOW2 = fields.LibvirtDiskFormat.QCOW2

_NAME = re.compile(r'disk(\.config|\.local|\.swap|\.eph\d{1,3})?')


class Receiver:
    """An instance's disks on their way to this host.

    :param local: the LocalHost
    :param context: the request's context
    :param disks: the instance's InstanceDisks, as they are on record now
    :param data: the LibvirtLiveMigrateData with what the source has planned
    """

    def __init__(self, local, context, disks, data):
        self._local = local
        self._connection = local.get_connection()
        self._context = context
        self._instance = disks.instance
        self._disks = disks
        self._data = data

    # Before the migration begins

    def check(self) -> None:
        """The last word before the migration begins; delete what is left.

        :raises: exception.MigrationPreCheckError
        """
        self._check_no_guest()
        for disk in self._data.disks:
            self._check_disk(disk)
        self._delete_leftovers()
        self._check_room()

    def _check_no_guest(self):
        if self._local.get_guest_config(self._instance) is not None:
            raise exception.MigrationPreCheckError(reason=_(
                "choose another host, or look at the server's guest on host "
                "%(host)s, where there must be none: an earlier migration "
                "may have brought it there. If it runs there, see nova-manage "
                "libvirt settle_live_migration") % {'host': CONF.host})

    def _check_disk(self, disk):
        record = self._disks.get(disk.name)
        faults = [fault for fault, is_so in (
            ('name', not _NAME.fullmatch(disk.name) or record is None),
            ('format', disk.format not in (RAW, QCOW2) or
             record is not None and disk.format != record.format),
            ('size', not disk.size),
            ('pool', record is not None and record.is_on_ceph !=
             self._pool(disk).kind().is_ceph),
            ('base', disk.base is not None and (
                disk.name != 'disk' or disk.format != QCOW2 or
                disk.base != imagecache.get_cache_fname(
                    self._instance.image_ref)))) if is_so]
        if faults:
            raise exception.MigrationPreCheckError(reason=_(
                "hard reboot the server: host %(host)s doesn't take its disk "
                "%(name)s, because of its %(faults)s: %(disk)s") % {
                    'host': CONF.host, 'name': disk.name,
                    'faults': ', '.join(faults), 'disk': disk})
        if disk.way == WAY.LINK:
            self._shared_file(disk)

    def _delete_leftovers(self):
        """Delete what a migration that has failed has left here."""
        left = leftovers.on_host(self._disks, CONF.host)
        if left:
            settle.clear_way(self._connection, self._disks)
            self._disks.save(self._context)
        directory = libvirt_utils.get_instance_path(self._instance)
        if (not self._data.is_shared_instance_path and
                self._instance.host != CONF.host and
                os.path.isdir(directory) and (
                    left or not self._has_disks(directory))):
            # It would refuse this one.
            LOG.warning('Removing %s, which an earlier live migration has '
                        'left', directory, instance=self._instance)
            shutil.rmtree(directory)

    @staticmethod
    def _has_disks(directory):
        """Whether an instance's directory has more than a guest leaves.

        Of disks that both hosts see nothing is left that would be noted.
        """
        return any(name.startswith('disk') and name != 'disk.info'
                   for name in os.listdir(directory))

    def _check_room(self):
        needed: dict = {}
        for disk in self._data.copied_disks:
            pool = self._pool(disk)
            device, _total, free = usage.measure(pool)
            pools, so_far, _free = needed.get(device, (set(), 0, 0))
            wanted = (disk.size if destination.preallocates()
                      else disk.allocation)
            needed[device] = pools | {pool.name}, so_far + wanted, free
        for pools, total, available in needed.values():
            if total > available:
                raise exception.MigrationPreCheckError(reason=_(
                    "choose another host, or make room: storage pool "
                    "%(pool)s of host %(host)s has %(available)d bytes "
                    "available and %(total)d are needed") % {
                        'pool': ', '.join(sorted(pools)), 'host': CONF.host,
                        'available': available, 'total': total})

    def _pool(self, disk):
        return storage_pool.StoragePool(
            self._connection, setup.pool_name_for(disk.name), CONF.host)

    # When it has begun

    def receive(self, cache_base) -> None:
        """Have a volume for each disk, and say where it is.

        :param cache_base: makes sure that the base image of an overlay is in
            this host's image cache, and returns its path
        :raises: exception.MigrationPreCheckError,
            exception.StorageVolumeError and others
        """
        # The source has had it since it was checked.
        for disk in self._data.disks:
            self._check_disk(disk)
        self._choose_names()
        # That may have taken long.
        self._disks = metadata.InstanceDisks.load(
            self._context, self._instance)
        self._check_awaited()
        self._save_next()
        try:
            self._make(cache_base)
        finally:
            # It may have taken longer than the source waits.
            given_up = self._delete_unwanted()
        if given_up:
            raise exception.MigrationError(reason=_(
                'try again: host %(source)s has waited no longer for host '
                '%(host)s to make room for the disks') % {
                    'source': self._instance.host, 'host': CONF.host})

    def _make(self, cache_base):
        base = None
        if any(disk.base for disk in self._data.disks):
            base = self._have_base(cache_base)
        for disk in self._data.disks:
            if disk.way == WAY.SHARE:
                self._check_base(disk, self._find(disk), cache_base)
            elif disk.way == WAY.LINK:
                self._link(disk)
            elif disk.way == WAY.SEND:
                self._create_to_be_sent(disk)
            else:
                volume = self._create(disk, base if disk.base else None)
                if destination.preallocates():
                    nova.privsep.storage.allocate(volume.path, disk.size)

    def _delete_unwanted(self):
        """Delete what was made after all had been rolled back.

        Nothing has it on record any more.

        :returns: whether it was so
        """
        disks = metadata.InstanceDisks.load(self._context, self._instance)
        wanted = {(record.pool, record.volume)
                  for _name, known in disks.items()
                  for record in (known, known.next)
                  if record is not None and record.host == CONF.host}
        unwanted = {(disk.pool, disk.volume) for disk in self._data.disks
                    if disk.way in WAY.MADE} - wanted
        if unwanted:
            LOG.warning('The migration was given up before there was room for '
                        'the disks: deleting %s', ', '.join(
                            sorted(volume for _pool, volume in unwanted)),
                        instance=self._instance)
            leftovers.delete_volumes(
                self._connection, CONF.host, unwanted, self._instance)
        return bool(unwanted)

    def _choose_names(self):
        taken: dict[str, set[str]] = {}
        for disk in self._data.disks:
            pool = self._pool(disk)
            disk.pool = pool.name
            if disk.way == WAY.SHARE:
                disk.volume = self._disks.get(disk.name).volume
            else:
                if pool.name not in taken:
                    # Of what another host has put there, libvirt on this one
                    # doesn't know.
                    taken[pool.name] = pool.file_names() | (
                        leftovers.names(self._disks))
                disk.volume = pool.free_name(
                    '%s_%s' % (self._instance.uuid, disk.name),
                    taken[pool.name])
            # An image of a Ceph pool has none.
            directory = pool.directory()
            disk.path = directory and os.path.join(directory, disk.volume)

    def _check_awaited(self):
        """Refuse a request that has come late.

        The server may be on its way to another host, which is on record.
        """
        if 'migration' not in self._data:
            return
        migration = objects.Migration.get_by_id(
            self._context.elevated(), self._data.migration.id)
        if migration.status not in settle.UNDER_WAY:
            raise exception.MigrationError(reason=_(
                'try again: when host %(host)s was asked for room for the '
                'disks, the migration was over (%(state)s)') % {
                    'host': CONF.host, 'state': migration.status})

    def _save_next(self):
        """Have on record what is going to be here, by one save."""
        for disk in self._data.disks:
            record = self._disks.get(disk.name)
            record.next = metadata.LibvirtDiskMetadata(
                backend=(record.backend if record.is_on_ceph else
                         fields.LibvirtDiskBackend.LIBVIRT_STORAGE),
                format=disk.format,
                # Of what is sent the plan has the length of the file.
                size=(disk.size if disk.way in (WAY.MIRROR, WAY.LINK)
                      else record.size),
                state=(fields.LibvirtDiskState.READY
                       if disk.way == WAY.SHARE
                       else fields.LibvirtDiskState.BUILDING),
                host=CONF.host, pool=disk.pool, volume=disk.volume)
            self._disks.set(disk.name, record)
        self._disks.save(self._context)

    def _find(self, disk):
        """Let libvirt know of a volume that the other host has made."""
        pool = self._pool(disk)
        try:
            return pool.volume(disk.volume)
        except exception.StorageVolumeNotFound:
            pool.refresh(timeout=storage_pool.COPY_TIMEOUT)
            return pool.volume(disk.volume)

    def _check_base(self, disk, volume, cache_base):
        """Have what an overlay that both hosts see is over here, too.

        Its header can't be rewritten while its guest runs.
        """
        if disk.format != QCOW2:
            return
        try:
            info = image_cache.look_at_overlay(volume.path)
        except OSError as e:
            # Root may not read there.
            LOG.debug('What volume %(volume)s is laid over is not known: '
                      '%(error)s', {'volume': volume.name, 'error': e})
            return
        if not info.backing_file:
            return
        if base_image.is_kept(self._instance, disk.name, info.backing_file):
            self._have_base(cache_base)
        found = (imagebackend._get_base_format(info.backing_file)
                 if os.path.exists(info.backing_file) else None)
        if found != (info.backing_file_format or RAW):
            raise exception.MigrationPreCheckError(reason=_(
                "migrate the server cold: disk %(name)s is laid over %(file)s "
                "of format %(wanted)s, and host %(host)s has %(found)s there"
            ) % {'name': disk.name, 'file': info.backing_file,
                 'wanted': info.backing_file_format or RAW,
                 'host': CONF.host,
                 'found': found or 'nothing'})

    def _create_to_be_sent(self, disk):
        state.create_volume(
            self._pool(disk), disk.volume, disk.size,
            (os.geteuid(), os.getegid()),
            allocation=disk.size if room.is_reserved(self._connection) else 0)

    def _link(self, disk):
        """Let a file that both hosts see be a volume by a second name.

        The first one goes when the guest is here.
        """
        path, base = self._shared_file(disk)
        nova.privsep.storage.link_over(path, self._create(disk, base).path)

    def _shared_file(self, disk):
        """The path of a disk's file, and its base image if it has one.

        :raises: exception.MigrationPreCheckError if either isn't here
        """
        path = os.path.join(
            libvirt_utils.get_instance_path(self._instance), disk.name)
        try:
            # Nothing that is there under the name is followed elsewhere.
            nova.privsep.storage.file_bytes(path)
            base = (content.look_at_qcow2(path, disk.size).backing_file
                    if disk.format == QCOW2 else None)
            return path, base and image_cache.checked_base(base)
        except (OSError, ValueError, exception.NovaException) as e:
            raise exception.MigrationPreCheckError(reason=_(
                "choose another host: disk %(name)s of the server can't "
                "become a volume of storage pool %(pool)s of host %(host)s "
                "by a hard link: %(error)s") % {
                    'name': disk.name, 'host': CONF.host, 'error': e,
                    'pool': setup.pool_name_for(disk.name)}) from e

    def _create(self, disk, base):
        """Make a volume that QEMU can copy into: of its size to the byte.

        :returns: the Volume
        """
        config = storage_config.LibvirtConfigStorageVolume()
        config.name = disk.volume
        config.capacity = disk.size
        config.allocation = 0
        config.target_format = disk.format
        if disk.format == QCOW2:
            config.compat = '1.1'
        if base:
            config.backing_store = (
                storage_config.LibvirtConfigStorageBackingStore())
            config.backing_store.path = base
            config.backing_store.format = imagebackend._get_base_format(base)
        return self._pool(disk).create(config)

    def _have_base(self, cache_base):
        if base_image.is_lost(self._context, self._instance):
            self._fetch_base()
        try:
            return cache_base()
        except Exception as e:
            raise exception.StorageBaseImageMissing(
                volume='%s_disk' % self._instance.uuid,
                image=self._instance.image_ref, host=CONF.host,
                reason=e) from e

    def _fetch_base(self):
        """Get the base image, which Glance has lost, from the source."""
        uri = peer.uri_of(self._data.src_storage_address)
        name = imagecache.get_cache_fname(self._instance.image_ref)
        here = base_image.pool(self._connection)
        wanted = base_image.name_on_the_way(self._instance)
        leftovers.delete_volumes(
            self._connection, CONF.host, [(here.name, wanted)],
            self._instance)
        with peer.connected(self._local.host, uri) as connection:
            there = storage_pool.StoragePool(
                connection, here.name, self._instance.host)
            length, _allocation = there.volume(name).file_bytes()
        volume = state.create_volume(
            here, wanted, length, (os.geteuid(), os.getegid()),
            allocation=length if room.is_reserved(self._connection) else 0)
        try:
            result = pump.copy(
                pump.Volume(uri, there.name, name),
                pump.Volume(self._local.uri, here.name, wanted), length,
                sparse=room.is_sparse(
                    self._connection, state.check_pool(here)),
                bandwidth=CONF.libvirt.storage_migration_bandwidth * units.Mi,
                stall_timeout=CONF.libvirt.storage_migration_stall_timeout)
            pump.verify(
                pump.Volume(self._local.uri, here.name, wanted), length,
                result.checksum, key=result.key,
                stall_timeout=CONF.libvirt.storage_migration_stall_timeout)
            base_image.take(self._instance, volume)
        except Exception:
            leftovers.delete_volumes(
                self._connection, CONF.host, [(here.name, wanted)],
                self._instance)
            raise
