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
"""Servers that are saved with their memory, and others that go on from it."""

import time
from xml.etree import ElementTree

import libvirt

from lab import config
from lab import live_images
from lab.cloud.server import Server
from lab.machine import Machine
from lab.tests import cloud_case
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import SERIES

INACTIVE = libvirt.VIR_DOMAIN_XML_INACTIVE
MEMORY_ID = live_images.MEMORY_ID


class LiveImagesCase(CloudTestCase):
    """A cloud in which admins may save memories."""

    lab = SERIES
    images_type = 'libvirt-storage'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for host in live_images.enable(cls.cloud):
            cls.addClassCleanup(cls.cloud.set, host, 'libvirt',
                                'live_images', 'false')

    def setUp(self):
        super().setUp()
        live_images.allow('@')

    def ask(self, server):
        """:returns: the API's response"""
        return live_images.ask(server, 'warm')

    def capture(self, server):
        """:returns: the image, with a memory"""
        image = live_images.capture(server, 'warm')
        self.addCleanup(live_images.delete, self.cloud, image)
        return image

    def create(self, image, host, **more):
        server = self.cloud.boot(
            'clone-' + host, image=image.id, host=host, wait=False, **more)
        self.addCleanup(server.delete)
        return server

    def clone(self, image, host, **more):
        server = self.create(image, host, **more)
        live_images.goes_on(server)
        return server

    def boots(self, server):
        """How often its guest has booted, in its own words."""
        return int(server.command('sh', 'cat /data/boots'))


