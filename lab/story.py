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
"""The whole story of the series, live: ``make demo``.

A legacy server, a host that is switched to storage pools, a disk that moves
into the pool, over to the other host without SSH, back again and larger; at
last a server that is saved with its memory, and three that go on from it.
What is done is done by the public API, and what is shown is said by the
guest, by libvirt and by the hosts' record of attempts to use SSH.
"""

import contextlib
import dataclasses
import json
import time

import rich.console
import rich.markup
import rich.progress
import rich.table

from . import cloud
from . import config
from . import hosts
from . import live_images
from . import lock
from . import state
from . import ui
from .errors import LabError
from .guest import testimony
from .host import both
from .host import Host

MIB = 1 << 20
GIB = 1 << 30
RESULT = config.ROOT / 'build' / 'demo.json'
DATA_MIB = 48
WRITE = 'boot 1: fill data %d %%s\nboot 1: fill raw 8 %%s vdb 64\n' % DATA_MIB
FLAVOR, LARGER = 'lab.small.disks', 'lab.medium.disks'
# An application that takes its time until it is of use, and what it knows then
# is in its memory alone.
WARM_UP = ('(n=0; while :; do n=$((n + 1)); echo $n >/run/counter.new; '
           'mv /run/counter.new /run/counter; sleep .1; done) '
           '>/dev/null 2>&1 & echo begun')
WARM = 50
CLONES = ('host-a', 'host-b', 'host-a')


class Unfulfilled(LabError):
    """Something is not as the story tells it."""


class Story:
    """Shows each step as it runs and remembers it."""

    def __init__(self, console):
        self.console = console
        self.began = time.monotonic()
        self.steps = []

    @contextlib.contextmanager
    def step(self, name):
        """:yields: a Step, whose detail is shown when it is done"""
        step = Step(name)
        self.steps.append(step)
        try:
            with step.shown(self.console):
                yield step
            step.ok = True
        except BaseException as error:
            step.detail = str(error) or type(error).__name__
            raise
        finally:
            step.seconds = time.monotonic() - step.start
            self.console.print(
                '%s %7.1f s  %s%s' % (
                    '[green]✓[/]' if step.ok else '[red]✗[/]', step.seconds,
                    name, '\n             [dim]%s[/]' % rich.markup.escape(
                        step.detail)
                    if step.detail and step.ok else ''), highlight=False)

    def table(self):
        table = rich.table.Table(title='The story', title_justify='left')
        for title, justify in (('', 'left'), ('step', 'left'),
                               ('seconds', 'right'), ('what was seen', 'left')):
            table.add_column(title, justify=justify)
        for step in self.steps:
            table.add_row('[green]✓[/]' if step.ok else '[red]✗[/]',
                          step.name, '%.1f' % step.seconds,
                          rich.markup.escape(step.detail))
        table.add_section()
        table.add_row('', 'all', '%.1f' % (time.monotonic() - self.began), '')
        return table

    def compare(self, rows):
        """Show a table: how long each server took to its first answer."""
        table = rich.table.Table(title='Boot against clone',
                                 title_justify='left')
        for title, justify in (('server', 'left'), ('host', 'left'),
                               ('boots', 'right'), ('counter', 'right'),
                               ('seconds to its first answer', 'right'),
                               ('of a boot', 'right')):
            table.add_column(title, justify=justify)
        for row in rows:
            table.add_row(row.name, row.host, str(row.boots), str(row.counter),
                          '%.1f' % row.seconds,
                          '%.2f' % (row.seconds / rows[0].seconds))
        self.console.print(table)

    def write(self, ssh_attempts):
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({
            'ok': bool(self.steps) and all(step.ok for step in self.steps),
            'steps': [{'name': step.name, 'seconds': round(step.seconds, 2),
                       'ok': step.ok, 'detail': step.detail}
                      for step in self.steps],
            'ssh_attempts': ssh_attempts}, indent=1) + '\n')


