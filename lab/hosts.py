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

"""Level hosts: up, down, status."""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

from . import ceph
from . import config
from . import guide
from . import host
from . import lock
from . import modular
from . import network
from . import packages
from . import pki
from . import preflight
from . import process
from . import roots
from . import ssh
from . import state
from . import storage
from . import ui
from .errors import LabError
from .machine import Machine

MEMORY = config.STATE / 'memory'


def prepare(options, progress: ui.Steps) -> None:
    """Install what is missing."""
    missing = packages.missing(packages.wanted(options))
    if missing:
        with progress.step('Debian packages (%d)' % len(missing)):
            packages.install(missing)
    if options.host_root:
        roots.ensure(options.host_root, progress)
    if 'vm' in options.storage.split(','):
        with progress.step('kernel and packages of the storage machine'):
            storage.prepare()
    if options.modular:
        modular.ensure(progress)


def up(options: state.Options, progress: ui.Steps | None = None) -> None:
    """Bring two hosts up; remains of an earlier try are removed first.

    The caller holds the lock.

    :raises: LabError; what was made stays for its logs until down()
    """
    progress = progress or ui.Steps()
    known = state.find()
    preflight.check(options, leftover=bool(known))
    guide.find()
    prepare(options, progress)
    if known:
        down(progress)
    config.STATE.mkdir(parents=True, exist_ok=True)
    config.STATE.chmod(0o711)
    shutil.rmtree(config.LOGS, ignore_errors=True)
    now = state.State('starting', options)
    # From here on a kill leaves something behind, and this says so.
    now.save()
    machines = [Machine(config.CONTROL), *host.both()]
    with progress.step('namespaces, file systems'), \
            concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = [pool.submit(network.create, options.network == 'ovs')]
        if options.ssh:
            jobs.append(pool.submit(ssh.make_keys, config.STATE / 'ssh'))
        memory = _memory() if options.memory else None
        jobs.append(pool.submit(machines[0].prepare))
        jobs += [pool.submit(m.prepare, options.ssh, memory,
                             options.host_root, options.modular)
                 for m in machines[1:]]
        for job in jobs:
            job.result()
        starting = [(m, m.begin()) for m in machines]
        for machine, process_ in starting:
            machine.finish(process_)
        for machine in machines[1:]:
            machine.make_users()
            machine.mend_emulator()
    beside = (storage.StorageVM() if 'vm' in options.storage.split(',')
              else None)
    if beside:
        beside.begin()
    with progress.step('certificates, as the admin guide says'):
        _certificates(*machines)
    with progress.step('virtlogd, %s' % (
            'modular daemons' if options.modular else 'libvirtd')):
        for machine in machines[1:]:
            machine.start_daemons()
        for machine in machines[1:]:
            machine.wait_ready()
    if ceph.is_wanted(options):
        with progress.step('Ceph: one monitor, one OSD in memory'):
            _bring_ceph(machines)
    if beside:
        with progress.step('storage machine: volume group, NFS exports'):
            beside.wait_ready()
    now = state.find()
    now.certificates = {name: 'good' for name in config.HOSTS}
    if options.level == 'hosts':
        now.phase = 'up'
    now.save()


def _bring_ceph(machines) -> None:
    there = ceph.Ceph()
    there.up()
    there.tell(machines[0])
    for machine in machines[1:]:
        there.join(machine)


def _certificates(control, *computes) -> None:
    authority = pki.Hosts(config.STATE / 'pki', control)
    authority.create()

    def one(host_):
        authority.issue(host_)
        host_.configure()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(one, computes))


def _memory() -> pathlib.Path:
    """Make room in memory for what the hosts have on their disks."""
    MEMORY.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=80%,mode=711', 'lab',
                    MEMORY], check=True)
    return MEMORY


def down(progress: ui.Steps | None = None) -> bool:
    """Remove whatever is there of this lab; its logs stay.

    The caller holds the lock.

    :returns: whether there was anything
    """
    progress = progress or ui.Steps()
    packages.forget_policy()
    known = state.find()
    if known is None:
        return False
    if known.boot == state.boot_id():
        known.phase = 'stopping'
        known.save()
        with progress.step('processes, namespaces'):
            _end_processes()
            network.delete()
            _free_loops()
            if MEMORY.is_mount():
                subprocess.run(['umount', MEMORY], check=True)
    with progress.step('files'):
        keep = {config.LOGS.name, 'state.json'}
        for entry in config.STATE.iterdir():
            if entry.name in keep:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (config.STATE / 'state.json').unlink()
    return True


def _inside() -> set[process.Process]:
    """All processes in the lab's namespaces, and what keeps them there."""
    found = set()
    for name in config.ADDRESSES:
        with contextlib.suppress(LabError):
            found.add(Machine(name).init)
        for pid in network.pids(name):
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    found.add(process.Process.of(pid))
    return {each for each in found if each.alive()}


