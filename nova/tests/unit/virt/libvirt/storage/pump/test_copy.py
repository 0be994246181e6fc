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
import subprocess
import sys
import time

import ddt

from nova.tests.unit.virt.libvirt.storage.pump import base
from nova.tests.unit.virt.libvirt.storage.pump import ends

StubStream = ends.StubStream
K16 = 16384

# What a process prints that loads the extension as the worker does.
ALONE = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader('_copy', sys.argv[1])
spec = importlib.util.spec_from_file_location(
    '_copy', sys.argv[1], loader=loader)
loader.exec_module(importlib.util.module_from_spec(spec))
print([name for name in sys.modules if name.startswith('nova')])
"""

# Not time.sleep(): the callbacks run in threads which eventlet doesn't know.
USLEEP = ctypes.CDLL(None).usleep


def content_of(parts):
    return b''.join(bytes(p) if isinstance(p, int) else p for p in parts)


@ddt.ddt
class CopyTestCase(base.PumpExtensionTestCase):
    # Content by letter: data; by number: a hole of that many bytes.
    @ddt.data(
        [b'A'], [b'A' * 511], [b'A' * 512], [b'A' * 4096, b'B'], [1], [4096],
        [1 << 40], [4096, b'A'], [b'A', 4096], [4096, b'A', 8192],
        [b'A', 1, b'B', 1, b'C'], [b'A' * 100000, 7, b'B' * 3],
        [b'AB' * 5000] * 30)
    def test_content_and_holes_arrive(self, parts):
        length = sum(p if isinstance(p, int) else len(p) for p in parts)
        source, destination = StubStream(parts), StubStream()
        if length > 1 << 30:
            written = []
            destination.end.send_hole = ends.SEND_HOLE(
                lambda s, n, f: written.append(n) or 0)
            copy = self.copy(source, destination, length)
            self.assertEqual([length], written)
        else:
            copy = self.copy(source, destination, length, slot_size=4096,
                             slots=3)
            self.assertEqual(content_of(parts), destination.written)
            self.assertEqual(
                [p for p in parts if isinstance(p, int)],
                [e[1] for e in destination.log if isinstance(e, tuple)])
        self.assertEqual('finish', destination.log[-1])
        self.assertEqual(['finish'], source.log)
        self.assertEqual(length, copy.transferred)
        self.assertEqual(self._pump.checksum(parts, 0x1234567890abcdef),
                         copy.checksum)

    def test_partial_sends_are_completed(self):
        parts = [b'abcdefghij' * 1000]
        destination = StubStream(take=7)
        self.copy(StubStream(parts), destination, 10000)
        self.assertEqual(parts[0], destination.written)

    def test_packets_are_put_together(self):
        parts = [b'A' * 4072, b'B' * 24] * 4
        destination = StubStream()
        self.copy(StubStream(parts), destination, 4096 * 4, slot_size=4096)
        self.assertEqual([4096] * 4 + ['finish'], destination.log)

    # Many small slots, of which each may be kept for long.
    @ddt.data(0, 1, 9, 10, 25, 1000)
    def test_what_is_kept_never_holds_up_the_copy(self, keep):
        parts = [bytes([65 + n % 26]) * (n % 10 + 1) for n in range(300)]
        for n in range(0, 300, 7):
            parts.insert(n, 5)
        length = len(content_of(parts))
        destination = StubStream(keep=keep)
        self.copy(StubStream(parts), destination, length, slot_size=10,
                  slots=3)
        self.assertEqual(content_of(parts), destination.written)

    def test_holes_become_zeroes_where_old_content_may_be(self):
        parts = [5000, b'A' * 10, 300]
        destination = StubStream()
        copy = self.copy(StubStream(parts), destination, 5310, sparse=False,
                         slot_size=4096)
        self.assertEqual(content_of(parts), destination.written)
        self.assertNotIn('hole', str(destination.log))
        self.assertEqual(5310, copy.data)

    # Zeroes in whole blocks, of 16 KiB from the content's start, are found.
    @ddt.data(
        ([b'A' * K16, bytes(3 * K16), b'B'], [K16, ('hole', 3 * K16), 1]),
        ([bytes(K16), b'A'], [('hole', K16), 1]),
        ([b'A', bytes(K16)], [K16, ('hole', 1)]),
        ([bytes(5)], [('hole', 5)]),
        ([b'A' * 100 + bytes(K16)], [K16, ('hole', 100)]),
        # no less than a block
        ([b'A', bytes(K16 - 2), b'B' + bytes(K16 - 1) + b'C'],
         [2 * K16]),
        # with what the source knows for a hole, one after the other
        ([b'A' * K16, 7 * K16, bytes(K16), b'B'],
         [K16, ('hole', 7 * K16), ('hole', K16), 1]))
    @ddt.unpack
    def test_zeroes_are_found(self, parts, expected):
        length = len(content_of(parts))
        destination = StubStream()
        copy = self.copy(StubStream(parts), destination, length,
                         find_holes=True)
        self.assertEqual(expected + ['finish'], destination.log)
        self.assertEqual(content_of(parts), destination.written)
        self.assertEqual(length, copy.transferred)
        self.assertEqual(
            sum(n for n in expected if isinstance(n, int)), copy.data)
        self.assertEqual(self._pump.checksum(parts, 0x1234567890abcdef),
                         copy.checksum)

    def test_zeroes_that_are_found_show_progress(self):
        destination = StubStream()
        self.copy(StubStream([bytes(1 << 20)] * 20), destination, 20 << 20,
                  find_holes=True)
        self.assertEqual([('hole', 8 << 20)] * 2 + [
            ('hole', 4 << 20), 'finish'], destination.log)

    def test_zeroes_are_sent_where_old_content_may_be(self):
        destination = StubStream()
        self.copy(StubStream([bytes(K16)]), destination, K16, sparse=False,
                  find_holes=True)
        self.assertEqual([K16, 'finish'], destination.log)

    def test_error_in_the_last_hole_that_is_found(self):
        destination = StubStream(fail_hole=True)
        e = self.fails(StubStream([b'A' * K16, bytes(K16)]), destination,
                       2 * K16, find_holes=True)
        self.assertEqual(('destination', 'send a hole'),
                         (e.side, e.operation))
        self.assertEqual('abort', destination.log[-1])

    # Of what lies in a slot a part alone is sent.
    @ddt.data(0, 1, 9, 10, 25, 1000)
    def test_what_is_kept_of_parts_never_holds_up_the_copy(self, keep):
        parts = [(b'A' if n % 3 else b'\0') * 10 for n in range(300)]
        destination = StubStream(keep=keep)
        self.copy(StubStream(parts), destination, 3000, slot_size=10,
                  slots=3, find_holes=True)
        self.assertEqual(content_of(parts), destination.written)

    def test_reads_alone_without_destination(self):
        parts = [b'A' * 10000, 10000]
        copy = self.copy(StubStream(parts), None, 20000)
        self.assertEqual(self._pump.checksum(parts, 0x1234567890abcdef),
                         copy.checksum)
        self.assertEqual((10000, 10000), (copy.data, copy.holes))

    @ddt.data(0, 1, 5, 9)
    def test_error_of_the_source(self, packet):
        source = StubStream([b'A' * 10] * 10, fail_at=packet)
        destination = StubStream()
        e = self.fails(source, destination, 100, slot_size=10)
        self.assertEqual(('source', 'receive', 'libvirt', 38, 18,
                          'No space left', packet * 10),
                         (e.side, e.operation, e.reason, e.code, e.domain,
                          e.message, e.transferred))
        self.assertEqual('abort', source.log[-1])
        self.assertEqual('abort', destination.log[-1])
        self.assertNotIn('finish', destination.log)

    @ddt.data(0, 1, 5, 9)
    def test_error_of_the_destination(self, packet):
        source = StubStream([b'A' * 10] * 10)
        destination = StubStream(fail_at=packet)
        e = self.fails(source, destination, 100, slot_size=10)
        self.assertEqual(('destination', 'send', 'libvirt', 38),
                         (e.side, e.operation, e.reason, e.code))
        self.assertEqual('abort', source.log[-1])
        self.assertEqual('abort', destination.log[-1])
        self.assertEqual(b'A' * 10 * packet, destination.written)

    @ddt.data('source', 'destination')
    def test_error_in_a_hole(self, side):
        streams = {'source': StubStream([b'A', 10]),
                   'destination': StubStream()}
        streams[side].fail_hole = True
        e = self.fails(streams['source'], streams['destination'], 11)
        self.assertEqual((side, 'libvirt'), (e.side, e.reason))

    @ddt.data('source', 'destination')
    def test_error_of_finish(self, side):
        streams = {'source': StubStream([b'A']), 'destination': StubStream()}
        streams[side].fail_finish = True
        e = self.fails(streams['source'], streams['destination'], 1)
        self.assertEqual((side, 'finish', 38), (e.side, e.operation, e.code))
        if side == 'source':
            self.assertNotIn('finish', streams['destination'].log)

    @ddt.data(-2, 0)
    def test_a_send_that_takes_nothing_fails(self, value):
        e = self.fails(StubStream([b'A' * 10]),
                       StubStream(fail_at=0, fail_with=value), 10)
        self.assertEqual(('destination', 'stuck', 0),
                         (e.side, e.reason, e.code))

    def test_would_block_fails(self):
        e = self.fails(StubStream([b'A'], fail_at=0, fail_with=-2),
                       StubStream(), 1)
        self.assertEqual(('source', 'stuck'), (e.side, e.reason))

    @ddt.data([b'A' * 9], [], [b'A', 8], [9])
    def test_short_source(self, parts):
        destination = StubStream()
        e = self.fails(StubStream(parts), destination, 10)
        self.assertEqual(('source', 'short'), (e.side, e.reason))
        self.assertEqual('abort', destination.log[-1])

    @ddt.data([b'A' * 11], [b'A', 10], [11])
    def test_long_source(self, parts):
        destination = StubStream()
        e = self.fails(StubStream(parts), destination, 10)
        self.assertEqual(('source', 'long'), (e.side, e.reason))
        self.assertNotIn('finish', destination.log)

    def test_an_empty_hole_fails(self):
        e = self.fails(StubStream([b'A', 0]), StubStream(), 1)
        self.assertEqual(('source', 'stuck'), (e.side, e.reason))

    def test_cancel_stops_at_the_next_packet(self):
        destination = StubStream(
            wait=lambda call: call == 5 and copy.cancel())
        copy = self._pump.Copy(StubStream([b'A' * 10] * 1000), destination,
                               10000, slot_size=10)
        e = self.assertRaises(self._pump.PumpError, copy.run)
        self.assertEqual('cancelled', e.reason)
        self.assertEqual([10] * 5 + ['abort'], destination.log)

    def test_cancel_ends_what_waits(self):
        destination = StubStream(keep=0)

        def settle(stream, most):
            copy.cancel()
            return 0 if not destination.stopped else -1

        destination.end.settle = ends.SETTLE(settle)
        copy = self._pump.Copy(StubStream([b'A' * 10]), destination, 10)
        e = self.assertRaises(self._pump.PumpError, copy.run)
        self.assertEqual('cancelled', e.reason)

    def test_cancel_before_run(self):
        destination = StubStream()
        copy = self._pump.Copy(StubStream([b'A']), destination, 1)
        copy.cancel()
        e = self.assertRaises(self._pump.PumpError, copy.run)
        self.assertEqual('cancelled', e.reason)
        self.assertNotIn('finish', destination.log)

    def test_cancel_after_the_end_is_too_late(self):
        copy = self.copy(StubStream([b'A']), StubStream(), 1)
        copy.cancel()
        self.assertEqual(1, copy.transferred)

    def test_cancel_while_the_source_finishes(self):
        source, destination = StubStream([b'A']), StubStream()
        source.end.finish = ends.CLOSE(lambda stream: copy.cancel() or 0)
        copy = self._pump.Copy(source, destination, 1)
        e = self.assertRaises(self._pump.PumpError, copy.run)
        self.assertEqual('cancelled', e.reason)
        self.assertEqual([1, 'abort'], destination.log)

    def test_cancel_while_the_bandwidth_limit_sleeps(self):
        # the fourth packet is received while the second one has a minute to
        # wait
        source = StubStream([b'A' * 65536] * 16,
                            wait=lambda call: call == 4 and copy.cancel())
        copy = self._pump.Copy(source, StubStream(), 1 << 20, bandwidth=1024)
        start = time.monotonic()
        self.assertRaises(self._pump.PumpError, copy.run)
        self.assertLess(time.monotonic() - start, 30)

    def test_bandwidth_limit_holds_for_data_alone(self):
        source = StubStream([b'A' * 65536] * 8 + [1 << 40])
        start = time.monotonic()
        destination = StubStream()
        destination.end.send_hole = ends.SEND_HOLE(lambda s, n, f: 0)
        self.copy(source, destination, (1 << 19) + (1 << 40),
                  bandwidth=1 << 20)
        # the last of eight pieces goes after seven eighths of half a second
        self.assertGreaterEqual(time.monotonic() - start, 0.43)

    def test_bandwidth_is_raised_meanwhile(self):
        # the second piece has a minute to wait
        source = StubStream([b'A' * 65536] * 16)
        source.wait = lambda call: call == 4 and set_bandwidth(1 << 30)
        copy = self._pump.Copy(source, StubStream(), 1 << 20, bandwidth=1024)

        def set_bandwidth(value):
            copy.bandwidth = value

        start = time.monotonic()
        copy.run()
        self.assertLess(time.monotonic() - start, 30)
        self.assertEqual(1 << 30, copy.bandwidth)

    @ddt.data(0, 1 << 40)
    def test_bandwidth_is_lowered_meanwhile(self, before):
        destination = StubStream()
        destination.wait = lambda call: call == 8 and lower()
        copy = self._pump.Copy(
            StubStream([b'A' * 65536] * 16), destination, 1 << 20,
            bandwidth=before, slot_size=65536)

        def lower():
            copy.bandwidth = 1 << 20

        start = time.monotonic()
        copy.run()
        # eight pieces are left, of which the first may go at once
        self.assertGreaterEqual(time.monotonic() - start, 0.35)

    def test_bandwidth_cannot_be_negative(self):
        copy = self._pump.Copy(StubStream([b'A']), StubStream(), 1)
        self.assertRaises(ValueError, setattr, copy, 'bandwidth', -1)
        self.assertEqual(0, copy.bandwidth)

    def test_no_checksum_before_the_end(self):
        copy = self._pump.Copy(StubStream([b'A']), StubStream(), 1)
        self.assertRaises(RuntimeError, getattr, copy, 'checksum')
        copy.run()
        self.assertEqual(self._pump.checksum([b'A'], 1), copy.checksum)

    def test_memory_is_bounded_by_the_ring(self):
        # the receiver may be ahead by the ring, and not by more
        ahead = []
        source = StubStream([b'A' * 10] * 100)
        destination = StubStream()
        destination.wait = lambda call: (
            USLEEP(1000), ahead.append(source.calls - call))
        self.copy(source, destination, 1000, slot_size=10, slots=4)
        self.assertLessEqual(max(ahead), 5)

    def test_runs_once(self):
        copy = self.copy(StubStream([b'A']), StubStream(), 1)
        self.assertRaises(RuntimeError, copy.run)

    @ddt.data({'length': 0}, {'length': -1}, {'bandwidth': -1},
              {'slot_size': 0}, {'slots': 1}, {'key': 0},
              {'key': (1 << 61) - 1})
    def test_parameters_out_of_range(self, kwargs):
        kwargs = dict({'length': 1}, **kwargs)
        self.assertRaises(ValueError, self._pump.Copy, StubStream(),
                          StubStream(), **kwargs)

    @ddt.data(None, object(), 'virStreamPtr')
    def test_refuses_what_is_no_stream(self, stream):
        self.assertRaises(TypeError, self._pump.Copy, stream, StubStream(), 1)

    def test_needs_nothing_but_its_path(self):
        """The worker loads it so; Nova would take seconds to import."""
        result = subprocess.run(
            [sys.executable, '-I', '-c', ALONE, self._pump.__file__],
            stdout=subprocess.PIPE, text=True)
        self.assertEqual("['nova.virt.libvirt.storage.pump._copy']",
                         result.stdout.strip())
