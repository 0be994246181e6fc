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

import ctypes
import os
import random
import signal
import time

import ddt

from nova import exception
from nova.tests.unit.virt.libvirt.storage.pump import test_nbd
from nova.virt.libvirt.storage.pump import transfer as pump

MIB = 1 << 20
# FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
PUNCH = 3


class WritingTestCase(test_nbd.PlayedTestCase):
    """Both passes, while somebody writes."""

    def setUp(self):
        super().setUp()
        self.chance = random.Random(7)
        self.pids, self.ended = [], []

    def watch(self, progress=None, **kwargs):
        return pump.Watch(progress=progress or self.told.append,
                          on_start=self.pids.append,
                          on_end=self.ended.append, **kwargs)

    def warm(self, source, export, length, **kwargs):
        copy = pump.WarmCopy(source, export, length, **kwargs)
        self.addCleanup(copy.close)
        return copy

    def write(self, source, nbytes):
        """What a guest does, at random: it writes, and discards."""
        size = os.path.getsize(source.name)
        fd = os.open(source.name, os.O_RDWR)
        while nbytes > 0:
            length = self.chance.choice((512, 4096, 20000, 65536, 131072))
            at = self.chance.randrange(0, size - length) // 512 * 512
            kind = self.chance.random()
            if kind < 0.15:
                ctypes.CDLL(None).fallocate(
                    fd, PUNCH, ctypes.c_long(at), ctypes.c_long(length))
            else:
                os.pwrite(fd, bytes(length) if kind < 0.25 else
                          self.chance.randbytes(length), at)
            nbytes -= length
        os.close(fd)

    def check(self, source, result):
        """What has been copied is the source."""
        with open(source.name, 'rb') as f:
            content = f.read()
        self.assertEqual(content, self.copied(len(content)))
        self.assertEqual(len(content), result.length)
        pump.verify(source, len(content), result.checksum, key=result.key)
        self.assertEqual((1, self.pids), (len(self.pids), self.ended))


