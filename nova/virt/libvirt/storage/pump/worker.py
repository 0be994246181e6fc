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
lines say how much bandwidth there is now. stdin's end means that the parent
has gone or wants no more: then the process ends. It answers with lines of JSON
on stdout:

    {"transferred": bytes}
    {"result": {"data", "holes", "checksum", "physical", "allocation"}}
    {"error": {"side", "operation", "reason", "code", ...}}
"""

import importlib.machinery
import importlib.util
import json
import os
import stat
import sys
import threading
import time
import urllib.parse

import libvirt

# How long a cancelled copy has to abort its streams (seconds): cancel is
# promised within 0.1 s.
ABORT_SECONDS = 0.04


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


def messages():
    """Yield what the parent says, until it says no more."""
    unread = b''
    while piece := os.read(0, 65536):
        *lines, unread = (unread + piece).split(b'\n')
        yield from map(json.loads, lines)  # noqa: N324


class End:
    """A volume on one host, opened through that host's libvirt."""

    def __init__(self, side, uri, pool, volume):
        self.side = side
        # libvirt here, by its usual socket: paths are paths of this process.
        self.is_local = not urllib.parse.urlsplit(uri)[1] and '?' not in uri
        with step(side, 'connect'):
            self.conn = libvirt.open(uri)
        with step(side, 'look up pool'):
            pool = self.conn.storagePoolLookupByName(pool)
        with step(side, 'look up volume'):
            self.volume = pool.storageVolLookupByName(volume)

    def download(self, length):
        with step(self.side, 'download'):
            stream = self.conn.newStream(0)
            self.volume.download(
                stream, 0, length,
                libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM)
        return stream

    def file(self, length):
        """Open the volume's file, where that is what its bytes are.

        :returns: file descriptor, or None if only libvirt can read it
        """
        if not self.is_local:
            return None
        try:
            fd = os.open(self.volume.path(),
                         os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (OSError, libvirt.libvirtError):
            return None
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_size == length and (
                self.sizes()[0] == length):
            return fd
        os.close(fd)
        return None

    def upload(self, length, sparse):
        with step(self.side, 'upload'):
            stream = self.conn.newStream(0)
            self.volume.upload(
                stream, 0, length,
                libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM if sparse else 0)
        return stream

    def sizes(self):
        """Return the physical size and the allocation in bytes."""
        with step(self.side, 'get sizes'):
            physical = self.volume.infoFlags(
                libvirt.VIR_STORAGE_VOL_GET_PHYSICAL)[2]
            return physical, self.volume.info()[2]


class Job:
    def __init__(self, request, parent):
        self.request = request
        self.parent = parent
        self.lock = threading.Lock()    # of the three below
        self.copy = None
        self.cancelled = False
        self.bandwidth = request['bandwidth']

    def watch_parent(self):
        for message in self.parent:
            self.set_bandwidth(message['bandwidth'])
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

    def report_progress(self):
        last = None
        while True:
            now = self.copy.transferred
            if now != last:
                say(transferred=now)
                last = now
            time.sleep(self.request['interval'])

    def start(self, target):
        threading.Thread(target=target, daemon=True).start()

    def run(self):
        request = self.request
        pump = load_pump(request['extension'])
        length = request['length']
        source = End('source', *request['source'])
        destination = None
        if request['destination']:
            destination = End('destination', *request['destination'])
        if length:
            self.run_copy(pump, source, destination)
            checksum = self.copy.checksum
            data, holes = self.copy.data, self.copy.holes
        else:
            # A stream of length 0 would be one without a limit.
            checksum = pump.checksum([], request['key'])
            data = holes = 0
        physical, allocation = source.sizes()
        if physical != length:
            # A download ends at its length, whatever comes after.
            raise Failure('source', 'compare sizes',
                          'long' if physical > length else 'short',
                          transferred=length)
        if destination:
            physical, allocation = destination.sizes()
        say(result={'data': data, 'holes': holes, 'checksum': checksum,
                    'physical': physical, 'allocation': allocation})

    def run_copy(self, pump, source, destination):
        request = self.request
        length = request['length']
        fd = source.file(length)
        # A volume that is verified may be the only copy soon.
        download = (source.download(length) if fd is None else
                    pump.File(fd, length, sync=destination is None))
        upload = None
        if destination:
            upload = destination.upload(length, request['sparse'])
        with self.lock:
            self.copy = pump.Copy(
                download, upload, length, sparse=request['sparse'],
                bandwidth=self.bandwidth, key=request['key'])
            if self.cancelled:
                self.copy.cancel()
        self.start(self.report_progress)
        try:
            self.copy.run()
        except pump.PumpError as e:
            raise Failure(e.side, e.operation, e.reason, e.code, e.domain,
                          e.message, e.transferred)


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
        say(error=Failure('', 'run', 'worker', message='%s: %s' % (
            type(e).__name__, e)).report)
    # Not sys.exit(): closing a connection waits for a peer that may be gone.
    os._exit(0)


if __name__ == '__main__':
    sys.exit(main())
