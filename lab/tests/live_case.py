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
"""What the scenarios of live migration have in common."""

import contextlib
import json
import os
import shutil
import time
from xml.etree import ElementTree

import libvirt

from lab import config
from lab.cloud import database
from lab.host import Host
from lab.tests import test_cloud_moves
from lab.tests.cloud_case import MIB

POOL = test_cloud_moves.POOL
OTHER = {'host-a': 'host-b', 'host-b': 'host-a'}

# The guest has the config drive mounted since it was started.
MOUNT = ('umount /config 2>/dev/null; sync; '
         'echo 3 >/proc/sys/vm/drop_caches; ')
READ_CONFIG = MOUNT + (
    'mount -t %s -o ro /dev/%s /config && cd /config && '
    'find . -type f | sort | xargs sha256sum | sha256sum | sed "s/ .*//"')


class LiveCase(test_cloud_moves.MovesCase):
    """Servers that move while their guests write.

    :cvar live_rate: MiB a second of one disk's copy, then of the memory; 0: no
        limit
    :cvar growth: by what share a disk may take more room after a move
    :cvar slack: bytes that a guest may write during a move and a look at it
    :cvar instances: the directory of the hosts in which instances' are
    """

    rate = None
    live_rate = 0
    growth = 1.05
    slack = 2 * MIB
    instances = '/var/lib/nova/instances'

    @classmethod
    def rates(cls):
        return {**super().rates(), 'live_migration_bandwidth': cls.live_rate}

    @classmethod
    def share(cls, mount):
        """Mount one directory on both hosts, as a network file system.

        libvirt goes by the type, and this is one that it takes for shared.
        """
        cls.folder = config.STATE / 'shared-live'
        cls.folder.mkdir(exist_ok=True)
        cls.folder.chmod(0o755)
        for host in (cls.a, cls.b):
            host.path(mount).mkdir(exist_ok=True)
            host.start('bindfs', [
                'bindfs', '-f', '-o', 'allow_other,subtype=glusterfs,'
                'fsname=lab', cls.folder, mount])
            host.wait(lambda: ' %s fuse.glusterfs ' % mount in host.run(
                ['cat', '/proc/mounts']).stdout, 10, 'mounted', 'bindfs')

    @classmethod
    def unshare(cls):
        for host in (cls.a, cls.b):
            host.stop('bindfs')
            host.forget('bindfs')
        shutil.rmtree(cls.folder, ignore_errors=True)

    @staticmethod
    def forget_pools(host):
        """Let the host's compute make its pools anew when it starts."""
        with contextlib.closing(host.connect()) as connection:
            for pool in connection.listAllStoragePools():
                if pool.isActive():
                    pool.destroy()
                pool.undefine()

    def writing_server(self, **more):
        """A server on host-a whose guest writes all the time."""
        server, said = self.server(**more)
        server.command('keep-writing', 256)
        return server, said

    # -- doing it

    def begin(self, server, host='host-b'):
        server.api.live_migrate_server(
            server.id, host=host, block_migration='auto')

    def settled(self, server, limit=300):
        found = server.wait('ACTIVE', 'PAUSED', 'SHUTOFF', 'ERROR',
                            limit=limit)
        # Its guest has not been off, whatever its new console has not seen.
        server.stay_awake()
        return found

    def recovered(self, server):
        """Wait until nothing is under way, and go on with the server.

        Nova puts it in ERROR when libvirt has failed, rolled back or not;
        whether it has one guest is what the scenarios look at.
        """
        found = self.settled(server)
        if found.status == 'ACTIVE':
            # After a failure it is so for a moment, when the guest is what
            # it was; then Nova calls it an error.
            with contextlib.suppress(AssertionError):
                self.wait_for(lambda: server.get().status == 'ERROR', 10,
                              'an error')
            found = server.get()
        if found.status == 'ERROR':
            server.api.reset_server_state(server.id, 'active')
            found = server.wait('ACTIVE')
        return found

    def live(self, server, host, state='ACTIVE'):
        """Migrate live.

        :returns: seconds until the API has said that it is there
        """
        start = time.monotonic()
        self.begin(server, host)
        found = self.settled(server)
        took = time.monotonic() - start
        if found.compute_host != host:
            self.fail('%s is %s on %s, not on %s: %s' % (
                server.id, found.status, found.compute_host, host,
                self.fault(server)))
        self.assertEqual(state, found.status)
        return took

    def newest_migration(self, server):
        """The id of the live migration that is under way."""
        return self.wait_for(lambda: next(
            (m.id for m in server.api.server_migrations(server.id)
             if m.status == 'running'), None), what='a running migration')

    # -- what a host has

    def runs_on(self, server) -> list[str]:
        """The hosts on which the guest is alive."""
        found = []
        for name in config.HOSTS:
            with contextlib.closing(Host(name).connect()) as connection:
                if server.id in [
                        domain.UUIDString()
                        for domain in connection.listAllDomains(
                            libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)]:
                    found.append(name)
        return found

    def sources(self, server, inactive=False) -> dict[str, tuple]:
        """By target: what libvirt has of a disk, (type, name, format)."""
        with server.domain() as domain:
            xml = domain.XMLDesc(2 if inactive else 0)
        return {disk.find('target').get('dev'): (
            disk.get('type'), (disk.find('source').get('volume') or
                               disk.find('source').get('file')),
            disk.find('driver').get('type'))
            for disk in ElementTree.fromstring(xml).findall('devices/disk')}

    def allocation(self, server, host) -> dict[str, int]:
        """Bytes that each volume takes, by disk."""
        return {path.name.partition('_')[2].rstrip('.0123456789'):
                path.stat().st_blocks * 512
                for path in Host(host).path(
                    self.instances + '/disks').iterdir()
                if path.name.startswith(server.id)}

    # -- what must be so

    def assert_here(self, server, host, before, status='ACTIVE', copied=True):
        """It runs on a host, as it has run all along, with all it has.

        :param before: a testimony from before the move
        :param copied: whether the other host has no part in its disks
        :returns: what its guest says now
        """
        found = server.get()
        self.assertEqual((status, host), (found.status, found.compute_host))
        self.assertEqual([host], self.runs_on(server))
        config_drive = server.command(
            'sh', READ_CONFIG % (before.config['format'],
                                 before.config['device'])).strip()
        self.assertEqual(before.config['files'], config_drive,
                         'the config drive has changed')
        said = server.look()
        self.assertEqual((before.boot_id, before.boot),
                         (said.boot_id, said.boot))
        self.assert_kept(said)
        self.assertEqual(before.swap, said.swap)
        self.assertEqual(
            {name: disk['bytes'] for name, disk in before.disks.items()},
            {name: disk['bytes'] for name, disk in said.disks.items()})
        self.assert_writes(server, max(before.written, 1))
        self.assert_on_record(server, host)
        self.assert_volumes(server, host)
        if copied:
            self.wait_for(lambda: not server.left_on(OTHER[host]), 60,
                          'a clean %s' % OTHER[host])
        return said

    def assert_writes(self, server, than):
        """What the guest counts goes on."""
        counts = []

        def grows():
            counts.append(int(server.command(
                'sh', 'cat /data/written || echo 0')))
            return counts[-1] > max(than - 1, counts[0])

        self.wait_for(grows, 60, 'another write')

    def assert_on_record(self, server, host):
        found = database.records(self.cloud, server.id)
        self.assertTrue(found)
        for name, record in found.items():
            self.assertEqual(
                ('libvirt-storage', 'ready', host, None, None),
                (record['backend'], record['state'], record['host'],
                 record.get('previous'), record.get('next')), name)

    def assert_volumes(self, server, host):
        """The guest's next start is from volumes, over its host's base."""
        live = self.sources(server)
        inactive = self.sources(server, inactive=True)
        self.assertEqual(live.keys(), inactive.keys())
        for name, (kind, volume, form) in inactive.items():
            self.assertEqual('volume', kind, name)
            self.assertIn(server.id, volume)
            self.assertEqual(volume, os.path.basename(live[name][1]), name)
            self.assertEqual(form, live[name][2], name)
        for path in Host(host).path(self.instances + '/disks').iterdir():
            if not path.name.startswith(server.id + '_'):
                continue
            info = json.loads(Host(host).run(
                ['qemu-img', 'info', '--force-share', '--output=json',
                 '%s/disks/%s' % (self.instances, path.name)]).stdout)
            backing = info.get('backing-filename')
            if backing and info['format'] == 'qcow2':
                self.assertTrue(
                    backing.startswith(self.instances + '/_base/'), backing)
                self.assertTrue(Host(host).path(backing).exists(), backing)

    def assert_no_growth(self, before, after):
        """No disk takes more than a twentieth more room.

        :param before, after: what allocation() has said
        """
        self.assertEqual(before.keys(), after.keys())
        for name, taken in after.items():
            self.assertLessEqual(
                taken, before[name] * self.growth + self.slack, name)

    def assert_moves(self, server, before, hosts=None):
        """The next two moves succeed and leave nothing over."""
        home = server.host
        for host in (OTHER[home], home) if hosts is None else hosts:
            # A fault may have kept it from reporting.
            self.cloud.wait_computes([host])
            self.live(server, host)
            before = self.assert_here(server, host, before)
        return before
