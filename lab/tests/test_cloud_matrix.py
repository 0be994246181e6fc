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
"""Every kind of legacy disk, each way into the pool, each pair of settings.

A cell of the matrix is a test, test_KIND_SETTINGS: servers of one kind are
made by a legacy host-a, the hosts are switched, then each server goes one of
the WAYS. After each step the guest has to boot and to find its data.
"""

import concurrent.futures
import functools
import itertools
import pathlib
import subprocess
import tempfile
import unittest

from lab import cloud as lab_cloud
from lab.host import Host
from lab.tests import cloud_case
from lab.tests.cloud_case import CloudTestCase
from lab.tests.cloud_case import GIB

DATA = ('delta', 12)
EPHEMERAL = ('epsilon', 4)
WRITE = ('boot 1: fill data %d %s\n'
         'boot 1: fill raw %d %s vdb 64\n' % (*DATA[::-1], *EPHEMERAL[::-1]))

#: What host-a is set to while it makes a server, and the server's image.
KINDS = {
    'flat': ({'images_type': 'flat', 'use_cow_images': 'false'}, 'guest'),
    'raw_with_cow': ({'images_type': 'raw'}, 'guest'),
    'raw_without_cow': (
        {'images_type': 'raw', 'use_cow_images': 'false'}, 'guest'),
    'qcow2_overlay': ({'images_type': 'qcow2'}, 'guest'),
    'qcow2_overlay_of_qcow2': (
        {'images_type': 'qcow2', 'force_raw_images': 'false'}, 'guest'),
    'qcow2_flat': ({'images_type': 'flat', 'use_cow_images': 'false',
                    'force_raw_images': 'false'}, 'guest'),
    'preallocated': (
        {'images_type': 'qcow2', 'preallocate_images': 'space'}, 'guest'),
    'preallocated_flat': (
        {'images_type': 'flat', 'use_cow_images': 'false',
         'preallocate_images': 'space'}, 'guest'),
    'rescued_before': ({'images_type': 'qcow2'}, 'guest'),
    'raw_image': ({'images_type': 'qcow2'}, 'guest-raw'),
    'vmdk_image': ({'images_type': 'qcow2'}, 'guest-vmdk'),
    'vmdk_image_flat': (
        {'images_type': 'flat', 'use_cow_images': 'false'}, 'guest-vmdk'),
}

#: What both hosts are set to afterwards, and what differs on host-b.
SETTINGS = {
    'same': ({}, {}),
    'other_cow': ({}, {'use_cow_images': 'false'}),
    'cow_differs': ({'use_cow_images': 'false'}, {'use_cow_images': 'true'}),
    'force_raw_differs': ({}, {'force_raw_images': 'false'}),
}

#: Ways of one server; all but the last may go at once.
WAYS = (
    ('hard_reboot', 'migrate', 'revert', 'resize', 'confirm', 'hard_reboot'),
    ('migrate', 'confirm', 'hard_reboot', 'migrate', 'revert'),
    ('resize', 'revert', 'migrate', 'confirm'),
    ('resize_here', 'revert', 'resize_here', 'confirm', 'migrate', 'confirm'),
)
HERE = WAYS[-1]

#: Ways from a host with legacy disks to one with pools.
TO_POOLS = (
    ('hard_reboot', 'migrate', 'revert', 'migrate', 'confirm', 'hard_reboot'),
    ('resize', 'revert', 'resize', 'confirm', 'hard_reboot'),
)


class Traveller:
    """One server on its way."""

    def __init__(self, case, server, way):
        self.case = case
        self.server = server
        self.way = way
        self.size = GIB
        self.before = None
        self.last = server.testimony()

    def go(self):
        for number, step in enumerate(self.way):
            try:
                getattr(self, step)()
                self.check(step)
            except Exception as error:
                raise AssertionError('%s: %s' % (
                    ', '.join(self.way[:number + 1]), error)) from error

    def check(self, step):
        if step == 'confirm':
            self.last = self.server.look()
        else:
            self.last = self.server.testimony(after=self.last)
        self.case.assert_data(self.last, data=DATA, raw=EPHEMERAL)
        self.case.assertEqual(self.size, self.last.own['bytes'])
        self.case.assertEqual({'vdc': True}, self.last.swap)
        self.case.assertEqual(self.server.id, self.last.config['uuid'])
        here = self.server.host
        self.case.assert_in_pool(
            self.server, here, self.case.is_pooled(here))
        if step in ('confirm', 'revert'):
            (other,) = {'host-a', 'host-b'} - {here}
            self.case.assert_nothing_left(self.server, other)

    def hard_reboot(self):
        self.server.hard_reboot()

    def migrate(self):
        self.before = self.size
        here = self.server.host
        (other,) = {'host-a', 'host-b'} - {here}
        self.server.migrate(other)
        self.case.assertEqual(other, self.server.host)

    def resize(self):
        self.before, self.size = self.size, self.size + GIB
        self.server.resize('lab.medium.disks' if self.size == 2 * GIB
                           else 'lab.large.disks')

    def resize_here(self):
        here = self.server.host
        self.resize()
        self.case.assertEqual(here, self.server.host)

    def revert(self):
        self.server.revert()
        self.size = self.before

    def confirm(self):
        self.server.confirm()


