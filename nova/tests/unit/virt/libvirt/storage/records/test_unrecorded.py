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

import os

import ddt
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids

from nova.tests.unit.virt.libvirt.storage.records import test_lifecycle
from nova.virt.libvirt.storage.records import unrecorded


@ddt.ddt
class TestMadeBeforeRecords(test_lifecycle.RecordsTestCase):
    """Guest's definition, then disk.info, then configuration."""

    def made(self, name='disk', guest=None, configured='qcow2'):
        record = unrecorded.made_before_records(
            self.instance, name, guest, configured)
        return record and (record.backend, record.format)

    @ddt.data('raw', 'qcow2')
    def test_guest_is_right_against_all_others(self, told):
        other = {'raw': 'qcow2', 'qcow2': 'raw'}[told]
        self.write('disk', test_lifecycle.HOSTILE, info=other)
        self.assertEqual(
            {'raw': ('flat', 'raw'), 'qcow2': ('qcow2', 'qcow2')}[told],
            self.made(guest=self.guest('disk', 'file', told),
                      configured='qcow2'))
        self.assertIn('disk.info says %s' % other, self.stdlog.logger.output)

    @ddt.data(('raw', 'qcow2', ('flat', 'raw')),
              ('qcow2', 'qcow2', ('qcow2', 'qcow2')),
              ('qcow2', 'flat', ('flat', 'qcow2')),
              (None, 'qcow2', ('qcow2', 'qcow2')),
              (None, 'flat', ('flat', 'raw')),
              (None, 'libvirt-storage', ('flat', 'raw')),
              ('qcow2', 'libvirt-storage', ('qcow2', 'qcow2')))
    @ddt.unpack
    def test_without_a_guest(self, noted, configured, expected):
        self.write('disk', test_lifecycle.HOSTILE, info=noted)
        self.assertEqual(expected, self.made(configured=configured))

    def test_disk_info_by_another_instances_path(self):
        """That of before, another spelling, or that of another host."""
        self.write('disk', test_lifecycle.HOSTILE)
        with open(os.path.join(self.dir, 'disk.info'), 'w') as f:
            f.write(jsonutils.dumps({
                '/before/%s/disk' % uuids.other: 'qcow2',
                '/before/%s/disk' % uuids.instance: 'raw'}))
        self.assertEqual(('flat', 'raw'), self.made(configured='qcow2'))

    def test_other_backends_of_the_guest(self):
        self.assertEqual(('lvm', 'raw'), self.made(guest=self.guest(
            'disk', 'block', 'raw',
            source_path='/dev/vg/%s_disk' % uuids.instance)))
        self.assertEqual(('rbd', 'raw'), self.made(guest=self.guest(
            'disk', 'network', 'raw',
            source_name='pool/%s_disk' % uuids.instance)))

    def test_volume_of_the_guest(self):
        record = unrecorded.made_before_records(
            self.instance, 'disk', self.guest(
                'disk', 'volume', 'qcow2', source_pool='p',
                source_volume='%s_disk' % uuids.instance), 'qcow2')
        self.assertEqual(
            ('libvirt-storage', 'qcow2', 'p', '%s_disk' % uuids.instance),
            (record.backend, record.format, record.pool, record.volume))

    @ddt.data(('.1', True), ('.12', True), ('.1.x', False), ('.eph0', False))
    @ddt.unpack
    def test_volume_with_a_number(self, suffix, is_it):
        """Its name was taken when it was made."""
        volume = '%s_disk%s' % (uuids.instance, suffix)
        record = unrecorded.made_before_records(
            self.instance, 'disk', self.guest(
                'disk', 'volume', 'qcow2', source_pool='p',
                source_volume=volume), 'qcow2')
        self.assertEqual(volume if is_it else None, record and record.volume)

    def test_config_drive_is_raw_whatever_anybody_says(self):
        self.write('disk.config', test_lifecycle.HOSTILE, info='qcow2')
        self.assertEqual(('flat', 'raw'), self.made('disk.config'))
        self.assertEqual(('flat', 'raw'), self.made(
            'disk.config', guest=self.guest('disk.config', 'file', 'qcow2')))

    def test_encrypted_logical_volume(self):
        self.assertEqual(('lvm', 'raw'), self.made(guest=self.guest(
            'disk', 'block', 'raw',
            source_path='/dev/mapper/%s_disk-dmcrypt' % uuids.instance)))

    def test_no_disk(self):
        self.assertIsNone(self.made())

    def test_cinder_volume_is_none_of_ours(self):
        self.assertIsNone(self.made(guest=self.guest(
            'disk', 'block', 'raw', source_path='/dev/sdb')))

    @ddt.data('{', '[]', '7', '')
    def test_broken_disk_info(self, text):
        self.write('disk')
        with open(os.path.join(self.dir, 'disk.info'), 'w') as f:
            f.write(text)
        self.assertEqual(('flat', 'raw'), self.made(configured='flat'))
