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

"""The daemons of the cloud: how each is started and when it is ready."""

import dataclasses
import os
import pathlib
import time

from . import config
from .. import ceph
from .. import nova_user
from ..errors import LabError

MARIADB = (
    '--innodb-flush-log-at-trx-commit=0', '--innodb-doublewrite=0',
    '--innodb-buffer-pool-size=192M', '--max-connections=500',
    '--skip-log-bin', '--skip-name-resolve', '--character-set-server=utf8mb3',
    '--performance-schema=OFF')
SOCKET = '/run/mariadb.socket'  # in ctl's own /run
DATABASES = ('keystone', 'placement', 'glance', 'nova', 'nova_api',
             'nova_cell0', 'neutron')
# What a service of Nova logs (nova.service, at debug level) when its RPC
# server listens.
CONSUMING = 'Join ServiceGroup membership'
# What uwsgi logs; its port is bound long before the application is loaded.
LOADED = "WSGI app 0 (mountpoint='') ready"


@dataclasses.dataclass(frozen=True)
class Service:
    """One daemon.

    :ivar place: "ctl" or a host's name
    :ivar ready: a port number of its machine, or a text that the log
        has as soon as the daemon serves
    """

    name: str
    place: str
    argv: tuple
    env: dict = dataclasses.field(default_factory=dict)
    ready: int | str | None = None


def wsgi(layout, name, venv, module, processes, *more, port=None, env=None):
    """An API under uwsgi.

    :param port: its name in config.PORTS where that isn't the service's
    :param more: further arguments of uwsgi
    """
    return Service(name, 'ctl', (
        venv / 'bin/uwsgi', '--http-socket',
        '%s:%d' % (layout.control, config.PORTS[port or name]), '--module',
        module + ':application', '--master', '--processes', processes,
        '--enable-threads', '--lazy-apps', '--need-app', '--die-on-term',
        '--buffer-size', 65535, '--add-header', 'Connection: close',
        '--socket-timeout', 300, '--listen', 100, '--procname-prefix-spaced',
        name, *more), env or {}, LOADED)


def nova_environment(layout) -> dict:
    """What a process needs to run the Nova under test."""
    env = {'PATH': '%s/bin:%s' % (layout.nova, os.environ['PATH'])}
    if layout.tree:
        env['PYTHONPATH'] = str(layout.tree)
    return env


def with_keys(layout, env) -> dict:
    """Let [key_manager]backend be lab_keys.FileKeyManager, for vTPMs."""
    here = str(pathlib.Path(__file__).with_name('keys'))
    return {**env, 'LAB_KEYS': str(layout.folder / 'keys'),
            'PYTHONPATH': ':'.join(filter(None, (
                env.get('PYTHONPATH'), here)))}


def with_ceph(layout, env) -> dict:
    """Let a process import librados and librbd, if there is Ceph."""
    if not layout.ceph:
        return env
    return {**env, 'PYTHONPATH': ':'.join(filter(None, (
        env.get('PYTHONPATH'), str(ceph.PYTHON))))}


def memcached(layout) -> Service:
    return Service('memcached', 'ctl', (
        'memcached', '-u', 'nobody', '-l', layout.control, '-m', 64, '-t', 2),
        ready=config.PORTS['memcached'])


def mariadb(layout) -> Service:
    data = layout.folder / 'mariadb'
    return Service('mariadb', 'ctl', (
        'mariadbd', '--no-defaults', '--user=root',
        '--datadir=%s' % (data / 'data'), '--bind-address=' + layout.control,
        '--socket=' + SOCKET, '--pid-file=%s' % (data / 'pid'), *MARIADB),
        ready=config.PORTS['mariadb'])


