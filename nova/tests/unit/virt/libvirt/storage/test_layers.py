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

"""Which room of nova.virt.libvirt.storage may import which."""

import ast
import graphlib
import pathlib

from nova import test
from nova.virt import libvirt

LIBVIRT = 'nova.virt.libvirt.'
STORAGE = LIBVIRT + 'storage.'
# Whether the driver speaks to one room of ours alone.
DRIVER_USES_API = True


def imports_of(module, late=True):
    """The modules that a module of nova.virt.libvirt imports.

    :param module: its name without that prefix
    :param late: whether what functions import counts as well
    :returns: set of full names; ``from a import b`` counts as a.b
    """
    path = pathlib.Path(libvirt.__file__).parent.joinpath(*module.split('.'))
    tree = ast.parse(path.with_suffix('.py').read_text())
    return {'%s.%s' % (node.module, name.name)
            if isinstance(node, ast.ImportFrom) else name.name
            for node in (ast.walk(tree) if late else tree.body)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in node.names}


class LayersTestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        root = pathlib.Path(libvirt.__file__).parent
        self.imports = {
            LIBVIRT + name: imports_of(name) for name in (
                '.'.join(path.relative_to(root).with_suffix('').parts)
                for path in root.rglob('*.py') if path.stem != '__init__')}
        self.rooms = {name: found for name, found in self.imports.items()
                      if name.startswith(STORAGE)}
        self.assertIn(STORAGE + 'pool.pool', self.rooms)

    def _assert_never(self, where, *prefixes, but=()):
        for room, found in self.rooms.items():
            if room.startswith(STORAGE + where):
                self.assertEqual([], sorted(
                    name for name in found if name.startswith(prefixes) and
                    not name.startswith(but)), room)

    def test_nothing_imports_what_stands_above_it(self):
        self._assert_never('', LIBVIRT + 'host', LIBVIRT + 'driver')
        for where in ('pool.', 'records.', 'pump.'):
            self._assert_never(where, STORAGE + 'move')
        self._assert_never('pool.', STORAGE + 'records', STORAGE + 'image')
        self._assert_never('pump.', 'nova.virt.', but=(STORAGE + 'pump',))
        self._assert_never('records.metadata', 'libvirt', 'nova.virt.',
                           but=(STORAGE + 'records',))
        self._assert_never('disk_kinds', 'nova.')
        self._assert_never('pool.kinds', 'nova.')

    def test_pool_types_are_named_in_one_room(self):
        """All others ask what a pool can do."""
        types = {'dir', 'fs', 'netfs', 'logical', 'rbd', 'disk'}
        for room in self.rooms:
            tree = ast.parse(pathlib.Path(libvirt.__file__).parent.joinpath(
                *room.removeprefix(LIBVIRT).split('.')).with_suffix(
                    '.py').read_text())
            compared = {
                part.value for node in ast.walk(tree)
                if isinstance(node, ast.Compare) and any(
                    getattr(side, 'attr', getattr(side, 'id', None)) in (
                        'type', 'pool_type')
                    for side in (node.left, *node.comparators))
                for part in ast.walk(node) if isinstance(part, ast.Constant)}
            self.assertEqual(set(), compared & types, room)

    def test_no_cycle(self):
        """Not even by way of a room of nova.virt.libvirt itself."""
        self.imports = {
            name: imports_of(name.removeprefix(LIBVIRT), late=False) &
            set(self.imports) for name in self.imports}
        reached, waiting = set(), list(self.rooms)
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting.extend(self.imports[name])
        # raises CycleError, which names the modules
        graphlib.TopologicalSorter(
            {name: self.imports[name] for name in reached}).prepare()

    def test_driver_uses_one_face(self):
        if not DRIVER_USES_API:
            self.skipTest('the driver still speaks to many rooms')
        self.assertEqual(
            {STORAGE + name for name in ('api', 'lvm', 'dmcrypt')},
            {name for name in self.imports[LIBVIRT + 'driver']
             if name.startswith(STORAGE)})
