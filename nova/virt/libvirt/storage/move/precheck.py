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
"""What the source of a move checks while the guest runs.

All that can be known before the guest is powered off: that the destination's
libvirt is reachable and trusted, that its pools are there and have room, that
the disks are in order. Whatever is wrong, the guest runs on.
"""

import os

from oslo_log import log as logging
from oslo_utils import units

import nova.conf
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.move import base_image as storage_base
from nova.virt.libvirt.storage.move import ceph_disk
from nova.virt.libvirt.storage.move import ceph_images
from nova.virt.libvirt.storage.move import guest_files as files
from nova.virt.libvirt.storage.move import item as storage_item
from nova.virt.libvirt.storage.move import offer as storage_offer
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.move import transport
from nova.virt.libvirt.storage.pool import health
from nova.virt.libvirt.storage.pool import kinds as pool_kinds
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import usage
from nova.virt.libvirt.storage.records import kinds

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# The first service version whose computes take volumes from a peer and read
# the records that this one writes.
MIN_COMPUTE = 76


def _refused(reason):
    """Return the exception that keeps the instance running as it is."""
    return exception.InstanceFaultRollback(
        exception.MigrationPreCheckError(reason=reason))


class Departure:
    """An instance's disks before they leave this host.

    :param move: a Move, whose instance still runs
    :ivar peer: the destination as a Peer, None if nothing is copied
    :ivar items: list of Item
    """

    def __init__(self, move):
        self.move = move
        self.context = move.context
        self.host = move.here.host
        self.instance = move.instance
        self.migration = move.migration
        self.disks = move.disks
        self.same_host = move.same_host
        self.peer = None
        self.items = []
        self._offer = None
        self._shared = {}
        self._needs_image = False
        # Names of pools there whose volumes take up their whole size
        self._thick = set()
        # StoragePool and bytes of what the destination fetches itself
        self._fetched = []
        # CephPoolThere by name, of those that disks are converted for
        self._over_ceph = {}
        # Names of the disks that go from one Ceph pool into another
        self._between_ceph = set()

    def check(self, stack):
        """Check all that can be known before the guest is powered off.

        :param stack: an ExitStack; closes the connection to the peer
        :raises: InstanceFaultRollback; the guest runs on
        """
        try:
            files.check_access(self.instance)
            if not self.disks.items() and not files.are_needed(self.instance):
                return
            self._check_versions()
            self._take_offer()
            self._look_at_ceph()
            if not self._is_anything_sent():
                # The destination sees the disks where they are.
                return
            self.peer = transport.reach(stack, self.move, self._offer)
            self._look_at_disks()
            self._look_at_base()
            self._check_room()
            self._check_room_here()
            ceph_disk.check_room(self.items)
        except exception.InstanceFaultRollback:
            raise
        except Exception as e:
            if not isinstance(e, exception.NovaException):
                LOG.exception('Unexpected error', instance=self.instance)
            raise exception.InstanceFaultRollback(e)

    def check_peer(self):
        """Check that the destination can still be reached.

        :raises: exception.NovaException
        """
        self.peer.check(self._offer.streamed_to)

    def pool_of_files(self):
        """Where what is no disk goes on its way.

        :returns: StoragePool here and PeerPool there
        """
        records = [record for _name, record in self._travelling()]
        here = (records[0].pool if records else
                setup.pool_name_for(files.NAME))
        return (state.file_pool(self.host.get_connection(), here),
                self._there(files.NAME))

    def is_shared(self, item):
        """Whether an item's pools here and there are one."""
        return self._shared.get((item.place_here(), item.pool.name), False)

    def _check_versions(self):
        if self.same_host:
            return
        service = objects.Service.get_by_host_and_binary(
            self.context.elevated(), self.migration.dest_compute,
            'nova-compute')
        if service is None or service.version < MIN_COMPUTE:
            raise _refused(
                _("upgrade the compute service on host %s or choose another "
                  "host: it is too old to take the disks of this instance, "
                  "which are volumes of libvirt storage pools") %
                self.migration.dest_compute)

    def _take_offer(self):
        self._offer = storage_offer.load(self.instance)
        if (self._offer is None or
                self._offer.migration_id != self.migration.id):
            raise _refused(
                _("try again, or upgrade the compute service on host %s: it "
                  "has made no offer for this instance's volumes") %
                self.migration.dest_compute)

    def _pool_name_there(self, kind):
        name = self._offer.pool_for(kind)
        if name is None:
            raise _refused(
                _("try again: host %(host)s offers no storage pool for "
                  "%(kind)s, only for %(offered)s") % {
                      'host': self.migration.dest_compute, 'kind': kind,
                      'offered': ', '.join(self._offer.kinds)})
        return name

    def _there(self, kind):
        """The destination's pool for a kind of disk."""
        name = self._pool_name_there(kind)
        return self._over_ceph.get(name) or self.peer.pool(name)

    def _is_anything_sent(self):
        return bool(self._travelling() or files.are_needed(self.instance) or
                    files.has_nvram(self.host, self.instance))

    def _travelling(self):
        """Name and record of the disks that aren't there already."""
        return [(name, record) for name, record in self.disks.items()
                if not name.endswith('.rescue') and not (
                    record.is_on_ceph and self._offered(name).ceph and
                    name not in self._between_ceph)]

    def _offered(self, name):
        return self._offer.pools[self._pool_name_there(kinds.of(name))]

    def _look_at_ceph(self):
        """Check that both hosts have one Ceph pool for a disk, or none.

        Or that the disk can be converted on its way into one, out of one, or
        into another one.
        """
        if any(record.is_on_ceph for _name, record in self.disks.items()):
            # Else a Ceph that is silent is waited for as long as it is.
            health.ready_for(self.host.get_connection, self.disks)
        for name, record in self.disks.items():
            if name.endswith('.rescue'):
                continue
            pool_name = self._pool_name_there(kinds.of(name))
            there = self._offer.pools[pool_name].ceph
            here = self._ceph_here(name, record)
            if here is None and there is None or (
                    (here, record.pool) == (there, pool_name)):
                continue
            why = self._why_not_converted(name, record, here, pool_name)
            if why:
                raise _refused(
                    _("choose a host with the same Ceph pool under the same "
                      "name: %(ceph)s here, %(other)s there. Disk %(name)s is "
                      "in storage pool %(here)s, and host %(host)s offers "
                      "%(there)s for it. %(why)s") % {
                          # The longest words that matter, first: the API
                          # shows 255 characters.
                          'ceph': here or _('no Ceph pool'),
                          'other': there or _('no Ceph pool'),
                          'name': name, 'host': self.migration.dest_compute,
                          'here': record.pool, 'there': pool_name,
                          'why': why})

    def _why_not_converted(self, name, record, here, pool_name):
        """What keeps a disk from moving into a Ceph pool, or from one.

        :param here: which Ceph pool it is in, None if it is in none
        :param pool_name: of the destination's pool for it
        :returns: None if it can be converted
        """
        there = self._offer.pools[pool_name].ceph
        if self.same_host:
            return _("On one host no disk is converted")
        if there is None:
            return None
        if here == there:
            return _("No disk moves within one Ceph pool")
        self._check_in_order(name, record)
        local = self.host.get_connection()
        pool = ceph_images.pool_over(local, there)
        if pool is None:
            return _("Host %(host)s has no active storage pool over %(ceph)s, "
                     "by which it could be converted") % {
                         'host': CONF.host, 'ceph': there}
        if here is None and kinds.is_copied(name):
            path = setup.pool_named(local, record.pool).volume(
                record.volume).path
            if not os.access(path, os.R_OK):
                return _("It can't be converted, as nova can't read "
                         "%s") % path
        if here is not None:
            self._between_ceph.add(name)
        if pool_name not in self._over_ceph:
            self._over_ceph[pool_name] = ceph_disk.CephPoolThere(
                pool_name, self.migration.dest_compute, pool, originals=[
                    known.volume for _name, known in self.disks.items()
                    if known.is_on_ceph])
            self._over_ceph[pool_name].probe(self.instance)
        return None

    def _ceph_here(self, name, record):
        if not record.is_on_ceph:
            return None
        self._check_in_order(name, record)
        pool = setup.pool_named(self.host.get_connection(), record.pool)
        # Gone, it would be made anew there.
        pool.volume(record.volume)
        return state.ceph_of(pool)

    def _check_in_order(self, name, record):
        if not record.is_in_pool or record.is_building or (
                record.host != CONF.host):
            raise _refused(
                _("hard reboot the instance, which brings its disks in "
                  "order: disk %(name)s is on record as %(state)s on "
                  "host %(host)s, backend %(backend)s") % {
                      'name': name, 'state': record.state,
                      'host': record.host, 'backend': record.backend})

    def _look_at_disks(self):
        local = self.host.get_connection()
        for name, record in self._travelling():
            self._check_in_order(name, record)
            here = storage_pool.StoragePool(local, record.pool, CONF.host)
            there = self._there(kinds.of(name))
            pool_type = there.check()
            if not pool_kinds.of_type(pool_type).sparse:
                self._thick.add(there.name)
            if kinds.is_copied(name) and (
                    record.is_on_ceph or there.name in self._over_ceph):
                item = ceph_disk.item_of(
                    name, there, record, here.volume(record.volume), local)
                record.size = record.size or item.length
                if there.name not in self._over_ceph:
                    item.sparse = self.peer.is_sparse(pool_type)
                self.items.append(item)
                continue
            if kinds.is_copied(name):
                self._check_format(name, record, there, pool_type)
                volume = here.volume(record.volume)
                _check_streams(record, volume)
                item = storage_item.Disk(name, there, record, volume)
                if item.flattenable():
                    item.growth = self._look_at_overlay(item, record)
                # By this the destination judges what it is sent.
                record.size = record.size or item.length
            else:
                item = storage_item.RemadeDisk(name, there, record)
            item.sparse = self.peer.is_sparse(pool_type)
            self.items.append(item)
            if not record.is_on_ceph:
                self._probe(here, there)
        self._there(files.NAME).check()

    def _check_format(self, name, record, there, pool_type):
        if (record.format != fields.LibvirtDiskFormat.RAW and
                not pool_kinds.of_type(pool_type).has_overlays):
            raise _refused(
                _("choose another host: disk %(name)s is of format "
                  "%(format)s, and storage pool %(pool)s of host %(host)s "
                  "takes raw disks alone, as it isn't a directory") % {
                      'name': name, 'format': record.format,
                      'pool': there.name, 'host': there.host})

    def _look_at_overlay(self, item, record):
        """Check what the destination will check, and the base image.

        libvirt tells what it was when it looked last.

        :param item: of the disk; is told whether it keeps its base image
        :param record: of the disk; gets its size where that isn't known, as
            that of a root disk whose flavor has none
        :returns: bytes by which the volume grows when it is flattened
        """
        info = image_cache.look_at_overlay(item.source.path, record.size)
        record.size = record.size or info.virtual_size
        if not info.backing_file:
            return 0
        item.keeps_base = storage_base.is_kept(
            self.instance, item.name, info.backing_file) and (
                self.same_host or
                storage_base.is_settled(self.context, self.instance))
        if item.keeps_base:
            self._needs_image = True
            return 0
        return storage_base.growth_of(info)

    def _look_at_base(self):
        if self.same_host or not self._needs_image:
            return
        here = storage_base.pool(self.host.get_connection())
        there = self._there(storage_base.NAME)
        volume = storage_base.find(self.context, self.instance, here, there)
        if volume is None:
            size = storage_base.room_to_fetch(self.instance, here, there)
            if size:
                self._fetched.append((there, size))
        else:
            pool_type = there.check()
            item = storage_item.BaseImage(
                storage_base.NAME, there, volume,
                storage_base.name_on_the_way(self.instance))
            item.sparse = self.peer.is_sparse(pool_type)
            self.items.append(item)

    def _probe(self, here, there):
        """Find out whether two pools are one."""
        key = (here.name, there.name)
        if key in self._shared:
            return
        if self.same_host:
            self._shared[key] = here.name == there.name
            return
        self._shared[key] = there.is_shared(here, self.instance)
        LOG.debug('Storage pool %(here)s and pool %(there)s of host %(host)s '
                  'are the same: %(same)s',
                  {'here': here.name, 'there': there.name, 'host': there.host,
                   'same': self._shared[key]}, instance=self.instance)

    def _check_room(self):
        """Compare what is to come with what each file system there has."""
        needed = {}
        incoming = [(item.pool, self._taken_by(item)) for item in self.items]
        for pool, size in incoming + self._fetched:
            key = self._offer.pools[pool.name].file_system
            pools, total = needed.get(key, ({}, 0))
            pools[pool.name] = pool
            needed[key] = (pools, total + size)
        for pools, total in needed.values():
            available = min(self._available(pool, total)
                            for pool in pools.values())
            if total > available:
                raise _refused(
                    _("choose another host, or make room: storage pool "
                      "%(pool)s of host %(host)s has %(available)d bytes "
                      "available and %(total)d are needed") % {
                          'pool': ', '.join(sorted(pools)),
                          'host': self.migration.dest_compute,
                          'available': available, 'total': total})

    def _taken_by(self, item):
        """Return the bytes that an item takes on the destination."""
        growth = item.growth
        if self.same_host or self.is_shared(item):
            growth *= 2  # the source's volume grows there, too
        if self._offer.preallocates or item.pool.name in self._thick:
            # Once there, it grows to what the new flavor says.
            return max(item.reserved(), self._new_size(item.name)) + growth
        # What isn't sparse there takes up its whole length.
        return (item.allocation if item.sparse else item.length) + growth

    def _new_size(self, name):
        """Return the bytes that the new flavor gives a disk, 0 if none."""
        flavor = ('new_flavor' in self.instance and
                  self.instance.new_flavor or None)
        if flavor is None:
            return 0
        return {'disk': flavor.root_gb, 'disk.local': flavor.ephemeral_gb
                }.get(name, 0) * units.Gi

    def _check_room_here(self):
        """Compare what flattening volumes takes with what there is."""
        growth: dict[str, int] = {}
        pools = {}
        for item in self.items:
            if item.growth:
                pool = item.source.pool
                pools[pool.name] = pool
                growth[pool.name] = growth.get(pool.name, 0) + item.growth
        for names, available, total in usage.overfull(
                growth, lambda name: usage.measure(pools[name])):
            raise _refused(
                _("make room first: storage pool %(pool)s of host %(host)s "
                  "has %(available)d bytes available and %(total)d are needed "
                  "to make volumes independent of base images that host "
                  "%(dest)s can't have") % {
                      'pool': ', '.join(names), 'host': CONF.host,
                      'dest': self.migration.dest_compute,
                      'available': available, 'total': total})

    def _available(self, pool, wanted):
        """How many bytes a pool of the destination has room for.

        Of a peer, libvirt alone can be asked, and what it has offered.
        """
        available = pool.available(wanted)
        free = self._offer.pools[pool.name].free
        # Or taken it.
        return available if free is None else min(available, free)


def _check_streams(record, volume):
    """Refuse what libvirt takes for a directory, and so won't stream.

    Where Nova may read the file itself, libvirt doesn't have to.

    :raises: exception.StoragePoolError if it can't learn how large a logical
        volume has become
    """
    if volume.pool.kind().is_volume_group:
        volume.check_known_length()
    path = volume.path
    if (record.format == fields.LibvirtDiskFormat.RAW and
            not os.access(path, os.R_OK) and content.is_ploop(path)):
        raise _refused(
            _("have the guest overwrite the start of its disk, then refresh "
              "storage pool %(pool)s: libvirt takes volume %(volume)s for a "
              "directory, as its guest has written the header of a ploop "
              "image to it") % {
                  'volume': volume.name, 'pool': volume.pool.name})
