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

"""The local disks of a compute's instances, for the driver.

All that the driver calls, a method an operation. A disk which is a volume of
a libvirt storage pool is a *pool disk* here and in the driver, where a volume
is one of Cinder. Methods which name no other exception raise
exception.StoragePoolError if libvirt can't be asked.
"""

import functools
import os
import typing as ty

from oslo_log import log as logging
from oslo_utils import units

from nova.compute import task_states
import nova.conf
from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import objects
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage import image_rbd
from nova.virt.libvirt.storage.live import offer as live_offer
from nova.virt.libvirt.storage.live import plan
from nova.virt.libvirt.storage.live import receive
from nova.virt.libvirt.storage.live import send
from nova.virt.libvirt.storage.live import settle
from nova.virt.libvirt.storage.live_image import capture
from nova.virt.libvirt.storage.live_image import interfaces
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import spawn
from nova.virt.libvirt.storage.live_image import under_way
from nova.virt.libvirt.storage.move import bitmaps
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.move import readiness
from nova.virt.libvirt.storage.move import source
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.move import undo
from nova.virt.libvirt.storage import operation
from nova.virt.libvirt.storage import orphans
from nova.virt.libvirt.storage.pool import health
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import sharing
from nova.virt.libvirt.storage.pool import usage
from nova.virt.libvirt.storage import reboot
from nova.virt.libvirt.storage.records import cells
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import lifecycle
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage import report
from nova.virt.libvirt.storage import transition
from nova.virt.libvirt.storage import unconfigured
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# What images_type should no longer be.
DEPRECATED = ('raw', 'flat', 'qcow2')

config_drive_image_type = operation.config_drive_image_type


def add_image_type(image_backend, get_connection: ty.Callable) -> None:
    """Let an imagebackend.Backend know ``images_type = libvirt-storage``.

    :param get_connection: gives the virConnect of this compute's libvirt
    """
    image_backend.BACKEND.update(image_rbd.bound_to(get_connection))


def makes_pool_disks() -> bool:
    """Whether new disks are made in pools. Those that are there stay."""
    return CONF.libvirt.images_type == 'libvirt-storage'


