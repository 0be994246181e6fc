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

"""Where the local disks of a cloud's instances are, by their records alone.

Reads the databases of the cells; asks no compute service and no libvirt.
"""

import collections
import dataclasses
import typing as ty

from oslo_log import log as logging
from oslo_serialization import jsonutils
import prettytable

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.objects import fields
from nova.virt.libvirt.storage.records import metadata

LOG = logging.getLogger(__name__)

# Records of so many instances are read at a time.
PAGE = 500

# So many instances are named in a warning.
SHOWN = 5

NO_RECORD = '-'
BROKEN = 'broken'


@dataclasses.dataclass(frozen=True, order=True)
class DiskLine:
    """One local disk, or one instance of whose disks nothing is on record.

    :ivar backend: backend on record, ``-`` without a record, ``broken`` where
        the record can't be read
    :ivar size: virtual size in bytes
    :ivar next: where it goes in a live migration: host, pool and volume
    """
    host: str
    instance_uuid: str
    disk: str
    backend: str
    format: str | None = None
    size: int | None = None
    pool: str | None = None
    volume: str | None = None
    state: str | None = None
    next: str | None = None

    @property
    def in_pool(self) -> bool:
        return self.backend in metadata.POOL_BACKENDS

    @property
    def is_raw_in_pool(self) -> bool:
        """Whether the guest writes the first bytes, and libvirt reads them."""
        return (self.backend == fields.LibvirtDiskBackend.LIBVIRT_STORAGE and
                self.format == fields.LibvirtDiskFormat.RAW)


def disks(context: 'nova_context.RequestContext',
          host: str | None = None) -> list[DiskLine]:
    """List the local disks of all instances that are on a host.

    :param context: an admin's context
    :param host: only this compute service's instances
    :returns: sorted by host, instance and disk
    :raises: exception.CellTimeout if a cell's database doesn't answer
    """
    lines = of_all_cells(context, _disks_of_cell, host)
    return sorted(lines, key=lambda line: (
        line.host, line.instance_uuid, line.disk))


def disks_of(context: 'nova_context.RequestContext',
             instance: 'objects.Instance') -> list[DiskLine]:
    """List the local disks of one instance.

    :param context: an admin's, of the instance's cell
    """
    bdms = objects.BlockDeviceMappingList.get_by_instance_uuid(
        context, instance.uuid)
    return list(_disks_of_instance(instance, bdms))


def of_all_cells(context: 'nova_context.RequestContext',
                 function: ty.Callable, *args) -> list:
    """Put what a function finds in each cell into one list, or nothing.

    :param function: takes the context of a cell and args
    :raises: exception.CellTimeout if a cell's database doesn't answer
    """
    found = []
    for result in nova_context.scatter_gather_skip_cell0(
            context, function, *args).values():
        if result is nova_context.did_not_respond_sentinel:
            raise exception.CellTimeout()
        if nova_context.is_cell_failure_sentinel(result):
            raise result
        found.extend(result)
    return found


def by_host(lines: list[DiskLine]) -> dict[str, collections.Counter]:
    """Count each host's disks by backend; raw ones of a pool on their own."""
    counts: dict[str, collections.Counter] = {}
    for line in lines:
        kind = line.backend
        if line.is_raw_in_pool:
            kind += ', raw'
        counts.setdefault(line.host, collections.Counter())[kind] += 1
    return counts


def legacy_instances(lines: list[DiskLine]) -> list[str]:
    """UUIDs of the instances that have a disk outside of a storage pool."""
    return sorted({
        line.instance_uuid for line in lines if not line.in_pool})


def half_way(lines: list[DiskLine], hosts: set[str]) -> list[str]:
    """UUIDs of the instances whose disks are to come into pools.

    :param hosts: those that keep new disks in storage pools
    """
    return legacy_instances([line for line in lines if line.host in hosts])


def warn_of_legacy_disks(context: 'nova_context.RequestContext',
                         instances: list['objects.Instance']) -> None:
    """Log once how many of a host's instances have a disk outside its pools.

    :param instances: all instances of the host
    """
    mappings = objects.BlockDeviceMappingList.bdms_by_instance_uuid(
        context, [i.uuid for i in instances if not i.deleted])
    legacy = legacy_instances([
        line for instance in instances if not instance.deleted
        for line in _disks_of_instance(
            instance, mappings.get(instance.uuid, []))])
    if legacy:
        LOG.warning(
            '%(count)d of the instances on this host have local disks outside '
            'of storage pools: %(uuids)s%(more)s. A hard reboot, a resize or '
            'a cold migration moves their disks into the pools. nova-manage '
            'libvirt list_disks lists them all.',
            {'count': len(legacy), 'uuids': ', '.join(legacy[:SHOWN]),
             'more': ' ...' if len(legacy) > SHOWN else ''})


def as_json(lines: list[DiskLine]) -> str:
    return jsonutils.dumps([dataclasses.asdict(line) for line in lines])


def as_tables(lines: list[DiskLine]) -> str:
    """Two tables for an operator: each disk, then the sums of each host."""
    columns = [field.name for field in dataclasses.fields(DiskLine)]
    detail = prettytable.PrettyTable(columns)
    detail.align = 'l'
    for line in lines:
        detail.add_row(['' if value is None else value
                        for value in dataclasses.astuple(line)])
    counts = by_host(lines)
    backends = sorted({backend for c in counts.values() for backend in c})
    sums = prettytable.PrettyTable(['host', *backends])
    sums.align = 'l'
    for host in sorted(counts):
        sums.add_row([host, *(counts[host][b] for b in backends)])
    return '%s\n%s' % (detail, sums)


def _disks_of_cell(context, host) -> list[DiskLine]:
    filters = {'deleted': False}
    if host:
        filters['host'] = host
    lines: list[DiskLine] = []
    marker = None
    while True:
        instances = objects.InstanceList.get_by_filters(
            context, filters, expected_attrs=[], limit=PAGE, marker=marker,
            sort_keys=['uuid'], sort_dirs=['asc'])
        if not instances:
            return lines
        marker = instances[-1].uuid
        placed = [i for i in instances if i.host]
        mappings = objects.BlockDeviceMappingList.bdms_by_instance_uuid(
            context, [i.uuid for i in placed])
        for instance in placed:
            lines.extend(_disks_of_instance(
                instance, mappings.get(instance.uuid, [])))


def _disks_of_instance(instance, bdms) -> ty.Iterator[DiskLine]:
    try:
        records = metadata.InstanceDisks.from_bdms(instance, bdms)
        found = list(records.items())
    except exception.InvalidDiskMetadata:
        yield DiskLine(instance.host, instance.uuid, '', BROKEN)
        return
    for name, record in found:
        if name.endswith('.rescue'):
            continue
        yield DiskLine(
            instance.host, instance.uuid, name, record.backend, record.format,
            record.size, record.pool, record.volume, record.state,
            record.next and '%s %s/%s' % (
                record.next.host, record.next.pool, record.next.volume))
    if not found and (instance.config_drive or any(
            bdm.source_type in ('image', 'blank') and
            bdm.destination_type == 'local' for bdm in bdms)):
        yield DiskLine(instance.host, instance.uuid, '', NO_RECORD)
