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

"""Copies in two passes into volumes of another host's libvirt."""

import os
from unittest import mock

import ddt

from nova import exception
from nova.tests.unit.virt.libvirt.storage.pump import ends
from nova.tests.unit.virt.libvirt.storage.pump import test_warm
from nova.tests.unit.virt.libvirt.storage.pump import test_worker
from nova.virt.libvirt.storage.pump import process
from nova.virt.libvirt.storage.pump import transfer as pump

MIB = test_warm.MIB

# Volumes are files that are written to as libvirt does that, and what is done
# to them stands in another one. With a third one there is no more room.
PLAYED = test_worker.PLAYED.partition('class Stream')[0] + """
def note(path, *what):
    with open(path + '.log', 'a') as f:
        f.write(' '.join(map(str, what)) + '\\n')

class Stream(ends.StubStream):
    def begin(self, path, offset):
        self.path, self.offset = path, offset
        self.fd = os.open(path, os.O_WRONLY)
    def send(self, stream, data, nbytes):
        if os.path.exists(self.path + '.full'):
            return -1
        data = ends.ctypes.string_at(data, nbytes)
        self.offset += os.pwrite(self.fd, data, self.offset)
        return nbytes
    def send_hole(self, stream, length, flags):
        self.offset += length
        os.ftruncate(self.fd, self.offset)
        return 0
    def sendHole(self, length):
        return self.send_hole(None, length, 0)
    def skip(self, stream, length):
        note(self.path, 'skip')
        self.offset += length
        return 0
    def finish(self, stream=None):
        return 0

class Volume:
    def __init__(self, path):
        self.name = path
    def path(self):
        return self.name
    def infoFlags(self, flags):
        return [0, 0, os.path.getsize(self.name)]
    def info(self):
        return [0, 0, os.stat(self.name).st_blocks * 512]
    def upload(self, stream, offset, length, flags):
        note(self.name, 'upload', offset, length, flags)
        stream.begin(self.name, offset)

class Connection:
    def storagePoolLookupByName(self, name):
        return self
    def storageVolLookupByName(self, name):
        note(name, 'look up')
        return Volume(name)
    def numOfVolumes(self):
        return 2
    def newStream(self, flags):
        return Stream()

libvirt = types.ModuleType('libvirt')
libvirt.libvirtError = type('libvirtError', (Exception,), {})
libvirt.registerErrorHandler = lambda handler, context: None
libvirt.VIR_CRED_AUTHNAME = libvirt.VIR_CRED_PASSPHRASE = 1
libvirt.VIR_CRED_REALM = 2
libvirt.openAuth = lambda uri, auth, flags: Connection()
libvirt.VIR_STORAGE_VOL_GET_PHYSICAL = 1
libvirt.VIR_STORAGE_VOL_BLOCK = 1
libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM = 1
sys.modules['libvirt'] = libvirt
worker = load('worker', %(worker)r)

def update(self, pump):
    stream = Stream()
    stream.begin(self.volume.name, 0)
    note(self.volume.name, 'update')
    return stream

worker.End.update = update
worker.main()
"""


