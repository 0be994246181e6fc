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
"""Instances whose disks are in storage pools over Ceph, on two hosts."""

import threading
from unittest import mock

import ddt
import fixtures
from oslo_utils import units

from nova.compute import instance_actions
from nova import exception
from nova import objects
from nova.tests.fixtures import ceph
from nova.tests.functional.api import client
from nova.tests.functional.libvirt import storage_pools
from nova.virt.libvirt import guest
from nova.virt.libvirt.storage import api
from nova.virt.libvirt.storage.records import metadata

SECRET = '5a2f4d3e-0d3c-4d5f-9a2a-3b1d7c9e6f10'
POOL = (
    "<pool type='rbd'><name>nova-disks-pool</name><source>"
    "<host name='192.0.2.100' port='6789'/><name>%s</name>"
    "<auth type='ceph' username='nova'><secret uuid='" + SECRET + "'/></auth>"
    "</source></pool>")
NAMES = ['disk', 'disk.config', 'disk.eph0', 'disk.swap']


class CephTestBase(storage_pools.StoragePoolsTestBase):

    #: by host, the Ceph pool of its storage pool; None: it has a directory
    ceph_pools = {'compute1': 'nova', 'compute2': 'nova'}

    def setUp(self):
        super().setUp()
        self.flags(state_path=self.useFixture(fixtures.TempDir()).path,
                   force_config_drive=True)
        self.flags(group='libvirt', rbd_destroy_volume_retries=1,
                   rbd_destroy_volume_retry_interval=0,
                   images_rbd_pool='nova', rbd_user='nova',
                   rbd_secret_uuid=SECRET)
        self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.ceph._DEFAULT_CONF',
            '/nowhere/ceph.conf'))
        self.ceph = self.useFixture(ceph.CephFixture()).cluster
        self.ceph.pools['other'] = {}
        self.images = self.ceph.pools['nova']
        size = len(storage_pools.CONTENT)
        image = ceph.StoredImage(size, storage_pools.CONTENT)
        image.snapshots['snap'] = ceph.Snapshot(image.content, size)
        image.snapshots['snap'].protected = True
        self.ceph.pools['images']['image'] = image
        self.glance.images[storage_pools.IMAGE]['locations'] = [
            {'url': 'rbd://%s/images/image/snap' % self.ceph.fsid}]
        self.useFixture(fixtures.MockPatch(
            'nova.storage.rbd_utils.RBDDriver.get_mon_addrs',
            return_value=(['192.0.2.100'], ['6789'])))
        for host in self.ceph_pools:
            self.start_compute(host)

    def _update_image(self, context, image_id, metadata, *args, **kwargs):
        """Serve what a snapshot has left on Ceph."""
        location = metadata.get('location')
        found = super()._update_image(
            context, image_id, metadata, *args, **kwargs)
        found['locations'] = [{'url': location}] if location else []
        if location:
            pool, name, _snapshot = location.split('/')[-3:]
            self.glance._imagedata[image_id] = (
                self.ceph.pools[pool][name].content)
        return found

    def _get_connection(self, *args, **kwargs):
        connection = super()._get_connection(*args, **kwargs)
        connection.secretDefineXML(
            "<secret ephemeral='no' private='no'><uuid>%s</uuid></secret>" %
            SECRET).setValue(b'key')
        name = self.ceph_pools[kwargs['hostname']]
        if name is not None:
            connection.storagePoolDefineXML(POOL % name)
        return connection

    def boot_with_all(self):
        server = self.boot(ephemeral=1, swap=64)
        self.written = {}
        for name in NAMES:
            self.write_image(server, name, b'guest ' + name.encode())
            self.written[name] = b'guest ' + name.encode()
        return server

    def write_image(self, server, name, content):
        self.images['%s_%s' % (server['id'], name)].content = content

    def assert_on(self, host, server, backend='libvirt-storage-rbd',
                  pool='nova-disks-pool'):
        """Check that all of a server's disks are where they have been."""
        is_in_pool = pool is not None
        self.assertEqual(
            {name: (backend, 'raw', 'ready', host, pool,
                    '%s_%s' % (server['id'], name) if is_in_pool else None)
             for name in NAMES},
            {name: (r.backend, r.format, r.state, r.host, r.pool, r.volume)
             for name, r in self.records(server).items()})
        self.assertEqual(
            self.written,
            {name: self.images['%s_%s' % (server['id'], name)].content
             for name in NAMES})
        self.assertEqual(len(NAMES), len(self.images))
        self.assertEqual({}, self.images[server['id'] + '_disk'].snapshots)
        self.assertEqual(
            {('network', 'rbd', 'nova/%s_%s' % (server['id'], name))
             for name in NAMES}, self.sources(host, server))
        for other in {*self.connections} - {host}:
            self.assert_no_guest(other, server)
        self.assert_nobody_copies()

    def sources(self, host, server):
        found = self.computes[host].driver._host.get_guest(
            objects.Instance(uuid=server['id']))
        return {(disk.source_type, disk.source_protocol, disk.source_name)
                for disk in found.get_all_disks()}

    def assert_nobody_copies(self):
        """Not a byte, and no host reaches for another one."""
        self.assertEqual([], self.pump.copied)
        self.assertFalse([command for command in self.programs.executed
                          if command[0] in ('ssh', 'scp', 'rsync')])
        for host, name in self.ceph_pools.items():
            if name is not None:
                self.assertEqual(0, self.raw_pool(host).refreshes)

    def fail_to_evacuate(self, server, source, dest):
        """What was on record before is known afterwards."""
        before = self.places(server)
        self.computes[source].stop()
        self.force_down(source, True)
        with mock.patch('nova.virt.libvirt.guest.Guest.launch',
                        side_effect=exception.InternalError('no memory')):
            self._evacuate_server(
                server, {'host': dest}, expected_state='ERROR',
                expected_migration_status='failed')
        self.assertEqual(before, self.places(server))

    def places(self, server):
        """Return where the disks are if an evacuation is given up."""
        known = [record.previous or record
                 for record in self.records(server).values()]
        return {(record.host, record.volume) for record in known}

    def evacuate_beside_its_source(self, server):
        """Evacuate a server; its host is back before that ends.

        :returns: names of the images
        """
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        target = self.computes['compute2'].manager.driver
        spawn, images = target.spawn, sorted(self.images)

        def spawn_late(*args, **kwargs):
            self.restart_compute_service('compute1')
            self.assertEqual(images, sorted(self.images))
            spawn(*args, **kwargs)

        self.useFixture(fixtures.MockPatchObject(target, 'spawn', spawn_late))
        self._evacuate_server(server, expected_host='compute2')
        return images


