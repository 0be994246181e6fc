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

"""Two hosts' pools in memory, for the tests of moves between them."""

import collections
import os
from unittest import mock
import zlib

import fixtures
from oslo_utils.fixture import uuidsentinel as uuids
import tenacity

import nova.conf
from nova import context
from nova import exception
from nova import objects
from nova.objects import fields
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt.libvirt.storage.move import destination as arrival
from nova.virt.libvirt.storage.pool import kinds
from nova.virt.libvirt.storage.pool import ownership
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pump import transfer as pump
from nova.virt.libvirt.storage.records import leftovers
from nova.virt.libvirt.storage.records import metadata

CONF = nova.conf.CONF

PoolInfo = collections.namedtuple(
    'PoolInfo', 'state capacity allocation available is_running')
VolumeInfo = collections.namedtuple('VolumeInfo', 'type capacity allocation')

POOL = 'nova-disks-pool'
BASES = 'nova-base-images-pool'


def checksum_of(content):
    return zlib.crc32(repr(content).encode())


class Daemon:
    """A host's libvirt: pools by name, each a dict of volumes by name.

    Two daemons which have one dict share that storage. log has what was done
    to volumes, in order.
    """

    def __init__(self, name):
        self.name = name
        self.pools = {POOL: {}, BASES: {}}
        self.types = collections.defaultdict(lambda: 'dir')
        self.inactive = set()
        self.unmounted = set()
        self.available = 1 << 40
        self.refreshes = 0
        self.log = []
        self.fail = {}
        self.closed = False
        self.version = 9_000_000
        self.extent = 1
        self.allocated = {}
        # By pool, the identity of the Ceph pool that it is over
        self.ceph = {}

    def getLibVersion(self):
        return self.version

    def getStoragePoolCapabilities(self, flags=0):
        return '<storagepoolCapabilities/>'

    def did(self, what, name):
        error = self.fail.get(what)
        if error:
            raise error
        self.log.append('%s %s' % (what, name))

    def setKeepAlive(self, interval, count):
        self.keepalive = (interval, count)

    def close(self):
        self.closed = True


class Volume:
    def __init__(self, pool, name):
        self.pool = pool
        self.name = name
        self.path = '/disks/' + name

    @property
    def content(self):
        return self.pool.volumes_by_name[self.name]

    def physical(self):
        return self.content['length']

    # An image of Ceph is a volume, too.
    size = physical

    @property
    def key(self):
        return '%s/%s' % (self.pool.daemon.ceph[self.pool.name], self.name)

    def file_bytes(self):
        return self.content['length'], self.content['allocation']

    def check_known_length(self):
        self.pool.daemon.did('look at', self.name)

    def info(self):
        return VolumeInfo(self.content.get('type', 0), self.content['length'],
                          self.content['allocation'])

    def config(self):
        config = mock.Mock(backing_store=None)
        if self.content.get('base'):
            config.backing_store = mock.Mock(path=self.content['base'])
        return config

    def delete(self):
        self.pool.daemon.did('delete', self.name)
        self.pool.volumes_by_name.pop(self.name, None)


