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
import subprocess
import sys

from . import machine
from series import compose
from series import SeriesError
from series.project import Project

ROOT = pathlib.Path(__file__).resolve().parents[2]
INSIDE = 'SERIES_RUNNER_IN_VENV'


def main() -> int:
    parser = argparse.ArgumentParser(prog='runner')
    parser.add_argument('command', choices=(
        'test', 'functional', 'each', 'lab', 'wheel', 'dist', 'prepare'))
    parser.add_argument('--all', action='store_true')
    arguments = parser.parse_args()
    if os.environ.get(INSIDE):
        return _inside(arguments)
    try:
        _prepare()
    except (machine.NotReady, SeriesError) as error:
        print('error:', error, file=sys.stderr)
        return 1
    python = ROOT / '.venv/bin/python'
    path = '%s:%s' % (python.parent, os.environ['PATH'])
    os.execve(python, [str(python), '-m', 'runner', *sys.argv[1:]], {
        **os.environ, INSIDE: '1', 'PATH': path})


def _prepare():
    logs = ROOT / 'build' / 'log'
    logs.mkdir(parents=True, exist_ok=True)
    machine.system(ROOT / 'bindep.txt', logs / 'apt.log')
    print(compose.make_tree(Project.load(ROOT)), flush=True)
    machine.venv(ROOT, ROOT / 'tree', logs / 'pip.log')
    machine.extensions(ROOT, ROOT / 'tree', logs / 'extensions.log')


def _inside(arguments) -> int:
    from . import counting
    from . import stages
    if arguments.command == 'prepare':
        return 0
    if arguments.command in ('wheel', 'dist'):
        return _package(arguments.command)
    tally = counting.Tally()
    if arguments.command == 'test':
        for stage in (stages.tools, stages.style, stages.unit, stages.lab):
            stage(tally)
    elif arguments.command == 'each':
        stages.each(tally, arguments.all)
    else:
        getattr(stages, arguments.command)(tally)
    return tally.report()


def _package(command) -> int:
    formats = ['--wheel'] if command == 'wheel' else ['--sdist', '--wheel']
    return subprocess.run([
        sys.executable, '-m', 'build', '--outdir', ROOT / 'dist', *formats,
        ROOT]).returncode


if __name__ == '__main__':
    sys.exit(main())
