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
import errno
import os
import threading
from unittest import mock

import ddt
import fixtures
from oslo_privsep import daemon
from oslo_utils import units

import nova.conf
from nova import exception
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt.libvirt.storage.pool import access
from nova.virt.libvirt.storage.pool import ceph as ceph_pool
from nova.virt.libvirt.storage.pool import config
from nova.virt.libvirt.storage.pool import pool
from nova.virt.libvirt.storage.pool import setup

CONF = nova.conf.CONF


def error(code, message='libvirt says no', int1=0):
    return fakelibvirt.make_libvirtError(
        fakelibvirt.libvirtError, message, error_code=code,
        error_message=message, int1=int1)


class Daemon:
    """As much of a virConnect as pools take; several threads may use it."""

    def __init__(self):
        self.pools = {}
        self.lock = threading.Lock()
        self.at_define = lambda: None

    def storagePoolLookupByName(self, name):
        if name not in self.pools:
            raise error(fakelibvirt.VIR_ERR_NO_STORAGE_POOL)
        return self.pools[name]

    def listAllStoragePools(self, flags):
        return list(self.pools.values())

    def storagePoolDefineXML(self, xml, flags):
        self.at_define()
        defined = config.LibvirtConfigStoragePool.from_xml(xml)
        with self.lock:
            if defined.name in self.pools:
                raise error(9, 'operation failed: pool already exists')
            self.pools[defined.name] = Pool(xml)
        return self.pools[defined.name]


class Pool:
    def __init__(self, xml, capacity=units.Ti):
        self.xml = xml
        self.capacity = capacity
        self.built = self.active = self.autostart = False
        self.starts = 0
        self.refresh = mock.Mock()
        self.createXML = mock.Mock()
        self.createXMLFrom = mock.Mock()
        self.storageVolLookupByName = mock.Mock()
        self.listAllVolumes = mock.Mock()

    def XMLDesc(self, flags):
        return self.xml

    def build(self, flags):
        self.built = True

    def setAutostart(self, on):
        self.autostart = bool(on)

    def isActive(self):
        return self.active

    def create(self, flags):
        if not self.built:
            raise error(fakelibvirt.VIR_ERR_SYSTEM_ERROR,
                        'cannot open directory', errno.ENOENT)
        if self.active:
            raise error(fakelibvirt.VIR_ERR_OPERATION_INVALID,
                        'pool is already active')
        self.active = True
        self.starts += 1

    def name(self):
        return config.LibvirtConfigStoragePool.from_xml(self.xml).name

    def info(self):
        return [2, self.capacity, 7, self.capacity - 7]


class PoolTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fakelibvirt.LibvirtModuleFixture())
        for name in ('START_TIMEOUT', 'REFRESH_TIMEOUT'):
            self.useFixture(fixtures.MonkeyPatch(
                'nova.virt.libvirt.storage.pool.pool.' + name, 0))
        self.flags(instances_path='/i')
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.daemon = Daemon()

    def define(self, name='nova-disks-pool', path='/i/disks', kind='dir',
               **kwargs):
        made = config.LibvirtConfigStoragePool()
        made.type, made.name, made.target_path = kind, name, path
        self.daemon.pools[name] = Pool(made.to_xml(), **kwargs)
        self.daemon.pools[name].built = True
        return self.daemon.pools[name]

    def ensure(self):
        return pool.StoragePool.ensure(
            self.daemon, setup.disks_pool_config(), 'host-a')


class ListPoolsTestCase(PoolTestCase):

    def test_list(self):
        self.define('a')
        self.define('b', path='/b')
        found = pool.list_pools(self.daemon, 'host-a')
        self.assertEqual(['a', 'b'], sorted(p.name for p in found))
        self.assertEqual({'host-a'}, {p.host for p in found})

    def test_no_storage_driver(self):
        with mock.patch.object(self.daemon, 'listAllStoragePools',
                               side_effect=error(3)):
            self.assertRaises(exception.StoragePoolError, pool.list_pools,
                              self.daemon, 'host-a')


