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

import os
import pwd
import tempfile
from unittest import mock

import fixtures

from nova import test
from nova.virt.libvirt.storage.pool import access


class TestAccess(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.root = self.enterContext(tempfile.TemporaryDirectory())
        self.pool = os.path.join(self.root, 'outer', 'pool')
        os.makedirs(self.pool)
        # The tests may run as root, who may do everything.
        self.useFixture(fixtures.MonkeyPatch('os.access', self._access))

    def _access(self, path, mode):
        # As a stranger to all that is below the root.
        if not str(path).startswith(self.root + '/'):
            return True
        return os.stat(path).st_mode & mode == mode

    def test_none(self):
        self.assertIsNone(access.obstacle(self.pool, os.X_OK | os.R_OK))

    def test_directory_itself(self):
        os.chmod(self.pool, 0o750)
        found = access.obstacle(self.pool, os.X_OK)
        self.assertEqual((self.pool, 'x'), (found.path, found.missing))
        owner = pwd.getpwuid(os.geteuid()).pw_name
        self.assertRegex(found.mode, '^drwxr-x--- %s:[^ ]+$' % owner)

    def test_directory_on_the_way(self):
        outer = os.path.dirname(self.pool)
        os.chmod(outer, 0o700)
        found = access.obstacle(self.pool, os.W_OK | os.X_OK)
        self.assertEqual((outer, 'x'), (found.path, found.missing))

    def test_may_enter_and_not_write(self):
        os.chmod(self.pool, 0o755)
        self.assertIsNone(access.obstacle(self.pool, os.X_OK))
        found = access.obstacle(self.pool, os.W_OK | os.X_OK)
        self.assertEqual((self.pool, 'wx'), (found.path, found.missing))

    def test_not_there(self):
        self.assertIsNone(access.obstacle(
            os.path.join(self.pool, 'none'), os.R_OK))

    def test_owner_without_a_name(self):
        os.chmod(self.pool, 0)
        with mock.patch('pathlib.Path.owner', side_effect=KeyError):
            found = access.obstacle(self.pool, os.X_OK)
        self.assertRegex(found.mode, r'^d--------- \d+:\d+$')

    def test_user(self):
        self.assertEqual(pwd.getpwuid(os.geteuid()).pw_name, access.user())
        with mock.patch('pwd.getpwuid', side_effect=KeyError):
            self.assertEqual(str(os.geteuid()), access.user())
