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

"""The user as which nova-compute runs, as Debian's packages make it."""

import pathlib
import shlex
import sys

from .errors import LabError

NAME = 'nova'
#: Of the user and of its group.
ID = 64060
HOME = '/var/lib/nova'
PRIVSEP_HELPER = '/usr/bin/privsep-helper'

# What the postinst of nova-common and nova-compute-qemu do, and systemd for
# RuntimeDirectory=. With UsePAM=no sshd takes the "!" for a locked account.
MAKE = '''
groupadd --system --gid %(id)d nova
useradd --system --uid %(id)d --gid nova --home-dir %(home)s \\
    --no-create-home --shell /bin/sh --password '*' nova
usermod --append --groups libvirt nova
install -d -o nova -g adm -m 0750 /var/log/nova
install -d -o nova -g nova -m 0755 /run/nova /run/lock/nova /var/cache/nova \\
    %(home)s %(home)s/instances
cat > /etc/sudoers.d/nova-common << END
nova ALL = (root) NOPASSWD: /usr/bin/nova-rootwrap /etc/nova/rootwrap.conf *
nova ALL = (root) NOPASSWD: %(helper)s *
END
chmod 0440 /etc/sudoers.d/nova-common
'''


def make(host, keys=None) -> None:
    """Make the user on a host that has begun to run.

    :param keys: files below its home, path to [mode, content]
    """
    host.run(['sh', '-euc', MAKE % {
        'id': ID, 'home': HOME, 'helper': PRIVSEP_HELPER}])
    for path, (mode, content) in (keys or {}).items():
        host.run(['install', '-d', '-o', NAME, '-g', NAME, '-m', '0700',
                  str(pathlib.PurePath(path).parent)])
        host.run(['sh', '-euc', 'cat > "$0"; chown nova:nova "$0"; '
                  'chmod %o "$0"' % mode, path], input=content)
    _open_way(host, pathlib.Path(sys.executable).resolve())


def _open_way(host, path) -> None:
    """Let everybody on a host pass to a file; /root is the host's own."""
    for parent in reversed(path.parents):
        if parent.stat().st_mode & 0o001:
            continue
        if parent != pathlib.Path('/root'):
            raise LabError('user nova can\'t reach %s: %s is closed to it; '
                           'open it with: chmod o+x %s' % (
                               path, parent, parent))
        host.run(['chmod', 'o+x', str(parent)])


def command(argv, umask: str = '') -> list[str]:
    """A command as the user, with its groups and no capability.

    :param umask: of the process, octal; none: as it is
    """
    before = ['sh', '-c', 'umask %s; exec "$@"' % umask, 'sh'] if umask else []
    return [*before, 'setpriv', '--reuid=' + NAME, '--regid=' + NAME,
            '--init-groups', '--inh-caps=-all', '--', *map(str, argv)]


def environment() -> dict[str, str]:
    return {'USER': NAME, 'LOGNAME': NAME, 'HOME': HOME}


def write_privsep_helper(host, program, python_path='') -> None:
    """Put the program where sudo finds it: sudo resets the environment.

    :param program: its words: a path, or an interpreter and its arguments
    :param python_path: where Nova lies; none: in the environment
    """
    path = host.path(PRIVSEP_HELPER)
    new = path.with_name('.privsep-helper')
    new.write_text('#!/bin/sh\nPYTHONPATH=%s exec %s "$@"\n' % (
        shlex.quote(str(python_path)), shlex.join(map(str, program))))
    new.chmod(0o755)
    new.rename(path)
