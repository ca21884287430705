"""Where experts live: from the experts that a router knows to slots of ranks, with replicas.

A rank has ``slots_per_rank`` slots, each with the weights of one expert or of none; slots count through the ranks of
the group. Which replica a rank's tokens go to depends on the rank alone, so that a step can be repeated. Why an expert
lives where, and who takes which replica, is for ``placement`` to say.

Shapes: N ranks, E experts, S slots of a rank.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..placement.expert_routes import slots_by_source
from ..placement.experts import ExpertPlacement


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMap:
    """A placement of experts, the same on all ranks of a group. Made by ``expert_map``.

    A map never changes: ranks switch to another one between two steps. ``digest`` is sent along with the rows, so a
    rank that switched earlier than another is found before any token reaches a wrong expert.

    Shapes: slots_NE [ranks, experts] int64, the slot that a rank's tokens use; experts_NS [ranks, slots of a rank]
    int64, the expert in each slot, -1 for none
    """

    slots_NE: Tensor
    experts_NS: Tensor
    digest: int

    @property
    def ranks(self) -> int:
        """The size of the group that the map is for."""
        return self.experts_NS.shape[0]

    @property
    def slots_per_rank(self) -> int:
        """The slots of a rank, empty ones included."""
        return self.experts_NS.shape[1]

    @property
    def num_experts(self) -> int:
        """The experts that the router knows."""
        return self.slots_NE.shape[1]


def expert_map(experts_NS: Tensor, slots_NE: Tensor, *, device: torch.device | None = None) -> ExpertMap:
    """Return the map with these experts in the slots, and these slots for each rank's tokens; tables on ``device``.

    Shapes: experts_NS [ranks, slots of a rank] int64, -1 for none; slots_NE [ranks, experts] int64
    Raises: ValueError naming the expert and the slot that do not fit
    """
    _check(experts_NS, slots_NE)
    tables = [table.contiguous() for table in (experts_NS, slots_NE)]
    digest = len(experts_NS)
    for table in tables:
        digest = zlib.crc32(table.numpy().tobytes(), digest)
    experts_NS, slots_NE = (table.to(device) for table in tables)
    return ExpertMap(slots_NE=slots_NE, experts_NS=experts_NS, digest=digest)


def map_of(placement: ExpertPlacement, layer: int, *, device: torch.device | None = None) -> ExpertMap:
    """Return the map of one layer of a placement: each rank's tokens use the replicas that are near."""
    return expert_map(
        torch.tensor(placement.experts_by_rank(layer)), torch.tensor(slots_by_source(placement, layer)), device=device
    )


def even_map(num_experts: int, *, ranks: int, device: torch.device | None = None) -> ExpertMap:
    """Return the map without replicas: neighbouring experts share a rank, the last ranks may have empty slots."""
    slots_per_rank = -(-num_experts // ranks)
    experts_L = torch.full((ranks * slots_per_rank,), -1)
    experts_L[:num_experts] = torch.arange(num_experts)
    return expert_map(
        experts_L.view(ranks, slots_per_rank), torch.arange(num_experts).expand(ranks, num_experts), device=device
    )


def _check(experts_NS: Tensor, slots_NE: Tensor) -> None:
    for name, table in (("experts", experts_NS), ("slots", slots_NE)):
        if table.dim() != 2 or table.dtype != torch.int64 or not table.numel():
            raise ValueError(f"{name} must be int64 [ranks, ...], not empty, got {table.dtype} {list(table.shape)}")
    if len(experts_NS) != len(slots_NE):
        raise ValueError(f"experts are of {len(experts_NS)} ranks, slots of {len(slots_NE)}")
    num_slots, num_experts = experts_NS.numel(), slots_NE.shape[1]
    outside = ((slots_NE < 0) | (slots_NE >= num_slots)).nonzero().tolist()
    if outside:
        rank, expert = outside[0]
        raise ValueError(f"slot {slots_NE[rank, expert]} does not exist: there are {num_slots}")
    wrong = (experts_NS.flatten()[slots_NE] != torch.arange(num_experts)).nonzero().tolist()
    if wrong:
        rank, expert = wrong[0]
        raise ValueError(f"rank {rank} looks for expert {expert} in slot {slots_NE[rank, expert]}, which has another")
