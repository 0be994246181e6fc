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
"""One disk that is taken in: an NBD server for its file, once.

Knows a file, and nothing of pools, instances or migrations. What its exit
status says is nothing: whether the content is right is told by its checksum.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import typing as ty

from oslo_log import log as logging
from oslo_serialization import jsonutils

import nova.conf
from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage.intake import guard
from nova.virt.libvirt.storage.intake import held
from nova.virt.libvirt.storage.intake import keys
from nova.virt.libvirt.storage.intake import listener

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

_GUARD = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'guard.py')
QEMU, NBDKIT = 'qemu-nbd', 'nbdkit'
_PACKAGES = {QEMU: 'qemu-utils', NBDKIT: 'nbdkit'}

# GnuTLS prefers ChaCha20 with a pre-shared key, for which a CPU with AES
# instructions takes three times as long. TLS 1.2 has no good cipher here.
_TLS = 'NORMAL:-VERS-ALL:+VERS-TLS1.3'
_AES = ':-CIPHER-ALL:+AES-128-GCM'
# The same for nbdkit, which can be told in GnuTLS's own file alone.
_POLICY = '[overrides]\ndisabled-version = tls1.2\n'
_POLICY_AES = 'tls-disabled-cipher = CHACHA20-POLY1305\n'
_POLICY_FILE = 'policy'
# Threads of an nbdkit for each connection: one receives while the other one
# writes. It has 16 by default, which wait for each other.
_THREADS = 2

# What a program needs to start, and GnuTLS to know its host's policy.
_READABLE = ('/usr', '/bin', '/lib', '/lib64', '/etc/ld.so.cache',
             '/etc/gnutls', '/etc/crypto-policies', '/etc/localtime',
             '/dev/urandom')

# Seconds for the guard to start qemu-nbd, and to end it.
_START_TIMEOUT = 20
_END_TIMEOUT = 10
# A raw image has whole sectors for QEMU, which enlarges the file to them.
_SECTOR = 512
# Beside the source's own: who has no key can hold a connection, too.
_MORE_CONNECTIONS = 7


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be taken in.

    :ivar path: of the file, which is new and this user's
    :ivar connections: how many the source opens
    :ivar has_aes: whether both CPUs have instructions for AES
    :ivar what: what it is, for the log
    """
    path: str
    connections: int
    has_aes: bool
    what: str


def program() -> str:
    """The NBD server of this host.

    nbdkit opens what is at a path by then, also where it is given a
    descriptor: nothing but landlock keeps it from another file.
    """
    found = CONF.libvirt.storage_migration_nbd_server
    return found if guard.can_confine() else QEMU


def obstacle() -> str | None:
    """What keeps this host from taking disks in; None if nothing does."""
    if shutil.which(program()) is None:
        return _("install %(program)s (on Debian in package %(package)s): it "
                 "isn't there") % {'program': program(),
                                   'package': _PACKAGES[program()]}
    return None


def check(address: str) -> None:
    """Check that a disk could be taken in now.

    :param address: on which this host is reached
    :raises: exception.StorageIntakeError
    """
    reason = obstacle()
    if reason:
        raise exception.StorageIntakeError(host=CONF.host, reason=reason)
    listener.listen(address, 1).close()


def stall_timeout() -> float:
    """Seconds without any work after which an export is ended."""
    return CONF.libvirt.storage_migration_stall_timeout


def command(path: str, key_directory: str, order: Order) -> list[str]:
    """The command line of the NBD server.

    The format is always raw: a file of qcow2 travels as its bytes, and
    nothing is probed.
    """
    most = str(order.connections + _MORE_CONNECTIONS)
    if program() == NBDKIT:
        return [
            NBDKIT, '--foreground', '--threads', str(_THREADS),
            '--filter=exitlast', '--filter=limit', '--tls=require',
            '--tls-psk=%s' % os.path.join(key_directory, keys.FILE),
            'file', path, 'limit=' + most]
    return [
        QEMU, '--format', 'raw', '--cache', 'writeback', '--aio',
        'threads', '--discard', 'unmap', '--detect-zeroes', 'off',
        '--shared', most,
        '--object', 'tls-creds-psk,id=tls,endpoint=server,dir=%s,priority=%s'
        % (key_directory, _TLS + (_AES if order.has_aes else '')),
        '--tls-creds', 'tls', path]


