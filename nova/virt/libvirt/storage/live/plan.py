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
"""What becomes of each disk in a live migration, as the source plans it.

All that can be known is checked here, and whatever is wrong the guest runs
on. A disk in a pool that both hosts see stays where it is, and a file that
both see becomes a volume by a second name; QEMU copies the others while the
guest writes to them, but for those that are read-only, which are sent before.
"""

import contextlib
import os
import typing as ty

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
import nova.privsep.storage
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.live import file_systems
from nova.virt.libvirt.storage.live import settle
from nova.virt.libvirt.storage.move import base_image
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import usage
from nova.virt.libvirt.storage.records import kinds
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

WAY = fields.LibvirtLiveMigrateDiskWay
QCOW2 = fields.LibvirtDiskFormat.QCOW2


@contextlib.contextmanager
def refusing():
    """Let what fails in a check be no more than a refusal.

    For an exception that it does not know the conductor puts an instance in
    ERROR, though its guest runs on.

    :raises: exception.MigrationPreCheckError
    """
    try:
        yield
    except exception.MigrationPreCheckError:
        raise
    except exception.NovaException as e:
        raise exception.MigrationPreCheckError(
            reason=e.format_message()) from e
    except Exception as e:
        LOG.exception('The check of a live migration has failed')
        raise exception.MigrationPreCheckError(reason=e) from e


def refused(reason, **values):
    return exception.MigrationPreCheckError(reason=reason % values)


def planned(data) -> list:
    """What is planned of pool disks: LibvirtLiveMigrateDiskInfo of each.

    :param data: a LibvirtLiveMigrateData, or None
    """
    return (data.disks if data is not None and
            data.has_planned_disks is True else [])


def is_pool_backed(disks) -> bool:
    """Whether an instance has a disk in a storage pool.

    :param disks: its InstanceDisks
    """
    return any(record.is_in_pool for _name, record in disks.items())


def is_on_ceph(disks) -> bool:
    """Whether all of an instance's disks are those of images_type = rbd.

    They are network disks to QEMU, which copies none, and the destination's as
    soon as the guest is there. In a cloud that goes over to pools host by host
    the two need not have the same images_type.

    :param disks: its InstanceDisks
    """
    backends = {record.backend for _name, record in disks.items()}
    return backends == {fields.LibvirtDiskBackend.RBD}