class Step:
    def __init__(self, name):
        self.name = name
        self.start = time.monotonic()
        self.seconds = 0.
        self.ok = False
        self.detail = ''
        self._bar = None

    @contextlib.contextmanager
    def shown(self, console):
        if not console.is_terminal:
            yield
            return
        with rich.progress.Progress(
                rich.progress.SpinnerColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn('{task.description}'),
                rich.progress.BarColumn(), console=console,
                transient=True) as bar:
            self._bar = bar, bar.add_task(self.name, total=None)
            yield

    def watch(self, server):
        """Show what the API tells of a server while one waits for it."""
        if not self._bar:
            return
        bar, task = self._bar
        known = bool(server.progress)
        bar.update(task, total=100 if known else None,
                   completed=server.progress or 0,
                   description='%s [dim](%s%s)[/]' % (
                       self.name, server.status,
                       ', ' + server.task_state if server.task_state else ''))


@dataclasses.dataclass
class Answer:
    """The first one of a guest.

    :ivar counter: of its application
    :ivar boots: how often it has booted
    :ivar seconds: since its server was asked for
    """
    name: str
    host: str
    counter: int
    boots: int
    seconds: float

    @classmethod
    def of(cls, the_cloud, name, host, image='guest'):
        """:returns: a new server, and its first answer"""
        start = time.monotonic()
        server = the_cloud.boot(name, host=host, image=image, wait=False)
        said = live_images.first_answer(
            server, host, 'sh',
            'echo $(cat /run/counter 2>/dev/null || echo 0) $(cat /data/boots)',
            boots=image == 'guest')
        seconds = time.monotonic() - start
        live_images.goes_on(server)
        return server, cls(name, host, *map(int, said.split()), seconds)


def expect(condition, message):
    if not condition:
        raise Unfulfilled(message)


def expect_data(said, seed, what):
    """The guest reads what it was told to write."""
    for name, mib in (('data', DATA_MIB), ('raw', 8)):
        found = said.ranges.get(name, {}).get('sha256')
        expect(found == testimony.pattern_sha256(seed, mib * MIB),
               '%s: the data "%s" of the server are not what it wrote: %s' % (
                   what, name, found))
    return 'start %d; %d MiB and %d MiB of data are the same' % (
        said.boot, DATA_MIB, 8)


