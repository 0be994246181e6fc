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

"""An instance's legacy disks become volumes of a pool; knows no other host.

All of the instance's disks move, or none. A file that gets a hard link may be
in use: guest and volume share it. One that must be copied may not. Each step
of :attr:`Transition.STEPS` can be the last one before a crash: the records say
which name of a disk counts, the next call goes on from there, and a call
when nothing is left to do does nothing.

A file gets its second name without a refresh of the pool: libvirt makes an
empty volume of the right format, and the file is put in its place. A disk of
the legacy backend lvm is a logical volume already, under the name that it has
in a pool over its volume group: its record changes, and nothing else. libvirt
looks at one volume's file whenever that volume's info is asked for
(storageVolGetInfoFlags in libvirt's src/storage/storage_driver.c), and keeps
the format it was told, so that a header that the guest has written into a
raw disk isn't interpreted.
"""

import dataclasses
import errno
import os
import typing as ty

from lxml import etree
from oslo_concurrency import processutils
from oslo_log import log as logging
from oslo_service import loopingcall
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
import nova.privsep.storage
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage import disk_kinds
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.pool import clearing
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import stream
from nova.virt.libvirt.storage.pool import usage
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

LVM = fields.LibvirtDiskBackend.LVM

# link(2) where the second name can't be made: another file system, one that
# has no hard links, or a file that already has as many names as it can have.
NO_HARD_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)

PROGRESS_INTERVAL = 5  # seconds between two lines of the log


@dataclasses.dataclass
class LegacyDisk:
    """One disk on its way.

    :ivar name: the disk's name, e.g. ``disk.eph0``
    :ivar path: its file in the instance directory
    :ivar record: its record, still that of the legacy backend
    :ivar pool: the pool that it goes to
    :ivar volume: the volume's name there, once chosen
    :ivar size: virtual size in bytes
    :ivar backing_path: the base image of a qcow2 overlay
    :ivar backing_format: of that, as the overlay's own header names it
    :ivar is_in_place: whether it is a volume of that pool already
    """
    name: str
    path: str
    record: 'metadata.LibvirtDiskMetadata'
    pool: storage_pool.StoragePool
    volume: str | None = None
    size: int = 0
    backing_path: str | None = None
    backing_format: str | None = None
    is_in_place: bool = False

    @property
    def is_raw(self) -> bool:
        return self.record.format == fields.LibvirtDiskFormat.RAW

    @property
    def target(self) -> str:
        return self.pool.volume(self.volume).path


def _ending(path):
    """The instance's directory and the file's name, of a path of a file."""
    return tuple((path or '').split(os.sep)[-2:])


def takes(kind, name, record) -> bool:
    """Whether a pool can have a file as its volume.

    A directory gets another name of it. Into a volume group, swap and config
    drives are copied if they are raw.

    :param kind: the pool's PoolKind
    :param name: the disk's
    :param record: of the file
    """
    return kind.is_directory or (
        kind.is_volume_group and disk_kinds.of_disk(name).is_remade and
        record.format == fields.LibvirtDiskFormat.RAW)


def is_due(disks: 'metadata.InstanceDisks') -> bool:
    """Whether an instance has files that can go to a pool.

    An instance with a disk on another legacy backend (lvm, rbd, ploop) stays
    as it is: all of its disks move or none.

    :param disks: the records of all its local disks
    """
    return _can_move(disks, metadata.FILE_BACKENDS)


def _can_move(disks, legacy):
    backends = {record.backend for name, record in _kept(disks)}
    return bool(backends & set(legacy)) and backends <= {
        *legacy, fields.LibvirtDiskBackend.LIBVIRT_STORAGE}


def _kept(disks):
    """The records of disks that outlive a rescue."""
    return [(name, record) for name, record in disks.items()
            if not name.endswith('.rescue')]


