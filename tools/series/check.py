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

"""Whether repository and tree agree, and whether each commit is in form."""

import dataclasses
import itertools
import pathlib
import re
import statistics
import subprocess
import tempfile

from . import compose
from . import imports
from . import save
from . import SeriesError
from . import topics
from .git import EMPTY_BLOB
from .git import Git
from .git import run_tool
from .mail import DIFF_TEXT
from .mail import Patch
from .project import Project

SIGNED_OFF = re.compile(rb'^Signed-off-by: \S.*<\S+>$', re.M)
MOST, MOST_OF_TESTS = 600, 1200  # lines that a commit should insert
# What git am takes for a header where it stands first in a body.
HEADER = re.compile(rb'\A\s*>?(From|Date|Subject)[ :]')


def check(project: Project) -> list[str]:
    """All that is wrong, each with its place and how to mend it."""
    git = compose.workshop(project)
    base = compose.ensure_base(git, project)
    series = compose.patches(project)
    owned = git.files(base)
    faults = [*_complete(project, series, owned), *_copies(project, owned),
              *(fault for patch in series
                for fault in _form(project, patch, owned))]
    if faults:
        return faults
    tip = compose.compose(git, project)
    return [*_tree_agrees(project, git, tip), *_round_trip(project, git, tip),
            *_options(project, git, compose.commits(git, tip),
                      series),
            *_imports(git, compose.commits(git, tip), series),
            *_gnu_patch(project, git, base, tip, series)]


def _complete(project, series, owned):
    """The set of files: nothing missing, nothing left over or twice."""
    for number, patch in enumerate(series, 1):
        if not patch.name.startswith(f'{number:04d}-'):
            yield (f'patches/{patch.name}: number {number:04d} is missing; '
                   'make save')
    there, faults = compose.account(project, series, owned)
    yield from faults
    try:
        topics.load(project, series)
    except SeriesError as error:
        yield str(error)
    expected = {*there, *(f'patches/{patch.name}' for patch in series)}
    for path in sorted(save.own_files(project, project.root) - expected):
        yield f'{path}: no patch adds it; remove it, or make save'


def _copies(project, owned):
    """No file of the base may lie here, wherever and whatever its name."""
    if not (project.root / '.git').exists():
        return
    names = {file.blob: path for path, file in owned.items()}
    for path, file in Git(project.root).tracked().items():
        if file.blob in names and file.blob != EMPTY_BLOB and (
                path != 'LICENSE'):
            yield (f"{path} is the base's own file {names[file.blob]}; git rm "
                   'it')


def _form(project, patch: Patch, owned):
    place = f'patches/{patch.name}'
    if HEADER.search(patch.message):
        yield (f'{place}: git am would take the first line of the body for a '
               'header: reword')
    if len(patch.subject) > 72:
        yield (f'{place}: its subject has {len(patch.subject)} characters, 72 '
               'are allowed: reword')
    if not patch.message.strip():
        yield f'{place}: no body: say why (git commit --amend)'
    found = DIFF_TEXT.search(patch.head)
    if found:
        line = patch.head.count(b'\n', 0, found.start(1)) + 1
        text = found.group().decode(errors='replace')
        yield (f'{place}: line {line} of the message reads like a diff '
               f'({text!r}); GNU patch would apply it: reword')
    if b'\nGIT binary patch\n' in patch.part(owned):
        yield (f'{place}: changes a binary file of the base, which GNU patch '
               'can not: add another file instead')
    if project.signed_off and not SIGNED_OFF.search(patch.message):
        yield f'{place}: no Signed-off-by: git commit --amend --signoff'
    yield from _context(project, place, patch, owned)


def _context(project, place, patch, owned):
    """At most so many lines of the base around and between our lines."""
    run, most = 0, 2 * project.context_lines
    for number, path, _there, text in patch.lines():
        run = run + 1 if text.startswith(' ') and path in owned else 0
        if run > most:
            yield (f'{place}: line {number} ({path}): {run} lines of context, '
                   f'{most} allowed: make tree save')


def _options(project, git, commits, series):
    """New lines of which an operator has to be told in a note."""
    for commit, patch in zip(commits, series):
        changed = [path for path, _section in patch.sections()]
        if any(p.startswith(project.notes) for p in (*patch.adds, *changed)):
            continue
        whole = Patch.of_commit(git, commit, patch.name, {}, 0)
        for _number, path, number, line in whole.lines():
            if path.endswith('.py') and 'tests' not in path.split('/') and (
                    line.startswith('+')
                    and re.search(project.note_pattern, line[1:])):
                yield (f'patches/{patch.name}: {path}, line {number} '
                       f'({line[1:].strip()}): an operator sees this, and the '
                       'commit adds no release note below '
                       f'{project.notes}: reno new')
                break


