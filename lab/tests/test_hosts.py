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

"""The level hosts of the lab, against real daemons."""

import contextlib
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock

import ddt
import libvirt

import lab
from lab import config
from lab import guide
from lab import hosts
from lab import lock
from lab import network
from lab import preflight
from lab import process
from lab import roots
from lab import state

MIB = 1 << 20
# A guest without a disk waits in its firmware, which is all that is asked.
DOMAIN = '''<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>%s
<serial type='file'><source path='/var/lib/nova/console'/></serial>
</devices></domain>'''
POOL = '''<pool type='dir'><name>%s</name><target><path>%s</path></target>
</pool>'''
VOLUME = '''<volume><name>%s</name><capacity>%d</capacity>
<allocation>%d</allocation><target><format type='raw'/></target></volume>'''

libvirt.registerErrorHandler(lambda _context, _error: None, None)


class HostsTest(unittest.TestCase):
    """Two hosts for all tests of a class."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.a, cls.b = cls.enterClassContext(lab.Hosts())

    def virsh(self, host, peer, *words, **more):
        return host.run(['virsh', '-c', host.uri(peer), *words], **more)

    def pool(self, host, name):
        """A dir pool on a host's own file system, gone after the test."""
        path = '/var/lib/nova/' + name
        host.run(['mkdir', '-p', path])
        connection = host.connect()
        self.addCleanup(connection.close)
        pool = connection.storagePoolDefineXML(POOL % (name, path))
        self.addCleanup(host.run, ['rm', '-rf', path])
        self.addCleanup(pool.undefine)
        pool.create()
        self.addCleanup(pool.destroy)
        return pool


