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
"""Instances that a resize moves to another cell, by way of an image."""

import os
from unittest import mock

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.policies import base as base_policies
from nova.policies import servers as servers_policies
from nova.tests.functional.libvirt import storage_pools
from nova.tests.functional.libvirt import test_storage_pools_ceph
from nova.tests.functional.libvirt import test_storage_pools_moves
from nova.tests.functional.libvirt import test_storage_pools_shared
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage.records import metadata

NAMES = ['disk', 'disk.config', 'disk.swap']
MADE_ANEW = ['disk.1', 'disk.config.1', 'disk.swap.1']


class TwoCells:
    """compute1 is in one cell, compute2 in another one."""

    NUMBER_OF_CELLS = 2
    # An error on a host is none of the API.
    CAST_AS_CALL = False

    def setUp(self):
        super().setUp()
        self.policy.set_rules({
            servers_policies.CROSS_CELL_RESIZE: base_policies.RULE_ADMIN_API},
            overwrite=False)

    def start_compute(self, hostname='compute1', **kwargs):
        kwargs['cell_name'] = hostname.replace('compute', 'cell')
        return super().start_compute(hostname, **kwargs)

    def records(self, server):
        """The records of the cell that the server is in."""
        context = nova_context.get_admin_context()
        mapping = objects.InstanceMapping.get_by_instance_uuid(
            context, server['id'])
        with nova_context.target_cell(
                context, mapping.cell_mapping) as in_cell:
            return dict(metadata.InstanceDisks.load(
                in_cell, objects.Instance.get_by_uuid(
                    in_cell, server['id'])).items())

    def wait_for_failure(self, server):
        # Last of all the conductor puts things back.
        server = self._wait_for_state_change(server, 'ERROR')
        self._wait_for_action_fail_completion(
            server, 'migrate', 'conductor_migrate_server')
        return server

    def confirm(self, server):
        self.api.post_server_action(server['id'], {'confirmResize': None})
        return self._wait_for_state_change(server, 'ACTIVE')


class CephCellsTestBase(TwoCells, test_storage_pools_ceph.CephTestBase):

    def _update_image(self, context, image_id, metadata, *args, **kwargs):
        metadata = dict(metadata, locations=[{'url': metadata['location']}])
        return super()._update_image(
            context, image_id, metadata, *args, **kwargs)

    def boot_and_write(self):
        server = self.boot(swap=64)
        self.write_image(server, 'disk', b'guest')
        return server

    def names(self, pool='nova'):
        return sorted(name[37:] for name in self.ceph.pools[pool])

    def assert_runs_with(self, server, host, names, pool='nova'):
        """Check that a server has these images, and nothing is left."""
        self.assertEqual(names, self.names(pool))
        images = self.ceph.pools[pool]
        self.assertEqual({('network', 'rbd', '%s/%s' % (pool, name))
                          for name in images}, self.sources(host, server))
        self.assertEqual({(host, 'ready', name) for name in images}, {
            (record.host, record.state, record.volume)
            for record in self.records(server).values()})
        root = images['%s_%s' % (server['id'], names[0])]
        self.assertEqual((b'guest', {}), (root.content, root.snapshots))
        if host == 'compute2':
            # Glance deletes the image that it came by.
            self.assertIsNone(root.parent)


class TestWithoutPoolsInTheOtherCell(CephCellsTestBase):
    """It can give the disk no other name."""

    images_types = {'compute2': 'rbd'}

    def test_refused(self):
        server = self.boot_and_write()
        self.api.post_server_action(server['id'], {'migrate': None})
        server = self.wait_for_failure(server)
        self.assertEqual(NAMES, self.names())
        self.assertIn('Give the hosts of each cell', self.stdlog.logger.output)
        self._reboot_server(server, hard=True)
        self.assert_runs_with(server, 'compute1', NAMES)


class TestOneCephPool(CephCellsTestBase):
    """All hosts see the images of both cells."""

    def test_confirm(self):
        server = self._migrate_server(self.boot_and_write())
        self.assertEqual(sorted(NAMES + MADE_ANEW), self.names())
        server = self.confirm(server)
        self.assert_runs_with(server, 'compute2', MADE_ANEW)
        self._reboot_server(server, hard=True)
        self.assert_runs_with(server, 'compute2', MADE_ANEW)
        self._delete_server(server)
        self.assertEqual([], self.names())

    def test_revert(self):
        server = self._migrate_server(self.boot_and_write())
        self.write_image(server, 'disk.1', b'what is given up')
        server = self._revert_resize(server)
        self.assert_runs_with(server, 'compute1', NAMES)

    def test_failure(self):
        server = self.boot_and_write()
        with mock.patch('nova.virt.libvirt.guest.Guest.launch',
                        side_effect=exception.InternalError('no memory')):
            self.api.post_server_action(server['id'], {'migrate': None})
            self.wait_for_failure(server)
        self._reboot_server(server, hard=True)
        self.assert_runs_with(server, 'compute1', NAMES)


class TestTwoCephPools(CephCellsTestBase):

    ceph_pools = {'compute1': 'nova', 'compute2': 'other'}

    def test_confirm(self):
        server = self.confirm(self._migrate_server(self.boot_and_write()))
        self.assert_runs_with(server, 'compute2', NAMES, 'other')
        self.assertEqual([], self.names())

    def test_revert(self):
        server = self._migrate_server(self.boot_and_write())
        server = self._revert_resize(server)
        self.assert_runs_with(server, 'compute1', NAMES)
        self.assertEqual([], self.names('other'))


class TestDistinctDirectories(
        TwoCells, test_storage_pools_moves.MovesTestBase):

    def base_of(self, host, server):
        self.assertIn('disk', self.volumes(host, server))
        backing = self.config_of(host, server, 'disk').backing_store
        return backing and os.path.basename(backing.path)

    def test_confirm(self):
        """No disk needs the image that it came by, and is deleted."""
        server = self.boot()
        self.assertEqual(
            storage_pools.BASE, self.base_of('compute1', server))
        server = self.confirm(self._migrate_server(server))
        self.assertIsNone(self.base_of('compute2', server))
        self.assert_nothing_left(server, 'compute1')


class TestOneDirectory(TwoCells, test_storage_pools_shared.SharedTestBase):
    """Of the other host's files libvirt knows when it looks again."""

    def setUp(self):
        super().setUp()
        for host in self.connections:
            self.define_pool(host, 'pool', self.shared)

    def roots(self, server):
        return self.volumes('compute1', server, 'pool')

    def test_confirm(self):
        server = self._migrate_server(self.boot())
        self.assertEqual(['disk', 'disk.1'], self.roots(server))
        server = self.confirm(server)
        self.assertEqual(['disk.1'], self.roots(server))
        self._reboot_server(server, hard=True)

    def test_revert_after_a_refresh_in_the_middle(self):
        """Of another server's operation"""
        server = self.boot()
        self.write_root(server)
        cached = image.LibvirtStorage.ensure_image_cached

        def refresh(*args, **kwargs):
            self.raw_pool('compute2', 'pool').refresh()
            return cached(*args, **kwargs)

        self.stub_out('nova.virt.libvirt.storage.image.LibvirtStorage.'
                      'ensure_image_cached', refresh)
        server = self._revert_resize(self._migrate_server(server))
        self.assert_has_root(server)
        self.assertEqual(['disk'], self.roots(server))
