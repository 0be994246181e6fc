# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.
"""Volumes' bytes from one libvirt to another; knows nothing of instances.

Each transfer runs in a worker process of its own (worker.py). Nova's
process has a libvirt event loop, which reads a stream's packets as they come,
whether or not anybody takes them: copying there would need as much memory as
the destination is slower than the source. A process can also be killed, which
a libvirt call that hangs can't be.

Without an event loop there is no libvirt keepalive. A peer that vanishes is
noticed by the deadline for progress, stall_timeout.

The functions block their thread (under eventlet: their green thread).
"""

import collections
import dataclasses
import importlib.util
import os
import random
import select
import signal
import subprocess
import sys
import time
import typing as ty
import urllib.parse

from oslo_log import log as logging
from oslo_serialization import jsonutils

from nova import exception
from nova.i18n import _

LOG = logging.getLogger(__name__)

_EXTENSION = 'nova.virt.libvirt.storage.pump._copy'
_WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                       'worker.py')

# What the worker may see of our environment: where client certificates and
# Kerberos tickets lie, and nothing else.
_ENVIRONMENT = ('PATH', 'HOME', 'USER', 'XDG_CONFIG_HOME', 'XDG_RUNTIME_DIR',
                'KRB5CCNAME', 'KRB5_CONFIG', 'KRB5_CLIENT_KTNAME',
                'SASL_CONF_PATH', 'LIBVIRT_DEBUG', 'LIBVIRT_LOG_OUTPUTS')

# Seconds between two progress reports of a worker.
_INTERVAL = 0.2
# Seconds between two looks at the cancel condition and at the deadline.
_POLL = 0.04
# Seconds from cancel to SIGKILL.
_GRACE = 0.05

_PRIME = (1 << 61) - 1

# What to do, by libvirt's error code.
# https://libvirt.org/html/libvirt-virterror.html
_ADVICE_CONNECT = _("check that libvirt listens there and that the "
                    "certificates are valid; that host's libvirt log has the "
                    "reason for a refusal")
_ADVICE = {
    38: _("see libvirt's log on that host, and its free space"),
    39: _("see libvirt's log on that host"),
    49: _("define the storage pool on that host"),
    50: _("refresh the storage pool on that host and look for the volume"),
    55: _("start the storage pool on that host"),
    88: _("let this host's certificate use the storage pool there"),
}

# VIR_ERR_NO_STORAGE_VOL
_NO_STORAGE_VOL = 50

_REASONS = {
    'short': _("the volume ended before its length; it was truncated"),
    'long': _("the volume is longer than its length; it has grown"),
    'stuck': _("libvirt neither moved data nor reported an error"),
    'thread': _("no thread could be started"),
    'worker': _("the worker process failed"),
}


