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

"""Whether what one host sees in its pools is what another one sees in its own.

What is shared can't be read off a pool's XML: a directory may be a mount. So a
volume is made on one side and looked for on the other.
"""

import re
import typing as ty

from oslo_utils import units
from oslo_utils import uuidutils

import nova.conf
from nova import exception
from nova.objects import fields
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup

CONF = nova.conf.CONF


_NAME = re.compile(r'.+_probe\.[0-9a-f]{32}')


def is_probe(name: str) -> bool:
    """Whether a volume was made to find out what is shared, by its name."""
    return _NAME.fullmatch(name) is not None


def probe_name(instance_uuid: str) -> str:
    """A name that no other probe has.

    A probe that is left over goes with the instance's volumes.

    :param instance_uuid: UUID of the instance that it is made for
    """
    return '%s_probe.%s' % (
        instance_uuid, uuidutils.generate_uuid(dashed=False))


def _probe_config(instance_uuid):
    return _named_probe_config(probe_name(instance_uuid))


def _named_probe_config(name):
    config = storage_config.LibvirtConfigStorageVolume()
    config.name = name
    config.capacity = units.Mi
    config.allocation = 0
    config.target_format = fields.LibvirtDiskFormat.RAW
    return config


def is_same(here, there, instance) -> bool:
    """Whether two pools, to both of which there is a connection, are one.

    :param here: StoragePool of one host
    :param there: StoragePool of another one
    :param instance: whose prefix the volumes get
    :raises: see is_seen()
    """
    return is_seen(here, lambda name: take_probe(there, name, instance),
                   instance)


def is_seen(here, take: ty.Callable[[str], ty.Any], instance) -> bool:
    """Whether another host's pool is one with a pool of this host.

    A volume is made here, then one of that name there. A pool which has the
    file already refuses to make it; asking it for the volume instead would
    take a refresh, which reads every file of a pool.

    :param here: StoragePool of this host
    :param take: does what take_probe() does, in the other host's pool
    :param instance: whose prefix the volumes get
    :raises: exception.StorageVolumeError, exception.StoragePoolError if a
        pool takes no volumes at all
    """
    config = _probe_config(instance.uuid)
    ours = here.create(config)
    try:
        take(config.name)
    except exception.NovaException:
        pass
    else:
        return False
    finally:
        ownership.delete_volume(ours, instance)
    # The name was taken, or something is wrong with that pool: without our
    # volume it must be possible.
    take(config.name)
    return True


def take_probe(pool, name: str, instance) -> None:
    """Make a probe in a pool, and delete it.

    :param pool: StoragePool
    :param name: of another host's probe
    :raises: exception.StorageVolumeError, exception.StoragePoolError
    """
    ownership.delete_volume(
        pool.create(_named_probe_config(name)), instance)


def make_probes(connection, instance_uuid, disks=None,
                pool_names: ty.Collection[str] | None = None
                ) -> list[list[str]]:
    """Make a volume in each pool from which an instance's would be deleted.

    :param connection: to this host's libvirt
    :param instance_uuid: UUID of the instance that it is about
    :param disks: its InstanceDisks, if they are known
    :param pool_names: of those that matter, where nothing is to be deleted
    :returns: a list of [pool name, volume name], for :func:`find_probes` on
        the other host and :func:`remove_probes` on this one
    :raises: exception.StorageVolumeError, exception.StoragePoolError if one
        of the pools takes no volumes, so that nothing may be deleted
    """
    probes: list[list[str]] = []
    configured = setup.pool_names()
    try:
        for place in _distinct(
                place for place in ownership.places(connection, disks)
                if pool_names is None or place.pool.name in pool_names):
            if place.pool.name in configured or place.is_on_record:
                if not place.pool.exists():
                    continue
                place.pool.start()
            elif not place.volumes(instance_uuid):
                continue  # it is somebody else's pool
            probe = place.pool.create(_probe_config(instance_uuid))
            probes.append([place.pool.name, probe.name])
    except exception.NovaException:
        remove_probes(connection, probes)
        raise
    return probes


def find_probes(connection, probes, has_to_see: bool = True) -> bool:
    """Whether this host sees any volume which another one has made.

    Then deleting a volume there would delete it here.

    :param connection: to this host's libvirt
    :param probes: what :func:`make_probes` has returned on the other host
    :param has_to_see: whether this host keeps disks in its pools; else one
        that is off is passed over
    :raises: exception.StoragePoolError if one of the pools can't be started,
        or isn't mounted: nothing tells what would be seen in it
    """
    names = {name for _pool, name in probes or ()}
    if not names:
        return False
    there = [place for place in _distinct(ownership.places(connection))
             if place.is_there()]
    for place in there:
        if has_to_see and place.is_configured:
            place.pool.start()
            place.pool.check_mounted()
    return any(names & place.pool.file_names() for place in there)


def _distinct(places):
    """The pools that two hosts may or may not share.

    A Ceph pool is known for what it is; no disk there is deleted because an
    instance has left a host.
    """
    for place in places:
        if not place.pool.exists() or not place.pool.kind().is_ceph:
            yield place


def remove_probes(connection, probes) -> None:
    """Remove the volumes which :func:`make_probes` has made on this host."""
    for pool_name, name in probes:
        pool = storage_pool.StoragePool(connection, pool_name, CONF.host)
        if not pool.exists() or not pool.kind().is_ceph:
            ownership.delete_named(pool, name)
