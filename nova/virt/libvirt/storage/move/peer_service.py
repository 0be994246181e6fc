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
"""The destination of a move, asked through its compute service.

What is asked goes by RPC, the bytes over NBD. No libvirt but this host's own
is spoken to. What the other side does is intake/intake.py's.
"""

import base64
import contextlib
import functools
import itertools
import socket

from oslo_log import log as logging
import oslo_messaging as messaging
from oslo_utils import excutils

from nova.compute import rpcapi
import nova.conf
from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage.intake import intake
from nova.virt.libvirt.storage.intake import kept
from nova.virt.libvirt.storage.move import peers
from nova.virt.libvirt.storage.pool import sharing
from nova.virt.libvirt.storage.pump import transfer as pump

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Seconds to wait for a port to take a connection.
_CONNECT_TIMEOUT = 10


def check_pump() -> None:
    """Check that this host can send over NBD.

    :raises: exception.MigrationPreCheckError
    """
    missing = pump.nbd_missing()
    if missing:
        raise exception.MigrationPreCheckError(reason=_(
            "install libnbd on host %(host)s, and Nova built with it: "
            "%(missing)s") % {'host': CONF.host, 'missing': missing})


class ServicePeer(peers.Peer):
    """A compute service, as the destination of a move.

    :param context: the request's context
    :param instance: the Instance
    :param migration: its Migration, which says where the destination is
    """
    may_be_cut = False

    def __init__(self, context, instance, migration):
        self._context = context
        self._instance = instance
        self._migration = migration
        self.host = migration.dest_compute
        self.where = 'host %s, over NBD' % self.host
        self._rpc = rpcapi.ComputeAPI()
        self._is_silent = False
        self._has_aes = False
        self._pools: dict[str, ServicePool] = {}

    def ask(self, what: str, **arguments):
        """Have the destination do something.

        :returns: what that says
        :raises: exception.StorageIntakeError if it doesn't answer, or what
            it answers
        """
        if self._is_silent:
            raise self._not_asked(_("it doesn't answer"))
        request = dict(arguments, do=what, host=CONF.host)
        try:
            return self._rpc.take_in_disks(
                self._context, self._instance, self._migration, request)
        except messaging.MessagingTimeout as e:
            # Each further question would take as long.
            self._is_silent = True
            raise self._not_asked(e)
        except exception.NovaException:
            raise
        except Exception as e:
            # An OSError there, say, is raised here as one. Who cleans up
            # behind a failure notes what is left, and goes on.
            raise self._not_asked(e)

    def _not_asked(self, error):
        return exception.StorageIntakeError(host=self.host, reason=_(
            "see the log of nova-compute there: %s") % error)

    def check(self, pools) -> None:
        """Check that disks can go this way, while the guest runs.

        :param pools: names of the pools that they may go to
        :raises: exception.MigrationPreCheckError
        """
        check_pump()
        try:
            answer = self.ask('greet')
        except exception.UnsupportedRPCVersion:
            raise exception.MigrationPreCheckError(reason=_(
                "upgrade the compute service on host %s and on all others: "
                "one of them is too old to take disks in over NBD") %
                self.host)
        if not isinstance(answer, dict):
            raise self._not_asked(_("its answer is %.80r") % (answer,))
        if answer.get('obstacle'):
            raise exception.MigrationPreCheckError(reason=_(
                "choose another host, as host %(host)s takes no disks in "
                "over NBD: %(reason)s") % {
                    'host': self.host, 'reason': answer['obstacle']})
        self._has_aes = bool(answer.get('aes')) and intake.cpu_has_aes()
        # A file of qcow2 grows meanwhile, and an export can't.
        self.takes_ahead = bool(answer.get('cuts'))
        self.reads = bool(answer.get('reads'))
        self.keeps = bool(answer.get('keeps'))
        # What is known of them may be old.
        self._pools.clear()
        super().check(pools)
        self._check_port()

    def _check_port(self):
        answer = self.ask('reach')
        if not (isinstance(answer, list | tuple) and
                list(map(type, answer)) == [str, int]):
            raise self._not_asked(_("its answer is %.80r") % (answer,))
        address, port = answer
        try:
            socket.create_connection(
                (address, port), timeout=_CONNECT_TIMEOUT).close()
        except OSError as e:
            raise exception.MigrationPreCheckError(reason=_(
                "check the firewall of host %(host)s, which has to let other "
                "compute nodes reach the ports of "
                "[libvirt]/storage_migration_nbd_port_min to _max: port "
                "%(port)d of %(address)s can't be reached from host "
                "%(here)s: %(error)s") % {
                    'host': self.host, 'port': port, 'address': address,
                    'here': CONF.host, 'error': e})

    def pool(self, name):
        return self._pools.setdefault(name, ServicePool(self, name))

    def takes_holes(self):
        return True

    @contextlib.contextmanager
    def target(self, pool_name, volume_name):
        place = {'pool': pool_name, 'volume': volume_name}
        found = self.ask('open', connections=pump.NBD_CONNECTIONS,
                         aes=self._has_aes, **place)
        export = pump.Export(found['address'], found['port'], '',
                             found['username'], found['key'])
        target = peers.Target(export, functools.cache(
            lambda: self.ask('connected', **place)))
        try:
            yield target
        except Exception:
            with excutils.save_and_reraise_exception():
                self._close(place)
        # Not before nobody can write to it any more, it has arrived.
        if target.length is None:
            self.ask('close', **place)
        elif target.changed is None:
            self.ask('close', length=target.length, **place)
        else:
            self.ask('close', length=target.length,
                     changed=[list(part) for part in target.changed], **place)

    def _close(self, place):
        try:
            self.ask('close', **place)
        except exception.NovaException as e:
            # It ends by itself, without its connections.
            LOG.warning('Volume %(volume)s may still be open: %(error)s',
                        {'volume': place['volume'], 'error': e},
                        instance=self._instance)

    def delete(self, places, instance):
        places = [tuple(place) for place in places]
        if not places:
            return []
        try:
            return [tuple(place) for place in self.ask(
                'delete', places=[list(place) for place in places])]
        except exception.NovaException as e:
            LOG.error('%s', e, instance=instance)
            return places


