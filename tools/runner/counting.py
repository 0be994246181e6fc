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

"""Run test programs and count truly."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import subunit
import testtools

from .progress import Line


class Tally:
    """Sums of all stages, and what to show at the end."""

    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.failures: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self._shown = 0

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
            self.add(title, False, 'not to be skipped in CI: ' + reason)
        else:
            self.skipped += 1
            self.notes.append('%s skipped: %s' % (title, reason))

    def sums(self) -> tuple[int, int, int]:
        """Tests that passed, failed and were skipped so far."""
        return self.passed, self.failed, self.skipped

    def show(self) -> None:
        """Print in full the failures that haven't been printed yet."""
        for title, output in self.failures[self._shown:]:
            print('\n%s\nFAILED: %s\n%s' % ('=' * 70, title, output),
                  flush=True)
        self._shown = len(self.failures)

    def report(self) -> int:
        """Show the failures, and print the sums as the last line.

        :returns: an exit status: 0 if tests ran and none failed
        """
        self.show()
        for note in self.notes:
            print(note)
        print('%d passed, %d failed, %d skipped' % (
            self.passed, self.failed, self.skipped), flush=True)
        return 1 if self.failed or not self.passed else 0


class _Counter(testtools.StreamResult):
    FINAL = {'success': 'passed', 'xfail': 'passed', 'skip': 'skipped',
             'fail': 'failed', 'uxsuccess': 'failed'}

    def __init__(self, tally: Tally, line: Line):
        super().__init__()
        self.tally, self.line = tally, line
        self.texts: dict[str | None, list[str]] = {}
        self.counts = dict.fromkeys(('passed', 'failed', 'skipped'), 0)
        self.begun: set[str | None] = set()

    def status(self, test_id=None, test_status=None, file_name=None,
               file_bytes=None, **_rest):
        if file_bytes:
            self.texts.setdefault(test_id, []).append(
                bytes(file_bytes).decode(errors='replace'))
        if test_status == 'inprogress':
            self.begun.add(test_id)
        kind = self.FINAL.get(test_status)
        if kind is None:
            return
        self.begun.discard(test_id)
        text = ''.join(self.texts.pop(test_id, ()))
        self.counts[kind] += 1
        if kind == 'failed':
            self.tally.failures.append((test_id, text))
        self.line.text = self.told()

    def told(self) -> str:
        return ', '.join('%d %s' % (n, k) for k, n in self.counts.items())


def stestr(tally: Tally, title: str, cwd: pathlib.Path, where: list[str],
           what: list[str], env: dict | None = None,
           python: tuple = (sys.executable,)) -> None:
    """Run tests under stestr and count each.

    :param where: arguments before ``run``, such as --test-path
    :param what: arguments after it, such as a pattern
    :param python: the command that is the interpreter
    """
    with tempfile.TemporaryFile() as errors:
        with Line(title) as line, subprocess.Popen(
                [*python, '-m', 'stestr', *where, 'run', '--subunit',
                 *what], cwd=cwd, stdout=subprocess.PIPE, stderr=errors,
                stdin=subprocess.DEVNULL,
                env={**os.environ, 'PYTHONFAULTHANDLER': '1',
                     **(env or {})}) as process:
            counter = _Counter(tally, line)
            subunit.ByteStreamToStreamResult(
                process.stdout, non_subunit_name='output').run(counter)
            died = sorted(filter(None, counter.begun))
            counter.counts['failed'] += len(died)
            line.text = counter.told()
        errors.seek(0)
        said = errors.read().decode(errors='replace')
    last_words = ''.join(counter.texts.get(None, ())) + said
    for test in died:
        tally.failures.append((
            test, 'did not end: its worker died\n' + last_words))
    tally.passed += counter.counts['passed']
    tally.skipped += counter.counts['skipped']
    tally.failed += counter.counts['failed']
    ran = sum(counter.counts.values())
    if not ran or process.returncode and not counter.counts['failed']:
        said += ''.join(counter.texts.pop(None, ()))
        tally.add(title, False, 'stestr ended with %d after %d tests\n%s' % (
            process.returncode, ran, said))


def command(tally: Tally, title: str, arguments: list, cwd: pathlib.Path,
            env: dict | None = None) -> bool:
    """Run a check that isn't made of tests.

    :returns: whether it passed
    """
    with Line(title) as line:
        done = subprocess.run(
            list(map(str, arguments)), cwd=cwd, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors='replace', env={**os.environ, **(env or {})})
        ok = done.returncode == 0
        line.text = 'passed' if ok else 'failed'
    tally.add(title, ok, done.stdout)
    return ok


def modules(names: list[str]) -> str:
    """A pattern for stestr of these modules and all below them."""
    return r'^(%s)(\.|$)' % '|'.join(map(re.escape, names))
