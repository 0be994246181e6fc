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

"""Removal of an instance's volumes, by name.

Who cleans up often has no block device mappings any longer, so what belongs
to an instance is told by the prefix of a volume's name.
"""

import re

from oslo_log import log as logging
from oslo_utils import units
from oslo_utils import uuidutils

import nova.conf
from nova import exception
from nova.objects import fields
from nova.virt.libvirt.storage.pool import config as storage_config
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import usage as storage_usage

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# E.g. disk.rescue, or disk.rescue.1 where that was taken
_RESCUE_NAME = re.compile(r'\.rescue(\.\d+)?$')


def has_pools(connection):
    """Whether a host has any pool in which it may keep disks.

    :param connection: Connection to the host's libvirt.
    """
    return any(storage_pool.StoragePool(connection, name, CONF.host).exists()
               for name in storage_usage.pool_names())


def has_volumes(connection, instance_uuid, ignored=()):
    """Whether an instance has volumes here, whoever has made them.

    :param connection: Connection to the host's libvirt.
    :param instance_uuid: UUID of the instance.
    :param ignored: (pool name, volume name) of those which don't count.
    """
    for name in storage_usage.pool_names():
        pool = storage_pool.StoragePool(connection, name, CONF.host)
        if pool.exists():
            # libvirt knows only files which it has made or looked for.
            pool.refresh()
    return any((volume.pool.name, volume.name) not in ignored
               for volume in get_volumes(connection, instance_uuid))


def get_volumes(connection, instance_uuid, rescue=False):
    """Return the volumes which belong to an instance.

    :param connection: Connection to the host's libvirt.
    :param instance_uuid: UUID of the instance.
    :param rescue: True for the disks of its rescue only.
    :return: An iterator over StorageVolume. A pool which does not exist has
        no volumes.
    :raises: exception.StoragePoolInactive, StoragePoolError
    """
    prefix = '%s_' % instance_uuid
    for name in storage_usage.pool_names():
        pool = storage_pool.StoragePool(connection, name, CONF.host)
        try:
            volumes = pool.volumes()
        except exception.StoragePoolNotFound:
            # Nobody has ever used pools here.
            continue
        for volume in volumes:
            if volume.name.startswith(prefix) and (
                    not rescue or _RESCUE_NAME.search(volume.name)):
                yield volume


def delete_volumes(connection, instance, rescue=False, keep=()):
    """Delete an instance's volumes on this host.

    :param connection: Connection to the host's libvirt.
    :param instance: The instance.
    :param rescue: True to delete the disks of its rescue only.
    :param keep: (pool name, volume name) of those which stay.
    :return: False if something is left and should be tried again.
    """
    complete = True
    try:
        for volume in get_volumes(connection, instance.uuid, rescue):
            if (volume.pool.name, volume.name) in keep:
                continue
            LOG.info('Deleting volume %(volume)s from storage pool %(pool)s',
                     {'volume': volume.name, 'pool': volume.pool.name},
                     instance=instance)
            try:
                volume.delete()
            except exception.NovaException as e:
                LOG.error('A volume of the instance is left and will be '
                          'deleted later: %s', e, instance=instance)
                complete = False
    except exception.NovaException as e:
        LOG.error('It is not known whether volumes of the instance are left; '
                  'it will be tried later: %s', e, instance=instance)
        complete = False
    return complete


def make_probes(connection, instance_uuid):
    """Make a volume in each pool, for another host to look for.

    :param connection: Connection to the host's libvirt.
    :param instance_uuid: UUID of the instance that it is about. Its prefix
        lets the volumes be found if they are left over.
    :return: A list of [pool name, volume name].
    """
    probes = []
    for name in storage_usage.pool_names():
        pool = storage_pool.StoragePool(connection, name, CONF.host)
        if not pool.exists():
            continue
        config = storage_config.LibvirtConfigStorageVolume()
        config.name = '%s_probe.%s' % (
            instance_uuid, uuidutils.generate_uuid(dashed=False))
        config.capacity = units.Mi
        config.allocation = 0
        config.target_format = fields.LibvirtDiskFormat.RAW
        pool.create(config)
        probes.append([name, config.name])
    return probes


def find_probes(connection, probes):
    """Whether this host sees any volume which another one has made.

    Then deleting a volume there would delete it here.

    :param connection: Connection to this host's libvirt.
    :param probes: What make_probes() has returned on the other host.
    """
    for pool_name in storage_usage.pool_names():
        pool = storage_pool.StoragePool(connection, pool_name, CONF.host)
        if not probes or not pool.exists():
            continue
        # libvirt knows only files which it has made or looked for.
        pool.refresh()
        names = {volume.name for volume in pool.volumes()}
        if any(name in names for _other_pool, name in probes):
            return True
    return False


def remove_probes(connection, probes):
    """Remove the volumes which make_probes() has made on this host."""
    for pool_name, name in probes:
        pool = storage_pool.StoragePool(connection, pool_name, CONF.host)
        try:
            pool.volume(name).delete()
        except exception.NovaException as e:
            LOG.warning('Volume %(volume)s of storage pool %(pool)s is left '
                        'over: %(error)s',
                        {'volume': name, 'pool': pool_name, 'error': e})