class TestLiveImages(LiveImagesCase):

    def test_clones(self):
        source = self.boot()
        source.command('sh', 'echo warm >/run/warm; echo kept >/data/kept')
        source.command('keep-writing', 64)
        boot_id = source.command('sh', 'cat /proc/sys/kernel/random/boot_id')
        with source.domain() as domain:
            before = domain.XMLDesc()
        begun = time.monotonic()
        image = self.capture(source)
        print('captured in %.1f s' % (time.monotonic() - begun))
        with source.domain() as domain:
            self.assertEqual(before, domain.XMLDesc())
        written = int(source.command('sh', 'cat /data/written'))
        source.command('sh', 'echo after >/data/after')
        # The memory is no user's.
        memory = self.cloud.conn.image.get_image(image.properties[MEMORY_ID])
        self.assertNotEqual(image.owner, memory.owner)
        self.assertEqual('private', memory.visibility)
        clones = []
        for host in ('host-a', 'host-a', 'host-b'):
            begun = time.monotonic()
            clone = self.clone(image, host)
            clones.append(clone)
            self.assertEqual('warm', clone.command(
                'sh', 'cat /run/warm').strip())
            print('%s: answered %.1f s after it was asked for' % (
                host, time.monotonic() - begun))
            self.assertEqual(host, clone.host)
            self.assertEqual(boot_id, clone.command(
                'sh', 'cat /proc/sys/kernel/random/boot_id'))
            self.assertEqual(1, self.boots(clone))
            kept = clone.command('sh', 'ls /data || true').split()
            self.assertIn('kept', kept)
            self.assertNotIn('after', kept)
            self.assertEqual(clone.id, clone.command(
                'sh', live_images.WHOSE).strip())
            clone.command('sh', 'echo %s >/data/own; sync' % clone.id)
        for clone in clones:
            self.assertEqual(clone.id, clone.command(
                'sh', 'cat /data/own').strip())
        self.assertGreater(
            int(source.command('sh', 'cat /data/written')), written)
        # From now on it is a server as any other.
        clone = clones[-1]
        clone.hard_reboot()
        clone._awake = False
        self.assertEqual(2, clone.testimony().boot)
        clone.migrate()
        self.assertEqual('host-a', clone.confirm().compute_host)
        self.assertEqual(3, clone.testimony().boot)
        self.assertIn('own', clone.command('sh', 'ls /data || true').split())
        snapshot = clone.snapshot('cold')
        self.addCleanup(self.cloud.conn.image.delete_image, snapshot.id)
        self.assertNotIn(MEMORY_ID, snapshot.properties)
        for clone in clones:
            host = clone.host
            clone.delete()
            self.assertEqual([], clone.left_on(host))

    def test_life_of_a_clone(self):
        """All that a server may go through, without a boot in between."""
        source = self.boot()
        source.command('sh', 'echo warm >/run/warm')
        clone = self.clone(self.capture(source), 'host-a')

        def is_warm(server):
            self.assertEqual('warm', server.command(
                'sh', 'cat /run/warm').strip())
            self.assertEqual(1, self.boots(server))

        is_warm(clone)
        clone.live_migrate('host-b')
        is_warm(clone)
        # It is saved itself, and another one goes on from that.
        again = self.clone(self.capture(clone), 'host-a')
        is_warm(again)
        again.command('sh', 'echo own >/data/own; sync')
        again.rescue()
        again.unrescue()
        self.assertEqual(2, again.testimony().boot)
        again.resize('lab.medium')
        again.confirm()
        self.assertIn('own', again.command('sh', 'ls /data || true').split())
        for server in (again, clone):
            server.delete()
            self.assert_nothing_left(server)

    def test_another_project(self):
        """It may see the disk, and doesn't get the memory."""
        image = self.capture(self.boot())
        identity = self.cloud.conn.identity
        project = identity.create_project(
            name='another', domain_id='default')
        self.addCleanup(identity.delete_project, project.id)
        identity.assign_project_role_to_user(
            project.id, self.cloud.conn.current_user_id,
            identity.find_role('admin').id)
        compute = self.cloud.conn_in('another').compute
        made = compute.create_server(
            name='thief', image_id=image.id, networks='none',
            flavor_id=self.cloud.flavor('lab.small').id, host='host-a')
        thief = Server(self.cloud, made.id)
        self.addCleanup(thief.delete)
        self.assertIn('another project', thief.wait('ERROR').fault['message'])
        self.assertEqual([], thief.left_on('host-a'))

    def test_policy_as_shipped(self):
        source = self.boot()
        live_images.allow('!')
        self.assertEqual(403, self.ask(source).status_code)

    def test_refused(self):
        stopped = self.boot('stopped')
        stopped.stop()
        self.assertEqual(409, self.ask(stopped).status_code)
        disks = self.boot('disks', flavor='lab.small.disks')
        response = self.ask(disks)
        self.assertEqual(409, response.status_code)
        self.assertIn('besides its root disk', response.text)

    def test_memory_of_a_deleted_image(self):
        source = self.boot()
        image, kept = self.capture(source), self.capture(source)
        self.cloud.conn.image.delete_image(image.id)

        def purge(*words):
            done = self.cloud.manage('libvirt', 'purge_memories', *words,
                                     check=False)
            return done.returncode, done.stdout

        gone, stays = image.properties[MEMORY_ID], kept.properties[MEMORY_ID]
        # It may be on its way to Glance, for all that is known of it.
        code, said = purge()
        self.assertEqual(0, code, said)
        for memory in (gone, stays):
            self.assertNotIn(memory, said)
        code, said = purge('--older-than', '0', '--dry-run')
        self.assertEqual(3, code, said)
        self.assertIn(gone, said)
        code, said = purge('--older-than', '0')
        self.assertEqual(0, code, said)
        self.assertIn('Deleted memory ' + gone, said)
        self.assertNotIn(stays, said)
        self.assertIsNone(self.cloud.conn.image.find_image(gone))
        self.assertEqual(
            'active', self.cloud.conn.image.get_image(stays).status)

    def test_refused_by_the_host(self):
        """Another flavor's size; a host that loads none; a foreign disk."""
        source = self.boot()
        image = self.capture(source)
        bigger = self.create(image, 'host-a', flavor='lab.medium')
        self.assertIn('in the image', bigger.wait('ERROR').fault['message'])
        foreign = self.copy_image('foreign', **{
            MEMORY_ID: image.properties[MEMORY_ID]})
        thief = self.create(foreign, 'host-a')
        self.assertIn('another disk', thief.wait('ERROR').fault['message'])
        self.cloud.set('host-b', 'libvirt', 'live_images', 'false')
        self.addCleanup(self.cloud.set, 'host-b', 'libvirt', 'live_images',
                        'true')
        other = self.create(image, 'host-b')
        self.assertIn('No valid host', other.wait('ERROR').fault['message'])


