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

"""The storage machine: up, commands in it, its libvirt."""

import contextlib
import ctypes
import os
import pathlib
import socket
import uuid

from .. import config
from .. import network
from .. import nova_user
from . import image
from ..errors import LabError
from ..machine import Machine

HERE = pathlib.Path(__file__).resolve().parent
NAME = 'storage'
ADDRESS = '10.97.0.13'
LIBVIRT_PORT, COMMAND_PORT = 16509, 2323
MEMORY = 512  # MiB
VOLUME_GROUP = 'vg0'
#: Bytes of the disks, whose files are sparse.
DISKS = {'volume-group': 6 << 30, 'exports': 3 << 30}
#: Directories that the machine exports by NFS, and how.
EXPORTS = {'trusting': 'no_root_squash', 'squashing': 'root_squash',
           'readonly': 'ro'}
TIMEOUT = 400  # seconds until it is up; it has no KVM
VIRTIOFSD = '/usr/lib/qemu/virtiofsd'
# Of timer and mitigations: seconds of the boot under emulation.
COMMAND_LINE = ('console=ttyS0 panic=-1 quiet loglevel=3 tsc=unstable '
                'no_timer_check mitigations=off random.trust_cpu=on')
CLONE_NEWNET = 0x40000000


def prepare() -> pathlib.Path:
    """Make what it starts from; returns the folder."""
    return image.ensure(config.CACHE / 'storage')


class StorageVM:
    """The storage machine of the lab that is up, or is to be.

    It runs in ctl's namespaces, and goes with them.
    """

    def __init__(self):
        self.control = Machine(config.CONTROL)
        self.folder = config.STATE / NAME
        self.console = config.LOGS / NAME / 'console.log'
        self.uri = 'qemu+tcp://%s/system' % ADDRESS

    # -- bringing it up

    def begin(self) -> None:
        """Start it; ctl is up. Don't wait."""
        files = prepare()
        self.folder.mkdir()
        self.console.parent.mkdir(parents=True, exist_ok=True)
        for name, size in DISKS.items():
            with open(self.folder / name, 'wb') as out:
                out.truncate(size)
        network.ip('tuntap add dev %s mode tap' % NAME,
                   'link set %s master %s up' % (NAME, config.BRIDGE),
                   machine=config.CONTROL)
        for tag, source in (('host', '/'), ('extras', files / 'extras')):
            self.control.start('virtiofsd-' + tag, [
                VIRTIOFSD, '--socket-path=%s' % self._socket(tag),
                '-o', 'source=%s' % source, '-o', 'cache=always',
                '-o', 'sandbox=chroot', '-o', 'no_posix_lock', '-o', 'xattr'])
        for tag in ('host', 'extras'):
            self.control.wait(self._socket(tag).exists, 10, 'listening',
                              'virtiofsd-' + tag)
        self.control.start(NAME, self._command(files))

    def _socket(self, tag):
        return self.folder / (tag + '.socket')

    def _command(self, files):
        command = [
            'qemu-system-x86_64', '-M', 'q35,accel=tcg', '-cpu', 'max',
            '-smp', '2', '-m', MEMORY, '-nodefaults', '-no-user-config',
            '-display', 'none', '-no-reboot',
            '-kernel', files / 'vmlinuz', '-initrd', files / 'initrd',
            '-append', '%s lab.init=%s lab.address=%s/%d lab.owner=%d' % (
                COMMAND_LINE, HERE / 'init', ADDRESS, config.PREFIX_LENGTH,
                nova_user.ID),
            '-object', 'memory-backend-memfd,id=memory,size=%dM,share=on' %
            MEMORY, '-numa', 'node,memdev=memory',
            '-netdev', 'tap,id=net,ifname=%s,script=no,downscript=no' % NAME,
            '-device', 'virtio-net-pci,netdev=net,romfile=',
            '-serial', 'file:%s' % self.console]
        for tag in ('host', 'extras'):
            command += [
                '-chardev', 'socket,id=%s,path=%s' % (tag, self._socket(tag)),
                '-device', 'vhost-user-fs-pci,chardev=%s,tag=%s,'
                'queue-size=1024' % (tag, tag)]
        for name in DISKS:
            command += ['-drive', 'file=%s,if=virtio,format=raw,discard=unmap'
                        % (self.folder / name)]
        return command

    def wait_ready(self, timeout: float = TIMEOUT) -> None:
        """:raises: LabError if it isn't up in time (seconds), or wrong"""
        self.control.wait(lambda: 'STORAGE ready' in self._told(), timeout,
                          'ready', NAME)
        failed = [line for line in self._told().splitlines()
                  if line.startswith('FAILED')]
        if failed:
            raise LabError('the storage machine: %s' % '; '.join(failed),
                           self.console)

    def _told(self):
        try:
            return self.console.read_text(errors='replace')
        except FileNotFoundError:
            return ''

    # -- using it

    @contextlib.contextmanager
    def _in_network(self):
        """This thread is in the lab's network for as long as it lasts."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(path):
            fd = os.open(path, os.O_RDONLY)
            try:
                if libc.setns(fd, CLONE_NEWNET):
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
            finally:
                os.close(fd)

        own = os.open('/proc/thread-self/ns/net', os.O_RDONLY)
        enter(self.control.netns)
        try:
            yield
        finally:
            enter('/proc/self/fd/%d' % own)
            os.close(own)

    def connect(self):
        """A libvirt.virConnect to the machine's libvirtd."""
        import libvirt
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        with self._in_network():
            return libvirt.open(self.uri)

    def run(self, script: str, check: bool = True, timeout: float = 60) -> str:
        """Run a script of bash in the machine, as root.

        :param timeout: seconds
        :returns: what it prints, errors included
        :raises: LabError if it fails, unless check is False
        """
        mark = uuid.uuid4().hex
        with self._in_network():
            peer = socket.create_connection((ADDRESS, COMMAND_PORT), timeout)
        with peer:
            peer.sendall((
                'exec 2>&1; export HOME=/root PATH=%s\n'
                '( %s\n) < /dev/null\necho %s $?; exit\n' % (
                    '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:'
                    '/bin', script, mark)).encode())
            told = b''
            while part := peer.recv(1 << 16):
                told += part
        printed, found, code = told.decode(errors='replace').rpartition(mark)
        if not found or check and int(code):
            raise LabError('%s on the storage machine ended with %s: %s' % (
                script, code.strip() or 'nothing', printed[-2000:].strip()))
        return printed

    def alive(self) -> bool:
        try:
            return self.control.service(NAME).alive()
        except (LabError, FileNotFoundError):
            return False
