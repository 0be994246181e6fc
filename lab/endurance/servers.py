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
"""A server of the soak: what is done to it, and what it must still have."""

import contextlib
import itertools
import re
import tempfile
import time

import libvirt
import openstack.exceptions

from ..cloud import database
from ..cloud import server as lab_server
from ..errors import LabError
from ..machine import Machine

MIB = 1 << 20
FLAVOR, BIGGER = 'lab.small.disks', 'lab.medium.disks'
#: Weights of what is done to a server that runs.
OPERATIONS = {'hard_reboot': 3, 'stop_start': 2, 'migrate_confirm': 6,
              'migrate_revert': 4, 'resize_confirm': 2, 'resize_revert': 2,
              'rescue': 1, 'snapshot': 1, 'shelve': 1, 'rebuild': 1,
              'boot_anew': 1, 'write': 3, 'cancel': 1, 'live_migrate': 6,
              'live_abort': 2,
              'migrate_while_deactivated': 1, 'migrate_without_image': 1}
#: Those that end on another host, or have been there.
MOVES = ('migrate_confirm', 'migrate_revert', 'resize_confirm',
         'resize_revert', 'live_migrate', 'migrate_while_deactivated',
         'migrate_without_image')
#: After these a disk that can't be had is no loss: it was given up.
DESTROY = ('rebuild', 'boot_anew', 'evacuate')
SETTLED = ('ACTIVE', 'SHUTOFF', 'ERROR', 'VERIFY_RESIZE', 'RESCUE',
           'SHELVED_OFFLOADED')
# Seconds without a change, by whether there is a task (of a compute that was
# killed, perhaps): nothing comes any more. A live migration has its own limit.
QUIET, STUCK = 20, 60
#: Of a fault: all that is left of its root disk.
IMAGE = re.compile('Rebuild the server from image ([0-9a-f-]{36})')
OWN_IMAGE = 'from its own image, if it was shelved'
OTHER = {'host-a': 'host-b', 'host-b': 'host-a'}


class Lost(Exception):
    """A server that can't be brought back, or without its data.

    :param subject: name of the Subject that it is about; '-' where of none
    """

    def __init__(self, message, subject='-'):
        super().__init__(message)
        self.subject = subject


