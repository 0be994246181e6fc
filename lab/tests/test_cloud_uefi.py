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

"""Servers with UEFI firmware, whose variables are a file beside the disks."""

from lab.cloud.server import ServerError
from lab.host import Host
from lab.tests import cloud_case
from lab.tests import test_cloud_servers

# libvirt 9.0 refuses Nova 34's own XML, with or without the series: a <loader>
# with the attribute "secure" beside <os firmware="efi">. 11.3 takes it.
REFUSED = "'secure' cannot be specified when firmware autoselection"
NVRAM = '/var/lib/libvirt/qemu/nvram'
VARIABLE = '/run/efi/%s-4c616220-6f66-204e-6f76-612c20554546'
MOUNT = 'mkdir -p /run/efi; mount -t efivarfs efivarfs /run/efi; '


class UefiCase:
    """Servers that boot by UEFI, or a skip where this libvirt can't."""

    lab = cloud_case.SERIES
    bigger = 'lab.uefi.bigger'

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        compute = cls.cloud.conn.compute
        cls.flavors = [compute.create_flavor(
            name='lab.uefi' + name, ram=256, vcpus=1, disk=disk, ephemeral=1,
            swap=64) for name, disk in (('', 1), ('.bigger', 2))]

    @classmethod
    def tearDownClass(cls):
        for flavor in cls.flavors:
            cls.cloud.conn.compute.delete_flavor(flavor)
        super().tearDownClass()

    def boot(self, name='server', **more):
        # The firmware takes more memory than others have.
        more['flavor'] = (self.bigger if more.get('flavor') == self.bigger
                          else 'lab.uefi')
        if 'image' not in more:
            more['image'] = self.copy_image(
                'uefi-' + self.id().rpartition('.')[2][:40],
                hw_firmware_type='uefi', hw_machine_type='q35',
                # The guest's kernel has no driver for q35's SATA.
                hw_cdrom_bus='scsi', hw_scsi_model='virtio-scsi').id
        try:
            return super().boot(name, **more)
        except ServerError:
            if REFUSED in self.service_log('host-a'):
                self.skipTest('this libvirt refuses the XML of Nova 34 for '
                              'UEFI: loader with secure=')
            raise

    # -- what the guest keeps in the firmware

    def write_variable(self, server, name, text):
        server.command('sh', MOUNT + "printf '\\007\\0\\0\\0%s' > %s" % (
            text, VARIABLE % name))

    def variables(self, server):
        """By name; those of the lab."""
        told = server.command(
            'sh', MOUNT + 'for v in one two; do f=%s; [ -e $f ] && '
            'echo $v $(tail -c +5 $f); done; true' % (VARIABLE % '$v'))
        return dict(line.split() for line in told.splitlines())

    def nvram_on(self, server, host):
        """Files of its firmware on a host."""
        names = Host(host).path(NVRAM)
        with server.domain() as domain:
            wanted = domain.name() + '_VARS'
        return sorted(path.name.removeprefix(wanted)
                      for path in names.iterdir()
                      if path.name.startswith(wanted))


class TestUefi(UefiCase, test_cloud_servers.TestPool):
    """All that a server does, and does it keep its variables?"""

    flavor = 'lab.uefi'

    def test_hard_reboot(self):
        server, before = self.server()
        self.assertEqual(1, len(self.nvram_on(server, 'host-a')))
        self.write_variable(server, 'one', 'alpha')
        server.hard_reboot()
        self.assert_kept(server.testimony(after=before))
        self.assertEqual({'one': 'alpha'}, self.variables(server))

    def test_migrate_revert(self):
        server, before = self.server()
        self.write_variable(server, 'one', 'alpha')
        server.migrate('host-b')
        there = server.testimony(after=before)
        self.assert_kept(there)
        self.assertEqual({'one': 'alpha'}, self.variables(server))
        self.write_variable(server, 'two', 'beta')
        server.revert()
        back = server.testimony(after=there)
        self.assert_kept(back)
        # As it was before.
        self.assertEqual({'one': 'alpha'}, self.variables(server))
        self.assertEqual([], self.nvram_on(server, 'host-b'))
        self.assert_only_on(server, 'host-a', 'host-b')

    def test_migrate_confirm(self):
        server, before = self.server()
        self.write_variable(server, 'one', 'alpha')
        server.migrate('host-b')
        there = server.testimony(after=before)
        server.confirm()
        self.assert_kept(there)
        self.assertEqual([], self.nvram_on(server, 'host-a'))
        self.assert_only_on(server, 'host-b', 'host-a')
        server.hard_reboot()
        self.assert_kept(server.testimony(after=there))
        self.assertEqual({'one': 'alpha'}, self.variables(server))
        server.delete()
        self.assertEqual([], [
            path.name for path in Host('host-b').path(NVRAM).iterdir()])

    def test_resize_grow(self):
        server, before = self.server()
        self.write_variable(server, 'one', 'alpha')
        server.resize(self.bigger)
        server.confirm()
        said = server.testimony(after=before)
        self.assertEqual(2 * cloud_case.GIB, said.own['bytes'])
        self.assert_kept(said)
        self.assertEqual({'one': 'alpha'}, self.variables(server))
        self.assertEqual([], self.nvram_on(server, 'host-a'))

    def test_rescue(self):
        server, before = self.server()
        self.write_variable(server, 'one', 'alpha')
        server.rescue()
        said = server.testimony(after=before)
        self.assertEqual(1, said.boot)
        server.unrescue()
        self.assert_kept(server.testimony(after=said))
        self.assertEqual({'one': 'alpha'}, self.variables(server))

    def test_migrate_when_off(self):
        server, before = self.server()
        self.write_variable(server, 'one', 'alpha')
        server.stop()
        server.migrate('host-b')
        server.confirm()
        server.start()
        self.assert_kept(server.testimony(after=before))
        self.assertEqual({'one': 'alpha'}, self.variables(server))


class TestUefiTransition(UefiCase, test_cloud_servers.TestTransition):
    """Legacy disks of such servers become volumes."""

    def test_migrate(self):
        server, before = self.legacy_server()
        self.write_variable(server, 'one', 'alpha')
        server.migrate('host-b')
        said = server.testimony(after=before)
        self.assert_data(said, data=test_cloud_servers.DATA,
                         raw=test_cloud_servers.EPHEMERAL)
        self.assertEqual({'one': 'alpha'}, self.variables(server))
        server.confirm()
        self.assert_moved(server, 'host-b')
        self.assert_nothing_left(server, 'host-a')

    def test_resize(self):
        self.skipTest('as test_migrate, and TestUefi has it')


load_tests = cloud_case.only_in_full
