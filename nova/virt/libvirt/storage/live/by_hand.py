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
"""How an operator ends a live migration of which no service knows the end.

Its source was away when libvirt ended it: there is no guest on the source, and
whether there is one on the destination, only who looks there can say.
"""

from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import objects
from nova.virt.libvirt.storage.live import settle
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import metadata


def end(context: 'nova_context.RequestContext', instance_uuid: str,
        moved: bool) -> str:
    """Let an instance's disks be where an operator has found its guest.

    :param context: an admin's context
    :param moved: whether the guest is on the destination
    :returns: the host that the instance is on then
    :raises: exception.InstanceMappingNotFound, exception.InstanceNotFound,
        exception.NoMigrationToSettle, exception.ComputeHostNotFound,
        exception.InvalidDiskMetadata
    """
    mapping = objects.InstanceMapping.get_by_instance_uuid(
        context, instance_uuid)
    if mapping.cell_mapping is None:
        # It has never come to a host.
        raise exception.InstanceNotFound(instance_id=instance_uuid)
    with nova_context.target_cell(context, mapping.cell_mapping) as cell:
        instance = objects.Instance.get_by_uuid(cell, instance_uuid)
        if instance.task_state is not None:
            raise exception.NoMigrationToSettle(
                instance_uuid=instance_uuid,
                reason=_('its task state is %s') % instance.task_state)
        disks = metadata.InstanceDisks.load(cell, instance)
        moving = settle.going(disks)
        if not moving:
            raise exception.NoMigrationToSettle(
                instance_uuid=instance_uuid,
                reason=_('it has no disk on its way to another host'))
        if not moved:
            evacuation.forget_next(disks)
            disks.save(cell)
            return instance.host
        host = moving[0][1].next.host
        node = objects.ComputeNode.get_first_node_by_host_for_old_compat(
            cell, host)
        settle.promote(disks)
        disks.save(cell)
        instance.host, instance.node = host, node.hypervisor_hostname
        instance.compute_id = node.id
        instance.save()
        return host
