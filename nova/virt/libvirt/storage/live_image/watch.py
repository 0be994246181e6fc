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
"""Watch a guest while its memory is saved: what it takes, and how long."""

import os
import threading
import time

from oslo_log import log as logging

from nova.compute import power_state
from nova.virt.libvirt.storage.live_image import memory_file
from nova.virt.libvirt import utils as libvirt_utils

LOG = logging.getLogger(__name__)

POLL = 0.02  # seconds


class Watch:
    """See for how long a guest stands still, and hurry it on if need be.

    QEMU appends what the guest changes while its memory is written: the file
    is as long as the guest likes, until that is paused.

    :param limit: after so many seconds the guest is paused, so that its
        memory comes to an end; after as many more the job is aborted
    :param path: where the memory is written
    :param size: of the memory, in bytes. Beyond twice of it the guest is
        paused; with less room than memory_file.RESERVE the job is aborted.
    """

    def __init__(self, guest, host, limit, instance, path, size):
        self._guest, self._host = guest, host
        self._limit, self._instance = limit, instance
        self._path, self._size = path, size
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
        actions, tried = [self._guest.abort_job, self._guest.pause], set()
        while not self._over.wait(POLL):
            try:
                if not self._paused and self._is_paused():
                    self._paused = seen
                seen = time.monotonic()
                wanted, reason = self._wanted(seen - begun)
                if wanted not in actions:
                    continue
                if wanted not in tried:
                    LOG.warning('Saving the memory takes %(reason)s: '
                                '%(action)s', {'reason': reason,
                                               'action': wanted.__name__},
                                instance=self._instance)
                try:
                    wanted()
                    del actions[actions.index(wanted):]
                except Exception as e:
                    # The next poll tries again, and doesn't fill the log.
                    if wanted not in tried:
                        LOG.warning('%(action)s has failed and is tried '
                                    'again: %(error)s', {
                                        'action': wanted.__name__,
                                        'error': e}, instance=self._instance)
                tried.add(wanted)
            except Exception as e:
                # Who waits for the job gets to know what is wrong.
                LOG.debug('The guest that is being saved can not be watched: '
                          '%s', e, instance=self._instance)

    def _wanted(self, seconds):
        """:returns: what is to be done by now, None for nothing; why"""
        if seconds > 2 * self._limit:
            return self._guest.abort_job, 'more than %d s' % (2 * self._limit)
        if os.path.exists(self._path):
            free = libvirt_utils.get_fs_info(
                os.path.dirname(self._path))['free']
            if free < memory_file.RESERVE:
                return self._guest.abort_job, (
                    'all but %d bytes of %s' % (free, self._path))
            if os.path.getsize(self._path) > 2 * self._size:
                return self._guest.pause, 'twice its size'
        if seconds > self._limit:
            return self._guest.pause, 'more than %d s' % self._limit
        return None, ''

    def _is_paused(self):
        return self._guest.get_power_state(self._host) == power_state.PAUSED
