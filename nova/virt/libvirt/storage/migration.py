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
"""A disk's way from one host's storage pool to another's.

Cold migration and resize of an instance whose disks are volumes. The source
does the work: it reaches the destination's libvirt, makes new volumes there
and streams the disks into them (pump.py). Of a peer's libvirt the storage API
alone is used, so that a URI which reaches no more than that is enough.

In order: the destination makes its offer in prep_resize (offer()); the source
checks everything that can be checked while the guest still runs
(Outgoing.check()); with the guest off it copies (Outgoing.run()); the
destination compares checksums and takes the disks over (accept()). Until
confirm() or revert() the source's volume is the disk's ``previous``.

A disk's record is ``building`` from before its first byte on the destination
until the destination has found it whole. What is still ``building`` is undone
by abandon() on the source, whenever that comes.
"""

import contextlib
import os
import threading
import time

from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_utils import units
from oslo_utils import uuidutils

import nova.conf
from nova import exception
from nova.i18n import _
from nova import objects
from nova.objects import fields
import nova.privsep.qemu
from nova import thread_pool_factory
from nova.virt import driver
from nova.virt import images
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import arrival
from nova.virt.libvirt.storage import base as storage_base
from nova.virt.libvirt.storage import config as storage_config
from nova.virt.libvirt.storage import metadata
from nova.virt.libvirt.storage import peer
from nova.virt.libvirt.storage import pool as storage_pool
from nova.virt.libvirt.storage import pump

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# The first service version whose computes take volumes from a peer.
MIN_COMPUTE = 75

# Seconds between two reports of progress.
_REPORT_INTERVAL = 5


def _refused(reason):
    """Return the exception that keeps the server running as it is."""
    return exception.InstanceFaultRollback(
        exception.MigrationPreCheckError(reason=reason))


def is_pool_backed(disks, block_device_info):
    """Whether an instance migrates by volumes.

    :param disks: its InstanceDisks
    """
    records = [record for _name, record in disks.items()]
    if not records:
        # Without any local disk there is nothing that SSH were needed for.
        return (CONF.libvirt.images_type == 'libvirt-storage' and
                not driver.block_device_info_get_image(block_device_info) and
                not driver.block_device_info_get_ephemerals(
                    block_device_info) and
                not driver.swap_is_usable(
                    driver.block_device_info_get_swap(block_device_info)))
    return any(record.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE
               for record in records)


# On the source

def prepare(virt_driver, context, instance, block_device_info):
    """Check a migration of volumes, while the guest runs.

    :param virt_driver: the LibvirtDriver
    :returns: an Outgoing, or None if the instance migrates another way
    :raises: InstanceFaultRollback
    """
    disks = metadata.InstanceDisks.from_block_device_info(
        instance, block_device_info or {})
    if not is_pool_backed(disks, block_device_info):
        return None
    migration = objects.Migration.get_by_id_and_instance(
        context, instance.migration_context.migration_id, instance.uuid)
    outgoing = Outgoing(
        context, virt_driver._host, virt_driver.job_tracker, instance,
        migration, disks, virt_driver._uri(),
        migration.dest_compute == CONF.host)
    outgoing.check()
    return outgoing


class _Disk:
    """One disk on its way.

    :ivar record: its record on this host, None for a base image
    :ivar source: its StorageVolume, None if it isn't copied
    :ivar length: bytes of that (physical, not virtual)
    :ivar allocation: bytes which that takes up
    :ivar pool: the destination's StoragePool
    :ivar target: the volume's name there
    :ivar done: bytes copied
    """

    def __init__(self, name, record, source, pool):
        self.name = name
        self.record = record
        self.pool = pool
        self.source = source
        self.length = self.allocation = self.done = 0
        if source:
            self.measure()
        self.target = None
        self.sparse = True
        self.result = None

    def measure(self):
        self.length = self.source.physical()
        self.allocation = min(self.source.info().allocation, self.length)