@ddt.ddt
class TestConnections(HostsTest):

    def test_each_is_a_machine_of_its_own(self):
        for host in (self.a, self.b):
            self.assertEqual(host.name,
                             host.run(['hostname']).stdout.strip())
            with host.connect() as connection:
                self.assertEqual(host.name, connection.getHostname())
        self.assertNotEqual(*(h.run(['cat', '/etc/machine-id']).stdout
                              for h in (self.a, self.b)))
        self.assertNotEqual(*(h.run(['virsh', 'capabilities']).stdout.partition(
            '</uuid>')[0] for h in (self.a, self.b)))

    def test_machines_files_are_not_the_hosts(self):
        for path in ('/etc/lab-probe', '/var/lib/nova/lab-probe',
                     '/tmp/lab-probe', '/root/lab-probe', '/run/lab-probe'):
            self.a.run(['touch', path])
            self.addCleanup(self.a.run, ['rm', path])
            self.assertTrue(self.a.path(path).exists())
            self.assertFalse(self.b.path(path).exists())
            self.assertFalse(os.path.exists(path))

    def test_tls_both_ways(self):
        for one, other in ((self.a, self.b), (self.b, self.a)):
            self.assertEqual(
                other.name, self.virsh(one, other, 'hostname').stdout.strip())

    def test_volume_made_and_filled_from_the_other_host(self):
        self.pool(self.b, 'across')
        self.a.run(['sh', '-c', 'head -c 3000000 /dev/urandom >/tmp/data'])
        self.addCleanup(self.a.run, ['rm', '/tmp/data'])
        self.virsh(self.a, self.b, 'vol-create-as', 'across', 'disk',
                   '3000000')
        self.virsh(self.a, self.b, 'vol-upload', 'disk', '/tmp/data',
                   '--pool', 'across')
        self.assertEqual(self.a.path('/tmp/data').read_bytes(),
                         self.b.path('/var/lib/nova/across/disk').read_bytes())

    def _refusal(self, host, peer, query=''):
        done = host.run(['virsh', '-c', host.uri(peer) + query, 'uri'],
                        check=False, timeout=20)
        self.assertNotEqual(0, done.returncode, done.stdout)
        return done.stderr

    @ddt.data(
        # kind, what its client says before it connects, what the peer's log
        # says of it, what a peer says that connects to it
        ('none', None, 'No certificate was found', None),
        # GnuTLS does not send one that the peer's CA has not signed.
        ('other-ca', 'not (been )?signed by|failed validation|trust',
         'No certificate was found', "known issuer|not trusted|signer"),
        ('wrong-name', None, 'not on the list of allowed clients',
         'does not match the hostname'),
        ('expired', 'expired', 'certificate is not trusted', 'not trusted'),
        ('revoked', None, 'revoked', 'revoked'))
    @ddt.unpack
    def test_bad_certificate_is_refused(self, kind, own, logged, peers):
        self.addCleanup(self.a.certificate, 'good')
        self.a.certificate(kind)
        log = pathlib.Path(self.b.service('libvirtd').log)
        before = log.stat().st_size
        told = self._refusal(self.a, self.b)
        if own:
            self.assertRegex(told, own)
        if logged:
            # Past the client's own check of its certificate.
            self._refusal(self.a, self.b, '?no_sanity=1')
            self.assertRegex(log.read_text()[before:], logged)
        if peers:
            self.assertRegex(self._refusal(self.b, self.a), peers)
        else:
            self.virsh(self.b, self.a, 'uri')
        bad = [check for check in hosts.status() if not check.ok]
        self.assertIn(('host-a', 'certificate'),
                      [(check.machine, check.what) for check in bad])
        self.a.certificate('good')
        for one, other in ((self.a, self.b), (self.b, self.a)):
            self.virsh(one, other, 'uri')
        self.assertTrue(hosts.healthy())

    def test_every_named_block_of_the_guide_runs(self):
        """Those that the lab's own set-up does not run."""
        named = {name.removeprefix(guide.PREFIX)
                 for name in guide._blocks(guide.find())}
        self.assertEqual({
            'ca', 'crl', 'certificate', 'install', 'install-nova', 'libvirtd',
            'qemu', 'dn', 'check', 'renew', 'revoke',
            # test_sasl.py
            'sasl-principals', 'sasl-install', 'sasl-libvirtd', 'sasl-check',
            'sasl-scram'}, named)
        for one, other in ((self.a, self.b), (self.b, self.a)):
            for peer in (other.name, other.address):
                self.assertEqual(other.name, guide.run(
                    one, 'check', as_nova=True, PEER=peer).strip())
            self.assertIn('CN=' + one.name, guide.run(one, 'dn'))

    def test_renewed_without_a_restart(self):
        before = self.a.service('libvirtd').pid
        serials = []
        for _ in range(2):
            self.a.certificates.issue(self.a)
            guide.run(self.a, 'renew')
            told = self.b.run([
                'gnutls-cli', '--print-cert', '--port=16514',
                '--x509cafile=/etc/pki/CA/cacert.pem', 'host-a'],
                check=False, input='', timeout=20).stdout
            serials.append(re.search(r'serial (0x\w+)', told)[1])
        self.assertNotEqual(*serials)
        self.assertEqual(before, self.a.service('libvirtd').pid)
        self.virsh(self.b, self.a, 'uri')

    def test_daemon_does_not_start_with_an_expired_certificate(self):
        """As the guide says; the lab's faults make an exception."""
        self.addCleanup(self.a.certificate, 'good')
        self.a.certificate('expired')
        self.a.configure(no_sanity=False)
        self.a.restart('libvirtd')
        self.assertRaisesRegex(lab.LabError, 'has ended before listening',
                               self.a.wait_port, config.TLS_PORT, 10,
                               'libvirtd')

    def test_unknown_kind_of_certificate(self):
        self.assertRaisesRegex(lab.LabError, 'there are: good',
                               self.a.certificate, 'better')

    def test_nothing_listens_without_tls(self):
        for host in (self.a, self.b):
            self.assertTrue(host.listening(config.TLS_PORT))
            self.assertFalse(host.listening(16509))
            self.assertFalse(host.listening(22))

    def test_live_migration_over_tls(self):
        with self.a.connect() as here, self.b.connect() as there:
            guest = here.createXML(DOMAIN % ('walker', ''))
            try:
                guest.migrateToURI3(
                    self.a.uri(self.b), {}, libvirt.VIR_MIGRATE_LIVE |
                    libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_TLS)
                self.assertEqual([], here.listAllDomains())
                guest = there.lookupByName('walker')
                self.assertTrue(guest.isActive())
            finally:
                guest.destroy()

    def test_guest_with_emulated_tpm(self):
        with self.a.connect() as here:
            guest = here.createXML(DOMAIN % (
                'sealed', "<tpm model='tpm-crb'><backend type='emulator' "
                "version='2.0'/></tpm>"))
            try:
                self.assertTrue(guest.isActive())
                self.assertIn('swtpm', self.a.run(
                    ['ps', '-A', '-o', 'args']).stdout)
            finally:
                guest.destroy()


