"""Answers that are kept by the key that a client gave its request: sent again, it gets the same answer and no other.

A core: no clock, no asyncio. Keys are each API key's own. Everything is bounded: what is kept goes when it is old, or
when there is too much, oldest first; an answer too large to keep is not kept, and a request sent again runs again.
Only whole, good answers are kept: what failed may be tried again under its key.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from .errors import HttpRefusal

MAX_KEY_CHARS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLimits:
    """Units: max_bytes, of all answers together; max_answer_bytes, of one; keep_s, from its end"""

    max_answers: int = 10_000
    max_bytes: int = 256 << 20
    max_answer_bytes: int = 4 << 20
    keep_s: float = 3600.0


@dataclass(slots=True, kw_only=True, eq=False)
class Claim:
    """A request under a key: on its way, or ended with an answer that is kept.

    ``body``: of the answer, as far as it has come; None when it is too large. ``ended_s`` None: on its way.
    """

    name: tuple[str, str]
    digest: bytes
    limit_bytes: int
    body: bytearray | None = field(default_factory=bytearray)
    streamed: bool = False
    ended_s: float | None = None

    def add(self, data: bytes) -> None:
        """Take in the next part of its answer."""
        if self.body is not None:
            self.body += data
            if len(self.body) > self.limit_bytes:
                self.body = None


class KeptAnswers:
    """All requests with keys."""

    def __init__(self, limits: KeptLimits | None = None) -> None:
        self._limits = limits or KeptLimits()
        self._claims: OrderedDict[tuple[str, str], Claim] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        """Return how many requests are known."""
        return len(self._claims)

    def claim(self, caller: str, key: str, digest: bytes, *, now_s: float) -> Claim:
        """Return a new claim for a request, or that of the same request, which has ended with an answer.

        ``digest``: of all that was asked. Raises: HttpRefusal: 400 for what is no key, 409 while the same request is on
        its way, 422 when another one had this key
        """
        if not 0 < len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
            problem = f"idempotency-key: must be 1 to {MAX_KEY_CHARS} printable ASCII characters"
            raise HttpRefusal(400, problem, code="invalid_value")
        self._forget_old(now_s)
        found = self._claims.get((caller, key))
        if found is not None:
            if found.digest != digest:
                problem = "this idempotency-key was used for another request: take a new key for each request"
                raise HttpRefusal(422, problem, code="idempotency_key_reused")
            if found.ended_s is None:
                problem = "the request with this idempotency-key is on its way: wait for it, or send it again later"
                raise HttpRefusal(409, problem, code="idempotency_key_in_use")
            return found
        claim = Claim(name=(caller, key), digest=digest, limit_bytes=self._limits.max_answer_bytes)
        self._claims[claim.name] = claim
        return claim

    def keep(self, claim: Claim, *, now_s: float) -> None:
        """Keep the answer that a claim has by now; one that is too large is forgotten."""
        if claim.body is None:
            self.forget(claim)
            return
        claim.ended_s = now_s
        self._bytes += len(claim.body)
        self._claims.move_to_end(claim.name)
        self._make_room()

    def forget(self, claim: Claim) -> None:
        """Free the key of a request that has brought no answer. Idempotent; what is kept stays."""
        if claim.ended_s is None and self._claims.get(claim.name) is claim:
            del self._claims[claim.name]

    def _forget_old(self, now_s: float) -> None:
        # Those that ended are in the order of their ends; those on their way end by themselves.
        for claim in list(self._claims.values()):
            if claim.ended_s is None:
                continue
            if claim.ended_s + self._limits.keep_s > now_s:
                return
            self._drop(claim)

    def _make_room(self) -> None:
        while len(self._claims) > self._limits.max_answers or self._bytes > self._limits.max_bytes:
            oldest = next((claim for claim in self._claims.values() if claim.ended_s is not None), None)
            if oldest is None:
                return
            self._drop(oldest)

    def _drop(self, claim: Claim) -> None:
        del self._claims[claim.name]
        self._bytes -= len(claim.body or b"")
