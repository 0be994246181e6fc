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

from unittest import mock

import ddt
from oslo_utils.fixture import uuidsentinel as uuids

from nova import context
from nova import exception
from nova import objects
from nova import test
from nova.tests.unit import fake_instance
from nova.virt import images
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.move import base_image
from nova.virt.libvirt.storage.pool import pool as storage_pool


@ddt.ddt
class FindTestCase(test.NoDBTestCase):
    """Glance has lost the image, and another one is copied meanwhile."""

    def setUp(self):
        super().setUp()
        self.context = context.RequestContext('user', 'project')
        self.instance = objects.Instance._from_db_object(
            self.context, objects.Instance(), fake_instance.fake_db_instance(
                image_ref=uuids.image))
        self.name = imagecache.get_cache_fname(uuids.image)
        self.stub_out('nova.virt.images.get_info', mock.Mock(
            side_effect=exception.ImageNotFound(image_id=uuids.image)))
        self.volume = mock.sentinel.volume
        self.here = mock.Mock(spec=storage_pool.StoragePool)
        self.here.name = 'bases'
        self.here.volume.side_effect = exception.StorageVolumeNotFound(
            pool='bases', volume=self.name, host='here', reason='', code=50)
        self.there = mock.Mock()
        self.there.has.return_value = False
        self.busy = exception.StoragePoolError(
            pool='bases', host='there', code=1,
            reason='asynchronous jobs running')

    def _find(self):
        return base_image.find(
            self.context, self.instance, self.here, self.there)

    def test_pool_is_busy(self):
        def refresh(timeout):
            # Another server's image is waited for; its server runs.
            self.assertEqual(storage_pool.COPY_TIMEOUT, timeout)
            self.here.volume.side_effect = None
            self.here.volume.return_value = self.volume

        self.here.refresh.side_effect = refresh
        self.assertIs(self.volume, self._find())

    def test_pool_of_the_destination_is_busy(self):
        self.there.has.side_effect = self.busy
        self.here.volume.side_effect = None
        self.here.volume.return_value = self.volume
        self.assertIs(self.volume, self._find())
        self.here.refresh.assert_not_called()

    def test_nobody_has_it(self):
        self.assertRaises(exception.StorageVolumeNotFound, self._find)
        self.here.refresh.assert_called_once_with(
            timeout=storage_pool.COPY_TIMEOUT)

    def test_busy_is_not_for_ever(self):
        self.here.refresh.side_effect = self.busy
        self.assertIs(self.busy, self.assertRaises(
            exception.StoragePoolError, self._find))

    def _own(self, **kwargs):
        own = context.RequestContext(
            'nova', 'service', **{'auth_token': 'token', 'roles': ['admin'],
                                  **kwargs})
        self.stub_out('nova.virt.libvirt.storage.service_user.admin_context',
                      lambda: own)
        return own

    def _is_lost(self):
        return base_image.is_lost(self.context, self.instance)

    def test_lost_by_the_word_of_nova_itself(self):
        """What is asked with a request is answered to who has sent that."""
        own = self._own()
        self.assertTrue(self._is_lost())

        def get_info(asked, image_id):
            if asked is own:
                return {'status': 'active'}
            raise exception.ImageNotFound(image_id=image_id)

        images.get_info.side_effect = get_info
        self.assertFalse(self._is_lost())

    @ddt.data({'roles': ['service']}, {'auth_token': None})
    def test_image_of_others(self, kwargs):
        """Glance says of it that it doesn't exist."""
        self._own(**kwargs)
        self.assertFalse(self._is_lost())
        self.assertFalse(base_image.is_settled(self.context, self.instance))
        self.assertTrue(base_image.is_refused(self.context, self.instance))
        self.assertFalse(base_image.can_be_had(
            self.context, self.instance, self.here))

    def test_image_on_another_server(self):
        """The source's word, where Nova's token would go."""
        self._own()
        self.instance.image_ref = 'http://192.0.2.9/v2/images/' + uuids.image
        self.assertFalse(self._is_lost())
        self.assertEqual([self.context], [
            call.args[0] for call in images.get_info.mock_calls])