@ddt.ddt
class LostStorageTestCase(PoolTestCase):

    def test_answers(self):
        self.assertFalse(pool.has_lost_storage(mock.Mock()))

    @ddt.data(
        (fakelibvirt.VIR_FROM_RPC, fakelibvirt.VIR_ERR_INTERNAL_ERROR,
         'internal error: client socket is closed', True),
        # It is away, and virtqemud will try again.
        (fakelibvirt.VIR_FROM_RPC, fakelibvirt.VIR_ERR_SYSTEM_ERROR,
         "Failed to connect socket to '/run/libvirt/virtstoraged-sock': "
         "Connection refused", False),
        (18, fakelibvirt.VIR_ERR_INTERNAL_ERROR,
         'internal error: something of the storage driver', False))
    @ddt.unpack
    def test_fails(self, domain, code, message, lost):
        conn = mock.Mock()
        conn.getStoragePoolCapabilities.side_effect = (
            conn.numOfSecrets.side_effect) = fakelibvirt.make_libvirtError(
                fakelibvirt.libvirtError, message, error_code=code,
                error_domain=domain)
        self.assertEqual(lost, pool.has_lost_storage(conn))
        # Without Ceph nobody needs a virtsecretd.
        for asked in (False, True):
            with mock.patch.object(
                    ceph_pool.CephPool, 'has_asked_for_secrets', asked):
                self.assertEqual(lost and asked, pool.has_lost_secrets(conn))


