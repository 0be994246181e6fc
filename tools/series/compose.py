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

from collections.abc import Container
import os
import re
import shutil
import tarfile
import tempfile
import time

from . import SeriesError
from . import topics
from .git import Git
from .git import identity
from .mail import Patch
from .project import Project

BASE_IDENTITY = identity('base', 'base@localhost', '2026-01-01T00:00:00Z')
SAVED = 'refs/series/saved'        # HEAD of the tree at the last save
COMPOSED = 'refs/series/composed'  # what the repository came to then
PARTIAL = 'refs/series/partial/'   # + topic: tree/ ends there, as composed
MOVING = 'refs/series/moving'      # a checkout that was begun
DELETED = re.compile(rb'^deleted file mode ', re.M)
# What to do about a file of several commits that somebody has changed here.
BY_HAND = ('later patches change this file, so change it in tree/: git '
           'checkout -- FILE, make tree, commit there (git commit --fixup for '
           'an earlier commit), make save')
IN_PROGRESS = ('rebase-merge', 'rebase-apply', 'MERGE_HEAD',
               'CHERRY_PICK_HEAD', 'REVERT_HEAD')


def patches(project: Project) -> list[Patch]:
    """All patches of the repository, in order."""
    return [Patch.parse(path.name, path.read_bytes())
            for path in sorted(project.patches.glob('*.patch'))]


def ensure_base(git: Git, project: Project) -> str:
    """Make sure that a repository has the base commit; returns it.

    It is the same commit whoever makes it, kept in the cache once made.

    :raises: SeriesError if the tag base stands for anything else
    """
    cache = _cache(project)
    if not git.resolve('refs/tags/base'):
        git.run('fetch', '--quiet', '--no-tags', cache.dir,
                'refs/tags/base:refs/tags/base')
    if git.resolve('base^{tree}') != cache.resolve('base^{tree}'):
        raise SeriesError(
            f'the tag base in {git.path} is not {project.release} as it was '
            'released; git tag -d base there, and make tree')
    return git.resolve('base^{commit}')


def _cache(project):
    """The repository that has the base, made once for all."""
    git = Git(project.cache / f'{project.sha256[:12]}.git', bare=True)
    git.dir.mkdir(parents=True, exist_ok=True)
    if not git.resolve('refs/tags/base'):
        _make_base(git, project)
    return git


def _make_base(git, project):
    """The tag comes last: whoever is killed or outrun has done no harm."""
    with tempfile.TemporaryDirectory(dir=project.cache) as scratch:
        with tarfile.open(project.sdist()) as archive:
            # Python 3.11.2 (Debian 12) has no filters; the sum is proven.
            archive.extraction_filter = getattr(tarfile, 'data_filter', None)
            archive.extractall(scratch)
        env = {**BASE_IDENTITY,
               'GIT_WORK_TREE': os.path.join(scratch, project.release),
               'GIT_INDEX_FILE': os.path.join(scratch, 'index')}
        git.run('init', '--quiet', '--bare', git.dir)
        git.run('add', '--all', '--force', env=env)
        commit = git.out('commit-tree', git.out('write-tree', env=env), '-m',
                         f'{project.name} {project.version}', env=env)
        git.run('update-ref', 'refs/tags/base', commit)


def workshop(project: Project) -> Git:
    """A repository to compose in: the tree's, or that of the cache."""
    git = Git(project.tree)
    return git if git.dir.exists() else _cache(project)


