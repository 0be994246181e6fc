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
"""What goes wrong while a pool-backed server moves, and what is left then.

After each fault: the guest has its data, nothing is left on the host to which
it did not come, nobody has tried SSH, and the next try succeeds.
"""

import concurrent.futures
import contextlib
import os
import random
import shutil
import time
import unittest

import openstack.exceptions

from lab.cloud import config as cloud_config
from lab.cloud import database
from lab import config
from lab.endurance import servers
from lab.host import Host
from lab.machine import Machine
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import MIB
from lab.tests.cloud_case import SERIES

DATA = ('alpha', 12)       # MiB that no copy can leave out
EPHEMERAL = ('beta', 4)
WRITE = ('boot 1: fill data 12 alpha\n'
         'boot 1: fill raw 4 beta vdb 64\n')
POOL = 'nova-disks-pool'
DISKS = '/var/lib/nova/instances/disks'
WORKER = 'pump/worker.py'
SERVICE_VERSION = ('from nova.objects import service\n'
                   'print(service.SERVICE_VERSION)')


class MovesCase(CloudTestCase):
    """Two hosts with pools and no sshd; copies are held at a rate.

    :cvar rate: MiB a second and disk; None: no limit
    :cvar more: further options of [libvirt]: (value, value afterwards). All
        are set at once, as each restart of a service takes its time
    """

    lab = SERIES
    images_type = 'libvirt-storage'
    flavor = 'lab.small.disks'
    rate = 1
    stall = 10
    # What Nova has without them.
    defaults = {'storage_migration_bandwidth': 0,
                'storage_migration_stall_timeout': 60,
                'live_migration_bandwidth': 0}
    more = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.a, cls.b = Host('host-a'), Host('host-b')
        cls.prepare()
        cls.set_options({
            **cls.rates(),
            **{name: value for name, (value, _after) in cls.more.items()}})

    @classmethod
    def prepare(cls):
        """What is done before the compute services are started anew."""

    @classmethod
    def tearDownClass(cls):
        cls.set_options({
            **{key: cls.defaults[key] for key in cls.rates()},
            **{name: after for name, (_value, after) in cls.more.items()}})
        super().tearDownClass()

    @classmethod
    def rates(cls):
        """The options of [libvirt] that the class runs with."""
        return {'storage_migration_bandwidth': cls.rate or 0,
                'storage_migration_stall_timeout': cls.stall}

    @classmethod
    def set_options(cls, values):
        """Set options of [libvirt]; computes that have them go on."""
        wanted = {('libvirt', key): str(value)
                  for key, value in values.items()}

        def change(host):
            if any((cls.cloud.get(host, *key) or str(
                    cls.defaults.get(key[1]))) != value
                   for key, value in wanted.items()):
                cls.cloud.set_many(host, wanted)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(change, config.HOSTS))

    def server(self, **more):
        """A server on host-a, and what its guest says."""
        server = self.boot(flavor=more.pop('flavor', self.flavor),
                           script=WRITE, **more)
        said = server.testimony()
        self.assert_kept(said)
        return server, said

    def assert_kept(self, said):
        self.assert_data(said, data=DATA, raw=EPHEMERAL)

    @classmethod
    def use(cls, path):
        """Let the disks of both hosts be in a directory."""
        for host in (cls.a, cls.b):
            with contextlib.closing(host.connect()) as connection:
                pool = connection.storagePoolLookupByName(POOL)
                pool.destroy()
                pool.undefine()
                pool = connection.storagePoolDefineXML(
                    '<pool type="dir"><name>%s</name><target><path>%s</path>'
                    '</target></pool>' % (POOL, path))
                pool.create()
                pool.setAutostart(1)

    # -- the middle of a move

    def begin(self, server, host='host-b'):
        server.api.migrate_server(server.id, host=host)

    def arrived(self, server, disk='disk') -> int:
        """Bytes of a disk that lie on host-b."""
        path = self.b.path('%s/%s_%s' % (DISKS, server.id, disk))
        try:
            return path.stat().st_blocks * 512
        except FileNotFoundError:
            return -1

    def wait_for(self, condition, limit=90, what='the condition'):
        until = time.monotonic() + limit
        while not (value := condition()):
            if time.monotonic() > until:
                self.fail('%s did not come in %d s' % (what, limit))
            time.sleep(.05)
        return value

    def wait_middle(self, server, percent):
        """Wait until so much of the root disk has arrived."""
        source = self.a.path('%s/%s_disk' % (DISKS, server.id))
        total = source.stat().st_blocks * 512
        self.wait_for(
            lambda: self.arrived(server) >= total * percent / 100,
            what='%d %% of the root disk' % percent)

    def workers(self, host) -> list[int]:
        """The processes which copy on a host."""
        found = []
        for line in host.run(['ps', '-eo', 'pid,args']).stdout.splitlines():
            if WORKER in line and 'ps -eo' not in line:
                found.append(int(line.split()[0]))
        return found

    # -- afterwards

    def settled(self, server, limit=120):
        """Wait until nothing is under way, whatever it came to."""
        return server.wait('ACTIVE', 'SHUTOFF', 'ERROR', 'VERIFY_RESIZE',
                           limit=limit)

    def migration(self, server):
        """The newest migration's record."""
        found = [m for m in self.cloud.conn.compute.migrations()
                 if m.server_id == server.id]
        return max(found, key=lambda m: m.id)

    def assert_stayed(self, server, before, boots=True):
        """It runs on host-a with its data; nothing of it is on host-b.

        :param boots: whether it was off in between
        """
        found = self.settled(server)
        self.assertEqual(('ACTIVE', 'host-a'),
                         (found.status, found.compute_host))
        said = (server.testimony(after=before) if boots else server.look())
        self.assert_kept(said)
        self.wait_for(lambda: not server.left_on('host-b'), 20,
                      'a clean host-b: %s' % server.left_on('host-b'))
        self.assertEqual([], self.workers(self.a))
        return said

    def assert_went(self, server, before, limit=120):
        """It waits for its confirmation on host-b, with its data."""
        found = self.settled(server, limit)
        self.assertEqual(('VERIFY_RESIZE', 'host-b'),
                         (found.status, found.compute_host))
        there = server.testimony(after=before)
        self.assert_kept(there)
        return there

    def assert_goes(self, server, said):
        """The next try succeeds, and so does the way back."""
        # A fault may have kept one from reporting.
        self.cloud.wait_computes()
        server.migrate('host-b')
        there = server.testimony(after=said)
        self.assert_kept(there)
        server.revert()
        back = server.testimony(after=there)
        self.assert_kept(back)
        self.assertEqual('host-a', server.host)
        self.assert_nothing_left(server, 'host-b')
        return back

    def fault(self, server) -> str:
        """What an operator reads of the newest action that failed."""
        compute = self.cloud.conn.compute
        # Noted when the server's state is set already.
        failed = self.wait_for(lambda: next(
            (action for action in compute.server_actions(server.id)
             if action.message), None), 30, 'an action that failed')
        answer = compute.get('/servers/%s/os-instance-actions/%s' % (
            server.id, failed.request_id), microversion='2.84')
        return '\n'.join(event['details'] or '' for event in
                         answer.json()['instanceAction']['events'])