@ddt.ddt
class TestSSHAttempts(HostsTest):

    def setUp(self):
        super().setUp()
        self.a.forget_ssh_attempts()

    @ddt.data('ssh', 'scp', 'sftp', 'rsync', '/usr/bin/ssh')
    def test_fails_and_is_recorded(self, name):
        done = self.a.run([name, 'host-b', 'a "b"\n'], check=False)
        self.assertEqual(255, done.returncode)
        self.assertIn('recorded', done.stderr)
        attempt, = self.a.ssh_attempts()
        self.assertEqual([name.rpartition('/')[2], 'host-b', 'a "b"\n'],
                         attempt['command'])
        self.assertEqual('host-a', attempt['host'])
        self.assertEqual([], self.b.ssh_attempts())

    def test_libvirt_over_ssh_is_recorded(self):
        done = self.a.run(['virsh', '-c', 'qemu+ssh://host-b/system', 'list'],
                          check=False)
        self.assertNotEqual(0, done.returncode)
        attempt, = self.a.ssh_attempts()
        self.assertEqual('ssh', attempt['command'][0])

    def test_unprivileged_user_is_recorded(self):
        self.a.run(['setpriv', '--reuid=nobody', '--clear-groups', 'scp', 'x'],
                   check=False)
        attempt, = self.a.ssh_attempts()
        self.assertNotEqual(0, attempt['uid'])


