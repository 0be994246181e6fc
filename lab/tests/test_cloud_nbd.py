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
"""Moves over NBD, on hosts whose libvirt listens to nobody."""

import re
import time

from lab import config
from lab.tests.ahead_case import AheadTests
from lab.tests.cloud_case import only_in_full
from lab.tests.test_cloud_moves import DISKS
from lab.tests.test_cloud_moves import MovesCase

GUARD = 'intake/guard.py'
FLAVOR = 'lab.medium.disks'

load_tests = only_in_full


class NbdCase(MovesCase):
    """libvirtd's TLS port is closed on both hosts."""

    more = {'storage_migration_transport': ('nbd', 'libvirt')}

    @classmethod
    def prepare(cls):
        # A service that loses its libvirt disables its host for a while.
        cls.addClassCleanup(cls._listen, True)
        cls._listen(False)

    @classmethod
    def _listen(cls, does):
        for host in (cls.a, cls.b):
            conf = host.folder / 'etc/libvirt' / (host.front + '.conf')
            text, count = re.subn('(?m)^listen_tls = .*', 'listen_tls = %d' %
                                  does, conf.read_text())
            assert count, conf
            conf.write_text(text)
            host.restart('libvirtd')
            host.run(['timeout', '30', 'sh', '-c',
                      'until virsh list >/dev/null 2>&1; do sleep .2; done'])
            if does:
                host.wait_ready()

    def setUp(self):
        super().setUp()
        for host, other in ((self.a, self.b), (self.b, self.a)):
            self.assertNotEqual(0, host.run(
                ['virsh', '-c', host.uri(other), 'list'],
                check=False).returncode, 'libvirt listens')

    def guards(self, host):
        """What stands between nova-compute and qemu-nbd, and that."""
        found = host.run(['ps', '-eo', 'pid,user,args']).stdout
        return [line for line in found.splitlines()
                if (GUARD in line or 'qemu-nbd' in line) and 'ps -eo' not in
                line]

    def assert_nothing_open(self):
        for host in (self.a, self.b):
            self.wait_for(lambda: not self.guards(host), 20,
                          'no qemu-nbd on %s: %s' % (
                              host.name, self.guards(host)))
            keys = host.path('/var/lib/nova/storage-intake')
            self.assertEqual([], list(keys.iterdir()) if keys.exists()
                             else [])


class TestMoves(NbdCase):
    rate = None

    def test_migrate_and_confirm(self):
        server, before = self.server()
        server.migrate('host-b')
        there = server.testimony(after=before)
        self.assert_kept(there)
        self.assert_nothing_open()
        server.confirm()
        self.assert_nothing_left(server, 'host-a')
        self.assertIn('over NBD', self.service_log('host-a'))

    def test_migrate_and_revert(self):
        server, before = self.server()
        self.assert_goes(server, before)
        self.assert_nothing_open()

    def test_resize(self):
        server, before = self.server()
        server.resize(FLAVOR)
        there = server.testimony(after=before)
        self.assert_kept(there)
        server.confirm()
        self.assert_nothing_open()
        self.assert_nothing_left(
            server, *(name for name in config.HOSTS if name != server.host))


class TestKills(NbdCase):

    def test_receiver_is_nova_s_and_holds_one_file(self):
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, 20)
        found = [line.split() for line in self.guards(self.b)
                 if 'guard.py' not in line]
        self.assertTrue(found)
        for pid, user, *_command in found:
            self.assertEqual('nova', user)
            status = self.b.run(['cat', '/proc/%s/status' % pid]).stdout
            self.assertIn('CapEff:\t0000000000000000', status)
        # The key is gone though the copy goes on.
        keys = self.b.path('/var/lib/nova/storage-intake')
        self.assertEqual([], list(keys.iterdir()))
        found = self.settled(server)
        self.assertEqual('VERIFY_RESIZE', found.status)
        self.assert_kept(server.testimony(after=before))
        self.assert_nothing_open()

    def _killed(self, host, percent):
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, percent)
        host.kill('nova-compute')
        time.sleep(1)
        self.assertEqual([], self.guards(self.b))
        self.cloud.start_compute(host.name)
        said = self.assert_stayed(server, before)
        self.assert_nothing_open()
        self.assert_goes(server, said)

    def test_destination_compute(self):
        self._killed(self.b, 50)

    def test_source_compute(self):
        self._killed(self.a, 50)

    def test_receiver(self):
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, 40)
        for line in self.guards(self.b):
            if 'guard.py' not in line:
                self.b.run(['kill', '-9', line.split()[0]])
        said = self.assert_stayed(server, before)
        self.assert_nothing_open()
        self.assert_goes(server, said)

    def test_server_is_deleted(self):
        server, _before = self.server()
        self.begin(server)
        self.wait_middle(server, 30)
        server.delete()
        for host in config.HOSTS:
            self.wait_for(lambda: not server.left_on(host), 60,
                          'a clean %s: %s' % (host, server.left_on(host)))
        self.assert_nothing_open()


