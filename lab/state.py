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

"""What is known of the lab that is up."""

import dataclasses
import json
import os
import pathlib

from . import config
from . import process
from .errors import LabError


@dataclasses.dataclass
class Options:
    """What `up` was asked for.

    :ivar host_root: release of Debian whose root the hosts have, one of
        roots.RELEASES; none: the machine's own
    :ivar modular: libvirt's modular daemons in place of libvirtd
    :ivar root: nova-compute runs as root, for comparison
    :ivar memory: the hosts' disks lie in memory, so that none is measured
    :ivar storage: what there is beside the hosts, separated by commas: "vm"
        for the storage machine, "ceph"
    """

    level: str = 'hosts'
    nova: str = 'tree'
    ssh: bool = False
    images_type: str = 'default'
    network: str = 'none'
    threading: str = 'native'
    memory: bool = False
    root: bool = False
    storage: str = ''
    host_root: str = dataclasses.field(
        default_factory=lambda: os.environ.get('LAB_HOST_ROOT', ''))
    modular: bool = dataclasses.field(
        default_factory=lambda: os.environ.get('LAB_MODULAR', '') == '1')


def boot_id() -> str:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()


@dataclasses.dataclass
class State:
    """:ivar phase: "starting", "up" or "stopping" """

    phase: str = 'starting'
    options: Options = dataclasses.field(default_factory=Options)
    boot: str = dataclasses.field(default_factory=boot_id)
    certificates: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> pathlib.Path:
        return config.STATE

    def save(self) -> None:
        process.write_json(config.STATE / 'state.json',
                           dataclasses.asdict(self))


def find() -> State | None:
    """The state of the lab, whole or not; None where there is none."""
    try:
        fields = json.loads((config.STATE / 'state.json').read_text())
    except FileNotFoundError:
        return None
    fields['options'] = Options(**fields['options'])
    return State(**fields)


def load() -> State:
    """The state of the lab that is up.

    :raises: LabError where it isn't
    """
    found = find()
    if not found or found.phase != 'up' or found.boot != boot_id():
        raise LabError('the lab is %s; bring it up with: lab/lab up' % (
            'half up' if found else 'down'))
    return found
