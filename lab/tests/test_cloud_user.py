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
"""nova-compute's user, and permissions that an operator gets wrong."""

import contextlib
import dataclasses
import os
import re
import unittest

from lab import config
from lab import nova_user
from lab.cloud import config as cloud_config
from lab.cloud import services
from lab.cloud.cloud import STOP
from lab.cloud.server import ServerError
from lab.host import Host
from lab.tests import cloud_case

IN_FULL = unittest.skipUnless(os.environ.get('LAB_SCENARIOS') == 'all',
                              'LAB_SCENARIOS=all runs this')
SCRIPT = 'boot 1: fill data 4 alpha\n'
DATA = {'data': ('alpha', 4)}
KEY = '/etc/pki/libvirt/private/clientkey.pem'
INSTANCES = '/var/lib/nova/instances'
SUDOERS = '/etc/sudoers.d/nova-common'
SOCKET = '/run/libvirt/libvirt-sock'
PRIVATE = '/var/lib/nova/private'
POOL = ('<pool type="dir"><name>private</name><target><path>%s</path>'
        '</target></pool>' % PRIVATE)


class UserCase(cloud_case.CloudTestCase):

    lab = cloud_case.SERIES
    images_type = 'libvirt-storage'

    def move_to_and_fro(self):
        """Boot, migrate, revert, migrate, confirm, hard reboot, delete."""
        server = self.boot(flavor='lab.small.disks', script=SCRIPT)
        said = server.testimony()
        for end in (server.revert, server.confirm):
            server.migrate('host-b')
            said = server.testimony(after=said)
            self.assert_data(said, **DATA)
            end()
            if end == server.revert:
                said = server.testimony(after=said)
                self.assert_data(said, **DATA)
                self.assert_nothing_left(server, 'host-b')
        self.assert_nothing_left(server, 'host-a')
        server.hard_reboot()
        self.assert_data(server.testimony(after=said), **DATA)
        server.stop()
        server.start()
        server.delete()
        self.assert_nothing_left(server)


class TestUser(UserCase):

    def test_is_nova(self):
        for host in map(Host, config.HOSTS):
            status = {}
            with open('/proc/%d/status' % host.service(
                    'nova-compute').pid) as source:
                for line in source:
                    key, _colon, value = line.partition(':')
                    status[key] = value.split()
            self.assertEqual({str(nova_user.ID)}, set(status['Uid']))
            self.assertEqual(0, int(status['CapEff'][0], 16))
            groups = host.run(['id', '-Gn', 'nova']).stdout.split()
            self.assertEqual(['nova', 'libvirt'], groups)

    def test_key_that_nova_can_not_read(self):
        """Refused while the guest runs, and the log says what to do."""
        server = self.boot()
        before = server.look()
        host = Host('host-a')
        host.run(['chmod', '600', KEY])
        self.addCleanup(host.run, ['chmod', '640', KEY])
        with self.assertRaisesRegex(ServerError, 'is ACTIVE on host-a'):
            server.migrate('host-b')
        advice = 'give %s (-rw------- root:nova) to a group of user nova' % KEY
        self.assertTrue(advice in self.service_log('host-a'),
                        'nova-compute has not said "%s"' % advice)
        self.assertEqual(before.boot_id, server.look().boot_id)
        host.run(['chmod', '640', KEY])
        server.migrate('host-b')
        server.confirm()


