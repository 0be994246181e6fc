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
"""Disks that were made, or have come, where no records are kept."""

import os

from oslo_log import log as logging
from oslo_serialization import jsonutils

import nova.conf
from nova.objects import fields
from nova.virt.libvirt.storage import dmcrypt
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

FILE_FORMATS = (fields.LibvirtDiskFormat.RAW, fields.LibvirtDiskFormat.QCOW2)

# What libvirt calls the type of a disk's source -> our backends.
SOURCE_BACKENDS = {
    'block': fields.LibvirtDiskBackend.LVM,
    'network': fields.LibvirtDiskBackend.RBD,
    'volume': fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
}


def raw_file(size: int = 0) -> 'metadata.LibvirtDiskMetadata':
    """The record of a file that is raw by definition: a kernel, a ramdisk."""
    return metadata.LibvirtDiskMetadata(
        backend=fields.LibvirtDiskBackend.FLAT,
        format=fields.LibvirtDiskFormat.RAW, size=size,
        state=fields.LibvirtDiskState.READY, host=CONF.host)


def made_before_records(
    instance, name: str, guest_config, configured: str,
) -> 'metadata.LibvirtDiskMetadata | None':
    """The record of a disk which was made when there were none.

    The guest's definition says what it last ran with; then the disk.info
    file; then the configuration. Where they disagree the guest's definition
    is right.

    :param guest_config: the guest's LibvirtConfigGuest, None without one
    :param configured: the image backend that this host would use now
    :returns: a record in state ``ready``, its size 0; None if there is no
        sign of such a disk
    """
    path = os.path.join(libvirt_utils.get_instance_path(instance), name)
    told = in_guest(guest_config, instance, name)
    is_file = os.path.exists(path)
    if told is None and not is_file:
        return None
    record = raw_file()
    if name.startswith('disk.config'):
        if told is not None and told.source_type != 'file':
            record.backend = SOURCE_BACKENDS[told.source_type]
            _place(record, told)
            if told.source_type == 'volume' and told.driver_format:
                record.format = told.driver_format
        return record
    noted = _in_disk_info(path)
    if told is not None and told.driver_format:
        record.format = told.driver_format
        if noted and noted != told.driver_format:
            LOG.warning('Disk %(name)s ran as %(told)s, and disk.info says '
                        '%(noted)s; it stays %(told)s',
                        {'name': name, 'told': told.driver_format,
                         'noted': noted}, instance=instance)
    elif noted:
        record.format = noted
    elif configured == fields.LibvirtDiskBackend.QCOW2:
        record.format = fields.LibvirtDiskFormat.QCOW2
    if told is not None and told.source_type in SOURCE_BACKENDS:
        record.backend = SOURCE_BACKENDS[told.source_type]
        _place(record, told)
    elif configured == fields.LibvirtDiskBackend.PLOOP:
        record.backend = fields.LibvirtDiskBackend.PLOOP
    elif (record.format == fields.LibvirtDiskFormat.QCOW2 and
            configured != fields.LibvirtDiskBackend.FLAT):
        record.backend = fields.LibvirtDiskBackend.QCOW2
    return record


def _place(record, told):
    if record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE:
        record.pool, record.volume = told.source_pool, told.source_volume


def in_guest(guest_config, instance, name):
    """Look for a disk in a guest's definition.

    :param guest_config: the guest's LibvirtConfigGuest, None without one
    :param name: of the disk
    :returns: its LibvirtConfigGuestDisk, None if there is none
    """
    by_uuid = '%s_%s' % (instance.uuid, name)
    for device in getattr(guest_config, 'devices', ()):
        if getattr(device, 'root_name', None) != 'disk':
            continue
        place = (getattr(device, 'source_volume', None) or
                 device.source_path or device.source_name or '')
        expected = name if device.source_type == 'file' else by_uuid
        found = os.path.basename(place)
        # Where the name of a volume was taken, it has got a number.
        is_numbered = device.source_type in ('volume', 'network') and (
            ownership.is_named_after(found, instance.uuid, name))
        if instance.uuid in place and (is_numbered or found in (
                expected, dmcrypt.volume_name(expected))):
            return device
    return None


def _in_disk_info(path):
    """The format that the instance's disk.info file has for a path."""
    try:
        with open(os.path.join(os.path.dirname(path), 'disk.info'),
                  'rb') as f:
            formats = jsonutils.load(f)
        if path in formats:
            return formats[path]
        # instances_path may have been another one, or spelled otherwise, or
        # be so on the host that has written this.
        ending = os.sep + os.path.join(*path.split(os.sep)[-2:])
        return next((image_format for place, image_format in formats.items()
                     if place.endswith(ending)), None)
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def take_files_up(disks, guest_config) -> None:
    """Believe what an older compute has done, which keeps no records.

    It has made files of disks, and the records still name what these have
    been on a host which has them no more.

    :param guest_config: the guest's LibvirtConfigGuest, as it is here; None
        without one
    """
    for name, record in disks.items():
        told = in_guest(guest_config, disks.instance, name)
        if (told is not None and told.source_type == 'file' and
                record.backend not in metadata.FILE_BACKENDS and
                told.driver_format in FILE_FORMATS):
            replace_by_file(disks, name, record, told.driver_format,
                            record.size)


def replace_by_file(disks, name, record, image_format, size):
    """Have a disk on record as the file that an older compute has made of it.

    :param record: what it was, None if that isn't on record
    :param image_format: of the file
    :param size: its virtual size in bytes, None if that isn't known
    """
    if (record is not None and
            record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE):
        LOG.warning('Disk %(name)s is a file, which an older compute has '
                    'made, and no longer volume %(volume)s in storage pool '
                    '%(pool)s of host %(host)s',
                    {'name': name, 'volume': record.volume,
                     'pool': record.pool, 'host': record.host},
                    instance=disks.instance)
        leftovers.note_disk(disks, record)
    record = raw_file(size or 0)
    if image_format == fields.LibvirtDiskFormat.QCOW2:
        record.format = fields.LibvirtDiskFormat.QCOW2
        record.backend = fields.LibvirtDiskBackend.QCOW2
    disks.set(name, record)


def is_replaced(disks, name, record, info):
    """Whether a compute without records has made a disk what it is now.

    A host with pools tells of none of its volumes.

    :param info: type and path of the disk as the other host had it
    """
    if record.backend in metadata.FILE_BACKENDS:
        return record.format != info['type']
    return os.path.exists(os.path.join(
        libvirt_utils.get_instance_path(disks.instance), name))
