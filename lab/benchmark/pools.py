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

"""What a pool with a thousand volumes costs, against legacy disks."""

import statistics
import time

from . import cases
from .. import config
from .. import hosts
from .. import lock
from .. import state
from ..errors import LabError
from ..host import Host

MANY = 1000
POOL = 'nova-disks-pool'
VOLUME = '''<volume><name>%s</name><capacity>1048576</capacity>
<allocation>0</allocation><target><format type='qcow2'/></target>%s</volume>'''
BACKING = '''<backingStore><path>%s</path><format type='raw'/></backingStore>'''

#: Runs in a host: which base images are in use, by the pool and by the disks.
SWEEP = '''
import sys, time
sys.path.insert(0, %(tree)r)
import libvirt
from oslo_config import cfg
import nova.conf
nova.conf.CONF([], project='nova')
nova.conf.CONF.set_override('images_type', 'libvirt-storage', 'libvirt')
nova.conf.CONF.set_override('storage_disks_pool', %(pool)r, 'libvirt')
from nova.virt.libvirt import host, utils
host.libvirt = libvirt
from nova.virt.libvirt.storage import image_cache as base_images
connection = libvirt.open('qemu:///system')
start = time.monotonic()
found = base_images.in_use(connection, 'host', %(cache)r)
middle = time.monotonic()
volumes = connection.storagePoolLookupByName(%(pool)r).listAllVolumes()
paths = [volume.path() for volume in volumes]
legacy_start = time.monotonic()
names = {utils.get_disk_backing_file(path) for path in paths}
end = time.monotonic()
assert found == names == {'base'}, (found, names)
assert len(paths) == %(many)d
print(middle - start, end - legacy_start)
'''


def sweep(host, runs, tell):
    """Find the base images that a thousand overlays need.

    :param host: a Host of the level hosts
    :returns: an iterable of cases.Row
    """
    cache, folder = '/var/lib/nova/bench/_base', '/var/lib/nova/bench/disks'
    host.run(['sh', '-c', 'mkdir -p %s && truncate -s 1M %s/base' % (
        cache, cache)])
    connection = host.connect()
    pool = connection.storagePoolDefineXML(
        "<pool type='dir'><name>bench-sweep</name><target><path>%s</path>"
        '</target></pool>' % folder)
    try:
        pool.build()
        pool.create()
        for number in range(MANY):
            pool.createXML(VOLUME % (
                'disk-%d' % number, BACKING % (cache + '/base')))
        ours, legacy = [], []
        for _run in range(runs):
            took = host.run([config.ROOT / '.venv/bin/python', '-W', 'ignore',
                             '-c', SWEEP % {
                                 'tree': str(_tree()), 'pool': 'bench-sweep',
                                 'cache': cache, 'many': MANY}]
                            ).stdout.split()
            ours.append(float(took[0]))
            legacy.append(float(took[1]))
            tell('image cache sweep: %.3f s, legacy %.1f s' % (
                ours[-1], legacy[-1]))
    finally:
        pool.destroy()
        pool.undefine()
        connection.close()
        host.run(['rm', '-rf', '/var/lib/nova/bench'])
    yield cases.less(
        'image cache sweep, %d overlays' % MANY, 'seconds',
        statistics.median(ours), 'qemu-img info of each',
        statistics.median(legacy), 1 / 50)


def _tree():
    from ..cloud import cloud
    return cloud.find_tree('tree')


def spawn(runs, progress):
    """Boot servers on a host whose pool has a thousand volumes.

    :returns: an iterable of cases.Row
    """
    from .. import cloud as lab_cloud
    took = {}
    with lock.held():
        if state.find():
            raise LabError('a lab is up; first: lab/lab down')
        try:
            cloud = lab_cloud.bring_up(
                state.Options(level='cloud', nova='tree',
                              images_type='libvirt-storage'), progress)
            _fill_pool()
            for images_type in ('libvirt-storage', 'qcow2'):
                cloud.set_images_type(images_type)
                took[images_type] = boots(cloud, runs, images_type,
                                          progress.say)
        finally:
            hosts.down(progress)
    yield cases.less(
        'boot of a server, %d volumes in the pool' % MANY, 'seconds',
        took['libvirt-storage'], 'legacy qcow2', took['qcow2'], 1.1)


def _fill_pool():
    connection = Host('host-a').connect()
    try:
        pool = connection.storagePoolLookupByName(POOL)
        for number in range(MANY):
            pool.createXML(VOLUME % ('foreign-%d' % number, ''))
    finally:
        connection.close()


def boots(cloud, runs, way, tell) -> float:
    """Boot servers on host-a, and delete them.

    :param way: what this is, for the reader
    :returns: seconds until one is ACTIVE, the median
    """
    took = []
    for number in range(1 + runs):
        start = time.monotonic()
        server = cloud.boot('bench', flavor='lab.small.disks', host='host-a',
                            wait=False)
        server.wait('ACTIVE')
        seconds = time.monotonic() - start
        server.delete()
        if number:
            took.append(seconds)
        tell('boot, %s: %.1f s%s' % (
            way, seconds,
            '' if number else ' (first, not counted)'))
    return statistics.median(took)