class TestFaults(HostsTest):

    def _hangs(self, host, peer):
        with self.assertRaises(subprocess.TimeoutExpired):
            self.virsh(host, peer, 'uri', timeout=2)

    def test_killed_and_started_again(self):
        before = self.b.service('libvirtd').pid
        with self.b.connect() as connection:
            guest = connection.createXML(DOMAIN % ('survivor', ''))
            self.b.kill('libvirtd')
            self.assertFalse(self.b.service('libvirtd').alive())
            self.assertFalse(hosts.healthy())
        self.assertRaisesRegex(lab.LabError, 'does not run on host-b',
                               self.b.pause, 'libvirtd')
        self.b.restart('libvirtd')
        self.b.wait_ready()
        self.assertNotEqual(before, self.b.service('libvirtd').pid)
        with self.b.connect() as connection:
            guest = connection.lookupByName('survivor')
            self.assertTrue(guest.isActive())
            # libvirtd may still be about to meet it again.
            with contextlib.suppress(libvirt.libvirtError):
                guest.destroy()
            self.assertEqual([], connection.listAllDomains())
        self.assertTrue(hosts.healthy())

    def test_paused(self):
        with self.b.paused('libvirtd'):
            self.assertTrue(self.b.service('libvirtd').paused())
            self._hangs(self.a, self.b)
        self.virsh(self.a, self.b, 'uri')

    def test_unknown_service(self):
        self.assertRaisesRegex(lab.LabError, 'host-a has no service cupsd',
                               self.a.restart, 'cupsd')

    def test_service_that_does_not_start(self):
        self.assertRaisesRegex(lab.LabError, 'there is no no-such-program',
                               self.a.start, 'x', ['no-such-program'])
        self.a.start('short', ['sh', '-c', 'echo sorry; sleep 0.1; exit 3'])
        with self.assertRaisesRegex(lab.LabError, 'short on host-a has ended '
                                    'before listening on port 99') as caught:
            self.a.wait_port(99, 10, 'short')
        self.assertIn('sorry', pathlib.Path(caught.exception.log).read_text())
        (config.STATE / 'services/host-a/short.json').unlink()

    def test_stop_takes_children_that_ignore_it(self):
        # Some daemons make a session of their own: nova-conductor does.
        for first in ([], ['setsid']):
            self.a.start('stubborn', [*first, 'sh', '-c', 'trap "" TERM; '
                                      'sleep 1000 & sleep 1000'])
            service = self.a.service('stubborn')
            self.a.wait(lambda: len(service.members()) == 4, 5,
                        'whole', 'stubborn')
            members = service.members()
            self.a.stop('stubborn', timeout=0.2)
            (config.STATE / 'services/host-a/stubborn.json').unlink()
            self.assertFalse(service.alive())
            self.assertEqual([], [m for m in members if m.alive()])

    def test_link_cut(self):
        with self.b.link.as_cut():
            self.assertEqual('cut', self.b.link.faulty())
            self._hangs(self.a, self.b)
        self.assertEqual('', self.b.link.faulty())
        self.virsh(self.a, self.b, 'uri')

    def _seconds_of(self, size):
        """The time that bytes take from a to b."""
        receiver = self.b.popen(
            [sys.executable, '-c', 'import socket\n'
             's = socket.create_server(("", 5001)).accept()[0]\n'
             'n = 0\n'
             'while part := s.recv(1 << 16): n += len(part)\n'
             'print(n)'], stdout=subprocess.PIPE, text=True)
        self.b.wait(lambda: self.b.listening(5001), 10, 'listening')
        start = time.monotonic()
        self.a.run([sys.executable, '-c', 'import socket\n'
                    's = socket.create_connection(("host-b", 5001))\n'
                    's.sendall(bytes(%d))' % size])
        self.assertEqual(str(size), receiver.communicate()[0].strip())
        return time.monotonic() - start

    def test_link_slow(self):
        # 4 MiB at 20 Mbit/s take 1.7 s; a burst may pass before.
        with self.b.link.slowed('20mbit'):
            self.assertEqual('slowed', self.b.link.faulty())
            self.assertGreater(self._seconds_of(4 * MIB), 1.3)
        self.assertLess(self._seconds_of(4 * MIB), 1.3)

    def _round_trip(self):
        """The least of a few, in milliseconds."""
        told = self.a.run([sys.executable, '-c', '''
import socket, time
def once():
    start = time.monotonic()
    with socket.socket() as s:
        s.settimeout(5)
        s.connect_ex(("host-b", 9))
    return time.monotonic() - start
print(1000 * min(once() for _ in range(4)))''']).stdout
        return float(told)

    def test_link_delay(self):
        self.b.link.delay(50)
        try:
            self.assertEqual('delayed', self.b.link.faulty())
            self.assertGreater(self._round_trip(), 100)
            self.assertLess(self._round_trip(), 200)
            self.virsh(self.a, self.b, 'uri')
            self._seconds_of(MIB)
        finally:
            self.b.link.restore()
        self.assertEqual('', self.b.link.faulty())
        self.assertLess(self._round_trip(), 50)

    def test_disk_full(self):
        pool = self.pool(self.b, 'fillable')
        for leave in (0, 10 * MIB):
            available = self.b.fill('fillable', leave)
            self.assertLessEqual(available, leave + 64 * 1024)
            self.assertGreaterEqual(available, leave - MIB)
            pool.refresh()
            self.assertEqual([], pool.listVolumes())
            self.assertLessEqual(pool.info()[3], leave + 64 * 1024)
            with self.assertRaises(libvirt.libvirtError) as caught:
                pool.createXML(VOLUME % ('big', 20 * MIB, 20 * MIB))
            self.assertIn('No space left', str(caught.exception))
            self.b.free('fillable')
        pool.createXML(VOLUME % ('big', 20 * MIB, 20 * MIB)).delete()

    def test_machines_own_disk_is_never_filled(self):
        self.b.run(['mkdir', '-p', '/tmp/outside'])
        self.addCleanup(self.b.run, ['rm', '-rf', '/tmp/outside'])
        with self.b.connect() as connection:
            pool = connection.storagePoolDefineXML(
                POOL % ('outside', '/tmp/outside'))
            self.addCleanup(self.b.run, ['virsh', 'pool-undefine', 'outside'])
            self.assertFalse(pool.isActive())
        self.assertRaisesRegex(lab.LabError, 'disk of the machine itself',
                               self.b.fill, 'outside')
        self.assertRaisesRegex(lab.LabError, "no storage pool with matching "
                               "name 'absent'", self.b.fill, 'absent')


