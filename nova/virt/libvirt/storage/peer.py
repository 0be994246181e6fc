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
"""The connection to another compute node's libvirt; knows nothing of disks.

Of a peer's libvirt the storage API alone is used, so that a URI which reaches
no more than that is enough.
"""

import contextlib
import re
import threading

from oslo_log import log as logging
from oslo_utils import netutils

import nova.conf
from nova import exception
from nova.i18n import _
from nova import thread_pool_factory

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Seconds to wait for a peer's libvirt to take a connection.
_CONNECT_TIMEOUT = 30
# A peer that doesn't answer is given up after (count + 1) * interval seconds.
_KEEPALIVE = (5, 3)

_HOST_NAME = re.compile(r'[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?'
                        r'(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*')


def uri_of(address):
    """Return the URI of a peer's libvirt.

    :param address: the peer's IP address or host name, from the migration
        record and so from another host
    :raises: MigrationPreCheckError if it is neither
    """
    if netutils.is_valid_ipv6(address):
        address = '[%s]' % address
    elif not (netutils.is_valid_ipv4(address) or
              (len(address) <= 253 and _HOST_NAME.fullmatch(address))):
        raise exception.MigrationPreCheckError(reason=_(
            "%r is neither an IP address nor a host name; check "
            "[libvirt]/migration_inbound_addr on the destination") % address)
    return CONF.libvirt.storage_migration_uri % address


@contextlib.contextmanager
def connected(host, uri):
    """Connect to a peer's libvirt for the time of a with statement.

    :param host: the nova.virt.libvirt.host.Host of this compute
    :param uri: URI as uri_of() returns
    :raises: MigrationPreCheckError
    """
    done = threading.Event()
    result = {}

    def connect():
        # libvirt has no timeout for this.
        try:
            result['connection'] = host.connect_to_peer(uri)
        except Exception as e:
            result['error'] = e
        done.set()

    thread_pool_factory.spawn(connect)
    if not done.wait(_CONNECT_TIMEOUT):
        result['error'] = _('no answer within %d seconds') % _CONNECT_TIMEOUT
    if 'connection' not in result:
        raise exception.MigrationPreCheckError(reason=_(
            "libvirt at %(uri)s can't be reached: %(error)s. Check that it "
            "listens there, that its certificate names this address and that "
            "it accepts this host's certificate; why it refused is in its "
            "own log alone") % {'uri': uri, 'error': result['error']})
    connection = result['connection']
    try:
        connection.setKeepAlive(*_KEEPALIVE)
        yield connection
    finally:
        try:
            connection.close()
        except Exception as e:
            LOG.debug('Closing %(uri)s: %(error)s', {'uri': uri, 'error': e})
