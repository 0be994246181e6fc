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
import pathlib
import subprocess
import sys

from . import check
from . import compose
from . import export
from . import save
from . import SeriesError
from .project import locked
from .project import Project

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog='series', description='Turn the '
                                     'repository into a tree and back.')
    parser.add_argument('command', choices=sorted(COMMANDS))
    parser.add_argument('--root', type=pathlib.Path, default=ROOT)
    arguments = parser.parse_args()
    try:
        project = Project.load(arguments.root)
        with locked(project):
            if save.finish(project):
                print('ended a save that was cut off')
            return COMMANDS[arguments.command](project)
    except SeriesError as error:
        print('error:', error, file=sys.stderr)
        return 1


def _say(text: str) -> int:
    if text:
        print(text)
    return 0


def _check(project: Project) -> int:
    faults = check.check(project)
    for fault in faults:
        print('error:', fault, file=sys.stderr)
    unsaved = subprocess.run(
        ['git', 'status', '--porcelain', '--', 'patches', *project.roots],
        cwd=project.root, stdout=subprocess.PIPE, text=True).stdout
    if unsaved:
        print('note: not committed here yet:\n' + unsaved.rstrip())
    if not faults:
        print('%d patches: tree and repository agree' % len(
            compose.patches(project)))
    return 1 if faults else 0


COMMANDS = {
    'tree': lambda project: _say(compose.make_tree(project)),
    'save': lambda project: _say(save.save(project)),
    'check': _check,
    'export': lambda project: _say(export.export(project)),
    'version': lambda project: _say(export.version(project)),
}

if __name__ == '__main__':
    sys.exit(main())
