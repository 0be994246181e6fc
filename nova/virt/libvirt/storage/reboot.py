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

"""The disks of an instance which stays, or is again, where it was.

A hard reboot is what an operator does to an instance with which something is
wrong, so it finishes or undoes whatever an earlier operation has left of the
disks. Before it destroys the guest it finds out whether it can.
"""

import os
import shutil
import typing as ty

from oslo_log import log as logging

from nova.compute import vm_states
import nova.conf
from nova import exception
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.move import guest_files
from nova.virt.libvirt.storage.move import source
from nova.virt.libvirt.storage import operation
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import lifecycle
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage.records import unrecorded
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


class Return(operation.DiskOperation):
    """The disks of an instance whose move to another host is given up.

    :ivar guest_runs: whether it was never powered off: nothing but the records
        was to be undone then. After take_back().
    """
    guest_runs = False

    def take_back(self, migration) -> None:
        """Make the disks what they were before a migration.

        The instance's directory has its name again.

        :param migration: the Migration which is given up
        :raises: exception.InvalidDiskMetadata, exception.DiskNotFinished,
            exception.StoragePoolError
        """
        self.start_pools()
        self._abandon(migration)
        try:
            self.guest_runs = self._local.host.get_guest(
                self._instance).is_active()
        except exception.InstanceNotFound:
            pass
        if self.guest_runs:
            # It could not be powered off, or this service was restarted while
            # it sent disks ahead.
            LOG.info('The guest has been running all the time',
                     instance=self._instance)
            return
        if self.records.has_mappings:
            self._went_back()
            self.take_up(self._disk_info())
        self.finish_earlier_move()

    def _went_back(self):
        """Have the disks on record as they were before the move."""
        lifecycle.went_back(self.records)
        self._note_new_swap()
        if leftovers.on_host(self.records, CONF.host):
            # Noted before they are deleted: this compute may be killed.
            self.records.save(self._context)
            leftovers.delete(self._local.get_connection(), self.records)
            self.records.save(self._context)

    def _note_new_swap(self):
        """Note the swap disk which the flavor that is given up has brought.

        A resize on this very host has made it, and the compute manager has
        deleted its mapping since, with its record.
        """
        if ((CONF.libvirt.images_type == 'libvirt-storage' or
                any(record.is_in_pool
                    for _name, record in self.records.items())) and
                not lifecycle.size_of(self._instance, metadata.SWAP,
                                      self._block_device_info)):
            leftovers.note_swap(self._local.get_connection(), self.records)

    def bring_directory_back(self) -> None:
        """Give the instance's directory its name again, if it has lost it."""
        directory = libvirt_utils.get_instance_path(self._instance)
        if os.path.exists(directory + '_resize'):
            if os.path.exists(directory):
                shutil.rmtree(directory)
            os.rename(directory + '_resize', directory)

    def _abandon(self, migration):
        source.abandon(self._context, self._local.host, self._instance,
                       migration, self.records)
        guest_files.restore_nvram(
            self._instance, libvirt_utils.get_instance_path(self._instance))


