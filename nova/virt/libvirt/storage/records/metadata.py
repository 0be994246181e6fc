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
"""The record of each local disk's layout; knows nothing of libvirt.

A disk's record is kept in the ``driver_info`` of its block device mapping.
It is the only source of the disk's format and backend: what can't be read
here is an error, and never a reason to look into the disk, whose first bytes
a guest may have written.
"""

import textwrap
import typing as ty

from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_versionedobjects import base as ovo_base
from oslo_versionedobjects import exception as ovo_exc

from nova import exception
from nova import objects
from nova.objects import base
from nova.objects import fields

LOG = logging.getLogger(__name__)

ROOT = 'disk'
SWAP = 'disk.swap'

# The backends whose disks are files of the instance directory.
FILE_BACKENDS = (fields.LibvirtDiskBackend.FLAT,
                 fields.LibvirtDiskBackend.QCOW2)

# A record with a previous one and a dozen disks without a mapping takes less
# than 8 KiB; the column holds 64 KiB on MySQL.
MAX_LENGTH = 32768


# Its own namespace: not an object of the RPC API, whatever imports it.
@ovo_base.VersionedObjectRegistry.register
class LibvirtDiskMetadata(base.NovaObject):
    """How one local disk is laid out.

    :ivar backend: the image backend that the disk is on
    :ivar format: the format of the disk's content, as the driver wrote it
    :ivar size: virtual size in bytes
    :ivar state: ``building`` until the last byte is written
    :ivar host: the compute service whose disk it is
    :ivar pool: the storage pool's name; unset for path-based backends
    :ivar volume: the volume's name there
    :ivar previous: the copy which is kept until a resize is confirmed or
        reverted
    :ivar unmapped: only in the root disk's mapping: by name, the records of
        disks for which there is no mapping
    """
    # Version 1.0: Initial version
    VERSION = '1.0'

    OBJ_PROJECT_NAMESPACE = 'nova.virt.libvirt'

    fields = {
        # Those of a volume-backed server's root mapping are None: there is
        # no local disk, the mapping just holds the unmapped ones.
        'backend': fields.LibvirtDiskBackendField(nullable=True),
        'format': fields.LibvirtDiskFormatField(nullable=True),
        'size': fields.NonNegativeIntegerField(nullable=True),
        'state': fields.LibvirtDiskStateField(nullable=True),
        'host': fields.StringField(nullable=True),
        'pool': fields.StringField(nullable=True),
        'volume': fields.StringField(nullable=True),
        'previous': fields.ObjectField('LibvirtDiskMetadata', nullable=True),
        'unmapped': fields.DictOfLibvirtDiskMetadataField(nullable=True),
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ('pool', 'volume', 'previous', 'unmapped'):
            if not self.obj_attr_is_set(name):
                setattr(self, name, None)

    @property
    def is_building(self) -> bool:
        return self.state == fields.LibvirtDiskState.BUILDING

    def holds_no_disk(self) -> bool:
        """Whether this is only the place of the unmapped disks."""
        return self.backend is None

    def faults(self) -> ty.Iterator[str]:
        """What makes this record unusable."""
        required = ('backend', 'format', 'size', 'state', 'host')
        for name in self.fields:
            if not self.obj_attr_is_set(name):
                yield 'it has no %s' % name
                return
        given = [name for name in required if getattr(self, name) is not None]
        if given and len(given) != len(required):
            yield 'it has %s without %s' % (
                ', '.join(given), ', '.join(set(required) - set(given)))
        if not given and not self.unmapped:
            yield 'it is empty'
        if (self.pool is None) != (self.volume is None):
            yield 'it has a pool without a volume, or the reverse'
        if (self.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE and
                self.volume is None):
            yield 'it names no volume'
        nested = list((self.unmapped or {}).values())
        if self.previous is not None:
            nested.append(self.previous)
        for record in nested:
            if record.unmapped:
                yield 'disks without a mapping are nested'
            elif record.holds_no_disk():
                yield 'a nested record is empty'
            else:
                yield from record.faults()


def dumps(record: LibvirtDiskMetadata, mapping: str) -> str:
    """A record as it is stored.

    :param mapping: the UUID of the mapping that it is stored in
    """
    primitive = record.obj_to_primitive()
    primitive['mapping'] = mapping
    return jsonutils.dumps(_without_changes(primitive), sort_keys=True)


def _without_changes(value):
    """Leave out what objects note about unsaved fields."""
    if isinstance(value, dict):
        return {k: _without_changes(v) for k, v in value.items()
                if k != 'nova_object.changes'}
    return value


def loads(text: str, instance_uuid: str,
          mapping: str) -> LibvirtDiskMetadata:
    """Read a stored record.

    :param mapping: the UUID of the mapping that it was found in
    :returns: a whole record
    :raises: exception.InvalidDiskMetadata if there is anything in it that
        this version does not understand
    """
    def refuse(reason):
        # It may quote the record, which can be anything.
        raise exception.InvalidDiskMetadata(
            instance_uuid=instance_uuid, mapping=mapping,
            reason=textwrap.shorten(reason, 160, placeholder=' ...'))

    if len(text) > MAX_LENGTH:
        refuse('it has %d characters, more than %d' % (
            len(text), MAX_LENGTH))
    try:
        primitive = jsonutils.loads(text)
    except (ValueError, RecursionError):
        refuse('it is no JSON')
    if not isinstance(primitive, dict):
        refuse('it is no JSON object')
    if primitive.get('mapping') != mapping:
        refuse('it belongs to mapping %s' % primitive.get('mapping'))
    if primitive.get('nova_object.name') != LibvirtDiskMetadata.obj_name():
        refuse('it is no %s' % LibvirtDiskMetadata.obj_name())
    try:
        record = LibvirtDiskMetadata.obj_from_primitive(primitive)
        if not isinstance(record, LibvirtDiskMetadata):
            refuse('it is no %s' % LibvirtDiskMetadata.obj_name())
        for fault in record.faults():
            refuse(fault)
    except ovo_exc.IncompatibleObjectVersion as error:
        refuse('its version %s is unknown here, where %s is the newest' % (
            error.kwargs.get('objver'), error.kwargs.get('supported')))
    except ovo_exc.VersionedObjectsException as error:
        refuse(str(error))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError,
            RecursionError) as error:
        refuse('%s: %s' % (type(error).__name__, error))
    record.obj_reset_changes(recursive=True)
    return record


