"""Who is who among the ranks of a replica: a mesh with the axes pp, ep and tp.

Ranks count with tp fastest, then ep, then pp, so that tensor-parallel ranks, which talk most, are neighbours. Attention
and dense layers are sharded over tp and the same on every ep rank; experts are spread over ep, and each expert's
weights over tp.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """The degrees of parallelism of a replica, and how many of its ranks, in their order, share a host: None is all.

    Raises: ValueError naming what is below 1
    """

    pp: int = 1
    ep: int = 1
    tp: int = 1
    ranks_per_host: int | None = None

    def __post_init__(self) -> None:
        if self.ranks_per_host is not None and self.ranks_per_host < 1:
            raise ValueError(f"ranks_per_host must be at least 1, got {self.ranks_per_host}")
        for axis in ("pp", "ep", "tp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis} must be at least 1, got {getattr(self, axis)}")

    @property
    def size(self) -> int:
        """The ranks of the replica."""
        return self.pp * self.ep * self.tp

    def place(self, rank: int) -> MeshPlace:
        """Return where a rank stands."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not in a mesh of {self.size}")
        stage, within = divmod(rank, self.ep * self.tp)
        return MeshPlace(shape=self, pp=stage, ep=within // self.tp, tp=within % self.tp)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlace:
    """One rank's coordinates, and the ranks that it forms groups with."""

    shape: MeshShape
    pp: int
    ep: int
    tp: int

    @property
    def rank(self) -> int:
        """The rank in the replica."""
        return (self.pp * self.shape.ep + self.ep) * self.shape.tp + self.tp

    @property
    def tp_ranks(self) -> tuple[int, ...]:
        """The ranks that differ in tp only."""
        return tuple(self._at(tp=tp) for tp in range(self.shape.tp))

    @property
    def ep_ranks(self) -> tuple[int, ...]:
        """The ranks that differ in ep only."""
        return tuple(self._at(ep=ep) for ep in range(self.shape.ep))

    @property
    def pp_ranks(self) -> tuple[int, ...]:
        """The ranks that differ in pp only, first stage first."""
        return tuple(self._at(pp=pp) for pp in range(self.shape.pp))

    @property
    def stage_ranks(self) -> tuple[int, ...]:
        """All ranks of this stage."""
        return tuple(self._at(ep=ep, tp=tp) for ep in range(self.shape.ep) for tp in range(self.shape.tp))

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

    def _at(self, *, pp: int | None = None, ep: int | None = None, tp: int | None = None) -> int:
        stage = self.pp if pp is None else pp
        return (stage * self.shape.ep + (self.ep if ep is None else ep)) * self.shape.tp + (
            self.tp if tp is None else tp
        )
