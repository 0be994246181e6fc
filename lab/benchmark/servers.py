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

"""A whole `openstack server migrate`: the series against stock Nova over SSH."""

import contextlib
import dataclasses
import statistics
import time
from xml.etree import ElementTree

import libvirt

from . import cases
from .. import hosts
from .. import lock
from .. import state
from ..errors import LabError
from ..host import Host

OTHER = {'host-a': 'host-b', 'host-b': 'host-a'}


@dataclasses.dataclass(frozen=True)
class Load:
    """:ivar data: MiB of random data on a disk"""

    case: str
    data: int
    target: float


LOADS = (Load('server migration, small image', 0, 1.0),
         Load('server migration, 4 GiB random', 4096, 0.7))
WAYS = {'series': state.Options(level='cloud', nova='tree',
                                images_type='libvirt-storage', memory=True),
        'stock over SSH': state.Options(level='cloud', nova='base', ssh=True,
                                        memory=True)}


@contextlib.contextmanager
def alone(options, progress):
    """Bring up a cloud, and take it down again whatever happens.

    :param options: its state.Options
    :returns: a context manager, which gives the Cloud
    """
    from .. import cloud as lab_cloud
    with lock.held():
        if state.find():
            raise LabError('a lab is up; first: lab/lab down')
        try:
            yield lab_cloud.bring_up(options, progress)
        finally:
            hosts.down(progress)


def over_nbd(cloud, **more):
    """Have the computes of a cloud move disks over NBD.

    :param more: other options of [libvirt], and their values
    """
    values = {'storage_migration_transport': 'nbd', **more}
    for host in OTHER:
        cloud.set_many(host, {('libvirt', name): value
                              for name, value in values.items()})


def measure(runs, progress, loads=LOADS, seconds=None, memory=True):
    """Bring up a cloud of each kind in turn, migrate there and back.

    The series does so over NBD.

    :param runs: of each load on each; the medians count
    :param seconds: measures one load; by default the whole migration
    :param memory: whether the hosts' disks lie in memory
    :returns: an iterable of cases.Row
    """
    found = {}
    for way, options in WAYS.items():
        with alone(dataclasses.replace(options, memory=memory),
                   progress) as cloud:
            if way == 'series':
                over_nbd(cloud)
            for load in loads:
                found[way, load] = (seconds or _seconds)(
                    cloud, load, runs, way, progress.say)
    for load in loads:
        yield cases.less(
            load.case, 'seconds', found['series', load], 'stock over SSH',
            found['stock over SSH', load], load.target)


def boot_with(cloud, load):
    """A server on host-a with so much data; the guest may not be up yet."""
    name = 'bench-%d' % load.data
    if cloud.conn.compute.find_flavor(name) is None:
        cloud.conn.compute.create_flavor(
            name=name, ram=128, vcpus=1, swap=0, disk=1,
            ephemeral=load.data and 1 + -(-load.data // 1024))
    server = cloud.boot('bench', flavor=name, host='host-a')
    if load.data:
        seen = server.testimony()
        server.stop()
        write(server, load.data)
        server.start()
        server.testimony(after=seen)
    return server


def wait_started(server, host, limit=600):
    """Wait until a host has started its guest, by libvirt's word.

    :param limit: seconds
    :raises: LabError
    """
    until = time.monotonic() + limit
    with contextlib.closing(Host(host).connect()) as connection:
        while server.id not in [
                domain.UUIDString() for domain in connection.listAllDomains(
                    libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)]:
            if time.monotonic() > until:
                raise LabError('%s is not started' % server.id)
            time.sleep(.05)


def _seconds(cloud, load, runs, way, tell) -> float:
    # The first boot on a host, and the first migration, do more.
    server = boot_with(cloud, load)
    seen = None

    def once():
        nonlocal seen
        # A guest that isn't up yet doesn't see the power button.
        seen = server.testimony(after=seen)
        start = time.monotonic()
        server.migrate(OTHER[server.host])
        return time.monotonic() - start

    return median_of(server, runs, once, '%s, %s' % (load.case, way), tell)


def median_of(server, runs, once, what, tell) -> float:
    """Migrate a server over and over, confirm it each time, delete it.

    :param once: migrates it, and returns seconds; its first call doesn't
        count
    :param what: is measured, for what tell says
    :returns: seconds
    """
    took = []
    try:
        for number in range(1 + runs):
            seconds = once()
            server.confirm()
            if number:
                took.append(seconds)
            tell('%s: %.1f s%s' % (what, seconds, '' if number else
                                   ' (first, not counted)'))
    finally:
        server.delete()
    return statistics.median(took)


def write(server, size) -> None:
    """Write random data into a stopped server's ephemeral disk.

    The guest makes no use of that.

    :param size: MiB
    """
    host = Host(server.host)
    with server.domain() as domain:
        xml = ElementTree.fromstring(domain.XMLDesc())
        for disk in xml.iter('disk'):
            source = disk.find('source')
            path = source.get('file') or source.get('volume')
            if path.endswith('disk.eph0'):
                break
        if source.get('volume'):
            path = domain.connect().storagePoolLookupByName(
                source.get('pool')).storageVolLookupByName(path).path()
    host.run(['sh', '-ec', '''
head -c $((64 << 20)) /dev/urandom >/tmp/random
n=0
while [ $((n * 64)) -lt %d ]; do
    echo "write -q -s /tmp/random $((n * 64))M 64M"
    n=$((n + 1))
done | qemu-io -f %s %s
rm /tmp/random''' % (size, disk.find('driver').get('type'), path)])
