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
"""Whether what a source asks for is its to ask; nothing is done here.

What comes by RPC is believed as little as possible: the instance, the
migration and the records of the disks are read from the database, and what is
asked has to agree with them.
"""

import dataclasses
import re
import typing as ty

from oslo_log import log as logging
from oslo_utils import excutils
from oslo_utils import units

import nova.conf
from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import objects
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Of a migration whose disks may be checked and copied. "cancelling" is what an
# operator makes of "migrating", see move/cancel.py.
_UNDER_WAY = ('pre-migrating', 'migrating', 'cancelling')

# A file of qcow2 is longer than what the guest sees, and holds what the guest
# has discarded.
_LONGEST = 2
_LONGEST_MORE = units.Gi
# Places of a disk that were written to; the pump tells no more.
_MOST_CHANGED = 1024
# Volumes that are deleted at once; a server has a few disks.
_MOST_PLACES = 200


@dataclasses.dataclass(frozen=True)
class Request:
    """What a source asks for, as the database has it.

    :ivar context: an admin's
    :ivar instance: the Instance
    :ivar migration: the Migration
    :ivar what: what is to be done, e.g. ``create``
    :ivar arguments: as they came
    """
    context: ty.Any
    instance: ty.Any
    migration: ty.Any
    what: str
    arguments: dict[str, ty.Any]

    def __str__(self):
        return '%s for migration %s of server %s' % (
            self.what, self.migration.id, self.instance.uuid)

    def refused(self, reason: str) -> exception.StorageIntakeRefused:
        """Log a refusal, and return it to be raised."""
        LOG.warning('Refused for migration %(migration)s of host %(source)s: '
                    '%(what)s: %(reason)s', {
                        'migration': self.migration.id, 'what': self.what,
                        'source': self.migration.source_compute,
                        'reason': reason}, instance=self.instance)
        return exception.StorageIntakeRefused(
            host=CONF.host, what=self.what, reason=reason,
            instance_uuid=self.instance.uuid)

    def get(self, name: str, kind: type):
        """An argument of a type.

        :raises: exception.StorageIntakeRefused
        """
        value = self.arguments.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) != (
                kind is bool):
            raise self.refused(_("argument %(name)s is %(value).50r") % {
                'name': name, 'value': value})
        return value

    # What is done while the migration is under way

    def check_under_way(self) -> None:
        """:raises: exception.StorageIntakeRefused"""
        if self.migration.status not in _UNDER_WAY:
            raise self.refused(_("the migration is %s") %
                               self.migration.status)
        if self.instance.host != self.migration.source_compute:
            raise self.refused(_("the server is on host %s") %
                               self.instance.host)

    def pool(self) -> str:
        """The name of a pool in which disks of the instance may come.

        :raises: exception.StorageIntakeRefused
        """
        name = self.get('pool', str)
        if name not in setup.pool_names() and (
                name != CONF.libvirt.storage_base_images_pool):
            raise self.refused(_("nothing is taken into storage pool %.80r") %
                               name)
        return name

    def volume(self) -> str:
        """The name of a volume of the instance in pool().

        :raises: exception.StorageIntakeRefused
        """
        return self.check_name('volume')

    def check_name(self, argument: str) -> str:
        """A volume's name that is the instance's to have in pool().

        :raises: exception.StorageIntakeRefused
        """
        name, uuid = self.get(argument, str), self.instance.uuid
        if self.pool() == CONF.libvirt.storage_base_images_pool:
            wanted = re.escape('%s.%s' % (self.base(), uuid))
        else:
            wanted = re.escape(uuid + '_') + r'[A-Za-z0-9][A-Za-z0-9._-]{,99}'
        if not re.fullmatch(wanted, name, re.ASCII):
            raise self.refused(_("volume %.120r is none of this server's") %
                               name)
        return name

    def base(self) -> str:
        """The name of the server's base image in an image cache."""
        return imagecache.get_cache_fname(self.instance.image_ref or '')

    def expected(self) -> 'metadata.LibvirtDiskMetadata':
        """The record by which pool() and volume() are on their way here.

        :raises: exception.StorageIntakeRefused
        """
        self.check_under_way()
        place = (self.pool(), self.volume())
        for record in self._coming():
            if (record.pool, record.volume) == place and (
                    record.migration_id == self.migration.id):
                return record
        raise self.refused(_("volume %(volume)s in storage pool %(pool)s is "
                             "not on record as coming") % {
                                 'volume': place[1], 'pool': place[0]})

    def length(self, name: str = 'length') -> int:
        """The length in bytes of the volume that is expected().

        :param name: of the argument
        :raises: exception.StorageIntakeRefused
        """
        length, record = self.get(name, int), self.expected()
        longest = _LONGEST * (record.size or 0) + _LONGEST_MORE + (
            # It was the root disk's once, if that was started with a memory.
            self.instance.flavor.memory_mb * units.Mi)
        if not 0 <= length <= longest:
            raise self.refused(_("%(length)d bytes are no length of a disk of "
                                 "%(size)d bytes") % {
                                     'length': length,
                                     'size': record.size or 0})
        return length

    def key(self) -> int:
        """A key for checksums.

        :raises: exception.StorageIntakeRefused
        """
        key = self.get('key', int)
        if not 0 < key < pump.PRIME:
            raise self.refused(_("key %d") % key)
        return key

    def changed(self) -> 'pump.Ranges | None':
        """What was written, as (offset, length) in bytes; None if not told.

        :raises: exception.StorageIntakeRefused
        """
        if self.arguments.get('changed') is None:
            return None
        found = self.get('changed', list)
        if len(found) > _MOST_CHANGED or not all(
                isinstance(part, list | tuple) and len(part) == 2 and
                all(type(value) is int and 0 <= value < 1 << 62
                    for value in part) for part in found):
            raise self.refused(_("%.80r is no list of what was written") %
                               found)
        return [(start, length) for start, length in found]

    def check_unused(self) -> None:
        """Check that the volume that is expected() is nothing else as well.

        :raises: exception.StorageIntakeRefused
        """
        expected = self.expected()
        place = (expected.pool, expected.volume)
        for name, record in self._disks().items():
            for known in (record, record.previous):
                if known is not None and known.host == CONF.host and (
                        (known.pool, known.volume) == place and
                        not known.is_building):
                    raise self.refused(_("volume %(volume)s is disk "
                                         "%(disk)s") % {
                                             'volume': place[1],
                                             'disk': name})

    def check_mine(self) -> None:
        """Check that pool() and volume() don't come by another migration.

        A host that the instance was moved from before is the source of an
        earlier one.

        :raises: exception.StorageIntakeRefused
        """
        place = (self.pool(), self.volume())
        for record in self._coming():
            if (record.pool, record.volume) == place and (
                    self._is_of_another(record)):
                raise self.refused(_("volume %(volume)s comes by migration "
                                     "%(id)d") % {
                                         'volume': place[1],
                                         'id': record.migration_id})

    def _is_of_another(self, record):
        # What is made anew for a move need not name it.
        return record.migration_id not in (None, self.migration.id)

    def removable(self) -> list[tuple[str, str]]:
        """The places asked for that are no disk, and may be deleted.

        :raises: exception.StorageIntakeRefused
        """
        disks = self._disks()
        # What is made here once the server has come is on no migration's
        # record either.
        mine = {self.migration.id}
        if self.instance.host == self.migration.source_compute:
            mine.add(None)
        allowed = {(record.pool, record.volume) for record in self._coming()
                   if record.migration_id in mine}
        allowed.update(leftovers.on_host(disks, CONF.host))
        allowed -= {(record.pool, record.volume)
                    for _name, disk in disks.items()
                    for record in (disk, disk.previous)
                    if record is not None and record.host == CONF.host and
                    not record.is_building}
        found, places = [], self.get('places', list)
        if len(places) > _MOST_PLACES:
            raise self.refused(_("%d places") % len(places))
        for place in places:
            # Lists can't be looked up, nor be what is allowed.
            place = tuple(map(str, place)) if isinstance(place, list) else ()
            if place not in allowed:
                raise self.refused(_("%.200r may be a disk") % (place,))
            found.append(place)
        return found

    def coming(self) -> set[tuple[str, str]]:
        """The places of what is on its way here, as (pool, volume)."""
        return {(record.pool, record.volume) for record in self._coming()}

    def _disks(self):
        return metadata.InstanceDisks.load(self.context, self.instance)

    def _coming(self):
        """The records of what comes to this host and isn't here yet."""
        disks = self._disks()
        return [record for _name, record in
                [*disks.items(), *disks.extras.items()]
                if record.is_building and record.host == CONF.host]


