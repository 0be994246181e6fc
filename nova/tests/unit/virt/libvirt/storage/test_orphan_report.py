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

from unittest import mock

from oslo_utils.fixture import uuidsentinel as uuids

from nova import context
from nova import exception
from nova.objects import base as objects_base
from nova import test
from nova.virt.libvirt.storage import orphan_report
from nova.virt.libvirt.storage import orphans


class OrphanReportTestCase(test.NoDBTestCase):
    def setUp(self):
        super().setUp()
        self.flags(host='here')
        self.context = context.get_admin_context()
        self.conductor = mock.sentinel.conductor
        self.stub_out('nova.conductor.rpcapi.ConductorAPI',
                      lambda: self.conductor)
        self.libvirt = mock.Mock()
        self.stub_out('nova.virt.libvirt.storage.orphan_report.libvirt',
                      self.libvirt)
        self.asked = []
        self.stub_out('nova.objects.InstanceList.get_uuids_by_host',
                      lambda cls, *args: self.own(*args))
        self.found = [
            orphans.Orphan('pool', str(kind), uuids.instance, kind)
            for kind in orphans.Kind]
        self.find = mock.Mock(side_effect=self.finds)
        self.stub_out('nova.virt.libvirt.storage.orphans.find', self.find)
        self.sweep = mock.Mock(side_effect=self.sweeps)
        self.stub_out('nova.virt.libvirt.storage.orphans.sweep', self.sweep)
        self.error = None

    def own(self, context, host):
        # From whom the instances are, and not from a database.
        self.asked.append(objects_base.NovaObject.indirection_api)
        self.assertEqual('here', host)
        return [uuids.own]

    def sweeps(self, context, connection, own, tried, unread):
        self.assertEqual({uuids.own}, own)
        self.assertIs(self.libvirt.open.return_value, connection)
        unread.append(orphans.Unread('other', 'it is not active'))
        for orphan in self.found:
            if orphan.kind is orphans.Kind.LEFT_OVER:
                tried.append((orphan, orphan.volume != 'busy'))
        if self.error:
            raise self.error

    def finds(self, context, connection, own, unread):
        self.assertEqual({uuids.own}, own)
        self.assertIs(self.libvirt.open.return_value, connection)
        self.asked.append(objects_base.NovaObject.indirection_api)
        unread.append(orphans.Unread('other', 'it is not active'))
        return self.found

    def test_look(self):
        found = orphan_report.look(self.context)
        self.assertEqual([self.conductor] * 2, self.asked)
        self.assertIsNone(objects_base.NovaObject.indirection_api)
        self.assertEqual(self.found, found.orphans)
        self.assertEqual(self.found[:1], found.left_over)
        self.assertEqual(['other'], [unread.pool for unread in found.unread])
        self.sweep.assert_not_called()
        self.libvirt.open.assert_called_once_with('qemu:///system')
        self.libvirt.open.return_value.close.assert_called_once_with()

    def test_delete(self):
        """What is left over since nobody has tried to delete."""
        [gone] = self.found[:1]
        busy = gone._replace(volume='busy')
        self.found.append(busy)
        found = orphan_report.look(self.context, delete=True)
        self.assertEqual([gone], found.deleted)
        self.assertEqual([gone, busy], found.orphans)
        self.assertEqual([busy], found.left_over)
        self.assertEqual(['other'], [unread.pool for unread in found.unread])
        self.assertIsNone(found.error)
        self.find.assert_not_called()

    def test_delete_fails_halfway(self):
        self.error = exception.StoragePoolError(
            pool='pool', host='here', code=1, reason='went away')
        found = orphan_report.look(self.context, delete=True)
        self.assertEqual(self.found[:1], found.deleted)
        self.assertIs(self.error, found.error)

    def test_uri(self):
        self.flags(connection_uri='qemu+unix:///system', group='libvirt')
        orphan_report.look(self.context)
        self.libvirt.open.assert_called_once_with('qemu+unix:///system')

    def test_libvirt_is_off(self):
        self.libvirt.open.side_effect = RuntimeError('off')
        self.assertRaises(RuntimeError, orphan_report.look, self.context)
        self.assertIsNone(objects_base.NovaObject.indirection_api)