class Remains:
    """What a lab could leave on the machine."""

    def __init__(self, name):
        self.name = name
        self.links = set(os.listdir('/sys/class/net'))
        self.policy = os.path.exists('/usr/sbin/policy-rc.d')

    def found(self):
        folder = str(config.CACHE / self.name)
        left = ['namespace ' + n for n in _listing('/run/netns')
                if n.startswith(self.name + '-')]
        left += ['mount ' + line for line in
                 pathlib.Path('/proc/mounts').read_text().splitlines()
                 if folder in line or '/%s-' % self.name in line]
        left += ['link ' + n for n in set(os.listdir('/sys/class/net')) -
                 self.links]
        for loop in pathlib.Path('/sys/block').glob('loop*/loop/backing_file'):
            with contextlib.suppress(OSError):
                if folder in loop.read_text():
                    left.append('loop ' + str(loop))
        for entry in pathlib.Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):
                # Also whoever merely has a file of it open.
                if (folder + '/').encode() in (
                        entry / 'cmdline').read_bytes() or any(
                        os.readlink(fd).startswith(folder + '/')
                        for fd in (entry / 'fd').iterdir()):
                    left.append('process ' + lock.describe(int(entry.name)))
        left += ['file %s/%s' % (folder, n) for n in _listing(folder)
                 if n != 'log']
        return left


def _listing(path):
    return os.listdir(path) if os.path.isdir(path) else []


