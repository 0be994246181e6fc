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
"""A real qemu-nbd, and clients that may and may not write to it."""

import contextlib
import decimal
import errno
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from unittest import mock

from cryptography.hazmat.primitives import serialization
import fixtures
from oslo_serialization import jsonutils

import nova.conf
from nova import exception
from nova import test
from nova.virt.libvirt.storage.intake import export
from nova.virt.libvirt.storage.intake import guard
from nova.virt.libvirt.storage.intake import keys
from nova.virt.libvirt.storage.intake import listener

CONF = nova.conf.CONF

SIZE = 1 << 20
WHAT = 'volume it_disk of migration 7 from host source'


def wait_for(condition, timeout=10):
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError('%s after %d seconds' % (condition, timeout))
        time.sleep(0.02)


class Client:
    """QEMU's own client, in a process; a line of commands at a time."""

    def __init__(self, port, directory, secure=True):
        image = 'driver=nbd,server.type=inet,server.host=127.0.0.1,'\
            'server.port=%d' % port
        tls = []
        if secure:
            image += ',tls-creds=tls'
            tls = ['--object', 'tls-creds-psk,id=tls,endpoint=client,'
                   'username=%s,dir=%s' % (keys.USERNAME, directory)]
        self.process = subprocess.Popen(
            ['qemu-io', *tls, '--image-opts', image], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)

    def do(self, *commands):
        """:returns: what it has said in the end"""
        return self.process.communicate(
            ''.join(command + '\n' for command in commands), timeout=30)[0]

    def begin(self, command):
        """Do the first of several commands, and stay connected."""
        self.process.stdin.write(command + '\n')
        self.process.stdin.flush()


class ExportTestBase(test.NoDBTestCase):
    server = export.QEMU
    tls_error = 'TLS handshake'

    def setUp(self):
        super().setUp()
        self.flags(storage_migration_nbd_server=self.server, group='libvirt')
        for program in (self.server, 'qemu-io'):
            if shutil.which(program) is None:
                self.skipTest('%s is not installed' % program)
        self.directory = self.useFixture(fixtures.TempDir()).path
        self.flags(state_path=self.directory)
        self.path = self.make_file('volume')
        self.exports = []
        self.addCleanup(lambda: [found.end() for found in self.exports])

    def make_file(self, name, length=SIZE):
        path = os.path.join(self.directory, name)
        with open(path, 'wb') as f:
            f.truncate(length)
        return path

    def export(self, path=None, connections=1, has_aes=True):
        found = export.Export(export.Order(
            path or self.path, connections, has_aes, WHAT), '127.0.0.1')
        self.exports.append(found)
        found.start()
        return found

    def client(self, found, key=None, **kwargs):
        directory = self.useFixture(fixtures.TempDir()).path
        with open(os.path.join(directory, 'keys.psk'), 'w') as f:
            f.write('%s:%s\n' % (keys.USERNAME, key or found.key))
        client = Client(found.port, directory, **kwargs)

        def end():
            client.process.kill()
            client.process.communicate()
        self.addCleanup(end)
        return client

    def content(self, offset=0, length=4):
        with open(self.path, 'rb') as f:
            f.seek(offset)
            return f.read(length)

    def pid(self, found):
        return found._pid()

    def is_gone(self, pid):
        return not export._is_alive(pid)

    def assert_untouched(self):
        self.assertEqual((SIZE, b'\0' * SIZE),
                         (os.path.getsize(self.path),
                          self.content(length=2 * SIZE)))

    def assert_logged(self, *texts):
        wait_for(lambda: (
            [found.is_running() for found in self.exports],
            all(text in self.stdlog.logger.output for text in texts))[1])


