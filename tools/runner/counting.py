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

"""Run test programs and count truly; one live line a stage."""

import os
import pathlib
import re
import subprocess
import sys
import time

import subunit
import testtools

PROGRESS_SECONDS = 30  # between two lines where nobody watches


class Tally:
    """Sums of all stages, and what to show at the end."""

    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.failures: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def add(self, title: str, ok: bool, output: str = '') -> None:
        """Count a check that isn't made of tests as one test."""
        if ok:
            self.passed += 1
        else:
            self.failed += 1
            self.failures.append((title, output))

    def skip(self, title: str, reason: str) -> None:
        """A whole stage can't run here; in CI that is a failure."""
        if os.environ.get('CI') == 'true':
            self.add(title, False, 'skipped in CI: ' + reason)
        else:
            self.skipped += 1
            self.notes.append('%s skipped: %s' % (title, reason))

    def report(self) -> int:
        for title, output in self.failures:
            print('\n' + '=' * 70 + '\nFAILED: %s\n%s' % (title, output))
        for note in self.notes:
            print(note)
        print('%d passed, %d failed, %d skipped' % (
            self.passed, self.failed, self.skipped))
        return 1 if self.failed or not self.passed else 0


class Line:
    """A stage's line: rewritten on a terminal, now and then elsewhere."""

    def __init__(self, title: str):
        self.title, self.start, self.last = title, time.monotonic(), 0.0
        self.live = sys.stdout.isatty()

    def show(self, text: str, end: bool = False) -> None:
        now = time.monotonic()
        if not end and now - self.last < (0.2 if self.live
                                          else PROGRESS_SECONDS):
            return
        self.last = now
        line = '%-12s %5.0f s  %s' % (self.title, now - self.start, text)
        if self.live:
            print('\r\x1b[K' + line, end='\n' if end else '', flush=True)
        else:
            print(line, flush=True)


class _Counter(testtools.StreamResult):
    FINAL = {'success': 'passed', 'xfail': 'passed', 'skip': 'skipped',
             'fail': 'failed', 'uxsuccess': 'failed'}

    def __init__(self, tally: Tally, line: Line):
        super().__init__()
        self.tally, self.line, self.texts = tally, line, {}
        self.counts = dict.fromkeys(('passed', 'failed', 'skipped'), 0)
        self.begun: set[str] = set()

    def status(self, test_id=None, test_status=None, file_name=None,
               file_bytes=None, **_rest):
        if file_bytes and file_name != 'pythonlogging':
            self.texts.setdefault(test_id, []).append(
                bytes(file_bytes).decode(errors='replace'))
        if test_status == 'inprogress':
            self.begun.add(test_id)
        kind = self.FINAL.get(test_status)
        if kind is None:
            return
        self.begun.discard(test_id)
        text = ''.join(self.texts.pop(test_id, ()))
        # setUpClass and the like report a fail, and a skip, of no test.
        self.counts[kind] += 1
        if kind == 'failed':
            self.tally.failures.append((test_id, text))
        self.line.show(self.told())

    def told(self) -> str:
        return ', '.join('%d %s' % (n, k) for k, n in self.counts.items())


def stestr(tally: Tally, title: str, cwd: pathlib.Path, arguments: list[str],
           env: dict | None = None) -> None:
    """Run tests under stestr and count each."""
    line = Line(title)
    counter = _Counter(tally, line)
    with subprocess.Popen(
            [sys.executable, '-m', 'stestr', *arguments[:-1], 'run',
             '--subunit', *arguments[-1]], cwd=cwd, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})}) as process:
        subunit.ByteStreamToStreamResult(
            process.stdout, non_subunit_name='output').run(counter)
        errors = process.stderr.read().decode(errors='replace')
    for test in sorted(filter(None, counter.begun)):
        counter.counts['failed'] += 1
        tally.failures.append((test, 'did not end: its worker died'))
    tally.passed += counter.counts['passed']
    tally.skipped += counter.counts['skipped']
    tally.failed += counter.counts['failed']
    ran = sum(counter.counts.values())
    if not ran or process.returncode and not counter.counts['failed']:
        tally.add(title, False, 'stestr ended with %d after %d tests\n%s\n%s' %
                  (process.returncode, ran, errors[-4000:],
                   ''.join(counter.texts.pop(None, ()))[-4000:]))
    line.show(counter.told(), end=True)


def command(tally: Tally, title: str, arguments: list, cwd: pathlib.Path,
            env: dict | None = None) -> None:
    """Run a check of its own, one test in the sums."""
    line = Line(title)
    done = subprocess.run(
        list(map(str, arguments)), cwd=cwd, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors='replace', env={**os.environ, **(env or {})})
    tally.add(title, done.returncode == 0, done.stdout)
    line.show('passed' if done.returncode == 0 else 'failed', end=True)


def modules(names: list[str]) -> str:
    """A pattern for stestr of these modules and all below them."""
    return r'^(%s)(\.|$)' % '|'.join(map(re.escape, names))
