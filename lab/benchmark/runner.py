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

"""Run the pump in a host, as a compute service would.

Run as a program there. Reads requests, one JSON a line, and answers each so.
"""

import concurrent.futures
import json
import os
import random
import resource
import sys
import threading
import time

from lab.benchmark import measure


def _silence():
    """Answers alone go to standard output."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    return answers


class Spinner(threading.Thread):
    """A Python thread with work to do; counts what it gets done."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended, self.count = False, 0

    def run(self):
        start = time.monotonic()
        while not self.ended:
            for _ in range(1000):
                pass
            self.count += 1
        self.took = time.monotonic() - start

    def end(self) -> float:
        """:returns: loops a second"""
        self.ended = True
        self.join()
        return self.count / self.took


def _cpu():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def copy(pump, request):
    """Copy volumes, at once or one after the other."""
    exports = request.get('exports')
    jobs = [(pump.Volume(request['source'], *names[:2]),
             pump.Export(*exports[n]) if exports else
             pump.Volume(request['destination'], *names[2:4]), names[4])
            for n, names in enumerate(request['volumes'])]

    def one(job):
        return pump.copy(*job, bandwidth=request.get('bandwidth', 0))

    memory = measure.Memory(os.getpid())
    spinner = Spinner()
    before, own = _cpu(), time.process_time()
    memory.start()
    if request.get('spin'):
        spinner.start()
    start = time.monotonic()
    if request.get('together'):
        with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
            results = list(pool.map(one, jobs))
    else:
        results = [one(job) for job in jobs]
    wall = time.monotonic() - start
    speed = spinner.end() if request.get('spin') else 0
    peak = memory.end()
    # The spinner's time and that of looking on are no part of a transfer.
    own = 0 if request.get('spin') else (
        time.process_time() - own - memory.cpu)
    return {'wall': wall, 'client': _cpu() - before + own,
            'memory': peak, 'speed': speed,
            'checksums': [[r.checksum, r.key] for r in results]}


def warm(pump, request):
    """Copy a volume in two passes, between which some of it is written."""
    pool, name = request['from']
    with pump.WarmCopy(pump.Volume(request['source'], pool, name),
                       pump.Export(*request['export']),
                       request['length']) as copy:
        start = time.monotonic()
        copy.first()
        first = time.monotonic() - start
        _change(request['path'], request['length'], request['changed'])
        start = time.monotonic()
        result = copy.rest(request['length'])
        return {'first': first, 'wall': time.monotonic() - start,
                'sent': result.data}


def _change(path, length, nbytes):
    """Write to random places, in pieces of 4 to 64 KiB as a guest does."""
    chance = random.Random(length)
    with open(path, 'r+b', buffering=0) as file:
        while nbytes > 0:
            data = os.urandom(chance.choice((4096, 4096, 16384, 65536)))
            file.seek(chance.randrange((length - len(data)) >> 12) << 12)
            file.write(data)
            nbytes -= len(data)


def verify(pump, request):
    start = time.monotonic()
    pump.verify(pump.Volume(request['uri'], request['pool'],
                            request['volume']),
                request['length'], request['checksum'], key=request['key'])
    return {'wall': time.monotonic() - start}


def cancel(pump, request):
    """Cancel a copy in its middle, and see how long it takes to end."""
    from nova import exception
    asked = []

    def cancelled():
        if time.monotonic() - start > request['after'] and not asked:
            asked.append(time.monotonic())
        return bool(asked)

    start = time.monotonic()
    try:
        pump.copy(pump.Volume(request['source'], *request['from']),
                  pump.Volume(request['destination'], *request['to']),
                  request['length'], cancelled=cancelled)
    except exception.StorageTransferCancelled:
        return {'wall': time.monotonic() - asked[0]}
    raise RuntimeError('it was over before it could be cancelled')


def spin(_pump, request):
    """How fast a thread is here; nothing else is done."""
    spinner = Spinner()
    spinner.start()
    time.sleep(request['seconds'])
    return {'speed': spinner.end()}


def main():
    answers = _silence()
    from nova.virt.libvirt.storage.pump import transfer as pump
    operations = {'copy': copy, 'warm': warm, 'verify': verify, 'cancel': cancel,
                  'spin': spin}
    print(json.dumps({'ready': True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = operations[request.pop('operation')](pump, request)
        except Exception as error:
            answer = {'error': '%s: %s' % (type(error).__name__, error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == '__main__':
    main()
