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

import re
import textwrap
import typing as ty

from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_versionedobjects import base as ovo_base
from oslo_versionedobjects import exception as ovo_exc

import nova.conf
from nova import exception
from nova import objects
from nova.objects import base
from nova.objects import fields
from nova.virt.libvirt.storage.records import old_keys

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

ROOT = 'disk'
SWAP = 'disk.swap'

# The backends whose disks are files of the instance directory.
FILE_BACKENDS = (fields.LibvirtDiskBackend.FLAT,
                 fields.LibvirtDiskBackend.QCOW2)

# Those whose disks are volumes of storage pools.
POOL_BACKENDS = (fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
                 fields.LibvirtDiskBackend.LIBVIRT_STORAGE_RBD)

_NAME = re.compile('[A-Za-z0-9._-]+')

# A record with a previous one and a dozen disks without a mapping takes less
# than 8 KiB; the column holds 64 KiB on MySQL.
MAX_LENGTH = 32768


# Their own namespace: no objects of the RPC API, whatever imports them.
@ovo_base.VersionedObjectRegistry.register
class LibvirtDiskExpected(base.NovaObject):
    """What a copy must be found to be before it is the disk.

    :ivar length: bytes of the volume's file
    :ivar checksum: of its content, under key
    :ivar key: of the checksum
    :ivar address: under which the libvirt is reached that has the original
    """
    # Version 1.0: Initial version
    VERSION = '1.0'

    OBJ_PROJECT_NAMESPACE = 'nova.virt.libvirt'

    fields = {
        'length': fields.NonNegativeIntegerField(),
        'checksum': fields.IntegerField(),
        'key': fields.IntegerField(),
        'address': fields.StringField(nullable=True),
    }


@ovo_base.VersionedObjectRegistry.register
class LibvirtLeftoverVolume(base.NovaObject):
    """A volume that its host is to delete at its next chance."""
    # Version 1.0: Initial version
    VERSION = '1.0'

    OBJ_PROJECT_NAMESPACE = 'nova.virt.libvirt'

    fields = {
        'host': fields.StringField(),
        'pool': fields.StringField(),
        'volume': fields.StringField(),
    }


