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

from nova.compute import utils as compute_utils
from nova import exception
from nova import test
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import refusal

UUID = '5d1c4d11-6f3a-4c5e-9a70-0f6f2c1d8e01'
ROOT = ("<disk type='volume' device='disk'><source pool='p' volume='%s_disk'/>"
        "<target dev='vda'/></disk>" % UUID)
CDROM = ("<disk type='volume' device='cdrom'><source pool='p' "
         "volume='%s_disk.config'/><target dev='hda'/></disk>" % UUID)

CEPH = ("<disk type='network' device='%%s'><source protocol='rbd' "
        "name='nova/%s_%%s'/><target dev='%%s'/></disk>" % UUID)


def domain(extra='', devices='', root=ROOT, genid='<genid/>', virt='kvm'):
    return refusal.parse(
        "<domain type='%s'>%s<name>instance-1</name>%s<devices>%s%s</devices>"
        "</domain>" % (virt, genid, extra, root, devices))


#: What is changed, and a part of the text.
REFUSED = (
    ({'virt': 'lxc'}, 'virt_type'),
    ({'root': CEPH % ('disk', 'disk', 'vda')}, 'is on Ceph'),
    ({'genid': ''}, 'hard reboot it once'),
    ({'extra': "<os firmware='efi'/>"}, 'UEFI'),
    ({'extra': "<os><loader type='pflash'>x</loader></os>"}, 'UEFI'),
    ({'extra': '<os><nvram>x</nvram></os>'}, 'UEFI'),
    ({'extra': "<cpu mode='host-passthrough'/>"}, 'cpu_mode'),
    ({'extra': "<cpu mode='maximum'/>"}, 'cpu_mode'),
    ({'devices': '<tpm/>'}, 'TPM'),
    ({'extra': "<launchSecurity type='sev'/>"}, 'encrypted'),
    ({'devices': "<hostdev type='pci'/>"}, 'device of this host'),
    ({'devices': "<hostdev type='mdev'/>"}, 'device of this host'),
    ({'devices': "<interface type='hostdev'/>"}, 'SR-IOV'),
    ({'devices': "<interface type='vdpa'/>"}, 'SR-IOV'),
    ({'devices': "<interface type='direct'/>"}, 'SR-IOV'),
    ({'devices': "<interface type='vhostuser'/>"}, 'SR-IOV'),
    ({'devices': '<filesystem/>'}, 'share'),
    ({'devices': "<memory model='nvdimm'/>"}, 'vPMEM'),
    ({'extra': '<memoryBacking><hugepages/></memoryBacking>'}, 'huge'),
    ({'extra': "<memoryBacking><source type='file'/></memoryBacking>"},
     'in a file'),
    ({'extra': "<memoryBacking><access mode='shared'/></memoryBacking>"},
     'in a file'),
    ({'extra': "<numatune><memory/></numatune>"}, 'NUMA'),
    ({'extra': '<cputune><vcpupin/></cputune>'}, 'dedicated'),
    ({'extra': '<cputune><vcpusched/></cputune>'}, 'real-time'),
    ({'devices': "<serial type='tcp'/>"}, 'serial'),
    ({'devices': "<console type='tcp'/>"}, 'serial'),
    ({'extra': "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/"
               "qemu/1.0'/>"}, 'arguments of QEMU'),
    ({'root': ROOT.replace('<target', '<encryption/><target')},
     'is encrypted'),
    ({'root': ROOT.replace('<target', '<shareable/><target')}, 'shared'),
    ({'devices': "<disk type='block' device='lun'><target dev='sda'/>"
                 "</disk>"}, 'SCSI device'),
    ({'root': ''}, 'root disk'),
    ({'root': "<disk type='file' device='disk'><source file='/x'/>"
              "<target dev='vda'/></disk>"}, 'root disk'),
    ({'root': "<disk type='network' device='disk'><source/>"
              "<target dev='vda'/></disk>"}, 'volume of Cinder'),
    ({'devices': ROOT.replace('_disk', '_disk.eph0').replace('vda', 'vdb')},
     'disk vdb'),
    ({'devices': ROOT.replace('_disk', '_disk.swap')}, 'swap'),
    ({'devices': ROOT.replace(UUID, 'of-another')}, 'besides the root'),
    ({'devices': "<disk type='file' device='cdrom'><source file='/i'/>"
                 "<target dev='hdb'/></disk>"}, 'disk hdb'),
    ({'devices': CDROM.replace('cdrom', 'disk')}, 'config_drive_format'),
)


@ddt.ddt
class RefusalTestCase(test.NoDBTestCase):

    @ddt.data(
        {}, {'devices': CDROM}, {'virt': 'qemu'},
        {'genid': '<genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid>'},
        {'devices': "<disk type='file' device='cdrom'><target dev='hda'/>"
                    "</disk>"},
        {'root': ROOT.replace('_disk', '_disk.1')},
        {'devices': "<interface type='bridge'/><rng model='virtio'/>"
                    "<console type='pty'/><serial type='pty'/>"},
        {'extra': "<cpu mode='custom'/><cputune><shares>1</shares></cputune>"})
    def test_can_be_saved(self, changes):
        refusal.check(UUID, domain(**changes))

    @ddt.data(*REFUSED)
    @ddt.unpack
    def test_refused(self, changes, text):
        error = self.assertRaises(exception.LiveImageRefused, refusal.check,
                                  UUID, domain(**changes))
        self.assertIn(text, str(error))
        self.assertIn(UUID, str(error))

    def test_every_rule_is_tested(self):
        for rule in refusal.RULES:
            self.assertTrue(any(domain(**changes).xpath(rule.xpath)
                                for changes, _text in REFUSED), rule.xpath)

    def test_all_reasons_are_told(self):
        error = self.assertRaises(
            exception.LiveImageRefused, refusal.check, UUID,
            domain(genid='', devices='<tpm/><filesystem/>'))
        # The event of the server's action shows the first 255 characters.
        shown = compute_utils.exception_to_dict(error)['message']
        for text in ('hard reboot', 'TPM', 'share of a file system'):
            self.assertIn(text, shown)

    def test_disks_on_ceph(self):
        """As of images_type rbd, or in a pool over Ceph: say it once."""
        found = refusal.reasons(UUID, domain(
            root=CEPH % ('disk', 'disk', 'vda') +
            CEPH % ('cdrom', 'disk.config', 'hda')))
        self.assertEqual(1, len(found), found)

    def test_volume_of_cinder_on_ceph(self):
        found = refusal.reasons(UUID, domain(devices=(
            CEPH % ('disk', 'x', 'vdb')).replace(UUID + '_', 'volume-')))
        self.assertEqual(1, len(found), found)
        self.assertIn('volume of Cinder', found[0])

    def test_entities_are_not_followed(self):
        found = refusal.parse(
            '<!DOCTYPE d [<!ENTITY x SYSTEM "/etc/passwd">]>'
            '<domain><name>&x;</name></domain>')
        self.assertNotIn('root:', found.findtext('name') or '')

    def test_what_is_no_xml(self):
        self.assertRaises(memory_file.Unfit, refusal.parse, '<domain>')