def compose(git: Git, project: Project) -> str:
    """Make the series' commits in a repository; moves no branch.

    :returns: the last commit
    :raises: SeriesError naming the patch, the file and the hunk
    """
    commit = ensure_base(git, project)
    series, owned = patches(project), git.files(commit)
    last, faults = account(project, series, owned)
    if faults:
        raise SeriesError('\n'.join(faults))
    blobs = dict(zip(last, git.out(
        'hash-object', '-w', '--no-filters', '--stdin-paths',
        stdin=b''.join(os.fsencode(project.root / path) + b'\n'
                       for path in last)).split('\n')))
    with tempfile.TemporaryDirectory() as scratch:
        index = {'GIT_INDEX_FILE': os.path.join(scratch, 'index')}
        added = _first_states(git, series, owned, blobs, index)
        git.run('read-tree', commit, env=index)
        for patch in series:
            _apply(git, patch.name, patch.diff, index, 'does not apply')
            _put(git, index, {path: (mode, added[patch.name].get(path))
                              for path, mode in patch.files.items()})
            commit = git.out(
                'commit-tree', git.out('write-tree', env=index),
                '-p', commit, env=_author(git, patch),
                stdin=_message(patch))
    files = git.files(commit)
    for path, blob in blobs.items():
        if files[path].blob != blob:
            raise SeriesError(f'{path}: the patches after {last[path]} do not '
                              f'lead to the file as it lies here\n{BY_HAND}')
    return commit


def account(project: Project, series: list[Patch], owned: Container[str],
            ) -> tuple[dict[str, str], list[str]]:
    """Whether the files of the series are as its patches say.

    :returns: path -> name of the patch that adds it, of all that are there
        after the last one; and what is wrong
    """
    there: dict[str, str] = {}
    faults = []
    for patch in series:
        for path, section in patch.sections():
            if path in owned:
                continue
            if path not in there:
                faults.append(f'patches/{patch.name} changes {path}, which '
                              'no patch before it adds: make tree save')
            elif DELETED.search(section):
                del there[path]
        for path in patch.adds:
            if path in there:
                faults.append(
                    f'{path} is added by patches/{there[path]} and by '
                    f'patches/{patch.name}; fold the two commits')
            if path in owned:
                faults.append(f'patches/{patch.name} adds {path}, which the '
                              'base owns; make tree save')
            there[path] = patch.name
    faults += [f'patches/{name} adds {path}, which is not in the repository: '
               f'git checkout -- {path}, or make save'
               for path, name in there.items()
               if not (project.root / path).is_file()]
    return there, faults


def _first_states(git, series, owned, blobs, index):
    """What each patch adds, if later ones change it before it lies here.

    :param blobs: path -> file as it lies here
    :returns: name of a patch -> path -> file
    """
    now, added = dict(blobs), {}
    for patch in reversed(series):
        added[patch.name] = {path: now.pop(path) for path in patch.adds}
        own = {path: now.pop(path, None) for path, _section in patch.sections()
               if path not in owned}
        if not own:
            continue
        git.run('read-tree', '--empty', env=index)
        _put(git, index, {path: ('100644', blob)
                          for path, blob in own.items() if blob})
        _apply(git, patch.name, patch.part(own), index, 'can not be taken back '
               'from the files as they lie here', BY_HAND, '--reverse')
        now.update((path, file.blob)
                   for path, file in git.tracked(index).items())
    return added


def _put(git, index, files):
    """Put files (path -> mode, blob) into an index, or take them out."""
    entries = sorted((mode, blob or '0' * 40, path)
                     for path, (mode, blob) in files.items())
    git.run('update-index', '-z', '--index-info', env=index,
            stdin=os.fsencode(''.join(
                f'{mode} {blob}\t{path}\0' for mode, blob, path in entries)))


def _apply(git, name, diff, index, fault, advice='mend the patch, or take the '
           'file from the last good commit', *options):
    """Apply a patch's hunks to an index; shows both sides if they don't."""
    if not diff:
        return
    done = git.run('apply', '--cached', '--unidiff-zero', '--verbose',
                   *options, '-', env=index, stdin=diff, check=False)
    if not done.returncode:
        return
    before = git.out('write-tree', env=index)
    said = done.stderr.decode(errors='replace')
    told = [f'patches/{name} {fault}:']
    for path, number in re.findall(
            r'(?m)^error: patch failed: (.*):(\d+)$', said):
        first = int(number)
        lines = git.out('show', f'{before}:{path}', check=False).split('\n')
        sign = '+' if options else '-'
        told += [f'{path}, line {first} (hunk @@ {sign}{first}), has:']
        told += ['    ' + line for line in lines[first - 1:first + 6]]
    told += ['git says, with what the patch expects:']
    told += ['    ' + line for line in said.splitlines()
             if not line.startswith('Checking patch ')]
    raise SeriesError('\n'.join([*told, advice]))


