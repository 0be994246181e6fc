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
"""A guest that is saved and goes on, without libvirt."""

import os
import stat

from nova.compute import power_state
from nova.tests.unit.virt.libvirt.storage.live_image import test_definition
from nova.tests.unit.virt.libvirt.storage.live_image import test_memory_file
from nova.virt.libvirt.storage.live_image import interfaces
from nova.virt.libvirt.storage.live_image import refusal

MACS = ('fa:16:3e:00:00:01', 'fa:16:3e:00:00:02')


class Killed(BaseException):
    """As the end of the process: nothing handles it."""


class Job:
    def __init__(self, kind):
        self.type = kind


class Guest:
    """A guest that does what libvirt and QEMU were seen to do.

    :ivar steps: what was done, in order
    :ivar fails: step -> error
    :ivar has_come_live: whether its disks were copied as files
    """

    has_come_live = False

    def __init__(self):
        self.steps = []
        self.fails = {}
        self.macs = list(MACS)
        # Of its definition, with which it starts the next time.
        self.defined = list(MACS)
        self.state = power_state.RUNNING
        self.job = False
        self.slow = None
        # Of the ports that Neutron has.
        self.ports = list(MACS)
        # MAC -> where it was put back, or is to be; what is remembered
        self.places, self.kept = {}, {}

    def step(self, name):
        self.steps.append(name)
        if name in self.fails:
            raise self.fails.pop(name)

    def get_xml_desc(self, dump_inactive=False, definition=None):
        xml = test_definition.SAVED.replace(
            "<interface type='bridge'><mac address='fa:16:3e:00:00:01'/>"
            "</interface>", ''.join(
                "<interface type='bridge'><mac address='%s'/><address "
                "type='pci' slot='0x%s'/></interface>" % (mac, mac[-2:])
                for mac in (self.defined if dump_inactive else self.macs)))
        if self.has_come_live and not (dump_inactive or definition):
            return xml.replace("<disk type='volume'", "<disk type='file'")
        return xml

    def is_active(self):
        return True

    def get_power_state(self, host):
        return self.state

    def _path(self, xml, element):
        return refusal.parse(xml).xpath(element)[0]

    def save_memory_live(self, xml):
        assert not self.macs, 'it has interfaces'
        path = self._path(xml, 'memory/@file')
        with open(path, 'wb') as f:
            f.write(b'part')
        if self.slow:
            self.slow()
        self.step('memory')
        with open(path, 'wb') as f:
            f.write(test_memory_file.saved(b'QEVMstream'))
        self.state = power_state.PAUSED

    def begin_backup(self, xml):
        assert self.state == power_state.PAUSED
        assert self._path(xml, '@mode') == 'pull'
        assert self._path(xml, 'disks/disk[@backup="no"]/@name') == 'hda'
        self.scratch = self._path(xml, 'disks/disk/scratch/@file')
        self.socket = self._path(xml, 'server/@socket')
        open(self.scratch, 'wb').close()
        os.mknod(self.socket, stat.S_IFSOCK | 0o700)
        self.job = True
        self.step('disk')

    def read(self, *command):
        """As qemu-img does from the socket."""
        *options, source, dest = command
        # QEMU opens its images anew when the guest goes on.
        assert self.state == power_state.RUNNING, 'read too early'
        assert self.job, 'nobody keeps the disk'
        assert source == 'nbd+unix:///vda?socket=' + self.socket, source
        assert options[-4:] == ['-f', 'raw', '-O', 'qcow2']
        with open(dest, 'wb') as f:
            f.write(b'part')
        self.step('copied')
        with open(dest, 'wb') as f:
            f.write(b'disk')

    def resume(self):
        self.step('resume')
        self.state = power_state.RUNNING

    def pause(self):
        self.step('pause')
        self.state = power_state.PAUSED

    def abort_job(self):
        self.step('abort')
        self.job = False

    def get_job_info(self):
        return Job(2 if self.job else 0)

    # The driver's part.

    def detach(self, vif):
        self.defined.remove(vif['address'])
        self.step('detach')
        self.macs.remove(vif['address'])

    def attach(self, vif, place):
        self.step('attach')
        self.places[vif['address']] = place
        self.macs.append(vif['address'])
        self.defined.append(vif['address'])

    def define(self, vif):
        self.step('define')
        self.defined.append(vif['address'])

    def plug(self, vif):
        self.step('plug')


def interfaces_of(guest):
    return interfaces.Interfaces(
        lambda: guest, [{'address': mac} for mac in MACS],
        lambda: [{'address': mac} for mac in guest.ports], guest.detach,
        guest.attach, guest.define, guest.plug, guest.kept.update,
        lambda: guest.kept)
