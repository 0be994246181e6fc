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

import os
import typing as ty

from oslo_log import log as logging

from nova.compute import task_states
import nova.conf
from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage import image_cache
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
from nova.virt.libvirt.storage.records import lifecycle
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage import report

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

config_drive_image_type = operation.config_drive_image_type


def add_image_type(image_backend, get_connection: ty.Callable) -> None:
    """Let an imagebackend.Backend know ``images_type = libvirt-storage``.

    :param get_connection: gives the virConnect of this compute's libvirt
    """
    image_backend.BACKEND['libvirt-storage'] = (
        image.LibvirtStorage.bound_to(get_connection))


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

    def _connection(self):
        return self._local.get_connection()

    # The compute

    def init_host(self) -> None:
        """Make or adopt the storage pools that disks are kept in."""
        if makes_pool_disks():
            setup.ensure_pools(self._connection(), CONF.host)
        # Disks made there stay, whatever images_type says now.
        self._has_pools = ownership.has_pools(self._connection())

    def warn_of_legacy_disks(self, context, instances) -> None:
        """Log which instances have disks outside the pools of this host."""
        if makes_pool_disks():
            report.warn_of_legacy_disks(context, instances)

    def stats(self) -> dict[str, str]:
        """What goes into ComputeNode.stats."""
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

    def open(self, context, instance,
             block_device_info) -> operation.DiskOperation:
        """Begin with an instance's disks, before anything is done to it.

        :returns: a DiskOperation: begin() before the first disk is made,
            finish() for the last one
        :raises: exception.InvalidDiskMetadata
        """
        disks = operation.DiskOperation(
            self._local, context, instance, block_device_info)
        disks.check()
        return disks

    def check_reboot(self, context, instance,
                     block_device_info) -> reboot.Reboot:
        """Find what would keep a guest from starting, while it still runs.

        :returns: a Reboot: bring_in_order() once the guest is destroyed,
            started() when it runs
        :raises: exception.InvalidDiskMetadata, exception.DiskNotFinished,
            exception.StoragePoolInactive, exception.StoragePoolError
        """
        disks = reboot.Reboot(
            self._local, context, instance, block_device_info)
        disks.check()
        return disks

    def ensure_base_cached(self, context, instance, info,
                           fallback_from_host=None) -> None:
        """Have the base image of a pool disk in the image cache.

        :param info: what disk_info() returns
        :param fallback_from_host: may have the image if Glance has it no more
        """
        cache_name = imagecache.get_cache_fname(instance.image_ref)
        if os.path.basename(info['backing_file']) == cache_name:
            self._local.image_backend.by_name(
                instance, 'disk', 'libvirt-storage').ensure_image_cached(
                    context, instance.image_ref,
                    trusted_certs=instance.trusted_certs,
                    fallback_from_host=fallback_from_host)

    # Snapshots

    def pool_disk(self, instance, guest, disk_path):
        """The Image of a pool disk that a guest runs with.

        :param guest: the Guest
        :param disk_path: what libvirt_utils.find_disk() returns: the device
            of a pool disk, such as ``vda``
        :returns: None if it isn't one
        """
        if '/' in disk_path:
            return None
        # The guest runs with what Nova has written into its XML.
        disk = guest.get_disk(disk_path)
        if disk is None or disk.source_type != 'volume':
            return None
        return self._local.image_backend.by_name(
            instance, 'disk',
            disk_info_mapping={'metadata': image.record_of(disk)})

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
            self._has_pools = self._has_pools or ownership.has_pools(
                self._connection())
        except exception.NovaException as e:
            # Nothing has happened to the instance yet.
            raise exception.InstanceFaultRollback(e)

    def depart(self, context, instance, block_device_info):
        """On the source: check a migration while the guest runs.

        Legacy disks get names in the pools of this host, if it has pools.

        :returns: a source.Outgoing to be run when the guest is off; None if
            the instance has no pool disks and migrates as ever
        :raises: exception.InstanceFaultRollback; the guest runs on
        """
        disks = operation.DiskOperation(
            self._local, context, instance, block_device_info)
        try:
            disks.take_up_running()
            disks.move_to_pools(guest_is_off=False)
        except (exception.InvalidDiskMetadata, exception.DiskNotFinished,
                exception.DiskBeingCopied,
                exception.DiskTransitionFailed) as error:
            raise exception.InstanceFaultRollback(error)
        return source.prepare(
            state.ThisHost(self._local.host, self._local.uri,
                           self._local.get_address(),
                           self._local.job_tracker),
            context, instance, block_device_info)

    def arrive(self, context, instance,
               block_device_info) -> operation.DiskOperation:
        """On the destination: take over the pool disks that have come.

        :returns: a DiskOperation, see :meth:`open`
        :raises: exception.StorageTransferMismatch and others
        """
        disks = operation.DiskOperation(
            self._local, context, instance, block_device_info)
        disks.accept()
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
        if self._has_pools:
            source.confirm(context, self._connection(), instance)

    # Live migration

    def check_live_migration(self, context, instance,
                             block_device_info) -> None:
        """On the source: refuse pool disks, and have all disks on record.

        :raises: exception.MigrationPreCheckError,
            exception.InvalidDiskMetadata, exception.DiskNotFinished
        """
        disks = operation.DiskOperation(
            self._local, context, instance, block_device_info)
        self._refuse_live_migration(instance, disks)
        disks.take_up_running()

    def _refuse_live_migration(self, instance, disks):
        # They would be left out of what is copied, and the guest would go on
        # with empty ones. What the guest runs with and what is on record
        # counts, and not what is configured. The two differ after a cold
        # migration that was refused when the legacy disks had been linked
        # into the pool.
        config = self._local.get_guest_config(instance)
        if config is None:
            return  # nothing that could migrate
        names = ['%s (%s/%s)' % (disk.target_dev, disk.source_pool,
                                 disk.source_volume)
                 for disk in config.devices if disk.root_name == 'disk' and
                 disk.source_type == 'volume']
        names = names or [
            '%s/%s' % (record.pool, record.volume)
            for _name, record in disks.records.items()
            if record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE]
        if names:
            raise exception.MigrationPreCheckError(reason=_(
                'Instance %(uuid)s can not be live migrated, because it has '
                'disks in storage pools of libvirt: %(disks)s. Migrate it '
                'cold instead.') % {
                    'uuid': instance.uuid, 'disks': ', '.join(names)})

    def live_migrated(self, context, instance, block_device_info) -> None:
        """On the destination: the disks are this host's now."""
        records = lifecycle.of_instance(instance, block_device_info)
        lifecycle.moved(records)
        records.save(context)

    # Deleting

    def delete(self, instance, block_device_info=None) -> bool:
        """Delete an instance's pool disks on this host.

        :param block_device_info: holds the records, which say what stays
            while a resize is reverted
        :returns: False if something is left and should be tried again
        """
        if not self._has_pools:
            return True
        records = lifecycle.of_instance(instance, block_device_info)
        keep: ty.Collection = ()
        if instance.task_state == task_states.RESIZE_REVERTING:
            keep = source.kept(records)
        return ownership.delete_volumes(
            self._connection(), instance, keep=keep, disks=records)

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

    def sweep(self, context) -> None:
        """Delete what is certainly left over of instances that are gone."""
        if not self._has_pools:
            return
        own = set(objects.InstanceList.get_uuids_by_host(context, CONF.host))
        try:
            orphans.sweep(context, self._connection(), own)
        except exception.StoragePoolError as e:
            LOG.warning('Volumes that are left over are not looked for: %s', e)

    def delete_of_deleted(self, instance) -> bool:
        """Delete the pool disks of an instance if it is gone.

        Nobody else does that then. As long as it is there, its disks may
        outlive its directory.

        :returns: False if something is left and should be tried again
        """
        if 'deleted' in instance and instance.deleted:
            return self.delete(instance)
        return True

    def forget(self, context, instance, block_device_info) -> None:
        """Take destroyed disks off the record."""
        lifecycle.forget(
            context, lifecycle.of_instance(instance, block_device_info))

    # Shared storage

    def are_here(self, instance) -> bool:
        """Whether an instance has pool disks here, whoever has made them."""
        if not self._has_pools:
            return False
        records = metadata.InstanceDisks.load(
            nova_context.get_admin_context(), instance)
        return ownership.has_volumes(
            self._connection(), instance.uuid,
            undo.old_copies(instance, records))

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
        return self._has_pools and sharing.find_probes(
            self._connection(), data.get('volumes'))

    def remove_probes(self, data: dict) -> None:
        """Remove what make_probes() has made on this host."""
        if data.get('volumes'):
            sharing.remove_probes(self._connection(), data['volumes'])
