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

"""One patch file: a commit's message, its hunks, the files that it adds.

The form is git's mail format. Below the ``---`` line, where mail programs and
patch tools read nothing, lines ``adds:``, ``adds executable:`` and
``deletes:`` name whole files. What a later commit changes in an added file, or
deletes, is a hunk as those on the base's files are, below them.
"""

import ast
from collections.abc import Collection
from collections.abc import Container
from collections.abc import Iterator
import dataclasses
import os
import re

from . import SeriesError
from .git import Git
from .git import NO_FILE

MODES = {'adds': '100644', 'adds executable': '100755', 'deletes': NO_FILE}
OWN_CONTEXT = 3  # lines around a hunk on a file that the series adds
SEPARATOR = b'\n---\n'
# What would make GNU patch or git am take a line of the message for a diff.
DIFF_TEXT = re.compile(
    rb'^\s*(diff --git |--- \S|\+\+\+ \S|@@ -\d|Index: |\*\*\* \S|---$)', re.M)
HUNK = re.compile(rb'^(@@ -\S+ \+\S+ @@).*$', re.M)
INDEX = re.compile(rb'^index [0-9a-f]{40}\.\.[0-9a-f]{40}(?: \d+)?\n', re.M)
# Options of format-patch, for the same mail whatever is configured.
MAIL = ('--zero-commit', '--keep-subject', '--no-signature', '--no-thread',
        '--no-attach', '--no-base', '--no-renames')


@dataclasses.dataclass
class Patch:
    """One commit of the series.

    :ivar head: mail header and message
    :ivar files: path -> mode of files that the commit adds, or NO_FILE for
        those of the base that it takes away
    :ivar diff: hunks on the base's files, then on those that earlier commits
        add
    """
    name: str
    head: bytes
    files: dict[str, str]
    diff: bytes

    @classmethod
    def parse(cls, name: str, data: bytes) -> 'Patch':
        head, separator, rest = data.partition(SEPARATOR)
        if not separator:
            raise SeriesError(f'patches/{name}: no line "---" after the '
                              'message; run make save to write it anew')
        notes, _blank, diff = (b'\n' + rest).partition(b'\n\n')
        files = {}
        for line in os.fsdecode(notes).split('\n')[1:]:
            word, _colon, path = line.partition(': ')
            if word not in MODES:
                raise SeriesError(f'patches/{name}: {word!r} below the '
                                  'message is no word of this format')
            files[path] = MODES[word]
        return cls(name, head, files, diff)

    @classmethod
    def of_commit(cls, git: Git, commit: str, name: str,
                  files: dict[str, str], context: int,
                  own: Collection[str] = ()) -> 'Patch':
        """Make the patch of a commit.

        :param files: as in the patch; of all other files, it has the hunks
        :param context: lines of the base around a hunk
        :param own: files of earlier commits that this one changes or deletes
        """
        mail = git.run('format-patch', '-1', '--stdout', '--always',
                       '--no-encode-email-headers', *MAIL, commit).stdout
        patch = cls(name, mail.partition(SEPARATOR)[0].rstrip(b'\n'), files,
                    b'')

        def hunks(lines):
            patch.diff = git.run(
                'diff-tree', '-p', '-r', '--no-commit-id', '--no-renames',
                '--full-index', '--binary', '--no-ext-diff', '--no-textconv',
                '--no-color', f'--unified={lines}', commit).stdout
            return patch

        base = hunks(context).part({*files, *own}, within=False)
        patch.diff = _stable(base + (
            hunks(OWN_CONTEXT).part(own) if own else b''))
        return patch

    def dump(self) -> bytes:
        words = {mode: word for word, mode in MODES.items()}
        in_order = sorted(self.files, key=lambda path: (
            self.files[path] == NO_FILE, path))
        notes = ''.join(
            f'{words[self.files[path]]}: {path}\n' for path in in_order)
        return self.head + SEPARATOR + os.fsencode(notes) + b'\n' + self.diff

    @property
    def adds(self) -> list[str]:
        return [p for p, mode in self.files.items() if mode != NO_FILE]

    @property
    def deletes(self) -> list[str]:
        return [p for p, mode in self.files.items() if mode == NO_FILE]

    @property
    def message(self) -> bytes:
        """The message without the mail's header."""
        return self.head.partition(b'\n\n')[2]

    @property
    def subject(self) -> str:
        found = re.search(rb'^Subject: (.*(?:\n .*)*)', self.head, re.M)
        subject = os.fsdecode(found.group(1)) if found else ''
        return subject.replace('\n ', ' ').strip()

    def sections(self) -> Iterator[tuple[str, bytes]]:
        """Of each file in the diff: its path, and what is said of it."""
        for section in re.split(rb'(?m)^(?=diff --git )', self.diff)[1:]:
            yield self._path(section.partition(b'\n')[0]), section

    def part(self, paths: Container[str], within: bool = True) -> bytes:
        """The diff of these files alone, or of all but these."""
        return b''.join(section for path, section in self.sections()
                        if (path in paths) is within)

    def _path(self, header):
        """The file that a line "diff --git" names, quoted or not, twice."""
        both = header.removeprefix(b'diff --git ')
        old, new = both[:len(both) // 2], both[len(both) // 2 + 1:]
        if old.startswith(b'"'):
            old, new = (ast.literal_eval('b' + name.decode())
                        for name in (old, new))
        if not old.startswith(b'a/') or new != b'b/' + old[2:]:
            raise SeriesError(f'patches/{self.name}: {os.fsdecode(header)} '
                              'names two files; make tree save')
        return os.fsdecode(old[2:])

    def lines(self) -> Iterator[tuple[int, str, int, str]]:
        """Of each line of the diff: number, file, number there, and text."""
        number = self.dump().count(b'\n') - self.diff.count(b'\n')
        path, there = '', 0
        for text in self.diff.decode(errors='replace').split('\n'):
            number += 1
            if text.startswith('diff --git '):
                path = self._path(text.encode())
            elif text.startswith('@@ '):
                there = int(re.search(r'\+(\d+)', text)[1]) - 1
            elif text.startswith((' ', '+')):
                there += 1
            yield number, path, there, text


def _stable(diff: bytes) -> bytes:
    """Leave out of a diff what changes though its meaning doesn't.

    Blob names change with every earlier patch on the same file; what follows
    a hunk's second @@ is a line of the base.
    """
    files = re.split(rb'(?m)^(?=diff --git )', diff)
    return b''.join(
        part if b'\nGIT binary patch\n' in part
        else HUNK.sub(rb'\1', INDEX.sub(b'', part))
        for part in files)
