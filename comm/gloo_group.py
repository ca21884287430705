"""A group over gloo: tensors on CPUs, TCP between them.

Everything is made of gloo's sends and receives, posted when an operation is called and carried by gloo's own thread
from then on. So any number may be in flight, any type travels as the bytes it is, rows may be spread unevenly, and
reductions add in the order of ranks (``rank_order``), which gloo's own do not. ``gloo_wire`` has the connections.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from .collectives import Work
from .errors import CommError, CommMisuse, CommTimeout, GroupClosed
from .gloo_wire import Call, Gloo, GlooWire, Posted
from .operands import Seat
from .rank_order import reduce_in_rank_order

MAX_IN_FLIGHT = 1024
"""Operations of a group that have been started and not waited for."""

WHOLE_BYTES = 64 * 1024
"""Up to here ranks send one another the whole of what is reduced: one hop; above, parts and then results: two."""

_POLL_S = 0.0002

_Steps = Generator[list[Posted], None, Tensor]
"""An operation: it posts transfers, is resumed when they are complete, and returns the result."""


class GlooGroup:
    """A group over gloo, seen from one rank: a ``Collectives``.

    Units: timeout_s, seconds that a wait may take unless it says otherwise; clock, in seconds, monotonic
    """

    def __init__(
        self, gloo: Gloo, *, name: str, rank: int, size: int, timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self._seat = Seat(name, rank, size)
        self._wire = GlooWire(gloo, self._seat, timeout_s=timeout_s, clock=clock)
        self._collectives = itertools.count()
        self._sent: defaultdict[int, itertools.count[int]] = defaultdict(itertools.count)
        self._received: defaultdict[int, itertools.count[int]] = defaultdict(itertools.count)
        self._flying: set[GlooWork] = set()
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
        return self._start(call, self._spread(call, x, list(send_counts), list(receive_counts)))

    def broadcast(self, x: Tensor, *, root: int) -> Work:
        """Overwrite ``x`` with the root's."""
        self._seat.check_rank("broadcast", "root", root)
        self._seat.check_contiguous("broadcast", x)
        call = self._call("broadcast", x)
        if root == self.rank:
            return self._start(call, self._move(call, x, to=self._wire.peers))
        return self._start(call, self._move(call, x, source=root))

    def send(self, x: Tensor, *, to: int) -> Work:
        """Send a tensor to one rank; complete when it has left and ``x`` may be reused."""
        self._seat.check_peer("send", "to", to)
        self._seat.check_contiguous("send", x)
        call = self._call("send", x, next(self._sent[to]))
        return self._start(call, self._move(call, x, to=[to]))

    def receive(self, out: Tensor, *, source: int) -> Work:
        """Receive a tensor from one rank."""
        self._seat.check_peer("receive", "source", source)
        self._seat.check_contiguous("receive", out)
        call = self._call("receive", out, next(self._received[source]))
        return self._start(call, self._move(call, out, source=source))

    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait until every rank has come here."""
        here = torch.zeros(1, dtype=torch.uint8)
        call = self._call("barrier", here)
        self._start(call, self._gather(call, here)).wait(timeout_s)

    def close(self) -> None:
        """End the group here: its connections break, which the other ranks see."""
        self._wire.fail("close", GroupClosed, f"rank {self.rank} closed the group")
        self._flying.clear()
        self._driven.put(None)

    # ------------------------------------------------------------------ what operations are made of

    def _reduce_whole(self, call: Call, x: Tensor, op: str) -> _Steps:
        parts = self._parts(x)
        yield self._wire.exchange(call, [(peer, x) for peer in self._wire.peers], self._from(parts))
        return reduce_in_rank_order(parts, op, x)

    def _reduce_in_parts(self, call: Call, x: Tensor, op: str) -> _Steps:
        pieces = x.view(-1).tensor_split(self.size)
        mine = pieces[self.rank]
        parts = self._parts(mine)
        # The result of a piece lands where the piece is sent from: it can only be on its way once its owner has all
        # that this rank had there.
        results = self._wire.exchange(call, [], self._from(pieces), hop=1)
        yield self._wire.exchange(call, self._from(pieces), self._from(parts))
        reduce_in_rank_order(parts, op, mine)
        yield [*results, *self._wire.exchange(call, [(peer, mine) for peer in self._wire.peers], [], hop=1)]
        return x

    def _reduce_own_part(self, call: Call, x: Tensor) -> _Steps:
        pieces = x.tensor_split(self.size)
        parts = self._parts(pieces[self.rank])
        yield self._wire.exchange(call, self._from(pieces), self._from(parts))
        return reduce_in_rank_order(parts, "sum", torch.empty_like(parts[self.rank]))

    def _gather(self, call: Call, x: Tensor) -> _Steps:
        result = x.new_empty((x.shape[0] * self.size, *x.shape[1:]))
        pieces = result.tensor_split(self.size)
        pieces[self.rank].copy_(x)
        yield self._wire.exchange(call, [(peer, x) for peer in self._wire.peers], self._from(pieces))
        return result

    def _spread(self, call: Call, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> _Steps:
        result = x.new_empty((sum(receive_counts), *x.shape[1:]))
        outgoing, incoming = x.split(send_counts), result.split(receive_counts)
        incoming[self.rank].copy_(outgoing[self.rank])
        yield self._wire.exchange(call, self._from(outgoing), self._from(incoming))
        return result

    def _move(self, call: Call, x: Tensor, *, to: Sequence[int] = (), source: int | None = None) -> _Steps:
        yield self._wire.exchange(call, [(peer, x) for peer in to], [] if source is None else [(source, x)])
        return x

    def _parts(self, mine: Tensor) -> list[Tensor]:
        """Return a place for every rank's part, by rank; this rank's is where it is."""
        return [mine if rank == self.rank else torch.empty_like(mine) for rank in range(self.size)]

    def _from(self, by_rank: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """Return the other ranks' tensors, each with its rank."""
        return [(peer, by_rank[peer]) for peer in self._wire.peers]

    # ------------------------------------------------------------------ how they go on

    def _call(self, operation: str, x: Tensor, pair_number: int | None = None) -> Call:
        if self._wire.dead:
            raise self._wire.error(operation)
        if x.device.type != "cpu":
            raise self._seat.error(CommMisuse, operation, f"gloo moves CPU tensors, this one is on {x.device}")
        if len(self._flying) >= MAX_IN_FLIGHT:
            raise self._seat.error(CommMisuse, operation, f"{MAX_IN_FLIGHT} operations are in flight; wait for some")
        if pair_number is not None:
            return Call(operation, "pair", pair_number)
        return Call(operation, operation, next(self._collectives))

    def _start(self, call: Call, steps: _Steps) -> GlooWork:
        work = GlooWork(self._wire, call.operation, steps, self._flying.discard)
        # A transfer must not be dropped while the other side may be at it: gloo would not read on.
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
        while (work := self._driven.get()) is not None and not self._wire.dead:
            work.settle()


