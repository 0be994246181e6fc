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
from .git import File
from .git import Git
from .git import identity
from .git import NO_FILE
from .mail import Patch
from .mail import SEPARATOR
from .project import Project

READY = 'ready'  # the last file of a staging folder: all else is whole


def write(git: Git, project: Project, tip: str, target: pathlib.Path) -> None:
    """Write the commits base..tip as patches and files below a folder.

    :raises: SeriesError naming the commit that doesn't fit the form
    """
    base = compose.ensure_base(git, project)
    if git.run('merge-base', '--is-ancestor', base, tip,
               check=False).returncode:
        raise SeriesError('tree/ does not stand on the base: git -C tree '
                          'rebase --onto base <the commit below the first '
                          'of the series>')
    owned = git.files(base)
    (target / 'patches').mkdir(parents=True)
    commits = git.out('log', '-z', '--reverse', '--topo-order',
                      '--format=%H%n%P%n%s%n%f%n%B', f'{base}..{tip}')
    for number, told in enumerate(filter(None, commits.split('\0')), 1):
        commit, parents, subject, slug, message = told.split('\n', 4)
        title = f'{commit[:12]} ({subject})'
        if len(parents.split()) != 1:
            raise SeriesError(f'{title} is a merge: rebase the series')
        if subject.startswith(('fixup!', 'squash!', 'amend!')):
            raise SeriesError(f'{title}: fold it in first: git -C tree rebase '
                              '-i --autosquash base')
        if os.fsdecode(SEPARATOR) in message + '\n':
            raise SeriesError(f'{title}: a line "---" would end the message '
                              'there; reword')
        changes = git.changes(parents, commit)
        ours = {path: file for path, file in changes.items()
                if path not in owned}
        for path, file in ours.items():
            _ours(project, title, path, file)
        files = {path: file.mode for path, file in ours.items()
                 if file.status == 'A'}
        files.update((path, NO_FILE) for path, file in changes.items()
                     if path in owned and file.mode == NO_FILE)
        patch = Patch.of_commit(
            git, commit, f'{number:04d}-{slug[:52].strip("-.")}.patch', files,
            project.context_lines, ours.keys() - files.keys())
        (target / 'patches' / patch.name).write_bytes(patch.dump())
    for path, file in git.files(tip).items():
        if path not in owned:
            write_file(git, target / path, file)


def _ours(project, title, path, file):
    """Hold a file of the series to the form."""
    if not path.startswith(tuple(root + '/' for root in project.roots)):
        raise SeriesError(f'{title} adds {path}, outside of '
                          f'{", ".join(project.roots)}')
    if '\n' in path:
        raise SeriesError(f'{title} adds {path!r}: no line break in a name')
    if file.mode not in ('100644', '100755', NO_FILE):
        raise SeriesError(f'{title} adds {path}, no plain file (mode '
                          f'{file.mode})')


def write_file(git: Git, path: pathlib.Path, file: File) -> None:
    """Write what git keeps as this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(git.run('cat-file', 'blob', file.blob).stdout)
    path.chmod(0o755 if file.mode == '100755' else 0o644)


def own_files(project: Project, top: pathlib.Path) -> set[str]:
    """Files of the series that lie below a folder, patches included."""
    return {str(path.relative_to(top))
            for root in (*project.roots, 'patches')
            for path in (top / root).rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}


def save(project: Project) -> str:
    """Write the tree's commits to the repository.

    :returns: what changed
    :raises: SeriesError; the repository is then as it was
    """
    git = Git(project.tree)
    if not git.dir.exists():
        raise SeriesError('there is no tree/: make tree')
    compose.interrupted(git)
    changed = compose.uncommitted(git, '--untracked-files=no')
    if changed:
        raise SeriesError('tree/ has changes that are in no commit; commit '
                          'them first:\n' + changed)
    untracked = compose.uncommitted(git)
    if untracked:
        print('note: not saved, as no commit has them:\n' + untracked)
    head = git.resolve('HEAD')
    before = git.resolve(compose.SAVED)
    shutil.rmtree(project.staging, ignore_errors=True)
    project.staging.mkdir()
    write(git, project, _with_the_rest(git, head), project.staging)
    (project.staging / READY).touch()
    os.sync()
    finish(project)
    tip = compose.compose(git, project)
    count, topic = len(compose.commits(git, head)), compose.partial(git)[0]
    end = [git.resolve('base^{commit}'), *compose.commits(git, tip)][count]
    compose.mark(git, tip, topic, end, f'update {compose.SAVED} {head}')
    said = f'saved {head[:12]}, {count} commits'
    if topic:
        said += f'; those after topic {topic} are kept'
    if before in (None, head) or compose.same_series(git, before, head):
        return said + ': nothing has changed'
    return _difference(git, before, head) + '\n' + said


def _with_the_rest(git, head):
    """The whole series where tree/ ends with a topic.

    :returns: the last commit, with all that come after the topic put on head
    :raises: SeriesError if they no longer apply
    """
    topic, end = compose.partial(git)
    if not topic:
        return head
    tip = git.resolve(compose.COMPOSED)
    for commit in compose.commits(git, tip, end):
        *author, message = git.out(
            'log', '-1', '--date=raw', '--format=%an%n%ae%n%ad%n%B',
            commit).split('\n', 3)
        title = f'{commit[:12]} ({message.splitlines()[0]})'
        # What it did, on head: a merge whose base is the commit before it.
        here = git.out('commit-tree', head + '^{tree}', '-p', commit + '^',
                       '-m', 'head', env=compose.BASE_IDENTITY)
        done = git.run('merge-tree', '--write-tree', '--name-only', here,
                       commit, check=False)
        tree, _newline, said = os.fsdecode(done.stdout).partition('\n')
        if done.returncode:
            raise SeriesError(
                f'nothing is saved: after topic {topic} comes {title}, which '
                f'does not apply on what is in tree/:\n{said.strip()}\n'
                'mend it in the whole series: git -C tree rebase --onto HEAD '
                f'{end[:12]} {tip[:12]}, then git -C tree update-ref -d '
                f'{compose.PARTIAL}{topic}, make save')
        if tree == git.resolve(head + '^{tree}') and git.changes(
                commit + '^', commit):
            print(f'note: {title} has nothing left to do and goes')
            continue
        head = git.out('commit-tree', tree, '-p', head,
                       env=identity(*author), stdin=os.fsencode(message))
    return head


def _difference(git, before, head):
    base = git.resolve('base^{commit}')
    if base in (before, head):  # range-diff takes no empty range
        sign = '+' if before == base else '-'
        return git.out('log', f'--format={sign} %h %s', '--reverse', before,
                       head, '^base')
    return git.out('range-diff', '--no-color', f'base..{before}',
                   f'base..{head}')


def finish(project: Project) -> bool:
    """Put in place what a save has made ready, also one that was killed.

    :returns: whether there was anything to put
    """
    staging = project.staging
    if not (staging / READY).exists():
        shutil.rmtree(staging, ignore_errors=True)
        return False
    fresh = own_files(project, staging)
    for name in own_files(project, project.root) - fresh:
        (project.root / name).unlink()
    for root in project.roots:
        top = project.root / root
        for folder in [*sorted(top.rglob('*'), reverse=True), top]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    for name in fresh:
        target = project.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(staging / name, f'{target}.saving')
        os.replace(f'{target}.saving', target)
    (staging / READY).unlink()
    shutil.rmtree(staging)
    return True
