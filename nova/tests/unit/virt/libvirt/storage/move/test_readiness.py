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
        self.refusal, self.pool_type = None, 'dir'
        self.check_access = self.useFixture(fixtures.MockPatchObject(
            readiness.storage_pool.StoragePool, 'check_access',
            autospec=True)).mock
        self.stub_out('time.monotonic', lambda: self.time)
        self.stub_out('nova.virt.libvirt.storage.move.state.check_pool',
                      self._check_pool)
        self.stub_out('nova.virt.libvirt.storage.move.peer.connected',
                      self._connect)
        host = mock.Mock()
        self.version = host.get_connection.return_value.getLibVersion
        self.version.return_value = 9_000_000
        self.readiness = readiness.Readiness(host, lambda: '192.0.2.7')

    def _check_pool(self, pool):
        self.assertEqual('here', pool.host)
        if pool.name in self.broken_pools:
            raise exception.MigrationPreCheckError(
                reason=self.broken_pools[pool.name])
        return self.pool_type

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

    def test_block_pool_has_no_directory(self):
        self.pool_type = 'logical'
        self.assertEqual('ready', self.found())
        self.check_access.assert_not_called()

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

    @mock.patch.object(readiness, 'LOG')
    def test_version_that_ends_of_a_full_disk(self, log):
        self.version.return_value = 11_003_000
        self.assertEqual('ready', self.found())
        self.found()
        self.assertEqual(1, log.warning.call_count)
        self.assertEqual(11_003_000, log.warning.call_args.args[1])

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
