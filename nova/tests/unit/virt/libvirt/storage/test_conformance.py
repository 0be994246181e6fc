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

"""What libvirt's storage does: the same tests on the fake and on a daemon.

For the latter set NOVA_TEST_LIBVIRT_URI, and NOVA_TEST_LIBVIRT_DIR to a
directory of that daemon's host in which pools may be made. It should be in a
file system that has sparse files.
"""

import os
import threading
import time

import fixtures
from oslo_utils import units
from oslo_utils import uuidutils

from nova import exception
from nova import test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_storage
from nova.virt.libvirt import config as guest_config
from nova.virt.libvirt.storage import image_cache as base_images
from nova.virt.libvirt.storage.pool import config
from nova.virt.libvirt.storage.pool import pool as storage_pool
from nova.virt.libvirt.storage.pool import usage

URI = os.environ.get('NOVA_TEST_LIBVIRT_URI')
DIRECTORY = os.environ.get('NOVA_TEST_LIBVIRT_DIR')

VOLUME = ("<volume><name>%s</name><capacity unit='bytes'>%d</capacity>"
          "<allocation unit='bytes'>%d</allocation><target><format type='%s'/>"
          "</target>%s</volume>")
BACKING = "<backingStore><path>%s</path><format type='%s'/></backingStore>"


class Provided:
    """To be mixed with what provides libvirt, conn and directory."""

    def setUp(self):
        super().setUp()
        self.provide()
        self.useFixture(fakelibvirt.LibvirtModuleFixture(self.libvirt))
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.name = 'nova-test-%s' % uuidutils.generate_uuid()
        self.path = os.path.join(self.directory, self.name)
        self.xml = ("<pool type='dir'><name>%s</name><target><path>%s</path>"
                    "</target></pool>" % (self.name, self.path))
        self.addCleanup(self._remove, self.name)

    def _remove(self, name):
        try:
            pool = self.conn.storagePoolLookupByName(name)
        except self.libvirt.libvirtError:
            return
        if pool.isActive():
            for volume in pool.listAllVolumes(0):
                volume.delete(0)
            pool.destroy()
        pool.undefine()

    def make_pool(self):
        pool = self.conn.storagePoolDefineXML(self.xml, 0)
        pool.build(0)
        pool.create(0)
        return pool

    def make(self, pool, name, capacity=units.Mi, allocation=0, fmt='raw',
             backing=''):
        return pool.createXML(
            VOLUME % (name, capacity, allocation, fmt, backing), 0)

    def fails(self, code, function, *args):
        """:returns: libvirt's message"""
        e = self.assertRaises(self.libvirt.libvirtError, function, *args)
        self.assertEqual(code, e.get_error_code(), e.get_error_message())
        return e.get_error_message()


