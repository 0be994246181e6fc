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
"""A move of volumes as a table, and what both ends of it have to agree on.

The source (S) and the destination (D) are two compute services. What they say
to each other goes with the instance: in the records of its disks, and before
there is anything on record, in its MigrationContext. Each row is one save of
the records; a compute service that is killed after it leaves the instance in
that row.

offer (D): ready@S
    lies there: disk / -
    killed here: nobody has to; the next try makes its own

pack (S): ready@S, leftovers
    lies there: disk, files / -
    killed here: S: revert, which deletes the files

intent (S): building@D, previous ready@S
    lies there: disk, files / part
    killed here: S: abandon()

expect (S): as before, expected
    lies there: disk / whole
    killed here: S by a hard reboot: abandon(); D by one: accept()

take (D): as before, extras gone
    lies there: disk / whole
    killed here: D by a hard reboot: accept()

verify (D): ready@D, previous ready@S
    lies there: disk / disk
    killed here: D by a hard reboot

confirm (S): ready@D, leftovers
    lies there: disk / disk
    killed here: S at its next chance: deletes the leftovers

give back (D): ready@S, leftovers
    lies there: disk / disk
    killed here: S: abandon(); a hard reboot on D is refused

revert (S): ready@S
    lies there: disk / -
    killed here: S: abandon()

Disks that are sent ahead are in row "intent" while their guest runs, and
"pack" comes after it: abandon() is the same, and the guest is left alone.

step_of() tells the row from the records. Swap is made anew: its record is
building until the destination has made it, and expects nothing. A disk on Ceph
that stays where it is has none of these steps: all hosts see it, and a hard
reboot takes it for that of the host which the instance is on.
"""

import dataclasses
import typing as ty

from oslo_utils import excutils

import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
from nova.virt.libvirt.storage.pool import clearing
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import kinds as pool_kinds
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.records import kinds

CONF = nova.conf.CONF


class Step(ty.NamedTuple):
    """A row of the table.

    :ivar name: what has been done
    :ivar host: who does it, S or D
    :ivar record: of a copied disk afterwards: its state and host, and those
        of its previous record
    :ivar disks: what lies on S / on D then
    :ivar goes_on: who goes on if that host is killed now, and how
    """
    name: str
    host: str
    record: str
    disks: str
    goes_on: str


STEPS = (
    Step('offer', 'D', 'ready@S', 'disk / -',
         'nobody has to; the next try makes its own'),
    Step('pack', 'S', 'ready@S, leftovers', 'disk, files / -',
         'S: revert, which deletes the files'),
    Step('intent', 'S', 'building@D, previous ready@S',
         'disk, files / part', 'S: abandon()'),
    Step('expect', 'S', 'as before, expected', 'disk / whole',
         'S by a hard reboot: abandon(); D by one: accept()'),
    Step('take', 'D', 'as before, extras gone', 'disk / whole',
         'D by a hard reboot: accept()'),
    Step('verify', 'D', 'ready@D, previous ready@S', 'disk / disk',
         'D by a hard reboot'),
    Step('confirm', 'S', 'ready@D, leftovers', 'disk / disk',
         'S at its next chance: deletes the leftovers'),
    Step('give back', 'D', 'ready@S, leftovers', 'disk / disk',
         'S: abandon(); a hard reboot on D is refused'),
    Step('revert', 'S', 'ready@S', 'disk / -',
         'S: abandon()'),
)

# The names of the rows, by which step_of() tells them.
(OFFER, PACK, INTENT, EXPECT, TAKE, VERIFY, CONFIRM, GIVE_BACK, REVERT) = (
    step.name for step in STEPS)


def step_of(disks):
    """Return the row of the table that an instance's records are in.

    Before and after a move a record says the same: OFFER stands for an
    instance that isn't on its way, PACK and CONFIRM (or GIVE_BACK) for one of
    which something is to be deleted yet.

    :param disks: the instance's InstanceDisks
    """
    moving = [record for name, record in disks.items()
              if record.migration_id is not None and record.previous is not
              None and kinds.is_copied(name)]
    coming = {name: record for name, record in disks.extras.items()
              if record.is_building}
    parts = [*(r for r in moving if r.is_building), *coming.values()]
    if any(record.expected is None for record in parts):
        return INTENT
    if coming:
        return EXPECT
    if any(record.is_building for record in moving):
        return TAKE
    if moving:
        return VERIFY
    here = {record.host for _name, record in disks.items()}
    if any(host in here for host, _pool, _volume in disks.leftovers):
        return PACK
    return CONFIRM if disks.leftovers else OFFER


