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

"""The context of command lines that have compute services fetch images."""

from unittest import mock

from keystoneauth1.access import access
from keystoneauth1 import exceptions as ks_exceptions
from keystoneauth1 import fixture as ks_fixture

from nova import context
from nova import test
from nova.virt.libvirt.storage import service_user

URL = 'http://192.0.2.1:9292'


class AdminContextTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        token = ks_fixture.V3Token(user_id='nova', project_id='service',
                                   project_name='service')
        token.add_role('admin')
        image = token.add_service('image', name='glance')
        image.add_standard_endpoints(public=URL, internal=URL + '/internal',
                                     region='one')
        self.auth = mock.Mock()
        self.auth.get_access.return_value = access.AccessInfoV3(
            token, auth_token='the token')
        self.plugin = mock.Mock(return_value=self.auth)
        self.stub_out('nova.service_auth.get_service_auth_plugin',
                      self.plugin)
        self.stub_out('nova.service_auth.get_service_auth_session',
                      mock.Mock())

    def test_goes_to_compute_services_with_a_token(self):
        there = context.RequestContext.from_dict(
            service_user.admin_context().to_dict())
        self.assertTrue(there.is_admin)
        self.assertEqual(('nova', 'service'),
                         (there.user_id, there.project_id))
        auth = there.get_auth_plugin()
        self.assertEqual('the token', auth.get_token(None))
        for interface, url in (('public', URL),
                               ('internal', URL + '/internal')):
            self.assertEqual(url, auth.get_endpoint(
                None, service_type='image', interface=interface))

    def test_token_is_renewed(self):
        service_user.admin_context()
        service_user.admin_context()
        # The plugin knows when it expires.
        self.assertEqual(2, self.auth.get_access.call_count)

    def assert_without_token(self, reason):
        found = service_user.admin_context()
        self.assertEqual((True, None), (found.is_admin, found.auth_token))
        self.assertIn('Check [service_user] in nova.conf',
                      self.stdlog.logger.output)
        self.assertIn(reason, self.stdlog.logger.output)

    def test_not_configured(self):
        self.plugin.return_value = None
        self.assert_without_token('not configured')

    def test_keystone_is_out_of_reach(self):
        self.auth.get_access.side_effect = ks_exceptions.ConnectFailure(
            'no route')
        self.assert_without_token('no route')

    def test_plugin_of_the_service_user(self):
        service_user.admin_context()
        self.plugin.assert_called_once_with('service_user')
