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

import fixtures
from lxml import etree
from oslo_utils.fixture import uuidsentinel as uuids
import tenacity

from nova import context as nova_context
import nova.privsep.qemu
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_live_images
from nova.tests.functional.api import client
from nova.tests.functional.libvirt import storage_pools
from nova.virt.libvirt.storage.live_image import capture
from nova.virt.libvirt.storage.live_image import store

RULE = 'os_compute_api:servers:create_image:live'
MEMORY_ID = store.MEMORY_ID


class LiveImagesTestBase(storage_pools.StoragePoolsTestBase):

    def setUp(self):
        super().setUp()
        self.guests = self.useFixture(libvirt_live_images.Guests())
        run = nova.privsep.qemu.run_while_it_copies
        self.useFixture(fixtures.MonkeyPatch(
            'nova.privsep.qemu.run_while_it_copies',
            lambda *command: self.guests.convert(*command) or run(*command)))
        # Nobody else owns what libvirt makes here.
        self.useFixture(fixtures.MockPatch('nova.privsep.path.chown'))
        for retried in (capture._let_go_on, capture._put_back,
                        capture._end_jobs):
            self.useFixture(fixtures.MockPatchObject(retried.retry, 'sleep'))
            self.useFixture(fixtures.MockPatchObject(
                retried.retry, 'stop', tenacity.stop_after_attempt(3)))
        # Nova's own user, whose images say whose they are.
        self.useFixture(fixtures.MockPatchObject(
            store, 'service_context', lambda: nova_context.RequestContext(
                user_id=uuids.nova, project_id=uuids.service,
                overwrite=False)))
        self.useFixture(fixtures.MockPatchObject(
            store, '_own_project', return_value=uuids.service))
        self._played = nova_fixtures.GlanceFixture.create
        self.useFixture(fixtures.MockPatchObject(
            self.glance, 'create', self._create_image_of))
        self.flags(force_config_drive=True)
        self.flags(live_images=True, cpu_mode='custom',
                   cpu_models=['Nehalem'], group='libvirt')
        self.policy.set_rules({RULE: '@'}, overwrite=False)
        self.start_compute('compute1')
        self.start_compute('compute2')

    def _create_image_of(self, context, metadata, data=None):
        image = self._played(self.glance, context, metadata, data)
        self.glance.images[image['id']]['owner'] = context.project_id
        image['owner'] = context.project_id
        return image

    def domain(self, host, server):
        return self.connections[host].lookupByUUIDString(server['id'])

    def source(self):
        server = self.boot()
        self.domain('compute1', server).memory = b'warm'
        return server

    def ask(self, server):
        return self.api.post_server_action(server['id'], {
            'createImage': {'name': 'warm', 'memory': True}})['image_id']

    def save(self, server):
        image_id = self.ask(server)
        self._wait_for_server_parameter(
            server, {'OS-EXT-STS:task_state': None})
        if image_id in self.glance.images:
            # As the client of Glance does with empty ones.
            for name in ('kernel_id', 'ramdisk_id'):
                self.glance.images[image_id]['properties'].pop(name)
        return image_id

    def create(self, image_id, host='compute1', flavor=None, **more):
        return self._create_server(
            image_uuid=image_id, flavor_id=flavor or self.flavor(),
            networks='none', host=host, **more)

    def assert_as_before(self, server, before):
        domain = self.domain('compute1', server)
        self.assertEqual(before, domain.XMLDesc(0))
        self.assertEqual(fakelibvirt.VIR_DOMAIN_RUNNING, domain._state)
        self.assertIsNone(domain.job)
        folder = capture.CONF.libvirt.snapshots_directory
        self.assertEqual([], [name for name in os.listdir(folder)
                              if name.startswith('live-image')])


