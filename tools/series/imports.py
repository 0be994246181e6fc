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

"""Whether each commit has what its files import.

A series is cut and put in another order by its files; one that imports what
a later commit adds is noticed by nobody who runs the last commit alone.
Nothing of it is run here.
"""

import ast
import os
import typing as ty

from .git import File
from .git import Git

SUFFIXES = ('.py', '/__init__.py', '.pyx')
# Of a module whose names can't be told.
ANY = '*'


def faults(git: Git, commits: list[str]) -> ty.Iterator[tuple[int, str]]:
    """What is imported before it is there; each once.

    :param commits: of the series, in order
    :returns: the commit's place in the list, from 0, and what is wrong
    """
    tree = _Tree(git, git.files(commits[0] + '^') if commits else {})
    ours: set[str] = set()
    told = set()
    for number, commit in enumerate(commits):
        changed = git.changes(commit + '^', commit)
        tree.change(changed)
        ours.update(path for path in changed if path.endswith('.py'))
        for path in sorted(ours.intersection(tree.files)):
            for line, module, name in tree.source(path).imports:
                if not tree.has(module, name) and (
                        path, module, name) not in told:
                    told.add((path, module, name))
                    yield number, f'{path}, line {line}: ' + (
                        f'there is no {name} in {module} yet'
                        if name else f'there is no {module} yet')


class _Tree:
    """The modules of one commit after the other."""

    def __init__(self, git, files):
        self._git = git
        self._sources: dict[str, _Source] = {}
        self.files: dict[str, File] = {}
        self.change(files)

    def change(self, changed):
        """Go on to the next commit."""
        self.files |= changed
        for path, file in changed.items():
            if file.status == 'D':
                del self.files[path]
        self._folders = {os.path.dirname(path) for path in self.files}
        # Only what is in one of these is the tree's to have.
        self._packages = {path.split('/')[0] for path in self.files
                          if path.count('/') == 1
                          and path.endswith('/__init__.py')}

    def source(self, path):
        blob = self.files[path].blob
        if blob not in self._sources:
            self._sources[blob] = _Source(
                self._git.run('cat-file', 'blob', blob).stdout)
        return self._sources[blob]

    def has(self, module, name):
        if module.split('.')[0] not in self._packages:
            return True
        if name is None or self._is_module(f'{module}.{name}'):
            return bool(name) or self._is_module(module)
        path = self._path(module)
        if path is None:
            return False
        source = self.source(path)
        return name in source.names or ANY in source.names or any(
            self.has(other, name) for other in source.all_of)

    def _is_module(self, module):
        return self._path(module) is not None or (
            module.replace('.', '/') in self._folders)

    def _path(self, module):
        path = module.replace('.', '/')
        return next((path + suffix for suffix in SUFFIXES
                     if path + suffix in self.files), None)


class _Source:
    """A file's content.

    :ivar imports: line, module and name of all that it imports by full name
    :ivar names: what it has at its top, and in branches there
    :ivar all_of: modules of which it has all names
    """

    def __init__(self, content):
        self.imports, self.names, self.all_of = [], {ANY}, []
        try:
            parsed = ast.parse(content)
        except (SyntaxError, ValueError):
            return  # Cython, or a fault that others find
        self.names = set(_bound(parsed.body)) - {ANY}
        for node in ast.walk(parsed):
            if isinstance(node, ast.Import):
                self.imports += [
                    (node.lineno, alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                self.imports += [
                    (node.lineno, node.module, alias.name)
                    for alias in node.names if alias.name != '*']
                if node.names[0].name == ANY:
                    self.all_of.append(node.module)


def _bound(body):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef,
                             ast.ClassDef)):
            yield node.name
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name).split('.')[0]
                        for alias in node.names)
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.ExceptHandler):
                yield from _bound(inner.body)
            for part in ast.walk(inner) if isinstance(
                    inner, ast.expr) else ():
                if isinstance(part, ast.Name) and isinstance(
                        part.ctx, ast.Store):
                    yield part.id
        for field in ('body', 'orelse', 'finalbody'):
            yield from _bound(getattr(node, field, []))