@ddt.ddt
class TestCeph(CephTestBase):

    def assert_deleted(self, server):
        self._delete_server(server)
        self.assertEqual({}, self.images)
        self.assert_nobody_copies()

    def test_boot_and_reboot(self):
        server = self.boot_with_all()
        self.assert_on('compute1', server)
        self.assertEqual(1 << 30, self.images[server['id'] + '_disk'].size)
        self._reboot_server(server, hard=True)
        self.assert_on('compute1', server)
        self._stop_server(server)
        self._start_server(server)
        self.assert_on('compute1', server)
        self.assert_deleted(server)

    def test_rescue(self):
        server = self.boot_with_all()
        self._rescue_server(server)
        self.assertEqual(
            sorted('%s_%s' % (server['id'], name) for name in (
                *NAMES, 'disk.config.rescue', 'disk.rescue')),
            sorted(self.images))
        self._unrescue_server(server)
        self.assertEqual(len(NAMES), len(self.images))
        self._reboot_server(server, hard=True)
        self.assert_on('compute1', server)

    def test_migrate_and_confirm(self):
        server = self.boot_with_all()
        server = self._migrate_server(server)
        self.assertEqual('compute2', server['OS-EXT-SRV-ATTR:host'])
        self.assertEqual(
            ['nova-resize'],
            list(self.images[server['id'] + '_disk'].snapshots))
        self._confirm_resize(server)
        self.assert_on('compute2', server)
        self.assertEqual({None}, {
            record.previous for record in self.records(server).values()})
        self._reboot_server(server, hard=True)
        self.assert_on('compute2', server)
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_on('compute1', server)
        self.assert_deleted(server)

    def test_revert(self):
        server = self.boot_with_all()
        before = self.records(server)
        self._resize_server(
            server, self.flavor(disk=2, ephemeral=1, swap=64))
        self.assertEqual(2 << 30, self.images[server['id'] + '_disk'].size)
        self.write_image(server, 'disk', b'what is taken back')
        server = self._revert_resize(server)
        self.assertEqual('compute1', server['OS-EXT-SRV-ATTR:host'])
        self.assert_on('compute1', server)
        self.assertEqual(1 << 30, self.images[server['id'] + '_disk'].size)
        self.assertEqual(
            {name: record.obj_to_primitive()
             for name, record in before.items()},
            {name: record.obj_to_primitive()
             for name, record in self.records(server).items()})
        self._reboot_server(server, hard=True)
        self.assert_on('compute1', server)
        self.assert_deleted(server)

    def test_delete_while_it_waits(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.assert_deleted(server)

    def test_evacuate(self):
        server = self.boot_with_all()
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        self._evacuate_server(server, expected_host='compute2')
        self.assertEqual(
            {('compute2', None)},
            {(r.host, r.previous) for r in self.records(server).values()})
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self.assert_on('compute2', server)
        # and back again, where old copies are known of other pools
        self.computes['compute2'].stop()
        self.force_down('compute2', True)
        self._evacuate_server(server, expected_host='compute1')
        self.restart_compute_service('compute2')
        self.force_down('compute2', False)
        self.assert_on('compute1', server)
        self.assert_deleted(server)

    def test_evacuate_and_its_source_is_back_before_that_ends(self):
        server = self.boot_with_all()
        images = self.evacuate_beside_its_source(server)
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self.assert_on('compute2', server)
        self.assertEqual(images, sorted(self.images))

    def test_evacuate_while_it_waits_for_confirm(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self._confirm_resize(server)
        self.computes['compute2'].stop()
        self.force_down('compute2', True)
        self._evacuate_server(server, expected_host='compute1')
        self.restart_compute_service('compute2')
        self.force_down('compute2', False)
        self.assert_on('compute1', server)

    @ddt.data('migrate', 'evacuate')
    def test_swap_that_has_grown(self, action):
        """It is larger than its flavor says when the resize is reverted."""
        server = self.boot(swap=64)
        self._resize_server(server, self.flavor(swap=128))
        server = self._revert_resize(server)
        if action == 'migrate':
            self._migrate_server(server)
        else:
            self.computes['compute1'].stop()
            self.force_down('compute1', True)
            self._evacuate_server(server)
        server = self.api.get_server(server['id'])
        self.assertEqual('compute2', server['OS-EXT-SRV-ATTR:host'])
        self.assertEqual(
            128 * units.Mi, self.images[server['id'] + '_disk.swap'].size)

    def test_deleted_while_it_is_on_no_host(self):
        server = self.boot_with_all()
        disk = self.images[server['id'] + '_disk']
        disk.watchers = 1
        self.flags(shelved_offload_time=0)
        self._shelve_server(server)
        self._delete_server(server)
        self.assertEqual([disk], list(self.images.values()))
        for watchers in (1, 0):
            disk.watchers = watchers
            self.sweep('compute2')
            self.assertEqual(watchers, len(self.images))

    def test_pool_is_a_directory_now(self):
        server = self.boot_with_all()
        self.raw_pool('compute1').destroy()
        self.raw_pool('compute1').undefine()
        self.connections['compute1'].storagePoolDefineXML(
            '<pool type="dir"><name>nova-disks-pool</name><target><path>%s'
            '</path></target></pool>' % self.useFixture(
                fixtures.TempDir()).path)
        self.raw_pool('compute1').create()
        self.restart_compute_service('compute1')
        self.assertRaises(
            client.OpenStackApiException, self._reboot_server, server,
            hard=True)
        self.assertTrue(self.connections['compute1'].lookupByUUIDString(
            server['id']).isActive())
        self._delete_server(server)
        self.assertEqual(len(NAMES), len(self.images))
        self.assertIn('is another one than that', self.stdlog.logger.output)

    def test_shelve(self):
        server = self.boot_with_all()
        self.flags(shelved_offload_time=0)
        self._shelve_server(server)
        self.assertEqual({}, self.images)


class TestRevertOfMoreDisks(CephTestBase):
    """A resize that is reverted has made a swap and an ephemeral disk."""

    def test_revert(self):
        self.flags(allow_resize_to_same_host=True)
        server = self.boot()
        before = set(self.images)
        self._resize_server(server, self.flavor(ephemeral=1, swap=64))
        self.assertLess(before, set(self.images))
        self._revert_resize(server)
        self.assertEqual(before, set(self.images))
        self.assertEqual({'disk', 'disk.config'}, set(self.records(server)))
        self._delete_server(server)
        self.assertEqual({}, self.images)


class TestRevertOfMoreDisksOnOneHost(TestRevertOfMoreDisks):

    ceph_pools = {'compute1': 'nova'}


class TestCephIsAway(CephTestBase):

    # An error on a host is none of the API.
    CAST_AS_CALL = False
    ceph_pools = {'compute1': 'nova'}

    def test_hard_reboot(self):
        """The guest runs on, and the next try goes through."""
        server = self.boot_with_all()
        for fault in ('answers', 'keeps_silent'):
            well = getattr(self.ceph, fault)
            setattr(self.ceph, fault, not well)
            self.notifier.reset()
            with mock.patch.object(
                    guest.Guest, 'poweroff', autospec=True) as mock_poweroff:
                self.api.post_server_action(
                    server['id'], {'reboot': {'type': 'HARD'}})
                (told,) = self.notifier.wait_for_versioned_notifications(
                    'instance.reboot.error')
                mock_poweroff.assert_not_called()
            self.assertIn(
                'Check that Ceph answers host compute1', told['payload'][
                    'nova_object.data']['fault']['nova_object.data'][
                        'exception_message'])
            self._wait_for_server_parameter(
                server, {'status': 'ACTIVE', 'OS-EXT-STS:task_state': None})
            setattr(self.ceph, fault, well)
        self._reboot_server(server, hard=True)
        self.assert_on('compute1', server)


class TestCephCutOff(CephTestBase):
    """A move has failed on its destination; what an operator does then."""

    # An error on a host is none of the API.
    CAST_AS_CALL = False

    def assert_no_guest(self, host, server):
        """Nobody has confirmed that it has left: it is off, and defined."""

    def fail_to_arrive(self, server, **patch):
        with mock.patch(**patch):
            self.api.post_server_action(
                server['id'], {'migrate': {'host': 'compute2'}})
            self.wait_for_failure(server)
        server = self._reboot_server(server, hard=True)
        self.assert_on('compute2', server)
        self.assertEqual({None}, {
            record.previous for record in self.records(server).values()})
        return server

    def restart_in_the_middle(self, server, where):
        """Kill nova-compute while it migrates a server, and start it."""
        manager = self.computes['compute2'].manager
        killed = threading.Event()

        def restart(*args, **kwargs):
            with mock.patch(
                    'nova.virt.libvirt.storage.move.copy._running', set()):
                manager._init_instance(
                    self.context, objects.Instance.get_by_uuid(
                        self.context, server['id'], expected_attrs=[
                            'flavor', 'info_cache', 'metadata',
                            'system_metadata', 'migration_context',
                            'numa_topology']))
            killed.set()
            raise exception.InternalError('killed')

        with mock.patch(where, autospec=True, side_effect=restart):
            self.api.post_server_action(
                server['id'], {'migrate': {'host': 'compute1'}})
            self.assertTrue(killed.wait(60))
            # It sets the task state when it is over.
            self._wait_for_action_fail_completion(
                server, instance_actions.MIGRATE, 'compute_resize_instance')
            self._wait_for_server_parameter(
                server, {'OS-EXT-STS:task_state': None})

    def test_ceph_was_away_when_it_came(self):
        server = self.boot_with_all()
        real = api.LocalDisks.arrive

        def arrive(*args, **kwargs):
            self.ceph.answers = False
            try:
                return real(*args, **kwargs)
            finally:
                self.ceph.answers = True

        server = self.fail_to_arrive(
            server, target='nova.virt.libvirt.storage.api.LocalDisks.arrive',
            new=arrive)
        server = self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_on('compute1', server)

    def test_that_it_came_was_never_on_record(self):
        server = self.boot_with_all()
        server = self.fail_to_arrive(
            server, target='nova.virt.libvirt.storage.api.LocalDisks.arrive',
            side_effect=exception.InternalError('killed'))
        # As it was with compute services that didn't put that right.
        with self.hosts.on('compute2'):
            disks = metadata.InstanceDisks.load(
                self.context, objects.Instance.get_by_uuid(
                    self.context, server['id']))
            for name, record in disks.items():
                record.host = 'compute1'
                disks.set(name, record)
            disks.save(self.context)
        self._stop_server(server)
        self.restart_in_the_middle(
            server, 'nova.virt.libvirt.storage.move.precheck.Departure.check')
        self.assertEqual(self.written, {
            name: self.images['%s_%s' % (server['id'], name)].content
            for name in NAMES})

    def test_evacuation_fails(self):
        server = self.boot_with_all()
        self.fail_to_evacuate(server, 'compute1', 'compute2')
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self._reboot_server(server, hard=True)
        self.assert_on('compute1', server)

    def test_snapshot_of_long_ago(self):
        server = self.boot_with_all()
        server = self.fail_to_arrive(
            server, target='nova.virt.libvirt.driver.LibvirtDriver.'
                           '_create_guest_with_network',
            side_effect=exception.InternalError('no memory'))
        self.written['disk'] = b'weeks of work'
        self.write_image(server, 'disk', b'weeks of work')
        # Whoever has made it
        self.images[server['id'] + '_disk'].snapshots['nova-resize'] = (
            ceph.Snapshot(b'long ago', 1))
        self.restart_in_the_middle(
            server, 'nova.virt.libvirt.storage.move.source.Outgoing.run')
        self._reboot_server(server, hard=True)
        self.assert_on('compute2', server)

    def test_ceph_was_away_when_it_was_confirmed(self):
        server = self.boot_with_all()
        server = self._migrate_server(server)
        self.ceph.answers = False
        self.api.post_server_action(server['id'], {'confirmResize': None})
        self.wait_for_failure(server)
        self.ceph.answers = True
        self._reboot_server(server, hard=True)
        self.assert_on('compute2', server)


class TestRefusedIntoCeph(storage_pools.Refusals, CephTestBase):

    ceph_pools = {'compute1': None, 'compute2': 'nova'}

    def test_into_ceph(self):
        """The source has no pool by which it could reach Ceph."""
        server = self.boot()
        self.refuse(
            server, 'choose a host with the same Ceph pool',
            'no Ceph pool here, %s/nova there' % self.ceph.fsid)
        self.assertEqual({}, self.images)


class TestRefusedOtherPool(storage_pools.Refusals, CephTestBase):

    ceph_pools = {'compute1': 'nova', 'compute2': 'other'}

    def test_other_pool(self):
        server = self.boot_with_all()
        self.refuse(server, '%s/nova' % self.ceph.fsid,
                    '%s/other' % self.ceph.fsid)
        self.assert_on('compute1', server)


class TestEvacuateToOtherPool(CephTestBase):

    ceph_pools = {'compute1': 'nova', 'compute2': 'other'}

    def test_evacuate(self):
        """What is nowhere to be seen there is made anew."""
        server = self.boot_with_all()
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        self._evacuate_server(server, expected_host='compute2')
        names = {'%s_%s' % (server['id'], name) for name in NAMES}
        self.assertEqual(names, set(self.ceph.pools['other']))
        self.assertEqual({('compute2', 'ready', None)}, {
            (r.host, r.state, r.previous)
            for r in self.records(server).values()})
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self.assertEqual(names, set(self.ceph.pools['other']))
        self.assert_no_guest('compute1', server)
        self._delete_server(server)
        self.assertEqual({}, self.ceph.pools['other'])


class QemuImg(fixtures.Fixture):
    """Plays what qemu-img does between files and the images of a cluster.

    :ivar fails: whether it does
    """

    def __init__(self, cluster):
        self._cluster, self.fails = cluster, False

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.move.convert.run', self.run))

    def run(self, command, watch, names, good=(0,), least=0):
        source, target = command[-2:]
        if command[1] == 'compare':
            return int(self._read(source) != self._read(target))
        if self.fails:
            raise exception.StorageTransferError(
                side='destination', reason='full', transferred=0, **names)
        if target.startswith('rbd:'):
            self._image_at(target).content = self._read(source)
        else:
            with open(target, 'r+b') as f:
                f.write(self._read(source))
        return 0

    def _image_at(self, path):
        pool, name = path.split(':')[1].split('/')
        return self._cluster.pools[pool][name]

    def _read(self, path):
        """What a test has written is not behind that."""
        if path.startswith('rbd:'):
            return self._image_at(path).content
        with open(path, 'rb') as f:
            return f.read(2 << 20).rstrip(b'\0')


class BetweenKindsTestBase(CephTestBase):
    """From a directory into Ceph, and back."""

    ceph_pools = {'compute1': None, 'compute2': 'nova'}

    def setUp(self):
        super().setUp()
        self.flags(use_cow_images=False)
        self.qemu_img = self.useFixture(QemuImg(self.ceph))

    def _get_connection(self, *args, **kwargs):
        connection = super()._get_connection(*args, **kwargs)
        if kwargs['hostname'] == 'compute1':
            connection.storagePoolDefineXML((POOL % 'nova').replace(
                'nova-disks-pool', 'over-ceph')).create(0)
        return connection

    def boot_with_all(self):
        server = self.boot(ephemeral=1, swap=64)
        self.write('compute1', server, 'disk', b'guest')
        return server

    def assert_in_directory(self, server):
        self.assertEqual({}, self.images)
        self.assertEqual(NAMES, self.volumes('compute1', server))
        self.assertEqual(
            {('libvirt-storage', 'ready', 'compute1')},
            {(record.backend, record.state, record.host)
             for record in self.records(server).values()})
        self.assertEqual(b'guest', self.content(
            'compute1', server, 'disk', 5, storage_pools.GUEST))
        self.assertEqual({None}, {
            record.previous for record in self.records(server).values()})

    def assert_in_ceph(self, server):
        self.assertEqual({'%s_%s' % (server['id'], name) for name in NAMES},
                         set(self.images))
        image = self.images[server['id'] + '_disk']
        self.assertEqual(
            b'guest', image.content[storage_pools.GUEST:])
        self.assertEqual(({}, 1 << 30), (image.snapshots, image.size))
        self.assertEqual(
            {('libvirt-storage-rbd', 'raw', 'ready', 'compute2')},
            {(record.backend, record.format, record.state, record.host)
             for record in self.records(server).values()})


class TestBetweenKinds(BetweenKindsTestBase):

    def test_there_and_back_again(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.assert_in_ceph(server)
        self.assertEqual(NAMES, self.volumes('compute1', server))
        self._confirm_resize(server)
        self.assert_in_ceph(server)
        self.assertEqual([], self.files('compute1'))
        self._reboot_server(server, hard=True)
        self.assert_in_ceph(server)
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_in_directory(server)
        self._delete_server(server)
        self.assertEqual([], self.files('compute1'))

    def test_revert(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.images[server['id'] + '_disk'].content = b'lost'
        self._revert_resize(server)
        self.assert_in_directory(server)
        self._reboot_server(server, hard=True)
        self.assert_in_directory(server)


class TestBetweenKindsFails(BetweenKindsTestBase):
    """The server is whole where it was, and the next try succeeds."""

    # An error on a host is none of the API.
    CAST_AS_CALL = False

    def test_failure(self):
        server = self.boot_with_all()
        self.qemu_img.fails = True
        self.api.post_server_action(
            server['id'], {'migrate': {'host': 'compute2'}})
        self.wait_for_refusal(server)
        self.assert_in_directory(server)
        self.qemu_img.fails = False
        self._migrate_server(server)
        self.assert_in_ceph(server)

    def test_evacuation_fails(self):
        server = self.boot(host='compute2')
        images = sorted(self.images)
        self.fail_to_evacuate(server, 'compute2', 'compute1')
        self.assertEqual([], self.files('compute1'))
        self.assertEqual(images, sorted(self.images))

    def test_evacuation_into_ceph_fails(self):
        server = self.boot()
        self.fail_to_evacuate(server, 'compute1', 'compute2')
        self.assertEqual(
            {('compute2', name) for name in self.images},
            {(host, name) for host, _pool, name in self.leftovers(server)})
        self._evacuate_server(
            server, {'host': 'compute2'}, expected_state='ACTIVE')
        # No image is taken for the disk that another try has begun.
        self.assertEqual(2 * 2, len(self.images))
        self._delete_server(server)
        self.assertEqual({}, self.images)

    def leftovers(self, server):
        return metadata.InstanceDisks.load(
            self.context, objects.Instance.get_by_uuid(
                self.context, server['id'])).leftovers


class TestTakeOver(CephTestBase):
    """Servers of ``images_type = rbd`` and of pools are the same disks."""

    images_types = {'compute1': 'rbd', 'compute2': 'rbd'}

    def upgrade(self, images_type='libvirt-storage'):
        for host in self.connections:
            self.set_option(host, 'images_type', images_type)
            self.restart_compute_service(host)

    def test_there_and_back(self):
        server = self.boot_with_all()
        self.assert_on('compute1', server, backend='rbd', pool=None)
        self.upgrade()
        self.assert_on('compute1', server, backend='rbd', pool=None)
        self._reboot_server(server, hard=True)
        self.assert_on('compute1', server)
        self.upgrade('rbd')
        self._reboot_server(server, hard=True)
        self.assert_on('compute1', server, backend='rbd', pool=None)
        self.upgrade()
        self._delete_server(server)
        self.assertEqual({}, self.images)

    def test_migrate(self):
        server = self.boot_with_all()
        self.upgrade()
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_on('compute2', server)

    def upgrade_one(self):
        """The other host sends its servers by SSH."""
        self.stub_remote_files()
        self.set_option('compute2', 'images_type', 'libvirt-storage')
        self.restart_compute_service('compute2')

    def test_revert_in_the_midst_of_an_upgrade(self):
        server = self.boot_with_all()
        images = sorted(self.images)
        self.upgrade_one()
        self._migrate_server(server)
        self._revert_resize(server)
        self.assertEqual(images, sorted(self.images))
        self.assert_on('compute1', server, backend='rbd', pool=None)

    def test_confirm_in_the_midst_of_an_upgrade(self):
        server = self.boot_with_all()
        images = sorted(self.images)
        self.upgrade_one()
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assertEqual(images, sorted(self.images))
        self._reboot_server(server, hard=True)
        self.assert_on('compute2', server)
        self.assertEqual([], list(
            self.images[server['id'] + '_disk'].snapshots))

    def test_evacuate_and_its_source_is_back_before_that_ends(self):
        server = self.boot_with_all()
        self.upgrade()
        self.evacuate_beside_its_source(server)

    def test_evacuate(self):
        server = self.boot_with_all()
        self.upgrade()
        self.computes['compute1'].stop()
        self.force_down('compute1', True)
        self._evacuate_server(server, expected_host='compute2')
        self.assertEqual({('compute2', 'rbd')}, {
            (r.host, r.backend) for r in self.records(server).values()})
        self.restart_compute_service('compute1')
        self.force_down('compute1', False)
        self.assert_on('compute2', server, backend='rbd', pool=None)
        self._reboot_server(server, hard=True)
        self.assert_on('compute2', server)

    def test_other_ceph_pool(self):
        server = self.boot_with_all()
        self.upgrade()
        self.flags(group='libvirt', images_rbd_pool='other')
        self._reboot_server(server, hard=True)
        self.assertEqual({'rbd'}, {
            record.backend for record in self.records(server).values()})