class GlooWork:
    """An operation on its way; whoever waits takes it on, one thread at a time."""

    def __init__(self, wire: GlooWire, operation: str, steps: _Steps, landed: Callable[[GlooWork], None]) -> None:
        self._wire = wire
        self._operation = operation
        self._steps = steps
        self._landed = landed
        self._posted: list[Posted] = []
        self._result: Tensor | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Return the operation's result once it is complete."""
        if self._result is not None:
            return self._result
        limit_s = self._wire.timeout_s if timeout_s is None else timeout_s
        deadline_s = self._wire.clock() + limit_s
        if not self._lock.acquire(timeout=max(limit_s, 0.0)):
            raise self._wire.fail(self._operation, CommTimeout, f"not complete within {limit_s} s")
        try:
            while self._result is None:
                if self._error is not None:
                    raise self._error
                self._wire.finish(self._operation, self._posted, deadline_s)
                self.advance()
            return self._result
        finally:
            self._lock.release()

    def done(self) -> bool:
        """Return whether ``wait`` would return or raise at once; the first time takes a thread to find out."""
        if self._watcher is None and self._result is None and not self._wire.dead:
            # Gloo's transfers cannot be asked, only waited for.
            self._watcher = threading.Thread(target=self.settle, name="gloo-watcher", daemon=True)
            self._watcher.start()
            self._watcher.join(_POLL_S)
        return self._result is not None or self._wire.dead

    def settle(self) -> None:
        """Wait, and leave what comes of it to whoever waits next."""
        try:
            self.wait()
        except CommError:
            assert self._wire.dead

    def advance(self) -> None:
        """Go on from where the posted transfers are complete."""
        try:
            self._posted = next(self._steps)
        except StopIteration as end:
            self._posted = []
            self._result = end.value
            self._landed(self)
        except BaseException as error:
            # The steps are over: whoever waits next is told the same.
            self._error = error
            raise
