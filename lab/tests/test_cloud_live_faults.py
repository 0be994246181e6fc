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
"""What goes wrong while a server migrates live, and what is left then.

Whatever dies: one guest, with its data; the next migration succeeds and leaves
nothing over.
"""

import contextlib
import random
import threading
import time
import unittest

import libvirt

from lab import config
from lab.endurance import cloud as endurance
from lab.tests import cloud_case
from lab.tests.live_case import LiveCase
from lab.tests.live_case import POOL

load_tests = cloud_case.only_in_full


class FaultCase(LiveCase):
    """Copies are slow, so that there is a middle."""

    live_rate = 4
    memory_rate = 1000  # MiB a second, where nothing is to be killed

    def settled(self, server, limit=300):
        with self.hurried(server):
            return super().settled(server, limit)

    @contextlib.contextmanager
    def hurried(self, server):
        """Let the memory go fast; at the copies' rate it takes minutes."""
        ended = threading.Event()

        def hurry(source):
            while not ended.wait(.5):
                # Most of the time there is no such job.
                with contextlib.suppress(Exception), (
                        server.domain(source)) as domain:
                    if domain.jobStats().get('memory_total'):
                        domain.migrateSetMaxSpeed(self.memory_rate)

        thread = threading.Thread(target=hurry, args=(server.host,))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def assert_one_guest(self, server):
        found = self.runs_on(server)
        self.assertEqual(1, len(found), 'guests run on %s' % found)
        return found[0]

    def assert_well(self, server, before, host=None):
        """It runs where Nova says, and the next migrations are as any.

        :param host: where it has to be; None: wherever it was sent or stayed
        """
        found = self.recovered(server)
        self.assertEqual('ACTIVE', found.status, found.fault)
        if host:
            self.assertEqual(host, found.compute_host)
        self.assertEqual(found.compute_host, self.assert_one_guest(server))
        said = server.look()
        self.assertEqual(before.boot_id, said.boot_id)
        self.assert_kept(said)
        # What is left over goes with the next try at the latest.
        self.assert_moves(server, said)

    def assert_told_to_settle(self, server):
        told = (server.get().fault or {}).get('message') or self.fault(server)
        self.assertIn('nova-manage libvirt settle_live_migration ' +
                      server.id, told)

    def settle(self, server, how):
        done = self.cloud.manage('libvirt', 'settle_live_migration',
                                 server.id, how, check=False)
        self.assertEqual(0, done.returncode, done.stdout + done.stderr)
        server.api.reset_server_state(server.id, 'active')
        server.stay_awake()


