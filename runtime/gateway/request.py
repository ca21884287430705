"""One request's way through replicas, until it has ended once: who is asked, what is passed on, what follows a loss.

A core: no clock, no asyncio, no sessions; time and tickets are arguments, events go in and actions come out. It must
not know text, nor how replicas are reached or chosen: replicas are names here.

    begin ─▶ Choose ──routed──▶ whole:  Submit WHOLE ────────────────── tokens ──▶ Finished
               ▲                split:  Submit HOLD, SEND ── tokens of both ─────▶ Finished
               └── lost: what was delivered goes with the next Submit ◀──┘
             no replica: waits until one is there, or the request's time is over ─▶ GiveUp

Tokens are a function of the request, so each attempt draws the same ones: what was delivered already is left out by its
position. Where the next attempt computes anew what a client has, it is told it (``Submit.generated``): two layouts may
round a near-tie differently, and what follows must follow from what the client has. So ``GoOn``, by which a replica
that waits for KV computes by itself, is said only while nothing has been delivered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from ...comm.kv.transfer import Ending
from ...sdk.errors import DeadlineExceeded, EngineUnavailable, Overloaded, SlipstreamError
from .routes import Route, Split, Whole

_ROOM = frozenset({Ending.NO_ROOM, Ending.NEVER_FITS})
"""Endings that another sender would meet as well."""


class Part(Enum):
    """What a replica does for a request: all of it; waits for its KV and goes on; computes its prompt and sends it."""

    WHOLE = auto()
    HOLD = auto()
    SEND = auto()


# ------------------------------------------------------------------ actions


@dataclass(frozen=True, slots=True, kw_only=True)
class Choose:
    """Choose a route and say so by ``routed``. ``decode``: only a split that ends there is of use."""

    exclude: frozenset[str]
    may_split: bool
    decode: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Send the request to a replica. ``decode``: of a SEND, to whom; ``generated``: as ``EngineRequest`` has it."""

    attempt: int
    replica: str
    part: Part
    generated: tuple[tuple[int, ...] | None, ...]
    ticket: str = ""
    decode: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """Pass on what was just taken, but for its first ``skip`` tokens, which may be all of them."""

    skip: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Abort an attempt; nothing more is said of it."""

    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GoOn:
    """Tell a HOLD to compute by itself."""

    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """End the request with an error."""

    error: SlipstreamError


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Every sample has ended."""


Action = Choose | Submit | Deliver | Drop | GoOn | GiveUp | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class WayLimits:
    """Bounds of one request's way.

    Units: shun_s, for which a replica that failed is left out; stall_s, in which a split must show its next token;
    commit_s, in which KV must have come whose sender was lost; max_losses, replicas that were lost with it; max_sends,
    senders for one that waits; max_splits, of one request
    """

    shun_s: float = 1.0
    stall_s: float = 30.0
    commit_s: float = 1.0
    max_losses: int = 8
    max_sends: int = 2
    max_splits: int = 2


class _Attempt:
    """``seen``: tokens of each sample that it was told or has brought; ``leads``: all that comes next is its to say."""

    __slots__ = ("leads", "number", "part", "replica", "seen", "ticket")

    def __init__(self, submit: Submit, samples: int) -> None:
        self.number = submit.attempt
        self.replica = submit.replica
        self.part = submit.part
        self.ticket = submit.ticket
        self.seen = [len(tokens or ()) for tokens in submit.generated] or [0] * samples
        self.leads = submit.part is Part.WHOLE


