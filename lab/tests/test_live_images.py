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
"""Guests that are saved with their memory, and go on as others.

Real libvirt and QEMU on two hosts, Nova's own code on both (imager.py), guests
that really run. There is no network service, no image service and no API.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import unittest
import uuid
from xml.etree import ElementTree

import libvirt

from lab import config
from lab.guest import image as guest_image
from lab.guest import testimony as words
from lab import nova_user
from lab.tests import cloud_case
from lab.tests import imager
from lab.tests import mover
from lab.tests import test_moves

POOLS = test_moves.POOLS
FOLDER = imager.FOLDER
SIZE = 128 << 20
MAC = '52:54:00:00:00:%02x'
DOMAIN = '''
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid>{genid}
  <memory unit='KiB'>{memory}</memory><vcpu>1</vcpu>
  <sysinfo type='smbios'><system>
    <entry name='serial'>{uuid}</entry><entry name='uuid'>{uuid}</entry>
  </system></sysinfo>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/>
    <smbios mode='sysinfo'/></os>
  <features><acpi/><apic/></features>
  <cpu mode='custom' match='exact'><model>Nehalem</model></cpu>
  <clock offset='utc'/>
  <devices>
    <disk type='volume' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source pool='{pool}' volume='{uuid}_disk'/>
      <target dev='vda' bus='virtio'/></disk>
    <disk type='volume' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source pool='{pool}' volume='{uuid}_disk.config'/>
      <target dev='hda' bus='ide'/></disk>
    <interface type='ethernet'><mac address='{mac}'/>
      <model type='virtio'/>
      <address type='pci' domain='0' bus='0' slot='{slot}' function='0'/>
    </interface>
    <serial type='pty'><log file='{folder}/{name}.log' append='off'/></serial>
    <graphics type='vnc' autoport='yes' listen='127.0.0.1'/>
    <video><model type='cirrus'/></video>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>'''


class Service(test_moves.Compute):
    """imager.py in a host."""

    module = 'lab.tests.imager'


class Guest:
    """A guest of a host, at its console.

    :ivar host: the lab.Host
    """

    def __init__(self, host, number, genid='<genid/>', memory=256 << 10):
        self.host, self.uuid = host, str(uuid.uuid4())
        self.name = 'guest-%d' % number
        self.mac = MAC % number
        self.xml = DOMAIN.format(
            name=self.name, uuid=self.uuid, genid=genid, memory=memory,
            pool=mover.DISKS, mac=self.mac, folder=FOLDER,
            # Others before it are free.
            slot='0x0a')
        self._commands = 0

    @contextlib.contextmanager
    def domain(self):
        with contextlib.closing(self.host.connect()) as connection:
            yield connection.lookupByUUIDString(self.uuid)

    def volume(self, name):
        return self.host.path(POOLS[mover.DISKS]) / (
            '%s_%s' % (self.uuid, name))

    def make_config_drive(self):
        folder = config.STATE / 'config-drive'
        shutil.rmtree(folder, ignore_errors=True)
        (folder / 'openstack/latest').mkdir(parents=True)
        (folder / 'openstack/latest/meta_data.json').write_text(json.dumps(
            {'uuid': self.uuid, 'name': self.name}))
        subprocess.run(
            ['genisoimage', '-quiet', '-o', self.volume('disk.config'),
             '-ldots', '-allow-lowercase', '-allow-multidot', '-l', '-J',
             '-r', '-V', 'config-2', folder], check=True)

    def console(self):
        path = self.host.path('%s/%s.log' % (FOLDER, self.name))
        return path.read_text(errors='replace') if path.exists() else ''

    def wait(self, found, what, limit=400):
        until = time.monotonic() + limit
        while not (value := found()):
            if time.monotonic() > until:
                raise AssertionError('%s: no %s in %d s; its console ends '
                                     'with:\n%s' % (
                                         self.name, what, limit,
                                         self.console()[-1500:]))
            time.sleep(.05)
        return value

    def command(self, *words_, limit=60):
        """Type a command, until the guest answers."""
        self._commands += 1
        number = 'c%d%s' % (self._commands, self.name.replace('-', ''))
        line = ' '.join(map(str, (number, *words_))) + '\n'
        until = time.monotonic() + limit
        while time.monotonic() < until:
            # QEMU looks once a second whether anybody has opened its pty.
            with self.domain() as domain:
                stream = domain.connect().newStream(0)
                domain.openConsole(None, stream, 1)
                try:
                    stream.send(b'\n' + line.encode())
                    for _ in range(100):
                        reply = words.replies(self.console()).get(number)
                        if reply is not None:
                            return reply
                        time.sleep(.1)
                finally:
                    with contextlib.suppress(libvirt.libvirtError):
                        stream.abort()
        raise AssertionError(
            '%s does not answer to %r; its console ends with:\n%s' % (
                self.name, line, self.console()[-1500:]))

    def sh(self, command):
        return self.command('sh', command)['output']

    def boots(self):
        return [event['boot'] for event in words.events(self.console())
                if event['event'] == 'ready']


class LiveImagesTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.a, cls.b, folder = test_moves.two_hosts(
            cls, 'live-images', POOLS, 'live_image/capture.py',
            'the tree saves no memory')
        cls.guest_image = guest_image.ensure(
            config.CACHE / 'guest') / 'guest.raw'
        database = folder / 'database.json'
        database.write_text(json.dumps(
            {'offer': None, 'driver_info': {}, 'mappings': [], 'disks': {}}))
        cls.services = {}
        for host in (cls.a, cls.b):
            service = Service(host, str(database), cls.b.name)
            cls.services[host.name] = service
            cls.addClassCleanup(service.close)
        cls.numbers = iter(range(1, 200))
        with contextlib.closing(cls.a.connect()) as connection:
            #: Whether QEMU leaves the disks to whom libvirt asks it for.
            cls.saves = connection.getVersion() < 10000000 or (
                connection.getLibVersion() >= 12008000)

    def guest(self, host=None, **more):
        """A guest that has booted."""
        guest = Guest(host or self.a, next(self.numbers), **more)
        self.addCleanup(self.destroy, guest)
        path = guest.volume('disk')
        subprocess.run(['qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2',
                        self.guest_image, path], check=True)
        subprocess.run(['qemu-img', 'resize', '-q', '-f', 'qcow2', path,
                        str(SIZE)], check=True)
        guest.make_config_drive()
        self.own(guest)
        with contextlib.closing(guest.host.connect()) as connection:
            connection.defineXML(guest.xml).create()
        guest.wait(guest.boots, 'ready guest')
        return guest

    def own(self, guest):
        for name in ('disk', 'disk.config'):
            if guest.volume(name).exists():
                os.chown(guest.volume(name), nova_user.ID, nova_user.ID)
        with contextlib.closing(guest.host.connect()) as connection:
            connection.storagePoolLookupByName(mover.DISKS).refresh()

    def destroy(self, guest):
        with contextlib.suppress(Exception), guest.domain() as domain:
            if domain.isActive():
                domain.destroy()
            domain.undefineFlags(2)
        for name in ('disk', 'disk.config'):
            guest.volume(name).unlink(missing_ok=True)

    def capture(self, guest, name, **more):
        return self.services[guest.host.name](
            'capture', uuid=guest.uuid, macs=[guest.mac], name=name, **more)

    def bring(self, name, host):
        """Have an image on a host, in its image cache."""
        if host is not self.a:
            for suffix in ('disk', 'memory'):
                path = '%s/%s.%s' % (FOLDER, name, suffix)
                shutil.copy(self.a.path(path), host.path(path))
                os.chown(host.path(path), nova_user.ID, nova_user.ID)
        self.services[host.name]('cache', name=name)

    def clone(self, name, host, **more):
        guest = Guest(host, next(self.numbers), **more)
        self.addCleanup(self.destroy, guest)
        guest.make_config_drive()
        self.own(guest)
        guest.times = self.services[host.name](
            'boot', uuid=guest.uuid, name=name, own=guest.xml)
        return guest

    def left(self, host=None):
        folder = (host or self.a).path(FOLDER + '/snapshots')
        return sorted(folder.iterdir()) if folder.exists() else []

    def normal(self, guest):
        """Its definition, without what an interface has that came anew."""
        with guest.domain() as domain:
            root = ElementTree.fromstring(domain.XMLDesc())
            for interface in root.iterfind('devices/interface'):
                for tag in ('alias', 'target'):
                    for found in interface.findall(tag):
                        interface.remove(found)
            return ElementTree.tostring(root)

    def assert_runs(self, guest):
        with guest.domain() as domain:
            self.assertEqual(1, domain.state()[0])
            self.assertEqual(0, domain.snapshotNum())
            self.assertIn(guest.mac, domain.XMLDesc())
            self.assertEqual(0, domain.jobInfo()[0])


class SavingTest(LiveImagesTest):

    def setUp(self):
        super().setUp()
        if not self.saves:
            self.skipTest('libvirt and QEMU of the hosts save no memory')


class TestVersions(LiveImagesTest):

    def test_refused_before_anything_happens(self):
        """As on Debian 13."""
        if self.saves:
            self.skipTest('libvirt and QEMU of the hosts save memories')
        source = self.guest()
        before = self.normal(source)
        with self.assertRaisesRegex(test_moves.StepFailed, 'takes libvirt'):
            self.capture(source, 'never')
        self.assert_runs(source)
        self.assertEqual(before, self.normal(source))
        self.assertEqual([], self.left())
        self.assertEqual('fine', source.sh('echo fine').strip())


class TestClones(SavingTest):

    def test_three_clones_on_two_hosts(self):
        source = self.guest()
        source.command('sh', 'echo warm >/run/warm; echo kept >/data/kept')
        boot_id = source.sh('cat /proc/sys/kernel/random/boot_id')
        source.command('keep-writing', 64)
        before = self.normal(source)
        saved = self.capture(source, 'one')
        print('capture:', saved, file=sys.stderr)
        self.assertLess(saved['pause'], 5)
        self.assertEqual(SIZE, saved['capacity'])
        self.assertEqual(before, self.normal(source))
        self.assert_runs(source)
        self.assertEqual([], self.left())
        written = int(source.sh('cat /data/written'))
        source.command('sh', 'echo after >/data/after')
        clones = []
        for host in (self.a, self.b):
            self.bring('one', host)
        for host in (self.a, self.a, self.b):
            clone = self.clone('one', host)
            clones.append(clone)
            print(host.name, clone.times, file=sys.stderr)
        genids = set()
        for clone in clones:
            self.assert_runs(clone)
            # It did not boot.
            self.assertEqual('warm', clone.sh('cat /run/warm').strip())
            self.assertEqual([], clone.boots())
            self.assertEqual(boot_id, clone.sh(
                'cat /proc/sys/kernel/random/boot_id'))
            # The disk is of the moment of the memory.
            self.assertEqual('kept', clone.sh('cat /data/kept').strip())
            self.assertNotIn('after', clone.sh('ls /data'))
            self.assertLessEqual(1, int(clone.sh('cat /data/written')))
            # It goes on writing, to a disk of its own.
            first = int(clone.sh('cat /data/written'))
            clone.wait(lambda: int(clone.sh('cat /data/written')) > first,
                       'write', 20)
            clone.command('sh', 'echo %s >/data/own; sync' % clone.name)
            # Who it is, it finds in a new config drive and a new interface.
            found = clone.sh(
                'umount /config 2>/dev/null; for i in 1 2 3 4 5; do '
                'mount -t iso9660 -o ro /dev/sr0 /config && break; sleep 1; '
                'done; cat /config/openstack/latest/meta_data.json')
            self.assertIn(clone.uuid, found)
            self.assertEqual(clone.mac, clone.wait(
                lambda: clone.sh('cat /sys/class/net/eth0/address').strip(),
                'interface', 20))
            with clone.domain() as domain:
                genids.add(re.search('<genid>(.*)</genid>',
                                     domain.XMLDesc())[1])
        with source.domain() as domain:
            genids.add(re.search('<genid>(.*)</genid>', domain.XMLDesc())[1])
        self.assertEqual(4, len(genids))
        for clone in clones:
            self.assertEqual(clone.name, clone.sh('cat /data/own').strip())
        self.assertGreater(int(source.sh('cat /data/written')), written)
        self.assertEqual('after', source.sh('cat /data/after').strip())
        # From now on it is a guest as any other.
        clone = clones[-1]
        with clone.domain() as domain:
            domain.destroy()
        check = clone.host.run(
            ['qemu-img', 'check', '-f', 'qcow2', '-U', '%s/%s_disk' % (
                POOLS[mover.DISKS], clone.uuid)], check=False)
        self.assertEqual(0, check.returncode, check.stdout + check.stderr)
        with clone.domain() as domain:
            domain.create()
        clone.wait(clone.boots, 'boot')
        self.assertEqual([2], clone.boots())
        # and can be saved itself.
        self.assertGreater(self.capture(clone, 'two')['stream'], 1 << 20)


class TestFaults(SavingTest):
    """What is killed, full or too slow while a guest is saved."""

    def setUp(self):
        super().setUp()
        self.service = self.services[self.a.name]

    def assert_right(self, source, before):
        self.assert_runs(source)
        self.assertEqual(before, self.normal(source))
        self.assertEqual([], self.left())
        self.assertEqual('fine', source.sh('echo fine').strip())

    def test_compute_is_killed(self):
        source = self.guest()
        before = self.normal(source)
        for step in ('detached', 'memory', 'disk', 'resumed', 'attached',
                     'copied', 'ended'):
            with self.subTest(step=step):
                self.service('die_at', row=step)
                with self.assertRaisesRegex(test_moves.StepFailed, 'killed'):
                    self.capture(source, 'never')
                self.service.kill()
                found, left = self.service('recover', macs=[source.mac])
                self.assertEqual([source.uuid], found)
                self.assertEqual([], left)
                self.assert_right(source, before)
        self.capture(source, 'after-kills')
        self.assert_right(source, before)

    def saving(self):
        """A guest whose memory libvirt is writing, and its state before."""
        source = self.guest()
        before = self.normal(source)
        self.service.begin('capture', uuid=source.uuid, macs=[source.mac],
                           name='never')
        path = self.a.path(FOLDER + '/snapshots/live-image-%s/memory' %
                           source.uuid)
        source.wait(path.exists, 'memory')
        return source, before

    def test_compute_is_killed_while_libvirt_saves(self):
        """libvirt goes on with it, and leaves the guest paused."""
        source, before = self.saving()
        self.service.kill()
        self.assertEqual([[source.uuid], []],
                         self.service('recover', macs=[source.mac]))
        self.assert_right(source, before)

    def test_libvirtd_is_killed(self):
        source, before = self.saving()
        self.a.kill('libvirtd')
        self.a.restart('libvirtd')
        self.a.wait_ready()
        with self.assertRaises(test_moves.StepFailed) as error:
            self.service.answer()
        print(error.exception, file=sys.stderr)
        if self.left():
            self.service('recover', macs=[source.mac])
        self.assert_right(source, before)
        self.capture(source, 'after-libvirtd')
        self.assert_right(source, before)

    def test_disk_is_full(self):
        source = self.guest()
        before = self.normal(source)
        for leave in (1 << 20, 60 << 20):
            self.a.fill(mover.DISKS, leave=leave)
            try:
                with self.assertRaises(test_moves.StepFailed) as error:
                    self.capture(source, 'never')
            finally:
                self.a.free(mover.DISKS)
            print(error.exception, file=sys.stderr)
            self.assert_right(source, before)

    def test_refused(self):
        source = self.guest(genid='')
        before = self.normal(source)
        with self.assertRaisesRegex(test_moves.StepFailed, 'hard reboot it'):
            self.capture(source, 'never')
        self.assert_right(source, before)

    def test_limit(self):
        """A guest that changes all its memory all the time."""
        source = self.guest()
        before = self.normal(source)
        source.command(
            'sh', '(while :; do dd if=/dev/urandom of=/run/busy bs=1M '
            'count=100; done) >/dev/null 2>&1 & echo begun')
        time.sleep(20)
        saved = self.capture(source, 'busy', timeout=2)
        print('busy:', saved, file=sys.stderr)
        self.assert_right(source, before)
        self.bring('busy', self.a)
        clone = self.clone('busy', self.a)
        self.assertEqual('fine', clone.sh('echo fine').strip())

    def test_image_that_does_not_fit(self):
        source = self.guest()
        self.capture(source, 'fit')
        self.bring('fit', self.a)
        before = sorted(self.a.path(POOLS[mover.DISKS]).iterdir())
        for flavor, text in (({'memory_mb': 512}, '256 in the image, 512'),
                             ({'vcpus': 2}, '1 in the image, 2'),
                             ({'root_gb': 1}, 'root disk')):
            guest = Guest(self.a, next(self.numbers))
            with self.assertRaisesRegex(test_moves.StepFailed, text):
                self.service('boot', uuid=guest.uuid, name='fit',
                             own=guest.xml, **flavor)
        memory = self.a.path(FOLDER + '/fit.memory')
        whole = memory.read_bytes()
        for damage in (whole[:-1], whole[4096:], b''):
            memory.write_bytes(damage)
            guest = Guest(self.a, next(self.numbers))
            with self.assertRaisesRegex(test_moves.StepFailed,
                                        'LiveImageUnusable'):
                self.service('boot', uuid=guest.uuid, name='fit',
                             own=guest.xml)
        # QEMU's own words about a stream that it can't read.
        at = whole.index(b'QEVM')
        memory.write_bytes(whole[:at] + b'QEVX' + whole[at + 4:])
        guest = Guest(self.a, next(self.numbers))
        self.addCleanup(self.destroy, guest)
        guest.make_config_drive()
        self.own(guest)
        with self.assertRaisesRegex(test_moves.StepFailed,
                                    'LiveImageUnusable') as error:
            self.service('boot', uuid=guest.uuid, name='fit', own=guest.xml)
        print(error.exception, file=sys.stderr)
        with guest.domain() as domain:
            self.assertFalse(domain.isActive())
        self.destroy(guest)
        self.assertEqual(before, sorted(
            self.a.path(POOLS[mover.DISKS]).iterdir()))


def load_tests(loader, tests, pattern):
    return cloud_case.only_in_full(loader, tests, pattern)
