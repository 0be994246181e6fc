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

"""One operation after the other, drawn at random, and faults amid them.

Three hosts have a pool for root disks. An instance is
moved, evacuated, rescued and so on; each second operation fails halfway, or
the host which is at it dies. After each the instance's disk has to be
somewhere, and what its guest runs with has to be that disk. In the end all
hosts are back: the instance has to start and to move, and when it is deleted
nothing may be left.

To walk elsewhere: OS_STORAGE_WALKS=100-150 names the seeds.
"""

import os
import random
import re

from lxml import etree

from nova import exception
from nova import objects
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_faults
from nova.tests.fixtures import libvirt_hosts
from nova.tests.fixtures import libvirt_storage
from nova.tests.functional.api import client
from nova.tests.functional.libvirt import storage_pools
from nova.virt.libvirt.storage.live import by_hand
from nova.virt.libvirt.storage.records import metadata

HOSTS = ('compute1', 'compute2', 'compute3')
# What a disk has where no guest has written: nothing, a hole, the image
BLANK = {b'', b'\0' * 6, b'......'}

# Weights, by what may be done in an instance's state; and in any state
ALWAYS = {'go_down': 3, 'come_back': 3, 'sweep': 2, 'undefine': 1,
          'restart': 1}
AMID = {'reset': 4}
BY_STATE = {
    'active': {'migrate': 6, 'resize': 2, 'live_migrate': 3, 'stop': 1,
               'reboot': 3, 'rescue': 1, 'reset': 3, 'write': 2, 'shelve': .7,
               'rebuild': .7, 'snapshot': .5},
    'stopped': {'migrate': 6, 'resize': 2, 'start': 3, 'reboot': 3,
                'reset': 2, 'shelve': .7},
    'resized': {'confirm': 3, 'revert': 3, 'reset': 2},
    'rescued': {'unrescue': 3, 'reset': 2},
    'error': {'reboot': 3, 'reset': 4, 'rescue': 1, 'rebuild': .7},
    'shelved': {'unshelve': 2},
    'shelved_offloaded': {'unshelve': 2},
}
# Where its host is down
OF_THE_LOST = {'evacuate': 12, 'reset': 4, 'migrate': .2, 'live_migrate': .2,
               'reboot': .3, 'stop': .2}
EVACUATED_FROM = ('active', 'stopped', 'error')

UNDONE_BY = {'rescued': 'unrescue', 'shelved_offloaded': 'unshelve'}

FAULTS = ('error', 'error', 'kill', 'kill after')
# The last effect that may fail is so many times two.
LATEST = 6


def seeds():
    first, _dash, last = os.environ.get(
        'OS_STORAGE_WALKS', '1-3').partition('-')
    return range(int(first), int(last or first) + 1)


class Store:
    """What a host has disks in."""

    def names(self):
        raise NotImplementedError

    def open(self, name):
        raise NotImplementedError

    def name_of(self, source):
        """:param source: name or path that a guest's definition has"""
        return os.path.basename(source)


class Directory(Store):
    """What a storage pool of files has.

    :param path: of its directory
    """

    def __init__(self, path):
        self.path = path
        self._file_system = libvirt_storage.RealFileSystem()

    def names(self):
        return os.listdir(self.path)

    def open(self, name):
        return self._file_system.open(os.path.join(self.path, name))

    def __str__(self):
        return self.path


class Disk:
    """What a disk may have, as far as the test knows.

    :param name: of the disk
    :param stores: by host, the Store that it is in there
    :ivar now: set of bytes
    :ivar before: set of what it had before moves that are not over
    :ivar is_doomed: whether something was to destroy it
    :ivar store: what it is in, None if that isn't certain
    """

    def __init__(self, name, stores):
        self.name, self.stores = name, stores
        self.now, self.before, self.store = set(), set(), None
        self.is_doomed = False

    @property
    def either(self):
        return self.now | self.before

    def written(self, content):
        self.now, self.is_doomed = {content}, False

    def moved(self):
        self.before |= self.now
        self.store = None

    def confirmed(self):
        self.before = set()

    def reverted(self):
        self.now |= self.before
        self.store = None

    def may_be_blank(self):
        """It may have been made anew."""
        self.now |= BLANK
        self.store = None

    def is_blank(self):
        self.is_doomed = False
        self.now, self.before, self.store = set(BLANK), set(), None


