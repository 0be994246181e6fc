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

import hashlib
import os
import time
from unittest import mock

import fixtures

from nova import exception
from nova import test
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import image_cache as base_images


def error(code, message='libvirt says no'):
    return fakelibvirt.make_libvirtError(
        fakelibvirt.libvirtError, message, error_code=code,
        error_message=message)


class Volume:
    def __init__(self, backing, gone=False):
        self.backing, self.gone = backing, gone

    def name(self):
        return 'volume'

    def XMLDesc(self, flags):
        if self.gone:
            raise error(fakelibvirt.VIR_ERR_NO_STORAGE_VOL)
        backing = ('<backingStore><path>%s</path></backingStore>' %
                   self.backing if self.backing else '')
        return '<volume><name>volume</name>%s</volume>' % backing


class Pool:
    def __init__(self, name, backing=(), kind='dir', active=True):
        self._name, self.kind, self.active = name, kind, active
        self.listAllVolumes = mock.Mock(
            return_value=[Volume(b) for b in backing])

    def name(self):
        return self._name

    def XMLDesc(self, flags):
        return "<pool type='%s'/>" % self.kind

    def isActive(self):
        return self.active

    def refresh(self, flags):
        pass


class BaseImagesTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.host.libvirt', fakelibvirt))
        self.flags(images_type='libvirt-storage', group='libvirt')
        self.instances_path = self.useFixture(fixtures.TempDir()).path
        self.flags(instances_path=self.instances_path)
        self.cache = os.path.join(self.instances_path, '_base')
        os.mkdir(self.cache)
        self.conn = mock.Mock()
        self.pools = {}
        self.conn.listAllStoragePools.side_effect = (
            lambda flags: list(self.pools.values()))
        self.conn.storagePoolLookupByName.side_effect = self._pool

    def _pool(self, name):
        if name not in self.pools:
            raise error(fakelibvirt.VIR_ERR_NO_STORAGE_POOL)
        return self.pools[name]

    def add(self, name, *names, **kwargs):
        self.pools[name] = Pool(name, [
            n and (n if ':' in n else os.path.join(self.cache, n))
            for n in names], **kwargs)
        return self.pools[name]

    def in_use(self):
        return base_images.in_use(self.conn, 'host-a', self.cache)


class InUseTestCase(BaseImagesTestCase):

    def test_all_volumes_of_all_pools(self):
        self.add('nova-disks-pool', 'a', 'b', None, 'a')
        self.add('formerly-ours', 'c')
        self.assertEqual({'a', 'b', 'c'}, self.in_use())
        for pool in self.pools.values():
            pool.listAllVolumes.assert_called_once_with(0)

    def test_what_has_no_overlays_is_not_listed(self):
        for pool in (self.add('nova-base-images-pool', 'a'),
                     self.add('iscsi', 'a', kind='iscsi'),
                     self.add('off', 'a', active=False)):
            self.assertEqual(set(), self.in_use())
            pool.listAllVolumes.assert_not_called()

    def test_images_elsewhere_are_not_ours(self):
        self.add('nova-disks-pool', 'a', '/etc/passwd', 'sub/b', '../c',
                 'json:{"driver":"nbd"}', 'nbd://h/x')
        self.assertEqual({'a'}, self.in_use())

    def test_other_path_to_the_cache(self):
        other = os.path.join(self.instances_path, 'link')
        os.symlink(self.cache, other)
        self.add('nova-disks-pool', other + '/a')
        self.assertEqual({'a'}, self.in_use())

    def test_volume_deleted_meanwhile(self):
        pool = self.add('nova-disks-pool', 'a')
        pool.listAllVolumes.return_value.append(Volume(None, gone=True))
        self.assertEqual({'a'}, self.in_use())

    def test_our_pool_is_inactive(self):
        self.add('nova-disks-pool', 'a', active=False)
        self.assertRaises(exception.StoragePoolInactive, self.in_use)

    def test_our_pool_can_not_be_listed(self):
        self.add('nova-disks-pool').listAllVolumes.side_effect = error(38)
        self.assertRaises(exception.StoragePoolError, self.in_use)

    def test_no_storage_driver(self):
        self.conn.listAllStoragePools.side_effect = error(3)
        self.assertRaises(exception.StoragePoolError, self.in_use)
        self.flags(images_type='qcow2', group='libvirt')
        self.assertEqual(set(), self.in_use())

    def test_cache_changed(self):
        pool = self.add('nova-base-images-pool')
        with mock.patch.object(pool, 'refresh') as mock_refresh:
            base_images.cache_changed(self.conn, 'host-a')
        mock_refresh.assert_called_once_with(0)

    def test_cache_changed_without_a_pool(self):
        with mock.patch.object(base_images.LOG, 'warning') as mock_warning:
            base_images.cache_changed(self.conn, 'host-a')
        mock_warning.assert_called_once()


class ImageCacheTestCase(BaseImagesTestCase):
    """The sweep of the image cache, over real files."""

    def setUp(self):
        super().setUp()
        self.manager = imagecache.ImageCacheManager(lambda: self.conn)
        self.stub_out('nova.privsep.path.utime', lambda path: os.utime(path))
        self.running = {'used_images': {}, 'instance_names': set(),
                        'used_swap_images': set(),
                        'used_ephemeral_images': set()}
        self.manager._list_running_instances = mock.Mock(
            side_effect=lambda *a: {k: v.copy()
                                    for k, v in self.running.items()})
        self.image = hashlib.sha1(b'image').hexdigest()
        self.other = hashlib.sha1(b'other').hexdigest()
        self.names = [self.image, self.other, 'ephemeral_1_1234567',
                      'ephemeral_2_1234567', 'swap_512', 'swap_1024']
        for name in self.names:
            path = os.path.join(self.cache, name)
            with open(path, 'w'):
                pass
            os.utime(path, (0, time.time() - 90 * 24 * 3600))

    def sweep(self):
        self.manager.update(mock.sentinel.context, [])
        return sorted(os.listdir(self.cache))

    def test_images_of_volumes_stay(self):
        """None of them is that of an instance which is on this host."""
        used = [self.image, 'ephemeral_2_1234567', 'swap_1024']
        self.add('nova-disks-pool', *used)
        self.assertEqual(sorted(used), self.sweep())

    def test_they_go_after_the_usual_age(self):
        self.add('nova-disks-pool', self.image)
        self.assertEqual([self.image], self.sweep())
        self.add('nova-disks-pool')
        self.assertEqual([self.image], self.sweep())
        os.utime(os.path.join(self.cache, self.image),
                 (0, time.time() - 90 * 24 * 3600))
        self.assertEqual([], self.sweep())

    def test_images_of_legacy_disks_stay_as_well(self):
        self.running['used_images'] = {'other': (1, 0, ['instance'])}
        self.running['used_swap_images'] = {'swap_512'}
        self.add('nova-disks-pool', self.image)
        self.assertEqual(sorted([self.image, self.other, 'swap_512']),
                         self.sweep())

    def test_nothing_goes_if_a_pool_can_not_be_read(self):
        self.add('nova-disks-pool', active=False)
        with mock.patch.object(imagecache.LOG, 'warning') as mock_warning:
            self.assertEqual(sorted(self.names), self.sweep())
        mock_warning.assert_called_once()

    def test_without_pools(self):
        self.flags(images_type='qcow2', group='libvirt')
        self.conn.listAllStoragePools.side_effect = error(3)
        self.assertEqual([], self.sweep())
