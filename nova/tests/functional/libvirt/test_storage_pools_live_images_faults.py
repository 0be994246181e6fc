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
"""Each effect of saving a server with its memory fails, and of its start.

Or the compute that is at it dies before or after that effect.
"""

import os

import ddt

from nova import exception
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_faults
from nova.tests.functional.api import client
from nova.tests.functional.libvirt import test_storage_pools_live_images
from nova.virt.libvirt.storage.live_image import capture
from nova.virt.libvirt.storage.live_image import store

# More than there are
EFFECTS = 50


def failed_in_glance(what):
    return exception.ImageDeleteConflict(reason=what)


@ddt.ddt
class TestFaults(test_storage_pools_live_images.LiveImagesTestBase):

    def setUp(self):
        super().setUp()
        os.makedirs(capture.CONF.libvirt.snapshots_directory)
        self.threads = self.useFixture(libvirt_faults.Threads())
        self.faults = self.useFixture(libvirt_faults.Faults(self.hosts, (
            (fakelibvirt.Domain, (
                'snapshotCreateXML', 'backupBegin', 'abortJob',
                'revertToSnapshot', 'updateDeviceFlags'),
             libvirt_faults.failed_in_libvirt),
            (nova_fixtures.GlanceFixture, (
                'create', 'update', 'delete', 'download'), failed_in_glance),
        )))

    def each(self, kind, do, check):
        """Do something as often as it has effects, of which one fails.

        :param do: what is done
        :param check: what has to hold then, with all hosts at work again
        """
        for number in range(1, EFFECTS):
            self.faults.arm(number, kind)
            try:
                do()
            except client.OpenStackApiException:
                # What the API casts is a call here.
                pass
            self.threads.wait()
            came = self.faults.came
            self.faults.disarm()
            for host in sorted(self.faults.dead):
                self.faults.dead.remove(host)
                self.restart_compute_service(host)
            try:
                check()
            except Exception as e:
                e.add_note('with the %d. effect: %s' % (number, came))
                raise
            if came is None:
                return
        self.fail('it has more than %d effects' % EFFECTS)

    @ddt.data('error', 'kill', 'kill after')
    def test_save(self, kind):
        source = self.source()
        before = self.domain('compute1', source).XMLDesc(0)

        def check():
            self.assert_as_before(source, before)
            server = self.api.get_server(source['id'])
            self.assertEqual(('ACTIVE', None), (
                server['status'], server['OS-EXT-STS:task_state']))
            for image in self.glance.images.values():
                self.assertIn(image['properties'].get(store.MEMORY_ID),
                              {None, *self.glance.images})

        self.each(kind, lambda: self.ask(source), check)
        self.create(self.save(source))

    @ddt.data('error', 'kill', 'kill after')
    def test_create(self, kind):
        """It goes on from the memory, or is in error; it never boots."""
        image_id, flavor = self.save(self.source()), self.flavor()
        self.started = 0

        def create():
            self.api.post_server({'server': self._build_server(
                image_uuid=image_id, flavor_id=flavor, networks='none',
                host='compute2', name='goes-on')})

        def check():
            for server in self.api.get_servers(search_opts={'name': 'goes'}):
                self.check_and_delete(server)

        self.each(kind, create, check)
        self.assertGreater(self.started, 0)

    def check_and_delete(self, server):
        if server['status'] == 'ACTIVE':
            domain = self.domain('compute2', server)
            self.assertEqual(
                (b'warm', fakelibvirt.VIR_DOMAIN_RUNNING, {}),
                (domain.memory, domain._state, domain._snapshots))
            self.started += 1
        self._delete_server(server)
        self.threads.wait()
        manager = self.computes['compute2'].manager
        with self.hosts.on('compute2'):
            # If the save has failed that tells where it is
            manager._cleanup_running_deleted_instances(self.context)
        self.sweep('compute2')
        self.assert_nothing_left(server, 'compute2')
