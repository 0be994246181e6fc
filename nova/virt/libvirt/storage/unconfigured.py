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
"""

from oslo_log import log as logging

from nova.compute import task_states
import nova.conf
from nova import exception
from nova.objects import fields
from nova.virt.libvirt.storage.pool import ownership

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

_LVM = fields.LibvirtDiskBackend.LVM
_RBD = fields.LibvirtDiskBackend.RBD


def delete(image_backend, instance, disks) -> bool:
    """Delete such disks of an instance on this host.

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
        return True
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
    return is_gone
