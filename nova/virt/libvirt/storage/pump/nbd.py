# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.
"""Exports of NBD servers as destinations; knows nothing of instances.

What sends to them is an extension of its own (_nbd.pyx), which isn't built
where libnbd isn't there.
"""

import functools
import importlib
import secrets
import typing as ty

from oslo_log import log as logging

from nova import exception
from nova.i18n import _

LOG = logging.getLogger(__name__)

_EXTENSION = 'nova.virt.libvirt.storage.pump._nbd'

# How many connections a transfer opens to an export; see _export.pxd.
CONNECTIONS = 1


class Export(ty.NamedTuple):
    """Where a server takes in one disk, and the key for that.

    The values are strings and numbers, so that they can be sent as they are.

    :ivar host: name or address
    :ivar port: of TCP
    :ivar name: of the export, '' for the server's default one
    :ivar username: to which the key belongs
    :ivar key: pre-shared key for TLS, hexadecimal
    """
    host: str
    port: int
    name: str
    username: str
    key: str

    @staticmethod
    def new_key() -> str:
        """Return a random key."""
        return secrets.token_hex(32)

    @property
    def psk(self) -> str:
        """What stands in the server's file of keys."""
        return '%s:%s\n' % (self.username, self.key)

    # Not the key: these go to logs and messages.
    def __str__(self):
        return 'nbds://%s:%d/%s' % (
            '[%s]' % self.host if ':' in self.host else self.host, self.port,
            self.name)

    def __repr__(self):
        return '<Export %s>' % str(self)


@functools.cache
def missing() -> str | None:
    """Return why this host can't send to exports, or None if it can.

    The log has it once.
    """
    try:
        importlib.import_module(_EXTENSION)
    except ImportError as e:
        LOG.info('Disks can not be sent over NBD from this host: %s. Install '
                 "libnbd and build Nova with libnbd's development files.", e)
        return _("the storage pump was built without libnbd, or that is not "
                 "installed (%s)") % e
    return None


def extension_path() -> str:
    """Return the path of the compiled extension.

    :raises: StoragePumpMissing
    """
    path = None if missing() else importlib.import_module(_EXTENSION).__file__
    if path is None:
        raise exception.StoragePumpMissing(module=_EXTENSION)
    return path