class Outgoing:
    """An instance's disks on their way out of this host.

    :param host: the Host of this compute
    :param job_tracker: the driver's InstanceJobTracker: a copy ends when the
        server is deleted
    :param disks: the instance's InstanceDisks
    :param local_uri: URI of this host's libvirt
    :param same_host: whether destination and source are one compute
    """

    def __init__(self, context, host, job_tracker, instance, migration, disks,
                 local_uri, same_host):
        self.context = context
        self.host = host
        self.job_tracker = job_tracker
        self.instance = instance
        self.migration = migration
        self.disks = disks
        self.local_uri = local_uri
        self.same_host = same_host
        self.uri = None
        self._owner = None
        self._peer = None
        self._exit = contextlib.ExitStack()
        self._disks = []
        self._shared = {}
        self._failed = False
        self._lock = threading.Lock()
        self._reported = None

    # What can be checked while the guest runs

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._exit.close()

    def check(self):
        """Check all that can be known before the guest is powered off.

        Leaves the connection to the peer open: what follows stands in a
        with statement over this object.

        :raises: InstanceFaultRollback; the guest runs on
        """
        if not self.disks.items():
            return
        try:
            with contextlib.ExitStack() as stack:
                self._check_versions()
                pools = self._get_offer()
                self._connect(stack)
                self._look_at_disks(pools)
                self._check_room()
                self._exit = stack.pop_all()
        except exception.NovaException as e:
            if isinstance(e, exception.InstanceFaultRollback):
                raise
            raise exception.InstanceFaultRollback(e)

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

    def _get_offer(self):
        """Return the destination's pool by kind of disk."""
        value = self.instance.system_metadata.get(arrival.OFFER)
        offered = jsonutils.loads(value) if value else {}
        if offered.get('m') != self.migration.id:
            raise _refused(
                _("host %s has made no offer for this server's volumes; its "
                  "compute service must be upgraded, or try again") %
                self.migration.dest_compute)
        self._owner = offered['o']
        return {kind: pool for pool, kinds in offered['p'].items()
                for kind in kinds}

    def _connect(self, stack):
        if self.same_host:
            self.uri = self.local_uri
            self._peer = self.host.get_connection()
            return
        self.uri = peer.uri_of(self.migration.dest_host)
        self._peer = stack.enter_context(
            peer.connected(self.host, self.uri))

    def _look_at_disks(self, offered):
        local = self.host.get_connection()
        dest = self.migration.dest_compute
        self._disks = []
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
            if arrival.kind_of(name) not in offered:
                raise _refused(
                    _("host %(host)s offers storage pools for %(offered)s "
                      "and none for %(kind)s; try again") % {
                          'host': dest, 'kind': name,
                          'offered': ', '.join(sorted(offered))})
            here = storage_pool.StoragePool(local, record.pool, CONF.host)
            there = storage_pool.StoragePool(
                self._peer, offered[arrival.kind_of(name)], dest)
            pool_type = arrival.check_pool(there)
            copied = arrival.is_copied(name)
            disk = _Disk(name, record,
                         here.volume(record.volume) if copied else None,
                         there)
            disk.sparse = pool_type in arrival.FILE_POOLS
            if copied and record.format == fields.LibvirtDiskFormat.QCOW2:
                _check_base(disk.source)
            self._probe(here, there)
            self._disks.append(disk)
        self._look_at_base(offered)

    def _look_at_base(self, offered):
        if self.same_host:
            return
        there = storage_pool.StoragePool(
            self._peer, offered[storage_base.NAME],
            self.migration.dest_compute)
        volume = storage_base.find(
            self.context, self.instance, self.disks,
            storage_base.pool(self.host.get_connection()), there)
        if volume is not None:
            arrival.check_pool(there)
            disk = _Disk(storage_base.NAME, None, volume, there)
            disk.target = storage_base.name_on_the_way(self.instance)
            self._disks.append(disk)

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
        config.name = 'nova-probe-' + uuidutils.generate_uuid()
        config.capacity = units.Mi
        config.allocation = 0
        config.target_format = fields.LibvirtDiskFormat.RAW
        with contextlib.ExitStack() as stack:
            ours = here.create(config)
            stack.callback(arrival.delete_volume, ours, self.instance)
            try:
                theirs = there.create(config)
            except exception.NovaException:
                # Taken, or something is wrong with that pool: without our
                # volume it must be possible.
                stack.close()
                arrival.delete_volume(there.create(config), self.instance)
                self._shared[key] = True
            else:
                arrival.delete_volume(theirs, self.instance)
                self._shared[key] = False
        LOG.debug('Storage pool %(here)s and pool %(there)s of host %(host)s '
                  'are the same: %(same)s',
                  {'here': here.name, 'there': there.name, 'host': there.host,
                   'same': self._shared[key]}, instance=self.instance)

    def _check_room(self):
        needed = {}
        for disk in self._disks:
            pool, total = needed.get(disk.pool.name, (disk.pool, 0))
            # What isn't sparse there takes up its whole length.
            total += disk.allocation if disk.sparse else disk.length
            needed[disk.pool.name] = (pool, total)
        for pool, total in needed.values():
            available = pool.info().available
            if total > available:
                # libvirt measures at a refresh; since then somebody may have
                # made room.
                pool.refresh()
                available = pool.info().available
            if total > available:
                raise _refused(
                    _("storage pool %(pool)s of host %(host)s has "
                      "%(available)d bytes available and %(total)d are "
                      "needed; make room there or choose another host") % {
                          'pool': pool.name, 'host': pool.host,
                          'available': available, 'total': total})

    # With the guest off

    def run(self):
        """Copy the disks.

        On failure the records are as they were and what was made on the
        destination is gone, or an error is in the log.

        :returns: what finish_migration gets as disk_info
        :raises: StorageTransferError and others
        """
        self._flatten_generated()
        with contextlib.ExitStack() as undo:
            for disk in self._disks:
                if disk.record:
                    disk.target = self._free_name(disk.pool, disk.name)
            # Pushed first, so done last: until the volumes are gone the
            # records say where they are.
            undo.callback(_restore, self.disks, self.context, self.instance)
            self._save_building()
            created = []
            undo.callback(self._delete_created, created)
            for disk in self._disks:
                if disk.source:
                    self._create(disk)
                    created.append((disk.pool.name, disk.target))
            self._copy_all()
            self._save_expectations()
            undo.pop_all()
        return jsonutils.dumps([])

    def _flatten_generated(self):
        """Let overlays go that are over anything but the server's image.

        A legacy ephemeral or swap disk is an overlay over a file system that
        this host has generated. The destination would generate another one,
        with another UUID.
        """
        for disk in self._disks:
            if (not disk.record or not disk.source or disk.name == 'disk' or
                    disk.record.format != fields.LibvirtDiskFormat.QCOW2):
                continue
            path = disk.source.path
            info = images.privileged_qemu_img_info(
                path, format=fields.LibvirtDiskFormat.QCOW2)
            if info.backing_file:
                nova.privsep.qemu.flatten_image(
                    path, fields.LibvirtDiskFormat.QCOW2)
                disk.measure()

    def _free_name(self, pool, disk_name):
        """A name that nothing has: what exists there is never touched."""
        wanted = name = '%s_%s' % (self.instance.uuid, disk_name)
        suffix = 0
        while True:
            try:
                pool.volume(name)
            except exception.StorageVolumeNotFound:
                return name
            suffix += 1
            name = '%s.%d' % (wanted, suffix)

    def _save_building(self):
        for disk in self._disks:
            if not disk.record:
                continue
            record = disk.record.obj_clone()
            record.previous = disk.record.obj_clone()
            record.previous.previous = None
            record.host = self.migration.dest_compute
            record.pool, record.volume = disk.pool.name, disk.target
            record.state = fields.LibvirtDiskState.BUILDING
            self.disks.set(disk.name, record)
        self.disks.save(self.context)

    def _create(self, disk):
        config = storage_config.LibvirtConfigStorageVolume()
        config.name = disk.target
        # The bytes of a file, whatever its format is.
        config.capacity = disk.length
        config.allocation = 0
        config.target_format = fields.LibvirtDiskFormat.RAW
        # Nova's user there may be another number than here.
        config.permissions = storage_config.LibvirtConfigStoragePermissions()
        config.permissions.mode = 0o644
        config.permissions.owner, config.permissions.group = self._owner
        return disk.pool.create(config)

    def _delete_created(self, created):
        _delete_at_peer(self._peer, self.host, self.instance, self.migration,
                        created)

    def _copy_all(self):
        """Copy several disks at a time; the first error ends the others."""
        waiting = [disk for disk in self._disks if disk.source]
        total = sum(disk.length for disk in waiting)
        start = self._reported = time.monotonic()
        errors = []

        def work():
            while True:
                with self._lock:
                    if not waiting or errors:
                        return
                    disk = waiting.pop(0)
                try:
                    self._copy(disk)
                except Exception as e:
                    with self._lock:
                        errors.append(e)

        def report(total=total):
            self._report(total, start)

        self._tick = report
        self._cancelled = lambda: bool(errors)
        parallel = min(CONF.libvirt.storage_migration_parallel_disks,
                       len(waiting))
        futures = [thread_pool_factory.spawn(work)
                   for _n in range(parallel - 1)]
        work()
        for future in futures:
            future.result()
        if errors:
            raise errors[0]
        self._report(total, start, last=True)

    def _copy(self, disk):
        def progress(done):
            disk.done = done
            self._tick()

        LOG.info('Copying volume %(volume)s (%(length)d bytes, %(allocation)d '
                 'allocated) to pool %(pool)s at %(uri)s as %(target)s',
                 {'volume': disk.source.name, 'length': disk.length,
                  'allocation': disk.allocation, 'pool': disk.pool.name,
                  'uri': self.uri, 'target': disk.target},
                 instance=self.instance)
        disk.result = pump.copy(
            pump.Volume(self.local_uri, disk.source.pool.name,
                        disk.source.name),
            pump.Volume(self.uri, disk.pool.name, disk.target), disk.length,
            sparse=disk.sparse,
            bandwidth=CONF.libvirt.storage_migration_bandwidth * units.Mi,
            stall_timeout=CONF.libvirt.storage_migration_stall_timeout,
            progress=progress, cancelled=self._cancelled,
            on_start=lambda pid: self.job_tracker.add_job(self.instance, pid),
            on_end=lambda pid: self.job_tracker.remove_job(self.instance, pid))
        progress(disk.length)
        LOG.info('Copied volume %(volume)s: %(data)d bytes of data in '
                 '%(seconds).1f s, %(rate).1f MiB/s',
                 {'volume': disk.source.name, 'data': disk.result.data,
                  'seconds': disk.result.seconds,
                  'rate': (disk.result.data / units.Mi /
                           max(disk.result.seconds, 0.001))},
                 instance=self.instance)

    def _report(self, total, start, last=False):
        """Say how far it is, where users and operators look for it."""
        now = time.monotonic()
        with self._lock:
            if not last and now - self._reported < _REPORT_INTERVAL:
                return
            self._reported = now
        done = sum(disk.done for disk in self._disks)
        rate = done / units.Mi / max(now - start, 0.001)
        LOG.info('Copied %(done)d of %(total)d bytes of the disks, '
                 '%(rate).1f MiB/s (holes included)',
                 {'done': done, 'total': total, 'rate': rate},
                 instance=self.instance)
        self.instance.progress = round(done * 100 / total) if total else 100
        self.instance.save()
        self.migration.disk_total = total
        self.migration.disk_processed = done
        self.migration.disk_remaining = total - done
        self.migration.save()

    def _save_expectations(self):
        """Let the destination know what it must find."""
        for disk in self._disks:
            if disk.source:
                self.instance.system_metadata[arrival.COPY + disk.name] = (
                    jsonutils.dumps({'length': disk.length,
                                     'checksum': disk.result.checksum,
                                     'key': disk.result.key}))
        self.instance.system_metadata.pop(arrival.OFFER, None)
        self.instance.system_metadata[arrival.MOVED] = str(self.migration.id)
        self.instance.save()


