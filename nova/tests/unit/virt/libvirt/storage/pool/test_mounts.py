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
"""Pools over file systems that libvirt mounts."""

import os
from unittest import mock

import ddt
import fixtures
from oslo_utils import units

from nova import exception
from nova.tests.unit.virt.libvirt.storage.pool import base
from nova.virt.libvirt.storage.pool import config
from nova.virt.libvirt.storage.pool import health
from nova.virt.libvirt.storage.pool import mounts
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import usage

# proc(5): source and target are escaped, and "shared:1" may be missing.
MOUNTINFO = '''\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
35 22 0:40 / /mnt/the\\040pool rw,nosuid - nfs4 %s rw,vers=4.2
36 22 0:41 / /mnt/other rw,nosuid shared:7 - nfs4 server:/other rw
'''
PATH = '/mnt/the pool'


class MountedPoolTestCase(base.PoolsTestCase):

    def setUp(self):
        super().setUp()
        self.mountinfo = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'mountinfo')
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.mounts.MOUNTINFO',
            self.mountinfo))
        self.mount()
        self.flags(group='libvirt', storage_disks_pool='nfs')
        self.raw = self.add_pool('nfs', PATH, kind='netfs')
        self.nfs = self.pool('nfs')

    def mount(self, source='server:/export'):
        with open(self.mountinfo, 'w') as f:
            f.write(MOUNTINFO % source)

    def unmount(self):
        with open(self.mountinfo, 'w') as f:
            f.write(MOUNTINFO.split('\n')[0] + '\n')

    def disk(self, name='v'):
        wanted = config.LibvirtConfigStorageVolume()
        wanted.name, wanted.capacity, wanted.allocation = name, units.Mi, 0
        wanted.target_format = 'raw'
        return wanted


@ddt.ddt
class LocalTestCase(MountedPoolTestCase):

    @ddt.data(('/', True), ('/var/lib', True), ('/mnt', True),
              (PATH, False), (PATH + '/disks', False), (PATH + '2', True),
              ('/mnt/other', False))
    @ddt.unpack
    def test_is_local(self, path, expected):
        self.assertIs(expected, mounts.is_local(path))

    def test_mounted_over(self):
        with open(self.mountinfo, 'a') as f:
            f.write('37 22 8:2 / /mnt/other rw shared:8 - xfs /dev/sdb rw\n')
        self.assertTrue(mounts.is_local('/mnt/other/disks'))

    def test_not_known(self):
        with open(self.mountinfo, 'w') as f:
            f.write('22 1 0:9 / / rw - fuse.other other rw\n')
        self.assertFalse(mounts.is_local(PATH))


@ddt.ddt
class MountTestCase(MountedPoolTestCase):
    """libvirt says that a pool is active though nothing is mounted."""

    def assert_refused(self, function, *args):
        e = self.assertRaises(
            exception.StoragePoolNotMounted, function, *args)
        for part in ('nfs', 'host here', 'virsh pool-destroy', PATH):
            self.assertIn(part, str(e)[:200])
        return str(e)

    def test_nothing_is_mounted(self):
        self.unmount()
        for function in (self.nfs.adopt, self.nfs.start,
                         lambda: self.nfs.create(self.disk()),
                         lambda: self.nfs.create_from(self.disk(), None),
                         lambda: usage.measure(self.nfs)):
            self.assertIn('nothing is mounted',
                          self.assert_refused(function))
        self.assertEqual([], self.raw.listVolumes())

    @ddt.data('server:/other', 'other:/export', '/dev/sdb')
    def test_something_else_is_mounted(self, source):
        self.mount(source)
        self.assertIn(source + ' is mounted', self.assert_refused(
            self.nfs.create, self.disk()))

    @ddt.data('server:/export', 'server:/export/', '//server/export')
    def test_well(self, source):
        self.mount(source)
        self.nfs.adopt()
        self.assertEqual('v', self.nfs.create(self.disk()).name)

    def test_well_by_a_link(self):
        link = os.path.join(self.useFixture(fixtures.TempDir()).path, 'link')
        os.symlink(PATH, link)
        self.add_pool('linked', link, kind='netfs')
        self.pool('linked').check_mounted()

    def test_directory_is_nobodys_mount(self):
        self.unmount()
        self.add_pool('plain')
        self.pool('plain').create(self.disk())

    def test_file_system_of_a_device(self):
        """It may have been mounted by any of the device's names."""
        self.mount('/dev/mapper/disks')
        self.add_pool('fs', '/mnt/other', kind='fs')
        self.pool('fs').check_mounted()
        self.unmount()
        self.assertRaises(exception.StoragePoolNotMounted,
                          self.pool('fs').check_mounted)

    def test_nothing_is_taken_for_deleted(self):
        """Its file is there again as soon as the export is mounted.

        libvirt knows the volume still, and doesn't mind that its file is gone.
        """
        self.nfs.create(self.disk())
        self.unmount()
        self.assert_refused(self.nfs.volume('v').delete)
        self.assertFalse(ownership.delete_named(self.nfs, 'v'))
        self.assertEqual(['v'], self.raw.listVolumes())
        self.mount()
        self.assertTrue(ownership.delete_named(self.nfs, 'v'))
        self.assertEqual([], self.raw.listVolumes())

    def test_of_another_host_nothing_is_known(self):
        self.unmount()
        base.pool.StoragePool(self.conn, 'nfs', 'there').check_mounted()

    def test_no_new_instance(self):
        self.assertIsNone(health.why_no_new_instance(self.conn))
        self.unmount()
        self.flags(host='here')
        self.assertIn('nothing is mounted',
                      health.why_no_new_instance(self.conn))

    def test_counts_as_full(self):
        """Not as what the directory below has room for."""
        self.stub_out('nova.virt.libvirt.utils.get_fs_info', lambda path: {
            'total': 10, 'used': 0, 'free': 10})
        self.stub_out('os.stat', lambda path: mock.Mock(st_dev=7))
        info = usage.LocalInfo('here')
        self.assertEqual(10, info.get(self.conn)['free'])
        self.unmount()
        self.assertEqual({'total': 10, 'used': 10, 'free': 0},
                         info.get(self.conn))