class Conformance(Provided):
    """What storage pools and their volumes do."""

    def settle(self, pool, condition):
        """Wait for the refresh which follows an upload."""
        for _i in range(200):
            if condition():
                return
            time.sleep(0.02)
        self.assertTrue(condition())

    def write(self, volume, data, offset=0):
        stream = self.conn.newStream(0)
        volume.upload(stream, offset, len(data), 0)
        self.assertEqual(len(data), stream.send(data))
        stream.finish()

    def read(self, volume, length, offset=0):
        stream = self.conn.newStream(0)
        volume.download(stream, offset, length, 0)
        data = b''
        while True:
            part = stream.recv(units.Mi)
            if not part:
                break
            data += part
        stream.finish()
        return data

    def parsed(self, volume):
        return config.LibvirtConfigStorageVolume.from_xml(volume.XMLDesc(0))

    # pools

    def test_missing_pool(self):
        self.fails(49, self.conn.storagePoolLookupByName, self.name)

    def test_name_and_path_are_taken(self):
        self.conn.storagePoolDefineXML(self.xml, 0)
        message = self.fails(
            9, self.conn.storagePoolDefineXML, self.xml, 0)
        self.assertIn('already exists', message)
        message = self.fails(
            9, self.conn.storagePoolDefineXML,
            self.xml.replace('<name>', '<name>other-'), 0)
        self.assertIn('conflict', message)

    def test_life_of_a_pool(self):
        pool = self.conn.storagePoolDefineXML(self.xml, 0)
        self.assertEqual([0, 0, 0, 0], list(pool.info()))
        self.assertIn(os.strerror(2), self.fails(38, pool.create, 0))
        for function in (lambda: pool.refresh(0), pool.destroy,
                         lambda: pool.listAllVolumes(0),
                         lambda: pool.storageVolLookupByName('x'),
                         lambda: self.make(pool, 'x')):
            self.assertIn('is not active', self.fails(55, function))
        pool.build(0)
        pool.build(0)
        pool.create(0)
        self.assertEqual(2, pool.info()[0])
        self.assertIn('already active', self.fails(55, pool.create, 0))
        self.assertIn('already active', self.fails(55, pool.build, 0))
        self.assertIn('still active', self.fails(55, pool.undefine))
        pool.destroy()
        pool.undefine()
        self.fails(49, pool.info)

    def test_volumes_survive_the_pool(self):
        pool = self.make_pool()
        self.make(pool, 'a')
        pool.destroy()
        self.fails(55, pool.storageVolLookupByName, 'a')
        pool.create(0)
        self.assertEqual(
            units.Mi, pool.storageVolLookupByName('a').info()[1])

    # volumes

    def test_raw(self):
        pool = self.make_pool()
        volume = self.make(pool, 'a', 64 * units.Mi)
        self.assertEqual([0, 64 * units.Mi, 0], list(volume.info()))
        self.assertEqual(64 * units.Mi, volume.infoFlags(1)[2])
        parsed = self.parsed(volume)
        self.assertEqual('raw', parsed.target_format)
        self.assertEqual(os.path.join(self.path, 'a'), parsed.target_path)
        self.assertEqual(['a'], [v.name() for v in pool.listAllVolumes(0)])

    def test_allocated(self):
        pool = self.make_pool()
        volume = self.make(pool, 'a', units.Mi, allocation=units.Mi)
        self.assertGreaterEqual(volume.info()[2], units.Mi)

    def test_overlay(self):
        pool = self.make_pool()
        base = self.make(pool, 'base')
        volume = self.make(pool, 'a', units.Gi, fmt='qcow2',
                           backing=BACKING % (base.path(), 'raw'))
        pool.refresh(0)
        parsed = self.parsed(pool.storageVolLookupByName('a'))
        self.assertEqual('qcow2', parsed.target_format)
        self.assertEqual(units.Gi, parsed.capacity)
        self.assertEqual(base.path(), parsed.backing_store.path)
        self.assertEqual('raw', parsed.backing_store.format)
        self.assertLess(volume.infoFlags(1)[2], units.Mi)
        # A backing file that goes is tolerated.
        pool.storageVolLookupByName('base').delete(0)
        pool.refresh(0)
        parsed = self.parsed(pool.storageVolLookupByName('a'))
        self.assertEqual(os.path.join(self.path, 'base'),
                         parsed.backing_store.path)

    def test_qcow2_is_old_unless_asked_for(self):
        pool = self.make_pool()
        self.make(pool, 'old', fmt='qcow2')
        pool.createXML(
            "<volume><name>new</name><capacity>1048576</capacity><target>"
            "<format type='qcow2'/><compat>1.1</compat></target></volume>", 0)
        pool.refresh(0)
        compat = {v.name(): self.parsed(v).compat
                  for v in pool.listAllVolumes(0)}
        # libvirt 9.0 makes the old version, 11.3 and 12.8 the new one.
        self.assertIn(compat.pop('old'), (None, '1.1'))
        self.assertEqual({'new': '1.1'}, compat)

    def test_create_errors(self):
        pool = self.make_pool()
        self.make(pool, 'a')
        self.fails(90, self.make, pool, 'a')
        self.fails(55, self.make, pool, 'a/b')
        self.fails(27, self.make, pool, '')
        self.fails(67, lambda: self.make(pool, 'b', fmt='bogus'))
        self.assertIn(os.strerror(2), self.fails(
            38, lambda: self.make(pool, 'b', fmt='qcow2', backing=BACKING % (
                self.path + '/missing', 'raw'))))
        self.fails(50, pool.storageVolLookupByName, 'b')

    def test_copy(self):
        pool = self.make_pool()
        source = self.make(pool, 'a', units.Mi)
        self.write(source, b'content')
        self.settle(pool, lambda: source.info()[1] == units.Mi)
        copy = self.retried(lambda: pool.createXMLFrom(
            VOLUME % ('b', 2 * units.Mi, 0, 'raw', ''), source, 0))
        self.assertEqual(2 * units.Mi, copy.info()[1])
        self.assertEqual(b'content\0', self.read(copy, 8))

    def test_copy_takes_the_space_that_is_asked_for(self):
        pool = self.make_pool()
        source = self.make(pool, 'a', 2 * units.Mi)
        for name, allocation, taken in (
                ('sparse', 0, False), ('less', units.Mi, False),
                ('all', 4 * units.Mi, True)):
            xml = VOLUME % (name, 4 * units.Mi, allocation, 'raw', '')
            copy = self.retried(
                lambda: pool.createXMLFrom(xml, source, 0))
            self.assertIs(taken, copy.info()[2] >= 4 * units.Mi, name)
            self.assertIs(taken, copy.info()[2] >= units.Mi, name)

    def retried(self, function):
        return function()

    def test_copy_is_never_smaller(self):
        pool = self.make_pool()
        source = self.make(pool, 'a', 4 * units.Mi)
        copy = pool.createXMLFrom(
            VOLUME % ('b', units.Mi, 0, 'raw', ''), source, 0)
        self.assertEqual(4 * units.Mi, copy.info()[1])

    def test_conversion_ignores_the_capacity(self):
        pool = self.make_pool()
        source = self.make(pool, 'a', 4 * units.Mi)
        copy = pool.createXMLFrom(
            VOLUME % ('b', 8 * units.Mi, 0, 'qcow2', ''), source, 0)
        self.assertEqual(4 * units.Mi, copy.info()[1])

    def test_copy_to_a_name_that_is_taken(self):
        pool = self.make_pool()
        source = self.make(pool, 'a')
        self.assertIn('already in use', self.fails(
            1, pool.createXMLFrom, VOLUME % ('a', 1024, 0, 'raw', ''),
            source, 0))

    def test_resize(self):
        pool = self.make_pool()
        for fmt in ('raw', 'qcow2'):
            volume = self.make(pool, fmt, fmt=fmt)
            volume.resize(2 * units.Mi, 0)
            self.assertEqual(2 * units.Mi, volume.info()[1])
            self.fails(8, volume.resize, units.Mi, 0)
        volume = pool.storageVolLookupByName('raw')
        volume.resize(4 * units.Mi, 1)
        self.assertGreaterEqual(volume.info()[2], 4 * units.Mi)

    def test_delete(self):
        pool = self.make_pool()
        volume = self.make(pool, 'a')
        volume.delete(0)
        for function in (lambda: volume.delete(0), volume.info,
                         lambda: volume.XMLDesc(0),
                         lambda: pool.storageVolLookupByName('a'),
                         lambda: self.conn.storageVolLookupByPath(
                             self.path + '/a')):
            self.fails(50, function)

    def test_guest_written_header_is_believed_after_a_refresh(self):
        pool = self.make_pool()
        volume = self.make(pool, 'a', 4 * units.Mi)
        secret = self.make(pool, 'secret')
        self.write(volume, libvirt_storage.qcow2_header(
            units.Gi, secret.path(), 'raw', '1.1'))

        def lied():
            parsed = self.parsed(pool.storageVolLookupByName('a'))
            return (parsed.target_format, parsed.capacity) == (
                'qcow2', units.Gi) and parsed

        pool.refresh(0)
        self.settle(pool, lied)
        self.assertEqual(secret.path(), lied().backing_store.path)
        self.assertEqual(4 * units.Mi, lied().physical)

    def test_no_header_of_a_guest_is_acted_upon(self):
        """Whatever libvirt reads there, it counts as the raw disk it is."""
        pool = self.make_pool()
        self.make(pool, 'base')
        headers = [libvirt_storage.qcow2_header(units.Gi, backing, 'raw',
                                                compat)
                   for compat in ('0.10', '1.1')
                   for backing in (None, '/etc/hostname', 'base',
                                   '../../etc/hostname',
                                   self.path + '/base',
                                   'json:{"driver":"file",'
                                   '"filename":"/etc/hostname"}',
                                   'nbd://127.0.0.1:10809/x')]
        headers += [b'QED\0' + bytes(60), b'KDMV\x01\0\0\0' + bytes(500),
                    b'conectix' + bytes(504), b'LUKS\xba\xbe\0\x01',
                    b'LUKS\xba\xbe\0\x02',
                    # LUKS 1, the payload after 4,096 sectors
                    b'LUKS\xba\xbe\0\x01' + b'aes'.ljust(32, b'\0') +
                    b'xts-plain64'.ljust(32, b'\0') +
                    b'sha256'.ljust(32, b'\0') + b'\0\0\x10\0' +
                    b'\0\0\0\x20' + bytes(480)]
        for n, header in enumerate(headers):
            volume = self.make(pool, 'v%d' % n, 4 * units.Mi)
            self.write(volume, header)
        # As a start of the daemon does; the uploads' own refreshes may run.
        pool.refresh(0)
        disk = guest_config.LibvirtConfigGuestDisk()
        disk.source_type, disk.source_pool = 'volume', self.name
        disk.driver_format = 'raw'
        believed = set()
        volumes = usage.Volumes(lambda: self.conn, 'host-a')
        for n in range(len(headers)):
            disk.source_volume = 'v%d' % n
            info = volumes.disk_info(disk)
            self.assertEqual(
                ('raw', 4 * units.Mi, ''),
                (info['type'], info['virt_disk_size'],
                 info['backing_file']), headers[n])
            believed.add(self.parsed(pool.storageVolLookupByName(
                'v%d' % n)).target_format)
        # It would not prove much if libvirt had seen nothing.
        self.assertIn('qcow2', believed)
        if os.path.isdir(self.path):  # and not in memory
            self.assertEqual({'base'}, base_images.in_use(
                self.conn, 'host-a', self.path))

    # streams

    def test_stream(self):
        pool = self.make_pool()
        volume = self.make(pool, 'a', units.Mi)
        data = os.urandom(300 * units.Ki)
        self.write(volume, data, offset=4096)
        self.assertEqual(data, self.read(volume, len(data), offset=4096))
        self.assertEqual(units.Mi, volume.infoFlags(1)[2])
        self.assertEqual(units.Mi, len(self.read(volume, 0)))

    def test_too_few_bytes_are_no_error(self):
        volume = self.make(self.make_pool(), 'a')
        stream = self.conn.newStream(0)
        volume.upload(stream, 0, 1000, 0)
        stream.send(b'x' * 10)
        stream.finish()

    # libvirt 10.1 to 12.6 ends, or hangs, of an error in an upload.
    dies_of_failed_uploads = False

    def test_too_many_bytes_are_an_error_at_the_end(self):
        if self.dies_of_failed_uploads:
            self.skipTest('this libvirt dies of a write error in an upload')
        volume = self.make(self.make_pool(), 'a')
        stream = self.conn.newStream(0)
        volume.upload(stream, 0, 10, 0)
        self.assertEqual(20, stream.send(b'x' * 20))
        self.assertIn(os.strerror(28), self.fails(38, stream.finish))

    def test_length_0_writes_past_the_capacity(self):
        pool = self.make_pool()
        volume = self.make(pool, 'a', 4096)
        stream = self.conn.newStream(0)
        volume.upload(stream, 0, 0, 0)
        stream.send(b'x' * 10000)
        stream.finish()
        self.assertEqual(10000, volume.infoFlags(1)[2])

    def test_holes(self):
        pool = self.make_pool()
        volume = self.make(pool, 'a', units.Mi)
        stream = self.conn.newStream(0)
        volume.upload(stream, 0, units.Mi, 1)
        stream.sendHole(units.Mi // 2)
        stream.send(b'w' * 4096)
        stream.sendHole(units.Mi // 2 - 4096)
        stream.finish()
        self.assertEqual(4096, volume.info()[2])
        stream = self.conn.newStream(0)
        volume.download(stream, 0, 0, 1)
        parts = []
        while True:
            data = stream.recvFlags(units.Mi, 1)
            if data == -3:
                parts.append(stream.recvHole())
            elif data:
                parts.append(data)
            else:
                break
        stream.finish()
        self.assertEqual(
            [units.Mi // 2, b'w' * 4096, units.Mi // 2 - 4096], parts)

    def test_holes_zero_nothing(self):
        pool = self.make_pool()
        volume = self.make(pool, 'a', units.Mi)
        self.write(volume, b'old')
        stream = self.conn.newStream(0)
        volume.upload(stream, 0, units.Mi, 1)
        stream.sendHole(4096)
        stream.send(b'new')
        stream.sendHole(units.Mi - 4099)
        stream.finish()
        self.assertEqual(b'old', self.read(volume, 3))

    @staticmethod
    def _next_section(_stream, rest):
        if not rest:
            return False, 0
        is_data = isinstance(rest[0], bytes)
        return is_data, len(rest[0]) if is_data else rest[0]

    @staticmethod
    def _take(_stream, count, rest):
        if not rest:
            return b''
        data, left = rest[0][:count], rest[0][count:]
        rest[:1] = [left] if left else []
        return data

    @staticmethod
    def _skip(_stream, length, rest):
        assert rest.pop(0) == length
        return length

    def test_send_and_receive_all(self):
        volume = self.make(self.make_pool(), 'a', units.Mi)
        stream = self.conn.newStream(0)
        volume.upload(stream, 0, units.Mi, 0)
        stream.sendAll(self._take, [b'x' * 4096, b'y' * (units.Mi - 4096)])
        stream.finish()
        received = []
        stream = self.conn.newStream(0)
        volume.download(stream, 0, 0, 0)
        stream.recvAll(lambda _stream, data, to: to.append(data), received)
        stream.finish()
        self.assertEqual(b'x' * 4096 + b'y' * (units.Mi - 4096),
                         b''.join(received))

    def test_send_all_sparsely(self):
        volume = self.make(self.make_pool(), 'a', units.Mi)
        stream = volume.connect().newStream(0)
        volume.upload(stream, 0, units.Mi, 1)
        stream.sparseSendAll(
            self._take, self._next_section, self._skip,
            [b'x' * 4096, units.Mi // 2 - 4096, b'y' * 4096,
             units.Mi // 2 - 4096])
        stream.finish()
        self.assertEqual(8192, volume.info()[2])
        self.assertEqual(b'x' * 4096 + bytes(4096),
                         self.read(volume, 8192))
        self.assertEqual(b'y' * 4096 + bytes(4096),
                         self.read(volume, 8192, units.Mi // 2))

    def test_abort_leaves_what_was_sent(self):
        pool = self.make_pool()
        volume = self.make(pool, 'a', units.Mi)
        stream = self.conn.newStream(0)
        volume.upload(stream, 0, units.Mi, 0)
        stream.send(b'x' * 4096)
        stream.abort()
        pool.refresh(0)
        self.assertIn('a', [v.name() for v in pool.listAllVolumes(0)])

    # what Nova makes of it

    def ensured(self, name=None):
        wanted = config.LibvirtConfigStoragePool.from_xml(self.xml)
        return storage_pool.StoragePool.ensure(self.conn, wanted, 'host-a')

    def test_ensure(self):
        for _i in range(2):
            pool = self.ensured()
            self.assertTrue(pool.is_active())
        pool = self.conn.storagePoolLookupByName(self.name)
        self.assertTrue(pool.autostart())
        pool.destroy()
        self.ensured()
        self.assertTrue(pool.isActive())

    def test_ensure_at_once(self):
        errors, start = [], threading.Barrier(4)

        def run():
            start.wait()
            try:
                self.ensured()
            except Exception as e:
                errors.append(e)

        threads = [threading.Thread(target=run) for _i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], errors)
        self.assertTrue(self.ensured().is_active())

    def test_nova_exceptions(self):
        pool = self.ensured()
        wanted = config.LibvirtConfigStorageVolume()
        wanted.name, wanted.capacity, wanted.target_format = 'a', 4096, 'raw'
        wanted.permissions = config.LibvirtConfigStoragePermissions()
        volume = pool.create(wanted)
        for function in (lambda: pool.create(wanted),
                         lambda: pool.create_from(wanted, volume)):
            exc = self.assertRaises(exception.StorageVolumeExists, function)
            for word in ('a', self.name, 'host-a'):
                self.assertIn(word, str(exc))
        self.assertRaises(exception.StorageVolumeNotFound, pool.volume, 'b')
        self.assertEqual(4096, volume.physical())
        volume.delete()
        volume.delete()
        self.assertRaises(exception.StorageVolumeNotFound, volume.info)
        self.conn.storagePoolLookupByName(self.name).destroy()
        self.assertRaises(exception.StoragePoolInactive, pool.volumes)


class FakeTestCase(Conformance, test.NoDBTestCase):

    def provide(self):
        self.libvirt = fakelibvirt
        self.conn = fakelibvirt.Connection('qemu:///system')
        self.directory = '/pools'

    # What can't be had from a real daemon at will.

    def test_refresh_while_a_volume_is_made(self):
        pool = self.make_pool()
        with pool.job():
            self.assertIn('asynchronous jobs running', self.fails(
                1, pool.refresh, 0))
        pool.refresh(0)

    def test_full(self):
        self.conn.file_system.capacity = 2 * units.Mi
        pool = self.ensured_small()
        wanted = config.LibvirtConfigStorageVolume.from_xml(
            VOLUME % ('a', 4 * units.Mi, 4 * units.Mi, 'raw', ''))
        self.assertRaises(exception.InsufficientStoragePoolSpace,
                          pool.create, wanted)
        self.assertEqual([], pool.volumes())
        wanted.allocation = 0
        volume = pool.create(wanted)
        stream = self.conn.newStream(0)
        volume.raw.upload(stream, 0, 4 * units.Mi, 0)
        for _i in range(16):
            stream.send(b'x' * 256 * units.Ki)
        self.assertIn(os.strerror(28), self.fails(38, stream.finish))

    def ensured_small(self):
        self.make_pool()
        return storage_pool.StoragePool(self.conn, self.name, 'host-a')

    def test_two_hosts(self):
        """Each connection is a host; they may share a file system."""
        other = fakelibvirt.Connection('qemu:///system')
        self.make(self.make_pool(), 'a')
        for shared in (False, True):
            if shared:
                other.file_system = self.conn.file_system
            else:
                other.file_system.make_directory(self.path)
                self.assertEqual({}, other.storage)
                other.storagePoolDefineXML(self.xml, 0)
            pool = other.storagePoolLookupByName(self.name)
            pool.create(0)
            self.assertEqual(['a'] if shared else [], pool.listVolumes())
            pool.destroy()


class RealFilesTestCase(Conformance, test.NoDBTestCase):
    """The fake again, over files that others can open."""

    def provide(self):
        self.libvirt = fakelibvirt
        self.conn = fakelibvirt.Connection('qemu:///system')
        self.conn.file_system = libvirt_storage.RealFileSystem()
        self.directory = self.useFixture(fixtures.TempDir()).path


def connect(case, place, missing):
    """Let a test speak to the daemon that the environment names.

    :param place: what else has to be named
    :param missing: what to say where one of them isn't
    """
    if not (URI and place):
        case.skipTest(missing)
    try:
        import libvirt
    except ImportError:
        case.skipTest('libvirt-python is not installed')
    libvirt.registerErrorHandler(lambda *args: None, None)
    case.libvirt = libvirt
    case.conn = libvirt.open(URI)
    case.addCleanup(case.conn.close)


class DaemonTestCase(Conformance, test.NoDBTestCase):

    def provide(self):
        connect(self, DIRECTORY, 'NOVA_TEST_LIBVIRT_URI and '
                'NOVA_TEST_LIBVIRT_DIR name no daemon')
        self.directory = DIRECTORY
        self.dies_of_failed_uploads = (
            10001000 <= self.conn.getLibVersion() < 12007000)
