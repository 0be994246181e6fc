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

import os
import pathlib
import re
import subprocess
import tempfile

from . import compose
from . import save
from .git import Git
from .mail import DIFF_TEXT
from .mail import Patch
from .project import Project

EMPTY = 'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'  # the empty file's blob
# What git am takes for a header where it stands first in a body.
HEADER = re.compile(rb'\A\s*>?(From|Date|Subject)[ :]')


def check(project: Project) -> list[str]:
    """All that is wrong, each with its place and how to mend it."""
    with tempfile.TemporaryDirectory() as scratch, (
            compose.workshop(project)) as git:
        base = compose.ensure_base(git, project)
        series = compose.patches(project)
        owned = git.entries(base)
        faults = [*_complete(project, series, owned), *_copies(project, owned),
                  *(f for patch in series for f in _form(project, patch))]
        if faults:
            return faults
        tip = compose.compose(git, project)
        faults = _tree_agrees(project, git, tip)
        faults += _round_trip(project, git, tip, pathlib.Path(scratch))
        return faults + _gnu_patch(
            project, git, base, tip, series, pathlib.Path(scratch))


def _complete(project, series, owned):
    """The set of files: nothing missing, nothing left over or twice."""
    adder = {}
    for patch in series:
        for path in patch.adds:
            if path in adder:
                yield ('%s is added by patches/%s and by patches/%s; fold the '
                       'two commits' % (path, adder[path], patch.name))
            adder[path] = patch.name
            if path in owned:
                yield 'patches/%s adds %s, which the base owns' % (
                    patch.name, path)
            if not (project.root / path).is_file():
                yield ('patches/%s adds %s, which is not in the repository; '
                       'restore it or make save' % (patch.name, path))
    expected = set(adder) | {'patches/' + patch.name for patch in series}
    for path in sorted(save.own_files(project) - expected):
        yield '%s: no patch adds it; remove it, or make save' % path
    for number, patch in enumerate(series, 1):
        if not patch.name.startswith('%04d-' % number):
            yield 'patches/%s: number %04d is missing; make save' % (
                patch.name, number)


def _copies(project, owned):
    """No file of the base may lie here, wherever and whatever its name."""
    blobs = {blob: path for path, (_mode, blob) in owned.items()}
    tracked = Git(project.root).run('ls-files', '-s', '-z',
                                    check=False).stdout
    for line in filter(None, tracked.split(b'\0')):
        meta, name = os.fsdecode(line).split('\t', 1)
        blob = meta.split()[1]
        if blob in blobs and blob != EMPTY and name != 'LICENSE':
            yield "%s is the base's own file %s; git rm it" % (
                name, blobs[blob])


def _form(project, patch: Patch):
    place = 'patches/%s: ' % patch.name
    if HEADER.search(patch.message):
        yield place + ('git am would take the first line of the body for a '
                       'header: reword')
    if len(patch.subject) > 72:
        yield '%sits subject has %d characters, 72 are allowed: reword' % (
            place, len(patch.subject))
    if not patch.message.strip():
        yield place + 'no body: say why (git commit --amend)'
    found = DIFF_TEXT.search(patch.message)
    if found:
        line = patch.head[:len(patch.head) - len(patch.message) +
                          found.start()].count(b'\n') + 1
        yield ('%sline %d of the message reads like a diff (%r); GNU patch '
               'would apply it: reword' % (
                   place, line, found.group().decode(errors='replace')))
    if b'\nGIT binary patch\n' in patch.diff:
        yield place + ('changes a binary file of the base, which GNU patch '
                       'can not: add another file instead')
    yield from _context(project, place, patch)
    if not any(path.startswith(project.notes) for path in patch.adds):
        for path, number, line in _new_lines(project, patch):
            if re.search(project.note_pattern, line):
                yield ('%s%s, line %d (%s): an operator sees this, and the '
                       'commit adds no release note below %s: reno new' % (
                           place, path, number, line.strip(), project.notes))
                break


