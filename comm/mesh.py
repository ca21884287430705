"""Who is who among the ranks of a replica: a mesh with the axes pp, sp, ep and tp.

Ranks count with tp fastest, then ep, then sp, then pp, so that tensor-parallel ranks, which talk most, are neighbours.
Attention and dense layers are sharded over tp and the same on every ep rank; experts are spread over ep, and each
expert's weights over tp. Sequence-parallel ranks have the same weights, and share the tokens of long prompts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """The degrees of parallelism of a replica, and how many of its ranks, in their order, share a host: None is all.

    Raises: ValueError naming what is below 1
    """

    pp: int = 1
    sp: int = 1
    ep: int = 1
    tp: int = 1
    ranks_per_host: int | None = None

    def __post_init__(self) -> None:
        if self.ranks_per_host is not None and self.ranks_per_host < 1:
            raise ValueError(f"ranks_per_host must be at least 1, got {self.ranks_per_host}")
        for axis in ("pp", "sp", "ep", "tp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis} must be at least 1, got {getattr(self, axis)}")

    @property
    def size(self) -> int:
        """The ranks of the replica."""
        return self.pp * self.sp * self.ep * self.tp

    def place(self, rank: int) -> MeshPlace:
        """Return where a rank stands."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not in a mesh of {self.size}")
        rest, tp = divmod(rank, self.tp)
        rest, ep = divmod(rest, self.ep)
        pp, sp = divmod(rest, self.sp)
        return MeshPlace(shape=self, pp=pp, sp=sp, ep=ep, tp=tp)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlace:
    """One rank's coordinates, and the ranks that it forms groups with."""

    shape: MeshShape
    pp: int
    sp: int
    ep: int
    tp: int

    @property
    def rank(self) -> int:
        """The rank in the replica."""
        return self._at()

    @property
    def tp_ranks(self) -> tuple[int, ...]:
        """The ranks that differ in tp only."""
        return tuple(self._at(tp=tp) for tp in range(self.shape.tp))

    @property
    def ep_ranks(self) -> tuple[int, ...]:
        """The ranks that differ in ep only."""
        return tuple(self._at(ep=ep) for ep in range(self.shape.ep))

    @property
    def sp_ranks(self) -> tuple[int, ...]:
        """The ranks that differ in sp only."""
        return tuple(self._at(sp=sp) for sp in range(self.shape.sp))

    @property
    def pp_ranks(self) -> tuple[int, ...]:
        """The ranks that differ in pp only, first stage first."""
        return tuple(self._at(pp=pp) for pp in range(self.shape.pp))

    @property
    def stage_ranks(self) -> tuple[int, ...]:
        """All ranks of this stage."""
        size = self.shape.size // self.shape.pp
        return tuple(range(self.pp * size, (self.pp + 1) * size))

    def expert_ranks(self, *, over_tp: bool) -> tuple[int, ...]:
        """The ranks that a layer's experts are spread over: those of tp, or of ep."""
        return self.tp_ranks if over_tp else self.ep_ranks

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return self.pp == self.shape.pp - 1

    def _at(self, *, pp: int | None = None, sp: int | None = None, ep: int | None = None, tp: int | None = None) -> int:
        rank = 0
        for given, own, degree in (
            (pp, self.pp, self.shape.pp),
            (sp, self.sp, self.shape.sp),
            (ep, self.ep, self.shape.ep),
            (tp, self.tp, self.shape.tp),
        ):
            rank = rank * degree + (own if given is None else given)
        return rank
