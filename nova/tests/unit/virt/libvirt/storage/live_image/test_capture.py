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

import errno
import os
import time
from unittest import mock

import ddt
import fixtures
from oslo_concurrency import processutils
from oslo_utils import units

from nova.compute import power_state
from nova.compute import vm_states
from nova import exception
from nova import objects
from nova import test
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.unit.virt.libvirt.storage.live_image import fake_guest
from nova.tests.unit.virt.libvirt.storage.live_image import test_definition
from nova.virt.libvirt.storage.live_image import capture
from nova.virt.libvirt.storage.live_image import refusal
from nova.virt.libvirt.storage.live_image import under_way
from nova.virt.libvirt.storage.live_image import watch

MACS = fake_guest.MACS


@ddt.ddt
class CaptureTestCase(test.NoDBTestCase):

    WHOLE = ['detach', 'detach', 'memory', 'disk', 'resume', 'attach',
             'attach', 'copied', 'abort']

    def setUp(self):
        super().setUp()
        self.folder = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'snapshots')
        self.flags(snapshots_directory=self.folder, group='libvirt')
        self.useFixture(fixtures.MockPatchObject(
            capture, 'libvirt', fakelibvirt))
        self.chown = self.useFixture(fixtures.MockPatch(
            'nova.privsep.path.chown')).mock
        self.info = self.useFixture(fixtures.MockPatch(
            'nova.virt.images.qemu_img_info',
            return_value=mock.Mock(virtual_size=1 << 30))).mock
        for retried in (capture._let_go_on, capture._put_back,
                        capture._end_jobs):
            self.useFixture(fixtures.MockPatchObject(
                retried.retry, 'sleep'))
            self.useFixture(fixtures.MockPatchObject(
                retried.retry, 'stop', lambda state: (
                    state.attempt_number >= 5)))
        self.instance = objects.Instance(
            uuid=test_definition.SOURCE, vm_state=vm_states.ACTIVE)
        self.guest = fake_guest.Guest()
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu.run_while_it_copies', self.guest.read))
        self.host = mock.Mock()
        self.host.get_guest.return_value = self.guest
        connection = self.host.get_connection.return_value
        connection.saveImageGetXMLDesc.return_value = test_definition.SAVED
        connection.getVersion.return_value = 7002000
        self._versions((9, 0, 0), (7, 2, 0))
        self.interfaces = fake_guest.interfaces_of(self.guest)

    def _capture(self):
        return capture.Capture(self.host, self.instance, self.interfaces)

    def _versions(self, libvirt, qemu):
        self.host.has_min_version.side_effect = (
            lambda lv_ver=(0,), hv_ver=(0,): libvirt >= lv_ver and (
                qemu >= hv_ver))

    def _assert_right(self):
        self.assertEqual(power_state.RUNNING, self.guest.state)
        self.assertEqual(set(MACS), set(self.guest.macs))
        self.assertEqual([], os.listdir(self.folder)
                         if os.path.isdir(self.folder) else [])

    def test_capture(self):
        with self._capture() as saved:
            self.assertEqual(self.WHOLE, self.guest.steps)
            self.assertEqual(10, saved.memory.length)
            with open(saved.disk, 'rb') as f:
                self.assertEqual(b'disk', f.read())
            self.assertEqual(1 << 30, saved.description.capacity)
            self.assertEqual(256, saved.description.memory_mb)
            self.assertEqual(1, saved.description.vcpus)
            self.assertEqual(7002000, saved.description.qemu_version)
            self.assertEqual(test_definition.SAVED, saved.description.domain)
            # QEMU makes the socket where it may, and nova may use it; the
            # memory is root's or QEMU's.
            me, qemu = os.geteuid(), 64055
            self.assertEqual(
                [(os.path.dirname(self.guest.socket), qemu),
                 (os.path.dirname(self.guest.socket), me),
                 (self.guest.socket, me), (saved.memory.path, me)],
                [(call.args[0], call.kwargs['uid'])
                 for call in self.chown.mock_calls])
            self.assertEqual(0o600, os.stat(saved.disk).st_mode & 0o777)
            # libvirt passes, and nobody else lists it.
            self.assertEqual(0o701, os.stat(os.path.dirname(
                saved.disk)).st_mode & 0o777)
        self._assert_right()

    def test_copy_is_nobody_elses_from_its_begin(self):
        """Its path can be guessed, and whoever has it open reads it all."""
        modes = []

        def read(*command):
            modes.append(os.stat(command[-1]).st_mode & 0o777)
            self.guest.read(*command)
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu.run_while_it_copies', read))
        with self._capture():
            self.assertEqual([0o600], modes)

    def test_only_the_disk_is_left_to_others(self):
        with mock.patch.object(self.guest, 'save_memory_live',
                               side_effect=OSError('enough')) as save:
            self.assertRaises(exception.LiveImageCaptureFailed,
                              self._capture().__enter__)
        found = refusal.parse(save.mock_calls[0].args[0])
        self.assertEqual([('vda', 'manual'), ('hda', 'no')], [
            (disk.get('name'), disk.get('snapshot'))
            for disk in found.findall('disks/disk')])

    def test_guest_that_has_come_by_live_migration(self):
        self.guest.has_come_live = True
        with self._capture():
            self.assertEqual(self.WHOLE, self.guest.steps)
        self._assert_right()

    def test_refused_before_anything_is_done(self):
        with mock.patch.object(
                self.guest, 'get_xml_desc',
                return_value=test_definition.SAVED.replace('genid', 'other')):
            self.assertRaises(exception.LiveImageRefused,
                              self._capture().__enter__)
        self.assertEqual([], self.guest.steps)
        self._assert_right()

    # As much as the memory, and what is left to others
    @ddt.data((512 * units.Mi - 1, True), (512 * units.Mi, False))
    @ddt.unpack
    def test_no_room_for_the_memory(self, free, is_refused):
        """Other guests' disks may be in that file system, too."""
        get_info = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.utils.get_fs_info', return_value={
                'total': units.Gi, 'free': free, 'used': 0})).mock
        if is_refused:
            error = self.assertRaises(exception.LiveImageRefused,
                                      self._capture().__enter__)
            self.assertIn('make room in %s' % self.folder, str(error)[:200])
            # Twice what the memory takes
            self.assertIn('a memory is written there if %d are' % (
                512 * units.Mi), str(error))
            self.assertEqual([], self.guest.steps)
        else:
            with self._capture():
                pass
        self.assertEqual(mock.call(self.folder), get_info.mock_calls[0])
        self._assert_right()

    def test_two_at_once(self):
        with self._capture():
            steps = list(self.guest.steps)
            self.assertRaises(exception.LiveImageRefused,
                              self._capture().__enter__)
            self.assertEqual(steps, self.guest.steps)
        self._assert_right()

    @ddt.data('detach', 'memory', 'disk', 'resume', 'copied')
    def test_failure(self, step):
        self.guest.fails[step] = fakelibvirt.libvirtError('no')
        error = self.assertRaises(exception.LiveImageCaptureFailed,
                                  self._capture().__enter__)
        self.assertIn({'detach': 'interfaces', 'copied': 'copy'}.get(
            step, step), str(error))
        self._assert_right()

    @ddt.data('resume', 'copied')
    def test_job_does_not_go_on_in_vain(self, step):
        self.guest.fails[step] = fakelibvirt.libvirtError('no')
        self.assertRaises(exception.LiveImageCaptureFailed,
                          self._capture().__enter__)
        self.assertEqual('abort', self.guest.steps[-1])
        self.assertFalse(self.guest.job)
        self._assert_right()

    def test_guest_finds_no_room_for_what_it_writes_over(self):
        def full(*_command):
            self.guest.state = power_state.PAUSED
            raise processutils.ProcessExecutionError(stderr='full')
        self.useFixture(fixtures.MockPatch(
            'nova.privsep.qemu.run_while_it_copies', full))
        self.assertRaises(exception.LiveImageCaptureFailed,
                          self._capture().__enter__)
        self.assertEqual(['abort', 'resume'], self.guest.steps[-2:])
        self._assert_right()

    def test_job_that_can_not_be_ended(self):
        """It is for the next start of nova-compute."""
        with mock.patch.object(
                self.guest, 'abort_job',
                side_effect=fakelibvirt.libvirtError('no')):
            error = self.assertRaises(exception.LiveImageCaptureFailed,
                                      self._capture().__enter__)
        self.assertIn('could not be ended', str(error))
        self.assertEqual(set(MACS), set(self.guest.macs))
        self.assertEqual([self.instance.uuid], under_way.instances())
        capture.recover(self.host, self.instance, self.interfaces)
        self.assertFalse(self.guest.job)
        self._assert_right()

    def test_qemu_that_runs_as_libvirtd_does(self):
        for label in ('', "<seclabel type='dynamic' model='dac'/>",
                      "<seclabel model='dac'><label>qemu:qemu</label>"
                      "</seclabel>"):
            domain = refusal.parse('<domain>%s</domain>' % label)
            self.assertIsNone(capture._owner(domain))
        under_way.begin(self.instance.uuid)
        under_way.make_export(self.instance.uuid, None)
        self.chown.assert_not_called()

    def test_failure_to_describe(self):
        self.info.side_effect = OSError('no')
        error = self.assertRaises(exception.LiveImageCaptureFailed,
                                  self._capture().__enter__)
        self.assertIn('description', str(error))
        self._assert_right()

    def test_never_resumed_before_the_disk_is_begun(self):
        self.guest.fails['disk'] = fakelibvirt.libvirtError('no')
        self.assertRaises(exception.LiveImageCaptureFailed,
                          self._capture().__enter__)
        self.assertLess(self.guest.steps.index('disk'),
                        self.guest.steps.index('resume'))

    @ddt.data("Could not create node: Inactive 'libvirt-1-format' can't be a "
              "file child of active '#block235'",
              # QEMU 10.0.13
              "Inactive 'n0' can't be a backing child of active 't0'")
    def test_libvirt_that_can_not_copy_at_that_moment(self, message):
        self.guest.fails['disk'] = fakelibvirt.libvirtError(message)
        error = self.assertRaises(exception.LiveImageCaptureFailed,
                                  self._capture().__enter__)
        self.assertIn('libvirt 9.0 with QEMU 7.2', str(error))
        self._assert_right()

    @ddt.data(((11, 3, 0), (10, 0, 13)), ((12, 7, 0), (11, 1, 0)))
    @ddt.unpack
    def test_versions_that_can_not_copy_at_that_moment(self, libvirt, qemu):
        """Nothing is done to the guest, and nothing is left."""
        self._versions(libvirt, qemu)
        error = self.assertRaises(exception.LiveImageRefused,
                                  self._capture().__enter__)
        self.assertIn('QEMU 10.0.0 and newer takes libvirt 12.8.0', str(error))
        self.assertEqual([], self.guest.steps)
        self._assert_right()

    @ddt.data(((11, 3, 0), (9, 2, 0)), ((12, 8, 0), (11, 1, 0)))
    @ddt.unpack
    def test_versions_that_can(self, libvirt, qemu):
        self._versions(libvirt, qemu)
        with self._capture():
            self.assertEqual(self.WHOLE, self.guest.steps)

    def test_libvirt_is_away_for_a_while(self):
        self.guest.fails['memory'] = fakelibvirt.libvirtError('closed')
        gone = exception.InternalError('no connection')

        def get_guest(_instance):
            if self.guest.steps[-1:] == ['memory'] and self.away:
                self.away -= 1
                raise gone
            return self.guest
        self.away = 3
        self.host.get_guest.side_effect = get_guest
        self.assertRaises(exception.LiveImageCaptureFailed,
                          self._capture().__enter__)
        self._assert_right()

    def test_libvirt_stays_away(self):
        """What can't be put right now is tried again later."""
        self.guest.fails['memory'] = fakelibvirt.libvirtError('closed')
        self.host.get_guest.side_effect = [
            self.guest, self.guest, *[exception.InternalError('gone')] * 5]
        error = self.assertRaises(exception.LiveImageGuestNotRight,
                                  self._capture().__enter__)
        self.assertIn('Hard reboot the server', str(error))
        self.assertEqual([self.instance.uuid], under_way.instances())
        # Should it be deleted instead, its memory doesn't stay.
        self.assertEqual([self.instance.uuid], under_way.left())

        self.host.get_guest.side_effect = None
        capture.recover(self.host, self.instance, self.interfaces)
        self._assert_right()

    def test_interface_that_can_not_be_put_back_at_once(self):
        """libvirt, or Open vSwitch, is on its way up again."""
        self.guest.fails['attach'] = exception.InterfaceAttachFailed(
            instance_uuid=self.instance.uuid)
        with self._capture():
            self.assertEqual(set(MACS), set(self.guest.macs))
        self._assert_right()

    def test_interface_without_a_port_is_not_left_in_the_guest(self):
        """It came back while its port was deleted, and wasn't out at once."""
        self.interfaces.take_out()
        attach, detach = self.interfaces.attach, self.interfaces.detach
        failures = [exception.DeviceDetachFailed(device='nic', reason='slow')]

        def and_delete(vif, place):
            attach(vif, place)
            self.guest.ports.remove(vif['address'])

        def fail_once(vif):
            if failures:
                raise failures.pop()
            detach(vif)
        self.interfaces.attach = and_delete
        self.interfaces.detach = fail_once
        self.assertTrue(capture.put_right(self.host, self.instance,
                                          self.interfaces))
        self.assertEqual([], self.guest.macs)

    def test_interfaces_are_put_back_though_it_can_not_go_on(self):
        self.guest.fails['resume'] = fakelibvirt.libvirtError('no')
        with mock.patch.object(capture, '_let_go_on',
                               side_effect=exception.InternalError('no')):
            self.assertRaises(exception.LiveImageGuestNotRight,
                              self._capture().__enter__)
        self.assertEqual(set(MACS), set(self.guest.macs))

    def test_places_of_interfaces_that_can_not_be_kept(self):
        with mock.patch.object(self.interfaces, 'keep_places', side_effect=(
                OSError(errno.ENOSPC, 'No space left'))):
            error = self.assertRaises(exception.LiveImageCaptureFailed,
                                      self._capture().__enter__)
        for text in ('in step places: nothing was taken from the guest',
                     self.folder, 'No space left'):
            self.assertIn(text, str(error))
        self.assertNotIn('may lose an interface', str(error))
        self.assertNotIn('detach', self.guest.steps)
        self._assert_right()

    def test_guest_that_does_not_give_up_an_interface(self):
        self.guest.fails['detach'] = exception.DeviceDetachFailed(
            device='nic', reason='no')
        error = self.assertRaises(exception.LiveImageCaptureFailed,
                                  self._capture().__enter__)
        self.assertIn('unless it is hard rebooted', str(error))

    def test_guest_is_deleted_meanwhile(self):
        self.guest.fails['memory'] = fakelibvirt.libvirtError('no domain')
        self.host.get_guest.side_effect = [
            self.guest, self.guest,
            *[exception.InstanceNotFound(instance_id='x')] * 5]
        self.assertRaises(exception.LiveImageCaptureFailed,
                          self._capture().__enter__)
        self.assertEqual([], os.listdir(self.folder))

    @ddt.data('detach', 'memory', 'disk', 'resume', 'attach')
    def test_killed(self, step):
        self.guest.fails[step] = fake_guest.Killed()
        # Nothing of ours runs any more.
        with mock.patch.object(
                capture, 'put_right',
                capture.put_right if step == 'attach' else mock.Mock()), (
                    mock.patch.object(under_way, 'end')), (
                    mock.patch.object(capture, 'end_job')):
            self.assertRaises(fake_guest.Killed, self._capture().__enter__)
        self.assertEqual([self.instance.uuid], under_way.instances())
        # libvirt ends what it was asked for all the same.
        if step == 'memory':
            self.guest.state = power_state.PAUSED
        capture.recover(self.host, self.instance, self.interfaces)
        self._assert_right()

    def test_recover_waits_for_the_end_of_the_job(self):
        under_way.begin(self.instance.uuid)
        self.guest.job = True
        self.guest.state = power_state.PAUSED
        self.guest.macs = []
        capture.recover(self.host, self.instance, self.interfaces)
        self.assertEqual(['abort', 'resume', 'attach', 'attach'],
                         self.guest.steps)
        self._assert_right()

    def test_recover_of_a_server_that_its_user_has_paused_since(self):
        under_way.begin(self.instance.uuid)
        self.guest.state = power_state.PAUSED
        self.guest.macs = []
        self.instance.vm_state = vm_states.PAUSED
        capture.recover(self.host, self.instance, self.interfaces)
        self.assertEqual(['attach', 'attach'], self.guest.steps)
        self.assertEqual(power_state.PAUSED, self.guest.state)
        self.assertEqual([], under_way.instances())

    def test_recover_of_a_server_that_is_gone(self):
        under_way.begin(self.instance.uuid)
        self.host.get_guest.side_effect = exception.InstanceNotFound(
            instance_id='x')
        capture.recover(self.host, self.instance, self.interfaces)
        self.assertEqual([], under_way.instances())

    def test_recover_where_files_can_not_be_deleted(self):
        """nova-compute starts nevertheless."""
        under_way.begin(self.instance.uuid)
        with mock.patch('shutil.rmtree', side_effect=OSError('read-only')):
            capture.recover(self.host, self.instance, self.interfaces)
        self.assertIn('read-only', self.stdlog.logger.output)
        self.assertEqual([self.instance.uuid], under_way.instances())

    def test_recover_without_libvirt(self):
        under_way.begin(self.instance.uuid)
        self.host.get_guest.side_effect = exception.InternalError('gone')
        capture.recover(self.host, self.instance, self.interfaces)
        self.assertEqual([self.instance.uuid], under_way.instances())

    def test_time_limit(self):
        """First the guest is paused, then the job is ended."""
        self.flags(live_image_timeout=1, group='libvirt')
        self.useFixture(fixtures.MockPatchObject(watch, 'POLL', 0.01))
        now = [0.0]

        def slow():
            while self.guest.steps[-1] != 'abort':
                now[0] += 0.1
                sleep(0.01)
            raise fakelibvirt.libvirtError('operation aborted')
        sleep = time.sleep
        self.guest.slow = slow
        with mock.patch.object(watch.time, 'monotonic', lambda: now[0]):
            self.assertRaises(exception.LiveImageCaptureFailed,
                              self._capture().__enter__)
        self.assertEqual(['detach', 'detach', 'pause', 'abort', 'resume',
                          'attach', 'attach'], self.guest.steps)
        self._assert_right()