@ovo_base.VersionedObjectRegistry.register
class LibvirtDiskMetadata(base.NovaObject):
    """How one local disk is laid out.

    :ivar backend: the image backend that the disk is on
    :ivar format: the format of the disk's content, as the driver wrote it
    :ivar size: virtual size in bytes
    :ivar state: ``building`` until the last byte is written; of a previous,
        ``replaced`` by an evacuation which is not over
    :ivar host: the compute service whose disk it is
    :ivar pool: the storage pool's name; unset for path-based backends
    :ivar volume: the volume's name there
    :ivar previous: the copy which is kept until a resize is confirmed or
        reverted; ``replaced``, the disk of the host that is left until an
        evacuation is over
    :ivar next: where the disk is going while its guest runs; it becomes the
        record once the guest runs there. It is ``building`` where that is a
        copy, ``ready`` where both hosts see one and the same volume
    :ivar expected: what the disk's copy must be; None once it was found to
        be that
    :ivar migration_id: of the Migration that has made previous what it is;
        None where a move by other means did
    :ivar unmapped: only in the root disk's mapping: by name, the records of
        disks for which there is no mapping
    :ivar extras: only there: by name, the records of what belongs to a move
        and is no disk of the instance
    :ivar leftovers: only there: volumes that are to be deleted yet
    """
    # Version 1.0: Initial version
    # Version 1.1: Added expected, migration_id, extras and leftovers
    # Version 1.2: Added next; later libvirt-storage-rbd as a backend, and
    #              replaced as a state: who doesn't know them refuses the
    #              records of such disks alone
    VERSION = '1.2'

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
        'next': fields.ObjectField('LibvirtDiskMetadata', nullable=True),
        'expected': fields.ObjectField('LibvirtDiskExpected', nullable=True),
        'migration_id': fields.IntegerField(nullable=True),
        'unmapped': fields.DictOfLibvirtDiskMetadataField(nullable=True),
        'extras': fields.DictOfLibvirtDiskMetadataField(nullable=True),
        'leftovers': fields.ListOfObjectsField('LibvirtLeftoverVolume',
                                               nullable=True),
    }

    # What only the root disk's mapping holds.
    OF_ROOT = ('unmapped', 'extras', 'leftovers')

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ('pool', 'volume', 'previous', 'next', 'expected',
                     'migration_id', *self.OF_ROOT):
            if not self.obj_attr_is_set(name):
                setattr(self, name, None)

    @property
    def is_building(self) -> bool:
        return self.state == fields.LibvirtDiskState.BUILDING

    @property
    def is_replaced(self) -> bool:
        """Whether this is a previous of what an evacuation has brought."""
        return self.state == fields.LibvirtDiskState.REPLACED

    @property
    def is_in_pool(self) -> bool:
        """Whether the disk is a volume of a storage pool."""
        return self.backend in POOL_BACKENDS

    @property
    def is_on_ceph(self) -> bool:
        """Whether that volume is one and the same on all hosts."""
        return self.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE_RBD

    @property
    def is_everywhere(self) -> bool:
        """Whether all hosts see the disk, as a volume of a pool or not."""
        return (self.is_on_ceph or
                self.backend == fields.LibvirtDiskBackend.RBD)

    @property
    def came_into_ceph(self) -> bool:
        """Whether that was made for a move, beside its original.

        A disk that stays in its Ceph pool keeps its name, and no copy has that
        of its original.
        """
        return (self.is_on_ceph and self.previous is not None and
                # That of images_type rbd was taken over where it was.
                self.previous.backend != fields.LibvirtDiskBackend.RBD and
                not (self.previous.is_on_ceph and
                     self.previous.volume == self.volume))

    @property
    def has_original(self) -> bool:
        """Whether its previous is a volume of its own.

        That of an image which stays in its Ceph pool is the image itself.
        """
        return (self.previous is not None and self.previous.is_in_pool and (
            not self.is_on_ceph or self.came_into_ceph))

    @property
    def is_where_it_was(self) -> bool:
        """Whether its previous is that very volume, which two hosts see."""
        return self.previous is not None and (
            (self.pool, self.volume) ==
            (self.previous.pool, self.previous.volume))

    @property
    def kept_copy(self) -> 'LibvirtDiskMetadata | None':
        """Its previous, if a move that was never confirmed has kept a copy."""
        # A copy has a name of its own in a pool that both hosts see.
        is_copy = self.migration_id is not None or not self.is_where_it_was
        return self.previous if self.has_original and is_copy else None

    def replaced(self) -> 'ty.Iterator[LibvirtDiskMetadata]':
        """What an evacuation that is over has done away with.

        The disk of the host that was left, and a copy which was kept there;
        neither if both may be the disk, since all have one name.
        """
        before = self.previous
        if not self.is_where_it_was:
            yield before
        if before.kept_copy is not None and not (
                self.is_where_it_was and before.is_where_it_was):
            yield before.kept_copy

    def holds_no_disk(self) -> bool:
        """Whether this is only the place of what has no mapping."""
        return self.backend is None

    def of_root(self) -> dict[str, ty.Any]:
        """What is here for want of a mapping of its own."""
        return {name: getattr(self, name) for name in self.OF_ROOT
                if getattr(self, name)}

    def holds_more(self) -> bool:
        """Whether this says more than where a disk is and what it is."""
        return any(getattr(self, name) is not None for name in (
            'previous', 'next', 'expected', 'migration_id', *self.OF_ROOT))

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
        if not given and not self.of_root():
            yield 'it is empty'
        if (self.pool is None) != (self.volume is None):
            yield 'it has a pool without a volume, or the reverse'
        if self.is_in_pool and self.volume is None:
            yield 'it names no volume'
        nested = [*(self.unmapped or {}).values(),
                  *(self.extras or {}).values()]
        nested += [record for record in (self.previous, self.next)
                   if record is not None]
        if self.next is not None and self.next.holds_more():
            yield 'its next record holds others'
        for part in (self.expected, *(self.leftovers or ())):
            yield from _unset(part)
        for record in nested:
            if record.of_root():
                yield 'disks without a mapping are nested'
            elif record.holds_no_disk():
                yield 'a nested record is empty'
            else:
                yield from record.faults()

    def volumes(self) -> ty.Iterator[str]:
        """Names of the volumes that this is, was, or is going to be.

        Whatever its backend is: who wrote it may have made that up.
        """
        if self.volume is not None:
            yield self.volume
        for record in (self.previous, self.next):
            if record is not None:
                yield from record.volumes()


