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

"""A machine of the lab: commands and daemons in its namespaces."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from . import config
from . import network
from . import process
from .errors import LabError
from .process import Service

NAMESPACES = ('--mount', '--uts', '--ipc', '--net', '--pid')
OVERLAYS = ('/etc', '/root', '/usr/bin', '/var/lib', '/var/log', '/var/cache')
ENVIRONMENT = {
    'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
    'HOME': '/root', 'LANG': 'C.UTF-8', 'USER': 'root', 'LOGNAME': 'root'}


class Machine:
    """One of config.ADDRESSES, of the lab that is up.

    :param name: "ctl", "host-a", "host-b"
    """

    def __init__(self, name: str):
        if name not in config.ADDRESSES:
            raise LabError('there is no machine %r; there are: %s' % (
                name, ', '.join(config.ADDRESSES)))
        self.name = name
        self.address = config.ADDRESSES[name]
        self.netns = network.path(name)
        self.folder = config.STATE / name
        self.logs = config.LOGS / name
        self._records = config.STATE / 'services' / name

    def __repr__(self):
        return '<%s %s>' % (type(self).__name__, self.name)

    # -- the machine as a whole ----------------------------------------------

    def description(self) -> dict:
        """What init.py is to make of this machine."""
        hosts = '127.0.0.1 localhost\n' + ''.join(
            '%s %s\n' % (address, name)
            for name, address in config.ADDRESSES.items())
        return {
            'name': self.name, 'netns': str(self.netns),
            'record': str(self.folder / 'init.json'),
            'keep': [str(config.ROOT)],
            'overlays': list(OVERLAYS),
            'binds': [[str(self.folder / 'tmp'), '/tmp'],
                      [str(self.folder / 'tmp'), '/var/tmp']],
            'loops': [], 'root': '',
            'folders': {'/run/lock': 0o1777},
            'files': {
                '/etc/hosts': [0o644, hosts],
                # No name server is asked: nobody would answer.
                '/etc/resolv.conf': [0o644, ''],
                '/etc/hostname': [0o644, self.name + '\n']}}

    def prepare(self) -> None:
        """Make the folders of which the machine is built."""
        for path in (self.folder, self.logs, self._records,
                     self.folder / 'tmp'):
            path.mkdir(parents=True, exist_ok=True)
        (self.folder / 'tmp').chmod(0o1777)

    def begin(self) -> subprocess.Popen:
        """Start the machine's first process; finish() waits for it."""
        spec = self.folder / 'machine.json'
        process.write_json(spec, self.description())
        with open(self.logs / 'init.log', 'ab') as log:
            return subprocess.Popen(
                [sys.executable, '-SE',
                 pathlib.Path(__file__).with_name('init.py'), spec],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd='/')

    def finish(self, starting: subprocess.Popen) -> None:
        if starting.wait():
            log = self.logs / 'init.log'
            raise LabError('%s did not start' % self.name, log)

    @property
    def init(self) -> process.Process:
        """The machine's first process, as it is known outside."""
        try:
            fields = json.loads((self.folder / 'init.json').read_text())
        except FileNotFoundError:
            raise LabError('%s is not up; bring the lab up with: lab/lab up'
                           % self.name) from None
        return process.Process(**fields)

    @property
    def pid(self) -> int:
        """:raises: LabError where the machine isn't running"""
        init = self.init
        if not init.alive():
            raise LabError('%s has ended; start over with: lab/lab down, '
                           'lab/lab up' % self.name)
        return init.pid

    def alive(self) -> bool:
        try:
            return self.init.alive()
        except LabError:
            return False

    def path(self, inside) -> pathlib.Path:
        """The path outside of a file that the machine sees.

        :param inside: an absolute path
        """
        return pathlib.Path('/proc/%d/root' % self.pid,
                            str(inside).lstrip('/'))

    # -- commands ------------------------------------------------------------

    def _command(self, argv, cwd) -> list[str]:
        return ['nsenter', '--target', str(self.pid), *NAMESPACES,
                '--wdns=%s' % cwd, '--', *map(str, argv)]

    def popen(self, argv, env=None, cwd='/', **arguments) -> subprocess.Popen:
        """subprocess.Popen in the machine, in a plain environment.

        :param env: added to machine.ENVIRONMENT
        """
        return subprocess.Popen(
            self._command(argv, cwd),
            env={**ENVIRONMENT, **(env or {})}, **arguments)

    def run(self, argv, check=True, timeout=None, input=None, env=None,
            cwd='/', **arguments) -> subprocess.CompletedProcess:
        """subprocess.run in the machine; output is captured as text.

        :param timeout: seconds
        :raises: LabError with the end of the output, unless check is False
        """
        arguments = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE,
                     'text': True, **arguments}
        if input is None:
            arguments.setdefault('stdin', subprocess.DEVNULL)
        done = subprocess.run(
            self._command(argv, cwd), timeout=timeout, input=input,
            env={**ENVIRONMENT, **(env or {})}, **arguments)
        if check and done.returncode:
            told = '\n'.join(str(t) for t in (done.stdout, done.stderr) if t)
            raise LabError('%s on %s ended with %d: %s' % (
                ' '.join(map(str, argv)), self.name, done.returncode,
                told[-2000:].strip()))
        return done

    # -- daemons -------------------------------------------------------------

    def _record(self, name) -> pathlib.Path:
        return self._records / (name + '.json')

    def service(self, name: str) -> Service:
        """:raises: LabError where none was started under that name"""
        return Service.load(self._record(name))

    def services(self) -> list[Service]:
        return [Service.load(path)
                for path in sorted(self._records.glob('[!.]*.json'))]

    def start(self, name: str, argv, env=None, cwd='/') -> Service:
        """Start a daemon that stays in the foreground.

        :param env: added to machine.ENVIRONMENT
        :raises: LabError where it is running already
        """
        path = self._record(name)
        if path.exists() and Service.load(path).alive():
            raise LabError('%s runs on %s already' % (name, self.name))
        service = Service(self.name, name, [str(a) for a in argv],
                          dict(env or {}), str(cwd),
                          str(self.logs / (name + '.log')))
        if not self._has_program(service.argv[0], (env or {}).get(
                'PATH', ENVIRONMENT['PATH'])):
            raise LabError('%s: there is no %s' % (name, service.argv[0]))
        self._launch(service)
        return service

    def _has_program(self, name, path):
        # A link is followed by the machine itself.
        return any(os.path.lexists(self.path(os.path.join(folder, name)))
                   for folder in path.split(':'))

    def _launch(self, service: Service) -> None:
        with open(service.log, 'ab') as log:
            outer = self.popen(
                service.argv, env=service.env, cwd=service.cwd,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        child = _only_child(outer)
        if child is None:
            raise LabError('%s on %s ended at once with %s' % (
                service.name, self.name, outer.poll()), service.log)
        service.pid, service.start, service.sid = (
            child.pid, child.start, outer.pid)
        service.save(self._record(service.name))
        _children.append(outer)

    def stop(self, name: str, timeout: float = 10) -> None:
        """End a daemon: politely, after the timeout (seconds) by force."""
        service = self.service(name)
        members = service.members()
        service.process.signal(signal.SIGTERM)
        service.process.signal(signal.SIGCONT)
        if not process.wait_gone([service.process], timeout):
            members += service.members()  # some were forked meanwhile
            service.process.signal(signal.SIGKILL)
        for member in members:
            member.signal(signal.SIGTERM)
            member.signal(signal.SIGCONT)
        if not process.wait_gone(members, 2):
            members += service.members()
            for member in members:
                member.signal(signal.SIGKILL)
        # Even this takes its time on a busy machine.
        process.wait_gone([service.process, *members], 60)
        _collect()

    def forget(self, name: str) -> None:
        """A daemon that has been stopped is not missed."""
        self._record(name).unlink(missing_ok=True)

    def restart(self, name: str, timeout: float = 10) -> Service:
        """Stop a daemon if it runs, start it as it was started."""
        service = self.service(name)
        self.stop(name, timeout)
        self._launch(service)
        return service

    def kill(self, name: str) -> None:
        """SIGKILL, to the daemon and those it keeps in its session."""
        service = self._running(name)
        members = service.members()
        service.signal(signal.SIGKILL)
        process.wait_gone(members, 5)
        _collect()

    def pause(self, name: str) -> None:
        """SIGSTOP: the daemon is there and answers nothing."""
        service = self._running(name)
        # nsenter, their parent, stops and goes on with its child by itself.
        for member in service.members():
            if member.pid != service.sid:
                member.signal(signal.SIGSTOP)
        # A signal takes its time on a busy machine.
        self.wait(service.paused, 5, 'paused', name)

    def resume(self, name: str) -> None:
        self._running(name).signal(signal.SIGCONT)

    def _running(self, name) -> Service:
        service = self.service(name)
        if not service.alive():
            raise LabError('%s does not run on %s (lab/lab restart %s %s)' % (
                name, self.name, self.name, name))
        return service

    @contextlib.contextmanager
    def paused(self, name: str):
        """A daemon is stopped as long as the context lasts."""
        self.pause(name)
        try:
            yield
        finally:
            if self.service(name).alive():
                self.resume(name)

    # -- waiting -------------------------------------------------------------

    def listening(self, port: int) -> bool:
        """Whether anybody listens on a TCP port of the machine."""
        wanted = ':%04X' % port
        for table in ('tcp', 'tcp6'):
            path = pathlib.Path('/proc/%d/net' % self.pid, table)
            with contextlib.suppress(FileNotFoundError):
                for line in path.read_text().splitlines()[1:]:
                    fields = line.split()
                    # 0A: TCP_LISTEN of include/net/tcp_states.h
                    if fields[1].endswith(wanted) and fields[3] == '0A':
                        return True
        return False

    def wait(self, ready, timeout: float, what: str,
             service: str | None = None) -> None:
        """Wait until a condition holds.

        :param ready: asked until it says True
        :param timeout: seconds
        :param service: the daemon that brings it about; its end is ours
        :raises: LabError
        """
        deadline = time.monotonic() + timeout
        running = self.service(service) if service else None
        while not ready():
            if running and not running.alive():
                raise LabError('%s on %s has ended before %s' % (
                    service, self.name, what), running.log)
            if time.monotonic() > deadline:
                raise LabError('%s%s: not %s after %d s' % (
                    service + ' on ' if service else '', self.name, what,
                    timeout), running and running.log)
            time.sleep(0.02)

    def wait_port(self, port: int, timeout: float = 60,
                  service: str | None = None) -> None:
        self.wait(lambda: self.listening(port), timeout,
                  'listening on port %d' % port, service)


#: nsenters of daemons that this process has started: to be reaped.
_children: list[subprocess.Popen] = []


def _collect() -> None:
    _children[:] = [child for child in _children if child.poll() is None]


def _only_child(outer: subprocess.Popen) -> process.Process | None:
    """The process that nsenter forks into the pid namespace."""
    path = '/proc/%d/task/%d/children' % (outer.pid, outer.pid)
    while outer.poll() is None:
        with contextlib.suppress(OSError, ProcessLookupError):
            with open(path) as source:
                pids = source.read().split()
            if pids:
                return process.Process.of(int(pids[0]))
        time.sleep(0.001)
    return None


def kill(outer: subprocess.Popen) -> None:
    """Kill what Machine.popen() has started, and wait for its end.

    nsenter, which the caller knows, would leave it alone behind.
    """
    child = _only_child(outer)
    if child is not None:
        child.signal(signal.SIGKILL)
    outer.wait()


def forward(code: int) -> int:
    """The exit status of a shell for a return code of subprocess."""
    return 128 - code if code < 0 else code


def terminal() -> dict[str, str]:
    """What a command typed by a user gets of the user's environment."""
    return {key: os.environ[key] for key in ('TERM', 'COLUMNS', 'LINES')
            if key in os.environ}
