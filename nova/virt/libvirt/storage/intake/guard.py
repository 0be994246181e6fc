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
"""The process that keeps one qemu-nbd; started by export.py, by path.

Or an nbdkit: what is said of the one holds for the other.

Nova isn't imported here. It stands between nova-compute and qemu-nbd because
neither ends the other when it dies: it ends qemu-nbd when its stdin does, and
the kernel ends qemu-nbd with it. (The kernel's signal comes when the *thread*
ends that has started a process; nova-compute's threads come and go, this
process has one.)

Its request is a line of JSON on stdin:

    {"command": [...], "socket": fd, "file": fd, "readable": [path ...],
     "environment": {...}, "longest": bytes, "stall": seconds}

The file may be one that is held with O_PATH alone. qemu-nbd finds it as
/proc/self/fd/4, whatever is at its path by then.

It answers with lines of JSON on stdout:

    {"pid": of qemu-nbd, "confined": whether landlock holds it}
    {"said": a line of qemu-nbd's standard error}
    {"ended": exit status, "why": "left", "asked" or "stalled"}
"""

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
import time

# Where a socket is handed over, see sd_listen_fds(3).
_LISTEN_FD = 3
# What it may write to, and how it opens that.
_FILE_FD = 4
FILE = '/proc/self/fd/%d' % _FILE_FD
# Seconds from SIGTERM to SIGKILL.
_GRACE = 5
# Seconds between two looks at qemu-nbd.
_INTERVAL = 0.1
# Lines of its standard error that are passed on: a peer can cause any number.
_MOST_LINES = 50

# Bytes of memory that it may have, the stacks of its threads among them. Who
# is connected may ask for much and take no answer, and QEMU keeps 16 answers
# of 32 MiB for each connection: 4 GiB for eight. It ends when it has no more;
# what a source sends takes some MiB, and 64 threads 512.
_MOST_MEMORY = 1 << 30
_MOST_STACK = 8 << 20

# QEMU allocates memory for each request. glibc gives so much back to the
# kernel at once and gets it anew, with a page fault for each page of it: a
# third of all that a qemu-nbd does, TLS included.
_MALLOC = {'MALLOC_MMAP_THRESHOLD_': str(16 << 20),
           'MALLOC_TRIM_THRESHOLD_': str(256 << 20)}

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

# include/uapi/linux/landlock.h; the numbers are the same on all
# architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1    # flag of landlock_create_ruleset()
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE = 1 << 14
# By version of the interface, how many rights to files it knows.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_MOST_FILE_RIGHTS = 16
# To bind and to connect TCP sockets, since version 4.
_NET_RIGHTS = 3
# Not to reach abstract sockets, nor to signal processes, of others: since
# version 6. Nova's own are of the same user.
_SCOPES = 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def say(**message):
    os.write(1, json.dumps(message).encode() + b'\n')  # noqa: N324


def _call(number, *args):
    found = _libc.syscall(ctypes.c_long(number), *args)
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


def _prctl(option, value):
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0),
                   ctypes.c_ulong(0), ctypes.c_ulong(0)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def landlock_version():
    return _call(_CREATE_RULESET, None, ctypes.c_size_t(0),
                 ctypes.c_uint32(_VERSION))


def can_confine():
    """Whether the kernel has landlock: since 5.13, if it is enabled."""
    try:
        return landlock_version() > 0
    except OSError:
        return False


class Landlock:
    """Rules for what this process and its children may open."""

    def __init__(self):
        self.version = landlock_version()
        rights = (1 << _FILE_RIGHTS.get(self.version, _MOST_FILE_RIGHTS)) - 1
        attributes = struct.pack('=Q', rights)
        if self.version >= 4:
            attributes += struct.pack('=Q', _NET_RIGHTS)
        if self.version >= 6:
            attributes += struct.pack('=Q', _SCOPES)
        self._rules = _call(_CREATE_RULESET, attributes,
                            ctypes.c_size_t(len(attributes)),
                            ctypes.c_uint32(0))

    def allow(self, path, rights):
        """Allow to use a file or, with all that is in it, a directory."""
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # nothing to open either
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                rights &= ~_READ_DIR
            self._allow(fd, rights)
        finally:
            os.close(fd)

    def _allow(self, fd, rights):
        rule = struct.pack('=Qi', rights, fd)
        _call(_ADD_RULE, ctypes.c_int(self._rules),
              ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0))

    def allow_reading(self, path):
        self.allow(path, _READ_FILE | _READ_DIR | _EXECUTE)

    def allow_writing(self, fd):
        """Allow to write to the file that a descriptor is of."""
        self._allow(fd, _READ_FILE | _WRITE_FILE |
                    (_TRUNCATE if self.version >= 3 else 0))

    def enforce(self):
        _call(_RESTRICT_SELF, ctypes.c_int(self._rules), ctypes.c_uint32(0))
        os.close(self._rules)


