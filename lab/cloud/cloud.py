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

"""The cloud as a whole: up, status, one compute's configuration, servers."""

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import time

from . import bootstrap
from . import config
from . import schemas
from . import server
from . import services
from . import venvs
from ..guest import image

ROOT = pathlib.Path(__file__).resolve().parents[2]


class CloudError(Exception):
    """What could not be done in the cloud, and what its log says."""


class Cloud:
    """A Nova cloud on the lab's hosts.

    :param site: the hosts level: starts daemons in places ("ctl", "host-a",
        "host-b"), knows addresses and namespaces
    :param nova: "base", "tree" or the path of a checkout
    :param images_type: of both hosts
    :param threading: "native" or "eventlet"
    """

    def __init__(self, site, nova='tree', images_type='default',
                 threading='native'):
        self.site = site
        self.folder = pathlib.Path(site.state) / 'cloud'
        self._options = {'nova': nova, 'images_type': images_type,
                         'threading': threading}

    # -- what it is made of

    @functools.cached_property
    def keys(self):
        return config.Secrets(self.folder / 'secrets.json')

    @functools.cached_property
    def layout(self):
        options = self.options()
        cache = pathlib.Path(self.site.cache)
        return config.Layout(
            folder=self.folder, control=self.site.address('ctl'),
            hosts={host: self.site.address(host) for host in self.site.hosts},
            services=cache / 'venvs/services', nova=cache / 'venvs/nova',
            tree=find_tree(options['nova']),
            images_type=options['images_type'],
            threading=options['threading'])

    def options(self) -> dict:
        """How the running cloud was brought up."""
        path = self.folder / 'options.json'
        if path.exists():
            return json.loads(path.read_text())
        return self._options

    @functools.cached_property
    def conn(self):
        """The admin's openstacksdk connection."""
        return bootstrap.connect(
            self.layout, self.keys, self.site.namespace('ctl'))

    def _all_services(self):
        layout = self.layout
        return [services.memcached(layout), services.mariadb(layout),
                services.rabbitmq(layout, self.keys),
                services.keystone(layout), services.placement(layout),
                services.glance(layout),
                services.nova_daemon(layout, 'nova-conductor'),
                services.nova_daemon(layout, 'nova-scheduler'),
                services.nova_api(layout),
                *(services.nova_compute(layout, host)
                  for host in layout.hosts)]

    # -- up

    @classmethod
    def prepare(cls, site, nova='tree') -> None:
        """What outlasts "down": environments and the guest's image."""
        cache = pathlib.Path(site.cache)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            works = [pool.submit(venvs.ensure, cache / 'venvs', site.step),
                     pool.submit(cls._guest, cache, site)]
            for work in works:
                work.result()
        tree = find_tree(nova)
        if tree:
            build_extensions(tree, cache / 'venvs/extensions.log')

    @staticmethod
    def _guest(cache, site):
        if not image.is_made(cache / 'guest'):
            with site.step('guest image'):
                image.ensure(cache / 'guest')

    def up(self) -> None:
        """Bring it up; the hosts may come up at the same time.

        A compute that is started before its conductor listens loses 10 s to
        RPC time-outs, so the order is: databases, keystone, control plane,
        computes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / 'options.json').write_text(json.dumps(self._options))
        self.__dict__.pop('layout', None)
        with self.site.step('configuration'):
            config.Writer(self.layout, self.keys).write_all()
        plan = schemas.Schemas(self.layout, self.keys, self._run_control)
        layout = self.layout
        pool = concurrent.futures.ThreadPoolExecutor(max_workers=8)
        try:
            rabbit = pool.submit(self._start, services.rabbitmq(
                layout, self.keys))
            cache = pool.submit(self._start, services.memcached(layout))
            with self.site.step('MariaDB'):
                plan.install_mariadb()
                self._start(services.mariadb(layout))
                plan.create_databases()
            identity = pool.submit(self._identity, plan)
            placement = pool.submit(self._schema_then_start, plan.placement,
                                    services.placement(layout))
            glance = pool.submit(self._schema_then_start, plan.glance,
                                 services.glance(layout))
            with self.site.step('Nova schemas'):
                plan.nova()
            for work in (rabbit, cache, identity):
                work.result()
            with self.site.step('control plane'):
                _all(pool, [functools.partial(self._start, service)
                            for service in (
                    services.nova_daemon(layout, 'nova-conductor'),
                    services.nova_daemon(layout, 'nova-scheduler'),
                    services.nova_api(layout))])
                placement.result()
                glance.result()
            filled = pool.submit(self._fill)
            with self.site.step('computes'):
                _all(pool, [functools.partial(self.start_compute, host)
                            for host in layout.hosts])
                self._wait_computes()
                plan.discover_hosts()
            filled.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        (self.folder / 'ready').touch()

    def _identity(self, plan):
        with self.site.step('keystone'):
            plan.keystone()
            self._start(services.keystone(self.layout))
            bootstrap.identity(self.conn, self.layout, self.keys)
        # its token's catalogue is from before the endpoints
        del self.conn

    def _schema_then_start(self, schema, service):
        with self.site.step(service.name):
            schema()
            self._start(service)

    def _fill(self):
        with self.site.step('images and flavors'):
            bootstrap.flavors(self.conn)
            bootstrap.images(
                self.conn, pathlib.Path(self.site.cache) / 'guest')

    def _run_control(self, name, argv, env=None):
        log = self.site.log(name, 'ctl')
        done = self.site.run('ctl', [str(word) for word in argv], env or {})
        with open(log, 'a') as file:
            file.write(done.stdout + done.stderr)
        if done.returncode:
            raise CloudError('%s ended with %d (log: %s):\n%s' % (
                ' '.join(map(str, argv[:4])), done.returncode, log,
                '\n'.join((done.stdout + done.stderr).splitlines()[-20:])))
        return done

    def _start(self, service):
        log = self.site.log(service.name, service.place)
        offset = log.stat().st_size if log.exists() else 0
        self.site.start(service.name, service.place,
                        [str(word) for word in service.argv], service.env)
        services.wait_ready(
            service, log, offset, self.site.namespace('ctl'),
            self.layout.control,
            lambda: self.site.alive(service.name, service.place))

    def _wait_computes(self, limit=60):
        until = time.monotonic() + limit
        while True:
            up = {found.host for found in self.conn.compute.services(
                binary='nova-compute') if found.state == 'up'}
            if up >= set(self.layout.hosts):
                return
            if time.monotonic() > until:
                raise CloudError('computes up after %d s: %s, wanted: %s' % (
                    limit, sorted(up), sorted(self.layout.hosts)))
            time.sleep(.3)

    # -- one service

    def start_compute(self, host) -> None:
        """Start a host's nova-compute; back when its RPC server listens."""
        self._start(services.nova_compute(self.layout, host))

    def restart(self, place, name) -> None:
        """Restart a daemon of the cloud.

        :param place: "ctl" or a host
        :raises CloudError: there is no such daemon
        """
        for service in self._all_services():
            if (service.place, service.name) == (place, name):
                self.site.stop(name, place)
                self._start(service)
                return
        raise CloudError('%s has no daemon %s; it has %s' % (
            place, name, ', '.join(service.name for service in
                                   self._all_services()
                                   if service.place == place) or 'none'))

    def set(self, host, section, key, value) -> None:
        """Set an option of one compute's nova.conf and restart it.

        :param host: "ctl" sets it for the control plane and all computes;
            the API, conductor and scheduler are restarted
        """
        self.set_many(host, {(section, key): value})

    def set_many(self, host, values) -> None:
        """Set several options, one restart.

        :param values: by (section, key)
        """
        for (section, key), value in values.items():
            config.set_option(
                self.layout.overrides(host), section, key, str(value))
        if host == 'ctl':
            for name in ('nova-conductor', 'nova-scheduler', 'nova-api'):
                self.restart('ctl', name)
        else:
            self.restart(host, 'nova-compute')

    def reset(self, host) -> None:
        """Undo all that was set for a host; restart it if there was any."""
        path = self.layout.overrides(host)
        if path.exists() and path.read_text().strip():
            path.write_text('')
            self.restart(host, 'nova-compute')

    def compute_log(self, host) -> pathlib.Path:
        return self.site.log('nova-compute', host)

    # -- use

    def openstack(self, *words, capture=True) -> subprocess.CompletedProcess:
        """Run the admin's command line client."""
        return self.site.run(
            'ctl', [str(self.layout.services / 'bin/openstack'), *words],
            bootstrap.environment(self.layout, self.keys), capture=capture)

    def manage(self, *words, program='nova-manage', place=None):
        """Run nova-manage or nova-status.

        :param place: a host, whose configuration is then read too
        """
        return self.site.run(
            place or 'ctl', [
                str(self.layout.nova / 'bin' / program),
                *self.layout.nova_files(place), *words],
            services.nova_environment(self.layout))

    def flavor(self, name):
        return self.conn.compute.find_flavor(name, ignore_missing=False)

    def image(self, name):
        return self.conn.image.find_image(name, ignore_missing=False)

    def boot(self, name, flavor='lab.small', image='guest', host=None,
             script=None, wait=True, **more) -> server.Server:
        """Create a server without a network.

        :param host: where; None: the scheduler's choice
        :param script: user data: lines "boot N: COMMAND" that the guest obeys
        :param wait: until it is ACTIVE and the guest has testified
        :param more: for openstacksdk's create_server
        """
        if script:
            more['user_data'] = server.encode_user_data(script)
        if host:
            more['host'] = host
        made = self.conn.compute.create_server(
            name=name, image_id=self.image(image).id,
            flavor_id=self.flavor(flavor).id, networks='none', **more)
        made = server.Server(self, made.id)
        if wait:
            try:
                made.wait('ACTIVE')
                made.testimony()
            except server.ServerError:
                with contextlib.suppress(Exception):
                    made.delete()
                raise
        return made

    # -- status

    def is_ready(self) -> bool:
        return (self.folder / 'ready').exists()

    def status(self) -> tuple[bool, list[tuple[str, str, bool, str]]]:
        """:returns: all is well, and (kind, name, ok, detail) of each part"""
        rows = []
        for service in self._all_services():
            alive = self.site.alive(service.name, service.place)
            rows.append(('daemon', '%s/%s' % (service.place, service.name),
                         alive, 'runs' if alive else 'does not run'))
        try:
            for found in self.conn.compute.services():
                rows.append((
                    'service', '%s/%s' % (found.host, found.binary),
                    found.state == 'up', '%s, %s' % (
                        found.state, found.status)))
            for found in self.conn.compute.servers(all_projects=True):
                rows.append((
                    'server', found.name, found.status != 'ERROR',
                    '%s on %s, %s' % (found.id, found.compute_host,
                                      found.status)))
        except Exception as error:
            rows.append(('service', 'API', False, str(error)))
        return all(row[2] for row in rows), rows


