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

"""A compute host: a machine with libvirtd over TLS."""

import os
import pathlib
import pwd
import shutil
import subprocess
import uuid

from . import config
from . import emulator
from . import faults
from . import guide
from . import modular
from . import nova_user
from . import pki
from . import roots
from . import ssh
from . import state
from .errors import LabError
from .machine import Machine

#: Folders that a host has for itself on the real disk.
OWN = ('/etc/libvirt', '/etc/pki', '/var/lib/libvirt', '/var/log/libvirt',
       '/var/cache/libvirt')
KVM = '/dev/kvm'
# What the packages make, which is more than libvirtd makes by itself.
QEMU_OWNED = ('var/lib/libvirt/qemu', 'var/cache/libvirt/qemu')
# The rest is what the admin guide says (guide.py). There is no polkit here.
LIBVIRTD_CONF = '''listen_addr = "%(address)s"
auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_group = "libvirt"
unix_sock_rw_perms = "0770"
tls_no_sanity_certificate = %(no_sanity)d
host_uuid = "%(uuid)s"
log_outputs = "2:stderr"
'''
# Of a modular daemon behind virtproxyd; nova-compute itself finds virtqemud.
DAEMON_CONF = '''auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_group = "libvirt"
unix_sock_rw_perms = "0770"
host_uuid = "%(uuid)s"
log_outputs = "2:stderr"
'''
QEMU_CONF = '''cgroup_controllers = [ ]
namespaces = [ ]
security_driver = "none"
stdio_handler = "logd"
max_core = 0
migration_address = "%(address)s"
migration_host = "%(name)s"
'''


