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
import fixtures
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids

from nova import context
from nova import exception
from nova import objects
from nova import test
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt.storage import report


class ReportTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.context = context.get_admin_context()
        self.instances, self.bdms = [], {}
        self.flags_seen = []
        self.stub_out('nova.virt.libvirt.storage.report.PAGE', 2)
        self.stub_out('nova.objects.InstanceList.get_by_filters',
                      lambda cls, *args, **kwargs: self._instances(
                          *args, **kwargs))
        self.stub_out(
            'nova.objects.BlockDeviceMappingList.bdms_by_instance_uuid',
            lambda cls, ctxt, found: {
                uuid: self.bdms[uuid] for uuid in found})
        self.stub_out('nova.context.scatter_gather_skip_cell0',
                      lambda ctxt, fn, *args: {
                          uuids.cell1: fn(ctxt, *args), uuids.cell2: []})

    def _instances(self, ctxt, filters, expected_attrs, limit, marker,
                   sort_keys, sort_dirs):
        found = [i for i in sorted(self.instances, key=lambda i: i.uuid)
                 if (not marker or i.uuid > marker) and
                 filters.get('host', i.host) == i.host]
        return found[:limit]

    def add(self, name, host, record):
        uuid = getattr(uuids, name)
        bdm = objects.BlockDeviceMapping(
            id=1, uuid=getattr(uuids, name + 'bdm'), instance_uuid=uuid,
            source_type='image', destination_type='local', boot_index=0,
            guest_format=None, driver_info=None, no_device=False)
        if isinstance(record, str):
            bdm.driver_info = record
        elif record is not None:
            for volume in (record, record.next):
                if volume is not None and volume.volume:
                    volume.volume = '%s_%s' % (uuid, volume.volume)
            bdm.driver_info = metadata.dumps(record, bdm.uuid)
        self.instances.append(objects.Instance(
            uuid=uuid, host=host, deleted=False, config_drive=''))
        self.bdms[uuid] = [bdm]
        return uuid

    def record(self, backend='qcow2', **kwargs):
        return metadata.LibvirtDiskMetadata(**{
            'backend': backend, 'format': 'qcow2', 'size': 9, 'state': 'ready',
            'host': 'a', **kwargs})

    def volume(self):
        return self.record('libvirt-storage', pool='p', volume='v')