def is_named_after(volume: str, instance_uuid: str) -> bool:
    """Whether a volume's name says that it is an instance's.

    A base image that came along with the instance has its UUID at the end.
    What names of Nova don't have may mean something to Ceph, or to qemu-img.
    """
    return _NAME.fullmatch(volume) is not None and (
        volume.startswith('%s_' % instance_uuid) or
            volume.endswith('.%s' % instance_uuid))


def _unset(part):
    """What makes a part of a record unusable."""
    if part is not None:
        for name in part.fields:
            if not part.obj_attr_is_set(name):
                yield 'its %s has no %s' % (part.obj_name(), name)


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
    if isinstance(value, list):
        return [_without_changes(v) for v in value]
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
            RecursionError, NotImplementedError) as error:
        # The last is for a field that a nested record has not got.
        refuse('%s: %s' % (type(error).__name__, error))
    _renew(record)
    record.obj_reset_changes(recursive=True)
    return record


def _renew(record):
    """Let what an older version has written be of this one."""
    # What was read keeps its version in an attribute of its own.
    record.VERSION = LibvirtDiskMetadata.VERSION
    nested = [record.previous, record.next,
              *(record.unmapped or {}).values(),
              *(record.extras or {}).values()]
    for other in nested:
        if other is not None:
            _renew(other)


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
        self._extras: dict[str, LibvirtDiskMetadata] = {}
        self._leftovers: list[tuple[str, str, str]] = []
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
        """Note a disk's record; :meth:`save` makes it last.

        What was replaced is ready as the disk.
        """
        self._load()
        if record.is_replaced:
            record.state = fields.LibvirtDiskState.READY
        self._records[name] = record
        self._changed = True

    def clear(self, name: str | None = None) -> None:
        """Forget a disk, or all, because it is destroyed.

        Works on broken records as well. What is to be deleted yet stays.
        """
        if name is None:
            try:
                self._load()
            except exception.InvalidDiskMetadata as error:
                LOG.warning('%s', error, instance=self.instance)
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

    @property
    def extras(self) -> dict[str, LibvirtDiskMetadata]:
        """By name, the records of what belongs to a move and is no disk.

        A copy; :meth:`set_extra` changes it.
        """
        self._load()
        return dict(self._extras)

    def set_extra(self, name: str,
                  record: LibvirtDiskMetadata | None) -> None:
        """Note what belongs to a move; :meth:`save` makes it last.

        :param record: None to forget it
        """
        self._load()
        if record is not None:
            self._extras[name] = record
        elif self._extras.pop(name, None) is None:
            return
        self._changed = True

    @property
    def leftovers(self) -> list[tuple[str, str, str]]:
        """Host, pool and volume of what is to be deleted yet."""
        self._load()
        return list(self._leftovers)

    @leftovers.setter
    def leftovers(self, places: ty.Iterable[tuple[str, str, str]]) -> None:
        self._load()
        wanted = sorted(set(places))
        if wanted != self._leftovers:
            self._leftovers = wanted
            self._changed = True

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
        elif unmapped or self._extras or self._leftovers:
            LOG.warning('No root disk mapping to hold the records of %s',
                        ', '.join(sorted([*unmapped, *self._extras,
                                          *map(str, self._leftovers)])),
                        instance=self.instance)
        for name, bdm in mappings.items():
            record = self._records.get(name) if (
                name in self._mappings) else None
            if bdm is self._root:
                record = self._as_root(record, unmapped)
                self._shorten(record, bdm.uuid)
            text = None if record is None else dumps(record, bdm.uuid)
            if bdm.driver_info != text:
                bdm.driver_info = text
        objects.BlockDeviceMappingList(
            context, objects=list(mappings.values())).save_driver_info()
        self._changed = False
        old_keys.drop(self.instance)

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

    def _shorten(self, record, mapping):
        """Leave out what is to be deleted yet, if there is too much of it.

        A record that is too long nobody would read any more.

        :param record: of the root's mapping, changed in place; may be None
        """
        dropped = []
        while (record is not None and record.leftovers and
               len(dumps(record, mapping)) > MAX_LENGTH):
            dropped.append(record.leftovers[-1])
            record.leftovers = record.leftovers[:-1]
        for left in dropped:
            place = (left.host, left.pool, left.volume)
            LOG.error('Volume %(volume)s, which is left over in storage pool '
                      '%(pool)s of host %(host)s, is not deleted before the '
                      'instance is: its record has no room for more',
                      {'volume': place[2], 'pool': place[1],
                       'host': place[0]}, instance=self.instance)
            self._leftovers.remove(place)

    def _as_root(self, record, unmapped):
        """Return the root's record with what is there for others."""
        if record is None and not (
                unmapped or self._extras or self._leftovers):
            return None
        if record is None:
            record = LibvirtDiskMetadata(
                backend=None, format=None, size=None, state=None, host=None)
        else:
            record = record.obj_clone()
        record.unmapped = unmapped or None
        record.extras = self._extras or None
        record.leftovers = [
            LibvirtLeftoverVolume(host=host, pool=pool, volume=volume)
            for host, pool, volume in self._leftovers] or None
        return record

    def _load(self):
        """Read all of the records at once, or none."""
        if self._loaded:
            return
        records, extras, leftovers = {}, {}, set()
        places = dict(self._mappings)
        if self._root is not None:
            places.setdefault(ROOT, self._root)
        for name, bdm in places.items():
            if not bdm.driver_info:
                continue
            record = loads(bdm.driver_info, self.instance.uuid, bdm.uuid)
            if bdm is self._root:
                records.update(record.unmapped or {})
                extras = dict(record.extras or {})
                leftovers = {(left.host, left.pool, left.volume)
                             for left in record.leftovers or ()}
                for part in record.OF_ROOT:
                    setattr(record, part, None)
            elif record.of_root():
                raise exception.InvalidDiskMetadata(
                    instance_uuid=self.instance.uuid, mapping=bdm.uuid,
                    reason='only the root disk holds others')
            if not record.holds_no_disk():
                records[name] = record
        if old_keys.take_in(
                (self.instance, records, extras, leftovers),
                old_keys.Classes(LibvirtDiskMetadata, LibvirtDiskExpected)):
            self._changed = True
        self._check_names([
            *(name for record in (*records.values(), *extras.values())
              for name in record.volumes()),
            *(name for _host, _pool, name in leftovers)])
        for record in records.values():
            if self._has_replaced(record):
                leftovers.update((known.host, known.pool, known.volume)
                                 for known in record.replaced())
                record.previous = None
                # Others may save what they have read long ago.
                self._changed |= record.host == CONF.host
        self._records, self._loaded = records, True
        self._extras, self._leftovers = extras, sorted(leftovers)

    def _has_replaced(self, record):
        """Whether an evacuation is over that has brought a disk."""
        return (record.previous is not None and record.previous.is_replaced and
                'host' in self.instance and self.instance.host == record.host)

    def _check_names(self, volumes):
        """Refuse to use or to delete what is another instance's.

        Another host has written the records, and may have been broken into.
        """
        for name in volumes:
            if not is_named_after(name, self.instance.uuid):
                raise exception.InvalidDiskMetadata(
                    instance_uuid=self.instance.uuid,
                    mapping=self._root.uuid if self._root else None,
                    reason='volume %s is none of the instance' %
                    textwrap.shorten(name, 100, placeholder=' ...'))
