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
"""What a destination does with files that have come; see test_move."""

import ddt

from nova.compute import task_states
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.move import destination
from nova.virt.libvirt.storage.records import metadata

POOL = two_hosts.POOL


@ddt.ddt
class OfferTestCase(two_hosts.TwoHostsTestCase):

    @ddt.data(('source', False), ('dest', True))
    @ddt.unpack
    def test_what_is_noted_as_left(self, host, is_kept):
        """An evacuation that has failed has noted what it was to replace."""
        self.instance.host = host
        name = self.volume_name('disk')
        self.dest.pools[POOL][name] = {'length': 5, 'allocation': 5}
        self.note_left('dest', name)
        self.make_offer()
        self.assertEqual(['disk'] if is_kept else [], self.ours(self.dest))


@ddt.ddt
class GiveFilesBackTestCase(two_hosts.TwoHostsTestCase):

    def setUp(self):
        super().setUp()
        self.disks.clear()
        self.flags(host='dest')
        self.instance.task_state = task_states.RESIZE_REVERTING
        self.name = self.volume_name('disk')
        self.dest.pools[POOL][self.name] = {'length': 5, 'allocation': 5}

    def volume(self, **values):
        """The disk as a volume of the destination."""
        record = self.record('libvirt-storage', host='dest', **values)
        record.pool, record.volume = POOL, self.name
        return record

    def give_back(self, *, previous, migration_id=None):
        self.disks.set('disk', self.volume(
            previous=previous, migration_id=migration_id))
        destination.give_files_back(self.dest, self.disks)

    def record(self, backend, **values):
        return metadata.LibvirtDiskMetadata(
            backend=backend, format='qcow2', size=5, state='ready', **values)

    @ddt.data(True, False)
    def test_file(self, was_on_record):
        previous = self.record('qcow2', host='source') if (
            was_on_record) else None
        self.give_back(previous=previous)
        found = self.disks.get('disk')
        self.assertEqual(('qcow2', 'source') if was_on_record else None,
                         found and (found.backend, found.host))
        self.assertEqual([], self.disks.leftovers)
        self.assertEqual([], self.ours(self.dest))

    def test_volume(self):
        """Whoever has sent it gives it back."""
        self.give_back(previous=None, migration_id=5)
        self.assertEqual('dest', self.disks.get('disk').host)
        self.assertEqual(['disk'], self.ours(self.dest))
