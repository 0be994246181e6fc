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

"""The fakes of the series' unit tests are held to what libvirt does."""

import os
import re
import subprocess
import sys
import tomllib
import unittest

import lab
from lab import config
from lab.cloud import cloud as lab_cloud

MODULE = 'nova.tests.unit.virt.libvirt.storage.test_conformance'


class ConformanceTest(unittest.TestCase):

    def test_fakes_do_as_libvirt_does(self):
        """Nova's own module, which else runs on the fakes, on a daemon."""
        tree = lab_cloud.find_tree('tree')
        if tree is None or not (tree / MODULE.replace('.', '/')).with_suffix(
                '.py').exists():
            self.skipTest('the tree has no such module')
        series = tomllib.loads(
            (config.ROOT / 'tools/series.toml').read_text())
        with lab.Hosts() as (host, _other):
            fails = host.dies_of_failed_uploads()
            done = subprocess.run(
                [sys.executable, '-m', 'unittest', '-v', MODULE + '.DaemonTestCase'], cwd=tree,
                env={**os.environ, **series['tests']['environment'],
                     'NOVA_TEST_LIBVIRT_URI': host.local_uri(),
                     'NOVA_TEST_LIBVIRT_DIR': '/var/lib/nova/conformance'},
                capture_output=True, text=True, timeout=120)
        self.assertEqual(0, done.returncode, done.stderr[-3000:])
        self.assertRegex(done.stderr, r'(?m)DaemonTestCase.*\.\.\. ok$')
        skipped = re.findall(r'DaemonTestCase\.(test_\w+) \.\.\. skipped',
                             done.stderr)
        self.assertEqual([
            'test_too_many_bytes_are_an_error_at_the_end'] if fails else [],
            skipped)