class TestLifecycle(unittest.TestCase):
    """Labs with names of their own, in processes of their own."""

    def setUp(self):
        super().setUp()
        self.name = 'labtest%d' % os.getpid()
        self.remains = Remains(self.name)
        self.addCleanup(self._remove)

    def _remove(self):
        self.python('hosts.down()')
        self.assertEqual([], self.remains.found())
        subprocess.run(['rm', '-rf', config.CACHE / self.name], check=True)

    def popen(self, code, user=None, **environment):
        return subprocess.Popen(
            [sys.executable, '-c', 'import lab\n'
             'from lab import hosts, lock, network, preflight, process, state'
             '\ntry:\n    with lock.held():\n        %s\n'
             'except lab.LabError as error:\n    raise SystemExit('
             '"LabError: %%s" %% error)' % code.replace('\n', '\n        ')],
            cwd=config.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, user=user,
            env={**os.environ, 'LAB_NAME': self.name, **environment})

    def python(self, code, **more):
        """Run code that holds the lock; its output, or what it raised."""
        with self.popen(code, **more) as running:
            out, err = running.communicate(timeout=120)
        if running.returncode:
            return err.strip().splitlines()[-1]
        return out.strip()

    UP = 'hosts.up(state.Options())\ns = state.find()\ns.phase="up"\ns.save()'

    def test_down_leaves_nothing(self):
        self.assertEqual('', self.python(self.UP))
        inside = self.python(
            'print(*(p for m in ("ctl", "host-a", "host-b") '
            'for p in network.pids(m)))').split()
        self.assertGreaterEqual(len(inside), 7)
        processes = [process.Process.of(int(pid)) for pid in inside]
        # Guests and faults go with it too.
        self.assertEqual('', self.python(
            'a, b = hosts.host.both()\n'
            'b.link.delay(5)\nb.link.slow("10mbit")\n'
            'a.pause("libvirtd")\n'
            'b.run(["sh", "-c", "sleep 1000 >/dev/null 2>&1 &"])\n'
            'b.connect().createXML(%r)' % (DOMAIN % ('left', ''))))
        self.assertEqual('True', self.python('print(hosts.down())'))
        self.assertEqual([], [p for p in processes if p.alive()])
        self.assertEqual([], self.remains.found())
        self.assertEqual('False', self.python('print(hosts.down())'))
        # The logs are there for whoever wonders.
        self.assertTrue((config.CACHE / self.name /
                         'log/host-a/libvirtd.log').exists())

    def test_killed_at_any_moment(self):
        start = time.monotonic()
        self.assertEqual('', self.python(self.UP))
        took = time.monotonic() - start
        self.python('hosts.down()')
        times = 10 if os.environ.get('LAB_SCENARIOS') == 'all' else 3
        for moment in sorted(random.uniform(0, took) for _ in range(times)):
            with self.subTest(moment=moment), self.popen(self.UP) as running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(moment)
                running.kill()
                running.communicate()
                if random.random() < 0.5:
                    self.assertIn(self.python('print(hosts.down())'),
                                  ('True', 'False'))
                    self.assertEqual([], self.remains.found())
                self.assertEqual('', self.python(self.UP))
                self.assertEqual('True', self.python(
                    'print(hosts.healthy())'))
                self.python('hosts.down()')
                self.assertEqual([], self.remains.found())

    def test_down_killed(self):
        for moment in (0.15, 0.2, 0.25, 0.3):
            self.assertEqual('', self.python(self.UP))
            with self.popen('hosts.down()') as running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(moment)
                running.kill()
                running.communicate()
            self.python('hosts.down()')
            self.assertEqual([], self.remains.found())

    def test_lock_names_its_holder(self):
        with self.popen('print("here", flush=True)\n'
                        'import time; time.sleep(60)') as holder:
            self.assertEqual('here\n', holder.stdout.readline())
            told = self.python('pass')
            holder.kill()
        self.assertIn('(pid %d)' % holder.pid, told)
        self.assertIn(str(config.ROOT), told)
        # Killed, it holds nothing any longer.
        self.assertEqual('', self.python('pass'))

    def test_name_in_use(self):
        namespace = self.name + '-host-b'
        network.ip('netns add ' + namespace)
        self.addCleanup(network.ip, 'netns del ' + namespace)
        with subprocess.Popen(['ip', 'netns', 'exec', namespace, 'sleep',
                               '60']) as sleeper:
            told = self.python(self.UP)
            sleeper.kill()
        self.assertIn('%s is in use by "sleep 60"' % namespace, told)
        self.assertIn('(pid %d)' % sleeper.pid, told)
        # Not its own, so nothing of it was removed or made.
        self.assertEqual('', self.python('hosts.down()'))
        self.assertEqual([namespace], [
            n for n in os.listdir('/run/netns') if n.startswith(self.name)])
        network.ip('netns del ' + namespace)
        self.assertEqual([], self.remains.found())
        network.ip('netns add ' + namespace)

    def _refused(self, setting, expected):
        told = self.python(setting + '\n' + self.UP)
        self.assertRegex(told, '^LabError: ' + expected)
        self.assertEqual([], self.remains.found())

    def test_too_little_memory(self):
        self._refused('preflight.available_memory = lambda: 100 << 20',
                      'level hosts takes 512 MiB of memory, 100 MiB')

    def test_too_little_disk(self):
        self._refused('from lab import config\n'
                      'config.NEEDED_DISK["hosts"] = 1 << 60',
                      'level hosts takes .* MiB on the disk')

    def test_another_system(self):
        self._refused('preflight.distribution = lambda: ("fedora", "41")',
                      'the lab is for Debian 12, this is fedora 41')

    def test_not_root(self):
        self._refused('import os; os.geteuid = lambda: 1000',
                      'the lab makes namespaces and mounts, which takes root')

    def test_state_of_an_earlier_start_of_the_machine(self):
        self.python('s = state.State("up", boot="another")\ns.save()')
        self.assertRegex(self.python('state.load()'), 'lab/lab up')
        self.assertEqual('', self.python(self.UP))

    def test_machine_that_has_ended_is_told(self):
        self.assertEqual('', self.python(self.UP))
        self.assertIn('host-b has ended; start over', self.python(
            'b = lab.Host("host-b")\nb.init.signal(9)\n'
            'process.wait_gone([b.init], 5)\n'
            'assert not hosts.healthy()\nb.run(["true"])'))

    def test_with_ssh(self):
        self.assertEqual('', self.python(
            'hosts.up(state.Options(ssh=True))'))
        self.assertEqual('host-b host-a', self.python(
            'a, b = hosts.host.both()\n'
            'for h in (a, b): h.wait_port(22, 10, "sshd")\n'
            'print(a.run(["ssh", "10.97.0.12", "hostname"]).stdout.strip(),'
            ' b.run(["ssh", "host-a", "hostname"]).stdout.strip())'))
        self.assertEqual('copied', self.python(
            'a, b = hosts.host.both()\n'
            'a.run(["sh", "-c", "echo copied >/tmp/x; rsync /tmp/x '
            'host-b:/tmp/y; scp -q /tmp/x host-b:/tmp/z"])\n'
            'print(b.run(["cat", "/tmp/z"]).stdout)'))


