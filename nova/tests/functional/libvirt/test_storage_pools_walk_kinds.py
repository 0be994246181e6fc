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
"""Operations at random, where root disks are in volume groups, or on Ceph."""

import ddt
import fixtures

from nova import exception
import nova.privsep.fs
from nova.storage import rbd_utils
from nova.tests.fixtures import libvirt_faults
from nova.tests.functional.libvirt import storage_pools_disks as disks
from nova.tests.functional.libvirt import storage_pools_walk as walks
from nova.tests.functional.libvirt import test_storage_pools_ceph as ceph
from nova.tests.functional.libvirt import test_storage_pools_lvm as lvm
from nova.virt.libvirt.storage.move import convert

HOSTS = walks.HOSTS


class KindsTestBase(walks.WalkTestBase):

    SNAPSHOTS_ARE_PLAYED = True

    def setUp(self):
        super().setUp()
        self.flags(use_cow_images=False)
        self.flags(storage_raw_files=True, group='libvirt')

    def define(self, host, xml):
        """Define a storage pool for a host's root disks, and start it."""
        self.connections[host].storagePoolDefineXML(
            xml.replace('nova-disks-pool', 'pool'))
        self.raw_pool(host, 'pool').create()
        self.set_option(host, 'storage_pool_mapping', {'root': 'pool'})

    def define_directory(self, host):
        path = self.useFixture(fixtures.TempDir()).path
        self.define(host, "<pool type='dir'><name>pool</name><target><path>%s"
                    "</path></target></pool>" % path)
        return disks.Directory(path)


class Group(disks.Store):
    """What is in a host's volume group."""

    def __init__(self, host, group):
        self._host, self._group = host, group

    def names(self):
        return list(self._group.devices)

    def open(self, name):
        return self._group.devices[name]

    def __str__(self):
        return 'group of %s' % self._host


@ddt.ddt
class TestGroups(KindsTestBase, lvm.GroupsTestBase):

    with_groups = ()

    def more_effects(self):
        return (nova.privsep.fs, ('lvextend',), libvirt_faults.failed_program),

    def prepare_pools(self):
        hosts = self.random.sample(HOSTS, self.random.choice((1, 2, 3, 3)))
        stores = {}
        for host in HOSTS:
            if host in hosts:
                self.define(host, lvm.VOLUME_GROUP)
                stores[host] = Group(host, self.group(host))
            else:
                stores[host] = self.define_directory(host)
        return stores

    @ddt.data(*walks.seeds())
    def test_walk(self, seed):
        self.walk(seed, 25)


class Image:
    """An image, as a guest has it."""

    def __init__(self, image):
        self._image = image

    def read(self, offset, length):
        return self._image.content[offset:offset + length]

    def write(self, offset, data):
        content = self._image.content[:offset].ljust(offset, b'\0')
        self._image.content = content + data + self._image.content[
            offset + len(data):]


class Images(disks.Store):
    """What is in a Ceph pool."""

    def __init__(self, name, images):
        self._name, self._images = name, images

    def names(self):
        return list(self._images)

    def open(self, name):
        return Image(self._images[name])

    def __str__(self):
        return 'Ceph pool %s' % self._name


@ddt.ddt
class TestCeph(KindsTestBase, ceph.CephTestBase):

    ceph_pools = dict.fromkeys(HOSTS)

    def setUp(self):
        super().setUp()
        self.useFixture(ceph.QemuImg(self.ceph))

    def more_effects(self):
        rbd = rbd_utils.rbd
        return (
            (rbd.RBD, ('create', 'clone', 'remove'), rbd.Error),
            (rbd.Image, ('resize', 'flatten', 'create_snap', 'remove_snap',
                         'rollback_to_snap'), rbd.Error),
            (convert, ('run',), self.failed_to_copy),
        )

    def leave(self):
        """Begin with what a snapshot has left that was cut off."""
        for image in self.images.values():
            image.snapshots = {
                name: snapshot for name, snapshot in image.snapshots.items()
                if name == 'nova-resize'}
        super().leave()

    @staticmethod
    def failed_to_copy(what):
        return exception.StorageTransferError(
            volume='disk', where='Ceph', length=1 << 30, transferred=0,
            side='destination', operation='write', reason=what)

    def prepare_pools(self):
        others = self.random.choice(((), (), (HOSTS[0],), (HOSTS[1],)))
        images = Images('nova', self.images)
        stores = {}
        for host in HOSTS:
            if host in others:
                stores[host] = self.define_directory(host)
                self.connections[host].storagePoolDefineXML(
                    (ceph.POOL % 'nova').replace(
                        'nova-disks-pool', 'over-ceph')).create(0)
            else:
                self.define(host, ceph.POOL % 'nova')
                stores[host] = images
        return stores

    @ddt.data(*walks.seeds())
    def test_walk(self, seed):
        self.walk(seed, 25)
