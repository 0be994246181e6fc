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

"""Every command of the command line, at level hosts."""

import subprocess
import sys
import unittest

import click.testing

from lab import cli
from lab import config
from lab import lock
from lab.tests import test_hosts


def run(test, *words, status=0) -> str:
    """What a command printed.

    :param status: the exit status that it must have
    """
    done = click.testing.CliRunner().invoke(cli.main, words)
    test.assertEqual(status, done.exit_code, done.output)
    return done.output


class TestCommands(test_hosts.HostsTest):

    def test_status(self):
        self.assertIn('TLS to host-b', run(self, 'status'))
        run(self, 'fault', 'host-a', 'kill', 'libvirtd')
        self.assertRegex(run(self, 'status', status=1),
                         '✗ +host-a +libvirtd +has ended')
        run(self, 'restart', 'host-a', 'libvirtd')
        run(self, 'fault', 'host-b', 'pause', 'virtlogd')
        self.assertRegex(run(self, 'status', status=1),
                         '✗ +host-b +virtlogd +pid [0-9]+ paused')
        run(self, 'fault', 'host-b', 'resume', 'virtlogd')
        run(self, 'status')

    def test_up_again(self):
        known = ['--ssh'] if self.a.folder.joinpath('../ssh').exists() else []
        self.assertIn('is up already', run(
            self, 'up', '--level', 'hosts', *known))
        self.assertRegex(
            run(self, 'up', '--level', 'cloud', '--nova', 'base', status=1),
            'error: the lab is up already, with other options .*level=hosts')

    def test_exec(self):
        run(self, 'exec', 'host-a', '--', 'test', '-S',
            '/run/libvirt/libvirt-sock')
        run(self, 'exec', 'ctl', '--', 'sh', '-c', 'exit 3', status=3)
        self.assertIn("'host-c' is not one of", run(
            self, 'exec', 'host-c', '--', 'true', status=2))

    def test_link(self):
        for words in (['cut'], ['slow', '10mbit'], ['delay', '2']):
            run(self, 'fault', 'host-a', 'link', *words)
            self.assertRegex(run(self, 'status', status=1), '✗ +host-a +link')
            run(self, 'fault', 'host-a', 'link', 'restore')
            run(self, 'status')
        self.assertRegex(run(self, 'fault', 'host-a', 'link', 'slow', 'fast',
                             status=1), 'error: .*fast')

    def test_disk(self):
        self.pool(self.a, 'commands')
        told = run(self, 'fault', 'host-a', 'disk', 'fill', 'commands',
                   '--leave', str(1 << 20))
        self.assertIn('bytes are available', told)
        self.assertLess(int(told.split()[0]), 2 << 20)
        run(self, 'fault', 'host-a', 'disk', 'free', 'commands')
        self.assertRegex(run(self, 'fault', 'host-a', 'disk', 'fill', 'none',
                             status=1), "error: .*'none'")

    def test_cert(self):
        run(self, 'cert', 'host-b', 'expired')
        self.addCleanup(run, self, 'cert', 'host-b', 'good')
        self.assertRegex(run(self, 'status', status=1),
                         '✗ +host-b +certificate +expired')
        run(self, 'cert', 'host-b', 'good')
        run(self, 'status')

    def test_logs(self):
        run(self, 'logs', 'host-a', 'libvirtd', '-n', '1')
        self.assertRegex(run(self, 'logs', 'host-a', 'nothing', status=1),
                         'error: no log of nothing on host-a; there are: '
                         '.*libvirtd')

    def test_what_takes_a_cloud(self):
        for words in (['openstack', 'server', 'list'],
                      ['set', 'ctl', 'DEFAULT', 'debug', 'true']):
            self.assertIn('up at level hosts, which has no cloud',
                          run(self, *words, status=1))

    def test_locked(self):
        with subprocess.Popen(
                [sys.executable, '-c', 'import lab, time\n'
                 'from lab import lock\nwith lock.held():\n'
                 '    print("here", flush=True)\n    time.sleep(60)'],
                cwd=config.ROOT, stdout=subprocess.PIPE,
                text=True) as holder:
            self.assertEqual('here\n', holder.stdout.readline())
            told = run(self, 'restart', 'host-a', 'virtlogd', status=1)
            holder.kill()
        self.assertRegex(told, 'error: another command has the lab .*pid %d'
                         % holder.pid)
        self.assertIsNone(lock.holder())


if __name__ == '__main__':
    unittest.main()
