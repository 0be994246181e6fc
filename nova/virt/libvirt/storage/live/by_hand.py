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

from oslo_log import log as logging

from nova.compute import power_state
from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova.network import neutron
from nova import objects
from nova.objects import fields
from nova.virt.libvirt.storage.live import settle
from nova.virt.libvirt.storage.records import evacuation
from nova.virt.libvirt.storage.records import metadata

LOG = logging.getLogger(__name__)


def end(context: 'nova_context.RequestContext', instance_uuid: str,
        moved: bool) -> str:
    """Let an instance's disks be where an operator has found its guest.

    :param context: an admin's context
    :param moved: whether the guest is on the destination
    :returns: the host that the instance is on then
    :raises: exception.InstanceMappingNotFound, exception.InstanceNotFound,
        exception.NoMigrationToSettle, exception.ComputeHostNotFound,
        exception.InvalidDiskMetadata, exception.PortBindingActivationFailed,
        what Neutron's client raises if it can't be asked
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
                reason=_('its task state is %(state)s. Wait for the end of '
                         'what is under way; if host %(host)s is down for '
                         'good, reset the state of the server before') % {
                             'state': instance.task_state,
                             'host': instance.host})
        disks = metadata.InstanceDisks.load(cell, instance)
        moving = settle.going(disks)
        # Cut off here, it can be called again: the records say still that
        # there is something to settle, and from where it went.
        if moving:
            source, host = moving[0][1].host, moving[0][1].next.host
        else:
            source, host = instance.host, settle.untold(cell, disks)
        if host is None:
            raise exception.NoMigrationToSettle(
                instance_uuid=instance_uuid,
                reason=_('it has no disk on its way to another host'))
        if not moved:
            if not moving or instance.host == host:
                raise exception.NoMigrationToSettle(
                    instance_uuid=instance_uuid,
                    reason=_('its guest has come to host %(host)s. Use '
                             '--moved; if the guest is gone since, start it '
                             'there') % {'host': host})
            evacuation.forget_next(disks)
            disks.save(cell)
            return instance.host
        node = objects.ComputeNode.get_first_node_by_host_for_old_compat(
            cell, host)
        has_ports = bool(instance.get_network_info())
        if has_ports:
            # Nothing else of Nova's would bind them to where the guest is.
            api = neutron.API()
            api.migrate_instance_start(
                cell, instance, objects.Migration(
                    source_compute=source, dest_compute=host,
                    migration_type=fields.MigrationType.LIVE_MIGRATION))
            # An evacuation that was refused has left none to be activated.
            api.setup_instance_network_on_host(cell, instance, host)
        instance.host, instance.node = host, node.hypervisor_hostname
        instance.compute_id = node.id
        # A refused start may have noted that there is no guest on the source;
        # the API takes no live migration then. The host looks for itself.
        instance.power_state = power_state.RUNNING
        instance.save()
        settle.promote(disks)
        disks.save(cell)
        if has_ports:
            _forget_source(cell, instance, source)
        return host


def _forget_source(context, instance, source):
    """Take the bindings to the source off the ports; a failure is logged."""
    try:
        neutron.API().setup_networks_on_host(
            context, instance, host=source, teardown=True)
    except Exception as e:
        LOG.warning('Ports may have bindings to host %(host)s yet, which are '
                    'of no use: %(error)s', {'host': source, 'error': e},
                    instance=instance)
