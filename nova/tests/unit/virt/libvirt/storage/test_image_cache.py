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
import shutil
import time
import types
from unittest import mock

import ddt
import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage import image_cache as base_images
from nova.virt.libvirt.storage.pool import setup
from nova.virt.libvirt.storage.pool import usage


def error(code, message='libvirt says no'):
    return fakelibvirt.make_libvirtError(
        fakelibvirt.libvirtError, message, error_code=code,
        error_message=message)


class Pool:
    """A pool over a real directory. Its volumes are never asked for."""

    def __init__(self, name, path, kind='dir', active=True):
        self._name, self.kind, self.active = name, kind, active
        self.path = path
        self.volumes = [uuids.instance + '_disk']

    def name(self):
        return self._name

    def XMLDesc(self, flags):
        return ("<pool type='%s'><target><path>%s</path></target></pool>" %
                (self.kind, self.path))

    def isActive(self):
        return self.active

    def refresh(self, flags):
        pass

    def listAllVolumes(self, flags):
        return [types.SimpleNamespace(name=lambda name=name: name)
                for name in self.volumes]


class BaseImagesTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fakelibvirt.LibvirtModuleFixture())
        self.useFixture(nova_fixtures.PrivsepFixture())
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
        path = os.path.join(self.instances_path, 'pools', name)
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path)
        for number, backing in enumerate(names):
            if backing and ':' not in backing:
                backing = os.path.join(self.cache, backing)
            with open(os.path.join(path, 'volume%d' % number), 'wb') as f:
                f.write(libvirt_storage.qcow2_header(
                    1024, backing, 'raw', '1.1') if backing else b'raw')
        self.pools[name] = Pool(name, path, **kwargs)
        return self.pools[name]

    def in_use(self):
        return base_images.in_use(self.conn, 'host-a', self.cache)


class InUseTestCase(BaseImagesTestCase):

    def test_all_volumes_of_all_pools(self):
        self.add('nova-disks-pool', 'a', 'b', None, 'a')
        self.add('formerly-ours', 'c')
        self.assertEqual({'a', 'b', 'c'}, self.in_use())

    def test_what_has_no_overlays_is_passed_over(self):
        self.add('nova-base-images-pool', 'a')
        self.add('iscsi', 'a', kind='iscsi')
        self.assertEqual(set(), self.in_use())

    def test_pool_that_is_off_and_no_longer_configured(self):
        """Servers whose records name it need their base images yet."""
        pool = self.add('formerly-ours', 'a', active=False)
        self.add('nova-disks-pool', 'b')
        self.assertEqual({'a', 'b'}, self.in_use())
        # Nobody knows what is in it. The others' sweep goes on.
        shutil.rmtree(pool.path)
        self.assertEqual({'b'}, self.in_use())

    def test_images_elsewhere_are_not_ours(self):
        pool = self.add('nova-disks-pool', 'a', '/etc/passwd', 'sub/b', '../c',
                        'json:{"driver":"nbd"}', 'nbd://h/x')
        self.assertEqual({'a'}, self.in_use())
        with open(os.path.join(pool.path, 'relative'), 'wb') as f:
            f.write(libvirt_storage.qcow2_header(1, '../../_base/r'))
        self.assertEqual({'a', 'r'}, self.in_use())

    def test_hostile_headers(self):
        """None of them keeps the others from being read."""
        pool = self.add('nova-disks-pool', 'a', 'x' * 1000)
        header = libvirt_storage.qcow2_header(1024, 'b', 'raw', '1.1')
        offset = header[8:16]
        for number, damaged in enumerate((
                header[:19], header[:-1], b'QFI\xfb',
                header.replace(offset, b'\xff' * 8, 1),
                header.replace(offset, b'\x7f' * 8, 1),
                header[:16] + b'\xff' * 4 + header[20:],
                header[:-1] + b'\0', header[:-1] + b'\xff',
                libvirt_storage.qcow2_header(1, '/a\0b/c'))):
            with open(os.path.join(pool.path, 'bad%d' % number), 'wb') as f:
                f.write(damaged)
        os.mkdir(os.path.join(pool.path, 'directory'))
        os.mkfifo(os.path.join(pool.path, 'fifo'))
        os.symlink('/dev/zero', os.path.join(pool.path, 'link'))
        self.assertIn('a', self.in_use())

    def test_other_path_to_the_cache(self):
        other = os.path.join(self.instances_path, 'link')
        os.symlink(self.cache, other)
        self.add('nova-disks-pool', other + '/a')
        self.assertEqual({'a'}, self.in_use())

    def test_volume_deleted_meanwhile(self):
        self.add('nova-disks-pool', 'a')
        listdir = os.listdir
        with mock.patch('os.listdir', side_effect=lambda path: [
                *listdir(path), 'gone']):
            self.assertEqual({'a'}, self.in_use())

    def test_our_pool_is_inactive(self):
        self.add('nova-disks-pool', 'a', active=False)
        self.assertRaises(exception.StoragePoolInactive, self.in_use)

    def test_our_pool_can_not_be_read(self):
        pool = self.add('nova-disks-pool')
        os.rmdir(pool.path)
        self.assertRaises(exception.StoragePoolError, self.in_use)
        os.mkdir(pool.path)
        with open(os.path.join(pool.path, 'x'), 'wb'), mock.patch(
                'os.open', side_effect=PermissionError):
            self.assertRaises(exception.StoragePoolError, self.in_use)

    def test_pool_is_not_mounted(self):
        """The directory below says nothing of what the disks need."""
        self.flags(host='host-a')
        mountinfo = os.path.join(self.instances_path, 'mountinfo')
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.mounts.MOUNTINFO', mountinfo))
        for name in ('nova-disks-pool', 'formerly-ours'):
            pool = self.add(name, 'a', kind='fs')
            with open(mountinfo, 'w') as f:
                f.write('36 22 8:2 / %s rw - xfs /dev/sdb rw\n' % pool.path)
            self.assertEqual({'a'}, self.in_use())
            with open(mountinfo, 'w'):
                pass
            self.assertRaises(exception.StoragePoolNotMounted, self.in_use)
            # Libvirt knows what it has seen there.
            pool.volumes = ['debian-12.iso']
            if name == 'formerly-ours':
                self.assertEqual(set(), self.in_use())
            else:
                self.assertRaises(exception.StoragePoolNotMounted, self.in_use)
            del self.pools[name]

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
        base_images.cache_changed(self.conn, 'host-a')
        self.assertIn('no storage pool nova-base-images-pool',
                      self.stdlog.logger.output)


