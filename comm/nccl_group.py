"""A group over NCCL: tensors on one GPU a rank.

An operation runs on a stream of NCCL's, and ``wait`` makes the caller's current stream wait for it: the host goes on,
and so does everything on other streams. Deadlines are held by a guard, a thread that looks at what is in flight: when
an operation has failed or is late, it aborts the communicator, which ends the kernels that hang. So a host that waits
for its stream is let go, and the group's next call, or wait, raises. What was computed after the failed operation is
void.

Types that NCCL does not know travel as bytes. It adds in an order of its own, which is the same for all ranks but
depends on the size of what is added.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from .collectives import Work
from .errors import CommError, CommMisuse, CommTimeout, GroupClosed, PeerLost
from .operands import Seat, Seated
from .timeouts import timeout

MAX_IN_FLIGHT = 1024
"""Operations of a group that the device has not come to the end of."""

_LOOK_S = 0.02
"""How often the guard looks at operations in flight."""

_AS_THEY_ARE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
    }
)

# torch's stubs know its process groups in part only.
_torch: Any = distributed

_REDUCE_OPS = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}


class NcclGroup(Seated):
    """A group over NCCL, seen from one rank: a ``Collectives``.

    Units: timeout_s, seconds from an operation's call to its end on the device; clock, in seconds, monotonic
    """

    def __init__(
        self,
        nccl: Any,
        device: torch.device,
        *,
        name: str,
        rank: int,
        size: int,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._nccl = nccl
        self._device = device
        super().__init__(Seat(name, rank, size))
        self.timeout_s = timeout_s
        self.clock = clock
        self._failure: tuple[type[CommError], str] | None = None
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._flying: deque[NcclWork] = deque()
        self._guard = threading.Thread(target=self._watch, name=f"nccl-{name}", daemon=True)
        self._guard.start()

    @classmethod
    def open(
        cls,
        store: Any,
        device: torch.device,
        *,
        name: str,
        rank: int,
        size: int,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> NcclGroup:
        """Open a communicator; NCCL connects the ranks in here, not in the first operation."""
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        # torch's own watchdog ends the process when an operation fails; the guard does what a living process needs.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
        options = _torch.ProcessGroupNCCL.Options()
        options._timeout = timeout(timeout_s)
        nccl = _torch.ProcessGroupNCCL(store, rank, size, options)
        nccl.eager_connect_single_device(device)
        return cls(nccl, device, name=name, rank=rank, size=size, timeout_s=timeout_s, clock=clock)

    # ------------------------------------------------------------------ operations

    def all_reduce(self, x: Tensor, *, op: str = "sum") -> Work:
        """Reduce over the ranks, in place."""
        self._seat.check_reduction("all_reduce", x, op)
        self._check_known("all_reduce", x)
        options = _torch.AllreduceOptions()
        options.reduceOp = _REDUCE_OPS[op]
        return self._start("all_reduce", x, x, lambda: self._nccl.allreduce([x], options))

    def reduce_scatter(self, x: Tensor) -> Work:
        """Sum over the ranks and keep this rank's part."""
        self._seat.check_parts("reduce_scatter", x)
        self._seat.check_reduction("reduce_scatter", x, "sum")
        self._check_known("reduce_scatter", x)
        result = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        options = _torch.ReduceScatterOptions()
        options.reduceOp = _REDUCE_OPS["sum"]
        return self._start("reduce_scatter", x, result, lambda: self._nccl._reduce_scatter_base(result, x, options))

    def all_gather(self, x: Tensor) -> Work:
        """Put the ranks' tensors one after the other."""
        self._seat.check_rows("all_gather", x)
        result = x.new_empty((x.shape[0] * self.size, *x.shape[1:]))
        out, sent = _movable(result), _movable(x)
        return self._start("all_gather", x, result, lambda: self._nccl._allgather_base(out, sent))

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Work:
        """Send rows to every rank."""
        self._seat.check_counts("all_to_all", x, send_counts, receive_counts)
        result = x.new_empty((sum(receive_counts), *x.shape[1:]))
        out, sent = _rows_movable(result), _rows_movable(x)
        return self._start(
            "all_to_all",
            x,
            result,
            lambda: self._nccl.alltoall_base(
                out, sent, list(receive_counts), list(send_counts), _torch.AllToAllOptions()
            ),
        )

    def broadcast(self, x: Tensor, *, root: int) -> Work:
        """Overwrite ``x`` with the root's."""
        self._seat.check_rank("broadcast", "root", root)
        self._seat.check_contiguous("broadcast", x)
        options = _torch.BroadcastOptions()
        options.rootRank = root
        return self._start("broadcast", x, x, lambda: self._nccl.broadcast([_movable(x)], options))

    def send(self, x: Tensor, *, to: int) -> Work:
        """Send a tensor to one rank."""
        self._seat.check_peer("send", "to", to)
        self._seat.check_contiguous("send", x)
        return self._start("send", x, x, lambda: self._nccl.send([_movable(x)], to, 0))

    def receive(self, out: Tensor, *, source: int) -> Work:
        """Receive a tensor from one rank."""
        self._seat.check_peer("receive", "source", source)
        self._seat.check_contiguous("receive", out)
        return self._start("receive", out, out, lambda: self._nccl.recv([_movable(out)], source, 0))

    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait, on the host, until every rank has come here and its earlier operations have ended on the device."""
        here = torch.zeros(1, dtype=torch.int32, device=self._device)
        options = _torch.AllreduceOptions()
        work = self._start("barrier", here, here, lambda: self._nccl.allreduce([here], options))
        work.wait_on_host(timeout_s)

    def close(self) -> None:
        """End the group here: its communicator is aborted, which the other ranks see."""
        self.fail("close", GroupClosed, f"rank {self.rank} closed the group")

    # ------------------------------------------------------------------ life

    @property
    def failure(self) -> tuple[type[CommError], str] | None:
        """What ended the group, and how."""
        return self._failure

    def error(self, operation: str) -> CommError:
        """Return what a call of a dead group raises."""
        assert self._failure is not None
        return self._seat.error(self._failure[0], operation, self._failure[1])

    def fail(self, operation: str, kind: type[CommError], reason: str) -> CommError:
        """End the group, unless it has ended; return what to raise."""
        with self._changed:
            ends = self._failure is None
            if ends:
                self._failure = (kind, reason)
            self._changed.notify_all()
        if ends:
            self._ended.set()
            # Waits for no kernel: it makes those that hang return.
            self._nccl.abort()
        return self.error(operation)

    def _start(self, operation: str, x: Tensor, result: Tensor, call: Callable[[], Any]) -> NcclWork:
        if self._failure is not None:
            raise self.error(operation)
        if x.device != self._device:
            raise self._seat.error(CommMisuse, operation, f"the tensor is on {x.device}, the group on {self._device}")
        if len(self._flying) >= MAX_IN_FLIGHT:
            raise self._seat.error(CommMisuse, operation, f"{MAX_IN_FLIGHT} operations are in flight; wait for some")
        try:
            native = None if _empty_everywhere(operation, x) else call()
        except RuntimeError as error:
            reason, _, _ = str(error).partition("\n")
            raise self.fail(operation, PeerLost, f"NCCL: {reason}") from error
        work = NcclWork(self, operation, native, x, result)
        if native is not None:
            with self._changed:
                self._flying.append(work)
                self._changed.notify_all()
        return work

    def _check_known(self, operation: str, x: Tensor) -> None:
        if x.dtype not in _AS_THEY_ARE:
            raise self._seat.error(CommMisuse, operation, f"NCCL cannot add {x.dtype}; convert it first")

    def _watch(self) -> None:
        """Look after operations in flight, in the order of their calls, until the group ends."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._flying or self._failure is not None)
                if self._failure is not None:
                    self._flying.clear()
                    return
                work = self._flying[0]
            # The lock is free meanwhile: ending a communicator may take its time, starting operations must not.
            if work.look():
                with self._changed:
                    self._flying.popleft()
                    self._changed.notify_all()
            else:
                self._ended.wait(_LOOK_S)

    def watched(self, work: NcclWork, limit_s: float) -> bool:
        """Block the host until the device has come to the end of a work; return whether it did in time."""
        with self._changed:
            return self._changed.wait_for(lambda: work.landed or self._failure is not None, limit_s)


