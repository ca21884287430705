"""How driver and rank make sure of each other before the first step. Pure: messages in, messages or a refusal out.

    driver → rank   challenge   version, nonce
    rank → driver   hello       version, rank, replica, nonce, MAC over all of it and the driver's nonce
    driver → rank   welcome     the driver's MAC over the same

Both MACs are HMAC-SHA256 with the cluster's secret, each with a label of its own, so that neither can be reflected; the
nonces make every run's different. Proves who is at the other end when the connection is made. It does not encrypt, and
does not hold off someone who can change bytes on the way: between hosts the network must be the cluster's own.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct

from .errors import CommMisuse, HandshakeRefused

PROTOCOL_VERSION = 1
SECRET_VARIABLE = "SLIPSTREAM_SECRET"
MIN_SECRET_BYTES = 16
MAX_REPLICA_BYTES = 256
MAX_MESSAGE_BYTES = 4096
"""Most bytes of a message before the two are sure of each other."""

_MAGIC = b"slipstream-bus"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_CHALLENGE = Struct(f"!{len(_MAGIC)}sH{_NONCE_BYTES}s")
_HELLO = Struct(f"!HIH{_NONCE_BYTES}s{_MAC_BYTES}s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Which replica this process belongs to, and the secret that its cluster shares.

    Raises: CommMisuse
    """

    replica: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.replica.encode()) <= MAX_REPLICA_BYTES:
            raise CommMisuse(f"a replica's name needs 1 to {MAX_REPLICA_BYTES} bytes, got {self.replica!r}")
        if len(self.secret) < MIN_SECRET_BYTES:
            raise CommMisuse(f"the cluster's secret needs at least {MIN_SECRET_BYTES} bytes, got {len(self.secret)}")


def secret_from(environment: Mapping[str, str]) -> bytes:
    """Return the cluster's secret from the environment.

    Raises: CommMisuse when it is not set
    """
    secret = environment.get(SECRET_VARIABLE, "")
    if not secret:
        raise CommMisuse(f"{SECRET_VARIABLE} is not set: give every process of the cluster the same secret in it")
    return secret.encode()


class DriverHandshake:
    """The driver's side of one connection."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._nonce = secrets.token_bytes(_NONCE_BYTES)

    def challenge(self) -> bytes:
        """Return the first message."""
        return _CHALLENGE.pack(_MAGIC, PROTOCOL_VERSION, self._nonce)

    def check(self, hello: bytes) -> tuple[int, bytes]:
        """Return the rank that a hello is from, and the welcome to answer it with.

        Raises: HandshakeRefused; the text may be told to the peer
        """
        if len(hello) < _HELLO.size:
            raise HandshakeRefused("the hello is cut short")
        version, rank, length, nonce, mac = _HELLO.unpack_from(hello)
        if version != PROTOCOL_VERSION:
            raise _versions(driver=PROTOCOL_VERSION, rank=version)
        name = hello[_HELLO.size :]
        # Before the MAC is right nothing else is looked at, and nothing said of what would have been right.
        transcript = _transcript(self._nonce, nonce, rank, name)
        if length != len(name) or not hmac.compare_digest(mac, _mac(self._identity.secret, b"rank", transcript)):
            raise HandshakeRefused(f"the secret is not the driver's: give both the same {SECRET_VARIABLE}")
        if name != self._identity.replica.encode():
            theirs = name.decode("utf-8", errors="replace")
            raise HandshakeRefused(f"this is replica {self._identity.replica!r}, not {theirs!r}")
        return rank, _mac(self._identity.secret, b"driver", transcript)


class RankHandshake:
    """A rank's side."""

    def __init__(self, identity: Identity, *, rank: int) -> None:
        self._identity = identity
        self._rank = rank
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._expected: bytes | None = None

    def hello(self, challenge: bytes) -> bytes:
        """Return the answer to a challenge.

        Raises: HandshakeRefused
        """
        if len(challenge) != _CHALLENGE.size:
            raise HandshakeRefused("who answers at the driver's address is no driver")
        magic, version, nonce = _CHALLENGE.unpack(challenge)
        if magic != _MAGIC:
            raise HandshakeRefused("who answers at the driver's address is no driver")
        if version != PROTOCOL_VERSION:
            raise _versions(driver=version, rank=PROTOCOL_VERSION)
        name = self._identity.replica.encode()
        transcript = _transcript(nonce, self._nonce, self._rank, name)
        self._expected = _mac(self._identity.secret, b"driver", transcript)
        mac = _mac(self._identity.secret, b"rank", transcript)
        return _HELLO.pack(PROTOCOL_VERSION, self._rank, len(name), self._nonce, mac) + name

    def check(self, welcome: bytes) -> None:
        """Make sure that the driver has the secret too.

        Raises: HandshakeRefused
        """
        if self._expected is None or not hmac.compare_digest(welcome, self._expected):
            raise HandshakeRefused(f"the driver does not know the secret: give both the same {SECRET_VARIABLE}")


def _transcript(driver_nonce: bytes, rank_nonce: bytes, rank: int, name: bytes) -> bytes:
    # All but the name have a fixed length, so that no two runs read the same.
    return _CHALLENGE.pack(_MAGIC, PROTOCOL_VERSION, driver_nonce) + rank_nonce + rank.to_bytes(4, "big") + name


def _mac(secret: bytes, side: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret, side + b"\0" + transcript, "sha256")


def _versions(*, driver: int, rank: int) -> HandshakeRefused:
    return HandshakeRefused(
        f"the driver speaks version {driver} of the step bus, the rank version {rank}: start both from one release"
    )
