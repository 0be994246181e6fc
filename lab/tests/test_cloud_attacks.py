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
"""What a source that was broken into can do to a destination over NBD.

It has nova-compute's configuration, and so its way to the message bus and to
the conductor; libvirt of the destination listens to nobody. Each attempt is
refused, and the destination's log names it.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import tempfile

from lab.cloud.server import ServerError
from lab.cloud import services
from lab import machine
from lab import nova_user
from lab.tests.cloud_case import only_in_full
from lab.tests.test_cloud_moves import DISKS
from lab.tests.test_cloud_moves import POOL
from lab.tests.test_cloud_nbd import NbdCase

SHELL = pathlib.Path(__file__).with_name('source_shell.py')
BASES = 'nova-base-images-pool'
SECRET = '/var/lib/nova/secret'
CLUSTER = 64 << 10

load_tests = only_in_full


class Shell:
    """The keys of host-a's compute service in wrong hands."""

    def __init__(self, cloud):
        layout = cloud.layout
        argv = [layout.nova / 'bin/python', SHELL,
                *layout.nova_files('host-a')]
        env = services.nova_environment(layout)
        if layout.user:
            argv = nova_user.command(argv)
            env.update(nova_user.environment())
        env.update(layout.environment)
        self.process = machine.Machine('host-a').popen(
            argv, env=env, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._answer() == {'answer': 'host-a'}

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, 'the shell has ended'
        return json.loads(line)

    def ask(self, what, server_id, migration_id, **request):
        """Ask host-b: {'answer'}, or {'error', 'message'}."""
        request = {'host': 'host-a', 'do': what, **request}
        self.process.stdin.write(json.dumps({
            'instance': server_id, 'migration': migration_id, 'to': 'host-b',
            'request': request}) + '\n')
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        machine.kill(self.process)
        self.process.communicate()


class AttackCase(NbdCase):
    # Somebody who is held up has that long.
    stall = 60
    # The second disk waits for the first one, with its guest off.
    more = {**NbdCase.more, 'storage_migration_parallel_disks': (1, 2),
            'storage_migration_precopy': (-1, 1024)}

    def setUp(self):
        super().setUp()
        self.shell = Shell(self.cloud)
        self.addCleanup(self.shell.close)
        self._log_begins = len(self.service_log('host-b'))

    def logged(self):
        """What host-b has logged in this test."""
        return self.service_log('host-b')[self._log_begins:]

    def middle(self):
        """A server whose root disk is on its way to host-b."""
        server, said = self.server()
        self.begin(server)
        self.wait_middle(server, 20)
        return server, said, self.migration(server).id

    @contextlib.contextmanager
    def held_up(self):
        """Let the copies on host-a wait within."""
        for pid in self.workers(self.a):
            self.a.run(['kill', '-%d' % signal.SIGSTOP, str(pid)])
        try:
            yield
        finally:
            for pid in self.workers(self.a):
                self.a.run(['kill', '-%d' % signal.SIGCONT, str(pid)])

    def refused(self, server, migration_id, what, text, **request):
        before = len(self.service_log('host-b'))
        found = self.shell.ask(what, server.id, migration_id, **request)
        self.assertIn('error', found, (what, request))
        said = [line for line in self.service_log('host-b')[
            before:].splitlines() if 'WARNING' in line]
        self.assertTrue(
            [line for line in said if text in line and
             'Refused for migration %d' % migration_id in line],
            '%s %s is not refused for "%s": %s, %s' % (
                what, request, text, found, said))
        return found

    def answered(self, server, migration_id, what, **request):
        found = self.shell.ask(what, server.id, migration_id, **request)
        self.assertIn('answer', found, found)
        return found['answer']

    def content(self, server, disk):
        return self.b.path('%s/%s_%s' % (DISKS, server.id, disk)).read_bytes()

    def hole(self, server, disk):
        """The first byte of what the copy leaves out, on the source."""
        path = self.a.path('%s/%s_%s' % (DISKS, server.id, disk))
        with path.open('rb') as file:
            hole = file.seek(0, os.SEEK_HOLE)
            self.assertLess(hole, path.stat().st_size)
        return hole

    def finishes(self, server, before):
        """The move goes on, and what comes is what was sent."""
        found = self.settled(server)
        self.assertEqual('VERIFY_RESIZE', found.status)
        said = server.testimony(after=before)
        self.assert_kept(said)
        self.assert_nothing_open()
        return said


class TestRequests(AttackCase):
    """What goes by RPC."""

    def test_requests(self):
        victim = self.boot(name='victim', host='host-b')
        theirs = victim.id + '_disk'
        server, before, migration = self.middle()
        own = server.id + '_disk'
        opened = {'connections': 1, 'aes': False}
        with self.held_up():
            for what, text, request in (
                    ('open', "none of this server's",
                     {'pool': POOL, 'volume': theirs, **opened}),
                    ('create', "none of this server's",
                     {'pool': POOL, 'volume': theirs, 'length': 1,
                      'mode': 0o644}),
                    ('close', "none of this server's",
                     {'pool': POOL, 'volume': theirs, 'length': 0}),
                    ('probe', "none of this server's",
                     {'pool': POOL, 'name': theirs}),
                    ('delete', 'may be a disk', {'places': [[POOL, theirs]]}),
                    ('delete', 'may be a disk', {'places': [
                        [POOL, own + '.config'], [POOL, theirs]]}),
                    ('open', "none of this server's",
                     {'pool': POOL, 'volume': SECRET, **opened}),
                    ('open', "none of this server's",
                     {'pool': POOL, 'volume': '%s_/../../%s' % (
                         server.id, SECRET), **opened}),
                    ('open', 'is taken into storage pool',
                     {'pool': 'default', 'volume': own, **opened}),
                    ('look', 'is taken into storage pool',
                     {'pool': '/var/lib/nova'}),
                    ('open', "none of this server's",
                     {'pool': BASES, 'volume': own, **opened}),
                    ('has', 'is not its base image',
                     {'pool': BASES, 'name': SECRET}),
                    ('open', 'not on record as coming',
                     {'pool': POOL, 'volume': own + '.other', **opened}),
                    ('open', 'is open already',
                     {'pool': POOL, 'volume': own, **opened}),
                    ('open', '1000 connections',
                     {'pool': POOL, 'volume': own, 'connections': 1000,
                      'aes': False}),
                    ('create', 'no length of a disk',
                     {'pool': POOL, 'volume': own, 'length': 1 << 50,
                      'mode': 0o644}),
                    ('create', 'mode 4755',
                     {'pool': POOL, 'volume': own, 'length': 1,
                      'mode': 0o4755}),
                    ('greet', "another host's", {'host': 'host-c'}),
                    ('shutdown', 'nothing is known of this request', {})):
                with self.subTest(what=what, request=request):
                    self.refused(server, migration, what, text, **request)
            # A migration of somebody else's server
            self.refused(victim, migration, 'greet', 'none of this server')
        there = self.finishes(server, before)
        # When it is over, nothing of it may be asked any more.
        for what, text, request in (
                ('open', 'the migration is finished',
                 {'pool': POOL, 'volume': own, **opened}),
                ('close', 'the migration is finished',
                 {'pool': POOL, 'volume': own, 'length': 0}),
                ('delete', 'its guest runs on this host',
                 {'places': [[POOL, own]]})):
            self.refused(server, migration, what, text, **request)
        self.assert_kept(server.look())
        self.assertEqual(there.boot_id, server.look().boot_id)
        victim.look()


class Client:
    """QEMU's client on host-a, with a key or without one.

    :param opened: what host-b has answered to "open"
    """

    def __init__(self, host, opened, key=None):
        self._host = host
        image = ('driver=nbd,server.type=inet,server.host=%(address)s,'
                 'server.port=%(port)d' % opened)
        tls = []
        self._folder = tempfile.TemporaryDirectory(
            dir=host.path('/var/lib/nova'))
        folder = pathlib.Path(self._folder.name)
        if key is not None:
            image += ',tls-creds=tls'
            (folder / 'keys.psk').write_text('%s:%s\n' % (
                opened['username'], key))
            tls = ['--object', 'tls-creds-psk,id=tls,endpoint=client,'
                   'username=%s,dir=/var/lib/nova/%s' % (
                       opened['username'], folder.name)]
        self._process = host.popen(
            ['qemu-io', *tls, '--image-opts', image], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)

    def begin(self, command) -> str:
        """:returns: the first line that it has said"""
        self._process.stdin.write(command + '\n')
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def do(self, *commands) -> str:
        """:returns: what it has said in the end"""
        return self._process.communicate(
            ''.join(command + '\n' for command in commands), timeout=60)[0]

    def close(self):
        machine.kill(self._process)
        self._process.communicate()
        self._folder.cleanup()


class TestExports(AttackCase):
    """What goes to the NBD server, with and without its key."""

    def client(self, opened, key=None):
        found = Client(self.a, opened, key)
        self.addCleanup(found.close)
        return found

    def open(self, server, migration, disk='disk.eph0'):
        return self.answered(
            server, migration, 'open', pool=POOL, connections=1, aes=False,
            volume='%s_%s' % (server.id, disk))

    def assert_logged(self, text):
        self.wait_for(lambda: text in self.logged(), 90,
                      'a line of host-b with "%s"' % text)

    def test_keys(self):
        server, before, migration = self.middle()
        place = {'pool': POOL, 'volume': server.id + '_disk.eph0'}
        with self.held_up():
            opened = self.open(server, migration)
            failed = 'qemu-nbd: option negotiation failed: '
            what = 'qemu-nbd for volume %s of migration %d from host host-a, '\
                'port %d: %s' % (place['volume'], migration, opened['port'],
                                 failed)
            length = len(self.content(server, 'disk.eph0'))
            # No key, another one, and what is no NBD
            self.assertNotIn('wrote', self.client(opened).do('write 0 4k'))
            self.assertNotIn('wrote', self.client(opened, '00' * 32).do(
                'write 0 4k'))
            self.a.run(['timeout', '5', 'bash', '-c', 'head -c 65536 '
                        '/dev/urandom > /dev/tcp/%(address)s/%(port)d' %
                        opened], check=False)
            # The key of one disk doesn't open another one.
            port = self.port_of_root(server)
            self.assertNotEqual(port, opened['port'])
            self.assertNotIn('wrote', self.client(
                {**opened, 'port': port}, opened['key']).do(
                    'write -P 5 0 4k'))
            # The right one does; nobody can come with it afterwards.
            held = self.client(opened, opened['key'])
            self.assertIn('wrote', held.begin('write -P 0 0 4k'))
            self.answered(server, migration, 'connected', **place)
            late = self.client(opened, opened['key'])
            self.assertNotIn('wrote', late.do('write -P 5 0 4k'))
            # Not more than the disk
            held.begin('write -P 5 %d 4k' % (1 << 40))
            self.assertEqual(length, len(self.content(server, 'disk.eph0')))
            # Whoever held a connection writes nothing when it is closed.
            self.answered(server, migration, 'close', **place)
            self.assertNotIn('wrote', held.do('write -P 5 0 4k', 'flush'))
            self.assertEqual(bytes(length),
                             self.content(server, 'disk.eph0'))
        self.finishes(server, before)
        said = self.logged()
        for text in (
                what + 'TLS handshake failed', what + 'Unknown client flags',
                'port %d: %sTLS handshake failed' % (port, failed),
                'Volume %s of storage pool %s is closed' % (
                    place['volume'], POOL)):
            self.assertIn(text, said)
        # It looks for the key with each connection, more than once.
        self.assertRegex(said, re.escape(what) + (
            '(TLS handshake failed: Error in password/key file|'
            'Cannot set PSK server credentials)'))

    def port_of_root(self, server):
        found = [line for line in self.logged().splitlines()
                 if 'Volume %s_disk of' % server.id in line and
                 'is open for host' in line]
        return int(found[-1].split('on port ')[1].split()[0])

    def test_written_by_somebody_else(self):
        """Bytes that the copy has not sent are found before the start."""
        server, _before, migration = self.middle()
        place = {'pool': POOL, 'volume': server.id + '_disk.eph0'}
        hole = self.hole(server, 'disk.eph0')
        with self.held_up():
            opened = self.open(server, migration)
            self.assertIn('wrote', self.client(opened, opened['key']).do(
                'write -P 5 %d 4k' % hole, 'flush'))
            self.answered(server, migration, 'close', **place)
            self.assertEqual(
                b'\5' * 4096,
                self.content(server, 'disk.eph0')[hole:hole + 4096])
        found = self.settled(server)
        self.assertEqual('ERROR', found.status)
        self.assert_logged('its checksum is')
        self.assert_nothing_open()
        # libvirt, which could copy it again, listens to nobody.
        with self.assertRaisesRegex(ServerError, 'copy is whole'):
            server.hard_reboot()

    def test_silence(self):
        """A disk that is opened and not written to is closed again."""
        server, before, migration = self.middle()
        opened = self.open(server, migration)
        # Nobody on host-a puts an end to it, nor goes on.
        with self.a.paused('nova-compute'):
            self.wait_for(
                lambda: 'port %d, was ended: it has done nothing for %d '
                'seconds' % (opened['port'], self.stall) in self.logged(),
                self.stall + 120, 'the end of a silent export')
        found = self.settled(server)
        if found.status == 'VERIFY_RESIZE':
            self.finishes(server, before)
        else:
            # The copy of the root disk was held up for as long.
            self.assert_stayed(server, before)
        self.assert_nothing_open()


class TestHeaders(AttackCase):
    """A disk that is no more than it should be until it was checked here."""

    @staticmethod
    def backing(disk):
        disk.seek(CLUSTER // 2)
        disk.write(SECRET.encode())
        disk.seek(8)
        disk.write(struct.pack('>QI', CLUSTER // 2, len(SECRET)))

    @staticmethod
    def data_file(disk):
        # Version 3, of which libvirt makes 2; one incompatible feature
        disk.seek(4)
        disk.write(struct.pack('>I', 3))
        disk.seek(72)
        disk.write(struct.pack('>QQQII', 4, 0, 0, 4, 104))
        name = SECRET.encode().ljust(-(-len(SECRET) // 8) * 8, b'\0')
        disk.write(struct.pack('>II', 0x44415441, len(SECRET)) + name +
                   bytes(8))

    @staticmethod
    def snapshot(disk):
        disk.seek(60)
        disk.write(struct.pack('>IQ', 1, CLUSTER))

    @staticmethod
    def encryption(disk):
        disk.seek(32)
        disk.write(struct.pack('>I', 1))

    def arrives(self, spoil, text):
        server, _before, _migration = self.middle()
        path = self.a.path('%s/%s_disk.eph0' % (DISKS, server.id))
        with self.held_up(), open(path, 'r+b') as disk:
            self.assertEqual(b'QFI\xfb', disk.read(4))
            before = os.fstat(disk.fileno()).st_size
            spoil(disk)
            self.assertEqual(before, os.fstat(disk.fileno()).st_size)
        found = self.settled(server)
        self.assertEqual('ERROR', found.status)
        said = [line for line in self.logged().splitlines()
                if server.id in line and text in line]
        self.assertTrue(said, 'nothing of "%s" is in the log' % text)
        with contextlib.closing(self.b.connect()) as connection:
            self.assertNotIn(server.id, [
                domain.UUIDString()
                for domain in connection.listAllDomains()])
        self.assert_nothing_open()

    def test_backing_file(self):
        self.arrives(self.backing, SECRET)

    def test_data_file(self):
        self.arrives(self.data_file, 'data_file')

    def test_internal_snapshot(self):
        self.arrives(self.snapshot, 'internal snapshots')

    def test_encryption(self):
        self.arrives(self.encryption, 'encrypted')
