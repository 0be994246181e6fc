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

"""No SSH in a host but for a record of who tried; or SSH as stock Nova wants it."""

import json
import pathlib
import subprocess
import sys

from . import config

NAMES = ('ssh', 'scp', 'sftp', 'rsync')
FOLDERS = ('/usr/local/sbin', '/usr/local/bin', '/usr/sbin', '/usr/bin')
RECORD = '/var/log/lab/ssh-attempts'

# It runs with what a bare interpreter has, in whatever environment.
RECORDER = '''#!%(python)s -SE
import json, os, sys, time
def command(pid):
    try:
        return open('/proc/%%d/cmdline' %% pid).read().split(chr(0))[:-1]
    except OSError:
        return []
line = json.dumps({'time': time.time(), 'host': %(host)r, 'uid': os.getuid(),
                   'command': [os.path.basename(sys.argv[0]), *sys.argv[1:]],
                   'parent': command(os.getppid())})
fd = os.open(%(record)r, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
os.write(fd, line.encode() + b'\\n')
sys.stderr.write('%%s: there is no SSH on this host of the lab; the attempt '
                 'is recorded\\n' %% os.path.basename(sys.argv[0]))
sys.exit(255)
'''


def make_recorder(host: str, folder: pathlib.Path) -> list[list[str]]:
    """Put the recorder where programs look for SSH's.

    :param folder: of the host, outside
    :returns: binds for the host's mount namespace
    """
    program = folder / 'ssh-recorder'
    program.write_text(RECORDER % {
        'python': sys.executable, 'host': host, 'record': RECORD})
    program.chmod(0o755)
    record = folder / 'record'
    record.mkdir(exist_ok=True)
    attempts = record / 'ssh-attempts'
    attempts.touch()
    attempts.chmod(0o666)
    binds = [[str(record), str(pathlib.Path(RECORD).parent)]]
    for name in NAMES:
        # Also where it isn't installed: /usr/bin is the host's own.
        binds.append([str(program), '/usr/bin/' + name])
        binds += [[str(program), path] for path in (
            '%s/%s' % (parent, name) for parent in FOLDERS[:-1])
            if pathlib.Path(path).exists()]
    return binds


def attempts(folder: pathlib.Path) -> list[dict]:
    """What was recorded: time, host, uid, command, parent (its command)."""
    path = folder / 'record' / 'ssh-attempts'
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_keys(folder: pathlib.Path) -> None:
    """One key pair for all users on all hosts, a host key for each."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ('id_ed25519', *('host-key-' + host for host in config.HOSTS)):
        if not (folder / name).exists():
            subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '',
                            '-C', 'lab', '-f', folder / name], check=True)


def user_files(home: str, keys: pathlib.Path) -> dict:
    """Files with which a user logs in to the other host, as in server_files.

    :param home: the user's folder
    """
    return {
        home + '/.ssh/id_ed25519': [0o600, (keys / 'id_ed25519').read_text()],
        home + '/.ssh/authorized_keys': [
            0o600, (keys / 'id_ed25519.pub').read_text()],
        home + '/.ssh/config': [0o600, 'Host *\n StrictHostKeyChecking no\n'
                                ' UserKnownHostsFile /dev/null\n'
                                ' LogLevel ERROR\n']}


def server_files(host: str, address: str, keys: pathlib.Path) -> dict:
    """Files of a host with sshd: path to [mode, content]."""
    return {
        **user_files('/root', keys),
        '/etc/ssh/lab_host_key': [
            0o600, (keys / ('host-key-' + host)).read_text()],
        '/etc/ssh/lab_sshd_config': [0o644, f'''ListenAddress {address}
HostKey /etc/ssh/lab_host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
UseDNS no
PidFile none
MaxStartups 100
Subsystem sftp internal-sftp
''']}
