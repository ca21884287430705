"""Certificates made for one test: an authority, and what it signs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Files:
    """Where a certificate, its key and the authority that signed it are."""

    certificate: str
    key: str
    authority: str


class Authority:
    """Signs certificates and puts them into a folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign(name, self._key.public_key(), ca=True, hosts=())
        self.path = str(folder / f"{name}.pem")
        Path(self.path).write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *hosts: str, password: bytes = b"") -> Files:
        """Return the files of a new certificate for these hosts: names, or addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, key.public_key(), ca=False, hosts=hosts)
        paths = Files(
            certificate=str(self._folder / f"{name}.pem"),
            key=str(self._folder / f"{name}.key"),
            authority=self.path,
        )
        secrecy: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password:
            secrecy = serialization.BestAvailableEncryption(password)
        pem = serialization.Encoding.PEM
        Path(paths.certificate).write_bytes(certificate.public_bytes(pem))
        Path(paths.key).write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, secrecy))
        return paths

    def _sign(self, name: str, key: ec.EllipticCurvePublicKey, *, ca: bool, hosts: tuple[str, ...]) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(self._name))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if hosts:
            names = [_host(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    return x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
