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

"""What libvirt does with the memory of guests, on the fake and on a daemon.

For the latter see test_conformance; the tests have to run where its files are,
as root. Its guests have no operating system, and need no KVM.
"""

import os
import time

import fixtures
from oslo_utils import units
from oslo_utils import uuidutils

from nova import test
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.fixtures import libvirt_live_images
from nova.tests.fixtures import libvirt_storage
from nova.tests.unit.virt.libvirt.storage import test_conformance
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt.storage.live_image import vm_state

CAPACITY = 64 * units.Mi
DOMAIN = '''
<domain type='qemu'>
  <name>%(name)s</name><uuid>%(uuid)s</uuid>
  <genid>%(genid)s</genid>
  <memory unit='KiB'>16384</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <disk type='volume' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source pool='%(pool)s' volume='%(name)s'/>
      <target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <target dev='hda' bus='ide'/><readonly/></disk>
  </devices>
</domain>'''
MEMORY = '''
<domainsnapshot><memory snapshot='external' file='%s'/><disks>
  <disk name='vda' snapshot='%s'/><disk name='hda' snapshot='no'/>
</disks></domainsnapshot>'''
BACKUP = '''
<domainbackup mode='pull'><server transport='unix' socket='%s'/><disks>
  <disk name='vda' backup='yes' type='file'><driver type='qcow2'/>
    <scratch file='%s'/></disk>
  <disk name='hda' backup='no'/>
</disks></domainbackup>'''
SNAPSHOT = '''
<domainsnapshot><name>live</name><state>running</state>
  <creationTime>0</creationTime><memory snapshot='internal'/><disks>
  <disk name='vda' snapshot='internal'/><disk name='hda' snapshot='no'/>
</disks>%s</domainsnapshot>'''

RUNNING, PAUSED, SHUTOFF = (fakelibvirt.VIR_DOMAIN_RUNNING,
                            fakelibvirt.VIR_DOMAIN_PAUSED,
                            fakelibvirt.VIR_DOMAIN_SHUTOFF)
REDEFINE = fakelibvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
REVERT_PAUSED = fakelibvirt.VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED
UNDEFINE_SNAPSHOTS = fakelibvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
LIVE = (fakelibvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE |
        fakelibvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA)