class Volume(ty.NamedTuple):
    """Where a volume is: libvirt's URI, pool name, volume name."""
    uri: str
    pool: str
    name: str

    def __str__(self):
        return '%s in pool %s at %s' % (self.name, self.pool, self.uri)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a transfer moved and what stood there afterwards.

    :ivar data: bytes that travelled as data
    :ivar holes: bytes that travelled as holes
    :ivar checksum: of the content under key
    :ivar key: of the checksum
    :ivar physical: bytes; size of the volume written (or read) afterwards
    :ivar allocation: bytes which that volume takes up
    :ivar seconds: from the worker's start to its end
    """
    data: int
    holes: int
    checksum: int
    key: int
    physical: int
    allocation: int
    seconds: float

    @property
    def length(self):
        return self.data + self.holes


def new_key() -> int:
    """Return a random key for a checksum."""
    return random.SystemRandom().randrange(1, _PRIME)


def extension_path() -> str:
    """Return the path of the compiled extension.

    :raises: StoragePumpMissing
    """
    spec = importlib.util.find_spec(_EXTENSION)
    if spec is None or not spec.origin:
        raise exception.StoragePumpMissing(module=_EXTENSION)
    return spec.origin


def copy(source: Volume, destination: Volume, length: int, *,
         sparse: bool = True, bandwidth: int = 0, stall_timeout: float = 60,
         progress: ty.Callable[[int], ty.Any] | None = None,
         on_start: ty.Callable[[int], ty.Any] | None = None,
         on_end: ty.Callable[[int], ty.Any] | None = None,
         cancelled: ty.Callable[[], bool] | None = None,
         key: int | None = None) -> Result:
    """Copy a volume's content byte for byte into a volume that is new.

    A source on this host (a URI without host and query) is read from its file
    where this process may open that, and through libvirt elsewhere: each byte
    that comes through the daemon costs both it and us.

    Nothing is removed on failure: the caller made the destination's volume.
    A clean end says that libvirt has taken all bytes and has room for them;
    whether the volume's content is right is for verify() to say.

    :param length: bytes; the source's *physical* size. A source that is
        shorter or longer is an error.
    :param sparse: leave holes where the source has them. Only for volumes
        that read as zeroes before the first write, as new files do; a new
        logical volume has old content.
    :param bandwidth: bytes a second at most, 0 for no limit
    :param stall_timeout: seconds without progress after which to give up;
        connecting counts
    :param progress: called with the bytes done so far, holes included
    :param on_start: called with the worker's process id
    :param on_end: called with the same when it has ended
    :param cancelled: asked every 0.04 s whether to stop
    :param key: for the checksum; a random one by default
    :returns: Result
    :raises: StorageTransferError, StorageTransferStalled,
        StorageTransferCancelled, StorageTransferMismatch, StoragePumpMissing
    """
    transfer = _Transfer(source, destination, length, sparse, bandwidth,
                         stall_timeout, progress, cancelled, key)
    result = transfer.run(on_start, on_end)
    if result.physical < length:
        raise transfer.error(
            exception.StorageTransferMismatch,
            reason=_("it has %(physical)d bytes of %(length)d") % {
                'physical': result.physical, 'length': length})
    if result.allocation < result.data:
        # libvirt writes what it has taken later, and virStreamFinish reports
        # no error of that (virFDStreamCloseInt): the file system may be full.
        # Or it compresses, which only the content can tell.
        LOG.info('Volume %(volume)s takes up %(allocation)d bytes and '
                 '%(data)d were sent; it is read back',
                 {'volume': destination, 'allocation': result.allocation,
                  'data': result.data})
        verify(destination, length, result.checksum, key=result.key,
               stall_timeout=stall_timeout, on_start=on_start, on_end=on_end,
               cancelled=cancelled)
    return result


def read(volume: Volume, length: int, *, key: int,
         stall_timeout: float = 60,
         progress: ty.Callable[[int], ty.Any] | None = None,
         on_start: ty.Callable[[int], ty.Any] | None = None,
         on_end: ty.Callable[[int], ty.Any] | None = None,
         cancelled: ty.Callable[[], bool] | None = None) -> Result:
    """Read a volume for its checksum; parameters as copy()'s.

    What is read is on disk afterwards, if the volume is one of this host
    whose file this process may open. Of a volume that libvirt alone can read
    nothing can be synced: it is what the page cache of its host says.

    :returns: Result
    :raises: as copy()
    """
    return _Transfer(volume, None, length, True, 0, stall_timeout, progress,
                     cancelled, key).run(on_start, on_end)


def verify(volume: Volume, length: int, checksum: int, **kwargs) -> Result:
    """Compare what stands in a volume with what was sent; keywords as read().

    Cheapest on the host that has the volume: over its local socket this takes
    about a third of the time of the copy over TLS. There alone the volume is
    known to be on disk, too (see read()); before, the source must stay.

    :param length: bytes
    :param checksum: Result.checksum of the copy, under the same key
    :raises: StorageTransferMismatch, also if there is no such volume or it
        has another length; else as copy()
    """
    try:
        result = read(volume, length, **kwargs)
    except exception.StorageTransferError as e:
        if e.kind not in ('short', 'long') and e.code != _NO_STORAGE_VOL:
            raise
        raise exception.StorageTransferMismatch(
            volume=volume.name, where=str(volume), reason=e)
    if result.checksum != checksum:
        raise exception.StorageTransferMismatch(
            volume=volume.name, where=str(volume),
            reason=_("its checksum is %(is)016x instead of %(sent)016x; check "
                     "that the pool has room, and its file system for errors"
                     ) % {'is': result.checksum, 'sent': checksum})
    return result


def _readable(files, timeout):
    """Return those of the files that can be read, within timeout seconds."""
    if not hasattr(select, 'poll'):
        # eventlet leaves select alone, as its own
        return select.select(files, [], [], timeout)[0]
    # Native select() knows no file descriptors above 1023.
    poll = select.poll()
    for f in files:
        poll.register(f, select.POLLIN)
    ready = {fd for fd, _event in poll.poll(timeout * 1000)}
    return [f for f in files if f.fileno() in ready]


class _Transfer:
    """One worker process, from start to end."""

    def __init__(self, source, destination, length, sparse, bandwidth,
                 stall_timeout, progress, cancelled, key):
        if length < 0:
            raise ValueError('length is negative: %d' % length)
        self.source = source
        self.destination = destination
        self.length = length
        self.stall_timeout = stall_timeout
        self.progress = progress or (lambda transferred: None)
        self.cancelled = cancelled or (lambda: False)
        self.key = new_key() if key is None else key
        self.transferred = 0
        self.request = {
            'extension': extension_path(), 'source': source,
            'destination': destination, 'length': length, 'sparse': sparse,
            'bandwidth': bandwidth, 'key': self.key, 'interval': _INTERVAL}
        self._answer = None
        self._unread = b''
        self._stderr: ty.Deque = collections.deque(maxlen=16)

    def error(self, cls, **kwargs):
        """Make an exception that says which volume, where and how far."""
        where = str(self.source)
        if self.destination:
            where += ' -> ' + str(self.destination)
        e = cls(volume=self.source.name, where=where, length=self.length,
                transferred=self.transferred, **kwargs)
        e.side = kwargs.get('side')
        e.transferred = self.transferred
        e.kind = None
        e.code = e.domain = 0
        return e

    def run(self, on_start, on_end):
        start = time.monotonic()
        worker = subprocess.Popen(
            [sys.executable, '-I', _WORKER], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd='/',
            start_new_session=True,
            env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ})
        try:
            if on_start:
                on_start(worker.pid)
            self._send_request(worker)
            self._follow(worker)
        finally:
            self._end(worker)
            if on_end:
                on_end(worker.pid)
        return self._result(worker, time.monotonic() - start)

    def _send_request(self, worker):
        try:
            os.write(worker.stdin.fileno(),
                     jsonutils.dump_as_bytes(self.request) + b'\n')
        except BrokenPipeError:
            pass    # it is dead already: _result() tells

    def _follow(self, worker):
        """Read what the worker says until it has ended or must be."""
        last_progress = time.monotonic()
        open_files = [worker.stdout, worker.stderr]
        while open_files:
            for f in _readable(open_files, _POLL):
                data = os.read(f.fileno(), 65536)
                if not data:
                    open_files.remove(f)
                elif f is worker.stderr:
                    self._stderr.append(data)
                elif self._take(data):
                    last_progress = time.monotonic()
            if self._answer is not None:
                return
            if self.cancelled():
                raise self.error(exception.StorageTransferCancelled)
            if time.monotonic() - last_progress > self.stall_timeout:
                raise self.error(exception.StorageTransferStalled,
                                 seconds=self.stall_timeout)

    def _take(self, data):
        """Handle the worker's lines; return whether there was progress."""
        moved = False
        *lines, self._unread = (self._unread + data).split(b'\n')
        for line in lines:
            try:
                message = jsonutils.loads(line)
            except ValueError:
                # the C library's last words
                self._stderr.append(line)
                continue
            if 'transferred' in message:
                moved |= message['transferred'] > self.transferred
                self.transferred = message['transferred']
                self.progress(self.transferred)
            else:
                self._answer = message
        return moved

    @staticmethod
    def _end(worker):
        """End the worker: its stdin's end asks for it, SIGKILL makes sure."""
        worker.stdin.close()
        deadline = time.monotonic() + _GRACE
        while worker.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if worker.poll() is None:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        worker.stdout.close()
        worker.stderr.close()

    def _result(self, worker, seconds):
        answer = self._answer
        if answer is None:
            raise self._died(worker)
        if 'error' in answer:
            raise self._failed(answer['error'])
        result = Result(key=self.key, seconds=seconds, **answer['result'])
        self.transferred = result.length
        self.progress(result.length)
        return result

    def _died(self, worker):
        if -worker.returncode in (signal.SIGKILL, signal.SIGTERM):
            # by the job tracker, when the server is deleted, or by a person
            return self.error(exception.StorageTransferCancelled)
        said = b''.join(self._stderr)[-500:].decode(errors='replace').strip()
        return self.error(
            exception.StorageTransferError, side='source', operation='run',
            reason=_("the worker process ended with status %(status)d: "
                     "%(said)s") % {'status': worker.returncode,
                                    'said': said})

    def _advice_to_connect(self, side):
        uri = getattr(self, side).uri
        return (_ADVICE_CONNECT if urllib.parse.urlsplit(uri).netloc
                else _("check that libvirt runs on this host"))

    def _failed(self, report):
        self.transferred = report['transferred'] or self.transferred
        if report['reason'] == 'cancelled':
            return self.error(exception.StorageTransferCancelled)
        reason = _REASONS.get(report['reason'], '')
        if report['message']:
            reason = '%s%s' % (reason + ': ' if reason else '',
                               report['message'])
        if report['reason'] == 'libvirt':
            reason += _(" (libvirt error code %(code)d, domain %(domain)d)"
                        ) % report
            advice = _ADVICE.get(report['code'])
            if report['operation'] == 'connect':
                advice = self._advice_to_connect(report['side'])
            if advice:
                reason += '; ' + advice
        e = self.error(exception.StorageTransferError, reason=reason,
                       side=report['side'], operation=report['operation'])
        e.kind = report['reason']
        e.code, e.domain = report['code'], report['domain']
        return e
