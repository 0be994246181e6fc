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
"""The texts that a user sees of all rooms, and the guide's table of them."""

import ast
import collections
import pathlib
import re

import nova
from nova import exception
from nova import test
from nova.tests.unit.virt.libvirt.storage.move import test_messages
from nova.virt.libvirt import storage

ROOMS = pathlib.Path(storage.__path__[0])
GUIDE = pathlib.Path(nova.__path__[0]).parent.joinpath(
    'doc', 'source', 'admin', 'libvirt-storage-pools.rst')
TITLE = 'When something goes wrong'
# Nova's own rooms beside ours.
STOCK = ('lvm.py', 'dmcrypt.py')

# As long as they get in earnest, by the name in a message's template.
LONGEST = collections.defaultdict(lambda: 'x' * 20, {
    **test_messages.LONGEST,
    'volume': '%s_disk.config' % ('u' * 36), 'mapping': 'u' * 36,
    'disks': 'disk, disk.eph0, disk.eph1, disk.swap, disk.config',
    'instance': 'u' * 36, 'instance_id': 'u' * 36, 'uuid': 'u' * 36,
    'supported': 'dir, fs, netfs, logical, rbd', 'other': 'p' * 60,
    'path': 'p' * 100, 'expected': 'p' * 100, 'cache': 'p' * 100,
    'file': 'p' * 90 + 'f' * 40, 'mark': '.nova-image-cache',
    'capacity': 10 ** 9, 'minimum': 1 << 30, 'code': 38, 'missing': 'rx',
    'side': 'destination', 'operation': 'look up volume', 'seconds': 3600,
    'transferred': 10 ** 15, 'length': 10 ** 15, 'free': 10 ** 15,
    'need': 10 ** 15, 'size': 10 ** 15, 'domain': 18, 'status': -9,
    'is': 1 << 63, 'wanted': 1 << 63, 'sent': 1 << 63, 'physical': 10 ** 15,
    'id': 1234567890, 'percent': 100, 'limit': 100, 'module': 'm' * 60,
})

# What to do, as a text may begin with it.
ADVICE = re.compile(
    r"Upgrade this host|from a backup of the database, or set it to NULL|"
    r"Hard reboot the server|See libvirt's log on host h+|"
    r"Define it with virsh pool-define|Start it with virsh pool-start|"
    r"Define storage pool p+ on host h+ as it was|"
    r"Give the hosts of each cell a Ceph pool of their own|"
    r"Use a pool of one of the types|Is the file system .* mounted|"
    r"Allow it by setfacl|Name p+ in nova.conf|Undefine storage pool p+|"
    r"Put an empty file|Use virsh pool-refresh|find out whose it is|"
    r"Look at the free space of storage pool p+|Free space in the file|"
    r"Remove the cause|Check the network|Try again|Revert the resize|"
    r"Mend the export of storage pool|Start storage pool p+ on host h+ anew|"
    r"Set \[libvirt\]/images_type to|Give user u+|Let user u+ on host|"
    r"Give the storage pool of disk|"
    r"Make room in storage pool|"
    r"Use a volume group of its own|Look with lvs on host h+|"
    r"Check that Ceph answers host h+|Look with rbd status|"
    r"Check which host this migration is|"
    r"Wait for the copy|Install Nova from a wheel|Make image u+ available|"
    r"Take a snapshot without memory|Make a new live image|"
    r"rebuild it|Confirm the resize and migrate", re.I)

# Whose message is made of the reason, which is looked at instead; Nova's own.
OTHERS = ('NovaException', 'InvalidConfiguration', 'InstanceFaultRollback',
          'MigrationError', 'MigrationPreCheckError', 'CellTimeout',
          'InstanceNotFound', 'InvalidDiskInfo', 'InvalidInput',
          'HypervisorUnavailable',
          # told by nova-manage alone
          'NoMigrationToSettle')


def trees():
    for path in sorted(ROOMS.rglob('*.py')):
        if path.name not in STOCK:
            yield path.relative_to(ROOMS), ast.parse(path.read_text())


def exceptions():
    """Names of the exceptions that our rooms make, without Nova's own."""
    found = set()
    for _path, tree in trees():
        caught = {id(node) for handler in ast.walk(tree)
                  if isinstance(handler, ast.ExceptHandler) and handler.type
                  for node in ast.walk(handler.type)}
        found |= {node.attr for node in ast.walk(tree)
                  if isinstance(node, ast.Attribute) and
                  getattr(node.value, 'id', None) == 'exception' and
                  id(node) not in caught}
    return sorted(found - set(OTHERS))


