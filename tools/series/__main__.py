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
import sys

from . import check
from . import compose
from . import export
from . import save
from . import SeriesError
from .git import Git
from .project import locked
from .project import Project

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog='series', description='Turn the '
                                     'repository into a tree and back.')
    parser.add_argument('command', choices=sorted(COMMANDS))
    parser.add_argument('--root', type=pathlib.Path, default=ROOT)
    parser.add_argument('--topic', default='', metavar='NAME',
                        help='tree: leave out what comes after this topic')
    arguments = parser.parse_args()
    try:
        project = Project.load(arguments.root)
        with locked(project):
            if save.finish(project):
                print('ended a save that was cut off')
            command = COMMANDS[arguments.command]
            print(command(project, arguments.topic)
                  if command is compose.make_tree else command(project))
    except SeriesError as error:
        print('error:', error, file=sys.stderr)
        return 1
    return 0


def _check(project: Project) -> str:
    faults = check.check(project)
    unsaved = Git(project.root).out(
        'status', '--porcelain', '--', 'patches', *project.roots,
        worktree=True, check=False)
    if unsaved:
        print('note: not committed here yet:\n' + unsaved)
    if faults:
        raise SeriesError('\nerror: '.join(faults))
    count = len(compose.patches(project))
    print('\n'.join(check.sizes(project)))
    return f'{count} patches: tree and repository agree'


COMMANDS = {'tree': compose.make_tree, 'save': save.save, 'check': _check,
            'export': export.export, 'version': export.version}

if __name__ == '__main__':
    sys.exit(main())
