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
"""Disks of images_type = lvm become those of a pool over their group."""

import os

import ddt
from oslo_utils.fixture import uuidsentinel as uuids
from oslo_utils import units

from nova import exception
from nova.tests.unit.virt.libvirt.storage import test_transition
from nova.virt.libvirt.storage.pool import config
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage import transition

UNRESCUE = """<domain><devices>
<disk type='block'><source dev='/dev/vg/%(uuid)s_disk'/></disk>
<disk type='block'><source dev='/dev/vg/of-cinder'/></disk>
</devices></domain>"""


@ddt.ddt
class TestVolumeGroup(test_transition.TransitionTestCase):

    def setUp(self):
        super().setUp()
        self.instance.ephemeral_key_uuid = None
        self.flags(group='libvirt', images_volume_group='vg',
                   storage_disks_pool='disks')
        self.files, self.pool = self.pool, self.define('disks', 'vg')
        self.group = self.conn.volume_group('vg')
        self.stub_out('nova.privsep.fs.lvorigins', self.group.lvorigins)
        self.stub_out('nova.privsep.fs.vginfo', self.group.vginfo)
        for name in ('disk', 'disk.eph0', 'disk.swap'):
            self.logical(name)
        self.pool.refresh()

    def define(self, name, group):
        made = config.LibvirtConfigStoragePool()
        made.type, made.name, made.target_path = 'logical', name, '/dev/vg'
        made.source = config.LibvirtConfigStoragePoolSource()
        made.source.name = group
        self.conn.storagePoolDefineXML(made.to_xml()).create(0)
        return storage_pool.StoragePool(self.conn, name, 'elsewhere')

    def logical(self, name):
        device = self.group.make('%s_%s' % (uuids.instance, name),
                                 8 * units.Mi)
        device.write(units.Mi, b'I am ' + name.encode())
        self.database[name] = metadata.LibvirtDiskMetadata(
            backend='lvm', format='raw', size=8 * units.Mi, state='ready',
            host='here', pool=None, volume=None, previous=None, unmapped=None)

    def whole(self, names=('disk', 'disk.eph0', 'disk.swap')):
        for name in names:
            self.assertEqual(
                b'I am ' + name.encode(), self.group.devices[
                    '%s_%s' % (uuids.instance, name)].read(
                        units.Mi, 5 + len(name)))

    def refused(self, **kwargs):
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition(**kwargs).run)
        self.assertEqual({('lvm', None, None)}, {
            (record.backend, record.pool, record.volume)
            for record in self.database.values()
            if record.backend != 'flat'})
        self.whole()
        return str(e)

    @ddt.data(True, False)
    def test_by_record_alone(self, guest_is_off):
        before = dict(self.group.devices)
        moving = self.transition(guest_is_off=guest_is_off)
        self.assertTrue(moving.run())
        moving.finish()
        self.assertEqual(before, self.group.devices)
        self.whole()
        for name, record in self.database.items():
            self.assertEqual(
                ('libvirt-storage', 'raw', 'ready', 'disks', 8 * units.Mi,
                 '%s_%s' % (uuids.instance, name)),
                (record.backend, record.format, record.state, record.pool,
                 record.size, record.volume))
        self.assertFalse(self.transition().run())

    def test_config_drive_is_a_file(self):
        self.legacy('disk.config', b'config' * 1000)
        moving = self.transition()
        moving.run()
        moving.finish()
        record = self.database['disk.config']
        self.assertEqual(('libvirt-storage', 6000),
                         (record.backend, record.size))
        device = self.group.devices[record.volume]
        self.assertEqual(b'config' * 1000 + bytes(100), device.read(0, 6100))
        self.assertFalse(os.path.exists(
            os.path.join(self.instance_dir, 'disk.config')))

    def test_config_drive_while_the_guest_runs(self):
        self.legacy('disk.config')
        self.assertIn('only be while the guest is off',
                      self.refused(guest_is_off=False))
        self.assertEqual(3, len(self.group.devices))

    def test_other_files_stay(self):
        self.legacy('disk.eph1')
        self.assertIn('name a pool that is a directory',
                      self.refused()[:200])

    def test_encrypted(self):
        self.instance.ephemeral_key_uuid = uuids.key
        text = self.refused()
        self.assertIn('a host with images_type = lvm', text[:250])
        self.assertIn('encrypted', text)

    def test_another_volume_group(self):
        self.flags(group='libvirt', images_volume_group='old')
        self.assertIn('logical over volume group old', self.refused())

    def test_pool_of_files(self):
        self.pool = self.files
        self.assertIn('define storage pool', self.refused()[:200])

    def test_volume_that_is_missing(self):
        self.group.remove('%s_disk.swap' % uuids.instance)
        self.pool.refresh()
        e = self.assertRaises(exception.DiskTransitionFailed,
                              self.transition().run)
        self.assertIn('_disk.swap', str(e))
        self.whole(('disk', 'disk.eph0'))

    def test_failure_deletes_no_disk(self):
        self.legacy('disk.config')
        self.stub_out('nova.virt.libvirt.storage.pool.stream.upload_file',
                      self.fail_upload)
        self.refused()

    @staticmethod
    def fail_upload(volume, path):
        raise exception.StorageVolumeError(
            pool='p', volume='v', host='h', code=38, reason='broken')

    @ddt.data(*transition.Transition.STEPS)
    def test_crash(self, step):
        self.legacy('disk.config')
        moving = self.transition()
        real = getattr(moving, step)

        def crash():
            real()
            raise test_transition.Crash()

        setattr(moving, step, crash)
        self.assertRaises(test_transition.Crash, moving.run)
        self.whole()
        moving = self.transition()
        moving.run()
        moving.finish()
        self.whole()
        self.assertEqual({'libvirt-storage'}, {
            record.backend for record in self.database.values()})
        self.assertEqual(4, len(self.group.devices))

    def test_rescued(self):
        path = os.path.join(self.instance_dir, 'unrescue.xml')
        with open(path, 'w') as f:
            f.write(UNRESCUE % {'uuid': uuids.instance})
        moving = self.transition()
        moving.run()
        moving.finish()
        with open(path) as f:
            text = f.read()
        self.assertIn('<disk type="volume"><source pool="disks" '
                      'volume="%s_disk"/>' % uuids.instance, text)
        self.assertIn('<disk type="block"><source dev="/dev/vg/of-cinder"/>',
                      text)

    def test_not_in_a_live_migration(self):
        """There files alone are copied."""
        self.transition()
        self.assertFalse(transition.is_due(self.disks))
