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
"""What operators ran into, where two real daemons are enough to see it.

What takes whole servers is in test_cloud_faults and test_cloud_watched.
"""

import contextlib
import os
import stat
import unittest

from lab.tests import mover
from lab.tests import opened
from lab.tests import test_cloud_hostile
from lab.tests import test_moves

MIB = 1 << 20
GIB = 1 << 30
WATCHED = '/var/lib/nova/watched'
NAME_AT = 4096  # where libvirt looks for it
PLOOP = b'WithouFreSpacExt'


class TestCapacity(test_moves.MovesTest):
    """What a host tells of its pools is of now, and never an error."""

    @contextlib.contextmanager
    def small_file_system(self, mib):
        path = self.pools[mover.DISKS]
        with self.pool(self.b) as pool:
            pool.destroy()
            self.b.run(['mount', '-t', 'tmpfs', '-o', 'size=%dm' % mib,
                        'tmpfs', path])
            pool.create()
        try:
            yield path
        finally:
            with self.pool(self.b) as pool:
                pool.destroy()
                self.b.run(['umount', path])
                pool.create()

    def test_file_system_that_grows(self):
        with self.small_file_system(64) as path:
            found = self.dest('capacity')
            self.assertEqual(64 * MIB, found['total'])
            # No refresh of the pool.
            self.b.run(['mount', '-o', 'remount,size=128m', path])
            found = self.dest('capacity')
            self.assertEqual(128 * MIB, found['total'])
            self.assertLessEqual(found['free'], found['total'])
            self.assertGreaterEqual(found['used'], 0)

    def test_pool_that_is_off(self):
        before = self.dest('capacity')
        with self.pool(self.b) as pool:
            pool.destroy()
            try:
                found = self.dest('capacity')
            finally:
                pool.create()
        self.assertEqual((before['total'], 0),
                         (found['total'], found['free']))
        self.assertGreater(self.dest('capacity')['free'], 0)


class TestNames(test_moves.MovesTest):
    """Any mapping of pools migrates, however long their names are."""

    def test_long_names(self):
        names = {kind: 'nova-%s-%s' % (kind, 'x' * 60)
                 for kind in ('ephemeral', 'swap', 'config')}
        for name in names.values():
            path = '/var/lib/nova/pools/' + name
            self.b.run(['install', '-d', '-o', 'nova', '-g', 'nova', path])
            with contextlib.closing(self.b.connect()) as connection:
                connection.storagePoolDefineXML(
                    '<pool type="dir"><name>%s</name><target><path>%s</path>'
                    '</target></pool>' % (name, path)).create()
            self.addCleanup(test_moves.drop, self.b, name)
        self.dest('configure', storage_pool_mapping=names)
        self.addCleanup(self.dest, 'configure', storage_pool_mapping=None)
        self.dest('offer')
        self.source('move')
        self.dest('accept')
        with self.pool(self.b, names['ephemeral']) as pool:
            self.assertEqual(['%s_disk.eph0' % mover.UUID],
                             pool.listVolumes())
        self.dest('revert')
        self.source('abandon')
        self.assert_back()


class TestRawDisks(test_moves.MovesTest):
    """Disks that are raw, as legacy ones stay: libvirt is asked nothing.

    At a refresh it opens what the guest has named in a header, and whenever it
    is asked for the volume's sizes or XML; so nothing of ours may ask.
    """

    def setUp(self):
        super().setUp()
        paths = {}
        self.a.run(['mkdir', '-p', WATCHED])
        for name, mode in (('file', 0o666), ('device', stat.S_IFCHR | 0o666)):
            paths[name] = self.a.path(WATCHED) / name
            paths[name].unlink(missing_ok=True)
            # The device is that of /dev/null.
            os.mknod(paths[name], mode, os.makedev(1, 3))
        paths['file'].write_bytes(bytes(65536))
        self.watch = opened.Watch(paths)
        self.addCleanup(self.watch.close)

    def spoil(self, disk, secret):
        path = self.directory(self.a) / ('%s_%s' % (mover.UUID, disk))
        with open(path, 'r+b') as file:
            file.write(test_cloud_hostile.header(
                GIB, MIB, secret, NAME_AT))
            file.seek(NAME_AT)
            file.write(secret.encode())

    def hostile(self):
        for disk, name in (('disk', 'file'), ('disk.eph0', 'device')):
            self.spoil(disk, '%s/%s' % (WATCHED, name))
        self.made = self.files(self.a)
        self.watch.opened()
        self.refresh()
        # That is libvirt's own doing, and shows that the trap is one.
        self.assertEqual({'file', 'device'}, set(self.watch.opened()))

    def test_move(self):
        self.hostile()
        self.dest('offer')
        self.source('move')
        self.assertEqual({}, self.watch.opened())
        self.dest('accept')
        self.assert_there()
        self.dest('revert')
        self.source('abandon')
        self.assertEqual({}, self.watch.opened())
        self.dest('offer')
        self.source('move')
        self.dest('accept')
        self.source('confirm')
        self.assertEqual({}, self.watch.opened())
        self.assertEqual({}, self.files(self.a))

    def test_delete(self):
        self.hostile()
        self.assertTrue(self.source('delete'))
        self.assertEqual({}, self.watch.opened())
        self.assertEqual({}, self.files(self.a))

    def test_header_that_libvirt_cannot_read(self):
        """A backing file of a thousand letters: libvirt fails at its XML."""
        self.spoil('disk', '/' + 'a' * 999)
        self.made = self.files(self.a)
        self.refresh()
        self.dest('offer')
        self.source('move')
        self.take_and_revert()
        self.assertEqual(self.made, self.files(self.a))
        self.assertTrue(self.source('delete'))
        self.assertEqual({}, self.files(self.a))

    def test_header_of_a_directory(self):
        """libvirt takes ploop for a directory, which it doesn't delete."""
        path = self.directory(self.a) / ('%s_disk' % mover.UUID)
        with open(path, 'r+b') as file:
            file.write(PLOOP)
        self.made = self.files(self.a)
        self.refresh()
        self.dest('offer')
        self.source('move')
        self.take_and_revert()
        self.assertTrue(self.source('delete'))
        self.assertEqual({}, self.files(self.a))


if __name__ == '__main__':
    unittest.main()
