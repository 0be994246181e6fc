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
import functools
import os
import pathlib
import unittest

import lab
from lab import cloud as lab_cloud
from lab import config
from lab import hosts
from lab import lock
from lab import state
from lab.guest import testimony

MIB = 1 << 20
GIB = 1 << 30


@functools.lru_cache
def the_cloud() -> lab_cloud.Cloud:
    """The lab's cloud; brought up, and down at the end, unless it is up.

    LAB_NOVA (base, tree or a path), LAB_SSH (0 or 1), LAB_IMAGES_TYPE and
    LAB_THREADING say how, where it is not up yet.
    """
    if _level() == 'cloud':
        return lab_cloud.Cloud()
    nova = os.environ.get('LAB_NOVA', 'tree')
    options = state.Options(
        level='cloud', nova=nova,
        ssh=os.environ.get('LAB_SSH', '1' if nova == 'base' else '0') == '1',
        images_type=os.environ.get('LAB_IMAGES_TYPE', 'default'),
        threading=os.environ.get('LAB_THREADING', 'native'))
    atexit.register(_down)
    with lock.held():
        return lab_cloud.bring_up(options)


def _level():
    try:
        return state.load().options.level
    except lab.LabError:
        return None


def _down():
    with lock.held():
        hosts.down()


def has_pools() -> bool:
    """Whether the Nova that runs knows images_type libvirt-storage."""
    tree = the_cloud().layout.tree
    return bool(tree) and pathlib.Path(
        tree, 'nova/virt/libvirt/storage/backend.py').exists()


class CloudTestCase(unittest.TestCase):
    """A scenario on a cloud whose hosts have one images_type.

    :cvar images_type: of both hosts; the class is skipped where the Nova that
        runs does not know it
    """

    images_type = 'default'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if os.geteuid():
            raise unittest.SkipTest('the lab makes namespaces: root only')
        if cls.images_type == 'libvirt-storage':
            if not has_pools():
                raise unittest.SkipTest('stock Nova has no storage pools')
        elif not state_of_ssh():
            # reboots and the like would do, but it is one story
            raise unittest.SkipTest(
                'legacy disks migrate over SSH: bring the lab up with --ssh')
        cls.cloud = the_cloud()
        cls.cloud.set_images_type(cls.images_type)

    def boot(self, name='server', **more):
        """A server that is deleted when the test is over."""
        server = self.cloud.boot('%s-%s' % (
            name, self._testMethodName.removeprefix('test_')[:20]),
            host=more.pop('host', 'host-a'), wait=False, **more)
        self.addCleanup(server.delete)
        server.wait('ACTIVE')
        server.testimony()
        return server

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


def state_of_ssh() -> bool:
    the_cloud()
    return state.load().options.ssh