class TestKills(MovesCase):
    """Somebody dies in the midst of the copy."""

    def _kill(self, name, host, percent):
        """A server that is on its way while a daemon is killed."""
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, percent)
        host.kill(name)
        if name == 'nova-compute':
            self.cloud.start_compute(host.name)
        else:
            host.restart(name)
            host.wait_ready()
        return server, before

    def _killed(self, name, host, percent):
        server, before = self._kill(name, host, percent)
        said = self.assert_stayed(server, before)
        self.assert_goes(server, said)

    def test_source_libvirtd(self):
        """The copy goes on: its workers have opened the files."""
        server, before = self._kill('libvirtd', self.a, 50)
        there = self.assert_went(server, before)
        server.confirm()
        self.assert_nothing_left(server, 'host-a')
        self.cloud.wait_computes()
        server.migrate('host-a')
        self.assert_kept(server.testimony(after=there))

    def test_destination_libvirtd_at_once(self):
        self._killed('libvirtd', self.b, 0)

    def test_destination_libvirtd(self):
        self._killed('libvirtd', self.b, 50)

    def test_destination_libvirtd_at_the_end(self):
        self._killed('libvirtd', self.b, 95)

    def test_source_compute(self):
        self._killed('nova-compute', self.a, 50)

    def test_source_compute_at_once(self):
        self._killed('nova-compute', self.a, 0)

    def test_source_compute_at_a_random_point(self):
        percent = random.randrange(1, 99)
        print('killed at %d %%' % percent)
        self._killed('nova-compute', self.a, percent)

    def test_destination_compute(self):
        """The source goes on; the destination takes over when it is back."""
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, 50)
        self.b.kill('nova-compute')
        time.sleep(2)
        self.cloud.start_compute('host-b')
        there = self.assert_went(server, before)
        server.revert()
        said = server.testimony(after=there)
        self.assert_kept(said)
        self.assert_nothing_left(server, 'host-b')
        self.assert_goes(server, said)

    def test_compute_that_unshelves(self):
        """All that is left of the disk is the image that it was shelved to."""
        server, before = self.server()
        server.shelve()
        server.api.unshelve_server(server.id)
        self.wait_for(lambda: server.get().task_state == 'spawning', 60,
                      'the build')
        host = Host(server.host)
        host.kill('nova-compute')
        self.cloud.start_compute(host.name)
        found = server.wait('ERROR')
        told = servers.IMAGE.search(found.fault['message'])
        self.assertTrue(told, found.fault)
        server.rebuild(told[1])
        said = server.testimony(after=before)
        self.assert_data(said, data=DATA)  # a shelved ephemeral disk is new
        server.migrate('host-b' if host.name == 'host-a' else 'host-a')
        self.assert_data(server.testimony(after=said), data=DATA)
        server.confirm()
        self.assert_nothing_left(server, host.name)

    def test_network_is_away_after_the_copy(self):
        """Nova fails on the source with all copied, and nothing sent."""
        # Or it may ask for nothing before the server has gone.
        self.cloud.set('host-a', 'neutron', 'extension_sync_interval', 0)
        self.addCleanup(self.cloud.set, 'host-a', 'neutron',
                        'extension_sync_interval', 600)
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, 50)
        before_it = len(self.service_log('host-a'))
        control = Machine('ctl')
        control.kill('network')
        try:
            # The API needs it, too.
            self.wait_for(lambda: 'vm_state to ERROR' in self.service_log(
                'host-a')[before_it:], 120, 'an error')
        finally:
            control.restart('network')
            control.wait_port(cloud_config.PORTS['network'], 60, 'network')
        found = self.settled(server)
        self.assertEqual(('ERROR', 'host-a'),
                         (found.status, found.compute_host))
        # What an operator does anyway.
        server.api.reboot_server(server.id, 'HARD')
        self.wait_for(lambda: server.get().status == 'ACTIVE', 120,
                      'an active server')
        said = self.assert_stayed(server, before)
        self.assert_goes(server, said)

    def test_conductor_is_away(self):
        """A copy needs neither conductor nor database."""
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, 20)
        with Machine('ctl').paused('nova-conductor'):
            self.wait_for(lambda: 'progress could not be saved' in
                          self.service_log('host-a'), 120, 'a warning')
        self.assert_went(server, before, 240)
        server.confirm()
        self.assert_nothing_left(server, 'host-a')

    def test_operator_cancels(self):
        """The documented way: end the worker; the server stays."""
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, 30)
        pids = self.wait_for(lambda: self.workers(self.a))
        self.a.run(['kill', *map(str, pids)])
        said = self.assert_stayed(server, before)
        self.assertIn('cancelled', self.service_log('host-a'))
        self.assert_goes(server, said)

    def test_server_is_deleted(self):
        server, _before = self.server()
        self.begin(server)
        self.wait_middle(server, 30)
        server.delete()
        self.wait_for(lambda: not self.workers(self.a), 20, 'no worker')
        for host in config.HOSTS:
            self.wait_for(lambda: not server.left_on(host), 60,
                          'a clean %s: %s' % (host, server.left_on(host)))


