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

"""From the repository to the tree: the base and one commit a patch."""

import os
import pathlib
import shutil
import tarfile
import tempfile
import time

from . import SeriesError
from .git import Git
from .mail import Patch
from .project import Project

BASE_IDENTITY = {
    'GIT_AUTHOR_NAME': 'base', 'GIT_AUTHOR_EMAIL': 'base@localhost',
    'GIT_COMMITTER_NAME': 'base', 'GIT_COMMITTER_EMAIL': 'base@localhost',
    'GIT_AUTHOR_DATE': '2026-01-01T00:00:00Z',
    'GIT_COMMITTER_DATE': '2026-01-01T00:00:00Z'}
# What work in the tree leaves behind and no commit should take up.
EXCLUDE = ('__pycache__/', '*.pyc', '*.so', '/build/', '.stestr/', '.tox/',
           '.mypy_cache/', '/.venv/', '*.egg-info/', '/instances/',
           'nova/virt/libvirt/storage/_*.c', '/dist/', 'doc/build/')
SAVED = 'refs/series/saved'        # HEAD of the tree at the last save
COMPOSED = 'refs/series/composed'  # what the repository came to then
MOVING = 'refs/series/moving'      # a checkout that was begun


def patches(project: Project) -> list[Patch]:
    """All patches of the repository, in order."""
    if not project.patches.is_dir():
        return []
    return [Patch.parse(path.name, path.read_bytes())
            for path in sorted(project.patches.glob('*.patch'))]


def ensure_base(git: Git, project: Project) -> str:
    """Make sure that a repository has the base commit; returns it.

    It is the same commit whoever makes it, kept in the cache once made.
    """
    cache = Git(project.cache / ('%s.git' % project.sha256[:12]), bare=True)
    if not cache.dir.exists():
        _make_base(cache, project)
    if not git.resolve('refs/tags/base'):
        git.run('fetch', '--quiet', '--no-tags', cache.dir,
                'refs/tags/base:refs/tags/base')
    return git.resolve('refs/tags/base')


def _make_base(cache, project):
    sdist = project.sdist()
    with tempfile.TemporaryDirectory(dir=project.cache) as scratch:
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter='data')
        source = pathlib.Path(scratch) / ('%s-%s' % (
            project.name, project.version))
        git = Git(source)
        git.run('init', '--quiet', '-b', 'series', source)
        git.run('add', '--all', '--force', worktree=True)
        git.run('commit', '--quiet', '-m', '%s %s' % (
            project.name, project.version), worktree=True, env=BASE_IDENTITY)
        git.run('tag', 'base')
        made = pathlib.Path(scratch) / 'made.git'
        git.run('clone', '--quiet', '--bare', source, made)
        os.rename(made, cache.dir)


def compose(git: Git, project: Project) -> str:
    """Make the series' commits in a repository; moves no branch.

    :returns: the last commit
    :raises: SeriesError naming the patch, the file and the hunk
    """
    commit = ensure_base(git, project)
    with tempfile.TemporaryDirectory() as scratch:
        index = {'GIT_INDEX_FILE': os.path.join(scratch, 'index')}
        git.run('read-tree', commit, env=index)
        for patch in patches(project):
            commit = _commit(git, project, patch, commit, index, scratch)
    return commit


def _commit(git, project, patch, parent, index, scratch):
    lines = []
    for path, mode in patch.adds.items():
        try:
            blob = git.out('hash-object', '-w', '--no-filters',
                           (project.root / path).absolute())
        except SeriesError as error:
            raise SeriesError('patches/%s adds %s, which is not there: '
                              'restore it, or make save\n%s' % (
                                  patch.name, path, error)) from None
        lines.append('%s %s\t%s' % (mode, blob, path))
    lines += ['0 %s\t%s' % ('0' * 40, path) for path in patch.deletes]
    if lines:
        git.run('update-index', '-z', '--index-info', env=index,
                stdin=('\0'.join(lines) + '\0').encode(
                    errors='surrogateescape'))
    if patch.diff:
        done = git.run('apply', '--cached', '--unidiff-zero', '--verbose',
                       '-', env=index, stdin=patch.diff, check=False)
        if done.returncode:
            raise SeriesError(_no_fit(git, patch, parent, done.stderr))
    who = _author(git, patch, scratch)
    return git.out(
        'commit-tree', git.out('write-tree', env=index), '-p', parent,
        env=who, stdin=_message(patch))


