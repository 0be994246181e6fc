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

"""`lab/bench`: bring a lab up, measure, take it down."""

import contextlib

import rich.console

from . import cases
from . import downtime
from . import live
from . import live_image
from . import methods
from . import pools
from . import rbd
from . import report
from . import servers
from .. import config
from .. import packages
from .. import ui
from ..cloud.cloud import build_extensions
from ..errors import LabError
from ..hosts import Hosts


def run(runs: int, chosen, console: rich.console.Console) -> list[cases.Row]:
    """Measure, show and write down.

    :param chosen: names of cases; all if empty
    """
    clouds = {'spawn': pools.spawn, 'servers': servers.measure,
              'downtime': downtime.measure, 'again': downtime.again,
              'live': live.measure, 'live-image': live_image.measure,
              'rbd': rbd.measure}
    known = (*cases.Cases.IN_MEMORY, *cases.Cases.ON_DISK, 'sweep', *clouds)
    unknown = set(chosen) - set(known)
    if unknown:
        raise LabError('no case %s; there are: %s' % (
            ', '.join(sorted(unknown)), ', '.join(known)))
    missing = packages.missing(packages.BENCH)
    progress = ui.Console(console)
    if missing:
        with progress.step('Debian packages (%d)' % len(missing)):
            packages.install(missing)
    wanted = chosen or known
    found: list[cases.Row] = []
    if set(wanted) - set(clouds):
        build_extensions(methods.tree(), config.ROOT / 'build/extensions.log')
        with Hosts(ssh=True, progress=progress) as (a, b):
            for row in _copies(a, b, wanted, runs, progress):
                found.append(row)
                report.write(found)
            if 'sweep' in wanted:
                found += pools.sweep(a, runs, progress.say)
                report.write(found)
    for name in clouds:
        if name in wanted:
            found += clouds[name](runs, progress)
            report.write(found)
    report.show(found, console)
    return found


def _copies(a, b, wanted, runs, progress):
    for group, memory in ((cases.Cases.IN_MEMORY, True),
                          (cases.Cases.ON_DISK, False)):
        todo = [name for name in group if name in wanted]
        if todo:
            with _bench(a, b, memory) as bench:
                one = cases.Cases(bench, runs, progress.say)
                for name in todo:
                    yield from getattr(one, name)()


@contextlib.contextmanager
def _bench(a, b, memory):
    bench = methods.Bench(a, b, memory)
    try:
        yield bench
    except BaseException:
        # What went wrong first is what counts; the lab goes anyway.
        with contextlib.suppress(Exception):
            bench.remove()
        raise
    bench.remove()