class TestWire(MovesCase):
    """The link and the disk beyond it."""

    def test_link_is_cut(self):
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, 50)
        start = time.monotonic()
        with self.b.link.as_cut():
            # It is the worker that must notice; the API is on the same wire.
            self.wait_for(lambda: not self.workers(self.a), 40,
                          'the end of the copy')
            self.assertLess(time.monotonic() - start, self.stall + 15)
        said = self.assert_stayed(server, before)
        self.assert_goes(server, said)

    def test_destination_is_full_in_the_middle(self):
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, 20)
        try:
            self.b.fill(POOL)
            found = self.settled(server)
        finally:
            self.b.free(POOL)
        self.assertEqual('host-a', found.compute_host)
        said = self.assert_stayed(server, before)
        self.assert_goes(server, said)

    def test_destination_has_no_room(self):
        server, before = self.server()
        self.b.fill(POOL, leave=8 * MIB)
        try:
            self.begin(server)
            said = self.assert_stayed(server, before, boots=False)
        finally:
            self.b.free(POOL)
        self.assertEqual(before.boot_id, said.boot_id)
        self.assertRegex(self.fault(server), 'room|available')
        self.assert_goes(server, said)

    def test_pool_is_inactive(self):
        server, before = self.server()
        with contextlib.closing(self.b.connect()) as connection:
            pool = connection.storagePoolLookupByName('nova-base-images-pool')
            pool.destroy()
            try:
                self.begin(server)
                said = self.assert_stayed_or_was_taken(server, before)
            finally:
                if not pool.isActive():
                    pool.create()
        self.assert_goes(server, said)

    def assert_stayed_or_was_taken(self, server, before):
        """Only an image that Glance has lost needs the base pool."""
        found = self.settled(server)
        if found.status == 'VERIFY_RESIZE':
            server.revert()
            return server.testimony()
        return self.assert_stayed(server, before, boots=False)

    def test_pool_goes_during_the_copy(self):
        server, before = self.server()
        self.begin(server)
        self.wait_middle(server, 20)
        with contextlib.closing(self.b.connect()) as connection:
            pool = connection.storagePoolLookupByName(POOL)
            pool.destroy()
            try:
                found = self.settled(server)
            finally:
                pool.create()
        self.assertEqual('host-a', found.compute_host)
        said = server.testimony(after=before)
        self.assert_kept(said)
        # What could not be deleted there goes with the next try.
        self.assert_goes(server, said)


