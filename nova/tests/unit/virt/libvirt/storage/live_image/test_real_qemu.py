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
"""The state of a real QEMU, through the writer, into another one."""

import os
import shutil
import socket
import subprocess
import time
import unittest

import fixtures
from oslo_serialization import jsonutils

import nova.privsep.storage
from nova import test
from nova.virt.libvirt.storage.live_image import vm_state

QEMU = shutil.which('qemu-system-x86_64')
MEMORY = 16  # MiB
CAPACITY = (512 << 20) + 512


@unittest.skipUnless(QEMU, 'there is no QEMU here')
class RealQEMUTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        # A socket's path has 107 bytes at most.
        self.folder = self.useFixture(fixtures.TempDir()).path
        self.base = self._path('base')
        with open(self.base, 'wb') as f:
            f.truncate(CAPACITY)
            f.write(b'of the base image')

    def _path(self, name):
        return os.path.join(self.folder, name)

    def _start(self, name, disk, kind, *more):
        """A machine without an operating system, and its monitor."""
        monitor = self._path(name)
        process = subprocess.Popen(
            [QEMU, '-machine', 'pc,accel=tcg', '-m', str(MEMORY),
             '-nodefaults', '-display', 'none', '-S', '-qmp',
             'unix:%s,server=on,wait=off' % monitor, '-drive',
             'file=%s,format=%s,if=virtio' % (disk, kind), *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        connection = socket.socket(socket.AF_UNIX)
        self.addCleanup(connection.close)
        until = time.monotonic() + 60
        while True:
            try:
                connection.connect(monitor)
                break
            except OSError:
                if process.poll() is not None:
                    self.fail(process.communicate()[0])
                self.assertLess(time.monotonic(), until)
                time.sleep(0.05)
        lines = connection.makefile('rw')
        self.addCleanup(lines.close)
        lines.readline()

        def ask(command, **arguments):
            lines.write(jsonutils.dumps(
                {'execute': command, 'arguments': arguments}) + '\n')
            lines.flush()
            while True:
                answer = jsonutils.loads(lines.readline())
                if 'event' not in answer:
                    self.assertIn('return', answer)
                    return answer['return']
        ask('qmp_capabilities')
        return ask

    def _memory(self, ask, name):
        ask('pmemsave', val=0, size=MEMORY << 20, filename=self._path(name))
        with open(self._path(name), 'rb') as f:
            return f.read()

    def test_memory_arrives(self):
        source = self._start('source', self.base, 'raw', '-snapshot')
        source('cont')
        time.sleep(1)
        source('stop')
        stream = self._path('stream')
        source('migrate', uri='exec:cat >' + stream)
        until = time.monotonic() + 60
        while source('query-migrate').get('status') != 'completed':
            self.assertLess(time.monotonic(), until)
            time.sleep(0.05)
        memory = self._memory(source, 'memory-1')
        self.assertTrue(any(memory))

        target = self._path('disk')
        open(target, 'wb').close()
        place = vm_state.write(
            target, vm_state.Stream(stream, 0, os.path.getsize(stream)),
            CAPACITY, vm_state.Backing(self.base, 'raw'), 'live')
        clone = self._start('clone', target, 'qcow2', '-loadvm', 'live')
        self.assertFalse(clone('query-status')['running'])
        self.assertEqual(memory, self._memory(clone, 'memory-2'))
        nova.privsep.storage.unprivileged_wipe(
            target, place.offset, place.length, 0o644)
        # It goes on, and its disk is whole without the snapshot.
        said = clone('human-monitor-command', **{
            'command-line': 'delvm live'})
        self.assertEqual('', said)
        clone('cont')
        self.assertEqual('running', clone('query-status')['status'])
        clone('quit')
        time.sleep(0.5)
        found = jsonutils.loads(subprocess.run(
            ['qemu-img', 'check', '--output=json', '-f', 'qcow2', '-U',
             target], capture_output=True, text=True, check=True).stdout)
        self.assertEqual(0, found['check-errors'])
        self.assertNotIn('leaks', found)
        self._assert_nothing_is_left(target, stream)

    def _assert_nothing_is_left(self, target, stream):
        """QEMU keeps the state as what is behind the end of the disk."""
        with open(stream, 'rb') as f:
            begin = f.read(4096)
        # That QEMU may have it locked still.
        grown = shutil.copy(target, self._path('grown'))
        with open(grown, 'rb') as f:
            self.assertNotIn(begin, f.read())
        # The guest of a disk that grows sees what is there.
        self._qemu_img('resize', '-f', 'qcow2', grown, '2G')
        self._qemu_img('resize', '-f', 'raw', self.base, '2G')
        self._qemu_img('compare', '-f', 'qcow2', '-F', 'raw', grown, self.base)

    def _migrated(self, ask):
        ask('migrate', uri='exec:cat >/dev/null')
        until = time.monotonic() + 60
        while ask('query-migrate').get('status') != 'completed':
            self.assertLess(time.monotonic(), until)
            time.sleep(0.05)

    def _qemu_img(self, *args):
        subprocess.run(['qemu-img', *args], check=True,
                       stdout=subprocess.DEVNULL)

    def test_disk_is_kept_while_the_guest_goes_on(self):
        """What libvirt has QEMU do for a backup job of mode "pull".

        A job that reads by itself, as one of mode "push", ended QEMU 7.2 in
        every other "cont".
        """
        raw, disk, scratch, copy, nbd = map(
            self._path, ('raw', 'disk', 'scratch', 'copy', 'nbd'))
        with open(raw, 'wb') as f:
            f.write(os.urandom(16 << 20))
        self._qemu_img('convert', '-f', 'raw', '-O', 'qcow2', raw, disk)
        ask = self._start(
            'source', self.base, 'raw', '-snapshot', '-blockdev',
            'driver=qcow2,node-name=disk,file.driver=file,file.filename=' +
            disk, '-device', 'virtio-blk-pci,drive=disk')
        if ask('query-version')['qemu']['major'] == 10:
            self.skipTest('this QEMU keeps no disk between the two')
        ask('cont')
        for _try in range(3):
            self._migrated(ask)
            self._qemu_img('create', '-q', '-f', 'qcow2', scratch, '16M')
            ask('blockdev-add', driver='qcow2', backing='disk',
                file={'driver': 'file', 'filename': scratch},
                **{'node-name': 'scratch'})
            ask('blockdev-backup', device='disk', target='scratch',
                sync='none', **{'job-id': 'job'})
            ask('nbd-server-start', addr={
                'type': 'unix', 'data': {'path': nbd}})
            ask('block-export-add', type='nbd', id='export', name='vda',
                **{'node-name': 'scratch'})
            ask('cont')
            self._qemu_img('convert', '-f', 'raw', '-O', 'raw',
                           'nbd+unix:///vda?socket=' + nbd, copy)
            ask('nbd-server-stop')
            ask('block-job-cancel', device='job')
            until = time.monotonic() + 60
            while ask('query-block-jobs'):
                self.assertLess(time.monotonic(), until)
                time.sleep(0.05)
            ask('blockdev-del', **{'node-name': 'scratch'})
            self._qemu_img('compare', '-f', 'raw', '-F', 'raw', raw, copy)
