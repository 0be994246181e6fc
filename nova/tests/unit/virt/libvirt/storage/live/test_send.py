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
import os
from unittest import mock

import fixtures
from oslo_utils.fixture import uuidsentinel as uuids

from nova import exception
from nova import objects
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.unit.virt.libvirt.storage.live import test_receive
from nova.tests.unit.virt.libvirt.storage.move import two_hosts
from nova.virt.libvirt.storage.live import send

POOL = two_hosts.POOL


class SendTestCase(test_receive.ReceiveTestCase):

    def send(self):
        self.flags(host='source')
        return send.Sender(self.local, self.load(), self.data).send()

    def setUp(self):
        super().setUp()
        self.plan()
        self.receive()
        self.verified = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.pump.transfer.verify')).mock

    def _abort(self, uuid=None):
        return send.abort(mock.Mock(uuid=uuid or self.instance.uuid))

    def _pulled_disk(self):
        self.as_overlay('disk.eph0', 'ephemeral_1', 4096)
        for disk in self.data.disks:
            if disk.name == 'disk.eph0':
                disk.format = 'qcow2'
        device = mock.Mock()
        device.is_job_complete.return_value = False
        self.guest.get_block_device.side_effect = lambda dev: device
        return device

    def test_config_drive(self):
        self.send()
        ((source, target, length, _kwargs),) = self.copies
        name = self.volume_name('disk.config')
        self.assertEqual(
            (('qemu:///system', POOL, name),
             ('qemu+tls://192.0.2.2/system', POOL, name), 100),
            (source, target, length))
        self.verified.assert_called_once()
        self.assertEqual(target, self.verified.call_args.args[0])

    def test_it_is_not_what_was_sent(self):
        self.verified.side_effect = exception.StorageTransferMismatch(
            volume='v', where='there', reason='it differs')
        self.assertRaises(exception.StorageTransferMismatch, self.send)

    def test_overlay_that_takes_over_its_base(self):
        device = self._pulled_disk()
        device.is_job_complete.side_effect = [False, True]
        self.stub_out(send.__name__ + '._POLL', 0)

        def pull(base):
            self.assertIsNone(base)
            del self.source.pools[POOL][self.volume_name('disk.eph0')]['base']

        device.rebase.side_effect = pull
        self.send()
        self.guest.get_block_device.assert_called_with('vdb')
        device.rebase.assert_called_once_with(None)
        # Else the guest would lose what is in its base.
        self.as_overlay('disk.eph0', 'ephemeral_1', 4096)
        device.rebase.side_effect = None
        device.is_job_complete.side_effect = [True]
        self.assertRaises(exception.MigrationError, self.send)

    def test_abort_while_a_disk_takes_over_its_base(self):
        device = self._pulled_disk()
        device.rebase.side_effect = lambda base: self.assertTrue(self._abort())
        self.assertIs(False, self.send())
        device.abort_job.assert_called_once_with()
        # The disk is what it was, and nothing is sent.
        self.assertEqual('ephemeral_1', os.path.basename(
            self.source.pools[POOL][self.volume_name('disk.eph0')]['base']))
        self.assertEqual([], self.copies)
        self.assertIs(False, self._abort())

    def test_abort_when_a_disk_has_just_taken_over_its_base(self):
        """libvirt then has no job to abort any more."""
        device = self._pulled_disk()
        device.rebase.side_effect = lambda base: self._abort()
        device.abort_job.side_effect = fakelibvirt.libvirtError('no job')
        self.assertIs(False, self.send())
        self.assertEqual([], self.copies)

    def test_error_while_a_disk_takes_over_its_base(self):
        device = self._pulled_disk()
        device.rebase.side_effect = fakelibvirt.libvirtError('full')
        self.assertRaises(fakelibvirt.libvirtError, self.send)
        self.assertIs(False, self._abort())

    def test_abort_while_a_config_drive_is_sent(self):
        def copy(*args, cancelled, **kwargs):
            self.assertFalse(cancelled())
            self._abort()
            self.assertTrue(cancelled())
            raise exception.StorageTransferCancelled(
                volume='v', where='there', transferred=1, length=2)

        self.stub_out('nova.virt.libvirt.storage.pump.transfer.copy', copy)
        self.assertIs(False, self.send())
        self.verified.assert_not_called()

    def test_abort_of_another_migration(self):
        self.verified.side_effect = lambda *args, **kwargs: self.assertIs(
            False, self._abort(uuids.other))
        self.assertIs(True, self.send())
        self.verified.assert_called_once()

    def test_nothing_to_send(self):
        self.data.disks = [disk for disk in self.data.disks
                           if disk.way == 'mirror']
        self.host.uris.clear()
        self.send()
        self.assertEqual([], self.host.uris)

    def test_legacy_config_drive(self):
        record = self.disks.get('disk.config')
        record.backend, record.pool, record.volume = 'flat', None, None
        self.disks.set('disk.config', record)
        self.disks.save(self.context)
        directory = os.path.join(
            two_hosts.CONF.instances_path, uuids.instance)
        os.mkdir(directory)
        path = os.path.join(directory, 'disk.config')
        with open(path, 'wb') as f:
            f.write(b'iso')
        self.send()
        self.assertEqual([], self.copies)
        volume = self.dest.pools[POOL][self.volume_name('disk.config')]
        self.assertEqual(b'iso', volume['content'])
        self.assertEqual(['disk.config'], os.listdir(directory))
        self.stub_out('nova.virt.libvirt.storage.pool.stream.upload_file',
                      lambda volume, path, sparse: volume.content.update(
                          content=b'zeroes'))
        self.assertRaises(exception.StorageTransferMismatch, self.send)

    def test_objects(self):
        # They travel by RPC.
        primitive = self.data.obj_to_primitive()
        found = objects.LibvirtLiveMigrateData.obj_from_primitive(primitive)
        self.assertEqual(
            [disk.path for disk in self.data.disks],
            [disk.path for disk in found.disks])