class Host(Machine):
    """host-a or host-b, of the lab that is up.

    :ivar link: faults of its network link (faults.Link)
    """

    def __init__(self, name: str):
        super().__init__(name)
        if name not in config.HOSTS:
            raise LabError('there is no host %r; there are: %s' % (
                name, ', '.join(config.HOSTS)))
        self.link = faults.Link(self, Machine(config.CONTROL))

    # -- making one ----------------------------------------------------------

    def prepare(self, with_ssh: bool = False,
                memory: pathlib.Path | None = None,
                root: str = '', modular_: bool = False) -> None:
        """Make the folders of which the host is built.

        :param memory: where /var/lib/nova lies in place of a disk
        :param root: a release of Debian, see roots.RELEASES
        :param modular_: with modular daemons in place of libvirtd
        """
        super().prepare()
        for path in OWN:
            (self.folder / path.lstrip('/')).mkdir(parents=True, exist_ok=True)
        self._root, self._modular = root, modular_
        if root:
            qemu = roots.user(root, 'libvirt-qemu')
        else:
            qemu = pwd.getpwnam('libvirt-qemu')[2:4]
        for path in QEMU_OWNED:
            (self.folder / path).mkdir(exist_ok=True, mode=0o750)
            os.chown(self.folder / path, *qemu)
        self._uuid = uuid.uuid4()
        self._with_ssh = with_ssh
        self._in_memory = memory and memory / self.name
        self.image = self.folder / 'nova.img'
        if memory:
            self._in_memory.mkdir()
        elif not self.image.exists():
            with open(self.image, 'wb') as out:
                out.truncate(config.DISK_BYTES)
            # No journal: what is on it does not outlive the lab.
            subprocess.run(
                ['mkfs.ext4', '-q', '-m', '0', '-O', '^has_journal',
                 '-E', 'lazy_itable_init=1,nodiscard,root_owner=0:0',
                 self.image], check=True, stdin=subprocess.DEVNULL)

    def description(self) -> dict:
        spec = super().description()
        if self._root:
            spec['root'] = str(roots.path(self._root))
            spec['root_at'] = str(self.folder / 'root')
            spec['overlays'] = []
            spec['keep'] += roots.python()
        if self._modular:
            spec['binds'] += [[str(modular.path(name)), '/usr/sbin/' + name]
                              for name in modular.DAEMONS]
        spec['binds'] += [[str(self.folder / path.lstrip('/')), path]
                          for path in OWN]
        if os.path.exists(KVM):
            # Where guests can't run on it libvirt probes QEMU again, for 20 s,
            # each time it starts one: qemuCaps "KVM was not enabled when
            # probing", src/qemu/qemu_capabilities.c. The lab's guests use TCG.
            closed = self.folder / 'no-kvm'
            closed.touch()
            closed.chmod(0)
            spec['binds'].append([str(closed), KVM])
        if self._in_memory:
            spec['binds'].append([str(self._in_memory), '/var/lib/nova'])
        else:
            spec['loops'].append([str(self.image), '/var/lib/nova'])
        spec['files']['/etc/machine-id'] = [0o444, self._uuid.hex + '\n']
        spec['folders'].update({
            '/run/libvirt': 0o755, '/run/sshd': 0o755,
            '/var/lib/nova/instances': 0o755})
        if self._with_ssh:
            spec['files'].update(ssh.server_files(
                self.name, self.address, config.STATE / 'ssh'))
        else:
            spec['binds'] += ssh.make_recorder(self.name, self.folder)
        return spec

    def make_users(self) -> None:
        """Make the user nova; the host has begun to run."""
        nova_user.make(self, ssh.user_files(
            nova_user.HOME, config.STATE / 'ssh') if self._with_ssh else None)

    def mend_emulator(self) -> None:
        """Keep QEMU from losing what guests store; the host has begun."""
        emulator.mend(self)

    def configure(self, no_sanity: bool = False) -> None:
        """Write libvirtd.conf and qemu.conf; the host is up.

        :param no_sanity: libvirtd starts though its own certificate is bad
        """
        values = {
            'name': self.name, 'address': self.address, 'uuid': self._uuid,
            'no_sanity': no_sanity}
        etc = self.folder / 'etc/libvirt'
        (etc / (self.front + '.conf')).write_text(LIBVIRTD_CONF % values)
        if self.front == modular.FRONT:
            for name in modular.DAEMONS[:-1]:
                (etc / (name + '.conf')).write_text(DAEMON_CONF % values)
        (etc / 'qemu.conf').write_text(QEMU_CONF % values)
        guide.run(self, 'libvirtd', ALLOWED=', '.join(
            '"CN=%s"' % name for name in config.HOSTS))
        guide.run(self, 'qemu')

    def start_daemons(self) -> None:
        """Start virtlogd, libvirtd and, with --ssh, sshd; don't wait.

        With modular daemons the service "libvirtd" is virtproxyd.
        """
        if self._with_ssh:
            self.start('sshd', ['/usr/sbin/sshd', '-D', '-e', '-f',
                                '/etc/ssh/lab_sshd_config'])
        self.start('virtlogd', ['/usr/sbin/virtlogd'])
        if self.front == modular.FRONT:
            for name in modular.DAEMONS[:-1]:
                self.start(name, ['/usr/sbin/' + name])
            self.start('libvirtd', ['/usr/sbin/' + modular.FRONT])
        else:
            self.start('libvirtd', ['/usr/sbin/libvirtd', '--listen'])

    def wait_ready(self, timeout: float = 30) -> None:
        self.wait_port(config.TLS_PORT, timeout, 'libvirtd')
        socket = self.path('/run/libvirt/libvirt-sock')
        self.wait(socket.exists, timeout, 'answering', 'libvirtd')

    @property
    def front(self) -> str:
        """The daemon that listens: libvirtd or virtproxyd."""
        known = state.find()
        return modular.FRONT if known and known.options.modular else 'libvirtd'

    # -- using it ------------------------------------------------------------

    def connect(self, readonly: bool = False):
        """A libvirt.virConnect to the host's libvirtd, past the network."""
        import libvirt
        # Its exceptions say the same; by default it prints them as well.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        return (libvirt.openReadOnly if readonly else libvirt.open)(
            self.local_uri(readonly))

    def dies_of_failed_uploads(self) -> bool:
        """Whether its libvirtd has the fault of 10.1 that 12.7 mends.

        A write error in an upload, such as a full disk, ends the daemon or
        makes it spin.
        """
        with self.connect() as connection:
            return 10_001_000 <= connection.getLibVersion() < 12_007_000

    def local_uri(self, readonly: bool = False) -> str:
        """By which the machine around the lab connects, past the network."""
        return 'qemu:///system?socket=%s' % self.path(
            '/run/libvirt/libvirt-sock%s' % ('-ro' if readonly else ''))

    def uri(self, peer: 'Host') -> str:
        """By which this host connects to another over TLS."""
        return 'qemu+tls://%s/system' % peer.name

    def ssh_attempts(self) -> list[dict]:
        """Uses of ssh, scp, sftp, rsync: time, host, uid, command, parent."""
        return ssh.attempts(self.folder)

    def forget_ssh_attempts(self) -> None:
        (self.folder / 'record' / 'ssh-attempts').write_text('')

    # -- certificates --------------------------------------------------------

    @property
    def certificates(self) -> pki.Hosts:
        return pki.Hosts(config.STATE / 'pki', Machine(config.CONTROL))

    def certificate(self, variant: str) -> None:
        """Give the host a certificate, good or bad; libvirtd is restarted.

        "none" is no certificate as a client: a libvirtd without one as a
        server does not listen. The other hosts learn of a revoked one.

        :param variant: one of pki.VARIANTS
        """
        if variant not in pki.VARIANTS:
            raise LabError('no kind of certificate %r; there are: %s' % (
                variant, ', '.join(pki.VARIANTS)))
        self.certificates.issue(self, variant)
        self._note(variant)
        self._uuid = uuid.UUID(
            self.path('/etc/machine-id').read_text().strip())
        self.configure(no_sanity=variant not in ('good', 'none'))
        self.restart('libvirtd')
        self.wait_ready()
        if variant == 'revoked':
            for peer in map(Host, config.HOSTS):
                if peer.name != self.name:
                    self.certificates.install(peer)
                    guide.run(peer, 'renew')

    def _note(self, variant: str) -> None:
        known = state.find()
        if known:
            known.certificates[self.name] = variant
            known.save()

    # -- full disks ----------------------------------------------------------

    def fill(self, pool: str, leave: int = 0) -> int:
        """Fill the file system of a storage pool; see faults.fill."""
        return faults.fill(self, pool, leave)

    def free(self, pool: str) -> None:
        faults.free(self, pool)

    def discard(self) -> None:
        """Remove the host's folder; it must not run."""
        shutil.rmtree(self.folder, ignore_errors=True)


def both() -> tuple[Host, ...]:
    return tuple(Host(name) for name in config.HOSTS)