class ExportTestCase(ExportTestBase):

    def test_write(self):
        found = self.export()
        self.assertIn('wrote 65536', self.client(found).do(
            'write -P 5 64k 64k', 'flush'))
        self.assertEqual(b'\5' * 4, self.content(65536))
        # The last one has left.
        wait_for(lambda: not found.is_running())
        found.end()
        self.assertEqual([], os.listdir(keys.root()))

    def test_zeroes_become_holes(self):
        found = self.export()
        self.client(found).do('write -P 5 0 1M', 'write -z -u 0 512k',
                              'flush')
        wait_for(lambda: not found.is_running())
        self.assertLessEqual(os.stat(self.path).st_blocks * 512, SIZE // 2)

    def test_cipher_without_aes(self):
        self.assertIn('wrote', self.client(self.export(has_aes=False)).do(
            'write -P 5 0 4k'))

    def test_length_that_is_no_multiple_of_a_sector(self):
        self.path = self.make_file('odd', SIZE + 100)
        found = self.export()
        self.client(found).do('write -P 5 1M 512', 'flush')
        found.end()
        self.assertEqual(SIZE + 100, os.path.getsize(self.path))
        self.assertEqual(b'\5' * 4, self.content(SIZE))

    def test_key_is_nova_s_alone(self):
        self.export()
        (directory,) = keys.root().iterdir()
        self.assertEqual(
            [0o700, 0o700, 0o600],
            [os.stat(path).st_mode & 0o777 for path in (
                keys.root(), directory, directory / 'keys.psk')])

    def test_no_delayed_acks(self):
        with listener.listen('127.0.0.1', 1) as found:
            self.assertTrue(found.getsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY))

    @staticmethod
    def free_ports():
        """:returns: the first of two ports that nobody has, side by side"""
        while True:
            # Below those which the kernel gives to connections.
            first = random.randrange(20000, 32000)
            with contextlib.ExitStack() as stack:
                try:
                    for port in (first, first + 1):
                        stack.enter_context(socket.socket()).bind(
                            ('127.0.0.1', port))
                    return first
                except OSError:
                    continue

    def test_ports(self):
        first = self.free_ports()
        self.flags(storage_migration_nbd_port_min=first,
                   storage_migration_nbd_port_max=first + 1, group='libvirt')
        self.assertEqual({first, first + 1}, {
            self.export(self.make_file(name)).port for name in 'ab'})
        e = self.assertRaises(exception.StorageIntakeError,
                              self.export, self.make_file('c'))
        self.assertIn('storage_migration_nbd_port_min', str(e))
        self.assertEqual(2, len(os.listdir(keys.root())))

    def test_address_of_another_host(self):
        e = self.assertRaises(exception.StorageIntakeError, listener.listen,
                              '192.0.2.7', 1)
        self.assertIn('migration_inbound_addr', str(e))
        e = self.assertRaises(exception.StorageIntakeError, listener.listen,
                              'no such name', 1)
        self.assertIn('migration_inbound_addr', str(e))

    def test_files_that_are_not_for_it(self):
        link = os.path.join(self.directory, 'link')
        os.symlink(self.path, link)
        second = self.make_file('second')
        os.link(second, second + '.too')
        fifo = os.path.join(self.directory, 'fifo')
        os.mkfifo(fifo)
        for path in (link, second, self.directory, '/dev/null', fifo):
            e = self.assertRaises(exception.StorageIntakeError,
                                  self.export, path)
            self.assertIn('no file of nova\'s own', str(e))
            self.assertRaises(exception.StorageIntakeError,
                              export.cut, path, 0)

    def test_cut(self):
        export.cut(self.path, SIZE)
        self.assertEqual(SIZE, os.path.getsize(self.path))
        export.cut(self.path, 700)
        self.assertEqual(700, os.path.getsize(self.path))
        for length in (701, -1):
            e = self.assertRaises(exception.StorageIntakeError,
                                  export.cut, self.path, length)
            self.assertIn('has 700 bytes', str(e))
        self.assertEqual(700, os.path.getsize(self.path))

    def test_cut_while_another_host_swaps_the_file(self):
        outside = self.make_file('outside')
        truncate = os.truncate

        def late(*args):
            os.rename(self.path, self.path + '.away')
            os.symlink(outside, self.path)
            truncate(*args)

        with mock.patch('os.truncate', side_effect=late) as mocked:
            export.cut(self.path, 700)
        mocked.assert_called_once()
        self.assertEqual([SIZE, 700], [os.path.getsize(path) for path in (
            outside, self.path + '.away')])


