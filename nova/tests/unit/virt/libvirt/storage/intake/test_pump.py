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
"""The storage pump into what a destination opens for it, both of them real."""

import os
import random
import shutil
import subprocess
import time

from nova import exception
from nova.tests.unit.virt.libvirt.storage.intake import test_export
from nova.tests.unit.virt.libvirt.storage.pump import test_nbd
from nova.virt.libvirt.storage.intake import export
from nova.virt.libvirt.storage.intake import kept
from nova.virt.libvirt.storage.intake import keys
from nova.virt.libvirt.storage.pump import transfer as pump

MIB = 1 << 20


class PumpTestCase(test_export.ExportTestBase, test_nbd.WorkerTestCase):

    def opened(self, length, **kwargs):
        self.path = self.make_file('new', length)
        return self.open(**kwargs)

    def open(self, **kwargs):
        self.made = self.export(connections=pump.NBD_CONNECTIONS, **kwargs)
        return pump.Export('127.0.0.1', self.made.port, '', keys.USERNAME,
                           self.made.key)

    def _test_copy(self, **kwargs):
        # no multiple of a sector, with zeroes and a hole at the end
        content = os.urandom(3 * MIB + 5) + bytes(MIB) + os.urandom(100)
        length = len(content) + 70000
        source = self.source(content, length)
        target = self.opened(length, **kwargs)

        def progress(done):
            if not self.told:
                self.made.connected()
                self.assertEqual([], os.listdir(keys.root()))
            self.told.append(done)

        result = pump.copy(source, target, length, progress=progress)
        self.assertEqual(length, self.told[-1])
        self.made.end()
        self.assertEqual(length, os.path.getsize(self.path))
        with open(self.path, 'rb') as f:
            self.assertEqual(content + bytes(70000), f.read())
        self.assertLess(os.stat(self.path).st_blocks * 512, length)
        found = pump.read(self.path_of(), length, key=result.key)
        self.assertEqual(result.checksum, found.checksum)

    def path_of(self):
        return pump.Volume('qemu:///system', 'pool', self.path)

    def test_copy(self):
        self._test_copy()

    def test_copy_without_aes(self):
        self._test_copy(has_aes=False)

    def test_memory_is_not_made_anew_for_each_request(self):
        # That costs as much as TLS does.
        length = 256 * MIB
        target = self.opened(length)
        faults = []

        def progress(done):
            # Not the last time: it may have ended by then.
            if done < length:
                with open('/proc/%d/stat' % self.made._pid()) as f:
                    # minflt of proc_pid_stat(5)
                    faults.append(int(f.read().rpartition(')')[2].split()[7]))

        pump.copy(self.source(os.urandom(length)), target, length,
                  progress=progress)
        pages = length // os.sysconf('SC_PAGE_SIZE')
        self.assertLess(faults[-1] - faults[0], pages // 4)

    def test_image_that_qemu_writes_to(self):
        # as a guest does, whose image grows by that
        path = os.path.join(self.folder, 'source')
        subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path,
                        '64M'], check=True)
        guest = subprocess.Popen(
            ['qemu-io', '-f', 'qcow2', '-d', 'unmap', path],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.addCleanup(guest.kill)
        chance = random.Random(5)

        def write(times):
            for number in range(times):
                at = chance.randrange(0, 63 * MIB) // 512 * 512
                length = chance.choice((512, 4096, 70144, MIB))
                guest.stdin.write(chance.choice((
                    'write -q -P %d %%d %%d' % chance.randrange(1, 255),
                    'write -q -P %d %%d %%d' % chance.randrange(1, 255),
                    'write -q -z %d %d', 'discard -q %d %d')) % (
                        at, length) + '\n')
            guest.stdin.write('flush\n')
            guest.stdin.flush()

        while os.path.getsize(path) < 6 * MIB:
            write(5)
            time.sleep(0.1)
        length = os.path.getsize(path)
        volume = pump.Volume('qemu:///system', 'pool', path)
        target = self.opened(80 * MIB)

        def progress(done):
            if not self.told:
                self.made.connected()
            self.told.append(done)
            write(3)

        with pump.WarmCopy(volume, target, length) as copy:
            copy.first(pump.Watch(progress=progress), 3 * MIB)
            self.assertGreater(len(self.told), 2)
            write(40)
            guest.communicate('quit\n')
            now = os.path.getsize(path)
            self.assertGreater(now, length)
            result = copy.rest(now)
        self.assertLess(result.data, now)
        self.made.end()
        export.cut(self.path, now)
        found = pump.read(self.path_of(), now, key=result.key)
        self.assertEqual(result.checksum, found.checksum)
        for command in (['cmp', path, self.path],
                        ['qemu-img', 'check', '-q', '-f', 'qcow2', self.path],
                        ['qemu-img', 'compare', '-q', path, self.path]):
            subprocess.run(command, check=True)

    def test_image_that_was_here_before(self):
        path = os.path.join(self.folder, 'source')
        volume = pump.Volume('qemu:///system', 'pool', path)

        def write(*commands):
            subprocess.run(
                ['qemu-io', '-f', 'qcow2', path], check=True, text=True,
                input='\n'.join(commands), stdout=subprocess.DEVNULL)

        subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path,
                        '64M'], check=True)
        write(*('write -P %d %dM 1M' % (n + 1, 2 * n) for n in range(20)))
        # What is kept was longer once, and somebody has spoiled it since.
        self.path = os.path.join(self.directory, 'kept')
        shutil.copy(path, self.path)
        with open(self.path, 'r+b') as f:
            f.seek(10 * MIB)
            f.write(os.urandom(MIB))
            f.seek(0, os.SEEK_END)
            f.write(os.urandom(2 * MIB))
        write('write -P 99 6M 1M', 'write -P 99 51M 1M')
        length, room, key = os.path.getsize(path), 80 * MIB, pump.new_key()
        kept.prepare(self.path, length, room, 0o644)
        table = kept.unpack(kept.read(self.path_of(), room, key), room)
        with pump.WarmCopy(volume, self.open(), length, key,
                           known=pump.Known(room, table)) as copy:
            first = copy.first(pump.Watch(
                progress=lambda done: self.made.connected()))
            write('write -P 98 55M 1M', 'write -z 0 1M')
            now = os.path.getsize(path)
            self.assertGreater(now, length)
            result = copy.rest(now)
        # Of the 22 MiB that are in the image
        self.assertLess(first.data + result.data, 8 * MIB)
        self.made.end()
        export.cut(self.path, now)
        found = pump.read(self.path_of(), now, key=key)
        self.assertEqual(result.checksum, found.checksum)
        for command in (['cmp', path, self.path],
                        ['qemu-img', 'compare', '-q', path, self.path]):
            subprocess.run(command, check=True)

    def test_key_that_is_gone(self):
        target = self.opened(MIB)
        self.made.connected()
        e = self.assertRaises(
            exception.StorageTransferError, pump.copy,
            self.source(os.urandom(MIB)), target, MIB)
        self.assertEqual(('destination', 'nbd'), (e.side, e.kind))
        self.assertEqual(bytes(MIB), self.content(length=2 * MIB))

    def test_volume_that_is_too_small(self):
        target = self.opened(MIB)
        self.assertRaises(
            exception.StorageTransferError, pump.copy,
            self.source(os.urandom(2 * MIB)), target, 2 * MIB)
        self.made.end()
        self.assertEqual(bytes(MIB), self.content(length=2 * MIB))

    def test_volume_that_is_closed_in_the_midst(self):
        content = os.urandom(8 * MIB)
        target = self.opened(len(content))

        def progress(done):
            if done > MIB:
                self.made.end()

        self.assertRaises(
            exception.StorageTransferError, pump.copy, self.source(content),
            target, len(content), progress=progress, bandwidth=4 * MIB)
        self.assertEqual(bytes(1024), self.content(len(content) - 1024, 1024))


class NbdkitPumpTestCase(test_export.NbdkitTestBase, PumpTestCase):
    pass
