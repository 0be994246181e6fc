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
"""A file that stays the same one, whoever else has its pool.

Another host may have mounted the pool, too. It can put a link to one of
nova's own files in the place of a volume at any time: between a look at it
and its use, too.
"""

import os


class HeldFile:
    """What was at a path once. Whoever holds it, closes it.

    It is held without being opened: a device would notice that, and a FIFO
    have nova-compute wait.

    :param path: of anything, be it a symbolic link
    :ivar fd: descriptor, by which nothing can be read or written
    :raises: OSError
    """

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)

    def stat(self) -> os.stat_result:
        return os.fstat(self.fd)

    def chmod(self, mode: int) -> None:
        os.chmod(self._link(), mode)

    def truncate(self, length: int) -> None:
        """Give it a length, in bytes."""
        os.truncate(self._link(), length)

    def _link(self):
        # The kernel goes to what the descriptor is of, by no path.
        return '/proc/self/fd/%d' % self.fd

    def close(self) -> None:
        """Hold it no longer. Twice is fine."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
