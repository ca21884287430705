"""Certificates for gRPC over TCP: which files they are in, and what servers and channels make of them.

Owns the four settings and their errors, each of which names the file. With an authority both sides are verified: a
server asks its callers for a certificate too. What is on a socket's path stays as open as its file. Files are read
once, when a process starts.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from ...sdk.errors import ConfigError
from .wire import is_socket

CERT_VARIABLE = "SLIPSTREAM_TLS_CERT"
KEY_VARIABLE = "SLIPSTREAM_TLS_KEY"
CA_VARIABLE = "SLIPSTREAM_TLS_CA"
NAME_VARIABLE = "SLIPSTREAM_TLS_NAME"
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """What is in the files, as PEM; b"" for one that is not given.

    ``certificate`` and ``key`` are this process's own, its chain included; ``authority`` signed those of all others,
    without one the system's authorities have to. ``name``: what servers' certificates are made out to, "" when that is
    the host that is called.
    """

    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)
    authority: bytes = b""
    name: str = ""

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return what a server listens with. Raises: ConfigError when there is no certificate"""
        if not self.certificate:
            raise ConfigError(CERT_VARIABLE, "a server needs a certificate and its key, only an authority was given")
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)],
            root_certificates=self.authority or None,
            require_client_auth=bool(self.authority),
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return what a caller connects with."""
        return grpc.ssl_channel_credentials(
            root_certificates=self.authority or None,
            private_key=self.key or None,
            certificate_chain=self.certificate or None,
        )

    def channel_options(self) -> tuple[tuple[str, str], ...]:
        """Return the options that go with the credentials."""
        return (("grpc.ssl_target_name_override", self.name),) if self.name else ()


def tls_from(environment: Mapping[str, str]) -> Tls | None:
    """Return what the environment names, None where it names nothing: then nothing is encrypted.

    Raises: ConfigError naming the variable and the file
    """
    return read_tls(
        certificate=environment.get(CERT_VARIABLE, ""),
        key=environment.get(KEY_VARIABLE, ""),
        authority=environment.get(CA_VARIABLE, ""),
        name=environment.get(NAME_VARIABLE, ""),
    )


def read_tls(
    *,
    certificate: str = "",
    key: str = "",
    authority: str = "",
    name: str = "",
    settings: tuple[str, str, str] = (CERT_VARIABLE, KEY_VARIABLE, CA_VARIABLE),
) -> Tls | None:
    """Read three files, "" for one that is not given; None without any. ``settings``: what errors call them.

    Raises: ConfigError naming the setting and the file
    """
    cert_setting, key_setting, ca_setting = settings
    if certificate and not key:
        raise ConfigError(key_setting, f"{certificate} needs its key: name the file")
    if key and not certificate:
        raise ConfigError(cert_setting, f"{key} needs its certificate: name the file")
    if not certificate and not authority:
        return None
    tls = Tls(
        certificate=_read(cert_setting, certificate),
        key=_read(key_setting, key),
        authority=_read(ca_setting, authority),
        name=name,
    )
    # gRPC says nothing of what is wrong with them; Python's own TLS does.
    if certificate:
        _check_pair(cert_setting, certificate, key_setting, key)
    if authority:
        _check_authority(ca_setting, authority)
    return tls


def open_channel(target: str, options: tuple[tuple[str, int], ...], tls: Tls | None) -> grpc.aio.Channel:
    """Return a channel to a target: encrypted where there are certificates, and a wire that others could be on."""
    if tls is None or is_socket(target):
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, tls.channel_credentials(), options=(*options, *tls.channel_options()))


def _read(setting: str, path: str) -> bytes:
    if not path:
        return b""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(setting, f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(setting, f"{path} is larger than {MAX_FILE_BYTES} bytes: it is no PEM file of ours")
    return data


def _check_pair(cert_setting: str, certificate: str, key_setting: str, key: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(certificate)
    except OSError as error:
        raise ConfigError(cert_setting, f"{certificate} holds no certificate in PEM: {error}") from error
    try:
        # Nobody is there to be asked for a password.
        context.load_cert_chain(certificate, key, password="")
    except OSError as error:
        problem = f"{key} holds no key in PEM, or not that of {certificate}, or one with a password: {error}"
        raise ConfigError(key_setting, problem) from error


def _check_authority(setting: str, authority: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(authority)
    except OSError as error:
        raise ConfigError(setting, f"{authority} holds no certificate in PEM: {error}") from error
