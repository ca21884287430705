"""The one protocol through which ranks exchange tensors, whatever carries them.

An operation is started by its call and returns a ``Work``, which is to be waited for; nothing may touch its tensors
until ``wait`` has returned. Every rank of a group calls the same operations in the same order, from one thread; sends
and receives need only keep their order between the two ranks. Works may be waited for in any order, from any thread.
Every wait has a deadline, the group's own unless another is given, and ends in a result or in one of ``errors``; after
an error the group is dead on every rank within that deadline, and a rank that fails tells the others, where it can, by
breaking its connections to them. Any dtype can be moved; types that a backend does not know (float8) travel as bytes.

Implementations: ``torch_groups`` opens those on torch.distributed, ``gloo_group`` for CPUs and ``nccl_group`` for GPUs;
``local_groups`` has threads of one process, for tests and groups of one.

Shapes: n = size of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Work(Protocol):
    """An operation on its way."""

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Return the operation's result once it is complete; again, the same.

        Units: timeout_s, seconds from now; None is the group's, which may also end a work that is given longer
        Raises: PeerLost, CommTimeout, GroupClosed
        """
        ...

    def done(self) -> bool:
        """Return whether ``wait`` would return or raise at once."""
        ...


class Collectives(Protocol):
    """A group of ranks, seen from one of them."""

    @property
    def name(self) -> str:
        """What errors and metrics call the group."""
        ...

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        ...

    @property
    def size(self) -> int:
        """The ranks of the group."""
        ...

    def all_reduce(self, x: Tensor, *, op: str = "sum") -> Work:
        """Reduce over the ranks (``sum`` or ``max``), in place; every rank gets the same bits.

        Shapes: x contiguous, the same on all ranks
        """
        ...

    def reduce_scatter(self, x: Tensor) -> Work:
        """Sum over the ranks and keep this rank's part of the first axis.

        Shapes: x [n * rows, ...] contiguous; result [rows, ...]
        """
        ...

    def all_gather(self, x: Tensor) -> Work:
        """Put the ranks' tensors one after the other.

        Shapes: x [rows, ...] contiguous, the same on all ranks; result [n * rows, ...]
        """
        ...

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Work:
        """Send rows to every rank: ``send_counts[r]`` to rank r, which expects as many from this one.

        Shapes: x [sum(send_counts), ...] contiguous, sorted by receiver; result [sum(receive_counts), ...], by sender
        """
        ...

    def broadcast(self, x: Tensor, *, root: int) -> Work:
        """Overwrite ``x`` with the root's.

        Shapes: x contiguous, the same on all ranks
        """
        ...

    def send(self, x: Tensor, *, to: int) -> Work:
        """Send a tensor to one rank, which ``receive``s it; between two ranks, in order. The result is ``x``."""
        ...

    def receive(self, out: Tensor, *, source: int) -> Work:
        """Receive a tensor into ``out``, contiguous, of the type and shape that ``source`` sends. The result is it."""
        ...

    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait until every rank has come here.

        Raises: as ``Work.wait``
        """
        ...

    def close(self) -> None:
        """End the group here: what is on its way, here and on the other ranks, fails. Idempotent, never waits long."""
        ...
