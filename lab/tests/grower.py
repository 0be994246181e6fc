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
"""Disks of an instance on logical volumes: made, grown, read, by Nova's code.

Run by test_storage.py on the storage machine, as root. Takes the name of the
pool; prints what was found as JSON. Between two steps a guest is started with
the disk and says how large that is.
"""

import contextlib
import json
import os
import subprocess
import sys
import types
from unittest import mock

import libvirt
import libvirt_qemu

from nova import conf
from nova import exception
import nova.privsep
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage import image
from nova.virt.libvirt.storage.pool import pool as storage_pool

MIB = 1 << 20
GROUP = 'vg0'
IMAGE = '7c1c0f0e-4a0e-4d4c-8f5e-0d6c7f4b2a11'
INSTANCE = '5d1c4d11-6f3a-4c5e-9a70-0f6f2c1d8e02'
CONTENT = b'of the image'
LATE = b'of the guest'
#: No multiple of an extent, which has 4 MiB here.
IMAGE_SIZE, SIZE, LARGER, LARGEST = (10 * MIB + 3 * 512, 18 * MIB, 31 * MIB,
                                     62 * MIB)
DIRECTORY = '/tmp/instances'
GUEST = '''
<domain type='qemu'><name>grown</name><memory unit='MiB'>16</memory>
<vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os>
<devices>%s</devices></domain>'''


def lvm(*command):
    return subprocess.run(command, check=True, text=True,
                          stdout=subprocess.PIPE).stdout.split()


def volumes():
    """Bytes of each logical volume, by its name."""
    words = lvm('lvs', '--noheadings', '--nosuffix', '--units', 'b', '-o',
                'lv_name,lv_size', '-S', 'lv_name=~"^(%s|rest)"' % INSTANCE,
                GROUP)
    return {name.removeprefix(INSTANCE + '_'): int(size)
            for name, size in zip(words[::2], words[1::2])}


def told(function, *args):
    try:
        function(*args)
    except exception.NovaException as e:
        return [type(e).__name__, str(e)]


@contextlib.contextmanager
def rest_is_taken(left=0):
    """By an operator, all but some extents."""
    free = int(lvm('vgs', '--noheadings', '-o', 'vg_free_count', GROUP)[0])
    lvm('lvcreate', '-qqy', '-n', 'rest', '-l', str(free - left), GROUP)
    try:
        yield
    finally:
        lvm('lvremove', '-qqfy', GROUP + '/rest')


class Disks:

    def __init__(self, connection, pool):
        self.connection = connection
        self.pool = storage_pool.StoragePool(connection, pool, 'storage')
        self.backend = image.LibvirtStorage.bound_to(lambda: connection)
        self.instance = types.SimpleNamespace(uuid=INSTANCE)

    def new(self, name, size):
        mapping = {'bus': 'virtio', 'dev': 'vda', 'type': 'disk'}
        record = self.backend(self.instance, name,
                              disk_info_mapping=mapping).metadata(size)
        disk = self.backend(self.instance, name, disk_info_mapping={
            **mapping, 'metadata': record})
        self.make(disk, size)
        record.state = 'ready'
        return disk

    @staticmethod
    def make(disk, size):
        """What spawn does, and finish_migration for a new flavor."""
        disk.create_from_image(None, IMAGE, size)

    def guest_sees(self, disk):
        """Start a guest with a disk: how many bytes that has to it."""
        domain = self.connection.createXML(
            GUEST % disk.libvirt_info('none', {}).to_xml(),
            libvirt.VIR_DOMAIN_START_PAUSED)
        try:
            said = json.loads(libvirt_qemu.qemuMonitorCommand(
                domain, '{"execute": "query-block"}', 0))
            return [block['inserted']['image']['virtual-size']
                    for block in said['return'] if 'inserted' in block][0]
        finally:
            domain.destroy()


def read(disk):
    with open(disk.path, 'rb') as f:
        return f.read()


def is_clean(disk, size):
    """Whether there is nothing but what was written here."""
    found = read(disk)
    end = size - len(LATE)
    return (found.startswith(CONTENT) and found[end:size] == LATE and
            not found[len(CONTENT):end].strip(b'\0') and
            not found[size:].strip(b'\0'))


