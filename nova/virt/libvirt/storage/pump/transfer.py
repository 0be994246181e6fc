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
"""Volumes' bytes from one host to another; knows nothing of instances.

They go to the other host's libvirt, or to an export of an NBD server there.

Each transfer runs in a worker process of its own (process.py, worker.py).
Nova's process has a libvirt event loop, which reads a stream's packets as they
come, whether or not anybody takes them: copying there would need as much
memory as the destination is slower than the source. A process can also be
killed, which a libvirt call that hangs can't be.

Without an event loop there is no libvirt keepalive. A peer that vanishes is
noticed by the deadline for progress, stall_timeout.

The functions block their thread (under eventlet: their green thread).
"""

import contextlib
import dataclasses
import importlib.util
import os
import random
import time
import typing as ty

from oslo_log import log as logging
from oslo_serialization import jsonutils

from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage.pump import bandwidth as pump_bandwidth
from nova.virt.libvirt.storage.pump import nbd
from nova.virt.libvirt.storage.pump import process

LOG = logging.getLogger(__name__)

Bandwidth = pump_bandwidth.Bandwidth
Export = nbd.Export
NBD_CONNECTIONS = nbd.CONNECTIONS
nbd_missing = nbd.missing

_EXTENSION = 'nova.virt.libvirt.storage.pump._copy'

# Of the checksums: a key is less.
PRIME = (1 << 61) - 1

# Bytes of a block's checksum in a table, of the least block, and of a table
# that are compared at once.
_VALUE, _LEAST_BLOCK, _COMPARED = 8, 65536, 8192

# (offset, length) in bytes
Ranges = ty.Sequence[tuple[int, int]]

# VIR_ERR_NO_STORAGE_VOL
_NO_STORAGE_VOL = 50


def new_key() -> int:
    """Return a random key for a checksum."""
    return random.SystemRandom().randrange(1, PRIME)


def extension_path() -> str:
    """Return the path of the compiled extension.

    :raises: StoragePumpMissing
    """
    spec = importlib.util.find_spec(_EXTENSION)
    if spec is None or not spec.origin:
        raise exception.StoragePumpMissing(module=_EXTENSION)
    return spec.origin


class Volume(ty.NamedTuple):
    """Where a volume is: libvirt's URI, pool name, volume name."""
    uri: str
    pool: str
    name: str

    def __str__(self):
        return '%s in pool %s at %s' % (self.name, self.pool, self.uri)


@dataclasses.dataclass(frozen=True)
class Watch:
    """Who looks on at a transfer, and how long; all on the waiting thread.

    :ivar stall_timeout: seconds without progress after which to give up;
        connecting counts
    :ivar progress: called with the bytes done so far, holes included; its
        first call says that the connections to both ends stand
    :ivar on_start: called with the worker's process id
    :ivar on_end: called with the same when it has ended
    :ivar cancelled: asked every 0.04 s whether to stop
    """
    stall_timeout: float = 60
    progress: ty.Callable[[int], ty.Any] = lambda transferred: None
    on_start: ty.Callable[[int], ty.Any] = lambda pid: None
    on_end: ty.Callable[[int], ty.Any] = lambda pid: None
    cancelled: ty.Callable[[], bool] = lambda: False


@dataclasses.dataclass(frozen=True)
class Result:
    """What a transfer moved and what stood there afterwards.

    :ivar data: bytes that travelled as data
    :ivar holes: bytes that travelled as holes
    :ivar checksum: of the content under key
    :ivar key: of the checksum
    :ivar physical: bytes; size of the volume written (or read) afterwards
    :ivar allocation: bytes which that volume takes up; None of an export
    :ivar seconds: from the worker's start to its end
    :ivar direct: whether the source's file was read; else it came through
        libvirt, which costs more
    :ivar changed: (offset, length) in bytes of what was another content, or
        was between such, where that was known; else None. The last one may
        go beyond the end.
    """
    data: int
    holes: int
    checksum: int
    key: int
    physical: int
    allocation: int | None
    seconds: float
    direct: bool = False
    changed: Ranges | None = None

    @property
    def length(self):
        return self.data + self.holes


