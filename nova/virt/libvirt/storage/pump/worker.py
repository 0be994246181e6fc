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
"""The process that moves a volume's bytes; started by process.py, by path.

Nova isn't imported here: a process with libvirt-python alone starts in a
tenth of a second, and, having no libvirt event loop, holds its memory flat
whatever the disk's size. The request comes as a line of JSON on stdin; later
lines say how much bandwidth there is now, and one with a length asks for the
second pass of a warm copy, which the request has announced. stdin's end means
that the parent has gone or wants no more: then the process ends. It answers
with lines of JSON on stdout, a pass with one result. "table" is a file
descriptor and a number of bytes: it has the checksums of so much that stands
at the destination already or, without a destination, takes the source's. With
"changed", (offset, length) of what may differ from what it has, it is brought
up to date, and no more than that is read where a file can be. "changes" is a
file descriptor, too: the second pass of a message with "changed" finds the
same there, for the source, and so does the first one of a request with "told".
"in_use" says of what is read that a guest may write to it meanwhile.

    {"transferred": bytes}
    {"result": {"data", "holes", "checksum", "physical", "allocation",
                "direct", "changed"}}
    {"error": {"side", "operation", "reason", "code", ...}}
"""

import bisect
import ctypes
import importlib.machinery
import importlib.util
import json
import os
import platform
import queue
import random
import stat
import sys
import threading
import time
import urllib.parse

import libvirt

# How long a cancelled copy has to abort its streams (seconds): cancel is
# promised within 0.1 s.
ABORT_SECONDS = 0.04
# TCP, TLS and NBD's greeting together: a server that is full is silent for
# ever, and one on a busy host for some seconds.
CONNECT_SECONDS = 30
# Between two passes a server hears from us as often: it ends what nobody
# writes to.
KEEP_SECONDS = 1

# What costs as much as a stream of its own, in bytes that are sent: when one
# has ended, libvirt looks at each volume of the pool, and lets nobody else in.
# For files that was 1.2 ms with none there, 2.7 with 50 and 19 with 450.
STREAM_COST, VOLUME_COST = 256 << 10, 12 << 10
# LVM's tools take some tenths of a second for that.
DEVICE_COST = 32 << 20

# Of what has changed so many places are told apart: a pipe takes 64 KiB from
# the parent without waiting for the reader.
MOST_CHANGED = 1024

# So many blocks are read in a second pass of which it is said that they have
# not changed: who says so may be wrong.
SAMPLE = 64

# ioprio_set(2) by machine; no library has it.
IOPRIO_SET = {'x86_64': 251, 'aarch64': 30, 'ppc64le': 273, 's390x': 282}
# IOPRIO_CLASS_NONE and _IDLE, shifted by IOPRIO_CLASS_SHIFT
IOPRIO_NONE, IOPRIO_IDLE = 0, 3 << 13

# libvirt's VIR_ERR_SYSTEM_ERROR, of its storage driver (VIR_FROM_STORAGE).
_CANT_OPEN = (38, 18)


# What SASL may want to know and libvirt finds in auth.conf. Without this list
# its client knows no mechanism that takes a password.
CREDENTIALS = [libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_PASSPHRASE,
               libvirt.VIR_CRED_REALM]


def ask_nobody(credentials, _opaque):
    return -1 if credentials else 0


class Failure(Exception):
    def __init__(self, side, operation, reason, code=0, domain=0, message='',
                 transferred=0):
        super().__init__(message)
        self.report = {
            'side': side, 'operation': operation, 'reason': reason,
            'code': code, 'domain': domain, 'message': message,
            'transferred': transferred}


class step:
    """Tells on which side and in which step a libvirt error came up."""

    def __init__(self, side, operation):
        self.side = side
        self.operation = operation

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, libvirt.libvirtError):
            raise Failure(self.side, self.operation, 'libvirt',
                          error.get_error_code() or 0,
                          error.get_error_domain() or 0,
                          error.get_error_message() or '')


_say_lock = threading.Lock()


def say(**message):
    with _say_lock:
        # Not jsonutils: nothing of OpenStack is imported here.
        line = json.dumps(message)  # noqa: N324
        os.write(1, line.encode() + b'\n')


def load_pump(path):
    # Its initialisation is named after the file.
    name = os.path.basename(path).partition('.')[0]
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def set_io_priority(priority):
    """Of this thread, and of those which it starts from now on.

    It is looked at by some of the kernel's I/O schedulers alone.
    """
    number = IOPRIO_SET.get(platform.machine())
    if number is not None:
        # IOPRIO_WHO_PROCESS, this thread
        ctypes.CDLL(None).syscall(number, 1, 0, priority)


