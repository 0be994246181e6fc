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

"""The command line."""

import os
import pathlib
import signal
import subprocess
import sys

import click
import rich.console

from . import config
from . import faults
from . import hosts
from . import lock
from . import pki
from . import preflight
from . import roots
from . import state
from . import ui
from .errors import LabError
from .host import Host
from .machine import forward
from .machine import Machine
from .machine import terminal

NO_ROOT = 3  # exit status where the root for --host-root can't be had
TAIL = 20  # lines of a log shown with an error
HOST = click.Choice(config.HOSTS)
MACHINE = click.Choice(list(config.ADDRESSES))


class Group(click.Group):
    """Shows what a user can meet as one line, and the log behind it."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except LabError as error:
            click.secho('error: %s' % error, fg='red', err=True)
            show_tail(error.log)
            ctx.exit(NO_ROOT if isinstance(error, roots.Unavailable) else 1)
        except KeyboardInterrupt:
            click.echo('interrupted; what there is goes with: lab/lab down',
                       err=True)
            ctx.exit(130)


def show_tail(log) -> None:
    if log and pathlib.Path(log).exists():
        click.echo('the last lines of %s:' % log, err=True)
        for line in pathlib.Path(log).read_text(
                errors='replace').splitlines()[-TAIL:]:
            click.echo('  ' + line, err=True)


def _terminated(_signal, _frame):
    raise KeyboardInterrupt


@click.group(cls=Group, context_settings={
    'help_option_names': ['-h', '--help']})
def main():
    """Two real libvirt hosts, and a Nova cloud on them, on this machine."""
    signal.signal(signal.SIGTERM, _terminated)


def _cloud():
    """The cloud of the lab that is up."""
    known = state.load()
    if known.options.level != 'cloud':
        raise LabError('the lab is up at level %s, which has no cloud; '
                       'take it down and: lab/lab up --level cloud' %
                       known.options.level)
    from . import cloud
    return cloud


@main.command()
@click.option('--level', type=click.Choice(['hosts', 'cloud']),
              default='cloud', show_default=True)
@click.option('--nova', type=click.Choice(['tree', 'base']), default='tree',
              show_default=True, help='The series, or stock Nova.')
@click.option('--ssh', is_flag=True,
              help='sshd and keys in the hosts, for stock Nova\'s migrations.')
@click.option('--images-type', default='default', show_default=True)
@click.option('--network', type=click.Choice(['none', 'ovs']), default='none',
              show_default=True)
@click.option('--threading', type=click.Choice(['native', 'eventlet']),
              default='native', show_default=True)
@click.option('--root', is_flag=True,
              help='nova-compute as root in place of user nova.')
@click.option('--storage', type=click.Choice(['', 'vm', 'ceph', 'ceph,vm']),
              default='',
              help='A virtual machine with a volume group and NFS exports; '
              'Ceph.')
@click.option('--host-root', type=click.Choice(['', *roots.RELEASES]),
              default=lambda: os.environ.get('LAB_HOST_ROOT', ''),
              help='The hosts\' Debian; the machine\'s own by default.')
@click.option('--modular', is_flag=True,
              default=lambda: os.environ.get('LAB_MODULAR', '') == '1',
              help='virtqemud, virtstoraged, virtproxyd in place of libvirtd; '
              'with --host-root trixie.')
def up(**arguments):
    """Bring the lab up; if it is, say so."""
    options = state.Options(**arguments)
    preflight.check_user()
    progress = ui.Console()
    with lock.held():
        known = state.find()
        if known and known.phase == 'up' and known.boot == state.boot_id():
            _already_up(known, options)
            return
        try:
            _up(options, progress)
        except LabError as error:
            if state.find():
                progress.say('what there is, for a look; lab/lab down '
                             'removes it, lab/lab up starts over')
            raise error
    progress.say('level %s is up' % options.level)


def _up(options, progress):
    if options.level == 'cloud':
        from . import cloud
        cloud.bring_up(options, progress)
    else:
        hosts.up(options, progress)


def _already_up(known, options):
    if known.options != options:
        raise LabError('the lab is up already, with other options (%s); '
                       'first: lab/lab down' % ', '.join(
                           '%s=%s' % item for item in
                           vars(known.options).items()))
    ended = [service for machine in map(Machine, config.ADDRESSES)
             for service in machine.services() if not service.alive()]
    click.echo('the lab is up already, level %s' % known.options.level)
    if ended:
        raise LabError('but these have ended: %s; see lab/lab status' %
                       ', '.join('%s on %s' % (s.name, s.machine)
                                 for s in ended), ended[0].log)


@main.command()
def down():
    """Remove everything but logs and caches."""
    preflight.check_user()
    progress = ui.Console()
    with lock.held():
        if not hosts.down(progress):
            click.echo('there is no lab to take down')


@main.command()
def status():
    """Is all well? So says the exit status too."""
    known = state.load()
    checks = hosts.status()
    if known.options.level == 'cloud':
        checks += _cloud().status()
    rich.console.Console(highlight=False).print(ui.table(checks))
    if not all(check.ok for check in checks):
        sys.exit(1)


@main.command(name='exec', context_settings={'ignore_unknown_options': True})
@click.argument('host', type=MACHINE)
@click.argument('command', nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(host, command):
    """Run a command in a host's namespaces."""
    state.load()
    sys.exit(forward(Machine(host).popen(command, env=terminal()).wait()))


