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
"""Level cloud: several servers at once, faults in each place meanwhile."""

import concurrent.futures
import contextlib
import threading
import time

import libvirt
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
          'clock of host': 1, 'switch use_cow_images': 1,
          'switch preallocate_images': 1, 'switch storage_pool_mapping': 1,
          'none': 2}
#: The same for the machine with the control plane.
CONTROL_FAULTS = {'kill nova-conductor': 1, 'pause nova-conductor': 1,
                  'restart nova-conductor': 1, 'pause rabbitmq': 1,
                  'pause glance': 1, 'kill glance': 1, 'pause nova-api': 1,
                  'none': 2}
OPTIONS = {'storage_migration_bandwidth': 4,
           'storage_migration_stall_timeout': 10}
#: What a setting is switched between; the first is the lab's own.
SETTINGS = {('DEFAULT', 'use_cow_images'): ('true', 'false'),
            ('DEFAULT', 'preallocate_images'): ('none', 'space'),
            ('libvirt', 'storage_pool_mapping'): ('', 'swap:soak-swap')}
MAPPED, MAPPED_PATH = 'soak-swap', '/var/lib/nova/soak-swap'
#: Faults of a round in one place, one after the other; the places have theirs
#: at the same time.
LEAST, MOST = 5, 11
#: Operations drawn for a server: more than it comes to while faults last.
OPERATIONS = 60
# Seconds after one that has failed, so that refusals don't use them up.
PAUSE = 2
# What is done to each server when the faults of a round are over.
AFTER = {'migrate_confirm': 2, 'migrate_revert': 1, 'live_migrate': 2}
# What a lab or a cloud that is whole doesn't raise.
LAB_OR_CLOUD = (LabError, libvirt.libvirtError,
                openstack.exceptions.SDKException)
# Of a host that dies: its servers are made anew on the other one.
EVACUATION = .06


class Fault:
    """One fault on one machine.

    :param cloud: the Cloud
    :param name: of FAULTS or CONTROL_FAULTS
    :param place: name of the machine
    :param after: seconds after the one before
    :param stays: seconds
    """

    def __init__(self, cloud, name, place, after, stays):
        self.cloud, self.name = cloud, name
        self.machine = (Host if place in config.HOSTS else Machine)(place)
        self.after, self.stays = after, stays

    def __str__(self):
        if self.name == 'none':
            return ''
        return '%s (%s) after %.1f s for %.1f s' % (
            self.name, self.machine.name, self.after, self.stays)

    def come_and_go(self, say):
        """:param say: called without anything when it comes"""
        time.sleep(self.after)
        if self.name == 'none':
            return
        say()
        with contextlib.ExitStack() as stack:
            self._begin(stack)
            time.sleep(self.stays)
        if isinstance(self.machine, Host):
            self.machine.wait_ready()

    def _begin(self, stack):
        place = self.machine
        verb, what = self.name.split(' ', 1)
        if verb == 'reboot':
            die(place)
            stack.callback(revive, self.cloud, place)
        elif verb == 'clock':
            # What a clock that is wrong does to certificates.
            stack.callback(place.certificate, 'good')
            place.certificate('not-yet-valid')
        elif verb == 'kill':
            place.kill(what)
            if what == 'nova-compute':
                stack.callback(self.cloud.start_compute, place.name)
            elif what == 'libvirtd':
                stack.callback(place.restart, what)
            else:
                stack.callback(self.cloud.restart, place.name, what)
        elif verb == 'pause':
            stack.enter_context(place.paused(what))
        elif verb == 'restart':
            self.cloud.restart(place.name, what)
        elif verb == 'cut':
            stack.enter_context(place.link.as_cut())
        elif verb == 'slow':
            stack.enter_context(place.link.slowed('20mbit'))
        elif verb == 'fill':
            stack.callback(place.free, POOL)
            place.fill(POOL)
        elif verb == 'stop':
            virsh = ['virsh', '-c', 'qemu:///system']
            stack.callback(place.run, [*virsh, 'pool-start', POOL],
                           check=False)
            place.run([*virsh, 'pool-destroy', POOL], check=False)
        elif verb == 'switch':
            (section, key), values = next(
                pair for pair in SETTINGS.items() if pair[0][1] == what)
            now = self.cloud.get(place.name, section, key) or values[0]
            self.cloud.set(place.name, section, key,
                           values[1 - values.index(now)])


