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
"""Definitions that somebody has written who is not Nova."""

import ddt

from nova import test
from nova.tests.unit.virt.libvirt.storage.live_image import test_definition
from nova.virt.libvirt.storage.live_image import definition
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import refusal

# What libvirt adds, or Nova does for some images, and is no harm.
HARMLESS = '''
  <controller type='usb' index='0' model='piix3-uhci'><alias name='usb'/></controller>
  <controller type='virtio-serial' index='0'><address type='pci'/></controller>
  <input type='tablet' bus='usb'><alias name='input0'/><address type='usb'/></input>
  <audio id='1' type='none'/>
  <sound model='ich6'/>
  <memballoon model='virtio'><stats period='10'/><alias name='balloon0'/></memballoon>
  <rng model='virtio'><rate bytes='9' period='1000'/>
    <backend model='random'>/dev/hwrng</backend><alias name='rng0'/></rng>
  <watchdog model='i6300esb' action='reset'><alias name='watchdog0'/></watchdog>
  <redirdev bus='usb' type='spicevmc'/>
'''  # noqa: E501


@ddt.ddt
class ClosedTestCase(test.NoDBTestCase):

    def _make(self, saved, wanted=test_definition.WANTED):
        return refusal.parse(definition.make(
            test_definition.described(saved), wanted, test_definition.OWN))

    @staticmethod
    def _with(devices='', top=''):
        return test_definition.SAVED.replace(
            '</devices>', devices + '</devices>' + top)

    @ddt.data(
        ('<features>', '<os><kernel>/etc/shadow</kernel><initrd>/other'
         '</initrd></os><features>', 'more than one element os'),
        ('</devices>', '</devices><devices/>',
         'more than one element devices'),
        ("mode='sysinfo'", "mode='host'", 'told what its host is'),
        ('<cputune>', '<iothreads>100000</iothreads><cputune>',
         'more threads for disks'),
        ('<cputune>', "<iothreadids><iothread id='1'/><iothread id='2'/>"
         '</iothreadids><cputune>', 'more threads for disks'),
        ('<cputune>', "<iothreads>1</iothreads><iothreadids><iothread id='1' "
         "thread_pool_min='100000' thread_pool_max='100000'/></iothreadids>"
         '<cputune>', 'more threads for disks'),
        ('<cputune>', "<iothreadids><iothread id='1'><poll max='9'/>"
         '</iothread></iothreadids><cputune>', 'more threads for disks'),
        ('262144<', '262144<x/>000<', 'in the midst of text'),
        ('>262144</memory', '><x>262144000</x></memory',
         'in the midst of text'),
        ('>1</vcpu', '>1<x/>6</vcpu', 'in the midst of text'),
        ('</genid', '<x/></genid', 'in the midst of text'),
        ('Nehalem<', 'Nehalem<x/>-IBRS<', 'in the midst of text'),
        ('<cputune>', '<iothreads>1<x/>000</iothreads><cputune>',
         'in the midst of text'),
        # libvirt takes the first attribute of that name.
        ('</devices>', "<audio id='1' xmlns:x='u' x:type='file' type='none' "
         "x:path='/etc/nova/nova.conf'/></devices>", 'not of libvirt'),
        ("<domain type='kvm'", "<domain xmlns:x='u' x:type='xen' type='kvm'",
         'not of libvirt'),
        ('<acpi/>', "<x:acpi xmlns:x='u'/>", 'not of libvirt'),
        ('<domain ', '<!DOCTYPE domain [<!ENTITY a "0">]><domain ',
         'document type'))
    @ddt.unpack
    def test_what_is_read_otherwise(self, old, new, reason):
        """Than libvirt does, or costs the host."""
        saved = test_definition.SAVED.strip().replace(old, new, 1)
        self.assertNotEqual(test_definition.SAVED.strip(), saved)
        e = self.assertRaises(memory_file.Unfit, self._make, saved)
        self.assertIn(reason, str(e))

    @ddt.data(
        # In a file, which is neither the guest's nor of the pool.
        ('</cpu>', "<numa><cell id='0' cpus='0' memory='262144' unit='KiB' "
         "memAccess='shared'/></numa></cpu>", 'cpu/numa/cell/@memAccess'),
        ('</cpu>', "<numa><cell id='0' memory='262144' discard='yes'/></numa>"
         '</cpu>', 'cpu/numa/cell/@discard'),
        ('<memory ', "<memory dumpCore='on' ", 'memory/@dumpCore'),
        ('<os>', "<os firmware='bios'>", 'os/@firmware'),
        ("model type='cirrus'", "model type='virtio' blob='on'",
         'devices/video/model/@blob'),
        ("<model type='cirrus'/>", "<model type='virtio'><acceleration "
         "accel3d='yes'/></model>", 'devices/video/model/acceleration'))
    @ddt.unpack
    def test_what_takes_more_of_the_host(self, old, new, named):
        saved = test_definition.SAVED.replace(old, new, 1)
        self.assertNotEqual(test_definition.SAVED, saved)
        e = self.assertRaises(memory_file.Unfit, self._make, saved)
        self.assertIn(named, str(e))

    @ddt.data('cirrus', 'qxl', 'virtio')
    def test_screens(self, model):
        """Each has memory of the host's, of which it doesn't say anything.

        libvirt adds one to a guest with a display. Nova makes no more.
        """
        screen = "<video><model type='%s'/></video>" % model
        wanted = test_definition.WANTED.replace(
            '</devices>', screen + '</devices>')
        one = test_definition.SAVED.replace(
            "<video><model type='cirrus'/></video>", screen)
        for own in (test_definition.WANTED, wanted):
            self._make(one, own)
            e = self.assertRaises(
                memory_file.Unfit, self._make,
                one.replace(screen, screen * 2), own)
            self.assertIn('more than one screen', str(e))

    def test_screen_of_two_models(self):
        self.assertRaises(memory_file.Unfit, self._make,
                          test_definition.SAVED.replace(
                              "<model type='cirrus'/>",
                              "<model type='cirrus'/><model type='qxl'/>"))

    @ddt.data('stdio', 'file', 'dev', 'pipe', 'vc', 'udp', 'nmdm',
              'qemu-vdagent', 'dbus')
    def test_console_of_another_kind(self, kind):
        """QEMU's own output, of which nobody limits the log, for one."""
        for tag in ('serial', 'console', 'channel'):
            e = self.assertRaises(
                memory_file.Unfit, self._make,
                self._with("<%s type='%s'/>" % (tag, kind)))
            self.assertIn('console', str(e))

    def test_what_is_counted_on_the_host(self):
        """The events that a host has libvirt count are its own to say."""
        event = "<perf><event name='%s' enabled='yes'/></perf>"
        theirs = self._with(top=event % 'cpu_cycles')
        self.assertEqual([], self._make(theirs).xpath('perf'))
        made = self._make(theirs, test_definition.WANTED.replace(
            '<cputune>', event % 'cmt' + '<cputune>'))
        self.assertEqual(['cmt'], made.xpath('perf/event/@name'))

    def test_what_every_guest_has(self):
        self._make(self._with(
            top="<seclabel type='none' model='selinux'/>"
                '<iothreads>1</iothreads>'))

    @ddt.data(('262144<', '262144<!-- -->000<'),
              ('>1</vcpu', '>1<?a b?>6</vcpu'),
              ("model type='cirrus'", "model type='qxl' ram='16777216'"),
              ("model type='cirrus'", "model type='qxl' vram=' 16777216 '"),
              ("model type='cirrus'", "model type='qxl' vram='lots'"))
    @ddt.unpack
    def test_more_than_the_flavor_gives(self, old, new):
        saved = test_definition.SAVED.replace(old, new, 1)
        self.assertNotEqual(test_definition.SAVED, saved)
        self.assertRaises(memory_file.Unusable, self._make, saved)

    def test_what_metadata_is_like(self):
        """Nobody reads it before it is replaced."""
        self._make(test_definition.SAVED.replace(
            '<nova:name>theirs', "<nova:name nova:a='b'>th<b/>eirs"))

    def test_what_the_host_decides(self):
        """Memory that is locked or prefetched, and QEMU's own."""
        theirs = self._with(
            top="<memoryBacking><locked/><allocation mode='immediate' "
                "threads='9999'/></memoryBacking>").replace(
            '<acpi/>', "<acpi/><tcg><tb-cache unit='MiB'>99999</tb-cache>"
                       '</tcg>')
        made = self._make(theirs)
        self.assertEqual([], made.xpath('memoryBacking | features/tcg'))
        self.assertIsNotNone(made.find('features/acpi'))
        made = self._make(theirs, test_definition.WANTED.replace(
            '<cputune>', '<memoryBacking><nosharepages/></memoryBacking>'
            '<features><tcg><tb-cache>7</tb-cache></tcg></features>'
            '<cputune>'))
        self.assertEqual('7', made.findtext('features/tcg/tb-cache'))
        self.assertEqual(['nosharepages'], [
            element.tag for element in made.find('memoryBacking')])
        # There may be none for it to be in.
        self._make(test_definition.SAVED.replace(
            '<features><acpi/><apic/></features>', ''))

    def test_screen_of_libvirts_making(self):
        self._make(test_definition.SAVED.replace(
            "model type='cirrus'", "model type='qxl' ram='65536' vram='65536' "
            "vgamem='16384' heads='1' primary='yes'"))

    def test_what_nova_gives(self):
        made = self._make(self._with(HARMLESS))
        self.assertEqual(
            '10', made.find('devices/memballoon/stats').get('period'))

    @ddt.data(
        "<hostdev mode='subsystem' type='pci'/>",
        "<filesystem type='mount'><source dir='/'/></filesystem>",
        "<parallel type='file'><source path='/etc/shadow'/></parallel>",
        "<smartcard mode='host'/>",
        "<shmem name='theirs'/>",
        "<pstore backend='acpi-erst'><path>/etc/shadow</path></pstore>",
        "<crypto model='virtio'/>",
        "<input type='evdev'><source dev='/dev/input/event0'/></input>",
        "<input type='passthrough' bus='virtio'><source evdev='/dev/x'/>"
        "</input>",
        "<audio id='2' type='file' path='/etc/nova/nova.conf'/>",
        "<audio id='2' type='oss'><input dev='/dev/dsp'/></audio>",
        "<video><model type='virtio'><acceleration "
        "rendernode='/dev/dri/renderD128'/></model></video>",
        "<video><driver name='vhostuser'/><model type='virtio'/></video>",
        "<graphics type='egl-headless'><gl rendernode='/dev/dri/x'/>"
        "</graphics>",
        "<graphics type='sdl' display=':0' xauth='/root/.Xauthority'/>",
        "<rng model='virtio'><backend model='egd' type='unix'>"
        "<source mode='connect' path='/run/x'/></backend></rng>",
        "<redirdev bus='usb' type='tcp'><source host='192.0.2.1'/></redirdev>",
        "<watchdog model='i6300esb' action='dump'/>",
        "<tpm model='tpm-tis'/>")
    def test_device(self, device):
        e = self.assertRaises(memory_file.Unfit, self._make,
                              self._with(device))
        self.assertIn('was not written by Nova', str(e))

    @ddt.data(
        "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/"
        "1.0'><qemu:arg value='-drive'/></qemu:commandline>",
        "<x:else xmlns:x='urn:else'/>",
        "<bootloader>/tmp/x</bootloader>",
        "<launchSecurity type='sev'/>",
        "<on_crash>coredump-destroy</on_crash>",
        "<memoryBacking><source type='file'/></memoryBacking>",
        "<memoryBacking><else/></memoryBacking>",
        "<numatune/>")
    def test_else(self, element):
        self.assertRaises(memory_file.Unfit, self._make,
                          self._with(top=element))

    @ddt.data(
        "<loader readonly='yes' type='rom'>/etc/shadow</loader>",
        "<dtb>/etc/shadow</dtb>",
        "<acpi><table type='slic'>/etc/shadow</table></acpi>")
    def test_os(self, element):
        self.assertRaises(memory_file.Unfit, self._make,
                          test_definition.SAVED.replace(
                              "<smbios mode='sysinfo'/>", element))

    @ddt.data(("device='disk'>", "device='disk' rawio='yes'>"),
              ("<driver name='qemu' type='raw' cache='none'/>",
               "<mirror type='file' file='/etc/shadow'/>"))
    @ddt.unpack
    def test_disk(self, before, after):
        self.assertIn(before, test_definition.SAVED)
        self.assertRaises(memory_file.Unfit, self._make,
                          test_definition.SAVED.replace(before, after))

    def test_randomness_is_this_hosts(self):
        rng = ("<rng model='virtio'><backend model='random'>%s</backend>"
               "</rng>")
        theirs = self._with(rng % '/var/lib/nova/secret')
        for ours in ('/dev/hwrng', None):
            made = self._make(theirs, test_definition.WANTED.replace(
                '</devices>', (rng % ours if ours else '') + '</devices>'))
            self.assertEqual([ours or '/dev/urandom'],
                             made.xpath('devices/rng/backend/text()'))

    def test_randomness_is_as_much_as_the_flavor_gives(self):
        rng = ("<rng model='virtio'>%s<backend model='random'>/dev/urandom"
               "</backend></rng></devices>")
        rate = "<rate bytes='%d' period='1000'/>"
        for theirs, ours in (('', rate % 9), (rate % 99, rate % 9),
                             (rate % 99, '')):
            made = self._make(
                test_definition.SAVED.replace('</devices>', rng % theirs),
                test_definition.WANTED.replace('</devices>', rng % ours))
            self.assertEqual(['9'] if ours else [],
                             made.xpath('devices/rng/rate/@bytes'))

    def test_display_that_the_instance_has_not(self):
        theirs = test_definition.SAVED.replace(
            "listen='192.0.2.7'>", "listen='192.0.2.7' socket='/run/x'>"
            "<gl enable='yes' rendernode='/dev/dri/x'/>")
        made = self._make(theirs, test_definition.WANTED.replace(
            "<graphics type='vnc' autoport='yes' listen='192.0.2.9'/>", ''))
        graphics = made.find('devices/graphics')
        self.assertEqual({'type': 'vnc', 'autoport': 'yes',
                          'listen': '127.0.0.1'}, dict(graphics.attrib))
        self.assertEqual([], list(graphics))
