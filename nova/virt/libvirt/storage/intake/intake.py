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
"""The destination's side of a move over NBD: what a source may have done.

One object a compute service. Each method that is named in _REQUESTS does one
thing that the source asks for by RPC; what it may ask is request.py's. A disk
is open for writing from ``open`` to ``close``, to who has its key.
"""

import socket
import threading
import typing as ty

from oslo_log import log as logging

import nova.conf
from nova import exception
from nova.i18n import _
from nova import thread_pool_factory
from nova.virt.libvirt.storage.intake import export
from nova.virt.libvirt.storage.intake import keys
from nova.virt.libvirt.storage.intake import listener
from nova.virt.libvirt.storage.intake import reaper
from nova.virt.libvirt.storage.intake import request as checks
from nova.virt.libvirt.storage.intake import volumes

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Seconds for the source to reach a port, once it was told which.
_REACH_TIMEOUT = 15
# More than a disk needs; the pump has one.
_MOST_CONNECTIONS = 8


def cpu_has_aes() -> bool:
    """Whether this host's CPU has instructions for AES."""
    try:
        with open('/proc/cpuinfo') as f:
            for line in f:
                name, _colon, value = line.partition(':')
                if name.strip() in ('flags', 'Features'):
                    return 'aes' in value.split()
    except OSError:
        pass
    return False


class Intake:
    """What a compute service takes in of its peers' disks.

    :param get_connection: gives the virConnect of this host's libvirt
    :param get_address: gives the address under which peers reach this host
    """

    def __init__(self, get_connection: ty.Callable,
                 get_address: ty.Callable[[], str]):
        self._get_connection = get_connection
        self._get_address = get_address
        self._lock = threading.Lock()
        # by UUID of the instance, pool and volume
        self._exports: dict[tuple[str, str, str], export.Export] = {}

    def start(self) -> None:
        """End what an earlier service has left."""
        reaper.reap()

    def obstacle(self) -> str | None:
        """What keeps this host from taking disks in; None if nothing."""
        if CONF.libvirt.storage_migration_transport == 'libvirt':
            return _("[libvirt]/storage_migration_transport is libvirt there")
        return export.obstacle()

    def handle(self, context, instance, migration, request: dict):
        """Do what the source of a migration asks for.

        :param request: see checks.check()
        :returns: plain values
        :raises: exception.StorageIntakeRefused and others
        """
        found = checks.check(context, instance, migration, request)
        if found.what not in _REQUESTS:
            raise found.refused(_("upgrade this host: nothing is known of "
                                  "this request"))
        LOG.debug('Asked to %s', found, instance=found.instance)
        return _REQUESTS[found.what](self, found)

    def _volumes(self, request) -> volumes.Volumes:
        return volumes.Volumes(self._get_connection(), request)

    # Before the guest is powered off

    def _greet(self, request):
        """Say whether this host takes disks in.

        :returns: dict with ``obstacle``, a text or None; ``aes``; and
            ``cuts``, as close does what the source knows by then
        """
        request.check_under_way()
        return {'obstacle': self.obstacle(), 'aes': cpu_has_aes(),
                'cuts': True}

    def _reach(self, request):
        """Let the source find out whether it reaches a port.

        :returns: address and port, on which the next seconds somebody answers
        """
        request.check_under_way()
        listening = listener.listen(self._get_address(), 1)
        port = listener.port_of(listening)
        thread_pool_factory.spawn_on(
            thread_pool_factory.ExecutorType.STORAGE_MIGRATION,
            _answer_one, listening)
        return [self._get_address(), port]

    def _look(self, request):
        request.check_under_way()
        return self._volumes(request).look()

    def _has(self, request):
        request.check_under_way()
        return self._volumes(request).has()

    def _probe(self, request):
        request.check_under_way()
        self._volumes(request).probe()

    def _free_name(self, request):
        request.check_under_way()
        return self._volumes(request).free_name()

    # With the guest off

    def _create(self, request):
        self._volumes(request).create()

    def _open(self, request):
        """Open a volume that was created for writing.

        :returns: dict with ``address``, ``port``, ``username``, ``key``
        """
        request.expected()
        place = self._place(request)
        connections = request.get('connections', int)
        if not 1 <= connections <= _MOST_CONNECTIONS:
            raise request.refused(_("%d connections") % connections)
        reason = self.obstacle()
        if reason:
            raise exception.StorageIntakeError(host=CONF.host, reason=reason)
        with self._lock:
            if place in self._exports:
                raise request.refused(_("the volume is open already"))
            order = export.Order(
                self._volumes(request).path(), connections,
                request.get('aes', bool) and cpu_has_aes(),
                'volume %s of migration %d from host %s' % (
                    place[2], request.migration.id,
                    request.migration.source_compute))
            found = self._exports[place] = export.Export(
                order, self._get_address())
        LOG.info('Volume %(volume)s of storage pool %(pool)s is open for host '
                 '%(source)s on port %(port)d', {
                     'volume': place[2], 'pool': place[1], 'port': found.port,
                     'source': request.migration.source_compute},
                 instance=request.instance)
        return {'address': self._get_address(), 'port': found.port,
                'username': keys.USERNAME, 'key': found.key}

    @staticmethod
    def _place(request):
        return (request.instance.uuid, request.pool(), request.volume())

    def _connected(self, request):
        """Take the key away: the source's connections stand."""
        place = self._place(request)
        with self._lock:
            found = self._exports.get(place)
        if found is None:
            raise request.refused(_("the volume is not open"))
        found.connected()

    def _close(self, request):
        """Let nobody write to a volume any more.

        It may have been made longer than the disk: then ``length`` comes.
        """
        self._end(self._place(request))
        if 'length' in request.arguments:
            request.expected()
            export.cut(self._volumes(request).path(),
                       request.get('length', int))

    def _delete(self, request):
        places = request.removable()
        for pool, name in places:
            self._end((request.instance.uuid, pool, name))
        return self._volumes(request).delete(places)

    # What this host does itself

    def close(self, instance) -> None:
        """Let nobody write to an instance's disks any more.

        :raises: exception.StorageIntakeError if somebody still does
        """
        with self._lock:
            places = [place for place in self._exports
                      if place[0] == instance.uuid]
        for place in places:
            self._end(place)

    def look_after(self) -> None:
        """Log and forget what has ended by itself."""
        with self._lock:
            exports = list(self._exports.items())
        for place, found in exports:
            if not found.is_running():
                self._end(place)

    def _end(self, place):
        with self._lock:
            found = self._exports.get(place)
        if found is None:
            return
        # Who asks at the same time waits for the same end.
        found.end()
        with self._lock:
            self._exports.pop(place, None)
        LOG.info('Volume %(volume)s of storage pool %(pool)s is closed',
                 {'volume': place[2], 'pool': place[1]})


def _answer_one(listening):
    """Take one connection and end it; nobody may come."""
    with listening:
        listening.settimeout(_REACH_TIMEOUT)
        try:
            found, _address = listening.accept()
            found.shutdown(socket.SHUT_RDWR)
            found.close()
        except OSError as e:
            LOG.debug('Port %(port)d was not reached: %(error)s', {
                'port': listener.port_of(listening), 'error': e})


_REQUESTS = {
    'greet': Intake._greet,
    'reach': Intake._reach,
    'look': Intake._look,
    'has': Intake._has,
    'probe': Intake._probe,
    'free_name': Intake._free_name,
    'create': Intake._create,
    'open': Intake._open,
    'connected': Intake._connected,
    'close': Intake._close,
    'delete': Intake._delete,
}
