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
"""Two computes with libvirt storage pools of their own."""

import os
from unittest import mock

import fixtures
from oslo_utils import units

from nova import context as nova_context
from nova import objects
from nova.objects import block_device
import nova.privsep
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_hosts
from nova.tests.fixtures import libvirt_storage
from nova.tests.functional.libvirt import base
from nova.virt.libvirt import config
from nova.virt.libvirt import driver
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import imagecache
from nova.virt.libvirt.storage.records import metadata
from nova.virt.libvirt import utils as libvirt_utils

IMAGE = '155d900f-4e14-4e4c-a73d-069cbf4541e6'
CONTENT = b'what is in the image'.ljust(units.Mi, b'.')
BASE = imagecache.get_cache_fname(IMAGE)
# Where a guest writes to its disk: behind what a header takes up of the file.
GUEST = units.Mi
URI = 'qemu+tls://%s/system'

# What ServersTestBase plays, and is to be real here.
_REAL = [
    (owner, name, owner.__dict__[name]) for owner, name in (
        (driver.LibvirtDriver, '_create_ephemeral'),
        (driver.LibvirtDriver, '_create_image'),
        (driver.LibvirtDriver, '_create_swap'),
        (driver.LibvirtDriver, '_get_local_gb_info'),
        (imagebackend.Backend, 'backend'),
        (libvirt_utils, 'fetch_image'),
        (libvirt_utils, 'fetch_raw_image'),
        (libvirt_utils, 'file_open'),
    )]


