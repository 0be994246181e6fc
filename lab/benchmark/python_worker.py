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

"""What the pump would be without C: the same copy in Python alone.

Run as a program: FILE URI POOL VOLUME. As the pump's worker does, it reads the
file of a volume of this host in one thread, which also makes the checksum, and
sends it to the other host's libvirt in another; holes stay holes. It makes the
volume first and prints checksum, bytes of data and bytes of holes.
"""

import errno
import hashlib
import os
import queue
import sys
import threading

import libvirt

SLOT_SIZE = 262144  # the pump's
SLOTS = 16
VOLUME = '''<volume><name>%s</name><capacity>%d</capacity>
<allocation>0</allocation><target><format type='raw'/></target></volume>'''
ZEROES = bytes(1 << 20)


class Stopped(Exception):
    pass


class Receiver(threading.Thread):
    """Puts data as bytes, holes as ints and None for the end in a queue."""

    def __init__(self, fd, length):
        super().__init__(daemon=True)
        self.fd, self.length = fd, length
        self.queue = queue.Queue(SLOTS)
        self.checksum = hashlib.sha256()
        self.error = None
        self.stopped = False

    def run(self):
        try:
            offset = 0
            while offset < self.length:
                offset = self.receive(offset)
        except Exception as error:
            self.error = error
        self.put(None)

    def put(self, item):
        while not self.stopped:
            try:
                return self.queue.put(item, timeout=1)
            except queue.Full:
                continue

    def receive(self, offset):
        """Read what comes next; return where it ends."""
        data = self.seek(offset, os.SEEK_DATA)
        if data > offset:
            self.hash_zeroes(data - offset)
            self.put(data - offset)
            return data
        hole = self.seek(offset, os.SEEK_HOLE)
        while offset < hole:
            if self.stopped:
                raise Stopped
            data = os.pread(self.fd, min(SLOT_SIZE, hole - offset), offset)
            if not data:
                raise EOFError('the file is too short')
            self.checksum.update(data)
            self.put(data)
            offset += len(data)
        return offset

    def seek(self, offset, whence):
        try:
            return min(os.lseek(self.fd, offset, whence), self.length)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return self.length

    def hash_zeroes(self, nbytes):
        """A hash must not see whether zeroes are a hole on this side."""
        while nbytes:
            piece = min(nbytes, len(ZEROES))
            self.checksum.update(memoryview(ZEROES)[:piece])
            nbytes -= piece


def send(stream, item):
    if isinstance(item, int):
        stream.sendHole(item)
        return
    rest = memoryview(item)
    while rest:
        sent = stream.send(bytes(rest) if len(rest) < len(item) else item)
        if sent <= 0:
            raise OSError('the stream took nothing')
        rest = rest[sent:]


def copy(path, uri, pool, name):
    fd = os.open(path, os.O_RDONLY)
    length = os.fstat(fd).st_size
    connection = libvirt.open(uri)
    volume = connection.storagePoolLookupByName(pool).createXML(
        VOLUME % (name, length))
    stream = connection.newStream()
    volume.upload(stream, 0, length,
                  libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
    receiver = Receiver(fd, length)
    receiver.start()
    sent = {bytes: 0, int: 0}
    try:
        while (item := receiver.queue.get()) is not None:
            send(stream, item)
            sent[type(item)] += item if type(item) is int else len(item)
        if receiver.error:
            raise receiver.error
        stream.finish()
    except BaseException:
        receiver.stopped = True
        stream.abort()
        raise
    return receiver.checksum.hexdigest(), sent[bytes], sent[int]


if __name__ == '__main__':
    print(*copy(*sys.argv[1:]))