class Happening:
    """Faults that come and go, in each place one after the other.

    A context, which ends when all of them are over.

    :param faults: a list of Faults for each place
    :param say: called with each Fault that comes
    """

    def __init__(self, faults, say):
        self._errors = []
        self._workers = [threading.Thread(target=self._work, args=(one, say))
                         for one in faults]

    def _work(self, faults, say):
        for fault in faults:
            try:
                fault.come_and_go(lambda: say(fault))
            except Exception as error:
                self._errors.append(servers.Lost('after %s: %s' % (
                    fault, error)))
                return

    def lasts(self) -> bool:
        return any(worker.is_alive() for worker in self._workers)

    def __enter__(self):
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_error):
        for worker in self._workers:
            worker.join()
        if self._errors:
            raise self._errors[0]


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
        cloud.again = 2
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

        :raises: servers.Lost, with the attributes subject (where it is one's)
            and steps
        """
        told = []
        try:
            if self.draw.chance(EVACUATION):
                self._evacuation(number, Host(
                    'host-a' if self.draw.chance(.5) else 'host-b'), told)
            else:
                self._faults(number, told)
        except (servers.Lost, LabError) as lost:
            lost.steps = told
            raise
        return told

    def _faults(self, number, told):
        faults = [[
            Fault(self.cloud, self.draw.one(weights), place,
                  self.draw.seconds(0, 5), self.draw.seconds(1, 8))
            for _one in range(self.draw.number(LEAST, MOST))]
            for place, weights in (*((name, FAULTS) for name in config.HOSTS),
                                   (config.CONTROL, CONTROL_FAULTS))]
        drawn = {subject: [self.draw.one(servers.OPERATIONS)
                           for _one in range(OPERATIONS)]
                 for subject in self.subjects}
        after = {subject: self.draw.one(AFTER) for subject in self.subjects}

        def comes(fault):
            told.append(plan.Step(number, '-', plan.FAULT, fault=str(fault)))
            self.say(told[-1])

        with Happening(faults, comes) as happening:
            since = dict(zip(self.subjects, self._all(
                lambda subject: self._operate(
                    number, subject, drawn[subject], happening, told))))
        self._judge(since)
        self._move_again(number, after, told)

    def _move_again(self, number, names, told):
        """What faults have cut off must go through when there are none.

        :param names: of the operations, by servers.Subject
        :param told: a list to which the steps are added
        :raises: servers.Lost, with the attribute subject
        """
        def move(subject):
            step = plan.Step(number, subject.name, names[subject],
                             'without a fault')
            told.append(step)
            try:
                getattr(subject, step.name)()
                step.outcome = 'done'
            except LAB_OR_CLOUD as error:
                step.outcome = 'failed: %s' % str(error)[:160]
                raise servers.Lost(
                    '%s: %s without a fault has failed: %s' % (
                        subject.name, step.name, error),
                    subject.name) from error
            finally:
                self.say(step)

        self._all(move)

    def _operate(self, number, subject, names, happening, told):
        """Go from operation to operation as long as faults come.

        :param names: of the operations
        :param happening: Happening
        :param told: a list to which the steps are added
        :returns: names of those since it was last known to run
        """
        since = []
        for name in names:
            if not happening.lasts():
                break
            step = plan.Step(number, subject.name, name)
            since.append(name)
            try:
                getattr(subject, name)()
                step.outcome = 'done'
                since = [name]
            except Exception as error:  # the API's, too: what we cause
                step.outcome = 'failed: %s' % str(error)[:160]
            told.append(step)
            self.say(step)
            if step.outcome != 'done' and happening.lasts():
                time.sleep(PAUSE)
                try:
                    subject.recover(since)
                    since = since[-1:]
                except servers.Lost:
                    return since  # judged when the faults are over
                except Exception:
                    continue  # the next operation may go, or be refused
        return since

    def _evacuation(self, number, host, told):
        """A host dies, its servers are made anew, and it comes back."""
        steps = {subject: [plan.Step(
            number, subject.name, 'evacuate', fault='dead host (%s)' %
            host.name)] for subject in self.subjects
            if subject.server is not None and
            subject.server.host == host.name}
        if not steps:
            return
        told += [step for [step] in steps.values()]
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
                self.say(step)
        self._judge({subject: ['evacuate'] for subject in steps})

    def _judge(self, since):
        """Have the oracle look at each server.

        :param since: by servers.Subject, names of the operations since it was
            last known to run
        :raises: servers.Lost, with the attribute subject
        """
        def look(subject):
            subject.recover(since[subject])
            oracle.check(subject)

        def judge(subject):
            try:
                try:
                    look(subject)
                except openstack.exceptions.ConflictException:
                    # Nova has called it an error since: of a live migration
                    # it does so when the guest runs again.
                    look(subject)
            except (servers.Lost, *LAB_OR_CLOUD) as error:
                raise servers.Lost(str(error), subject.name) from error

        self._wait_services()
        with concurrent.futures.ThreadPoolExecutor(len(since)) as pool:
            list(pool.map(judge, since))

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

    def make_anew(self, name):
        """Have another server for one that is lost.

        :raises: servers.Lost: not even that
        """
        subject, = [one for one in self.subjects if one.name == name]
        try:
            subject.boot_anew()
        except LAB_OR_CLOUD as error:
            raise servers.Lost('%s can not be made anew: %s' % (
                name, error)) from error

    def end(self):
        """Delete the servers; nothing of any may be left.

        What a host doesn't know to be there, as it was away when the server
        was deleted, is what an operator sweeps.

        :raises: servers.Lost
        """
        self._all(lambda subject: subject.server and subject.server.delete())
        until = time.monotonic() + 90
        while oracle.nobody_s(set()) and time.monotonic() < until:
            time.sleep(2)
        for host in oracle.nobody_s(set()):
            self.say('%s: %s' % (host, self.cloud.manage(
                'libvirt', 'purge_orphans', place=host, check=False).stdout))
        if left := oracle.nobody_s(set()):
            raise oracle.Left('deleted servers have left %s' % left)


def run(cloud, seed: int, limit: plan.Limit, count: int,
        say, keep_going=False) -> report.Result:
    """Go on until the limit or the first trouble.

    :param say: called with each step
    :param keep_going: make a server that is lost anew, and go on
    """
    result = report.Result('cloud', seed)
    start, rounds = time.monotonic(), 0
    soak = Soak(cloud, plan.Draw(seed), count, say)
    try:
        soak.begin()
        while not limit.reached(rounds):
            rounds += 1
            try:
                result.steps += soak.once(rounds)
            except servers.Lost as lost:
                _complain(result, lost)
                if not keep_going or result.subject == '-':
                    break
                say('%4d %-8s %s' % (rounds, result.subject, lost))
                soak.make_anew(result.subject)
            for name, kib in oracle.memory().items():
                result.memory.setdefault(name, []).append(kib)
            result.moves = sum(
                step.name in servers.MOVES and step.outcome == 'done'
                for step in result.steps)
            say('%4d          %d faults so far, %d moves went through' % (
                rounds, result.faults, result.moves))
        if keep_going or not result.complaint:
            soak.end()
    except (servers.Lost, LabError) as lost:
        _complain(result, lost)
    finally:
        result.seconds = time.monotonic() - start
        result.judge_memory()
    return result


def _complain(result, lost):
    result.complaint += ('; ' if result.complaint else '') + str(lost)
    result.subject = getattr(lost, 'subject', '-')
    result.steps += getattr(lost, 'steps', [])