def is_over(instance_uuid: str, migration_id: int) -> bool:
    """Whether no disk comes by a migration any more."""
    context = nova_context.get_admin_context()
    try:
        objects.Instance.get_by_uuid(context, instance_uuid, expected_attrs=[])
        return objects.Migration.get_by_id(
            context, migration_id).status not in _UNDER_WAY
    except (exception.InstanceNotFound, exception.MigrationNotFound):
        return True


def check(context, instance, migration, request: dict) -> Request:
    """Read from the database what a request is about.

    :param instance: the Instance as the source has sent it
    :param migration: likewise, the Migration
    :param request: ``host``, the source's name; ``do``, what; and arguments
    :raises: exception.StorageIntakeRefused if it isn't the source of a
        migration to this host
    """
    context = context.elevated()
    arguments = dict(request)
    what = str(arguments.pop('do', ''))[:20]
    try:
        found = Request(
            context, objects.Instance.get_by_uuid(
                context, instance.uuid, expected_attrs=[
                    'flavor', 'migration_context', 'system_metadata']),
            objects.Migration.get_by_id_and_instance(
                context, migration.id, instance.uuid),
            what, arguments)
    except exception.MigrationNotFoundForInstance:
        with excutils.save_and_reraise_exception():
            LOG.warning('Refused for migration %(migration)s: %(what)s: it '
                        "is none of this server's",
                        {'migration': migration.id, 'what': what},
                        instance=instance)
    if found.migration.dest_compute != CONF.host or (
            found.migration.migration_type not in ('migration', 'resize')):
        raise found.refused(_("the migration goes to host %s") %
                            found.migration.dest_compute)
    if found.migration.source_compute != arguments.pop('host', None):
        raise found.refused(_("the migration is another host's"))
    return found
