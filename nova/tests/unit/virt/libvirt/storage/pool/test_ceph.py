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
"""Pools over Ceph."""

import os
from unittest import mock

import fixtures
from oslo_utils import units

from nova.compute import task_states
import nova.conf
from nova import exception
from nova import objects
from nova.storage import rbd_utils
from nova.tests.fixtures import ceph
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt.libvirt.storage.pool import ceph as ceph_pool
from nova.virt.libvirt.storage.pool import health
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import sharing
from nova.virt.libvirt.storage.pool import usage

CONF = nova.conf.CONF

UUID = '11111111-2222-3333-4444-555555555555'


class CephPoolTestCase(base.PoolsTestCase):

    def setUp(self):
        super().setUp()
        self.flags(state_path=self.useFixture(fixtures.TempDir()).path)
        self.flags(group='libvirt', rbd_destroy_volume_retries=2,
                   rbd_destroy_volume_retry_interval=0)
        self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.ceph._DEFAULT_CONF',
            '/nowhere/ceph.conf'))
        self.ceph = self.useFixture(ceph.CephFixture()).cluster
        self.images = self.ceph.pools['nova']
        self.secret = self.conn.secretDefineXML(
            "<secret ephemeral='no' private='no'><uuid>%s</uuid>"
            "<usage type='ceph'><name>client.compute</name></usage>"
            "</secret>" % base.SECRET)
        self.secret.setValue(b'a key')
        self.raw = self.add_pool('ceph', kind='rbd')
        self.pool = self.pool('ceph')

    def add_image(self, name='i', size=units.Gi):
        self.images[name] = ceph.StoredImage(size)
        return self.images[name]


class XMLTestCase(CephPoolTestCase):
    """The pool's XML is the one place that says where Ceph is."""

    def conf(self):
        with open(self.pool.ceph().driver.ceph_conf) as f:
            return f.read().strip()

    def test_all_is_said_there(self):
        self.flags(group='libvirt', images_rbd_pool='other',
                   rbd_user='other')
        driver = self.pool.ceph().driver
        self.assertEqual(('nova', 'compute'), (driver.pool, driver.rbd_user))
        self.assertEqual(
            '[global]\nclient_mount_timeout = 5\n'
            'mon_host = 10.0.0.1:6790,[fd00::1]:6789\n'
            '[client.compute]\nkey = YSBrZXk=', self.conf())
        self.assertEqual(['10.0.0.1', 'fd00::1'], [
            host for host, _port in self.pool.ceph().monitors])

    def test_it_overrules_what_the_host_says(self):
        path = os.path.join(CONF.state_path, 'own.conf')
        with open(path, 'w') as f:
            f.write('[global]\nmon_host = elsewhere\n'
                    'rbd_default_features = 3\n')
        self.flags(group='libvirt', images_rbd_ceph_conf=path)
        found = self.conf()
        self.assertIn('rbd_default_features = 3', found)
        self.assertLess(found.index('elsewhere'), found.index('10.0.0.1'))

    def test_timeout(self):
        self.flags(group='libvirt', rbd_connect_timeout=7)
        self.assertIn('\nclient_mount_timeout = 7\n', self.conf())

    def test_key_is_nobody_elses_to_read(self):
        self.conf()
        path = os.path.join(CONF.state_path, 'ceph', 'ceph.conf')
        self.assertEqual(0o600, os.stat(path).st_mode & 0o777)
        self.assertEqual(0o700, os.stat(os.path.dirname(path)).st_mode & 0o777)
        self.assertEqual(['ceph.conf'], os.listdir(os.path.dirname(path)))

    def test_new_key(self):
        self.conf()
        self.secret.setValue(b'another key')
        self.assertIn('YW5vdGhlciBrZXk=', base.pool.StoragePool(
            self.conn, 'ceph', 'here').ceph()._conf())

    def test_private_secret(self):
        """For QEMU alone; Ceph's keyring is looked for."""
        self.secret._private = True
        self.assertNotIn('key', self.conf())

    def test_asks_for_a_secret(self):
        """Which virtsecretd may not answer any more, see pool.py."""
        with mock.patch.object(ceph_pool.CephPool, 'has_asked_for_secrets',
                               False):
            self.assertFalse(pool.has_lost_secrets(mock.Mock()))
            self.conf()
            self.assertTrue(ceph_pool.CephPool.has_asked_for_secrets)

    def test_no_such_secret(self):
        self.conn._secrets.clear()
        e = self.assertRaises(exception.StorageCephError,
                              lambda: self.pool.ceph().driver)
        self.assertIn('secret', str(e))

    def test_modules_are_missing(self):
        with mock.patch.object(rbd_utils, 'rbd', None), mock.patch.dict(
                'sys.modules', rados=None, rbd=None):
            for ask in (lambda: self.pool.ceph().driver,
                        lambda: self.pool.ceph().check()):
                e = self.assertRaises(exception.StorageCephError, ask)
                self.assertIn('rbd python libraries not found', str(e))

    def test_others_are_over_no_ceph(self):
        self.add_pool('files')
        self.assertIsNone(
            base.pool.StoragePool(self.conn, 'files', 'here').ceph())
        self.assertIsNone(
            base.pool.StoragePool(self.conn, 'ceph', 'elsewhere').ceph())


