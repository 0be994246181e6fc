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

"""Steps with the time they take, and checks."""

import contextlib
import dataclasses
import threading
import time

import rich.console
import rich.live
import rich.spinner
import rich.table


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of `status`."""

    machine: str
    what: str
    ok: bool
    detail: str = ''


class Steps:
    """Says nothing."""

    @contextlib.contextmanager
    def step(self, text: str):
        yield

    def say(self, text: str) -> None:
        pass


class Console(Steps):
    """Shows each step as it runs, and what it took."""

    def __init__(self, console: rich.console.Console | None = None):
        self.console = console or rich.console.Console(
            stderr=False, highlight=False)
        self.began = time.monotonic()
        self._lock = threading.Lock()
        self._running: list[_Running] = []
        self._live: rich.live.Live | None = None

    @contextlib.contextmanager
    def step(self, text: str):
        """A step; several may run at the same time, in threads."""
        start = time.monotonic()
        running = _Running(text, start)
        self._show(running)
        ok = False
        try:
            yield
            ok = True
        finally:
            self._hide(running)
            took = time.monotonic() - start
            self.console.print('%s %7.1f s  %s%s' % (
                '[green]✓[/]' if ok else '[red]✗[/]', took, text,
                '' if ok else ' [red]failed[/]'), highlight=False)

    def _show(self, running):
        if not self.console.is_terminal:
            return
        with self._lock:
            self._running.append(running)
            if self._live is None:
                # One for all: they can't be ended in any other order.
                self._live = rich.live.Live(
                    get_renderable=lambda: rich.console.Group(
                        *self._running), console=self.console,
                    transient=True, refresh_per_second=8)
                self._live.start()

    def _hide(self, running):
        with self._lock:
            if running in self._running:
                self._running.remove(running)
            if self._live and not self._running:
                self._live.stop()
                self._live = None

    def say(self, text: str) -> None:
        self.console.print('%s %7.1f s  %s' % (
            ' ', time.monotonic() - self.began, text))


class _Running:
    def __init__(self, text, start):
        self.spinner = rich.spinner.Spinner('dots')
        self.text, self.start = text, start

    def __rich__(self):
        self.spinner.update(text='%5.1f s  %s' % (
            time.monotonic() - self.start, self.text))
        return self.spinner


def table(checks: list[Check]) -> rich.table.Table:
    out = rich.table.Table(box=None, pad_edge=False)
    for title in ('', 'machine', 'what', 'detail'):
        out.add_column(title)
    for check in checks:
        out.add_row('[green]✓[/]' if check.ok else '[red]✗[/]',
                    check.machine, check.what, check.detail)
    return out
