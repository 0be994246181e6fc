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

import argparse
import os
import pathlib
import shutil
import sys
import tempfile

from . import machine
from series import project
from series import SeriesError
from series import compose

ROOT = pathlib.Path(__file__).resolve().parents[2]
INSIDE = 'SERIES_RUNNER_IN_VENV'


def main() -> int:
    parser = argparse.ArgumentParser(prog='runner')
    parser.add_argument('command', choices=(
        'system', 'prepare', 'test', 'tools', 'style', 'unit', 'functional',
        'newer_python', 'sanitize', 'lab', 'each', 'wheel', 'dist'))
    parser.add_argument('--all', action='store_true',
                        help='each: all unit tests on every commit')
    parser.add_argument('--first', type=int, default=1, metavar='N',
                        help='each: begin with the Nth commit')
    parser.add_argument('--last', type=int, metavar='N',
                        help='each: end with the Nth commit')
    arguments = parser.parse_args()
    try:
        if os.environ.get(INSIDE):
            return _inside(arguments)
        _prepare(arguments.command == 'system')
    except (machine.NotReady, SeriesError) as error:
        print('error:', error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        return 130
    if arguments.command in ('system', 'prepare'):
        return 0
    python = ROOT / '.venv/bin/python'
    os.execve(python, [str(python), '-m', 'runner', *sys.argv[1:]], {
        **os.environ, INSIDE: '1', 'PYTHONPATH': str(ROOT / 'tools'),
        'PATH': '%s:%s' % (python.parent, os.environ['PATH'])})


def _prepare(system_alone):
    logs = ROOT / 'build' / 'log'
    logs.mkdir(parents=True, exist_ok=True)
    machine.system(ROOT / 'bindep.txt', logs / 'apt.log')
    if system_alone:
        return
    here = project.Project.load(ROOT)
    with project.locked(here):
        print(compose.make_tree(here), flush=True)
    machine.venv(ROOT, here.tree, logs / 'pip.log')
    machine.extensions(ROOT / '.venv/bin/python', here.tree,
                       logs / 'extensions.log')


def _inside(arguments) -> int:
    from . import counting
    from . import stages
    for name in (INSIDE, 'PYTHONPATH'):  # no business of what is tested
        os.environ.pop(name, None)
    if arguments.command in ('wheel', 'dist'):
        return _build(arguments.command == 'wheel')
    tally = counting.Tally()
    stage = getattr(stages, arguments.command)
    if arguments.command == 'each':
        stage(tally, arguments.all, arguments.first, arguments.last)
    else:
        stage(tally)
    return tally.report()


def _build(wheel_alone):
    """Build the packages; the wheel of the source distribution, if both."""
    dist = ROOT / 'dist'
    with tempfile.TemporaryDirectory() as fresh, open(
            ROOT / 'build/log/dist.log', 'w') as out:
        machine.step('wheel' if wheel_alone else 'sdist, wheel', [
            sys.executable, '-m', 'build', '--outdir', fresh,
            *(['--wheel'] if wheel_alone else []), ROOT], out)
        dist.mkdir(exist_ok=True)
        for old in [*dist.glob('*.whl'), *dist.glob('*.tar.gz')]:
            old.unlink()
        for made in pathlib.Path(fresh).iterdir():
            shutil.move(made, dist)
            print('dist/' + made.name)
    return 0


if __name__ == '__main__':
    sys.exit(main())
