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

"""Servers on volume groups of several hosts, and between those and files."""

import os
import shutil

import fixtures
from oslo_utils import units

from nova.tests.fixtures import libvirt_storage
from nova.tests.functional.libvirt import storage_pools

VOLUME_GROUP = (
    "<pool type='logical'><name>nova-disks-pool</name><source><name>vg</name>"
    "</source><target><path>/dev/vg</path></target></pool>")
ALL = dict.fromkeys(('disk', 'disk_eph0', 'disk_swap', 'disk_config'), 'raw')
NAMES = ['disk', 'disk.config', 'disk.eph0', 'disk.swap']


class Devices(libvirt_storage.RealFileSystem):
    """A host's files, and the devices of its volume group.

    :param group: function which returns the VolumeGroup
    """

    def __init__(self, group):
        super().__init__()
        self._group = group

    def open(self, path):
        if not path.startswith('/dev/vg/'):
            return super().open(path)
        try:
            return self._group().devices[os.path.basename(path)]
        except KeyError:
            raise FileNotFoundError(path)


class GroupsTestBase(storage_pools.StoragePoolsTestBase):

    #: those whose disks are logical volumes; the others' are raw files
    with_groups = {'compute1', 'compute2'}

    def setUp(self):
        super().setUp()
        self.flags(force_config_drive=True, use_cow_images=False)
        self.flags(storage_raw_files=True, group='libvirt')
        for name, play in (
                ('fs.lvorigins', lambda vg: self._group().lvorigins(vg)),
                ('fs.vginfo', lambda vg: self._group().vginfo(vg)),
                ('fs.lvextents', lambda path: self._group().extents(
                    os.path.basename(path))),
                ('fs.lvextend', lambda path, size, extents: (
                    self._group().extend(
                        os.path.basename(path), size, extents))),
                ('storage.sync', lambda path: None)):
            self.useFixture(fixtures.MonkeyPatch('nova.privsep.' + name, play))
        self.programs.file_system = Devices(self._group)
        for host in ('compute1', 'compute2'):
            self.start_compute(host)

    def _group(self):
        return self.group(self.hosts.current)

    def group(self, host):
        return self.connections[host].volume_group('vg')

    def _get_connection(self, *args, **kwargs):
        connection = super()._get_connection(*args, **kwargs)
        if kwargs['hostname'] in self.with_groups:
            connection.storagePoolDefineXML(VOLUME_GROUP)
        return connection

    def boot_with_all(self):
        server = self.boot(ephemeral=1, swap=64)
        for name in ('disk', 'disk.eph0'):
            self.write('compute1', server, name, b'of the guest')
        return server

    def assert_settled(self, server, host):
        """Check a server that is on a host, with nothing on the other one."""
        (other,) = {*self.connections} - {host}
        self.assert_ready(host, server, **ALL)
        self.assert_written(host, server)
        self.assertEqual(NAMES, self.volumes(host, server))
        self.assert_nothing_left(server, other)
        if other in self.with_groups:
            self.assertEqual({}, self.group(other).devices)
        self.assertEqual({None}, {
            record.previous for record in self.records(server).values()})

    def assert_written(self, host, server):
        self.assertEqual(storage_pools.CONTENT[:512],
                         self.content(host, server, 'disk'))
        for name in ('disk', 'disk.eph0'):
            self.assertEqual(b'of the guest', self.content(
                host, server, name, 12, storage_pools.GUEST), name)

    def assert_whole(self, host):
        """Of a volume with less room the guest loses what it writes."""
        self.assertEqual({None}, {
            device.room for device in self.group(host).devices.values()})

    def assert_without_ssh(self):
        self.assertFalse([command for command in self.programs.executed
                          if command[0] in ('ssh', 'scp', 'rsync')])