class Conformance(test_conformance.Provided):
    """What guests with a memory do."""

    def setUp(self):
        super().setUp()
        self.pool = self.make_pool()
        self.base = self.make(self.pool, 'base', CAPACITY)

    def define(self, **more):
        """A guest and its overlay, both of one name."""
        uuid = uuidutils.generate_uuid()
        values = {'name': 'nova-test-' + uuid, 'uuid': uuid,
                  'genid': uuidutils.generate_uuid(), 'pool': self.name,
                  **more}
        self.make(self.pool, values['name'], CAPACITY, fmt='qcow2',
                  backing=test_conformance.BACKING % (
                      self.base.path(), 'raw'))
        domain = self.conn.defineXML(DOMAIN % values)
        self.addCleanup(self._undefine, domain)
        return domain, DOMAIN % values

    def _undefine(self, domain):
        if domain.isActive():
            domain.destroy()
        domain.undefineFlags(UNDEFINE_SNAPSHOTS)

    def start(self):
        domain, _xml = self.define()
        domain.create()
        return domain

    def state(self, domain):
        return domain.info()[0]

    def file(self, name):
        return os.path.join(self.path, name)

    def save(self, domain, disks='manual'):
        """:returns: path of the file with its memory"""
        path = self.file('memory-' + domain.name())
        domain.snapshotCreateXML(MEMORY % (path, disks), LIVE)
        return path

    def saved(self):
        """:returns: the stream of a guest"""
        return memory_file.find_stream(self.save(self.start()))

    def give(self, domain, stream):
        """Put a memory into a guest's disk."""
        vm_state.write(
            self.pool.storageVolLookupByName(domain.name()).path(), stream,
            CAPACITY, vm_state.Backing(self.base.path(), 'raw'), 'live')

    def wait_for_no_job(self, domain):
        until = time.monotonic() + 30
        while domain.jobInfo()[0]:
            self.assertLess(time.monotonic(), until)
            time.sleep(0.05)

    def test_memory_of_a_guest_whose_disk_somebody_else_sees_to(self):
        domain = self.start()
        path = self.save(domain)
        self.assertEqual(PAUSED, self.state(domain))
        self.assertEqual(0, domain.jobInfo()[0])
        self.assertIn(domain.UUIDString(),
                      self.conn.saveImageGetXMLDesc(path, 0))
        memory_file.find_stream(path)
        domain.resume()
        self.assertEqual(RUNNING, self.state(domain))

    def test_memory_without_disks(self):
        """Nobody has to see to anything, so that the guest goes on."""
        domain = self.start()
        self.save(domain, 'no')
        self.assertEqual(RUNNING, self.state(domain))

    def test_memory_of_a_guest_that_is_off(self):
        domain, _xml = self.define()
        self.fails(27, self.save, domain)

    def test_backup(self):
        domain = self.start()
        self.save(domain)
        # QEMU makes it, whoever that is.
        os.mkdir(self.file('export'))
        os.chmod(self.file('export'), 0o777)
        socket = self.file('export/socket')
        backup = BACKUP % (socket, self.file('scratch'))
        domain.backupBegin(backup, None, 0)
        self.assertTrue(os.path.exists(socket))
        self.assertNotEqual(0, domain.jobInfo()[0])
        self.assertEqual(PAUSED, self.state(domain))
        # It waits for half a minute, and gives up.
        self.fails(68, domain.backupBegin, backup, None, 0)
        domain.resume()
        domain.abortJob()
        self.wait_for_no_job(domain)
        self.assertFalse(os.path.exists(socket))
        self.assertEqual(RUNNING, self.state(domain))

    def test_no_job(self):
        domain = self.start()
        self.assertEqual(0, domain.jobInfo()[0])
        self.fails(55, domain.abortJob)

    def test_snapshot_is_of_its_own_domain(self):
        domain, _xml = self.define()
        _other, xml = self.define()
        message = self.fails(
            8, domain.snapshotCreateXML, SNAPSHOT % xml, REDEFINE)
        self.assertIn('must use uuid', message)

    def test_undefine_with_a_snapshot(self):
        domain, xml = self.define()
        domain.snapshotCreateXML(SNAPSHOT % xml, REDEFINE)
        self.assertEqual(1, domain.snapshotNum())
        self.assertIn('1 snapshots', self.fails(55, domain.undefineFlags, 0))
        domain.undefineFlags(UNDEFINE_SNAPSHOTS)
        self.conn.defineXML(xml)

    def test_revert_to_a_disk_without_memory(self):
        domain, xml = self.define()
        snapshot = domain.snapshotCreateXML(SNAPSHOT % xml, REDEFINE)
        e = self.assertRaises(
            self.libvirt.libvirtError, domain.revertToSnapshot, snapshot,
            REVERT_PAUSED)
        # QEMU doesn't start; from libvirt 10.9 on, a job of its fails.
        self.assertIn(e.get_error_code(), (1, 9), str(e))
        self.assertEqual(SHUTOFF, self.state(domain))

    def test_go_on_as_another_guest(self):
        stream = self.saved()
        genids = set()
        for _number in range(2):
            domain, xml = self.define()
            self.give(domain, stream)
            snapshot = domain.snapshotCreateXML(SNAPSHOT % xml, REDEFINE)
            domain.revertToSnapshot(snapshot, REVERT_PAUSED)
            self.assertEqual(PAUSED, self.state(domain))
            snapshot.delete(0)
            self.assertEqual(0, domain.snapshotNum())
            domain.resume()
            self.assertEqual(RUNNING, self.state(domain))
            genids |= {self.genid(xml), self.genid(domain.XMLDesc(0))}
        # What it was defined with is given to no guest that has gone on.
        self.assertEqual(4, len(genids))

    @staticmethod
    def genid(xml):
        return xml.partition('<genid>')[2].partition('</genid>')[0]


class FakeTestCase(Conformance, test.NoDBTestCase):

    def provide(self):
        self.useFixture(libvirt_live_images.Guests())
        self.libvirt = fakelibvirt
        self.conn = fakelibvirt.Connection('qemu:///system')
        self.conn.file_system = libvirt_storage.RealFileSystem()
        self.directory = self.useFixture(fixtures.TempDir()).path


class DaemonTestCase(Conformance, test.NoDBTestCase):

    def provide(self):
        test_conformance.connect(
            self, test_conformance.DIRECTORY, 'NOVA_TEST_LIBVIRT_URI and '
            'NOVA_TEST_LIBVIRT_DIR name no daemon')
        self.directory = test_conformance.DIRECTORY
        if not os.path.isdir(self.directory):
            self.skipTest('the files of the daemon are elsewhere')

    def test_backup(self):
        if self.conn.getVersion() // 1000000 == 10:
            self.skipTest('this QEMU keeps no disk when the memory was saved')
        super().test_backup()