def texts(function='_'):
    """The templates that our rooms put into messages, or into the log."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and node.args and
                    isinstance(node.args[0], ast.Constant) and
                    isinstance(node.args[0].value, str)):
                continue
            # _() or LOG.warning()
            called = getattr(node.func, 'value', node.func)
            if getattr(called, 'id', None) == function:
                yield path, node.args[0].value


def render(template):
    def value(match):
        found = LONGEST[match[1]]
        if match[3] in 'dxf' and isinstance(found, str):
            found = 10 ** 9
        return '%{}{}'.format(match[2], match[3]) % found

    template = re.sub(r'%\((\w+)\)([\d.]*)([a-z])', value, template)
    return re.sub('%[a-z]', 'h' * 64, template)


def rows():
    """The first cells of the guide's tables, as regular expressions."""
    text = GUIDE.read_text()
    section = text[text.index('\n%s\n' % TITLE):]
    for cell in re.findall(r'^   \* - (.*(?:\n       .*)*)', section, re.M):
        cell = re.sub(r'\s+', ' ', cell)
        if cell != 'Message':
            yield cell, re.compile(
                '.*'.join(re.escape(part.strip())
                          for part in cell.split('...')), re.S | re.I)


class MessagesTestCase(test.NoDBTestCase):
    def setUp(self):
        super().setUp()
        self.rows = dict(rows())
        self.assertGreater(len(self.rows), 30)

    def assert_in_guide(self, text):
        self.assertTrue(
            any(row.search(text) for row in self.rows.values()),
            'the guide has no row for: %s' % text)

    def test_exceptions(self):
        names = exceptions()
        self.assertGreater(len(names), 20)
        for name in names:
            text = render(getattr(exception, name).msg_fmt)
            with self.subTest(exception=name):
                self.assert_in_guide(text)
                if name in ('StorageTransferError', 'StorageIntakeError'):
                    continue  # the reason has it, see below
                found = ADVICE.search(text) or test_messages.ADVICE.search(
                    text)
                self.assertIsNotNone(found, text)
                self.assertLessEqual(found.end(), test_messages.WITHIN, text)

    def test_all_of_ours_are_looked_at(self):
        """Those which the series adds to nova.exception."""
        self.assertEqual(set(), {
            name for name in vars(exception)
            if re.match('Storage(Pool|Volume|Transfer|Base|Pump)', name)} -
            set(exceptions()))

    def test_refusals(self):
        seen = 0
        for path, template in texts():
            # These are whole messages; all others are parts of one.
            if path.parts[0] != 'move' or test_messages.PARTS.search(template):
                continue
            seen += 1
            with self.subTest(room=path, template=template):
                self.assert_in_guide(render(template))
        self.assertGreater(seen, 12)

    def test_reasons_of_a_failed_copy(self):
        """Their advice comes first, so that a fault has it."""
        seen = 0
        for path, template in texts():
            if path.name != 'process.py' or not re.match(
                    'check|see|define|refresh|start|let|try', template):
                continue
            seen += 1
            text = render(exception.StorageTransferError.msg_fmt.replace(
                '%(reason)s', template))
            advice = render(template).split(';')[0].split(':')[0]
            self.assertLessEqual(text.index(advice) + len(advice),
                                 test_messages.WITHIN, text)
        self.assertGreater(seen, 6)

    def test_no_row_of_something_that_nobody_says(self):
        said = [render(getattr(exception, name).msg_fmt)
                for name in [*exceptions(), 'InvalidDiskInfo']]
        said += [render(template) for _path, template in texts()]
        said += [render(template) for _path, template in texts('LOG')]
        said.append(exception.InvalidDiskInfo.msg_fmt %
                    {'reason': 'Base image failed safety check'})
        said += [exception.InvalidInput.msg_fmt % {'reason': render(template)}
                 for _path, template in texts()]
        said.append('Unable to resize disk down. Choose a flavor with at '
                    'least')
        for cell, row in self.rows.items():
            self.assertTrue(any(row.search(text) for text in said),
                            'nobody says: %s' % cell)
