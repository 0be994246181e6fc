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

"""Cold migration where libvirt asks for SASL beside certificates."""

import dataclasses
import time

from lab import config
from lab import kerberos
from lab.cloud.server import ServerError
from lab.host import Host
from lab.tests import cloud_case
from lab.tests import test_cloud_user

TICKETS = 'FILE:/var/lib/nova/tickets'
ADVICE = ('check the Kerberos ticket or keytab of user nova here, and '
          'sasl_allowed_username_list there')


class SaslCase(test_cloud_user.UserCase):

    environment = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.a, cls.b = map(Host, config.HOSTS)
        cls.addClassCleanup(cls.end)
        cls.set_up(cls.a, cls.b)
        for host in config.HOSTS:
            cls.use(cls.environment, host)
            # The name is what Kerberos asks for.
            cls.cloud.set(host, 'libvirt', 'migration_inbound_addr', '%s')

    @classmethod
    def end(cls):
        for host in (cls.a, cls.b):
            kerberos.use_none(host)
            cls.use({}, host.name)
            cls.cloud.reset(host.name)

    @classmethod
    def use(cls, environment, host, restart=False):
        cls.cloud.layout = dataclasses.replace(
            cls.cloud.layout, environment=environment)
        if restart:
            cls.cloud.restart(host, 'nova-compute')

    def there_and_back(self):
        """host-a, host-b and host-a again; then to and fro."""
        server = self.boot(flavor='lab.small.disks',
                           script=test_cloud_user.SCRIPT)
        said = server.testimony()
        for host in ('host-b', 'host-a'):
            server.migrate(host)
            said = server.testimony(after=said)
            self.assert_data(said, **test_cloud_user.DATA)
            server.confirm()
        server.migrate('host-b')
        server.revert()
        self.assert_data(server.testimony(after=said), **test_cloud_user.DATA)
        self.assert_nothing_left(server, 'host-b')

    def assert_refused(self, server, environment, said):
        """nova-compute says so at its start, and refuses before power-off."""
        before = server.look()
        log = self.cloud.compute_log('host-a')
        start = log.stat().st_size
        self.use(environment, 'host-a', restart=True)
        try:
            self.a.wait(lambda: "can't come to this host" in log.read_text(
                errors='replace')[start:], 60, 'warned of')
            with self.assertRaisesRegex(ServerError, 'is ACTIVE on host-a'):
                server.migrate('host-b')
            told = log.read_text(errors='replace')[start:]
            self.assertGreater(told.count(ADVICE), 1)
            self.assertIn(said, told)
            self.assertEqual(before.boot_id, server.look().boot_id)
        finally:
            self.use(self.environment, 'host-a')


class TestKerberos(SaslCase):

    environment = {**kerberos.ENVIRONMENT, 'KRB5CCNAME': TICKETS}

    @classmethod
    def set_up(cls, *hosts):
        cls.realm = kerberos.Realm()
        cls.realm.create(*hosts)
        for host in hosts:
            kerberos.use_gssapi(host)

    def test_there_and_back(self):
        self.there_and_back()

    def test_refused(self):
        server = self.boot()
        kerberos.install(self.realm.add('nova/elsewhere'), self.a,
                         '/etc/nova/elsewhere.keytab')
        none = {'KRB5CCNAME': TICKETS + '-none'}
        self.assert_refused(server, none, 'No Kerberos credentials available')
        self.assert_refused(
            server, {**none, 'KRB5_CLIENT_KTNAME':
                     '/etc/nova/elsewhere.keytab'}, 'authentication failed')
        cache = kerberos.short_ticket(self.a, 3)
        time.sleep(6)
        self.assert_refused(server, {'KRB5CCNAME': cache}, 'Ticket expired')
        # And once more in order.
        self.cloud.restart('host-a', 'nova-compute')
        server.migrate('host-b')
        server.confirm()


class TestPassword(SaslCase):

    @classmethod
    def set_up(cls, *hosts):
        for host in hosts:
            kerberos.use_scram(host)

    def test_there_and_back(self):
        self.there_and_back()


load_tests = cloud_case.only_in_full