def _no_fit(git, patch, parent, stderr):
    """Both sides of a hunk that doesn't apply."""
    text = stderr.decode(errors='replace')
    where = [line for line in text.splitlines() if line.startswith('error:')]
    shown = []
    for line in where:
        name, _colon, number = line.rpartition(':')
        path = name.removeprefix('error: patch failed: ')
        if path != name and number.isdigit():
            lines = git.out('show', '%s:%s' % (parent, path),
                            check=False).splitlines()
            start = int(number)
            shown += ['%s, line %d, has:' % (path, start)]
            shown += ['    ' + x for x in lines[start - 1:start + 6]]
            mark = ('@@ -%d' % start).encode()
            hunk = next((h for h in patch.diff.split(b'\n@@ ')
                         if (b'@@ ' + h).startswith(mark)), b'')
            shown += ['the patch expects:']
            shown += ['    ' + x for x in hunk.decode(
                errors='replace').splitlines()[1:12]]
    return ('patches/%s does not apply:\n%s\n%s\nmend the patch, or take the '
            'file from the last good commit' % (
                patch.name, '\n'.join(where) or text, '\n'.join(shown)))


def _author(git, patch, scratch):
    """Author and date; the committer is the author, so that names agree."""
    done = git.run('mailinfo', '-k', os.path.join(scratch, 'message'),
                   os.path.join(scratch, 'diff'), stdin=patch.dump())
    found = dict(line.split(': ', 1) for line in done.stdout.decode(
        errors='surrogateescape').splitlines() if ': ' in line)
    try:
        name, email, date = found['Author'], found['Email'], found['Date']
    except KeyError as error:
        raise SeriesError('patches/%s has no %s in its header' % (
            patch.name, error)) from None
    return {'GIT_AUTHOR_NAME': name, 'GIT_COMMITTER_NAME': name,
            'GIT_AUTHOR_EMAIL': email, 'GIT_COMMITTER_EMAIL': email,
            'GIT_AUTHOR_DATE': date, 'GIT_COMMITTER_DATE': date}


def _message(patch):
    subject = patch.subject.encode(errors='surrogateescape')
    body = patch.message.strip(b'\n')
    return subject + b'\n' + (b'\n' + body + b'\n' if body else b'')


def make_tree(project: Project) -> str:
    """Bring tree/ to what the repository says.

    :returns: what was done, in a line
    :raises: SeriesError if tree/ holds work that isn't saved
    """
    if not (project.tree / '.git').exists():
        return _new_tree(project)
    git = Git(project.tree)
    moving = git.resolve(MOVING)
    if moving:  # a checkout was cut off: the index or files are between two
        _checkout(git, moving)
    head = git.resolve('HEAD')
    commit = compose(git, project)
    if commit == git.resolve(COMPOSED) and head == git.resolve(SAVED):
        return 'tree/ is at %s already' % head[:12]
    if _same_series(git, head, commit):
        _mark(git, head, commit)
        return 'tree/ is at %s already' % head[:12]
    if git.out('status', '--porcelain', worktree=True):
        raise SeriesError(
            'tree/ has changes that are in no commit; commit them (or git '
            'stash), then make save, or git reset --hard to drop them')
    if head != git.resolve(SAVED):
        raise SeriesError(
            'tree/ holds commits that are not in the repository: make save '
            'writes them there; to drop them: git -C tree update-ref %s HEAD'
            % SAVED)
    kept = 'refs/series/kept/%s' % time.strftime('%Y%m%d-%H%M%S')
    git.run('update-ref', kept, head)
    _checkout(git, commit)
    _mark(git, commit, commit)
    return 'tree/ is at %s now; what was there is %s' % (commit[:12], kept)


def _new_tree(project):
    if project.tree.exists() and any(project.tree.iterdir()):
        raise SeriesError('tree/ is there and is no git repository; move it '
                          'away')
    new = project.root / 'tree.new'
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    git = Git(new)
    git.run('init', '--quiet', '-b', 'series', new)
    (git.dir / 'info').mkdir(exist_ok=True)
    (git.dir / 'info' / 'exclude').write_text('\n'.join(EXCLUDE) + '\n')
    commit = compose(git, project)
    git.run('update-ref', 'refs/heads/series', commit)
    git.run('reset', '--quiet', '--hard', commit, worktree=True)
    _mark(git, commit, commit)
    if project.tree.exists():
        project.tree.rmdir()
    os.rename(new, project.tree)
    return 'tree/ is new, at %s' % commit[:12]


def _checkout(git, commit):
    git.run('update-ref', MOVING, commit)
    git.run('reset', '--quiet', '--hard', commit, worktree=True)
    git.run('update-ref', '-d', MOVING)


def _mark(git, head, composed):
    git.run('update-ref', SAVED, head)
    git.run('update-ref', COMPOSED, composed)


def _same_series(git, one, other):
    """Whether two series differ in nothing but names of commits."""
    def told(tip):
        return git.out('log', '--reverse', '--format=%T%n%an%n%ae%n%ad%n%B',
                       'base..%s' % tip)
    return told(one) == told(other) and (
        git.resolve(one + '^{tree}') == git.resolve(other + '^{tree}'))
