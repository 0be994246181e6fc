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

"""Each way to bring volumes from host-a to host-b."""

import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import secrets
import subprocess
import sys
import time

from . import measure
from .. import config
from .. import machine
from ..errors import LabError

FOLDER = '/var/lib/nova/bench'
POOL = 'bench'
POOL_XML = '''<pool type='dir'><name>%s</name><target><path>%s</path>
</target></pool>''' % (POOL, FOLDER)
VOLUME_XML = '''<volume><name>%s</name><capacity>%d</capacity>
<allocation>0</allocation><target><format type='raw'/></target></volume>'''
NBD_PORT = 10809

# Receivers of one disk over NBD with TLS and a pre-shared key: a socket that
# was made before, and an end when the client has gone.
KEYS = '/run/bench-keys'
# Not ChaCha20, on which GnuTLS agrees with such a key as a rule.
PRIORITY = 'NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM'
SYSTEM_PRIORITY = '[overrides]\ntls-disabled-cipher = CHACHA20-POLY1305\n'
RECEIVERS = {
    'qemu-nbd': [
        'qemu-nbd', '-f', 'raw', '-e', '{connections}', '--cache', 'writeback',
        '--aio', 'threads', '--discard', 'unmap', '--detect-zeroes', 'off',
        '--object', 'tls-creds-psk,id=t,endpoint=server,dir=%s,priority=%s' % (
            KEYS, PRIORITY), '--tls-creds', 't', '{path}'],
    'nbdkit': [
        'nbdkit', '--foreground', '--threads', '2', '--filter=exitlast',
        '--tls=require',
        '--tls-psk=%s/keys.psk' % KEYS, 'file', '{path}']}
LISTEN = '''import os, socket, sys
listening = socket.socket()
listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
listening.bind((sys.argv[1], 0))
listening.listen(16)
os.dup2(listening.fileno(), 3)
os.set_inheritable(3, True)     # it may have been that
print(listening.getsockname()[1], flush=True)
os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()),
                  MALLOC_MMAP_THRESHOLD_='16777216',
                  MALLOC_TRIM_THRESHOLD_='268435456',
                  GNUTLS_SYSTEM_PRIORITY_FILE='%s/priority')
os.execvp(sys.argv[2], sys.argv[2:])
''' % KEYS


def tree() -> pathlib.Path:
    """The checkout of Nova whose pump is measured."""
    return pathlib.Path(os.environ.get('LAB_NOVA_TREE',
                                       config.ROOT / 'tree')).resolve()