class WalkTestBase(storage_pools.StoragePoolsTestBase):
    """Walks through pools of one kind, or several."""

    # Whether what is in the root disk comes into a snapshot, and back
    SNAPSHOTS_ARE_PLAYED = False

    def setUp(self):
        super().setUp()
        self.flags(force_config_drive=False, shelved_offload_time=0)
        self.migrations = self.useFixture(
            libvirt_hosts.Migrations(self.connections))
        self.threads = self.useFixture(libvirt_faults.Threads())
        for host in HOSTS:
            if host not in self.computes:
                self.start_compute(host)
        self.told = []

    def prepare(self, seed):
        self.random = random.Random(seed)
        self.faults = self.useFixture(
            libvirt_faults.Faults(self.hosts, self.more_effects()))
        self.down = self.faults.down
        self.flags(allow_resize_to_same_host=self.random.random() < .3)
        self.disks = [Disk('disk', self.prepare_pools())]
        ephemeral = self.random.choice((0, 1))
        if ephemeral:
            self.disks.append(Disk('disk.eph0', {
                host: self.store_of_others(host) for host in HOSTS}))
        self.tell('seed %d, %s' % (seed, {
            disk.name: [str(disk.stores[host]) for host in HOSTS]
            for disk in self.disks}))
        self.flavors = [
            self.flavor(ephemeral=ephemeral, memory_mb=size)
            for size in (512, 600)]
        self.server = self.boot(flavor=self.flavors[0])
        self.number = 0
        self.write_anew()

    def more_effects(self):
        """Return what else may fail, as libvirt_faults.EFFECTS has it."""
        return ()

    def prepare_pools(self):
        """Give each host a pool for root disks.

        :returns: dict of Store, by host
        """
        raise NotImplementedError

    def store_of_others(self, host):
        """Return the Store that a host has other disks in."""
        return Directory(os.path.join(self.directories[host], 'disks'))

    def tell(self, line):
        self.told.append(line)

    def violated(self, what):
        self.fail('\n'.join([what, *self.told, *self.describe()]))

    def describe(self):
        yield 'host %s' % self.instance().host
        for name, record in self.records(self.server).items():
            yield '%s: %s' % (name, self._short(record))
        yield 'left: %s' % metadata.InstanceDisks.load(
            self.context, self.instance()).leftovers
        for disk in self.disks:
            yield '%s: %s' % (disk.name, self.all_contents(disk))
        yield str(self.api.get_server(self.server['id']).get('fault'))

    def _short(self, record):
        return record and '%s %s@%s %s <- %s -> %s' % (
            record.state, (record.volume or record.backend)[-12:], record.host,
            record.migration_id, self._short(record.previous),
            self._short(record.next))

    def instance(self):
        return objects.Instance.get_by_uuid(
            self.context, self.server['id'],
            expected_attrs=['system_metadata', 'info_cache'])

    def other_hosts(self):
        return [host for host in HOSTS if host != self.instance().host]

    def guest(self, host):
        """Return a host's domain of the instance, None without one."""
        return next((domain for domain in self.connections[
            host].listAllDomains(0) if domain.UUIDString() ==
            self.server['id']), None)

    def is_running(self):
        host = self.instance().host
        guest = host and self.guest(host)
        return bool(guest and guest.isActive() and host not in self.down)

    # What is on the disk

    def is_of(self, name, disk):
        """Whether a volume, or a file of a legacy disk, is one of a disk."""
        return re.fullmatch(r'%s(_|(_resize|_del)?/)%s(\.\d+)?' % (
            self.server['id'], re.escape(disk.name)), name) is not None

    def name_of_guests(self, host, disk):
        """Return the name of what a guest has as a disk, by its definition.

        None if it has none: in a rescue it has but the root disk.
        """
        tree = etree.fromstring(self.guest(host).XMLDesc(0))
        names = [disk.stores[host].name_of(next(
            source.get(key) for key in ('volume', 'file', 'dev', 'name')
            if source.get(key))) for source in tree.iterfind(
                './devices/disk/source')]
        names = [name for name in names if self.is_of(name, disk)]
        if not names:
            return None
        (name,) = names
        return name

    def write_anew(self):
        host = self.instance().host
        for disk in self.disks:
            name = self.name_of_guests(host, disk)
            if name is not None:
                self.number += 1
                content = b'%06d' % self.number
                disk.stores[host].open(name).write(
                    storage_pools.GUEST, content)
                disk.written(content)

    def all_contents(self, disk):
        """Return what lies in the pools: by what a file has, their names."""
        found = {}
        for store in dict.fromkeys(disk.stores.values()):
            for name in sorted(store.names()):
                if self.is_of(name, disk):
                    found.setdefault(store.open(name).read(
                        storage_pools.GUEST, 6), []).append(
                            '%s/%s' % (store, name))
        return found

    def verify(self):
        instance = self.instance()
        if instance.vm_state.startswith('shelved'):
            return
        for disk in self.disks:
            found = self.all_contents(disk)
            if not disk.now & set(found) and (found or not disk.is_doomed):
                self.violated('%s is lost: %s' % (disk.name, disk.now))
            self._verify_guests(instance, disk)

    def _verify_guests(self, instance, disk):
        users = {}
        for host in HOSTS:
            guest = self.guest(host)
            if guest is None or not guest.isActive():
                continue
            name = self.name_of_guests(host, disk)
            if name is None:
                continue
            store = disk.stores[host]
            users.setdefault('%s/%s' % (store, name), []).append(host)
            if host == instance.host:
                disk.store = store
                if name not in store.names():
                    self.violated('%s runs without %s' % (host, name))
                content = store.open(name).read(storage_pools.GUEST, 6)
                if content not in disk.either:
                    self.violated('%s has %s, not %s' % (
                        disk.name, content, disk.either))
        for path, hosts in users.items():
            if len(hosts) > 1:
                self.violated('%s use %s' % (hosts, path))

    # Hosts

    def power_off(self, host):
        for domain in self.connections[host].listAllDomains(0):
            domain._state = fakelibvirt.VIR_DOMAIN_SHUTOFF

    def lose(self, host, with_guests):
        self.computes[host].stop()
        self.force_down(host, True)
        self.down.add(host)
        if with_guests:
            self.power_off(host)
        self.tell('  %s is down%s' % (
            host, ' with its guests' if with_guests else ''))

    def bring_back(self, host):
        self.faults.dead.discard(host)
        self.down.discard(host)
        for pool in self.connections[host].listAllStoragePools(0):
            # As libvirt does when it starts
            if pool.isActive():
                pool.refresh()
        before = self.computes[host], self.compute_rp_uuids[host]
        try:
            self.restart_compute_service(host)
        except Exception:
            if not self.faults.came:
                raise
            self.computes[host], self.compute_rp_uuids[host] = before
            self.lose(host, False)
        else:
            self.force_down(host, False)

    # Operations

    def act(self, **action):
        self.api.post_server_action(self.server['id'], action)
        self.threads.wait()

    def do(self, name, is_faulty=False):
        """Do one operation, and tell what became of it."""
        if is_faulty:
            self.faults.arm(int(2 ** self.random.uniform(0, LATEST)),
                            self.random.choice(FAULTS))
        try:
            result = getattr(self, 'do_' + name)()
        except client.OpenStackApiException as e:
            result = str(e)[-120:]
        except Exception as e:
            if self.faults.came is None and not self.faults.dead:
                raise
            result = str(e)
        self.threads.wait()
        instance = self.instance()
        self.tell('%s: %s [%s] -> %s %s/%s' % (
            name, result, self.faults.came, instance.host,
            instance.vm_state, instance.task_state))
        self.faults.disarm()
        for host in sorted(self.faults.dead - self.down):
            self.lose(host, self.random.random() < .5)

    def do_go_down(self):
        host = (self.random.random() < .6 and self.instance().host or
                self.random.choice(HOSTS))
        if host not in self.down and len(self.down) < 2:
            self.lose(host, True)

    def do_come_back(self):
        if self.down:
            self.bring_back(self.random.choice(sorted(self.down)))

    def do_restart(self):
        self.bring_back(self.random.choice(
            [host for host in HOSTS if host not in self.down]))

    def do_sweep(self):
        for host in HOSTS:
            if host not in self.down:
                self.sweep(host)

    def do_undefine(self):
        """What an operator does with guests that are in the way."""
        for host in self.other_hosts():
            guest = self.guest(host)
            if guest is not None and not guest.isActive():
                guest.undefine()
                return host

    def do_reset(self):
        self.act(**{'os-resetState': {
            'state': self.random.choice(('active', 'active', 'error'))}})

    def do_write(self):
        if self.is_running():
            self.write_anew()

    def _move(self, **action):
        host = self.instance().host
        try:
            self.act(**action)
        finally:
            instance = self.instance()
            if instance.host != host or instance.vm_state == 'resized':
                for disk in self.disks:
                    disk.moved()

    def do_migrate(self):
        host = self.random.choice(self.other_hosts())
        self._move(migrate={'host': host})
        return host

    def do_resize(self):
        self._move(resize={'flavorRef': self.random.choice(self.flavors)})

    def do_live_migrate(self):
        host = self.random.choice(self.other_hosts())
        self.act(**{'os-migrateLive': {
            'host': host, 'block_migration': 'auto'}})
        return host

    def unfinished_moves(self):
        return objects.MigrationList.get_by_filters(self.context, {
            'instance_uuid': self.server['id'], 'status': 'finished'})

    def do_confirm(self):
        # Of several Nova takes the oldest, wherever the instance is.
        if len(self.unfinished_moves()) == 1:
            self.act(confirmResize=None)
            if self.instance().vm_state != 'resized':
                for disk in self.disks:
                    disk.confirmed()

    def do_revert(self):
        if len(self.unfinished_moves()) == 1:
            for disk in self.disks:
                disk.reverted()
            self.act(revertResize=None)

    def do_evacuate(self):
        hosts = [h for h in self.other_hosts() if h not in self.down]
        if not hosts:
            return
        host = self.random.choice(hosts)
        # Else it might run twice.
        self.power_off(self.instance().host)
        lost = [disk for disk in self.disks
                if disk.stores[host] is not disk.store]
        try:
            self.act(evacuate={'host': host})
        finally:
            self.threads.wait()
            if self.instance().host == host:
                for disk in lost:
                    disk.may_be_blank()
            else:
                self._end_stray(host)
        return host

    def _end_stray(self, host):
        """End what an evacuation has started, if that compute has died."""
        guest = self.guest(host)
        if guest is None or not guest.isActive() or host in self.down:
            return
        if host not in self.faults.dead:
            self.violated('a guest is left on %s' % host)
        guest._state = fakelibvirt.VIR_DOMAIN_SHUTOFF
        guest.undefine()
        self.tell('  guest on %s is ended' % host)

    def do_settle(self):
        """What an operator does when told to."""
        self.act(**{'os-resetState': {'state': 'active'}})
        moved = any(guest and guest.isActive() for guest in map(
            self.guest, self.other_hosts()))
        try:
            by_hand.end(self.context, self.server['id'], moved)
        except exception.NoMigrationToSettle:
            by_hand.end(self.context, self.server['id'], True)

    def do_stop(self):
        self.act(**{'os-stop': None})

    def do_start(self):
        self.act(**{'os-start': None})

    def do_reboot(self):
        self.act(reboot={'type': 'HARD'})

    def do_rescue(self):
        self.act(rescue={'rescue_image_ref': storage_pools.IMAGE})

    def do_unrescue(self):
        self.act(unrescue=None)

    def do_rebuild(self):
        self._remake(self.disks, rebuild={'imageRef': storage_pools.IMAGE})

    def do_shelve(self):
        self._remake(self.disks[self.SNAPSHOTS_ARE_PLAYED:], shelve=None)

    def _remake(self, disks, **action):
        for disk in disks:
            disk.may_be_blank()
            disk.is_doomed = True
        self.act(**action)
        if self.instance().vm_state not in ('error', 'shelved'):
            for disk in disks:
                disk.is_blank()

    def do_unshelve(self):
        self.act(unshelve=None)

    def do_snapshot(self):
        self.act(createImage={'name': 'snapshot'})

    # A walk

    def choices(self):
        instance = self.instance()
        known = BY_STATE[instance.vm_state]
        if instance.task_state and not instance.vm_state.startswith('shelved'):
            known = AMID
        elif (instance.host in self.down and
                instance.vm_state in EVACUATED_FROM):
            known = OF_THE_LOST
        weights = {**known, **ALWAYS}
        if not self.down:
            del weights['come_back']
        return list(weights), list(weights.values())

    def walk(self, seed, steps):
        self.prepare(seed)
        for _step in range(steps):
            (name,) = self.random.choices(*self.choices())
            self.do(name, is_faulty=self.random.random() < .5)
            self.verify()
        self.recover()

    def recover(self):
        """Bring all hosts back, and do what an operator does then."""
        for host in sorted(self.down):
            self.bring_back(host)
        self.do('report')
        if self.instance().vm_state == 'resized':
            self.do(self.random.choice(('confirm', 'revert')))
        for migration in self.unfinished_moves():
            migration.status = 'error'
            migration.save()
        state = self.instance().vm_state
        if state != 'shelved':
            if state in UNDONE_BY:
                self.do(UNDONE_BY[state])
            self.verify()
            self.start_and_move()
        self.leave()

    def do_report(self):
        return ', '.join(host for host in HOSTS if self.guest(host))

    def start_and_move(self):
        self.act(**{'os-resetState': {'state': 'active'}})
        self.do('reboot')
        fault = self.api.get_server(self.server['id']).get(
            'fault', {'message': ''})['message']
        if 'settle_live_migration' in fault:
            self.do('settle')
            self.do('reboot')
        elif 'evacuate the server there' in fault:
            self.return_to(re.search(r'on host (\w+)', fault).group(1))
        if self.instance().vm_state == 'error' and BLANK & self.disks[0].now:
            # A rebuild was cut off.
            self.do('rebuild')
        self.verify()
        if not self.is_running():
            self.violated('it does not start')
        self.do('write')
        self.do('migrate')
        if self.instance().vm_state != 'resized':
            self.violated('it does not move')
        self.do('confirm')
        self.verify()

    def return_to(self, host):
        """What an operator does if a disk is whole on another host alone."""
        guest = self.guest(host)
        if guest is not None:
            guest.undefine()
        left = self.instance().host
        self.lose(left, False)
        self.act(evacuate={'host': host})
        self.tell('return to %s' % host)
        self.bring_back(left)

    def leave(self):
        self._delete_server(self.server)
        self.threads.wait()
        for host in HOSTS:
            guest = self.guest(host)
            if guest is not None:
                guest.undefine()
        for _time in range(2):
            for host in HOSTS:
                self.sweep(host)
        for disk in self.disks:
            found = self.all_contents(disk)
            if found:
                self.fail('\n'.join(['left: %s' % found, *self.told]))
