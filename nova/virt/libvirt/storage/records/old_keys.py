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
"""What moves kept in system_metadata before the records held it.

An instance that was in the midst of a move when its hosts were upgraded goes
on: the keys are read into its records, and are gone with their next save.
Nobody writes them.
"""

import typing as ty

from oslo_serialization import jsonutils

import nova.conf
from nova.objects import fields

CONF = nova.conf.CONF

PREFIX = 'libvirt_storage_'
# What a copy must be found to be, by the name of what it is;
_COPY = PREFIX + 'copy_'
# the migration's id and the address of the source's libvirt;
_MOVED = PREFIX + 'moved'
# the source's swap;
_SWAP = PREFIX + 'swap'
# host, pool and volume of what is to be deleted yet.
_LEFT = PREFIX + 'left_'

# What travels beside the disks.
_NO_DISKS = ('base', 'files')


class Classes(ty.NamedTuple):
    """The classes of what the keys become; their room imports this one."""
    record: type
    expected: type


def take_in(disks, classes):
    """Read the keys into the records.

    To do it twice comes to the same: a record that has moved on stays.

    :param disks: (instance, the disks' records by name, the records of what
        is no disk by name, set of leftovers as (host, pool, volume)); all but
        the instance are changed in place
    :param classes: the Classes
    :returns: whether there were any keys
    """
    instance, records, extras, leftovers = disks
    keys = _of(instance)
    if not keys:
        return False
    moved = keys.get(_MOVED)
    migration_id, address = moved if moved else (None, None)
    for name, record in records.items():
        if record.previous is None:
            continue
        if record.migration_id is None:
            record.migration_id = migration_id
        if record.is_building and record.expected is None:
            record.expected = _expected(
                classes, keys.get(_COPY + name), address)
    for name in _NO_DISKS:
        if _COPY + name in keys and name not in extras:
            extras[name] = _extra(classes, keys[_COPY + name], records, moved)
    if moved and _SWAP in keys and 'disk.swap' not in extras:
        extras['disk.swap'] = _swap(
            classes, keys[_SWAP], records, migration_id)
    leftovers.update(tuple(place) for key, place in keys.items()
                     if key.startswith(_LEFT))
    return True


def drop(instance):
    """Delete the keys, once what they said is in the saved records."""
    if not _of(instance):
        return
    for key in list(instance.system_metadata):
        # An offer, too: what it was made for has begun.
        if key.startswith(PREFIX):
            del instance.system_metadata[key]
    instance.save()


def _of(instance):
    if 'system_metadata' not in instance:
        return {}
    return {key: jsonutils.loads(value)
            for key, value in (instance.system_metadata or {}).items()
            if key.startswith((_COPY, _MOVED, _SWAP, _LEFT))}


def _expected(classes, value, address):
    return value and classes.expected(
        length=value['length'], checksum=value['checksum'], key=value['key'],
        address=address)


def _hosts(records):
    """The destination and the source of a move, as the disks have it."""
    for record in records.values():
        if record.previous is not None:
            return record.host, record.previous.host
    return CONF.host, CONF.host


def _extra(classes, value, records, moved):
    migration_id, address = moved if moved else (None, None)
    return classes.record(
        backend=fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
        format=fields.LibvirtDiskFormat.RAW, size=value['length'],
        state=fields.LibvirtDiskState.BUILDING, host=_hosts(records)[0],
        pool=value['at'][0], volume=value['at'][1],
        migration_id=migration_id,
        expected=_expected(classes, value, address))


def _swap(classes, value, records, migration_id):
    pool, volume, disk_format, size = value
    return classes.record(
        backend=fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
        format=disk_format, size=size, state=fields.LibvirtDiskState.READY,
        host=_hosts(records)[1], pool=pool, volume=volume,
        migration_id=migration_id)
