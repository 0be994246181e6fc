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
import shutil
from unittest import mock

import ddt
import fixtures
from lxml import etree

from nova import exception
from nova import objects
from nova import test
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.unit.virt.libvirt.storage.live_image import test_definition
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt.storage.live_image import boot
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import refusal
from nova.virt.libvirt.storage.live_image import vm_state

CAPS = '''
<capabilities><host><cpu><arch>x86_64</arch></cpu></host>
<guest><os_type>hvm</os_type><arch name='x86_64'><wordsize>64</wordsize>
<machine>%s</machine><machine canonical='pc-i440fx-7.2'>pc</machine>
<domain type='qemu'/><domain type='kvm'><machine>pc-q35-7.2</machine></domain>
</arch></guest></capabilities>'''


@ddt.ddt
class LiveBootTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MockPatchObject(
            boot, 'libvirt', fakelibvirt))
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.path = os.path.join(self.folder, 'memory')
        self.flags(host='here')
        self.flags(virt_type='qemu', group='libvirt')
        self.instance = objects.Instance(
            uuid=test_definition.OWN, config_drive='True', launched_at=None,
            system_metadata={}, image_ref='', flavor=objects.Flavor(
                memory_mb=256, vcpus=1, root_gb=1))
        self.host = mock.Mock()
        self.host.get_connection.return_value.getVersion.return_value = (
            7002000)
        self._has_machine('pc-i440fx-7.2')
        self._keep()

    def _has_machine(self, name):
        caps = vconfig.LibvirtConfigCaps()
        caps.parse_str(CAPS % name)
        self.host.get_capabilities.return_value = caps

    def _keep(self, **changes):
        stream = os.path.join(self.folder, 'stream')
        with open(stream, 'wb') as f:
            f.write(b'QEVM')
        with memory_file.Reader(
                test_definition.described(**changes),
                vm_state.Stream(stream, 0, 4)) as reader, open(
                    self.path, 'wb') as out:
            shutil.copyfileobj(reader, out)

    def _boot(self):
        return boot.LiveBoot(self.host, self.instance, self.path)

    def _assert_unusable(self, text, function, *args):
        error = self.assertRaises(
            exception.LiveImageUnusable, function, *args)
        # A flavor is as large on any host.
        self.assertEqual('in the flavor' in str(error),
                         isinstance(error, exception.ImageUnacceptable))
        for part in (text, test_definition.OWN, 'here'):
            self.assertIn(part, str(error))

    def test_file_that_is_no_memory(self):
        with open(self.path, 'wb') as f:
            f.write(b'QFI\xfb')
        self._assert_unusable('no memory', self._boot)
        os.unlink(self.path)
        self._assert_unusable('No such file', self._boot)

    def test_check_host(self):
        self._boot().check_host()
        # 0: as large as the image.
        self.instance.flavor.root_gb = 0
        self._boot().check_host()

    @ddt.data(('memory_mb', 512, '256 in the image, 512 in the flavor'),
              ('vcpus', 2, '1 in the image, 2 in the flavor'),
              ('root_gb', 2, '1073741824 bytes in the image, 2147483648'))
    @ddt.unpack
    def test_flavor_of_another_size(self, name, value, text):
        setattr(self.instance.flavor, name, value)
        self._assert_unusable(text, self._boot().check_host)
        # No other host is tried.
        self.assertRaises(exception.ImageUnacceptable,
                          self._boot().check_host)

    def test_config_drive(self):
        """Its user is told, and no other host is tried."""
        self.instance.config_drive = ''
        error = self.assertRaises(exception.LiveImageUnfit,
                                  self._boot().check_host)
        self.assertIn('create the server with a config drive', str(error))
        self.flags(force_config_drive=True)
        self._boot().check_host()

    def test_no_config_drive(self):
        domain = refusal.parse(test_definition.SAVED)
        drive = domain.find("devices/disk[@device='cdrom']")
        drive.getparent().remove(drive)
        self._keep(domain=etree.tostring(domain, encoding='unicode'))
        error = self.assertRaises(exception.LiveImageUnfit,
                                  self._boot().check_host)
        self.assertIn('create the server without a config drive', str(error))
        self.instance.config_drive = ''
        self._boot().check_host()

    def test_machine_that_the_host_has_not(self):
        self._has_machine('pc-i440fx-9.0')
        self._assert_unusable('no machine of type pc-i440fx-7.2 (x86_64)',
                              self._boot().check_host)

    @ddt.data(('<domain', "can not be read"),
              ("<?xml version='1.0' encoding='utf-8'?><domain/>",
               'can not be read'),
              ('<domain>&a;</domain>', 'can not be read'),
              ('\ud800', 'can not be read'),
              ('', 'can not be read'),
              ('<domain/>', 'does not name a type of machine'),
              ("<domain><os><type arch='x86_64'>hvm</type></os></domain>",
               'does not name a type of machine'))
    @ddt.unpack
    def test_definition_that_can_not_be_read(self, domain, text):
        """Nor could any other host, so none is tried."""
        self._keep(domain=domain)
        error = self.assertRaises(exception.LiveImageUnfit,
                                  self._boot().check_host)
        self.assertIn(text, str(error))

    @ddt.data(
        ('</domain>', ''),
        ("<target dev='vda' bus='virtio'/>", ''),
        ("<target dev='vda' bus='virtio'/>", "<target bus='virtio'/>"),
        ("<target dev='vda' bus='virtio'/>",
         "<target dev='vda'/><target dev='vdb'/>"),
        ("</devices>", '<disk/></devices>'),
        ("<os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type>",
         '<os>'),
        ("<memory unit='KiB'>262144</memory>", ''),
        ("<memory unit='KiB'>262144</memory>", '<memory>much</memory>'),
        ("<vcpu placement='static' cpuset='0-3'>1</vcpu>", ''),
        ("<model type='cirrus'/>", "<model type='qxl' ram='lots'/>"),
        ('domain', 'else'))
    @ddt.unpack
    def test_definition_that_is_malformed(self, old, new):
        domain = test_definition.SAVED.replace(old, new)
        self.assertNotEqual(test_definition.SAVED, domain)
        self._keep(domain=domain)
        self.assertRaises(exception.LiveImageUnfit, self._boot().define,
                          test_definition.WANTED)

    def test_disk_that_is_named_like_two(self):
        """Where disks are compared it reads like what the flavor asks for."""
        saved = refusal.parse(test_definition.SAVED)
        disk, cdrom = saved.findall('devices/disk')
        disk.getparent().remove(disk)
        cdrom.find('target').set('dev', 'hda (ide), disk vda')
        cdrom.find('target').set('bus', 'virtio')
        self._keep(domain=etree.tostring(saved, encoding='unicode'))
        self.assertRaises(exception.LiveImageUnfit, self._boot().define,
                          test_definition.WANTED)

    def test_older_qemu(self):
        self._keep(qemu_version=7002001)
        self._assert_unusable('7002001 in the image, 7002000 here',
                              self._boot().check_host)
        self._keep(qemu_version=7000000)
        self._boot().check_host()

    @ddt.data((fakelibvirt.VIR_CPU_COMPARE_IDENTICAL, True),
              (fakelibvirt.VIR_CPU_COMPARE_SUPERSET, True),
              (fakelibvirt.VIR_CPU_COMPARE_INCOMPATIBLE, False),
              (fakelibvirt.VIR_CPU_COMPARE_ERROR, False))
    @ddt.unpack
    def test_cpu(self, result, fits):
        self.flags(virt_type='kvm', group='libvirt')
        self.host.compare_hypervisor_cpu.return_value = result
        if fits:
            self._boot().check_host()
        else:
            self._assert_unusable('Nehalem', self._boot().check_host)
        self.assertIn('Nehalem', self.host.compare_hypervisor_cpu.mock_calls[
            0].args[0])

    def test_cpu_that_can_not_be_compared(self):
        self.flags(virt_type='kvm', group='libvirt')
        self.host.compare_hypervisor_cpu.side_effect = (
            fakelibvirt.libvirtError('unknown CPU model'))
        self._assert_unusable('unknown CPU model', self._boot().check_host)

    def test_emulated_cpu(self):
        self.flags(virt_type='qemu', group='libvirt')
        self._boot().check_host()
        self.host.compare_hypervisor_cpu.assert_not_called()

    def _image(self, base='/base', size=1 << 30):
        disk = os.path.join(self.folder, 'disk')
        self.checked_base = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.storage.image_cache.checked_base')).mock
        self.useFixture(fixtures.MockPatchObject(
            vm_state, 'read', return_value=vm_state.Overlay(
                size, base and vm_state.Backing(base, 'raw'))))
        with open(disk, 'wb'):
            pass
        os.chmod(disk, 0o644)
        image = mock.Mock(path=disk, driver_format='qcow2')
        image.make_private.side_effect = lambda *args: os.chmod(disk, 0o600)
        return image

    def test_write_root(self):
        image = self._image()
        with mock.patch.object(vm_state, 'write') as write:
            self._boot().write_root(image)
        path, stream, capacity, backing, name = write.mock_calls[0].args
        self.assertEqual((image.path, 1 << 30, ('/base', 'raw'), 'live'),
                         (path, capacity, backing, name))
        self.assertEqual((self.path, 4), (stream.path, stream.length))
        self.checked_base.assert_called_once_with('/base')

    def test_nobody_else_reads_the_memory(self):
        """Not even who had the disk open before it was there."""
        image, modes = self._image(), []

        def write(path, *args):
            modes.append(os.stat(path).st_mode & 0o777)
            return vm_state.Stream(path, 4, 4)
        with mock.patch.object(vm_state, 'write', side_effect=write):
            self._boot().write_root(image)
        image.make_private.assert_called_once_with('/base', 'raw', 1 << 30)
        self.assertEqual([0o600], modes)

    def test_one_after_the_other(self):
        """Each sees what the one before has left of the room."""
        image = self._image()
        with mock.patch.object(vm_state, 'write') as write, mock.patch(
                'oslo_concurrency.lockutils.lock') as lock, mock.patch.object(
                    memory_file, 'check_room') as check:
            for call in (check, write):
                call.side_effect = lambda *args: self.assertEqual(
                    (1, 0), (lock.return_value.__enter__.call_count,
                             lock.return_value.__exit__.call_count))
            self._boot().write_root(image)
            write.assert_called_once()
            lock.return_value.__exit__.assert_called_once()

    def test_write_root_without_room(self):
        """The disks of other guests may be in that file system, too."""
        image = self._image()
        get_info = self.useFixture(fixtures.MockPatch(
            'nova.virt.libvirt.utils.get_fs_info',
            return_value={'free': memory_file.RESERVE + 3})).mock
        with mock.patch.object(vm_state, 'write') as write:
            self._assert_unusable('make room in %s' % self.folder,
                                  self._boot().write_root, image)
            write.assert_not_called()
            image.make_private.assert_not_called()
            get_info.return_value['free'] += 1
            self._boot().write_root(image)
            write.assert_called_once()
        get_info.assert_called_with(self.folder)

    def test_write_root_over_a_base_that_is_none(self):
        image = self._image()
        self.checked_base.side_effect = exception.BaseImageMisplaced(
            file='/base', cache='/c', host='h', mark='m')
        with mock.patch.object(vm_state, 'write') as write:
            self.assertRaises(exception.BaseImageMisplaced,
                              self._boot().write_root, image)
        write.assert_not_called()

    def test_write_root_that_is_raw(self):
        """It may hold whatever its user has written."""
        image = self._image()
        image.driver_format = 'raw'
        self._assert_unusable('use_cow_images', self._boot().write_root,
                              image)
        vm_state.read.assert_not_called()

    def test_write_root_of_another_size(self):
        self._assert_unusable('root disk', self._boot().write_root,
                              self._image(size=2 << 30))

    def test_write_root_that_is_no_overlay(self):
        self._assert_unusable('use_cow_images', self._boot().write_root,
                              self._image(base=None))

    def test_define(self):
        made = refusal.parse(self._boot().define(test_definition.WANTED))
        self.assertEqual(test_definition.OWN, made.findtext('uuid'))
        self._assert_unusable(
            '524288 here', self._boot().define,
            test_definition.WANTED.replace('262144', '524288'))

    def _written(self):
        """One whose root disk has the memory, and that path."""
        image, live = self._image(), self._boot()

        def write(path, *args):
            with open(path, 'wb') as f:
                f.write(b'disk' + b'QEVM' + b'more')
            return vm_state.Stream(path, 4, 4)
        with mock.patch.object(vm_state, 'write', side_effect=write):
            live.write_root(image)
        return live, image.path

    def test_start(self):
        guest = mock.Mock()
        live, _path = self._written()
        xml = live.define(test_definition.WANTED)
        live.start(guest, xml)
        snapshot = refusal.parse(
            guest.go_on_from_snapshot.mock_calls[0].args[0])
        self.assertEqual(test_definition.OWN,
                         snapshot.findtext('domain/uuid'))

    def test_memory_is_taken_out(self):
        """QEMU leaves it in the disk, and shows it to a guest whose disk
        grows.
        """
        guest = mock.Mock()
        live, path = self._written()

        def go_on(_xml, loaded):
            # It is QEMU's to read.
            with open(path, 'rb') as f:
                self.assertIn(b'QEVM', f.read())
            self.assertEqual(0o600, os.stat(path).st_mode & 0o777)
            loaded()
            with open(path, 'rb') as f:
                self.assertEqual(b'disk' + bytes(4) + b'more', f.read())
            # Nova reads it as QEMU's.
            self.assertEqual(0o644, os.stat(path).st_mode & 0o777)
        guest.go_on_from_snapshot.side_effect = go_on
        live.start(guest, live.define(test_definition.WANTED))
        guest.go_on_from_snapshot.assert_called_once()

    def test_memory_is_taken_out_of_what_is_qemus(self):
        guest = mock.Mock()
        guest.go_on_from_snapshot.side_effect = lambda xml, loaded: loaded()
        live, path = self._written()
        with mock.patch('os.access', return_value=False), mock.patch(
                'nova.privsep.storage.wipe') as wipe:
            live.start(guest, live.define(test_definition.WANTED))
        wipe.assert_called_once_with(path, 4, 4, 0o644)

    def test_start_fails(self):
        """There is no other start in its place."""
        guest = mock.Mock()
        guest.go_on_from_snapshot.side_effect = fakelibvirt.libvirtError(
            'Size mismatch: pc.ram')
        live, _path = self._written()
        self._assert_unusable(
            'Size mismatch: pc.ram', live.start, guest,
            live.define(test_definition.WANTED))
        self.assertEqual(1, len(guest.mock_calls))

    def test_give_devices(self):
        guest = mock.Mock()
        self._boot().give_devices(guest, test_definition.WANTED)
        cdrom, nic = guest.mock_calls
        self.assertEqual('change_media', cdrom[0])
        wanted = refusal.parse(test_definition.WANTED)
        self.assertEqual(
            etree.tostring(wanted.find("devices/disk[@device='cdrom']"),
                           encoding='unicode'), cdrom.args[0].to_xml())
        self.assertEqual(
            mock.call.attach_device(mock.ANY, persistent=True, live=True),
            nic)
        self.assertIn('fa:16:3e:00:00:02', nic.args[0].to_xml())
