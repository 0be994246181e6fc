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
"""Start a guest from the memory of another one.

    1  the root disk is made as an overlay as ever, then written anew with
       the memory as the state of a snapshot in it
    2  the guest is defined as the other one was, with what is its own
    3  libvirt goes back to the snapshot, paused, and gives the guest a new
       generation ID; the memory is wiped out of the disk, and libvirt deletes
       the snapshot
    4  config drive and interfaces, which the guest finds when it goes on

There is no other start for it: whoever asks for a guest that is warm is not
given one that boots.
"""


import contextlib
import os
import stat
import typing as ty

from lxml import etree
from oslo_concurrency import lockutils

import nova.conf
from nova import exception
from nova.i18n import _
import nova.privsep.storage
from nova.virt import configdrive
from nova.virt.libvirt.storage import image_cache
from nova.virt.libvirt.storage.live_image import definition
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import refusal
from nova.virt.libvirt.storage.live_image import vm_state

try:
    import libvirt
except ImportError:
    libvirt = None

CONF = nova.conf.CONF


class LiveBoot:
    """One instance's start from a memory.

    :param host: the Host
    :param instance: the instance
    :param path: of the file that its memory is kept in
    :raises: exception.LiveImageUnusable
    """

    def __init__(self, host, instance, path: str):
        self._host = host
        self._instance = instance
        with unusable(instance):
            self.description, self._stream = memory_file.read(path)

    def check_host(self) -> None:
        """Check that this host can run the guest, before a file is made.

        :raises: exception.LiveImageUnusable
        """
        with unusable(self._instance):
            self._check_machine()
            self._check_cpu()
            flavor = self._instance.flavor
            for what, saved, wanted in (
                    (_('memory (MiB)'), self.description.memory_mb,
                     flavor.memory_mb),
                    (_('CPUs'), self.description.vcpus, flavor.vcpus)):
                if saved != wanted:
                    raise memory_file.Unfit(_(
                        '%(what)s: %(saved)s in the image, %(wanted)s in the '
                        'flavor') % {'what': what, 'saved': saved,
                                     'wanted': wanted})
            self._check_size(flavor.root_gb << 30)
            self._check_config_drive()

    def _check_config_drive(self):
        """The guest can be given no drive, and none can be taken from it."""
        saved = definition.has_config_drive(self.description)
        if saved != bool(configdrive.required_by(self._instance)):
            raise memory_file.Unfit(
                _('create the server with a config drive, as the other one '
                  'had') if saved else
                _('create the server without a config drive, as the other '
                  'one had none'))

    def _check_size(self, size):
        # 0: as large as the image.
        if size and size != self.description.capacity:
            raise memory_file.Unfit(_(
                'root disk: %(saved)d bytes in the image, %(wanted)d in the '
                'flavor') % {'saved': self.description.capacity,
                             'wanted': size})

    def _check_machine(self):
        arch, machine = definition.machine_of(self.description)
        connection = self._host.get_connection()
        ours = connection.getVersion()
        if ours < self.description.qemu_version:
            raise memory_file.Unusable(_(
                'QEMU: %(saved)d in the image, %(wanted)d here') % {
                    'saved': self.description.qemu_version, 'wanted': ours})
        known = set()
        for guest in self._host.get_capabilities().guests:
            if guest.arch == arch:
                for domain in guest.domains.values():
                    known.update(domain.machines)
                    known.update(domain.aliases)
        if machine not in known:
            raise memory_file.Unusable(_(
                'QEMU of this host has no machine of type %(machine)s '
                '(%(arch)s)') % {'machine': machine, 'arch': arch})

    def _check_cpu(self):
        cpu = definition.cpu_of(self.description)
        # QEMU emulates any CPU.
        if cpu is None or CONF.libvirt.virt_type != 'kvm':
            return
        try:
            result = self._host.compare_hypervisor_cpu(cpu)
        except libvirt.libvirtError as e:
            raise memory_file.Unusable(_(
                "its CPU can't be compared with this host's: %s") % e)
        if result <= libvirt.VIR_CPU_COMPARE_INCOMPATIBLE:
            raise memory_file.Unusable(_(
                "this host lacks a part of its CPU: %(cpu)s") % {'cpu': cpu})

    def write_root(self, image) -> None:
        """Put the memory into the root disk, which was made just now.

        :param image: the LibvirtStorage; its volume is an overlay of which
            nothing is allocated yet
        :raises: exception.LiveImageUnusable, OSError,
            exception.StoragePoolError, exception.StorageVolumeError
        """
        with unusable(self._instance):
            # Only what was made as an overlay is read as one.
            made = vm_state.read(image.path) if (
                image.driver_format == 'qcow2') else None
            if made is None or made.backing is None:
                raise memory_file.Unusable(_(
                    'the root disk would be no overlay; set use_cow_images'))
            image_cache.checked_base(made.backing.path)
            self._check_size(made.capacity)
            self._mode = stat.S_IMODE(os.stat(image.path).st_mode)
            # Each is to see what the one before has left of the room.
            with lockutils.lock('live-image-room'):
                memory_file.check_room(
                    os.path.dirname(image.path), self._stream.length)
                image.make_private(*made.backing, made.capacity)
                self._place = vm_state.write(
                    image.path, self._stream, self.description.capacity,
                    made.backing, definition.SNAPSHOT)

    def define(self, own: str) -> str:
        """The definition of the guest.

        :param own: the XML that the driver would start the instance with
        :raises: exception.LiveImageUnusable
        """
        with unusable(self._instance):
            return definition.make(
                self.description, own, self._instance.uuid)

    def start(self, guest, xml: str) -> None:
        """Let a defined guest have the memory; it stays paused.

        :param guest: the Guest
        :param xml: what :meth:`define` has returned
        :raises: exception.LiveImageUnusable with QEMU's words; OSError
        """
        with unusable(self._instance):
            guest.go_on_from_snapshot(definition.snapshot(xml),
                                      self._wipe_memory)

    def _wipe_memory(self):
        """Take the memory out of the root disk, which others may read then.

        QEMU wouldn't: since it has gone back to the snapshot the disk's own
        table has the memory, behind the end of the disk. So it would move
        along, and be seen by the guest of a disk that grows.

        :raises: OSError
        """
        # Nova's own, where libvirt gives QEMU none. Root is nobody on NFS.
        wipe = (nova.privsep.storage.unprivileged_wipe
                if os.access(self._place.path, os.W_OK)
                else nova.privsep.storage.wipe)
        wipe(*self._place, self._mode)

    def give_devices(self, guest, own: str) -> None:
        """Give the paused guest its media and interfaces.

        :param guest: the Guest
        :param own: the XML that the driver would start the instance with
        """
        for device in refusal.parse(own).iterfind('devices/*'):
            if device.tag == 'disk' and device.get('device') == 'cdrom':
                guest.change_media(_Device(device))
            elif device.tag == 'interface':
                guest.attach_device(
                    _Device(device), persistent=True, live=True)


class _Device(ty.NamedTuple):
    """A device as the driver has written it, for the methods of Guest."""
    element: etree._Element

    def to_xml(self) -> str:
        return etree.tostring(self.element, encoding='unicode')


@contextlib.contextmanager
def unusable(instance):
    """Say of which instance it is that a memory can't be used."""
    try:
        yield
    except (memory_file.Unusable, libvirt.libvirtError, FileNotFoundError,
            ValueError) as error:
        kind = (exception.LiveImageUnfit
                if isinstance(error, memory_file.Unfit)
                else exception.LiveImageUnusable)
        raise kind(instance_uuid=instance.uuid, host=CONF.host,
                   reason=error) from error
