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
patch tools read nothing, ``adds:``, ``adds executable:`` and ``deletes:`` lines
name whole files.
"""

import dataclasses
import re

from . import SeriesError
from .git import Git

ADDS = {'adds': '100644', 'adds executable': '100755'}
SEPARATOR = b'\n---\n'
# What would make GNU patch or git am take a line of the message for a diff.
DIFF_TEXT = re.compile(
    rb'^\s*(diff --git |--- \S|\+\+\+ \S|@@ -\d|Index: |\*\*\* \S|---$)', re.M)
HUNK = re.compile(rb'^(@@ -\S+ \+\S+ @@).*$', re.M)
INDEX = re.compile(rb'^index [0-9a-f]{40}\.\.[0-9a-f]{40}(?: \d+)?\n', re.M)


@dataclasses.dataclass
class Patch:
    """:ivar head: mail header and message
    :ivar adds: path -> mode of the files that the commit adds
    :ivar deletes: paths of the base's files that it takes away
    :ivar diff: hunks on the base's files
    """
    name: str
    head: bytes
    adds: dict[str, str]
    deletes: list[str]
    diff: bytes

    def dump(self) -> bytes:
        words = {mode: word for word, mode in ADDS.items()}
        lines = ['%s: %s' % (words[mode], path)
                 for path, mode in sorted(self.adds.items())]
        lines += ['deletes: %s' % path for path in sorted(self.deletes)]
        notes = ''.join(line + '\n' for line in lines)
        return self.head + b'\n---\n' + _encode(notes) + b'\n' + self.diff

    @classmethod
    def parse(cls, name: str, data: bytes) -> 'Patch':
        head, separator, rest = data.partition(SEPARATOR)
        if not separator:
            raise SeriesError(
                'patches/%s: no line "---" after the message; run make save '
                'to write it anew' % name)
        notes, _blank, diff = rest.partition(b'\n')  # no notes: blank first
        patch = cls(name, head, {}, [], b'')
        while notes:
            word, _colon, value = _decode(notes).partition(': ')
            if word in ADDS:
                patch.adds[value] = ADDS[word]
            elif word == 'deletes':
                patch.deletes.append(value)
            else:
                raise SeriesError('patches/%s: %r below the message is '
                                  'no word of this format' % (name, word))
            notes, _blank, diff = diff.partition(b'\n')
        patch.diff = diff
        return patch

    @classmethod
    def of_commit(cls, git: Git, commit: str, number: int, changes: dict,
                  added: dict, context: int) -> 'Patch':
        """Make the patch of a commit.

        :param changes: path -> status, of the base's files alone
        :param added: path -> mode, of files that the commit adds
        :param context: lines of the base around a hunk
        """
        hunks = sorted(p for p, status in changes.items() if status != 'D')
        mail = git.run(
            'format-patch', '-1', '--stdout', '--always', '--zero-commit',
            '--keep-subject', '--no-signature', '--no-encode-email-headers',
            '--no-thread', '--no-attach', '--no-base', '--no-renames',
            commit).stdout
        if SEPARATOR in git.run('show', '-s', '--format=%B', commit).stdout:
            raise SeriesError('%s: a line "---" would end the message there; '
                              'reword' % commit[:12])
        diff = git.run(
            'diff-tree', '-p', '-r', '--no-commit-id', '--no-renames',
            '--full-index', '--binary', '--no-ext-diff', '--no-textconv',
            '--no-color', '--unified=%d' % context, commit, '--',
            *(':(literal)' + path for path in hunks)).stdout if hunks else b''
        subject = git.out('show', '-s', '--format=%f', commit)[:52].strip('-.')
        return cls('%04d-%s.patch' % (number, subject),
                   mail.partition(SEPARATOR)[0].rstrip(b'\n'),
                   added, [p for p, status in changes.items() if status == 'D'],
                   _stable(diff))

    @property
    def message(self) -> bytes:
        """The message without the mail's header."""
        return self.head.partition(b'\n\n')[2]

    @property
    def subject(self) -> str:
        found = re.search(rb'^Subject: (.*(?:\n .*)*)', self.head, re.M)
        return _decode(found.group(1)).replace('\n ', ' ').strip() if (
            found) else ''


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


def _encode(text: str) -> bytes:
    return text.encode(errors='surrogateescape')


def _decode(data: bytes) -> str:
    return data.decode(errors='surrogateescape')