@ddt.ddt
class CheckedBaseTestCase(BaseImagesTestCase):

    def setUp(self):
        super().setUp()
        self.link = os.path.join(self.instances_path, 'link')
        os.symlink(self.cache, self.link)

    def test_place(self):
        image = os.path.join(self.cache, 'a')
        self.assertEqual(image, base_images.checked_base(image))
        other = os.path.join(self.instances_path, 'link', '..', 'link', 'a')
        self.assertEqual(os.path.join(self.link, 'a'),
                         base_images.checked_base(other))

    def test_instances_path_is_a_link(self):
        link = self.useFixture(fixtures.TempDir()).join('instances')
        os.symlink(self.instances_path, link)
        self.flags(instances_path=link)
        image = os.path.join(self.cache, 'a')
        self.assertEqual(image, base_images.checked_base(image))

    def test_former_cache(self):
        """Its images stay below the disks that were made then."""
        image = os.path.join(self.cache, 'a')
        self.flags(subdirectory_name='_base_here', group='image_cache')
        exc = self.assertRaises(exception.BaseImageMisplaced,
                                base_images.checked_base, image)
        self.assertIn(setup.CACHE_MARK, str(exc)[:200])
        setup._mark_cache(self.cache)
        self.assertEqual(image, base_images.checked_base(image))

    @ddt.data(None, '/elsewhere/base')
    def test_overlay(self, misplaced):
        backing = misplaced or os.path.join(self.cache, 'base')
        with mock.patch.object(content, 'look_at_qcow2', autospec=True,
                               return_value=mock.Mock(
                                   backing_file=backing)) as look:
            if misplaced:
                self.assertRaises(exception.BaseImageMisplaced,
                                  base_images.look_at_overlay, '/disk')
                return
            self.assertIs(look.return_value,
                          base_images.look_at_overlay('/disk', 7))
        look.assert_called_once_with('/disk', 7)

    def test_overlay_of_nothing(self):
        with mock.patch.object(content, 'look_at_qcow2', autospec=True,
                               return_value=mock.Mock(backing_file=None)):
            self.assertIsNone(
                base_images.look_at_overlay('/disk').backing_file)

    def test_mark_on_its_own(self):
        with mock.patch.object(setup.LOG, 'warning') as mock_warning:
            setup._mark_cache(self.cache)
            setup._mark_cache(self.cache)
            mock_warning.assert_not_called()
            setup._mark_cache('/nowhere')
        mock_warning.assert_called_once()
        self.assertEqual([setup.CACHE_MARK], os.listdir(self.cache))

    @ddt.data('/etc/passwd', 'a', 'nbd://h/_base/a', 'json:{"a":"/_base/b"}')
    def test_foreign(self, path):
        exc = self.assertRaises(exception.BaseImageMisplaced,
                                base_images.checked_base, path)
        for word in (os.path.normpath(path), self.cache):
            self.assertIn(word, str(exc))

    def test_below_and_above(self):
        for path in ('sub/a', '../a', '.', '../_bas/a'):
            self.assertRaises(
                exception.BaseImageMisplaced, base_images.checked_base,
                os.path.join(self.cache, path))


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

    def test_disk_usage_counts_where_disks_are(self):
        with open(os.path.join(self.cache, self.image), 'wb') as f:
            f.write(b'x' * 100000)
        here = os.stat(self.cache).st_dev
        for devices, counts in (({here}, True), ({-1, here}, True),
                                ({-1}, False), (set(), False)):
            with mock.patch.object(usage, 'disk_devices',
                                   return_value=devices):
                self.assertEqual(
                    counts, self.manager.get_disk_usage() >= 100000)
        self.flags(images_type='qcow2', group='libvirt')
        self.assertGreaterEqual(self.manager.get_disk_usage(), 100000)

    def test_without_pools(self):
        self.flags(images_type='qcow2', group='libvirt')
        self.conn.listAllStoragePools.side_effect = error(3)
        self.assertEqual([], self.sweep())
