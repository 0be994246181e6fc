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
"""What becomes of the records of disks, with all of the services."""

from nova import context as nova_context
from nova import objects
from nova.tests.functional.libvirt import base
from nova.virt.libvirt.storage.records import metadata


class TestDiskRecords(base.ServersTestBase):

    microversion = 'latest'
    ADMIN_API = True

    def setUp(self):
        super().setUp()
        self.start_compute(hostname='compute1')
        self.context = nova_context.get_admin_context()

    def _mapping(self, server):
        (bdm,) = objects.BlockDeviceMappingList.get_by_instance_uuid(
            self.context, server['id'])
        return bdm

    def _record(self, server):
        bdm = self._mapping(server)
        return metadata.loads(bdm.driver_info, server['id'], bdm.uuid)

    def test_rebuild_makes_broken_records_anew(self):
        """Newer microversions give destroy() a copy of the mappings."""
        server = self._create_server(networks='none')
        bdm = self._mapping(server)
        bdm.driver_info = bdm.driver_info[:200]
        bdm.save()
        self._rebuild_server(server, '155d900f-4e14-4e4c-a73d-069cbf4541e6')
        record = self._record(server)
        self.assertEqual(('ready', 'compute1'), (record.state, record.host))

    def test_rebuild_forgets_what_was_before(self):
        server = self._create_server(networks='none')
        bdm = self._mapping(server)
        old = self._record(server)
        old.previous = old.obj_clone()
        bdm.driver_info = metadata.dumps(old, bdm.uuid)
        bdm.save()
        self._rebuild_server(server, '155d900f-4e14-4e4c-a73d-069cbf4541e6')
        self.assertIsNone(self._record(server).previous)
