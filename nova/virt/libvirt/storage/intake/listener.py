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
"""The socket on which a disk is taken in; Nova's, so that nobody is faster.

qemu-nbd gets it ready-made. It doesn't set TCP_NODELAY on what it accepts, and
without that each window of requests waits for a delayed ACK (40 ms). What is
set on the listening socket is inherited.
"""

import errno
import socket

import nova.conf
from nova import exception
from nova.i18n import _

CONF = nova.conf.CONF


def listen(address: str, connections: int) -> socket.socket:
    """Listen on a free port of the configured range.

    :param address: an IP address or host name of this host
    :param connections: how many may wait to be accepted
    :returns: the socket
    :raises: exception.StorageIntakeError if there is none
    """
    first = CONF.libvirt.storage_migration_nbd_port_min
    last = CONF.libvirt.storage_migration_nbd_port_max
    error: OSError | None = None
    try:
        family, kind, protocol, _name, place = socket.getaddrinfo(
            address, first, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise exception.StorageIntakeError(host=CONF.host, reason=_(
            "check [libvirt]/migration_inbound_addr, %(address)r: "
            "%(error)s") % {'address': address, 'error': e})
    for port in range(first, last + 1):
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            found.bind((place[0], port, *place[2:]))
            found.listen(connections)
            return found
        except OSError as e:
            found.close()
            error = e
            if e.errno != errno.EADDRINUSE:
                break
    raise exception.StorageIntakeError(host=CONF.host, reason=_(
        "check [libvirt]/migration_inbound_addr and "
        "[libvirt]/storage_migration_nbd_port_min and _max: no port of "
        "%(address)s from %(first)d to %(last)d can be listened on: "
        "%(error)s") % {'address': address, 'first': first, 'last': last,
                        'error': error})


def port_of(listening) -> int:
    """The port of a socket that listen() has returned."""
    return listening.getsockname()[1]