class InstanceDisks:
    """The records of all local disks of an instance, by disk name.

    :param instance: the instance
    :param mappings: disk name -> BlockDeviceMapping of its local disks
    :param root: the root disk's mapping, local or not; None only where an
        instance has none, and then disks without a mapping can't be recorded
    """

    def __init__(self, instance: 'objects.Instance',
                 mappings: dict[str, 'objects.BlockDeviceMapping'],
                 root: 'objects.BlockDeviceMapping | None'):
        self.instance = instance
        self._mappings = mappings
        self._root = root
        self._records: dict[str, LibvirtDiskMetadata] = {}
        self._loaded = False
        self._changed = False

    @property
    def has_mappings(self) -> bool:
        """Whether there is a place for records at all."""
        return self._root is not None or bool(self._mappings)

    @classmethod
    def from_bdms(
        cls, instance: 'objects.Instance',
        bdms: ty.Iterable['objects.BlockDeviceMapping'],
    ) -> 'InstanceDisks':
        """Take the records out of an instance's mappings.

        :param bdms: all mappings of the instance
        """
        mappings, root, ephemerals = {}, None, 0
        for bdm in bdms:
            if 'id' not in bdm or 'instance_uuid' not in bdm:
                continue  # not in the database, no place for a record
            if 'no_device' in bdm and bdm.no_device:
                continue
            if 'boot_index' in bdm and bdm.boot_index == 0:
                root = bdm
            if bdm.destination_type != fields.BlockDeviceDestinationType.LOCAL:
                continue
            if bdm.source_type == fields.BlockDeviceSourceType.IMAGE:
                if bdm is root:
                    mappings[ROOT] = bdm
            elif bdm.guest_format == 'swap':
                mappings[SWAP] = bdm
            else:
                mappings['disk.eph%d' % ephemerals] = bdm
                ephemerals += 1
        return cls(instance, mappings, root)

    @classmethod
    def from_block_device_info(
        cls, instance: 'objects.Instance', block_device_info: dict,
    ) -> 'InstanceDisks':
        """Take the records out of what the driver is called with.

        Takes no round trip to the database.

        :param block_device_info: as nova.virt.driver.get_block_device_info
            makes it
        """
        devices = [device for kind in (
            'image', 'ephemerals', 'block_device_mapping')
            for device in block_device_info.get(kind) or ()]
        if block_device_info.get('swap'):
            devices.append(block_device_info['swap'])
        return cls.from_bdms(instance, [
            device._bdm_obj for device in devices
            if hasattr(device, '_bdm_obj')])

    @classmethod
    def load(cls, context, instance: 'objects.Instance') -> 'InstanceDisks':
        """Read an instance's mappings, where a caller has been given none."""
        return cls.from_bdms(
            instance, objects.BlockDeviceMappingList.get_by_instance_uuid(
                context, instance.uuid))

    def get(self, name: str) -> LibvirtDiskMetadata | None:
        """The record of a disk.

        :param name: the disk's name, e.g. ``disk`` or ``disk.eph0``
        :returns: None if nothing is on record
        :raises: exception.InvalidDiskMetadata if any of the instance's
            records is broken
        """
        self._load()
        return self._records.get(name)

    def items(self) -> list[tuple[str, LibvirtDiskMetadata]]:
        """Name and record of all disks on record, sorted by name.

        :raises: exception.InvalidDiskMetadata
        """
        self._load()
        return sorted(self._records.items())

    def set(self, name: str, record: LibvirtDiskMetadata) -> None:
        """Note a disk's record; :meth:`save` makes it last."""
        self._load()
        self._records[name] = record
        self._changed = True

    def clear(self, name: str | None = None) -> None:
        """Forget a disk, or all, because it is destroyed.

        Works on broken records as well.
        """
        if name is None:
            self._records, self._loaded = {}, True
        else:
            self._load()
            self._records.pop(name, None)
        self._changed = True

    def mark(self, state: str,
             names: ty.Iterable[str] | None = None) -> list[str]:
        """Set the state of disks on record.

        :param names: None for all
        :returns: the names of those whose state was another one
        """
        self._load()
        wanted = self._records if names is None else set(names)
        marked = []
        for name, record in self._records.items():
            if name in wanted and record.state != state:
                record.state = state
                marked.append(name)
                self._changed = True
        return marked

    def building(self) -> list[str]:
        """Names of the disks that were begun and never finished."""
        return [name for name, record in self.items() if record.is_building]

    def save(self, context) -> None:
        """Save all records in one round trip; none if nothing changed.

        :raises: exception.BDMNotFound if a mapping is gone; nothing is saved
        """
        if not self._changed and not self._is_unsaved():
            return
        unmapped = {name: record for name, record in self._records.items()
                    if name not in self._mappings}
        mappings = dict(self._mappings)
        if self._root is not None:
            mappings.setdefault(ROOT, self._root)
        elif unmapped:
            LOG.warning('No root disk mapping to hold the records of %s',
                        ', '.join(sorted(unmapped)), instance=self.instance)
        for name, bdm in mappings.items():
            record = self._records.get(name) if (
                name in self._mappings) else None
            if bdm is self._root:
                record = self._with_unmapped(record, unmapped)
            text = None if record is None else dumps(record, bdm.uuid)
            if bdm.driver_info != text:
                bdm.driver_info = text
        objects.BlockDeviceMappingList(
            context, objects=list(mappings.values())).save_driver_info()
        self._changed = False

    def _is_unsaved(self):
        """Whether an earlier try to save these mappings has failed."""
        places = [*self._mappings.values(), self._root]
        if not any(bdm.driver_info and
                   'driver_info' in bdm.obj_what_changed()
                   for bdm in places if bdm is not None):
            return False
        try:
            self._load()
            return True
        except exception.InvalidDiskMetadata:
            # What is broken is none of ours.
            return False

    @staticmethod
    def _with_unmapped(record, unmapped):
        if record is None and not unmapped:
            return None
        if record is None:
            record = LibvirtDiskMetadata(
                backend=None, format=None, size=None, state=None, host=None)
        else:
            record = record.obj_clone()
        record.unmapped = unmapped or None
        return record

    def _load(self):
        """Read all of the records at once, or none."""
        if self._loaded:
            return
        records = {}
        places = dict(self._mappings)
        if self._root is not None:
            places.setdefault(ROOT, self._root)
        for name, bdm in places.items():
            if not bdm.driver_info:
                continue
            record = loads(bdm.driver_info, self.instance.uuid, bdm.uuid)
            if bdm is self._root:
                records.update(record.unmapped or {})
                record.unmapped = None
            elif record.unmapped:
                raise exception.InvalidDiskMetadata(
                    instance_uuid=self.instance.uuid, mapping=bdm.uuid,
                    reason='only the root disk holds others')
            if not record.holds_no_disk():
                records[name] = record
        self._records, self._loaded = records, True
