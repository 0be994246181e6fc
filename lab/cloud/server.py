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

"""A server as a scenario sees it: its API, its guest and what it leaves.

Every method that changes the server waits until the change is done and raises
:class:`ServerError` with the fault when it is not.
"""

import base64
import contextlib
import itertools
import json
import os
import time

import libvirt
import openstack.exceptions

from ..errors import LabError
from ..guest import testimony as words
from ..host import Host
from ..machine import Machine

POLL = .4  # seconds


class ServerError(LabError):
    """A server did not come to where it was sent; says where it is."""


class NoReply(ServerError):
    """A guest does not answer at its console."""


class Server:
    """One server.

    :param cloud: the Cloud
    :param id: its UUID
    """

    _numbers = itertools.count(1)

    def __init__(self, cloud, id):
        self.cloud = cloud
        self.id = id
        self.watch = lambda server: None  # called with what wait() sees
        self._awake = False  # it listens though its console says nothing

    # -- the API

    @property
    def api(self):
        return self.cloud.conn.compute

    def get(self):
        """The server as openstacksdk has it, fresh."""
        return self.api.get_server(self.id)

    @property
    def host(self) -> str:
        return self.get().compute_host

    def wait(self, *states, limit=180):
        """Wait until it is in one of these states and nothing is under way.

        :param limit: seconds
        """
        until = time.monotonic() + limit
        while True:
            server = self.get()
            self.watch(server)
            if server.status in states and not server.task_state:
                return server
            # One in ERROR that is rebooted is so until it runs.
            if (server.status == 'ERROR' and not server.task_state and
                    'ERROR' not in states):
                raise ServerError('%s is in ERROR: %s' % (
                    self.id, (server.fault or {}).get('message')))
            if time.monotonic() > until:
                raise ServerError(
                    '%s is %s (task %s) after %d s, not %s%s' % (
                        self.id, server.status, server.task_state, limit,
                        ' or '.join(states), self._why()))
            time.sleep(POLL)

    def actions(self) -> list:
        """What was done to it, newest first: (action, message)."""
        return [(action.action, action.message)
                for action in self.api.server_actions(self.id)]

    def _why(self):
        failed = ['%s: %s' % pair for pair in self.actions()[:1] if pair[1]]
        return '; ' + failed[0] if failed else ''

    def hard_reboot(self):
        self.api.reboot_server(self.id, 'HARD')
        return self.wait('ACTIVE')

    def soft_reboot(self):
        self.api.reboot_server(self.id, 'SOFT')
        return self.wait('ACTIVE')

    def stop(self):
        self.api.stop_server(self.id)
        return self.wait('SHUTOFF')

    def start(self):
        self.api.start_server(self.id)
        return self.wait('ACTIVE')

    def migrate(self, host=None, limit=180):
        """Migrate cold, until it awaits confirmation."""
        before = self.host
        self.api.migrate_server(self.id, host=host)
        return self._moved(before, 'VERIFY_RESIZE', limit)

    def _moved(self, before, state, limit):
        server = self.wait(state, 'ACTIVE', 'SHUTOFF', limit=limit)
        if server.status != state:
            raise ServerError('%s is %s on %s, it came from %s%s' % (
                self.id, server.status, server.compute_host, before,
                self._why()))
        return server

    def resize(self, flavor, limit=180):
        """Resize until it awaits confirmation.

        :param flavor: name
        """
        before = self.host
        self.api.resize_server(self.id, self.cloud.flavor(flavor).id)
        return self._moved(before, 'VERIFY_RESIZE', limit)

    def confirm(self):
        self.api.confirm_server_resize(self.id)
        return self.wait('ACTIVE', 'SHUTOFF')

    def revert(self):
        self.api.revert_server_resize(self.id)
        return self.wait('ACTIVE', 'SHUTOFF')

    def live_migrate(self, host, limit=240):
        self.api.live_migrate_server(
            self.id, host=host, block_migration='auto')
        server = self.wait('ACTIVE', limit=limit)
        if server.compute_host != host:
            raise ServerError('%s is still on %s%s' % (
                self.id, server.compute_host, self._why()))
        self.stay_awake()
        return server

    def stay_awake(self) -> None:
        """Know that its guest goes on, whatever its console has not seen."""
        self._awake = True

    def rescue(self, image='guest'):
        self.api.rescue_server(
            self.id, image=self.cloud.image(image).id)
        return self.wait('RESCUE')

    def unrescue(self):
        self.api.unrescue_server(self.id)
        return self.wait('ACTIVE')

    def snapshot(self, name):
        """:returns: the image, active"""
        image = self.api.create_server_image(self.id, name)
        until = time.monotonic() + 180
        while (found := self.cloud.conn.image.get_image(image.id)
               ).status != 'active':
            if found.status in ('killed', 'deleted') or (
                    time.monotonic() > until):
                raise ServerError('snapshot %s of %s is %s' % (
                    image.id, self.id, found.status))
            time.sleep(POLL)
        self.wait('ACTIVE', 'SHUTOFF')
        return found

    def rebuild(self, image='guest'):
        self.api.rebuild_server(self.id, self.cloud.image(image).id)
        return self.wait('ACTIVE')

    def shelve(self):
        self.api.shelve_server(self.id)
        return self.wait('SHELVED_OFFLOADED')

    def unshelve(self):
        self.api.unshelve_server(self.id)
        return self.wait('ACTIVE')

    def delete(self):
        """Delete it and wait until it is gone; gone already is fine."""
        self.api.delete_server(self.id, ignore_missing=True)
        until = time.monotonic() + 90
        with contextlib.suppress(openstack.exceptions.NotFoundException):
            while self.api.get_server(self.id):
                if time.monotonic() > until:
                    raise ServerError('%s is still there 90 s after delete'
                                      % self.id)
                time.sleep(POLL)

    # -- the guest

    def console(self) -> str:
        """What the guest has printed since it was started."""
        return self.api.get_server_console_output(self.id)['output'] or ''

    def testimony(self, after=None, limit=240) -> words.Testimony:
        """The newest look of the guest at itself.

        :param after: an earlier testimony: wait for one of a later start
        :param limit: seconds
        """
        until = time.monotonic() + limit
        known = after.boot_id if after else None
        while True:
            console = self.console()
            whole = words.testimonies(console)
            if whole and whole[-1].boot_id != known:
                return whole[-1]
            if words.ready(console) not in (None, known):
                # It has testified, and a line was torn on its way.
                with contextlib.suppress(NoReply):
                    self.command('testify', limit=30)
            if time.monotonic() > until:
                raise ServerError('%s has not testified in %d s; its console '
                                  'ends with:\n%s' % (
                                      self.id, limit, self.console()[-1500:]))
            time.sleep(POLL)

    def command(self, *command, limit=120) -> str:
        """Type a command at the console and wait for the guest's reply.

        :param command: "fill", "data", 16, "seed" and so on; see guest/init
        :returns: its output
        :raises NoReply: the guest does not answer
        :raises ServerError: it could not do it
        """
        number = 'c%d-%d' % (os.getpid(), next(self._numbers))
        line = ' '.join([number, *map(str, command)])
        if not self._awake:
            self._ready(limit)
        for _try in range(3):
            # Typed again, a command that was obeyed has its reply repeated.
            with self._typed(line):
                reply = self._reply(number, limit / 3)
            if reply:
                break
        else:
            raise NoReply(
                'the guest of %s does not answer to "%s"; its console ends '
                'with:\n%s' % (self.id, line, self.console()[-1500:]))
        # From now on its console says so.
        self._awake = False
        if not reply['ok']:
            raise ServerError('the guest of %s could not "%s": %s' % (
                self.id, line, reply['output']))
        return reply['output']

    def _reply(self, number, limit):
        until = time.monotonic() + limit
        while time.monotonic() < until:
            if reply := words.replies(self.console()).get(number):
                return reply
            time.sleep(POLL / 2)

    @property
    def address(self) -> str:
        """Its IPv4 address in the guests' network."""
        return next(address['addr'] for addresses in
                    self.get().addresses.values() for address in addresses
                    if address['version'] == 4)

    def ping(self, limit=60) -> None:
        """Wait until the guest answers the control plane's pings."""
        self._from_control(['busybox', 'ping', '-c', '1', '-W', '1',
                            self.address], limit)

    def ssh(self, *command, limit=60) -> str:
        """Run a command in the guest, from the control plane.

        :param limit: seconds in which the guest must let us in
        :returns: its output
        :raises ServerError: it can't be reached, or the command failed
        """
        return self._from_control(['ssh', self.address, *command], limit)

    def _from_control(self, argv, limit):
        until = time.monotonic() + limit
        while True:
            done = Machine('ctl').run(argv, check=False, timeout=limit)
            if not done.returncode:
                return done.stdout.strip()
            # 255 is ssh's own failure, 1 a ping without an answer.
            if time.monotonic() > until or (
                    argv[0] == 'ssh' and done.returncode != 255):
                raise ServerError('"%s" from the control plane ended with %d '
                                  'for %s: %s; its console ends with:\n%s' % (
                                      ' '.join(argv), done.returncode, self.id,
                                      (done.stdout + done.stderr).strip(),
                                      self.console()[-1500:]))
            time.sleep(POLL)

    def look(self, limit=90) -> words.Testimony:
        """Make the running guest testify anew."""
        known = words.testimonies(self.console())[-1:]
        for _try in range(3):
            # A line of what it says may be torn on its way through qemu.
            with contextlib.suppress(NoReply):
                self.command('testify', limit=limit / 3)
            found = words.testimonies(self.console())[-1:]
            if found != known:
                return found[0]
        raise ServerError('no testimony of %s comes whole through its '
                          'console, which ends with:\n%s' % (
                              self.id, self.console()[-3000:]))

    def _ready(self, limit):
        until = time.monotonic() + limit
        # a guest that came by live migration has obeyed before, at best
        while not any(event['event'] in ('whole', 'ready', 'done')
                      and event.get('id') != 'user-data'
                      for event in words.events(self.console())):
            if time.monotonic() > until:
                raise ServerError('the guest of %s is not ready after %d s; '
                                  'its console ends with:\n%s' % (
                                      self.id, limit, self.console()[-1500:]))
            time.sleep(POLL)

    @contextlib.contextmanager
    def _typed(self, line):
        """Type a line; the console stays open until the reply is there.

        qemu looks once a second whether anybody has opened its pty, and reads
        from it only then.
        """
        with self.domain() as domain:
            stream = domain.connect().newStream()
            domain.openConsole(None, stream,
                               libvirt.VIR_DOMAIN_CONSOLE_FORCE)
            try:
                stream.send(('\n%s\n' % line).encode())
                yield
            finally:
                with contextlib.suppress(libvirt.libvirtError):
                    stream.abort()

    @contextlib.contextmanager
    def domain(self, host=None):
        """Its libvirt domain on a host, by default where the API says."""
        connection = Host(host or self.host).connect()
        try:
            yield connection.lookupByUUIDString(self.id)
        finally:
            connection.close()

    # -- what lies on the hosts

    def left_on(self, host) -> list[str]:
        """All that a host has of this server: paths, domains, volumes."""
        found = []
        root = Machine(host).path('/var/lib/nova')
        for folder, folders, files in os.walk(root):
            for name in folders + files:
                if self.id in name:
                    found.append(os.path.relpath(
                        os.path.join(folder, name), root))
            folders[:] = [name for name in folders if self.id not in name]
        connection = Host(host).connect()
        try:
            found += ['domain ' + domain.name()
                      for domain in connection.listAllDomains()
                      if domain.UUIDString() == self.id]
            for pool in connection.listAllStoragePools(
                    libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE):
                pool.refresh()
                found += ['volume %s/%s' % (pool.name(), volume.name())
                          for volume in pool.listAllVolumes()
                          if self.id in volume.name()]
        finally:
            connection.close()
        return sorted(found)

    def files_on(self, host) -> list[str]:
        """Names in its directory on a host."""
        return sorted(path.name for path in Machine(host).path(
            '/var/lib/nova/instances/' + self.id).iterdir())

    def disk_info(self, host=None) -> dict:
        """Nova's own disk.info file of the server, if it has one."""
        path = Machine(host or self.host).path(
            '/var/lib/nova/instances/%s/disk.info' % self.id)
        return json.loads(path.read_text()) if path.exists() else {}


def encode_user_data(script: str) -> str:
    return base64.b64encode(script.encode()).decode()
