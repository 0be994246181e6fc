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
"""Directories with a key, one for each disk that is taken in.

GnuTLS reads the key file at every handshake: as long as it is there, who has
the key may connect. So it goes as soon as the source's connections stand.
"""

import os
import pathlib
import secrets
import shutil
import tempfile

from oslo_log import log as logging

import nova.conf

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# As QEMU's tls-creds-psk wants it.
FILE = 'keys.psk'
USERNAME = 'nova'

# QEMU makes a group for Diffie-Hellman of its own, each time, if its directory
# has none: half a second of CPU time on average, for versions of TLS that are
# not used here. This is ffdhe2048 of RFC 7919. QEMU 11 leaves that to GnuTLS,
# and says so of the file.
NEEDLESS_GROUP = 'external DH parameters file'
_GROUP_FILE = 'dh-params.pem'
_GROUP = """-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""


def root() -> pathlib.Path:
    """The directory that all of them are in."""
    return pathlib.Path(CONF.state_path, 'storage-intake')


class KeyDirectory:
    """A new key in a directory that this user alone can enter.

    :ivar key: 256 random bits in hexadecimal digits
    :ivar path: of the directory
    """

    def __init__(self):
        root().mkdir(mode=0o700, exist_ok=True)
        self.path = tempfile.mkdtemp(prefix='key-', dir=root())
        self.key = secrets.token_hex(32)
        self._write(FILE, '%s:%s\n' % (USERNAME, self.key))
        self._write(_GROUP_FILE, _GROUP)

    def _write(self, name, text):
        with os.fdopen(os.open(
                os.path.join(self.path, name),
                os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w') as f:
            f.write(text)

    def remove(self) -> None:
        """Let nobody connect with this key any more. Twice is fine."""
        shutil.rmtree(self.path, ignore_errors=True)
        if os.path.exists(self.path):
            LOG.error('Remove directory %s: it has the key of a disk that '
                      'was taken in', self.path)
