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

import errno
import os
import stat

import fixtures
from oslo_concurrency import processutils

import nova.privsep.storage
from nova import test
from nova.tests import fixtures as nova_fixtures


class CopyTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.directory = self.useFixture(fixtures.TempDir()).path
        self.source, self.target = self.path('source'), self.path('target')
        with open(self.source, 'wb') as f:
            f.write(b'new')

    def path(self, name):
        return os.path.join(self.directory, name)

    def _test_earlier_copy(self, copy, *more):
        """Its cp was not killed with the service, and writes on."""
        with open(self.path('.target.incoming'), 'wb') as earlier:
            copy(self.source, self.target, *more)
            earlier.write(b'old')
        with open(self.target, 'rb') as f:
            self.assertEqual(b'new', f.read())

    def test_copy_over_beside_an_earlier_copy(self):
        self._test_earlier_copy(nova.privsep.storage.copy_over)

    def test_copy_as_beside_an_earlier_copy(self):
        self._test_earlier_copy(
            nova.privsep.storage.copy_as, os.geteuid(), os.getegid(), 3)

    def copy_as(self, most=3):
        return nova.privsep.storage.copy_as(
            self.source, self.target, os.geteuid(), os.getegid(), most)

    def test_copy_as(self):
        self.assertTrue(self.copy_as())
        self.assertEqual(0o600, os.stat(self.target).st_mode & 0o777)
        os.unlink(self.source)
        self.assertFalse(self.copy_as())

    def test_copy_as_of_more_than_there_may_be(self):
        e = self.assertRaises(OSError, self.copy_as, most=2)
        self.assertEqual((errno.EFBIG, self.source), (e.errno, e.filename))
        self.assertEqual(['source'], os.listdir(self.directory))

    def test_copy_as_follows_no_link(self):
        os.rename(self.source, self.path('secret'))
        os.symlink(self.path('secret'), self.source)
        self.assertFalse(self.copy_as())
        os.unlink(self.source)
        os.mkfifo(self.source)
        self.assertFalse(self.copy_as())
        self.assertFalse(os.path.exists(self.target))

    def test_copy_as_writes_through_no_link(self):
        """QEMU, whose directory it is, may be faster than this."""
        secret = self.path('secret')
        self.useFixture(fixtures.MockPatchObject(
            nova.privsep.storage.fileutils, 'delete_if_exists',
            side_effect=lambda path: os.symlink(secret, path)
            if not os.path.lexists(path) else os.unlink(path)))
        self.assertRaises(FileExistsError, self.copy_as)
        self.assertFalse(os.path.exists(secret))


class TestTakeTree(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.directory = self.useFixture(fixtures.TempDir()).path
        self.tree = os.path.join(self.directory, 'tree')
        self.owned = []
        self.useFixture(fixtures.MockPatchObject(
            os, 'chown', side_effect=lambda name, uid, gid, **how:
            self.owned.append((name, uid, gid, how['follow_symlinks']))))
        self.useFixture(fixtures.MockPatchObject(
            os, 'fchown', side_effect=lambda fd, uid, gid:
            self.owned.append((os.readlink('/proc/self/fd/%d' % fd),
                               uid, gid))))

    def take(self):
        nova.privsep.storage.take_tree(self.tree, 7, 8)

    def test_all_of_it(self):
        below = os.path.join(self.tree, 'below')
        os.makedirs(below)
        os.chmod(below, 0o777)
        os.symlink('/etc/passwd', os.path.join(below, 'link'))
        self.take()
        self.assertEqual(
            [(self.tree, 7, 8), ('below', 7, 8, False),
             (below, 7, 8), ('link', 7, 8, False)], self.owned)
        self.assertEqual(0o755, stat.S_IMODE(os.stat(below).st_mode))

    def test_links_to_directories(self):
        os.mkdir(os.path.join(self.directory, 'elsewhere'))
        os.mkdir(self.tree)
        os.symlink('../elsewhere', os.path.join(self.tree, 'link'))
        self.take()
        self.assertEqual([(self.tree, 7, 8), ('link', 7, 8, False)],
                         self.owned)

    def test_is_a_link(self):
        os.symlink('/etc', self.tree)
        self.take()
        self.assertEqual([], self.owned)


class TestWipe(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'disk')
        with open(self.path, 'wb') as f:
            f.write(b'a' * 4096 + b'secret' * 4096 + b'z')
        os.chmod(self.path, 0o600)

    def wipe(self):
        nova.privsep.storage.wipe(self.path, 4096, 6 * 4096, 0o644)
        with open(self.path, 'rb') as f:
            self.assertEqual(b'a' * 4096 + bytes(6 * 4096) + b'z', f.read())
        self.assertEqual(0o644, stat.S_IMODE(os.stat(self.path).st_mode))

    def test_wipe(self):
        before = os.stat(self.path).st_blocks
        self.wipe()
        if os.stat(self.path).st_blocks == before:
            self.skipTest('this file system makes no holes')

    def test_wipe_where_no_holes_are_made(self):
        """NFS 4.1 for one."""
        self.useFixture(fixtures.MockPatchObject(
            processutils, 'execute',
            side_effect=processutils.ProcessExecutionError(stderr='no')))
        self.useFixture(fixtures.MockPatchObject(
            nova.privsep.storage, '_CHUNK', 5000))
        self.wipe()

    def test_wipe_fails(self):
        """Nobody else reads what is still there."""
        for call in ('fsync', 'pwrite'):
            with fixtures.MockPatchObject(
                    processutils, 'execute',
                    side_effect=processutils.ProcessExecutionError()), (
                fixtures.MockPatchObject(
                    os, call, side_effect=OSError(errno.EIO, 'broken'))):
                self.assertRaises(OSError, self.wipe)
            self.assertEqual(0o600, stat.S_IMODE(os.stat(self.path).st_mode))

    def test_wipe_follows_no_link(self):
        link = self.path + '.link'
        os.symlink(self.path, link)
        self.assertRaises(OSError, nova.privsep.storage.wipe, link, 0, 9,
                          0o644)
        with open(self.path, 'rb') as f:
            self.assertEqual(b'a' * 9, f.read(9))
