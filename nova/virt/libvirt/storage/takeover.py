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

"""Disks of ``images_type = rbd`` become disks of storage pools, and back.

Both are images of one Ceph pool under one name: nothing but the record
changes, and a guest that runs needn't know.
"""

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.objects import fields
from nova.storage import rbd_utils
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

RBD = fields.LibvirtDiskBackend.RBD
LIBVIRT_STORAGE_RBD = fields.LibvirtDiskBackend.LIBVIRT_STORAGE_RBD


def take_over(connection, disks: metadata.InstanceDisks) -> bool:
    """Have an instance's disks on record as what this host makes them now.

    All of those that are on Ceph, or none. A failure is logged, and the disks
    stay what they are; so do those of a move that may be reverted yet. Beside
    what it was before, an image under another backend looks like a copy.

    :param connection: this host's libvirt
    :param disks: the instance's InstanceDisks; the caller saves them
    :returns: whether that has changed a record
    """
    if any(record.previous is not None for _name, record in disks.items()):
        return False
    try:
        if CONF.libvirt.images_type == 'libvirt-storage':
            changed = _into_pools(connection, disks)
        elif CONF.libvirt.images_type == 'rbd':
            changed = _out_of_pools(connection, disks)
        else:
            return False
    except (exception.NovaException, RuntimeError) as e:
        LOG.warning('The disks on Ceph stay on record as they are: %s', e,
                    instance=disks.instance)
        return False
    for name, record in changed.items():
        LOG.info('Disk %(name)s is on record as %(backend)s now',
                 {'name': name, 'backend': record.backend},
                 instance=disks.instance)
        disks.set(name, record)
    return bool(changed)


def _into_pools(connection, disks):
    changed = {}
    for name, record in _of_backend(disks, RBD):
        pool = setup.pool_of(connection, name)
        ceph = pool.ceph() if pool.exists() else None
        if ceph is None or ceph.identity != _legacy_identity():
            LOG.info('Disk %(name)s stays outside of the storage pools: pool '
                     '%(pool)s of this host is not over the Ceph pool '
                     '%(ceph)s that it is in',
                     {'name': name, 'pool': pool.name,
                      'ceph': CONF.libvirt.images_rbd_pool},
                     instance=disks.instance)
            return {}
        record.pool, record.volume = pool.name, _name(disks, name)
        pool.volume(record.volume)
        record.backend = LIBVIRT_STORAGE_RBD
        changed[name] = record
    return changed


def _out_of_pools(connection, disks):
    changed = {}
    for name, record in _of_backend(disks, LIBVIRT_STORAGE_RBD):
        pool = setup.pool_named(connection, record.pool)
        ceph = pool.ceph()
        if ceph is None or ceph.identity != _legacy_identity() or (
                record.volume != _name(disks, name)):
            # It goes on as it is: the record says how.
            return {}
        record.backend, record.pool, record.volume = RBD, None, None
        changed[name] = record
    return changed


def _of_backend(disks, backend):
    """Name and a copy of the record of a backend's disks on this host."""
    return [(name, record.obj_clone()) for name, record in disks.items()
            if record.backend == backend and record.host == CONF.host and
            not record.is_building and not name.endswith('.rescue')]


def _name(disks, disk_name):
    return '%s_%s' % (disks.instance.uuid, disk_name)


def _legacy_identity():
    """What CephPool.identity is of the pool of ``images_type = rbd``."""
    driver = rbd_utils.RBDDriver()
    return '%s/%s' % (driver.get_fsid(), driver.pool)
