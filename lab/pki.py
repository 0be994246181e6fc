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

"""Certificates of the hosts: good ones as the guide says, and bad ones.

The CA, a good certificate, its installation and its revocation are the admin
guide's commands (guide.py). It has none for bad certificates: these are made here.
"""

import datetime
import ipaddress
import os
import pathlib
import shutil

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.oid import NameOID

from . import guide
from . import nova_user

DAYS = 30
VARIANTS = ('good', 'none', 'other-ca', 'wrong-name', 'expired',
            'not-yet-valid', 'revoked')

_HOUR = datetime.timedelta(hours=1)
_LONG = datetime.timedelta(days=DAYS)
#: From when to when, as seen from now: by default, and of a variant.
_PERIOD = (-_HOUR, _LONG)
_PERIODS = {'expired': (-2 * 24 * _HOUR, -_HOUR),
            'not-yet-valid': (_HOUR, _LONG)}


def _pem_key(key) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM,
                             serialization.PrivateFormat.PKCS8,
                             serialization.NoEncryption())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def write_private(path: pathlib.Path, content: bytes, mode=0o600) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode),
              'wb') as out:
        out.write(content)
    path.chmod(mode)


class Authority:
    """A CA in a folder: cacert.pem and cakey.pem.

    :param common: the CA's name
    """

    def __init__(self, folder: pathlib.Path, common: str = 'another CA'):
        self.folder, self.common = folder, common

    def create(self) -> None:
        """Make one of which no host knows."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = x509.CertificateBuilder().subject_name(
            _name(self.common)).issuer_name(_name(self.common)).public_key(
            key.public_key()).serial_number(
            x509.random_serial_number()).not_valid_before(
            now + _PERIOD[0]).not_valid_after(
            now + _PERIOD[1]).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), True
        ).add_extension(x509.KeyUsage(
            False, False, False, False, False, True, True, False, False), True
        ).add_extension(x509.SubjectKeyIdentifier.from_public_key(
            key.public_key()), False).sign(key, hashes.SHA256())
        (self.folder / 'cacert.pem').write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM))
        write_private(self.folder / 'cakey.pem', _pem_key(key))

    def _load(self):
        return (x509.load_pem_x509_certificate(
            (self.folder / 'cacert.pem').read_bytes()),
            serialization.load_pem_private_key(
                (self.folder / 'cakey.pem').read_bytes(), None))

    def issue(self, into: pathlib.Path, host: str, name: str, address: str,
              period=_PERIOD) -> None:
        """A certificate for a host, as server and as client.

        :param into: the folder for HOST.pem and HOST.key

        :param name: common name and DNS name
        :param address: IP address
        :param period: when it begins and ends, timedeltas from now
        """
        authority, authority_key = self._load()
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = x509.CertificateBuilder().subject_name(
            _name(name)).issuer_name(authority.subject).public_key(
            key.public_key()).serial_number(
            x509.random_serial_number()).not_valid_before(
            now + period[0]).not_valid_after(now + period[1]).add_extension(
            x509.BasicConstraints(ca=False, path_length=None), True
        ).add_extension(x509.KeyUsage(
            True, False, True, False, False, False, False, False, False), True
        ).add_extension(x509.ExtendedKeyUsage([
            ExtendedKeyUsageOID.SERVER_AUTH,
            ExtendedKeyUsageOID.CLIENT_AUTH]), False).add_extension(
            x509.SubjectAlternativeName([
                x509.DNSName(name),
                x509.IPAddress(ipaddress.ip_address(address))]), False
        ).add_extension(
            # As the CA's certificate has it: there is more than one way.
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                authority.extensions.get_extension_for_class(
                    x509.SubjectKeyIdentifier).value), False
        ).sign(authority_key, hashes.SHA256())
        (into / (host + '.pem')).write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM))
        write_private(into / (host + '.key'), _pem_key(key))


class Hosts:
    """The certificates of the lab's hosts.

    :param folder: of the CA; in it a folder a host, with what is brought there
    :param control: the machine where the CA is
    """

    def __init__(self, folder: pathlib.Path, control):
        self.folder, self.control = folder, control

    def create(self) -> None:
        """Make the CA."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ('ca', 'crl'):
            guide.run(self.control, name, self.folder)

    def issue(self, host, variant: str = 'good') -> None:
        """Make a host's certificate and install it.

        :param variant: one of VARIANTS
        """
        folder = self.folder / host.name
        folder.mkdir(exist_ok=True, mode=0o700)
        if variant in ('other-ca', 'wrong-name', *_PERIODS):
            authority = Authority(self.folder)
            if variant == 'other-ca':
                authority = Authority(self.folder / 'other')
                authority.create()
            wrong = variant == 'wrong-name'
            authority.issue(
                folder, host.name, 'somebody-else' if wrong else host.name,
                '192.0.2.1' if wrong else host.address,
                _PERIODS.get(variant, _PERIOD))
        else:
            guide.run(self.control, 'certificate', self.folder,
                      HOST=host.name, ADDRESS=host.address)
            if variant == 'revoked':
                guide.run(self.control, 'revoke', self.folder, HOST=host.name)
            shutil.copy(self.folder / (host.name + '.pem'), folder)
            shutil.move(self.folder / (host.name + '.key'),
                        folder / (host.name + '.key'))
        self.install(host)
        if variant == 'none':
            for path in ('libvirt/clientcert.pem', 'qemu/client-cert.pem',
                         'libvirt/private/clientkey.pem',
                         'qemu/client-key.pem'):
                (host.folder / 'etc/pki' / path).unlink()

    def install(self, host) -> None:
        """Bring a host what it should have now, and put it in its place."""
        folder = self.folder / host.name
        for name in ('cacert.pem', 'cacrl.pem'):
            shutil.copy(self.folder / name, folder)
        guide.run(host, 'install', folder, HOST=host.name,
                  QEMU_GROUP=_qemu_group(host))
        guide.run(host, 'install-nova', NOVA_GROUP=nova_user.NAME)


def _qemu_group(host) -> str:
    return host.run(['id', '--group', '--name', 'libvirt-qemu']).stdout.strip()
