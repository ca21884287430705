"""How a call proves that its caller knows the cluster's secret, and the answer that its server does. Bytes in and out.

    server → caller   challenge   a random number, when it was made, and a MAC by which the server knows it as its own
    caller → server   proof       the challenge, a nonce, HMAC(secret, "call", challenge, nonce, method)
    server → caller   answer      HMAC(secret, "answer", the same)

Like ``comm.handshake``, over calls in place of one connection. Protects against callers and servers that do not know
the secret, and against whoever has listened: a challenge is good at the process that made it, for half a minute, once
for each method, and the secret itself is never sent. Does not encrypt, does not keep what passes after the opening of a
call from being changed, and does not hold off someone who stands between the two and passes everything on: between
hosts the network must be the cluster's own. What was listened to can be tried against guesses: take a secret that is
random, not a word.

A server keeps nothing of the challenges that it hands out, so asking for many costs it nothing; those that were
answered rightly it keeps until they are too old.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from struct import Struct

from ...comm.handshake import SECRET_VARIABLE
from ..clock import Clock
from .errors import SecretRefused

LIFETIME_S = 30.0
MAX_USED = 65_536

_RANDOM_BYTES = 16
_MAC_BYTES = 32
_STAMP = Struct(f"!{_RANDOM_BYTES}sQ")  # random, milliseconds on the server's clock
_CHALLENGE_BYTES = _STAMP.size + _MAC_BYTES
_PROOF_BYTES = _CHALLENGE_BYTES + _RANDOM_BYTES + _MAC_BYTES


class Challenger:
    """The server's side. ``max_used``: calls that may be opened within the lifetime of a challenge."""

    def __init__(self, secret: bytes, *, clock: Clock, max_used: int = MAX_USED) -> None:
        self._secret = secret
        self._clock = clock
        self._max_used = max_used
        # A key of this process alone: what another server, or an earlier one, handed out is not known here.
        self._key = secrets.token_bytes(_MAC_BYTES)
        self._used: set[tuple[bytes, str]] = set()
        self._used_order: deque[tuple[float, tuple[bytes, str]]] = deque()

    def challenge(self) -> bytes:
        """Return what a caller has to answer."""
        stamp = _STAMP.pack(secrets.token_bytes(_RANDOM_BYTES), int(self._clock() * 1000))
        return stamp + self._own(stamp)

    def check(self, method: str, proof: bytes | None) -> bytes:
        """Return the answer to a call's proof. Raises: SecretRefused; the text may be told to the caller"""
        if proof is None:
            raise SecretRefused(
                f"only calls of its own cluster are taken: set {SECRET_VARIABLE} to the cluster's secret"
            )
        challenge, nonce, mac = _parts(proof)
        # Before the MAC is right nothing else is looked at, and nothing said of what would have been right.
        if len(proof) != _PROOF_BYTES or not hmac.compare_digest(
            mac, _call_mac(self._secret, challenge, nonce, method)
        ):
            raise SecretRefused(f"the secret is not the server's: give both the same {SECRET_VARIABLE}")
        stamp = challenge[: _STAMP.size]
        age_s = self._clock() - _STAMP.unpack(stamp)[1] / 1000
        if not hmac.compare_digest(challenge[_STAMP.size :], self._own(stamp)) or age_s > LIFETIME_S:
            raise SecretRefused("the challenge is not this server's, or too old: ask for another one")
        self._use(challenge, method)
        return _answer_mac(self._secret, challenge, nonce, method)

    def _use(self, challenge: bytes, method: str) -> None:
        """Note that a challenge was answered for a method: it never is again."""
        now_s = self._clock()
        while self._used_order and self._used_order[0][0] <= now_s:
            self._used.discard(self._used_order.popleft()[1])
        use = (challenge, method)
        if use in self._used:
            raise SecretRefused("the challenge was answered before: ask for another one")
        if len(self._used) >= self._max_used:
            raise SecretRefused(f"{len(self._used)} calls were opened within {LIFETIME_S:g} s: try again later")
        self._used.add(use)
        # By then it is too old, whenever it was made.
        self._used_order.append((now_s + LIFETIME_S, use))

    def _own(self, stamp: bytes) -> bytes:
        return hmac.digest(self._key, stamp, "sha256")


class Proof:
    """The caller's side of one call: ``sent`` goes with it, and its answer is checked."""

    def __init__(self, secret: bytes, challenge: bytes, method: str) -> None:
        if len(challenge) != _CHALLENGE_BYTES:
            raise SecretRefused("who answers at the server's address speaks another version, or is no server of ours")
        nonce = secrets.token_bytes(_RANDOM_BYTES)
        self.sent = challenge + nonce + _call_mac(secret, challenge, nonce, method)
        self._expected = _answer_mac(secret, challenge, nonce, method)

    def check(self, answer: bytes | None) -> None:
        """Make sure that the server knows the secret too. Raises: SecretRefused"""
        if answer is None or not hmac.compare_digest(answer, self._expected):
            raise SecretRefused(f"who answers does not know the secret: give both the same {SECRET_VARIABLE}")


def _parts(proof: bytes) -> tuple[bytes, bytes, bytes]:
    nonce_end = _CHALLENGE_BYTES + _RANDOM_BYTES
    return proof[:_CHALLENGE_BYTES], proof[_CHALLENGE_BYTES:nonce_end], proof[nonce_end:]


def _call_mac(secret: bytes, challenge: bytes, nonce: bytes, method: str) -> bytes:
    return _mac(secret, b"slipstream-call", challenge, nonce, method)


def _answer_mac(secret: bytes, challenge: bytes, nonce: bytes, method: str) -> bytes:
    return _mac(secret, b"slipstream-answer", challenge, nonce, method)


def _mac(secret: bytes, label: bytes, challenge: bytes, nonce: bytes, method: str) -> bytes:
    # All but label and method have a fixed length, and labels end with a zero: no two calls read the same.
    return hmac.digest(secret, label + b"\0" + challenge + nonce + method.encode(), "sha256")