def tell(story, the_cloud):
    """The story itself, on a cloud whose hosts are on legacy qcow2."""
    with story.step('boot two servers on host-a, images_type qcow2: '
                    'each writes data') as step:
        first, second = [the_cloud.boot(
            name, flavor=FLAVOR, host='host-a', wait=False,
            script=WRITE % (name, name)) for name in ('first', 'second')]
        for server in (first, second):
            server.watch = step.watch
            server.wait('ACTIVE')
        told = {server: server.testimony() for server in (first, second)}
        expect_data(told[first], 'first', 'first boot')
        expect_data(told[second], 'second', 'first boot')
        step.detail = 'disks of "first": %s' % ', '.join(
            name for name in first.files_on('host-a')
            if name.startswith('disk') and name != 'disk.info')

    with story.step('switch both hosts to images_type '
                    'libvirt-storage') as step:
        log = the_cloud.compute_log('host-a')
        offset = log.stat().st_size
        the_cloud.set_images_type('libvirt-storage')
        step.detail = warning(log, offset, first.id)

    with story.step('hard reboot of "first": its disks move into the '
                    'pool') as step:
        first.watch = step.watch
        first.hard_reboot()
        said = first.testimony(after=told[first])
        expect_data(said, 'first', 'after the transition')
        volumes = volumes_of(first, 'host-a')
        expect(volumes, 'host-a has no volume of "first"')
        left = [name for name in first.files_on('host-a')
                if name in ('disk', 'disk.eph0', 'disk.swap')]
        expect(not left, 'legacy files are left: %s' % left)
        step.detail = 'now volumes of nova-disks-pool: %s' % ', '.join(
            name.replace(first.id, '<uuid>') for name in volumes)

    with story.step('cold migration of "first", host-a to host-b, '
                    'over TLS') as step:
        first.watch = step.watch
        first.migrate('host-b')
        said = first.testimony(after=said)
        step.detail = expect_data(said, 'first', 'on host-b')

    with story.step('confirm it') as step:
        first.confirm()
        left = first.left_on('host-a')
        expect(not left, 'host-a still has %s' % left)
        step.detail = 'nothing of it is left on host-a'

    with story.step('resize "first" to a larger flavor, back to '
                    'host-a') as step:
        first.watch = step.watch
        before = said
        first.resize(LARGER)
        first.confirm()
        said = first.testimony(after=before)
        expect_data(said, 'first', 'after the resize')
        expect(said.own['bytes'] == 2 * GIB and
               said.filesystem['bytes'] > 1.9 * GIB,
               'the disk or its file system did not grow')
        step.detail = 'file system: %.2f GiB, was %.2f GiB' % (
            said.filesystem['bytes'] / GIB, before.filesystem['bytes'] / GIB)

    with story.step('migrate "second", a legacy server still, to host-b '
                    '...') as step:
        second.watch = step.watch
        second.migrate('host-b')
        there = second.testimony(after=told[second])
        step.detail = expect_data(there, 'second', 'on host-b')

    with story.step('... and revert') as step:
        second.watch = step.watch
        second.revert()
        said = second.testimony(after=there)
        expect(second.host == 'host-a', '"second" is on ' + second.host)
        left = second.left_on('host-b')
        expect(not left, 'host-b still has %s' % left)
        step.detail = expect_data(said, 'second', 'after revert')

    with story.step('what lies in both pools') as step:
        lines = []
        for host in config.HOSTS:
            text = ', '.join('%s (%.1f of %.1f MiB)' % volume
                             for volume in volumes_of(None, host))
            for server, name in ((first, 'first'), (second, 'second')):
                text = text.replace(server.id, '<%s>' % name)
            lines.append('%s: %s' % (host, text or 'nothing'))
        step.detail = '\n'.join(lines)

    tell_of_memory(story, the_cloud)

    with story.step('attempts to use ssh, scp, sftp or rsync') as step:
        attempts = ssh_attempts()
        expect(not attempts, 'there were some: %s' % attempts)
        step.detail = 'none recorded on either host, and no sshd runs there'
    return first, second


def tell_of_memory(story, the_cloud):
    """How a server that is warm becomes four."""
    with story.step('switch both hosts to live_images, and let somebody save '
                    'a memory') as step:
        live_images.enable(the_cloud)
        live_images.allow('@')
        step.detail = 'as shipped, nobody may: policy "!"'

    with story.step('boot "warm" on host-a, and let it count to %d in its '
                    'memory' % WARM) as step:
        warm, answer = Answer.of(the_cloud, 'warm', 'host-a')
        rows = [answer]
        warm.command('sh', WARM_UP)
        counted = 0
        while counted < WARM:
            time.sleep(1)
            counted = count(warm)
        answer.counter = 0
        step.detail = 'it has counted to %d' % counted

    with story.step('save it with its memory') as step:
        log = the_cloud.compute_log('host-a')
        offset = log.stat().st_size
        image = live_images.capture(warm, 'warm')
        saved = count(warm)
        expect(saved > counted, 'it does not go on counting')
        step.detail = 'it stood still for %s s, and counts on' % (
            live_images.pauses(log, offset)[-1])

    with story.step('three servers go on from it, on two hosts') as step:
        clones = []
        for number, host in enumerate(CLONES, 1):
            clone, answer = Answer.of(
                the_cloud, 'clone-%d' % number, host, image.id)
            clones.append(clone)
            rows.append(answer)
            expect(answer.boots == 1, '%s has booted' % answer.name)
            expect(counted <= answer.counter,
                   '%s starts to count anew' % answer.name)
            expect(clone.host == host, '%s is on %s' % (
                answer.name, clone.host))
        ids = [clone.command('sh', live_images.WHOSE).strip()
               for clone in clones]
        expect(ids == [clone.id for clone in clones],
               'their config drives are not their own: %s' % ids)
        for clone in clones:
            clone.command('sh', 'echo %s >/data/own' % clone.id)
        expect([clone.command('sh', 'cat /data/own').strip()
                for clone in clones] == ids, 'they share a disk')
        expect('own' not in warm.command('sh', 'ls /data || true').split(),
               'they write to the disk of "warm"')
        step.detail = ('none has booted; each counts on, with a disk and a '
                       'config drive of its own')
    story.compare(rows)
    for server in (warm, *clones):
        server.delete()
    live_images.delete(the_cloud, image)


