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

"""What is measured, and what is hoped for."""

import dataclasses
import functools
import os
import statistics

GIB = 1 << 30
MIB = 1 << 20

# The way that tells what C is worth.
PYTHON = 'Python worker'
# The pump into qemu-nbd, as a destination without libvirt starts it.
NBD = 'pump over NBD'

RANDOM = '''for _ in range(%d):
    out.write(os.urandom(1 << 20))'''
# Extents of 1 MiB, spread evenly, as many as make up the share.
SPREAD = '''size, data = %d, %d
for n in range(data >> 20):
    out.seek(n * (size // (data >> 20)) >> 12 << 12)
    out.write(os.urandom(1 << 20))
out.truncate(size)'''


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of build/bench.json.

    :ivar target: the least (or, where ``most``, the most) that the ratio
        should be; None: for information
    """

    case: str
    metric: str
    ours: float
    other: str
    other_value: float
    ratio: float
    target: float | None = None
    most: bool = False

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return (self.ratio <= self.target if self.most
                else self.ratio >= self.target)


def faster(case, ours, other, theirs, target=None, metric='seconds'):
    return Row(case, metric, ours, other, theirs, theirs / ours, target)


def less(case, metric, ours, other, theirs, target=None):
    return Row(case, metric, ours, other, theirs,
               ours / theirs if theirs else 0, target, most=True)


class Cases:
    """:param bench: methods.Bench
    :param runs: of each way; the medians count
    :param tell: called with a line of text as things go
    """

    def __init__(self, bench, runs=5, tell=print):
        self.bench, self.runs, self.tell = bench, runs, tell

    def paired(self, name, length, ways) -> dict[str, list]:
        """Run each way in turn, so often; costs by way."""
        costs = {way: [] for way in ways}
        for number in range(self.runs):
            for way, run in ways.items():
                self.bench.clear(name)
                cost = run()
                if not number:
                    self.bench.check(name)
                costs[way].append(cost)
                self.tell('%s: %s %d of %d: %.2f s' % (
                    name, way, number + 1, self.runs, cost.wall))
        return costs

    def _ways(self, name, length, sparse=False, virsh=True):
        bench = self.bench
        checksums = []

        def pump():
            cost, answer = bench.pump([name], length)
            checksums.append(answer['checksums'][0])
            return cost

        ways = {'pump': pump,
                'rsync -S' if sparse else 'rsync': functools.partial(
                    bench.rsync, name, length, sparse)}
        if not sparse:
            ways['scp'] = functools.partial(bench.scp, name, length)
        if virsh:
            ways['virsh --sparse' if sparse else 'virsh'] = functools.partial(
                bench.virsh, name, length, sparse)
        for connections in (1, 4):
            ways['nbdcopy -C %d' % connections] = functools.partial(
                bench.nbdcopy, name, length, connections)
        ways[PYTHON] = functools.partial(bench.python_worker, name, length)
        return ways, checksums

    def random(self, size=GIB, targets=None):
        """A disk full of data; then its copy is verified."""
        name, case = 'random', '%g GiB random' % (size / GIB)
        length = self.bench.make(name, RANDOM % (size >> 20))
        ways, checksums = self._ways(name, length)
        ways['virsh vol-upload'] = functools.partial(
            self.bench.upload, name, length)
        costs = self.paired(name, length, ways)
        yield from rows(case, costs, {'rsync': 1.5, 'scp': 1.5,
                                      'nbdcopy -C 4': 1.0})
        ours = median(costs['pump'], 'wall')
        for way in ('nbdcopy -C 1', 'nbdcopy -C 4'):
            yield less(case, 'CPU s/GiB', *per_gib(
                costs['pump'], size), way, *per_gib(costs[way], size),
                1.0 if way.endswith('4') else None)
        for way in (*list(costs)[1:4], PYTHON):
            yield less(case, 'CPU s/GiB', *per_gib(
                costs['pump'], size), way, *per_gib(costs[way], size))
        yield less(case, 'peak MiB', median(costs['pump'], 'memory') / MIB,
                   'limit', 64, 1.0)
        yield less(case, 'peak MiB', median(costs['pump'], 'memory') / MIB,
                   PYTHON, median(costs[PYTHON], 'memory') / MIB)
        verified = []
        self.bench.clear(name)
        _cost, answer = self.bench.pump([name], length)
        for _ in range(self.runs):
            verified.append(self.bench.verify(
                name, length, answer['checksums'][0]))
        yield less(case, 'verification seconds',
                   statistics.median(verified), 'our copy', ours, 0.4)
        yield from self._threads(case, name, length)
        cancelled = []
        for _ in range(self.runs):
            self.bench.clear(name)
            cancelled.append(self.bench.cancel(name, length, ours / 2))
        yield less(case, 'seconds to cancel', statistics.median(cancelled),
                   'limit', 0.1, 1.0)
        self.bench.forget(name)

    def _threads(self, case, name, length):
        """What another thread of the process keeps of its speed.

        Against the same thread in a process that has nothing to do with the
        copy: beside it the machine is as busy.
        """
        inside, beside = [], []
        for _ in range(self.runs):
            self.bench.clear(name)
            _cost, answer = self.bench.pump([name], length, spin=True)
            inside.append(answer['speed'])
            self.bench.clear(name)
            self.bench.peer.begin('spin', seconds=answer['wall'])
            self.bench.pump([name], length)
            beside.append(self.bench.peer.answer()['speed'])
        ours, theirs = statistics.median(inside), statistics.median(beside)
        yield Row(case, 'loops/s of another thread', ours,
                  'the same in another process', theirs, ours / theirs, 0.95)

    def sparse(self, size=10 * GIB, share=0.05):
        name = 'sparse'
        case = '%g GiB, %g %% data' % (size / GIB, 100 * share)
        length = self.bench.make(name, SPREAD % (size, int(size * share)))
        ways, _checksums = self._ways(name, length, sparse=True)
        costs = self.paired(name, length, ways)
        yield from rows(case, costs, {'rsync -S': 20, 'nbdcopy -C 1': 1.5,
                                      'nbdcopy -C 4': 1.5})
        self.bench.clear(name)
        self.bench.pump([name], length)
        here, there = self.bench.allocations(name)
        yield less(case, 'allocation MiB', there / MIB, 'the source',
                   here / MIB, 1.02)
        self.bench.forget(name)

    def _nbd_ways(self, name, length, sparse=False):
        """Over NBD; what the libvirt way needs is there to compare."""
        bench = self.bench

        def pump(run, *args):
            return lambda: run(*args)[0]

        ways = {
            NBD: pump(bench.pump_nbd, name, length),
            NBD + ', nbdkit': pump(bench.pump_nbd, name, length, 'nbdkit'),
            'pump': pump(bench.pump, [name], length)}
        for connections in (1, 4):
            way = 'nbdcopy -C %d' % connections
            ways[way] = functools.partial(bench.nbdcopy, name, length,
                                          connections)
            ways[way + ', qemu-nbd'] = functools.partial(
                bench.nbdcopy_psk, name, length, connections)
        ways['nbdcopy -C 4, nbdkit PSK'] = functools.partial(
            bench.nbdcopy_psk, name, length, 4, 'nbdkit')
        ways['rsync -S' if sparse else 'rsync'] = functools.partial(
            bench.rsync, name, length, sparse)
        if not sparse:
            ways['scp'] = functools.partial(bench.scp, name, length)
        return ways

    def nbd(self, size=GIB):
        """A disk full of data into an NBD server on the other host."""
        name, case = 'nbd', 'NBD, %g GiB random' % (size / GIB)
        length = self.bench.make(name, RANDOM % (size >> 20))
        costs = self.paired(name, length, self._nbd_ways(name, length))
        yield from rows(case, costs, {
            'nbdcopy -C 1': 1.0, 'nbdcopy -C 4': 1.0, 'rsync': 2.0,
            'scp': 2.0}, NBD)
        for way in costs:
            if way != NBD:
                yield less(case, 'CPU s/GiB', *per_gib(costs[NBD], size), way,
                           *per_gib(costs[way], size),
                           1.1 if way == 'nbdcopy -C 4' else None)
        yield less(case, 'peak MiB', median(costs[NBD], 'memory') / MIB,
                   'limit', 64, 1.0)
        self.bench.forget(name)

    def nbd_sparse(self, size=10 * GIB):
        """5 % of data, in extents of 1 MiB."""
        name, case = 'nbd-sparse', 'NBD, %g GiB with 5 %%' % (size / GIB)
        length = self.bench.make(name, SPREAD % (size, size // 20))
        costs = self.paired(name, length, self._nbd_ways(name, length, True))
        yield from rows(case, costs, {
            'nbdcopy -C 1': 1.0, 'nbdcopy -C 4': 1.0, 'rsync -S': 30.0}, NBD)
        self.bench.forget(name)

    def nbd_three(self, size=512 * MIB):
        """Three disks full of data, at once or in turn."""
        names = ['nbd-three-%d' % n for n in range(3)]
        case = 'NBD, three disks at once'
        for name in names:
            length = self.bench.make(name, RANDOM % (size >> 20))
        costs = {True: [], False: []}
        for _ in range(self.runs):
            for together, found in costs.items():
                for name in names:
                    self.bench.clear(name)
                cost, _answer = self.bench.pump_nbd_all(
                    names, length, together=together)
                found.append(cost)
                self.tell('three disks over NBD, %s: %.2f s' % (
                    'at once' if together else 'in turn', cost.wall))
        for name in names:
            self.bench.check(name)
        yield faster(case, median(costs[True], 'wall'),
                     'one after the other', median(costs[False], 'wall'), 1.2)
        # Two cores can't do more than two seconds a second.
        yield Row(case, 'CPU s/s', median(costs[True], 'cpu') /
                  median(costs[True], 'wall'), 'cores', os.cpu_count(),
                  median(costs[True], 'cpu') / median(costs[True], 'wall') /
                  os.cpu_count())
        self.bench.forget(*names)

    def nbd_warm(self, size=2 * GIB, changed=20 * MIB):
        """What is left to do when the guest is off, of a disk sent ahead.

        :param changed: bytes that the guest writes meanwhile
        """
        name = 'nbd-warm'
        case = 'NBD, %g GiB, %d MiB changed' % (size / GIB, changed >> 20)
        length = self.bench.make(name, RANDOM % (size >> 20))
        cold, rest, sent = [], [], []
        for number in range(self.runs):
            self.bench.clear(name)
            cold.append(self.bench.pump_nbd(name, length)[0].wall)
            self.bench.clear(name)
            found = self.bench.pump_warm(name, length, changed)
            if not number:
                self.bench.check(name)
            rest.append(found['wall'])
            sent.append(found['sent'] / MIB)
            self.tell('%s: all of it %.2f s, first pass %.2f s, rest %.2f s, '
                      '%.0f MiB' % (name, cold[-1], found['first'], rest[-1],
                                    sent[-1]))
        yield less(case, 'seconds with the guest off', statistics.median(rest),
                   'all of it', statistics.median(cold), 0.35)
        yield less(case, 'MiB sent', statistics.median(sent), 'changed',
                   changed / MIB)
        self.bench.forget(name)

    def empty(self, size=10 * GIB):
        name, case = 'empty', '%g GiB empty' % (size / GIB)
        length = self.bench.make(name, 'out.truncate(%d)' % size)
        ways, _checksums = self._ways(name, length, sparse=True)
        costs = self.paired(name, length, ways)
        yield from rows(case, costs, {})
        yield less(case, 'seconds', median(costs['pump'], 'wall'), 'limit',
                   0.3, 1.0)
        self.bench.forget(name)

    def overlay(self, size=200 * MIB):
        """The file of a COW volume of which so much was changed."""
        name, case = 'overlay', 'overlay, %d MiB changed' % (size >> 20)
        folder = '/var/lib/nova/bench'
        self.bench.a.run(['truncate', '-s', '10G', folder + '/base'])
        self.bench.a.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-F',
                          'raw', '-b', folder + '/base',
                          folder + '/' + name])
        self.bench.a.run(['sh', '-ec', 'head -c %d /dev/urandom >/tmp/new; '
                          'qemu-io -f qcow2 -c "write -q -s /tmp/new 1G %d" '
                          '%s/%s; rm /tmp/new' % (size, size, folder, name)])
        self.bench._refresh()
        length = self.bench.a.path('%s/%s' % (folder, name)).stat().st_size
        ways, _checksums = self._ways(name, length)
        costs = self.paired(name, length, ways)
        yield from rows(case, costs, {})
        self.bench.forget(name, 'base')

    def three(self, size=512 * MIB):
        names, case = ['three-%d' % n for n in range(3)], 'three disks at once'
        for name in names:
            length = self.bench.make(name, RANDOM % (size >> 20))
        walls = {True: [], False: []}
        for _ in range(self.runs):
            for together in walls:
                for name in names:
                    self.bench.clear(name)
                cost, _answer = self.bench.pump(names, length,
                                                together=together)
                walls[together].append(cost.wall)
                self.tell('three disks, %s: %.2f s' % (
                    'at once' if together else 'in turn', cost.wall))
        for name in names:
            self.bench.check(name)
        yield faster(case, statistics.median(walls[True]),
                     'one after the other', statistics.median(walls[False]),
                     1.3)
        self.bench.forget(*names)

    def tiny(self):
        name, case = 'tiny', '4 KiB'
        length = self.bench.make(name, 'out.write(os.urandom(4096))')
        ways, _checksums = self._ways(name, length)
        yield from rows(case, self.paired(name, length, ways), {})
        self.bench.clear(name)
        _cost, answer = self.bench.pump([name], length)
        yield less(case, 'seconds of a worker that reads it',
                   statistics.median(self.bench.verify(
                       name, length, answer['checksums'][0])
                       for _ in range(self.runs)), 'limit', 0.15, 1.0)
        self.bench.forget(name)

    def slow(self, size=256 * MIB, rate='84mbit'):
        """Memory while the destination takes 10 MiB/s."""
        name, case = 'slow', '%d MiB at 10 MiB/s' % (size >> 20)
        length = self.bench.make(name, RANDOM % (size >> 20))
        with self.bench.b.link.slowed(rate):
            cost, _answer = self.bench.pump([name], length)
        self.tell('%s: %.1f s' % (case, cost.wall))
        yield less(case, 'peak MiB', cost.memory / MIB, 'limit', 64, 1.0)
        self.bench.forget(name)

    def large(self, size=20 * GIB):
        """Memory for a large disk full of data, once; on the real disk."""
        name, case = 'large', '%g GiB random' % (size / GIB)
        length = self.bench.make(name, 'block = os.urandom(64 << 20)\n' +
                                 'for n in range(%d):\n' % (size >> 26) +
                                 '    out.write(block[n:] + block[:n])')
        cost, _answer = self.bench.pump([name], length)
        self.tell('%s: %.1f s' % (case, cost.wall))
        yield less(case, 'peak MiB', cost.memory / MIB, 'limit', 64, 1.0)
        self.bench.forget(name)

    IN_MEMORY = ('tiny', 'empty', 'random', 'sparse', 'overlay', 'three',
                 'slow', 'nbd_warm', 'nbd_three', 'nbd', 'nbd_sparse')
    ON_DISK = ('large',)


def median(costs, field) -> float:
    return statistics.median(getattr(cost, field) for cost in costs)


def per_gib(costs, size):
    return (median(costs, 'cpu') * GIB / size,)


def rows(case, costs, targets, ours='pump'):
    """Our time against each other way's."""
    for way in costs:
        if way != ours:
            yield faster(case, median(costs[ours], 'wall'), way,
                         median(costs[way], 'wall'), targets.get(way))
