"""The connections of a group over gloo: transfers are posted to them until one breaks, and then all are broken.

Owns how gloo is spoken to (tags, its smallest wait, what its errors mean) and the one failure that ends a group. Knows
nothing of what operations are made of; ``gloo_group`` does.

Gloo ends a wait when its connection breaks, but for transfers that are half-way. So a thread for every other rank waits
for what is never sent, and is the first to know; and waits for transfers long enough to be caught half-way are left to
threads that may hang until their deadline, while the caller is told at once.

A transfer's tag says which operation it belongs to and how many bytes it has: ranks that do not agree never meet, which
ends in CommTimeout. Gloo, given too long a message, would end the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .errors import CommError, CommTimeout, PeerLost
from .operands import Seat
from .timeouts import FOR_EVER, Timeout, timeout
from .waiters import Waiters

_NEVER_SENT = 0x7FFFFFFF
"""A tag that no transfer has."""

_ENDED_HERE = "Application timeout"
"""What gloo says where this rank broke the connection, by a wait that was not in time."""

_KINDS = {
    "pair": 1,
    "all_reduce": 3,
    "reduce_scatter": 5,
    "all_gather": 7,
    "all_to_all": 11,
    "broadcast": 13,
    "barrier": 17,
}


class Transfer(Protocol):
    """A send or a receive of gloo's."""

    def wait(self, timeout: Timeout) -> bool:
        """Block until it is complete; raise RuntimeError when it cannot be, or is not in time."""
        ...


class Gloo(Protocol):
    """The part of torch's ProcessGroupGloo that is used."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Transfer:
        """Post a send."""
        ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Transfer:
        """Post a receive."""
        ...


@dataclass(frozen=True, slots=True)
class Posted:
    """A transfer on its way, from or to another rank."""

    transfer: Transfer
    peer: int


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operation: what its transfers have in common on all ranks.

    Sends and receives between two ranks count by themselves, as ``pair``; all else counts together.
    """

    operation: str
    kind: str
    number: int

    def tag(self, x: Tensor, hop: int) -> int:
        """Return 31 bits that both ends of a transfer know: whose, which one, and a hash of kind and size."""
        look = (x.numel() * x.element_size() * _KINDS[self.kind] * 0x9E3779B1 >> 16) & 0xFFFF
        return (self.kind == "pair") << 30 | hop << 29 | (self.number % 0x2000) << 16 | look


class GlooWire:
    """A group's connections, seen from one rank, until they break.

    Units: timeout_s, seconds that a wait may take unless it says otherwise; clock, in seconds, monotonic
    """

    def __init__(self, gloo: Gloo, seat: Seat, *, timeout_s: float, clock: Callable[[], float]) -> None:
        self.seat = seat
        self.timeout_s = timeout_s
        self.clock = clock
        # Everybody starts with another peer, so that no rank is everybody's first.
        self.peers = [(seat.rank + step) % seat.size for step in range(1, seat.size)]
        self._gloo: Gloo | None = gloo
        self._failure: tuple[type[CommError], str] | None = None
        self.changed = threading.Condition()
        """Held to change what is waited for: works that land, and the end of the group."""
        self.waiters = Waiters(f"gloo-{seat.group}")
        for peer in self.peers:
            self.waiters.start(partial(self._watch, gloo, peer))

    @property
    def dead(self) -> bool:
        """Whether the connections are broken."""
        return self._failure is not None

    def error(self, operation: str) -> CommError:
        """Return what a call raises now that the connections are broken."""
        assert self._failure is not None
        return self.seat.error(self._failure[0], operation, self._failure[1])

    def exchange(
        self, call: Call, sends: Iterable[tuple[int, Tensor]], receives: Iterable[tuple[int, Tensor]], *, hop: int = 0
    ) -> list[Posted]:
        """Post transfers with other ranks; empty ones are left out, on both sides.

        Receives first, so that what the others send finds its place.
        """
        posted = [self._post(call, peer, x, hop, sends=False) for peer, x in receives if x.numel()]
        posted += [self._post(call, peer, x, hop, sends=True) for peer, x in sends if x.numel()]
        return posted

    def finish(self, operation: str, posted: Sequence[Posted], deadline_s: float) -> None:
        """Block until transfers are complete.

        Units: deadline_s, on the clock
        Raises: PeerLost, CommTimeout, GroupClosed
        """
        for one in posted:
            left_s = 0.0 if self.dead else deadline_s - self.clock()
            try:
                one.transfer.wait(timeout(left_s))
            except RuntimeError as error:
                raise self._broken(operation, one.peer, error) from error

    def fail(self, operation: str, kind: type[CommError], reason: str) -> CommError:
        """Break the connections, unless they are; return what to raise, which is the first reason."""
        with self.changed:
            if self._failure is None:
                self._failure = (kind, reason)
                self.changed.notify_all()
            gloo, self._gloo = self._gloo, None
        if gloo is not None:
            self._break(gloo)
            self.waiters.end()
        return self.error(operation)

    def _post(self, call: Call, peer: int, x: Tensor, hop: int, *, sends: bool) -> Posted:
        gloo = self._gloo
        if gloo is None:
            raise self.error(call.operation)
        try:
            return Posted((gloo.send if sends else gloo.recv)([x], peer, call.tag(x, hop)), peer)
        except RuntimeError as error:
            raise self._broken(call.operation, peer, error) from error

    def _broken(self, operation: str, peer: int, error: RuntimeError) -> CommError:
        text = str(error).partition("\n")[0].partition(". This is typically")[0]
        if "Timed out waiting" in text:
            late = f"rank {peer} did not take part in time, or called another operation"
            return self.fail(operation, CommTimeout, late)
        if _ENDED_HERE in text:
            return self.fail(operation, CommTimeout, "another operation of this rank was not complete in time")
        return self.fail(operation, PeerLost, f"the connection to rank {peer} broke: {text}")

    def _watch(self, gloo: Gloo, peer: int) -> None:
        """Wait for the end of a connection."""
        try:
            gloo.recv([torch.empty(1, dtype=torch.uint8)], peer, _NEVER_SENT).wait(FOR_EVER)
        except RuntimeError as error:
            if _ENDED_HERE not in str(error):
                self._broken("watch", peer, error)

    def _break(self, gloo: Gloo) -> None:
        """Close every connection, so that the other ranks see it at once.

        Gloo closes all when a wait is not in time: so wait for what nobody sends.
        """
        for peer in self.peers:
            try:
                gloo.recv([torch.empty(1, dtype=torch.uint8)], peer, _NEVER_SENT).wait(timeout(0.0))
            except RuntimeError:
                # As wanted: it was not in time, or this connection had been broken before.
                continue