def _end_processes() -> None:
    """End each machine's first process, then whoever is left in one."""
    everybody = set()
    deadline = time.monotonic() + 30
    # A namespace of the lab has only what the lab brought there.
    while left := _inside():
        everybody |= left
        for each in left:
            each.signal(signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LabError('processes in the lab\'s namespaces do not end: '
                           '%s' % ', '.join(lock.describe(each.pid)
                                            for each in left))
        time.sleep(0.01)
    # One that is ending leaves its namespaces first.
    process.wait_gone(everybody, 20)


def _loops() -> list[str]:
    """Loop devices over files of this lab."""
    found = []
    for path in pathlib.Path('/sys/block').glob('loop*/loop/backing_file'):
        try:
            backing = path.read_text().strip().removesuffix(' (deleted)')
        except OSError:
            continue
        if pathlib.Path(backing).is_relative_to(config.STATE):
            found.append('/dev/' + path.parts[3])
    return found


def _free_loops() -> None:
    """Wait for the mounts of ended machines to be gone."""
    deadline = time.monotonic() + 20
    while found := _loops():
        if time.monotonic() > deadline - 18:
            for device in found:
                subprocess.run(['losetup', '--detach', device],
                               stderr=subprocess.DEVNULL)
        if time.monotonic() > deadline:
            raise LabError('still in use: %s' % ', '.join(found))
        time.sleep(0.02)


def status() -> list[ui.Check]:
    """Machines, daemons, links, certificates, pools, TLS both ways."""
    known = state.load()
    checks = []
    for machine in (Machine(config.CONTROL), *host.both()):
        alive = machine.alive()
        checks.append(ui.Check(machine.name, 'machine', alive,
                               machine.address if alive else 'has ended'))
        if not alive:
            continue
        for service in machine.services():
            checks.append(ui.Check(
                machine.name, service.name,
                service.alive() and not service.paused(),
                'pid %d' % service.pid + (' paused' if service.paused() else '')
                if service.alive() else 'has ended'))
        if isinstance(machine, host.Host):
            checks += _host_status(machine, known)
    return checks


def _host_status(machine: host.Host, known) -> list[ui.Check]:
    fault = machine.link.faulty()
    variant = known.certificates.get(machine.name, 'good')
    checks = [
        ui.Check(machine.name, 'link', not fault, fault or 'whole'),
        ui.Check(machine.name, 'certificate', variant == 'good', variant)]
    service = machine.service('libvirtd')
    if not service.alive() or service.paused():
        return checks
    for peer in host.both():
        if peer.name != machine.name:
            checks.append(_reach(machine, peer))
    with machine.connect() as connection:
        for pool in connection.listAllStoragePools():
            active, capacity, _allocation, free = pool.info()
            checks.append(ui.Check(
                machine.name, 'pool ' + pool.name(), bool(active),
                '%.1f of %.1f GiB free' % (free / 2**30, capacity / 2**30)
                if active else 'inactive'))
    attempts = len(machine.ssh_attempts())
    if not known.options.ssh:
        checks.append(ui.Check(machine.name, 'ssh', True,
                               '%d attempts recorded' % attempts))
    return checks


def _reach(machine, peer) -> ui.Check:
    try:
        done = machine.run(['virsh', '-c', machine.uri(peer), 'uri'],
                           check=False, timeout=10)
        ok, told = not done.returncode, done.stderr.strip().splitlines()
    except subprocess.TimeoutExpired:
        ok, told = False, ['no answer in 10 s']
    return ui.Check(machine.name, 'TLS to ' + peer.name, ok,
                    '' if ok else told[-1] if told else '')


def healthy() -> bool:
    return all(check.ok for check in status())


class Hosts:
    """Two hosts as a context; a lab that was up before stays up.

    :param ssh: with sshd and keys
    :param storage: what there is beside them, see state.Options
    """

    def __init__(self, ssh: bool = False, progress: ui.Steps | None = None,
                 storage: str = ''):
        self.options = state.Options(level='hosts', ssh=ssh, storage=storage)
        self.progress = progress
        self.mine = False

    def __enter__(self) -> tuple[host.Host, ...]:
        with lock.held():
            known = state.find()
            if (known and known.phase == 'up' and
                    known.boot == state.boot_id()):
                if known.options.ssh != self.options.ssh:
                    raise LabError('a lab is up %s --ssh; take it down first '
                                   '(lab/lab down)' % (
                                       'with' if known.options.ssh
                                       else 'without'))
                if self.options.storage not in ('', known.options.storage):
                    raise LabError('a lab is up without --storage %s; take it '
                                   'down first (lab/lab down)' %
                                   self.options.storage)
            else:
                self.mine = True
                try:
                    up(self.options, self.progress)
                except BaseException:
                    down()
                    raise
        return host.both()

    def __exit__(self, *_exception) -> None:
        if self.mine:
            with lock.held():
                down()
