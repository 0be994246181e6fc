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
"""What a user, an operator and a host do with an instance, by name.

For a test that draws them at random.
"""

import re

from lxml import etree

from nova import exception
from nova import objects
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.functional.api import client
from nova.tests.functional.libvirt import storage_pools
from nova.virt.libvirt.storage.live import by_hand

HOSTS = ('compute1', 'compute2', 'compute3')


class OperationsTestBase(storage_pools.StoragePoolsTestBase):
    """Operations on one instance.

    :ivar server: the API's server
    :ivar disks: list of storage_pools_disks.Disk
    :ivar number: of what has been written to disks
    :ivar flavors: list of flavor ids to resize to
    :ivar random: a random.Random
    :ivar faults: libvirt_faults.Faults
    :ivar threads: libvirt_faults.Threads
    :ivar down: names of the hosts that are
    """

    # Whether what is in the root disk comes into a snapshot, and back
    SNAPSHOTS_ARE_PLAYED = False

    def tell(self, line):
        """Note what has been done."""
        raise NotImplementedError

    def violated(self, what):
        """Fail, and tell what has been done."""
        raise NotImplementedError

    def instance(self):
        return objects.Instance.get_by_uuid(
            self.context, self.server['id'],
            expected_attrs=['system_metadata', 'info_cache'])

    def other_hosts(self):
        return [host for host in HOSTS if host != self.instance().host]

    def hosts_at_work(self):
        return [host for host in HOSTS
                if host not in self.down and host in self.computes]

    def guest(self, host):
        """Return a host's domain of the instance, None without one."""
        return next((domain for domain in self.connections[
            host].listAllDomains(0) if domain.UUIDString() ==
            self.server['id']), None)

    def is_active_on(self, host):
        guest = self.guest(host)
        return guest is not None and guest.isActive()

    def is_running(self):
        host = self.instance().host
        return bool(host and host not in self.down and
                    self.is_active_on(host))

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
            self._let_be_up(host)

    def _let_be_up(self, host):
        try:
            self.force_down(host, False)
        except client.OpenStackApiException:
            # A start completes but one evacuation of an instance.
            self.restart_compute_service(host)
            self.force_down(host, False)

    # Operations

    def act(self, **action):
        self.api.post_server_action(self.server['id'], action)
        self.threads.wait()

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
        for host in self.hosts_at_work():
            self.sweep(host)

    def do_clean_caches(self):
        for host in self.hosts_at_work():
            with self.hosts.on(host):
                self.computes[host].manager._run_image_cache_manager_pass(
                    self.context)

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
        for disk in self.disks:
            disk.store = None
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
        # By a live migration
        has_come = self.is_active_on(host)
        try:
            self.act(evacuate={'host': host})
        finally:
            self.threads.wait()
            if self.instance().host == host:
                for disk in lost:
                    disk.may_be_blank()
            elif not has_come:
                self._end_stray(host)
        return host

    def _end_stray(self, host):
        """End what an evacuation has started, if that compute has died."""
        if not self.is_active_on(host) or host in self.down:
            return
        if host not in self.faults.dead:
            self.violated('a guest is left on %s' % host)
        guest = self.guest(host)
        guest._state = fakelibvirt.VIR_DOMAIN_SHUTOFF
        guest.undefine()
        self.tell('  guest on %s is ended' % host)

    def do_settle(self):
        """What an operator does when told to."""
        self.act(**{'os-resetState': {'state': 'active'}})
        moved = any(map(self.is_active_on, self.other_hosts()))
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

    def do_pause(self):
        self.act(pause=None)

    def do_unpause(self):
        self.act(unpause=None)

    def do_suspend(self):
        self.act(suspend=None)

    def do_resume(self):
        self.act(resume=None)

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

    def do_report(self):
        return ', '.join(host for host in HOSTS if self.guest(host))
