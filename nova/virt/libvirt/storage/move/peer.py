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

import collections
import contextlib
import os
import re
import threading

from oslo_log import log as logging
from oslo_utils import netutils

import nova.conf
from nova import exception
from nova.i18n import _
from nova import thread_pool_factory
from nova.virt.libvirt.storage.pool import access

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Seconds to wait for a peer's libvirt to take a connection.
_CONNECT_TIMEOUT = 30
# A peer that doesn't answer is given up after (count + 1) * interval seconds.
_KEEPALIVE = (5, 3)

# How many attempts still wait at a URI that were given up. A few more may
# find a link that is whole again; many would take all threads.
_hanging: collections.Counter[str] = collections.Counter()
_MOST_HANGING = 4
_lock = threading.Lock()

# In libvirt's errors: a key, a certificate, a CA's certificate or list.
_KEY_FILE = re.compile(r'/[^\s\'":,]+\.pem')

# libvirt's errors about what auth_tls = "sasl" asks for beside certificates.
# Of a server's certificate it says "authentication failed", too.
_SASL = re.compile(r'SASL|GSSAPI|Kerberos|auth credentials|'
                   r'authentication failed: authentication failed|'
                   r'authentication request for', re.IGNORECASE)

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
            "check [libvirt]/migration_inbound_addr on the destination: %r is "
            "neither an IP address nor a host name") % address)
    return CONF.libvirt.storage_migration_uri % address


@contextlib.contextmanager
def connected(host, uri):
    """Connect to a peer's libvirt for the time of a with statement.

    :param host: the nova.virt.libvirt.host.Host of this compute
    :param uri: URI as uri_of() returns
    :raises: MigrationPreCheckError
    """
    try:
        connection = _connect(host, uri)
    except Exception as e:
        _check_keys(uri, str(e))
        _check_sasl(uri, str(e))
        raise exception.MigrationPreCheckError(reason=_(
            "check libvirt and the certificates of both hosts, libvirt at "
            "%(uri)s can't be reached: %(error)s. If this host refused it, "
            "nova-compute's standard error says why; if it refused this host, "
            "its own log does. It must listen there with a certificate that "
            "names this address, and accept the certificate of this host") % {
                'uri': uri, 'error': e})
    try:
        yield connection
    finally:
        _close(connection, uri)


def _check_keys(uri, error):
    """Name the file that an error is about if nova may not read it."""
    for path in _KEY_FILE.findall(error):
        found = access.obstacle(path, os.R_OK)
        if found:
            raise exception.MigrationPreCheckError(reason=_(
                "give %(obstacle)s (%(mode)s) to a group of user %(user)s, "
                "after each renewal anew: it keeps nova on this host from "
                "reading %(path)s, without which libvirt at %(uri)s can't be "
                "reached: %(error)s") % {
                    'user': access.user(), 'path': path,
                    'obstacle': found.path, 'mode': found.mode,
                    'uri': uri, 'error': error})


def _check_sasl(uri, error):
    """Say what to do where it is SASL that keeps this host out."""
    if _SASL.search(error):
        raise exception.MigrationPreCheckError(reason=_(
            "check the Kerberos ticket or keytab of user %(user)s here, and "
            "sasl_allowed_username_list there: libvirt at %(uri)s can't be "
            "reached, as this host does not authenticate: %(error)s. With "
            "SCRAM check auth.conf here and passwd.db there") % {
                'user': access.user(), 'uri': uri, 'error': error})


def _connect(host, uri):
    if _hanging[uri] >= _MOST_HANGING:
        raise TimeoutError(_('earlier attempts are still unanswered'))
    attempt = _Attempt(host, uri)
    thread_pool_factory.spawn_on(
        thread_pool_factory.ExecutorType.STORAGE_PEER, attempt.run)
    return attempt.wait(_CONNECT_TIMEOUT)


class _Attempt:
    """A connection that is waited for, but not for ever.

    libvirt has no timeout for this: the thread of an attempt that isn't
    answered is lost until the peer's host ends it.
    """

    def __init__(self, host, uri):
        self.host = host
        self.uri = uri
        self._done = threading.Event()
        self._given_up = False
        self._connection = self._error = None

    def run(self):
        try:
            self._connection = self.host.connect_to_peer(self.uri)
            self._connection.setKeepAlive(*_KEEPALIVE)
        except Exception as e:
            self._error = e
        with _lock:
            self._done.set()
            if not self._given_up:
                return
            _hanging[self.uri] -= 1
        if self._connection is not None:
            _close(self._connection, self.uri)

    def wait(self, timeout):
        self._done.wait(timeout)
        with _lock:
            if not self._done.is_set():
                self._given_up = True
                _hanging[self.uri] += 1
                self._error = TimeoutError(
                    _('no answer within %d seconds') % timeout)
        if self._error is None:
            return self._connection
        if self._connection is not None and not self._given_up:
            _close(self._connection, self.uri)
        raise self._error


def _close(connection, uri):
    try:
        connection.close()
    except Exception as e:
        LOG.debug('Closing %(uri)s: %(error)s', {'uri': uri, 'error': e})
