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

"""One line a stage: rewritten on a terminal, now and then elsewhere."""

import sys
import threading
import time

LIVE_SECONDS = 0.5
PLAIN_SECONDS = 30  # between two lines where nobody watches


class Line:
    """A context manager that shows title, elapsed time and ``text``."""

    def __init__(self, title: str):
        self.title, self.text = title, 'running'
        self.start = time.monotonic()
        self.live = sys.stdout.isatty()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> 'Line':
        self._thread.start()
        return self

    def __exit__(self, kind, _value, _traceback) -> None:
        self._ended.set()
        self._thread.join()
        if kind:
            self.text = 'stopped'
        self._show('\n')

    def _tick(self):
        if self.live:
            self._show('')
        while not self._ended.wait(
                LIVE_SECONDS if self.live else PLAIN_SECONDS):
            self._show('' if self.live else '\n')

    def _show(self, end):
        print('%s%-14s %5.0f s  %s' % (
            '\r\x1b[K' if self.live else '', self.title,
            time.monotonic() - self.start, self.text), end=end, flush=True)
