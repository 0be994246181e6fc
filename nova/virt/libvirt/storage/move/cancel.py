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
"""How an operator cancels the copy of a cold migration or a resize.

The request is a status of the migration: the source saves its progress in the
migration's record every few seconds and gets the status back with it, so that
this takes neither an RPC nor a shell on the source.
"""

from nova import context as nova_context
from nova import exception
from nova import objects

# Between "migrating" and "error". Only the source's copy knows it; everybody
# else sees a migration that is in progress.
CANCELLING = 'cancelling'


def request(context: 'nova_context.RequestContext',
            instance_uuid: str) -> 'objects.Migration':
    """Ask the source to give up the copy of an instance's disks.

    The source notices within some seconds; the instance is then started there
    again, and the migration ends in status ``error``.

    :param context: an admin's context
    :returns: the migration
    :raises: exception.InstanceMappingNotFound, exception.InstanceNotFound,
        exception.NoCopyToCancel
    """
    mapping = objects.InstanceMapping.get_by_instance_uuid(
        context, instance_uuid)
    if mapping.cell_mapping is None:
        # It has never come to a host.
        raise exception.InstanceNotFound(instance_id=instance_uuid)
    with nova_context.target_cell(context, mapping.cell_mapping) as cell:
        instance = objects.Instance.get_by_uuid(cell, instance_uuid)
        try:
            # Whatever the task state, which an operator may have reset.
            migration = objects.Migration.get_by_instance_and_status(
                cell, instance_uuid, 'migrating')
        except exception.MigrationNotFoundByStatus:
            raise exception.NoCopyToCancel(
                instance_uuid=instance_uuid, task_state=instance.task_state)
        migration.status = CANCELLING
        migration.save()
        return migration


def is_requested(migration: 'objects.Migration') -> bool:
    """Whether an operator wants a migration's copy to end.

    :param migration: just saved by the source, which brings its status
    """
    return migration.status == CANCELLING
