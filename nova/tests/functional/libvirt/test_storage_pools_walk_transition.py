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
"""Operations at random, of an instance whose disks were legacy ones."""

import os

import ddt

from nova.tests.functional.libvirt import storage_pools_disks as disks
from nova.tests.functional.libvirt import storage_pools_walk as walks

HOSTS = walks.HOSTS


class Instances(disks.Directory):
    """What a host has in its pool, and in its directory of instances."""

    def names(self):
        found = ['%s/%s' % (name, disk) for name in os.listdir(self.path)
                 if len(name) > 35
                 for disk in os.listdir(os.path.join(self.path, name))]
        return found + os.listdir(os.path.join(self.path, 'disks'))

    def name_of(self, source):
        """A guest that was running shows a name that may be gone since."""
        directory, name = os.path.split(source)
        if directory.startswith(self.path) and len(
                os.path.basename(directory)) > 35:
            uuid = os.path.basename(directory)
            return ('%s/%s' if os.path.exists(source) else '%s_%s') % (
                uuid, name)
        return name

    def open(self, name):
        return super().open(name if '/' in name else 'disks/' + name)


@ddt.ddt
class TestTransition(walks.WalkTestBase):

    images_types = {'compute1': 'qcow2'}

    def prepare_pools(self):
        return {host: Instances(self.directories[host]) for host in HOSTS}

    def store_of_others(self, host):
        return self.disks[0].stores[host]

    def prepare(self, seed):
        super().prepare(seed)
        if self.random.random() < .5:
            self.do('stop')
        self.set_option('compute1', 'images_type', 'libvirt-storage')
        self.bring_back('compute1')

    @ddt.data(*walks.seeds())
    def test_walk(self, seed):
        self.walk(seed, 25)