class TestReport(ReportTestCase):

    def test_disks(self):
        legacy = self.record(unmapped={
            'disk.config': self.record('flat', format='raw'),
            'disk.rescue': self.record('flat', format='raw')})
        one = self.add('one', 'b', legacy)
        two = self.add('two', 'a', self.volume())
        three = self.add('three', 'a', None)
        four = self.add('four', 'c', '{')
        self.add('five', None, None)
        lines = report.disks(self.context)
        self.assertEqual(
            sorted([('b', one, 'disk', 'qcow2'),
                    ('b', one, 'disk.config', 'flat'),
                    ('a', two, 'disk', 'libvirt-storage'),
                    ('a', three, '', '-'), ('c', four, '', 'broken')]),
            [(x.host, x.instance_uuid, x.disk, x.backend) for x in lines])
        self.assertEqual(sorted([one, three, four]),
                         report.legacy_instances(lines))
        self.assertEqual([three], report.half_way(lines, {'a', 'd'}))
        self.assertEqual({'qcow2': 1, 'flat': 1}, report.by_host(lines)['b'])

    def test_config_drive_of_one_on_a_volume(self):
        one = self.add('one', 'a', None)
        self.bdms[one][0].destination_type = 'volume'
        self.assertEqual([], report.disks(self.context))
        self.instances[0].config_drive = 'True'
        self.assertEqual(['-'], [
            line.backend for line in report.disks(self.context)])

    def test_on_its_way_in_a_live_migration(self):
        volume = self.volume()
        volume.next = self.record(
            'libvirt-storage', pool='q', volume='w', host='b',
            state='building')
        uuid = self.add('one', 'a', volume)
        lines = report.disks(self.context)
        self.assertEqual(['b q/%s_w' % uuid], [line.next for line in lines])
        self.assertIn('b q/%s_w' % uuid, report.as_tables(lines))

    def test_on_ceph_all_are_raw(self):
        """There libvirt reads no guest's first bytes."""
        line = report.DiskLine('a', 'one', 'disk', 'libvirt-storage-rbd',
                               'raw')
        self.assertEqual((True, False), (line.in_pool, line.is_raw_in_pool))

    def test_raw_files_of_pools_are_counted(self):
        self.add('one', 'a', self.volume())
        raw = self.volume()
        raw.format = 'raw'
        self.add('two', 'a', raw)
        lines = report.disks(self.context)
        self.assertEqual({'libvirt-storage': 1, 'libvirt-storage, raw': 1},
                         report.by_host(lines)['a'])
        self.assertIn('libvirt-storage, raw', report.as_tables(lines))

    def test_one_host(self):
        self.add('one', 'b', self.record())
        two = self.add('two', 'a', self.volume())
        self.assertEqual([two], [
            x.instance_uuid for x in report.disks(self.context, 'a')])

    def test_disks_of_one_instance(self):
        self.add('one', 'b', self.record())
        two = self.add('two', 'a', self.volume())
        self.stub_out(
            'nova.objects.BlockDeviceMappingList.get_by_instance_uuid',
            lambda cls, ctxt, uuid: self.bdms[uuid])
        self.assertEqual([(two, True)], [
            (x.instance_uuid, x.in_pool)
            for x in report.disks_of(self.context, self.instances[1])])

    def test_volume_backed_server_has_no_local_disk(self):
        uuid = self.add('one', 'b', None)
        self.bdms[uuid][0].destination_type = 'volume'
        self.assertEqual([], report.disks(self.context))

    def test_silent_cell(self):
        self.stub_out('nova.context.scatter_gather_skip_cell0',
                      lambda ctxt, fn, *args: {
                          uuids.cell1: context.did_not_respond_sentinel})
        self.assertRaises(exception.CellTimeout, report.disks, self.context)

    def test_output(self):
        uuid = self.add('two', 'a', self.volume())
        lines = report.disks(self.context)
        self.assertEqual(uuid + '_v', jsonutils.loads(
            report.as_json(lines))[0]['volume'])
        text = report.as_tables(lines)
        for part in (uuid, 'libvirt-storage', ' p ', '_v '):
            self.assertIn(part, text)


class TestWarning(ReportTestCase):

    def setUp(self):
        super().setUp()
        self.warning = self.useFixture(fixtures.MockPatchObject(
            report.LOG, 'warning')).mock

    def _text(self):
        report.warn_of_legacy_disks(self.context, self.instances)
        if not self.warning.called:
            return None
        self.warning.assert_called_once()
        template, values = self.warning.call_args.args
        return template % values

    def test_all_in_pools(self):
        self.add('one', 'a', self.volume())
        self.assertIsNone(self._text())

    def test_few(self):
        self.add('one', 'a', self.volume())
        legacy = sorted([self.add('two', 'a', self.record()),
                         self.add('three', 'a', None)])
        self.assertIn('2 of the instances', self._text())
        self.assertIn(': %s. ' % ', '.join(legacy), self._text_again())

    def _text_again(self):
        self.warning.reset_mock()
        return self._text()

    def test_many(self):
        legacy = sorted(self.add('i%d' % n, 'a', self.record())
                        for n in range(7))
        text = self._text()
        self.assertIn('7 of the instances', text)
        self.assertIn(', '.join(legacy[:report.SHOWN]) + ' ...', text)
        self.assertNotIn(legacy[report.SHOWN], text)

    def test_deleted(self):
        self.add('one', 'a', self.record())
        self.instances[0].deleted = True
        self.assertIsNone(self._text())
