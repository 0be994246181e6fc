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

import ddt
from lxml import etree

from nova import test
from nova.virt.libvirt.storage.live_image import definition
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import refusal

SOURCE = '5d1c4d11-6f3a-4c5e-9a70-0f6f2c1d8e01'
OWN = '7f5b6a0e-52f1-4f0d-a77c-0b0d9b5f2c02'

# What libvirt 9.0 has saved along with a guest's memory.
SAVED = '''
<domain type='kvm' id='3'>
  <name>instance-00000001</name>
  <uuid>%(uuid)s</uuid>
  <genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid>
  <title>theirs</title>
  <metadata><nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1"><nova:name>theirs</nova:name></nova:instance></metadata>
  <memory unit='KiB'>262144</memory>
  <currentMemory unit='KiB'>262144</currentMemory>
  <vcpu placement='static' cpuset='0-3'>1</vcpu>
  <cputune><shares>1</shares></cputune>
  <resource><partition>/machine</partition></resource>
  <sysinfo type='smbios'><system>
    <entry name='serial'>%(uuid)s</entry><entry name='uuid'>%(uuid)s</entry>
  </system></sysinfo>
  <os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type>
    <boot dev='hd'/><smbios mode='sysinfo'/></os>
  <features><acpi/><apic/></features>
  <cpu mode='custom' match='exact' check='full'>
    <model fallback='forbid'>Nehalem</model>
    <feature policy='require' name='vme'/></cpu>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/libexec/of-another-host</emulator>
    <disk type='volume' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source pool='p' volume='%(uuid)s_disk' index='2'/>
      <backingStore type='file'><format type='raw'/><source file='/base'/></backingStore>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x04' function='0x0'/>
    </disk>
    <disk type='volume' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source pool='p' volume='%(uuid)s_disk.config'/>
      <target dev='hda' bus='ide'/><readonly/>
      <address type='drive' controller='0' bus='0' target='0' unit='0'/>
    </disk>
    <controller type='pci' index='0' model='pci-root'/>
    <interface type='bridge'><mac address='fa:16:3e:00:00:01'/></interface>
    <serial type='pty'><source path='/dev/pts/7'/>
      <log file='/instances/theirs/console.log' append='off'/>
      <target type='isa-serial' port='0'/></serial>
    <console type='pty' tty='/dev/pts/7'><source path='/dev/pts/7'/>
      <log file='/instances/theirs/console.log' append='off'/>
      <target type='serial' port='0'/></console>
    <channel type='unix'><source mode='bind' path='/theirs.sock'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <graphics type='vnc' port='5907' autoport='yes' listen='192.0.2.7'>
      <listen type='address' address='192.0.2.7'/></graphics>
    <video><model type='cirrus'/></video>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+109</label></seclabel>
</domain>''' % {'uuid': SOURCE}  # noqa: E501

# What the driver would start the instance with.
WANTED = '''
<domain type='kvm'>
  <uuid>%(uuid)s</uuid><genid/>
  <name>instance-00000002</name>
  <memory>262144</memory><vcpu cpuset='4-7'>1</vcpu>
  <metadata><nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1"><nova:name>own</nova:name></nova:instance></metadata>
  <sysinfo type='smbios'><system>
    <entry name='serial'>%(uuid)s</entry><entry name='uuid'>%(uuid)s</entry>
  </system></sysinfo>
  <os><type machine='pc'>hvm</type><boot dev='hd'/><smbios mode='sysinfo'/></os>
  <cputune><shares>2</shares></cputune>
  <cpu mode='host-model'/>
  <devices>
    <disk type='volume' device='disk'>
      <driver name='qemu' type='qcow2' cache='writeback'/>
      <source pool='q' volume='%(uuid)s_disk'/>
      <target dev='vda' bus='virtio'/>
      <iotune><total_iops_sec>5</total_iops_sec></iotune></disk>
    <disk type='volume' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source pool='q' volume='%(uuid)s_disk.config'/>
      <target dev='hda' bus='ide'/></disk>
    <interface type='bridge'><mac address='fa:16:3e:00:00:02'/></interface>
    <serial type='pty'><log file='/instances/own/console.log' append='off'/></serial>
    <channel type='unix'><source mode='bind' path='/own.sock'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <graphics type='vnc' autoport='yes' listen='192.0.2.9'/>
  </devices>
</domain>''' % {'uuid': OWN}  # noqa: E501


def described(domain=SAVED, **changes):
    return memory_file.Description(**{
        'domain': domain, 'capacity': 1 << 30, 'memory_mb': 256, 'vcpus': 1,
        'qemu_version': 7002000, 'length': 4, **changes})