def environment(key_directory: str, order: Order) -> dict[str, str]:
    """What the NBD server has to find in its environment."""
    if program() != NBDKIT:
        return {}
    path = os.path.join(key_directory, _POLICY_FILE)
    with open(path, 'w') as f:
        f.write(_POLICY + (_POLICY_AES if order.has_aes else ''))
    return {'GNUTLS_SYSTEM_PRIORITY_FILE': path}


class Export:
    """An NBD server from its start to its end.

    :param order: an Order
    :param address: on which it listens
    :ivar port: of that, when it was started
    :ivar key: what the source must know
    :raises: exception.StorageIntakeError
    """

    def __init__(self, order: Order, address: str):
        self.order = order
        self._address = address
        self._program = program()
        self.port = 0
        self._answers: list[dict] = []
        self._unread = b''
        self._lock = threading.RLock()
        self._is_new = True
        # a subprocess.Popen; None before its start and after its end
        self.guard: ty.Any = None
        self._file, self.length = _hold(order.path)
        try:
            self._keys = keys.KeyDirectory()
        except Exception:
            self._file.close()
            raise
        self.key = self._keys.key

    def start(self) -> None:
        """Start the server; who ends it meanwhile waits for that.

        :raises: exception.StorageIntakeError, also if it was ended before
        """
        with self._lock:
            if not self._is_new:
                raise exception.StorageIntakeError(host=CONF.host, reason=_(
                    "try again: %s was closed while it was opened") %
                    self.order.what)
            try:
                with listener.listen(
                        self._address,
                        self.order.connections + _MORE_CONNECTIONS) as found:
                    self.port = listener.port_of(found)
                    self._start(found)
            except Exception:
                self.end()
                raise
            self._is_new = False

    def _start(self, listening):
        # -s and -E: nothing of the user's or of the environment's
        self.guard = subprocess.Popen(
            [sys.executable, '-s', '-E', _GUARD], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd='/',
            pass_fds=(listening.fileno(), self._file.fd),
            start_new_session=True, env={})
        os.set_blocking(self.guard.stdout.fileno(), False)
        longest = -(-self.length // _SECTOR) * _SECTOR
        os.writev(self.guard.stdin.fileno(), [jsonutils.dump_as_bytes({
            'command': command(guard.FILE, self._keys.path, self.order),
            'socket': listening.fileno(), 'file': self._file.fd,
            'readable': [*_READABLE, self._keys.path],
            'environment': environment(self._keys.path, self.order),
            'longest': max(longest, _SECTOR),
            'stall': stall_timeout()}), b'\n'])
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._answers and time.monotonic() < deadline and (
                self.guard.poll() is None):
            time.sleep(0.01)
            self._read()
        if not self._answers or 'pid' not in self._answers[0]:
            raise exception.StorageIntakeError(host=CONF.host, reason=_(
                "see nova-compute's log there: %(program)s for %(what)s "
                "could not be started") % {
                    'program': self._program, 'what': self.order.what})
        if not self._answers[0]['confined']:
            LOG.info('This kernel has no landlock: %s is held by the rights '
                     'of its user alone', self._program)

    def _read(self):
        """Take what the guard says, and log it."""
        data = bytearray(1 << 16)
        while True:
            try:
                # Not os.read(): eventlet's waits for more.
                length = os.readv(self.guard.stdout.fileno(), [data])
            except BlockingIOError:
                return
            if not length:
                return
            *lines, self._unread = (
                self._unread + data[:length]).split(b'\n')
            for line in lines:
                self._take(line)

    def _take(self, line):
        try:
            message = dict(jsonutils.loads(line))
        except (TypeError, ValueError):
            # the interpreter's last words
            message = {'said': line.decode(errors='replace')}
        self._answers.append(message)
        if 'said' in message and keys.NEEDLESS_GROUP not in message['said']:
            LOG.warning('%(program)s for %(what)s, port %(port)d: %(said)s',
                        {'program': self._program, 'what': self.order.what,
                         'port': self.port, 'said': message['said']})
        elif message.get('why') == 'stalled':
            LOG.error('%(program)s for %(what)s, port %(port)d, was ended: '
                      'it has done nothing for %(seconds)d seconds',
                      {'program': self._program, 'what': self.order.what,
                       'port': self.port, 'seconds':
                       CONF.libvirt.storage_migration_stall_timeout})

    def connected(self) -> None:
        """Let nobody connect any more: the source's connections stand."""
        self._keys.remove()

    def is_running(self) -> bool:
        """Whether somebody may write to the file yet; logs what was said.

        One that is about to start or to end doesn't make anybody wait.
        """
        if not self._lock.acquire(blocking=False):
            return True
        try:
            if self._is_new:
                return True
            if self.guard is None:
                return False
            is_running = self.guard.poll() is None
            # It says why before it ends.
            self._read()
            return is_running
        finally:
            self._lock.release()

    def end(self) -> None:
        """See to it that nobody writes to the file. Twice is fine.

        :raises: exception.StorageIntakeError if it can't be ended
        """
        with self._lock:
            self._is_new = False
            self._keys.remove()
            if self.guard is not None:
                self._end()
            self._file.close()

    def _end(self):
        if not self.guard.stdin.closed:
            self.guard.stdin.close()
        deadline = time.monotonic() + _END_TIMEOUT
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.is_running():
            self.guard.kill()
            self.guard.wait()
        if not any('ended' in answer for answer in self._answers):
            # The kernel kills qemu-nbd with a guard that was killed. Who asks
            # anew after an error isn't told that it has ended, either.
            _wait_for_end(self._pid(), self.order.what)
        self.guard.stdout.close()
        self.guard = None
        try:
            # QEMU may have enlarged it to whole sectors.
            if self._file.stat().st_size > self.length:
                self._file.truncate(self.length)
        except OSError as e:
            # NFS: another host has deleted it.
            if e.errno != errno.ESTALE:
                raise

    def _pid(self):
        return next((answer['pid'] for answer in self._answers
                     if 'pid' in answer), None)


def cut(path: str, length: int) -> None:
    """Give a file that was taken in its length; nobody writes to it.

    :param path: of the file
    :param length: bytes
    :raises: exception.StorageIntakeError if it has fewer
    """
    file, found = _hold(path)
    with contextlib.closing(file):
        if not 0 <= length <= found:
            raise exception.StorageIntakeError(host=CONF.host, reason=_(
                "try again: %(path)s has %(found)d bytes, and the source "
                "speaks of %(length)d") % {
                    'path': path, 'found': found, 'length': length})
        if length < found:
            file.truncate(length)


def _wait_for_end(pid, what):
    deadline = time.monotonic() + _END_TIMEOUT
    while pid and _is_alive(pid):
        if time.monotonic() > deadline:
            raise exception.StorageIntakeError(host=CONF.host, reason=_(
                "do not start the server: process %(pid)d, which writes to "
                "%(what)s, does not end") % {'pid': pid, 'what': what})
        time.sleep(0.01)


def _is_alive(pid):
    try:
        with open('/proc/%d/stat' % pid) as f:
            # It may have nobody yet who asks for its exit status.
            return f.read().rpartition(')')[2].split()[0] not in 'ZX'
    except OSError:
        return False


def _hold(path):
    """Return a file that may be written to, held, and its length."""
    file = held.HeldFile(path)
    try:
        found = file.stat()
        if (not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or
                found.st_uid != os.geteuid()):
            raise exception.StorageIntakeError(host=CONF.host, reason=_(
                "choose another storage pool: %s is no file of nova's own") %
                path)
    except Exception:
        file.close()
        raise
    return file, found.st_size