class TestTrust(MovesCase):
    """Certificates that are no good: refused while the guest runs on."""

    rate = None

    def _refused(self, kind, host=None, reason="can't be reached"):
        host = host or self.a
        server, before = self.server()
        host.certificate(kind)
        try:
            self.cloud.wait_computes()
            self.begin(server)
            said = self.assert_stayed(server, before, boots=False)
            self.assertEqual(before.boot_id, said.boot_id)
            self.assertRegex(self.fault(server), reason)
        finally:
            host.certificate('good')
        self.assert_goes(server, said)

    def test_none(self):
        self._refused('none')

    def test_other_ca(self):
        self._refused('other-ca')

    def test_dn_that_is_not_allowed(self):
        self._refused('wrong-name')

    def test_expired(self):
        self._refused('expired')

    def test_revoked(self):
        self._refused('revoked')

    def test_destination_has_a_wrong_name(self):
        self._refused('wrong-name', self.b,
                      "can't be reached: .*verify peer's certificate")


class TestProgress(MovesCase):
    """What a user sees of a move while it is under way."""

    def test_progress_moves_with_the_bytes(self):
        server, said = self.server()
        server.command('fill', 'more', 24, 'gamma')
        seen = []

        def watch(found):
            if found.task_state == 'resize_migrating':
                seen.append(found.progress)

        server.watch = watch
        server.migrate('host-b')
        self.assertEqual(sorted(seen), seen)
        self.assertTrue([value for value in seen if 0 < value < 100], seen)
        # There is more than one report.
        self.assertGreater(len(set(seen)), 2, seen)
        there = server.testimony(after=said)
        self.assert_data(there, data=DATA, raw=EPHEMERAL, more=('gamma', 24))
        server.confirm()
        self.assert_nothing_left(server, 'host-a')