@dataclasses.dataclass
class ThisHost:
    """The compute service that moves disks.

    :ivar host: its nova.virt.libvirt.host.Host
    :ivar uri: of its libvirt
    :ivar address: under which other hosts reach that
    :ivar job_tracker: the driver's InstanceJobTracker: a copy ends when the
        instance is deleted
    """
    host: ty.Any
    uri: str
    address: str
    job_tracker: ty.Any


@dataclasses.dataclass
class Move:
    """An instance's disks on their way out of this host.

    :ivar context: the request's context
    :ivar here: ThisHost
    :ivar instance: the instance
    :ivar migration: its Migration, which says where the destination is
    :ivar disks: the instance's InstanceDisks
    """
    context: ty.Any
    here: ThisHost
    instance: ty.Any
    migration: ty.Any
    disks: ty.Any

    @property
    def same_host(self):
        """Whether destination and source are one compute."""
        return self.migration.dest_compute == CONF.host


def moved_by(disks):
    """Return the id of the Migration that has copied an instance's volumes.

    :param disks: the instance's InstanceDisks
    :returns: None if there is none, or if it hasn't copied all of them yet
    """
    found = None
    records = [*disks.items(), *disks.extras.items()]
    for name, record in records:
        if record.migration_id is None or (
                record.previous is None and name not in disks.extras):
            continue
        if record.is_building and kinds.is_copied(name) and (
                record.expected is None):
            return None
        found = record.migration_id
    return found


def create_volume(pool, name, length, owner, mode=0o644, allocation=0):
    """Make the volume on the destination that the bytes go to.

    :param pool: StoragePool there
    :param length: bytes of the file, whatever its format is
    :param owner: user and group id of Nova there: the user may have another
        number than on the source
    :param allocation: bytes to take from the pool now
    :returns: StorageVolume
    :raises: as StoragePool.create() does; nothing that was made is left then
    """
    config = storage_config.LibvirtConfigStorageVolume()
    config.name = name
    config.capacity = length
    config.allocation = allocation
    config.target_format = fields.LibvirtDiskFormat.RAW
    config.permissions = storage_config.LibvirtConfigStoragePermissions()
    config.permissions.mode = mode
    config.permissions.owner, config.permissions.group = owner
    try:
        volume = pool.create(config)
        # Longer than asked for it shows what others have written there.
        clearing.clear_rest(volume, length)
    except exception.StorageVolumeExists:
        raise
    except Exception:
        with excutils.save_and_reraise_exception():
            # It may be there nevertheless, and no record names it for long:
            # libvirt knew of none with this name.
            ownership.delete_named(pool, name)
    return volume


def ceph_of(pool):
    """Return which Ceph pool a pool of this host is over; None without one.

    Two pools of one Ceph pool are one, whatever their hosts call them.

    :param pool: the StoragePool
    :raises: exception.StorageCephError
    """
    images = pool.ceph() if pool.exists() else None
    return None if images is None else images.identity


def file_pool(connection, pool_name):
    """Return the pool of this host for what goes with a guest as a file.

    :param pool_name: of the pool for its disks, which may hold no files
    :returns: a StoragePool
    """
    pool = setup.pool_named(connection, pool_name)
    if pool.exists() and pool.kind().is_ceph:
        return setup.pool_named(
            connection, CONF.libvirt.storage_base_images_pool)
    return pool


def check_pool(pool):
    """Check that a pool is there, active, and of a type that holds disks.

    :returns: its type
    """
    if not pool.exists():
        reason = _("define and start storage pool %(pool)s on host %(host)s: "
                   "it doesn't exist there")
    elif not pool.is_active():
        reason = _("start storage pool %(pool)s on host %(host)s: it is "
                   "inactive")
    else:
        pool_type = pool.config().type
        if pool_kinds.of_type(pool_type).holds_disks:
            return pool_type
        reason = _("name a pool of one of the types %(types)s in nova.conf: "
                   "storage pool %(pool)s of host %(host)s is of type "
                   "%(type)s")
        raise exception.MigrationPreCheckError(reason=reason % {
            'pool': pool.name, 'host': pool.host, 'type': pool_type,
            'types': ', '.join(pool_kinds.DISK_TYPES)})
    raise exception.MigrationPreCheckError(
        reason=reason % {'pool': pool.name, 'host': pool.host})
