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

"""Network namespaces, the bridge in the control plane, links to it."""

import os
import pathlib
import subprocess

from . import config
from .errors import LabError

PREFIX_LENGTH = config.PREFIX_LENGTH
#: The guests' network (--network ovs): a bridge in ctl, an interface on hosts.
DATA = 'data'
DATA_ADDRESS = '10.98.0.1'


def path(machine: str) -> pathlib.Path:
    """Of a machine's network namespace."""
    return pathlib.Path('/run/netns') / config.netns(machine)


def ip(*commands: str, machine: str | None = None) -> None:
    """Run commands of ip(8) in one go.

    :param machine: in whose namespace
    """
    where = ['-n', config.netns(machine)] if machine else []
    done = subprocess.run(
        ['ip', *where, '-batch', '-'], input='\n'.join(commands) + '\n',
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise LabError('ip %s: %s' % ('; '.join(commands),
                                      done.stdout.strip()))


def create(data: bool = False) -> None:
    """Make all namespaces, and connect the hosts to the control plane.

    :param data: the guests' network too
    """
    ip(*('netns add %s' % config.netns(name) for name in config.ADDRESSES))
    ip('link set lo up', 'link add %s type bridge' % config.BRIDGE,
       'addr add %s/%d dev %s' % (config.ADDRESSES[config.CONTROL],
                                  config.PREFIX_LENGTH, config.BRIDGE),
       'link set %s up' % config.BRIDGE,
       *(command for host in config.HOSTS for command in (
           'link add %s type veth peer name %s netns %s' % (
               config.port(host), config.BRIDGE, config.netns(host)),
           'link set %s master %s up' % (config.port(host), config.BRIDGE))),
       machine=config.CONTROL)
    for host in config.HOSTS:
        ip('link set lo up',
           'addr add %s/%d dev %s' % (config.ADDRESSES[host],
                                      config.PREFIX_LENGTH, config.BRIDGE),
           'link set %s up' % config.BRIDGE,
           'route add default via %s' % config.ADDRESSES[config.CONTROL],
           machine=host)
    if data:
        _create_data()


def _create_data() -> None:
    """Connect the hosts once more, for what their guests send."""
    ip('link add %s type bridge' % DATA,
       'addr add %s/%d dev %s' % (DATA_ADDRESS, PREFIX_LENGTH, DATA),
       'link set %s up' % DATA, machine=config.CONTROL)
    _finish_checksums(config.CONTROL, DATA)
    for host in config.HOSTS:
        port = config.port(host, DATA)
        ip('link add %s type veth peer name %s netns %s' % (
            port, DATA, config.netns(host)),
           'link set %s master %s up' % (port, DATA), machine=config.CONTROL)
        ip('link set %s up' % DATA, machine=host)
        _finish_checksums(config.CONTROL, port)
        _finish_checksums(host, DATA)


def _finish_checksums(machine: str, device: str) -> None:
    """Let no packet leave with a checksum that the device should finish.

    A switch in user space passes it on as it is, and the guest drops it.
    """
    done = subprocess.run(
        ['ip', 'netns', 'exec', config.netns(machine), 'ethtool', '-K',
         device, 'tx', 'off'], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise LabError('ethtool -K %s tx off: %s' % (
            device, done.stdout.strip()))


def existing() -> list[str]:
    """The machines whose namespaces are there."""
    return [name for name in config.ADDRESSES if path(name).exists()]


def pids(machine: str) -> list[int]:
    """All processes in a machine's network namespace."""
    try:
        wanted = os.stat(path(machine))
    except FileNotFoundError:
        return []
    found = []
    for entry in os.scandir('/proc'):
        if entry.name.isdigit():
            try:
                there = os.stat('/proc/%s/ns/net' % entry.name)
            except OSError:
                continue
            if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                found.append(int(entry.name))
    return found


def delete() -> None:
    """Remove the namespaces, and with them all that is in them."""
    for name in existing():
        ip('netns del %s' % config.netns(name))
