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
"""Operations at random, where root disks are files."""

import ddt
import fixtures

from nova.tests.functional.libvirt import storage_pools_disks as disks
from nova.tests.functional.libvirt import storage_pools_walk as walks
from nova.tests.functional.libvirt import test_storage_pools_shared as shared

HOSTS = walks.HOSTS
# Which of them see one pool
SHARINGS = ((), HOSTS[:2], HOSTS[::2], HOSTS[1:], HOSTS)


@ddt.ddt
class TestWalk(walks.WalkTestBase, shared.SharedTestBase):

    CAST_AS_CALL = True

    def prepare_pools(self):
        sharing = self.random.choice(SHARINGS)
        common = disks.Directory(self.shared)
        stores = {
            host: common if host in sharing else disks.Directory(
                self.useFixture(fixtures.TempDir()).path) for host in HOSTS}
        for host, store in stores.items():
            self.define_pool(host, 'pool', store.path)
        return stores

    @ddt.data(*walks.seeds())
    def test_walk(self, seed):
        self.walk(seed, 25)
