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

import contextlib
import os

from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_utils import units
from oslo_utils import uuidutils

import nova.conf
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
from nova.virt import images
from nova.virt.libvirt import host as libvirt_host
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.move import base_image as storage_base
from nova.virt.libvirt.storage.move import guest_files as files
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.move import state as moves
from nova.virt.libvirt.storage.move import undo
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import pool as storage_pool

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# The first service version whose computes take volumes from a peer.
MIN_COMPUTE = 75


def _refused(reason):
    """Return the exception that keeps the server running as it is."""
    return exception.InstanceFaultRollback(
        exception.MigrationPreCheckError(reason=reason))


class Departure:
    """An instance's disks before they leave this host.

    :param context: the request's context
    :param host: the Host of this compute
    :param instance: the instance, still running
    :param migration: its Migration, which says where the destination is
    :param disks: the instance's InstanceDisks
    :param local_uri: URI of this host's libvirt
    :param same_host: whether destination and source are one compute
    :param address: under which the destination reaches this host's libvirt
    :ivar uri: URI of the destination's libvirt
    :ivar peer: connection to that
    :ivar owner: user and group id of Nova there
    :ivar items: list of moves.Item
    """

    def __init__(self, context, host, instance, migration, disks, local_uri,
                 same_host, address):
        self.context = context
        self.host = host
        self.instance = instance
        self.migration = migration
        self.disks = disks
        self.local_uri = local_uri
        self.same_host = same_host
        self.address = address
        self.uri = None
        self.peer = None
        self.owner = None
        self.items = []
        self._offered = {}
        self._free = {}
        self._file_system = {}
        self._shared = {}
        self._needs_image = False

    def check(self, stack):
        """Check all that can be known before the guest is powered off.

        :param stack: an ExitStack; closes the connection to the peer
        :raises: InstanceFaultRollback; the guest runs on
        """
        if not self.disks.items() and not files.are_needed(self.instance):
            return
        try:
            self._check_versions()
            self._take_offer()
            self._connect(stack)
            self._look_at_disks()
            self._look_at_base()
            self._check_room()
            self._check_room_here()
        except exception.InstanceFaultRollback:
            raise
        except Exception as e:
            if not isinstance(e, exception.NovaException):
                LOG.exception('Unexpected error', instance=self.instance)
            raise exception.InstanceFaultRollback(e)

    def pool_of_files(self):
        """Where what is no disk goes on its way.

        :returns: StoragePool here and StoragePool there
        """
        records = [record for _name, record in self.disks.items()]
        here = (records[0].pool if records else
                storage_pool.pool_name_for(files.NAME))
        return (storage_pool.StoragePool(
                    self.host.get_connection(), here, CONF.host),
                self._there(files.NAME))

    def is_shared(self, item):
        """Whether an item's pools here and there are one."""
        return item.record is not None and self._shared.get(
            (item.record.pool, item.pool.name), False)

    def _check_versions(self):
        if self.same_host:
            return
        service = objects.Service.get_by_host_and_binary(
            self.context.elevated(), self.migration.dest_compute,
            'nova-compute')
        if service is None or service.version < MIN_COMPUTE:
            raise _refused(
                _("the disks of this server are volumes of libvirt storage "
                  "pools, which the compute service on %s is too old to "
                  "take; upgrade it, or choose another host") %
                self.migration.dest_compute)

    def _take_offer(self):
        value = self.instance.system_metadata.get(moves.OFFER)
        offered = jsonutils.loads(value) if value else {}
        if offered.get('m') != self.migration.id:
            raise _refused(
                _("host %s has made no offer for this server's volumes; its "
                  "compute service must be upgraded, or try again") %
                self.migration.dest_compute)
        self.owner = offered['o']
        self._offered = {kind: pool for pool, kinds in offered['p'].items()
                         for kind in kinds}
        self._free = dict(zip(offered['p'], offered['f']))
        self._file_system = dict(zip(offered['p'], offered['d']))

    def _there(self, kind):
        """The destination's pool for a kind of disk."""
        if kind not in self._offered:
            raise _refused(
                _("host %(host)s offers storage pools for %(offered)s "
                  "and none for %(kind)s; try again") % {
                      'host': self.migration.dest_compute, 'kind': kind,
                      'offered': ', '.join(sorted(self._offered))})
        return storage_pool.StoragePool(
            self.peer, self._offered[kind], self.migration.dest_compute)

    def _connect(self, stack):
        if self.same_host:
            self.uri = self.local_uri
            self.peer = self.host.get_connection()
            return
        self.uri = peer.uri_of(self.migration.dest_host)
        self.peer = stack.enter_context(
            peer.connected(self.host, self.uri))

    def _look_at_disks(self):
        local = self.host.get_connection()
        for name, record in self.disks.items():
            if name.endswith('.rescue'):
                continue
            if (record.backend != fields.LibvirtDiskBackend.LIBVIRT_STORAGE or
                    record.is_building or record.host != CONF.host):
                raise _refused(
                    _("disk %(name)s is on record as %(state)s on host "
                      "%(host)s, backend %(backend)s; a hard reboot of the "
                      "server brings its disks in order") % {
                          'name': name, 'state': record.state,
                          'host': record.host, 'backend': record.backend})
            here = storage_pool.StoragePool(local, record.pool, CONF.host)
            there = self._there(moves.kind_of(name))
            pool_type = moves.check_pool(there)
            volume, growth = None, 0
            if moves.is_copied(name):
                volume = here.volume(record.volume)
                _check_type(volume)
                if record.format == fields.LibvirtDiskFormat.QCOW2:
                    growth = self._look_at_overlay(name, volume)
            self.items.append(moves.Item(
                name, record, volume, there,
                sparse=pool_type in moves.FILE_POOLS, growth=growth))
            self._probe(here, there)
        moves.check_pool(self._there(files.NAME))

    def _look_at_overlay(self, name, volume):
        """Check the base image that an overlay's header names.

        libvirt tells what it was when it looked last.

        :returns: bytes by which the volume grows when it is flattened
        """
        info = images.privileged_qemu_img_info(
            volume.path, format=fields.LibvirtDiskFormat.QCOW2)
        if not info.backing_file:
            return 0
        _check_base(volume, info.backing_file)
        if storage_base.is_kept(self.instance, name, info.backing_file):
            self._needs_image = True
            return 0
        base_format = info.backing_file_format or fields.LibvirtDiskFormat.RAW
        base = images.privileged_qemu_img_info(
            info.backing_file, format=base_format)
        # What is compressed in the base isn't any more in the overlay.
        return (base.disk_size if base_format == fields.LibvirtDiskFormat.RAW
                else base.virtual_size)

    def _look_at_base(self):
        if self.same_host or not self._needs_image:
            return
        there = self._there(storage_base.NAME)
        volume = storage_base.find(
            self.context, self.instance,
            storage_base.pool(self.host.get_connection()), there)
        if volume is not None:
            moves.check_pool(there)
            self.items.append(moves.Item(
                storage_base.NAME, None, volume, there,
                target=storage_base.name_on_the_way(self.instance)))

    def _probe(self, here, there):
        """Find out whether two pools are one, by a volume in both.

        A new volume is made here, then one of that name there. A pool which
        has the file already refuses to make it; asking it for the volume
        instead would need a refresh, which reads every file of a pool.
        """
        key = (here.name, there.name)
        if key in self._shared:
            return
        if self.same_host:
            self._shared[key] = here.name == there.name
            return
        config = storage_config.LibvirtConfigStorageVolume()
        # What is left of it goes with the instance.
        config.name = '%s_probe.%s' % (
            self.instance.uuid, uuidutils.generate_uuid(dashed=False))
        config.capacity = units.Mi
        config.allocation = 0
        config.target_format = fields.LibvirtDiskFormat.RAW
        with contextlib.ExitStack() as stack:
            ours = here.create(config)
            stack.callback(undo.delete_volume, ours, self.instance)
            try:
                theirs = there.create(config)
            except exception.NovaException:
                # Taken, or something is wrong with that pool: without our
                # volume it must be possible.
                stack.close()
                undo.delete_volume(there.create(config), self.instance)
                self._shared[key] = True
            else:
                undo.delete_volume(theirs, self.instance)
                self._shared[key] = False
        LOG.debug('Storage pool %(here)s and pool %(there)s of host %(host)s '
                  'are the same: %(same)s',
                  {'here': here.name, 'there': there.name, 'host': there.host,
                   'same': self._shared[key]}, instance=self.instance)

    def _check_room(self):
        """Compare what is to come with what each file system there has."""
        needed = {}
        for item in self.items:
            key = self._file_system[item.pool.name]
            pools, total = needed.get(key, ({}, 0))
            # What isn't sparse there takes up its whole length.
            total += item.allocation if item.sparse else item.length
            total += item.growth
            if self.same_host or self.is_shared(item):
                total += item.growth  # the source's volume grows there, too
            pools[item.pool.name] = item.pool
            needed[key] = (pools, total)
        for pools, total in needed.values():
            available = min(self._available(pool, total)
                            for pool in pools.values())
            if total > available:
                raise _refused(
                    _("storage pool %(pool)s of host %(host)s has "
                      "%(available)d bytes available and %(total)d are "
                      "needed; make room there or choose another host") % {
                          'pool': ', '.join(sorted(pools)),
                          'host': self.migration.dest_compute,
                          'available': available, 'total': total})

    def _check_room_here(self):
        """Compare what flattening volumes takes with what their pools have."""
        needed = {}
        for item in self.items:
            if item.growth:
                pool, total = needed.get(
                    item.source.pool.name, (item.source.pool, 0))
                needed[pool.name] = (pool, total + item.growth)
        for pool, total in needed.values():
            available = _measured(pool, total)
            if total > available:
                raise _refused(
                    _("storage pool %(pool)s of host %(host)s has "
                      "%(available)d bytes available and %(total)d are "
                      "needed to make volumes independent of base images "
                      "that host %(dest)s can't have; make room there") % {
                          'pool': pool.name, 'host': CONF.host,
                          'dest': self.migration.dest_compute,
                          'available': available, 'total': total})

    def _available(self, pool, wanted):
        """How many bytes a pool of the destination has room for."""
        available = _measured(pool, wanted)
        free = self._free[pool.name]
        # Or taken it.
        return available if free is None else min(available, free)


