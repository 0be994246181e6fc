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

"""SASL inside TLS, by the commands of the admin guide: Kerberos and SCRAM.

A KDC runs in ctl. What differs from host to host lies in the lab's folder.
"""

import pathlib

from . import config
from . import guide
from . import nova_user
from .machine import Machine

REALM = 'LAB.EXAMPLE'
SERVICE = 'krb5kdc'
KEYTAB = '/etc/nova/krb5.keytab'
#: Of nova-compute, as the guide says.
ENVIRONMENT = {'KRB5_CLIENT_KTNAME': KEYTAB}
PASSWORD = 'no secret in a lab'
_FOLDER = config.STATE / 'krb5'
_KRB5_CONF = '''[libdefaults]
default_realm = %(realm)s
dns_lookup_kdc = false
dns_lookup_realm = false
clockskew = 1
[realms]
%(realm)s = {
 kdc = %(control)s
}
[domain_realm]
%(names)s
'''
_KDC_CONF = '''[kdcdefaults]
kdc_listen = %(control)s:88
kdc_tcp_listen = %(control)s:88
[realms]
%(realm)s = {
 database_name = %(folder)s/principal
 key_stash_file = %(folder)s/stash
}
'''


class Realm:
    """The Kerberos realm of the lab; its KDC outlives this object."""

    def __init__(self):
        self.control = Machine(config.CONTROL)
        self._environment = {'KRB5_KDC_PROFILE': str(_FOLDER / 'kdc.conf'),
                             'KRB5_CONFIG': '/etc/krb5.conf'}

    def create(self, *hosts) -> None:
        """Make it, with all principals, and start the KDC."""
        _FOLDER.mkdir(mode=0o700, exist_ok=True)
        values = {
            'realm': REALM, 'control': config.ADDRESSES[config.CONTROL],
            'folder': _FOLDER, 'names': '\n'.join(
                '%s = %s' % (name, REALM) for name in config.ADDRESSES)}
        (_FOLDER / 'kdc.conf').write_text(_KDC_CONF % values)
        for machine in (self.control, *hosts):
            machine.path('/etc/krb5.conf').write_text(_KRB5_CONF % values)
        if not (_FOLDER / 'principal').exists():
            self._run(['kdb5_util', 'create', '-r', REALM, '-s', '-P', 'lab'])
        if not any(service.name == SERVICE and service.alive()
                   for service in self.control.services()):
            self.control.start(SERVICE, ['/usr/sbin/krb5kdc', '-n'],
                               env=self._environment)
        self.control.wait_port(88, 20, SERVICE)
        for host in hosts:
            if not (_FOLDER / (host.name + '.nova.keytab')).exists():
                guide.run(self.control, 'sasl-principals', _FOLDER,
                          HOST=host.name, REALM=REALM, **self._environment)

    def _run(self, argv):
        return self.control.run(argv, env=self._environment)

    def add(self, principal: str) -> pathlib.Path:
        """Make another principal.

        :returns: its keytab
        """
        path = _FOLDER / (principal.replace('/', '_') + '.keytab')
        path.unlink(missing_ok=True)
        self._run(['kadmin.local', 'addprinc', '-randkey', principal])
        self._run(['kadmin.local', 'ktadd', '-k', path, principal])
        return path


def install(keytab: pathlib.Path, host, path: str) -> None:
    """Give nova a keytab on a host."""
    host.path(path).write_bytes(keytab.read_bytes())
    host.run(['chown', 'root:nova', path])
    host.run(['chmod', '640', path])


def short_ticket(host, seconds: int) -> str:
    """Fetch nova a ticket that expires soon.

    :returns: KRB5CCNAME of its cache
    """
    cache = 'FILE:/var/lib/nova/short-ticket'
    host.run(nova_user.command([
        'kinit', '-l', '%ds' % seconds, '-k', '-t', KEYTAB, '-c', cache,
        'nova/' + host.name]))
    return cache


def use_gssapi(host) -> None:
    """Have a host's libvirt ask for Kerberos; libvirtd is restarted.

    As a client libvirtd has its keytab too, for live migrations.
    """
    guide.run(host, 'sasl-install', _FOLDER, HOST=host.name,
              NOVA_GROUP=nova_user.NAME)
    _restart(host, ', '.join('"nova/%s", "libvirt/%s"' % (name, name)
                             for name in config.HOSTS),
             {'KRB5_CLIENT_KTNAME': '/etc/libvirt/krb5.tab'})


def use_scram(host) -> None:
    """Have a host's libvirt ask for a password; libvirtd is restarted."""
    guide.run(host, 'sasl-scram', NOVA_GROUP=nova_user.NAME,
              PASSWORD=PASSWORD)
    _restart(host, '"nova"')


def use_none(host) -> None:
    """Certificates alone, as before."""
    host.certificate('good')


def _restart(host, allowed, environment=None) -> None:
    guide.run(host, 'sasl-libvirtd', USERS=allowed)
    service = host.service('libvirtd')
    host.stop('libvirtd')
    host.start('libvirtd', service.argv, env=environment)
    host.wait_ready()
