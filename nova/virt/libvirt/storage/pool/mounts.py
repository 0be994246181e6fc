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
"""What is mounted where libvirt should have mounted a pool's file system.

libvirt notes that a pool is active, and doesn't look again: after somebody has
unmounted it, what is written to the pool fills the directory below.
"""

import re
import typing as ty

MOUNTINFO = '/proc/self/mountinfo'

# File systems that one host alone has mounted.
_LOCAL = ('ext2', 'ext3', 'ext4', 'xfs', 'btrfs', 'zfs', 'f2fs', 'jfs',
          'bcachefs', 'tmpfs')


def source_at(path: str) -> str | None:
    """What is mounted at a directory, as seen by this process.

    :param path: an absolute path, links resolved
    :returns: the source, e.g. ``server:/export``; None if it is no mount
    :raises: OSError if that can't be found out
    """
    found = None
    with open(MOUNTINFO, errors='surrogateescape') as f:
        for line in f:
            # proc(5): what is before the dash varies in number
            before, _dash, after = line.partition(' - ')
            if _unescaped(before.split(' ')[4]) == path:
                # The last one hides the others.
                found = _unescaped(after.split(' ')[1])
    return found


def type_at(path: str) -> str:
    """The type of the file system that a file or directory is in.

    :param path: an absolute path, links resolved
    :returns: as /proc/self/mountinfo has it; empty if it isn't there
    :raises: OSError if that can't be found out
    """
    longest, found = '', ''
    with open(MOUNTINFO, errors='surrogateescape') as f:
        for line in f:
            before, _dash, after = line.partition(' - ')
            place = _unescaped(before.split(' ')[4])
            # Of mounts at one place the last is the one that is seen.
            if len(place) >= len(longest) and (path + '/').startswith(
                    place.rstrip('/') + '/'):
                longest, found = place, after.split(' ')[0]
    return found


def is_local(path: str) -> bool:
    """Whether a directory is in a file system that no other host can see.

    :param path: an absolute path, links resolved
    :raises: OSError if that can't be found out
    """
    return type_at(path) in _LOCAL


def _unescaped(text):
    return re.sub(r'\\([0-7]{3})', lambda m: chr(int(m.group(1), 8)), text)


def sources_of(pool_source: ty.Any) -> set[str]:
    """By which names an export can be mounted.

    :param pool_source: a LibvirtConfigStoragePoolSource
    """
    path = pool_source.dir or ''
    return {text for host, _port in pool_source.hosts for text in (
        '%s:%s' % (host, path.rstrip('/') or '/'),
        # of format cifs
        '//%s/%s' % (host, path.strip('/')))}
