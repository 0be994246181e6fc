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
"""What the scenarios on the cloud have in common."""

import atexit
import os
import pathlib
import tempfile
import unittest

from lab import cloud as lab_cloud
from lab import config
from lab import hosts
from lab import lock
from lab import state
from lab.guest import testimony
from lab.host import both
from lab.machine import Machine

MIB = 1 << 20
GIB = 1 << 30

#: How a lab is brought up for a class of scenarios.
STOCK = {'nova': 'base', 'ssh': True, 'network': 'none'}
SERIES = {'nova': 'tree', 'ssh': False, 'network': 'none'}
#: The series with legacy disks, which migrate over SSH.
LEGACY = {'nova': 'tree', 'ssh': True, 'network': 'none'}

_mine = []  # not empty: the lab that is up was brought up here


def cloud_for(wanted, images_type='default') -> lab_cloud.Cloud:
    """A cloud of one kind; it is taken down when the tests are over.

    A lab that was up before is used if it is of that kind, and stays.

    :param wanted: STOCK, SERIES or the like
    :param images_type: with which it is brought up
    :raises unittest.SkipTest: another one is up
    """
    known = state.find()
    if _mine:
        # One of an earlier class; what somebody else brought up has any root.
        usual = state.Options()
        wanted = {'host_root': usual.host_root, 'modular': usual.modular,
                  **wanted}
    if known and known.phase == 'up' and known.boot == state.boot_id():
        if known.options.level == 'cloud' and (
                known.options.storage == wanted.get('storage', '')) and all(
                getattr(known.options, key) == value
                for key, value in wanted.items()):
            return lab_cloud.Cloud()
        if not _mine:
            raise unittest.SkipTest(
                'a lab of another kind is up (%s), this takes %s; lab/lab '
                'down makes room' % (known.options, wanted))
    if not _mine:
        _mine.append(True)
        atexit.register(_down)
    with lock.held():
        return lab_cloud.bring_up(state.Options(
            level='cloud', images_type=images_type,
            threading=os.environ.get('LAB_THREADING', 'native'),
            **wanted))


def _down():
    with lock.held():
        hosts.down()


def only_in_full(_loader, tests, _pattern):
    """A module's load_tests: only LAB_SCENARIOS=all runs it."""
    return tests if os.environ.get('LAB_SCENARIOS') == 'all' else (
        unittest.TestSuite())


class CloudTestCase(unittest.TestCase):
    """A scenario on a cloud whose hosts have one images_type.

    :cvar lab: STOCK, SERIES or the like
    :cvar images_type: of both hosts
    :cvar options: others that matter for disks, see Cloud.set_images_type
    """

    lab = STOCK
    images_type = 'default'
    options = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if os.geteuid():
            raise unittest.SkipTest('the lab makes namespaces: root only')
        if cls.lab['nova'] == 'tree' and not _has_pools():
            raise unittest.SkipTest('the tree knows no storage pools')
        cls.cloud = cloud_for(cls.lab, cls.images_type)
        cls.cloud.set_images_type(cls.images_type, **cls.options)

    def setUp(self):
        super().setUp()
        # Those before may have restarted libvirt.
        self.cloud.wait_computes()
        for host in both():
            if not self.lab['ssh']:
                host.forget_ssh_attempts()
        self.addCleanup(self._show_logs_on_failure)

    def tearDown(self):
        super().tearDown()
        if not self.lab['ssh']:
            self.assertEqual([], [attempt for host in both()
                                  for attempt in host.ssh_attempts()])

    def _show_logs_on_failure(self):
        result = self._outcome.result if self._outcome else None
        failed = self._outcome and not self._outcome.success
        if result is None or not failed:
            return
        for host in both():
            log = host.logs / 'nova-compute.log'
            if log.exists():
                lines = [line for line in log.read_text(
                    errors='replace').splitlines()
                    if ' ERROR ' in line or ' WARNING ' in line]
                print('%s: %s' % (host.name, '\n'.join(lines[-25:])))

    def boot(self, name='server', **more):
        """A server that is deleted when the test is over."""
        server = self.cloud.boot('%s-%s' % (
            name, self._testMethodName.removeprefix('test_')[:20]),
            host=more.pop('host', 'host-a'), wait=False, **more)
        self.addCleanup(server.delete)
        server.wait('ACTIVE')
        server.testimony()
        return server

    def copy_image(self, name, **properties):
        """An image of its own with the guest's content."""
        content = self.cloud.conn.image.download_image(
            self.cloud.image('guest')).content
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            made = self.cloud.conn.create_image(
                name, filename=file.name, disk_format='qcow2',
                container_format='bare', wait=True, **properties)
        self.addCleanup(self.cloud.conn.image.delete_image, made.id,
                        ignore_missing=True)
        return made

    # -- what a guest says

    def assert_data(self, said, **ranges):
        """The guest reads what it was told to write.

        :param ranges: NAME=(SEED, MIB)
        """
        for name, (seed, mib) in ranges.items():
            self.assertIn(name, said.ranges, 'the guest has lost ' + name)
            self.assertEqual(
                testimony.pattern_sha256(seed, mib * MIB),
                said.ranges[name]['sha256'], name + ' has changed')

    # -- what lies on the hosts

    def lies(self, server, host):
        """What a host has of a server, without what names it."""
        return sorted({path.replace(server.id, 'ID').split(' instance-')[0]
                       for path in server.left_on(host)})

    def assert_nothing_left(self, server, *host_names):
        for host in host_names or config.HOSTS:
            self.assertEqual([], server.left_on(host), host)

    def service_log(self, host):
        return (Machine(host).logs / 'nova-compute.log').read_text(
            errors='replace')


def _has_pools():
    tree = lab_cloud.cloud.find_tree('tree')
    return pathlib.Path(
        tree, 'nova/virt/libvirt/storage/image.py').exists()