def rabbitmq(layout, keys) -> Service:
    home = layout.folder / 'rabbitmq'
    for folder in ('mnesia', 'log'):
        (home / folder).mkdir(parents=True, exist_ok=True)
    conf = home / 'rabbitmq.conf'
    conf.touch(mode=0o600)
    conf.write_text(f'''loopback_users = none
listeners.tcp.1 = {layout.control}:{config.PORTS['rabbitmq']}
default_user = openstack
default_pass = {keys.rabbit}
vm_memory_high_watermark.absolute = 1GB
disk_free_limit.absolute = 200MB
log.file.level = warning
''')
    (home / 'plugins').write_text('[].\n')
    cookie = home / '.erlang.cookie'
    if not cookie.exists():
        cookie.touch(mode=0o600)
        cookie.write_text(keys.cookie)
        cookie.chmod(0o400)
    return Service('rabbitmq', 'ctl', (
        '/usr/lib/rabbitmq/bin/rabbitmq-server',), {
            'RABBITMQ_NODENAME': 'lab@localhost',
            'RABBITMQ_CONFIG_FILE': str(conf),
            'RABBITMQ_MNESIA_BASE': str(home / 'mnesia'),
            'RABBITMQ_LOG_BASE': str(home / 'log'),
            'RABBITMQ_ENABLED_PLUGINS_FILE': str(home / 'plugins'),
            'RABBITMQ_PID_FILE': str(home / 'pid'),
            # One scheduler: idle ones spin for their work.
            'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS': '+S 1:1 +sbwt none',
            'HOME': str(home)}, config.PORTS['rabbitmq'])


def keystone(layout) -> Service:
    etc = layout.etc / 'keystone'
    return wsgi(layout, 'keystone', layout.services, 'keystone.wsgi.api', 2,
                env={'OS_KEYSTONE_CONFIG_DIR': str(etc),
                     'OS_KEYSTONE_CONFIG_FILES':
                     str(etc / 'keystone.conf')})


def placement(layout) -> Service:
    return wsgi(layout, 'placement', layout.services, 'placement.wsgi.api',
                1, env={'OS_PLACEMENT_CONFIG_DIR':
                        str(layout.etc / 'placement')})


def glance(layout) -> Service:
    # glanceclient sends chunks of 1 MiB, which uwsgi's default refuses.
    return wsgi(layout, 'glance', layout.services, 'glance.wsgi.api', 1,
                '--threads', 4, '--chunked-input-limit', 64 << 20,
                '--chunked-input-timeout', 120,
                env=with_ceph(layout, {
                    'OS_GLANCE_CONFIG_DIR': str(layout.etc / 'glance')}))


def empty_network(layout) -> Service:
    return Service('network', 'ctl', (
        layout.services / 'bin/uwsgi', '--http-socket',
        '%s:%d' % (layout.control, config.PORTS['network']), '--wsgi-file',
        pathlib.Path(__file__).with_name('empty_network.py'), '--master',
        '--die-on-term', '--need-app', '--procname-prefix-spaced',
        'network'), {}, 'spawned uWSGI worker 1')


def nova_api(layout) -> Service:
    return wsgi(layout, 'nova-api', layout.nova, 'nova.wsgi.osapi_compute',
                2, env={
                    **nova_environment(layout),
                    'OS_NOVA_CONFIG_DIR': str(layout.etc / 'nova'),
                    'OS_NOVA_CONFIG_FILES':
                    'api-paste.ini;nova.conf;ctl.conf;set-ctl.conf'})


def nova_daemon(layout, name) -> Service:
    """nova-conductor or nova-scheduler."""
    return Service(name, 'ctl', (
        layout.nova / 'bin' / name, *layout.nova_files()),
        nova_environment(layout), CONSUMING)


def nova_compute(layout, host) -> Service:
    argv = [layout.nova / 'bin/nova-compute', *layout.nova_files(host)]
    env = with_ceph(layout, with_keys(layout, nova_environment(layout)))
    if layout.user:
        argv = nova_user.command(argv, layout.umask)
        env.update(nova_user.environment())
    env.update(layout.environment)
    return Service('nova-compute', host, tuple(argv), env, CONSUMING)


def manage(layout, name) -> tuple:
    """The start of a command of nova-manage, nova-status and the like."""
    return (layout.nova / 'bin' / name, *layout.nova_files())


def wait_ready(service: Service, machine, offset: int, seconds: float = 180,
               given_up=lambda: False) -> None:
    """Wait until a daemon serves.

    :param machine: where it runs
    :param offset: where its log ended before it was started, in bytes
    :param given_up: asked whether to wait no longer
    :raises LabError: it has ended, or does not serve in time
    """
    def serves():
        if given_up():
            raise LabError('%s was not waited for' % service.name)
        if isinstance(service.ready, int):
            return machine.listening(service.ready)
        return _says(service, machine, offset)

    if service.ready:
        machine.wait(serves, seconds, 'serving', service.name)


def _says(service, machine, offset):
    time.sleep(.1)
    with open(machine.service(service.name).log, errors='replace') as file:
        file.seek(offset)
        return service.ready in file.read()