class ServicePool(peers.PeerPool):
    """A storage pool of another compute service's host."""

    def __init__(self, of: ServicePeer, name: str):
        self.name = name
        self.host = of.host
        self._peer = of
        # An answer takes some hundredths of a second, and servers are down.
        self._type: str | None = None
        self._names: set[str] | None = None

    def _ask(self, what, **arguments):
        return self._peer.ask(what, pool=self.name, **arguments)

    def check(self):
        if self._type is None:
            self._type = self._ask('look')['type']
        return self._type

    def available(self, wanted):
        return self._ask('look')['free']

    def refresh(self):
        # The names there are looked up in the pool's directory.
        self._names = None

    def has(self, name, refresh=False):
        return self._ask('has', name=name)

    def free_name(self, wanted, taken=()):
        if self._names is None:
            self._names = set(self._ask('names'))
        possible = itertools.chain(
            [wanted], ('%s.%d' % (wanted, n) for n in itertools.count(1)))
        return next(name for name in possible
                    if name not in self._names and name not in taken)

    def is_shared(self, here, instance):
        return sharing.is_seen(
            here, lambda name: self._ask('probe', name=name), instance)

    def take_up(self, name, lengths, mode, key):
        length, room = lengths
        found = self._ask('take_up', volume=name, length=length, room=room,
                          mode=mode, key=key)
        data = b''
        while len(data) < found['bytes']:
            piece = base64.b64decode(
                self._ask('table', volume=name, at=len(data)))
            data += piece
            # Of 64 KiB it has 8 bytes, and then some of zlib's.
            if not piece or len(data) > 4096 + (room >> 12):
                raise exception.StorageIntakeError(host=self.host, reason=_(
                    "see the log of nova-compute there: it has forgotten what "
                    "volume %s holds, or makes something up") % name)
        return kept.unpack(data, room)

    def read(self, name, length, key, changed=None):
        self._ask('read', volume=name, room=length, key=key,
                  changed=changed and [list(part) for part in changed])

    def has_read(self, name):
        found = self._ask('has_read', volume=name)
        return found['done'], found['ended']

    def create(self, name, length, mode):
        self._ask('create', volume=name, length=length, mode=mode)
