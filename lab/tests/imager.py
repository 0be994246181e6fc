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
"""A compute service's part in live images; run as a program in a host.

Nova's own modules and the host's real libvirtd, with no network service and
no image service: interfaces are ethernet devices, images are files. Asked as
mover.py is.
"""

import functools
import hashlib
import os
import signal
import time

from lab.tests import mover

FOLDER = '/var/lib/nova/instances'
BASE = FOLDER + '/_base'


class Compute(mover.Compute):
    """One host's compute service."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        from nova.virt.libvirt import host
        self.host = host.Host('qemu:///system')
        self.host.initialize()
        # As in _get_domain(), which may meet a libvirtd that has ended.
        self.conf.set_override('virt_type', 'qemu', 'libvirt')
        self.conf.set_override('live_images', True, 'libvirt')

    def _instance(self, uuid, memory_mb=256, vcpus=1, root_gb=0):
        from nova.compute import vm_states
        from nova import objects
        return objects.Instance(
            self.context, id=1, uuid=uuid, image_ref=uuid,
            vm_state=vm_states.ACTIVE, config_drive='True',
            flavor=objects.Flavor(memory_mb=memory_mb, vcpus=vcpus,
                                  root_gb=root_gb))

    def _interfaces(self, uuid, macs):
        from nova.virt.libvirt.storage.live_image import interfaces
        from nova.virt.libvirt.storage.live_image import under_way
        instance = self._instance(uuid)

        def get_guest():
            return self.host.get_guest(instance)

        def attach(vif, place):
            get_guest()._domain.attachDeviceFlags(
                interface(vif['address'], place), 3)
            self._die('attached')

        def detach(vif):
            get_guest()._domain.detachDeviceFlags(
                interface(vif['address']), 3)
            # Nova's own waits for an event, and retries.
            until = time.monotonic() + 20
            while vif['address'] in get_guest().get_xml_desc():
                if time.monotonic() > until:
                    raise RuntimeError('not detached')
                time.sleep(.05)
            self._die('detached')

        def define(vif):
            get_guest()._domain.attachDeviceFlags(
                interface(vif['address']), 2)

        vifs = [{'address': mac} for mac in macs]
        return interfaces.Interfaces(
            get_guest, vifs, lambda: vifs, detach, attach, define,
            lambda vif: None,
            functools.partial(under_way.keep_places, uuid),
            functools.partial(under_way.places, uuid))

    def _die(self, step):
        if step == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def die_at(self, row, late=False):
        """Be killed in a step of a capture."""
        super().die_at(row)
        from nova.virt.libvirt import guest
        cls = guest.Guest
        for name, step in (('save_memory_live', 'memory'),
                           ('begin_backup', 'disk'), ('resume', 'resumed'),
                           ('abort_job', 'ended')):
            self._die_behind(cls, name, step)
        import nova.privsep.qemu
        self._die_behind(nova.privsep.qemu, 'run_while_it_copies', 'copied')

    def _die_behind(self, owner, name, step):
        method = getattr(owner, name)
        method = getattr(method, '_plain', method)

        def dying(*args):
            answer = method(*args)
            self._die(step)
            return answer
        dying._plain = method
        dying.__name__ = name
        setattr(owner, name, dying)

    def capture(self, uuid, macs, name, timeout=60):
        """Save a guest, into two files.

        :param name: of the files, in the folder of instances
        """
        from nova.virt.libvirt.storage.live_image import capture
        from nova.virt.libvirt.storage.live_image import memory_file
        import shutil
        self.conf.set_override('live_image_timeout', timeout, 'libvirt')
        begun = time.monotonic()
        with capture.Capture(self.host, self._instance(uuid),
                             self._interfaces(uuid, macs)) as saved:
            took = time.monotonic() - begun
            shutil.copy(saved.disk, '%s/%s.disk' % (FOLDER, name))
            with memory_file.Reader(
                    saved.description, saved.memory) as reader, open(
                        '%s/%s.memory' % (FOLDER, name), 'wb') as out:
                shutil.copyfileobj(reader, out, 1 << 20)
        return {'pause': saved.pause, 'took': took,
                'capacity': saved.description.capacity,
                'stream': saved.memory.length}

    def recover(self, macs):
        """What a compute service does when it starts."""
        from nova.virt.libvirt.storage.live_image import capture
        from nova.virt.libvirt.storage.live_image import under_way
        found = under_way.instances()
        for uuid in found:
            capture.recover(self.host, self._instance(uuid),
                            self._interfaces(uuid, macs))
        return [found, under_way.instances()]

    def cache(self, name):
        """Have the disk of an image in the image cache."""
        from nova.virt import images
        base = '%s/%s' % (BASE, hashlib.sha1(name.encode()).hexdigest())
        images.convert_image('%s/%s.disk' % (FOLDER, name), base + '.part',
                             'qcow2', 'raw')
        os.rename(base + '.part', base)

    def boot(self, uuid, name, own, **flavor):
        """Start an instance from an image.

        :param own: the XML that a driver would start it with
        :returns: for how long each step took, in seconds
        """
        from nova.virt.libvirt import guest as libvirt_guest
        from nova.virt.libvirt.storage import image
        from nova.virt.libvirt.storage.live_image import boot
        instance = self._instance(uuid, **flavor)
        times, begun = {}, time.monotonic()

        def done(step):
            nonlocal begun
            now = time.monotonic()
            times[step], begun = round(now - begun, 3), now

        live = boot.LiveBoot(self.host, instance,
                             '%s/%s.memory' % (FOLDER, name))
        live.check_host()
        xml = live.define(own)
        done('check')
        base = '%s/%s' % (BASE, hashlib.sha1(name.encode()).hexdigest())
        root = image.LibvirtStorage.bound_to(self.host.get_connection)(
            instance, 'disk')
        with root._created(root._create_overlay, base,
                           root._inspect_base(base),
                           live.description.capacity):
            live.write_root(root)
        done('disk')
        guest = libvirt_guest.Guest.create(xml, self.host)
        done('define')
        live.start(guest, xml)
        done('go on')
        live.give_devices(guest, own)
        done('devices')
        guest.resume()
        guest.sync_guest_time()
        done('resume')
        return times


def interface(mac, place=None):
    address = '' if place is None else "<address %s/>" % ' '.join(
        "%s='%s'" % pair for pair in place.items())
    return ("<interface type='ethernet'><mac address='%s'/>"
            "<model type='virtio'/>%s</interface>" % (mac, address))


if __name__ == '__main__':
    mover.Compute = Compute
    mover.main()
    # The threads of Host don't end.
    os._exit(0)