class TestParts(unittest.TestCase):

    def test_process_is_known_by_its_start(self):
        with subprocess.Popen(['sleep', '60']) as sleeper:
            mine = process.Process.of(sleeper.pid)
            other = process.Process(sleeper.pid, mine.start + 1)
            self.assertTrue(mine.alive())
            self.assertFalse(other.alive())
            self.assertFalse(other.signal(signal.SIGKILL))
            self.assertIsNone(sleeper.poll())
            self.assertTrue(mine.signal(signal.SIGKILL))
        self.assertFalse(mine.alive())
        self.assertFalse(mine.signal(signal.SIGKILL))

    def test_guides_blocks_become_scripts(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, guide.PAGE)
            path.parent.mkdir(parents=True)
            path.write_text(
                'Page\n\n.. code-block:: console\n   :name: '
                'remote-libvirt-tls-x\n\n   # cat > f << EOF\n   a # b\n'
                '\n   EOF\n   # cat \\\n       f\n\nText.\n\n'
                '   .. code-block:: console\n\n      # not this\n')
            with unittest.mock.patch.dict(os.environ, LAB_NOVA_TREE=folder):
                self.assertEqual(path, guide.find())
                self.assertEqual('cat > f << EOF\na # b\n\nEOF\ncat \\\n    f\n',
                                 guide.script('x'))
                self.assertRaisesRegex(lab.LabError, 'has no block .*-y$',
                                       guide.script, 'y')

    def test_lock_again_in_the_same_process(self):
        taken = threading.Event()
        with lock.held(), lock.held():
            self.assertEqual(os.getpid(), lock.holder())
            taken.set()
        self.assertIsNone(lock.holder())

    def test_root_that_can_not_be_made(self):
        """Whatever it fails of, no host of that release can be had."""
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            program = pathlib.Path(folder, 'mmdebstrap')
            program.write_text('#!/bin/sh\nexec sleep 60\n')
            program.chmod(0o755)
            for name, value in (('FOLDER', pathlib.Path(folder, 'roots')),
                                ('LIMIT', .01),
                                ('mirror', lambda: 'http://127.0.0.1/'),
                                ('_check_reach', lambda *args: None)):
                stack.enter_context(unittest.mock.patch.object(
                    roots, name, value))
            stack.enter_context(unittest.mock.patch.dict(
                os.environ, PATH='%s:%s' % (folder, os.environ['PATH'])))
            self.assertRaisesRegex(roots.Unavailable, 'mmdebstrap in',
                                   roots._make, 'trixie', 'trixie', '')
            program.write_text('#!/bin/sh\nexit 1\n')
            self.assertRaisesRegex(roots.Unavailable, 'mmdebstrap$',
                                   roots._make, 'trixie', 'trixie', '')

    def test_needs_are_told_for_each_level(self):
        self.assertEqual(config.NEEDED_MEMORY.keys(),
                         config.NEEDED_DISK.keys())
        self.assertGreater(preflight.available_memory(), MIB)
        self.assertEqual('hosts', state.Options().level)
