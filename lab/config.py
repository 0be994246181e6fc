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

"""Names, addresses and paths of the lab."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
#: Prefix of everything on the machine that has a name.
NAME = os.environ.get('LAB_NAME', 'lab')
CACHE = ROOT / '.lab'
#: What `up` makes and `down` removes, but for the logs.
STATE = CACHE / NAME
LOGS = STATE / 'log'

CONTROL = 'ctl'
ADDRESSES = {CONTROL: '10.97.0.1', 'host-a': '10.97.0.11',
             'host-b': '10.97.0.12'}
PREFIX_LENGTH = 24
HOSTS = tuple(name for name in ADDRESSES if name != CONTROL)

BRIDGE = 'mgmt'  # in ctl; the hosts' interface has the same name
TLS_PORT = 16514  # libvirt's tls_port

MIB = 1 << 20
#: Of a host's /var/lib/nova; its file is sparse.
DISK_BYTES = 48 << 30
#: Memory and disk that must be free before a level is brought up.
NEEDED_MEMORY = {'hosts': 512 * MIB, 'cloud': 6 << 30}
#: More of it for the storage machine.
STORAGE_MEMORY = 768 * MIB
CEPH_MEMORY = 1 << 30
#: More of it where the hosts' disks lie in memory.
DISKS_IN_MEMORY = 10 << 30
NEEDED_DISK = {'hosts': 1 << 30, 'cloud': 8 << 30}


def netns(machine: str) -> str:
    """The name of a machine's network namespace."""
    return '%s-%s' % (NAME, machine)


def port(host: str, bridge: str = BRIDGE) -> str:
    """The bridge's port, in ctl, to which a host is connected."""
    return '%s-%s' % (bridge, host.rpartition('-')[2])
