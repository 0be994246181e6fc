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
"""

import os

from oslo_log import log as logging

from nova.compute import task_states
import nova.conf
from nova import exception
from nova.objects import fields
from nova.virt.libvirt.storage import dmcrypt
from nova.virt.libvirt.storage import lvm
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

_LVM = fields.LibvirtDiskBackend.LVM
_RBD = fields.LibvirtDiskBackend.RBD


def delete(connection, image_backend, instance, disks) -> bool:
    """Delete such disks of an instance on this host.

    :param connection: this host's libvirt
    :param image_backend: the Backend of nova.virt.libvirt.imagebackend
    :param disks: the instance's InstanceDisks
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
                # It tries again while somebody looks at the image.
                image.driver.cleanup_volumes(image.rbd_name.__eq__)
            else:
                image.discard()
        except Exception as e:
            LOG.error('Disk %(name)s of image backend %(backend)s stays, '
                      'which [libvirt]/images_type named when it was made: '
                      '%(error)s', {'name': name, 'backend': record.backend,
                                    'error': e}, instance=instance)
            is_gone = False
    return _delete_logical_volumes(connection, instance) and is_gone


def _delete_logical_volumes(connection, instance):
    """Delete those that have the name of an instance's disks.

    Where a pool shows them they go with its volumes.
    """
    group = CONF.libvirt.images_volume_group
    directory = os.path.join('/dev', group or '')
    if (not group or CONF.libvirt.images_type == _LVM or
            not os.path.exists(directory) or
            instance.task_state == task_states.RESIZE_REVERTING):
        return True
    try:
        if _has_pool_over(connection, group):
            return True
        names = [name for name in lvm.list_volumes(group)
                 if name.startswith('%s_' % instance.uuid)]
        if instance.ephemeral_key_uuid is not None:
            for name in names:
                dmcrypt.delete_volume(dmcrypt.volume_name(name))
        lvm.remove_volumes([os.path.join(directory, name) for name in names])
    except Exception as e:
        LOG.error('Logical volumes of the instance may be left in volume '
                  'group %(group)s, which [libvirt]/images_volume_group '
                  'names: %(error)s', {'group': group, 'error': e},
                  instance=instance)
        return False
    return True


def _has_pool_over(connection, group):
    try:
        pools = storage_pool.list_pools(connection, CONF.host)
    except exception.StoragePoolError:
        return False  # This libvirt may have no storage driver.
    return any(pool.kind().is_volume_group and
               pool.config().source.name == group for pool in pools)
