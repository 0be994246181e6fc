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

"""Copies of what has changed alone."""

import ctypes
import itertools
import os
import random
import tempfile

import ddt

from nova.tests.unit.virt.libvirt.storage.pump import base
from nova.tests.unit.virt.libvirt.storage.pump import ends
from nova.tests.unit.virt.libvirt.storage.pump import test_table

KEY = test_table.KEY
content_of = test_table.content_of


class Disk(ends.StubStream):
    """A destination that has content, and whose parts can be written.

    :param content: what stands there
    """

    def __init__(self, content, **kwargs):
        super().__init__(**kwargs)
        self.content = bytearray(content)
        self.offset = 0

    def _put(self, data):
        self.log.append((self.offset, len(data), bool(any(data))))
        self.content[self.offset:self.offset + len(data)] = data
        self.offset += len(data)

    def send(self, stream, data, nbytes):
        if self._fails():
            return self.fail_with
        self._put(ctypes.string_at(data, nbytes))
        return nbytes

    def send_hole(self, stream, length, flags):
        self._put(bytes(length))
        return 0

    def skip(self, stream, length):
        self.offset += length
        return 0

    def finish(self, stream):
        return 0


def letters(text, size=32):
    """Parts of so many bytes a letter: data; a dot: a hole."""
    runs = [(letter, len(list(run)) * size)
            for letter, run in itertools.groupby(text)]
    return [length if letter == '.' else letter.encode() * length
            for letter, length in runs]