@ddt.ddt
class TestEnsure(PoolTestCase):

    def test_made(self):
        made = self.ensure()
        raw = self.daemon.pools['nova-disks-pool']
        self.assertTrue(raw.built and raw.active and raw.autostart)
        self.assertEqual('/i/disks', made.config().target_path)
        self.assertEqual(os.geteuid(), made.config().permissions.owner)

    def test_started_by_another_service_before_it_is_built(self):
        def build(flags):
            raw = self.daemon.pools['nova-disks-pool']
            raw.built = raw.active = True
            raise error(fakelibvirt.VIR_ERR_OPERATION_INVALID,
                        'pool is already active')

        with mock.patch.object(Pool, 'build', side_effect=build):
            self.ensure()
        self.assertTrue(self.daemon.pools['nova-disks-pool'].autostart)

    def test_can_not_be_built(self):
        with mock.patch.object(Pool, 'build', side_effect=error(38)):
            self.assertRaises(exception.StoragePoolError, self.ensure)

    def test_second_time_nothing_is_made(self):
        self.ensure()
        self.ensure()
        self.assertEqual(1, self.daemon.pools['nova-disks-pool'].starts)

    @ddt.data('dir', 'fs', 'netfs')
    def test_operators_pool_is_used_as_it_is(self, kind):
        raw = self.define(path='/somewhere', kind=kind)
        self.assertEqual('/somewhere', self.ensure().config().target_path)
        self.assertEqual((True, False, 1),
                         (raw.active, raw.autostart, raw.starts))

    @ddt.data('iscsi', 'scsi', 'disk', 'mpath', 'gluster')
    def test_type_that_can_not_serve(self, kind):
        raw = self.define(kind=kind)
        e = self.assertRaises(exception.StoragePoolUnsupported, self.ensure)
        for part in ('nova-disks-pool', 'host-a', kind,
                     'dir, fs, netfs, logical, rbd'):
            self.assertIn(part, str(e))
        self.assertFalse(raw.active)

    def test_too_small(self):
        self.define(capacity=units.Mi)
        e = self.assertRaises(exception.StoragePoolTooSmall, self.ensure)
        self.assertIn('mounted?', str(e))

    def test_directory_that_nova_can_not_enter(self):
        self.define(path='/i/private')
        with mock.patch.object(
                access, 'obstacle', autospec=True,
                return_value=access.Obstacle(
                    '/i/private', 'drwxr-x--- root:kvm', 'x')) as mock_look:
            e = self.assertRaises(exception.StoragePoolForbidden, self.ensure)
        mock_look.assert_called_once_with('/i/private', os.X_OK)
        for part in ('User %s ' % access.user(), 'nova-disks-pool', 'host-a',
                     '/i/private is drwxr-x--- root:kvm',
                     'setfacl -m u:%s:x /i/private' % access.user()):
            self.assertIn(part, str(e)[:200])

    def test_block_pool_has_no_directory(self):
        """/dev/VG is root's, and says nothing of the volumes there."""
        self.define(path='/dev/vg', kind='logical')
        with mock.patch.object(access, 'obstacle', autospec=True) as mock_look:
            pool.StoragePool(
                self.daemon, 'nova-disks-pool', 'host-a').check_access()
        mock_look.assert_not_called()

    def test_image_cache_that_nova_can_not_write(self):
        def look(path, needed):
            if path == '/i/_base' and needed & os.W_OK:
                return access.Obstacle(path, 'drwxr-xr-x root:root', 'wx')

        with mock.patch.object(access, 'obstacle', autospec=True,
                               side_effect=look):
            e = self.assertRaises(exception.StoragePoolForbidden,
                                  setup.ensure_pools, self.daemon, 'host-a')
        self.assertIn('/i/_base is drwxr-xr-x root:root', str(e))

    def test_instances_directory_that_nova_can_not_write(self):
        def look(path, needed):
            if path == '/i':
                return access.Obstacle(path, 'drwxr-xr-x root:root', 'rwx')

        with mock.patch.object(access, 'obstacle', autospec=True,
                               side_effect=look):
            e = self.assertRaises(exception.StorageUserForbidden,
                                  setup.ensure_pools, self.daemon, 'host-a')
        self.assertIn('Give user %s the permissions rwx for /i on host '
                      'host-a' % access.user(), str(e))
        self.assertIn('drwxr-xr-x root:root', str(e)[:200])
        self.assertEqual({}, self.daemon.pools)

    def test_guests_that_use_no_pools(self):
        for virt_type in ('lxc', 'parallels'):
            self.flags(virt_type=virt_type, group='libvirt')
            e = self.assertRaises(exception.StorageVirtTypeUnsupported,
                                  setup.ensure_pools, self.daemon, 'host-a')
            self.assertIn('images_type to qcow2 or flat on host host-a',
                          str(e))
            self.assertIn(virt_type, str(e))
            self.assertEqual({}, self.daemon.pools)

    def test_privileges_that_nova_does_not_get(self):
        with mock.patch('nova.privsep.storage.names_in', side_effect=(
                daemon.FailedToDropPrivileges('helper exited non-zero (1)'))):
            e = self.assertRaises(exception.StoragePrivilegeMissing,
                                  setup.ensure_pools, self.daemon, 'host-a')
        self.assertIn('Let user %s on host host-a run' % access.user(), str(e))
        for part in ('[nova_sys_admin]/helper_command', 'sudoers'):
            self.assertIn(part, str(e)[:200])
        self.assertIn('helper exited non-zero (1)', str(e))
        self.assertEqual({}, self.daemon.pools)

    def test_directory_of_another_pool(self):
        self.define(name='mine', path='/i/./disks/')
        e = self.assertRaises(exception.StoragePoolConflict, self.ensure)
        self.assertIn('that of storage pool mine', str(e))
        self.assertNotIn('nova-disks-pool', self.daemon.pools)

    def test_many_at_once(self):
        barrier = threading.Barrier(8)
        self.daemon.at_define = barrier.wait
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.pool._start',
            pool._start.retry_with(
                stop=pool.tenacity.stop_after_delay(10),
                wait=pool.tenacity.wait_fixed(0.01))))
        failures = []

        def ensure():
            try:
                self.ensure()
            except Exception as e:
                failures.append(e)

        threads = [threading.Thread(target=ensure) for _n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], failures)
        self.assertTrue(self.daemon.pools['nova-disks-pool'].active)

    def test_base_images_pool_has_to_be_over_the_image_cache(self):
        self.define('nova-base-images-pool', path='/somewhere')
        e = self.assertRaises(exception.StoragePoolMisplaced,
                              setup.ensure_pools, self.daemon, 'host-a')
        for word in ('nova-base-images-pool', 'host-a', '/somewhere',
                     '/i/_base'):
            self.assertIn(word, str(e))
        # by whatever path
        self.daemon.pools.clear()
        self.define('nova-base-images-pool', path='/i/../i/_base')
        setup.ensure_pools(self.daemon, 'host-a')

    def test_all_pools_of_a_host(self):
        self.flags(storage_pool_mapping={'swap': 'fast'}, group='libvirt')
        fast = self.define(name='fast', path='/fast')
        setup.ensure_pools(self.daemon, 'host-a')
        self.assertEqual({'nova-disks-pool', 'nova-base-images-pool', 'fast'},
                         set(self.daemon.pools))
        self.assertTrue(fast.active)

    @ddt.data('nova-disks-pool', 'fast')
    def test_pool_that_can_not_be_started(self, name):
        """The guests with disks in others are there nevertheless."""
        self.flags(storage_pool_mapping={'swap': 'fast'}, group='libvirt')
        raws = {other: self.define(name=other, path='/i/' + other,
                                   kind='netfs')
                for other in ('nova-disks-pool', 'fast')}
        raws[name].create = mock.Mock(side_effect=error(
            38, 'mount: the server does not answer'))
        with mock.patch.object(setup.LOG, 'error') as mock_error:
            setup.ensure_pools(self.daemon, 'host-a')
        self.assertEqual({other: other != name for other in raws},
                         {other: raw.active for other, raw in raws.items()})
        mock_error.assert_called_once()
        self.assertIn('the server does not answer',
                      str(mock_error.call_args.args))
        # What it finds once it is on is wrong for good.
        del raws[name].create
        raws[name].capacity = units.Mi
        self.assertRaises(exception.StoragePoolTooSmall, setup.ensure_pools,
                          self.daemon, 'host-a')

    def test_new_pool_that_can_not_be_started(self):
        with mock.patch.object(
                Pool, 'create', side_effect=error(38, 'not so')):
            self.assertRaises(exception.StoragePoolError, setup.ensure_pools,
                              self.daemon, 'host-a')

    def test_mapped_pool_has_to_be_there(self):
        self.flags(storage_pool_mapping={'swap': 'fast'}, group='libvirt')
        e = self.assertRaises(exception.StoragePoolNotFound,
                              setup.ensure_pools, self.daemon, 'host-a')
        self.assertIn('no storage pool fast on host host-a', str(e))

    def test_base_images_have_a_pool_of_their_own(self):
        # Else nobody sees which of them the disks there are laid over.
        for flags in ({'storage_disks_pool': 'nova-base-images-pool'},
                      {'storage_pool_mapping': {
                          'swap': 'nova-base-images-pool'}}):
            with self.subTest(flags=flags):
                self.flags(group='libvirt', **flags)
                e = self.assertRaises(exception.InvalidConfiguration,
                                      setup.ensure_pools, self.daemon,
                                      'host-a')
                for word in ('nova-base-images-pool', 'host-a',
                             'storage_base_images_pool'):
                    self.assertIn(word, str(e))
                self.assertEqual({}, self.daemon.pools)
                CONF.clear_override('storage_disks_pool', 'libvirt')

    def test_mapped_kind_has_to_be_one(self):
        # Such disks would be made in another pool, without a word.
        self.flags(storage_pool_mapping={'swop': 'fast', 'swap': 'fast'},
                   group='libvirt')
        self.define(name='fast', path='/fast')
        e = self.assertRaises(exception.InvalidConfiguration,
                              setup.ensure_pools, self.daemon, 'host-a')
        self.assertIn('config, ephemeral, root, swap', str(e))
        self.assertIn('swop', str(e))
        self.assertIn('host-a', str(e))
        self.assertEqual({'fast'}, set(self.daemon.pools))


