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

"""The local disks of one instance, through one operation of the driver.

Between the records of the disks and the image backends: every disk is on
record before it is made, and marked as whole when it is. Where this host has
storage pools, legacy disks move into them.
"""

import dataclasses
import functools
import os
import shutil
import typing as ty

from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_utils import units

from nova.compute import task_states
import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
from nova.virt.libvirt import blockinfo
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.intake import intake
from nova.virt.libvirt.storage.move import base_image
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.move import handover
from nova.virt.libvirt.storage.move import offer
from nova.virt.libvirt.storage.move import undo
from nova.virt.libvirt.storage.pool import health
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import lifecycle
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage.records import unrecorded
from nova.virt.libvirt.storage import takeover
from nova.virt.libvirt.storage import transition
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class LocalHost:
    """What the disks of an instance need of the compute that they are on.

    :ivar host: its Host
    :ivar image_backend: its imagebackend.Backend
    :ivar job_tracker: its InstanceJobTracker: a copy ends when the instance
        is deleted
    :ivar uri: URI of its libvirt
    :ivar get_address: gives the address under which peers reach its libvirt
    """
    host: ty.Any
    image_backend: ty.Any
    job_tracker: ty.Any
    uri: str
    get_address: ty.Callable[[], str]

    def __post_init__(self):
        # What peers write to of the disks of this compute.
        self.intake = intake.Intake(
            self.get_connection, self.get_address, self.has_guest, self.uri)

    def get_connection(self):
        """The connection to libvirt, in which its storage answers."""
        connection = self.host.get_connection()
        ended = None
        if storage_pool.has_lost_storage(connection):
            ended = 'virtstoraged'
        elif storage_pool.has_lost_secrets(connection):
            ended = 'virtsecretd'
        if ended:
            LOG.warning('%s has ended, or was restarted; connecting to '
                        'libvirt anew', ended)
            self.host.drop_connection(connection)
            connection = self.host.get_connection()
        return connection

    def has_guest(self, instance, running: bool = False) -> bool:
        """Whether an instance has a guest here, or one that runs."""
        try:
            guest = self.host.get_guest(instance)
        except exception.InstanceNotFound:
            return False
        return not running or guest.is_active()

    def get_guest_config(self, instance):
        """:returns: LibvirtConfigGuest of a guest, None if there is none"""
        try:
            return self.host.get_guest(instance).get_config()
        except exception.InstanceNotFound:
            return None


def cache_base(local, context, instance, fallback_from_host=None) -> str:
    """Have an instance's image in the image cache of this host.

    :param local: the LocalHost
    :param fallback_from_host: may have the image if Glance has it no more
    :returns: its path
    """
    return local.image_backend.by_name(
        instance, 'disk', 'libvirt-storage').ensure_image_cached(
            context, instance.image_ref,
            trusted_certs=instance.trusted_certs,
            fallback_from_host=fallback_from_host)


def config_drive_image_type() -> str:
    """The image backend of a config drive that is going to be made."""
    if CONF.libvirt.images_type in ('rbd', 'libvirt-storage'):
        return CONF.libvirt.images_type
    return 'raw'


def _is_offered_ceph(instance) -> bool:
    """Whether the destination of a move has a Ceph pool for its disks."""
    told = offer.load(instance)
    return told is not None and any(
        pool.ceph for pool in told.pools.values())