class ImagesTestCase(CephPoolTestCase):

    def test_libvirt_is_not_asked(self):
        self.add_image('one')
        self.add_image('two')
        self.assertEqual({'one', 'two'}, self.pool.file_names())
        self.assertEqual(['one', 'two'],
                         [image.name for image in self.pool.volumes()])
        self.pool.refresh()
        self.assertEqual('one', self.pool.find('one', refresh=True).name)
        self.assertEqual('one.1', self.pool.free_name('one'))
        self.assertEqual(0, self.raw.refreshes)

    def test_sizes(self):
        self.add_image()
        image = self.pool.volume('i')
        image.resize(2 * units.Gi)
        self.assertEqual(2 * units.Gi, image.physical())
        self.assertEqual('nova/i', image.key)
        self.assertEqual(
            'rbd:nova/i:id=compute:conf=%s/ceph/ceph.conf' % CONF.state_path,
            image.path)

    def test_no_such_image(self):
        self.assertRaises(exception.StorageVolumeNotFound,
                          self.pool.volume, 'i')
        self.assertIsNone(self.pool.find('i'))

    def test_ceph_is_out_of_reach(self):
        """Then there may well be such an image."""
        self.ceph.answers = False
        for call in (self.pool.file_names, self.pool.volumes,
                     lambda: self.pool.volume('i'),
                     lambda: self.pool.find('i')):
            e = self.assertRaises(exception.StorageCephError, call)
            self.assertIn('Check that Ceph answers host here', str(e)[:200])

    def test_no_such_ceph_pool(self):
        del self.ceph.pools['nova']
        e = self.assertRaises(exception.StorageCephError,
                              self.pool.file_names)
        self.assertIn("error opening pool 'nova'", str(e))

    def test_check(self):
        self.add_image()
        self.pool.ceph().check(['i', 'gone'])
        self.ceph.answers = False
        e = self.assertRaises(exception.StorageCephError,
                              self.pool.ceph().check)
        self.assertEqual(110, e.kwargs['code'])

    def test_check_of_what_keeps_silent(self):
        """The monitors answer, and who keeps the images doesn't."""
        self.add_image()
        self.ceph.keeps_silent = True
        self.pool.ceph().check()
        e = self.assertRaises(exception.StorageCephError,
                              self.pool.ceph().check, ['i'])
        self.assertIn('Check that Ceph answers host here', str(e)[:200])

    def test_delete(self):
        self.add_image()
        image = self.pool.volume('i')
        image.delete()
        self.assertEqual({}, self.images)
        image.delete()

    def test_delete_of_what_was_left_does_not_wait(self):
        """What it is in the way of is refused, and comes again."""
        self.add_image()
        self.ceph.keeps_silent = True
        with mock.patch.object(ceph_pool.CephImage, 'delete') as delete:
            self.assertFalse(ownership.delete_named(self.pool, 'i'))
        delete.assert_not_called()
        # and not that it would wait for ever
        self.assertIn('Check that Ceph answers', self.stdlog.logger.output)
        self.ceph.keeps_silent = False
        self.assertTrue(ownership.delete_named(self.pool, 'i'))
        self.assertEqual({}, self.images)

    def test_delete_drops_the_snapshot_of_a_resize(self):
        self.add_image().snapshots['nova-resize'] = ceph.Snapshot(b'', 1)
        self.pool.volume('i').delete()
        self.assertEqual({}, self.images)

    def test_in_use(self):
        for fault in ('watchers', 'snapshots'):
            with self.subTest(fault):
                image = self.add_image()
                setattr(image, fault, {'s': ceph.Snapshot(b'', 1)}
                        if fault == 'snapshots' else 1)
                e = self.assertRaises(exception.StorageImageBusy,
                                      self.pool.volume('i').delete)
                self.assertIn('rbd status', str(e)[:200])
                self.assertIn('i', self.images)

    def test_measure(self):
        self.assertEqual(
            (self.ceph.fsid, 1 << 40, 1 << 38),
            usage.measure(self.pool))
        self.assertEqual(0, self.raw.refreshes)

    def test_two_pools_over_one_count_once(self):
        self.add_pool('again', kind='rbd')
        self.flags(group='libvirt', storage_disks_pool='ceph',
                   storage_pool_mapping={'swap': 'again'})
        self.assertEqual(1 << 40, usage.LocalInfo('here').get(
            self.conn)['total'])

    def test_two_ceph_pools_of_one_cluster_count_once(self):
        """Both have the devices of the whole cluster."""
        self.ceph.pools['swaps'] = {}
        other = self.add_pool('swaps', kind='rbd')
        other.config.source.name = 'swaps'
        self.flags(group='libvirt', storage_disks_pool='ceph',
                   storage_pool_mapping={'swap': 'swaps'})
        self.assertEqual(
            {'total': 1 << 40, 'free': 1 << 38,
             'used': (1 << 40) - (1 << 38)},
            usage.LocalInfo('here').get(self.conn))


