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
"""What operators ran into: each went wrong once, on two hosts with pools.

Settings that change under servers, pools that are off or busy, images that
can't be had any more, hosts that were away.
"""

import contextlib
import json
import shutil
import time
import unittest

import libvirt

from lab.cloud.server import ServerError
from lab import config
from lab.host import both
from lab.machine import Machine
from lab.tests import cloud_case
from lab.tests.cloud_case import GIB
from lab.tests.cloud_case import MIB
from lab.tests import test_cloud_moves

POOL = test_cloud_moves.POOL
BASES = 'nova-base-images-pool'
PLACE = '/var/lib/nova/pools/'
INSTANCES = '/var/lib/nova/instances/'
POOL_XML = '<pool type="dir"><name>%s</name><target><path>%s</path></target>' \
           '</pool>'


class FaultsCase(test_cloud_moves.MovesCase):
    rate = None

    @contextlib.contextmanager
    def settings(self, values, hosts=config.HOSTS):
        """Settings of [libvirt] or, by (section, key), of another one."""
        values = {key if isinstance(key, tuple) else ('libvirt', key): value
                  for key, value in values.items()}
        before = {(host, key): self.cloud.get(host, *key)
                  for host in hosts for key in values}
        try:
            for host in hosts:
                self.cloud.set_many(host, values)
            yield
        finally:
            for host in hosts:
                self.cloud.set_many(host, {
                    key: before[host, key] or self.default(key)
                    for key in values})

    @staticmethod
    def default(key):
        return {'storage_pool_mapping': '', 'storage_disks_pool': POOL,
                'preallocate_images': 'none'}[key[1]]

    def add_pool(self, host, name):
        """A dir pool of the operator's; it stays as long as the lab."""
        path = PLACE + name
        host.run(['install', '-d', '-o', 'nova', '-g', 'nova',
                  '/var/lib/nova/pools', path])
        with contextlib.closing(host.connect()) as connection:
            try:
                pool = connection.storagePoolLookupByName(name)
            except libvirt.libvirtError:
                pool = connection.storagePoolDefineXML(POOL_XML % (name, path))
            if not pool.isActive():
                pool.create()

    @contextlib.contextmanager
    def pool_off(self, host, name, path=None):
        """It is off, and can't be started where a path is given."""
        host.run(['virsh', '-c', 'qemu:///system', 'pool-destroy', name])
        if path:
            host.run(['mv', path, path + '.away'])
        try:
            yield
        finally:
            if path:
                host.run(['rm', '-rf', path])
                host.run(['mv', path + '.away', path])
            host.run(['virsh', '-c', 'qemu:///system', 'pool-start', name],
                     check=False)

    def started(self, name='server', **more):
        """A server on host-a, of whose guest nothing is asked."""
        server = self.cloud.boot(name, host='host-a', wait=False, **{
            'flavor': self.flavor, **more})
        self.addCleanup(server.delete)
        server.wait('ACTIVE')
        return server

    def is_running(self, server):
        with server.domain() as domain:
            return bool(domain.isActive())

    def status(self, host):
        """:returns: status and reason of its compute service"""
        found, = self.cloud.conn.compute.services(
            binary='nova-compute', host=host)
        return found.status, found.disabled_reason or ''

    def orphans(self, host):
        done = self.cloud.manage('libvirt', 'list_disks', '--orphans',
                                 '--json', place=host, check=False)
        self.assertIn(done.returncode, (0, 3, 4), done.stdout + done.stderr)
        return json.loads(done.stdout.strip().splitlines()[-1])

    def purge(self, host, *words, status=0):
        done = self.cloud.manage('libvirt', 'purge_orphans', *words,
                                 place=host, check=False)
        told = done.stdout + done.stderr
        self.assertEqual(status, done.returncode, told)
        self.assertNotIn('Traceback', told)
        return done.stdout