class TestBetweenGroups(GroupsTestBase):

    def test_migrate_and_confirm(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.assert_ready('compute2', server, **ALL)
        self.assert_written('compute2', server)
        self.assert_whole('compute2')
        # What a revert would bring back
        self.assertEqual(NAMES, self.volumes('compute1', server))
        self._confirm_resize(server)
        self.assert_settled(server, 'compute2')
        self.assert_without_ssh()
        self._reboot_server(server, hard=True)
        self.assert_settled(server, 'compute2')
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_settled(server, 'compute1')
        self._delete_server(server)
        self.assert_nothing_left(server)
        self.assertEqual({}, self.group('compute1').devices)

    def test_revert(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.write('compute2', server, 'disk', b'lost')
        self._revert_resize(server)
        self.assert_settled(server, 'compute1')
        self._reboot_server(server, hard=True)
        self.assert_settled(server, 'compute1')

    def test_resize(self):
        server = self.boot_with_all()
        self._resize_server(
            server, self.flavor(disk=2, ephemeral=1, swap=64))
        self.assert_written('compute2', server)
        self.assert_whole('compute2')
        self.assertEqual(2 << 30, self.group('compute2').devices[
            server['id'] + '_disk'].length)
        self.assertEqual(1 << 30, self.group('compute1').devices[
            server['id'] + '_disk'].length)
        self._confirm_resize(server)
        self.assert_settled(server, 'compute2')
        self.assertEqual(2 << 30, self.records(server)['disk'].size)

    def test_revert_of_a_resize(self):
        server = self.boot_with_all()
        self._resize_server(
            server, self.flavor(disk=2, ephemeral=1, swap=128))
        self._revert_resize(server)
        self.assert_settled(server, 'compute1')
        self.assertEqual(1 << 30, self.records(server)['disk'].size)

    def test_delete_while_it_waits(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self._delete_server(server)
        self.assert_nothing_left(server)
        for host in self.connections:
            self.assertEqual({}, self.group(host).devices, host)

    def test_inventory(self):
        """Whole extents of the group, and what an operator adds to it."""
        self.group('compute1').capacity = 7 << 30
        self._run_periodics()
        uuid = self._get_provider_uuid_by_host('compute1')
        self.assertEqual(
            7, self._get_provider_inventory(uuid)['DISK_GB']['total'])


class TestOneHost(GroupsTestBase):
    """A resize on a host keeps the volume of before beside the new one."""

    def setUp(self):
        super().setUp()
        self.flags(allow_resize_to_same_host=True)
        (service,) = self.api.get_services(
            host='compute2', binary='nova-compute')
        self.api.put_service(service['id'], {'status': 'disabled'})

    def test_confirm(self):
        server = self.boot_with_all()
        self._resize_server(
            server, self.flavor(disk=2, ephemeral=1, swap=64))
        self.assert_whole('compute1')
        self.assert_written_in(server)
        self._confirm_resize(server)
        self.assertEqual(4, len(self.group('compute1').devices))
        self.assert_written_in(server)
        self.assertEqual(2 << 30, self.device(server).length)
        self._delete_server(server)
        self.assertEqual({}, self.group('compute1').devices)

    def test_revert(self):
        server = self.boot_with_all()
        self._resize_server(
            server, self.flavor(disk=2, ephemeral=1, swap=64))
        self._revert_resize(server)
        self.assert_settled(server, 'compute1')
        self.assertEqual(1 << 30, self.device(server).length)

    def device(self, server):
        return self.group('compute1').devices[
            self.records(server)['disk'].volume]

    def assert_written_in(self, server):
        self.assertEqual(b'of the guest', self.device(server).read(
            storage_pools.GUEST, 12))


class TestIntoGroup(GroupsTestBase):
    """From a directory into a volume group, and back."""

    with_groups = {'compute2'}

    def test_there_and_back_again(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self.assert_ready('compute2', server, **ALL)
        self.assert_whole('compute2')
        self._confirm_resize(server)
        self.assert_settled(server, 'compute2')
        self._migrate_server(server)
        self._confirm_resize(server)
        self.assert_settled(server, 'compute1')
        # What is zeroes in the volume is a hole of the file.
        self.assertLess(self.config_of(
            'compute1', server, 'disk').allocation, 512 * units.Mi)
        self.assert_without_ssh()

    def test_revert(self):
        server = self.boot_with_all()
        self._migrate_server(server)
        self._revert_resize(server)
        self.assert_settled(server, 'compute1')


class TestFilesStay(GroupsTestBase):
    """Servers from before whose hosts have volume groups for new disks."""

    images_types = {'compute1': 'qcow2', 'compute2': 'qcow2'}

    def copy(self, source, target, *args, **kwargs):
        target = target.replace(self.directories[self.source],
                                self.directories[self.dest])
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(source, target)

    def migrate(self, server, source, dest):
        self.source, self.dest = source, dest
        self._migrate_server(server)
        self._confirm_resize(server)
        records = self.records(server)
        self.assertEqual(
            {dest}, {record.host for record in records.values()})
        self.assertFalse(
            {record.backend for record in records.values()} -
            {'flat', 'qcow2'})
        for host in self.connections:
            self.assertEqual({}, self.group(host).devices)
        self._reboot_server(server, hard=True)
        self.assertLessEqual(
            {'disk', *records}, set(os.listdir(self.instance_path(
                dest, server))))

    def test_migrate(self):
        """There and back: what is made anew is a file as well."""
        server = self.boot(ephemeral=1, swap=64)
        for host in self.connections:
            self.set_option(host, 'images_type', 'libvirt-storage')
            self.restart_compute_service(host)
        self._reboot_server(server, hard=True)
        self.stub_remote_files()
        self.stub_out('nova.virt.libvirt.utils.copy_image', self.copy)
        self.migrate(server, 'compute1', 'compute2')
        self.migrate(server, 'compute2', 'compute1')


class RefusedTestBase(storage_pools.Refusals, GroupsTestBase):

    def refuse(self, server, *words):
        super().refuse(server, *words)
        self.assertEqual({}, self.group('compute2').devices)


class TestRefusedIntoGroup(RefusedTestBase):

    with_groups = {'compute2'}

    def test_qcow2(self):
        self.flags(use_cow_images=True)
        self.flags(storage_raw_files=False, group='libvirt')
        server = self.boot()
        before = self.guest_disks('compute1', server)
        self.refuse(server, 'choose another host', 'takes raw disks alone')
        self.assertEqual(before, self.guest_disks('compute1', server))


class TestRefusedFull(RefusedTestBase):

    def test_group_is_full(self):
        """By what the source needs; a scheduler asks for less."""
        server = self.boot_with_all()
        self.group('compute2').capacity = 1 << 30
        self.refuse(server, 'make room')
        self.assert_settled(server, 'compute1')
