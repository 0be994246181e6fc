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

from lab import config
from lab import live_images
from lab.tests import cloud_case
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import SERIES

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
            kept = clone.command('sh', 'ls /data').split()
            self.assertIn('kept', kept)
            self.assertNotIn('after', kept)
            found = clone.command(
                'sh', 'umount /config 2>/dev/null; for i in 1 2 3 4 5; do '
                'mount -t iso9660 -o ro /dev/sr0 /config && break; sleep 1; '
                'done; cat /config/openstack/latest/meta_data.json')
            self.assertIn(clone.id, found)
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
        self.assertIn('own', clone.command('sh', 'ls /data').split())
        snapshot = clone.snapshot('cold')
        self.addCleanup(self.cloud.conn.image.delete_image, snapshot.id)
        self.assertNotIn(MEMORY_ID, snapshot.properties)
        for clone in clones:
            host = clone.host
            clone.delete()
            self.assertEqual([], clone.left_on(host))

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

    def test_interfaces(self):
        source = self.boot(network=True)
        known = [self.assert_reached(source)]
        image = self.capture(source)
        self.assertEqual(known, [self.assert_reached(source)])
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
