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

"""Servers that go on from a memory, beside the same ones that boot.

What counts is the time from the request to the first answer of the guest.
"""

import statistics
import time
from concurrent import futures

from . import cases
from . import servers
from .. import live_images
from ..errors import LabError

CLOUD = servers.WAYS['series']
HOST = 'host-a'
AT_ONCE = 8
# KiB that the source writes four times a second.
WRITES = 64


def measure(runs, progress):
    """Save a server with its memory, and have others go on from it.

    :param runs: of each; the medians count
    :returns: an iterable of cases.Row
    """
    with servers.alone(CLOUD, progress) as cloud:
        live_images.enable(cloud)
        live_images.allow('@')
        found, started, pause = measured(cloud, runs, progress.say)
    for many, target in ((1, .2), (AT_ONCE, .25)):
        yield cases.less(
            'live boot, %d at once' % many, 'seconds to the first answer',
            found[many]['live boot'], 'boot', found[many]['boot'], target)
    # No way to start a server is faster than what Nova does before its guest.
    yield cases.less(
        'boot, to the start of its guest', 'seconds', started,
        'to the first answer', found[1]['boot'], 1.)
    yield cases.less('saved with its memory', 'seconds of standing still',
                     pause, 'a second', 1., 1.)


def measured(cloud, runs, tell):
    """Measure on a cloud that is up.

    :returns: by number at once and way, seconds until a guest has answered;
        seconds until the guest of a boot was started; for how many seconds
        the source stood still. Medians all
    """
    source = cloud.boot('bench', host=HOST)
    source.command('keep-writing', WRITES)
    image, pause = _captures(cloud, source, runs, tell)
    source.command('stop-writing')
    found, started = {}, []
    for many in (1, AT_ONCE):
        took = {'boot': [], 'live boot': []}
        # In turn, for what else the machine has to do.
        for number in range(1 + (runs if many == 1 else 1)):
            for way, name in (('boot', 'guest'), ('live boot', image.id)):
                seconds = _answers(cloud, name, many, way == 'live boot')
                tell('%s, %d at once: %s s' % (way, many, ', '.join(
                    '%.1f' % one for one in seconds)))
                # The first one fetches the image.
                if number:
                    took[way] += seconds
        found[many] = {way: statistics.median(seconds)
                       for way, seconds in took.items()}
    for _number in range(runs):
        started.append(_start(cloud))
        tell('boot: %.1f s until its guest was started' % started[-1])
    source.delete()
    return found, statistics.median(started), pause


def _captures(cloud, source, runs, tell):
    """:returns: the last image; the median of the pauses, in seconds"""
    log, image, pauses = cloud.compute_log(HOST), None, []
    for _number in range(runs):
        if image is not None:
            live_images.delete(cloud, image)
        begins = log.stat().st_size
        start = time.monotonic()
        image = live_images.capture(source, 'bench')
        took = time.monotonic() - start
        found = live_images.pauses(log, begins)
        if len(found) != 1:
            raise LabError('%s tells of %d pauses' % (HOST, len(found)))
        pauses += found
        tell('saved in %.1f s, stood still for %.2f s' % (took, pauses[-1]))
    return image, statistics.median(pauses)


def _start(cloud) -> float:
    """:returns: seconds until the guest of a server that boots is started"""
    start = time.monotonic()
    server = cloud.boot('bench', host=HOST, wait=False)
    try:
        servers.wait_started(server, HOST)
        return time.monotonic() - start
    finally:
        server.delete()


def _answers(cloud, image, many, live) -> list[float]:
    """:returns: for each server, seconds until its guest has answered"""
    made = []

    def answer(server, start):
        live_images.first_answer(server, HOST, 'sh', 'echo fine',
                                 boots=not live)
        return time.monotonic() - start

    try:
        with futures.ThreadPoolExecutor(many) as executor:
            waiting = []
            for _number in range(many):
                start = time.monotonic()
                made.append(cloud.boot('bench', image=image, host=HOST,
                                       wait=False))
                waiting.append(executor.submit(answer, made[-1], start))
            return [one.result() for one in waiting]
    finally:
        for server in made:
            server.delete()
