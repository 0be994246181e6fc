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
"""What the destination of a live migration offers for pool disks.

It goes to the source with the migration's data, which both ends get back
until the migration has ended.
"""

import os

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage.move import state
from nova.virt.libvirt.storage.pool import kinds as pool_kinds
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import sharing
from nova.virt.libvirt.storage.records import kinds

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


def make(connection, instance, disks, address) -> dict:
    """Say which pools of this host take an instance's disks.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks
    :param address: under which the source reaches this host's libvirt
    :returns: fields of LibvirtLiveMigrateData; none if the disks stay files
    :raises: exception.MigrationPreCheckError if pool disks are to come and
        their pool isn't fit for them
    """
    records = [record for _name, record in disks.items()]
    must_come = any(record.is_in_pool for record in records)
    takes_legacy = CONF.libvirt.images_type == 'libvirt-storage'
    if not must_come and not takes_legacy:
        return {}
    pools = {kind: setup.pool_name_for(kind) for kind in (
        {kinds.of(name) for name, _record in disks.items()} or kinds.ALL)}
    # Of an instance without records the source finds out what it has.
    has_files = not records or not all(
        record.is_in_pool for record in records)
    probes: list[list[str]] = []
    try:
        taking = {name: _checked(connection, name)
                  for name in set(pools.values())}
        probes = sharing.make_probes(
            connection, instance.uuid, disks, pool_names=set(taking))
        by_pool = _by_pool(taking, probes)
        takes_links = (takes_legacy and has_files and
                       _takes_links(taking, by_pool))
    except exception.NovaException as e:
        sharing.remove_probes(connection, probes)
        if must_come:
            # Of others, no other host would be tried.
            raise exception.MigrationPreCheckError(
                reason=e.kwargs.get('reason') if isinstance(
                    e, exception.MigrationPreCheckError)
                else e.format_message()) from e
        LOG.warning('The disks stay outside of the storage pools of this '
                    'host: %s', e, instance=instance)
        return {}
    return {'dst_storage_pools': pools, 'dst_storage_probes': by_pool,
            'dst_storage_address': address, 'dst_takes_legacy': takes_legacy,
            'dst_takes_links': takes_links}


def _by_pool(pools, probes):
    """What tells the source that one of its pools is one of this host."""
    by_pool: dict[str, list[str]] = {}
    for pool_name, probe in probes:
        by_pool.setdefault(pool_name, []).append(probe)
    for name, pool in pools.items():
        ceph = state.ceph_of(pool)
        if ceph is not None:
            # It needs no probe: that it is the same, its identity says.
            by_pool[name] = [ceph]
    return by_pool


def _takes_links(pools, probes):
    """Whether a file of instances_path can be a volume of each pool as well.

    The other way round it is the same: a probe gets a second name there.
    """
    for name, pool in pools.items():
        if pool.directory() is None or not probes.get(name):
            return False
        second = os.path.join(CONF.instances_path, probes[name][0])
        try:
            os.link(pool.volume(probes[name][0]).path, second)
            os.unlink(second)
        except (OSError, exception.NovaException) as e:
            LOG.debug('Storage pool %(pool)s takes no hard links from '
                      '%(directory)s: %(error)s', {
                          'pool': name, 'error': e,
                          'directory': CONF.instances_path})
            return False
    return True


def _checked(connection, name):
    pool = setup.receiving_pool(connection, name, CONF.host)
    pool_type = state.check_pool(pool)
    if pool_type not in pool_kinds.LIVE_TYPES:
        raise exception.MigrationPreCheckError(reason=_(
            "name a pool of one of the types %(types)s in nova.conf: storage "
            "pool %(pool)s of host %(host)s is of type %(type)s, into which "
            "a running server's disks can't go") % {
                'pool': name, 'host': CONF.host, 'type': pool_type,
                'types': ', '.join(pool_kinds.LIVE_TYPES)})
    return pool


def withdraw(connection, data) -> None:
    """Remove what make() has made for the source to look for.

    :param connection: this host's libvirt
    :param data: the LibvirtLiveMigrateData that the source was sent
    """
    if 'dst_storage_probes' in data:
        sharing.remove_probes(connection, [
            (pool, probe) for pool, probes in data.dst_storage_probes.items()
            for probe in probes])