class LocalDisks:
    """The local disks of a compute's instances, on record and in pools.

    :param host: the Host of this compute
    :param image_backend: the driver's imagebackend.Backend
    :param job_tracker: the driver's InstanceJobTracker
    :param uri: URI of this compute's libvirt
    :param get_address: gives the address under which peers reach it
    """

    def __init__(self, host, image_backend, job_tracker, uri: str,
                 get_address: ty.Callable[[], str]):
        self._local = operation.LocalHost(
            host, image_backend, job_tracker, uri, get_address)
        self._readiness = readiness.Readiness(host, get_address)
        self._offering: health.Offering | None = None
        self._has_pools = False
        self._is_starting = False
        # UUIDs of instances whose disks were not deleted just now
        self._stayed: set[str] = set()

    def _connection(self):
        return self._local.get_connection()

    def get_connection(self):
        """:returns: to libvirt, for what makes and reads disks"""
        return self._connection()

    # The compute

    def init_host(self) -> dict[str, bool]:
        """Make or adopt the storage pools that disks are kept in.

        :returns: capabilities of the driver that hang on the pools
        """
        self._is_starting = True
        if makes_pool_disks():
            setup.ensure_pools(self._connection(), CONF.host)
            if not CONF.libvirt.live_migration_with_native_tls:
                LOG.warning('Disks in storage pools are live migrated in '
                            'plain text, unless [libvirt]/'
                            'live_migration_with_native_tls is set')
        elif CONF.libvirt.images_type in DEPRECATED:
            LOG.warning('[libvirt]/images_type = %s is deprecated. Leave it '
                        'out, or set it to libvirt-storage, to keep new disks '
                        'in libvirt storage pools; see "Moving local disks '
                        'into libvirt storage pools" in the admin guide.',
                        CONF.libvirt.images_type)
        self._local.intake.start()
        # Disks made there stay, whatever images_type says now.
        self._has_pools = None
        if self._has_pools:
            bitmaps.recover(self._local.host)
        else:
            LOG.debug('This host has no storage pools that are known of')
        return {'supports_live_images': self._starts_live()}

    @property
    def _has_pools(self) -> bool:
        """Whether this host has pools, as far as libvirt can be asked.

        Its storage driver is a daemon of its own, that a host without storage
        pools need not run.
        """
        if self._pools_found is None:
            try:
                self._pools_found = ownership.has_pools(self._connection())
            except exception.StoragePoolError as e:
                LOG.info('Storage pools, if there are any, are passed over: '
                         '%s', e)
                return False
        return self._pools_found

    @_has_pools.setter
    def _has_pools(self, found: bool | None) -> None:
        """:param found: None to have libvirt asked"""
        self._pools_found = found

    def warn_of_legacy_disks(self, context, instances) -> None:
        """Log which instances have disks outside the pools of this host."""
        # What was evacuated has been destroyed by now.
        self._is_starting = False
        if makes_pool_disks():
            report.warn_of_legacy_disks(context, instances)

    def stats(self) -> dict[str, str]:
        """What goes into ComputeNode.stats."""
        self._local.intake.look_after()
        return self._readiness.stats()

    def check_pools(self, set_host_enabled) -> None:
        """Keep this host from the scheduler while its pools are off.

        :param set_host_enabled: the driver's, see health.Offering
        """
        if self._offering is None:
            self._offering = health.Offering(set_host_enabled)
        self._offering.check(self._connection())

    def capacity(self) -> dict[str, int]:
        """:returns: total, free and used of the pools, in bytes"""
        return usage.get_local_info(self._connection(), CONF.host)

    def image_cache_changed(self) -> None:
        """Let libvirt know that base images came or went."""
        spawn.open_store(None).sweep()
        if makes_pool_disks():
            image_cache.cache_changed(self._connection(), CONF.host)

    def disk_info(self, disk) -> dict:
        """What the driver wants to know of a pool disk of a guest.

        :param disk: its LibvirtConfigGuestDisk, of source_type ``volume``
        :returns: as _get_instance_disk_info_from_config; see usage.Volumes
        :raises: exception.StorageVolumeError, exception.StoragePoolError
        """
        return usage.Volumes(
            self._local.get_connection, CONF.host).disk_info(disk)

    # Making disks

    @staticmethod
    def is_cross_cell_move(instance) -> bool:
        """Whether a resize moves, or has moved, an instance between cells."""
        return cells.has_two(instance)

    def open(self, context, instance,
             block_device_info) -> operation.DiskOperation:
        """Begin with an instance's disks, before anything is done to it.

        :returns: a DiskOperation: begin() before the first disk is made,
            finish() for the last one
        :raises: exception.InvalidDiskMetadata, exception.StoragePoolError,
            exception.DisksMayBeElsewhere, exception.LiveMigrationNotEnded
        """
        disks = operation.DiskOperation(
            self._local, context, instance, block_device_info)
        settle.end_moving(self._local.host, disks.records)
        settle.settle(context, self._local.host, disks.records)
        disks.check()
        disks.start_pools()
        return disks

    def check_stays(self, instance) -> None:
        """Check a guest that is to be powered off, suspended or unpaused.

        :raises: exception.DisksMayBeElsewhere,
            exception.InvalidDiskMetadata, exception.LiveMigrationNotEnded
        """
        if CONF.libvirt.virt_type not in setup.VIRT_TYPES:
            # libvirt's LXC can't be asked for what a guest's job is.
            return
        context = nova_context.get_admin_context()
        settle.check_stays(
            context, self._local.host, instance,
            lambda: metadata.InstanceDisks.load(context, instance))

    def check_reboot(self, context, instance,
                     block_device_info) -> reboot.Reboot:
        """Find what would keep a guest from starting, while it still runs.

        :returns: a Reboot: bring_in_order() once the guest is destroyed,
            started() when it runs
        :raises: exception.InvalidDiskMetadata, exception.DiskNotFinished,
            exception.DiskBeingCopied, exception.DiskGivenBack,
            exception.DisksMayBeElsewhere, exception.StoragePoolInactive,
            exception.StoragePoolError, exception.LiveMigrationNotEnded
        """
        disks = reboot.Reboot(
            self._local, context, instance, block_device_info)
        settle.end_moving(self._local.host, disks.records)
        settle.settle(context, self._local.host, disks.records)
        disks.check()
        return disks

    def start_pools(self, context, instance) -> None:
        """Start the pools that a guest needs, before anything is done to it.

        :raises: exception.StoragePoolError if one of them can't be started
        """
        if not self._has_pools:
            return
        try:
            health.ready_for(
                self._local.get_connection,
                metadata.InstanceDisks.load(context, instance))
        except exception.InvalidDiskMetadata as e:
            # The guest's own definition says where its disks are.
            LOG.warning('%s', e, instance=instance)

    def ensure_base_cached(self, context, instance, info,
                           fallback_from_host=None) -> None:
        """Have the base image of a pool disk in the image cache.

        :param info: what disk_info() returns
        :param fallback_from_host: may have the image if Glance has it no more
        """
        cache_name = imagecache.get_cache_fname(instance.image_ref)
        if os.path.basename(info['backing_file']) == cache_name:
            operation.cache_base(
                self._local, context, instance, fallback_from_host)

    # Snapshots

    def pool_disk(self, instance, guest, disk_path):
        """The Image of a pool disk that a guest runs with.

        :param guest: the Guest
        :param disk_path: what libvirt_utils.find_disk() returns: the device
            of a pool disk, such as ``vda``; of one on Ceph its name there
        :returns: None if it isn't one
        """
        if self._has_pools and disk_path.startswith('rbd:'):
            return self._disk_on_ceph(instance, os.path.basename(disk_path))
        if '/' in disk_path:
            return None
        # The guest runs with what Nova has written into its XML.
        disk = guest.get_disk(disk_path)
        if disk is None or disk.source_type != 'volume':
            return None
        return self._local.image_backend.by_name(
            instance, 'disk',
            disk_info_mapping={'metadata': image.record_of(disk)})

    def size_and_base(self, instance, guest, disk_path):
        """How large a guest's pool disk is, and what it is an overlay of.

        :param guest: see :meth:`pool_disk`, as of disk_path
        :returns: tuple (bytes, path or None); None if it is no pool disk
        """
        disk = self.pool_disk(instance, guest, disk_path)
        return disk and (disk.get_disk_size(disk_path),
                         disk.get_backing_file())

    def _disk_on_ceph(self, instance, volume):
        """The Image of a disk whose record says that it is that volume."""
        records = metadata.InstanceDisks.load(
            nova_context.get_admin_context(), instance)
        for name, record in records.items():
            if record.is_on_ceph and record.volume == volume:
                return self._local.image_backend.by_name(
                    instance, name, disk_info_mapping={'metadata': record})
        return None

    # Live images

    def _starts_live(self):
        """Whether guests can be saved, and new ones go on from a memory.

        To be asked when the pools are there: in those over a volume group or
        Ceph no root disk is an overlay, which alone can hold a memory.
        """
        if not (CONF.libvirt.live_images and makes_pool_disks() and
                CONF.use_cow_images and
                CONF.libvirt.virt_type in setup.VIRT_TYPES):
            return False
        try:
            return setup.pool_of(
                self._connection(), 'disk').kind().has_overlays
        except exception.StoragePoolError as e:
            LOG.warning('No server goes on from a memory on this host: %s', e)
            return False

    def save_live(self, context, instance, driver, image_api, image_id: str,
                  metadata: dict, update_task_state: ty.Callable) -> None:
        """Save a running guest with its memory, as two images.

        :param driver: see :func:`interfaces.of`
        :param image_id: of the user's image, which is queued
        :param metadata: of that image
        :param update_task_state: as of ComputeDriver.live_snapshot()
        :raises: exception.LiveImageRefused,
            exception.LiveImageCaptureFailed; the guest runs on
        """
        update_task_state(task_state=task_states.IMAGE_PENDING_UPLOAD)
        if not CONF.libvirt.live_images:
            raise exception.LiveImageRefused(
                instance_uuid=instance.uuid,
                reason=_('set [libvirt]/live_images on its host, and hard '
                         'reboot it'))
        store = spawn.open_store(image_api)
        nics = interfaces.of(self._local.host, driver, context, instance)
        try:
            # While the guest runs yet.
            store.check_user()
            with capture.Capture(self._local.host, instance, nics) as saved:
                # The guest runs again as before.
                update_task_state(
                    task_state=task_states.IMAGE_UPLOADING,
                    expected_state=task_states.IMAGE_PENDING_UPLOAD)
                store.publish(context, image_id, metadata, saved)
        except memory_file.Unusable as e:
            raise exception.LiveImageRefused(
                instance_uuid=instance.uuid, reason=e)
        LOG.info('Saved with its memory', instance=instance)

    def recover_live(self, context, instances, driver) -> None:
        """Put right what captures have left that were cut off.

        :param instances: all of this host
        :param driver: see :func:`interfaces.of`
        """
        cut_off = set(under_way.instances())
        for instance in instances if cut_off else ():
            if instance.uuid in cut_off:
                cut_off.remove(instance.uuid)
                self._recover_live(context, instance, driver)
        for uuid in cut_off:
            # Nobody has its guest here any more.
            capture.end(uuid)

    def _recover_live(self, context, instance, driver):
        if not self._is_leaving(instance):
            capture.recover(self._local.host, instance, interfaces.of(
                self._local.host, driver, context, instance))

    def _is_leaving(self, instance):
        """Whether a live migration of later on keeps a guest from going on."""
        try:
            disks = metadata.InstanceDisks.load(
                nova_context.get_admin_context(), instance)
            if not settle.is_open(self._local.host, disks):
                return False
            reason: ty.Any = 'a live migration of it is open'
        except exception.NovaException as e:
            reason = e
        LOG.warning('What is left of saving the guest with its memory is put '
                    'right later: %s', reason, instance=instance)
        return True

    def live_boot(self, context, instance,
                  image_api) -> spawn.Spawn | None:
        """Prepare the start from the memory that an image has.

        :returns: None if it has none
        :raises: exception.LiveImageUnusable
        """
        return spawn.prepare(self._local.host, image_api, context, instance)

    # Cold migration and resize

    def offer(self, context, instance, migration) -> None:
        """On the destination: say what it can take.

        :raises: exception.InstanceFaultRollback
        """
        try:
            destination.offer(
                self._connection(), instance, migration,
                metadata.InstanceDisks.load(context, instance))
            # A pool may have been defined since this service was started.
            self._has_pools = self._has_pools or None
        except Exception as e:
            # Nothing has happened to the instance yet.
            raise exception.InstanceFaultRollback(e)

    def take_in(self, context, instance, migration, request: dict):
        """On the destination: do what the source asks for over RPC.

        :returns: plain values
        :raises: exception.StorageIntakeRefused, exception.StorageIntakeError,
            and what libvirt says of pools and volumes
        """
        return self._local.intake.handle(
            context, instance, migration, request)

    def depart(self, context, instance, block_device_info):
        """On the source: check a migration while the guest runs.

        Large disks are sent ahead, which takes its time.
        Legacy disks get names in the pools of this host, if it has pools.

        :returns: a source.Outgoing to be run when the guest is off; None if
            the instance has no pool disks and migrates as ever
        :raises: exception.InstanceFaultRollback; the guest runs on
        """
        disks = operation.DiskOperation(
            self._local, context, instance, block_device_info)
        try:
            settle.end_moving(self._local.host, disks.records)
            settle.settle(context, self._local.host, disks.records)
            disks.take_up_running()
            disks.move_to_pools(guest_is_off=False)
            disks.refuse_logical_volumes()
        except Exception as error:
            raise exception.InstanceFaultRollback(error)
        return source.prepare(
            state.ThisHost(self._local.host, self._local.uri,
                           self._local.get_address(),
                           self._local.job_tracker),
            context, instance, block_device_info)

    def arrive(self, context, instance, block_device_info, disk_info: dict,
               moved_disks: str) -> operation.DiskOperation:
        """On the destination: take over the pool disks that have come.

        :param disk_info: the driver's, gets the records into its mapping
        :param moved_disks: what migrate_disk_and_power_off has returned on
            the source
        :returns: a DiskOperation which has begun, see :meth:`open`
        :raises: exception.StorageTransferMismatch and others
        """
        disks = operation.DiskOperation(
            self._local, context, instance, block_device_info)
        disks.start_pools()
        disks.accept()
        disks.begin(disk_info, moved_disks=moved_disks)
        return disks

    def take_back(self, context, instance, migration,
                  block_device_info) -> reboot.Return:
        """On the source: have the disks back after a revert.

        The instance's directory has its name again.

        :returns: a Return: attach(), and started() when the guest runs
        :raises: exception.InvalidDiskMetadata, exception.DiskNotFinished
        """
        disks = reboot.Return(
            self._local, context, instance, block_device_info)
        disks.take_back(migration)
        return disks

    def give_up(self, context, instance, migration,
                block_device_info) -> reboot.Return:
        """On the source: undo a migration that has failed there.

        :returns: a Return, see :meth:`take_back`
        :raises: exception.InvalidDiskMetadata, exception.DiskNotFinished
        """
        disks = reboot.Return(
            self._local, context, instance, block_device_info)
        disks.bring_directory_back()
        disks.take_back(migration)
        return disks

    def confirm(self, context, instance) -> None:
        """On the source: delete what was kept for a revert."""
        if not self._has_pools:
            return
        root = metadata.InstanceDisks.load(context, instance).get('disk')
        # The driver does it with images_type = rbd.
        if (root is not None and root.is_everywhere and
                not root.came_into_ceph and
                CONF.libvirt.images_type != 'rbd'):
            self._local.image_backend.by_name(
                instance, 'disk',
                disk_info_mapping={'metadata': root}).remove_snap(
                    libvirt_utils.RESIZE_SNAPSHOT_NAME, ignore_errors=True)
        source.confirm(context, self._connection(), instance)

    # Live migration

    @plan.refusing()
    def offer_live(self, context, instance) -> dict:
        """On the destination: say which pools take an instance's disks.

        :returns: fields of LibvirtLiveMigrateData
        :raises: exception.MigrationPreCheckError
        """
        if not self._has_pools:
            return {}
        return live_offer.make(
            self._connection(), instance,
            metadata.InstanceDisks.load(context, instance),
            self._local.get_address())

    def withdraw_live(self, data) -> None:
        """On the destination: remove what offer_live() has made."""
        live_offer.withdraw(self._connection(), data)

    @plan.refusing()
    def plan_live(self, context, instance, block_device_info,
                  data) -> bool | None:
        """On the source: have all disks on record, and plan their ways.

        :param data: the LibvirtLiveMigrateData; says of each disk what
            becomes of it, if they are pool disks
        :returns: whether all stay where they are, as pool disks that both
            hosts see do, and images of Ceph outside of the pools, whatever
            images_type the hosts have; None if the driver has to find out
        :raises: exception.MigrationPreCheckError
        """
        disks = operation.DiskOperation(
            self._local, context, instance, block_device_info)
        settle.wait_until_ended(self._local.host, instance)
        settle.settle(context, self._local.host, disks.records)
        disks.take_up_running()
        if 'dst_storage_pools' in data and data.dst_storage_pools:
            disks.take_over()
        if plan.is_pool_backed(disks.records):
            plan.Plan(self._local, context, disks.records, data).make()
        else:
            plan.refuse_unknown(
                instance, self._local.get_guest_config(instance))
            if ('dst_takes_legacy' in data and data.dst_takes_legacy and
                    transition.is_due(disks.records)):
                self._plan_transition(context, disks.records, data)
        if data.has_planned_disks:
            return not data.copied_disks
        return True if plan.is_on_ceph(disks.records) else None

    def _plan_transition(self, context, disks, data):
        """Let files become pool disks on the way, all of them or none."""
        moving = plan.Plan(self._local, context, disks, data)
        reason: ty.Any = (
            'both hosts see the instance directory, and the pools of the '
            'destination take no hard links from there')
        if moving.takes_files():
            try:
                moving.make()
                return
            except Exception as e:
                reason = e
        LOG.warning('The disks stay files in the live migration, and go into '
                    'storage pools at the next hard reboot: %s', reason,
                    instance=disks.instance)

    @plan.refusing()
    def check_live(self, context, instance, data) -> None:
        """On the destination: the last word before a live migration begins.

        :raises: exception.MigrationPreCheckError
        """
        if plan.planned(data):
            self._receiver(context, instance, data).check()

    def receive_live(self, context, instance, data) -> bool:
        """On the destination: make the volumes, and say where they are.

        :param data: the LibvirtLiveMigrateData, or None
        :returns: whether the disks are, or are to be, pool disks
        """
        if not plan.planned(data):
            return False
        self._receiver(context, instance, data).receive(functools.partial(
            operation.cache_base, self._local, context, instance))
        return True

    def _receiver(self, context, instance, data):
        return receive.Receiver(
            self._local, context,
            metadata.InstanceDisks.load(context, instance), data)

    def send_live(self, context, instance, data) -> bool:
        """On the source: what has to be done before QEMU copies the disks.

        :returns: False if abort_live() has ended it
        :raises: exception.MigrationError and others; the guest runs on
        """
        return not plan.planned(data) or send.Sender(
            self._local, metadata.InstanceDisks.load(context, instance),
            data).send()

    @staticmethod
    def abort_live(guest) -> bool:
        """On the source: end what send_live() does.

        :returns: False if it does nothing: libvirt has the migration then
        """
        return send.abort(guest)

    def copied_live(self, guest, data) -> tuple[list, list[str]] | None:
        """On the source: the devices of a guest that QEMU copies.

        :returns: as the driver's _live_migration_copy_disk_paths(); None if
            the disks are no pool disks
        :raises: exception.MigrationError if one would be left out
        """
        if not plan.planned(data):
            return None
        return [], plan.devices_to_copy(guest, data)

    def gb_live(self, data) -> float:
        """How much QEMU copies of pool disks, in GiB; 2 at least of each."""
        return sum(max(2, size / units.Gi)
                   for size in plan.bytes_to_copy(data))

    def refuse_to_guess(self, context, instance) -> ty.NoReturn:
        """On the source: leave a migration that was cut off to an operator.

        :raises: exception.DisksMayBeElsewhere, or another exception if the
            instance was deleted in the meantime
        """
        settle.refuse_to_guess(metadata.InstanceDisks.load(context, instance))

    def leave(self, context, instance, data) -> bool:
        """Take away what others don't need of disks that they see, too.

        On the source of a live migration these are the pool disks that the
        guest has left. It runs on the destination: an error is only logged.
        On the destination of a migration of files that is reverted these are
        the volumes which they have become.

        :param data: the LibvirtLiveMigrateData, or None
        :returns: whether pool disks have been, or were to be, migrated live
        """
        if not plan.planned(data):
            if instance.task_state == task_states.RESIZE_REVERTING:
                self._give_files_back(context, instance)
            return False
        try:
            settle.leave(context, self._connection(),
                         metadata.InstanceDisks.load(context, instance))
        except Exception:
            LOG.exception('Volumes of the instance may be left on this host; '
                          'they go before its next migration to it',
                          instance=instance)
        return True

    def _give_files_back(self, context, instance):
        if not self._has_pools:
            return
        try:
            migration = objects.Migration.get_by_id_and_instance(
                context, instance.migration_context.migration_id,
                instance.uuid)
            if (migration.source_compute != CONF.host and
                    not migration.cross_cell_move):
                destination.give_files_back(
                    self._connection(), metadata.InstanceDisks.load(
                        context, instance))
        except Exception:
            LOG.exception('Volumes of the reverted migration may be left on '
                          'this host, and on record', instance=instance)

    def stayed_live(self, context, instance, data) -> None:
        """On the source: note that the guest runs on here.

        The destination, which does so too when it has deleted what it has
        made, may have died. Until it is back this host may restart, and then
        nobody could tell. An error is only logged.
        """
        if not plan.planned(data):
            return
        try:
            settle.wait_until_ended(self._local.host, instance)
            settle.settle(context, self._local.host,
                          metadata.InstanceDisks.load(context, instance))
        except Exception as e:
            LOG.warning('The live migration stays on record until the '
                        'destination has cleaned up: %s', e,
                        instance=instance)

    def is_overtaken_live(self, context, instance, data) -> bool:
        """On the destination: whether a rollback has come too late."""
        if not plan.planned(data) or not settle.is_overtaken(
                context, instance, data):
            return False
        LOG.warning('A live migration that has failed is not rolled back any '
                    'more: the server has come since, or is coming again',
                    instance=instance)
        return True

    def abandon_live(self, context, instance, data) -> None:
        """On the destination: delete what was made for a live migration."""
        # To end what is here takes its time.
        if plan.planned(data) and not self.is_overtaken_live(
                context, instance, data):
            settle.abandon(context, self._connection(),
                           metadata.InstanceDisks.load(context, instance),
                           plan.planned(data))

    def live_migrated(self, context, instance, block_device_info) -> None:
        """On the destination: the disks are this host's now.

        The guest runs here: an error is only logged.
        """
        try:
            disks = operation.DiskOperation(
                self._local, context, instance, block_device_info)
            are_known = settle.arrived(
                disks.records, self._local.get_guest_config(instance))
            disks.records.save(context)
            if are_known:
                # A file that both hosts see has two names now.
                disks.finish_earlier_move()
                disks.started()
        except Exception:
            LOG.exception('Where the disks are is not on record yet; it will '
                          'be when the server is next hard rebooted or moved, '
                          'or this service starts', instance=instance)

    # Deleting

    def delete(self, instance, block_device_info=None) -> bool:
        """Delete an instance's pool disks on this host.

        And those of a backend that images_type doesn't name any more.

        :param block_device_info: holds the records, which say what stays
            while a resize is reverted
        :returns: False if something is left and should be tried again
        """
        if ownership.has_stayed(instance, self._is_starting):
            LOG.info('The disks that the instance has in storage pools stay: '
                     'its evacuation from here is not over, or has failed',
                     instance=instance)
            self._stayed.add(instance.uuid)
            return True
        # What came between may have failed before forget().
        self._stayed.discard(instance.uuid)
        records = lifecycle.of_instance(instance, block_device_info)
        is_gone = unconfigured.delete(
            self._connection, self._local.image_backend, instance, records,
            makes_pool_disks() or bool(self._pools_found))
        if not self._has_pools:
            return is_gone
        # Nobody has to write to what is deleted.
        self._local.intake.close(instance)
        others: ty.Collection[tuple[str, str]] = ()
        has_two = cells.has_two(instance)
        if has_two or ownership.is_elsewhere(instance):
            now = lifecycle.of_new_disks(
                instance._context, instance, block_device_info)
            try:
                others = cells.of_the_other(
                    nova_context.get_admin_context(), self._connection(), now)
            except exception.NovaException as e:
                LOG.error('The disks stay on this host, as it is not known '
                          'which of them another host has: %s', e,
                          instance=instance)
                if ownership.is_making(instance):
                    leftovers.note_own(now)
                    lifecycle.forget(instance._context, now)
                return False
        if instance.task_state == task_states.RESIZE_REVERTING:
            keep = source.kept(records)
            return destination.give_back(
                self._connection(), instance, records,
                keep={*keep, *others} if others else keep, is_copy=has_two)
        is_gone = ownership.delete_volumes(
            self._connection(), instance, keep=others, disks=records,
            is_copy=has_two) and is_gone
        if not is_gone and (lifecycle.is_destroying(instance) or
                            ownership.is_making(instance)):
            # What came with the call may be of before a rebuild.
            records = lifecycle.of_new_disks(
                instance._context, instance, block_device_info)
            leftovers.note_undeleted(self._connection(), records, others)
            # In one save: a guest must not start from what is left.
            lifecycle.forget(instance._context, records)
        return is_gone

    def unrescued(self, context, instance) -> None:
        """Delete the pool disks of a rescue, and take them off the record.

        What can't be deleted is tried again with the instance.
        """
        if not self._has_pools:
            return
        records = metadata.InstanceDisks.load(context, instance)
        ownership.delete_volumes(
            self._connection(), instance, rescue=True, disks=records)
        try:
            lifecycle.unrescued(records)
            records.save(context)
        except exception.InvalidDiskMetadata as e:
            # The guest runs already, without its rescue.
            LOG.warning('%s', e, instance=instance)

    def sweep(self, context, driver) -> None:
        """Delete what is certainly left over of instances that are gone.

        A guest that couldn't be put right after it was saved is tried again.

        :param driver: see :func:`interfaces.of`
        """
        cut_off = under_way.left()
        if not self._has_pools and not cut_off:
            return
        own = set(objects.InstanceList.get_uuids_by_host(context, CONF.host))
        for uuid in cut_off:
            if uuid not in own:
                capture.end(uuid)
                continue
            instance = objects.Instance.get_by_uuid(context, uuid)
            if instance.task_state is None:
                self._recover_live(context, instance, driver)
        if not self._has_pools:
            return
        try:
            # Where disks are files, Nova leaves directories as it always has.
            orphans.sweep(context, self._connection(), own,
                          with_directories=makes_pool_disks())
        except exception.StoragePoolError as e:
            LOG.warning('Volumes that are left over are not looked for: %s', e)

    def delete_of_deleted(self, instance) -> bool:
        """Delete the pool disks of an instance if it is gone.

        Nobody else does that then. As long as it is there, its disks may
        outlive its directory.

        :returns: False if something is left and should be tried again
        """
        if 'deleted' in instance and instance.deleted:
            try:
                return self.delete(instance)
            except exception.HypervisorUnavailable as e:
                LOG.error('Disks of the instance may be left; it will be '
                          'tried later: %s', e, instance=instance)
                return False
        return True

    def forget(self, context, instance, block_device_info) -> None:
        """Take destroyed disks off the record."""
        if instance.uuid in self._stayed:
            self._stayed.remove(instance.uuid)
            return
        lifecycle.forget(context, lifecycle.of_new_disks(
            context, instance, block_device_info))

    # Shared storage

    def are_here(self, instance) -> bool:
        """Whether an instance has pool disks here, whoever has made them."""
        if not self._has_pools:
            return False
        records = metadata.InstanceDisks.load(
            nova_context.get_admin_context(), instance)
        return ownership.has_volumes(
            self._connection(), instance.uuid,
            undo.old_copies(instance, records),
            {record.pool for _name, record in records.items()})

    def make_probes(self, instance) -> dict:
        """Make a volume in each pool, for another host to look for.

        :returns: for that host's find_probes()
        """
        if not self._has_pools:
            return {}
        return {'volumes': sharing.make_probes(
            self._connection(), instance.uuid)}

    def find_probes(self, data: dict) -> bool:
        """Whether this host sees a volume of another's make_probes()."""
        # One that should have pools, and can't be asked, may see it.
        has_to_see = makes_pool_disks()
        return (has_to_see or self._has_pools) and sharing.find_probes(
            self._connection(), data.get('volumes'), has_to_see)

    def remove_probes(self, data: dict) -> None:
        """Remove what make_probes() has made on this host."""
        if data.get('volumes'):
            sharing.remove_probes(self._connection(), data['volumes'])
