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

import threading
from unittest import mock

import ddt

from nova import exception
from nova import test
from nova import thread_pool_factory
from nova.virt.libvirt.storage.move import peer
from nova.virt.libvirt.storage.pool import access

URI = 'qemu+tls://192.0.2.7/system'
KEY = '/etc/pki/libvirt/private/clientkey.pem'
# libvirt 9.0's words
UNREADABLE = ('Unable to set x509 key and certificate: %s, '
              '/etc/pki/libvirt/clientcert.pem: Error while reading file.' %
              KEY)


@ddt.ddt
class TestRefusals(test.NoDBTestCase):

    def refusal(self, error, obstacle=None):
        host = mock.Mock()
        host.connect_to_peer.side_effect = RuntimeError(error)
        with mock.patch.object(access, 'obstacle', autospec=True,
                               side_effect=obstacle) as mock_look:
            if not obstacle:
                mock_look.side_effect = lambda path, needed: None
            e = self.assertRaises(exception.MigrationPreCheckError,
                                  peer.connected(host, URI).__enter__)
        return e.format_message()

    def test_key_that_nova_can_not_read(self):
        def look(path, needed):
            if path == KEY:
                return access.Obstacle(KEY, '-rw------- root:root', 'r')

        told = self.refusal(UNREADABLE, look)
        self.assertIn('give %s (-rw------- root:root) to a group of user %s' %
                      (KEY, access.user()), told[:200])
        self.assertIn('reading %s' % KEY, told)
        self.assertIn(UNREADABLE, told)

    def test_files_are_readable(self):
        told = self.refusal(UNREADABLE)
        self.assertIn("libvirt at %s can't be reached" % URI, told)

    def test_no_file_is_named(self):
        told = self.refusal('Connection refused', AssertionError)
        self.assertIn('Connection refused', told)

    @ddt.data(
        'authentication failed: Failed to start SASL negotiation: -1 (SASL(-1)'
        ': generic failure: GSSAPI Error: Unspecified GSS failure. (Ticket '
        'expired))',
        'authentication failed: authentication failed',
        'authentication failed: Failed to collect auth credentials',
        'authentication failed: no SASL mechanism')
    def test_sasl(self, error):
        told = self.refusal(error)
        self.assertIn('Kerberos ticket or keytab of user %s' % access.user(),
                      told[:200])
        self.assertIn('sasl_allowed_username_list', told[:200])
        for text in (URI, error):
            self.assertIn(text, told)

    def test_while_many_disks_are_copied(self):
        # For hours, perhaps; nothing is wrong with the peer.
        done = threading.Event()
        self.addCleanup(done.set)
        with mock.patch.object(peer, '_CONNECT_TIMEOUT', 5), (
                mock.patch.dict(
                    thread_pool_factory.ExecutorsPoolSize._EXECUTOR_POOL_SIZE,
                    {thread_pool_factory.ExecutorType.STORAGE_MIGRATION:
                     lambda: 2})):
            for _n in range(3):
                thread_pool_factory.spawn_on(
                    thread_pool_factory.ExecutorType.STORAGE_MIGRATION,
                    done.wait, 60)
            host = mock.Mock()
            with peer.connected(host, URI) as found:
                self.assertEqual(host.connect_to_peer.return_value, found)

    def test_certificate_of_the_server(self):
        self.assertNotIn('Kerberos', self.refusal(
            "authentication failed: Failed to verify peer's certificate"))
