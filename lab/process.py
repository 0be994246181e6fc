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

"""A process known by its id and its start time, and records of daemons."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import time

from .errors import LabError


def _stat(pid: int) -> list[str]:
    """The fields of proc_pid_stat(5) after the command's name."""
    text = pathlib.Path('/proc/%d/stat' % pid).read_text()
    return text.rpartition(')')[2].split()


@dataclasses.dataclass(frozen=True)
class Process:
    """Not another one that later got the same id.

    :ivar start: in clock ticks since the machine's start (field 22 of
        proc_pid_stat(5))
    """

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> 'Process':
        """:raises: ProcessLookupError where it is gone"""
        try:
            return cls(pid, int(_stat(pid)[19]))
        except FileNotFoundError:
            raise ProcessLookupError(pid) from None

    @property
    def state(self) -> str:
        """A letter as in ps(1), '' when it has ended."""
        try:
            fields = _stat(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return ''
        if int(fields[19]) != self.start or fields[0] in 'ZX':
            return ''
        return fields[0]

    def alive(self) -> bool:
        return bool(self.state)

    def signal(self, number: int) -> bool:
        """Send a signal to just this process.

        :returns: whether it was there
        """
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # The descriptor is of whoever has the id now: look once more.
            if not self.alive():
                return False
            signal.pidfd_send_signal(fd, number)
            return True
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)


def sessions(*sids: int) -> list[Process]:
    """All processes of these sessions."""
    found = []
    for entry in os.scandir('/proc'):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ProcessLookupError):
                fields = _stat(int(entry.name))
                if int(fields[3]) in sids and fields[0] not in 'ZX':
                    found.append(Process(int(entry.name), int(fields[19])))
    return found


def wait_gone(processes, timeout: float) -> bool:
    """Wait until all of them have ended.

    :param timeout: seconds
    """
    deadline = time.monotonic() + timeout
    while any(p.alive() for p in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def write_json(path: pathlib.Path, content) -> None:
    """Replace a file as a whole; only root can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name('.%s.%d' % (path.name, os.getpid()))
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
              'w') as out:
        json.dump(content, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    fresh.rename(path)


@dataclasses.dataclass
class Service:
    """A daemon that the lab has started in one of its machines.

    :ivar argv, env, cwd: how it was started, to do it again
    :ivar sid: its session, in which its children are too
    """

    machine: str
    name: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    log: str
    pid: int = 0
    start: int = 0
    sid: int = 0

    @classmethod
    def load(cls, path: pathlib.Path) -> 'Service':
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise LabError('%s has no service %s' % (
                path.parent.name, path.stem)) from None

    def save(self, path: pathlib.Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @property
    def record(self) -> dict:
        return dataclasses.asdict(self)

    @property
    def process(self) -> Process:
        return Process(self.pid, self.start)

    def alive(self) -> bool:
        return self.process.alive()

    def paused(self) -> bool:
        return self.process.state == 'T'

    def members(self) -> list[Process]:
        """The daemon and its children: some make a session of their own."""
        if not self.alive():
            # Its id may be another's by now; a session's members keep it.
            return [p for p in sessions(self.sid) if p.start >= self.start]
        return sessions(self.sid, self.pid)

    def signal(self, number: int) -> None:
        for member in self.members():
            member.signal(number)
