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

"""A certificate authority made on the spot, and certificates good and bad."""

import dataclasses
import datetime
import ipaddress
import os
import pathlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.oid import NameOID

DAYS = 30
VARIANTS = ('good', 'none', 'other-ca', 'wrong-name', 'expired', 'revoked')


@dataclasses.dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM."""

    certificate: bytes
    key: bytes

    @property
    def serial(self) -> int:
        return x509.load_pem_x509_certificate(self.certificate).serial_number


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
    """A CA in a folder: ca.pem, ca.key, crl.pem.

    :param common: the CA's name
    """

    def __init__(self, folder: pathlib.Path, common: str = 'lab CA'):
        self.folder, self.common = folder, common

    @property
    def certificate(self) -> bytes:
        return (self.folder / 'ca.pem').read_bytes()

    @property
    def crl(self) -> bytes:
        return (self.folder / 'crl.pem').read_bytes()

    def create(self) -> None:
        """Make the CA, and an empty list of revoked certificates."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = x509.CertificateBuilder().subject_name(
            _name(self.common)).issuer_name(_name(self.common)).public_key(
            key.public_key()).serial_number(
            x509.random_serial_number()).not_valid_before(
            now - datetime.timedelta(hours=1)).not_valid_after(
            now + datetime.timedelta(days=DAYS)).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), True
        ).add_extension(x509.KeyUsage(
            False, False, False, False, False, True, True, False, False), True
        ).add_extension(x509.SubjectKeyIdentifier.from_public_key(
            key.public_key()), False).sign(key, hashes.SHA256())
        (self.folder / 'ca.pem').write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM))
        write_private(self.folder / 'ca.key', _pem_key(key))
        self.revoke(())

    def _load(self):
        return (x509.load_pem_x509_certificate(self.certificate),
                serialization.load_pem_private_key(
                    (self.folder / 'ca.key').read_bytes(), None))

    def issue(self, name: str, address: str, expired: bool = False) -> Pair:
        """A certificate for a host, as server and as client.

        :param name: common name and DNS name
        :param address: IP address
        :param expired: its time is over since an hour
        """
        authority, authority_key = self._load()
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.timezone.utc)
        first, last = ((now - datetime.timedelta(days=2),
                        now - datetime.timedelta(hours=1)) if expired else
                       (now - datetime.timedelta(hours=1),
                        now + datetime.timedelta(days=DAYS)))
        certificate = x509.CertificateBuilder().subject_name(
            _name(name)).issuer_name(authority.subject).public_key(
            key.public_key()).serial_number(
            x509.random_serial_number()).not_valid_before(
            first).not_valid_after(last).add_extension(
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
            x509.AuthorityKeyIdentifier.from_issuer_public_key(
                authority_key.public_key()), False
        ).sign(authority_key, hashes.SHA256())
        return Pair(certificate.public_bytes(serialization.Encoding.PEM),
                    _pem_key(key))

    def revoke(self, serials) -> None:
        """Make these, and no others, the revoked certificates."""
        authority, key = self._load()
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateRevocationListBuilder().issuer_name(
            authority.subject).last_update(
            now - datetime.timedelta(minutes=1)).next_update(
            now + datetime.timedelta(days=DAYS)).add_extension(
            x509.CRLNumber(int(now.timestamp())), False)
        for serial in serials:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(
                    serial).revocation_date(
                    now - datetime.timedelta(minutes=1)).build())
        (self.folder / 'crl.pem').write_bytes(builder.sign(
            key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