class TestKills(FaultCase):

    def _killed(self, name, host, percent, after=0):
        server, before = self.writing_server()
        self.begin(server)
        self.wait_middle(server, percent)
        host.kill(name)
        time.sleep(after)
        if name == 'nova-compute':
            self.cloud.start_compute(host.name)
        else:
            host.restart(name)
            host.wait_ready()
        self.assert_goes_on(server, before)

    def assert_goes_on(self, server, before):
        """It does where it is, or when an operator has said where that is."""
        self.settled(server)
        if self.assert_one_guest(server) == server.host:
            return self.assert_well(server, before)
        self.assertEqual(('host-a', ['host-b']),
                         (server.host, self.runs_on(server)))
        for action in (lambda: server.api.reboot_server(server.id, 'HARD'),
                       lambda: server.api.start_server(server.id)):
            with contextlib.suppress(Exception):
                action()
            with contextlib.suppress(Exception):
                server.wait('ACTIVE', 'SHUTOFF', 'ERROR', limit=60)
            self.assertEqual(['host-b'], self.runs_on(server))
        self.assert_told_to_settle(server)
        self.settle(server, '--moved')
        self.assertEqual('host-b', server.host)
        self.assert_well(server, before, 'host-b')

    def test_source_libvirtd(self):
        self._killed('libvirtd', self.a, 50)

    def test_source_libvirtd_at_a_random_point(self):
        self._killed('libvirtd', self.a, self.random_point())

    def test_destination_libvirtd(self):
        self._killed('libvirtd', self.b, 50)

    def test_destination_libvirtd_at_a_random_point(self):
        self._killed('libvirtd', self.b, self.random_point())

    def test_source_compute(self):
        self._killed('nova-compute', self.a, 50)

    def test_source_compute_at_the_beginning(self):
        self._killed('nova-compute', self.a, 20)

    def test_source_compute_at_the_end(self):
        self._killed('nova-compute', self.a, 90)

    def test_source_compute_at_a_random_point(self):
        self._killed('nova-compute', self.a, self.random_point())

    def test_destination_compute(self):
        self._killed('nova-compute', self.b, 50, after=2)

    def test_destination_compute_at_a_random_point(self):
        self._killed('nova-compute', self.b, self.random_point(), after=2)

    def test_guest(self):
        """QEMU dies on the source: nothing has arrived, all is kept."""
        server, before = self.writing_server()
        # QEMU holds back where in a qcow2 file it has written, until it is
        # told to flush: a file system does so, a guest's sync alone does not.
        server.command('sh', 'dd if=/dev/vdb of=/dev/vdb bs=512 count=1 '
                       'conv=notrunc,fsync')
        self.begin(server)
        self.wait_middle(server, 50)
        with server.domain('host-a') as domain:
            name = domain.name()
        self.a.run(['pkill', '-KILL', '-f', 'guest=%s,' % name])
        self.recovered(server)
        self.assertEqual(('host-a', []), (server.host, self.runs_on(server)))
        with contextlib.suppress(AssertionError):
            # By then Nova has seen that it is off.
            self.wait_for(lambda: server.get().status == 'SHUTOFF', 30,
                          'a server that is off')
        server.api.reboot_server(server.id, 'HARD')
        server.wait('ACTIVE')
        said = server.testimony(after=before)
        self.assert_kept(said)
        server.command('keep-writing', 256)
        self.assert_moves(server, server.look())

    def random_point(self):
        percent = random.randrange(0, 99)
        print('killed at %d %%' % percent)
        return percent

    def test_source_compute_until_the_guest_has_gone(self):
        """libvirt ends the migration by itself; nobody in Nova knows.

        The source has to leave its old copies alone, and to say what an
        operator has to do.
        """
        server, before = self.writing_server()
        self.begin(server)
        self.wait_middle(server, 50)
        self.a.kill('nova-compute')
        with self.hurried(server):
            self.wait_for(lambda: self.runs_on(server) == ['host-b'], 180,
                          'the guest on host-b')
        self.cloud.start_compute('host-a')
        self.assert_goes_on(server, before)

    def test_source_host(self):
        """It loses its power: nobody there knows where the guest is."""
        server, before = self.writing_server()
        self.begin(server)
        self.wait_middle(server, 50)
        endurance.die(self.a)
        endurance.revive(self.cloud, self.a)
        self.wait_for(lambda: not self.runs_on(server), 90, 'no guest')
        server.wait('ACTIVE', 'SHUTOFF', 'ERROR', limit=120)
        with contextlib.suppress(Exception):
            server.api.reboot_server(server.id, 'HARD')
            server.wait('ACTIVE', 'ERROR', limit=60)
        self.assertEqual([], self.runs_on(server))
        self.assert_told_to_settle(server)
        self.settle(server, '--not-moved')
        server.hard_reboot()
        said = server.testimony(after=before)
        self.assert_kept(said)
        server.command('keep-writing', 256)
        self.assert_moves(server, server.look())

    def test_host_starts_its_guests_again(self):
        """resume_guests_state_on_host_boot boots no old copy."""
        self.cloud.set('host-a', 'DEFAULT',
                       'resume_guests_state_on_host_boot', 'true')
        self.addCleanup(self.cloud.set, 'host-a', 'DEFAULT',
                        'resume_guests_state_on_host_boot', 'false')
        server, before = self.writing_server()
        self.begin(server)
        self.wait_middle(server, 50)
        self.a.kill('nova-compute')
        with self.hurried(server):
            self.wait_for(lambda: self.runs_on(server) == ['host-b'], 180,
                          'the guest on host-b')
        self.cloud.start_compute('host-a')
        time.sleep(15)
        self.assertEqual(['host-b'], self.runs_on(server))
        server.stay_awake()
        with server.domain('host-b'):
            pass


