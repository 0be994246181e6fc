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
"""How large a volume group is now.

libvirt looks at a pool's refresh, and then counts what it makes and deletes
itself. Operators extend a volume group while it is in use.
"""

import subprocess
import time

from oslo_log import log as logging

from nova.virt.libvirt.storage import lvm

LOG = logging.getLogger(__name__)

# Names of pools of this host for whose volume groups LVM doesn't answer.
_unanswered: set[str] = set()

#: Seconds for which LVM is left alone when it has kept silent: a command that
#: waits for a disk stays until that answers.
PAUSE = 600
# By name of such a pool, when LVM is asked again.
_silent: dict[str, float] = {}


def measured(pool, info):
    """Correct what libvirt says of a pool over a volume group.

    If LVM doesn't answer it stays as it is, with one warning.

    :param pool: a StoragePool of this host
    :param info: its PoolInfo as libvirt has it
    :returns: the PoolInfo, with the sizes of now
    """
    if time.monotonic() < _silent.get(pool.name, 0):
        return info
    try:
        sizes = lvm.get_volume_group_info(pool.config().source.name)
    except Exception as e:
        if isinstance(e, subprocess.TimeoutExpired):
            _silent[pool.name] = time.monotonic() + PAUSE
        if pool.name not in _unanswered:
            _unanswered.add(pool.name)
            LOG.warning("Storage pool %(pool)s is as large as libvirt found "
                        "it at its last refresh, as LVM doesn't say how large "
                        "its volume group is: %(error)s",
                        {'pool': pool.name, 'error': e})
        return info
    _unanswered.discard(pool.name)
    return info._replace(capacity=sizes['total'], available=sizes['free'],
                         allocation=sizes['used'])
