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

"""From the tree to the repository: our lines, and nothing else."""

import os
import pathlib
import shutil

from . import compose
from . import SeriesError
from .git import Git
from .mail import Patch
from .project import Project

READY = 'ready'  # the last file of a staging folder: all else is whole


def write(git: Git, project: Project, tip: str,
          target: pathlib.Path) -> list[Patch]:
    """Write the commits base..tip as patches and files below a folder.

    :returns: the patches
    :raises: SeriesError naming the commit that doesn't fit the form
    """
    base = compose.ensure_base(git, project)
    if git.run('merge-base', '--is-ancestor', base, tip,
               check=False).returncode:
        raise SeriesError('tree/ does not stand on the base: git -C tree '
                          'rebase --onto base <the commit below the first '
                          'of the series>')
    owned = git.entries(base)
    adder: dict[str, str] = {}
    written = []
    (target / 'patches').mkdir(parents=True)
    commits = git.out('rev-list', '--reverse', '--topo-order', '--parents',
                      '%s..%s' % (base, tip)).splitlines()
    for number, line in enumerate(commits, 1):
        commit, *parents = line.split()
        subject = git.out('show', '-s', '--format=%s', commit)
        title = '%s (%s)' % (commit[:12], subject)
        if len(parents) != 1:
            raise SeriesError('%s is a merge: rebase the series' % title)
        if subject.startswith(('fixup!', 'squash!', 'amend!')):
            raise SeriesError('%s: fold it in first: git -C tree rebase -i '
                              '--autosquash base' % title)
        changes = git.changes(parents[0], commit)
        entries = git.entries(commit, *changes) if changes else {}
        ours = {path: entries.get(path) for path in changes
                if path not in owned}
        for path, entry in ours.items():
            _addition(project, title, path, entry, adder)
        patch = Patch.of_commit(
            git, commit, number,
            {p: s for p, s in changes.items() if p in owned},
            {p: entry[0] for p, entry in ours.items()}, project.context_lines)
        (target / 'patches' / patch.name).write_bytes(patch.dump())
        for path, entry in ours.items():
            write_file(git, target / path, *entry)
        written.append(patch)
    return written


def _addition(project, title, path, entry, adder):
    """Hold a file of the series to the form."""
    if path in adder:
        raise SeriesError(
            '%s changes %s, which %s adds: a file of ours belongs whole to '
            'one commit; git commit --fixup and git rebase --autosquash' % (
                title, path, adder[path]))
    if not path.startswith(tuple(root + '/' for root in project.roots)):
        raise SeriesError('%s adds %s, outside of %s' % (
            title, path, ', '.join(project.roots)))
    if '\n' in path:
        raise SeriesError('%s adds %r: no line break in a name' % (
            title, path))
    if entry[0] not in ('100644', '100755'):
        raise SeriesError('%s adds %s, no plain file (mode %s)' % (
            title, path, entry[0]))
    adder[path] = title


def write_file(git: Git, path: pathlib.Path, mode: str, blob: str) -> None:
    """Write what git keeps as this blob."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(git.run('cat-file', 'blob', blob).stdout)
    path.chmod(0o755 if mode == '100755' else 0o644)


def own_files(project: Project) -> set[str]:
    """Files of the series that lie in the repository, patches included."""
    found = set()
    for root in (*project.roots, 'patches'):
        for path in (project.root / root).rglob('*'):
            if path.is_file() and '__pycache__' not in path.parts:
                found.add(str(path.relative_to(project.root)))
    return found


def save(project: Project) -> str:
    """Write the tree's commits to the repository.

    :returns: what changed
    :raises: SeriesError; the repository is then as it was
    """
    git = Git(project.tree)
    if not git.dir.exists():
        raise SeriesError('there is no tree/: make tree')
    compose.interrupted(git)
    changed = git.out('status', '--porcelain', worktree=True).splitlines()
    if any(not line.startswith('??') for line in changed):
        raise SeriesError('tree/ has changes that are in no commit; commit '
                          'them first:\n' + compose.shorten(changed))
    if changed:
        print('note: not saved, as no commit has them:\n' +
              compose.shorten(changed))
    head = git.resolve('HEAD')
    before = git.resolve(compose.SAVED)
    _stage(git, project, head)
    finish(project)
    compose.mark(git, head, compose.compose(git, project))
    said = 'saved %s, %s commits' % (head[:12], git.out(
        'rev-list', '--count', 'base..HEAD'))
    if before in (None, head) or compose.same_series(git, before, head):
        return said + ': nothing has changed'
    base = git.resolve('base^{commit}')
    if base in (before, head):  # range-diff takes no empty range
        return git.out('log', '--format=%s %%h %%s' % (
            '+' if before == base else '-'), '--reverse',
            before, head, '^base') + '\n' + said
    return git.out('range-diff', '--no-color', 'base..%s' % before,
                   'base..%s' % head) + '\n' + said


def _stage(git, project, head):
    shutil.rmtree(project.staging, ignore_errors=True)
    project.staging.mkdir()
    write(git, project, head, project.staging)
    (project.staging / READY).touch()
    os.sync()


def finish(project: Project) -> bool:
    """Put in place what a save has made ready, also one that was killed.

    :returns: whether there was anything to put
    """
    staging = project.staging
    if not (staging / READY).exists():
        shutil.rmtree(staging, ignore_errors=True)
        return False
    fresh = {str(path.relative_to(staging)): path
             for path in staging.rglob('*')
             if path.is_file() and path.name != READY}
    for name in own_files(project) - set(fresh):
        (project.root / name).unlink()
    for name, path in fresh.items():
        target = project.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, str(target) + '.saving')
        os.replace(str(target) + '.saving', target)
    for root in project.roots:
        top = project.root / root
        for path in [*sorted(top.rglob('*'), reverse=True), top]:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    (staging / READY).unlink()
    shutil.rmtree(staging)
    return True
