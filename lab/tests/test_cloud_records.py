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
"""Records of disks that are broken, archived and purged."""

import json
import time
import unittest

from lab.cloud import database
from lab.tests import cloud_case
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import LEGACY

load_tests = cloud_case.only_in_full

DATA = ('alpha', 12)
WRITE = 'boot 1: fill data 12 alpha\n'


def _changed(text, **values):
    whole = json.loads(text)
    whole['nova_object.data'].update(values)
    return json.dumps(whole)


#: What can be wrong with a record, made of a good one and another disk's.
BROKEN = {
    'unknown version': lambda text, _other: json.dumps(
        {**json.loads(text), 'nova_object.version': '1.99'}),
    'unknown backend': lambda text, _other: _changed(text, backend='zfs'),
    'wrong type': lambda text, _other: _changed(text, size=['many']),
    'truncated': lambda text, _other: text[:len(text) // 2],
    'no JSON': lambda _text, _other: 'qcow2',
    "another disk's": lambda _text, other: other,
    # As large as the column is.
    'huge': lambda text, _other: _changed(text, host='h' * 60000)}


class TestBroken(CloudTestCase):
    """One server's records are broken; the others don't notice."""

    lab = LEGACY
    images_type = 'qcow2'

    def setUp(self):
        super().setUp()
        self.server = self.boot(flavor='lab.small.disks', script=WRITE)
        self.other = self.boot('other', script=WRITE)
        found = database.mappings(self.cloud, self.server.id)
        self.good, self.of_vdb = found['vda'], found['vdb']
        self.assertIn('LibvirtDiskMetadata', self.good)
        self.assertIn('LibvirtDiskMetadata', self.of_vdb)

    def break_record(self, kind):
        text = BROKEN[kind](self.good, self.of_vdb)
        self.assertNotEqual(text, self.good)
        database.set_driver_info(self.cloud, self.server.id, 'vda', text)
        return text

    def stored(self):
        return database.mappings(self.cloud, self.server.id)['vda']

    def runs(self):
        with self.server.domain('host-a') as domain:
            return bool(domain.isActive())

    def logged(self):
        return [line for line in self.service_log('host-a').splitlines()
                if self.server.id in line and 'can not be used' in line
                and 'NULL' in line]

    def wait_logged(self, seen, limit=60):
        until = time.monotonic() + limit
        while len(self.logged()) <= seen:
            self.assertLess(time.monotonic(), until, 'nothing was logged')
            time.sleep(.5)

    def test_hard_reboot(self):
        """The log says why, and the guest runs on."""
        before = self.server.testimony()
        for kind in BROKEN:
            with self.subTest(kind):
                text = self.break_record(kind)
                seen = len(self.logged())
                self.server.api.reboot_server(self.server.id, 'HARD')
                self.wait_logged(seen)
                # Nova's state for a reboot that has failed before it began.
                self.server.wait('ACTIVE')
                self.assertTrue(self.runs())
                self.assertEqual(text, self.stored())
        # What the other server needs of the host goes on.
        self.cloud.restart('host-a', 'nova-compute')
        said = self.other.testimony()
        self.other.hard_reboot()
        self.assert_data(self.other.testimony(after=said), data=DATA)
        # The way out that the error names.
        database.set_driver_info(self.cloud, self.server.id, 'vda', None)
        self.server.hard_reboot()
        self.assert_data(self.server.testimony(after=before), data=DATA)
        self.assertEqual(
            json.loads(self.good)['nova_object.data']['format'],
            json.loads(self.stored())['nova_object.data']['format'])

    def test_other_operations(self):
        """Refused before anything has happened to guest and disks."""
        boot_id = self.server.testimony().boot_id
        self.break_record('unknown version')
        with self.assertRaisesRegex(Exception, 'is ACTIVE on host-a|No valid'):
            self.server.migrate('host-b')
        self.assertEqual(('ACTIVE', boot_id), (
            self.server.get().status, self.server.look().boot_id))
        with self.assertRaises(Exception):
            self.server.live_migrate('host-b')
        self.assertEqual(boot_id, self.server.look().boot_id)
        text = self.stored()
        # Nova powers a server off before its driver is asked to rescue it.
        self.server.api.rescue_server(self.server.id)
        self.server.wait('ERROR')
        self.assertEqual(text, self.stored())
        self.server.delete()
        self.assert_nothing_left(self.server)

    def test_rebuild(self):
        """It destroys the disks, and the broken record with them."""
        self.break_record('truncated')
        before = self.server.testimony()
        self.server.rebuild()
        self.assertEqual(1, self.server.testimony(after=before).boot)
        self.assertIn('LibvirtDiskMetadata', self.stored())

    def test_archived_and_purged(self):
        def archived():
            return database.query(
                self.cloud, "SELECT driver_info FROM "
                "shadow_block_device_mapping WHERE instance_uuid = '%s' "
                "AND driver_info IS NOT NULL" % self.server.id)

        # Deleted mappings keep what the clean-up has left of the record.
        self.break_record('unknown version')
        broken = self.stored()
        self.server.delete()
        # It ends with 1 when it has archived something.
        self.cloud.manage('db', 'archive_deleted_rows', '--until-complete',
                          check=False)
        self.assertIn([broken], archived())
        self.cloud.manage('db', 'purge', '--all')
        self.assertEqual([], archived())


class TestBrokenOfVolumes(TestBroken):
    """The same, with disks in storage pools."""

    images_type = 'libvirt-storage'


if __name__ == '__main__':
    unittest.main()