class TestPermissions(UserCase):
    """Each made wrong alone: nova-compute doesn't start, and says why."""

    def setUp(self):
        super().setUp()
        self.host = Host('host-a')

    def assert_refused(self, said, *mend):
        """Start it, read its log, do what that says, start it again.

        :param said: regular expression
        :param mend: a command
        """
        self.host.stop('nova-compute', timeout=STOP)
        log = self.cloud.compute_log('host-a')
        before = log.stat().st_size
        service = services.nova_compute(self.cloud.layout, 'host-a')
        self.host.start('nova-compute', service.argv, env=service.env)

        def tells():
            with open(log, errors='replace') as file:
                file.seek(before)
                self.told = file.read()
            return re.search(said, self.told)

        try:
            self.host.wait(tells, 60, 'refused with: ' + said)
            self.assertNotIn(services.CONSUMING, self.told)
        finally:
            self.host.run(mend)
            # With native threads it waits for its thread pools for ever.
            self.cloud.restart('host-a', 'nova-compute')

    def test_pool(self):
        self.host.run(['install', '-d', '-o', 'root', '-g', 'libvirt-qemu',
                       '-m', '0750', PRIVATE])
        overrides = self.cloud.layout.overrides('host-a')
        with contextlib.closing(self.host.connect()) as connection:
            pool = connection.storagePoolDefineXML(POOL)
            pool.create()
        cloud_config.set_option(
            overrides, 'libvirt', 'storage_disks_pool', 'private')
        try:
            self.assert_refused(
                'Allow it by setfacl -m u:nova:x %s[.] User nova can not use '
                'storage pool private on host host-a: %s is drwxr-x--- '
                'root:[a-z-]+' % (PRIVATE, PRIVATE),
                'setfacl', '-m', 'u:nova:x', PRIVATE)
        finally:
            self.cloud.set('host-a', 'libvirt', 'storage_disks_pool',
                           'nova-disks-pool')
            with contextlib.closing(self.host.connect()) as connection:
                pool = connection.storagePoolLookupByName('private')
                pool.destroy()
                pool.undefine()

    def test_instances_directory(self):
        self.host.run(['chown', 'root:root', INSTANCES])
        self.assert_refused(
            'Give user nova the permissions rwx for %s on host host-a, which '
            'is drwxr-xr-x root:root' % INSTANCES,
            'chown', 'nova:nova', INSTANCES)

    def test_sudoers(self):
        self.host.run(['mv', SUDOERS, '/root/nova-common'])
        self.assert_refused(
            'Let user nova on host host-a run the command in .nova_sys_admin'
            './helper_command as root, which sudoers',
            'mv', '/root/nova-common', SUDOERS)

    def test_socket(self):
        """Stock Nova's own words are enough."""
        self.host.run(['chmod', '0700', SOCKET])
        self.assert_refused(
            "Failed to connect socket to '.*libvirt-sock': Permission denied",
            'chmod', '0770', SOCKET)


@IN_FULL
class TestQemuSettings(UserCase):
    """What an operator may have in qemu.conf."""

    def run_with(self, *lines):
        for host in map(Host, config.HOSTS):
            path = host.folder / 'etc/libvirt/qemu.conf'
            before = path.read_text()
            self.addCleanup(self.restart, host)
            self.addCleanup(path.write_text, before)
            path.write_text(before + '\n'.join(lines) + '\n')
            self.restart(host)
        self.move_to_and_fro()

    def restart(self, host):
        host.restart('libvirtd')
        host.wait_ready()
        self.cloud.restart(host.name, 'nova-compute')

    def test_owners_are_not_remembered(self):
        """Disks are root's after the guest has run, as on NFS."""
        self.run_with('remember_owner = 0')

    def test_qemu_runs_as_nova(self):
        for host in map(Host, config.HOSTS):
            # Of the user libvirt-qemu, as the packages make them.
            host.run(['chown', '-R', 'nova:nova', '/var/lib/libvirt/qemu',
                      '/var/cache/libvirt/qemu'])
            self.addCleanup(host.run, [
                'chown', '-R', 'libvirt-qemu', '/var/lib/libvirt/qemu',
                '/var/cache/libvirt/qemu'])
        self.run_with('user = "nova"', 'group = "nova"',
                      'dynamic_ownership = 0')


@IN_FULL
class TestUmask(UserCase):

    def test_umask_0027(self):
        """As a hardened unit of systemd has it."""
        layout = self.cloud.layout
        self.addCleanup(self.use, layout)
        self.use(dataclasses.replace(layout, umask='0027'))
        self.move_to_and_fro()

    def use(self, layout):
        self.cloud.layout = layout
        for host in layout.hosts:
            self.cloud.restart(host, 'nova-compute')


if __name__ == '__main__':
    unittest.main()
