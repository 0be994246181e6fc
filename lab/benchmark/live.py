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

"""A live migration of a guest that writes: the series against stock Nova.

Stock Nova copies legacy qcow2 disks, and leaves zeroes in the config drive.
"""

import statistics
import time

import libvirt

from . import cases
from . import servers
from .. import state

WAYS = {'series': state.Options(level='cloud', nova='tree',
                                images_type='libvirt-storage', memory=True),
        'stock qcow2': state.Options(level='cloud', nova='base', ssh=True,
                                     images_type='qcow2', memory=True)}
SCRIPT = ('boot 1: fill data 128 alpha\n'
          'boot 1: fill raw 32 beta vdb 64\n')
# At most so much longer than stock Nova takes.
TARGET = 1.1


def measure(runs, progress):
    """Bring up a cloud of each kind in turn, migrate there and back.

    :param runs: on each; the medians count
    :returns: an iterable of cases.Row
    """
    found = {}
    for way, options in WAYS.items():
        with servers.alone(options, progress) as cloud:
            found[way] = _times(cloud, runs, way, progress.say)
    for name, target in (('seconds', TARGET), ('seconds of libvirt', TARGET),
                         ('ms of downtime', None)):
        yield cases.less('live migration', name, found['series'][name],
                         'stock qcow2', found['stock qcow2'][name], target)


def _times(cloud, runs, way, tell) -> dict[str, float]:
    server = cloud.boot('live', flavor='lab.small.disks', host='host-a',
                        script=SCRIPT)
    took = []
    try:
        server.command('keep-writing', 256)
        for number in range(1 + runs):
            start = time.monotonic()
            host = servers.OTHER[server.host]
            server.live_migrate(host)
            seconds = time.monotonic() - start
            with server.domain(host) as domain:
                job = domain.jobStats(
                    libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
            if number:
                took.append((seconds, job.get('time_elapsed', 0) / 1000,
                             job.get('downtime', 0)))
            tell('live migration, %s: %.1f s, %d ms of downtime%s' % (
                way, seconds, job.get('downtime', 0),
                '' if number else ' (first, not counted)'))
            # As much as a user would notice between two.
            server.look()
    finally:
        server.delete()
    return dict(zip(
        ('seconds', 'seconds of libvirt', 'ms of downtime'),
        map(statistics.median, zip(*took))))
