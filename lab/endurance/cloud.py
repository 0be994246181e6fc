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
"""Level cloud: several servers at once, a few faults a round."""

import concurrent.futures
import contextlib
import threading
import time

import openstack.exceptions

from .. import config
from ..errors import LabError
from ..host import Host
from ..machine import Machine
from . import oracle
from . import plan
from . import report
from . import servers

POOL = 'nova-disks-pool'
#: Weights. Each comes at a random moment, stays some seconds, and is undone.
FAULTS = {'kill nova-compute': 4, 'kill libvirtd': 3, 'pause libvirtd': 1,
          'pause nova-compute': 1, 'cut link': 2, 'slow link': 2,
          'fill pool': 2, 'stop pool': 2, 'reboot host': 1,
          'clock of host': 1, 'pause nova-conductor': 1,
          'restart nova-conductor': 1, 'switch use_cow_images': 1,
          'switch preallocate_images': 1, 'switch storage_pool_mapping': 1,
          'none': 2}
OPTIONS = {'storage_migration_bandwidth': 4,
           'storage_migration_stall_timeout': 10}
#: What a setting is switched between; the first is the lab's own.
SETTINGS = {('DEFAULT', 'use_cow_images'): ('true', 'false'),
            ('DEFAULT', 'preallocate_images'): ('none', 'space'),
            ('libvirt', 'storage_pool_mapping'): ('', 'swap:soak-swap')}
MAPPED, MAPPED_PATH = 'soak-swap', '/var/lib/nova/soak-swap'
#: Faults of a round, one after the other; operations on a server meanwhile.
MOST = 4
# Of a host that dies: its servers are made anew on the other one.
EVACUATION = .06


class Fault:
    """One fault on one machine.

    :param cloud: the Cloud
    :param name: of FAULTS
    :param host: where
    :param after: seconds from now
    :param stays: seconds
    """

    def __init__(self, cloud, name, host, after, stays):
        self.cloud, self.name, self.host = cloud, name, Host(host)
        self.after, self.stays = after, stays

    def __str__(self):
        if self.name == 'none':
            return ''
        return '%s (%s) after %.1f s for %.1f s' % (
            self.name, self.host.name, self.after, self.stays)

    def come_and_go(self):
        time.sleep(self.after)
        if self.name != 'none':
            with contextlib.ExitStack() as stack:
                self._begin(stack)
                time.sleep(self.stays)
            self.host.wait_ready()

    def _begin(self, stack):
        host, verb = self.host, self.name.split(' ', 1)[0]
        what = self.name.split(' ', 1)[1]
        control = Machine(config.CONTROL)
        if self.name == 'reboot host':
            die(host)
            stack.callback(revive, self.cloud, host)
        elif verb == 'clock':
            # What a clock that is wrong does to certificates.
            stack.callback(host.certificate, 'good')
            host.certificate('not-yet-valid')
        elif self.name == 'kill nova-compute':
            host.kill(what)
            stack.callback(self.cloud.start_compute, host.name)
        elif self.name == 'kill libvirtd':
            host.kill(what)
            stack.callback(host.restart, what)
        elif verb == 'pause':
            place = control if 'conductor' in what else host
            stack.enter_context(place.paused(what))
        elif verb == 'restart':
            self.cloud.restart(config.CONTROL, what)
        elif verb == 'cut':
            stack.enter_context(host.link.as_cut())
        elif verb == 'slow':
            stack.enter_context(host.link.slowed('20mbit'))
        elif verb == 'fill':
            host.fill(POOL)
            stack.callback(host.free, POOL)
        elif verb == 'stop':
            self._stop_pool(stack)
        elif verb == 'switch':
            (section, key), values = next(
                pair for pair in SETTINGS.items() if pair[0][1] == what)
            now = self.cloud.get(host.name, section, key) or values[0]
            self.cloud.set(host.name, section, key,
                           values[1 - values.index(now)])

    def _stop_pool(self, stack):
        for call, virsh in ((None, 'pool-destroy'),
                            (stack.callback, 'pool-start')):
            argv = ['virsh', '-c', 'qemu:///system', virsh, POOL]
            if call:
                call(self.host.run, argv, check=False)
            else:
                self.host.run(argv, check=False)