def _author(git, patch):
    """Author and date; the committer is the author, so that names agree."""
    told = git.out('mailinfo', '-k', '--no-inbody-headers', os.devnull,
                   os.devnull, stdin=patch.head + b'\n')
    found = dict(line.split(': ', 1) for line in told.split('\n')
                 if ': ' in line)
    try:
        return identity(found['Author'], found['Email'], found['Date'])
    except KeyError as error:
        raise SeriesError(
            f'patches/{patch.name} has no {error} in its header') from None


def _message(patch):
    parts = os.fsencode(patch.subject), patch.message.strip(b'\n')
    return b'\n\n'.join(filter(None, parts)) + b'\n'


def commits(git: Git, tip: str, after: str = 'base') -> list[str]:
    """The commits of a series, in order."""
    return git.out('rev-list', '--reverse', f'{after}..{tip}').splitlines()


def end_of(git: Git, project: Project, tip: str, topic: str) -> str:
    """Where a topic ends in the whole series; without a topic, the tip."""
    if not topic:
        return tip
    ends = {one.name: one.end
            for one in topics.load(project, patches(project))}
    if topic not in ends:
        raise SeriesError(f'{topics.PLACE} has no topic {topic!r}: make tree '
                          f'TOPIC= one of {", ".join(ends) or "none"}')
    return commits(git, tip)[ends[topic] - 1]


def partial(git: Git) -> tuple[str, str]:
    """The topic with which tree/ ends, and its commit; or nothing twice."""
    name, _space, commit = git.out(
        'for-each-ref', '--format=%(refname) %(objectname)',
        PARTIAL).partition(' ')
    return name.removeprefix(PARTIAL), commit


def make_tree(project: Project, topic: str | None = None,
              keep_work: bool = False) -> str:
    """Bring tree/ to what the repository says.

    :param topic: leave out what comes after this topic; '' leaves out
        nothing, None what was left out before
    :param keep_work: be content with a tree that goes on from there
    :returns: what was done, in a line
    :raises: SeriesError if tree/ holds work that isn't saved
    """
    if not (project.tree / '.git').exists():
        return _new_tree(project, topic)
    git = Git(project.tree)
    _exclude(git, project)
    if git.resolve(MOVING):
        _end_checkout(git)
    head = git.resolve('HEAD')
    before = partial(git)
    topic = before[0] if topic is None else topic
    tip = compose(git, project)
    commit = end_of(git, project, tip, topic)
    same = same_series(git, head, commit)
    unchanged = tip == git.resolve(COMPOSED) and before == (
        topic, commit if topic else '')
    until = topic and f' (the end of topic {topic})'
    work = _unsaved(git, same or head == git.resolve(SAVED))
    if work and keep_work and unchanged:
        return 'tree/ has work that is not saved, and is used as it is'
    if work:
        raise SeriesError(work)
    if same or unchanged:
        mark(git, tip, topic, commit, f'update {SAVED} {head}')
        return f'tree/ is at {head[:12]}{until}'
    kept = _keep(git, head)
    mark(git, tip, topic, commit, f'update {MOVING} {commit}')
    _checkout(git)
    return f'tree/ is at {commit[:12]}{until} now; what was there is {kept}'


def _unsaved(git, head_is_saved):
    """What would be lost if tree/ moved on, and what to do; or nothing."""
    interrupted(git)
    changed = uncommitted(git)
    if changed:
        return (f'tree/ has changes that are in no commit:\n{changed}\n'
                'commit them there (or git stash) and make save; to drop '
                'them: git -C tree reset --hard, git -C tree clean -d')
    if not head_is_saved:
        return ('tree/ holds commits that are not in the repository; make '
                'save writes them there; to drop them: git -C tree reset '
                f'--hard {SAVED}')


