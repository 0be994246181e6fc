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

"""Servers on Ceph: pools against stock Nova's images_type = rbd.

One cloud, one Ceph: stock Nova first, which is then upgraded.
"""

import contextlib
import statistics
import time

from . import cases
from . import pools
from . import servers
from .. import ceph
from .. import config
from .. import state
from ..errors import LabError
from ..host import both
from ..machine import Machine

STOCK = state.Options(level='cloud', nova='base', ssh=True, images_type='rbd',
                      storage='ceph')
FOREIGN = 'foreign-'
#: Runs in ctl: images that are nobody's, as others make them.
FILL = '''
import rados, rbd
with rados.Rados(conffile=%(conf)r, rados_id='admin') as cluster:
    with cluster.open_ioctx(%(pool)r) as ioctx:
        for number in range(%(many)d):
            rbd.RBD().create(ioctx, %(name)r + str(number), 1 << 20)
'''


def measure(runs, progress):
    """Boot and migrate on stock Nova, upgrade it, and do the same.

    :param runs: of each on each; the medians count
    :returns: an iterable of cases.Row
    """
    with servers.alone(STOCK, progress) as cloud:
        _fill(ceph.Ceph())
        known = _volumes()
        stock = _all(cloud, runs, 'stock', progress.say)
        cloud.upgrade('tree')
        cloud.set_images_type('libvirt-storage')
        ours = _all(cloud, runs, 'series', progress.say)
        # libvirt learns of what others have made by a refresh alone.
        refreshed = [host for host, names in _volumes().items()
                     if names != known[host]]
    if refreshed:
        raise LabError('a pool was refreshed on ' + ', '.join(refreshed))
    for (case, metric), target in (
            (('boot', 'seconds'), 1.1), (('cold migration', 'seconds'), .8),
            (('cold migration', 'MiB sent by both hosts'), None)):
        yield cases.less(
            '%s on Ceph, %d images' % (case, pools.MANY), metric,
            ours[case, metric], 'stock images_type = rbd',
            stock[case, metric], target)


def _fill(there):
    there.control.run(['/usr/bin/python3', '-c', FILL % {
        'conf': str(ceph.FOLDER / 'ceph.conf'), 'pool': ceph.DISKS,
        'many': pools.MANY, 'name': FOREIGN}], timeout=300)


def _volumes() -> dict[str, list[str]]:
    """Which of those images the hosts' libvirts know."""
    found = {}
    for host in both():
        with contextlib.closing(host.connect()) as connection:
            pool = connection.storagePoolLookupByName(ceph.POOL)
            found[host.name] = [name for name in pool.listVolumes()
                                if name.startswith(FOREIGN)]
    return found


def _all(cloud, runs, way, tell) -> dict[tuple[str, str], float]:
    found = {('boot', 'seconds'): pools.boots(cloud, runs, way, tell)}
    seconds, sent = _migrations(cloud, runs, way, tell)
    found['cold migration', 'seconds'] = seconds
    found['cold migration', 'MiB sent by both hosts'] = sent
    return found


def _migrations(cloud, runs, way, tell) -> tuple[float, float]:
    server = cloud.boot('bench', flavor='lab.small.disks', host='host-a')
    took, sent = [], []
    seen = None
    try:
        for number in range(1 + runs):
            # A guest that isn't up yet doesn't see the power button.
            seen = server.testimony(after=seen)
            before, start = _sent(), time.monotonic()
            server.migrate(servers.OTHER[server.host])
            seconds, mib = time.monotonic() - start, (_sent() - before) / 2**20
            server.confirm()
            if number:
                took.append(seconds)
                sent.append(mib)
            tell('cold migration, %s: %.1f s, %.2f MiB sent' % (
                way, seconds, mib))
    finally:
        server.delete()
    return statistics.median(took), statistics.median(sent)


def _sent() -> int:
    """Bytes that the hosts have sent: to Ceph and services, and over SSH."""
    return sum(int(Machine(host).run(
        ['cat', '/sys/class/net/mgmt/statistics/tx_bytes']).stdout)
        for host in config.HOSTS)