class RequestWay:
    """One request's.

    ``delivered``: the tokens of each sample that were passed on, which whoever carries out ``Deliver`` adds to.
    ``may_split``: whether it may be split at all; one of several samples never is. Units: ends_s, its deadline
    """

    # Slots, as in all that a gateway has one of for each of many requests.
    __slots__ = (
        "_asked", "_attempts", "_delivered", "_done", "_ends_s", "_error", "_hold", "_limits", "_losses", "_max_tokens",
        "_may_split", "_next", "_over", "_retry_s", "_send", "_sends", "_shunned", "_splits", "_stall_s",
    )  # fmt: skip

    def __init__(
        self,
        delivered: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        may_split: bool,
        ends_s: float,
        limits: WayLimits | None = None,
    ) -> None:
        self._delivered = delivered
        self._max_tokens = max_tokens
        self._may_split = may_split and len(delivered) == 1
        self._ends_s = ends_s
        self._limits = limits or WayLimits()
        self._over: set[int] = set()
        self._attempts: dict[int, _Attempt] = {}
        self._hold: _Attempt | None = None
        self._send: _Attempt | None = None
        self._next = 0
        self._sends = self._splits = self._losses = 0
        self._shunned: dict[str, float] = {}
        self._asked: Choose | None = None
        self._retry_s: float | None = None
        self._stall_s: float | None = None
        self._error: SlipstreamError | None = None
        self._done = False

    # ------------------------------------------------------------------ what is asked of it

    @property
    def done(self) -> bool:
        """Whether it has ended: ``Finished`` or ``GiveUp`` was said, or ``leave`` was called."""
        return self._done

    @property
    def waits(self) -> bool:
        """Whether no replica has it, and ``replicas_changed`` is news."""
        return self._retry_s is not None

    @property
    def wakes_s(self) -> float:
        """When ``due`` wants to be called, unless something happens before."""
        return min(at_s for at_s in (self._retry_s, self._stall_s, self._ends_s) if at_s is not None)

    @property
    def ends_s(self) -> float:
        """When its time is over."""
        return self._ends_s

    def leads(self, attempt: int) -> bool:
        """Whether all that comes next comes from this attempt: its tokens need not be shown to ``take``."""
        one = self._attempts.get(attempt)
        return one is not None and one.leads

    # ------------------------------------------------------------------ beginning

    def begin(self, now_s: float) -> list[Action]:
        """Begin."""
        return self._choose(now_s)

    def routed(self, route: Route | None, *, ticket: str, now_s: float, stall_s: float | None = None) -> list[Action]:
        """Take the answer to ``Choose``; None: nobody can have it now.

        ``ticket``: a name never used before, for the case that it is split. ``stall_s``: in place of the limits'.
        """
        asked, self._asked = self._asked, None
        assert asked is not None, "nothing was asked"
        if stall_s is None:
            stall_s = self._limits.stall_s
        if asked.decode is not None:
            return self._another_send(route, now_s + stall_s)
        match route:
            case None:
                return self._wait(now_s)
            case Whole(replica=replica):
                return [self._submit(replica, Part.WHOLE)]
            case Split(prefill=prefill, decode=decode):
                self._splits += 1
                self._sends = 1
                self._stall_s = now_s + stall_s
                hold = self._submit(decode, Part.HOLD, ticket=ticket)
                return [hold, self._submit(prefill, Part.SEND, ticket=ticket, decode=decode)]

    def _another_send(self, route: Route | None, stalls_s: float) -> list[Action]:
        """Let another replica send to the one that waits, or let that one go on by itself."""
        hold, send = self._hold, self._send
        assert hold is not None, "a sender was asked for nobody"
        if hold.leads:
            return []
        actions: list[Action] = [] if send is None else [self._drop(send)]
        if isinstance(route, Split) and route.decode == hold.replica:
            self._sends += 1
            self._stall_s = stalls_s
            return [*actions, self._submit(route.prefill, Part.SEND, ticket=hold.ticket, decode=hold.replica)]
        self._stall_s = None
        hold.leads = True
        return [*actions, GoOn(attempt=hold.number)]

    def _wait(self, now_s: float) -> list[Action]:
        """Wait for a replica; one that has not been anywhere yet, or was only refused as too much, does not."""
        if self._error is None:
            return self._give_up(EngineUnavailable("no replica takes requests now"))
        if isinstance(self._error, Overloaded) and not self._losses:
            return self._give_up(self._error)
        self._retry_s = now_s + self._limits.shun_s
        return []

    def _submit(self, replica: str, part: Part, *, ticket: str = "", decode: str = "") -> Submit:
        self._next += 1
        generated = self._generated()
        submit = Submit(
            attempt=self._next, replica=replica, part=part, generated=generated, ticket=ticket, decode=decode
        )
        one = self._attempts[self._next] = _Attempt(submit, len(self._delivered))
        if part is Part.HOLD:
            self._hold = one
        elif part is Part.SEND:
            self._send = one
        return submit

    def _generated(self) -> tuple[tuple[int, ...] | None, ...]:
        if not self._over and not any(self._delivered):
            return ()
        return tuple(None if index in self._over else tuple(tokens) for index, tokens in enumerate(self._delivered))

    # ------------------------------------------------------------------ what attempts bring

    def take(self, attempt: int, index: int, token_ids: Sequence[int], *, now_s: float) -> list[Action]:
        """Take a sample's next tokens, as one attempt brings them."""
        one = self._attempts.get(attempt)
        if one is None or index in self._over:
            return []
        if one.leads:
            return [Deliver(skip=0)]
        if self._hold is not None and self._hold.leads and one is self._send:
            return []
        known, seen = self._delivered[index], one.seen[index]
        skip = min(len(token_ids), len(known) - seen)
        if list(known[seen : seen + skip]) != list(token_ids[:skip]):
            # Cannot be with one layout; with two a near-tie may go either way, and nobody may go on from the other.
            return self.failed(attempt, EngineUnavailable(f"{one.replica} drew other tokens"), now_s=now_s)
        one.seen[index] = seen + len(token_ids)
        if one.part is Part.HOLD:
            one.leads = True
            self._stall_s = None
        elif self._stall_s is not None:
            self._stall_s = max(self._stall_s, now_s + self._limits.stall_s)
        return [Deliver(skip=skip)]

    def over(self, attempt: int, index: int) -> list[Action]:
        """Take a sample's end; its last tokens were taken before. The attempt itself goes on until ``ended``."""
        if attempt not in self._attempts:
            return []
        self._over.add(index)
        return [] if not self._all_over else self._drop_all(but=attempt)

    def ended(self, attempt: int, *, now_s: float) -> list[Action]:
        """Take the end of an attempt that has brought everything."""
        if attempt in self._attempts and not self._all_over:
            return self.failed(attempt, EngineUnavailable("the answer ended before the request did"), now_s=now_s)
        return [] if self._forget(attempt) is None else self._finish()

    def handed_off(self, attempt: int, ending: str, *, now_s: float) -> list[Action]:
        """Take what became of a SEND's KV: a value of ``Ending``. Nothing more comes of the attempt."""
        one = self._forget(attempt)
        if one is None:
            return []
        assert one.part is Part.SEND, "only what was to be sent is handed off"
        if self._all_over:
            return self._finish()
        hold = self._hold
        if hold is None or hold.leads:
            return []
        if ending == Ending.COMMITTED:
            self._stall_s = now_s + self._limits.stall_s
            return []
        self._error = EngineUnavailable(f"the KV of {one.replica} did not come to {hold.replica}: {ending}")
        if ending == Ending.UNACKNOWLEDGED:
            self._stall_s = now_s + self._limits.commit_s
            return []
        self._shun(one.replica, now_s)
        return self._without_send(now_s, same_again=ending in _ROOM)

    def failed(self, attempt: int, error: SlipstreamError, *, now_s: float) -> list[Action]:
        """Take an attempt's error. What another replica may do better goes on there."""
        one = self._forget(attempt)
        if one is None:
            return []
        if self._all_over:
            return self._finish()
        if one.part is Part.SEND and self._hold is not None and self._hold.leads:
            return []
        if not isinstance(error, EngineUnavailable | Overloaded):
            return self._give_up(error)
        self._error = error
        if isinstance(error, EngineUnavailable):
            self._losses += 1
            if self._losses > self._limits.max_losses:
                return self._give_up(error)
        self._shun(one.replica, now_s)
        if one.part is not Part.SEND:
            return self._again(now_s)
        if self._has_first_token():
            # It may have sent everything before it was lost.
            self._stall_s = now_s + self._limits.commit_s
            return []
        return self._without_send(now_s, same_again=False)

    # ------------------------------------------------------------------ time, and what happens elsewhere

    def due(self, now_s: float) -> list[Action]:
        """Look what is due."""
        if self._done:
            return []
        if now_s >= self._ends_s:
            late = DeadlineExceeded("the request's time is over")
            return self._give_up(self._error if self.waits and self._error is not None else late)
        if self._retry_s is not None and now_s >= self._retry_s:
            return self._choose(now_s)
        if self._stall_s is not None and now_s >= self._stall_s:
            return self._stalled(now_s)
        return []

    def replicas_changed(self, now_s: float) -> list[Action]:
        """Take that other replicas are there than before."""
        return self._choose(now_s) if self.waits and not self._done else []

    def leave(self) -> list[Action]:
        """Give the request up: its client has gone."""
        self._done = True
        return self._drop_all()

    def _stalled(self, now_s: float) -> list[Action]:
        self._stall_s = None
        self._error = EngineUnavailable("a split request made no progress")
        if self._send is not None:
            self._shun(self._send.replica, now_s)
        return self._without_send(now_s, same_again=False)

    # ------------------------------------------------------------------ what follows

    def _without_send(self, now_s: float, *, same_again: bool) -> list[Action]:
        """Go on with a HOLD whose KV does not come."""
        hold = self._hold
        assert hold is not None and not hold.leads, "nobody waits"
        if self._has_first_token():
            return self._again(now_s)
        if same_again or self._sends >= self._limits.max_sends:
            return self._another_send(None, now_s)
        self._asked = Choose(exclude=self._excluded(now_s) - {hold.replica}, may_split=True, decode=hold.replica)
        return [self._asked]

    def _again(self, now_s: float) -> list[Action]:
        """Drop what there is and choose anew."""
        return [*self._drop_all(), *self._choose(now_s)]

    def _choose(self, now_s: float) -> list[Action]:
        self._retry_s = self._stall_s = None
        left = self._max_tokens - max(map(len, self._delivered))
        may_split = self._may_split and self._splits < self._limits.max_splits and left > 1
        self._asked = Choose(exclude=self._excluded(now_s), may_split=may_split)
        return [self._asked]

    def _has_first_token(self) -> bool:
        """Whether a client has a token that the one that waits was not told."""
        hold = self._hold
        return hold is not None and len(self._delivered[0]) > hold.seen[0]

    def _shun(self, replica: str, now_s: float) -> None:
        self._shunned[replica] = now_s + self._limits.shun_s

    def _excluded(self, now_s: float) -> frozenset[str]:
        self._shunned = {name: until_s for name, until_s in self._shunned.items() if until_s > now_s}
        return frozenset(self._shunned)

    # ------------------------------------------------------------------ ends

    @property
    def _all_over(self) -> bool:
        return len(self._over) == len(self._delivered)

    def _drop(self, one: _Attempt) -> Drop:
        self._forget(one.number)
        return Drop(attempt=one.number)

    def _drop_all(self, *, but: int | None = None) -> list[Action]:
        self._retry_s = self._stall_s = None
        return [self._drop(one) for one in list(self._attempts.values()) if one.number != but]

    def _forget(self, attempt: int) -> _Attempt | None:
        one = self._attempts.pop(attempt, None)
        if one is not None and one is self._hold:
            self._hold = None
        elif one is not None and one is self._send:
            self._send = None
        return one

    def _give_up(self, error: SlipstreamError) -> list[Action]:
        self._done = True
        return [*self._drop_all(), GiveUp(error=error)]

    def _finish(self) -> list[Action]:
        self._done = True
        return [*self._drop_all(), Finished()]