def _check_base(volume):
    """Refuse an overlay over something that Nova hasn't put there."""
    backing_store = volume.config().backing_store
    cache_dir = imagecache.ImageCacheManager().cache_dir
    if (backing_store is not None and
            os.path.dirname(backing_store.path) != cache_dir):
        raise _refused(
            _("volume %(volume)s depends on %(file)s, which is not in the "
              "image cache %(cache)s") % {
                  'volume': volume.name, 'file': backing_store.path,
                  'cache': cache_dir})


# The end of it, either way

def _restore(disks, context, instance):
    """Make the source's copies the disks again."""
    for name, record in disks.items():
        if record.previous is not None and record.previous.host == CONF.host:
            disks.set(name, record.previous)
    disks.save(context)
    for key in list(instance.system_metadata):
        if key.startswith((arrival.OFFER, arrival.COPY, arrival.MOVED)):
            del instance.system_metadata[key]
    instance.save()


def abandon(context, host, instance, migration, disks):
    """On the source: make its volumes the disks again.

    After a revert the destination has deleted its volumes. Those of a copy
    that was cut off by a crash of this compute are deleted from here.

    :param migration: the Migration, which says where the destination is
    :param disks: the instance's InstanceDisks
    """
    # After a revert the records are the source's again, unless the
    # destination took its disks for shared because its directory is.
    places = [(record.pool, record.volume)
              for name, record in disks.items()
              if arrival.is_copied(name) and record.previous is not None and
              record.previous.host == CONF.host]
    if places:
        _delete_at_peer(None, host, instance, migration, places)
        _restore(disks, context, instance)
    elif instance.system_metadata.pop(arrival.MOVED, None):
        instance.save()