@main.command(context_settings={'ignore_unknown_options': True})
@click.argument('arguments', nargs=-1, type=click.UNPROCESSED)
def openstack(arguments):
    """The admin's client against this cloud."""
    sys.exit(_cloud().Cloud().openstack(arguments))


@main.command(name='set')
@click.argument('host', type=MACHINE)
@click.argument('section')
@click.argument('key')
@click.argument('value')
def set_(host, section, key, value):
    """Change nova.conf of one compute, or of ctl, and restart it."""
    with lock.held():
        _cloud().Cloud().set(host, section, key, value)


@main.command()
@click.argument('host', type=MACHINE)
@click.argument('service')
def restart(host, service):
    """Stop a service if it runs, and start it as it was."""
    known = state.load()
    with lock.held():
        if service == 'libvirtd' and host in config.HOSTS:
            Host(host).restart(service)
            Host(host).wait_ready()
        elif (known.options.level == 'cloud' and
              service not in ('virtlogd', 'sshd')):
            # It waits until the service serves.
            _cloud().Cloud().restart(host, service)
        else:
            Machine(host).restart(service)


@main.command()
@click.argument('host', type=MACHINE)
@click.argument('service', required=False)
@click.option('-f', '--follow', is_flag=True)
@click.option('-n', '--lines', default=50, show_default=True)
def logs(host, service, follow, lines):
    """Show the end of a service's log, or of all of a host's."""
    folder = config.LOGS / host
    found = [folder / (service + '.log')] if service else sorted(
        folder.glob('*.log'))
    if not found or not found[0].exists():
        there = ', '.join(sorted(p.stem for p in folder.glob('*.log')))
        raise LabError('no log of %s on %s; there are: %s' % (
            service or 'anything', host, there or 'none'))
    command = ['tail', '-n', str(lines), *(['-F'] if follow else []),
               *map(str, found)]
    sys.exit(forward(subprocess.run(command).returncode))


@main.command()
@click.argument('host', type=HOST)
@click.argument('kind', type=click.Choice(pki.VARIANTS))
def cert(host, kind):
    """Give a host a certificate, good or bad."""
    state.load()
    with lock.held():
        Host(host).certificate(kind)


@main.group()
@click.argument('host', type=MACHINE)
@click.pass_context
def fault(ctx, host):
    """Break something on a host, or mend it.

    \b
    lab/lab fault HOST kill|pause|resume SERVICE
    lab/lab fault HOST link cut | slow RATE | delay MS | restore
    lab/lab fault HOST disk fill POOL [--leave BYTES] | free POOL
    """
    if '--help' in sys.argv or '-h' in sys.argv:
        return
    state.load()
    ctx.with_resource(lock.held())
    ctx.obj = host


def _host(name) -> Host:
    return Host(name)


@fault.command()
@click.argument('service')
@click.pass_obj
def kill(host, service):
    """End a service at once (SIGKILL)."""
    Machine(host).kill(service)


@fault.command()
@click.argument('service')
@click.pass_obj
def pause(host, service):
    """A service hangs (SIGSTOP)."""
    Machine(host).pause(service)


@fault.command()
@click.argument('service')
@click.pass_obj
def resume(host, service):
    """A paused service goes on."""
    Machine(host).resume(service)


@fault.group()
def link():
    """The host's network."""


