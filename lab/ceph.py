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

"""Ceph beside the hosts: one monitor, one OSD in memory, in ctl."""

import base64
import contextlib
import json
import pathlib
import time
import uuid

from . import config
from . import nova_user
from .errors import LabError
from .machine import Machine

FOLDER = config.STATE / 'ceph'
LOGS = config.LOGS / 'ceph'
#: Modules of Debian's Python, which the environments don't have, and they
#: alone.
PYTHON = FOLDER / 'python'
MODULES = ('rados', 'rbd')
DEBIAN_PYTHON = pathlib.Path('/usr/lib/python3/dist-packages')
ADDRESS = config.ADDRESSES[config.CONTROL]
PORT = 6789
USER = 'nova'
DISKS, IMAGES = 'nova', 'images'  # Ceph pools
#: libvirt's secret with the key, on both hosts.
SECRET = str(uuid.uuid5(uuid.NAMESPACE_DNS, 'secret.ceph.nova.lab'))
POOL = 'nova-disks-pool'  # libvirt's
CONF = '/etc/ceph/ceph.conf'
TIMEOUT = 180  # seconds for each step; 5 are enough on an idle machine

_CONF = '''[global]
fsid = {fsid}
mon_host = [v2:{address}:3300,v1:{address}:{port}]
public_addr = {address}
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = {folder}/keyring
run_dir = {folder}/run
log_file = {logs}/$name.log
admin_socket = {folder}/run/$name.$pid.asok
crash_dir = {folder}/crash
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_allow_pool_delete = true
auth_allow_insecure_global_id_reclaim = false
rbd_default_features = 61
ms_bind_ipv6 = false
[mon]
mon_data = {folder}/mon
mon_initial_members = a
mon_cluster_log_file = {logs}/cluster.log
mon_data_avail_crit = 1
mon_data_avail_warn = 2
[mgr]
mgr_data = {folder}/mgr
mgr_initial_modules =
[osd]
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = 8589934592
osd_memory_target = 939524096
'''
_CLIENT_CONF = '''[global]
mon_host = {address}:{port}
keyring = /etc/ceph/$cluster.$name.keyring
'''
_CAPS = {
    'mon.': ['mon', 'allow *'],
    'client.admin': ['mon', 'allow *', 'osd', 'allow *', 'mgr', 'allow *'],
    'mgr.x': ['mon', 'allow profile mgr', 'osd', 'allow *'],
    'osd.0': ['mon', 'allow profile osd', 'mgr', 'allow profile osd', 'osd',
              'allow *']}


