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
import contextlib
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova import context
from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt.storage.move import readiness


@ddt.ddt
class ReadinessTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.flags(images_type='libvirt-storage', group='libvirt')
        self.flags(host='here')
        self.time, self.broken_pools, self.connected = 0, {}, []
        self.refusal = None
        self.types = {}
        self.check_access = self.useFixture(fixtures.MockPatchObject(
            readiness.storage_pool.StoragePool, 'check_access',
            autospec=True)).mock
        self.check_mounted = self.useFixture(fixtures.MockPatchObject(
            readiness.storage_pool.StoragePool, 'check_mounted',
            autospec=True)).mock
        self.stub_out('time.monotonic', lambda: self.time)
        self.stub_out('nova.virt.libvirt.storage.move.state.check_pool',
                      self._check_pool)
        self.ceph = {}
        self.stub_out('nova.virt.libvirt.storage.move.state.ceph_of',
                      lambda pool: self.ceph.get(pool.name))
        self.stub_out('nova.virt.libvirt.storage.move.peer.connected',
                      self._connect)
        host = mock.Mock()
        self.version = host.get_connection.return_value.getLibVersion
        self.version.return_value = 9_000_000
        self.flags(storage_migration_transport='libvirt', group='libvirt')
        self.mock_check = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.intake.export.check',
            autospec=True)).mock
        self.missing = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pump.transfer.nbd_missing',
            return_value=None)).mock
        self.readiness = readiness.Readiness(host, lambda: '192.0.2.7')

    def _check_pool(self, pool):
        self.assertEqual('here', pool.host)
        if pool.name in self.broken_pools:
            raise exception.MigrationPreCheckError(
                reason=self.broken_pools[pool.name])
        return self.types.get(pool.name, 'dir')

    @contextlib.contextmanager
    def _connect(self, host, uri):
        self.connected.append(uri)
        if self.refusal:
            raise exception.MigrationPreCheckError(reason=self.refusal)
        yield

    def found(self):
        return self.readiness.stats()[readiness.STAT]

    def test_ready(self):
        self.assertEqual('ready', self.found())
        self.assertEqual(['qemu+tls://192.0.2.7/system'], self.connected)

    def test_connects_now_and_then(self):
        self.found()
        self.time = 599
        self.found()
        self.assertEqual(1, len(self.connected))
        self.time = 601
        self.found()
        self.assertEqual(2, len(self.connected))

    def test_refused_connection_is_tried_each_time(self):
        self.refusal = 'no trust'
        self.assertIn('no trust', self.found())
        self.refusal = None
        self.assertEqual('ready', self.found())

    def test_disks_on_ceph_need_no_way(self):
        self.refusal = 'no trust'
        self.ceph['nova-disks-pool'] = 'cluster/nova'
        self.assertEqual('ready', self.found())
        self.assertEqual([], self.connected)
        self.flags(storage_pool_mapping={'swap': 'files'}, group='libvirt')
        self.assertIn('no trust', self.found())

    def ways(self, transport):
        self.flags(storage_migration_transport=transport, group='libvirt')
        stats = self.readiness.stats()
        return stats[readiness.STAT], stats[readiness.WAYS]

    def test_ways(self):
        self.assertEqual(('ready', 'nbd,libvirt'), self.ways('auto'))
        self.mock_check.assert_called_once_with('192.0.2.7')
        self.assertEqual(('ready', 'libvirt'), self.ways('libvirt'))
        self.mock_check.assert_called_once_with('192.0.2.7')

    def test_no_libvirt_of_a_peer_is_needed(self):
        self.refusal = 'no trust'
        self.assertEqual(('ready', 'nbd'), self.ways('nbd'))
        self.assertEqual([], self.connected)
        self.assertEqual(('ready', 'nbd'), self.ways('auto'))
        self.assertEqual(('ready', 'nbd'), self.ways('auto'))
        # once
        self.assertEqual(1, self.stdlog.logger.output.count('no trust'))

    def test_host_that_takes_nothing_in(self):
        self.mock_check.side_effect = exception.StorageIntakeError(
            host='here', reason='no qemu-nbd')
        self.assertEqual(('ready', 'libvirt'), self.ways('auto'))
        found, ways = self.ways('nbd')
        self.assertEqual('', ways)
        self.assertIn('no qemu-nbd', found)

    def test_host_that_can_not_send(self):
        self.missing.return_value = 'no libnbd.so.0'
        self.assertEqual(('ready', 'libvirt'), self.ways('auto'))
        self.assertIn('no libnbd.so.0', self.ways('nbd')[0])

    def test_no_way(self):
        self.mock_check.side_effect = exception.StorageIntakeError(
            host='here', reason='no qemu-nbd')
        self.refusal = 'no trust'
        found, ways = self.ways('auto')
        self.assertEqual('', ways)
        self.assertIn('no qemu-nbd', found)

    def test_volume_group(self):
        """Its disks come by libvirt alone."""
        self.flags(storage_pool_mapping={'swap': 'vg'}, group='libvirt')
        self.types['vg'] = 'logical'
        self.assertEqual(('ready', 'libvirt'), self.ways('auto'))
        self.assertEqual('vg', self.readiness.stats()[readiness.DEVICES])
        found, ways = self.ways('nbd')
        self.assertEqual('', ways)
        self.assertIn('let disks come by libvirt', found)
        self.assertIn('volumes of storage pool vg of host here', found)
        self.types.clear()
        self.assertEqual(('ready', 'nbd'), self.ways('nbd'))
        self.assertEqual('', self.readiness.stats()[readiness.DEVICES])

    def test_pools_of_devices(self):
        self.stub_out(
            'nova.context.scatter_gather_skip_cell0',
            lambda ctxt, function: {uuids.cell1: [
                objects.ComputeNode(host=host, stats=stats)
                for host, stats in (
                    ('a', {readiness.DEVICES: 'vg,fast'}), ('c', None),
                    ('b', {readiness.DEVICES: ''}), ('d', {}))]})
        self.assertEqual({('a', 'vg'), ('a', 'fast')},
                         readiness.pools_of_devices(
                             context.get_admin_context()))

    def test_hosts_without_a_way_in_common(self):
        nodes = {uuids.cell1: [
            objects.ComputeNode(host=host, stats={
                readiness.STAT: 'ready', readiness.WAYS: ways})
            for host, ways in (('a', 'nbd,libvirt'), ('b', 'libvirt'),
                               ('c', 'libvirt'))]}
        self.stub_out('nova.context.scatter_gather_skip_cell0',
                      lambda ctxt, function: nodes)
        context_ = context.get_admin_context()
        self.assertEqual([], readiness.hosts_not_ready(context_))
        nodes[uuids.cell1].append(objects.ComputeNode(host='d', stats={
            readiness.STAT: 'ready', readiness.WAYS: 'nbd'}))
        found = dict(readiness.hosts_not_ready(context_))
        self.assertEqual({'b', 'c', 'd'}, set(found))
        self.assertIn('to host d by nbd alone', found['b'])
        self.assertIn('to host b by libvirt alone', found['d'])

    @ddt.data('nova-disks-pool', 'fast')
    def test_pool(self, name):
        self.flags(storage_pool_mapping={'swap': 'fast'}, group='libvirt')
        self.broken_pools[name] = 'is inactive'
        self.assertIn('is inactive', self.found())

    def test_pool_that_nova_can_not_use(self):
        self.check_access.side_effect = exception.StoragePoolForbidden(
            user='nova', pool='nova-disks-pool', host='here', path='/private',
            mode='drwxr-x--- root:kvm', missing='x')
        self.assertIn('setfacl -m u:nova:x /private', self.found())

    def test_pool_that_is_not_mounted(self):
        self.check_mounted.side_effect = exception.StoragePoolNotMounted(
            pool='nova-disks-pool', host='here', path='/mnt', found='nothing')
        self.assertIn('nothing is mounted at /mnt', self.found())

    def test_without_pools(self):
        self.flags(images_type='qcow2', group='libvirt')
        self.assertEqual({}, self.readiness.stats())
        self.assertEqual([], self.connected)

    @mock.patch.object(readiness, 'LOG')
    def test_logs_what_changes(self, log):
        self.found()
        log.info.assert_not_called()
        self.broken_pools['nova-disks-pool'] = 'is inactive'
        self.found()
        self.found()
        self.assertEqual(1, log.warning.call_count)
        self.broken_pools.clear()
        self.found()
        self.found()
        self.assertEqual(1, log.info.call_count)

    def test_version_that_ends_of_a_full_disk(self):
        self.version.return_value = 11_003_000
        self.assertEqual('ready', self.found())
        self.found()
        self.assertEqual(1, self.stdlog.logger.output.count(
            'libvirt 11.3.0 of this host, as all from 10.1 to 12.6'))

    def test_hosts_not_ready(self):
        nodes = {
            uuids.cell1: [
                objects.ComputeNode(host='c', stats={readiness.STAT: 'bad'}),
                objects.ComputeNode(host='d', stats={readiness.STAT: 'ready'}),
                objects.ComputeNode(host='e', stats=None)],
            uuids.cell2: [
                objects.ComputeNode(host='b', stats={readiness.STAT: 'worse'}),
                objects.ComputeNode(host='a', stats={'uptime': '1'})]}
        self.stub_out('nova.context.scatter_gather_skip_cell0',
                      lambda ctxt, function: nodes)
        self.assertEqual(
            [('b', 'worse'), ('c', 'bad')],
            readiness.hosts_not_ready(context.get_admin_context()))
        self.assertEqual(
            {'b', 'c', 'd'},
            readiness.hosts_with_pools(context.get_admin_context()))