class TestSettings(FaultsCase):
    """nova.conf changes under servers that are there."""

    def test_pool_that_nova_conf_no_longer_names(self):
        for host in both():
            self.add_pool(host, 'nova-root-nvme')
            self.add_pool(host, 'nova-swap-ssd')
        with self.settings({'storage_pool_mapping':
                           'root:nova-root-nvme,swap:nova-swap-ssd'}):
            gone, rebuilt = self.started('gone'), self.started('rebuilt')
            moved, told = self.server()
        with self.settings({'storage_disks_pool': 'nova-root-nvme'}):
            other = self.started('other')
        gone.delete()
        self.assert_nothing_left(gone)
        other.delete()
        self.assert_nothing_left(other)
        rebuilt.rebuild()
        left = [place for place in rebuilt.left_on('host-a')
                if 'nova-root-nvme' in place or 'nova-swap-ssd' in place]
        self.assertEqual([], left)
        rebuilt.rescue()
        rebuilt.unrescue()
        self.assertEqual([], [place for place in rebuilt.left_on('host-a')
                              if 'rescue' in place])
        self.assert_goes(moved, told)

    def test_pools_with_ordinary_names(self):
        """Any mapping migrates, however long the names are."""
        names = {'root': 'nova-root-nvme', 'ephemeral': 'nova-ephemeral-sas',
                 'swap': 'nova-swap-ssd', 'config': 'nova-config-drives'}
        for host in both():
            for name in names.values():
                self.add_pool(host, name)
        with self.settings({'storage_pool_mapping': ','.join(
                '%s:%s' % pair for pair in names.items())}):
            server, said = self.server()
            self.assert_goes(server, said)
            server.delete()
            self.assert_nothing_left(server)

    def test_reserved_space_stays_reserved(self):
        with self.settings({('DEFAULT', 'preallocate_images'): 'space'}):
            server, said = self.server()
            before = self.allocated(server, 'host-a')
            self.assertGreaterEqual(before['disk'], GIB)
            server.migrate('host-b')
            said = server.testimony(after=said)
            self.assert_kept(said)
            after = self.allocated(server, 'host-b')
            self.assertEqual({}, {
                name: (size, after[name]) for name, size in before.items()
                if after[name] < size - MIB})
            server.confirm()

    def allocated(self, server, host):
        """Bytes that its disks take up, by disk."""
        folder = Machine(host).path(test_cloud_moves.DISKS)
        return {path.name.partition('_')[2].partition('.1')[0]:
                path.stat().st_blocks * 512
                for path in folder.iterdir() if server.id in path.name}

    def test_image_cache_by_another_path(self):
        """Older servers are whole when it is reached by a symbolic link."""
        server, said = self.server()
        self.a.run(['ln', '-sfn', '/var/lib/nova/instances',
                    '/var/lib/nova/inst'])
        before = self.cloud.get('host-a', 'DEFAULT', 'instances_path')
        self.cloud.set('host-a', 'DEFAULT', 'instances_path',
                       '/var/lib/nova/inst')
        try:
            image = server.snapshot('by another path')
            self.cloud.conn.image.delete_image(image.id)
            server.hard_reboot()
            said = server.testimony(after=said)
            self.assert_goes(server, said)
        finally:
            self.cloud.set('host-a', 'DEFAULT', 'instances_path',
                           before or '/var/lib/nova/instances')


class TestPools(FaultsCase):
    """One sick pool harms nobody else."""

    def test_confirm_and_delete_while_a_pool_is_off(self):
        self.add_pool(self.a, 'scratch')
        with self.settings({'storage_pool_mapping': 'swap:scratch'},
                           ['host-a']):
            moved = self.started(flavor='lab.small')
            gone = self.started('gone', flavor='lab.small')
            moved.migrate('host-b')
            with self.pool_off(self.a, 'scratch', PLACE + 'scratch'):
                moved.confirm()
                self.assertEqual('ACTIVE', moved.get().status)
                gone.delete()
            self.assert_nothing_left(moved, 'host-a')
            self.assert_nothing_left(gone)

    def test_hard_reboot_starts_the_pool(self):
        server, said = self.server()
        with self.pool_off(self.a, POOL):
            server.hard_reboot()
        self.assert_kept(server.testimony(after=said))

    def test_hard_reboot_looks_before_it_destroys(self):
        server = self.started()
        with self.pool_off(self.a, POOL, test_cloud_moves.DISKS):
            server.api.reboot_server(server.id, 'HARD')
            server.wait('ACTIVE', 'ERROR')
            self.assertTrue(self.is_running(server))
            self.assertIn(POOL, self.fault(server))
            # Nobody is sent to such a host, and its service says why.
            self.wait_for(lambda: self.status('host-a')[0] == 'disabled', 90,
                          'a disabled service')
            self.assertIn(POOL, self.status('host-a')[1])
        self.wait_for(lambda: self.status('host-a')[0] == 'enabled', 90,
                      'an enabled service')
        server.hard_reboot()

    def test_boot_while_a_large_image_is_copied(self):
        """libvirt keeps a pool busy for as long as it copies."""
        image = self.copy_image('not cached')
        folder = self.a.path('/var/lib/nova/instances/_base')
        with open(folder / 'large', 'wb') as file:
            file.truncate(60 * GIB)
        self.addCleanup((folder / 'large').unlink)
        virsh = ['virsh', '-c', 'qemu:///system']
        self.a.run([*virsh, 'pool-refresh', BASES])
        copying = self.a.popen([*virsh, 'vol-clone', '--pool', BASES, 'large',
                                'large.copy'])
        self.addCleanup(self.a.run, ['rm', '-f', '/var/lib/nova/instances/'
                                     '_base/large.copy'], check=False)
        try:
            server = self.started(image='not cached', flavor='lab.small')
            self.assertIsNone(copying.poll(), 'the copy was over too soon')
        finally:
            self.a.run(['pkill', '-f', 'vol-clon[e]'], check=False)
            copying.wait()
            # libvirt goes on with it.
            self.wait_for(lambda: not self.a.run(
                [*virsh, 'pool-refresh', BASES], check=False).returncode,
                300, 'the end of the copy')
        self.assertEqual(server.get().image.id, image.id)


