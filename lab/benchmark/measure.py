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

"""Wall time, CPU seconds and peak memory of a command in a host."""

import contextlib
import dataclasses
import os
import pathlib
import resource
import subprocess
import threading
import time

from ..errors import LabError

TICK = os.sysconf('SC_CLK_TCK')
INTERVAL = 0.02  # seconds between two looks at memory


@dataclasses.dataclass(frozen=True)
class Cost:
    """:ivar wall, client, daemons: seconds; memory: bytes at the peak

    ``client`` and ``daemons`` are CPU time, of all processes of the
    transfer and of the daemons on both sides.
    """

    wall: float
    client: float
    daemons: float
    memory: int

    @property
    def cpu(self) -> float:
        return self.client + self.daemons


def _descendants(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir('/proc/%d/task' % one):
                text = pathlib.Path('/proc/%d/task/%s/children' % (
                    one, task)).read_text()
                todo += map(int, text.split())
        found.append(one)
    return found[1:]


def _peak(pid: int) -> int:
    """VmHWM of proc_pid_status(5): since exec, unlike ru_maxrss."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path('/proc/%d/status' % pid).open():
            if line.startswith('VmHWM:'):
                return int(line.split()[1]) * 1024
    return 0


class Memory(threading.Thread):
    """Sums the peaks of a process's descendants, by looking on."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peaks, self.ended = pid, {}, threading.Event()
        self.cpu = 0.0

    def run(self):
        while not self.ended.is_set():
            for pid in _descendants(self.pid):
                # The newest counts: before exec it was its parent's.
                if now := _peak(pid):
                    self.peaks[pid] = now
            self.ended.wait(INTERVAL)
        self.cpu = time.thread_time()

    def end(self) -> int:
        """:returns: bytes"""
        self.ended.set()
        self.join()
        return sum(self.peaks.values())


def daemon_cpu(services) -> float:
    """CPU seconds of daemons and of the children they have waited for."""
    total = 0
    for service in services:
        for pid in (service.pid, *_descendants(service.pid)):
            with contextlib.suppress(OSError):
                fields = pathlib.Path('/proc/%d/stat' % pid).read_text(
                    ).rpartition(')')[2].split()
                total += sum(map(int, fields[11:15]))
    return total / TICK


def command(host, argv, services) -> Cost:
    """Run a command in a host.

    :param services: the daemons that work for it
    """
    before = daemon_cpu(services)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    with host.popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT) as process:
        memory = Memory(process.pid)
        memory.start()
        output = process.communicate()[0]
    wall = time.monotonic() - start
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise LabError('%s: %s' % (argv, output.decode(errors='replace')))
    return Cost(wall, now.ru_utime + now.ru_stime - used.ru_utime -
                used.ru_stime, _settled(services) - before, memory.end())


def _settled(services) -> float:
    """CPU time once those who work for a session have been waited for."""
    time.sleep(0.05)
    return daemon_cpu(services)