def _measured(pool, wanted):
    """How many bytes libvirt takes a pool to have room for."""
    available = pool.info().available
    if wanted > available:
        # libvirt measures at a refresh; since then somebody may have made
        # room.
        pool.refresh()
        available = pool.info().available
    return available


def _check_type(volume):
    """Refuse what libvirt takes for a directory, and so won't stream."""
    libvirt = libvirt_host.libvirt
    if volume.info().type not in (libvirt.VIR_STORAGE_VOL_FILE,
                                  libvirt.VIR_STORAGE_VOL_BLOCK):
        raise _refused(
            _("libvirt takes volume %(volume)s of storage pool %(pool)s for "
              "a directory, as its guest has written the header of a ploop "
              "image to it; the guest must overwrite that, and the pool be "
              "refreshed, before it can be moved") % {
                  'volume': volume.name, 'pool': volume.pool.name})


def _check_base(volume, backing_file):
    """Refuse an overlay over something that Nova hasn't put there."""
    cache_dir = imagecache.ImageCacheManager().cache_dir
    if os.path.dirname(backing_file) != cache_dir:
        raise _refused(
            _("volume %(volume)s depends on %(file)s, which is not in the "
              "image cache %(cache)s") % {
                  'volume': volume.name, 'file': backing_file,
                  'cache': cache_dir})
