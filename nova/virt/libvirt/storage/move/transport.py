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
"""Which way the disks of a move go: over NBD, or by the peer's libvirt."""

import contextlib

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage.move import peer_libvirt
from nova.virt.libvirt.storage.move import peer_service
from nova.virt.libvirt.storage.move import peers

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# By [libvirt]/storage_migration_transport, what is tried in this order.
NBD, LIBVIRT = 'nbd', 'libvirt'
_WAYS = {'auto': (NBD, LIBVIRT), NBD: (NBD,), LIBVIRT: (LIBVIRT,)}


def ways() -> tuple[str, ...]:
    """The ways that this host is configured to take, best first."""
    return _WAYS[CONF.libvirt.storage_migration_transport]


def reach(stack: contextlib.ExitStack, move, offer) -> peers.Peer:
    """Reach the destination of a move, while the guest runs.

    :param stack: closes what is opened
    :param move: the Move
    :param offer: the destination's Offer
    :raises: exception.MigrationPreCheckError, which says what was tried
    """
    if move.same_host:
        return peer_libvirt.LibvirtPeer(
            move.here.host.get_connection(), move.here.uri,
            move.migration.dest_compute, offer.owner)
    tried: dict[str, exception.NovaException] = {}
    for way in ways():
        try:
            return _reached(way, stack, move, offer)
        except exception.NovaException as e:
            tried[way] = e
            LOG.info('The disks can not go to host %(host)s by %(way)s: '
                     '%(error)s', {
                         'host': move.migration.dest_compute, 'way': way,
                         'error': e}, instance=move.instance)
    if len(tried) == 1:
        raise next(iter(tried.values()))
    raise exception.MigrationPreCheckError(reason=_(
        "choose another host, or mend one of the two ways to %(host)s. Over "
        "NBD: %(nbd)s; by libvirt: %(error)s") % {
            'host': move.migration.dest_compute, 'nbd': _text(tried[NBD]),
            'error': _text(tried[LIBVIRT])})


def _text(error):
    # without "Migration pre-check error:"
    return (getattr(error, 'kwargs', None) or {}).get('reason', error)


def _reached(way, stack, move, offer):
    if way == NBD:
        found = peer_service.ServicePeer(
            move.context, move.instance, move.migration)
        found.check(offer.streamed_to)
        return found
    return stack.enter_context(peer_libvirt.connected(
        move.here.host, move.migration.dest_host,
        move.migration.dest_compute, offer.owner))


def delete_again(host, instance, migration, places):
    """Delete what a migration that is undone has made on its destination.

    :param host: the Host of this compute
    :param places: list of (pool, volume)
    :returns: those that couldn't be deleted
    :raises: exception.MigrationPreCheckError if libvirt there can't be reached
    """
    for way in ways():
        if places and way == NBD:
            places = peer_service.ServicePeer(
                instance._context, instance, migration).delete(
                    places, instance)
        elif places:
            with peer_libvirt.connected(
                    host, migration.dest_host,
                    migration.dest_compute) as found:
                places = found.delete(places, instance)
    return places
