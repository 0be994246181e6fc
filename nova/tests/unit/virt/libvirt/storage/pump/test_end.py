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

"""The contract of _end.pxd: what a copy asks of ends, and what if one errs."""

import contextlib
import ctypes

import ddt

from nova.tests.unit.virt.libvirt.storage.pump import base
from nova.tests.unit.virt.libvirt.storage.pump import ends

# Not threading's: the copy's threads are none of Python's or eventlet's.
SELF = ctypes.CDLL(None).pthread_self
SELF.restype = ctypes.c_ulong

# VIR_STREAM_RECV_STOP_AT_HOLE
STOP_AT_HOLE = 1


class StrictStream(ends.StubStream):
    """Notes what a copy does that an end need not bear."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.faults = []
        self.threads = {}
        self.names = []
        self.busy = False
        self.before = None
        self.answer = 0
        self.sent = []

    @contextlib.contextmanager
    def _call(self, name, **wanted):
        if self.busy:
            self.faults.append('%s while %s is at work' % (
                name, self.names[-1]))
        self.busy = True
        self.names.append(name)
        self.threads.setdefault(name, set()).add(SELF())
        for what, holds in wanted.items():
            if not holds:
                self.faults.append('%s: %s' % (name, what))
        yield
        self.before = name
        self.busy = False

    def recv(self, stream, data, nbytes, flags):
        with self._call('recv', room=nbytes > 0, flags=flags == STOP_AT_HOLE,
                        open=self.before != 'recv' or self.answer > 0):
            self.answer = super().recv(stream, data, nbytes, flags)
            return self.answer

    def recv_hole(self, stream, length, flags):
        with self._call('recv_hole', flags=flags == 0,
                        told=(self.before, self.answer) == ('recv', -3)):
            self.answer = super().recv_hole(stream, length, flags)
            return self.answer

    def send(self, stream, data, nbytes):
        with self._call('send', data=nbytes > 0, open=self.answer >= 0):
            self.answer = super().send(stream, data, nbytes)
            if self.answer > 0:
                self.sent.append((data, self.written[-self.answer:]))
            return self.answer

    def settle(self, stream, most):
        # What must stay stands there as it was sent.
        with self._call('settle', most=0 <= most <= len(self.written),
                        open=self.answer >= 0):
            for data, was in self.sent:
                if ctypes.string_at(data, len(was)) != was:
                    self.faults.append('settle: %d bytes are gone' % len(was))
            kept = min(self.keep, most)
            while sum(len(was) for _data, was in self.sent[1:]) >= kept and (
                    self.sent):
                del self.sent[0]
            self.answer = super().settle(stream, most)
            return self.answer

    def send_hole(self, stream, length, flags):
        with self._call('send_hole', length=length > 0, flags=flags == 0,
                        open=self.answer >= 0):
            self.answer = super().send_hole(stream, length, flags)
            return self.answer

    def finish(self, stream):
        with self._call('finish', once=self.names.count('finish') == 0,
                        open=self.before not in ('abort', 'last_error')):
            self.answer = super().finish(stream)
            return self.answer

    def abort(self, stream):
        with self._call('abort', once=self.names.count('abort') == 0):
            self.answer = super().abort(stream)
            return self.answer

    def last_error(self, stream, error):
        with self._call('last_error', failed=self.answer == -1,
                        zeroed=bytes(error[0]) == bytes(ends.CError()),
                        same_thread=SELF() in self.threads[self.before]):
            super().last_error(stream, error)


PARTS = [4096, b'A' * 10000, 300, b'B', 70, b'C' * 5000]
LENGTH = 4096 + 10000 + 300 + 1 + 70 + 5000


@ddt.ddt
class KeptByTheCopyTestCase(base.PumpExtensionTestCase):
    """What a copy asks of its ends, come what may."""

    # Arguments of the source, those of the destination, length, reason.
    @ddt.data(
        ({}, {}, LENGTH, None), ({}, {'take': 7}, LENGTH, None),
        ({}, {'keep': 0}, LENGTH, None), ({}, {'keep': 1}, LENGTH, None),
        ({}, {'keep': 5000}, LENGTH, None),
        ({}, {'keep': LENGTH}, LENGTH, None),
        ({}, {'keep': LENGTH, 'take': 7}, LENGTH, None),
        ({'fail_at': 4}, {'keep': LENGTH}, LENGTH, 'libvirt'),
        ({}, {'keep': -1}, LENGTH, 'libvirt'),
        ({'fail_at': 0}, {}, LENGTH, 'libvirt'),
        ({'fail_at': 3}, {}, LENGTH, 'libvirt'),
        ({'fail_hole': True}, {}, LENGTH, 'libvirt'),
        ({'fail_finish': True}, {}, LENGTH, 'libvirt'),
        ({}, {'fail_at': 0}, LENGTH, 'libvirt'),
        ({}, {'fail_at': 4}, LENGTH, 'libvirt'),
        ({}, {'fail_hole': True}, LENGTH, 'libvirt'),
        ({}, {'fail_finish': True}, LENGTH, 'libvirt'),
        ({}, {}, LENGTH + 1, 'short'), ({}, {}, LENGTH - 1, 'long'))
    @ddt.unpack
    def test_what_is_called(self, source, destination, length, reason):
        source = StrictStream(PARTS, **source)
        destination = StrictStream(**destination)
        copy = self._pump.Copy(source, destination, length, slot_size=4096,
                               slots=3)
        last = 'abort'
        if reason:
            e = self.assertRaises(self._pump.PumpError, copy.run)
            self.assertEqual(reason, e.reason)
        else:
            copy.run()
            last = 'finish'
        for end in (source, destination):
            self.assertEqual([], end.faults)
            self.assertEqual(last, end.names[-1])
            self.assertEqual(reason is not None, end.stopped)

    @ddt.data({}, {'fail_at': 2}, {'fail_hole': True}, {'fail_finish': True})
    def test_which_thread_calls(self, kwargs):
        source, destination = StrictStream(PARTS), StrictStream(**kwargs)
        with contextlib.suppress(self._pump.PumpError):
            self._pump.Copy(source, destination, LENGTH).run()
        for end in (source, destination):
            for name, threads in end.threads.items():
                self.assertEqual(1, len(threads), name)
                self.assertEqual(not name.startswith('recv'),
                                 threads == {SELF()}, name)


def answers(value):
    return lambda *args: value


def tells_of_a_hole(length):
    def recv_hole(stream, found, flags):
        found[0] = length
        return 0
    return recv_hole


@ddt.ddt
class BrokenByAnEndTestCase(base.PumpExtensionTestCase):
    """An end that doesn't do what it must fails the copy, and no more."""

    TYPES = {'recv': ends.RECV, 'recv_hole': ends.RECV_HOLE,
             'send': ends.SEND, 'settle': ends.SETTLE,
             'send_hole': ends.SEND_HOLE,
             'finish': ends.CLOSE, 'abort': ends.CLOSE,
             'last_error': ends.LAST_ERROR}

    def run_copy(self, side, **functions):
        streams = {'source': ends.StubStream(PARTS),
                   'destination': ends.StubStream()}
        for name, function in functions.items():
            setattr(streams[side].end, name, self.TYPES[name](function))
        e = self.assertRaises(
            self._pump.PumpError, self.copy, streams['source'],
            streams['destination'], LENGTH, slot_size=4096)
        self.assertNotIn('finish', streams['destination'].log)
        for name, stream in streams.items():
            if 'abort' not in functions or name != side:
                self.assertEqual('abort', stream.log[-1])
        self.assertEqual(side, e.side)
        return e

    @ddt.data(
        ('source', 'recv', answers(-2), 'stuck'),
        ('source', 'recv', answers(-4), 'stuck'),
        ('source', 'recv', answers(-1 << 31), 'stuck'),
        ('source', 'recv', lambda s, data, n, flags: n + 1, 'broken'),
        ('source', 'recv', answers((1 << 31) - 1), 'broken'),
        ('source', 'recv', answers(0), 'short'),
        ('source', 'recv_hole', answers(-2), 'stuck'),
        ('source', 'recv_hole', answers(0), 'stuck'),
        ('source', 'recv_hole', tells_of_a_hole(-1), 'stuck'),
        ('source', 'recv_hole', tells_of_a_hole(-1 << 63), 'stuck'),
        ('source', 'recv_hole', tells_of_a_hole((1 << 63) - 1), 'long'),
        ('destination', 'send', answers(0), 'stuck'),
        ('destination', 'send', answers(-2), 'stuck'),
        ('destination', 'send', answers(-3), 'stuck'),
        ('destination', 'send', lambda s, data, n: n + 1, 'broken'),
        ('destination', 'send', answers((1 << 31) - 1), 'broken'),
        ('destination', 'settle', answers(-2), 'stuck'),
        ('destination', 'settle', lambda s, most: most + 1, 'broken'),
        ('destination', 'send_hole', answers(-2), 'stuck'),
        ('source', 'finish', answers(-2), 'stuck'))
    @ddt.unpack
    def test_answer(self, side, name, function, reason):
        e = self.run_copy(side, **{name: function})
        self.assertEqual((reason, 0, ''), (e.reason, e.code, e.message))

    def test_destination_never_finishes(self):
        destination = ends.StubStream()
        destination.end.finish = ends.CLOSE(answers(-2))
        e = self.fails(ends.StubStream([b'A']), destination, 1)
        self.assertEqual(('destination', 'finish', 'stuck'),
                         (e.side, e.operation, e.reason))

    @ddt.data(-1, -2, 5)
    def test_abort_fails_too(self, value):
        e = self.run_copy('source', recv=answers(-1), abort=answers(value))
        self.assertEqual(('receive', 'libvirt', 38),
                         (e.operation, e.reason, e.code))

    def test_an_error_that_says_nothing(self):
        e = self.run_copy('source', recv=answers(-1), last_error=answers(None))
        self.assertEqual(('libvirt', 0, 0, ''),
                         (e.reason, e.code, e.domain, e.message))
        self.assertIn('receive', str(e))

    def test_an_error_without_an_end(self):
        def last_error(stream, error):
            ctypes.memset(error, ord('x'), ctypes.sizeof(ends.CError))
        e = self.run_copy('destination', send=answers(-1),
                          last_error=last_error)
        self.assertEqual('x' * 1023, e.message)

    @ddt.data(('source', 'recv'), ('destination', 'send'))
    @ddt.unpack
    def test_what_is_no_end_of_that_side(self, side, name):
        streams = {'source': ends.StubStream([b'A']),
                   'destination': ends.StubStream()}
        setattr(streams[side].end, name, self.TYPES[name]())
        self.assertRaises(TypeError, self._pump.Copy, streams['source'],
                          streams['destination'], 1)
