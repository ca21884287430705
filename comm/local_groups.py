"""Groups whose ranks are threads of one process: for tests, and for groups of one.

Keeps the whole contract of ``Collectives``, failures included, and sees what no real backend can: that ranks called
different operations, or the same with shapes that do not fit. That kills the group with CommMisuse on every rank. An
operation happens, for all ranks, in the call of the rank that comes last.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .collectives import Collectives, Work
from .errors import CommError, CommMisuse, CommTimeout, GroupClosed, PeerLost
from .operands import Seat, Seated
from .rank_order import reduce_in_rank_order

_Result = TypeVar("_Result")

MAX_IN_FLIGHT = 1024
"""Operations that a rank may have started and the others not yet."""

BytesSent = Counter[tuple[int, int]]
"""(source, destination) → bytes. Reductions count as one exchange of parts, then one of results."""


def local_group(
    size: int, *, name: str = "local", timeout_s: float = 30.0, bytes_sent: BytesSent | None = None
) -> list[Collectives]:
    """Return a group's ranks, each for a thread of its own; ``bytes_sent`` counts what passes between them."""
    room = _Room(size, name, timeout_s, Counter() if bytes_sent is None else bytes_sent)
    return [LocalRank(room, rank) for rank in range(size)]


def run_ranks(
    ranks: Sequence[Collectives], body: Callable[[Collectives], _Result], *, timeout_s: float = 60.0
) -> list[_Result]:
    """Run ``body`` for every rank in a thread of its own and return the results, by rank.

    A rank that raises closes its group. What is raised is the first error that no other rank's end explains.

    Raises: what a body raised; CommTimeout when one has not ended
    """
    results: dict[int, _Result] = {}
    errors: list[BaseException] = []

    def run(rank: Collectives) -> None:
        try:
            results[rank.rank] = body(rank)
        except BaseException as error:
            errors.append(error)
            rank.close()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank.rank}", daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        if thread.is_alive() and not errors:
            raise CommTimeout(f"group {ranks[0].name}: {thread.name} has not ended within {timeout_s} s")
    for error in sorted(errors, key=lambda error: isinstance(error, GroupClosed | PeerLost)):
        raise error
    return [results[rank.rank] for rank in ranks]