@ddt.ddt
class TestPool(PoolTestCase):

    def setUp(self):
        super().setUp()
        self.raw = self.define()
        self.pool = pool.StoragePool(self.daemon, 'nova-disks-pool', 'host-a')

    def test_names_of_pools(self):
        self.flags(storage_pool_mapping={
            'root': 'r', 'ephemeral': 'e', 'swap': 's', 'config': 'c'},
            group='libvirt')
        self.assertEqual('reescc', ''.join(map(setup.pool_name_for, (
            'disk', 'disk.local', 'disk.eph1', 'disk.swap', 'disk.config',
            'disk.config.rescue'))))
        self.flags(storage_pool_mapping={}, group='libvirt')
        self.assertEqual('nova-disks-pool', setup.pool_name_for('disk.rescue'))

    def test_info(self):
        self.assertEqual(
            pool.PoolInfo(2, units.Ti, 7, units.Ti - 7), self.pool.info())

    def test_not_there(self):
        other = pool.StoragePool(self.daemon, 'other', 'host-a')
        self.assertFalse(other.exists())
        for call in (other.info, other.config, other.refresh, other.volumes,
                     other.is_active, lambda: other.volume('v')):
            e = self.assertRaises(exception.StoragePoolNotFound, call)
            self.assertIn('other', str(e))

    def test_refresh_waits_for_jobs(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.pool.REFRESH_TIMEOUT', 0.5))
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.libvirt.storage.pool.pool._refresh.retry.wait',
            pool.tenacity.wait_fixed(0.01)))
        busy = error(1, "internal error: pool 'p' has asynchronous jobs "
                        "running.")
        self.raw.refresh.side_effect = [busy, busy, None]
        self.pool.refresh()
        self.assertEqual(3, self.raw.refresh.call_count)
        self.raw.refresh.side_effect = busy
        self.assertRaises(exception.StoragePoolError, self.pool.refresh)
        self.assertGreater(self.raw.refresh.call_count, 4)
        for reason in (busy, error(1, 'other')):
            self.raw.refresh.reset_mock()
            self.raw.refresh.side_effect = [reason, None]
            self.assertRaises(exception.StoragePoolError,
                              self.pool.refresh, timeout=0)
            self.raw.refresh.assert_called_once_with(0)

    def test_volumes_in_one_call(self):
        raw = [mock.Mock(), mock.Mock()]
        for volume, name in zip(raw, 'ab'):
            volume.name.return_value = name
        self.raw.listAllVolumes.return_value = raw
        self.assertEqual(['a', 'b'], [v.name for v in self.pool.volumes()])
        self.raw.listAllVolumes.assert_called_once_with(0)

    @ddt.data(
        (fakelibvirt.VIR_ERR_NO_STORAGE_VOL, 'x', 0,
         exception.StorageVolumeNotFound),
        (fakelibvirt.VIR_ERR_STORAGE_VOL_EXIST, 'x', 0,
         exception.StorageVolumeExists),
        (fakelibvirt.VIR_ERR_OPERATION_INVALID, 'Requested operation is not '
         "valid: volume target path '/p/v' already exists", 0,
         exception.StorageVolumeExists),
        (fakelibvirt.VIR_ERR_SYSTEM_ERROR, 'x', errno.ENOSPC,
         exception.InsufficientStoragePoolSpace),
        (1, 'qemu-img: No space left on device', 0,
         exception.InsufficientStoragePoolSpace),
        (fakelibvirt.VIR_ERR_OPERATION_INVALID,
         "storage pool 'p' is not active", 0, exception.StoragePoolInactive),
        (fakelibvirt.VIR_ERR_SYSTEM_ERROR, 'x', errno.EIO,
         exception.StorageVolumeError))
    @ddt.unpack
    def test_errors(self, code, message, int1, expected):
        self.raw.createXML.side_effect = error(code, message, int1)
        wanted = config.LibvirtConfigStorageVolume()
        wanted.name, wanted.capacity = 'v', 1
        e = self.assertRaises(expected, self.pool.create, wanted)
        self.assertIs(expected, type(e))
        self.assertIn('nova-disks-pool', str(e))
        self.assertIn('host-a', str(e))

    def test_free_name(self):
        taken = {'v', 'v.1'}

        def look_up(name):
            if name not in taken:
                raise error(fakelibvirt.VIR_ERR_NO_STORAGE_VOL)

        self.raw.storageVolLookupByName.side_effect = look_up
        self.assertEqual('w', self.pool.free_name('w'))
        self.assertEqual('v.2', self.pool.free_name('v'))
        self.raw.storageVolLookupByName.side_effect = error(38, 'gone')
        self.assertRaises(exception.StorageVolumeError, self.pool.free_name,
                          'v')

    @ddt.data((['a', 'b'], {'a', 'b'}), (OSError(errno.EACCES, 'no'), set()))
    @ddt.unpack
    def test_names_in_directory(self, listed, expected):
        with mock.patch('nova.privsep.storage.names_in',
                        side_effect=[listed]):
            self.assertEqual(expected, self.pool.names_in_directory())
        self.raw.refresh.assert_not_called()

    def test_volume_is_novas_to_write(self):
        wanted = config.LibvirtConfigStorageVolume()
        wanted.name, wanted.capacity = 'v', 1
        self.pool.create(wanted)
        xml, flags = self.raw.createXML.call_args.args
        made = config.LibvirtConfigStorageVolume.from_xml(xml)
        self.assertEqual((os.geteuid(), 0o644, 0), (
            made.permissions.owner, made.permissions.mode, flags))
        source = mock.Mock()
        self.pool.create_from(wanted, source)
        self.assertIs(source.raw, self.raw.createXMLFrom.call_args.args[1])
