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

import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova import test
from nova.virt.libvirt.storage.live_image import under_way


class UnderWayTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.folder = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'snapshots')
        self.flags(host='here')
        self.flags(snapshots_directory=self.folder, group='libvirt')

    def test_there_and_gone(self):
        self.assertEqual([], under_way.instances())
        path = under_way.begin(uuids.instance)
        os.mkdir(os.path.join(self.folder, 'tmpabc'))
        os.mkdir(os.path.join(self.folder, 'live-image-of-somebody'))
        self.assertEqual([uuids.instance], under_way.instances())
        self.assertRaises(FileExistsError, under_way.begin, uuids.instance)
        # Another host that shares the directory has no part in it.
        self.flags(host='other')
        self.assertEqual([], under_way.instances())
        self.flags(host='here')
        self.assertEqual([uuids.instance], under_way.instances())
        open(os.path.join(path, 'memory'), 'w').close()
        under_way.end(uuids.instance)
        self.assertEqual([], under_way.instances())

    def test_killed_before_anything_was_done(self):
        os.makedirs(under_way.directory(uuids.instance))
        self.assertEqual([], under_way.instances())
        under_way.begin(uuids.instance)
        self.assertEqual([uuids.instance], under_way.instances())

    def test_killed_before_it_was_said_whose_it_is(self):
        # Or there was no room left to say it.
        path = under_way.directory(uuids.instance)
        os.makedirs(path)
        open(os.path.join(path, 'host'), 'w').close()
        self.assertEqual([], under_way.instances())
        under_way.begin(uuids.instance)
        self.assertEqual([uuids.instance], under_way.instances())