@contextlib.contextmanager
def happening(faults):
    """They come and go in a thread of their own, and are over at the end.

    :returns: the thread
    """
    errors = []

    def work():
        try:
            for fault in faults:
                fault.come_and_go()
        except Exception as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield worker
    finally:
        worker.join()
    if errors:
        raise errors[0]


def die(host):
    """A host loses its power."""
    host.kill('nova-compute')
    host.kill('libvirtd')
    # In its own namespace: no process of another host's.
    host.run(['pkill', '-9', 'qemu-system'], check=False)
    # libvirt knows nothing of guests and pools when such a host is back.
    host.run(['find', '/run/libvirt/qemu', '/run/libvirt/storage', '-type',
              'f', '-delete'])


def revive(cloud, host):
    host.restart('libvirtd')
    host.wait_ready()
    cloud.start_compute(host.name)


class Soak:
    """Rounds on a cloud that is up.

    :param cloud: the Cloud, its hosts on images_type libvirt-storage
    :param draw: plan.Draw
    :param count: how many servers at once
    :param say: called with each step
    """

    def __init__(self, cloud, draw, count, say):
        self.cloud, self.draw, self.say = cloud, draw, say
        self.subjects = [servers.Subject(cloud, 'soak-%d' % number)
                         for number in range(count)]

    def begin(self):
        """Make the servers, and a flavor to be resized to again."""
        find = self.cloud.conn.compute.find_flavor
        like = self.cloud.flavor(servers.BIGGER)
        if not find(servers.BIGGER + '.same'):
            self.cloud.conn.compute.create_flavor(
                name=servers.BIGGER + '.same', ram=like.ram, vcpus=like.vcpus,
                disk=like.disk, ephemeral=like.ephemeral, swap=like.swap)
        for name in config.HOSTS:
            self._add_pool(Host(name))
            self.cloud.set_many(name, {
                ('libvirt', key): value for key, value in OPTIONS.items()})
        self._all(lambda subject: subject.boot_anew())

    @staticmethod
    def _add_pool(host):
        virsh = ['virsh', '-c', 'qemu:///system']
        host.run(['install', '-d', '-o', 'nova', '-g', 'nova', MAPPED_PATH])
        if host.run([*virsh, 'pool-info', MAPPED], check=False).returncode:
            host.run([*virsh, 'pool-define-as', MAPPED, 'dir', '--target',
                      MAPPED_PATH])
        host.run([*virsh, 'pool-start', MAPPED], check=False)
        host.run([*virsh, 'pool-autostart', MAPPED])

    def _all(self, work):
        with concurrent.futures.ThreadPoolExecutor(
                len(self.subjects)) as pool:
            return list(pool.map(work, self.subjects))

    def once(self, number) -> list[plan.Step]:
        """Operations on each server, faults meanwhile, and the oracle.

        :raises: servers.Lost, with the attribute subject
        """
        if self.draw.chance(EVACUATION):
            return self._evacuation(number, Host(
                'host-a' if self.draw.chance(.5) else 'host-b'))
        faults = [Fault(self.cloud, self.draw.one(FAULTS),
                        'host-a' if self.draw.chance(.5) else 'host-b',
                        self.draw.seconds(0, 12), self.draw.seconds(1, 10))
                  for _one in range(self.draw.number(1, MOST))]
        told = plan.SEVERAL.join(filter(None, map(str, faults)))
        drawn = {subject: [self.draw.one(servers.OPERATIONS)
                           for _one in range(MOST)]
                 for subject in self.subjects}
        steps = {subject: [] for subject in self.subjects}

        def operate(subject, worker):
            for name in drawn[subject]:
                step = plan.Step(number, subject.name, name, fault=told)
                steps[subject].append(step)
                try:
                    getattr(subject, name)()
                    step.outcome = 'done'
                except servers.Lost:
                    raise
                except Exception as error:  # the API's, too: what we cause
                    step.outcome = 'failed: %s' % str(error)[:160]
                    return
                if not worker.is_alive():
                    return

        with happening(faults) as worker:
            self._all(lambda subject: operate(subject, worker))
        return self._judge(steps)

    def _evacuation(self, number, host):
        """A host dies, its servers are made anew, and it comes back."""
        steps = {subject: [plan.Step(
            number, subject.name, 'evacuate', fault='dead host (%s)' %
            host.name)] for subject in self.subjects
            if subject.server is not None and
            subject.server.host == host.name}
        if not steps:
            return []
        self.say(plan.Step(number, '-', 'dead host (%s)' % host.name))
        die(host)
        with self.cloud.forced_down(
                host.name, lambda _name: revive(self.cloud, host)):
            for subject, [step] in steps.items():
                try:
                    subject.evacuate()
                    step.outcome = 'done'
                except Exception as error:
                    step.outcome = 'failed: %s' % str(error)[:160]
        return self._judge(steps)

    def _judge(self, steps):
        """Have the oracle look at each server.

        :param steps: by servers.Subject, a list
        :returns: all of them
        :raises: servers.Lost, with the attributes subject and steps
        """
        self._wait_services()
        told = [step for done in steps.values() for step in done]
        for step in told:
            self.say(step)

        def look(subject):
            subject.recover([step.name for step in steps[subject]])
            oracle.check(subject)

        def judge(subject):
            try:
                try:
                    look(subject)
                except openstack.exceptions.ConflictException:
                    # Nova has called it an error since: of a live migration
                    # it does so when the guest runs again.
                    look(subject)
            except (servers.Lost, LabError) as error:
                lost = servers.Lost(str(error))
                lost.subject = subject.name
                raise lost from error

        try:
            with concurrent.futures.ThreadPoolExecutor(len(steps)) as pool:
                list(pool.map(judge, steps))
        except servers.Lost as lost:
            lost.steps = told
            raise
        return told

    def _wait_services(self, limit=120):
        """Until both computes are up and enabled again."""
        until = time.monotonic() + limit
        while True:
            with contextlib.suppress(Exception):
                good = {service.host for service in
                        self.cloud.conn.compute.services(
                            binary='nova-compute')
                        if (service.state, service.status) ==
                        ('up', 'enabled')}
                if good >= set(config.HOSTS):
                    return
            if time.monotonic() > until:
                raise servers.Lost(
                    'the compute services are not up %d s after the fault'
                    % limit)
            time.sleep(1)

    def end(self):
        """Delete the servers; nothing of any may be left.

        :raises: servers.Lost
        """
        self._all(lambda subject: subject.server and subject.server.delete())
        until = time.monotonic() + 90
        while left := oracle.nobody_s(set()):
            if time.monotonic() > until:
                raise oracle.Left('deleted servers have left %s' % left)
            time.sleep(2)


def run(cloud, seed: int, limit: plan.Limit, count: int,
        say) -> report.Result:
    """Go on until the limit or the first trouble.

    :param say: called with each step
    """
    result = report.Result('cloud', seed)
    start, rounds = time.monotonic(), 0
    soak = Soak(cloud, plan.Draw(seed), count, say)
    try:
        soak.begin()
        while not limit.reached(rounds):
            rounds += 1
            result.steps += soak.once(rounds)
            for name, kib in oracle.memory().items():
                result.memory.setdefault(name, []).append(kib)
        soak.end()
    except servers.Lost as lost:
        result.complaint = str(lost)
        result.subject = getattr(lost, 'subject', '-')
        result.steps += getattr(lost, 'steps', [])
    finally:
        result.seconds = time.monotonic() - start
        result.judge_memory()
    return result
