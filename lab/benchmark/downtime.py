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

"""How long a server is down, and what a second move of it takes, over NBD."""

import functools
import statistics
import time

import libvirt

from . import cases
from . import servers

LOADS = (servers.Load('downtime, 4 GiB of data', 4096, 0.35),
         servers.Load('downtime, 16 GiB of data', 16384, 0.2))
AGAIN = servers.Load('migration back, 128 MiB changed of 4 GiB', 4096, 0.25)
# MiB that change before the way back, in whole pieces of servers.write().
CHANGED = 128
# KiB that the guest writes four times a second.
WRITES = 256


def measure(runs, progress, loads=LOADS):
    """Migrate a server whose guest writes 1 MiB/s, there and back.

    What counts is the time from its power-off to the first word of the guest
    on the other host. Beside it stands the time until that host starts the
    guest: without KVM the boot alone takes as long as a small disk.

    :param runs: of each load in each kind of cloud; the medians count
    :returns: an iterable of cases.Row
    """
    starts = {}
    # Memory doesn't hold 16 GiB on two hosts.
    yield from servers.measure(
        runs, progress, loads, functools.partial(_downtime, starts),
        memory=False)
    for load in loads:
        ours, stock = (statistics.median(starts[way, load][1:])
                       for way in servers.WAYS)
        yield cases.less(load.case + ', to the start', 'seconds', ours,
                         'stock over SSH', stock, load.target)


def again(runs, progress, load=AGAIN):
    """Migrate a server, change a little of it, and migrate it back.

    :param runs: each with a server of its own; the medians count
    :returns: an iterable of cases.Row
    """
    with servers.alone(servers.WAYS['series'], progress) as cloud:
        servers.over_nbd(cloud, storage_migration_keep_copies=1)
        took = [_there_and_back(cloud, load, progress.say)
                for _n in range(runs)]
    first, back = map(statistics.median, zip(*took))
    yield cases.less(load.case, 'seconds', back, 'the first time', first,
                     load.target)


def _downtime(starts, cloud, load, runs, way, tell) -> float:
    server = servers.boot_with(cloud, load)
    seen = None

    def once():
        nonlocal seen
        seen = seen or server.testimony()
        server.command('keep-writing', WRITES)
        start, seconds, seen = _down(server, seen)
        tell('%s, %s: %.1f s until its start' % (load.case, way, start))
        starts.setdefault((way, load), []).append(start)
        return seconds

    return servers.median_of(
        server, runs, once, '%s, %s' % (load.case, way), tell)


def _down(server, seen):
    """Migrate it.

    :returns: seconds until it is started, until its guest speaks, and what
        that says
    """
    host = server.host
    with server.domain(host) as domain:
        server.api.migrate_server(server.id, host=servers.OTHER[host])
        while _is_active(domain):
            time.sleep(.02)
        since = time.monotonic()
    servers.wait_started(server, servers.OTHER[host])
    start = time.monotonic() - since
    server.wait('VERIFY_RESIZE')
    said = server.testimony(after=seen)
    return start, time.monotonic() - since, said


def _is_active(domain) -> bool:
    try:
        return bool(domain.isActive())
    except libvirt.libvirtError as e:
        if e.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return False


def _there_and_back(cloud, load, tell) -> tuple[float, float]:
    server = servers.boot_with(cloud, load)
    took, seen = [], None
    try:
        for _way in ('there', 'back'):
            seen = server.testimony(after=seen)
            start = time.monotonic()
            server.migrate(servers.OTHER[server.host])
            took.append(time.monotonic() - start)
            server.confirm()
            if len(took) == 1:
                server.testimony(after=seen)
                server.stop()
                servers.write(server, CHANGED)
                server.start()
        tell('%s: %.1f s, %.1f s the first time' % (
            load.case, took[1], took[0]))
    finally:
        server.delete()
    return took[0], took[1]