class NcclWork:
    """An operation on its way on the device."""

    def __init__(self, group: NcclGroup, operation: str, native: Any, x: Tensor, result: Tensor) -> None:
        self._group = group
        self._operation = operation
        self._native = native
        self._x = x  # NCCL reads it until the operation ends
        self._result = result
        self.landed = native is None
        self._deadline_s = group.clock() + group.timeout_s

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Make the current stream wait for the operation; what is enqueued there from now on sees the result."""
        if self._group.failure is not None and not self.landed:
            raise self._group.error(self._operation)
        if self._native is not None:
            if timeout_s is not None:
                self._deadline_s = self._group.clock() + timeout_s
            self._native.wait()
        return self._result

    def wait_on_host(self, timeout_s: float | None = None) -> None:
        """Block the host until the operation has ended on the device."""
        limit_s = self._group.timeout_s if timeout_s is None else timeout_s
        if not self._group.watched(self, limit_s):
            raise self._group.fail(self._operation, CommTimeout, f"not complete within {limit_s} s")
        if not self.landed:
            raise self._group.error(self._operation)

    def done(self) -> bool:
        """Return whether the operation has ended on the device."""
        return self.landed or self._group.failure is not None or bool(self._native.is_completed())

    def look(self) -> bool:
        """Return whether the operation has ended; end the group when it failed or is late. For the guard."""
        if self._native.is_completed():
            if (failed := _what_failed(self._native)) is not None:
                self._group.fail(self._operation, PeerLost, f"NCCL: {failed}")
                return False
            self.landed = True
        elif self._group.clock() > self._deadline_s:
            self._group.fail(self._operation, CommTimeout, "some rank did not take part in time")
        return self.landed


def _what_failed(native: Any) -> str | None:
    """Return what an operation of NCCL's that has ended failed with."""
    try:
        error = native.exception()
    except Exception as raised:  # torch hands out some of its errors by raising them
        error = raised
    return None if error is None else str(error)


def _movable(x: Tensor) -> Tensor:
    """Return the same memory in a type that NCCL can move."""
    return x if x.dtype in _AS_THEY_ARE else x.view(-1).view(torch.uint8)


def _rows_movable(x: Tensor) -> Tensor:
    """Return the same rows in a type that NCCL can move."""
    return x if x.dtype in _AS_THEY_ARE else x.view(x.shape[0], x.shape[1:].numel()).view(torch.uint8)


def _empty_everywhere(operation: str, x: Tensor) -> bool:
    """Return whether no rank has anything to move; in all_to_all a rank without rows may stand beside others with."""
    return not (x.shape[1:] if operation == "all_to_all" else x.shape).numel()