class GroupTestCase(ExportTestBase):
    """QEMU makes a group of its own if it is given none."""

    def test_group_is_not_made_anew(self):
        # RFC 7919, A.1, has how it is made from the base of natural logarithms
        group = serialization.load_pem_parameters(
            keys._GROUP.encode()).parameter_numbers()
        with decimal.localcontext(decimal.Context(prec=700)):
            e = int(decimal.Decimal(1).exp() * 2 ** 1918)
        self.assertEqual(
            (2, 2 ** 2048 - 2 ** 1984 + (e + 560316) * 2 ** 64 - 1),
            (group.g, group.p))

    def test_qemu_takes_that_group(self):
        with mock.patch.object(keys, '_GROUP', 'none'):
            self.export()
        self.assert_logged('DH parameters')

    def test_newer_qemu_needs_no_group(self):
        found = self.export()
        found._take(jsonutils.dump_as_bytes({
            'said': "qemu-nbd: warning: Use of an external DH parameters file "
            "'dh-params.pem' is deprecated and will be removed in a future "
            "release"}))
        self.assertNotIn('deprecated', self.stdlog.logger.output)


class EndTestCase(ExportTestBase):

    def test_silence(self):
        with fixtures.MonkeyPatch(
                'nova.virt.libvirt.storage.intake.export.stall_timeout',
                lambda: 1):
            found = self.export()
        pid = self.pid(found)
        self.assert_logged('it has done nothing for', WHAT)
        self.assertTrue(self.is_gone(pid))

    def test_closed_before_it_is_started(self):
        found = export.Export(export.Order(self.path, 1, True, WHAT),
                              '127.0.0.1')
        self.assertTrue(found.is_running())
        found.end()
        self.assertFalse(found.is_running())
        e = self.assertRaises(exception.StorageIntakeError, found.start)
        self.assertIn('was closed while it was opened', str(e))
        self.assertEqual(0, found.port)
        self.assertEqual([], os.listdir(keys.root()))

    def test_closed_while_it_starts(self):
        started = threading.Event()
        found = export.Export(export.Order(self.path, 1, True, WHAT),
                              '127.0.0.1')
        start = found._start

        def begin(listening):
            started.set()
            # The others have no time for that.
            time.sleep(0.3)
            start(listening)

        with mock.patch.object(found, '_start', side_effect=begin):
            thread = threading.Thread(target=found.start)
            thread.start()
            self.assertTrue(started.wait(30))
            before = time.monotonic()
            self.assertTrue(found.is_running())
            self.assertLess(time.monotonic() - before, 0.2)
            found.end()
        thread.join()
        self.assertTrue(self.is_gone(self.pid(found)))

    def test_guard_is_killed(self):
        found = self.export()
        pid = self.pid(found)
        os.kill(found.guard.pid, signal.SIGKILL)
        wait_for(lambda: self.is_gone(pid))
        found.end()

    def test_nova_compute_is_killed(self):
        found = self.export()
        pid = self.pid(found)
        # which closes this
        found.guard.stdin.close()
        wait_for(lambda: self.is_gone(pid))

    def test_guard_that_hangs(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.intake.export._END_TIMEOUT', 0.5))
        found = self.export()
        pid = self.pid(found)
        os.kill(found.guard.pid, signal.SIGSTOP)
        found.end()
        self.assertTrue(self.is_gone(pid))

    def test_process_that_does_not_end(self):
        # It waits for its disk, say, and can't be killed.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.intake.export._END_TIMEOUT', 0.3))
        for number in (signal.SIGSTOP, signal.SIGKILL):
            found = self.export()
            os.kill(found.guard.pid, number)
            with mock.patch.object(export, '_is_alive', autospec=True,
                                   return_value=True):
                for _n in range(2):
                    self.assertRaises(
                        exception.StorageIntakeError, found.end)
            found.end()
            self.assertTrue(self.is_gone(self.pid(found)))

    def test_file_that_is_gone(self):
        found = self.export()
        os.unlink(self.path)
        found.end()
        self.assertFalse(found.is_running())

    def test_program_that_does_not_start(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.intake.export.command',
            lambda *args: ['no-such-nbd']))
        found = self.export()
        wait_for(lambda: not found.is_running())
        self.assert_logged('no-such-nbd')


