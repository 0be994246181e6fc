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

import os
import pathlib
import time

from lab import config
from lab.host import both
from lab.tests import cloud_case
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import SERIES

RULE = 'os_compute_api:servers:create_image:live'
MEMORY_ID = 'img_live_memory_id'


class LiveImagesCase(CloudTestCase):
    """A cloud in which admins may save memories."""

    lab = SERIES
    images_type = 'libvirt-storage'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.policy = pathlib.Path(config.STATE / 'live-images.yaml')
        cls.policy.write_text('{}\n')
        cls.policy.chmod(0o644)
        if cls.cloud.get('ctl', 'oslo_policy', 'policy_file') != str(
                cls.policy):
            cls.cloud.set('ctl', 'oslo_policy', 'policy_file', cls.policy)
        for host in both():
            if cls.cloud.get(host.name, 'libvirt', 'live_images') != 'true':
                cls.cloud.set(host.name, 'libvirt', 'live_images', 'true')
                cls.addClassCleanup(cls.cloud.set, host.name, 'libvirt',
                                    'live_images', 'false')

    def setUp(self):
        super().setUp()
        self.allow('@')

    def allow(self, rule):
        """oslo.policy reads its file again when it has changed."""
        self.policy.write_text('"%s": "%s"\n' % (RULE, rule))
        now = time.time()
        os.utime(self.policy, (now, now + 1))

    def ask(self, server, name='warm'):
        """:returns: the API's response"""
        return self.cloud.conn.compute.post(
            '/servers/%s/action' % server.id, microversion='2.105',
            json={'createImage': {'name': name, 'memory': True}})

    def capture(self, server, name='warm'):
        """:returns: the image, with a memory"""
        response = self.ask(server, name)
        self.assertEqual(202, response.status_code, response.text)
        image_id = response.json()['image_id']
        self.addCleanup(self.cloud.conn.image.delete_image, image_id,
                        ignore_missing=True)
        server.wait('ACTIVE', limit=300)
        image = self.cloud.conn.image.find_image(image_id)
        self.assertIsNotNone(image, server.actions())
        self.assertEqual('active', image.status)
        memory_id = image.properties.get(MEMORY_ID)
        self.assertTrue(memory_id, image.properties)
        self.addCleanup(self.cloud.conn.image.delete_image, memory_id,
                        ignore_missing=True)
        return image

    def create(self, image, host, **more):
        server = self.cloud.boot(
            'clone-' + host, image=image.id, host=host, wait=False, **more)
        self.addCleanup(server.delete)
        return server

    def clone(self, image, host, **more):
        server = self.create(image, host, **more)
        server.wait('ACTIVE')
        # It doesn't boot, so that its console says nothing.
        server._awake = True
        return server

    def boots(self, server):
        """How often its guest has booted, in its own words."""
        return int(server.command('sh', 'cat /data/boots'))

    def compute_event(self, server):
        """Why the last image of a server could not be made."""
        action = next(self.cloud.conn.compute.server_actions(server.id))
        found = self.cloud.conn.compute.get_server_action(
            action.request_id, server.id)
        return {event['event']: event.get('details')
                for event in found.events}


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
        self.allow('!')
        self.assertEqual(403, self.ask(source).status_code)

    def test_refused(self):
        stopped = self.boot('stopped')
        stopped.stop()
        self.assertEqual(409, self.ask(stopped).status_code)
        disks = self.boot('disks', flavor='lab.small.disks')
        response = self.ask(disks)
        self.assertEqual(409, response.status_code)
        self.assertIn('besides its root disk', response.text)

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


def load_tests(loader, tests, pattern):
    return cloud_case.only_in_full(loader, tests, pattern)