class TestLeftBehind(FaultsCase):
    """Nothing that a host has left on another is forgotten."""

    def test_deleted_server_of_which_a_pool_was_off(self):
        server = self.started()
        server.migrate('host-b')
        kept = self.orphans('host-a')
        self.assertEqual({'kept for revert'}, {
            line['kind'] for line in kept
            if line['instance_uuid'] == server.id}, kept)
        # It is deleted by name, and what is kept never.
        self.assertNotIn(server.id, self.purge('host-a'))
        with self.pool_off(self.a, POOL, test_cloud_moves.DISKS):
            server.confirm()
        left = self.lies(server, 'host-a')
        self.assertIn('volume %s/ID_disk' % POOL, left)
        server.delete()
        self.assertEqual(left, self.lies(server, 'host-a'))
        self.assertEqual({'left over'}, {
            line['kind'] for line in self.orphans('host-a')
            if line['instance_uuid'] == server.id})
        told = self.purge('host-a', '--dry-run', status=3)
        self.assertIn('Would delete volume %s_disk' % server.id, told)
        self.assertEqual(left, self.lies(server, 'host-a'))
        told = self.purge('host-a')
        self.assertIn('Deleted volume %s_disk' % server.id, told)
        self.assertEqual([], [place for place in server.left_on('host-a')
                              if place.startswith('volume')])
        self.purge('host-a', '--dry-run')

    def test_directories(self):
        """What a host keeps beside its pools that was away meanwhile."""
        server = self.started()
        server.migrate('host-b')
        server.confirm()
        folders = [self.a.path(INSTANCES + server.id + end)
                   for end in ('', '_resize')]
        for folder in folders:
            self.a.run(['install', '-d', '-o', 'nova', '-g', 'nova',
                        INSTANCES + folder.name])
            self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
            (folder / 'console.log').write_bytes(b'of a guest')

        def kinds():
            return [line['kind'] for line in self.orphans('host-a')
                    if server.id in line['volume'] and line['pool'] is None]

        # Its host may have the same file system, as far as Nova knows.
        self.assertEqual(['unknown'] * 2, kinds())
        self.assertNotIn(server.id, self.purge('host-a'))
        server.delete()
        self.assertEqual(['left over'] * 2, kinds())
        self.purge('host-a', '--dry-run', status=3)
        told = self.purge('host-a')
        for folder in folders:
            self.assertIn(folder.name, told)
            self.assertFalse(folder.exists(), told)

    def test_volume_of_nobody(self):
        name = '5d1c4d11-6f3a-4c5e-9a70-0f6f2c1d8e01_disk'
        path = self.a.path(test_cloud_moves.DISKS) / name
        path.write_bytes(b'anybody')
        self.addCleanup(path.unlink)
        with contextlib.closing(self.a.connect()) as connection:
            connection.storagePoolLookupByName(POOL).refresh()
        self.assertEqual(['unknown'], [
            line['kind'] for line in self.orphans('host-a')
            if line['volume'] == name])
        self.purge('host-a')
        self.assertTrue(path.exists())


class TestImages(FaultsCase):

    def test_deactivated_image(self):
        """It can't be fetched, so the base image travels along."""
        image = self.copy_image('deactivated')
        server, said = self.server(image='deactivated')
        self.cloud.conn.image.deactivate_image(image.id)
        server.migrate('host-b')
        said = server.testimony(after=said)
        self.assert_kept(said)
        server.confirm()


class TestReset(FaultsCase):
    """An operator resets a server whose disks are being copied."""

    rate = 1

    def test_hard_reboot_in_the_middle_of_a_copy(self):
        server, said = self.server()
        self.begin(server)
        self.wait_middle(server, 20)
        server.api.reset_server_state(server.id, 'active')
        server.api.reboot_server(server.id, 'HARD')
        self.wait_for(lambda: any(
            action == 'reboot' and message
            for action, message in server.actions()), 60, 'a refusal')
        told = self.fault(server)
        self.assertIn('Wait for the copy to host host-b', told)
        for word in ('rebuild', 'delete'):
            self.assertNotIn(word, told.split('Traceback')[0])
        self.wait_for(lambda: not self.workers(self.a), 120, 'an end')
        time.sleep(5)
        with contextlib.suppress(ServerError):
            self.settled(server, limit=30)
        server.api.reset_server_state(server.id, 'error')
        server.hard_reboot()
        self.assert_kept(server.testimony(after=said))


load_tests = cloud_case.only_in_full


if __name__ == '__main__':
    unittest.main()
