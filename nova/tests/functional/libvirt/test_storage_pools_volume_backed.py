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
"""Servers on a volume: their only local disks are those of the flavor."""

import ddt

from nova.tests import fixtures as nova_fixtures
from nova.tests.functional.libvirt import test_storage_pools_ceph as ceph

OLD = b'of the flavor that was given up'


class VolumeBackedTestBase(ceph.CephTestBase):

    def setUp(self):
        super().setUp()
        self.flags(force_config_drive=False)

    def boot_on_volume(self, **flavor):
        server = self._build_server(
            flavor_id=self.flavor(**flavor), networks='none', host='compute1',
            image_uuid='')
        server.pop('imageRef', None)
        server['block_device_mapping_v2'] = [{
            'source_type': 'volume', 'destination_type': 'volume',
            'boot_index': 0,
            'uuid': nova_fixtures.CinderFixture.IMAGE_BACKED_VOL}]
        server = self.api.post_server({'server': server})
        return self._wait_for_state_change(server, 'ACTIVE')

    def left(self):
        """Names of all local disks of any server, wherever they are."""
        return sorted({name.partition('_')[2] for name in (
            *self.images, *(name for host, pool in self.ceph_pools.items()
                            if pool is None for name in self.files(host)))})

    def write_into_all(self):
        for image in self.images.values():
            image.content = OLD

    def assert_new(self):
        self.assertNotIn(
            OLD, {image.content for image in self.images.values()})


@ddt.ddt
class Flavors:
    """A resize brings local disks, or does away with them."""

    MORE = {'swap': 64, 'ephemeral': 1}
    BOTH = ['disk.local', 'disk.swap']

    def test_revert(self):
        server = self.boot_on_volume()
        self.assertEqual([], self.left())
        for _try in range(2):
            self._resize_server(server, self.flavor(**self.MORE))
            self.assertEqual(self.BOTH, self.left())
            self.assert_new()
            self.write_into_all()
            self._revert_resize(server)
            self.assertEqual([], self.left())
            self.assertEqual({}, self.records(server))

    def test_confirm(self):
        server = self.boot_on_volume()
        self._resize_server(server, self.flavor(**self.MORE))
        self._confirm_resize(server)
        self.assertEqual(self.BOTH, self.left())
        self.assertEqual(self.BOTH, sorted(self.records(server)))

    @ddt.data(True, False)
    def test_swap_goes(self, is_confirmed):
        server = self.boot_on_volume(swap=64)
        self.assertEqual(['disk.swap'], self.left())
        self._resize_server(server, self.flavor())
        if is_confirmed:
            self._confirm_resize(server)
        else:
            self._revert_resize(server)
        kept = [] if is_confirmed else ['disk.swap']
        self.assertEqual(kept, self.left())
        self._reboot_server(server, hard=True)
        self.assertEqual(kept, self.left())
        self.assertEqual(kept, sorted(self.records(server)))


class TestOnCeph(Flavors, VolumeBackedTestBase):
    pass


class TestInDirectories(Flavors, VolumeBackedTestBase):

    ceph_pools = {'compute1': None, 'compute2': None}


class OneHost:
    """The resize is to the very host that the server is on."""

    def setUp(self):
        super().setUp()
        self.flags(allow_resize_to_same_host=True)


class TestOnCephOfOneHost(OneHost, Flavors, VolumeBackedTestBase):

    ceph_pools = {'compute1': 'nova'}


class TestInDirectoriesOfOneHost(OneHost, Flavors, VolumeBackedTestBase):

    ceph_pools = {'compute1': None}