class AdoptTestCase(CephPoolTestCase):
    """The service starts."""

    def setUp(self):
        super().setUp()
        self.flags(group='libvirt', storage_disks_pool='ceph',
                   images_type='libvirt-storage')
        self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.setup._mark_cache'))
        self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pool.access.obstacle',
            return_value=None))
        self.useFixture(fixtures.MockPatch('nova.privsep.storage.names_in'))

    def start(self):
        setup.ensure_pools(self.conn, 'here')

    def test_ceph_answers(self):
        self.raw.destroy()
        self.start()
        self.assertTrue(self.raw.isActive())

    def test_ceph_is_away(self):
        """The guests of this host are there nevertheless."""
        self.raw.destroy()
        self.ceph.answers = False
        with mock.patch.object(setup.LOG, 'error') as mock_error:
            self.start()
        self.assertIn('Check that Ceph answers host here',
                      str(mock_error.call_args.args[-1]))
        # libvirt wasn't made to wait for it.
        self.assertFalse(self.raw.isActive())
        # No new instance comes here until it is back.
        self.assertIn('Check that Ceph answers',
                      health.why_no_new_instance(self.conn))
        self.ceph.answers = True
        self.assertIsNone(health.why_no_new_instance(self.conn))
        self.assertTrue(self.raw.isActive())

    def test_no_such_ceph_pool(self):
        """Waiting doesn't help."""
        del self.ceph.pools['nova']
        self.assertRaises(exception.StorageCephError, self.start)


