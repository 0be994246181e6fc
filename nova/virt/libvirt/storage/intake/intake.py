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

import collections
import contextlib
import socket
import threading
import typing as ty

from oslo_log import log as logging
from oslo_utils import excutils

import nova.conf
from nova import exception
from nova.i18n import _
from nova import thread_pool_factory
from nova.virt.libvirt.storage.intake import export
from nova.virt.libvirt.storage.intake import kept
from nova.virt.libvirt.storage.intake import keys
from nova.virt.libvirt.storage.intake import listener
from nova.virt.libvirt.storage.intake import reading
from nova.virt.libvirt.storage.intake import reaper
from nova.virt.libvirt.storage.intake import request as checks
from nova.virt.libvirt.storage.intake import volumes
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import keeping

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Seconds for the source to reach a port, once it was told which.
_REACH_TIMEOUT = 15
# More than a disk needs; the pump has one.
_MOST_CONNECTIONS = 8
# Volumes of one server that are open at once: half of the ports.
_MOST_EXPORTS = 32
# Ports for one server on which its source is waited for.
_MOST_REACHING = 4


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
    :param has_guest: tells whether an Instance has a guest on this host; with
        running=True, whether it has one that runs
    :param uri: of this host's libvirt
    """

    def __init__(self, get_connection: ty.Callable,
                 get_address: ty.Callable[[], str],
                 has_guest: ty.Callable[..., bool],
                 uri: str = ''):
        self._get_connection = get_connection
        self._get_address = get_address
        self._has_guest = has_guest
        self._uri = uri
        self._lock = threading.Lock()
        self._unchanged = threading.Condition(self._lock)
        # by UUID of the instance, pool and volume
        self._exports: dict[tuple[str, str, str], export.Export] = {}
        # ids of the migrations that these were opened for
        self._migrations: dict[tuple[str, str, str], int] = {}
        # UUIDs of the instances whose disks are being taken over, and of
        # those whose disks are being changed by this service itself
        self._handed_over: set[str] = set()
        self._changing: collections.Counter[str] = collections.Counter()
        # by UUID of the instance, ports on which its source is waited for
        self._reaching: collections.Counter[str] = collections.Counter()
        # places whose volumes are being read for _tables
        self._taken_up: set[tuple[str, str, str]] = set()
        self._tables = kept.Tables()
        self._readings = reading.Readings()

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

        :returns: dict with ``obstacle``, a text or None; ``aes``; ``cuts``,
            as close does what the source knows by then; ``reads``, as a disk
            may be read here before it is closed; and ``keeps``, as copies may
            stay here to be taken up
        """
        request.check_under_way()
        return {'obstacle': self.obstacle(), 'aes': cpu_has_aes(),
                'cuts': True, 'reads': True, 'keeps': all(
                    keeping.is_possible(self._get_connection(), name)
                    for name in setup.pool_names())}

    def _reach(self, request):
        """Let the source find out whether it reaches a port.

        :returns: address and port, on which the next seconds somebody answers
        """
        request.check_under_way()
        uuid = request.instance.uuid
        with self._lock:
            # Each holds a thread that other servers' need, too.
            if self._reaching[uuid] >= _MOST_REACHING:
                raise request.refused(_("earlier ports still wait for it"))
            self._reaching[uuid] += 1
        try:
            listening = listener.listen(self._get_address(), 1)
            port = listener.port_of(listening)
            thread_pool_factory.spawn_on(
                thread_pool_factory.ExecutorType.STORAGE_PEER,
                self._answer_one, listening, uuid)
        except Exception:
            with excutils.save_and_reraise_exception():
                self._reached(uuid)
        return [self._get_address(), port]

    def _answer_one(self, listening, uuid):
        try:
            _answer_one(listening)
        finally:
            self._reached(uuid)

    def _reached(self, uuid):
        with self._lock:
            self._reaching[uuid] -= 1
            self._reaching += collections.Counter()

    def _look(self, request):
        request.check_under_way()
        return self._volumes(request).look()

    def _has(self, request):
        request.check_under_way()
        return self._volumes(request).has()

    def _probe(self, request):
        request.check_under_way()
        self._volumes(request).probe()

    def _names(self, request):
        request.check_under_way()
        return self._volumes(request).names()

    # With the guest off

    def _create(self, request):
        self._volumes(request).create()

    def _open(self, request):
        """Open a volume that was created for writing.

        :returns: dict with ``address``, ``port``, ``username``, ``key``
        """
        request.expected()
        self._check_no_guest(request)
        place = self._place(request)
        self._tables.forget(place)
        self._readings.reopen(place)
        connections = request.get('connections', int)
        if not 1 <= connections <= _MOST_CONNECTIONS:
            raise request.refused(_("%d connections") % connections)
        reason = self.obstacle()
        if reason:
            raise exception.StorageIntakeError(host=CONF.host, reason=reason)
        order = export.Order(
            self._volumes(request).path(), connections,
            request.get('aes', bool) and cpu_has_aes(),
            'volume %s of migration %d from host %s' % (
                place[2], request.migration.id,
                request.migration.source_compute))
        self._end_others(request)
        with self._lock:
            if place in self._exports:
                raise request.refused(_("the volume is open already"))
            if request.instance.uuid in self._handed_over:
                raise request.refused(_("the disks are being taken over"))
            # Each holds a port that other servers' need, too.
            if sum(uuid == place[0] for uuid, _pool, _name in
                   self._exports) >= _MOST_EXPORTS:
                raise request.refused(_("%d volumes are open already") %
                                      _MOST_EXPORTS)
            found = self._exports[place] = export.Export(
                order, self._get_address())
            self._migrations[place] = request.migration.id
        # Without the lock: a program may take its time.
        try:
            # The disk may have been taken over since.
            request.expected()
            found.start()
        except Exception:
            with excutils.save_and_reraise_exception():
                self._end(place, found)
        LOG.info('Volume %(volume)s of storage pool %(pool)s is open for host '
                 '%(source)s on port %(port)d', {
                     'volume': place[2], 'pool': place[1], 'port': found.port,
                     'source': request.migration.source_compute},
                 instance=request.instance)
        return {'address': self._get_address(), 'port': found.port,
                'username': keys.USERNAME, 'key': found.key}

    def _end_others(self, request):
        """End what was open under names that nothing comes by any more."""
        uuid, coming = request.instance.uuid, request.coming()
        with self._lock:
            others = [place for place in self._exports
                      if place[0] == uuid and place[1:] not in coming]
        for place in others:
            self._end(place)

    @staticmethod
    def _place(request):
        return (request.instance.uuid, request.pool(), request.volume())

    def _connected(self, request):
        """Take the key away: the source's connections stand."""
        request.check_mine()
        place = self._place(request)
        with self._lock:
            found = self._exports.get(place)
        if found is None:
            raise request.refused(_("the volume is not open"))
        found.connected()

    def _close(self, request):
        """Let nobody write to a volume any more.

        It may have been made longer than the disk: then ``length`` comes. If
        it was read here before, ``changed`` says what was written since.
        """
        request.check_mine()
        place, changed = self._place(request), request.changed()
        self._end(place)
        if 'length' not in request.arguments:
            self._readings.forget(place)
            return
        length = request.get('length', int)
        with self._change(request):
            export.cut(self._volumes(request).path(), length)
            if changed is None:
                self._readings.forget(place)
            else:
                self._readings.close(place, length, changed)

    def _read(self, request):
        """Read a disk that has come in part, while its guest still runs.

        It goes on when this returns: see _has_read(). With ``changed`` that is
        what was written to a copy that was taken up.
        """
        request.expected()
        place, room = self._place(request), request.length('room')
        found = reading.Reading(pump.Volume(self._uri, *place[1:]), room,
                                request.key())
        with self._unless_handed_over(request):
            try:
                self._readings.begin(place, found, request.changed())
            except ValueError:
                raise request.refused(_("the volume is being read"))

    def _has_read(self, request):
        """Say how far that is.

        :returns: dict with ``done``, bytes, and ``ended``
        """
        request.expected()
        found = self._readings.get(self._place(request))
        if found is None:
            raise request.refused(_("the volume is not being read"))
        if found.error is not None:
            raise exception.StorageIntakeError(
                host=CONF.host, reason=found.error)
        return {'done': found.done, 'ended': found.is_over}

    def _take_up(self, request):
        """Let a volume that was kept here be written over.

        :returns: dict with ``bytes``, of what table gives piece by piece
        """
        place, key = self._place(request), request.key()
        with self._change(request):
            room = self._volumes(request).take_up()
        volume = pump.Volume(self._uri, *place[1:])
        with self._alone(request, place):
            table = kept.read(volume, room, key)
        self._tables.add(place, table)
        self._readings.put(place, reading.Reading(volume, room, key, table))
        LOG.info('Volume %(volume)s of storage pool %(pool)s was kept here: '
                 'the source sends what differs',
                 {'volume': place[2], 'pool': place[1]},
                 instance=request.instance)
        return {'bytes': len(table)}

    @contextlib.contextmanager
    def _alone(self, request, place):
        with self._lock:
            if place in self._taken_up:
                raise request.refused(_("the volume is being read"))
            self._taken_up.add(place)
        try:
            yield
        finally:
            with self._lock:
                self._taken_up.discard(place)

    def _table(self, request):
        """Tell what stands in a volume.

        :returns: a piece of it in base64, from byte ``at`` on
        """
        request.expected()
        return self._tables.piece(self._place(request),
                                  request.get('at', int))

    @contextlib.contextmanager
    def _change(self, request):
        """Change a file of what comes; a hand-over waits, or forbids it.

        :raises: exception.StorageIntakeRefused
        """
        place = self._place(request)
        with self._unless_handed_over(request):
            with self._lock:
                if place in self._exports:
                    raise request.refused(_("the volume is open"))
            # They may have been taken over since.
            request.expected()
            self._check_no_guest(request)
            yield

    def _check_no_guest(self, request):
        """Check that what is written to is no guest's disk, be it off.

        What the database says of a disk may be the source's word.

        :raises: exception.StorageIntakeRefused
        """
        if self._has_guest(request.instance):
            raise request.refused(_(
                "its guest is on this host: undefine that, if the instance "
                "is on another one"))

    @contextlib.contextmanager
    def _unless_handed_over(self, request):
        """Have a hand-over of the instance's disks wait, if none goes on."""
        uuid = request.instance.uuid
        with self._lock:
            if uuid in self._handed_over:
                raise request.refused(_("the disks are being taken over"))
            self._changing[uuid] += 1
        try:
            yield
        finally:
            with self._lock:
                self._changing[uuid] -= 1
                self._changing += collections.Counter()
                self._unchanged.notify_all()

    def _delete(self, request):
        if self._has_guest(request.instance, running=True):
            # The source writes the records: what it calls left may be a disk.
            raise request.refused(_("its guest runs on this host"))
        for pool, name in request.removable():
            self._end((request.instance.uuid, pool, name))
            self._tables.forget((request.instance.uuid, pool, name))
            self._readings.forget((request.instance.uuid, pool, name))
        with self._unless_handed_over(request):
            # What was on its way may be a disk since.
            return self._volumes(request).delete(request.removable())

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

    @contextlib.contextmanager
    def handing_over(self, instance):
        """Let nobody write to an instance's disks, nor begin to meanwhile.

        :raises: exception.StorageIntakeError if somebody still writes
        """
        with self._lock:
            self._handed_over.add(instance.uuid)
            while self._changing[instance.uuid]:
                self._unchanged.wait()
        try:
            self.close(instance)
            yield
        finally:
            with self._lock:
                self._handed_over.discard(instance.uuid)

    def verify(self, instance, record) -> bool:
        """Compare a disk with what was sent by what was read of it before.

        :param record: the disk's record
        :returns: False if all of it has to be read to know
        """
        expected = record.expected
        return self._readings.verify(
            (instance.uuid, record.pool, record.volume), expected.length,
            expected.checksum, expected.key)

    def look_after(self) -> None:
        """Log and forget what has ended; raises nothing.

        What outlives its migration is ended here: it was the source's to close
        and to delete.
        """
        with self._lock:
            exports = [(place, found, self._migrations[place])
                       for place, found in self._exports.items()]
        for place, found, migration_id in exports:
            try:
                if not found.is_running() or checks.is_over(
                        place[0], migration_id):
                    self._end(place, found)
            except Exception as e:
                # It stays in the way of a hand-over.
                LOG.error('Volume %(volume)s of storage pool %(pool)s may be '
                          'open yet: %(error)s', {
                              'volume': place[2], 'pool': place[1],
                              'error': e})

    def _end(self, place, opened=None):
        """End what is open at a place, or nothing but what was opened."""
        with self._lock:
            found = self._exports.get(place)
        if found is None or opened not in (None, found):
            return
        # Who asks at the same time waits for the same end.
        found.end()
        with self._lock:
            if self._exports.get(place) is found:
                del self._exports[place], self._migrations[place]
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
    'names': Intake._names,
    'create': Intake._create,
    'open': Intake._open,
    'connected': Intake._connected,
    'close': Intake._close,
    'read': Intake._read,
    'has_read': Intake._has_read,
    'delete': Intake._delete,
    'take_up': Intake._take_up,
    'table': Intake._table,
}