class TestGlance(LiveImagesCase):
    """The image service is away."""

    def test_at_capture(self):
        source = self.boot(host='host-a')
        source.command('keep-writing', 64)
        with source.domain() as domain:
            before = domain.XMLDesc()
        log = self.cloud.compute_log('host-a')
        offset = log.stat().st_size
        response = self.ask(source)
        self.assertEqual(202, response.status_code, response.text)
        image_id = response.json()['image_id']
        until = time.monotonic() + 120
        while not live_images.pauses(log, offset):
            self.assertLess(time.monotonic(), until, 'it is not saved')
            time.sleep(.05)
        # The guest goes on; its disk is being read.
        Machine(config.CONTROL).stop('glance')
        try:
            source.wait('ACTIVE', limit=300)
        finally:
            self.cloud.restart(config.CONTROL, 'glance')
        self.assertNotEqual(
            'active', self.cloud.conn.image.get_image(image_id).status)
        self.cloud.conn.image.delete_image(image_id)
        self.assertIn('lance', live_images.why(source))
        with source.domain() as domain:
            self.assertEqual(before, domain.XMLDesc())
        self.assertEqual([], [path for path in source.left_on('host-a')
                              if 'live-image' in path])
        written = int(source.command('sh', 'cat /data/written'))
        # No memory is left over, and the next one goes well.
        image = self.capture(source)
        done = self.cloud.manage('libvirt', 'purge_memories', '--older-than',
                                 '0', '--dry-run', check=False)
        self.assertEqual(0, done.returncode, done.stdout)
        clone = self.clone(image, 'host-b')
        self.assertGreaterEqual(
            int(clone.command('sh', 'cat /data/written')), written)

    def test_at_boot(self):
        """A host can't reach it; the memory is in nobody's cache there."""
        image = self.capture(self.boot(host='host-a'))
        option = 'host-b', 'glance', 'api_servers'
        before = self.cloud.get(*option)
        self.cloud.set(*option, 'http://10.97.0.1:9')
        try:
            clone = self.create(image, 'host-b')
            fault = clone.wait('ERROR').fault['message']
            print(fault)
            self.assertEqual([], clone.left_on('host-b'))
        finally:
            self.cloud.set(*option, before)
        self.assertEqual(1, self.boots(self.clone(image, 'host-b')))


class TestNics(LiveImagesCase):
    """Interfaces are out of the memory, and every server has its own."""

    lab = {**SERIES, 'network': 'ovs'}

    def assert_reached(self, server):
        """It has the interface of its port, and is reached there."""
        # What a guest does that is told of a new interface; it has no udev.
        server.command('sh', 'killall udhcpc; network start')
        server.ping()
        (port,) = self.cloud.conn.network.ports(device_id=server.id)
        self.assertEqual('ACTIVE', port.status)
        (interface,) = server.look().interfaces.values()
        self.assertEqual(
            (port.mac_address, server.address),
            (interface['mac'], interface['address']))
        return interface['mac'], interface['address']

    def places(self, server, flags):
        """:returns: MAC -> PCI address, as libvirt has them"""
        with server.domain() as domain:
            root = ElementTree.fromstring(domain.XMLDesc(flags))
        return {interface.find('mac').get('address'):
                interface.find('address').attrib
                for interface in root.iterfind('devices/interface')}

    def test_interfaces(self):
        source = self.boot(network=True)
        known = [self.assert_reached(source)]
        before = [self.places(source, flags) for flags in (0, INACTIVE)]
        image = self.capture(source)
        self.assertEqual(known, [self.assert_reached(source)])
        self.assertEqual(
            before, [self.places(source, flags) for flags in (0, INACTIVE)])
        self.assertNotIn('at another address',
                         self.service_log(source.host))
        for host in config.HOSTS:
            clone = self.clone(image, host, network=True)
            known.append(self.assert_reached(clone))
            self.assertEqual(1, self.boots(clone))
        macs, addresses = zip(*known, strict=True)
        self.assertEqual((3, 3), (len(set(macs)), len(set(addresses))))
        source.ping()
        # As any other's from now on.
        clone.hard_reboot()
        clone._awake = False
        self.assertEqual(2, clone.testimony().boot)
        clone.ping()
        self.assertEqual(known[-1], self.assert_reached(clone))
        clone.delete()
        self.assertEqual([], list(self.cloud.conn.network.ports(
            device_id=clone.id)))

    def test_without_a_network(self):
        """It may be one with interfaces, and others without any."""
        source = self.boot(network=True)
        clone = self.clone(self.capture(source), 'host-b')
        self.assertEqual('', clone.command(
            'sh', 'ls /sys/class/net | grep -v lo || true').strip())
        self.assert_reached(source)


def load_tests(loader, tests, pattern):
    return cloud_case.only_in_full(loader, tests, pattern)
