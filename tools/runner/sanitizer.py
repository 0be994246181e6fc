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

"""The pump as the compiler's sanitizers see it.

It runs without the GIL, so nothing of Python's looks after its memory and its
threads. Neither Python nor what it loads else is compiled for sanitizers, so
theirs is preloaded, into the interpreters that run the pump and no others.
"""

import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys

from . import machine


@dataclasses.dataclass(frozen=True)
class Kind:
    """A sanitizer of GCC's.

    :param name: as -fsanitize has it
    :param library: to be preloaded
    :param options: environment of its runtime
    :param prefix: the command that starts the interpreter
    :param leave_out: arguments of stestr
    """
    name: str
    library: str
    options: dict[str, str]
    prefix: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()


KINDS = (
    # An interpreter that ends frees nothing.
    Kind('address', 'libasan.so', {'ASAN_OPTIONS': 'detect_leaks=0',
                                   'PYTHONMALLOC': 'malloc'}),
    Kind('undefined', 'libubsan.so', {'UBSAN_OPTIONS': 'print_stacktrace=1'}),
    # GCC 12's finds no place for its shadow among random addresses, and
    # shadow is what a test of memory would measure.
    Kind('thread', 'libtsan.so', {'TSAN_OPTIONS': 'exitcode=0'},
         ('setarch', '-R'), ('--exclude-regex', 'memory')),
)


def prepare(kind: Kind, tree: pathlib.Path, reports: pathlib.Path,
            logs: pathlib.Path) -> pathlib.Path:
    """Compile the extensions of a tree for a sanitizer.

    :param reports: a directory for what it reports
    :param logs: a directory for what the compiler says
    :returns: path of an interpreter that has the sanitizer
    :raises: machine.NotReady
    """
    for built in tree.glob('nova/**/*.so'):
        built.unlink()
    flag = '-fsanitize=' + kind.name
    with open(logs / ('sanitize-%s.log' % kind.name), 'w') as out:
        machine.step(kind.name + ' build', [
            sys.executable, 'setup.py', '--quiet', 'build_ext', '--force',
            '--inplace'], out, {
                'PBR_VERSION': machine.version(tree), 'LDFLAGS': flag,
                'CFLAGS': flag + ' -fno-omit-frame-pointer -g -O1'}, tree)
    python = reports / 'python'
    options = {name: '%s:log_path=%s' % (value, reports / 'report')
               if name.endswith('_OPTIONS') else value
               for name, value in kind.options.items()}
    options['LD_PRELOAD'] = _library(kind.library)
    python.write_text('#!/bin/sh\nexec %s "$@"\n' % shlex.join([
        *kind.prefix, 'env', *('%s=%s' % each for each in options.items()),
        sys.executable]))
    python.chmod(0o755)
    return python


def _library(name):
    """Where the compiler has a library."""
    path = subprocess.run(
        ['gcc', '-print-file-name=' + name], check=True, text=True,
        stdout=subprocess.PIPE).stdout.strip()
    return os.path.realpath(path)


def environment(python: pathlib.Path) -> dict[str, str]:
    """What tests need to run, and to start workers, with that interpreter."""
    return {'SANITIZED_PYTHON': str(python), 'PYTHON': str(python)}


def found(reports: pathlib.Path) -> str:
    """What the sanitizer has reported so far."""
    return ''.join(path.read_text(errors='replace')
                   for path in sorted(reports.glob('report*')))
