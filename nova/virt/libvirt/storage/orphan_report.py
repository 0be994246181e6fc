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

    :ivar orphans: list of orphans.Orphan
    :ivar unread: list of orphans.Unread: there may be more in these pools
    :ivar deleted: those of the orphans that are gone by now
    """
    orphans: list[orphans.Orphan]
    unread: list[orphans.Unread]
    deleted: list[orphans.Orphan]

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
        answers
    """
    unread: list[orphans.Unread] = []
    with _asking_conductor(), _connected() as connection:
        own = set(objects.InstanceList.get_uuids_by_host(context, CONF.host))
        # Each is judged when it is its turn: a server may have come since.
        deleted = orphans.sweep(context, connection, own) if delete else []
        found = orphans.find(context, connection, own, unread)
    return Found([*deleted, *found], unread, deleted)


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
