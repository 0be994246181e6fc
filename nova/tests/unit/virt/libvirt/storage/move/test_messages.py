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

import ast
import glob
import os
import re

import ddt

from nova import exception
from nova import test
from nova.virt.libvirt.storage import content
from nova.virt.libvirt.storage import intake
from nova.virt.libvirt.storage import live
from nova.virt.libvirt.storage import move

# Of a fault, the API's users are shown 255 characters.
WITHIN = 200

# As long as they get in earnest, by the name in a message's template.
LONGEST = {
    'host': 'h' * 64, 'dest': 'h' * 64, 'source': 'h' * 64, 'pool': 'p' * 60,
    'volume': 'v' * 50, 'disk': 'disk.config', 'name': 'disk.config',
    'uri': 'qemu+tls://%s/system' % ('h' * 64), 'image': 'u' * 36,
    'instance_uuid': 'u' * 36, 'migration': 1234567890, 'where': 'w' * 160,
    'directory': 'd' * 60, 'types': 'dir, fs, netfs, logical, disk',
    'available': 10 ** 15, 'total': 10 ** 15, 'reason': 'r' * 300,
    'error': 'e' * 300, 'path': 'p' * 120, 'state': 'building',
    'user': 'u' * 32, 'obstacle': '/etc/pki/libvirt/private',
    'mode': 'drwx------ root:root', 'format': 'qcow2',
    'backend': 'libvirt-storage', 'kind': 'disk.config', 'type': 'rbd',
    'nbd': 'n' * 300, 'here': 'h' * 64, 'address': 'a' * 64, 'port': 65535,
    'missing': 'm' * 100, 'way': 'libvirt', 'other': 'h' * 64,
    'theirs': 'nbd', 'what': 'open', 'file': 'f' * 120, 'wanted': 'raw',
    'found': 'nothing',
    'offered': 'disk, disk.config, disk.eph, disk.swap, files',
    'transferred': 10 ** 15, 'length': 10 ** 15, 'operation': 'look up pool',
    'dev': 'vda', 'place': 'p' * 110, 'runs': 'qcow2', 'record': 'raw',
    'uuid': 'u' * 36, 'disks': 'd' * 160, 'faults': 'name, format, size',
    'volumes': 'v' * 200, 'ceph': 'f' * 36 + '/' + 'c' * 20,
    'there': 't' * 100, 'why': 'w' * 160,
}

ADVICE = re.compile(
    r'upgrade the compute service on host h+|try again|hard '
    r'reboot the (server|instance)|'
    r'choose another host|make room|define and start storage pool p+|'
    r'start storage pool p+|name a pool of one of the types|'
    r'check \[libvirt\]/migration_inbound_addr|'
    r'check libvirt and the certificates of both hosts|'
    r'have the guest overwrite the start of its disk|'
    r'let the user of nova-compute write to|let disks come by libvirt|'
    r'install libnbd on host h+|check the firewall of host h+|'
    r'see the log of nova-compute there|check which host this migration is|'
    r'to a group of user u+|check the Kerberos ticket or keytab|'
    r'choose a host with the same Ceph pool under the same name|'
    r'check that Ceph answers this host, and that there is room for|'
    r"run 'setfacl -m u:u+:x [a-z/]+'|"
    r'Do not start a guest|evacuate the server there|'
    r'migrate the server cold|turn off \[libvirt\]/|'
    r"look (at|for) the server's guest",
    re.IGNORECASE)

# Parts of other messages.
PARTS = re.compile(
    r'earlier attempts|no answer within|nothing is known of its checksum|'
    # what a peer isn't allowed, and why two hosts don't fit together
    r'^file |^mode |^%d names|^%\(length\)d bytes of|^disks come by|'
    r'%\(first\)s|^it |^its |^no Ceph|^%\(pool\)s \(|'
    # why no disk goes into a Ceph pool, or out of one
    r"^On one host|^No disk moves|^It can't be|^Host %\(host\)s has no|"
    # of a migration that has begun
    r"^disk %\(name\)s still depends|^nothing is planned")


def templates():
    """The templates of all messages of the rooms, with their files."""
    for path in [*glob.glob(os.path.join(move.__path__[0], '*.py')),
                 *glob.glob(os.path.join(live.__path__[0], '*.py')),
                 os.path.join(intake.__path__[0], 'volumes.py'),
                 content.__file__]:
        with open(path) as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            if (isinstance(node, ast.Call) and
                    getattr(node.func, 'id', None) == '_' and
                    isinstance(node.args[0], ast.Constant)):
                yield os.path.basename(path), node.args[0].value


@ddt.ddt
class MessagesTestCase(test.NoDBTestCase):
    def has_advice(self, text):
        found = ADVICE.search(text)
        self.assertIsNotNone(found, text)
        self.assertLessEqual(found.end(), WITHIN, text)

    def test_refusals(self):
        seen = 0
        for room, template in templates():
            if PARTS.search(template):
                continue
            seen += 1
            with self.subTest(room=room, template=template):
                reason = template
                if '%' in template:
                    reason %= LONGEST if '%(' in template else 'h' * 64
                self.has_advice(str(
                    exception.MigrationPreCheckError(reason=reason)))
        self.assertGreater(seen, 12)

    @ddt.data(
        exception.UnsafeDiskContent, exception.DiskBeingCopied,
        exception.DiskGivenBack, exception.DisksMayBeElsewhere,
        exception.StorageBaseImageMissing, exception.StorageTransferMismatch,
        exception.StorageDestinationGone, exception.StorageIntakeRefused)
    def test_exceptions(self, cls):
        self.has_advice(cls(**LONGEST).format_message())
