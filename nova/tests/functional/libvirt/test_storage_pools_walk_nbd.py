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
"""Operations at random, where disks are copied over NBD."""

import ddt

from nova.tests.fixtures import libvirt_faults
from nova.tests.fixtures import libvirt_hosts
from nova.tests.functional.libvirt import storage_pools_walk as walks
from nova.tests.functional.libvirt import test_storage_pools_nbd as nbd
from nova.tests.functional.libvirt import test_storage_pools_walk as files


@ddt.ddt
class TestNbd(nbd.NbdTestBase, files.TestWalk):

    def more_effects(self):
        exports = libvirt_hosts.Exports
        return (
            (exports, ('connect', 'write'), libvirt_faults.failed_in_libvirt),
            (exports.Export, ('start', 'end'), libvirt_faults.failed_program))

    def verify(self):
        super().verify()
        for export in self.exports.made:
            host = 'compute' + export.address[-1]
            if export.is_open and host in self.down:
                # It ends with its compute service.
                export.is_open = export.has_key = False
            if export.is_open or export.has_key:
                self.violated('%s is open to more' % host)

    @ddt.data(*walks.seeds())
    def test_walk(self, seed):
        self.walk(seed, 25)
