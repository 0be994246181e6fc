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

"""A small project of the same shape, in a temporary folder."""

import hashlib
import io
import os
import pathlib
import subprocess
import tarfile
import tempfile
import unittest
from unittest import mock

from series import compose
from series.git import Git
from series.project import Project

BASE = {
    'PKG-INFO': b'Version: 1.0\n',
    'nova/__init__.py': b'',
    'nova/a.py': b''.join(b'line %d\n' % n for n in range(40)),
    'nova/b.py': b'\n'.join(b'b %d' % n for n in range(20)),  # no last newline
    'nova/bytes.bin': bytes(range(256)),
    'nova/latin.txt': 'gr\xfc\xdfe\n'.encode('latin-1') * 9,
    'doc/page.rst': b'Title\n=====\n\nText.\n',
}
TOML = '''
[base]
name = "small"
version = "1.0"
sha256 = "%s"
[series]
local_version = "test"
roots = ["nova", "doc", "releasenotes"]
note_pattern = '^\\s+cfg\\.\\w*Opt\\('
exclude = ["__pycache__/", "*.so"]
notes = "releasenotes/notes/"
context_lines = 1
'''


class ProjectTest(unittest.TestCase):

    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.top = pathlib.Path(scratch.name)
        env = mock.patch.dict(os.environ, {
            'XDG_CACHE_HOME': str(self.top / 'cache')})
        env.start()
        self.addCleanup(env.stop)
        sdist = self._sdist()
        self.project = self.new_project('one', sdist)
        self.project.cache.mkdir(parents=True)
        (self.project.cache / self.project.sdist_name).write_bytes(sdist)

    @staticmethod
    def _sdist():
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode='w:gz') as archive:
            for name, data in BASE.items():
                info = tarfile.TarInfo('small-1.0/' + name)
                info.size, info.mode = len(data), 0o644
                archive.addfile(info, io.BytesIO(data))
        return out.getvalue()

    def new_project(self, name, sdist=None):
        root = self.top / name
        (root / 'tools').mkdir(parents=True)
        text = TOML % hashlib.sha256(sdist).hexdigest() if sdist else (
            self.project.root / 'tools/series.toml').read_text()
        (root / 'tools/series.toml').write_text(text)
        subprocess.run(['git', 'init', '--quiet', root], check=True)
        return Project.load(root)

    def tree(self, project=None):
        """The project's tree, with somebody to commit in it."""
        project = project or self.project
        compose.make_tree(project)
        git = Git(project.tree)
        git.run('config', 'user.name', 'J\xfcrgen Tester')
        git.run('config', 'user.email', 'tester@example.org')
        return git

    def commit(self, git, files, message='Subject\n\nBody.\n'):
        """Commit; None as content deletes, a tuple is content and mode."""
        for name, content in files.items():
            path = git.path / name
            if content is None:
                path.unlink()
                continue
            mode = 0o644
            if isinstance(content, tuple):
                content, mode = content
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(mode)
        git.run('add', '--all', '--force', '--', *files, worktree=True)
        git.run('commit', '--quiet', '--allow-empty', '-F', '-',
                stdin=message.encode(), worktree=True,
                env={'GIT_AUTHOR_DATE': '2026-02-03T04:05:06+0100'})
        return git.resolve('HEAD')

    def contents(self, project=None):
        """All files of a repository but the tree's and git's."""
        root = (project or self.project).root
        return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mode)
                for p in root.rglob('*') if p.is_file() and
                not str(p.relative_to(root)).startswith(('tree', '.git'))}
