"""A group over gloo: tensors on CPUs, TCP between them.

Everything is made of gloo's sends and receives, posted when an operation is called and carried by gloo's own thread
from then on. So any number may be in flight, any type travels as the bytes it is, rows may be spread unevenly, and
reductions add in the order of ranks (``rank_order``), which gloo's own do not. ``gloo_wire`` has the connections.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from .collectives import Work
from .errors import CommError, CommMisuse, CommTimeout, GroupClosed
from .gloo_wire import Call, Gloo, GlooWire, Posted
from .operands import Seat, Seated
from .rank_order import reduce_in_rank_order

MAX_IN_FLIGHT = 1024
"""Operations of a group that have been started and not waited for."""

SHORT_BYTES = 64 * 1024
"""Up to here ranks send one another the whole of what is reduced, one hop, and the caller waits for transfers itself.
Above, ranks send parts and then results, two hops, and works go on by themselves."""

SEGMENT_BYTES = 512 * 1024
"""What is added while more is on its way."""

_POLL_S = 0.0002

_Steps = Generator[list[Posted], None, Tensor]
"""An operation: it posts transfers, is resumed when they are complete, and returns the result."""


class GlooGroup(Seated):
    """A group over gloo, seen from one rank: a ``Collectives``.

    Units: timeout_s, seconds that a wait may take unless it says otherwise; clock, in seconds, monotonic
    """

    def __init__(
        self, gloo: Gloo, *, name: str, rank: int, size: int, timeout_s: float, clock: Callable[[], float]
    ) -> None:
        super().__init__(Seat(name, rank, size))
        self._wire = GlooWire(gloo, self._seat, timeout_s=timeout_s, clock=clock)
        self._collectives = itertools.count()
        self._sent: defaultdict[int, itertools.count[int]] = defaultdict(itertools.count)
        self._received: defaultdict[int, itertools.count[int]] = defaultdict(itertools.count)
        self._flying: set[GlooWork] = set()

    def all_reduce(self, x: Tensor, *, op: str = "sum") -> Work:
        """Reduce over the ranks in their order, in place."""
        self._seat.check_reduction("all_reduce", x, op)
        call = self._call("all_reduce", x)
        # Between two ranks both ways move the same bytes.
        if _bytes(x) <= (SEGMENT_BYTES if self.size == 2 else SHORT_BYTES):
            return self._start(call, self._reduce_whole(call, x, op), _bytes(x))
        return self._start(call, self._reduce_in_parts(call, x, op), _bytes(x))

    def reduce_scatter(self, x: Tensor) -> Work:
        """Sum over the ranks and keep this rank's part."""
        self._seat.check_parts("reduce_scatter", x)
        self._seat.check_reduction("reduce_scatter", x, "sum")
        call = self._call("reduce_scatter", x)
        return self._start(call, self._reduce_own_part(call, x), _bytes(x))

    def all_gather(self, x: Tensor) -> Work:
        """Put the ranks' tensors one after the other."""
        self._seat.check_rows("all_gather", x)
        call = self._call("all_gather", x)
        return self._start(call, self._gather(call, x), _bytes(x))

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Work:
        """Send rows to every rank."""
        self._seat.check_counts("all_to_all", x, send_counts, receive_counts)
        call = self._call("all_to_all", x)
        row_bytes = x.shape[1:].numel() * x.element_size()
        longest = max(*send_counts, *receive_counts) * row_bytes
        return self._start(call, self._spread(call, x, list(send_counts), list(receive_counts)), longest)

    def broadcast(self, x: Tensor, *, root: int) -> Work:
        """Overwrite ``x`` with the root's."""
        self._seat.check_rank("broadcast", "root", root)
        self._seat.check_contiguous("broadcast", x)
        call = self._call("broadcast", x)
        if root == self.rank:
            return self._start(call, self._move(call, x, to=self._wire.peers), _bytes(x))
        return self._start(call, self._move(call, x, source=root), _bytes(x))

    def send(self, x: Tensor, *, to: int) -> Work:
        """Send a tensor to one rank; complete when it has left and ``x`` may be reused."""
        self._seat.check_peer("send", "to", to)
        self._seat.check_contiguous("send", x)
        call = self._call("send", x, next(self._sent[to]))
        return self._start(call, self._move(call, x, to=[to]), _bytes(x))

    def receive(self, out: Tensor, *, source: int) -> Work:
        """Receive a tensor from one rank."""
        self._seat.check_peer("receive", "source", source)
        self._seat.check_contiguous("receive", out)
        call = self._call("receive", out, next(self._received[source]))
        return self._start(call, self._move(call, out, source=source), _bytes(out))

    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait until every rank has come here."""
        here = torch.zeros(1, dtype=torch.uint8)
        call = self._call("barrier", here)
        self._start(call, self._gather(call, here), _bytes(here)).wait(timeout_s)

    def close(self) -> None:
        """End the group here: its connections break, which the other ranks see."""
        self._wire.fail("close", GroupClosed, f"rank {self.rank} closed the group")
        self._flying.clear()

    # ------------------------------------------------------------------ what operations are made of

    def _reduce_whole(self, call: Call, x: Tensor, op: str) -> _Steps:
        parts = self._parts(x)
        yield self._wire.exchange(call, [(peer, x) for peer in self._wire.peers], self._from(parts))
        return reduce_in_rank_order(parts, op, x)

    def _reduce_in_parts(self, call: Call, x: Tensor, op: str) -> _Steps:
        """Gather what all have of this rank's piece, reduce it, and send it round, one segment after the other."""
        pieces = x.view(-1).tensor_split(self.size)
        parts = self._parts(pieces[self.rank])
        step = SEGMENT_BYTES // x.element_size()
        segments = [slice(start, start + step) for start in range(0, pieces[0].numel(), step)]
        results: list[Posted] = []
        gathered: list[list[Posted]] = []
        for segment in segments:
            leaving = [piece[segment] for piece in pieces]
            # A result lands where the piece is sent from: it can only be on its way once its owner has all that this
            # rank had there.
            results += self._wire.exchange(call, [], self._from(leaving), hop=1)
            gathered.append(
                self._wire.exchange(call, self._from(leaving), self._from([part[segment] for part in parts]))
            )
        for segment, posted in zip(segments, gathered, strict=True):
            yield posted
            mine = reduce_in_rank_order([part[segment] for part in parts], op, pieces[self.rank][segment])
            results += self._wire.exchange(call, [(peer, mine) for peer in self._wire.peers], [], hop=1)
        yield results
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

    def _start(self, call: Call, steps: _Steps, longest_bytes: int) -> GlooWork:
        work = GlooWork(self._wire, call.operation, steps, self._flying.discard)
        # A transfer must not be dropped while the other side may be at it: gloo would not read on.
        self._flying.add(work)
        work.advance()
        if longest_bytes > SHORT_BYTES:
            work.go_on()
        return work


