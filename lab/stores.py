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

"""Move a guest between two QEMUs many times; see what its memory loses.

    python -m lab.stores [--moves N] [--memory KIB]

There is no libvirt and no disk. QEMU and its guest get one processor, so that
QEMU's threads wait for each other as they do on a machine with much to do. See
emulator.py for the fault that this is about.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from .guest import image

HERE = pathlib.Path(__file__).parent
COMMAND_LINE = 'panic=-1 ' + image.COMMAND_LINE
#: The lab's flavors have 128 MiB.
MEMORY = 128 << 10
DEATHS = re.compile('BUG|Oops|panic|Call Trace|segfault|corrupt')
LIMIT = 60  # seconds for whatever a guest has to do


class Guest:
    """A guest in a QEMU of its own, without libvirt.

    :ivar console: what it has said
    """

    def __init__(self, folder: pathlib.Path, number: int, kernel: pathlib.Path,
                 memory: int, comes_from: pathlib.Path | None = None,
                 program: str = 'qemu-system-x86_64', more=()):
        """Start one.

        :param memory: KiB
        :param comes_from: the UNIX socket where it arrives
        """
        self._log = folder / ('console-%d' % number)
        monitor = folder / ('monitor-%d' % number)
        incoming = ['-incoming', 'unix:%s' % comes_from] if comes_from else []
        self._process = subprocess.Popen([
            program, '-M', 'pc', '-accel', 'tcg', '-cpu', 'Nehalem',
            '-m', '%dk' % memory, '-nodefaults', '-display', 'none',
            '-kernel', str(kernel), '-initrd', str(folder / 'initrd'),
            '-append', COMMAND_LINE, '-serial', 'file:%s' % self._log,
            '-qmp', 'unix:%s,server=on,wait=off' % monitor, *more, *incoming])
        self._socket = socket.socket(socket.AF_UNIX)
        wait(lambda: self._connects(monitor), 'the monitor')
        self._file = self._socket.makefile('rw')
        self._file.readline()
        self.tell('qmp_capabilities')

    def _connects(self, monitor) -> bool:
        with contextlib.suppress(OSError):
            self._socket.connect(str(monitor))
            return True
        return False

    def tell(self, command: str, **arguments) -> dict:
        """One command of QMP: what it returns.

        :raises RuntimeError: QEMU refuses it
        """
        self._file.write(json.dumps(
            {'execute': command, 'arguments': arguments}) + '\n')
        self._file.flush()
        while True:
            said = json.loads(self._file.readline())
            if 'error' in said:
                raise RuntimeError('%s: %s' % (command, said['error']))
            if 'return' in said:
                return said['return']

    @property
    def console(self) -> str:
        return (self._log.read_text(errors='replace')
                if self._log.exists() else '')

    def is_alive(self, times: int = 2) -> bool:
        """Whether it has said so that often, as it does once a second."""
        return self.console.count('ALIVE') >= times

    def move(self, there: pathlib.Path) -> float:
        """Send it to another; returns seconds."""
        self.tell('migrate-set-parameters', **{
            'max-bandwidth': 1 << 30, 'downtime-limit': 300})
        start = time.monotonic()
        self.tell('migrate', uri='unix:%s' % there)
        wait(lambda: self.tell('query-migrate').get('status') in (
            'completed', 'failed'), 'the migration')
        return time.monotonic() - start

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()


def wait(for_what, name: str) -> None:
    """Poll until something is true.

    :raises TimeoutError: it isn't in LIMIT seconds
    """
    until = time.monotonic() + LIMIT
    while not for_what():
        if time.monotonic() > until:
            raise TimeoutError('%s: not in %d s' % (name, LIMIT))
        time.sleep(.05)


def make_initrd(folder: pathlib.Path) -> None:
    """Compile the guest's only program into an initrd."""
    root = folder / 'root'
    root.mkdir()
    image.run('gcc', '-O2', '-static', '-o', root / 'init',
              HERE / 'guest/stores.c')
    (folder / 'initrd').write_bytes(image.run(
        '/bin/busybox', 'cpio', '-o', '-H', 'newc', cwd=root, input=b'init'))
    shutil.rmtree(root)


def run(kernel: pathlib.Path, moves: int, memory: int = MEMORY, tell=print,
        **how) -> tuple[int, int, int]:
    """Move a guest; another one goes on when it has died.

    :param kernel: of the lab's guest image
    :param memory: KiB that it has
    :param how: for Guest: program, more
    :returns: moves, after how many of them the guest had lost something,
        after how many it was dead
    """
    lost = died = 0
    took = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_initrd(folder)
        numbers = iter(range(1, 1 << 20))
        here = None
        try:
            for number in range(1, moves + 1):
                if here is None:
                    here = Guest(folder, next(numbers), kernel, memory, **how)
                    wait(here.is_alive, 'the guest')
                there = folder / ('moves-%d' % number)
                other = Guest(folder, next(numbers), kernel, memory, there,
                              **how)
                took.append(here.move(there))
                here.end()
                here = other
                with contextlib.suppress(TimeoutError):
                    wait(lambda: here.is_alive(3) or DEATHS.search(
                        here.console), 'the guest')
                dead = not here.is_alive() or bool(DEATHS.search(here.console))
                pages = here.console.count('LOST')
                died += dead
                lost += bool(pages)
                tell('move %d: %.1f s, %d pages lost%s' % (
                    number, took[-1], pages, ', dead' if dead else ''))
                if dead:
                    here.end()
                    here = None
        finally:
            if here:
                here.end()
    tell('%d moves of %d KiB: %d lost memory, %d died; median %.1f s' % (
        moves, memory, lost, died, statistics.median(took)))
    return moves, lost, died


def main() -> int:
    from .cloud import cloud
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--moves', type=int, default=20)
    parser.add_argument('--memory', type=int, default=MEMORY, help='KiB')
    parser.add_argument('--program', default='qemu-system-x86_64')
    said = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    image.ensure(cloud.GUEST)
    _, lost, died = run(cloud.GUEST / 'vmlinuz', said.moves, said.memory,
                        program=said.program)
    return bool(lost or died)


if __name__ == '__main__':
    sys.exit(main())