class Cells:
    """What the cells of all pairs of settings need."""

    legacy = ('disk', 'disk.eph0', 'disk.swap', 'disk.config')

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        _upload_vmdk(cls.cloud)

    def travellers(self, kind, ways):
        """Servers of a kind on legacy disks, one for each way."""
        made_by, image = KINDS[kind]
        self.cloud.set_images_type(**made_by)
        servers = [self.boot('%s-%d' % (kind, number), image=image,
                             flavor='lab.small.disks', script=WRITE)
                   for number in range(len(ways))]
        if kind == 'rescued_before':
            for server in servers:
                first = server.testimony()
                server.rescue()
                server.unrescue()
                server.testimony(after=first)
        return [Traveller(self, *pair) for pair in zip(servers, ways)]

    def go(self, travellers):
        """All at once, two at a time."""
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            list(threads.map(Traveller.go, travellers))

    def assert_in_pool(self, server, host, pooled):
        """All of its disks, or none."""
        self.assertEqual([] if pooled else sorted(self.legacy), [
            name for name in server.files_on(host) if name in self.legacy])
        lies = self.lies(server, host)
        for name in self.legacy:
            self.assertEqual(pooled, any(
                path.startswith('volume nova-disks-pool/ID_' + name)
                for path in lies), (name, lies))


class TestMatrix(Cells, CloudTestCase):
    """Both hosts have pools. Its tests are made below."""

    lab = cloud_case.SERIES
    images_type = 'libvirt-storage'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if cls.cloud.get('ctl', 'DEFAULT',
                         'allow_resize_to_same_host') != 'true':
            cls.cloud.set('ctl', 'DEFAULT',
                          'allow_resize_to_same_host', 'true')
            for host in ('host-a', 'host-b'):
                cls.cloud.restart(host, 'nova-compute')

    def is_pooled(self, _host):
        return True

    def cell(self, kind, settings):
        travellers = self.travellers(kind, WAYS)
        both, on_b = SETTINGS[settings]
        self.cloud.set_images_type('libvirt-storage', **both)
        if on_b:
            self.cloud.set_many('host-b', {
                ('DEFAULT', key): value for key, value in on_b.items()})
        *first, last = travellers
        self.go(first)
        services = {service.host: service.id for service in
                    self.cloud.conn.compute.services(binary='nova-compute')}
        self.cloud.conn.compute.disable_service(services['host-b'])
        last.way, rest = HERE[:4], HERE[4:]
        try:
            last.go()
        finally:
            self.cloud.conn.compute.enable_service(services['host-b'])
        last.way = rest
        last.go()


for _kind, _settings in itertools.product(KINDS, SETTINGS):
    setattr(TestMatrix, 'test_%s_%s' % (_kind, _settings),
            functools.partialmethod(TestMatrix.cell, _kind, _settings))


class TestTypesDiffer(Cells, CloudTestCase):
    """host-a has legacy disks, over SSH they come to host-b, which has pools.

    Its tests are made below.
    """

    lab = cloud_case.LEGACY

    def setUp(self):
        super().setUp()
        self.addCleanup(self.cloud.set_images_type, 'default')

    def is_pooled(self, host):
        """Legacy disks move into the pools on arrival."""
        return host == 'host-b'

    def cell(self, kind):
        travellers = self.travellers(kind, TO_POOLS)
        self.cloud.set_many('host-b', {
            ('libvirt', 'images_type'): 'libvirt-storage',
            **{('DEFAULT', key): self.cloud.get('host-a', 'DEFAULT', key)
               for key in ('use_cow_images', 'force_raw_images')}})
        self.go(travellers)


for _kind in KINDS:
    setattr(TestTypesDiffer, 'test_' + _kind,
            functools.partialmethod(TestTypesDiffer.cell, _kind))


class TestPoolsOnOneHost(CloudTestCase):
    """host-a has pools, host-b has not."""

    lab = cloud_case.SERIES
    images_type = 'libvirt-storage'

    def setUp(self):
        super().setUp()
        self.cloud.set('host-b', 'libvirt', 'images_type', 'qcow2')
        self.addCleanup(self.cloud.set, 'host-b', 'libvirt', 'images_type',
                        self.images_type)
        connection = Host('host-b').connect()
        try:
            for pool in connection.listAllStoragePools():
                pool.destroy()
                pool.undefine()
        finally:
            connection.close()

    def test_pool_to_legacy_refused(self):
        """Nothing happens to the server; the user can read why."""
        server = self.boot(flavor='lab.small.disks', script=WRITE)
        before = server.testimony()
        with self.assertRaisesRegex(
                Exception, 'is ACTIVE on host-a|NoValidHost|No valid host'):
            server.migrate('host-b')
        self.assertEqual('host-a', server.host)
        self.assertEqual(before.boot_id, server.look().boot_id)
        self.assertIn('define and start storage pool nova-disks-pool on host '
                      'host-b', self.service_log('host-b'))
        self.assert_nothing_left(server, 'host-b')


def _upload_vmdk(cloud):
    """The guest's image as Nova's most used sort of vmdk."""
    if cloud.conn.image.find_image('guest-vmdk'):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, 'guest.vmdk')
        subprocess.run(
            ['qemu-img', 'convert', '-O', 'vmdk', '-o',
             'subformat=streamOptimized',
             str(lab_cloud.cloud.GUEST / 'guest.qcow2'), str(path)],
            check=True, capture_output=True)
        cloud.conn.image.create_image(
            name='guest-vmdk', disk_format='vmdk', container_format='bare',
            visibility='public', filename=str(path),
            disable_vendor_agent=True, wait=True, timeout=60)


load_tests = cloud_case.only_in_full


if __name__ == '__main__':
    unittest.main()
