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
import stat

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

    def test_places(self):
        under_way.begin(uuids.instance)
        self.assertEqual({}, under_way.places(uuids.instance))
        places = {'fa:16:3e:00:00:01': {'type': 'pci', 'slot': '0x08'}}
        under_way.keep_places(uuids.instance, places)
        self.assertEqual(places, under_way.places(uuids.instance))
        path = os.path.join(under_way.directory(uuids.instance), 'places')
        os.truncate(path, 9)
        self.assertEqual({}, under_way.places(uuids.instance))

    def test_left(self):
        """Of this process, or of one that was killed."""
        under_way.begin(uuids.instance)
        self.assertEqual([], under_way.left())
        under_way.close(uuids.instance)
        self.assertEqual([uuids.instance], under_way.left())
        under_way.end(uuids.instance)
        self.assertEqual([], under_way.left())

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


class ExportTestCase(test.NoDBTestCase):
    """The place where QEMU, which may have been broken into, has to write."""

    def setUp(self):
        super().setUp()
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.flags(snapshots_directory=self.folder, group='libvirt')
        self.chowned = []
        self.stub_out('nova.privsep.path.chown', self._chown)
        under_way.begin(uuids.instance)
        self.path = under_way.make_export(uuids.instance, 64055)
        self.chowned.clear()

    def _chown(self, path, uid, gid=-1):
        self.chowned.append((path, uid))

    @staticmethod
    def _listen(path):
        os.mknod(path, stat.S_IFSOCK | 0o700)

    def test_socket(self):
        self._listen(self.path)
        self.assertEqual(self.path, under_way.take_export(uuids.instance))
        me = os.geteuid()
        # From then on nobody but nova puts anything else there.
        self.assertEqual([(os.path.dirname(self.path), me), (self.path, me)],
                         self.chowned)

    def _refused(self):
        self.chowned.clear()
        self.assertRaises(OSError, under_way.take_export, uuids.instance)
        self.assertNotIn(self.path, [path for path, _uid in self.chowned])
        os.unlink(self.path)

    def test_link_to_anything(self):
        secret = os.path.join(self.folder, 'secret')
        open(secret, 'w').close()
        others = os.path.join(self.folder, 'others')
        self._listen(others)
        for target in (secret, others):
            os.symlink(target, self.path)
            self._refused()
            os.link(target, self.path)
            self._refused()

    def test_nothing(self):
        self.assertRaises(OSError, under_way.take_export, uuids.instance)
