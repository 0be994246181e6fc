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
"""The directories of instances that lie beside the pools.

In them are consoles' logs, and the disks that are in no pool.
"""

import os
import re
import shutil

from oslo_log import log as logging

import nova.conf
from nova.virt.libvirt.storage.pool import mounts

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# As Nova names them: while a resize can be reverted, and while they go.
_RESIZE = '_resize'
_NAME = re.compile(r'(?P<uuid>[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})'
                   r'(_resize|_del)?')


def find() -> list[tuple[str, str]]:
    """List the directories that are named after an instance.

    None where other hosts may have mounted the same file system: those of
    all of their instances would be there.

    :returns: list of (path, UUID)
    :raises: OSError if they can't be listed
    """
    if not mounts.is_local(os.path.realpath(CONF.instances_path)):
        return []
    try:
        with os.scandir(CONF.instances_path) as entries:
            names = [entry.name for entry in entries
                     if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [(os.path.join(CONF.instances_path, name), match['uuid'])
            for name in names if (match := _NAME.fullmatch(name))]


def is_of_before_a_resize(path: str) -> bool:
    """Whether a directory is kept for the revert of a resize."""
    return path.endswith(_RESIZE)


def delete(path: str) -> bool:
    """Delete the directory of an instance that is gone.

    :param path: as find() has it
    :returns: whether it is gone; what is in the way is logged
    """
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        # The deletion of the instance may be under way. If only a part was
        # gone before, the next try finds the rest.
        return not os.path.lexists(path)
    except OSError as e:
        LOG.warning('Directory %(path)s is left over: %(error)s',
                    {'path': path, 'error': e})
        return False
    return True