@link.command()
@click.pass_obj
def cut(host):
    """Nothing passes, and nobody is told."""
    _host(host).link.cut()


@link.command()
@click.argument('rate')
@click.pass_obj
def slow(host, rate):
    """At most RATE each way: 10mbit, 500kbit, 1mbps (bytes)."""
    _host(host).link.slow(faults.rate(rate))


@link.command()
@click.argument('milliseconds', type=click.FloatRange(min=0, min_open=True))
@click.pass_obj
def delay(host, milliseconds):
    """Each packet later by MILLISECONDS, each way."""
    _host(host).link.delay(milliseconds)


@link.command()
@click.pass_obj
def restore(host):
    """The link is whole again."""
    _host(host).link.restore()


@fault.group()
def disk():
    """The file system of a storage pool."""


@disk.command()
@click.argument('pool')
@click.option('--leave', default=0, type=click.IntRange(min=0),
              help='Bytes that stay available.')
@click.pass_obj
def fill(host, pool, leave):
    """Fill it."""
    click.echo('%d bytes are available' % _host(host).fill(pool, leave))


@disk.command()
@click.argument('pool')
@click.pass_obj
def free(host, pool):
    """Undo fill."""
    _host(host).free(pool)


@main.command(hidden=True)
@click.option('--level', default='cloud')
def prepare(level):
    """Install and build what `up` needs, and stop there."""
    options = state.Options(level=level)
    preflight.check_user()
    with lock.held():
        hosts.prepare(options, ui.Console())
        if level == 'cloud':
            from . import cloud
            cloud.prepare(options, ui.Console())


@main.command(name='root', hidden=True)
@click.argument('release', type=click.Choice(roots.RELEASES))
@click.argument('name')
@click.argument('wanted', nargs=-1, required=True)
def root_(release, name, wanted):
    """Make a root of a release with these packages; prints its path."""
    preflight.check_user()
    with lock.held():
        found = roots.ensure(release, ui.Steps(), name, tuple(wanted))
    click.echo(found)


@main.command(hidden=True)
@click.option('--runs', default=5, show_default=True,
              help='Of each way; the medians count.')
@click.argument('cases', nargs=-1)
def bench(runs, cases):
    """Measure the pump against other ways (lab/bench)."""
    preflight.check_user()
    from .benchmark import command
    # No narrower than its table.
    wide = max(120, rich.console.Console().width)
    command.run(runs, cases, rich.console.Console(highlight=False, width=wide))


@main.command(hidden=True)
@click.option('--steps', type=int, help='Rounds at each level, at most.')
@click.option('--minutes', type=float, help='For all levels, at most.')
@click.option('--seed', type=int, help='Of the random choices; else drawn.')
@click.option('--hosts-only', is_flag=True, help='Only moves of volumes.')
@click.option('--cloud-only', is_flag=True, help='Only whole servers.')
@click.option('--keep-going', is_flag=True,
              help='Though something was found: with a new server in place of '
              'the one that was lost, and on the next level.')
@click.option('--in-a-row', type=int, default=0,
              help='So many moves without a fault first, between hosts.')
@click.option('--labs', default=1, show_default=True,
              type=click.IntRange(1, 8),
              help='At once; with --hosts-only. The seeds count up.')
@click.option('--report', type=click.Path(path_type=pathlib.Path),
              hidden=True)
def soak(steps, minutes, seed, hosts_only, cloud_only, keep_going, in_a_row,
         labs, report):
    """Do what clouds do, with faults at random moments (lab/soak)."""
    preflight.check_user()
    if steps is None and minutes is None:
        minutes = 10
    from .endurance import command
    if labs > 1:
        if not hosts_only:
            raise click.UsageError('--labs goes with --hosts-only')
        sys.exit(not command.run_beside(labs, seed, [
            word for name, value in (('--steps', steps),
                                     ('--minutes', minutes),
                                     ('--in-a-row', in_a_row))
            if value is not None for word in (name, str(value))]))
    sys.exit(not command.run(
        steps, minutes, seed, hosts_only, cloud_only, keep_going, in_a_row,
        **({'path': report} if report else {})))


@main.command()
@click.option('--keep', is_flag=True, help='Leave the cloud up.')
def demo(keep):
    """Tell the whole story of the series, live."""
    preflight.check_user()
    from . import story
    sys.exit(not story.run(keep))