class AttackTestCase(ExportTestBase):
    """What somebody tries who reaches the port."""

    def test_other_key(self):
        found = self.export()
        self.client(found, key='ab' * 32).do('write -P 66 0 4k')
        self.assert_logged('port %d' % found.port, WHAT, self.tls_error)
        self.assert_untouched()
        # Who has the right one isn't kept out.
        self.assertIn('wrote', self.client(found).do('write -P 5 0 4k'))

    def test_key_of_another_disk(self):
        found, other = self.export(), self.export(self.make_file('other'))
        self.client(found, key=other.key).do('write -P 66 0 4k')
        self.assert_logged('port %d' % found.port, self.tls_error)
        self.assert_untouched()

    def test_no_key(self):
        found = self.export()
        self.client(found, secure=False).do('write -P 66 0 4k')
        self.assert_untouched()
        self.assertTrue(found.is_running())

    def test_key_that_was_used(self):
        found = self.export()
        source = self.client(found)
        source.begin('write -P 5 0 4k')
        wait_for(lambda: self.content() == b'\5' * 4)
        found.connected()
        self.client(found).do('write -P 66 0 4k')
        self.assert_logged(self.tls_error)
        self.assertEqual(b'\5' * 4, self.content())
        # The connection that stands goes on.
        self.assertIn('wrote', source.do('write -P 6 4k 4k', 'flush'))
        self.assertEqual(b'\6' * 4, self.content(4096))

    def test_writing_after_the_end(self):
        found = self.export()
        source = self.client(found)
        source.begin('write -P 5 0 4k')
        wait_for(lambda: self.content() == b'\5' * 4)
        found.end()
        source.do('write -P 66 0 4k', 'flush')
        self.assertEqual(b'\5' * 4, self.content())

    def test_more_than_there_is(self):
        found = self.export()
        client = self.client(found)
        client.do('write -P 66 1M 64k', 'write -P 66 960k 128k',
                  'truncate 64M', 'write -z 900k 1M', 'flush')
        wait_for(lambda: not found.is_running())
        self.assert_untouched()

    def test_answers_that_nobody_takes(self):
        """Of each connection qemu-nbd would keep 512 MiB of them."""
        pid = self.pid(self.export())
        wait_for(lambda: resource.prlimit(
            pid, resource.RLIMIT_DATA)[0] == 1 << 30 and resource.prlimit(
                pid, resource.RLIMIT_STACK)[0] <= 8 << 20)

    def test_silent_connections(self):
        with fixtures.MonkeyPatch(
                'nova.virt.libvirt.storage.intake.export.stall_timeout',
                lambda: 2):
            found = self.export()
        for _n in range(12):
            silent = socket.create_connection(('127.0.0.1', found.port))
            self.addCleanup(silent.close)
        self.assert_logged('it has done nothing for')
        self.assertTrue(self.is_gone(self.pid(found)))
        self.assert_untouched()

    def test_malformed_nbd(self):
        found = self.export()
        for garbage in (b'\0' * 4096, b'\xff' * 4096, b'GET / HTTP/1.0\r\n',
                        b'\0\0\0\3IHAVEOPT\0\0\0\5\xff\xff\xff\xff',
                        b'\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\0'):
            with socket.create_connection(
                    ('127.0.0.1', found.port)) as bad:
                bad.settimeout(30)
                bad.recv(64)
                try:
                    bad.sendall(garbage)
                    bad.shutdown(socket.SHUT_WR)
                    while bad.recv(4096):
                        pass
                except OSError:
                    pass
        self.assert_logged('port %d' % found.port, WHAT)
        self.assert_untouched()
        self.assertIn('wrote', self.client(found).do('write -P 5 0 4k'))

    def test_flood_of_errors(self):
        found = self.export()
        for _n in range(3 * guard._MOST_LINES):
            with socket.create_connection(('127.0.0.1', found.port)) as bad:
                bad.recv(64)
                bad.sendall(b'\xff' * 64)
        self.assertIn('wrote', self.client(found).do('write -P 5 0 4k'))
        found.end()
        self.assertLessEqual(
            self.stdlog.logger.output.count(WHAT), guard._MOST_LINES + 1)

    def test_other_files(self):
        """What qemu-nbd could open, if somebody had taken it over."""
        if not guard.can_confine():
            self.skipTest('this kernel has no landlock')
        secret = self.make_file('secret')

        def command(path, key_directory, order):
            return ['sh', '-c', 'cat %s && echo yes; echo no >> %s; '
                    'cat %s >&2; printf it | dd of=%s conv=notrunc && '
                    'echo written >&2; head -c 9 /etc/passwd >> %s' % (
                        secret, secret, '/etc/passwd', path, path)]

        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.intake.export.command', command))
        found = self.export()
        wait_for(lambda: not found.is_running())
        said = self.stdlog.logger.output
        for path in (secret, '/etc/passwd'):
            self.assertRegex(said, r'%s: Permission denied' % path)
        self.assertNotIn('root:', said)
        self.assertIn('written', said)
        self.assertEqual(SIZE, os.path.getsize(secret))
        # It doesn't become larger either.
        self.assertEqual((SIZE, b'it'), (os.path.getsize(self.path),
                                         self.content(length=2)))

    def test_other_processes(self):
        """Those of nova-compute are of the same user."""
        if not guard.can_confine() or guard.landlock_version() < 6:
            self.skipTest('this kernel does not keep signals in')
        if not os.path.exists('/usr/bin/python3'):
            self.skipTest('there is no Python that it may read')
        other = subprocess.Popen(['sleep', '60'])
        self.addCleanup(other.wait)
        self.addCleanup(other.kill)
        path = '\0nova-test-%d' % other.pid
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.intake.export.command',
            lambda *args: ['/usr/bin/python3', '-c', """if True:
                import os, socket
                for act in (
                        lambda: os.kill(%d, 9),
                        lambda: socket.socket(socket.AF_UNIX).connect(%r)):
                    try:
                        act()
                    except PermissionError as e:
                        os.write(2, b'refused %%r\\n' %% str(e).encode())
                """ % (other.pid, path)]))
        listening = socket.socket(socket.AF_UNIX)
        self.addCleanup(listening.close)
        listening.bind(path)
        listening.listen()
        found = self.export()
        wait_for(lambda: not found.is_running())
        self.assertIsNone(other.poll())
        self.assertEqual(2, self.stdlog.logger.output.count('refused'))