@dataclass(slots=True, eq=False)
class LocalWork:
    """One rank's part of an operation."""

    room: _Room
    seat: Seat
    operation: str
    x: Tensor
    result: Tensor
    send_counts: Sequence[int] = ()
    receive_counts: Sequence[int] = ()
    finished: bool = False

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Return the result once every rank that it takes has come."""
        return self.room.wait(self, timeout_s)

    def done(self) -> bool:
        """Return whether ``wait`` would return or raise at once."""
        return self.finished or self.room.failure is not None


@dataclass(slots=True)
class _Meeting:
    """A collective that some ranks have called."""

    call: Hashable
    parts: dict[int, LocalWork] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Failure:
    kind: type[CommError]
    reason: str


class _Room:
    """Where the ranks of a group meet; one lock for all of it."""

    def __init__(self, size: int, name: str, timeout_s: float, bytes_sent: BytesSent) -> None:
        self.size = size
        self.name = name
        self.timeout_s = timeout_s
        self.bytes_sent = bytes_sent
        self.failure: _Failure | None = None
        self._changed = threading.Condition()
        self._meetings: dict[int, _Meeting] = {}
        self._calls = [0] * size
        self._sent: dict[tuple[int, int], deque[LocalWork]] = {}
        self._awaited: dict[tuple[int, int], deque[LocalWork]] = {}

    def meet(self, part: LocalWork, call: Hashable, complete: Callable[[list[LocalWork], BytesSent], None]) -> Work:
        """Bring one rank's part of its next collective; the last rank to come carries it out."""
        rank = part.seat.rank
        with self._changed:
            self._refuse_if_dead(part)
            number = self._calls[rank]
            meeting = self._meetings.setdefault(number, _Meeting(call))
            if len(self._meetings) > MAX_IN_FLIGHT:
                self._misuse(part, f"more than {MAX_IN_FLIGHT} operations wait for other ranks; wait for some first")
            if meeting.call != call:
                others = ", ".join(map(str, sorted(meeting.parts)))
                self._misuse(part, f"called as {call}, at rank {others} as {meeting.call}")
            self._calls[rank] += 1
            meeting.parts[rank] = part
            if len(meeting.parts) == self.size:
                del self._meetings[number]
                parts = [meeting.parts[place] for place in range(self.size)]
                self._check_counts(parts)
                complete(parts, self.bytes_sent)
                self._finish(parts)
        return part

    def post(self, part: LocalWork, *, source: int, to: int) -> Work:
        """Bring one end of a point-to-point transfer; the later end carries it out."""
        sends = part.seat.rank == source
        mine, theirs = (self._sent, self._awaited) if sends else (self._awaited, self._sent)
        with self._changed:
            self._refuse_if_dead(part)
            waiting = theirs.get((source, to))
            if not waiting:
                queue = mine.setdefault((source, to), deque())
                if len(queue) >= MAX_IN_FLIGHT:
                    self._misuse(part, f"more than {MAX_IN_FLIGHT} transfers wait for rank {to if sends else source}")
                queue.append(part)
                return part
            sent, received = (part, waiting.popleft()) if sends else (waiting.popleft(), part)
            if (sent.x.dtype, sent.x.shape) != (received.x.dtype, received.x.shape):
                self._misuse(
                    part,
                    f"rank {source} sends {sent.x.dtype} {list(sent.x.shape)}, "
                    f"rank {to} receives {received.x.dtype} {list(received.x.shape)}",
                )
            received.x.copy_(sent.x)
            self.bytes_sent[source, to] += _bytes(sent.x)
            self._finish([sent, received])
        return part

    def wait(self, part: LocalWork, timeout_s: float | None) -> Tensor:
        """Wait for a part; a rank that waits in vain kills the group."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        with self._changed:
            if not self._changed.wait_for(part.done, limit):
                missing = [
                    rank
                    for meeting in self._meetings.values()
                    if part in meeting.parts.values()
                    for rank in range(self.size)
                    if rank not in meeting.parts
                ]
                who = f"rank {', '.join(map(str, missing))} did" if missing else "the peer did"
                self._fail(CommTimeout, f"{who} not take part within {limit} s")
            if part.finished:
                return part.result
            raise self._error(part)

    def end(self, kind: type[CommError], reason: str) -> None:
        """Kill the group, unless it is dead already."""
        with self._changed:
            self._fail(kind, reason)

    def _check_counts(self, parts: list[LocalWork]) -> None:
        for sender in parts:
            for rank, count in enumerate(sender.send_counts):
                expected = parts[rank].receive_counts[sender.seat.rank]
                if count != expected:
                    self._misuse(sender, f"rank {sender.seat.rank} sends {count} rows, rank {rank} expects {expected}")

    def _finish(self, parts: list[LocalWork]) -> None:
        for part in parts:
            part.finished = True
        self._changed.notify_all()

    def _misuse(self, part: LocalWork, reason: str) -> None:
        self._fail(CommMisuse, f"ranks do not agree: {reason}")
        raise self._error(part)

    def _fail(self, kind: type[CommError], reason: str) -> None:
        if self.failure is None:
            self.failure = _Failure(kind, reason)
            self._meetings.clear()
            self._sent.clear()
            self._awaited.clear()
            self._changed.notify_all()

    def _refuse_if_dead(self, part: LocalWork) -> None:
        if self.failure is not None:
            raise self._error(part)

    def _error(self, part: LocalWork) -> CommError:
        assert self.failure is not None
        return part.seat.error(self.failure.kind, part.operation, self.failure.reason)


class LocalRank(Seated):
    """A group of threads, seen from one of them: a ``Collectives``."""

    def __init__(self, room: _Room, rank: int) -> None:
        self._room = room
        super().__init__(Seat(room.name, rank, room.size))

    def all_reduce(self, x: Tensor, *, op: str = "sum") -> Work:
        """Reduce over the ranks in their order, in place."""
        self._seat.check_reduction("all_reduce", x, op)

        def complete(parts: list[LocalWork], sent: BytesSent) -> None:
            total = reduce_in_rank_order([part.x for part in parts], op, torch.empty_like(x))
            for part in parts:
                part.x.copy_(total)
            _count_all(sent, len(parts), 2 * -(-x.numel() // len(parts)) * x.element_size())

        part = LocalWork(self._room, self._seat, "all_reduce", x, x)
        return self._room.meet(part, ("all_reduce", op, x.dtype, tuple(x.shape)), complete)

    def reduce_scatter(self, x: Tensor) -> Work:
        """Sum over the ranks and keep this rank's part."""
        self._seat.check_parts("reduce_scatter", x)
        self._seat.check_reduction("reduce_scatter", x, "sum")

        def complete(parts: list[LocalWork], sent: BytesSent) -> None:
            for place, part in enumerate(parts):
                reduce_in_rank_order([other.x.tensor_split(len(parts))[place] for other in parts], "sum", part.result)
            _count_all(sent, len(parts), _bytes(x) // len(parts))

        part = LocalWork(self._room, self._seat, "reduce_scatter", x, x.new_empty(_rows(x, x.shape[0] // self.size)))
        return self._room.meet(part, ("reduce_scatter", x.dtype, tuple(x.shape)), complete)

    def all_gather(self, x: Tensor) -> Work:
        """Put the ranks' tensors one after the other."""
        self._seat.check_rows("all_gather", x)

        def complete(parts: list[LocalWork], sent: BytesSent) -> None:
            for part in parts:
                for place, chunk in enumerate(part.result.tensor_split(len(parts))):
                    chunk.copy_(parts[place].x)
            _count_all(sent, len(parts), _bytes(x))

        part = LocalWork(self._room, self._seat, "all_gather", x, x.new_empty(_rows(x, x.shape[0] * self.size)))
        return self._room.meet(part, ("all_gather", x.dtype, tuple(x.shape)), complete)

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Work:
        """Send rows to every rank."""
        self._seat.check_counts("all_to_all", x, send_counts, receive_counts)

        def complete(parts: list[LocalWork], sent: BytesSent) -> None:
            inboxes = [part.result.split(list(part.receive_counts)) for part in parts]
            for source, part in enumerate(parts):
                for to, rows in enumerate(part.x.split(list(part.send_counts))):
                    inboxes[to][source].copy_(rows)
                    if to != source:
                        sent[source, to] += _bytes(rows)

        part = LocalWork(
            self._room,
            self._seat,
            "all_to_all",
            x,
            x.new_empty(_rows(x, sum(receive_counts))),
            send_counts=tuple(send_counts),
            receive_counts=tuple(receive_counts),
        )
        return self._room.meet(part, ("all_to_all", x.dtype, tuple(x.shape[1:])), complete)

    def broadcast(self, x: Tensor, *, root: int) -> Work:
        """Overwrite ``x`` with the root's."""
        self._seat.check_rank("broadcast", "root", root)
        self._seat.check_contiguous("broadcast", x)

        def complete(parts: list[LocalWork], sent: BytesSent) -> None:
            for place, part in enumerate(parts):
                if place != root:
                    part.x.copy_(parts[root].x)
                    sent[root, place] += _bytes(x)

        part = LocalWork(self._room, self._seat, "broadcast", x, x)
        return self._room.meet(part, ("broadcast", root, x.dtype, tuple(x.shape)), complete)

    def send(self, x: Tensor, *, to: int) -> Work:
        """Send a tensor to one rank; complete when that rank has it."""
        self._seat.check_peer("send", "to", to)
        self._seat.check_contiguous("send", x)
        return self._room.post(LocalWork(self._room, self._seat, "send", x, x), source=self.rank, to=to)

    def receive(self, out: Tensor, *, source: int) -> Work:
        """Receive a tensor from one rank."""
        self._seat.check_peer("receive", "source", source)
        self._seat.check_contiguous("receive", out)
        return self._room.post(LocalWork(self._room, self._seat, "receive", out, out), source=source, to=self.rank)

    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait until every rank has come here."""
        nothing = torch.empty(0)
        part = LocalWork(self._room, self._seat, "barrier", nothing, nothing)
        self._room.meet(part, "barrier", lambda parts, sent: None).wait(timeout_s)

    def close(self) -> None:
        """End the group on every rank."""
        self._room.end(GroupClosed, f"rank {self.rank} closed the group")

    def lose(self) -> None:
        """End the group as if this rank's process had died; for tests of what is built on groups."""
        self._room.end(PeerLost, f"rank {self.rank} ended")


def _rows(x: Tensor, rows: int) -> tuple[int, ...]:
    return (rows, *x.shape[1:])


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _count_all(sent: BytesSent, size: int, count: int) -> None:
    """Count the same number of bytes from every rank to every other."""
    for source in range(size):
        for to in range(size):
            if to != source:
                sent[source, to] += count