class Runner:
    """runner.py in a host."""

    def __init__(self, host):
        self.host = host
        self.process = host.popen(
            [sys.executable, '-m', 'lab.benchmark.runner'],
            env={'PYTHONPATH': '%s:%s' % (tree(), config.ROOT),
                 'OS_NOVA_DISABLE_EVENTLET_PATCHING': 'true'},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=open(host.logs / 'bench.log', 'ab'), text=True)
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise LabError('the pump could not be run',
                           self.host.logs / 'bench.log')
        answer = json.loads(line)
        if 'error' in answer:
            raise LabError(answer['error'])
        return answer

    def begin(self, operation, **request) -> None:
        self.process.stdin.write(json.dumps(
            {'operation': operation, **request}) + '\n')
        self.process.stdin.flush()

    def __call__(self, operation, **request) -> dict:
        self.begin(operation, **request)
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Receiver:
    """A server in a host that takes one disk in; a context manager.

    :param name: of the volume, whose file is there
    :param kind: key of RECEIVERS
    """

    def __init__(self, host, name, kind, connections=1):
        self.host = host
        self.path = '%s/%s' % (FOLDER, name)
        self.argv = [part.format(path=self.path, connections=connections)
                     for part in RECEIVERS[kind]]

    def __enter__(self):
        before = _children_cpu()
        self.process = self.host.popen(
            [sys.executable, '-c', LISTEN, self.host.address, *self.argv],
            stdout=subprocess.PIPE,
            stderr=open(self.host.logs / 'bench.log', 'ab'), text=True)
        self.port = int(self.process.stdout.readline())
        # What a server costs until it is ready is no part of a copy.
        time.sleep(1)
        self.before = before + measure.daemon_cpu([self.process])
        return self

    def __exit__(self, kind, *error):
        if kind:
            machine.kill(self.process)
        self.process.wait()
        self.process.stdout.close()

    def cost(self, cost) -> measure.Cost:
        """A copy's cost with ours; after the end."""
        return dataclasses.replace(
            cost, daemons=_children_cpu() - self.before - cost.client)


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Bench:
    """Two hosts with a pool each, and what the ways need.

    :param memory: the pools lie in memory, so that no disk is measured
    """

    def __init__(self, a, b, memory: bool = True):
        self.a, self.b = a, b
        for host in (a, b):
            host.run(['mkdir', '-p', FOLDER])
            if memory:
                host.run(['mount', '-t', 'tmpfs', '-o', 'size=80%', 'bench',
                          FOLDER])
            with host.connect() as connection:
                connection.storagePoolCreateXML(POOL_XML)
        b.start('nbdkit', [
            'nbdkit', '--foreground', '--tls=require', '--tls-verify-peer',
            '--tls-certificates=/etc/pki/qemu', '--ipaddr', b.address,
            '--port', NBD_PORT, 'file', 'dir=' + FOLDER])
        b.wait_port(NBD_PORT, 10, 'nbdkit')
        self.key = secrets.token_hex(32)
        for host in (a, b):
            host.run(['mkdir', '-p', '-m', '700', KEYS])
            host.path(KEYS + '/keys.psk').write_text('nova:%s\n' % self.key)
            host.path(KEYS + '/priority').write_text(SYSTEM_PRIORITY)
            # Else QEMU makes one at each start; Nova gives it this one.
            host.run(['certtool', '--get-dh-params', '--sec-param', 'medium',
                      '--outfile', KEYS + '/dh-params.pem'])
        self.runner, self.peer = Runner(a), Runner(b)

    def remove(self) -> None:
        """Take the pools away, for others in their place."""
        for runner in (self.runner, self.peer):
            runner.close()
        self.b.stop('nbdkit')
        for host in (self.a, self.b):
            with host.connect() as connection:
                connection.storagePoolLookupByName(POOL).destroy()
            host.run(['sh', '-c', 'umount %s || rm -rf %s' % (FOLDER, FOLDER)])

    # -- volumes -------------------------------------------------------------

    def make(self, name: str, program: str) -> int:
        """Make a volume's file on host-a.

        :param program: Python; ``out`` is the open file
        :returns: its length in bytes
        """
        path = '%s/%s' % (FOLDER, name)
        self.a.run([sys.executable, '-c', 'import os, random\n'
                    'with open(%r, "wb") as out:\n    %s' % (
                        path, program.replace('\n', '\n    '))])
        self._refresh()
        return self.a.path(path).stat().st_size

    def forget(self, *names: str) -> None:
        for host in (self.a, self.b):
            for name in names:
                host.path('%s/%s' % (FOLDER, name)).unlink(missing_ok=True)
        self._refresh()

    def clear(self, name: str) -> None:
        """Remove what a copy has made."""
        self.b.path('%s/%s' % (FOLDER, name)).unlink(missing_ok=True)
        with self.b.connect() as connection:
            connection.storagePoolLookupByName(POOL).refresh()

    def _refresh(self) -> None:
        for host in (self.a, self.b):
            with host.connect() as connection:
                connection.storagePoolLookupByName(POOL).refresh()

    def check(self, name: str) -> None:
        """:raises: LabError where the copy differs"""
        done = subprocess.run(['cmp', *(h.path('%s/%s' % (FOLDER, name))
                                        for h in (self.a, self.b))],
                              stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise LabError('the copy differs: %s' % done.stdout)

    def allocations(self, name: str) -> list[int]:
        """Bytes on host-a and on host-b."""
        return [h.path('%s/%s' % (FOLDER, name)).stat().st_blocks * 512
                for h in (self.a, self.b)]

    # -- ways ----------------------------------------------------------------

    def _services(self, *names):
        return [host.service(name) for host in (self.a, self.b)
                for name in names if host.name == 'host-b' or
                name == 'libvirtd']

    def pump(self, names, length: int, **more) -> tuple[measure.Cost, dict]:
        """The copy with all that a migration does for it."""
        services = self._services('libvirtd')
        before = measure.daemon_cpu(services)
        self._create(names, length)
        answer = self.runner(
            'copy', source='qemu:///system', destination=self.a.uri(self.b),
            volumes=[[POOL, name, POOL, name, length] for name in names],
            **more)
        return measure.Cost(
            answer['wall'], answer['client'],
            measure.daemon_cpu(services) - before, answer['memory']), answer

    def _create(self, names, length):
        with self.b.connect() as connection:
            pool = connection.storagePoolLookupByName(POOL)
            for name in names:
                pool.createXML(VOLUME_XML % (name, length))

    def cancel(self, name: str, length: int, after: float) -> float:
        """Seconds from a cancel in the middle to the copy's end."""
        self._create([name], length)
        return self.runner(
            'cancel', source='qemu:///system', destination=self.a.uri(self.b),
            **{'from': [POOL, name], 'to': [POOL, name]}, length=length,
            after=after)['wall']

    def verify(self, name: str, length: int, checksum) -> float:
        """Seconds that it takes on host-b."""
        return self.peer('verify', uri='qemu:///system', pool=POOL,
                         volume=name, length=length, checksum=checksum[0],
                         key=checksum[1])['wall']

    def rsync(self, name, length, sparse=False):
        path = '%s/%s' % (FOLDER, name)
        return measure.command(
            self.a, ['rsync', *(['-S'] if sparse else []), path,
                     'host-b:' + path], self._services('sshd'))

    def scp(self, name, length):
        path = '%s/%s' % (FOLDER, name)
        return measure.command(self.a, ['scp', '-q', path, 'host-b:' + path],
                               self._services('sshd'))

    def virsh(self, name, length, sparse=False):
        """A sparse download can't go through a pipe: it seeks."""
        if sparse:
            return self.upload(name, length, sparse=True)
        return self._virsh(
            name, length, 'virsh -q vol-download --pool %s %s /dev/stdout | '
            '{} /dev/stdin' % (POOL, name))

    def upload(self, name, length, sparse=False):
        """libvirt's own client reads the file: it can't be much faster."""
        return self._virsh(name, length, '{} %s %s/%s' % (
            '--sparse' if sparse else '', FOLDER, name))

    def _virsh(self, name, length, text):
        """:param text: what is run once the volume is there, {} the upload"""
        uri = self.a.uri(self.b)
        make = 'virsh -q -c %s vol-create-as %s %s %d --allocation 0' % (
            uri, POOL, name, length)
        upload = 'virsh -q -c %s vol-upload --pool %s %s' % (uri, POOL, name)
        return measure.command(
            self.a, ['sh', '-c', '%s && %s' % (make, text.format(upload))],
            self._services('libvirtd'))

    def python_worker(self, name, length):
        """Our copy, with threads, a queue and hashlib instead of C."""
        return measure.command(self.a, [
            sys.executable, '-I',
            config.ROOT / 'lab/benchmark/python_worker.py',
            '%s/%s' % (FOLDER, name), self.a.uri(self.b), POOL, name],
            self._services('libvirtd'))

    def pump_nbd(self, name, length, kind='qemu-nbd'):
        """The pump into a file that is there and empty."""
        return self.pump_nbd_all([name], length, kind)

    def pump_nbd_all(self, names, length, kind='qemu-nbd', **more):
        """The pump into files that are there and empty.

        :param more: ``together`` for all at once
        """
        with contextlib.ExitStack() as stack:
            receivers = []
            for name in names:
                self._make_file(name, length)
                receivers.append(stack.enter_context(
                    Receiver(self.b, name, kind)))
            answer = self.runner(
                'copy', source='qemu:///system', destination='',
                volumes=[[POOL, name, '', '', length] for name in names],
                exports=[[self.b.address, receiver.port, '', 'nova',
                          self.key] for receiver in receivers], **more)
        # The runner is a child that hasn't ended: its use isn't in ours. The
        # first receiver counts from before the others.
        cost = measure.Cost(answer['wall'], 0, 0, answer['memory'])
        return dataclasses.replace(receivers[0].cost(cost),
                                   client=answer['client']), answer

    def pump_warm(self, name, length, changed):
        """The pump in two passes.

        :param changed: bytes that are written between them
        :returns: seconds of either, and bytes ``sent`` in the second one
        """
        self._make_file(name, length)
        with Receiver(self.b, name, 'qemu-nbd') as receiver:
            return self.runner(
                'warm', source='qemu:///system', length=length,
                changed=changed, path='%s/%s' % (FOLDER, name),
                **{'from': [POOL, name]}, export=[
                    self.b.address, receiver.port, '', 'nova', self.key])

    def nbdcopy_psk(self, name, length, connections, kind='qemu-nbd'):
        """nbdcopy into the same."""
        self._make_file(name, length)
        with Receiver(self.b, name, kind, connections) as receiver:
            cost = measure.command(self.a, [
                'nbdcopy', '--destination-is-zero', '--flush',
                '--connections=%d' % connections, '%s/%s' % (FOLDER, name),
                'nbds://nova@%s:%d/?tls-psk-file=%s/keys.psk' % (
                    self.b.address, receiver.port, KEYS)], [])
        return receiver.cost(cost)

    def _make_file(self, name, length):
        with open(self.b.path('%s/%s' % (FOLDER, name)), 'wb') as out:
            out.truncate(length)

    def nbdcopy(self, name, length, connections=1):
        """Into a file that is there and empty, which it is told."""
        self._make_file(name, length)
        return measure.command(self.a, [
            'nbdcopy', '--destination-is-zero', '--connections=%d' %
            connections, '%s/%s' % (FOLDER, name),
            'nbds://host-b/%s?tls-certificates=/etc/pki/qemu' % name],
            self._services('nbdkit'))
