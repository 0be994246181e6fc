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
"""`lab/soak`: bring a lab up, let it live for a while, take it down."""

import concurrent.futures
import contextlib
import json
import os
import secrets
import subprocess
import tempfile

import rich.markup

from . import cloud as cloud_level
from . import moves
from . import plan
from . import report
from .. import cloud as lab_cloud
from .. import config
from .. import hosts
from .. import lock
from .. import state
from .. import ui

SERVERS = 3


@contextlib.contextmanager
def _cloud(progress):
    options = state.Options(level='cloud', nova='tree', ssh=False,
                            network='none', images_type='libvirt-storage')
    with lock.held():
        up = lab_cloud.bring_up(options, progress)
    try:
        yield up
    finally:
        with lock.held():
            hosts.down()


def run_beside(labs, seed, arguments) -> bool:
    """Run level hosts in several labs at once, each with a seed of its own.

    Most of a round is waiting: for a copy at its rate, for a deadline.

    :param labs: how many; the seeds count up
    :param arguments: of the command line, for each of them
    :returns: whether nothing was lost and nothing left in any of them
    """
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    progress = ui.Console()

    def one(number):
        path = os.path.join(folder, '%d.json' % number)
        with subprocess.Popen(
                [config.ROOT / 'lab/soak', '--hosts-only', '--seed',
                 str(seed + number), '--report', path, *arguments],
                env={**os.environ, 'COLUMNS': '1000',
                     'LAB_NAME': '%s%d' % (config.NAME, number)},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True) as soak:
            for line in soak.stdout:
                progress.say(rich.markup.escape('%d: %s' % (
                    seed + number, line.rstrip())))
        if not os.path.exists(path):
            return not soak.returncode, []
        with open(path) as file:
            return not soak.returncode, json.load(file)

    with tempfile.TemporaryDirectory() as folder, \
            concurrent.futures.ThreadPoolExecutor(labs) as pool:
        done = list(pool.map(one, range(labs)))
    report.write_told([told for _well, results in done for told in results])
    for line in report.sum_lines([
            told for _well, results in done for told in results]):
        progress.say(line)
    return all(well for well, _results in done)


def run(steps, minutes, seed, hosts_only, cloud_only, keep_going,
        in_a_row=0, path=report.PATH) -> bool:
    """Run one or both levels; see the command line for the parameters.

    :param path: where the report goes
    :returns: whether nothing was lost and nothing left
    """
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    progress = ui.Console()
    progress.say('seed %d' % seed)
    results = []

    def say(step):
        # "[libvirt]" is no markup.
        progress.say(rich.markup.escape(str(step)))

    levels = [level for level, skipped in (('hosts', cloud_only),
                                           ('cloud', hosts_only))
              if not skipped]
    share = None if minutes is None else minutes / len(levels)
    for level in levels:
        limit = plan.Limit(steps, share)
        if level == 'hosts':
            results.append(moves.run(seed, limit, say, in_a_row))
        else:
            with _cloud(progress) as up:
                results.append(cloud_level.run(
                    up, seed, limit, SERVERS, say, keep_going))
        report.write(results, path)
        for line in report.lines(results[-1]):
            progress.say(line)
        if results[-1].complaint and not keep_going:
            return False
    return not any(result.complaint for result in results)