class SharedPoolTestCase(ExportTestBase):
    """What another host tries that has mounted the same pool.

    It puts links to nova's own files in the place of a volume.
    """

    def setUp(self):
        super().setUp()
        self.outside = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'secret')
        with open(self.outside, 'wb') as f:
            f.write(b's' * 2 * SIZE)

    def new(self):
        found = export.Export(export.Order(self.path, 1, True, WHAT),
                              '127.0.0.1')
        self.exports.append(found)
        return found

    def swap(self):
        """Have a link at the volume's path, which is elsewhere now."""
        volume = self.path + '.away'
        os.rename(self.path, volume)
        os.symlink(self.outside, self.path)
        self.path = volume

    def assert_outside_untouched(self):
        with open(self.outside, 'rb') as f:
            self.assertEqual(b's' * 2 * SIZE, f.read())

    def assert_volume_is_served(self, found):
        said = self.client(found).do('read -P 0 0 4k', 'write -P 5 0 4k',
                                     'flush')
        self.assertIn('wrote 4096', said)
        self.assertNotIn('verification failed', said)
        found.end()
        self.assertEqual(b'\5' * 4, self.content())
        self.assert_outside_untouched()

    def test_swapped_after_it_was_checked(self):
        found = self.new()
        self.swap()
        found.start()
        self.assert_volume_is_served(found)

    def test_swapped_while_it_starts(self):
        # nbdkit may know its path by then, which it may not open any more.
        found = self.export()
        self.swap()
        self.client(found).do('write -P 66 0 4k', 'flush')
        found.end()
        self.assert_outside_untouched()

    def test_deleted_after_it_was_checked(self):
        found = self.new()
        os.unlink(self.path)
        os.symlink(self.outside, self.path)
        with contextlib.suppress(exception.StorageIntakeError):
            found.start()
            self.client(found).do('write -P 66 0 4k', 'flush')
        found.end()
        self.assert_outside_untouched()

    def test_swapped_before_its_end(self):
        found = self.export()
        os.truncate(self.path, SIZE + 512)
        self.swap()
        found.end()
        self.assertEqual(SIZE, os.path.getsize(self.path))
        self.assert_outside_untouched()

    def holders(self, pid='self'):
        """How many descriptors of the volume a process has."""
        found = 0
        for fd in os.listdir('/proc/%s/fd' % pid):
            with contextlib.suppress(FileNotFoundError):
                found += os.path.samefile(
                    '/proc/%s/fd/%s' % (pid, fd), self.path)
        return found

    def test_nobody_holds_the_file_any_more(self):
        found = self.export()
        self.assertEqual([1, 0], [
            self.holders(), self.holders(found.guard.pid)])
        found.end()
        self.assertEqual(0, self.holders())
        found = self.new()
        with mock.patch.object(found, '_start', side_effect=OSError):
            self.assertRaises(OSError, found.start)
        self.assertEqual(0, self.holders())
        found = self.new()
        found.end()
        self.assertEqual(0, self.holders())
        with mock.patch.object(keys, 'KeyDirectory', side_effect=OSError):
            self.assertRaises(OSError, self.new)
        self.assertEqual(0, self.holders())
        os.link(self.path, self.path + '.too')
        self.assertRaises(exception.StorageIntakeError, self.new)
        self.assertEqual(0, self.holders())

    def test_file_that_is_held_is_gone(self):
        # As NFS says it where another host has deleted it.
        found = self.export()
        os.truncate(self.path, SIZE + 512)
        with mock.patch('os.truncate', side_effect=OSError(
                errno.ESTALE, 'stale')):
            found.end()
        self.assertEqual(0, self.holders())