def count(server):
    """:returns: what its application has counted to"""
    return int(server.command('sh', 'cat /run/counter'))


def warning(log, offset, uuid, limit=30):
    """The compute's line about servers that are still on legacy disks."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        with open(log, errors='replace') as file:
            file.seek(offset)
            for line in file:
                if ' WARNING ' in line and uuid in line:
                    return 'warning: ' + line.split('] ', 1)[-1].strip()[:300]
        time.sleep(.3)
    raise Unfulfilled('host-a does not warn of legacy disks in ' + str(log))


def volumes_of(server, host):
    """Names of a server's volumes; of all: (name, allocation, capacity)."""
    connection = Host(host).connect()
    try:
        pool = connection.storagePoolLookupByName('nova-disks-pool')
        found = [(volume.name(), *volume.info()[1:])
                 for volume in pool.listAllVolumes()]
    finally:
        connection.close()
    if server:
        return sorted(name for name, _, _ in found if server.id in name)
    return sorted((name, allocation / MIB, capacity / MIB)
                  for name, capacity, allocation in found)


def ssh_attempts():
    return [attempt for host in both() for attempt in host.ssh_attempts()]


def run(keep: bool) -> bool:
    """Bring the cloud up, tell the story, take the cloud down.

    :param keep: leave the cloud up
    :returns: whether everything was as told
    """
    console = rich.console.Console(highlight=False)
    story = Story(console)
    attempts, failed = [], None
    with lock.held():
        if state.find():
            raise LabError('the lab is up, or half up; the demo brings up its '
                           'own: lab/lab down')
        try:
            the_cloud = _up(story, console)
            for host in both():
                host.forget_ssh_attempts()
            tell(story, the_cloud)
        except Exception as error:  # told below, with the table
            failed = error
        finally:
            if state.find():
                with contextlib.suppress(LabError):
                    attempts = ssh_attempts()
            if not keep and state.find():
                hosts.down(ui.Console(console))
    story.write(attempts)
    console.print()
    console.print(story.table())
    console.print('record: %s' % RESULT)
    if failed:
        console.print('[red]error:[/] %s' % rich.markup.escape(str(failed)))
        if getattr(failed, 'log', None):
            console.print('log: %s' % failed.log)
    elif keep:
        console.print(
            'The cloud is up. Its client: lab/lab openstack server list; a '
            'shell on a host: lab/lab exec host-a -- bash; a guest\'s '
            'console: lab/lab exec host-a -- virsh console DOMAIN; down: '
            'lab/lab down')
    if failed and not isinstance(failed, LabError):
        raise failed
    return not failed


def _up(story, console):
    options = state.Options(level='cloud', nova='tree', images_type='qcow2')
    with _whole(story, 'the cloud is up: two libvirt hosts, no sshd'):
        return cloud.bring_up(options, ui.Console(console))


@contextlib.contextmanager
def _whole(story, name):
    """A step whose parts show themselves."""
    step = Step(name)
    story.steps.append(step)
    try:
        yield
        step.ok = True
    except BaseException as error:
        step.detail = str(error)
        raise
    finally:
        step.seconds = time.monotonic() - step.start