class Subject:
    """One server.

    :param cloud: the Cloud
    :param name: for people
    :ivar expected: by range: (seed, MiB) that the guest has written
    """

    _seeds = itertools.count(1)

    def __init__(self, cloud, name):
        self.cloud, self.name = cloud, name
        self.server = None
        self.image = None
        self.expected: dict[str, tuple[str, int]] = {}
        self.gone: list[str] = []  # UUIDs of deleted ones
        # By host and UUID, how often virtlogd has given its console up.
        self._consoles: dict[tuple[str, str], int] = {}
        self._seen, self._since, self._last = None, 0., 0.
        self._called_error = False  # by recover() itself
        self._used: set[str] = set()  # images that it was rebuilt from

    def _own_image(self):
        """An image that nobody else misses: it is deleted under the server.

        :returns: its name
        """
        image = self.cloud.conn.image
        name = 'soak of %s' % self.name
        if self.image is None:
            data = image.download_image(self.cloud.image('guest')).content
            with tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                self.image = self.cloud.conn.create_image(
                    name, filename=file.name, disk_format='qcow2',
                    container_format='bare', wait=True)
        return name

    def boot_anew(self):
        if self.server is not None:
            self.gone.append(self.server.id)
            self.server.delete()
        self.server, self.expected = None, {}
        self._called_error = False
        seed = self._seed()
        made = self.cloud.boot(
            self.name, flavor=FLAVOR, wait=False, image=self._own_image(),
            script='boot 1: fill data 8 %s\nboot 1: fill raw 4 %s vdb 64\n' % (
                seed, seed))
        made.watch = self._watch
        self.server = made
        made.wait('ACTIVE')
        made.testimony()
        self.expected = {'data': (seed, 8), 'raw': (seed, 4)}

    def _watch(self, found):
        """Don't wait for what has failed already and left no ERROR.

        :param found: the server as the API has it, in a state that isn't the
            wanted one or was not a moment ago
        """
        now, seen = time.monotonic(), (found.status, found.task_state)
        if seen != self._seen or now - self._last > 5:
            self._since = now
        self._seen, self._last = seen, now
        # One that is confirmed has no task either.
        if found.task_state != 'migrating' and now - self._since > (
                STUCK if found.task_state or found.status == 'VERIFY_RESIZE'
                else QUIET):
            raise lab_server.ServerError('%s stays %s (task %s)' % (
                found.id, *seen))

    def _seed(self):
        return '%s-%d' % (self.name, next(self._seeds))

    # -- operations: each ends with a server that runs

    def hard_reboot(self):
        self.server.hard_reboot()

    def stop_start(self):
        self.server.stop()
        self.server.start()

    def _go(self):
        self.server.migrate(OTHER[self.server.host])

    def migrate_confirm(self):
        self._go()
        self.server.confirm()

    def migrate_revert(self):
        self._go()
        self.server.revert()

    def resize_confirm(self):
        self._resize()
        self.server.confirm()

    def resize_revert(self):
        self._resize()
        self.server.revert()

    def _resize(self):
        # A disk can't become smaller.
        self.server.resize(BIGGER + '.same' if self._flavor() == BIGGER else
                           BIGGER)

    def _flavor(self):
        return self.server.get().flavor['original_name']

    def rescue(self):
        self.server.rescue()
        self.server.unrescue()

    def snapshot(self):
        image = self.server.snapshot('soak of ' + self.name)
        self.cloud.conn.image.delete_image(image.id, ignore_missing=True)

    def shelve(self):
        # What isn't on the root disk is lost: Nova's own way.
        self.expected.pop('raw', None)
        self.server.shelve()
        self.server.unshelve()

    def rebuild(self):
        self.expected = {}
        self.server.rebuild()

    def cancel(self):
        """Migrate it, and change one's mind while its disks are copied."""
        other = OTHER[self.server.host]
        self.server.api.migrate_server(self.server.id, host=other)
        until = time.monotonic() + 30
        while self.server.get().task_state != 'resize_migrating':
            if time.monotonic() > until:
                break
            time.sleep(.1)
        # Too early or too late is refused, and either is right.
        self.cloud.manage('libvirt', 'cancel_move', self.server.id,
                          check=False)
        if self.server.wait('ACTIVE', 'SHUTOFF',
                            'VERIFY_RESIZE').status == 'VERIFY_RESIZE':
            self.server.revert()

    def live_migrate(self):
        self.server.live_migrate(OTHER[self.server.host])

    def live_abort(self):
        server = self.server
        server.api.live_migrate_server(
            server.id, host=OTHER[server.host], block_migration='auto')
        until = time.monotonic() + 30
        while server.get().task_state == 'migrating':
            if time.monotonic() > until:
                break
            # Too early or too late is refused, and either is right.
            with contextlib.suppress(openstack.exceptions.SDKException):
                for migration in server.api.server_migrations(server.id):
                    server.api.abort_server_migration(migration, server)
                    break
            time.sleep(.5)
        server.wait('ACTIVE')
        server.stay_awake()

    def migrate_while_deactivated(self):
        """The image can't be fetched; its base travels along."""
        if self.image is None:
            return self.migrate_confirm()
        image = self.cloud.conn.image
        image.deactivate_image(self.image.id)
        try:
            self.migrate_confirm()
        finally:
            image.reactivate_image(self.image.id)

    def migrate_without_image(self):
        if self.image is not None:
            self.cloud.conn.image.delete_image(self.image.id)
            self.image = None
        self.migrate_confirm()

    def evacuate(self):
        """Its host is dead: it is made anew from its image."""
        self.expected = {}
        other = OTHER[self.server.host]
        self.server.api.evacuate_server(self.server.id, host=other)
        # By newer versions of the API it stays off.
        self.server.wait('ACTIVE', 'SHUTOFF')

    def write(self):
        name, seed = 'data', self._seed()
        self.expected.pop(name, None)
        self.server.command('fill', name, 8, seed)
        self.expected[name] = (seed, 8)

    # -- afterwards

    def recover(self, operations):
        """Do what the operator's guide says until it runs.

        :param operations: those since it was last known to run
        :raises Lost: it does not come back
        """
        told, operation = '', ', '.join(operations)
        given_up = not set(DESTROY).isdisjoint(operations)
        if self.server is not None and any(
                name.startswith('live') for name in operations):
            # Its console is another one, and the guest goes on all the time.
            self.server.stay_awake()
        for _try in range(4):
            if self.server is None or not self._exists():
                if not given_up:
                    raise Lost('%s is gone after %s' % (self.name, operation))
                self.boot_anew()
                return
            try:
                if self._step_back():
                    return
            except LabError as error:
                told = str(error)
        if given_up:
            self.boot_anew()
            return
        found = self.server.get()
        raise Lost('%s does not come back after %s: %s' % (
            self.name, operation, told or '%s, %s' % (
                found.status, (found.fault or {}).get('message'))))

    def _exists(self):
        with contextlib.suppress(openstack.exceptions.NotFoundException):
            return bool(self.server.get())
        return False

    def _shelved_image(self, message) -> str | None:
        """What to rebuild the server from whose unshelving was cut off.

        The first error names it. After a stop and a start the server has
        another one, and its user looks for the image that shelving has made.

        :param message: of its fault
        :returns: an image's ID
        """
        named = IMAGE.search(message)
        if named:
            return named[1]
        if OWN_IMAGE not in message:
            return None
        return next((image.id for image in self.cloud.conn.image.images(
            name='%s-shelved' % self.name, sort='created_at:desc')
            if image.id not in self._used), None)

    def _step_back(self):
        """:returns: whether it runs"""
        server = self.server
        try:
            found = server.wait(*SETTLED, limit=90)
        except lab_server.ServerError:
            # A compute was killed with a task under way.
            server.api.reset_server_state(server.id, 'error')
            self._called_error = True
            found = server.get()
        if found.status == 'ERROR':
            if not (self._called_error or
                    (found.fault or {}).get('message') or
                    any(message for _action, message in server.actions())):
                raise Lost('%s is in ERROR and nothing says why' % self.name)
            image = self._shelved_image(
                (found.fault or {}).get('message') or '')
            if image:
                server.rebuild(image)
                self._used.add(image)
            else:
                self._reboot()
        elif found.status == 'VERIFY_RESIZE':
            self._revert()
        elif found.status == 'RESCUE':
            server.unrescue()
        elif found.status == 'SHELVED_OFFLOADED':
            server.unshelve()
        elif found.status == 'SHUTOFF':
            server.start()
        elif self.guests() != [server.host]:
            # Nova takes it for active, and the user says that it isn't.
            self._reboot()
        elif self._is_transient():
            # Nova has it so for a live snapshot, and libvirt wasn't there
            # when it was to be defined again. It would be gone once it is off.
            self._reboot()
        else:
            self._called_error = False
            return True
        return server.get().status == 'ACTIVE'

    def _revert(self):
        server = self.server
        try:
            server.revert()
        except openstack.exceptions.SDKException:
            # It is being confirmed, perhaps by a compute that was killed.
            try:
                server.wait('ACTIVE', 'SHUTOFF')
            except lab_server.ServerError:
                server.api.reset_server_state(server.id, 'active')
                server.hard_reboot()

    def _reboot(self):
        server = self.server
        with contextlib.suppress(openstack.exceptions.ConflictException):
            server.api.reboot_server(server.id, 'HARD')
            server.wait('ACTIVE', 'ERROR')
        if any(record.get('next') for record in database.records(
                self.cloud, server.id).values()):
            self._settle()

    def _settle(self):
        """Do what the message of an open live migration says.

        :raises Lost: there is none
        """
        server, here = self.server, self.server.host
        there = OTHER[here]
        told = [(server.get().fault or {}).get('message') or '']
        told += [message or '' for _action, message in server.actions()[:1]]
        if not any('settle_live_migration' in text for text in told):
            raise Lost('%s is on its way to %s, and nothing says what to do: '
                       '%s' % (self.name, there, told))
        moved = there in self.guests()
        if moved:
            with _if_there(), server.domain(here) as left:
                if left.isActive():
                    left.destroy()
                left.undefine()
        self.cloud.manage('libvirt', 'settle_live_migration', server.id,
                          '--moved' if moved else '--not-moved')
        server.api.reset_server_state(server.id, 'active')
        server.hard_reboot()

    def has_lost_console(self) -> bool:
        """Whether virtlogd has given its console up since the last question.

        It does where the disk is full, until the guest is started again.
        """
        place = self.server.host, self.server.id
        path = Machine(self.server.host).logs / 'virtlogd.log'
        told = path.read_text().count(
            self.server.id + '/console.log: No space left on device')
        before, self._consoles[place] = self._consoles.get(place, 0), told
        return told > before

    def _is_transient(self):
        with self.server.domain() as domain:
            return not domain.isPersistent()

    def guests(self) -> list[str]:
        """The hosts on which libvirt has a guest of it that runs."""
        found = []
        for host in OTHER:
            with _if_there(), self.server.domain(host) as domain:
                if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING:
                    found.append(host)
        return found


@contextlib.contextmanager
def _if_there():
    """Do nothing where libvirt has no such domain."""
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