class TestAllIsSent(FaultCase):
    """libvirt dies on the source when the guest has been sent.

    What it finds there when it is back is a paused guest with the old disks,
    of which it doesn't know how the migration has ended.
    """

    live_rate = 0

    def send_all(self, server):
        """Leave libvirt on the source waiting for the destination's word."""
        self.begin(server)

        def copies():
            with contextlib.suppress(libvirt.libvirtError), (
                    server.domain('host-a')) as domain:
                return domain.jobStats().get('disk_total')

        self.wait_for(copies, 90, 'the copy of the disks')
        # The guests' QEMUs go on without it.
        self.b.pause('libvirtd')
        self.wait_for(lambda: self.state(server, 'host-a')[0] ==
                      libvirt.VIR_DOMAIN_PAUSED, 25, 'a guest that was sent')
        time.sleep(1)

    def state(self, server, host):
        """State and reason of its guest, as libvirt has them."""
        with server.domain(host) as domain:
            return tuple(domain.state())

    def kill_source(self, server):
        self.a.kill('libvirtd')
        self.a.restart('libvirtd')
        self.a.wait_ready()
        found = self.state(server, 'host-a')
        self.assertEqual((libvirt.VIR_DOMAIN_PAUSED,
                          libvirt.VIR_DOMAIN_PAUSED_MIGRATION), found)
        server.wait('ACTIVE', 'PAUSED', 'ERROR', limit=120)

    def assert_asks(self, server):
        """It isn't started here, and the operator reads what to do."""
        for action in (lambda: server.api.stop_server(server.id),
                       lambda: server.api.reboot_server(server.id, 'HARD')):
            with contextlib.suppress(Exception):
                action()
            with contextlib.suppress(Exception):
                server.wait('ACTIVE', 'SHUTOFF', 'ERROR', limit=60)
            self.assertEqual((libvirt.VIR_DOMAIN_PAUSED,
                              libvirt.VIR_DOMAIN_PAUSED_MIGRATION),
                             self.state(server, 'host-a'))
        self.assert_told_to_settle(server)

    def test_guest_is_on_the_destination(self):
        server, before = self.writing_server()
        self.send_all(server)
        self.a.pause('libvirtd')
        # It lets the guest go on; the source doesn't hear of it.
        self.b.resume('libvirtd')
        self.wait_for(lambda: self.state(server, 'host-b')[0] ==
                      libvirt.VIR_DOMAIN_RUNNING, 25, 'a guest on host-b')
        self.kill_source(server)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         self.state(server, 'host-b')[0])
        self.assert_asks(server)
        self.assertEqual(libvirt.VIR_DOMAIN_RUNNING,
                         self.state(server, 'host-b')[0])
        with server.domain('host-a') as domain:
            domain.destroy()
            domain.undefine()
        self.settle(server, '--moved')
        self.assertEqual('host-b', server.host)
        self.assert_well(server, before, 'host-b')


class TestWire(FaultCase):

    def test_link_is_cut(self):
        server, before = self.writing_server()
        self.begin(server)
        self.wait_middle(server, 50)
        with self.b.link.as_cut():
            time.sleep(40)
            # The API is not on that wire, the guest's host is.
            self.assertIn('host-a', self.runs_on(server))
        # Only now libvirt can let go of the copies.
        self.assert_well(server, before)

    def test_link_is_cut_for_a_moment(self):
        server, before = self.writing_server()
        self.begin(server)
        self.wait_middle(server, 30)
        with self.b.link.as_cut():
            time.sleep(4)
        self.assert_well(server, before)

    def test_destination_is_full(self):
        server, before = self.writing_server()
        server.command('fill', 'more', 64, 'gamma')
        self.begin(server)
        self.wait_middle(server, 20)
        try:
            self.b.fill(POOL)
            self.settled(server)
        finally:
            self.b.free(POOL)
        self.assert_well(server, before, 'host-a')

    def test_abort(self):
        server, before = self.writing_server()
        self.begin(server)
        number = self.newest_migration(server)
        self.wait_middle(server, 30)
        server.api.abort_server_migration(number, server.id)
        self.settled(server)
        self.wait_for(lambda: not server.left_on('host-b'), 30,
                      'a clean host-b: %s' % server.left_on('host-b'))
        self.assert_well(server, before, 'host-a')

    def test_force_complete(self):
        server, before = self.writing_server()
        self.begin(server)
        number = self.newest_migration(server)
        self.wait_middle(server, 30)
        server.api.force_complete_server_migration(number, server.id)
        self.assert_well(server, before, 'host-b')

    def test_server_is_deleted_afterwards(self):
        server, before = self.writing_server()
        self.begin(server)
        self.assertEqual('host-b', self.settled(server).compute_host)
        # The source may not have cleaned up yet.
        server.delete()
        for host in config.HOSTS:
            self.wait_for(lambda: not server.left_on(host), 60,
                          'a clean %s: %s' % (host, server.left_on(host)))


class TestProgress(FaultCase):
    """The disks take several of Nova's looks."""

    def test_progress(self):
        """An operator sees the disks shrink."""
        server, before = self.writing_server()
        server.command('fill', 'more', 64, 'gamma')
        self.begin(server)
        number = self.newest_migration(server)
        seen = []

        def look():
            with contextlib.suppress(Exception):
                found = server.api.get_server_migration(number, server.id)
                seen.append(found.disk_remaining_bytes)
            return not server.get().task_state

        with self.hurried(server):
            self.wait_for(look, 240, 'the end of the migration')
        seen = [value for value in seen if value is not None]
        # Nova looks every five seconds.
        self.assertGreater(max(seen), min(seen[seen.index(max(seen)):]), seen)
        self.assert_well(server, before, 'host-b')


if __name__ == '__main__':
    unittest.main()
