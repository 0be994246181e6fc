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
"""What nova-manage tells, and deletes, of what no instance has here.

For the host on which it is called: only its libvirt knows its volumes. What
is on record of them the conductor says, as to nova-compute; so this needs no
access to a database.
"""

import contextlib
import typing as ty

from oslo_serialization import jsonutils
import prettytable

from nova.conductor import rpcapi as conductor_rpcapi
import nova.conf
from nova import context as nova_context
from nova import objects
from nova.objects import base as objects_base
from nova.virt.libvirt.storage import orphans

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF


class Found(ty.NamedTuple):
    """What lies in a host's storage pools, and beside them.

    :ivar orphans: list of orphans.Orphan; after deleting, those that were
        tried
    :ivar unread: list of orphans.Unread: there may be more in these pools
    :ivar deleted: those of the orphans that are gone by now
    :ivar error: what has ended the deleting before its time
    """
    orphans: list[orphans.Orphan]
    unread: list[orphans.Unread]
    deleted: list[orphans.Orphan]
    error: Exception | None = None

    @property
    def left_over(self) -> list[orphans.Orphan]:
        """What is certainly left over and still there."""
        return [orphan for orphan in self.orphans
                if orphan.kind is orphans.Kind.LEFT_OVER and
                orphan not in self.deleted]

    def as_json(self) -> str:
        return jsonutils.dumps([{**orphan._asdict(), 'kind': orphan.kind.value}
                                for orphan in self.orphans])

    def as_table(self) -> str:
        table = prettytable.PrettyTable(orphans.Orphan._fields)
        table.align = 'l'
        for orphan in self.orphans:
            table.add_row([orphan.pool or '-', *orphan[1:3],
                           orphan.kind.value])
        return str(table)


def look(context: 'nova_context.RequestContext',
         delete: bool = False) -> Found:
    """Look for volumes and directories that no instance has on this host.

    :param context: an admin's
    :param delete: whether to delete those that are certainly left over
    :raises: libvirt.libvirtError if this host's libvirt can't be asked,
        exception.StoragePoolError, messaging.MessagingTimeout if no conductor
        answers; once something may be deleted, Found.error tells it
    """
    unread: list[orphans.Unread] = []
    tried: list[tuple[orphans.Orphan, bool]] = []
    error = None
    with _asking_conductor(), _connected() as connection:
        own = set(objects.InstanceList.get_uuids_by_host(context, CONF.host))
        if not delete:
            return Found(orphans.find(context, connection, own, unread),
                         unread, [])
        try:
            # Each is judged when it is its turn: a server may have come since.
            orphans.sweep(context, connection, own, tried, unread)
        except Exception as e:
            error = e
    return Found([orphan for orphan, _is_gone in tried], unread,
                 [orphan for orphan, is_gone in tried if is_gone], error)


@contextlib.contextmanager
def _asking_conductor():
    before = objects_base.NovaObject.indirection_api
    objects_base.NovaObject.indirection_api = conductor_rpcapi.ConductorAPI()
    try:
        yield
    finally:
        objects_base.NovaObject.indirection_api = before


@contextlib.contextmanager
def _connected():
    # The driver's, for the hypervisors that keep disks in pools.
    connection = libvirt.open(CONF.libvirt.connection_uri or 'qemu:///system')
    try:
        yield connection
    finally:
        connection.close()