class WithoutLandlockTestCase(SharedPoolTestCase):

    def setUp(self):
        super().setUp()
        with open(export._GUARD) as f:
            text = f.read()
        self.assertEqual(1, text.count('return landlock_version() > 0'))
        path = self.make_file('guard.py')
        with open(path, 'w') as f:
            f.write(text.replace(
                'return landlock_version() > 0', 'return False'))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.intake.export._GUARD', path))

    def test_nothing_else_than_the_descriptor_holds_it(self):
        self.export()
        self.assert_logged('has no landlock')


class NbdkitTestBase(ExportTestBase):
    server = export.NBDKIT
    tls_error = 'gnutls_handshake'


class NbdkitTestCase(NbdkitTestBase, ExportTestCase):

    def test_length_that_is_no_multiple_of_a_sector(self):
        # It is left as it is; QEMU's client asks for whole sectors.
        self.path = self.make_file('odd', SIZE + 100)
        found = self.export()
        self.client(found).do('write -P 5 0 512', 'write -P 5 1M 512',
                              'flush')
        found.end()
        self.assertEqual(SIZE + 100, os.path.getsize(self.path))
        self.assertEqual((b'\5' * 4, bytes(4)),
                         (self.content(), self.content(SIZE)))

    def test_what_it_may_use_of_tls(self):
        for has_aes in (True, False):
            self.export(self.make_file(str(has_aes)), has_aes=has_aes)
        policies = [(path / 'policy').read_text()
                    for path in keys.root().iterdir()]
        self.assertEqual([False, True], sorted(
            'CHACHA20' in policy for policy in policies))
        for policy in policies:
            self.assertIn('disabled-version = tls1.2', policy)


class NbdkitEndTestCase(NbdkitTestBase, EndTestCase):
    pass


class NbdkitAttackTestCase(NbdkitTestBase, AttackTestCase):
    pass


class NbdkitSharedPoolTestCase(NbdkitTestBase, SharedPoolTestCase):
    pass


class ProgramTestCase(test.NoDBTestCase):

    def test_nbdkit_is_not_left_without_landlock(self):
        for server, can_confine, expected in (
                (export.NBDKIT, True, export.NBDKIT),
                (export.NBDKIT, False, export.QEMU),
                (export.QEMU, False, export.QEMU)):
            self.flags(storage_migration_nbd_server=server, group='libvirt')
            with mock.patch.object(guard, 'can_confine', autospec=True,
                                   return_value=can_confine):
                self.assertEqual(expected, export.program())