class Pool:
    def __init__(self, daemon, name, host):
        self.daemon = daemon
        self.name = name
        self.host = host

    @classmethod
    def ensure(cls, daemon, config, host):
        daemon.pools.setdefault(POOL, {})
        return cls(daemon, POOL, host)

    @property
    def volumes_by_name(self):
        return self.daemon.pools[self.name]

    def exists(self):
        return self.name in self.daemon.pools

    def is_active(self):
        return self.name not in self.daemon.inactive

    def start(self):
        self.daemon.inactive.discard(self.name)

    def config(self):
        return mock.Mock(
            type=self.daemon.types[self.name],
            target_path='/%s/%s' % (self.daemon.name, self.name))

    def kind(self):
        return kinds.of_type(self.daemon.types[self.name])

    def ceph(self):
        identity = self.daemon.ceph.get(self.name)
        return identity and mock.Mock(
            identity=identity, sizes=lambda: (1 << 40, 1 << 38))

    def directory(self):
        return self.config().target_path

    def check_mounted(self):
        if self.name in self.daemon.unmounted:
            raise exception.StoragePoolNotMounted(
                pool=self.name, host=self.host, path='/mnt', found='nothing')

    def info(self):
        return PoolInfo(2, 0, 0, self.daemon.available, True)

    def refresh(self, timeout=None):
        self.daemon.refreshes += 1

    def volume(self, name):
        if not self.is_active():
            raise exception.StoragePoolInactive(
                pool=self.name, host=self.host)
        if name not in self.volumes_by_name:
            raise exception.StorageVolumeNotFound(
                volume=name, pool=self.name, host=self.host)
        return Volume(self, name)

    def volumes(self):
        return [Volume(self, name) for name in sorted(self.volumes_by_name)]

    def file_names(self):
        return set(self.volumes_by_name)

    find = storage_pool.StoragePool.find
    free_name = storage_pool.StoragePool.free_name

    def create(self, config):
        self.daemon.did('create', config.name)
        if config.name in self.volumes_by_name:
            raise exception.StorageVolumeExists(
                volume=config.name, pool=self.name, host=self.host)
        extent = self.daemon.extent
        self.volumes_by_name[config.name] = {
            'length': -(-config.capacity // extent) * extent, 'allocation': 0}
        self.daemon.allocated[config.name] = config.allocation
        return Volume(self, config.name)


class FakeHost:
    """What the driver's Host is to these modules."""

    def __init__(self, local, peer):
        self.local = local
        self.peer = peer
        self.uris = []
        self.nvram = None

    def get_connection(self):
        if isinstance(self.local, Exception):
            raise self.local
        return self.local

    def get_guest(self, instance):
        if self.nvram is None:
            raise exception.InstanceNotFound(instance_id=instance.uuid)
        guest = mock.Mock()
        guest.get_config.return_value.os_nvram = self.nvram
        return guest

    def connect_to_peer(self, uri):
        self.uris.append(uri)
        if isinstance(self.peer, Exception):
            raise self.peer
        return self.peer


class TwoHostsTestCase(test.NoDBTestCase):
    """An instance on host source, to be moved to host dest."""

    def setUp(self):
        super().setUp()
        self.flags(host='source', instances_path=self.useFixture(
            fixtures.TempDir()).path)
        self.flags(images_type='libvirt-storage',
                   storage_migration_transport='libvirt', group='libvirt')
        self.useFixture(fakelibvirt.LibvirtModuleFixture())
        self.useFixture(nova_fixtures.PrivsepFixture())
        # what the guest has beside its disks
        self.directory = self.useFixture(fixtures.TempDir()).path
        for name in ('utils.VTPM_DIR',
                     'storage.move.guest_files.NVRAM_DIR'):
            self.useFixture(fixtures.MonkeyPatch(
                'nova.virt.libvirt.' + name,
                self.useFixture(fixtures.TempDir()).path))
        self.stub_out('nova.virt.libvirt.storage.pool.stream.upload_file',
                      self.upload)
        self.stub_out('nova.virt.libvirt.storage.pool.stream.download_file',
                      self.download)
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.move.undo._delete_anew.retry.wait',
            tenacity.wait_none()))
        # Not every test ends the moves that it has begun.
        self.stub_out('nova.virt.libvirt.storage.move.copy._running', set())
        # what a pool's file system has, if that isn't the default
        self.free = {}
        self.stub_out('nova.virt.libvirt.utils.get_fs_info', self.get_fs_info)
        # which file system a pool is in, if that isn't one of its own
        self.devices = {}
        self.stub_out('nova.virt.libvirt.storage.move.destination._device_of',
                      lambda path: self.devices.get(path, path))
        self.source = Daemon('source')
        self.dest = Daemon('dest')
        self.host = FakeHost(self.source, self.dest)
        self.stub_out('nova.virt.libvirt.storage.pool.pool.StoragePool', Pool)
        self.stub_out('nova.virt.libvirt.storage.pool.pool.list_pools',
                      lambda daemon, host: [Pool(daemon, name, host)
                                            for name in daemon.pools])
        self.stub_out('nova.virt.libvirt.storage.pool.setup.pool_name_for',
                      lambda name: POOL)
        self.stub_out(
            'nova.virt.libvirt.storage.pool.ownership.places',
            lambda daemon, disks=None: [ownership.Place(
                Pool(daemon, POOL, CONF.host), is_configured=True)])
        self.stub_out('nova.virt.libvirt.storage.pool.setup.disks_pool_config',
                      lambda: None)
        self.stub_out('nova.virt.libvirt.storage.pump.transfer.copy',
                      self.pump_copy)
        self.stub_out('nova.virt.libvirt.storage.pump.transfer.verify',
                      self.pump_verify)
        self.context = context.RequestContext('fake', 'fake')
        self.saves = []
        self.stub_out(
            'nova.objects.BlockDeviceMappingList._save_driver_info',
            lambda cls, c, i, infos: self.saves.append(infos))
        self.image_error = None
        self.image_status = 'active'
        self.stub_out('nova.virt.images.get_info', self.get_image)
        self.own = context.RequestContext(
            'nova', 'service', auth_token='token', roles=['admin'])
        self.stub_out('nova.virt.libvirt.storage.service_user.admin_context',
                      lambda: self.own)
        self.stub_out('nova.virt.images.privileged_qemu_img_info',
                      self.qemu_img_info)
        self.stub_out('nova.virt.libvirt.storage.content.look_at_qcow2',
                      lambda path, size=0: self.qemu_img_info(path, 'qcow2'))
        self.stub_out('nova.virt.libvirt.storage.content.look_at_base',
                      lambda path: None)
        self.flattened = []
        self.stub_out('nova.privsep.qemu.flatten_image', self.flatten_image)
        self.copies = []
        self.copy_error = None
        self.direct = False
        self.instance = objects.Instance(
            self.context, uuid=uuids.instance, system_metadata={},
            image_ref=uuids.image, progress=0,
            migration_context=objects.MigrationContext(migration_id=7))
        self.instance.save = mock.Mock()
        self.migration = objects.Migration(
            self.context, id=7, source_compute='source', dest_compute='dest',
            dest_host='192.0.2.2')
        self.migration.save = mock.Mock()
        self.bdms = objects.BlockDeviceMappingList(objects=[
            self._bdm(source_type='image', boot_index=0),
            self._bdm(source_type='blank', boot_index=-1),
            self._bdm(source_type='blank', boot_index=-1,
                      guest_format='swap')])
        self.disks = self.load()
        for name, length in (('disk', 1000), ('disk.eph0', 600),
                             ('disk.swap', 400), ('disk.config', 100)):
            self.add_disk(name, length)
        self.disks.save(self.context)
        self.saves.clear()

    def _bdm(self, **kwargs):
        kwargs = dict({'no_device': False, 'guest_format': None,
                       'destination_type': 'local', 'driver_info': None},
                      **kwargs)
        self.bdm_ids = getattr(self, 'bdm_ids', 0) + 1
        return objects.BlockDeviceMapping(
            id=self.bdm_ids, uuid=getattr(uuids, 'bdm%d' % self.bdm_ids),
            instance_uuid=uuids.instance, **kwargs)

    def load(self, context=None, instance=None):
        return metadata.InstanceDisks.from_bdms(self.instance, self.bdms)

    def volume_name(self, name):
        return '%s_%s' % (uuids.instance, name)

    def add_disk(self, name, length, disk_format='raw'):
        self.source.pools[POOL][self.volume_name(name)] = {
            'length': length, 'allocation': length // 2,
            'content': 'content of ' + name}
        self.disks.set(name, metadata.LibvirtDiskMetadata(
            backend=fields.LibvirtDiskBackend.LIBVIRT_STORAGE,
            format=disk_format, size=length,
            state=fields.LibvirtDiskState.READY, host='source', pool=POOL,
            volume=self.volume_name(name)))

    def get_fs_info(self, path):
        free = self.free.get(path, 1 << 40)
        if isinstance(free, Exception):
            raise free
        return {'free': free}

    @staticmethod
    def upload(volume, path, sparse=True):
        with open(path, 'rb') as f:
            content = f.read()
        volume.content.update(content=content, length=len(content),
                              allocation=len(content))

    @staticmethod
    def download(volume, path):
        with open(path, 'wb') as f:
            f.write(volume.content['content'])

    def pump_copy(self, source, destination, length, **kwargs):
        self.copies.append((source, destination, length, kwargs))
        kwargs.setdefault('on_start', mock.Mock())(1234)
        kwargs.setdefault('progress', mock.Mock())(length // 2)
        try:
            if self.copy_error:
                raise self.copy_error
            content = self.source.pools[source.pool][source.name]
            target = (self.source if destination.uri == 'qemu:///system' else
                      self.dest).pools[destination.pool][destination.name]
            target.update(content)
        finally:
            kwargs.setdefault('on_end', mock.Mock())(1234)
        return pump.Result(
            data=length, holes=0, key=5,
            checksum=checksum_of(content['content']),
            physical=length, allocation=length, seconds=1, direct=self.direct)

    def pump_verify(self, volume, length, checksum, **kwargs):
        daemon = self.dest if volume.uri == 'dest:///' else self.source
        content = daemon.pools[volume.pool][volume.name]
        if (checksum_of(content.get('content')) != checksum or
                content['length'] != length):
            raise exception.StorageTransferMismatch(
                volume=volume.name, where='dest', reason='it differs')

    def get_image(self, context, image_id):
        if self.image_error:
            raise self.image_error
        return {'id': image_id, 'status': self.image_status}

    def content_at(self, path):
        """What is in a volume of this host."""
        daemon = self.dest if CONF.host == 'dest' else self.source
        for volumes in daemon.pools.values():
            if os.path.basename(path) in volumes:
                return volumes[os.path.basename(path)]
        raise exception.DiskNotFound(location=path)

    def qemu_img_info(self, path, format=None):
        content = self.content_at(path)
        return mock.Mock(
            backing_file=content.get('base'),
            backing_file_format=content.get('base_format', 'raw'),
            format_specific={'data': {'bitmaps': [
                {'name': name} for name in content.get('bitmaps', ())]}},
            disk_size=content['allocation'], virtual_size=content['length'])

    def flatten_image(self, path, image_format):
        self.assertEqual('qcow2', image_format)
        self.flattened.append(os.path.basename(path))
        del self.content_at(path)['base']

    def lay_over(self, disk_name, base_name, allocation=0, **base):
        """Make a disk an overlay over an image in the image cache."""
        record = self.disks.get(disk_name).obj_clone()
        record.format = 'qcow2'
        self.disks.set(disk_name, record)
        self.disks.save(self.context)
        self.saves.clear()
        self.source.pools[POOL][self.volume_name(disk_name)]['base'] = (
            os.path.join(CONF.instances_path, '_base', base_name))
        self.source.pools[BASES][base_name] = dict(
            {'length': allocation, 'allocation': allocation,
             'content': 'image ' + base_name}, **base)

    def make_offer(self):
        self.flags(host='dest')
        try:
            arrival.offer(self.dest, self.instance, self.migration,
                          self.load())
        finally:
            self.flags(host='source')

    def left(self, host):
        return leftovers.on_host(self.load(), host)

    def note_left(self, host, *names):
        disks = self.load()
        leftovers.note(disks, host, [(POOL, name) for name in names])
        disks.save(self.context)
        self.disks = self.load()

    def places(self, disks=None):
        """By disk: state, host, volume's suffix, host of the previous one."""
        return {
            name: (record.state, record.host,
                   record.volume.removeprefix(uuids.instance + '_'),
                   record.previous and record.previous.host)
            for name, record in (disks or self.load()).items()}

    def ours(self, daemon):
        return sorted(name.removeprefix(uuids.instance + '_')
                      for name in daemon.pools[POOL])