@ddt.ddt
class WarmCopyTestCase(WritingTestCase, test_nbd.WorkerTestCase):
    """Into a real server, which has ended then."""

    def test_nobody_writes(self):
        source = self.source(os.urandom(3 * MIB + 700), 6 * MIB + 5)
        length = 6 * MIB + 5
        copy = self.warm(source, self.serve(length), length, key=77)
        first = copy.first(self.watch())
        self.assertEqual((0, length), (self.told[0], self.told[-1]))
        self.assertEqual([], self.ended)
        del self.told[:]
        result = copy.rest(length, self.watch())
        self.assertEqual((0, length), (result.data, self.told[-1]))
        self.assertEqual((first.checksum, 77), (result.checksum, result.key))
        self.check(source, result)

    @ddt.data(True, False)
    def test_somebody_writes_meanwhile_and_afterwards(self, sparse):
        length = 24 * MIB
        source = self.source(b'', length)
        self.write(source, 20 * MIB)
        copy = self.warm(
            source, self.serve(length, b'' if sparse else b'\xff' * length),
            length, sparse=sparse)

        def progress(done):
            # while the first pass is on its way
            self.told.append(done)
            self.write(source, 300000)

        copy.first(self.watch(progress), bandwidth=16 * MIB)
        self.assertGreater(len(self.told), 3)
        self.write(source, MIB)
        result = copy.rest(length, self.watch())
        self.assertGreater(result.data, 0)
        self.assertLess(result.data, length)
        self.check(source, result)

    def test_what_has_changed(self):
        content = bytearray(os.urandom(4 * MIB))
        source = self.source(bytes(content))
        copy = self.warm(source, self.serve(4 * MIB), 4 * MIB)
        self.assertIsNone(copy.first(self.watch()).changed)
        for at in (70000, 140000, 3 * MIB):
            content[at:at + 5] = b'other'
        self.source(bytes(content))
        result = copy.rest(4 * MIB, self.watch())
        self.assertEqual([(65536, 131072), (3 * MIB, 65536)],
                         [tuple(part) for part in result.changed])
        self.check(source, result)

    def test_what_may_have_changed(self):
        content = bytearray(os.urandom(4 * MIB))
        source = self.source(bytes(content))
        copy = self.warm(source, self.serve(8 * MIB), 4 * MIB)
        copy.first(self.watch())
        content[70000:70005] = b'other'
        source = self.source(bytes(content) + b'more')
        # Some of it has not, and one place is told twice.
        result = copy.rest(4 * MIB + 4, self.watch(), changed=[
            (0, 1), (69000, 900), (69999, 7), (2 * MIB, MIB), (4 * MIB, 4)])
        self.assertEqual([(65536, 65536), (4 * MIB, 65536)],
                         [tuple(part) for part in result.changed])
        self.check(source, result)

    @ddt.data(0, MIB)
    def test_more_has_changed_than_may_have(self, at):
        source = self.source(os.urandom(2 * MIB))
        copy = self.warm(source, self.serve(2 * MIB), 2 * MIB)
        copy.first(self.watch())
        with open(source.name, 'r+b') as f:
            f.seek(at)
            f.write(b'other')
        e = self.assertRaises(
            exception.StorageTransferError, copy.rest, 2 * MIB, self.watch(),
            changed=[(65536, 65536), (MIB + 65536, 65536)])
        self.assertEqual('unmarked', e.kind)
        self.assertIn('1 of 29', str(e))
        self.assertEqual(self.pids, self.ended)

    def test_no_more_is_read_than_may_have_changed(self):
        source = self.source(os.urandom(MIB), 64 << 30)
        copy = self.warm(source, self.serve(64 << 30), 64 << 30)
        copy.first(self.watch())
        with open(source.name, 'r+b') as f:
            f.write(b'a sample has it once in 16,000 times')
            f.seek(32 << 30)
            f.write(b'other')
        result = copy.rest(64 << 30, self.watch(), changed=[
            # more than a pipe takes at once
            *((at, 1) for at in range(16 << 30, 17 << 30, 65536 * 2)),
            (32 << 30, 1)])
        self.assertEqual(65536, result.data)

    def test_all_is_rewritten(self):
        source = self.source(os.urandom(8 * MIB))
        copy = self.warm(source, self.serve(8 * MIB), 8 * MIB)
        copy.first(self.watch())
        source = self.source(os.urandom(8 * MIB))
        result = copy.rest(8 * MIB, self.watch())
        self.assertEqual(8 * MIB, result.data)
        self.check(source, result)

    def known(self, content, key):
        """What is on the destination already, and its table."""
        export = self.serve(len(content), content)
        with open(self.path, 'rb') as f:
            self.assertEqual(content, f.read())
        return export, pump.Known(len(content), pump.read_table(
            self.source(content, name='kept'), len(content), key=key))

    @ddt.data((0, 0), (MIB, MIB), (8 * MIB, 6 * MIB))
    @ddt.unpack
    def test_what_stands_there_is_not_sent_again(self, changed, sent):
        kept = os.urandom(6 * MIB) + bytes(2 * MIB)
        export, table = self.known(kept, 77)
        # One half was rewritten, one is zeroes now.
        source = self.source(os.urandom(changed // 2) + bytes(
            changed - changed // 2) + kept[changed:])
        copy = self.warm(source, export, len(kept), key=77, known=table)
        first = copy.first(self.watch())
        self.assertEqual(sent, first.data)
        self.write(source, 300000)
        result = copy.rest(len(kept), self.watch())
        self.assertLess(result.data, 4 * MIB)
        self.check(source, result)

    def _read_here(self, source, length, known):
        """Read the source as its copy is being read elsewhere."""
        return known.differs_from(pump.read_table(
            source, length, key=77, room=known.length, in_use=True))

    def test_no_more_is_read_than_differs(self):
        kept = os.urandom(2 * MIB) + bytes(6 * MIB)
        export, known = self.known(kept, 77)
        content = bytearray(kept[:2 * MIB + 9])
        content[70000:70005] = content[MIB:MIB + 5] = b'other'
        source = self.source(bytes(content))
        differs = self._read_here(source, len(content), known)
        self.assertEqual([(65536, 65536), (MIB, 65536)], differs)
        # Written since: the one comes along, the other comes at the end.
        content[MIB + 9:MIB + 14] = content[9:14] = b'since'
        content += b'more'
        source = self.source(bytes(content))
        copy = self.warm(source, export, 2 * MIB + 9, key=77, known=known)
        first = copy.first(self.watch(), changed=differs)
        self.assertEqual((2 << 16, [[65536, 65536], [MIB, 65536]]),
                         (first.data, first.changed))
        result = copy.rest(len(content), self.watch(), changed=[
            (9, 5), (MIB + 9, 5), (2 * MIB + 9, 4)])
        self.assertEqual([[0, 65536], [2 * MIB, 65536]], result.changed)
        self.check(source, result)

    @ddt.data(True, False)
    def test_somebody_writes_while_the_copy_is_read(self, is_noted):
        kept = os.urandom(8 * MIB)
        export, known = self.known(kept, 77)
        source = self.source(kept)
        self.write(source, MIB)
        differs = self._read_here(source, len(kept), known)
        with open(source.name, 'rb') as f:
            read = f.read()
        self.write(source, MIB)
        copy = self.warm(source, export, len(kept), key=77, known=known)
        self.assertLess(copy.first(self.watch(), changed=differs).data,
                        4 * MIB)
        self.write(source, MIB)
        with open(source.name, 'rb') as f:
            content = f.read()
        noted = [(at, 512) for at in range(0, len(kept), 512)
                 if content[at:at + 512] != read[at:at + 512]]
        self.check(source, copy.rest(
            len(kept), self.watch(), changed=noted if is_noted else None))

    def test_what_differs_from_nothing_that_is_known(self):
        copy = self.warm(self.source(b'a'), self.serve(1), 1)
        self.assertRaises(ValueError, copy.first, changed=[])

    def test_more_stands_there_than_is_sent(self):
        # A qcow2 image may grow until the second pass.
        kept = os.urandom(2 * MIB)
        export, known = self.known(kept + bytes(6 * MIB), 77)
        source = self.source(kept)
        copy = self.warm(source, export, len(kept), key=77, known=known)
        self.assertEqual(0, copy.first(self.watch()).data)
        with open(source.name, 'ab') as f:
            f.write(b'A' * MIB)
        result = copy.rest(3 * MIB, self.watch())
        self.assertEqual(MIB, result.data)
        self.check(source, result)

    def test_what_stands_there_is_read_under_the_same_key(self):
        # Else all of it is sent: that is right, too.
        kept = os.urandom(4 * MIB)
        export, table = self.known(kept, 78)
        source = self.source(kept)
        copy = self.warm(source, export, len(kept), key=77, known=table)
        self.assertEqual(len(kept), copy.first(self.watch()).data)
        self.check(source, copy.rest(len(kept), self.watch()))

    def test_table_of_another_length(self):
        kept = os.urandom(4 * MIB)
        export, table = self.known(kept, 77)
        copy = self.warm(self.source(kept), export, len(kept), key=77,
                         known=table._replace(table=table.table[:-8]))
        e = self.assertRaises(exception.StorageTransferError, copy.first,
                              self.watch())
        self.assertIn('no table of 64 blocks', str(e))

    def test_all_is_discarded(self):
        source = self.source(os.urandom(8 * MIB))
        copy = self.warm(source, self.serve(8 * MIB), 8 * MIB)
        copy.first(self.watch())
        source = self.source(b'', 8 * MIB)
        result = copy.rest(8 * MIB, self.watch())
        self.assertEqual(0, result.data)
        self.check(source, result)
        self.assertLess(os.stat(self.path).st_blocks * 512, MIB)

    @ddt.data(1, 512, 65536, 3 * MIB + 5)
    def test_it_grows(self, nbytes):
        # as the file of a qcow2 image does
        before = os.urandom(2 * MIB + 100)
        source = self.source(before)
        copy = self.warm(source, self.serve(8 * MIB), len(before))
        with open(source.name, 'ab') as f:
            f.write(b'A' * (nbytes // 2))
        copy.first(self.watch())
        with open(source.name, 'ab') as f:
            f.write(b'B' * (nbytes - nbytes // 2))
        result = copy.rest(len(before) + nbytes, self.watch())
        self.assertLessEqual(result.data, nbytes + 65536)
        self.check(source, result)

    def test_it_shrinks(self):
        source = self.source(os.urandom(2 * MIB))
        copy = self.warm(source, self.serve(2 * MIB), 2 * MIB)
        copy.first(self.watch())
        os.truncate(source.name, MIB + 7)
        self.check(source, copy.rest(MIB + 7, self.watch()))

    def test_it_outgrows_the_export(self):
        source = self.source(os.urandom(MIB))
        copy = self.warm(source, self.serve(MIB), MIB)
        copy.first(self.watch())
        os.truncate(source.name, MIB + 512)
        e = self.assertRaises(exception.StorageTransferError, copy.rest,
                              MIB + 512, self.watch())
        self.assertEqual('small', e.kind)
        self.assertEqual(self.pids, self.ended)

    def test_it_has_another_length_than_was_said(self):
        source = self.source(os.urandom(MIB))
        copy = self.warm(source, self.serve(2 * MIB), MIB)
        copy.first(self.watch())
        os.truncate(source.name, MIB + 512)
        self.assertRaises(exception.StorageTransferError, copy.rest, MIB,
                          self.watch())

    def test_key_is_needed_until_the_first_word(self):
        source = self.source(os.urandom(4 * MIB))
        copy = self.warm(source, self.serve(4 * MIB), 4 * MIB)

        def progress(done):
            if not self.told:
                os.unlink(os.path.join(self.folder, 'keys.psk'))
            self.told.append(done)

        copy.first(self.watch(progress))
        self.write(source, MIB)
        self.check(source, copy.rest(4 * MIB, self.watch()))

    def test_memory(self):
        source = self.source(os.urandom(MIB), 256 << 30)
        export = self.serve(256 << 30)
        copy = self.warm(source, export, 256 << 30)
        copy.first(self.watch())
        with open('/proc/%d/status' % self.pids[0]) as f:
            peak, = [int(line.split()[1]) * 1024 for line in f
                     if line.startswith('VmHWM')]
        self.assertLess(peak, 64 * MIB)
        self.assertEqual(0, copy.rest(256 << 30, self.watch()).data)

    def test_server_hears_of_it_between_the_passes(self):
        # it ends what nobody writes to
        source = self.source(os.urandom(MIB))
        copy = self.warm(source, self.serve(MIB), MIB)
        copy.first(self.watch())

        def heard():
            with open('/proc/%d/io' % self.server.process.pid) as f:
                return f.read()

        for _n in range(2):
            before, deadline = heard(), time.monotonic() + 30
            while heard() == before:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.1)
        self.check(source, copy.rest(MIB, self.watch()))

    @ddt.data('server', 'worker')
    def test_killed_between_the_passes(self, who):
        source = self.source(os.urandom(4 * MIB))
        copy = self.warm(source, self.serve(4 * MIB), 4 * MIB)
        copy.first(self.watch())
        self.write(source, 2 * MIB)
        os.kill({'server': self.server.process.pid,
                 'worker': self.pids[0]}[who], signal.SIGKILL)
        self.assertRaises(
            {'server': exception.StorageTransferError,
             'worker': exception.StorageTransferCancelled}[who], copy.rest,
            4 * MIB, self.watch())
        self.assertEqual(self.pids, self.ended)
        self.assertRaises(RuntimeError, copy.rest, 4 * MIB)

    def test_given_up_between_the_passes(self):
        source = self.source(os.urandom(4 * MIB))
        with self.warm(source, self.serve(4 * MIB), 4 * MIB) as copy:
            copy.first(self.watch())
        self.assertEqual(self.pids, self.ended)
        self.copied(0)

    def test_cancelled(self):
        source = self.source(os.urandom(4 * MIB))
        copy = self.warm(source, self.serve(4 * MIB), 4 * MIB)
        asked = []

        def cancelled():
            if self.told:
                asked.append(time.monotonic())
            return bool(asked)

        self.assertRaises(
            exception.StorageTransferCancelled, copy.first,
            self.watch(cancelled=cancelled), bandwidth=MIB)
        self.assertLess(time.monotonic() - asked[0], 0.5)
        self.assertEqual(self.pids, self.ended)

    def test_first_pass_fails(self):
        source = self.source(os.urandom(4 * MIB))
        copy = self.warm(source, self.serve(MIB), 4 * MIB)
        self.assertRaises(exception.StorageTransferError, copy.first,
                          self.watch())
        self.assertEqual(self.pids, self.ended)

    def test_in_no_other_order(self):
        source = self.source(os.urandom(MIB))
        export = self.serve(MIB)
        self.assertRaises(ValueError, pump.WarmCopy, source, export, 0)
        copy = self.warm(source, export, MIB)
        self.assertRaises(RuntimeError, copy.rest, MIB)
        copy.first(self.watch())
        self.assertRaises(RuntimeError, copy.first)
