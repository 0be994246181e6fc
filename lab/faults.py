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

"""What goes wrong on demand: links and full disks."""

import contextlib
import os
import pathlib
import re
import sys

from lxml import etree

from . import config
from . import network
from .errors import LabError

RELAY = 'link-delay'
FILL = '.lab-fill'


class Link:
    """A host's link to the bridge.

    :param host: Machine at its far end
    :param control: Machine at whose bridge it ends
    """

    def __init__(self, host, control):
        self.host, self.control = host, control
        self.port = config.port(host.name)
        self.relay = '%s-%s' % (RELAY, host.name)
        self.tap = 'delay' + self.port.removeprefix(config.BRIDGE)

    def cut(self) -> None:
        """Nothing passes and nobody is told, as when a switch has died."""
        network.ip('link set %s nomaster' % self._bridged,
                   machine=self.control.name)

    def slow(self, rate: str) -> None:
        """Limit both directions.

        :param rate: as tc(8) has it: "10mbit", "500kbit" (bits), "10mibps"
            (bytes) a second
        """
        for machine, device in self._ends():
            # A burst of a timer tick at the rate; 64 KiB is a GSO packet.
            machine.run(['tc', 'qdisc', 'replace', 'dev', device, 'root',
                         'tbf', 'rate', rate, 'burst', '128kb',
                         'latency', '200ms'])

    def delay(self, milliseconds: float) -> None:
        """Hold back each packet, in both directions, by so much.

        By a relay in user space: not every kernel has netem.
        """
        if milliseconds <= 0:
            raise LabError('the delay must be above 0 ms')
        self._end_relay()
        for machine, device in self._ends():
            machine.run(['ethtool', '-K', device, 'tx', 'off'])
        network.ip('link set %s nomaster' % self.port,
                   'tuntap add dev %s mode tap' % self.tap,
                   'link set %s master %s up' % (self.tap, config.BRIDGE),
                   machine=self.control.name)
        self.control.start(self.relay, [
            sys.executable, '-SE',
            pathlib.Path(__file__).with_name('relay.py'), self.port, self.tap,
            milliseconds])

    def restore(self) -> None:
        """Undo all of this."""
        self._end_relay()
        network.ip('link set %s master %s up' % (self.port, config.BRIDGE),
                   machine=self.control.name)
        for machine, device in self._ends():
            machine.run(['tc', 'qdisc', 'del', 'dev', device, 'root'],
                        check=False)
            machine.run(['ethtool', '-K', device, 'tx', 'on'], check=False)

    def faulty(self) -> str:
        """What is wrong with the link, in words; '' when nothing is."""
        found = []
        if self._has_relay():
            found.append('delayed')
        master = self.control.run(
            ['ip', '-o', 'link', 'show', 'master', config.BRIDGE]).stdout
        if ' %s@' % self.port not in master and ' %s:' % self.tap not in (
                master):
            found.append('cut')
        if 'tbf' in self.host.run(['tc', 'qdisc', 'show', 'dev',
                                   config.BRIDGE]).stdout:
            found.append('slowed')
        return ', '.join(found)

    @contextlib.contextmanager
    def as_cut(self):
        """Cut as long as the context lasts."""
        self.cut()
        try:
            yield
        finally:
            self.restore()

    @contextlib.contextmanager
    def slowed(self, rate: str):
        """Slow as long as the context lasts."""
        self.slow(rate)
        try:
            yield
        finally:
            self.restore()

    @property
    def _bridged(self) -> str:
        return self.tap if self._has_relay() else self.port

    def _ends(self):
        return (self.host, config.BRIDGE), (self.control, self.port)

    def _has_relay(self) -> bool:
        try:
            return self.control.service(self.relay).alive()
        except LabError:
            return False

    def _end_relay(self) -> None:
        if self._has_relay():
            self.control.stop(self.relay)
        self.control.forget(self.relay)
        if self.tap in self.control.run(
                ['ip', '-o', 'link', 'show', 'type', 'tun']).stdout:
            network.ip('link del %s' % self.tap, machine=self.control.name)


def rate(text: str) -> str:
    """Check what a user gives as a rate, before tc does.

    :raises: LabError
    """
    if not re.fullmatch(r'\d+(\.\d+)?([kmgt]i?)?(bit|bps)', text.lower()):
        raise LabError('%r is no rate: a number and kbit, mbit, kbps '
                       '(bytes) ..., as in 10mbit' % text)
    return text.lower()


def _mount_of(host, pool: str) -> pathlib.Path:
    """The root, seen from outside, of the file system a pool lies on."""
    import libvirt
    with contextlib.closing(host.connect()) as connection:
        try:
            xml = connection.storagePoolLookupByName(pool).XMLDesc()
        except libvirt.libvirtError as error:
            raise LabError('%s: %s' % (host.name, error)) from None
    target = etree.fromstring(xml).findtext('target/path')
    if not target or not target.startswith('/'):
        raise LabError('storage pool %s has no folder to fill' % pool)
    path = host.path(target)
    try:
        device = path.stat().st_dev
    except FileNotFoundError:
        raise LabError('storage pool %s: there is no %s on %s' % (
            pool, target, host.name)) from None
    # A pool on the machine's own disk would fill it for everybody.
    if device == os.stat(config.ROOT).st_dev or device == os.stat(
            '/').st_dev:
        raise LabError(
            'storage pool %s lies in %s, on the disk of the machine itself; '
            'only one below /var/lib/nova or on a file system mounted in the '
            'host can be filled' % (pool, target))
    top = host.path('/')
    while path != top and path.parent.stat().st_dev == device:
        path = path.parent
    return path


def fill(host, pool: str, leave: int = 0) -> int:
    """Fill the file system on which a storage pool lies.

    :param leave: bytes that stay available; the file system's blocks round
    :returns: bytes that are available now
    :raises: LabError where the pool isn't on a file system of the lab's own
    """
    top = _mount_of(host, pool)
    fd = os.open(top / FILL, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        size = os.fstat(fd).st_size
        while True:
            now = os.statvfs(top)
            spare = now.f_bavail * now.f_frsize - leave
            # Metadata takes some as the file grows, so by and by.
            step = spare if spare < 16 * now.f_frsize else spare * 31 // 32
            step -= step % now.f_frsize
            if step < now.f_frsize:
                break
            try:
                os.posix_fallocate(fd, size, step)
            except OSError:
                break
            size += step
        now = os.statvfs(top)
        return now.f_bavail * now.f_frsize
    finally:
        os.close(fd)


def free(host, pool: str) -> None:
    """Undo fill()."""
    (_mount_of(host, pool) / FILL).unlink(missing_ok=True)
