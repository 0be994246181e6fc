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
    owned = git.entries(base)
    commits = git.out('rev-list', '--reverse', '--topo-order', '--parents',
                      '%s..%s' % (base, tip)).splitlines()
    adder: dict[str, str] = {}
    written = []
    (target / 'patches').mkdir(parents=True)
    for number, line in enumerate(commits, 1):
        commit, *parents = line.split()
        title = '%s (%s)' % (commit[:12], git.out(
            'show', '-s', '--format=%s', commit))
        if len(parents) != 1:
            raise SeriesError('%s is a merge: rebase the series' % title)
        if git.out('show', '-s', '--format=%s', commit).startswith(
                ('fixup!', 'squash!', 'amend!')):
            raise SeriesError('%s: fold it in first: git -C tree rebase -i '
                              '--autosquash base' % title)
        changes = git.changes(parents[0], commit)
        ours = {p: s for p, s in changes.items() if p not in owned}
        for path in ours:
            if path in adder:
                raise SeriesError(
                    '%s changes %s, which %s adds: a file of ours belongs '
                    'whole to one commit; git commit --fixup and git rebase '
                    '--autosquash' % (title, path, adder[path]))
            if not path.startswith(tuple(r + '/' for r in project.roots)):
                raise SeriesError('%s adds %s, outside of %s' % (
                    title, path, ', '.join(project.roots)))
            adder[path] = title
        entries = git.entries(commit)
        for path in changes:
            mode = entries.get(path, ('100644',))[0]
            if mode not in ('100644', '100755') and path in ours:
                raise SeriesError('%s adds %s, no plain file (mode %s)' % (
                    title, path, mode))
        patch = Patch.of_commit(
            git, commit, number,
            {p: s for p, s in changes.items() if p in owned},
            {p: entries[p][0] for p in ours}, project.context_lines)
        (target / 'patches' / patch.name).write_bytes(patch.dump())
        for path in ours:
            _write_file(git, target / path, *entries[path])
        written.append(patch)
    return written


def _write_file(git, path, mode, blob):
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
    if git.out('status', '--porcelain', '--untracked-files=no',
               worktree=True):
        raise SeriesError('tree/ has changes that are in no commit')
    head = git.resolve('HEAD')
    before = git.resolve(compose.SAVED)
    _stage(git, project, head)
    finish(project)
    compose._mark(git, head, compose.compose(git, project))
    base = git.resolve('refs/tags/base')
    if before in (None, head, base) or head == base:
        return 'saved %s' % head[:12]
    return git.out('range-diff', '--no-color', 'base..%s' % before,
                   'base..%s' % head)


def _stage(git, project, head):
    shutil.rmtree(project.staging, ignore_errors=True)
    project.staging.mkdir()
    write(git, project, head, project.staging)
    (project.staging / READY).touch()
    os.sync()


def finish(project: Project) -> None:
    """Put in place what a save has made ready, also one that was killed."""
    staging = project.staging
    if not (staging / READY).exists():
        shutil.rmtree(staging, ignore_errors=True)
        return
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
