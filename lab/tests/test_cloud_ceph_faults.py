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
"""Ceph is away, in part or as a whole; servers and services go on."""

import contextlib
import subprocess
import time
import unittest

from lab import ceph
from lab import machine
from lab.host import Host
from lab.tests import cloud_case
from lab.tests import test_cloud_ceph
from lab.tests import test_cloud_servers

MON, OSD = 'ceph-mon', 'ceph-osd'
SILENCE = 40  # seconds
ADVICE = 'Check that Ceph answers host host-a'


class TestFaults(test_cloud_ceph.CephTestCase):

    assert_kept = test_cloud_servers.Scenarios.assert_kept

    def server(self, name='server'):
        server = self.boot(name, flavor=self.flavor,
                           script=test_cloud_servers.WRITE)
        return server, server.testimony()

    def wait_for(self, what, limit, *arguments):
        until = time.monotonic() + limit
        while not what(*arguments):
            self.assertLess(time.monotonic(), until, what)
            time.sleep(1)

    def setUp(self):
        super().setUp()
        self._logged = len(self.service_log('host-a'))

    def assert_logged(self, text):
        """The compute service of host-a has said it in this test."""
        self.assertIn(text, self.service_log('host-a')[self._logged:])

    def service(self):
        (found,) = self.cloud.conn.compute.services(
            host='host-a', binary='nova-compute')
        return found

    def test_monitor_is_away(self):
        """No guest is destroyed; the service comes up without its disks."""
        server, before = self.server()
        with self.ceph.control.paused(MON):
            begun = time.monotonic()
            server.hard_reboot()
            self.assertLess(time.monotonic() - begun, 90)
            self.assertEqual(before.boot_id, server.look().boot_id)
            self.assert_logged(ADVICE)
            self.cloud.restart('host-a', 'nova-compute')
            self.wait_for(lambda: (self.service().disabled_reason or '')
                          .find(ADVICE) >= 0, 150)
            self.assertEqual(before.boot_id, server.look().boot_id)
        self.wait_for(lambda: self.service().status == 'enabled', 150)
        server.hard_reboot()
        self.assert_kept(server.testimony(after=before))
        self.assert_whole(server)

    def test_images_are_out_of_reach(self):
        """The monitor answers, and nobody who keeps the images."""
        server, before = self.server()
        with self.ceph.control.paused(OSD):
            server.hard_reboot()
            # It writes nothing now that would have to be answered.
            self.assert_logged(ADVICE)
            self.assertEqual('ACTIVE', server.get().status)
        said = server.look()
        self.assertEqual(before.boot_id, said.boot_id)
        self.assert_kept(said)

    def test_silence_while_a_server_is_made(self):
        """It waits; another server of that host is served."""
        neighbour, _before = self.server('neighbour')
        made = self.cloud.boot('waits', flavor=self.flavor, host='host-a',
                               script=test_cloud_servers.WRITE, wait=False)
        self.addCleanup(made.delete)
        with self.ceph.control.paused(OSD):
            until = time.monotonic() + SILENCE
            while time.monotonic() < until:
                # Not a pause: QEMU waits for what the guest is writing.
                begun = time.monotonic()
                neighbour.api.get_server_console_output(neighbour.id)
                self.assertLess(time.monotonic() - begun, 30)
                time.sleep(1)
            self.assertEqual('BUILD', made.get().status)
        made.wait('ACTIVE')
        self.assert_kept(made.testimony())
        self.assert_whole(made)

    def test_silence_in_mid_import(self):
        """Half an image has come; it is whole in the end."""
        neighbour, _before = self.server('neighbour')
        # That is a few MiB.
        with Host('host-a').link.slowed('10mbit'):
            made = self.cloud.boot(
                'imported', flavor=self.flavor, host='host-a',
                script=test_cloud_servers.WRITE, wait=False)
            self.addCleanup(made.delete)
            self.wait_for(lambda: 'disk' in self.images(made), 180)
            with self.ceph.control.paused(OSD):
                until = time.monotonic() + SILENCE
                while time.monotonic() < until:
                    neighbour.api.get_server_console_output(neighbour.id)
                    time.sleep(1)
                self.assertEqual('BUILD', made.get().status)
        made.wait('ACTIVE')
        self.assert_kept(made.testimony())
        self.assert_whole(made)

    @contextlib.contextmanager
    def watched(self, image):
        """Somebody has an image open, as the guest of a lost host may."""
        watcher = self.ceph.control.popen(
            ['rbd', 'watch', '%s/%s' % (ceph.DISKS, image)],
            env={'CEPH_CONF': str(ceph.FOLDER / 'ceph.conf')},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            self.wait_for(lambda: 'watcher=' in self.ceph.run(
                'rbd', 'status', '%s/%s' % (ceph.DISKS, image)), 30)
            yield
        finally:
            machine.kill(watcher)

    def test_watched_at_delete(self):
        server, _before = self.server()
        server.stop()
        self.cloud.set_many('host-a', {
            ('libvirt', 'rbd_destroy_volume_retries'): 2,
            ('libvirt', 'rbd_destroy_volume_retry_interval'): 1,
            # Nova tries five times, and the watch is there for two of them.
            ('DEFAULT', 'instance_delete_interval'): 20})
        try:
            with self.watched(server.id + '_disk'):
                server.delete()
                self.assertEqual(['disk'], self.images(server))
                self.assert_logged('Look with rbd status')
            # A watch outlives its owner for half a minute.
            self.wait_for(lambda: not self.images(server), 120)
        finally:
            self.cloud.set_many('host-a', {
                ('libvirt', 'rbd_destroy_volume_retries'): 12,
                ('libvirt', 'rbd_destroy_volume_retry_interval'): 5,
                ('DEFAULT', 'instance_delete_interval'): 300})


load_tests = cloud_case.only_in_full

if __name__ == '__main__':
    unittest.main()