def _new_lines(project, patch):
    """File, number and text of each line that a patch brings."""
    path, number = '', 0
    for line in patch.diff.decode(errors='replace').split('\n'):
        if line.startswith('diff --git '):
            path = line.rpartition(' b/')[2]
        elif line.startswith('@@ '):
            number = int(re.search(r'\+(\d+)', line).group(1)) - 1
        elif line.startswith(('+', ' ')) and not line.startswith('+++ '):
            number += 1
            if line[0] == '+' and 'tests' not in path.split('/'):
                yield path, number, line[1:]
    for path in patch.adds:
        if path.endswith('.py') and 'tests' not in path.split('/') and (
                project.root / path).is_file():
            text = (project.root / path).read_text(errors='replace')
            for number, line in enumerate(text.split('\n'), 1):
                yield path, number, line


def _context(project, place, patch):
    """At most so many lines of the base around and between our lines."""
    run, path = 0, ''
    start = patch.dump().count(b'\n') - patch.diff.count(b'\n')
    for number, line in enumerate(patch.diff.split(b'\n'), start + 1):
        if line.startswith(b'diff --git '):
            path = line.rpartition(b' b/')[2].decode(errors='replace')
        run = run + 1 if line.startswith(b' ') else 0
        if run > 2 * project.context_lines:
            yield ('%sline %d (%s): %d lines of context, %d allowed: make '
                   'tree save' % (place, number, path, run,
                                  2 * project.context_lines))


def _tree_agrees(project, git, tip):
    if not (project.tree / '.git').exists():
        return []
    faults = []
    changed = git.out('status', '--porcelain', worktree=True).splitlines()
    if changed:
        faults.append('tree/ has changes that are in no commit; commit them '
                      'there and make save:\n' + compose.shorten(changed))
    for path, status in sorted(git.changes(tip, 'HEAD').items()):
        faults.append('%s is not the same in tree/ and in the repository '
                      '(%s); make save writes the tree here' % (path, status))
    if not faults and not compose.same_series(git, tip, 'HEAD'):
        faults.append('the commits of tree/ and of the repository come to the '
                      'same files and differ in number, message or author; '
                      'make save writes those of the tree here')
    return faults


def _round_trip(project, git, tip, scratch):
    """What is here must be what a save would write, to the byte.

    A hunk that applies with an offset is written back with other numbers.
    """
    fresh = scratch / 'fresh'
    save.write(git, project, tip, fresh)
    for path in sorted(p for p in fresh.rglob('*') if p.is_file()):
        name = str(path.relative_to(fresh))
        here = project.root / name
        if not here.is_file():
            yield '%s is missing; make save' % name
            continue
        old, new = (f.read_bytes().split(b'\n') for f in (here, path))
        if old != new:
            line = next((n for n, (a, b) in enumerate(zip(old, new), 1)
                         if a != b), min(len(old), len(new)) + 1)
            yield ('%s, line %d: a save would write it otherwise (a hunk with '
                   'an offset, or an edit by hand); make tree save' % (
                       name, line))


def _gnu_patch(project, git, base, tip, series, scratch):
    """GNU patch must build the same files, with no offset and no fuzz."""
    work = scratch / 'work'
    work.mkdir()
    changes = git.changes(base, tip)
    owned = git.entries(base)
    for path in changes:
        if path in owned:
            save.write_file(git, work / path, *owned[path])
    faults = []
    for patch in series:
        for path in patch.deletes:
            (work / path).unlink()
        if not patch.diff and not DIFF_TEXT.search(patch.message):
            continue
        done = subprocess.run(
            ['patch', '-p1', '--fuzz=0', '--force', '--no-backup-if-mismatch',
             '-i', project.patches / patch.name], cwd=work,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in done.stdout.splitlines():
            if done.returncode or 'offset' in line or 'fuzz' in line:
                faults.append('patches/%s: GNU patch says: %s' % (
                    patch.name, line))
    final = git.entries(tip)
    for path in changes:
        if path not in owned:
            continue
        here = work / path
        blob = final.get(path, (None, None))[1]
        if blob is None and here.exists() or blob and (
                not here.exists() or
                git.out('hash-object', '--no-filters', here) != blob):
            faults.append('%s: git and GNU patch do not build the same' % path)
    return faults
