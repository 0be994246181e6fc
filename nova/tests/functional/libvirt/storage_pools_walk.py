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

Three hosts have a pool for root disks. An instance is moved, evacuated,
rescued and so on. Each second operation fails halfway, or the host which is at
it dies, or the hosts' periodic tasks run amid it. After each the instance's
disk has to be somewhere, and what its guest runs with has to be that disk. In
the end all hosts are back: the instance has to start and to move, and when it
is deleted nothing may be left.

To walk elsewhere: OS_STORAGE_WALKS=100-150 names the seeds.
"""

import os
import random
import re
import threading
import traceback

from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt_faults
from nova.tests.fixtures import libvirt_hosts
from nova.tests.functional.api import client
from nova.tests.functional.libvirt import storage_pools
from nova.tests.functional.libvirt import storage_pools_disks as disks
from nova.tests.functional.libvirt import storage_pools_operations as ops
from nova.virt.libvirt.storage.records import metadata

HOSTS = ops.HOSTS
VOLUME = nova_fixtures.CinderFixture.IMAGE_BACKED_VOL
OTHERS = b'not of the one that is moved'

# Weights, by what may be done in an instance's state; and in any state
ALWAYS = {'go_down': 3, 'come_back': 3, 'sweep': 2, 'undefine': 1,
          'restart': 1, 'clean_caches': 1}
AMID = {'reset': 4}
BY_STATE = {
    'active': {'migrate': 6, 'resize': 3, 'live_migrate': 4, 'stop': 1,
               'reboot': 3, 'rescue': 1, 'reset': 3, 'write': 2, 'shelve': .7,
               'rebuild': .7, 'snapshot': .5, 'pause': .7, 'suspend': .7},
    'stopped': {'migrate': 6, 'resize': 3, 'start': 3, 'reboot': 3,
                'reset': 2, 'shelve': .7, 'rescue': .7, 'rebuild': .5,
                'snapshot': .3},
    'paused': {'unpause': 3, 'live_migrate': 2, 'reset': 1, 'reboot': 1,
               'shelve': .5, 'snapshot': .3},
    'suspended': {'resume': 3, 'reset': 1, 'reboot': 1, 'shelve': .5,
                  'snapshot': .3},
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

FAULTS = ('error', 'error', 'kill', 'kill after', 'amid', 'amid')
# The last effect that may fail is so many times two.
LATEST = 6


def seeds():
    first, _dash, last = os.environ.get(
        'OS_STORAGE_WALKS', '1-3').partition('-')
    return range(int(first), int(last or first) + 1)


class WalkTestBase(ops.OperationsTestBase):
    """Walks through pools of one kind, or several."""

    def setUp(self):
        super().setUp()
        self.flags(force_config_drive=False, shelved_offload_time=0)
        self.flags(remove_unused_original_minimum_age_seconds=0,
                   group='image_cache')
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
        self.faults.amid = self.work_amid
        self.work, self.work_failed = None, []
        self.flags(allow_resize_to_same_host=self.random.random() < .3)
        self.disks = [disks.Disk('disk', self.prepare_pools())]
        ephemeral = self.random.choice((0, 1))
        if ephemeral:
            self.disks.append(disks.Disk('disk.eph0', {
                host: self.store_of_others(host) for host in HOSTS}))
        self.tell('seed %d, %s' % (seed, {
            disk.name: [str(disk.stores[host]) for host in HOSTS]
            for disk in self.disks}))
        swap = self.random.choice((0, 0, 64))
        self.flavors = [
            self.flavor(disk=disk, ephemeral=ephemeral, swap=swap,
                        memory_mb=memory)
            for disk, swap, memory in (
                (1, swap, 512), (1, swap, 600),
                (2, self.random.choice((0, swap, 64, 128)), 512))]
        self.server = self.boot(flavor=self.flavors[0])
        self.has_volume = self.random.random() < .3
        if self.has_volume:
            self._attach_volume(self.server, VOLUME)
        self.number = 0
        self.write_anew()
        self.boot_bystander()

    def boot_bystander(self):
        """Boot a server that nothing may happen to."""
        bystander = self.boot('compute2', flavor=self.flavors[0])
        self.others = self.records(bystander)['disk'].volume
        self.store_of_bystander().open(self.others).write(
            storage_pools.GUEST, OTHERS)

    def store_of_bystander(self):
        return self.disks[0].stores['compute2']

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
        return disks.Directory(os.path.join(self.directories[host], 'disks'))

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

    def verify(self):
        store = self.store_of_bystander()
        if self.others not in store.names() or OTHERS != store.open(
                self.others).read(storage_pools.GUEST, len(OTHERS)):
            self.violated('the disk of another server is lost')
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
        for host in filter(self.is_active_on, HOSTS):
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

    # An operation

    def do(self, name, is_faulty=False):
        """Do one operation, and tell what became of it."""
        if is_faulty:
            self.arm()
        try:
            result = getattr(self, 'do_' + name)()
        except client.OpenStackApiException as e:
            result = str(e)[-120:]
        except Exception as e:
            if self.faults.came is None and not self.faults.dead:
                raise
            result = str(e)
        self.wait()
        instance = self.instance()
        self.tell('%s: %s [%s] -> %s %s/%s' % (
            name, result, self.faults.came, instance.host,
            instance.vm_state, instance.task_state))
        self.end_faults()

    def arm(self):
        self.faults.arm(int(2 ** self.random.uniform(0, LATEST)),
                        self.random.choice(FAULTS))

    def wait(self):
        self.threads.wait()
        if self.work:
            self.work.join()
            self.work = None
        if self.work_failed:
            self.violated(self.work_failed[0])

    def end_faults(self):
        self.faults.disarm()
        for host in sorted(self.faults.dead - self.down):
            self.lose(host, self.random.random() < .5)

    def work_amid(self):
        """Let the hosts do what they do from time to time.

        What waits for a lock goes on when it is free.
        """
        self.work = threading.Thread(target=self._periodic_tasks)
        self.work.start()
        self.work.join(1)

    def _periodic_tasks(self):
        try:
            self.do_sweep()
            self.do_clean_caches()
        except Exception:
            self.work_failed.append(traceback.format_exc())

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

    def start_and_move(self):
        self.act(**{'os-resetState': {'state': 'active'}})
        self.do('reboot')
        fault = self.fault()
        if 'settle_live_migration' in fault:
            self.do('settle')
            self.do('reboot')
        elif 'evacuate the server there' in fault:
            self.return_to(re.search(r'on host (\w+)', fault).group(1))
        if self.instance().vm_state == 'error' and (
                disks.BLANK & self.disks[0].now):
            # A rebuild was cut off.
            self.do('rebuild')
        self.verify()
        if not self.is_running():
            self.violated('it does not start')
        if self.has_volume and VOLUME not in self.guest(
                self.instance().host).XMLDesc(0):
            self.violated('its volume is not attached')
        self.do('write')
        self.do('migrate')
        for _host in HOSTS:
            if (self.instance().vm_state != 'error' or
                    'undefine' not in self.fault()):
                break
            self.do('undefine')
            self.act(**{'os-resetState': {'state': 'active'}})
            self.do('migrate')
        if self.instance().vm_state != 'resized':
            self.violated('it does not move')
        self.do('confirm')
        self.verify()

    def fault(self):
        """Return what the server's owner is told, if anything."""
        return self.api.get_server(self.server['id']).get(
            'fault', {'message': ''})['message']

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

    def delete(self):
        """Delete the server, at times while its host is down, or fails."""
        host = self.instance().host
        if host and self.random.random() < .3:
            self.lose(host, True)
        if self.random.random() < .7:
            self.arm()
        try:
            self.api.delete_server(self.server['id'])
        except Exception as e:
            if self.faults.came is None:
                raise
            self.tell(str(e))
        self.wait()
        self.tell('delete [%s]' % self.faults.came)
        self.end_faults()
        for host in sorted(self.down):
            self.bring_back(host)
        try:
            self.api.delete_server(self.server['id'])
        except client.OpenStackApiNotFoundException:
            pass
        self._wait_until_deleted(self.server)
        self.wait()

    def leave(self):
        self.delete()
        for host in HOSTS:
            guest = self.guest(host)
            if guest is not None:
                guest.undefine()
        for _time in range(2):
            for host in HOSTS:
                self.sweep(host)
        found = [name for disk in self.disks
                 for store in disk.stores.values() for name in store.names()
                 if name.startswith(self.server['id'])]
        if found:
            self.fail('\n'.join(['left: %s' % found, *self.told]))
