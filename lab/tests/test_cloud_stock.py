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

"""What stock Nova breaks, so that it is known and not believed.

A cold migration turns each raw disk into qcow2 where the destination has
``use_cow_images``, whatever its ``images_type``; the disk.info that travels with
the disks goes on to call them raw, and so does the guest's definition (bug
2038898). What the series does with the same servers: test_cloud_matrix.py.
"""

import json
import os
import time
import unittest

from lab import cloud as lab_cloud
from lab.cloud.server import ServerError
from lab.machine import Machine
from lab.tests import cloud_case

SCRIPT = ('boot 1: fill data 4 alpha\n'
          'boot 1: fill raw 4 beta vdb 64\n')
DATA = {'data': ('alpha', 4), 'raw': ('beta', 4)}


class TestStock(cloud_case.CloudTestCase):

    lab = cloud_case.STOCK
    images_type = 'flat'

    def moved(self, here, there, image='guest'):
        """A server after its cold migration.

        :param here, there: options of [DEFAULT] on host-a and host-b
        :param image: name
        :returns: it, its last testimony, and by disk: the format that it has
            and the one that Nova has noted
        """
        defaults = {'use_cow_images': 'true', 'force_raw_images': 'true'}
        for host, options in (('host-a', here), ('host-b', there)):
            values = {('DEFAULT', key): value for key, value in
                      {**defaults, **options}.items()}
            values['libvirt', 'images_type'] = 'flat'
            if any(self.cloud.get(host, *name) != value
                   for name, value in values.items()):
                self.cloud.set_many(host, values)
        server = self.boot(flavor='lab.small.disks', script=SCRIPT,
                           image=image)
        before = server.testimony()
        server.migrate('host-b')
        noted = {path.rpartition('/')[2]: kind
                 for path, kind in server.disk_info('host-b').items()}
        folder = '/var/lib/nova/instances/%s/' % server.id
        return server, before, {name: (json.loads(Machine('host-b').run(
            ['qemu-img', 'info', '--force-share', '--output=json',
             folder + name]).stdout)['format'], noted.get(name))
            for name in ('disk', 'disk.eph0', 'disk.swap')}

    def assert_lost_but_for_revert(self, server, before):
        with self.assertRaisesRegex(ServerError, 'has not testified'):
            server.testimony(after=before, limit=60)
        server.revert()
        said = server.testimony(after=before)
        self.assert_data(said, **DATA)

    def test_flat_with_cow_images(self):
        """The defaults but for images_type: the guest does not boot."""
        server, before, formats = self.moved({}, {})
        self.assertEqual({'disk': ('qcow2', 'raw'),
                          'disk.eph0': ('qcow2', 'raw'),
                          'disk.swap': ('qcow2', 'raw')}, formats)
        self.assert_lost_but_for_revert(server, before)

    def test_flat_to_a_host_with_cow_images(self):
        """Settings differ: what was well on host-a is lost on host-b."""
        server, before, formats = self.moved({'use_cow_images': 'false'}, {})
        self.assertEqual(('qcow2', 'raw'), formats['disk'])
        self.assert_lost_but_for_revert(server, before)

    def test_flat_qcow2_image_with_cow_images(self):
        """The root disk is as the image is; ephemeral and swap are lost."""
        # One of its own: what is in the image cache stays as it came.
        image = self.cloud.conn.image.create_image(
            name='guest-not-raw', disk_format='qcow2', container_format='bare',
            filename=str(lab_cloud.cloud.GUEST / 'guest.qcow2'),
            disable_vendor_agent=True, wait=True, timeout=60)
        self.addCleanup(self.cloud.conn.image.delete_image, image.id)
        server, before, formats = self.moved(
            {'force_raw_images': 'false'}, {'force_raw_images': 'false'},
            image.name)
        self.assertEqual({'disk': ('qcow2', 'qcow2'),
                          'disk.eph0': ('qcow2', 'raw'),
                          'disk.swap': ('qcow2', 'raw')}, formats)
        said = server.testimony(after=before)
        self.assert_data(said, data=DATA['data'])
        self.assertEqual('qcow2', said.disks['vdb']['magic'])
        self.assertEqual({}, said.swap)
        server.revert()
        self.assert_data(server.testimony(after=said), **DATA)

    def test_flat_to_a_host_without_cow_images(self):
        """The way that is left."""
        server, before, formats = self.moved({}, {'use_cow_images': 'false'})
        self.assertEqual(('raw', 'raw'), formats['disk'])
        said = server.testimony(after=before)
        self.assert_data(said, **DATA)
        self.assertEqual({'vdc': True}, said.swap)


class TestLiveStock(cloud_case.CloudTestCase):
    """What a live block migration doesn't take along."""

    lab = cloud_case.STOCK
    images_type = 'qcow2'

    def test_config_drive(self):
        """QEMU can't mirror a read-only disk: it arrives as zeroes."""
        server = self.boot(flavor='lab.small.disks', script=SCRIPT)
        said = server.testimony()
        server.command('keep-writing', 256)
        for number in range(int(os.environ.get('LAB_LIVE_MOVES', '3'))):
            start = time.monotonic()
            server.live_migrate('host-a' if number % 2 else 'host-b')
            print('stock: move %d: %.1f s' % (
                number + 1, time.monotonic() - start))
            found = server.look()
            self.assertEqual(said.boot_id, found.boot_id)
            self.assert_data(found, **DATA)
        self.assertEqual('iso9660', said.config['format'])
        device = '/dev/' + said.config['device']
        forget = 'umount /config; echo 3 >/proc/sys/vm/drop_caches; '
        self.assertEqual('0', server.command(
            'sh', forget + r"tr -d '\0' <%s | wc -c" % device).strip())
        with self.assertRaises(ServerError):
            server.command('sh', 'mount -t iso9660 -o ro %s /config' % device)


load_tests = cloud_case.only_in_full

if __name__ == '__main__':
    unittest.main()
