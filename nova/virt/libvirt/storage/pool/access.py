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
"""What the user of nova-compute may do with files of its host.

libvirt and QEMU have other users: that they reach a file says nothing of it.
"""

import os
import pathlib
import pwd
import stat
import typing as ty


class Obstacle(ty.NamedTuple):
    """A directory or file that keeps nova-compute from another one.

    :ivar path: its path
    :ivar mode: type, mode and owner as ls has them, e.g.
        ``drwxr-x--- root:kvm``
    :ivar missing: the permissions that are needed there, e.g. ``x``
    """
    path: str
    mode: str
    missing: str


def user() -> str:
    """The name of the user that this process runs as, else its number."""
    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def obstacle(path: str, needed: int) -> Obstacle | None:
    """Find what keeps this process from a file or directory.

    :param path: an absolute path
    :param needed: os.R_OK, os.W_OK, os.X_OK or several of them
    :returns: the first obstacle on the way; None if there is none or if the
        file doesn't exist
    """
    last = pathlib.Path(path)
    for step in (*reversed(last.parents), last):
        wanted = needed if step == last else os.X_OK
        try:
            found = os.stat(step)
        except OSError:
            # Nothing can be said of what isn't there.
            return None
        if not os.access(step, wanted):
            return Obstacle(str(step), _describe(step, found),
                            _letters(wanted))
    return None


def _describe(path, found):
    try:
        owner = '%s:%s' % (path.owner(), path.group())
    except KeyError:
        owner = '%d:%d' % (found.st_uid, found.st_gid)
    return '%s %s' % (stat.filemode(found.st_mode), owner)


def _letters(needed):
    return ''.join(letter for letter, bit in (
        ('r', os.R_OK), ('w', os.W_OK), ('x', os.X_OK)) if needed & bit)