class Ceph:
    """The Ceph of the lab that is up, or is to be."""

    def __init__(self):
        self.control = Machine(config.CONTROL)
        self._env = {'CEPH_CONF': str(FOLDER / 'ceph.conf')}

    def run(self, *argv, **arguments) -> str:
        """A program of Ceph as its administrator, in ctl; its output."""
        return self.control.run(argv, env=self._env, **arguments).stdout

    def up(self) -> None:
        """Bring it up; ctl is.

        :raises: LabError
        """
        for name in ('run', 'mon', 'mgr', 'osd', 'crash'):
            (FOLDER / name).mkdir(parents=True)
        LOGS.mkdir(parents=True, exist_ok=True)
        self._link_modules()
        fsid = str(uuid.uuid4())
        (FOLDER / 'ceph.conf').write_text(_CONF.format(
            fsid=fsid, address=ADDRESS, port=PORT, folder=FOLDER, logs=LOGS))
        self._make_keys()
        self.run('monmaptool', '--create', '--addv', 'a',
                 '[v2:%s:3300,v1:%s:%d]' % (ADDRESS, ADDRESS, PORT),
                 '--fsid', fsid, FOLDER / 'monmap')
        self.run('ceph-mon', '-i', 'a', '--mkfs', '--monmap',
                 FOLDER / 'monmap', '--keyring', FOLDER / 'keyring')
        self._start('mon', 'a')
        self._start('mgr', 'x')
        osd = str(uuid.uuid4())
        self.run('ceph', 'osd', 'new', osd, '0', timeout=TIMEOUT)
        self.run('ceph-osd', '-i', '0', '--mkfs', '--osd-uuid', osd,
                 timeout=TIMEOUT)
        self._start('osd', '0')
        self.control.wait(self._is_up, TIMEOUT, 'up', 'ceph-osd')
        for name in (DISKS, IMAGES):
            self.run('ceph', 'osd', 'pool', 'create', name, '8', '8',
                     timeout=TIMEOUT)
        for name in (DISKS, IMAGES):
            self.run('rbd', 'pool', 'init', name, timeout=TIMEOUT)
        # What is left for a pool, the manager says.
        self.control.wait(self._tells_room, TIMEOUT, 'counting', 'ceph-mgr')
        caps = ', '.join('profile rbd pool=%s' % name
                         for name in (DISKS, IMAGES))
        self.run('ceph', 'auth', 'get-or-create', 'client.' + USER,
                 'mon', 'profile rbd', 'osd', caps, 'mgr', caps)

    @staticmethod
    def _link_modules():
        PYTHON.mkdir()
        for name in MODULES:
            found = sorted(DEBIAN_PYTHON.glob(name + '.*.so'))
            if not found:
                raise LabError('there is no module %s in %s' % (
                    name, DEBIAN_PYTHON))
            (PYTHON / found[0].name).symlink_to(found[0])

    def _make_keys(self):
        keyring = FOLDER / 'keyring'
        for name, caps in _CAPS.items():
            words = [word for pair in zip(caps[::2], caps[1::2])
                     for word in ('--cap', *pair)]
            create = [] if keyring.exists() else ['-C']
            self.run('ceph-authtool', *create, keyring, '--gen-key', '-n',
                     name, *words)

    def _start(self, kind, name):
        self.control.start('ceph-' + kind, [
            '/usr/bin/ceph-' + kind, '-f', '-i', name], env=self._env)

    def _is_up(self):
        time.sleep(.2)
        done = self.control.run(
            ['ceph', '--connect-timeout', '5', 'osd', 'stat', '-f', 'json'],
            env=self._env, check=False)
        with contextlib.suppress(ValueError):
            return json.loads(done.stdout).get('num_up_osds') == 1

    def _tells_room(self):
        time.sleep(.2)
        told = json.loads(self.run('ceph', 'df', '-f', 'json'))
        return told['stats']['total_bytes'] and {
            pool['name'] for pool in told['pools']} >= {DISKS, IMAGES}

    @property
    def key(self) -> str:
        """The key of the user that Nova and Glance log in as."""
        return self.run('ceph', 'auth', 'get-key', 'client.' + USER).strip()

    # -- who uses it

    def tell(self, machine, group: str = 'root') -> None:
        """Let a machine's programs find Ceph, and log in.

        :param group: whose processes may
        """
        self._put(machine, CONF, _CLIENT_CONF.format(
            address=ADDRESS, port=PORT), 0o644, group)
        self._put(machine, '/etc/ceph/ceph.client.%s.keyring' % USER,
                  '[client.%s]\nkey = %s\n' % (USER, self.key), 0o640, group)

    @staticmethod
    def _put(machine, path, content, mode, group):
        machine.run(['sh', '-euc', 'mkdir -p /etc/ceph; cat > "$0"; '
                     'chgrp %s "$0"; chmod %o "$0"' % (group, mode), path],
                    input=content)

    def join(self, host) -> None:
        """Let a host's libvirt and nova-compute use it."""
        self.tell(host, nova_user.NAME)
        with contextlib.closing(host.connect()) as connection:
            connection.secretDefineXML(
                "<secret ephemeral='no' private='no'><uuid>%s</uuid><usage "
                "type='ceph'><name>client.%s</name></usage></secret>" % (
                    SECRET, USER)).setValue(base64.b64decode(self.key))
            pool = connection.storagePoolDefineXML(self.pool_xml())
            pool.create()
            pool.setAutostart(1)

    @contextlib.contextmanager
    def silent(self):
        """Who keeps the images answers nobody as long as the context lasts.

        A group of them may wait for a lease for ever then ("laggy"), which no
        other OSD gives; one that was down doesn't wait.
        """
        try:
            with self.control.paused('ceph-osd'):
                yield
        finally:
            self.run('ceph', 'osd', 'down', '0')

    @staticmethod
    def pool_xml(name: str = POOL, of_ceph: str = DISKS) -> str:
        """A pool of libvirt's over one of Ceph's."""
        return (
            "<pool type='rbd'><name>%s</name><source><host name='%s' "
            "port='%d'/><name>%s</name><auth type='ceph' username='%s'>"
            "<secret uuid='%s'/></auth></source></pool>" % (
                name, ADDRESS, PORT, of_ceph, USER, SECRET))

    def images(self, pool: str = DISKS) -> list[str]:
        """Names of the images of a Ceph pool."""
        return sorted(json.loads(self.run(
            'rbd', '--pool', pool, 'ls', '--format', 'json')))

    def info(self, image: str, pool: str = DISKS) -> dict:
        """What `rbd info` says of an image."""
        return json.loads(self.run(
            'rbd', '--pool', pool, 'info', image, '--format', 'json'))

    def snapshots(self, image: str, pool: str = DISKS) -> list[str]:
        return [found['name'] for found in json.loads(self.run(
            'rbd', '--pool', pool, 'snap', 'ls', image, '--format',
            'json'))]


def is_wanted(options) -> bool:
    """Whether `up` was asked for it."""
    return 'ceph' in options.storage.split(',')
