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

"""The cloud level's whole life: killed at any moment, and up again."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import unittest

from lab import config
from lab import lock
from lab import process
from lab.tests import cloud_case
from lab.tests.test_hosts import Remains

#: Moments, on the way up, at which the command is ended.
MOMENTS = int(os.environ.get('LAB_MOMENTS', 10))
UP = ('up', '--nova', 'base', '--ssh')


def processes(name) -> set[process.Process]:
    """All processes in the network namespaces of a lab."""
    wanted = set()
    with contextlib.suppress(FileNotFoundError):
        wanted = {entry.stat().st_ino for entry in os.scandir('/run/netns')
                  if entry.name.startswith(name + '-')}
    found = set()
    for entry in os.scandir('/proc'):
        with contextlib.suppress(OSError, ProcessLookupError):
            if entry.name.isdigit() and os.stat(
                    '/proc/%s/ns/net' % entry.name).st_ino in wanted:
                found.add(process.Process.of(int(entry.name)))
    return found


class TestCloudLifecycle(unittest.TestCase):
    """A lab with a name of its own, by the command that users type."""

    def setUp(self):
        super().setUp()
        if os.geteuid():
            self.skipTest('the lab makes namespaces: root only')
        self.name = 'cloudtest%d' % os.getpid()
        self.remains = Remains(self.name)
        self.addCleanup(self._remove)

    def _remove(self):
        self.lab('down')
        self.assertEqual([], self.remains.found())
        subprocess.run(['rm', '-rf', config.CACHE / self.name], check=True)

    def popen(self, *words):
        return subprocess.Popen(
            [sys.executable, '-P', '-m', 'lab', *words], cwd='/',
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
            # Who runs the tests in the background may ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env={
                **os.environ, 'PYTHONPATH': str(config.ROOT),
                'LAB_NAME': self.name})

    def lab(self, *words, status=0):
        """Run a command of the lab; what it printed."""
        with self.popen(*words) as running:
            told, _none = running.communicate(timeout=400)
        self.assertEqual(status, running.returncode, told)
        return told

    def interrupt(self, moment, number):
        """End `up` at a moment; by SIGINT as a terminal does, or SIGKILL.

        :param moment: seconds
        :returns: what it printed
        """
        with self.popen(*UP) as running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(moment)
            if number == signal.SIGINT:
                # Ctrl-C goes to the terminal's whole process group.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.pid, number)
            else:
                running.kill()
            told, _none = running.communicate(timeout=60)
        return told

    def assert_down_leaves_nothing(self):
        there = processes(self.name)
        self.lab('down')
        self.assertEqual([], [lock.describe(each.pid) for each in there
                              if each.alive()])
        self.assertEqual([], self.remains.found())

    def test_up_interrupted_at_any_moment(self):
        start = time.monotonic()
        self.lab(*UP)
        took = time.monotonic() - start
        self.lab('status')
        self.assertIn('is up already', self.lab(*UP))
        self.assert_down_leaves_nothing()
        moments = sorted(random.uniform(.3, took) for _ in range(MOMENTS))
        for count, moment in enumerate(moments):
            number = (signal.SIGKILL, signal.SIGINT)[count % 2]
            with self.subTest(moment=moment, signal=number.name):
                print('%s after %.1f of %.1f s' % (
                    number.name, moment, took), flush=True)
                told = self.interrupt(moment, number)
                if 'is up\n' in told:  # faster than the first time
                    self.lab('status')
                else:
                    if number == signal.SIGINT:
                        self.assertIn('lab/lab down', told)
                        self.assertNotIn('Traceback', told)
                    self.assertRegex(self.lab('status', status=1),
                                     'the lab is (half up|down)')
                if random.random() < .5:
                    self.assert_down_leaves_nothing()
                # else "up" has to remove what there is by itself
                self.lab(*UP)
                self.lab('status')
                self.assert_down_leaves_nothing()


load_tests = cloud_case.only_in_full

if __name__ == '__main__':
    unittest.main()
