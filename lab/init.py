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

"""The first process of a machine of the lab.

Run as a program by machine.py, with the path of a JSON description. It joins
the machine's network namespace, makes the other namespaces, and forks: the child is
process 1 there, mounts what the machine has for itself, and stays to reap whatever is
left to it. The parent writes the child's id and start time, lets it go on, and
ends when it is ready. Standard library alone: it starts in a bare interpreter.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys

# linux/sched.h, linux/mount.h, linux/prctl.h
NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000)
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
# asm/unistd_64.h of x86, for which the lab is: no call of libc's
PIVOT_ROOT = 155
OLD_ROOT = '/.old'
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name, *arguments):
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, '%s: %s' % (name, os.strerror(number)),
                      str(arguments))


def mount(source, target, kind=None, flags=0, data=None):
    _call('mount', *(a if a is None else str(a).encode()
                     for a in (source, target, kind)),
          ctypes.c_ulong(flags), data and data.encode())


def _bind(source, target):
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.lexists(target):
            open(target, 'w').close()
    mount(source, target, flags=MS_BIND)


def _loop(image, target):
    """Mount an image's file system; the loop device goes with the mount."""
    os.makedirs(target, exist_ok=True)
    device = subprocess.run(
        ['losetup', '--find', '--show', '--direct-io=on', image], check=True,
        stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        mount(device, target, 'ext4', data='discard')
        # What ext4 keeps back counts as available with libvirt (f_bfree).
        with open('/sys/fs/ext4/%s/reserved_clusters' %
                  os.path.basename(device), 'w') as out:
            out.write('0')
    finally:
        # Of a device in use it is put off until it is free: LOOP_CLR_FD.
        subprocess.run(['losetup', '--detach', device], check=True)


def _change_root(spec):
    """Make another directory the root; what is written there is in memory."""
    at = spec['root_at']
    os.makedirs(at, exist_ok=True)
    mount('tmpfs', at, 'tmpfs', data='mode=755,size=2g')
    for part in ('upper', 'work', 'root'):
        os.mkdir('%s/%s' % (at, part))
    new = at + '/root'
    mount('overlay', new, 'overlay',
          data='lowerdir=%s,upperdir=%s/upper,workdir=%s/work' % (
              spec['root'], at, at))
    os.chmod(new, 0o755)
    mount('/dev', new + '/dev', flags=MS_BIND | MS_REC)
    os.mkdir(new + OLD_ROOT)
    os.chdir(new)
    if _libc.syscall(PIVOT_ROOT, b'.', OLD_ROOT[1:].encode()):
        number = ctypes.get_errno()
        raise OSError(number, 'pivot_root: %s' % os.strerror(number))
    os.chroot('.')
    os.chdir('/')


def build(spec):
    """Mount what this machine has for itself."""
    mount('none', '/', flags=MS_REC | MS_PRIVATE)
    kept = [(path, os.open(path, os.O_PATH)) for path in spec['keep']]
    sources = [(os.open(source, os.O_PATH), target)
               for source, target in spec['binds']]
    if spec['root']:
        _change_root(spec)
    mount('proc', '/proc', 'proc')
    mount('sysfs', '/sys', 'sysfs')
    mount('tmpfs', '/run', 'tmpfs', data='mode=755,size=1g')
    for number, path in enumerate(spec['overlays']):
        upper, work = ('/run/.overlay/%d/%s' % (number, kind)
                       for kind in ('upper', 'work'))
        os.makedirs(upper)
        os.makedirs(work)
        there = os.stat(path)
        os.chown(upper, there.st_uid, there.st_gid)
        os.chmod(upper, there.st_mode & 0o7777)
        mount('overlay', path, 'overlay',
              data='lowerdir=%s,upperdir=%s,workdir=%s' % (path, upper, work))
    for path, fd in kept:
        os.makedirs(path, exist_ok=True)
        mount('/proc/self/fd/%d' % fd, path, flags=MS_BIND | MS_REC)
        os.close(fd)
    for fd, target in sources:
        _bind('/proc/self/fd/%d' % fd, target)
        os.close(fd)
    for image, target in spec['loops']:
        _loop(image, target)
    if spec['root']:
        _call('umount2', OLD_ROOT.encode(), MNT_DETACH)
        os.rmdir(OLD_ROOT)
    for path, (mode, content) in spec['files'].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w') as out:
            out.write(content)
        os.chmod(path, mode)
    for path, mode in spec['folders'].items():
        os.makedirs(path, exist_ok=True)
        os.chmod(path, mode)
    with open('/proc/sys/kernel/hostname', 'w') as out:
        out.write(spec['name'])


def reap():
    """Be the init of the namespace until killed."""
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        signal.sigwait([signal.SIGCHLD])


def first(spec, go, ready):
    """What process 1 does; it never returns."""
    try:
        os.setsid()
        if os.read(go, 1) != b'g':
            os._exit(1)
        build(spec)
        os.write(ready, b'ready')
    except BaseException as error:
        os.write(ready, repr(error).encode()[:4000])
        os._exit(1)
    os.close(ready)
    os.closerange(3, 256)
    reap()


def main():
    with open(sys.argv[1]) as source:
        spec = json.load(source)
    # Until its id is written nobody could end it but by this.
    _call('prctl', PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    namespace = os.open(spec['netns'], os.O_RDONLY)
    _call('setns', namespace, NEWNET)
    _call('unshare', NEWNS | NEWUTS | NEWIPC | NEWPID)
    go_read, go_write = os.pipe()
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(go_write)
        os.close(ready_read)
        first(spec, go_read, ready_write)
    os.close(ready_write)
    with open('/proc/%d/stat' % pid) as source:
        start = int(source.read().rpartition(')')[2].split()[19])
    with open(spec['record'] + '.new', 'w') as out:
        json.dump({'pid': pid, 'start': start}, out)
    os.rename(spec['record'] + '.new', spec['record'])
    os.write(go_write, b'g')
    told = b''
    while part := os.read(ready_read, 4096):
        told += part
        if told == b'ready':
            return 0
    print(told.decode(errors='replace') or 'ended', file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