def interrupted(git: Git) -> None:
    """:raises: SeriesError in the midst of a rebase, am, merge or move"""
    if git.resolve(MOVING):
        raise SeriesError('a checkout of tree/ was cut off: make tree first')
    for name in IN_PROGRESS:
        if (git.dir / name).exists():
            raise SeriesError(
                f'tree/ is in the midst of something (.git/{name}): see git '
                '-C tree status, and end it there')


def uncommitted(git: Git, *options: str) -> str:
    """The first changes of the work tree that are in no commit, if any."""
    lines = git.out('status', '--porcelain', *options,
                    worktree=True).splitlines()
    if len(lines) > 10:
        lines[10:] = [f'and {len(lines) - 10} more']
    return '\n'.join('    ' + line for line in lines)


def _new_tree(project, topic):
    if project.tree.exists() and any(project.tree.iterdir()):
        raise SeriesError('tree/ is there and is no git repository; move it '
                          'away')
    new = project.root / 'tree.new'
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    git = Git(new)
    git.run('init', '--quiet', '-b', 'series', new)
    _exclude(git, project)
    tip = compose(git, project)
    commit = end_of(git, project, tip, topic)
    mark(git, tip, topic, commit, f'update {MOVING} {commit}')
    _checkout(git)
    os.rename(new, project.tree)
    return f'tree/ is new, at {commit[:12]}'


def _exclude(git, project):
    (git.dir / 'info').mkdir(exist_ok=True)
    (git.dir / 'info' / 'exclude').write_text(
        '\n'.join(project.exclude) + '\n')


def _keep(git, commit):
    """Give what is about to be left a name, which is returned."""
    now = time.strftime('%Y%m%d-%H%M%S')
    name = f'refs/series/kept/{now}-{commit[:12]}'
    git.run('update-ref', name, commit)
    return name


def _end_checkout(git):
    """End a checkout that was cut off: some files are old, others new.

    Somebody may have worked on since: all is kept first, new files too.
    """
    # Left by the git that was killed; see project.locked.
    (git.dir / 'index.lock').unlink(missing_ok=True)
    git.run('add', '--all', worktree=True)
    found = git.out('stash', 'create', worktree=True, check=False,
                    env=BASE_IDENTITY)
    print('ending a checkout of tree/ that was cut off; the files as they '
          'were are', _keep(git, found or git.resolve('HEAD')))
    _checkout(git)


def _checkout(git):
    """Bring a tree to where it is to move."""
    commit = git.resolve(MOVING)
    git.run('reset', '--quiet', '--hard', commit, worktree=True)
    git.run('update-ref', SAVED, commit)
    git.run('update-ref', '-d', MOVING)


def mark(git: Git, tip: str, topic: str | None, end: str,
         also: str) -> None:
    """Note what the repository comes to and of that, what tree/ holds.

    :param tip: the whole series
    :param topic: the topic with which tree/ ends, if that isn't the whole
    :param end: where it ends in the whole series
    :param also: a further line for git update-ref
    """
    lines = [also, f'update {COMPOSED} {tip}']
    before = partial(git)[0]
    if topic:
        lines.append(f'update {PARTIAL}{topic} {end}')
    if before and before != topic:
        lines.append(f'delete {PARTIAL}{before}')
    git.run('update-ref', '--stdin', stdin='\n'.join(lines).encode() + b'\n')


def same_series(git: Git, one: str, other: str) -> bool:
    """Whether two series differ in nothing but names of commits."""
    def told(tip):
        commits = git.out('log', '--reverse', f'base..{tip}',
                          '--format=%T%n%an%n%ae%n%ad%n%B')
        return commits, git.resolve(tip + '^{tree}')
    return told(one) == told(other)
