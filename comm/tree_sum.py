"""A group whose ranks add up sums of subtrees as one rank would: the same bits for 1, 2, 4 and 8 ranks.

What is given to be summed are float32 sums of the rank's own leaves (``kernels.tree_sum``); what comes back is all of
the tree, rounded once to the model's type. The parts are gathered, in the order of the ranks, and every rank adds them
up: float32 of all ranks travels where a plain sum would send its own type once or twice. Whatever is no sum goes
through as it is.

Shapes: n = size of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.tree_sum import add_stacked
from .collectives import Collectives, Work
from .errors import CommMisuse


class TreeWork:
    """A work whose result is made of what another one brings."""

    def __init__(self, work: Work, made_of: Callable[[Tensor], Tensor]) -> None:
        self._work = work
        self._made_of = made_of
        self._result: Tensor | None = None

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """As ``Work.wait``."""
        if self._result is None:
            self._result = self._made_of(self._work.wait(timeout_s))
        return self._result

    def done(self) -> bool:
        """As ``Work.done``: what is left to do then waits for nobody."""
        return self._result is not None or self._work.done()


class TreeGroup:
    """``Collectives`` over another group: sums are those of a tree, of type ``dtype``."""

    def __init__(self, group: Collectives, dtype: torch.dtype) -> None:
        self._group = group
        self._dtype = dtype

    @property
    def name(self) -> str:
        """As ``Collectives.name``."""
        return self._group.name

    @property
    def rank(self) -> int:
        """As ``Collectives.rank``."""
        return self._group.rank

    @property
    def size(self) -> int:
        """As ``Collectives.size``."""
        return self._group.size

    def all_reduce(self, x: Tensor, *, op: str = "sum") -> Work:
        """Add up the ranks' subtrees; ``x`` stays as it is.

        Shapes: x [rows, ...] float32 contiguous, the same on all ranks; the result is of the model's type
        """
        self._check(x, "all_reduce", op)
        gathered = self._group.all_gather(x)
        return TreeWork(gathered, lambda parts: add_stacked(parts.view(self.size, *x.shape), self._dtype))

    def reduce_scatter(self, x: Tensor) -> Work:
        """Add up the ranks' subtrees of this rank's part of the first axis.

        Shapes: x [n * rows, ...] float32 contiguous; result [rows, ...] of the model's type
        """
        self._check(x, "reduce_scatter", "sum")
        rows, left = divmod(x.shape[0], self.size)
        if left:
            raise CommMisuse(f"group {self.name}: {x.shape[0]} rows do not divide by {self.size} ranks")
        counts = [rows] * self.size
        parts = self._group.all_to_all(x, send_counts=counts, receive_counts=counts)
        return TreeWork(parts, lambda x: add_stacked(x.view(self.size, rows, *x.shape[1:]), self._dtype))

    def all_gather(self, x: Tensor) -> Work:
        """As ``Collectives.all_gather``."""
        return self._group.all_gather(x)

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Work:
        """As ``Collectives.all_to_all``."""
        return self._group.all_to_all(x, send_counts=send_counts, receive_counts=receive_counts)

    def broadcast(self, x: Tensor, *, root: int) -> Work:
        """As ``Collectives.broadcast``."""
        return self._group.broadcast(x, root=root)

    def send(self, x: Tensor, *, to: int) -> Work:
        """As ``Collectives.send``."""
        return self._group.send(x, to=to)

    def receive(self, out: Tensor, *, source: int) -> Work:
        """As ``Collectives.receive``."""
        return self._group.receive(out, source=source)

    def barrier(self, timeout_s: float | None = None) -> None:
        """As ``Collectives.barrier``."""
        self._group.barrier(timeout_s)

    def close(self) -> None:
        """As ``Collectives.close``."""
        self._group.close()

    def _check(self, x: Tensor, operation: str, op: str) -> None:
        if op != "sum" or x.dtype != torch.float32 or x.dim() == 0:
            raise CommMisuse(
                f"group {self.name}: {operation} of subtrees takes rows of float32 to add, got {op} of {x.dtype}"
            )
