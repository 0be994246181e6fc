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
"""A bandwidth that several transfers have together; knows nothing of libvirt.

Any thread may call these functions.
"""

import contextlib
import threading
import typing as ty


class Bandwidth:
    """What all transfers of one move may send together.

    Each that is under way has an equal part of it. What one doesn't use is
    lost to the others until it ends: the sum is what must hold.

    :param total: bytes a second, holes not counted; 0 for no limit
    """

    def __init__(self, total: int):
        if total < 0:
            raise ValueError('bandwidth is negative: %d' % total)
        self.total = total
        self._lock = threading.Lock()
        self._tells: list[ty.Callable[[int], ty.Any]] = []

    @contextlib.contextmanager
    def shared(self, tell: ty.Callable[[int], ty.Any]) -> ty.Iterator[None]:
        """Have a part of it within the context.

        Nothing may be sent any more when the context ends: then the others
        have more.

        :param tell: called with the part, in bytes a second or 0 for no limit:
            at once, when the others have been told that they have less, and
            whenever it changes, on any thread; it must neither block nor raise
        """
        with self._lock:
            self._tell_others(len(self._tells) + 1)
            self._tells.append(tell)
            tell(self._part(len(self._tells)))
        try:
            yield
        finally:
            with self._lock:
                self._tells.remove(tell)
                self._tell_others(len(self._tells))

    def _part(self, number):
        # 0 would be no limit
        return max(self.total // number, 1) if self.total else 0

    def _tell_others(self, number):
        if self.total:
            for tell in self._tells:
                tell(self._part(number))