class TestKinds(MovesCase):
    """Every kind of move that needs no fault."""

    rate = None

    def test_there_and_back(self):
        """20 moves; what the guest writes in between is in each copy."""
        moves = int(os.environ.get('LAB_MOVES', '20'))
        server, said = self.server()
        ranges = dict(data=DATA, raw=EPHEMERAL)
        for number in range(1, moves + 1):
            server.migrate('host-b' if number % 2 else 'host-a')
            said = server.testimony(after=said)
            self.assert_data(said, **ranges)
            server.confirm()
            host, other = ('host-b', 'host-a') if number % 2 else (
                'host-a', 'host-b')
            self.assertEqual(host, server.host)
            self.assert_nothing_left(server, other)
            name = 'more%d' % (number % 4)
            ranges[name] = ('move%d' % number, 1 + number % 3)
            server.command('fill', name, ranges[name][1], ranges[name][0])
        self.assert_data(server.look(), **ranges)

    def test_raw_root_disk(self):
        self.cloud.set_images_type(self.images_type, use_cow_images='false')
        try:
            server, said = self.server()
            self.assert_goes(server, said)
        finally:
            self.cloud.set_images_type(self.images_type)

    def test_unshelved(self):
        """It was made from a snapshot, which is gone since."""
        server, before = self.server()
        server.shelve()
        server.unshelve()
        said = server.testimony(after=before)
        home = server.host
        server.migrate('host-b' if home == 'host-a' else 'host-a')
        there = server.testimony(after=said)
        # a shelved ephemeral disk is new
        self.assert_data(there, data=DATA)
        server.confirm()
        self.assert_nothing_left(server, home)

    def test_confirm_twice(self):
        server, before = self.server()
        server.migrate('host-b')
        self.assert_kept(server.testimony(after=before))
        server.confirm()
        with self.assertRaises(openstack.exceptions.ConflictException):
            server.api.confirm_server_resize(server.id)
        self.assert_nothing_left(server, 'host-a')

    def test_name_is_taken_by_a_foreign_volume(self):
        server, before = self.server()
        foreign = self.b.path('%s/%s_disk' % (DISKS, server.id))
        foreign.write_bytes(b'foreign')
        was_there = server.left_on('host-b')
        self.assertIn('volume %s/%s_disk' % (POOL, server.id), was_there)
        server.migrate('host-b')
        there = server.testimony(after=before)
        self.assert_kept(there)
        self.assertIn('volume %s/%s_disk.1' % (POOL, server.id),
                      server.left_on('host-b'))
        server.revert()
        back = server.testimony(after=there)
        self.assert_kept(back)
        self.assertEqual(was_there, server.left_on('host-b'))
        self.assertEqual(b'foreign', foreign.read_bytes())
        server.migrate('host-b')
        there = server.testimony(after=back)
        server.confirm()
        self.assert_nothing_left(server, 'host-a')
        server.hard_reboot()
        self.assert_kept(server.testimony(after=there))
        self.assertEqual(b'foreign', foreign.read_bytes())

    def test_resize_that_takes_the_swap_away(self):
        flavor = self.cloud.conn.compute.create_flavor(
            name='lab.no-swap', ram=160, vcpus=1, disk=2, ephemeral=1, swap=0)
        self.addCleanup(self.cloud.conn.compute.delete_flavor, flavor)
        server, before = self.server()
        server.resize('lab.no-swap')
        there = server.testimony(after=before)
        self.assertEqual({}, there.swap)
        server.revert()
        back = server.testimony(after=there)
        self.assertEqual({'vdc': True}, back.swap)
        self.assert_kept(back)
        self.assert_nothing_left(server, 'host-b')
        server.resize('lab.no-swap')
        server.testimony(after=back)
        server.confirm()
        self.assert_nothing_left(server, 'host-a')

    def test_base_image_that_glance_has_lost(self):
        own = self.copy_image('lost')
        server, before = self.server(image='lost')
        self.cloud.conn.image.delete_image(own.id)
        server.migrate('host-b')
        there = server.testimony(after=before)
        self.assert_kept(there)
        server.confirm()
        server.hard_reboot()
        self.assert_kept(server.testimony(after=there))
        cache = self.b.path('/var/lib/nova/instances/_base')
        self.assertEqual([], [name for name in os.listdir(cache)
                              if server.id in name])

    def test_destination_without_the_series(self):
        server, before = self.server()
        service = self.b.service('nova-compute')
        record = service.record
        self.cloud.set('host-b', 'libvirt', 'images_type', 'default')
        self.b.stop('nova-compute')
        env = {key: value for key, value in record['env'].items()
               if key != 'PYTHONPATH'}
        python = self.cloud.layout.nova / 'bin/python'
        version = int(self.b.run([python, '-c', SERVICE_VERSION],
                                 env=env).stdout)
        # Nova starts no service that is older than all others have been.
        database.query(
            self.cloud, "UPDATE services SET version = %d WHERE host = "
            "'host-b' AND `binary` = 'nova-compute'" % version)
        # It keeps in mind how old the oldest is.
        self.cloud.restart('ctl', 'nova-conductor')
        self.b.start('nova-compute', record['argv'], env=env)
        try:
            self.cloud.wait_computes(['host-b'])
            self.begin(server)
            said = self.assert_stayed(server, before, boots=False)
            self.assertEqual(before.boot_id, said.boot_id)
            self.assertRegex(self.fault(server), 'too old|no offer')
        finally:
            self.b.stop('nova-compute')
            self.cloud.start_compute('host-b')
            self.cloud.set('host-b', 'libvirt', 'images_type',
                           self.images_type)
        self.assert_goes(server, said)

    def test_same_host(self):
        """A resize which the scheduler leaves on the host that has it."""
        for place in ('ctl', *config.HOSTS):
            self.cloud.set(place, 'DEFAULT', 'allow_resize_to_same_host',
                           'true')
        service = next(s for s in self.cloud.conn.compute.services()
                       if (s.host, s.binary) == ('host-b', 'nova-compute'))
        self.cloud.conn.compute.disable_service(service)
        try:
            server, before = self.server()
            server.resize('lab.medium.disks')
            there = server.testimony(after=before)
            self.assertEqual('host-a', server.host)
            self.assert_kept(there)
            server.revert()
            back = server.testimony(after=there)
            self.assert_kept(back)
            server.resize('lab.medium.disks')
            there = server.testimony(after=back)
            server.confirm()
            self.assert_kept(server.look())
            self.assertEqual(4, len([
                path for path in server.left_on('host-a')
                if path.startswith('volume ')]), server.left_on('host-a'))
        finally:
            self.cloud.conn.compute.enable_service(service)
            for place in ('ctl', *config.HOSTS):
                self.cloud.set(place, 'DEFAULT', 'allow_resize_to_same_host',
                               'false')

    def test_many_disks(self):
        option = 'DEFAULT', 'max_local_block_devices'
        self.cloud.set('ctl', *option, '-1')
        self.addCleanup(self.cloud.set, 'ctl', *option, '3')
        flavor = self.cloud.conn.compute.create_flavor(
            name='lab.many', ram=128, vcpus=1, disk=1, ephemeral=17, swap=64)
        self.addCleanup(self.cloud.conn.compute.delete_flavor, flavor)
        image = self.cloud.image('guest').id
        mapping = [{'boot_index': 0, 'uuid': image, 'source_type': 'image',
                    'destination_type': 'local'}]
        mapping += [{'boot_index': -1, 'source_type': 'blank',
                     'destination_type': 'local', 'volume_size': 1}] * 17
        mapping += [{'boot_index': -1, 'source_type': 'blank',
                     'destination_type': 'local', 'volume_size': 64,
                     'guest_format': 'swap'}]
        server, before = self.server(flavor='lab.many',
                                     block_device_mapping=mapping)
        self.assertGreaterEqual(len(before.disks), 19)
        self.assert_goes(server, before)


