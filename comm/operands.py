"""What the operands of a collective must be, said before anything is sent.

Owns the checks that one rank can make alone, and how errors name a place: group, operation, rank. Whether the ranks
agree with one another is for the implementations to see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .errors import CommError, CommMisuse

_Error = TypeVar("_Error", bound=CommError)

OPS = ("sum", "max")

REDUCIBLE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    }
)
"""Types that can be added; all others can only be moved."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank of a group."""

    group: str
    rank: int
    size: int

    def error(self, kind: type[_Error], operation: str, reason: str) -> _Error:
        """Return an error that says where it happened."""
        return kind(f"group {self.group}: {operation} at rank {self.rank} of {self.size}: {reason}")

    def check_reduction(self, operation: str, x: Tensor, op: str) -> None:
        """Raise CommMisuse unless ``x`` can be reduced."""
        self.check_contiguous(operation, x)
        if op not in OPS:
            raise self.error(CommMisuse, operation, f"op must be one of {', '.join(OPS)}, got {op!r}")
        if x.dtype not in REDUCIBLE:
            raise self.error(CommMisuse, operation, f"{x.dtype} cannot be reduced, only moved; convert it first")

    def check_contiguous(self, operation: str, x: Tensor) -> None:
        """Raise CommMisuse unless ``x`` lies in one piece."""
        if not x.is_contiguous():
            raise self.error(CommMisuse, operation, f"the tensor {list(x.shape)} must be contiguous")

    def check_rows(self, operation: str, x: Tensor) -> None:
        """Raise CommMisuse unless ``x`` is contiguous and has rows."""
        self.check_contiguous(operation, x)
        if x.dim() == 0:
            raise self.error(CommMisuse, operation, "the tensor needs a first axis, got a scalar")

    def check_parts(self, operation: str, x: Tensor) -> None:
        """Raise CommMisuse unless the first axis of ``x`` has an equal part for every rank."""
        self.check_rows(operation, x)
        if x.shape[0] % self.size:
            raise self.error(CommMisuse, operation, f"{x.shape[0]} rows do not divide by {self.size} ranks")

    def check_counts(
        self, operation: str, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> None:
        """Raise CommMisuse unless the counts fit the group, ``x`` and one another."""
        self.check_rows(operation, x)
        for name, counts in (("send_counts", send_counts), ("receive_counts", receive_counts)):
            if len(counts) != self.size:
                raise self.error(CommMisuse, operation, f"{name} has {len(counts)} entries for {self.size} ranks")
            if any(count < 0 for count in counts):
                raise self.error(CommMisuse, operation, f"{name} must not be negative, got {list(counts)}")
        if sum(send_counts) != x.shape[0]:
            raise self.error(CommMisuse, operation, f"send_counts add up to {sum(send_counts)} for {x.shape[0]} rows")
        if send_counts[self.rank] != receive_counts[self.rank]:
            raise self.error(
                CommMisuse,
                operation,
                f"sends itself {send_counts[self.rank]} rows and expects {receive_counts[self.rank]}",
            )

    def check_rank(self, operation: str, role: str, rank: int) -> None:
        """Raise CommMisuse unless ``rank`` is in the group."""
        if not 0 <= rank < self.size:
            raise self.error(CommMisuse, operation, f"{role} {rank} is not in the group")

    def check_peer(self, operation: str, role: str, rank: int) -> None:
        """Raise CommMisuse unless ``rank`` is another rank of the group."""
        self.check_rank(operation, role, rank)
        if rank == self.rank:
            raise self.error(CommMisuse, operation, f"{role} is this rank itself")


class Seated:
    """What every group says of itself."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat

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
