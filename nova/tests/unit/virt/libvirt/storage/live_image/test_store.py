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

import datetime
import os
import threading
import time
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import timeutils

from nova import exception
from nova.image import glance
from nova import test
from nova.tests.unit.virt.libvirt.storage.live_image import test_definition
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import store
from nova.virt.libvirt.storage.live_image import vm_state

DISK = {'id': uuids.disk, 'properties': {'os_hash_value': 'abc'}}


@ddt.ddt
class StoreTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        folder = self.useFixture(fixtures.TempDir()).path
        self.flags(instances_path=folder)
        self.cache = os.path.join(folder, 'live')
        self.auth = mock.Mock()
        self.auth.get_project_id.return_value = 'service'
        self.auth.get_access.return_value.role_names = ['service', 'admin']
        self.get_auth = self.useFixture(fixtures.MockPatch(
            'nova.service_auth.get_service_auth_plugin',
            return_value=self.auth)).mock
        self.useFixture(fixtures.MockPatch(
            'nova.service_auth.get_service_auth_session'))
        self.glance = mock.Mock()
        self.glance.create.return_value = {'id': uuids.memory}
        self.glance.get.return_value = {'size': 36}
        self.store = store.Store(self.glance, self.cache)

    def _uploaded(self):
        """The image as it is in Glance afterwards."""
        self.store.upload(DISK, 'name', 'project', mock.sentinel.reader)
        self.glance.get.return_value = {
            **self.glance.create.mock_calls[0].args[1],
            'id': uuids.memory, 'owner': 'service', 'status': 'active'}
        return self.glance.get.return_value

    def test_belongs_to_nova(self):
        image = self._uploaded()
        self.assertEqual('private', image['visibility'])
        for call in (self.glance.create, self.glance.update):
            context = call.mock_calls[0].args[0]
            self.assertEqual(self.auth, context.get_auth_plugin())
            self.assertIsNone(context.auth_token)
        self.get_auth.assert_called_with('service_user')
        self.assertEqual(mock.sentinel.reader,
                         self.glance.update.mock_calls[0].kwargs['data'])

    def test_long_name(self):
        """Glance takes no longer one, and an image of Nova's may have it."""
        self.store.upload(DISK, 'n' * 255, 'project', mock.sentinel.reader)
        name = self.glance.create.mock_calls[0].args[1]['name']
        self.assertEqual('n' * 246 + ' (memory)', name)
        self.assertEqual(255, len(name))

    def test_nova_sees_its_own_images(self):
        """Without a token the image API asks who may see an image."""
        # As the client of Glance gives it: no attribute but those it has.
        image = mock.Mock(spec=['id', 'visibility'], visibility='private')
        self.assertTrue(glance._is_image_available(
            store.service_context(), image))

    def test_nova_has_no_user(self):
        self.get_auth.return_value = None
        for call in (
                lambda: self.store.upload(DISK, 'name', 'project', None),
                lambda: self.store.check(DISK, uuids.memory, 'project'),
                lambda: self.store.fetch(uuids.memory)):
            error = self.assertRaises(memory_file.Unusable, call)
            self.assertIn('[service_user]', str(error))
        self.assertEqual([], self.glance.mock_calls)

    def test_upload_fails(self):
        self.glance.update.side_effect = exception.ImageBadRequest(
            image_id='x', response='full')
        self.assertRaises(exception.ImageBadRequest, self.store.upload, DISK,
                          'name', 'project', None)
        self.glance.delete.assert_called_once_with(mock.ANY, uuids.memory)

    def _publish(self):
        folder = self.useFixture(fixtures.TempDir()).path
        disk, memory = (os.path.join(folder, name) for name in 'dm')
        for path in (disk, memory):
            with open(path, 'wb') as f:
                f.write(path[-1].encode() * 4)
        self.read = []
        self.glance.get.return_value = DISK

        def update(context, image_id, metadata, data=None, purge_props=None):
            self.read.append((image_id, data and data.read()))
        self.glance.update.side_effect = self.glance.update.side_effect or (
            update)
        self.store.publish(
            mock.sentinel.context, uuids.disk,
            {'name': 'warm', 'properties': {'owner_id': 'project'}},
            mock.Mock(disk=disk, memory=vm_state.Stream(memory, 0, 4),
                      description=test_definition.described()))

    def test_publish(self):
        self._publish()
        (disk, data), (memory, kept), (last, none) = self.read
        self.assertEqual((uuids.disk, b'dddd'), (disk, data))
        self.assertEqual(uuids.memory, memory)
        self.assertTrue(kept.startswith(b'NOVALIVE'))
        self.assertTrue(kept.endswith(b'mmmm'))
        # The disk's image knows of it when all is there.
        self.assertEqual((uuids.disk, None), (last, none))
        calls = self.glance.update.mock_calls
        self.assertEqual({'properties': {
            'img_live_memory_id': uuids.memory}}, calls[-1].args[2])
        self.assertFalse(calls[-1].kwargs['purge_props'])
        self.assertEqual([mock.sentinel.context] * 2,
                         [calls[0].args[0], calls[-1].args[0]])
        self.assertEqual(self.auth, calls[1].args[0].get_auth_plugin())
        properties = self.glance.create.mock_calls[0].args[1]['properties']
        self.assertEqual('project', properties['nova_live_project_id'])

    def test_check_user(self):
        self.store.check_user()
        self.get_auth.return_value = None
        self.assertRaises(memory_file.Unusable, self.store.check_user)

    def test_publish_fails_at_the_end(self):
        error = exception.ImageNotFound(image_id='x')
        self.glance.update.side_effect = (None, None, error)
        self.assertRaises(exception.ImageNotFound, self._publish)
        self.glance.delete.assert_called_once_with(mock.ANY, uuids.memory)

    def test_delete(self):
        for error in (None, exception.ImageNotFound(image_id='x'),
                      exception.GlanceConnectionFailed(server='g', reason='')):
            self.glance.delete.side_effect = error
            self.assertIs(
                not isinstance(error, exception.GlanceConnectionFailed),
                self.store.delete(uuids.memory))

    def test_check(self):
        self._uploaded()
        self.store.check(DISK, uuids.memory, 'project')

    @ddt.data(
        ({'owner': 'project'}, 'belongs to a user'),
        ({'owner': None}, 'belongs to a user'),
        ({'status': 'deactivated'}, 'deactivated'),
        ({'status': 'queued'}, 'queued'),
        ({'properties': {}}, 'another disk'))
    @ddt.unpack
    def test_forged(self, changes, text):
        self._uploaded().update(changes)
        error = self.assertRaises(memory_file.Unusable, self.store.check,
                                  DISK, uuids.memory, 'project')
        self.assertIn(text, str(error))

    @ddt.data(({'id': uuids.other}, 'another disk'),
              ({'properties': {'os_hash_value': 'changed'}}, 'another disk'),
              ({'properties': {}}, 'another disk'))
    @ddt.unpack
    def test_another_disk(self, changes, text):
        """A user has copied the property, or replaced the data."""
        self._uploaded()
        error = self.assertRaises(memory_file.Unusable, self.store.check,
                                  {**DISK, **changes}, uuids.memory,
                                  'project')
        self.assertIn(text, str(error))

    @ddt.data('other', None, '')
    def test_another_project(self, project):
        self._uploaded()['properties'].setdefault('x', None)
        error = self.assertRaises(memory_file.Unusable, self.store.check,
                                  DISK, uuids.memory, project)
        self.assertIn('another project', str(error))

    @ddt.data(exception.ImageNotFound(image_id='x'),
              exception.ImageNotAuthorized(image_id='x'))
    def test_gone(self, error):
        self.glance.get.side_effect = error
        error = self.assertRaises(memory_file.Unusable, self.store.check,
                                  DISK, uuids.memory, 'project')
        self.assertIn(uuids.memory, str(error))

    @ddt.data('https://attacker.example/v2/images/' + uuids.memory,
              '../images/' + uuids.memory, 'memory', '', None,
          # MySQL finds these, and each would be a file of its own here.
          uuids.memory.upper(), '{%s}' % uuids.memory,
          uuids.memory.replace('-', ''))
    def test_no_id(self, memory_id):
        """Nova's token goes to Glance alone, whatever a user has written."""
        for call in (
                lambda: self.store.check(DISK, memory_id, 'project'),
                lambda: self.store.fetch(memory_id)):
            error = self.assertRaises(memory_file.Unfit, call)
            self.assertIn('is no ID of an image', str(error))
        self.assertEqual([], self.glance.mock_calls)

    def _download(self, context, image_id, dest_path):
        with open(dest_path, 'w') as f:
            f.write(image_id)

    def test_fetched_once(self):
        self.glance.download.side_effect = self._download
        path = self.store.fetch(uuids.memory)
        self.assertEqual(path, self.store.fetch(uuids.memory))
        self.assertEqual(1, self.glance.download.call_count)
        self.assertEqual([uuids.memory], os.listdir(self.cache))
        self.assertEqual(0o700, os.stat(self.cache).st_mode & 0o777)

    @ddt.data((memory_file.RESERVE + 35, False),
              (memory_file.RESERVE + 36, True))
    @ddt.unpack
    def test_room(self, free, is_fetched):
        """The disks of guests may be in that file system, too."""
        self.glance.download.side_effect = self._download
        get_info = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.utils.get_fs_info',
            return_value={'free': free})).mock
        if is_fetched:
            self.store.fetch(uuids.memory)
        else:
            error = self.assertRaises(memory_file.Unusable, self.store.fetch,
                                      uuids.memory)
            self.assertNotIsInstance(error, memory_file.Unfit)
            self.assertIn('make room in %s' % self.cache, str(error))
        get_info.assert_called_once_with(self.cache)
        self.glance.get.assert_called_once_with(mock.ANY, uuids.memory)
        self.assertEqual([uuids.memory] if is_fetched else [],
                         os.listdir(self.cache))

    def test_two_at_once_fetch_it_once(self):
        def slow(context, image_id, dest_path):
            time.sleep(0.2)
            self._download(context, image_id, dest_path)
        self.glance.download.side_effect = slow
        threads = [threading.Thread(
            target=self.store.fetch, args=(uuids.memory,))
            for _number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(1, self.glance.download.call_count)
        self.assertEqual([uuids.memory], os.listdir(self.cache))

    def test_what_was_not_fetched_whole_is_gone(self):
        def cut(context, image_id, dest_path):
            self._download(context, image_id, dest_path)
            raise OSError('corrupt')
        self.glance.download.side_effect = cut
        self.assertRaises(OSError, self.store.fetch, uuids.memory)
        self.assertEqual([], os.listdir(self.cache))

    def _glance_has(self, *images):
        """Images as Glance has them, an hour old."""
        changed = timeutils.utcnow(with_timezone=True) - (
            datetime.timedelta(hours=1))
        images = {image['id']: {'properties': {}, 'updated_at': changed,
                                **image} for image in images}

        def get_all(context, filters):
            return [image for image in images.values()
                    if image['owner'] == filters['owner']]

        def get(context, image_id):
            if image_id not in images:
                raise exception.ImageNotFound(image_id=image_id)
            return images[image_id]

        self.glance.get_all.side_effect = get_all
        self.glance.get.side_effect = get
        return images

    @staticmethod
    def _memory(memory_id=uuids.memory, disk_id=uuids.disk, **more):
        return {'id': memory_id, 'owner': 'service', 'properties': {
            'nova_live_disk_id': disk_id}, **more}

    @staticmethod
    def _disk(**properties):
        return {'id': uuids.disk, 'owner': 'user', 'properties': properties}

    def test_forgotten(self):
        images = self._glance_has(
            self._memory(), self._disk(img_live_memory_id=uuids.memory),
            self._memory(uuids.other, uuids.gone, status='queued'),
            {'id': uuids.another, 'owner': 'service'},
            self._memory(uuids.foreign, uuids.gone, owner='user'))
        (found,) = self.store.forgotten(60)
        self.assertEqual((uuids.other, uuids.gone), found[:2])
        self.assertIn('is gone', found.reason)
        # A capture was cut off, or a user has taken the property away.
        for named in ({}, {'img_live_memory_id': uuids.other}):
            images[uuids.disk]['properties'] = named
            found = self.store.forgotten(60)
            self.assertEqual([uuids.memory, uuids.other],
                             [memory.memory for memory in found])
            self.assertIn('does not name it', found[0].reason)
        for call in [*self.glance.get_all.mock_calls,
                     *self.glance.get.mock_calls]:
            self.assertEqual(self.auth, call.args[0].get_auth_plugin())

    def test_not_forgotten_yet(self):
        """It may be on its way to Glance."""
        self._glance_has(self._memory())
        self.assertEqual([], self.store.forgotten(2 * 3600))
        self.assertEqual(1, len(self.store.forgotten(3500)))

    def test_forgotten_is_not_known(self):
        """Who doesn't see the disks would take all of them for gone."""
        self._glance_has(self._memory())
        self.auth.get_access.return_value.role_names = ['service']
        error = self.assertRaises(memory_file.Unusable, self.store.forgotten,
                                  60)
        self.assertIn('role admin', str(error))
        self.get_auth.return_value = None
        error = self.assertRaises(memory_file.Unusable, self.store.forgotten,
                                  60)
        self.assertIn('configure [service_user]', str(error))

    @ddt.data(exception.ImageNotAuthorized(image_id='x'),
              exception.GlanceConnectionFailed(server='g', reason=''))
    def test_forgotten_without_an_answer(self, error):
        self._glance_has(self._memory())
        self.glance.get.side_effect = error
        self.assertRaises(type(error), self.store.forgotten, 60)

    def test_sweep(self):
        self.flags(remove_unused_original_minimum_age_seconds=100,
                   group='image_cache')
        self.store.sweep()
        self.glance.download.side_effect = self._download
        old = self.store.fetch(uuids.old)
        self.store.fetch(uuids.new)
        os.utime(old, times=(time.time() - 101,) * 2)
        self.store.sweep()
        self.assertEqual([uuids.new], os.listdir(self.cache))
        # Use makes it young again.
        os.utime(self.store.fetch(uuids.new), times=(0, 0))
        self.store.fetch(uuids.new)
        self.store.sweep()
        self.assertEqual([uuids.new], os.listdir(self.cache))

    def test_sweep_of_what_is_of_use_just_then(self):
        """A guest's boot has it in hand when the sweep gets to it."""
        self.flags(remove_unused_original_minimum_age_seconds=100,
                   group='image_cache')
        self.glance.download.side_effect = self._download
        path = self.store.fetch(uuids.old)
        os.utime(path, times=(0, 0))
        part = path + '.part'
        with open(part, 'w'):
            pass
        os.utime(part, times=(0, 0))

        def used(name, **kwargs):
            # Whoever had the lock before has fetched it.
            os.utime(path)
            return mock.DEFAULT

        with mock.patch('oslo_concurrency.lockutils.lock',
                        side_effect=used) as lock:
            self.store.sweep()
        self.assertEqual([uuids.old], os.listdir(self.cache))
        # One lock for a memory and for what is on its way to be it.
        self.assertEqual({uuids.old}, {
            call.args[0] for call in lock.call_args_list})

    def test_sweep_of_what_goes_at_the_same_time(self):
        """What is fetched gets its name, another host deletes something."""
        self.flags(remove_unused_original_minimum_age_seconds=100,
                   group='image_cache')
        self.glance.download.side_effect = self._download
        os.utime(self.store.fetch(uuids.old), times=(0, 0))
        with mock.patch('os.listdir', return_value=['gone', uuids.old]):
            self.store.sweep()
        self.assertEqual([], os.listdir(self.cache))