@ddt.ddt
class ChangesTestCase(base.PumpExtensionTestCase):
    def twice(self, first, second, size=32, slot_size=128, **kwargs):
        """Copy one content, and then what differs in another.

        :returns: the destination and the second copy
        """
        before, after = content_of(first), content_of(second)
        table = self._pump.Table(len(before), KEY, block_size=size)
        self.copy(ends.StubStream(first), None, len(before), table=table,
                  slot_size=slot_size)
        # The export may be larger than what went to it.
        disk = Disk(before.ljust(len(after), b'\0'))
        table.grow(len(after))
        copy = self.copy(ends.StubStream(second), disk, len(after),
                         table=table, only_changes=True, slots=3,
                         slot_size=slot_size, **kwargs)
        self.assertEqual(after, bytes(disk.content)[:len(after)])
        self.assertEqual(self._pump.checksum(second, KEY), copy.checksum)
        self.assertEqual(len(after), copy.transferred)
        self.assertEqual(test_table.values_of(after, size),
                         table.values[:-(-len(after) // size)])
        return disk, copy

    # A letter is a block, a slot has four. What is sent, in blocks: from
    # where, how many, whether it has data.
    @ddt.data(
        ('AAAAAAAA', 'AAAAAAAA', []), ('........', '........', []),
        ('AAAAAAAA', 'ABAAAAAA', [(1, 1, True)]),
        ('AAAAAAAA', 'BAAAAAAB', [(0, 1, True), (7, 1, True)]),
        ('AAAAAAAA', 'ABABAAAA', [(1, 3, True)]),
        ('AAAAAAAA', 'AAABBAAA', [(3, 1, True), (4, 1, True)]),
        ('AAAAAAAA', 'AA...AAA', [(2, 3, False)]),
        ('A......A', 'A.....BA', [(6, 1, True)]),
        ('AA....AA', 'A......A', [(1, 1, False), (6, 1, False)]),
        ('........', '...B....', [(3, 1, True)]),
        ('AAAAAAAA', '........', [(0, 8, False)]),
        ('A\0A.A\0A.', 'A.A\0A.A\0', []),
        ('AAAA', 'AAAABB', [(4, 2, True)]), ('AAAA', 'AAAA..', []),
        ('AAAA....', 'AA', []), ('AAAA', 'AB', [(1, 1, True)]))
    @ddt.unpack
    def test_what_is_sent(self, before, after, sent):
        disk, copy = self.twice(letters(before), letters(after))
        self.assertEqual(
            sent, [(offset // 32, length // 32, data)
                   for offset, length, data in disk.log])
        self.assertEqual(sum(length for _o, length, data in sent if data) * 32,
                         copy.data)
        self.assertEqual(
            sum(length for _o, length, data in sent if not data) * 32,
            copy.holes)

    # What stands there and is sent all the same: blocks that it may be.
    @ddt.data(
        (0, 'AAAAAAAA', 'ABAAABAA', [(1, 1), (5, 1)]),
        (2, 'AAAAAAAA', 'AAAAAAAA', []),
        # As much as comes at a time goes along or none of it.
        (2, 'AAAAAAAA', 'ABAAAAAA', [(1, 3)]),
        (1, 'AAAAAAAA', 'ABAAAAAA', [(1, 1)]),
        (2, 'AAAAAAAA', 'AAABAAAA', [(3, 1)]),
        (2, 'AAAAAAAA', 'AAABABAA', [(3, 5)]),
        (4, 'AAAAAAAA', 'AABAAAAA', [(2, 2)]),
        (5, 'AAAAAAAA', 'AAABAAAA', [(3, 5)]),
        (5, 'AAAA....AAAA', 'AAAB....AAAA', [(3, 5)]),
        (8, 'AAAA....AAAA', 'AAAB....AAAA', [(3, 9)]),
        (4, 'AAAA....AAAA', 'AAAB....AABA', [(3, 5), (10, 2)]),
        (6, 'AAAA....AAAA', 'AAAB....AABA', [(3, 9)]),
        (4, 'AAAAAAAA', '....AAAA', [(0, 8)]),
        (3, 'AAAAAAAA', 'AA.....A', [(2, 6)]))
    @ddt.unpack
    def test_what_goes_along(self, bridge, before, after, sent):
        disk, copy = self.twice(letters(before), letters(after), sparse=False,
                                bridge=bridge * 32)
        found = []
        for offset, length, _data in disk.log:
            first, count = offset // 32, length // 32
            if found and first == sum(found[-1]):
                first, count = found[-1][0], found[-1][1] + count
                found.pop()
            found.append((first, count))
        self.assertEqual(sent, found)
        self.assertEqual(sum(count for _first, count in sent) * 32, copy.data)
        self.assertEqual(0, copy.holes)

    def test_no_hole_where_there_can_be_none(self):
        disk = Disk(b'')
        disk.end.send_hole = ends.SEND_HOLE()
        table = self._pump.Table(128, KEY, block_size=32)
        self.copy(ends.StubStream([128]), None, 128, table=table)
        self.assertRaises(TypeError, self._pump.Copy,
                          ends.StubStream([128]), disk, 128,
                          table=table, only_changes=True)
        self.copy(ends.StubStream(letters('A..A')), disk, 128, table=table,
                  only_changes=True, sparse=False)
        self.assertRaises(ValueError, self._pump.Copy,
                          ends.StubStream([128]), disk, 128, table=table,
                          only_changes=True, sparse=False, bridge=-1)

    def test_whatever_was_and_is(self):
        chance = random.Random(5)

        def some(length):
            parts = []
            while length:
                n = min(length, chance.choice((1, 7, 32, 64, 100, 500)))
                parts.append(chance.choice((
                    n, bytes(n), b'A' * n, chance.randbytes(n))))
                length -= n
            return parts

        def changed(parts):
            content = bytearray(content_of(parts))
            for _n in range(chance.randrange(4)):
                at = chance.randrange(len(content) + 1)
                content[at:at + 40] = chance.choice((
                    bytes(len(content[at:at + 40])), b'B', b''))
            content += bytes(chance.choice((0, 0, 1, 100)))
            found, at = [], 0
            while at < len(content):
                n = chance.choice((1, 31, 32, 200))
                piece = bytes(content[at:at + n])
                found.append(piece if any(piece) or chance.random() < 0.3
                             else len(piece))
                at += n
            return found

        for _n in range(300):
            before = some(chance.choice((1, 31, 32, 33, 1000, 2049)))
            after = changed(before)
            if after:
                self.twice(before, after, size=chance.choice((32, 64, 128)),
                           slot_size=chance.choice((7, 64, 128, 1024)),
                           bandwidth=chance.choice((0, 1 << 30)),
                           sparse=chance.random() < 0.5,
                           bridge=chance.choice((0, 0, 64, 100, 500)))

    def test_a_pass_more(self):
        table = self._pump.Table(256, KEY, block_size=32)
        disk = Disk(bytes(256))
        self.copy(ends.StubStream(letters('AAAAAAAA')), disk, 256, table=table)
        for text in ('AABAAAAA', 'AABAA..A', 'AAAAABBA', 'AAAAABBA'):
            disk.offset = 0
            self.copy(ends.StubStream(letters(text)), disk, 256, table=table,
                      only_changes=True)
            self.assertEqual(content_of(letters(text)), bytes(disk.content))

    def test_error_leaves_the_table_unknown(self):
        table = self._pump.Table(128, KEY, block_size=32)
        self.copy(ends.StubStream([128]), None, 128, table=table)
        e = self.fails(ends.StubStream(letters('AAAA')), Disk(b'', fail_at=0),
                       128, table=table, only_changes=True)
        self.assertEqual('destination', e.side)
        self.assertRaises(ValueError, self._pump.Copy,
                          ends.StubStream([128]), Disk(b''), 128,
                          table=table, only_changes=True)

    @ddt.data(([b'A' * 64], 'short'), ([b'A' * 129], 'long'), ([129], 'long'))
    @ddt.unpack
    def test_length(self, parts, reason):
        table = self._pump.Table(128, KEY, block_size=32)
        self.copy(ends.StubStream([128]), None, 128, table=table)
        e = self.fails(ends.StubStream(parts), Disk(bytes(128)), 128,
                       table=table, only_changes=True)
        self.assertEqual(('source', reason), (e.side, e.reason))

    def test_not_to_what_can_only_be_written_from_end_to_end(self):
        table = self._pump.Table(128, KEY, block_size=32)
        self.copy(ends.StubStream([128]), None, 128, table=table)
        disk = Disk(b'')
        disk.end.skip = ends.SKIP()
        self.assertRaises(TypeError, self._pump.Copy,
                          ends.StubStream([128]), disk, 128,
                          table=table, only_changes=True)


@ddt.ddt
class BlocksTestCase(base.PumpExtensionTestCase):
    """Copies that read some blocks alone."""

    def table(self, parts, size=32):
        content = content_of(parts)
        table = self._pump.Table(len(content), KEY, block_size=size)
        self.copy(ends.StubStream(parts), None, len(content), table=table)
        return table

    # What is written, what is read of it, and the blocks that have changed; a
    # hole is read as far as it goes.
    @ddt.data(
        ('AAAAAAAA', 'AAAAAAAA', [], 0, []),
        ('AAAAAAAA', 'AAABAAAA', [(3, 1)], 1, [(3, 1)]),
        ('AAAAAAAA', 'AAAAAAAA', [(3, 1)], 1, []),
        ('AAAAAAAA', 'BAAAAAAB', [(0, 1), (7, 1)], 2, [(0, 1), (7, 1)]),
        ('AAAAAAAA', 'ABBBBBBA', [(1, 6)], 6, [(1, 6)]),
        ('AAAAAAAA', 'AABBBAAA', [(1, 3), (4, 9), (12, 5)], 7, [(2, 3)]),
        ('AAAAAAAA', 'AA...AAA', [(2, 1)], 3, [(2, 3)]),
        ('AA....AA', 'AA.B..AA', [(3, 1)], 1, [(3, 1)]),
        ('A.......', 'A.......', [(0, 1)], 1, []),
        ('........', '........', [(5, 1)], 3, []))
    @ddt.unpack
    def test_what_is_read(self, before, after, blocks, read, changed):
        table = self.table(letters(before))
        disk = Disk(content_of(letters(before)))
        for destination in (disk, None):
            table = self.table(letters(before))
            source = ends.StubStream(letters(after))
            copy = self.copy(source, destination, 256, table=table, slots=3,
                             slot_size=128, only_changes=True, blocks=blocks)
            self.assertEqual(256 - read * 32, source.passed)
            self.assertEqual(changed, table.changed)
            self.assertEqual(256, copy.transferred)
            self.assertEqual(self._pump.checksum(letters(after), KEY),
                             copy.checksum)
        self.assertEqual(content_of(letters(after)), bytes(disk.content))

    def test_what_changed_unseen(self):
        # It stands in the table as it was, and so in the checksum.
        table = self.table(letters('AAAA'))
        copy = self.copy(ends.StubStream(letters('BBBA')), None, 128,
                         table=table, only_changes=True, blocks=[(1, 1)])
        self.assertEqual(self._pump.checksum(letters('ABAA'), KEY),
                         copy.checksum)

    @ddt.data(1, 31, 33, 100)
    def test_last_block_is_read_unless_it_is_whole(self, more):
        parts = [b'A' * 96, b'B' * more]
        table = self.table(parts)
        source = ends.StubStream(parts)
        copy = self.copy(source, None, 96 + more, table=table,
                         only_changes=True, blocks=[])
        self.assertEqual(96 + more - more % 32, source.passed)
        self.assertEqual(self._pump.checksum(parts, KEY), copy.checksum)

    def test_whatever_was_and_is(self):
        chance = random.Random(6)
        for _n in range(300):
            size = chance.choice((32, 64))
            length = chance.choice((1, 64, 65, 1000, 2048))
            before = bytearray(chance.randbytes(length))
            table = self.table([bytes(before)], size)
            grown = length + chance.choice((0, 0, 1, 300))
            after = before.ljust(grown, b'\0')
            disk = Disk(bytes(after))
            table.grow(grown)
            blocks = []
            for _write in range(chance.randrange(5)):
                at = chance.randrange(grown)
                end = min(grown, at + chance.randrange(1, 100))
                after[at:end] = chance.choice((
                    bytes(end - at), chance.randbytes(end - at)))
                blocks.append((at // size, (end - 1) // size - at // size + 1))
            packets, at = [], 0
            while at < grown:
                piece = bytes(after[at:at + chance.choice((32, 50, 400))])
                packets.append(piece if any(piece) else len(piece))
                at += len(piece)
            copy = self.copy(
                ends.StubStream(packets), disk, grown, table=table,
                only_changes=True, blocks=blocks, slots=2,
                slot_size=chance.choice((size, 128, 1024)))
            self.assertEqual(bytes(after), bytes(disk.content))
            self.assertEqual(self._pump.checksum([bytes(after)], KEY),
                             copy.checksum)
            self.assertEqual(test_table.values_of(bytes(after), size),
                             table.values)

    def test_of_a_file(self):
        content = bytearray(random.Random(8).randbytes(5 << 16))
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.truncate(8 << 16)
            file.flush()
            table = self._pump.Table(8 << 16, KEY)
            self.copy(self._pump.File(file.fileno(), 8 << 16), None, 8 << 16,
                      table=table)
            for block in (1, 4, 6):
                os.pwrite(file.fileno(), b'new', (block << 16) + 100)
            for blocks, changed in (([(0, 2)], [(1, 1)]),
                                    ([(4, 1)], [(4, 1)]), ([(6, 1)], [(6, 1)]),
                                    ([], [])):
                copy = self.copy(
                    self._pump.File(file.fileno(), 8 << 16, sync=True), None,
                    8 << 16, table=table, only_changes=True, blocks=blocks)
                self.assertEqual(changed, table.changed)
            file.seek(0)
            self.assertEqual(self._pump.checksum([file.read()], KEY),
                             copy.checksum)

    def test_not_of_what_has_to_be_read_from_end_to_end(self):
        table = self.table(letters('AAAA'))
        source = ends.StubStream([128])
        source.end.pass_over = ends.SKIP()
        self.assertRaises(TypeError, self._pump.Copy, source, None, 128,
                          table=table, only_changes=True, blocks=[])
        self.assertRaises(ValueError, self._pump.Copy, ends.StubStream([128]),
                          None, 128, table=table, blocks=[])
        for blocks in ([(-1, 1)], [(1, -1)], [('a', 1)], [1], 5):
            self.assertRaises((TypeError, ValueError), self._pump.Copy,
                              ends.StubStream([128]), None, 128, table=table,
                              only_changes=True, blocks=blocks)