class Reboot(Return):
    """The disks of an instance through a hard reboot."""

    def __init__(self, local, context, instance, block_device_info):
        super().__init__(local, context, instance, block_device_info)
        self._migration: ty.Any = None

    def check(self) -> None:
        """Find what would keep the guest from starting, while it still runs.

        :raises: exception.InvalidDiskMetadata, exception.DiskNotFinished,
            exception.DiskBeingCopied, exception.DiskGivenBack,
            exception.StoragePoolError
        """
        super().check()
        self._migration = source.unfinished(
            self._context, self._instance, self.records)
        self.settle_evacuation()
        self._check_finished()
        if self._migration is None and (
                source.is_running(self._instance) or any(
                    record.host != CONF.host
                    for _name, record in self.records.items())):
            # Its copy runs, or the records are another host's to finish.
            lifecycle.refuse_half_copied(self.records)
            leftovers.refuse_given_back(
                self._local.get_connection(), self.records)
        self.start_pools()

    def _check_finished(self):
        lost, _unwanted = self._lost()
        lost += self._unknown()
        if lost:
            raise exception.DiskNotFinished(
                instance_uuid=self._instance.uuid, disks=', '.join(lost))

    def _unknown(self):
        """Find disks which a rebuild has destroyed, and not made again.

        What has their names in a pool is what it couldn't delete; and nothing
        tells its format.

        :returns: names of disks
        """
        left = leftovers.on_host(self.records, CONF.host)
        if not left or CONF.libvirt.images_type != 'libvirt-storage':
            return []
        images = {name: self.image(name) for name, _mapping in
                  lifecycle.local_disks(self._disk_info()['mapping'])
                  if name not in lifecycle.REMADE and
                  self.records.get(name) is None}
        guest_config = self._local.get_guest_config(self._instance)
        return [name for name, image in images.items()
                if (image.pool_name, image.volume_name) in left and
                unrecorded.made_before_records(
                    self._instance, name, guest_config,
                    self._configured()) is None]

    def _lost(self):
        """What was never finished, and isn't made anew.

        :returns: names of disks that the instance has, and of those that it
            has no more, as a resize to them has failed
        """
        # One with a previous one has come from there, and may be whole.
        names = [name for name in self.records.building()
                 if self.records.get(name).previous is None and
                 name not in lifecycle.REMADE and
                 not name.endswith('.rescue')]
        wanted = self._disk_info()['mapping'] if names else ()
        brought = lifecycle.brought_by_resize(self._instance)
        return ([name for name in names
                 if name in wanted and name not in brought],
                [name for name in names if name not in wanted])

    def bring_in_order(self, disk_info: dict, guest_config, driver) -> None:
        """Finish or undo what earlier operations have left; the guest is off.

        It is to be created by :meth:`creator` then.

        :param disk_info: gets the records attached
        :param guest_config: the LibvirtConfigGuest that the guest ran with
        :param driver: see :meth:`DiskOperation.make_unfinished`
        :raises: exception.StorageTransferMismatch and others
        """
        if self._migration is not None:
            self.bring_directory_back()
            self._abandon(self._migration)
            guest_files.restore_tpm(self._instance)
            self._went_back()
        if destination.is_due(self._instance, self.records):
            # They have come, and finish_migration has failed.
            self.accept()
        _lost, unwanted = self._lost()
        lifecycle.forget_unfinished(self.records, self.image, unwanted)
        lifecycle.adopt(self.records)
        self._end_rescue()
        self._begin_brought(disk_info, guest_config)
        self.take_up(disk_info, guest_config, remade=(
            lifecycle.REMADE | lifecycle.brought_by_resize(self._instance)))
        self.make_unfinished(driver)
        # From here on the source's copies are no longer kept.
        self.look_again()
        root = self.records.get('disk')
        was_moved = root is not None and root.previous is not None
        if was_moved and root.host == CONF.host:
            lifecycle.note_grown(self.records, self.image)
        source.settle(self._context, self._instance, self.records)
        if was_moved:
            self._remove_snapshot(root)
        self.move_to_pools(disk_info)

    def _begin_brought(self, disk_info, guest_config):
        """Record those of them that the resize has failed to begin."""
        for name in lifecycle.brought_by_resize(self._instance):
            # An older compute, on this host then, may have made it.
            if (name in disk_info['mapping'] and
                    self.records.get(name) is None and
                    unrecorded.made_before_records(
                        self._instance, name, guest_config,
                        self._configured()) is None):
                image = self.image(name, {
                    **disk_info['mapping'][name],
                    'taken': leftovers.names(self.records)})
                record = image.metadata(lifecycle.size_of(
                    self._instance, name, self._block_device_info))
                if record.is_in_pool:
                    self.records.set(name, record)

    def _remove_snapshot(self, root):
        """Remove what a resize went back to, had it been reverted."""
        if not root.is_everywhere or (
                self._instance.vm_state == vm_states.RESIZED):
            return
        try:
            self.image('disk').remove_snap(
                libvirt_utils.RESIZE_SNAPSHOT_NAME, ignore_errors=True)
        except exception.NovaException as e:
            LOG.warning('Snapshot %(name)s of the root disk is left: '
                        '%(error)s',
                        {'name': libvirt_utils.RESIZE_SNAPSHOT_NAME,
                         'error': e}, instance=self._instance)

    def _end_rescue(self):
        """Delete the pool disks of a rescue that has failed."""
        if any(name.endswith('.rescue') and record.is_in_pool
               for name, record in self.records.items()):
            ownership.delete_volumes(
                self._local.get_connection(), self._instance, rescue=True,
                disks=self.records)
        lifecycle.unrescued(self.records)

    @property
    def brought_tpm(self) -> bool:
        """Whether the state of a TPM has come and is yet to be taken over."""
        return guest_files.has_tpm(self._instance) and bool(
            self._instance.old_flavor)