class StoragePoolsTestBase(base.ServersTestBase):
    """Hosts whose instances directories and pools are their own.

    A disk is written as (pool, name of the disk, what stands behind that in
    the volume's name).
    """

    microversion = 'latest'
    ADMIN_API = True
    #: by host, where that is another one than libvirt-storage
    images_types: dict[str, str] = {}
    transport = 'libvirt'
    network = '192.0.2.%d'

    def setUp(self):
        self.hosts = self.useFixture(libvirt_hosts.Hosts())
        super().setUp()
        for owner, name, real in _REAL:
            self.useFixture(fixtures.MockPatchObject(owner, name, real))
        self.programs = self.useFixture(libvirt_hosts.Programs())
        self.pump = self.useFixture(
            libvirt_hosts.Pump(self._connection_at))
        self.stub_out('nova.virt.libvirt.utils.get_fs_info',
                      self._get_fs_info)
        # What needs privileges gets those of the test.
        nova.privsep.sys_admin_pctxt.set_client_mode(False)
        self.addCleanup(nova.privsep.sys_admin_pctxt.set_client_mode, True)
        self.flags(virt_type='qemu', group='libvirt')
        self.glance._imagedata[IMAGE] = CONTENT
        self.glance.images[IMAGE].update(
            size=len(CONTENT), min_disk=0, min_ram=0)
        self.useFixture(fixtures.MockPatchObject(
            self.glance, 'update', self._update_image))
        self.context = nova_context.get_admin_context()
        self.connections = {}
        self.directories = {}
        self.addCleanup(fakelibvirt.PEERS.clear)

    def _update_image(self, context, image_id, metadata, data=None,
                      purge_props=False):
        """Keep what a snapshot uploads; nothing is written behind that."""
        if data is not None:
            content = b''
            while len(content) < 2 * GUEST:
                part = data.read(2 * GUEST - len(content))
                if not part:
                    break
                content += part
            self.glance._imagedata[image_id] = content
            metadata = dict(metadata, size=len(content))
        return nova_fixtures.GlanceFixture.update(
            self.glance, context, image_id, metadata, data, purge_props)

    def _get_fs_info(self, path):
        fs = self.connections[self.hosts.current].file_system
        return {'total': fs.capacity, 'used': fs.used,
                'free': fs.capacity - fs.used}

    def _connection_at(self, uri):
        if uri == 'qemu:///system':
            return self.connections[self.hosts.current]
        return libvirt_storage.Peer(fakelibvirt.PEERS[uri])

    def start_compute(
        self, hostname='compute1', host_info=None, pci_info=None,
        mdev_info=None, vdpa_info=None, libvirt_version=None,
        qemu_version=None, cell_name=None, connection=None
    ):
        if hostname not in self.connections:
            directory = self.useFixture(fixtures.TempDir()).path
            address = self.network % (len(self.connections) + 1)
            connection = self._get_connection(hostname=hostname)
            connection.file_system = libvirt_storage.RealFileSystem()
            self.connections[hostname] = connection
            self.directories[hostname] = directory
            self.hosts.options[hostname] = {
                (None, 'host'): hostname,
                (None, 'my_ip'): address,
                (None, 'instances_path'): directory,
                ('libvirt', 'images_type'): self.images_types.get(
                    hostname, 'libvirt-storage'),
                ('libvirt', 'migration_inbound_addr'): address,
                ('libvirt', 'storage_migration_transport'): self.transport,
            }
            fakelibvirt.PEERS[URI % address] = connection
        with self.hosts.on(hostname):
            super().start_compute(
                hostname, host_info, pci_info, mdev_info, vdpa_info,
                libvirt_version, qemu_version, cell_name,
                self.connections[hostname])
        manager = self.computes[hostname].manager
        self.hosts.bind(hostname, manager)
        self._keep_files_apart(hostname, manager.driver)
        return hostname

    def _keep_files_apart(self, hostname, libvirt_driver):
        """Let no host see the files of another one by their path."""
        real = libvirt_driver.check_instance_shared_storage_remote

        def check(context, data):
            for directory in self.directories.values():
                data = dict(data, filename=data['filename'].replace(
                    directory, self.directories[hostname]))
            return real(context, data)

        libvirt_driver.check_instance_shared_storage_remote = check

    def _wait_for_server_parameter(self, server, expected_params,
                                   max_retries=10, **kwargs):
        # Real files take their time on a busy machine.
        return super()._wait_for_server_parameter(
            server, expected_params, max(60, max_retries), **kwargs)

    def set_option(self, hostname, name, value, group='libvirt'):
        """Set an option for one host."""
        self.hosts.options[hostname][group, name] = value

    def force_down(self, host, down):
        """Say whether a host's compute service is to be taken for down."""
        (service,) = self.api.get_services(host=host, binary='nova-compute')
        self.api.put_service(service['id'], {'forced_down': down})

    def sweep(self, host):
        """Let a host delete what is left over on it."""
        with self.hosts.on(host):
            driver = self.computes[host].manager.driver
            driver._local_disks.sweep(self.context, driver)

    def stub_remote_files(self):
        """Let nobody log in to another host to make its directories."""
        for what in ('create_dir', 'create_file', 'remove_dir',
                     'remove_file'):
            self.stub_out('nova.virt.libvirt.volume.remotefs.'
                          'RemoteFilesystem.' + what, mock.Mock())

    def boot(self, host='compute1', flavor=None, **flavor_kwargs):
        flavor = flavor or self.flavor(**flavor_kwargs)
        return self._create_server(
            image_uuid=IMAGE, flavor_id=flavor, networks='none', host=host)

    def flavor(self, disk=1, ephemeral=0, swap=0, memory_mb=512):
        return self._create_flavor(
            disk=disk, ephemeral=ephemeral, swap=swap, vcpu=1,
            memory_mb=memory_mb)

    def wait_for_refusal(self, server):
        """Wait until a migration has failed, and its task state is reset."""
        self._wait_for_server_parameter(
            server, {'status': 'ACTIVE', 'OS-EXT-STS:task_state': None,
                     'OS-EXT-SRV-ATTR:host': 'compute1'})
        self._wait_for_migration_status(server, ['error'])
        # The last that the compute manager does. It resets the task state
        # just before, which ends what has been begun since.
        self.notifier.wait_for_versioned_notifications('compute.exception')

    def wait_for_failure(self, server):
        """Wait until a server is in error, and what has failed is over.

        :returns: the server
        """
        server = self._wait_for_state_change(server, 'ERROR')
        self.notifier.wait_for_versioned_notifications('compute.exception')
        return server

    def assert_told(self, server, *words):
        """Whoever looks at the server's migration reads these words."""
        actions = self.api.get_instance_actions(server['id'])
        (action,) = [a for a in actions if a['action'] == 'migrate']
        detail = self.api.get_instance_action_details(
            server['id'], action['request_id'])
        told = '\n'.join('%s %s' % (event.get('details'), event['traceback'])
                         for event in detail['events'])
        for word in words:
            self.assertIn(word, told)

    # What became of it

    def raw_pool(self, host, name='nova-disks-pool'):
        return self.connections[host].storagePoolLookupByName(name)

    def volumes(self, host, server, name='nova-disks-pool'):
        """Return the names of a server's volumes, without its id.

        Where the pool is gone or stopped, what its directory has.
        """
        pool = self.connections[host].storage.get(name)
        if pool and pool.isActive():
            pool.refresh()
            found = pool.listVolumes()
        else:
            found = self.files(host)
        prefix = server['id'] + '_'
        return sorted(volume.removeprefix(prefix) for volume in found
                      if volume.startswith(prefix))

    def files(self, host):
        """Return what is in a host's pool of disks, as seen from outside."""
        return sorted(os.listdir(
            os.path.join(self.directories[host], 'disks')))

    def lose_image(self, roles=('admin',)):
        """Have Glance lose the image.

        :param roles: of Nova's own user
        """
        del self.glance.images[IMAGE]
        own = nova_context.RequestContext(
            'nova', 'service', auth_token='token', roles=roles)
        self.stub_out('nova.virt.libvirt.storage.service_user.admin_context',
                      lambda: own)

    def instance_path(self, host, server):
        return os.path.join(self.directories[host], server['id'])

    def config_of(self, host, server, name):
        """Return a volume's configuration."""
        volume = self.raw_pool(host).storageVolLookupByName(
            '%s_%s' % (server['id'], name))
        parsed = libvirt_storage.config.LibvirtConfigStorageVolume
        return parsed.from_xml(volume.XMLDesc(0))

    def content(self, host, server, name, length=512, offset=0):
        volume = self.raw_pool(host).storageVolLookupByName(
            '%s_%s' % (server['id'], name))
        return volume._file().read(offset, length)

    def write(self, host, server, name, data, offset=GUEST):
        """Write what the guest would write."""
        volume = self.raw_pool(host).storageVolLookupByName(
            '%s_%s' % (server['id'], name))
        volume._file().write(offset, data)

    def records(self, server):
        """Return a server's records by name of the disk."""
        instance = objects.Instance.get_by_uuid(
            self.context, server['id'], expected_attrs=['system_metadata'])
        disks = metadata.InstanceDisks.load(self.context, instance)
        return dict(disks.items())

    def system_metadata(self, server):
        """Return what older versions have noted of a move."""
        instance = objects.Instance.get_by_uuid(
            self.context, server['id'], expected_attrs=['system_metadata'])
        return {key: value for key, value in instance.system_metadata.items()
                if key.startswith('libvirt_storage')}

    def mappings(self, server):
        return block_device.BlockDeviceMappingList.get_by_instance_uuid(
            self.context.elevated(read_deleted='yes'), server['id'])

    def guest_disks(self, host, server):
        """Return a guest's disks: by target device, what it is told."""
        domain = self.connections[host].lookupByUUIDString(server['id'])
        guest = config.LibvirtConfigGuest()
        guest.parse_str(domain.XMLDesc(0))
        prefix = server['id'] + '_'
        return {
            disk.target_dev: (
                disk.driver_format,
                disk.source_volume.removeprefix(prefix)
                if disk.source_type == 'volume' else disk.source_path)
            for disk in guest.devices
            if isinstance(disk, config.LibvirtConfigGuestDisk)}

    def assert_no_guest(self, host, server):
        self.assertRaises(
            fakelibvirt.libvirtError,
            self.connections[host].lookupByUUIDString, server['id'])

    def assert_ready(self, host, server, **disks):
        """Check the records, the volumes and the guest of a server.

        A rescue's records stay until the next operation takes them up.

        :param disks: by name of the disk ('_' for '.'), its format, or format
            and name of the volume
        """
        expected = {}
        for name, wanted in disks.items():
            name = name.replace('_', '.')
            image_format, volume = (
                (wanted, name) if isinstance(wanted, str) else wanted)
            expected[name] = (
                'libvirt-storage', image_format, 'ready', host,
                'nova-disks-pool', '%s_%s' % (server['id'], volume))
        self.assertEqual(expected, {
            name: (record.backend, record.format, record.state, record.host,
                   record.pool, record.volume)
            for name, record in self.records(server).items()
            if not name.endswith('.rescue')})
        volumes = {record[1:2] + (record[5][37:],)
                   for record in expected.values()}
        self.assertEqual(
            volumes, set(self.guest_disks(host, server).values()))
        self.assertLessEqual({volume for _format, volume in volumes},
                             set(self.volumes(host, server)))

    def assert_nothing_left(self, server, *hosts):
        """Check that no host has anything of a server."""
        for host in hosts or self.connections:
            self.assertEqual([], self.volumes(host, server))
            self.assert_no_guest(host, server)
            for suffix in ('', '_resize', '_del'):
                self.assertFalse(os.path.exists(
                    self.instance_path(host, server) + suffix))


class Refusals:
    """For hosts of which one refuses what would come to it."""

    # An error on a host is none of the API.
    CAST_AS_CALL = False

    def refuse(self, server, *words):
        """Check that a server stays where it is, and runs on.

        :param words: that say why
        """
        self.api.post_server_action(
            server['id'], {'migrate': {'host': 'compute2'}})
        self.wait_for_refusal(server)
        self.assert_told(server, *words)
