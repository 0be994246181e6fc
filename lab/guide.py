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

"""The commands of the admin guide's page on libvirt over TLS.

The hosts are set up by what the guide says, word for word, so that it can't be
wrong for long. A command block of the page that is to be run has a name.
"""

import functools
import os
import pathlib
import re

from . import config
from . import nova_user
from .errors import LabError

PAGE = 'doc/source/admin/remote-libvirt-tls.rst'
PREFIX = 'remote-libvirt-tls-'
_BLOCK = re.compile(
    r'^(?P<indent> *)\.\. code-block:: console\n'
    r'(?P=indent)   :name: (?P<name>\S+)\n'
    r'\n(?P<body>(?:(?P=indent)   .*\n|\s*\n)+)', re.M)


def find() -> pathlib.Path:
    """The page: of the checkout under test, else of the repository.

    :raises: LabError
    """
    for top in (os.environ.get('LAB_NOVA_TREE'), config.ROOT / 'tree',
                config.ROOT):
        if top and (path := pathlib.Path(top, PAGE)).exists():
            return path
    raise LabError('there is no %s; "make tree" brings it' % PAGE)


@functools.cache
def _blocks(path: pathlib.Path) -> dict[str, str]:
    return {match['name']: _script(match['body'], match['indent'] + '   ')
            for match in _BLOCK.finditer(path.read_text())}


def _script(body: str, indent: str) -> str:
    """A block as a shell script: prompts go, the rest stays."""
    lines = []
    for line in body.rstrip().splitlines():
        line = line.removeprefix(indent)
        lines.append(line.removeprefix('# '))
    return '\n'.join(lines) + '\n'


def script(name: str) -> str:
    """The commands of a named block.

    :param name: without what is common to the names on the page
    :raises: LabError where the page has no such block
    """
    path = find()
    try:
        return _blocks(path)[PREFIX + name]
    except KeyError:
        raise LabError('%s has no block %s%s' % (path, PREFIX, name)) from None


def run(machine, name: str, cwd='/', as_nova=False, **variables: str) -> str:
    """Run a block in a machine as the guide has it.

    :param as_nova: as the user of nova-compute in place of root
    :param variables: which the page tells the reader to set
    :returns: what it printed
    """
    argv = ['sh', '-euc', script(name)]
    if as_nova:
        argv = nova_user.command(argv)
        variables.update(nova_user.environment())
    variables.setdefault('DAEMON', getattr(machine, 'front', ''))
    return machine.run(argv, cwd=cwd, env=variables).stdout