class Transition:
    """The way of one instance's legacy disks into their pools.

    :param context: the request's context; needs no auth token
    :param instance: the instance
    :param disks: the records of all its local disks
    :param get_pool: gives the pool of a name
    :param instance_dir: where the legacy files are
    :param base_dir: the image cache's directory, the only place in which a
        base image may be
    :param guest_is_off: whether disks may be copied
    """

    # In this order a crash after any of them loses nothing: until
    # _record_volumes is done the old name counts, afterwards the new one.
    STEPS = (
        '_record_intent',
        '_make_volumes',
        '_fill_volumes',
        '_check_volumes',
        '_record_volumes',
    )
    # Once the volumes are on record.
    CLOSING_STEPS = (
        '_rewrite_rescue_xml',
        '_remove_old_names',
    )

    def __init__(self, context, instance: 'objects.Instance',
                 disks: 'metadata.InstanceDisks',
                 get_pool: ty.Callable[[str], storage_pool.StoragePool],
                 instance_dir: str, base_dir: str,
                 guest_is_off: bool = True):
        self._context = context
        self._instance = instance
        self._disks = disks
        self._get_pool = get_pool
        self._instance_dir = instance_dir
        self._base_dir = base_dir
        self._guest_is_off = guest_is_off
        self._moving: list[LegacyDisk] = []

    def run(self) -> bool:
        """Make volumes of the legacy disks and save that in their records.

        The old names stay until :meth:`finish`, which the caller calls when
        the guest's XML names the volumes.

        :returns: whether anything was done
        :raises: exception.DiskTransitionFailed; the disks are what they were
        """
        if not _can_move(self._disks, (*metadata.FILE_BACKENDS, LVM)):
            return False
        try:
            self._moving = self._plan()
            LOG.info('Moving %(count)d disks into storage pools: %(disks)s',
                     {'count': len(self._moving),
                      'disks': ', '.join(d.name for d in self._moving)},
                     instance=self._instance)
            for step in self.STEPS:
                getattr(self, step)()
        # A call to the conductor that got no answer isn't in this list: what
        # is on record then is known to the next call only.
        except (exception.NovaException, OSError, ValueError,
                processutils.ProcessExecutionError) as error:
            self._undo()
            if isinstance(error, exception.DiskTransitionFailed):
                raise
            raise exception.DiskTransitionFailed(
                instance=self._instance.uuid, reason=str(error)) from error
        return True

    def finish(self) -> None:
        """Take the old names away, of disks that are volumes on record.

        Does what an interrupted call has left over as well.
        """
        for step in self.CLOSING_STEPS:
            getattr(self, step)()

    def _plan(self) -> list[LegacyDisk]:
        plan = []
        for name, record in _kept(self._disks):
            if record.backend == LVM:
                plan.append(self._logical_volume(name, record))
                continue
            if record.backend not in metadata.FILE_BACKENDS:
                continue
            path = os.path.join(self._instance_dir, name)
            if record.state != fields.LibvirtDiskState.READY:
                self._refuse(_('disk %s was never finished') % name)
            pool = self._get_pool(
                record.pool or setup.pool_name_for(name))
            if not takes(pool.kind(), name, record):
                self._refuse(_(
                    'name a pool that is a directory for it in nova.conf. '
                    'Disk %(name)s is a file, and storage pool %(pool)s '
                    'of host %(host)s holds none') % {
                        'name': name, 'pool': pool.name, 'host': pool.host})
            disk = LegacyDisk(name, path, record, pool, volume=record.volume)
            self._measure(disk)
            plan.append(disk)
        return plan

    def _logical_volume(self, name, record):
        """A disk that stays where it is."""
        if self._instance.ephemeral_key_uuid:
            self._refuse(_(
                'leave it on a host with images_type = lvm, or make the '
                'server anew from a snapshot. Its disks are encrypted, and '
                'those in storage pools are not'))
        pool = self._get_pool(setup.pool_name_for(name))
        source = pool.config().source
        group = CONF.libvirt.images_volume_group
        if not pool.kind().keeps_blocks or source is None or (
                group and source.name != group):
            self._refuse(_(
                'define storage pool %(pool)s of host %(host)s as one of type '
                'logical over volume group %(group)s, in which disk %(name)s '
                'is, or name such a pool for it in nova.conf') % {
                    'pool': pool.name, 'host': pool.host, 'name': name,
                    'group': group or _('of images_type = lvm')})
        disk = LegacyDisk(
            name, '', record, pool, is_in_place=True,
            # as nova.virt.libvirt.imagebackend.Lvm has it
            volume='%s_%s' % (self._instance.uuid, name.replace('_', '__')))
        disk.size = pool.volume(disk.volume).physical()
        return disk

    def _refuse(self, reason):
        raise exception.DiskTransitionFailed(
            instance=self._instance.uuid, reason=reason)

    def _measure(self, disk):
        """Size and base image, by the format on record and no other."""
        try:
            length, allocation = nova.privsep.storage.file_bytes(disk.path)
        except (OSError, ValueError) as error:
            self._refuse(_('disk %(name)s: %(error)s') % {
                'name': disk.name, 'error': error})
        disk.size = length
        if disk.record.format == fields.LibvirtDiskFormat.QCOW2:
            # It may have come from another host, by SSH.
            info = content.look_at_qcow2(disk.path)
            disk.size = info.virtual_size
            disk.backing_path = self._checked_base(disk, info.backing_file)
            disk.backing_format = info.backing_file_format
        elif disk.record.format != fields.LibvirtDiskFormat.RAW:
            self._refuse(_('disk %(name)s is of format %(format)s, and a '
                           'volume is either raw or qcow2') % {
                'name': disk.name, 'format': disk.record.format})

    def _checked_base(self, disk, backing_file):
        """The base image's path if it is one that Nova itself keeps."""
        if not backing_file:
            return None
        try:
            return image_cache.checked_base(
                os.path.join(self._instance_dir, backing_file),
                self._base_dir)
        except exception.BaseImageMisplaced as error:
            self._refuse(_('disk %(name)s: %(error)s') % {
                'name': disk.name, 'error': error})

    def _record_intent(self):
        """Say which volumes are to be made, before any of them is there.

        What lies under such a name later is ours to replace.
        """
        for disk in self._moving:
            if disk.volume is None:
                disk.volume = disk.pool.free_name(
                    '%s_%s' % (self._instance.uuid, disk.name),
                    leftovers.names(self._disks) |
                    disk.pool.names_in_directory())
            disk.record.pool = disk.pool.name
            disk.record.volume = disk.volume
            self._disks.set(disk.name, disk.record)
        self._disks.save(self._context)

    def _make_volumes(self):
        for disk in self._moving:
            if disk.is_in_place:
                continue
            try:
                volume = disk.pool.volume(disk.volume)
            except exception.StorageVolumeNotFound:
                disk.pool.create(self._volume_config(disk))
                continue
            if not nova.privsep.storage.same_file(disk.path, volume.path):
                volume.delete()
                disk.pool.create(self._volume_config(disk))

    def _volume_config(self, disk):
        config = storage_config.LibvirtConfigStorageVolume()
        config.name = disk.volume
        config.capacity = disk.size
        config.allocation = 0
        config.target_format = disk.record.format
        if disk.record.format == fields.LibvirtDiskFormat.QCOW2:
            config.compat = '1.1'
        if disk.backing_path:
            config.backing_store = (
                storage_config.LibvirtConfigStorageBackingStore())
            config.backing_store.path = disk.backing_path
            config.backing_store.format = (
                disk.backing_format or fields.LibvirtDiskFormat.RAW)
        return config

    def _fill_volumes(self):
        for disk in self._moving:
            if disk.is_in_place:
                continue
            if disk.pool.directory() is None:
                self._upload(disk)
                continue
            if nova.privsep.storage.same_file(disk.path, disk.target):
                continue
            try:
                nova.privsep.storage.link_over(disk.path, disk.target)
            except OSError as error:
                if error.errno not in NO_HARD_LINK:
                    raise
                LOG.info('Disk %(name)s is copied into storage pool %(pool)s, '
                         'as it can not be linked there: %(error)s',
                         {'name': disk.name, 'pool': disk.pool.name,
                          'error': error}, instance=self._instance)
                self._copy(disk)

    def _check_off(self, disk):
        if not self._guest_is_off:
            self._refuse(_('disk %(name)s has to be copied into storage pool '
                           '%(pool)s, and can only be while the guest is off: '
                           'hard reboot the instance first') % {
                'name': disk.name, 'pool': disk.pool.name})

    def _upload(self, disk):
        """Copy a small file into a volume that is none."""
        self._check_off(disk)
        volume = disk.pool.volume(disk.volume)
        stream.upload_file(volume, disk.path)
        clearing.clear_rest(volume, disk.size)

    def _copy(self, disk):
        self._check_off(disk)
        _length, allocation = nova.privsep.storage.file_bytes(disk.path)
        _device, _total, available = usage.measure(disk.pool)
        if available < allocation:
            self._refuse(_('storage pool %(pool)s has %(free)d bytes left, '
                           'and disk %(name)s takes %(need)d') % {
                'pool': disk.pool.name, 'free': available,
                'name': disk.name, 'need': allocation})

        def progress():
            done = nova.privsep.storage.copied_bytes(disk.target)
            LOG.info('Disk %(name)s: %(done)d of %(total)d MiB copied into '
                     'storage pool %(pool)s',
                     {'name': disk.name, 'done': done // units.Mi,
                      'total': allocation // units.Mi,
                      'pool': disk.pool.name}, instance=self._instance)

        timer = loopingcall.FixedIntervalLoopingCall(progress)
        timer.start(interval=PROGRESS_INTERVAL,
                    initial_delay=PROGRESS_INTERVAL)
        try:
            nova.privsep.storage.copy_over(disk.path, disk.target)
        finally:
            timer.stop()

    def _check_volumes(self):
        """libvirt must see in the volume the size which the disk has."""
        for disk in self._moving:
            volume = disk.pool.volume(disk.volume)
            # Of what is raw libvirt may have read a header of the guest's.
            capacity = (volume.physical() if disk.is_raw
                        else volume.info().capacity)
            if capacity != disk.size and (
                    disk.pool.directory() is not None or capacity < disk.size):
                self._refuse(_(
                    'volume %(volume)s of storage pool %(pool)s came out with '
                    '%(capacity)d bytes, and disk %(name)s has %(size)d') % {
                        'volume': disk.volume, 'pool': disk.pool.name,
                        'capacity': capacity, 'name': disk.name,
                        'size': disk.size})

    def _record_volumes(self):
        for disk in self._moving:
            if disk.record.size != disk.size:
                LOG.warning('The record of disk %(name)s said %(old)s bytes, '
                            'and the disk has %(new)d',
                            {'name': disk.name, 'old': disk.record.size,
                             'new': disk.size}, instance=self._instance)
            disk.record.size, disk.record.host = disk.size, CONF.host
            disk.record.backend = fields.LibvirtDiskBackend.LIBVIRT_STORAGE
            self._disks.set(disk.name, disk.record)
        self._disks.save(self._context)

    def _undo(self):
        """The disks stay legacy: take back volumes and intent."""
        try:
            for disk in self._moving:
                if disk.volume is None or disk.is_in_place:
                    continue
                try:
                    disk.pool.volume(disk.volume).delete()
                except exception.StorageVolumeNotFound:
                    pass
            for disk in self._moving:
                disk.record.pool = disk.record.volume = None
                self._disks.set(disk.name, disk.record)
            self._disks.save(self._context)
        except Exception:
            LOG.exception('Volumes of an unfinished move into storage pools '
                          'are left; the next hard reboot goes on with them',
                          instance=self._instance)

    def _volumes_on_record(self) -> dict[str, 'metadata.LibvirtDiskMetadata']:
        """Old path -> record, of disks that are volumes."""
        return {
            os.path.join(self._instance_dir, name): record
            for name, record in _kept(self._disks)
            # What another host has on record may not be this file.
            if record.host == CONF.host and
            record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE and
            record.state == fields.LibvirtDiskState.READY}

    def _rewrite_rescue_xml(self):
        """A rescued guest goes back to this XML as it is."""
        path = os.path.join(self._instance_dir, 'unrescue.xml')
        if not os.path.exists(path):
            return
        parser = etree.XMLParser(resolve_entities=False, no_network=True)
        tree = etree.parse(path, parser)
        volumes = self._volumes_on_record()
        # It may have been rescued under another instances_path.
        files = {_ending(old): record for old, record in volumes.items()}
        devices = {'/dev/%s/%s' % (CONF.libvirt.images_volume_group,
                                   record.volume): record
                   for record in volumes.values()}
        changed = False
        for disk in tree.iterfind('./devices/disk'):
            source = disk.find('source')
            record = None if source is None else files.get(
                _ending(source.get('file')), devices.get(source.get('dev')))
            if record is None:
                continue
            disk.set('type', 'volume')
            source.attrib.clear()
            source.set('pool', record.pool)
            source.set('volume', record.volume)
            changed = True
        if changed:
            new = path + '.new'
            tree.write(new, encoding='utf-8')
            os.rename(new, path)

    def _remove_old_names(self):
        for path, record in self._volumes_on_record().items():
            if not os.path.lexists(path):
                continue
            # Never the only name: this fails unless the volume is there.
            volume = self._get_pool(record.pool).volume(record.volume)
            volume.physical()
            LOG.info('Disk %(path)s is volume %(volume)s of storage pool '
                     '%(pool)s now; its old name goes',
                     {'path': path, 'volume': volume.name,
                      'pool': record.pool}, instance=self._instance)
            nova.privsep.storage.remove(path)
