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
"""Which files of the host its guests can have opened: none.

A guest writes a qcow2 header to its disks, which names a file of the host as
the backing file. To open a character device can do something, such as to start
a watchdog. So it isn't enough that no content comes to the guest.
"""

import base64
import os
import stat
import unittest

from lab.host import both
from lab.tests import cloud_case
from lab.tests.cloud_case import GIB
from lab.tests import opened
from lab.tests import test_cloud_hostile
from lab.tests import test_cloud_pool

FOLDER = '/var/lib/nova/watched'
#: What a guest names, by its disk; the first still boots, and has the name
#: where QEMU would find it, and libvirt doesn't look.
NAMED = {'vda': FOLDER + '/fifo', 'vdb': FOLDER + '/device',
         'vdc': FOLDER + '/file'}
NAME_AT = 4096
KIND = {'file': 0o666, 'fifo': stat.S_IFIFO | 0o666,
        'device': stat.S_IFCHR | 0o666}


class WatchedCase(test_cloud_pool.TestHostile):
    """The disks that are made here, and what opens files of the host."""

    options = {}
    raw_files = 'false'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        paths = {}
        for host in both():
            host.run(['mkdir', '-p', FOLDER])
            for name, mode in KIND.items():
                path = host.path(FOLDER) / name
                path.unlink(missing_ok=True)
                # The device is that of /dev/null.
                os.mknod(path, mode, os.makedev(1, 3))
                path.chmod(0o666)
                paths['%s of %s' % (name, host.name)] = path
            (host.path(FOLDER) / 'file').write_bytes(bytes(65536))
        cls.watch = opened.Watch(paths)
        cls.addClassCleanup(cls.watch.close)
        cls.paths = paths

    def setUp(self):
        super().setUp()
        self.watch.opened()

    def hostile_server(self):
        server = self.boot(flavor='lab.small.disks',
                           script=test_cloud_hostile.WRITE)
        self.spoil(server, 'vda', NAMED['vda'])
        server.command('sh', 'swapoff -a; true')
        for disk in ('vdb', 'vdc'):
            for data, at in ((NAMED[disk].encode(), NAME_AT), (
                    test_cloud_hostile.header(
                        GIB, 128 << 10, NAMED[disk], NAME_AT), 0)):
                server.command('write-head', disk,
                               base64.b64encode(data).decode(), at)
        return server, server.look()

    def assert_nothing_opened(self, after):
        self.assertEqual({}, self.watch.opened(), 'after ' + after)

    def test_watch(self):
        """It sees what it is there for."""
        with open(self.paths['device of host-a'], 'rb'), \
                open(self.paths['file of host-b'], 'rb'):
            pass
        os.close(os.open(self.paths['fifo of host-a'],
                         os.O_RDONLY | os.O_NONBLOCK))
        self.assertEqual(
            {'device of host-a': 1, 'file of host-b': 1, 'fifo of host-a': 1},
            self.watch.opened())

    # In place of what is inherited.
    test_in_place = test_moves = None


class TestWatched(WatchedCase):

    def test_nothing_is_opened(self):
        server, said = self.hostile_server()
        for disk in ('vda', 'vdb'):
            self.assertEqual('qcow2', said.disks[disk]['magic'])
            self.assertEqual('qcow2', self.formats(server)[disk])
        self.assert_nothing_opened('the guest has written')
        self.settle(server)
        self.assert_nothing_opened('refresh and restart of libvirt')
        server.stop()
        self.settle(server)
        server.start()
        self.assert_nothing_opened('stop and start')
        server.hard_reboot()
        self.assert_nothing_opened('hard reboot')
        image = server.snapshot('of-%s' % server.id)
        self.addCleanup(self.cloud.conn.image.delete_image, image.id)
        self.assert_nothing_opened('snapshot')
        server.rescue()
        self.settle(server)
        server.unrescue()
        self.assert_nothing_opened('rescue')
        server.resize('lab.medium.disks')
        server.confirm()
        self.assert_nothing_opened('resize')
        server.migrate('host-a' if server.host == 'host-b' else 'host-b')
        self.settle(server)
        server.revert()
        self.assert_nothing_opened('migration and revert')
        for host in both():
            # Its first look at the image cache sweeps the pools.
            self.cloud.restart(host.name, 'nova-compute')
            self.cloud.manage('libvirt', 'list_disks', '--orphans',
                              place=host.name, check=False)
        self.settle(server)
        self.assert_nothing_opened('the sweeps')
        said = server.look()
        self.assertEqual('qcow2', said.disks['vdb']['magic'])
        server.delete()
        self.assert_nothing_opened('delete')


class TestWatchedWithoutCow(TestWatched):
    """Copies in place of overlays."""

    options = {'use_cow_images': 'false'}


class TestRawFiles(WatchedCase):
    """Really raw files, as the option's help has it: there it happens."""

    options = {'use_cow_images': 'false'}
    raw_files = 'true'

    def test_libvirt_opens_what_raw_files_name(self):
        server, _said = self.hostile_server()
        self.assert_nothing_opened('the guest has written')
        self.settle(server)
        self.assertIn('file of host-a', self.watch.opened())
        # From then on libvirt does whenever it is asked about the volume, but
        # on no other host.
        server.hard_reboot()
        self.assertEqual(set(), {
            name for name in self.watch.opened() if 'host-b' in name})


load_tests = cloud_case.only_in_full


if __name__ == '__main__':
    unittest.main()
