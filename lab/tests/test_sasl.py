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

"""SASL inside TLS, as the admin guide says: Kerberos and passwords."""

import contextlib
import time

import libvirt

from lab import guide
from lab import kerberos
from lab import nova_user
from lab.tests import test_hosts

NOTHING = 'FILE:/var/lib/nova/no-ticket'


class SaslTest(test_hosts.HostsTest):

    def tearDown(self):
        for host in (self.a, self.b):
            kerberos.use_none(host)
        super().tearDown()

    def connect(self, environment, ok=True):
        """Connect from host-a to host-b as nova.

        :returns: what libvirt says
        """
        done = self.a.run(nova_user.command(
            ['virsh', '-c', self.a.uri(self.b), 'hostname']), check=False,
            timeout=30, env={**nova_user.environment(), **environment})
        self.assertEqual(ok, not done.returncode, done)
        return done.stdout + done.stderr

    def log(self):
        return (self.b.logs / 'libvirtd.log').read_text(errors='replace')


class TestKerberos(SaslTest):

    def setUp(self):
        super().setUp()
        self.realm = kerberos.Realm()
        self.realm.create(self.a, self.b)
        for host in (self.a, self.b):
            kerberos.use_gssapi(host)
            # Of an earlier test.
            host.run(['sh', '-c', 'rm -f /tmp/krb5cc_*'])

    def test_both_ways(self):
        for one, other in ((self.a, self.b), (self.b, self.a)):
            self.assertEqual(other.name, guide.run(
                one, 'sasl-check', as_nova=True, PEER=other.name).strip())

    def test_live_migration(self):
        with self.a.connect() as here, self.b.connect() as there:
            guest = here.createXML(test_hosts.DOMAIN % ('walker', ''))
            try:
                guest.migrateToURI3(
                    self.a.uri(self.b), {}, libvirt.VIR_MIGRATE_LIVE |
                    libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_TLS)
                guest = there.lookupByName('walker')
                self.assertTrue(guest.isActive())
            finally:
                guest.destroy()

    def test_no_keytab(self):
        self.assertIn('No Kerberos credentials available', self.connect(
            {'KRB5CCNAME': NOTHING}, ok=False))

    def test_keytab_that_nova_can_not_read(self):
        self.a.run(['chmod', '600', kerberos.KEYTAB])
        with contextlib.ExitStack() as stack:
            stack.callback(self.a.run, ['chmod', '640', kerberos.KEYTAB])
            self.assertIn('No Kerberos credentials available', self.connect(
                {'KRB5CCNAME': NOTHING, **kerberos.ENVIRONMENT}, ok=False))

    def test_expired_ticket(self):
        cache = {'KRB5CCNAME': kerberos.short_ticket(self.a, 4)}
        self.connect(cache)
        time.sleep(7)
        self.assertIn('Ticket expired', self.connect(cache, ok=False))

    def test_principal_that_is_not_allowed(self):
        kerberos.install(self.realm.add('nova/elsewhere'), self.a,
                         '/etc/nova/elsewhere.keytab')
        self.assertIn('authentication failed', self.connect({
            'KRB5_CLIENT_KTNAME': '/etc/nova/elsewhere.keytab',
            'KRB5CCNAME': NOTHING}, ok=False))
        self.assertIn("identity 'nova/elsewhere' not allowed", self.log())

    def test_server_without_a_keytab(self):
        self.b.run(['rm', '/etc/libvirt/krb5.tab'])
        self.assertIn('authentication failed', self.connect(
            {'KRB5CCNAME': NOTHING, **kerberos.ENVIRONMENT}, ok=False))


class TestPassword(SaslTest):

    def setUp(self):
        super().setUp()
        for host in (self.a, self.b):
            kerberos.use_scram(host)

    def test_both_ways(self):
        for one, other in ((self.a, self.b), (self.b, self.a)):
            self.assertEqual(other.name, guide.run(
                one, 'check', as_nova=True, PEER=other.name).strip())

    def test_wrong_password(self):
        self.a.run(['sed', '-i', 's/^password=.*/password=guessed/',
                    '/etc/libvirt/auth.conf'])
        self.assertIn('authentication failed', self.connect({}, ok=False))