class OwnershipTestCase(CephPoolTestCase):
    """Whichever host an instance is on, the image is its disk."""

    def setUp(self):
        super().setUp()
        self.flags(group='libvirt', storage_disks_pool='ceph')
        self.add_image('%s_disk' % UUID)
        self.add_image('%s_disk.swap' % UUID)
        self.add_image('other_disk')
        self.instance = objects.Instance(
            uuid=UUID, host='here', task_state='deleting')

    def test_its_host_deletes_it(self):
        self.assertTrue(
            ownership.delete_volumes(self.conn, self.instance))
        self.assertEqual(['other_disk'], list(self.images))

    def test_others_do_not(self):
        for host, task in (('there', None), (None, None),
                           ('here', 'resize_reverting')):
            with self.subTest(host=host, task=task):
                self.instance.host, self.instance.task_state = host, task
                self.assertTrue(
                    ownership.delete_volumes(self.conn, self.instance))
                self.assertEqual(3, len(self.images))

    def test_copies_of_one_of_two_cells(self):
        self.instance.host, self.instance.task_state = 'there', None
        self.assertTrue(ownership.delete_volumes(
            self.conn, self.instance, keep={('ceph', '%s_disk' % UUID)},
            is_copy=True))
        self.assertEqual(['%s_disk' % UUID, 'other_disk'], list(self.images))

    def test_rebuild_and_evacuation(self):
        """Its source is back before the other host has its guest."""
        migrations = self.useFixture(fixtures.MockPatch(
            'nova.objects.MigrationList.get_by_filters',
            return_value=[mock.Mock(status='pre-migrating')])).mock
        actions = self.useFixture(fixtures.MockPatch(
            'nova.objects.InstanceActionList.get_by_instance_uuid',
            return_value=[mock.Mock(action='evacuate')])).mock
        # An operator may have set the state of one that hung.
        for task in (*task_states.rebuild_states, None):
            self.instance.task_state = task
            self.assertTrue(
                ownership.delete_volumes(self.conn, self.instance))
            self.assertEqual(3, len(self.images))
        self.assertEqual(
            (UUID, 'here', 'evacuation'),
            tuple(migrations.call_args.args[1][name] for name in (
                'instance_uuid', 'source_compute', 'migration_type')))
        # It was cut off, and the instance is rebuilt where it is.
        actions.return_value = [mock.Mock(action='rebuild')]
        self.instance.task_state = task_states.REBUILDING
        with mock.patch('nova.objects.Instance.get_by_uuid',
                        return_value=self.instance):
            ownership.delete_volumes(self.conn, self.instance)
        self.assertEqual(['other_disk'], list(self.images))

    def test_rebuild_of_what_was_evacuated_once(self):
        """This service was not started since, which ends the migration."""
        self.instance.task_state = task_states.REBUILDING
        self.useFixture(fixtures.MockPatch(
            'nova.objects.MigrationList.get_by_filters',
            return_value=[mock.Mock(status='done')]))
        known = self.useFixture(fixtures.MockPatch(
            'nova.objects.Instance.get_by_uuid')).mock
        for host, left in (('there', 3), ('here', 1)):
            known.return_value = objects.Instance(host=host)
            ownership.delete_volumes(self.conn, self.instance)
            self.assertEqual(left, len(self.images))

    def test_volumes_are_here(self):
        self.assertTrue(ownership.has_volumes(self.conn, UUID))
        self.assertFalse(ownership.has_volumes(self.conn, 'nobody'))

    def test_no_probe(self):
        self.add_pool('files')
        self.flags(group='libvirt', storage_pool_mapping={'swap': 'files'})
        probes = sharing.make_probes(self.conn, UUID)
        self.assertEqual(['files'], [pool for pool, _name in probes])
        self.assertEqual(3, len(self.images))
        self.assertTrue(sharing.find_probes(self.conn, probes))
        # What the source of a live migration is told instead of one
        sharing.remove_probes(
            self.conn, [*probes, ('ceph', '%s/nova' % self.ceph.fsid)])
        self.assertFalse(sharing.find_probes(self.conn, probes))
