"""A group over gloo: tensors on CPUs, TCP between them.

Everything is made of gloo's sends and receives, posted when an operation is called and carried by gloo's own thread
from then on. So any number may be in flight, any type travels as the bytes it is, rows may be spread unevenly, and
reductions add in the order of ranks (``rank_order``), which gloo's own do not.

A transfer's tag says which operation it belongs to and how many bytes it has: ranks that do not agree never meet, which
ends in CommTimeout; gloo would end the process. A group that fails breaks all its connections, and so tells the
others. It owns no rendezvous: ``torch_groups`` does.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from .collectives import Work
from .errors import CommError, CommMisuse, CommTimeout, GroupClosed, PeerLost
from .operands import Seat
from .rank_order import reduce_in_rank_order

MAX_IN_FLIGHT = 1024
"""Operations of a group that have been started and not waited for."""

WHOLE_BYTES = 64 * 1024
"""Up to here ranks send one another the whole of what is reduced: one hop; above, parts and then results: two."""

_SHORTEST_WAIT_S = 0.002
"""Gloo counts milliseconds, and takes none for no limit."""

_POLL_S = 0.0002


class Transfer(Protocol):
    """A send or a receive of gloo's."""

    def wait(self, timeout: timedelta) -> bool:
        """Block until it is complete; raise RuntimeError when it cannot be, or is not in time."""
        ...


class Wire(Protocol):
    """The part of torch's ProcessGroupGloo that is used here."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Transfer:
        """Post a send."""
        ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Transfer:
        """Post a receive."""
        ...


_Posted = list[tuple[Transfer, int]]
"""Transfers, each with the other rank's number."""

_Steps = Generator[_Posted, None, Tensor]
"""An operation: it posts transfers, is resumed when they are complete, and returns the result."""