class TestSharedPool(MovesCase):
    """Both hosts have their disks in one directory."""

    rate = None
    folder = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = config.STATE / 'shared-pool'
        cls.folder.mkdir(exist_ok=True)
        cls.folder.chmod(0o755)
        cls.use(str(cls.folder))

    @classmethod
    def tearDownClass(cls):
        cls.use(DISKS)
        shutil.rmtree(cls.folder, ignore_errors=True)
        super().tearDownClass()

    def files(self, server):
        return sorted(path.name.replace(server.id, 'ID')
                      for path in self.folder.iterdir()
                      if server.id in path.name)

    def test_revert_and_confirm(self):
        server, before = self.server()
        home = self.files(server)
        self.assertEqual(4, len(home))
        server.migrate('host-b')
        there = server.testimony(after=before)
        self.assert_kept(there)
        self.assertEqual(8, len(self.files(server)))
        server.revert()
        back = server.testimony(after=there)
        self.assert_kept(back)
        self.assertEqual(home, self.files(server))
        server.migrate('host-b')
        there = server.testimony(after=back)
        server.confirm()
        self.assertEqual(4, len(self.files(server)))
        server.hard_reboot()
        there = server.testimony(after=there)
        self.assert_kept(there)
        server.migrate('host-a')
        back = server.testimony(after=there)
        server.confirm()
        self.assert_kept(server.look())
        self.assertEqual(4, len(self.files(server)))
        server.delete()
        self.assertEqual([], self.files(server))