@dataclasses.dataclass(frozen=True)
class Job:
    """What is copied byte for byte or, without a destination, read.

    A source on this host (a URI without host and query) is read from its file
    where this process may open that, and through libvirt elsewhere: each byte
    that comes through the daemon costs both it and us.

    :ivar source: where the bytes come from
    :ivar destination: a new volume, an export or None to read the source
    :ivar length: bytes; the source's *physical* size. A source that is
        shorter or longer is an error, but for a device that is only read.
    :ivar sparse: leave holes where the source has them. libvirt leaves them
        in a file, which has to be new, and writes zeroes to a device.
    :ivar find_holes: leave holes where the source has zeroes, too: of a block
        device nothing else tells what was never written
    :ivar key: for the checksum; a random one by default
    """
    source: Volume
    destination: Volume | Export | None
    length: int
    sparse: bool = True
    find_holes: bool = False
    key: int = dataclasses.field(default_factory=new_key)

    def __post_init__(self):
        if self.length < 0:
            raise ValueError('length is negative: %d' % self.length)

    def run(self, watch: Watch = Watch(),
            bandwidth: Bandwidth | int = 0,
            table: tuple[int, int] | None = None,
            changed: Ranges | None = None, in_use: bool = False) -> Result:
        """Do it in a worker process, and wait for that.

        Nothing is removed on failure: the caller made the destination's
        volume. A clean end says that libvirt has taken all bytes and has room
        for them, or that the NBD server has flushed them and the connection
        is closed; whether the volume's content is right is for verify() to
        say.

        What is read without a destination is on disk afterwards, if the volume
        is one of this host whose file this process may open. Of a volume that
        libvirt alone can read nothing can be synced: it is what the page cache
        of its host says.

        :param bandwidth: bytes a second at most, 0 for no limit; or the
            Bandwidth that this job shares with others
        :param table: file descriptor that gets the checksums of the blocks
            of what is read without a destination, and for how many bytes
        :param changed: it has them already, and these may not be right
        :param in_use: a guest may write to what is read without a destination,
            and have it grow: its I/O comes first, and nothing is synced
        :raises: StorageTransferError, StorageTransferStalled,
            StorageTransferCancelled, StorageTransferMismatch,
            StoragePumpMissing
        """
        if isinstance(bandwidth, int):
            bandwidth = Bandwidth(bandwidth)
        worker = process.WorkerProcess(
            self, watch, extension_path(), table=table, changed=changed,
            in_use=in_use)
        start = time.monotonic()
        found = worker.run(bandwidth)
        result = Result(key=self.key, seconds=time.monotonic() - start,
                        **found)
        if self.destination and result.physical < self.length:
            raise worker.error(
                exception.StorageTransferMismatch,
                reason=_("it has %(physical)d bytes of %(length)d") % {
                    'physical': result.physical, 'length': self.length})
        self.check_written(result, result.data, watch)
        return result

    def check_written(self, result: Result, data: int, watch: Watch) -> None:
        """Read a volume back that takes up less than was sent to it.

        libvirt writes what it has taken later, and virStreamFinish reports no
        error of that (virFDStreamCloseInt): the file system may be full. Or it
        compresses, which only the content can tell.

        :param data: bytes that were sent to it, at least
        :raises: as verify()
        """
        volume = self.destination
        if not isinstance(volume, Volume) or (
                result.allocation is None or result.allocation >= data):
            return
        LOG.info('Volume %(volume)s takes up %(allocation)d bytes and '
                 '%(data)d were sent; it is read back',
                 {'volume': volume, 'allocation': result.allocation,
                  'data': data})
        verify(volume, result.length, result.checksum, key=result.key,
               stall_timeout=watch.stall_timeout, on_start=watch.on_start,
               on_end=watch.on_end, cancelled=watch.cancelled)