def confine(writable, readable):
    """Leave this process nothing else to open, where the kernel can.

    :param writable: descriptors of files
    :param readable: paths, also of directories
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if not can_confine():
        return
    rules = Landlock()
    for path in readable:
        rules.allow_reading(path)
    for fd in writable:
        rules.allow_writing(fd)
    rules.enforce()


def limit_stack():
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft == resource.RLIM_INFINITY or soft > _MOST_STACK:
        resource.setrlimit(resource.RLIMIT_STACK, (_MOST_STACK, hard))


def become(request, parent, errors):
    """Be qemu-nbd: never returns."""
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)     # it was dead before
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (request['longest'],) * 2)
        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY,) * 2)
        limit_stack()
        null = os.open('/dev/null', os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(errors, 2)
        # Either may be where the other one has to be.
        listening, file = [
            fcntl.fcntl(request[name], fcntl.F_DUPFD, _FILE_FD + 1)
            for name in ('socket', 'file')]
        os.dup2(listening, _LISTEN_FD)
        os.dup2(file, _FILE_FD)
        os.closerange(_FILE_FD + 1, 1 << 16)
        # 0 is /dev/null.
        confine([_FILE_FD, 0], request['readable'])
        environment = {
            'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', 'LC_ALL': 'C',
            'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid()), **_MALLOC,
            **request['environment']}
        os.execvpe(request['command'][0], request['command'], environment)
    except Exception as e:
        os.write(2, ('%s: %s\n' % (type(e).__name__, e)).encode())
    os._exit(127)


class Keeper:
    """What goes on with qemu-nbd, until it has ended.

    :param pid: its process id
    :param errors: file descriptor of its standard error
    :param stall: seconds without any work after which it is ended
    """

    def __init__(self, pid, errors, stall):
        self._pid = pid
        self._errors = errors
        self._stall = stall
        self._lines_left = _MOST_LINES
        self._unread = b''
        self._why = 'left'

    def run(self):
        worked, since = self._work(), time.monotonic()
        wanted = [0, self._errors]
        while True:
            for fd in select.select(wanted, [], [], _INTERVAL)[0]:
                if fd == self._errors:
                    if not self._pass_on():
                        wanted.remove(fd)
                elif not os.read(0, 4096):
                    return self._end('asked')
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return self._ended(status)
            now = self._work()
            if now != worked:
                worked, since = now, time.monotonic()
            elif time.monotonic() - since > self._stall:
                return self._end('stalled')

    def _work(self):
        """Something that differs whenever qemu-nbd has done something."""
        try:
            with open('/proc/%d/stat' % self._pid) as f:
                fields = f.read().rpartition(')')[2].split()
            with open('/proc/%d/io' % self._pid) as f:
                written = f.read()
            if self._waits_for_disk():
                return time.monotonic()     # what is flushed takes its time
        except OSError:
            return None
        return fields[11:13], written

    def _waits_for_disk(self):
        tasks = '/proc/%d/task' % self._pid
        for task in os.listdir(tasks):
            with open('%s/%s/stat' % (tasks, task)) as f:
                if f.read().rpartition(')')[2].split()[0] == 'D':
                    return True
        return False

    def _pass_on(self):
        data = os.read(self._errors, 4096)
        *lines, self._unread = (self._unread + data).split(b'\n')
        self._unread = self._unread[-4096:]
        for line in lines:
            if self._lines_left > 0:
                self._lines_left -= 1
                say(said=line.decode(errors='replace')[:500])
        return bool(data)

    def _end(self, why):
        self._why = why
        os.kill(self._pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return self._ended(status)
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
                deadline += 3600
            time.sleep(0.01)

    def _ended(self, status):
        while select.select([self._errors], [], [], 0)[0] and self._pass_on():
            pass
        say(ended=os.waitstatus_to_exitcode(status), why=self._why)


def main():
    line = b''
    while not line.endswith(b'\n'):
        data = os.read(0, 1 << 16)
        if not data:
            return 1
        line += data
    request = json.loads(line)  # noqa: N324
    errors, of_child = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        become(request, parent, of_child)
    os.close(of_child)
    # qemu-nbd alone listens, and has the file.
    os.close(request['socket'])
    os.close(request['file'])
    try:
        say(pid=pid, confined=can_confine())
        Keeper(pid, errors, request['stall']).run()
    except BrokenPipeError:
        pass    # nobody reads any more; the kernel ends qemu-nbd with this
    return 0


if __name__ == '__main__':
    sys.exit(main())
