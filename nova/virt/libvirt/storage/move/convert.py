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
"""qemu-img, run for a move between a Ceph pool and another.

It ends when the move does, or this service.
"""

import os
import re
import subprocess
import tempfile
import time

import nova.conf
from nova import exception
from nova.i18n import _

CONF = nova.conf.CONF

# Seconds between two looks at a process: cancelling takes as long.
_INTERVAL = 0.2
# The kernel ends the program when the thread ends that has started it: left
# alone it would go on to write, and nobody could delete what it has open.
# That is told too late if it has ended before.
_ENDED_WITH_US = ('setpriv', '--pdeathsig', 'KILL', '--',
                  'sh', '-c', 'test "$PPID" = "$0" && exec "$@"')
# Of what a program says on its standard error.
_LONGEST_ERROR = 500
# What "qemu-img -p" writes again and again, and bytes in which one of it is.
_PERCENT = re.compile(rb'\((\d+\.\d+)/100%\)')
_LONGEST_PERCENT = 64


def run(command: list[str], watch: dict, names: dict,
        good: tuple[int, ...] = (0,), least: int = 0) -> int:
    """Run a program until it ends, stalls, or somebody cancels the move.

    Of one that is told to say how far it is, that is reported.

    :param command: its name and arguments
    :param watch: what copy.Transfer.watch() gives
    :param names: of the exceptions: ``volume``, ``where``, ``length``
        (bytes), ``side``, which host it is written for, and ``operation``,
        what is done
    :param good: exit codes that are no error
    :param least: bytes of files that are no progress yet. The threads of
        librbd wake each other up by some, also while a Ceph keeps silent.
    :returns: its exit code
    :raises: exception.StorageTransferError,
        exception.StorageTransferCephStalled,
        exception.StorageTransferCancelled
    """
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                [*_ENDED_WITH_US, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL, stdout=said, stderr=errors, cwd='/')
        except OSError as e:
            raise _failed(names, e) from e
        watch['on_start'](process.pid)
        try:
            before, since, part = None, time.monotonic(), 0.0
            while process.poll() is None:
                if watch['cancelled']():
                    raise exception.StorageTransferCancelled(
                        transferred=0, reason='',
                        **{**names, 'side': 'source'})
                done, told = _done(process.pid), _part(said)
                if None in (done, before) or done - before > least or (
                        told > part):
                    before, since = done, time.monotonic()
                elif time.monotonic() - since > watch['stall_timeout']:
                    # Of a Ceph that is full each single write is waited for.
                    raise exception.StorageTransferCephStalled(
                        seconds=watch['stall_timeout'], transferred=0,
                        host=CONF.host, reason='', **names)
                if told > part:
                    part = told
                    watch['progress'](int(names['length'] * part))
                time.sleep(_INTERVAL)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            watch['on_end'](process.pid)
        if process.returncode in good:
            return process.returncode
        errors.seek(0)
        error = errors.read(_LONGEST_ERROR).decode(errors='replace').strip()
        raise _failed(names, error or _('it ended with %d') %
                      process.returncode)


def _done(pid):
    """Bytes that a process has read from files, and written to them.

    :returns: None if that isn't known
    """
    try:
        with open('/proc/%d/io' % pid) as f:
            return sum(int(line.split()[1]) for line in f
                       if line.startswith(('rchar:', 'wchar:')))
    except (OSError, ValueError):
        return None


def _part(said):
    """Which part of its work a program says that it has done; 0 at first."""
    length = os.fstat(said.fileno()).st_size
    end = os.pread(said.fileno(), _LONGEST_PERCENT,
                   max(0, length - _LONGEST_PERCENT))
    found = _PERCENT.findall(end)
    return float(found[-1]) / 100 if found else 0.0


def _failed(names, reason):
    return exception.StorageTransferError(
        transferred=0, reason=_(
            "check that Ceph answers this host, and that there is room for "
            "%(where)s: %(reason)s") % {
                'where': names['where'], 'reason': reason}, **names)
