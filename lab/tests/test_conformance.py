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
GUESTS = MODULE + '_guests'
FOLDER = '/var/lib/nova/conformance'


class ConformanceTest(unittest.TestCase):

    def module(self, name):
        """:returns: the tree; how to run that module's tests on a daemon"""
        tree = lab_cloud.find_tree('tree')
        if tree is None or not (tree / name.replace('.', '/')).with_suffix(
                '.py').exists():
            self.skipTest('the tree has no such module')
        return tree, [sys.executable, '-m', 'unittest', '-v',
                      name + '.DaemonTestCase']

    def environment(self, uri):
        series = tomllib.loads(
            (config.ROOT / 'tools/series.toml').read_text())
        return {**os.environ, **series['tests']['environment'],
                'NOVA_TEST_LIBVIRT_URI': uri, 'NOVA_TEST_LIBVIRT_DIR': FOLDER}

    def assert_passed(self, done):
        """:returns: names of the tests that were skipped"""
        self.assertEqual(0, done.returncode, done.stderr[-6000:])
        self.assertRegex(done.stderr, r'(?m)DaemonTestCase.*\.\.\. ok$')
        return re.findall(r'DaemonTestCase\.(test_\w+) \.\.\. skipped',
                          done.stderr)

    def test_fakes_do_as_libvirt_does(self):
        """Nova's own module, which else runs on the fakes, on a daemon."""
        tree, command = self.module(MODULE)
        with lab.Hosts() as (host, _other):
            fails = host.dies_of_failed_uploads()
            done = subprocess.run(
                command, cwd=tree, env=self.environment(host.local_uri()),
                capture_output=True, text=True, timeout=120)
        self.assertEqual([
            'test_too_many_bytes_are_an_error_at_the_end'] if fails else [],
            self.assert_passed(done))

    @unittest.skipUnless(os.environ.get('LAB_SCENARIOS') == 'all',
                         'of the full set: LAB_SCENARIOS=all')
    def test_fake_guests_do_as_libvirt_s_do(self):
        """In the host itself: their files are written by hand."""
        tree, command = self.module(GUESTS)
        with lab.Hosts() as (host, _other):
            host.run(['install', '-d', FOLDER])
            done = host.run(command, cwd=tree, check=False, timeout=240,
                            env=self.environment('qemu:///system'))
        self.assertIn(self.assert_passed(done), ([], ['test_backup']))