def grow(disks):
    found = {}
    disk = disks.new('disk', SIZE)
    made = 20 * MIB
    found['made'] = [volumes(), disks.guest_sees(disk),
                     disk.get_disk_size(None), disk.record.size]
    # Up to the very end of what the guest sees.
    with open(disk.path, 'r+b') as f:
        f.seek(made - len(LATE))
        f.write(LATE)

    disks.make(disk, LARGER)
    found['grown'] = [volumes(), disks.guest_sees(disk),
                      is_clean(disk, made)]

    with rest_is_taken(left=3):
        found['full'] = [told(disks.make, disk, LARGEST), volumes(),
                         disks.guest_sees(disk), is_clean(disk, made)]

    # Somebody is faster, once the new extents are overwritten.
    extend = nova.privsep.fs.lvextend
    with contextlib.ExitStack() as stack:
        def extend_late(*args):
            stack.enter_context(rest_is_taken())
            extend(*args)

        with mock.patch('nova.privsep.fs.lvextend', extend_late):
            found['full in the middle'] = [told(disks.make, disk, LARGEST)]
        found['full in the middle'] += [
            volumes(), disks.guest_sees(disk), is_clean(disk, made)]

    busy = exception.StoragePoolError(
        pool='', host='', code=1, reason='asynchronous jobs running')
    with mock.patch.object(storage_pool.StoragePool, 'refresh',
                           side_effect=busy):
        error = told(disks.make, disk, LARGEST)
    volume = disks.pool.volume(disk.volume_name)
    found['next try'] = [error, volumes(), disks.guest_sees(disk),
                         is_clean(disk, made), volume.physical()]
    before = volume.info().capacity
    volume.check_known_length()
    found['known'] = [before, volume.info().capacity]
    return found, disk


def copy(disks, disk):
    """Of a snapshot, and a rescue, which has a disk of its own."""
    target = DIRECTORY + '/snapshot'
    disk.snapshot_extract(target, 'qcow2')
    info = json.loads(subprocess.run(
        ['qemu-img', 'info', '-f', 'qcow2', '--output', 'json', target],
        check=True, stdout=subprocess.PIPE).stdout)
    same = subprocess.run(
        ['qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', disk.path,
         target], stdout=subprocess.DEVNULL).returncode == 0
    rescue = disks.new('disk.rescue', None)
    found = {'snapshot': [info['virtual-size'], same],
             'rescue': [volumes(), disks.guest_sees(rescue),
                        read(rescue).rstrip(b'\0') == CONTENT]}
    rescue.delete()
    disk.delete()
    found['left'] = volumes()
    return found


def main(pool):
    libvirt.registerErrorHandler(lambda context, error: None, None)
    nova.privsep.sys_admin_pctxt.set_client_mode(False)
    conf.CONF([], project='nova', default_config_files=[])
    conf.CONF.set_override('host', 'storage')
    conf.CONF.set_override('instances_path', DIRECTORY)
    conf.CONF.set_override('storage_disks_pool', pool, 'libvirt')
    cache = DIRECTORY + '/_base'
    os.makedirs(cache)
    with open(os.path.join(
            cache, imagecache.get_cache_fname(IMAGE)), 'wb') as f:
        f.write(CONTENT)
        f.truncate(IMAGE_SIZE)
    # What others have left.
    lvm('lvcreate', '-qqy', '-n', 'old', '-L', '96M', GROUP)
    subprocess.run('yes secret | head -c 96M > /dev/%s/old' % GROUP,
                   shell=True, check=True)
    lvm('lvremove', '-qqfy', GROUP + '/old')
    disks = Disks(libvirt.open('qemu:///system'), pool)
    base = disks.connection.storagePoolDefineXML(
        "<pool type='dir'><name>%s</name><target><path>%s</path></target>"
        '</pool>' % (conf.CONF.libvirt.storage_base_images_pool, cache))
    base.create()
    try:
        found, disk = grow(disks)
        found.update(copy(disks, disk))
    finally:
        base.destroy()
        base.undefine()
    print(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