class TestAhead(AheadTests, NbdCase):
    """Over NBD."""
    more = {**NbdCase.more, **AheadTests.more}

    def assert_sent_twice(self, server, before, written):
        super().assert_sent_twice(server, before, written)
        # It has read ahead, too.
        self.assertIn('after most of it before', self.service_log('host-b'))

    def assert_goes_all_the_same(self, server, before):
        """What was sent ahead is lost: it is copied with the guest off."""
        self.assert_goes_off(server, before)
        self.assertIn('has not noticed', self.service_log('host-a'))

    def test_destination_compute_is_killed(self):
        server, before = self.writing()
        self.b.kill('nova-compute')
        time.sleep(1)
        self.assertEqual([], self.guards(self.b))
        self.assert_runs(server)
        self.cloud.start_compute('host-b')
        self.assert_goes_all_the_same(server, before)

    def test_receiver_is_killed(self):
        server, before = self.writing()
        for line in self.guards(self.b):
            if 'guard.py' not in line:
                self.b.run(['kill', '-9', line.split()[0]])
        self.assert_goes_all_the_same(server, before)


class TestAgain(NbdCase):
    """What a host has kept of a server that comes back isn't sent again."""
    rate = None
    more = {**NbdCase.more, 'storage_migration_keep_copies': (1, 0)}

    def sent(self, server, source, begin):
        """Bytes of the root disk that went from a host, and how."""
        found = re.search(
            r'Copied volume %s_disk[ ,][^:]*: (\d+) bytes of data in [0-9.]+ s'
            r'(, into a copy that was kept there)?' % server.id,
            self.service_log(source)[begin:])
        self.assertTrue(found, 'nothing went from ' + source)
        return int(found[1]), bool(found[2])

    def moves(self, server, said, host, end):
        """Move it; returns what the guest says and what sent() does."""
        source = server.host
        begin = len(self.service_log(source))
        server.migrate(host)
        said = server.testimony(after=said)
        self.assert_kept(said)
        sent = self.sent(server, source, begin)
        getattr(server, end)()
        if end == 'revert':
            said = server.testimony(after=said)
            self.assert_kept(said)
        self.assert_nothing_open()
        return said, sent

    def assert_is_little(self, sent):
        self.assertTrue(sent[1], 'no copy was taken up')
        # Of the 12 MiB that the guest has written once.
        self.assertLess(sent[0], 8 << 20)

    def kept(self, server, host):
        return [path for path in server.left_on(host) if '/disks/' in path]

    def test_back_to_where_it_was(self):
        server, said = self.server()
        said, first = self.moves(server, said, 'host-b', 'confirm')
        self.assertFalse(first[1])
        self.assertTrue(self.kept(server, 'host-a'))
        said, back = self.moves(server, said, 'host-a', 'confirm')
        self.assert_is_little(back)
        self.assertTrue(self.kept(server, 'host-b'))
        # A copy that somebody has written to is no worse than none.
        path = self.b.path('%s/%s_disk' % (DISKS, server.id))
        with open(path, 'r+b') as disk:
            disk.seek(1 << 20)
            disk.write(b'\xee' * (6 << 20))
        _said, there = self.moves(server, said, 'host-b', 'confirm')
        self.assertTrue(there[1])
        self.assertGreater(there[0], 4 << 20)

    def test_after_a_revert(self):
        server, said = self.server()
        said, first = self.moves(server, said, 'host-b', 'revert')
        self.assertFalse(first[1])
        self.assertTrue(self.kept(server, 'host-b'))
        _said, again = self.moves(server, said, 'host-b', 'confirm')
        self.assert_is_little(again)
