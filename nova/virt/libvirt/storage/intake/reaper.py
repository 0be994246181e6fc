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
"""What an earlier compute service has left of disks that were taken in.

Its qemu-nbds end with it. What is found nevertheless, is ended here: nobody
may write to a disk that this service takes over.
"""

import os
import pathlib
import shutil
import signal
import time

from oslo_log import log as logging
import psutil

import nova.conf
from nova import exception
from nova.i18n import _
from nova.virt.libvirt.storage.intake import export
from nova.virt.libvirt.storage.intake import keys

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# Seconds for what is killed to be gone.
_TIMEOUT = 10


def reap() -> None:
    """End what serves a disk of this host, and remove all keys.

    :raises: exception.StorageIntakeError if something can't be ended
    """
    deadline = time.monotonic() + _TIMEOUT
    while found := _processes():
        if time.monotonic() > deadline:
            raise exception.StorageIntakeError(host=CONF.host, reason=_(
                "end process %d: it writes to a disk that an earlier "
                "nova-compute has let it write to") % found[0])
        for pid in found:
            LOG.warning('Ending process %d, an NBD server of an earlier '
                        'nova-compute', pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.1)
    root = keys.root()
    for path in (root.iterdir() if root.is_dir() else ()):
        LOG.info('Removing %s, a key that is no longer in use', path)
        shutil.rmtree(path, ignore_errors=True)


def _processes() -> list[int]:
    """Processes which serve with a key of this compute service's."""
    mark = b'=%s/' % os.fsencode(keys.root())
    programs = [os.fsencode(name) for name in (export.QEMU, export.NBDKIT)]
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
        try:
            arguments = path.read_bytes().split(b'\0')
        except OSError:
            continue    # it has ended
        if os.path.basename(arguments[0]) in programs and (
                any(mark in argument for argument in arguments)) and (
                    _is_ours(int(path.parent.name))):
            found.append(int(path.parent.name))
    return found


def _is_ours(pid):
    """Whether a process runs as this user: others may call it anything."""
    try:
        return psutil.Process(pid).uids().effective == os.geteuid()
    except psutil.NoSuchProcess:
        return False