def _all(pool, works):
    for work in [pool.submit(work) for work in works]:
        work.result()


def find_tree(nova) -> pathlib.Path | None:
    """The checkout that is meant.

    :param nova: "base" (None is returned), "tree" (the repository's, or
        LAB_NOVA_TREE of the environment) or a path
    """
    if nova == 'base':
        return None
    path = pathlib.Path(
        os.environ.get('LAB_NOVA_TREE') or ROOT / 'tree'
        if nova == 'tree' else nova).resolve()
    if not (path / 'nova/cmd/compute.py').exists():
        raise CloudError('%s is no checkout of Nova; "make tree" makes one'
                         % path)
    return path


def build_extensions(tree, log) -> None:
    """Compile the checkout's extensions where they are older than it."""
    sources = [*tree.glob('nova/**/*.pyx'), *tree.glob('nova/**/*.pxd')]
    if not sources:
        return
    built = list(tree.glob('nova/**/*.so'))
    if built and (min(path.stat().st_mtime for path in built) >
                  max(path.stat().st_mtime for path in sources)):
        return
    with open(log, 'w') as out:
        done = subprocess.run(
            [os.sys.executable, 'setup.py', '--quiet', 'build_ext',
             '--inplace'], cwd=tree, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, 'PBR_VERSION': '34.0.0'})
    if done.returncode:
        raise CloudError('the extensions of %s could not be built:\n%s' % (
            tree, pathlib.Path(log).read_text()[-2000:]))
