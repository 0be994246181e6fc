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
"""Nobody outside the driver writes or reads the records of disks.

Snapshots of volume-backed servers need a volume service, which the lab has
not: Nova's unit and functional tests cover them.
"""

import json
import pathlib
import unittest

from lab import cloud as lab_cloud
from lab.cloud import database
from lab.tests import cloud_case
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import LEGACY

load_tests = cloud_case.only_in_full

#: What a user would like to have on record for a disk.
WANTED = json.dumps({
    'mapping': None, 'nova_object.name': 'LibvirtDiskMetadata',
    'nova_object.namespace': 'nova.virt.libvirt',
    'nova_object.version': '1.0', 'nova_object.data': {
        'backend': 'flat', 'format': 'qcow2', 'size': 1, 'state': 'ready',
        'host': 'host-a', 'pool': None, 'volume': None, 'previous': None,
        'unmapped': None}})
SECRET = ('driver_info', 'LibvirtDiskMetadata')


class TestDriverInfo(CloudTestCase):

    lab = LEGACY
    images_type = 'qcow2'

    def assert_no_record(self, what):
        text = what if isinstance(what, str) else json.dumps(what)
        for word in SECRET:
            self.assertNotIn(word, text)

    def request(self, microversion, **more):
        return self.cloud.conn.compute.post('/servers', json={'server': {
            'name': 'refused', 'flavorRef': self.cloud.flavor('lab.small').id,
            'imageRef': self.cloud.image('guest').id, **more}},
            microversion=microversion)

    def test_request(self):
        """Refused by each version of the API."""
        v2 = {'source_type': 'image', 'destination_type': 'local',
              'boot_index': 0, 'uuid': self.cloud.image('guest').id}
        legacy = {'device_name': 'vdb', 'volume_id': self.cloud.image(
            'guest').id}
        newest = self.cloud.conn.compute.get_endpoint_data().max_microversion
        self.assertEqual(2, newest[0])
        for minor in range(1, newest[1] + 1):
            version = '2.%d' % minor
            more = {'networks': 'none'} if minor >= 37 else {}
            for key, mapping in (('block_device_mapping_v2', v2),
                                 ('block_device_mapping', legacy)):
                answer = self.request(version, **more, **{
                    key: [{**mapping, 'driver_info': WANTED}]})
                self.assertEqual(400, answer.status_code, version)
                self.assertIn('driver_info', answer.text, version)
        # Without it the request is a good one.
        answer = self.request(version, **more, block_device_mapping_v2=[v2])
        self.assertEqual(202, answer.status_code)
        self.cloud.conn.compute.delete_server(answer.json()['server']['id'])

    def image(self, name, **properties):
        image = self.cloud.conn.image.create_image(
            name=name, disk_format='qcow2', container_format='bare',
            filename=str(pathlib.Path(lab_cloud.cloud.GUEST, 'guest.qcow2')),
            disable_vendor_agent=True, wait=True, timeout=60, **properties)
        self.addCleanup(self.cloud.conn.image.delete_image, image.id)
        return image

    def assert_own_records(self, server):
        found = database.records(self.cloud, server.id)
        self.assertEqual({'vda', 'vdb', 'vdc', 'disk.config'}, set(found))
        for name, record in found.items():
            self.assertEqual(
                ('flat', 'raw') if name == 'disk.config' else
                ('qcow2', 'qcow2'), (record['backend'], record['format']))

    def test_image_with_mappings(self):
        root = self.cloud.image('guest').id
        mapping = [
            {'source_type': 'image', 'destination_type': 'local',
             'boot_index': 0, 'image_id': root, 'device_name': '/dev/vda',
             'delete_on_termination': True, 'driver_info': WANTED},
            {'source_type': 'blank', 'destination_type': 'local',
             'boot_index': -1, 'volume_size': 1, 'device_name': '/dev/vdb',
             'delete_on_termination': True, 'driver_info': WANTED}]
        image = self.image('mapped', bdm_v2='True',
                           block_device_mapping=json.dumps(mapping))
        server = self.boot(flavor='lab.small.disks', image=image.id)
        self.assert_own_records(server)

    def test_image_with_legacy_mappings(self):
        image = self.image(
            'legacy',
            block_device_mapping=json.dumps([
                {'device_name': '/dev/vdb', 'virtual_name': 'ephemeral0',
                 'delete_on_termination': True, 'driver_info': WANTED}]),
            mappings=json.dumps([
                {'device': '/dev/vdc', 'virtual': 'swap',
                 'driver_info': WANTED}]))
        server = self.boot(flavor='lab.small.disks', image=image.id)
        self.assert_own_records(server)

    def test_images_and_answers(self):
        """A snapshot, a shelved server and what the API says."""
        server = self.boot(flavor='lab.small.disks')
        self.assert_own_records(server)
        compute = self.cloud.conn.compute
        newest = '%d.%d' % compute.get_endpoint_data().max_microversion
        for path in ('', '/os-volume_attachments', '/diagnostics',
                     '/os-instance-actions', '/topology', '/migrations',
                     '/metadata', '/ips'):
            answer = compute.get('/servers/%s%s' % (server.id, path),
                                 microversion=newest)
            self.assertEqual(200, answer.status_code, path)
            self.assert_no_record(answer.text)
        for path in ('/servers/detail?all_tenants=1', '/os-migrations',
                     '/os-hypervisors/detail'):
            self.assert_no_record(compute.get(
                path, microversion=newest).text)
        image = server.snapshot('of-' + server.id)
        self.addCleanup(self.cloud.conn.image.delete_image, image.id)
        self.assert_no_record(self.cloud.conn.image.get(
            '/v2/images/' + image.id).text)
        server.shelve()
        shelved = self.cloud.conn.image.find_image(
            server.get().name + '-shelved', ignore_missing=False)
        self.assert_no_record(self.cloud.conn.image.get(
            '/v2/images/' + shelved.id).text)
        server.unshelve()
        self.assert_own_records(server)

    def test_notifications(self):
        names = ('oslo_messaging_notifications', 'driver'), (
            'notifications', 'notification_format'), (
            'notifications', 'bdms_in_notifications')
        log = self.cloud.compute_log('host-a')
        self.cloud.set_many('host-a', dict(zip(names, (
            'log', 'both', 'true'))))
        self.addCleanup(self.cloud.set_many, 'host-a', dict(zip(names, (
            'noop', 'unversioned', 'false'))))
        offset = log.stat().st_size
        server = self.boot(flavor='lab.small.disks')
        before = server.testimony()
        server.hard_reboot()
        server.testimony(after=before)
        with open(log) as file:
            file.seek(offset)
            said = [line for line in file
                    if 'oslo.messaging.notification' in line]
        for event in ('instance.create.end', 'instance.reboot.end'):
            self.assertTrue([line for line in said if event in line and
                             'block_devices' in line], event)
        self.assert_no_record('\n'.join(said))


if __name__ == '__main__':
    unittest.main()