def joined(ranges, most=MOST_CHANGED):
    """Join ranges with what is between them until they are few.

    :param ranges: list of (offset, length), in order
    :returns: such a list, no longer than most
    """
    gap = 65536
    while len(ranges) > most:
        found = []
        for start, length in ranges:
            if found and start - sum(found[-1]) <= gap:
                start, length = found[-1][0], start + length - found[-1][0]
                found.pop()
            found.append((start, length))
        ranges, gap = found, gap * 2
    return ranges


def covers(blocks, block):
    """Whether one of the ranges has a block.

    :param blocks: list of (first, count), in order
    """
    at = bisect.bisect_right(blocks, (block, float('inf'))) - 1
    return at >= 0 and block < sum(blocks[at])


def sample(blocks, total):
    """Pick blocks at random that are in none of the ranges.

    :param blocks: list of (first, count), in order
    :param total: how many there are
    """
    return [block for block in random.sample(range(total), min(total, SAMPLE))
            if not covers(blocks, block)]


def messages():
    """Yield what the parent says, until it says no more."""
    unread = b''
    while piece := os.read(0, 65536):
        *lines, unread = (unread + piece).split(b'\n')
        yield from map(json.loads, lines)  # noqa: N324


class End:
    """A volume on one host, opened through that host's libvirt."""

    takes_holes = False

    def __init__(self, side, uri, pool, volume):
        self.side = side
        self._place = uri, pool, volume
        self._before = None
        # libvirt here, by its usual socket: paths are paths of this process.
        self.is_local = not urllib.parse.urlsplit(uri)[1] and '?' not in uri
        self._fd = None
        with step(side, 'connect'):
            self.conn = libvirt.openAuth(
                uri, [CREDENTIALS, ask_nobody, None], 0)
        with step(side, 'look up pool'):
            self.pool = self.conn.storagePoolLookupByName(pool)
        with step(side, 'look up volume'):
            self.volume = self.pool.storageVolLookupByName(volume)

    def download(self, length):
        with step(self.side, 'download'):
            stream = self.conn.newStream(0)
            self.volume.download(
                stream, 0, length,
                libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
        return stream

    def file(self, length, direct=False, may_grow=False):
        """Open the volume's file, where that is what its bytes are.

        libvirt isn't asked for its size: it would open what a guest has named
        in the header of a raw disk.

        :param direct: past the page cache, where the file system can do that
        :param may_grow: it may be longer
        :returns: file descriptor, or None if only libvirt can read it
        """
        if not self.is_local:
            return None
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        for more in [os.O_DIRECT, 0] if direct else [0]:
            try:
                fd = os.open(self.volume.path(), flags | more)
                break
            except (OSError, libvirt.libvirtError):
                continue
        else:
            return None
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and (
                found.st_size >= length if may_grow
                else found.st_size == length):
            self._fd = fd
            return fd
        os.close(fd)
        return None

    def is_device(self):
        with step(self.side, 'get sizes'):
            return self.volume.info()[0] == libvirt.VIR_STORAGE_VOL_BLOCK

    def upload(self, length, sparse):
        with step(self.side, 'upload'):
            stream = self.conn.newStream(0)
            self.volume.upload(
                stream, 0, length,
                libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM if sparse else 0)
        return stream

    def update(self, pump):
        return pump.Update(self.conn, self.volume)

    def bridge(self):
        """How many bytes that stand there are better sent than left out."""
        with step(self.side, 'look up volume'):
            if self.volume.path().startswith('/dev/'):
                return DEVICE_COST
            return STREAM_COST + self.pool.numOfVolumes() * VOLUME_COST

    def keep(self):
        """Between two passes nothing is open that could be lost."""

    def again(self, length, has_room):
        """Return what the second pass writes to.

        libvirt may have been restarted meanwhile.

        :param length: bytes of the source by now
        :param has_room: the volume's room was taken beforehand, and there may
            be no more
        """
        found = End(self.side, *self._place)
        # To close a connection may be to wait for a host that is gone.
        found._before = self
        if has_room:
            found.check(length)
        return found

    def check(self, length):
        physical, _allocation = self.sizes_written(length, 0)
        if physical < length:
            raise Failure(self.side, 'look up volume', 'small',
                          message='%d of %d' % (physical, length))

    def fit(self, length):
        """Have a file that was written over end where its content does."""
        physical, _allocation = self.sizes_written(length, 0)
        if physical == length or self.is_device():
            return
        with step(self.side, 'cut'):
            stream = self.conn.newStream(0)
            self.volume.upload(
                stream, length - 1, 1,
                libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
            # What lies under it stays, and the file ends behind it.
            stream.sendHole(1)
            stream.finish()

    def sizes(self):
        """Return the physical size and the allocation in bytes."""
        if self._fd is not None:
            found = os.fstat(self._fd)
            return found.st_size, found.st_blocks * 512
        with step(self.side, 'get sizes'):
            physical = self.volume.infoFlags(
                libvirt.VIR_STORAGE_VOL_GET_PHYSICAL)[2]
            return physical, self.volume.info()[2]

    def sizes_written(self, length, data):
        """Return the sizes of what was written here, or what they should be.

        The guest of a raw disk writes its header. libvirt then tells no sizes
        if it can't open what that names; who takes the volume over looks at
        the file itself.

        :param length: bytes that the volume should have
        :param data: bytes of it that were sent
        """
        try:
            return self.sizes()
        except Failure as e:
            report = e.report
            if ((report['code'], report['domain']) != _CANT_OPEN or
                    self.volume.path() in report['message']):
                raise
            return length, data

    def close(self):
        """All that counts has been done; the process ends soon."""


class Export:
    """An export of an NBD server as the destination."""

    # Zeroes cost it nothing.
    takes_holes = True

    def __init__(self, request, length):
        self.nbd = load_pump(request['extension'])
        # Never in a file: libnbd wants a path, and reads it while it connects.
        key = os.memfd_create('key')
        os.write(key, ('%(username)s:%(key)s\n' % request).encode())
        try:
            self.connection = self.nbd.Connection(
                request['host'], request['port'], request['name'],
                username=request['username'],
                psk_file='/proc/self/fd/%d' % key, timeout=CONNECT_SECONDS)
        except self.nbd.NbdError as e:
            raise Failure('destination', 'connect', 'nbd', e.code, 0,
                          e.message)
        finally:
            os.close(key)
        self.check(length)

    def check(self, length):
        if self.connection.size < length:
            raise Failure('destination', 'connect', 'small',
                          message='%d of %d' % (self.connection.size, length))

    def upload(self, length, sparse):
        return self.nbd.Export(self.connection, blank=sparse)

    def update(self, pump):
        return self.nbd.Export(self.connection, blank=False)

    def bridge(self):
        return 0

    def sizes_written(self, length, data):
        return self.connection.size, None

    def again(self, length, has_room):
        self.check(length)
        return self

    def fit(self, length):
        """Who closes it says how long it is."""

    def keep(self):
        """Tell the server that there is more to come."""
        try:
            self.connection.flush(timeout=CONNECT_SECONDS)
        except self.nbd.NbdError as e:
            raise Failure('destination', 'wait', 'nbd', e.code, 0, e.message)

    def close(self):
        self.connection.close()


class Job:
    def __init__(self, request, parent):
        self.request = request
        self.parent = parent
        self.lock = threading.Lock()    # of the three below
        self.copy = None
        self.cancelled = False
        self.bandwidth = request['bandwidth']
        self.direct = False     # whether libvirt isn't asked for the bytes
        self.second: queue.Queue[tuple] = queue.Queue()

    def watch_parent(self):
        for message in self.parent:
            self.set_bandwidth(message['bandwidth'])
            if 'length' in message:
                self.second.put((message['length'], message.get('changed')))
        with self.lock:
            self.cancelled = True
            copy = self.copy
        if copy is not None:
            copy.cancel()
            time.sleep(ABORT_SECONDS)
        os._exit(1)

    def set_bandwidth(self, bandwidth):
        with self.lock:
            self.bandwidth = bandwidth
            if self.copy is not None:
                self.copy.bandwidth = bandwidth

    def report_progress(self, copy, ended):
        last = None
        while not ended.is_set():
            now = copy.transferred
            if now != last:
                say(transferred=now)
                last = now
            ended.wait(self.request['interval'])

    def start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        return thread

    def run(self):
        request = self.request
        pump = load_pump(request['extension'])
        length = request['length']
        table = None
        table_file, table_length = request.get('table') or (None, length)
        if request['warm'] or table_file is not None:
            table = pump.Table(table_length, request['key'])
        changed = request.get('changed')
        if table_file is not None and (request['warm'] or
                                       changed is not None):
            with open(table_file, 'rb', closefd=False) as file:
                table.load(file.read())
        source = End('source', *request['source'])
        destination = None
        before = 0
        if isinstance(request['destination'], dict):
            destination = Export(request['destination'], length)
        elif request['destination']:
            destination = End('destination', *request['destination'])
        in_use = request.get('in_use', False)
        if request['warm'] or in_use:
            set_io_priority(IOPRIO_IDLE)
        if request['warm']:
            found = self.run_pass(
                pump, source, destination, length, table=table, in_use=True,
                changed=self.read_changes() if request.get('told') else None)
            before = found['data']
            say(result={**found, 'allocation': None, 'physical':
                        destination.sizes_written(length, before)[0]})
            length, is_told = self.wait_for_second(destination)
            changed = self.read_changes() if is_told else None
            set_io_priority(IOPRIO_NONE)
            table.grow(length)
            destination = destination.again(length, not request['sparse'])
            # libvirt may have been restarted meanwhile
            source = End('source', *request['source'])
        found = self.run_pass(pump, source, destination, length, table=table,
                              in_use=in_use, changed=changed)
        physical, allocation = source.sizes()
        if physical != length and not in_use and not (
                # What was copied to a block device may be shorter than that.
                destination is None and physical > length and
                source.is_device()):
            # A download ends at its length, whatever comes after.
            raise Failure('source', 'compare sizes',
                          'long' if physical > length else 'short',
                          transferred=length)
        if destination:
            if request['warm']:
                destination.fit(length)
            physical, allocation = destination.sizes_written(
                length, min(length, max(before, found['data'])))
            destination.close()
        elif table:
            os.pwrite(table_file, table.dump(), 0)
        say(result={**found, 'physical': physical, 'allocation': allocation,
                    'direct': self.direct})

    def wait_for_second(self, destination):
        """Return the second pass's length, and whether changes are told."""
        while True:
            try:
                return self.second.get(timeout=KEEP_SECONDS)
            except queue.Empty:
                destination.keep()

    def read_changes(self):
        with open(self.request['changes'], 'rb', closefd=False) as file:
            # An earlier pass may have read it.
            file.seek(0)
            return json.load(file)  # noqa: N324

    def run_pass(self, pump, source, destination, length, *, table,
                 in_use=False, changed=None):
        if not length:
            # A stream of length 0 would be one without a limit.
            return {'data': 0, 'holes': 0,
                    'checksum': pump.checksum([], self.request['key'])}
        known = table is not None and table.filled
        unchanged = self.run_copy(
            pump, source, destination, length, table=table, in_use=in_use,
            changed=changed)
        # To look for them takes as long as there are blocks.
        told = table.changed if known else []
        wrong = [block for block in unchanged if covers(told, block)]
        if wrong:
            raise Failure('source', 'compare', 'unmarked',
                          message='%d of %d' % (len(wrong), len(unchanged)))
        size = table.block_size if known else 0
        # Of what was unchanged nothing is known but that it is there.
        return {'data': self.copy.data, 'checksum': self.copy.checksum,
                'holes': length - self.copy.data,
                'changed': joined([(first * size, count * size)
                                   for first, count in told])
                if known else None}

    def run_copy(self, pump, source, destination, length, *, table,
                 in_use=False, changed=None):
        """:returns: the blocks of a sample, which should not have changed"""
        request = self.request
        sparse, warm = request['sparse'], table is not None
        # Then something stands there, of which it tells.
        known = warm and table.filled
        blocks, unchanged = None, []
        fd = source.file(length, direct=warm, may_grow=in_use)
        self.direct = fd is not None
        if self.direct and changed is not None:
            size = table.block_size
            blocks = [(start // size, -(-(start + n) // size) - start // size)
                      for start, n in changed]
            if destination and not in_use:
                # Without the last one, which may be longer by now.
                unchanged = sample(blocks, (length - 1) // size)
                blocks += [(block, 1) for block in unchanged]
        # A volume that is verified may be the only copy soon.
        sync = destination is None and not in_use
        download = (source.download(length) if fd is None else
                    pump.File(fd, length, sync=sync, direct=warm))
        upload, bridge = None, 0
        if destination:
            upload = (destination.update(pump) if known else
                      destination.upload(length, sparse))
            sparse = destination.takes_holes or (sparse and not known)
            bridge = destination.bridge() if known else 0
        with self.lock:
            self.copy = pump.Copy(
                download, upload, length, sparse=sparse,
                find_holes=request.get('find_holes', False) and not known,
                bandwidth=self.bandwidth,
                key=request['key'], table=table, only_changes=known,
                blocks=blocks, bridge=bridge)
            if self.cancelled:
                self.copy.cancel()
        ended = threading.Event()
        reporter = self.start(self.report_progress, self.copy, ended)
        try:
            self.copy.run()
        except pump.PumpError as e:
            raise Failure(e.side, e.operation, e.reason, e.code, e.domain,
                          e.message, e.transferred)
        finally:
            # Nothing of this pass is told during the next one.
            ended.set()
            reporter.join()
        return unchanged


def main():
    # libvirt's default handler prints; errors are reported once, by say().
    libvirt.registerErrorHandler(lambda context, error: None, None)
    parent = messages()
    request = next(parent, None)
    if request is None:
        os._exit(1)
    job = Job(request, parent)
    job.start(job.watch_parent)
    try:
        job.run()
    except Failure as e:
        say(error=e.report)
    except Exception as e:
        say(error=Failure('source', 'run', 'worker', message='%s: %s' % (
            type(e).__name__, e)).report)
    # Not sys.exit(): closing a connection waits for a peer that may be gone.
    os._exit(0)


if __name__ == '__main__':
    sys.exit(main())