class DiskOperation:
    """What one operation of the driver does with an instance's disks.

    :param local: the LocalHost
    :param block_device_info: with the mappings that hold the records
    :ivar records: the InstanceDisks
    :ivar there: names of the disks that begin() has found: what of an
        evacuated instance is on storage that hosts share
    """

    def __init__(self, local: LocalHost, context, instance,
                 block_device_info):
        self._local = local
        self._context = context
        self._instance = instance
        self._block_device_info = block_device_info
        self.there: list[str] = []
        self._suffix = ''
        self._is_unfinished = False
        self._transition: transition.Transition | None = None
        self._has_pool_disks = False
        self._arrivals: list[handover.Arrival] = []
        self.records = lifecycle.of_new_disks(
            context, instance, block_device_info)

    def check(self) -> None:
        """:raises: exception.InvalidDiskMetadata if a record is broken"""
        self.records.items()

    def start_pools(self) -> None:
        """Start the pools that the disks are in, if they are off.

        :raises: exception.StoragePoolError if one of them can't be started,
            exception.InvalidDiskMetadata
        """
        health.ready_for(self._local.get_connection, self.records)

    def image(self, name, mapping=None):
        """The Image of a disk as on record, or as this host would make it.

        :param mapping: the disk's part of ``disk_info['mapping']``
        """
        if mapping is None:
            mapping = self.mapping(name)
        image_type = None
        if 'metadata' not in (mapping or {}) and self._makes_files(name):
            image_type = 'qcow2' if CONF.use_cow_images else 'flat'
        elif name.startswith('disk.config'):
            image_type = config_drive_image_type()
        return self._local.image_backend.by_name(
            self._instance, name, image_type, disk_info_mapping=mapping)

    def _makes_files(self, name):
        """Whether a new disk is a file, since others have to stay files.

        Volumes and files together can't be migrated.
        """
        return (CONF.libvirt.images_type == 'libvirt-storage' and
                not name.endswith('.rescue') and self._stays_in_files())

    def mapping(self, name: str) -> dict | None:
        """What an image backend needs of a disk that is on record."""
        record = self.records.get(name)
        return record and {'metadata': record}

    def is_on_record(self, name: str) -> bool:
        return self.records.get(name) is not None

    def attach(self, disk_info: dict) -> None:
        """Let the image backends see the records.

        :param disk_info: gets the records into its mapping
        """
        if self.records.has_mappings:
            lifecycle.attach(self.records, disk_info['mapping'])

    def disk_info(self) -> dict:
        """:returns: of blockinfo, in which image backends see the records"""
        disk_info = self._disk_info()
        self.attach(disk_info)
        return disk_info

    def take_up(self, disk_info, guest_config=None,
                remade=frozenset()) -> None:
        """Record the disks that lack a record; attach all to disk_info.

        :param guest_config: the LibvirtConfigGuest that the guest ran with
        :param remade: names of disks that are made anew after this if they
            were never finished
        :raises: exception.DiskNotFinished if another was never finished,
            exception.InvalidDiskMetadata
        """
        if not self.records.has_mappings:
            return
        lifecycle.take_up(
            self.records, disk_info['mapping'], guest_config,
            self._configured(), self._block_device_info)
        self.records.save(self._context)
        unfinished = [name for name in self.records.building()
                      if name not in remade]
        if unfinished:
            raise exception.DiskNotFinished(
                instance_uuid=self._instance.uuid,
                disks=', '.join(unfinished))

    def settle_evacuation(self) -> None:
        """Have disks on record as they are here, if others have been.

        :raises: exception.InvalidDiskMetadata
        """
        if 'task_state' not in self._instance or (
                self._instance.task_state not in task_states.rebuild_states):
            evacuation.give_up(self.records)
        last = evacuation.find_unsettled(
            self._context, self._instance, self.records)
        if evacuation.has_come(last, self.records):
            unrecorded.take_files_up(
                self.records, self._local.get_guest_config(self._instance))
        elif evacuation.has_failed(last, self.records):
            evacuation.take_back(
                self.records, self._local.get_guest_config(self._instance),
                self._configured())

    def take_up_running(self) -> None:
        """Have the disks of a guest that runs, or may run, on record.

        :raises: exception.InvalidDiskMetadata, exception.DiskNotFinished
        """
        if self.records.has_mappings:
            self.settle_evacuation()
            self.take_up(self._disk_info(),
                         self._local.get_guest_config(self._instance))

    def _disk_info(self):
        return blockinfo.get_disk_info(
            CONF.libvirt.virt_type, self._instance, self._instance.image_meta,
            self._block_device_info)

    def _configured(self):
        """The image backend of a file of which nothing else is known."""
        configured = self._local.image_backend.backend().RECORDED_AS
        if (configured == fields.LibvirtDiskBackend.LIBVIRT_STORAGE and
                CONF.use_cow_images):
            # Pools hold no such files. The default made this one, before it
            # meant pools.
            return fields.LibvirtDiskBackend.QCOW2
        return configured

    # Making disks

    def begin(self, disk_info, guest_config=None, suffix='',
              moved_disks=None) -> None:
        """Have all disks on record before the first of them is made.

        :param guest_config: the LibvirtConfigGuest that the guest ran with
        :param suffix: ``.rescue`` if only the disks of a rescue are made
        :param moved_disks: what migrate_disk_and_power_off has returned on
            the host that the disks come from
        """
        self._suffix = suffix
        if not self.records.has_mappings:
            return
        if moved_disks is not None:
            lifecycle.arrived(self.records, jsonutils.loads(moved_disks))
            # Whatever fails, the instance is here.
            self.records.save(self._context)
        elif leftovers.on_host(self.records, CONF.host):
            leftovers.forget_gone(self._local.get_connection(), self.records)
        if suffix:
            # The guest keeps its own disks.
            self.settle_evacuation()
        stale = undo.after_evacuation(self._instance, self.records)
        instance_dir = libvirt_utils.get_instance_path(self._instance)
        is_new = not os.path.exists(instance_dir)
        self.there = lifecycle.begin(
            self.records, disk_info['mapping'], guest_config, self.image,
            self._configured(), self._block_device_info, suffix, stale)
        evacuation.refuse_other_names(
            self._local.get_connection, self.records)
        if is_new and os.path.isdir(instance_dir):
            # Some backends make it when they are asked about a disk; it is
            # _create_image's to make, which tells who must clean it up.
            shutil.rmtree(instance_dir)
        self.records.save(self._context)

    def finish(self, make_config_drive: ty.Callable) -> None:
        """Make the config drive, the last of the disks; then all are whole.

        :param make_config_drive: makes it if the instance has one; takes the
            ``record`` of the disk
        :raises: exception.StorageTransferMismatch,
            exception.UnsafeDiskContent if what has come is no longer what it
            was
        """
        make_config_drive(
            record=self.records.get('disk.config' + self._suffix))
        lifecycle.finished(self.records, self.image, self._suffix)
        self.records.save(self._context)
        # The guest is started next.
        self.look_again()

    def make_unfinished(self, driver) -> None:
        """Make what holds nothing of the guest, and was never finished.

        A config drive that was is made when the guest is defined: see
        :meth:`creator`.

        :param driver: the LibvirtDriver, which makes what is on the disks
        """
        images = lifecycle.discard_unfinished(self.records, self.image)
        self._is_unfinished = bool(images)
        for name, image in images.items():
            size = self.records.get(name).size
            if name == 'disk.swap':
                swap_mb = size // units.Mi
                image.create_from_func(
                    functools.partial(
                        driver._create_swap, swap_mb=swap_mb,
                        context=self._context,
                        is_block_dev=image.is_block_dev),
                    size, cache_name='swap_%s' % swap_mb,
                    context=self._context)
            elif name == 'disk.local':
                image.create_from_func(
                    functools.partial(
                        driver._create_ephemeral,
                        ephemeral_size=size // units.Gi,
                        fs_label=driver._get_fs_label_ephemeral(0),
                        os_type=self._instance.os_type,
                        is_block_dev=image.is_block_dev,
                        context=self._context,
                        vm_mode=fields.VMMode.get_from_instance(
                            self._instance)),
                    size, context=self._context)

    def creator(self, create_guest: ty.Callable,
                make_config_drive: ty.Callable) -> ty.Callable:
        """What creates the guest, and finishes its disks before it starts.

        :param create_guest: takes ``post_xml_callback``, which it calls when
            the guest is defined: a config drive tells what devices it has
        :param make_config_drive: see :meth:`finish`
        :returns: to be called as create_guest
        """
        if not self._is_unfinished:
            return create_guest
        return functools.partial(create_guest, post_xml_callback=(
            functools.partial(self.finish, make_config_drive)))

    # From and to other hosts

    def accept(self) -> None:
        """Take over the pool disks that have come with an instance.

        :raises: exception.StorageTransferMismatch and others
        """
        # What is compared and taken over, nobody may write to any more.
        with self._local.intake.handing_over(self._instance):
            arriving = handover.arriving(self.records)
            self._has_pool_disks = destination.accept(
                self._context, self._instance, self.records,
                self._local.get_connection(), self._local.uri,
                self._cache_base, self._local.intake.verify)
            if arriving:
                self._arrivals = handover.look(
                    self._local.get_connection(), arriving)

    def look_again(self) -> None:
        """Compare disks that have come with what they were when they came.

        :raises: exception.StorageTransferMismatch,
            exception.UnsafeDiskContent
        """
        if self._arrivals:
            handover.look_again(
                self._context, self._local.get_connection, self.records,
                self._arrivals)

    def may_copy_from(self, host: str) -> str | None:
        """The host, if base images may be copied from it over SSH.

        They are never for an instance that has come with pool disks.
        """
        return None if self._has_pool_disks else host

    def _cache_base(self):
        try:
            return self._fetch_base(self._context)
        except (exception.ImageNotFound, exception.ImageNotAuthorized):
            context = base_image.context_to_fetch(
                self._context, self._instance)
            if context is None:
                raise
            return self._fetch_base(context)

    def _fetch_base(self, context):
        return self.image('disk').ensure_image_cached(
            context, self._instance.image_ref,
            trusted_certs=self._instance.trusted_certs)

    # Into the pools of this host

    def move_to_pools(self, disk_info=None, guest_is_off=True) -> None:
        """Move legacy disks into storage pools, if this host has pools.

        If that fails the disks stay as they are, and so does the instance.
        The driver calls :meth:`started` once the guest is defined with them.

        :param disk_info: gets the new records attached
        :raises: exception.DiskTransitionFailed if the guest is not off
        """
        if guest_is_off or _is_offered_ceph(self._instance):
            self.take_over(disk_info)
        moving = self._new_transition(guest_is_off)
        if moving is None:
            return
        try:
            moving.run()
        except exception.DiskTransitionFailed as error:
            if not guest_is_off:
                raise
            LOG.error('%s', error, instance=self._instance)
        if disk_info is not None:
            self.attach(disk_info)
        self._transition = moving

    def take_over(self, disk_info=None) -> None:
        """Have disks on Ceph on record as what this host makes them now.

        :param disk_info: gets the new records attached
        """
        if self.records.has_mappings and takeover.take_over(
                self._local.get_connection(), self.records):
            self.records.save(self._context)
            if disk_info is not None:
                self.attach(disk_info)

    def finish_earlier_move(self) -> None:
        """Have :meth:`started` end a move into pools that was cut off."""
        self._transition = self._new_transition()

    def _new_transition(self, guest_is_off=True):
        if (CONF.libvirt.images_type != 'libvirt-storage' or
                not self.records.has_mappings):
            return None
        try:
            if self._stays_in_files():
                return None
        except exception.StoragePoolError as e:
            if not guest_is_off:
                raise exception.DiskTransitionFailed(
                    instance=self._instance.uuid, reason=e) from e
            # It starts with its files, which need no pool.
            LOG.error('The disks stay outside of the storage pools: %s', e,
                      instance=self._instance)
            return None
        return transition.Transition(
            self._context, self._instance, self.records,
            lambda name: storage_pool.StoragePool(
                self._local.get_connection(), name, CONF.host),
            libvirt_utils.get_instance_path(self._instance),
            imagecache.ImageCacheManager().cache_dir, guest_is_off)

    def refuse_logical_volumes(self) -> None:
        """Refuse to migrate what Nova has made as logical volumes itself.

        :raises: exception.MigrationPreCheckError
        """
        names = [name for name, record in self.records.items()
                 if record.backend == fields.LibvirtDiskBackend.LVM]
        if names:
            raise exception.MigrationPreCheckError(reason=_(
                'migration is not supported for logical volumes that are in '
                'no storage pool, as %s are; see "From images_type = lvm" in '
                '"Moving local disks into libvirt storage pools" in the admin '
                'guide') % ', '.join(names))

    def _stays_in_files(self):
        """Whether a disk would move into a pool that takes no files.

        All of the disks move, or none.
        """
        connection = self._local.get_connection()
        for name, record in self.records.items():
            if record.backend not in metadata.FILE_BACKENDS:
                continue
            pool = setup.pool_of(connection, name)
            if pool.exists() and not transition.takes(
                    pool.kind(), name, record):
                LOG.info('Disk %(name)s stays a file: storage pool %(pool)s '
                         'is over Ceph or a volume group, into which it can '
                         'not move', {'name': name, 'pool': pool.name},
                         instance=self._instance)
                return True
        return False

    def started(self) -> None:
        """Take the legacy names away: the guest is defined with pool disks.

        A failure is logged; the next hard reboot tries it again.
        """
        if self._transition is None:
            return
        try:
            self._transition.finish()
        except (exception.NovaException, OSError):
            LOG.exception('The legacy names of disks are left; the next hard '
                          'reboot takes them away', instance=self._instance)