class TestLiveImages(LiveImagesTestBase):

    def told(self, server):
        """What the event of its last action tells."""
        action = self.api.get_instance_actions(server['id'])[0]
        (event,) = [event for event in
                    self.api.get_instance_action_details(
                        server['id'], action['request_id'])['events']
                    if event['event'] == 'compute_live_snapshot_instance']
        return str(event.get('details'))

    def test_save_and_go_on(self):
        source = self.source()
        before = self.domain('compute1', source).XMLDesc(0)
        image_id = self.save(source)
        self.assert_as_before(source, before)
        self.assertEqual(b'warm', self.domain('compute1', source).memory)
        image = self.glance.images[image_id]
        self.assertEqual('active', image['status'])
        memory = self.glance.images[image['properties'][MEMORY_ID]]
        self.assertEqual((uuids.service, 'private'),
                         (memory['owner'], memory['visibility']))
        genids = {etree.fromstring(before).findtext('genid')}
        for host in ('compute1', 'compute2', 'compute2'):
            server = self.create(image_id, host)
            domain = self.domain(host, server)
            # It has not booted.
            self.assertEqual(b'warm', domain.memory)
            self.assertEqual(fakelibvirt.VIR_DOMAIN_RUNNING, domain._state)
            self.assertEqual({}, domain._snapshots)
            # Nor is it in the disk, where it would stay and move along.
            disk = self.guests._file(domain, domain.xml.find(
                "devices/disk[@device='disk']"))
            self.assertNotIn(b'warm', disk.read(0, disk.length))
            self.assertEqual([server['id'] + '_disk.config'], domain.media)
            self.assertEqual(
                server['id'],
                domain.xml.findtext("sysinfo/system/entry[@name='uuid']"))
            genids.add(domain.xml.findtext('genid'))
            self.assert_ready(host, server, disk='qcow2', disk_config='qcow2')
            self._delete_server(server)
            self.assert_nothing_left(server)
        self.assertEqual(4, len(genids))

    def test_policy_as_shipped(self):
        source = self.source()
        self.policy.set_rules({RULE: '!'}, overwrite=False)
        error = self.assertRaises(client.OpenStackApiException, self.ask,
                                  source)
        self.assertEqual(403, error.response.status_code)

    def test_failed_save(self):
        source = self.source()
        before = self.domain('compute1', source).XMLDesc(0)

        def fail(domain):
            raise libvirt_live_images.error('no space left on device')

        for name in ('saving', 'reading'):
            setattr(self.guests, name, fail)
            image_id = self.save(source)
            setattr(self.guests, name, lambda domain: None)
            self.assertNotIn(image_id, self.glance.images)
            self.assertIn('runs on as before', self.told(source))
            self.assert_as_before(source, before)
        self.assertIn(self.save(source), self.glance.images)

    def test_refused_by_the_host(self):
        self.flags(live_images=False, group='libvirt')
        source = self.source()
        image_id = self.save(source)
        self.assertNotIn(image_id, self.glance.images)
        self.assertIn('set [libvirt]/live_images', self.told(source))

    def test_flavor_of_another_size(self):
        image_id = self.save(self.source())
        server = self.create(image_id, flavor=self.flavor(memory_mb=1024),
                             expected_state='ERROR')
        self.assertIn('512 in the image, 1024 in the flavor',
                      server['fault']['message'])
        self.assert_nothing_left(server, 'compute1')

    def test_memory_of_another_disk(self):
        image_id = self.save(self.source())
        foreign = self.glance.create(self.context, {
            **self.glance.images[storage_pools.IMAGE], 'id': uuids.foreign,
            'properties': {MEMORY_ID: self.glance.images[image_id][
                'properties'][MEMORY_ID]}})
        server = self.create(foreign['id'], expected_state='ERROR')
        self.assertIn('belongs to another disk', server['fault']['message'])

    def test_no_host_that_loads_memories(self):
        """Nobody boots it in place of that."""
        image_id = self.save(self.source())
        self.flags(live_images=False, group='libvirt')
        for host in ('compute1', 'compute2'):
            self.restart_compute_service(host)
        self._run_periodics()
        server = self.create(image_id, 'compute2', expected_state='ERROR')
        self.assertIn('No valid host', server['fault']['message'])
        self.assert_no_guest('compute2', server)