class GlooWork:
    """An operation on its way. Its caller takes it on when it waits, or, once it goes on by itself, a waiter does."""

    def __init__(self, wire: GlooWire, operation: str, steps: _Steps, landed: Callable[[GlooWork], None]) -> None:
        self._wire = wire
        self._operation = operation
        self._steps = steps
        self._landed = landed
        self._posted: list[Posted] = []
        self._result: Tensor | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._goes_on = False
        # Belongs to a thread, and so does what may be written to: a waiter takes on its caller's.
        self._inference_mode = torch.is_inference_mode_enabled()

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Return the operation's result once it is complete."""
        limit_s = max(self._wire.timeout_s if timeout_s is None else timeout_s, 0.0)
        if self._result is None and not self._goes_on and self._lock.acquire(blocking=False):
            try:
                return self._take_on(self._wire.clock() + limit_s)
            finally:
                self._lock.release()
        if not self._settled():
            with self._wire.changed:
                if not self._wire.changed.wait_for(self._settled, limit_s):
                    raise self._wire.fail(self._operation, CommTimeout, f"not complete within {limit_s} s")
        return self._outcome()

    def done(self) -> bool:
        """Return whether ``wait`` would return or raise at once; the first time takes a waiter to find out."""
        if not self._goes_on and not self._settled():
            # Gloo's transfers cannot be asked, only waited for.
            self.go_on()
            with self._wire.changed:
                self._wire.changed.wait_for(self._settled, _POLL_S)
        return self._settled()

    def go_on(self) -> None:
        """Have a waiter take it on, within the group's own deadline."""
        if self._result is None:
            self._goes_on = True
            self._wire.waiters.start(self._settle)

    def advance(self) -> None:
        """Go on from where the posted transfers are complete."""
        try:
            self._posted = next(self._steps)
        except StopIteration as end:
            self._posted = []
            with self._wire.changed:
                self._result = end.value
                self._wire.changed.notify_all()
            self._landed(self)
        except BaseException as error:
            # The steps are over: whoever waits is told the same.
            with self._wire.changed:
                self._error = error
                self._wire.changed.notify_all()
            raise

    def _outcome(self) -> Tensor:
        if self._result is not None:
            return self._result
        if self._error is not None and not isinstance(self._error, CommError):
            raise self._error
        raise self._wire.error(self._operation)

    def _settled(self) -> bool:
        return self._result is not None or self._error is not None or self._wire.dead

    def _settle(self) -> None:
        """Take it on, and leave what comes of it to whoever waits."""
        with self._lock, torch.inference_mode(self._inference_mode):
            try:
                self._take_on(self._wire.clock() + self._wire.timeout_s)
            except Exception:
                assert self._settled()

    def _take_on(self, deadline_s: float) -> Tensor:
        while self._result is None:
            if self._error is not None:
                raise self._error
            self._wire.finish(self._operation, self._posted, deadline_s)
            self.advance()
        return self._result


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