class TestBesideDisks(MovesCase):
    """What a server has on its host that is no disk."""

    rate = None
    tpm = '/var/lib/libvirt/swtpm/%s/tpm2/tpm2-00.permall'
    setup = 'manufactur'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for host in config.HOSTS:
            cls.cloud.set_many(host, {
                ('key_manager', 'backend'): 'lab_keys.FileKeyManager',
                ('libvirt', 'swtpm_enabled'): 'true'})
        compute = cls.cloud.conn.compute
        cls.tpm_flavor = compute.create_flavor(
            name='lab.tpm', ram=128, vcpus=1, disk=1, ephemeral=1, swap=64)
        compute.create_flavor_extra_specs(cls.tpm_flavor, {
            'hw:tpm_version': '2.0', 'hw:tpm_model': 'tpm-tis'})

    @classmethod
    def tearDownClass(cls):
        cls.cloud.conn.compute.delete_flavor(cls.tpm_flavor)
        for host in config.HOSTS:
            cls.cloud.set_many(host, {
                ('key_manager', 'backend'): 'barbican',
                ('libvirt', 'swtpm_enabled'): 'false'})
        super().tearDownClass()

    def state(self, host, server):
        path = host.path(self.tpm % server.id)
        return path.read_bytes() if path.exists() else None

    def was_made_on(self, host, server):
        """Whether libvirt has let swtpm make a new TPM there."""
        with server.domain() as domain:
            name = domain.name()
        log = host.path('/var/log/swtpm/libvirt/qemu/%s-swtpm.log' % name)
        return log.exists() and self.setup in log.read_text(
            errors='replace')

    def test_vtpm(self):
        server, before = self.server(flavor='lab.tpm')
        self.assertTrue(self.state(self.a, server))
        self.assertTrue(self.was_made_on(self.a, server))
        server.migrate('host-b')
        there = server.testimony(after=before)
        self.assert_kept(there)
        self.assertTrue(self.state(self.b, server))
        self.assertFalse(self.was_made_on(self.b, server))
        # The source keeps the state where a revert finds it.
        kept = self.a.path('/var/lib/nova/instances/%s_resize/swtpm/%s' % (
            server.id, server.id))
        self.assertTrue((kept / 'tpm2/tpm2-00.permall').stat().st_size)
        server.revert()
        back = server.testimony(after=there)
        self.assertTrue(self.state(self.a, server))
        self.assertIsNone(self.state(self.b, server))
        self.assert_nothing_left(server, 'host-b')
        server.migrate('host-b')
        there = server.testimony(after=back)
        server.confirm()
        self.assertIsNone(self.state(self.a, server))
        self.assertTrue(self.state(self.b, server))
        self.assert_nothing_left(server, 'host-a')

    def test_console_log_of_a_server_that_is_off(self):
        server, _before = self.server()
        server.stop()
        log = '/var/lib/nova/instances/%s/console.log' % server.id
        said = self.a.path(log).read_bytes()
        self.assertIn(b'LAB ', said)
        server.migrate('host-b')
        self.assertEqual(said[-100 << 10:], self.b.path(log).read_bytes())
        server.confirm()
        server.start()
        self.assert_kept(server.testimony())


def load_tests(loader, tests, _pattern):
    """Long ones all; test_moves.py has the same faults without a cloud."""
    if os.environ.get('LAB_SCENARIOS', 'fast') == 'all':
        return tests
    return unittest.TestSuite()


if __name__ == '__main__':
    unittest.main()