@ddt.ddt
class WarmVolumeTestCase(test_warm.WritingTestCase):
    """Both passes, by the real process."""

    def played(self):
        return PLAYED % {'ends': ends.__file__, 'worker': process._WORKER}

    def volume(self, length):
        """A new volume of the other host's."""
        with open(self.path, 'wb') as f:
            f.truncate(length)
        return pump.Volume('qemu+tls://dest/system', 'pool', self.path)

    def copied(self, length):
        self.assertEqual(length, os.path.getsize(self.path))
        with open(self.path, 'rb') as f:
            return f.read()

    def log(self):
        with open(self.path + '.log') as f:
            return f.read().splitlines()

    def test_nobody_writes(self):
        length = 6 * MIB + 5
        source = self.source(os.urandom(3 * MIB + 700), length)
        copy = self.warm(source, self.volume(length), length, key=77)
        first = copy.first(self.watch())
        self.assertEqual((0, length), (self.told[0], self.told[-1]))
        result = copy.rest(length, self.watch())
        self.assertEqual((0, length), (result.data, self.told[-1]))
        self.assertEqual((first.checksum, 77), (result.checksum, result.key))
        self.check(source, result)
        # Connected to anew, and nothing had to be cut.
        self.assertEqual(['look up', 'upload 0 %d 1' % length, 'look up',
                          'update'], self.log())

    @ddt.data(True, False)
    def test_somebody_writes_meanwhile_and_afterwards(self, sparse):
        length = 24 * MIB
        source = self.source(b'', length)
        self.write(source, 20 * MIB)
        copy = self.warm(source, self.volume(length), length, sparse=sparse)

        def progress(done):
            self.told.append(done)
            self.write(source, 300000)

        copy.first(self.watch(progress), bandwidth=16 * MIB)
        self.assertGreater(len(self.told), 3)
        self.write(source, MIB)
        result = copy.rest(length, self.watch())
        self.assertGreater(result.data, 0)
        self.assertLess(result.data, length)
        self.check(source, result)
        self.assertIn('skip', self.log())

    def test_all_is_discarded(self):
        source = self.source(os.urandom(8 * MIB))
        copy = self.warm(source, self.volume(8 * MIB), 8 * MIB)
        copy.first(self.watch())
        source = self.source(b'', 8 * MIB)
        result = copy.rest(8 * MIB, self.watch())
        self.assertEqual(8 * MIB, result.data)
        self.check(source, result)

    @ddt.data((1, True), (512, True), (65536, False), (3 * MIB + 5, True))
    @ddt.unpack
    def test_it_grows(self, nbytes, has_end):
        before = os.urandom(2 * MIB + 100)
        source = self.source(before)
        copy = self.warm(source, self.volume(len(before)), len(before))
        with open(source.name, 'ab') as f:
            f.write(b'A' * (nbytes // 2))
        copy.first(self.watch())
        with open(source.name, 'ab') as f:
            if has_end:
                f.write(b'B' * (nbytes - nbytes // 2))
            else:
                f.truncate(len(before) + nbytes)
        result = copy.rest(len(before) + nbytes, self.watch())
        self.check(source, result)
        self.assertEqual(len(before) + nbytes, result.physical)

    def test_it_shrinks(self):
        source = self.source(os.urandom(2 * MIB))
        copy = self.warm(source, self.volume(2 * MIB), 2 * MIB)
        copy.first(self.watch())
        os.truncate(source.name, MIB + 7)
        self.check(source, copy.rest(MIB + 7, self.watch()))
        self.assertEqual('upload %d 1 1' % (MIB + 6), self.log()[-1])

    def test_room_that_was_taken(self):
        # It has no hole: that would give the room away.
        source = self.source(os.urandom(MIB) + bytes(MIB), 3 * MIB)
        copy = self.warm(source, self.volume(8 * MIB), 3 * MIB, sparse=False)
        copy.first(self.watch())
        self.assertEqual(8 * MIB, os.path.getsize(self.path))
        with open(source.name, 'ab') as f:
            f.write(b'A' * MIB)
        self.check(source, copy.rest(4 * MIB, self.watch()))

    def test_it_outgrows_the_room_that_was_taken(self):
        source = self.source(os.urandom(MIB))
        copy = self.warm(source, self.volume(2 * MIB), MIB, sparse=False)
        copy.first(self.watch())
        os.truncate(source.name, 2 * MIB + 512)
        e = self.assertRaises(exception.StorageTransferError, copy.rest,
                              2 * MIB + 512, self.watch())
        self.assertEqual('small', e.kind)
        self.assertEqual(self.pids, self.ended)
        self.assertNotIn('update', self.log())

    def test_no_more_room(self):
        source = self.source(os.urandom(4 * MIB))
        copy = self.warm(source, self.volume(4 * MIB), 4 * MIB)
        copy.first(self.watch())
        self.write(source, MIB)
        with open(self.path + '.full', 'w'):
            pass
        e = self.assertRaises(exception.StorageTransferError, copy.rest,
                              4 * MIB, self.watch())
        self.assertEqual('destination', e.side)
        self.assertEqual(self.pids, self.ended)

    def test_what_takes_up_less_than_was_sent_is_read_back(self):
        source = self.source(os.urandom(4 * MIB))
        copy = self.warm(source, self.volume(4 * MIB), 4 * MIB)
        copy.first(self.watch())
        # As if it could not be written.
        self.volume(4 * MIB)
        with mock.patch.object(pump, 'verify', autospec=True) as verify:
            result = copy.rest(4 * MIB, self.watch())
        self.assertEqual((4 * MIB, result.checksum),
                         verify.call_args.args[1:])
