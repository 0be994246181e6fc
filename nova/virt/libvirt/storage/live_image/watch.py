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
"""See for how long a guest stands still while its memory is saved."""

import threading
import time

from oslo_log import log as logging

from nova.compute import power_state

LOG = logging.getLogger(__name__)

POLL = 0.02  # seconds


class Watch:
    """See for how long a guest stands still, and hurry it on if need be.

    :param limit: after so many seconds the guest is paused, so that its
        memory comes to an end; after as many more the job is aborted
    """

    def __init__(self, guest, host, limit, instance):
        self._guest, self._host = guest, host
        self._limit, self._instance = limit, instance
        self._over = threading.Event()
        self._paused = 0.0
        self._resumed = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_exception):
        self._resumed = time.monotonic()
        self._over.set()
        self._thread.join()

    def pause(self) -> float:
        """:returns: seconds, too many by POLL at most"""
        return self._resumed - self._paused if self._paused else 0.0

    def _run(self):
        begun = seen = time.monotonic()
        actions = [(2 * self._limit, self._guest.abort_job),
                   (self._limit, self._guest.pause)]
        while not self._over.wait(POLL):
            try:
                if not self._paused and self._is_paused():
                    self._paused = seen
                seen = time.monotonic()
                if actions and seen - begun > actions[-1][0]:
                    _limit, action = actions.pop()
                    LOG.warning('Saving the memory takes longer than '
                                '%d s: %s', _limit, action.__name__,
                                instance=self._instance)
                    action()
            except Exception as e:
                # Who waits for the job gets to know what is wrong.
                LOG.debug('The guest that is being saved can not be watched: '
                          '%s', e, instance=self._instance)

    def _is_paused(self):
        return self._guest.get_power_state(self._host) == power_state.PAUSED
