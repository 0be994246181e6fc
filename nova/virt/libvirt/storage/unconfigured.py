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

"""Disks of image backends which images_type names no more.

The driver deletes logical volumes and images of Ceph if they are what it is
configured to make. Those of instances from before are known by their records.
Logical volumes are known by their names, too: one that can't be deleted loses
its record, and on a host that was evacuated the records are of another one.
So are images of a deleted instance.
"""

import os

from oslo_log import log as logging

from nova.compute import task_states
import nova.conf
from nova import exception
from nova.i18n import _
from nova.objects import fields
from nova.storage import rbd_utils
from nova.virt.libvirt.storage import dmcrypt
from nova.virt.libvirt.storage import lvm
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import setup

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

_LVM = fields.LibvirtDiskBackend.LVM
_RBD = fields.LibvirtDiskBackend.RBD


class _StillThere(Exception):
    """An image that Ceph hasn't deleted."""


def delete(get_connection, image_backend, instance, disks,
           has_pools: bool) -> bool:
    """Delete such disks of an instance on this host.

    :param get_connection: gives this host's libvirt, if that is needed
    :param image_backend: the Backend of nova.virt.libvirt.imagebackend
    :param disks: the instance's InstanceDisks
    :param has_pools: whether this host makes, or is known to have, pools
    :returns: False if something is left and should be tried again
    """
    try:
        others = [(name, record) for name, record in disks.items()
                  if record.backend in (_LVM, _RBD) and
                  record.backend != CONF.libvirt.images_type and
                  record.host == CONF.host]
    except exception.InvalidDiskMetadata as e:
        LOG.warning('%s', e, instance=instance)
        others = []
    if others and instance.task_state == task_states.RESIZE_REVERTING:
        return True  # the source goes on with them
    if any(record.backend == _RBD for _name, record in others) and (
            ownership.has_gone_with_images(instance)):
        others = [(name, record) for name, record in others
                  if record.backend != _RBD]
    is_gone = True
    for name, record in others:
        try:
            image = image_backend.by_name(
                instance, name, disk_info_mapping={'metadata': record})
            if not image.exists():
                continue
            if record.backend == _RBD:
                _delete_images(image.driver, [image.rbd_name])
            else:
                image.discard()
        except Exception as e:
            LOG.error('Disk %(name)s of image backend %(backend)s stays, '
                      'which [libvirt]/images_type named when it was made: '
                      '%(error)s', {'name': name, 'backend': record.backend,
                                    'error': e}, instance=instance)
            is_gone = False
    is_gone = _delete_images_of_deleted(
        get_connection, instance, disks, has_pools) and is_gone
    return _delete_logical_volumes(
        get_connection, instance, disks, has_pools) and is_gone


def _delete_images(driver, names):
    # It tries again while somebody looks at an image, and doesn't say so.
    driver.cleanup_volumes(names.__contains__)
    for name in names:
        if driver.exists(name):
            raise _StillThere(_(
                "it is open somewhere, or has snapshots; when rbd status and "
                "rbd snap ls show no more of that, delete it by rbd rm "
                "%(pool)s/%(image)s") % {
                    'pool': CONF.libvirt.images_rbd_pool, 'image': name})


def _delete_images_of_deleted(get_connection, instance, disks, has_pools):
    """Delete those that have the name of a deleted instance's disks.

    One that was busy has lost its record when it is tried again. Where a pool
    shows them they go with its volumes.
    """
    pool = CONF.libvirt.images_rbd_pool
    if ('deleted' not in instance or not instance.deleted or
            CONF.libvirt.images_type == _RBD or
            not CONF.libvirt.images_rbd_ceph_conf):
        return True
    try:
        if ownership.has_gone_with_images(instance) or _has_pool_over(
                get_connection(), _RBD, pool, disks, has_pools):
            return True
        driver = rbd_utils.RBDDriver()
        try:
            with rbd_utils.RADOSClient(driver) as client:
                names = [name for name in
                         rbd_utils.RbdProxy().list(client.ioctx)
                         if name.startswith('%s_' % instance.uuid)]
        except rbd_utils.rados.ObjectNotFound:
            return True  # images_rbd_pool has a default, and may not be there
        _delete_images(driver, names)
    except Exception as e:
        LOG.error('Images of the instance may be left in Ceph pool %(pool)s, '
                  'which [libvirt]/images_rbd_pool names: %(error)s',
                  {'pool': pool, 'error': e}, instance=instance)
        return False
    return True


def _delete_logical_volumes(get_connection, instance, disks, has_pools):
    """Delete those that have the name of an instance's disks.

    Where a pool shows them they go with its volumes, which is in vain while
    Nova's own encryption has them open.
    """
    group = CONF.libvirt.images_volume_group
    directory = os.path.join('/dev', group or '')
    if (not group or CONF.libvirt.images_type == _LVM or
            not os.path.exists(directory) or
            instance.task_state == task_states.RESIZE_REVERTING):
        return True
    try:
        names = [name for name in lvm.list_volumes(group)
                 if name.startswith('%s_' % instance.uuid)]
        if instance.ephemeral_key_uuid is not None:
            for name in names:
                dmcrypt.delete_volume(dmcrypt.volume_name(name))
        if not names or _has_pool_over(
                get_connection(), _LVM, group, disks, has_pools):
            return True
        kept = _of_other_hosts(instance, disks).intersection(names)
        if kept:
            LOG.warning('Another host has disks of the names of these logical '
                        'volumes, which stay; if it does not share the volume '
                        'group, delete them: lvremove %s', ' '.join(
                            '%s/%s' % (group, name) for name in sorted(kept)),
                        instance=instance)
        lvm.remove_volumes([os.path.join(directory, name)
                            for name in names if name not in kept])
    except Exception as e:
        LOG.error('Logical volumes of the instance may be left in volume '
                  'group %(group)s, which [libvirt]/images_volume_group '
                  'names: %(error)s', {'group': group, 'error': e},
                  instance=instance)
        return False
    return True


def _of_other_hosts(instance, disks):
    """Names of the logical volumes that are disks on another host.

    After an evacuation, where hosts share the volume group. An instance that
    is deleted has no disks anywhere.
    """
    if ('deleted' in instance and instance.deleted or
            instance.task_state == task_states.DELETING):
        return set()
    return {'%s_%s' % (instance.uuid, name) for name, record in disks.items()
            if record.backend == _LVM and record.host != CONF.host}


def _has_pool_over(connection, backend, source, disks, has_pools):
    """Whether one of ownership.places() shows what a backend makes.

    :param source: the volume group, or Ceph pool, that it makes it in
    """
    try:
        pools = storage_pool.list_pools(connection, CONF.host)
    except exception.StoragePoolError:
        if has_pools:
            raise
        return False  # This libvirt may have no storage driver.
    known = {*setup.pool_names(), *ownership.pools_on_record(disks)}

    def shows(pool):
        kind = pool.kind()
        is_such = kind.is_ceph if backend == _RBD else kind.is_volume_group
        return is_such and pool.config().source.name == source

    return any((pool.name in known or pool.is_active()) and shows(pool)
               for pool in pools)