@ddt.ddt
class DefinitionTestCase(test.NoDBTestCase):

    def _make(self, saved=SAVED, wanted=WANTED, **changes):
        return refusal.parse(definition.make(
            described(saved, **changes), wanted, OWN))

    def test_nothing_of_the_other_is_left(self):
        text = etree.tostring(self._make(), encoding='unicode')
        for theirs in (SOURCE, 'instance-00000001', 'theirs', '/dev/pts',
                       '192.0.2.7', '5907', "of-another-host",
                       '64055', 'fa:16:3e', '43dc0cf8', "'0-3'", '/base'):
            self.assertNotIn(theirs, text)

    def test_what_is_its_own(self):
        made = self._make()
        self.assertEqual(OWN, made.findtext('uuid'))
        self.assertEqual('instance-00000002', made.findtext('name'))
        self.assertIsNone(made.get('id'))
        self.assertEqual({OWN}, set(made.xpath('sysinfo/system/entry/text()')))
        self.assertEqual('2', made.findtext('cputune/shares'))
        self.assertEqual('4-7', made.find('vcpu').get('cpuset'))
        self.assertEqual(36, len(made.findtext('genid')))
        self.assertEqual(['own'], made.xpath('metadata/*/*/text()'))
        self.assertEqual(['/instances/own/console.log'] * 2,
                         made.xpath('devices/*/log/@file'))
        self.assertEqual(['/own.sock'],
                         made.xpath('devices/channel/source/@path'))
        self.assertEqual(['192.0.2.9'],
                         made.xpath('devices/graphics/@listen'))

    def test_disks(self):
        disk, cdrom = self._make().findall('devices/disk')
        self.assertEqual('%s_disk' % OWN, disk.find('source').get('volume'))
        self.assertEqual('q', disk.find('source').get('pool'))
        self.assertEqual(
            {'name': 'qemu', 'type': 'qcow2', 'cache': 'writeback'},
            dict(disk.find('driver').attrib))
        self.assertEqual('5', disk.findtext('iotune/total_iops_sec'))
        self.assertEqual('0x04', disk.find('address').get('slot'))
        self.assertEqual('virtio-disk0', disk.find('alias').get('name'))
        self.assertIsNone(cdrom.find('source'))
        self.assertEqual('file', cdrom.get('type'))
        self.assertIsNotNone(cdrom.find('address'))

    def test_what_the_memory_fits_stays(self):
        """All else is as it was saved."""
        made, saved = self._make(), refusal.parse(SAVED)
        for path in ('memory', 'currentMemory', 'os', 'features', 'cpu',
                     'clock', 'on_poweroff', 'devices/controller',
                     'devices/video'):
            self.assertEqual(
                [etree.tostring(found) for found in saved.findall(path)],
                [etree.tostring(found) for found in made.findall(path)], path)

    def test_a_snapshot_is_made_in_disks_alone(self):
        domain = definition.make(described(), WANTED, OWN)
        found = refusal.parse(definition.snapshot(domain))
        self.assertEqual('live', found.findtext('name'))
        self.assertEqual('internal', found.find('memory').get('snapshot'))
        self.assertEqual(
            [('vda', 'internal'), ('hda', 'no')],
            [(disk.get('name'), disk.get('snapshot'))
             for disk in found.findall('disks/disk')])
        self.assertEqual(domain, etree.tostring(
            found.find('domain'), encoding='unicode'))

    @ddt.data(
        (('>262144<', '>524288<'), 'memory (KiB): 262144 in the image, '
                                   '524288 here'),
        (("'4-7'>1<", "'4-7'>2<"), 'CPUs: 1 in the image, 2 here'),
        (("type='kvm'", "type='qemu'"), 'kvm in the image, qemu here'),
        (("machine='pc'", "machine='pc' arch='aarch64'"), 'aarch64 here'),
        (("dev='vda' bus='virtio'", "dev='sda' bus='scsi'"),
         'disk vda (virtio)'),
        (("dev='hda'", "dev='hdb'"), 'cdrom hdb (ide)'),
        (('<graphics', "<tpm/><graphics"), 'TPM'),
        (('<graphics', "<hostdev type='mdev'/><graphics"), 'vGPU'),
        (("mode='host-model'", "mode='host-passthrough'"), 'cpu_mode'))
    @ddt.unpack
    def test_does_not_fit(self, change, text):
        self.assertIn(change[0], WANTED)
        error = self.assertRaises(
            memory_file.Unusable, self._make, wanted=WANTED.replace(*change))
        self.assertIn(text, str(error))

    @ddt.data(
        ("<memory unit='KiB'>", "<memory unit='GiB'>"),
        ("<memory unit='KiB'>", "<memory unit='b'>"),
        ("<feature policy='require' name='vme'/>",
         "<numa><cell id='0' cpus='0' memory='262144' unit='KiB'/>"
         "<cell id='1' memory='268435456' unit='KiB'/></numa>"),
        ("<feature policy='require' name='vme'/>",
         "<numa><cell id='0' cpus='0' memory='262144' unit='GiB'/></numa>"))
    @ddt.unpack
    def test_forged_size_of_the_memory(self, *change):
        """libvirt takes units, and the sum of the NUMA nodes, at their word.

        So a forged definition gets more memory than the flavor has.
        """
        self.assertIn(change[0], SAVED)
        error = self.assertRaises(memory_file.Unusable, self._make,
                                  saved=SAVED.replace(*change))
        self.assertIn('memory', str(error))

    def test_memory_in_numa_nodes(self):
        self._make(saved=SAVED.replace(
            "<feature policy='require' name='vme'/>",
            "<numa><cell id='0' memory='131072' unit='KiB'/>"
            "<cell id='1' memory='131072' unit='KiB'/></numa>"))

    def test_description_of_another_size(self):
        error = self.assertRaises(
            memory_file.Unusable, self._make, memory_mb=128)
        self.assertIn('128 in the image, 256 here', str(error))

    def test_consoles_that_the_instance_has_not(self):
        made = self._make(wanted=WANTED.replace(
            "<graphics type='vnc' autoport='yes' listen='192.0.2.9'/>", '')
            .replace("<log file='/instances/own/console.log' append='off'/>",
                     ''))
        graphics = made.find('devices/graphics')
        self.assertEqual({'type': 'vnc', 'autoport': 'yes',
                          'listen': '127.0.0.1'}, dict(graphics.attrib))
        self.assertEqual([], made.xpath('devices/*/log'))

    def test_machine_and_cpu(self):
        self.assertEqual(('x86_64', 'pc-i440fx-7.2'),
                         definition.machine_of(described()))
        self.assertIn('Nehalem', definition.cpu_of(described()))
        self.assertIsNone(definition.cpu_of(described(
            '<domain><os><type/></os></domain>')))