def _imports(git, commits, series):
    for number, fault in imports.faults(git, commits):
        yield (f'patches/{series[number].name}: {fault}; another order, or '
               'the import with what it needs')


def sizes(project: Project) -> list[str]:
    """How many lines the commits insert, and which of them are too large."""
    git = compose.workshop(project)
    tip = compose.compose(git, project)
    counts, found = [], []
    for patch, commit in zip(compose.patches(project), compose.commits(
            git, tip)):
        lines = [line.split('\t') for line in git.out(
            'diff-tree', '-r', '--numstat', '--no-commit-id', '--no-renames',
            commit).splitlines()]
        count = sum(int(new) for new, _old, _path in lines if new != '-')
        tests = all('tests' in path.split('/') for _new, _old, path in lines)
        most = MOST_OF_TESTS if tests else MOST
        if count > most:
            found.append(f'warning: patches/{patch.name} inserts {count} '
                         f'lines, at most {most} are wanted')
        counts.append(count)
    if counts:
        found.append(f'median of inserted lines: '
                     f'{statistics.median_low(counts)}')
    return found


def _tree_agrees(project, git, tip):
    if not (project.tree / '.git').exists():
        return
    changed = compose.uncommitted(git)
    if changed:
        yield ('tree/ has changes that are in no commit; commit them there '
               'and make save:\n' + changed)
    tip = compose.end_of(git, project, tip, compose.partial(git)[0])
    different = git.changes(tip, 'HEAD')
    for path, file in different.items():
        yield (f'{path} is not the same in tree/ and in the repository '
               f'({file.status}); make save writes the tree here')
    if not different and not compose.same_series(git, tip, 'HEAD'):
        yield ('the commits of tree/ and of the repository come to the same '
               'files and differ in number, message or author; make save '
               'writes those of the tree here')


def _round_trip(project, git, tip):
    """What is here must be what a save would write, to the byte.

    A hunk that applies with an offset is written back with other numbers.
    """
    with tempfile.TemporaryDirectory() as scratch:
        fresh = pathlib.Path(scratch)
        save.write(git, project, tip, fresh)
        for name in sorted(save.own_files(project, fresh)):
            here = project.root / name
            if not here.is_file():
                yield f'{name} is missing; make save'
                continue
            line = _difference(here.read_bytes(), (fresh / name).read_bytes())
            if line:
                yield (f'{name}, line {line}: a save would write it otherwise '
                       '(a hunk with an offset, or an edit by hand); make '
                       'tree save')


def _difference(one: bytes, other: bytes) -> int:
    """The number of the first line that differs, or 0."""
    pairs = itertools.zip_longest(one.split(b'\n'), other.split(b'\n'))
    return next((n for n, (a, b) in enumerate(pairs, 1) if a != b), 0)


def _gnu_patch(project, git, base, tip, series):
    """GNU patch must build the same files, with no offset and no fuzz."""
    owned, final = git.files(base), git.files(tip)
    touched = set(owned).intersection(git.out(
        'log', '-z', '--format=', '--name-only', f'{base}..{tip}').split('\0'))
    with tempfile.TemporaryDirectory() as scratch:
        work = pathlib.Path(scratch)
        for path in touched:
            save.write_file(git, work / path, owned[path])
        for patch in series:
            yield from _gnu_patch_one(patch, work, patch.part(owned))
        for path in sorted(touched):
            built = git.out('hash-object', '--no-filters', work / path,
                            check=False)  # nothing, where there is no file
            if built != (final[path].blob if path in final else ''):
                yield f'{path}: git and GNU patch do not build the same'


def _gnu_patch_one(patch, work, diff):
    for path in patch.deletes:
        (work / path).unlink(missing_ok=True)
    if not diff:
        return
    done = run_tool(
        ['patch', '-p1', '--fuzz=0', '--force', '--no-backup-if-mismatch'],
        cwd=work, stderr=subprocess.STDOUT,
        input=dataclasses.replace(patch, diff=diff).dump())
    for line in done.stdout.decode(errors='replace').splitlines():
        if done.returncode or 'offset' in line or 'fuzz' in line:
            yield f'patches/{patch.name}: GNU patch says: {line}'