class Known(ty.NamedTuple):
    """What stands in an export before anything is sent to it.

    :ivar length: bytes of it
    :ivar table: what read_table() says of them, under the copy's key
    """
    length: int
    table: bytes

    def differs_from(self, table: bytes) -> list[tuple[int, int]]:
        """Say where other content stands elsewhere.

        :param table: what is known of that, for the same length and key
        :returns: list of (offset, length) in bytes, in order
        :raises: ValueError if it isn't of the same length
        """
        blocks = len(table) // _VALUE
        if not blocks or len(table) != len(self.table):
            raise ValueError('%d bytes are no table beside one of %d' % (
                len(table), len(self.table)))
        size = _LEAST_BLOCK
        while -(-self.length // size) > blocks:
            size *= 2
        found: list[tuple[int, int]] = []
        for at in range(0, len(table), _COMPARED):
            here = table[at:at + _COMPARED]
            there = self.table[at:at + _COMPARED]
            # Most of it is equal.
            for n in range(0, len(here), _VALUE) if here != there else ():
                if here[n:n + _VALUE] == there[n:n + _VALUE]:
                    continue
                start = (at + n) // _VALUE * size
                if found and sum(found[-1]) == start:
                    found[-1] = (found[-1][0], found[-1][1] + size)
                else:
                    found.append((start, size))
        return found


class WarmCopy:
    """A copy in two passes, of which the first is a warm one.

    first() may run while a guest writes to the source; rest() is for when it
    doesn't any more, and sends what differs. Between them the connection to
    an export stays; libvirt is connected to anew. What the first pass read
    only costs bytes where it was torn or is old: the second one reads all of
    it again, unless somebody else knows what may have changed, and takes for
    granted no more than that the destination has what was sent to it.

    It is a context manager, which ends what is under way. When any pass has
    failed, begin anew with another destination.

    :param source: where the bytes come from
    :param destination: an export, or a new volume, that nothing was written to
        yet
    :param length: bytes of the source that the first pass reads, one at least
    :param key: for the checksum; a random one by default
    :param sparse: as in Job. A volume that can't have holes has all the room
        that it will ever have, and takes no more.
    :param find_holes: as in Job; of the first pass
    :param known: what read_table() says of all of the export, if something
        was written to it before: the first pass sends what differs, too. What
        the export has beyond length reads as zeroes.
    """

    def __init__(self, source: Volume, destination: Volume | Export,
                 length: int, key: int | None = None, sparse: bool = True,
                 known: 'Known | None' = None, find_holes: bool = False):
        if length <= 0:
            raise ValueError('length is out of range: %d' % length)
        self._job = Job(source, destination, length, sparse, find_holes,
                        key=new_key() if key is None else key)
        self._known = known
        self._sent = 0
        self._changes: int | None = None
        self._worker: process.WorkerProcess | None = None

    @property
    def key(self) -> int:
        """For the checksums of both passes."""
        return self._job.key

    def __enter__(self) -> 'WarmCopy':
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        """End the worker, and with it the connection; it may have ended."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()
        fd, self._changes = self._changes, None
        if fd is not None:
            os.close(fd)

    def first(self, watch: Watch = Watch(),
              bandwidth: Bandwidth | int = 0,
              changed: Ranges | None = None) -> Result:
        """Send all of it. Reading it yields to other I/O of the disk.

        :param changed: (offset, length) in bytes, in order, of what may differ
            from what is known; by default anything may. What differs
            elsewhere is for rest() to be told.
        :returns: what was sent; its checksum is no content's that ever was,
            if somebody wrote meanwhile
        :raises: as Job.run()
        """
        if self._worker is not None:
            raise RuntimeError('a first pass runs once')
        if changed is not None and self._known is None:
            raise ValueError('it is not known what the destination has')
        known = self._known or Known(0, b'')
        self._changes = os.memfd_create('changes')
        self._tell(changed)
        with _table_file(known.table) as file:
            self._worker = process.WorkerProcess(
                self._job, watch, extension_path(), warm=True,
                table=(file, known.length) if self._known else None,
                changes=self._changes, told=changed is not None)
            self._worker.start()
        result = self._do(self._worker, bandwidth, last=False)
        self._sent = result.data
        return result

    def rest(self, length: int, watch: Watch = Watch(),
             bandwidth: Bandwidth | int = 0,
             changed: Ranges | None = None) -> Result:
        """Send what differs from what the first pass has sent.

        :param length: bytes that the source has now. What an export has
            beyond them is left as it is; a volume ends there.
        :param changed: (offset, length) in bytes, in order, of what may have
            changed since the first pass began, and of all that it has not
            read; by default anything may. No more is read of a source whose
            file this process may open, but for a sample: it is an error if
            that has changed, as then nothing is known.
        :returns: the content's checksum; data are the bytes sent in this pass
        :raises: as Job.run()
        """
        if self._worker is None:
            raise RuntimeError('there is no first pass that ended well')
        self._job = dataclasses.replace(self._job, length=length)
        self._tell(changed)
        self._worker.ask_again(self._job, watch, changed is not None)
        try:
            result = self._do(self._worker, bandwidth, last=True)
        finally:
            self.close()
        self._job.check_written(
            result, min(length, max(self._sent, result.data)), watch)
        return result

    def _tell(self, changed):
        if changed is None:
            return
        os.ftruncate(self._changes, 0)
        os.pwrite(self._changes, jsonutils.dump_as_bytes(list(changed)), 0)

    def _do(self, worker, bandwidth, last):
        if isinstance(bandwidth, int):
            bandwidth = Bandwidth(bandwidth)
        start = time.monotonic()
        try:
            found = worker.do(bandwidth, last=last)
        except BaseException:
            self.close()
            raise
        return Result(key=self._job.key, seconds=time.monotonic() - start,
                      **found)


def _watch(keywords):
    # None is as good as nothing
    return Watch(**{name: value for name, value in keywords.items()
                    if value is not None})


def copy(source: Volume, destination: Volume | Export, length: int, *,
         sparse: bool = True, find_holes: bool = False,
         key: int | None = None, bandwidth: Bandwidth | int = 0,
         **watch) -> Result:
    """Copy a volume's content into a new one: a Job in one call.

    :param watch: keywords of Watch
    :returns: Result
    :raises: as Job.run()
    """
    job = Job(source, destination, length, sparse, find_holes,
              new_key() if key is None else key)
    return job.run(_watch(watch), bandwidth)


def read(volume: Volume, length: int, *, key: int, **watch) -> Result:
    """Read a volume for its checksum: a Job in one call.

    :param watch: keywords of Watch
    :returns: Result
    :raises: as Job.run()
    """
    return Job(volume, None, length, key=key).run(_watch(watch))


def read_table(volume: Volume, length: int, *, key: int,
               room: int | None = None, in_use: bool = False,
               **watch) -> bytes:
    """Read a volume for the checksums of its blocks.

    :param volume: of this host
    :param length: bytes, one at least
    :param key: for the checksums
    :param room: bytes that the table is for, if these are more: what follows
        counts as zeroes
    :param in_use: a guest may write to the volume meanwhile, as in Job.run()
    :param watch: keywords of Watch
    :returns: what a WarmCopy may know, 8 bytes a block of at least 64 KiB
    :raises: as Job.run()
    """
    with _table_file() as file:
        Job(volume, None, length, key=key).run(
            _watch(watch), table=(file, room or length), in_use=in_use)
        return os.pread(file, os.fstat(file).st_size, 0)


def read_again(volume: Volume, length: int, known: Known, changed: Ranges, *,
               key: int, **watch) -> tuple[Result, Known]:
    """Read of a volume what may have changed since read_table().

    Of a volume that libvirt alone can read all is read.

    :param volume: of this host
    :param length: bytes that it has now; no more than were known
    :param known: what read_table() said under the same key
    :param changed: (offset, length) of what may have changed
    :param watch: keywords of Watch
    :returns: the Result, with the checksum of the whole content, and what is
        known now
    :raises: as Job.run()
    """
    with _table_file(known.table) as file:
        result = Job(volume, None, length, key=key).run(
            _watch(watch), table=(file, known.length), changed=changed)
        return result, Known(known.length, os.pread(
            file, os.fstat(file).st_size, 0))


@contextlib.contextmanager
def _table_file(content: bytes | None = None):
    """A file descriptor through which a worker gets or gives a table."""
    fd = os.memfd_create('table')
    try:
        with open(fd, 'wb', closefd=False) as file:
            file.write(content or b'')
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


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
    with _missing_as_mismatch(volume):
        result = read(volume, length, **kwargs)
    return _compare(volume, result, checksum)


def verify_known(volume: Volume, length: int, checksum: int, known: Known,
                 changed: Ranges, **kwargs) -> Result:
    """As verify(), but read no more than what may have changed.

    :param known: as read_again(), whose keywords the others are
    :param changed: likewise
    """
    with _missing_as_mismatch(volume):
        result, _known = read_again(volume, length, known, changed, **kwargs)
    return _compare(volume, result, checksum)


@contextlib.contextmanager
def _missing_as_mismatch(volume):
    try:
        yield
    except exception.StorageTransferError as e:
        if e.kind not in ('short', 'long') and e.code != _NO_STORAGE_VOL:
            raise
        raise exception.StorageTransferMismatch(
            volume=volume.name, where=str(volume), reason=e)


def _compare(volume, result, checksum):
    if result.checksum != checksum:
        raise exception.StorageTransferMismatch(
            volume=volume.name, where=str(volume),
            reason=_("its checksum is %(is)016x instead of %(sent)016x; check "
                     "that the pool has room, and its file system for errors"
                     ) % {'is': result.checksum, 'sent': checksum})
    return result