class GlooGroup:
    """A group over gloo, seen from one rank: a ``Collectives``.

    Units: timeout_s, seconds that a wait may take unless it says otherwise; clock, in seconds, monotonic
    """

    def __init__(
        self, wire: Wire, *, name: str, rank: int, size: int, timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self.timeout_s = timeout_s
        self.clock = clock
        self._seat = Seat(name, rank, size)
        self._wire: Wire | None = wire
        # Everybody starts with another peer, so that no rank is everybody's first.
        self._peers = [(rank + step) % size for step in range(1, size)]
        self._collectives = itertools.count()
        self._sent: defaultdict[int, itertools.count[int]] = defaultdict(itertools.count)
        self._received: defaultdict[int, itertools.count[int]] = defaultdict(itertools.count)
        self._flying: set[GlooWork] = set()
        self._failure: tuple[type[CommError], str] | None = None
        self._lock = threading.Lock()
        self._driven: queue.SimpleQueue[GlooWork | None] = queue.SimpleQueue()
        self._driver: threading.Thread | None = None

    @property
    def name(self) -> str:
        """What errors and metrics call the group."""
        return self._seat.group

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return self._seat.rank

    @property
    def size(self) -> int:
        """The ranks of the group."""
        return self._seat.size

    # ------------------------------------------------------------------ operations

    def all_reduce(self, x: Tensor, *, op: str = "sum") -> Work:
        """Reduce over the ranks in their order, in place."""
        self._seat.check_reduction("all_reduce", x, op)
        call = self._call("all_reduce", x)
        if self.size == 2 or x.numel() * x.element_size() <= WHOLE_BYTES:
            return self._start(call, self._reduce_whole(call, x, op))
        work = self._start(call, self._reduce_in_parts(call, x, op))
        self._drive(work)
        return work

    def reduce_scatter(self, x: Tensor) -> Work:
        """Sum over the ranks and keep this rank's part."""
        self._seat.check_parts("reduce_scatter", x)
        self._seat.check_reduction("reduce_scatter", x, "sum")
        call = self._call("reduce_scatter", x)
        return self._start(call, self._reduce_own_part(call, x))

    def all_gather(self, x: Tensor) -> Work:
        """Put the ranks' tensors one after the other."""
        self._seat.check_rows("all_gather", x)
        call = self._call("all_gather", x)
        return self._start(call, self._gather(call, x))

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Work:
        """Send rows to every rank."""
        self._seat.check_counts("all_to_all", x, send_counts, receive_counts)
        call = self._call("all_to_all", x)
        return self._start(call, self._exchange_rows(call, x, list(send_counts), list(receive_counts)))

    def broadcast(self, x: Tensor, *, root: int) -> Work:
        """Overwrite ``x`` with the root's."""
        self._seat.check_rank("broadcast", "root", root)
        self._seat.check_contiguous("broadcast", x)
        call = self._call("broadcast", x)
        if root == self.rank:
            return self._start(call, _move(x, call, sends=[(peer, x) for peer in self._peers]))
        return self._start(call, _move(x, call, receives=[(root, x)]))

    def send(self, x: Tensor, *, to: int) -> Work:
        """Send a tensor to one rank; complete when it is on its way and ``x`` may be reused."""
        self._seat.check_peer("send", "to", to)
        self._seat.check_contiguous("send", x)
        call = self._call("send", x, next(self._sent[to]))
        return self._start(call, _move(x, call, sends=[(to, x)]))

    def receive(self, out: Tensor, *, source: int) -> Work:
        """Receive a tensor from one rank."""
        self._seat.check_peer("receive", "source", source)
        self._seat.check_contiguous("receive", out)
        call = self._call("receive", out, next(self._received[source]))
        return self._start(call, _move(out, call, receives=[(source, out)]))

    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait until every rank has come here."""
        here = torch.zeros(1, dtype=torch.uint8)
        call = self._call("barrier", here)
        self._start(call, self._gather(call, here)).wait(timeout_s)

    def close(self) -> None:
        """End the group here: its connections break, which the other ranks see."""
        self.fail("close", GroupClosed, f"rank {self.rank} closed the group")

    # ------------------------------------------------------------------ how operations go

    def _reduce_whole(self, call: _Call, x: Tensor, op: str) -> _Steps:
        parts = self._parts(x)
        yield call.exchange([(peer, x) for peer in self._peers], [(peer, parts[peer]) for peer in self._peers])
        return reduce_in_rank_order(parts, op, x)

    def _reduce_in_parts(self, call: _Call, x: Tensor, op: str) -> _Steps:
        pieces = x.view(-1).tensor_split(self.size)
        mine = pieces[self.rank]
        parts = self._parts(mine)
        # The result of a piece lands where the piece is sent from. It can only be on its way once its owner has all of
        # what this rank had there.
        results = call.exchange([], [(peer, pieces[peer]) for peer in self._peers], hop=1)
        yield call.exchange(
            [(peer, pieces[peer]) for peer in self._peers], [(peer, parts[peer]) for peer in self._peers]
        )
        reduce_in_rank_order(parts, op, mine)
        yield [*results, *call.exchange([(peer, mine) for peer in self._peers], [], hop=1)]
        return x

    def _reduce_own_part(self, call: _Call, x: Tensor) -> _Steps:
        pieces = x.tensor_split(self.size)
        parts = self._parts(pieces[self.rank])
        yield call.exchange(
            [(peer, pieces[peer]) for peer in self._peers], [(peer, parts[peer]) for peer in self._peers]
        )
        return reduce_in_rank_order(parts, "sum", torch.empty_like(parts[self.rank]))

    def _gather(self, call: _Call, x: Tensor) -> _Steps:
        result = x.new_empty((x.shape[0] * self.size, *x.shape[1:]))
        pieces = result.tensor_split(self.size)
        pieces[self.rank].copy_(x)
        yield call.exchange([(peer, x) for peer in self._peers], [(peer, pieces[peer]) for peer in self._peers])
        return result

    def _exchange_rows(self, call: _Call, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> _Steps:
        result = x.new_empty((sum(receive_counts), *x.shape[1:]))
        outgoing, incoming = x.split(send_counts), result.split(receive_counts)
        incoming[self.rank].copy_(outgoing[self.rank])
        yield call.exchange([(peer, outgoing[peer]) for peer in self._peers], [(p, incoming[p]) for p in self._peers])
        return result

    def _parts(self, mine: Tensor) -> list[Tensor]:
        """Return a place for every rank's part, by rank; this rank's is where it is."""
        return [mine if rank == self.rank else torch.empty_like(mine) for rank in range(self.size)]

    # ------------------------------------------------------------------ life

    @property
    def dead(self) -> bool:
        """Whether the group has failed or was closed."""
        return self._failure is not None

    def post(self, call: _Call, x: Tensor, peer: int, tag: int, *, sends: bool) -> tuple[Transfer, int]:
        """Post one transfer."""
        wire = self._wire
        if wire is None:
            raise self.fail(call.operation, GroupClosed, "the group was closed")
        try:
            return (wire.send if sends else wire.recv)([x], peer, tag), peer
        except RuntimeError as error:
            raise self.broken(call.operation, peer, error) from error

    def broken(self, operation: str, peer: int, error: RuntimeError) -> CommError:
        """End the group because a transfer failed; return what to raise."""
        text = str(error)
        if "Timed out waiting" in text:
            return self.fail(
                operation, CommTimeout, f"rank {peer} did not take part in time, or called another operation"
            )
        if "Application timeout" in text:
            return self.fail(operation, CommTimeout, "another operation of this rank was not complete in time")
        return self.fail(operation, PeerLost, f"the connection to rank {peer} broke: {text.splitlines()[0]}")

    def fail(self, operation: str, kind: type[CommError], reason: str) -> CommError:
        """End the group, unless it has ended; return what to raise."""
        with self._lock:
            if self._failure is None:
                self._failure = (kind, reason)
            first_kind, first_reason = self._failure
            wire, self._wire = self._wire, None
        if wire is not None:
            _break_connections(wire, self._peers)
            self._flying.clear()
            self._driven.put(None)
        return self._seat.error(first_kind, operation, first_reason)

    def land(self, work: GlooWork) -> None:
        """Forget a work that is complete."""
        self._flying.discard(work)

    def _call(self, operation: str, x: Tensor, pair_number: int | None = None) -> _Call:
        if self._failure is not None:
            raise self._seat.error(self._failure[0], operation, self._failure[1])
        if x.device.type != "cpu":
            raise self._seat.error(CommMisuse, operation, f"gloo moves CPU tensors, this one is on {x.device}")
        if len(self._flying) >= MAX_IN_FLIGHT:
            raise self._seat.error(CommMisuse, operation, f"{MAX_IN_FLIGHT} operations are in flight; wait for some")
        if pair_number is not None:
            return _Call(self, operation, "pair", pair_number)
        return _Call(self, operation, operation, next(self._collectives))

    def _start(self, call: _Call, steps: _Steps) -> GlooWork:
        work = GlooWork(self, call.operation, steps)
        # Gloo gives up a connection where a transfer is dropped that the other side has begun.
        self._flying.add(work)
        work.advance()
        return work

    def _drive(self, work: GlooWork) -> None:
        """Have a work of several hops go on while its caller computes."""
        if self._driver is None:
            self._driver = threading.Thread(target=self._drive_all, name=f"gloo-{self.name}", daemon=True)
            self._driver.start()
        self._driven.put(work)

    def _drive_all(self) -> None:
        while (work := self._driven.get()) is not None:
            work.settle()


class GlooWork:
    """An operation on its way: one thread at a time takes it on."""

    def __init__(self, group: GlooGroup, operation: str, steps: _Steps) -> None:
        self._group = group
        self._operation = operation
        self._steps = steps
        self._posted: _Posted = []
        self._result: Tensor | None = None
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Return the operation's result once it is complete."""
        if self._result is not None:
            return self._result
        limit_s = self._group.timeout_s if timeout_s is None else timeout_s
        deadline_s = self._group.clock() + limit_s
        if not self._lock.acquire(timeout=max(limit_s, _SHORTEST_WAIT_S)):
            raise self._group.fail(self._operation, CommTimeout, f"not complete within {limit_s} s")
        try:
            while self._result is None:
                self._finish_posted(deadline_s)
                self.advance()
            return self._result
        finally:
            self._lock.release()

    def done(self) -> bool:
        """Return whether ``wait`` would return or raise at once."""
        if self._result is not None or self._group.dead:
            return True
        # Gloo's transfers cannot be asked, only waited for.
        if self._watcher is None:
            self._watcher = threading.Thread(target=self.settle, name="gloo-watcher", daemon=True)
            self._watcher.start()
            self._watcher.join(_POLL_S)
        return self._result is not None or self._group.dead

    def settle(self) -> None:
        """Wait, and leave what comes of it to whoever waits next."""
        try:
            self.wait()
        except CommError:
            assert self._group.dead

    def advance(self) -> None:
        """Go on from where the posted transfers are complete."""
        try:
            self._posted = next(self._steps)
        except StopIteration as end:
            self._posted = []
            self._result = end.value
            self._group.land(self)

    def _finish_posted(self, deadline_s: float) -> None:
        for transfer, peer in self._posted:
            left_s = max(deadline_s - self._group.clock(), _SHORTEST_WAIT_S)
            try:
                transfer.wait(timedelta(seconds=left_s))
            except RuntimeError as error:
                raise self._group.broken(self._operation, peer, error) from error


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of an operation: what its transfers have in common on all ranks."""

    group: GlooGroup
    operation: str
    kind: str
    number: int

    def exchange(
        self, sends: Iterable[tuple[int, Tensor]], receives: Iterable[tuple[int, Tensor]], *, hop: int = 0
    ) -> _Posted:
        """Post transfers; receives first, so that what the others send finds its place. Empty ones are left out."""
        posted = [self.group.post(self, x, peer, self._tag(x, hop), sends=False) for peer, x in receives if x.numel()]
        posted += [self.group.post(self, x, peer, self._tag(x, hop), sends=True) for peer, x in sends if x.numel()]
        return posted

    def _tag(self, x: Tensor, hop: int) -> int:
        """Return 31 bits that both ends of a transfer know: whose, which one, and a hash of kind and size."""
        pair = self.kind == "pair"
        look = (x.numel() * x.element_size() * _KINDS[self.kind] * 0x9E3779B1 >> 16) & 0xFFFF
        return pair << 30 | hop << 29 | (self.number % 0x2000) << 16 | look


_KINDS = {
    "pair": 1,
    "all_reduce": 3,
    "reduce_scatter": 5,
    "all_gather": 7,
    "all_to_all": 11,
    "broadcast": 13,
    "barrier": 17,
}


def _move(
    result: Tensor,
    call: _Call,
    *,
    sends: Sequence[tuple[int, Tensor]] = (),
    receives: Sequence[tuple[int, Tensor]] = (),
) -> _Steps:
    yield call.exchange(sends, receives)
    return result


_NEVER_SENT = 0x7FFFFFFF


def _break_connections(wire: Wire, peers: Sequence[int]) -> None:
    """Close every connection of a group, by gloo's own means: a receive that is not complete in time does it."""
    for peer in peers:
        scratch = torch.empty(1, dtype=torch.uint8)
        try:
            wire.recv([scratch], peer, _NEVER_SENT).wait(timedelta(seconds=_SHORTEST_WAIT_S))
        except RuntimeError:
            # As wanted: it timed out, which closed all connections, or this one was closed before.
            continue