class Plan:
    """What becomes of the disks of an instance that runs here.

    :param local: the LocalHost
    :param context: the request's context
    :param disks: the instance's InstanceDisks
    :param data: the LibvirtLiveMigrateData with what the destination offers
    """

    def __init__(self, local, context, disks, data):
        self._local = local
        self._context = context
        self._instance = disks.instance
        self._disks = disks
        self._data = data
        self._guest = local.host.get_guest(disks.instance)
        # Bytes by which overlays grow here, by directory
        self._growth: dict[str, int] = {}

    def make(self) -> None:
        """Put into the data what becomes of each disk.

        :raises: exception.MigrationPreCheckError and others; nothing has
            happened to the instance
        """
        pools = (self._data.dst_storage_pools
                 if 'dst_storage_pools' in self._data else {})
        if not pools:
            raise refused(_(
                'choose another host, or upgrade the compute service there: '
                'it is too old to take the disks of a running server into '
                'storage pools, or keeps no pools. Or migrate the server '
                'cold'))
        if settle.going(self._disks):
            raise refused(_(
                'try again when the live migration has ended that libvirt on '
                'host %(host)s is still at'), host=CONF.host)
        disks = [self._planned(name, record, pools)
                 for name, record in self._disks.items()
                 if not name.endswith('.rescue')]
        self._check_guest({disk.dev for disk in disks})
        self._check_room()
        if any(disk.way == WAY.MIRROR for disk in disks) and (
                CONF.libvirt.live_migration_tunnelled):
            raise refused(_(
                'turn off [libvirt]/live_migration_tunnelled on host '
                "%(host)s, which can't copy single disks"), host=CONF.host)
        if any(disk.way == WAY.SEND for disk in disks):
            # Better now than when the migration has begun.
            with peer.connected(self._local.host, peer.uri_of(
                    self._data.dst_storage_address)):
                pass
        self._data.src_storage_address = self._local.get_address()
        self._data.disks = disks

    def _planned(self, name, record, pools):
        is_file = record.backend in metadata.FILE_BACKENDS
        if (record.is_building or record.host != CONF.host or not (
                record.is_in_pool or is_file and self.takes_files())):
            raise refused(_(
                'hard reboot the server, which brings its disks in order: '
                'disk %(name)s is on record as %(state)s on host %(host)s, '
                'backend %(backend)s'), name=name, state=record.state,
                host=record.host, backend=record.backend)
        if kinds.of(name) not in pools:
            raise refused(_(
                'try again: the destination offers no storage pool for '
                '%(kind)s, only for %(offered)s'), kind=kinds.of(name),
                offered=', '.join(sorted(pools)))
        self._check_ceph(name, record, pools[kinds.of(name)])
        if not is_file and not record.is_on_ceph:
            self._check_source_pool(name, record)
        device = self._device_of(name, record)
        disk = objects.LibvirtLiveMigrateDiskInfo(
            name=name, dev=device.target_dev, format=record.format,
            base=None, pool=None, volume=None, path=None)
        path = path_of(self._local, self._disks, name)
        length, disk.allocation = self._file_bytes(record, path)
        if not is_file and self._is_shared(record, pools[kinds.of(name)]):
            disk.way, disk.size = WAY.SHARE, record.size or length
            if not record.is_on_ceph:
                self._check_file_system(name, device, path)
        elif is_file and self._data.is_shared_instance_path:
            disk.way = WAY.LINK
            disk.size = length if is_read_only(device) else (
                self._capacity(device))
            self._check_file_system(name, device, path)
        elif is_read_only(device):
            disk.way, disk.size = WAY.SEND, length
            if record.format == QCOW2:
                self._look_at_sent_overlay(disk, record, path)
        else:
            disk.way = WAY.MIRROR
            disk.size = self._capacity(device)
            if record.format == QCOW2:
                self._look_at_overlay(disk, path)
        return disk

    def _capacity(self, device):
        """What QEMU has open, in bytes; it compares with that."""
        return self._guest.get_block_device(
            device.target_dev).get_capacity()

    def _check_source_pool(self, name, record):
        """Refuse what would come as another kind of disk than it is here."""
        pool = self._pool(record)
        if not pool.kind().is_directory:
            raise refused(_(
                'migrate the server cold: its disk %(name)s lies in storage '
                'pool %(pool)s of host %(host)s, which is of type %(type)s; '
                'only disks in files go to another host while their guest '
                'runs'), name=name, pool=pool.name, host=CONF.host,
                type=pool.config().type)

    def _check_ceph(self, name, record, there):
        """Refuse what would have to go into a Ceph pool, or out of one."""
        told = self._data.dst_storage_probes.get(there, ())
        here = (state.ceph_of(self._pool(record)) if record.is_on_ceph
                else None)
        if here is not None and (here not in told or there != record.pool) or (
                here is None and any('/' in probe for probe in told)):
            raise refused(_(
                'choose a host with the same Ceph pool under the same name: '
                '%(ceph)s here, %(other)s there. Disk %(name)s is in storage '
                'pool %(here)s, and the destination has %(there)s for it. No '
                "running server's disk can move into a Ceph pool, or out of "
                'one'), name=name, ceph=here or _('no Ceph pool'),
                other=', '.join(
                    probe for probe in told if '/' in probe) or
                _('no Ceph pool'), here=record.pool, there=there)

    def _file_bytes(self, record, path):
        if record.volume is None:
            return nova.privsep.storage.file_bytes(path)
        return self._pool(record).volume(record.volume).file_bytes()

    def _pool(self, record):
        return storage_pool.StoragePool(
            self._local.get_connection(), record.pool, CONF.host)

    def takes_files(self) -> bool:
        """Whether files of the instance directory become pool disks.

        Where both hosts see the directory, they get second names there;
        nothing is copied.
        """
        return ('dst_takes_legacy' in self._data and
                self._data.dst_takes_legacy and (
                    not self._data.is_shared_instance_path or
                    'dst_takes_links' in self._data and
                    self._data.dst_takes_links))

    def _device_of(self, name, record):
        """The guest's disk, which must be what is on record."""
        path = os.path.join(
            libvirt_utils.get_instance_path(self._instance), name)
        place = record.pool, record.volume
        for device in self._guest.get_all_disks():
            if record.is_on_ceph:
                if device.source_name == path_on_ceph(
                        self._local, record):
                    break
                continue
            if (device.source_path == path if place == (None, None) else
                    place == (device.source_pool, device.source_volume)):
                break
        else:
            raise refused(_(
                'commit the snapshot that its guest writes to (virsh '
                'blockcommit --active --pivot) if there is one, else hard '
                "reboot the server: it doesn't run with %(place)s, which "
                'is on record as its disk %(name)s'), name=name,
                place=path if place == (None, None) else '/'.join(place))
        if device.driver_format != record.format:
            raise refused(_(
                'hard reboot the server: disk %(name)s runs as %(runs)s and '
                'is on record as %(record)s'), name=name,
                runs=device.driver_format, record=record.format)
        return device

    def _check_guest(self, known):
        """No disk of the guest's may be left out: it would be empty there."""
        directory = libvirt_utils.get_instance_path(self._instance)
        for device in self._guest.get_all_disks():
            place = (
                '%s/%s' % (device.source_pool, device.source_volume)
                if device.source_type == 'volume' else device.source_path)
            if device.target_dev not in known and (
                    device.source_type == 'volume' or
                    (place or '').startswith(directory + os.sep)):
                raise refused(_(
                    'hard reboot the server: nothing is on record of its '
                    'disk %(dev)s, %(place)s'), dev=device.target_dev,
                    place=place)

    def _is_shared(self, record, there):
        """Whether the destination's pool is the one of this host.

        It has made a volume in each of its pools.
        """
        if record.is_on_ceph:
            return True  # see _check_ceph()
        probes = self._data.dst_storage_probes.get(there, ())
        return bool(set(probes) & self._pool(record).file_names())

    def _check_file_system(self, name, device, path):
        """libvirt asks for this only when the migration has begun."""
        kind = file_systems.type_of(path)
        if is_read_only(device) or file_systems.is_shared(
                kind, self._local.get_connection()):
            return
        raise refused(_(
            'migrate the server cold: disk %(name)s lies in a directory '
            "that both hosts share, on a file system (%(type)s) that libvirt "
            "doesn't take for shared"), name=name, type=kind)

    def _look_at_sent_overlay(self, disk, record, path):
        """See to it that the destination gets the image of a CD-ROM."""
        info = image_cache.look_at_overlay(path, record.size)
        if not info.backing_file:
            return
        if not self._can_have_base(disk, info):
            raise refused(_(
                "migrate the server cold: disk %(name)s, which its guest only "
                "reads, is laid over an image that the destination can't "
                "have: %(file)s"), name=disk.name, file=info.backing_file)
        disk.base = imagecache.get_cache_fname(self._instance.image_ref)

    def _can_have_base(self, disk, info):
        return base_image.is_kept(
            self._instance, disk.name, info.backing_file) and (
                base_image.can_be_had(
                    self._context, self._instance,
                    base_image.pool(self._local.get_connection())))

    def _look_at_overlay(self, disk, path):
        """Find out what an overlay is over on the destination."""
        info = image_cache.look_at_overlay(path, disk.size)
        if not info.backing_file:
            return
        if self._can_have_base(disk, info):
            disk.base = imagecache.get_cache_fname(self._instance.image_ref)
            return
        # The image may be out of reach for this request alone: a command
        # line has no user's token.
        growth = base_image.growth_of(info)
        disk.allocation += growth
        directory = os.path.dirname(path)
        self._growth[directory] = growth + self._growth.get(directory, 0)

    def _check_room(self):
        for directories, available, total in usage.overfull(
                self._growth, usage.file_system):
            raise refused(_(
                'make room first: %(directory)s on host %(host)s has '
                '%(available)d bytes available and %(total)d are needed to '
                'make disks independent of base images that the destination '
                "can't have"), directory=', '.join(directories),
                host=CONF.host, available=available, total=total)