def _delete_at_peer(connection, host, instance, migration, places):
    """Delete the destination's volumes of a move that has failed.

    What can't be deleted is noted, for the destination's next offer.

    :param connection: to the destination's libvirt, which may have been cut
        by what made the move fail; None if there is none
    :param places: list of (pool, volume)
    """
    if not places:
        return
    dest = migration.dest_compute
    if dest == CONF.host:
        connection = host.get_connection()
    if connection is not None:
        places = arrival.delete_volumes(connection, dest, places, instance)
    if places and dest != CONF.host:
        try:
            with peer.connected(
                    host, peer.uri_of(migration.dest_host)) as connection:
                places = arrival.delete_volumes(connection, dest, places,
                                                instance)
        except exception.NovaException as e:
            LOG.error('%s', e, instance=instance)
    for place in places:
        LOG.error('Volume %(volume)s is left over in storage pool %(pool)s of '
                  'host %(host)s; it goes when this server is sent to that '
                  'host again, or must be deleted there',
                  {'volume': place[1], 'pool': place[0], 'host': dest},
                  instance=instance)
        instance.system_metadata[
            arrival.LEFT + uuidutils.generate_uuid()[:8]] = (
                jsonutils.dumps([dest, *place]))


def confirm(context, connection, instance):
    """On the source: delete the copies that were kept for a revert.

    Only those whose successors the destination has found to be whole.
    """
    if not instance.system_metadata.pop(arrival.MOVED, None):
        return
    disks = metadata.InstanceDisks.load(context, instance)
    for name, record in disks.items():
        previous = record.previous
        if previous is None or previous.host != CONF.host:
            continue
        if record.is_building and arrival.is_copied(name):
            LOG.error('Volume %(volume)s in pool %(pool)s is kept, as its '
                      'copy on host %(host)s was not verified',
                      {'volume': previous.volume, 'pool': previous.pool,
                       'host': record.host}, instance=instance)
            continue
        if arrival.delete_volumes(
                connection, CONF.host, [(previous.pool, previous.volume)],
                instance):
            continue
        record.previous = None
        disks.set(name, record)
    disks.save(context)


def kept(disks):
    """Return what must stay when a revert deletes this host's volumes.

    :returns: set of (pool, volume). In a pool which both hosts use, or on
        one and the same host, that is the copy to which is reverted; in
        distinct pools old and new have one name.
    """
    records = [record for _name, record in disks.items()]
    return ({(r.previous.pool, r.previous.volume) for r in records
             if r.previous is not None} -
            {(r.pool, r.volume) for r in records})
