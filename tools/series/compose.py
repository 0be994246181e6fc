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

from collections.abc import Iterator
import contextlib
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

    :raises: SeriesError if the tag base stands for anything else
    """
    cache = Git(project.cache / ('%s.git' % project.sha256[:12]), bare=True)
    if not cache.dir.exists():
        _make_base(cache, project)
    if not git.resolve('refs/tags/base'):
        git.run('fetch', '--quiet', '--no-tags', cache.dir,
                'refs/tags/base:refs/tags/base')
    if git.resolve('base^{tree}') != cache.resolve('base^{tree}'):
        raise SeriesError(
            'the tag base in %s is not %s %s as it was released; git tag -d '
            'base there, and make tree' % (
                git.path, project.name, project.version))
    return git.resolve('base^{commit}')


def _make_base(cache, project):
    sdist = project.sdist()
    with tempfile.TemporaryDirectory(dir=project.cache) as scratch:
        with tarfile.open(sdist) as archive:
            # Python 3.11.2 (Debian 12) has no filters; the sum is proven.
            archive.extraction_filter = getattr(tarfile, 'data_filter', None)
            archive.extractall(scratch)
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
        try:
            os.rename(made, cache.dir)
        except OSError:  # somebody else has made the same one meanwhile
            if not cache.dir.exists():
                raise


@contextlib.contextmanager
def workshop(project: Project) -> Iterator[Git]:
    """A repository to compose in: the tree's, or one that goes again."""
    if (project.tree / '.git').exists():
        yield Git(project.tree)
        return
    with tempfile.TemporaryDirectory() as scratch:
        git = Git(pathlib.Path(scratch), bare=True)
        git.run('init', '--quiet', '--bare', scratch)
        yield git


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
            raise SeriesError('patches/%s adds %s, which is not there: git '
                              'checkout -- %s, or make save\n%s' % (
                                  patch.name, path, path, error)) from None
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
    done = git.run('mailinfo', '-k', '--no-inbody-headers', os.path.join(scratch, 'message'),
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


def make_tree(project: Project, keep_work: bool = False) -> str:
    """Bring tree/ to what the repository says.

    :param keep_work: be content with a tree that goes on from there
    :returns: what was done, in a line
    :raises: SeriesError if tree/ holds work that isn't saved
    """
    if not (project.tree / '.git').exists():
        return _new_tree(project)
    git = Git(project.tree)
    _exclude(git, project)
    if git.resolve(MOVING):
        _end_checkout(git)
    head = git.resolve('HEAD')
    commit = compose(git, project)
    work = _unsaved(git, head, commit)
    if work and keep_work and commit == git.resolve(COMPOSED):
        return 'tree/ has work that is not saved, and is used as it is'
    if work:
        raise SeriesError(work)
    if same_series(git, head, commit) or commit == git.resolve(COMPOSED):
        mark(git, head, commit)
        return 'tree/ is at %s' % head[:12]
    kept = _keep(git, head)
    _checkout(git, commit)
    mark(git, commit, commit)
    return 'tree/ is at %s now; what was there is %s' % (commit[:12], kept)


def _unsaved(git, head, commit):
    """What would be lost if tree/ moved on, and what to do; or nothing."""
    interrupted(git)
    changed = git.out('status', '--porcelain', worktree=True).splitlines()
    if changed:
        return ('tree/ has changes that are in no commit:\n%s\ncommit them '
                'there (or git stash) and make save; to drop them: git -C '
                'tree reset --hard, git -C tree clean -d' % shorten(changed))
    if head != git.resolve(SAVED) and not same_series(git, head, commit):
        return ('tree/ holds commits that are not in the repository; make '
                'save writes them there; to drop them: git -C tree reset '
                '--hard %s' % SAVED)


def interrupted(git: Git) -> None:
    """:raises: SeriesError in the midst of a rebase, am or merge"""
    for name in ('rebase-merge', 'rebase-apply', 'MERGE_HEAD',
                 'CHERRY_PICK_HEAD', 'REVERT_HEAD'):
        if (git.dir / name).exists():
            raise SeriesError(
                'tree/ is in the midst of something (.git/%s): see git -C '
                'tree status, and end it there' % name)


def shorten(lines: list[str], most: int = 10) -> str:
    more = ['    and %d more' % (len(lines) - most)] if len(lines) > most else []
    return '\n'.join(['    ' + line for line in lines[:most]] + more)


def _new_tree(project):
    if project.tree.exists() and any(project.tree.iterdir()):
        raise SeriesError('tree/ is there and is no git repository; move it '
                          'away')
    new = project.root / 'tree.new'
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    git = Git(new)
    git.run('init', '--quiet', '-b', 'series', new)
    _exclude(git, project)
    commit = compose(git, project)
    git.run('update-ref', 'refs/heads/series', commit)
    git.run('reset', '--quiet', '--hard', commit, worktree=True)
    mark(git, commit, commit)
    if project.tree.exists():
        project.tree.rmdir()
    os.rename(new, project.tree)
    return 'tree/ is new, at %s' % commit[:12]


def _exclude(git, project):
    (git.dir / 'info').mkdir(exist_ok=True)
    (git.dir / 'info' / 'exclude').write_text(
        '\n'.join(project.exclude) + '\n')


def _keep(git, commit):
    """Give what is about to be left a name, which is returned."""
    name = 'refs/series/kept/%s-%s' % (
        time.strftime('%Y%m%d-%H%M%S'), commit[:12])
    git.run('update-ref', name, commit)
    return name


def _end_checkout(git):
    """End a checkout that was cut off: some files are old, others new.

    Somebody may have worked on since: all is kept first.
    """
    # Left by the git that was killed; see project.locked.
    (git.dir / 'index.lock').unlink(missing_ok=True)
    found = git.out('stash', 'create', worktree=True, check=False,
                    env=BASE_IDENTITY)
    if found:
        print('ending a checkout of tree/ that was cut off; the files as they '
              'were are', _keep(git, found))
    _checkout(git, git.resolve(MOVING))


def _checkout(git, commit):
    git.run('update-ref', MOVING, commit)
    git.run('reset', '--quiet', '--hard', commit, worktree=True)
    git.run('update-ref', '-d', MOVING)


def mark(git: Git, head: str, composed: str) -> None:
    """Note that a head of the tree and the repository agree."""
    git.run('update-ref', SAVED, head)
    git.run('update-ref', COMPOSED, composed)


def same_series(git: Git, one: str, other: str) -> bool:
    """Whether two series differ in nothing but names of commits."""
    def told(tip):
        return git.out('log', '--reverse', '--format=%T%n%an%n%ae%n%ad%n%B',
                       'base..%s' % tip)
    return told(one) == told(other) and (
        git.resolve(one + '^{tree}') == git.resolve(other + '^{tree}'))