def path_of(local, disks, name) -> str:
    """Where a disk of an instance lies on this host.

    :param local: the LocalHost
    :param disks: the instance's InstanceDisks
    :param name: the disk's name
    """
    record = disks.get(name)
    if record.volume is None:
        return os.path.join(
            libvirt_utils.get_instance_path(disks.instance), name)
    return storage_pool.StoragePool(
        local.get_connection(), record.pool, CONF.host).volume(
            record.volume).path


def path_on_ceph(local, record) -> str:
    """The name of a disk's source in the XML of a guest.

    :param local: the LocalHost
    :param record: of a disk on Ceph
    """
    return setup.pool_named(
        local.get_connection(), record.pool).volume(record.volume).key


def is_read_only(device) -> bool:
    """Whether a guest can't write to a disk; QEMU then doesn't copy it.

    :param device: its LibvirtConfigGuestDisk
    """
    return bool(device.readonly) or device.source_device == 'cdrom'


def refuse_unknown(instance, guest_config) -> None:
    """Refuse a guest with pool disks of which nothing is on record.

    They would be left out of what is copied.

    :param guest_config: its LibvirtConfigGuest, None without one
    :raises: exception.MigrationPreCheckError
    """
    names = [
        '%s (%s/%s)' % (disk.target_dev, disk.source_pool,
                        disk.source_volume)
        for disk in getattr(guest_config, 'devices', ())
        if disk.root_name == 'disk' and disk.source_type == 'volume']
    if names:
        raise refused(_(
            'hard reboot the server: instance %(uuid)s runs with disks in '
            'storage pools of which nothing is on record: %(disks)s'),
            uuid=instance.uuid, disks=', '.join(names))


def devices_to_copy(guest, data) -> list[str]:
    """The guest's devices that QEMU copies.

    :param guest: the Guest
    :param data: the LibvirtLiveMigrateData
    :raises: exception.MigrationError if a disk would be left out, with which
        the guest would go on as an empty one
    """
    ways = {disk.dev: disk.way for disk in planned(data)}
    left_out = [device.target_dev for device in guest.get_all_disks()
                if device.source_type == 'volume' and
                device.target_dev not in ways]
    if left_out:
        raise exception.MigrationError(reason=_(
            "nothing is planned of the guest's disks %s in storage "
            "pools") % ', '.join(left_out))
    return [dev for dev, way in ways.items() if way == WAY.MIRROR]


def bytes_to_copy(data) -> ty.Iterator[int]:
    """How much QEMU copies of each disk, at least; in bytes.

    :param data: the LibvirtLiveMigrateData
    """
    for disk in planned(data):
        if disk.way == WAY.MIRROR:
            yield disk.allocation
