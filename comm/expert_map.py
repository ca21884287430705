"""Where experts live: from the experts that a router knows to slots of ranks, with replicas.

A rank has ``slots_per_rank`` slots, each with the weights of one expert or of none; slots count through the ranks of
the group. Which replica a rank's tokens go to depends on the rank alone, so that a step can be repeated. Why an expert
lives where is for ``placement`` to say.

Shapes: N ranks, E experts, R most replicas of an expert, S slots of a rank.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor


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


def expert_map(slots_ER: Tensor, *, ranks: int, slots_per_rank: int, device: torch.device | None = None) -> ExpertMap:
    """Return the map in which each expert's replicas live in the given slots, with its tables on ``device``.

    The replicas of an expert, in the order of their slots, each serve an equal share of neighbouring ranks: ranks of
    one host tend to use the same one, and often it is theirs.

    Shapes: slots_ER [experts, most replicas] int64, -1 where an expert has fewer
    Raises: ValueError naming the expert or slot that does not fit
    """
    _check(slots_ER, ranks, slots_per_rank)
    num_experts, most = slots_ER.shape
    num_slots = ranks * slots_per_rank
    # Missing replicas sort behind all others.
    sorted_ER = torch.where(slots_ER < 0, num_slots, slots_ER).sort(dim=1).values
    replicas_E = (slots_ER >= 0).sum(1)
    choice_NE = torch.div(torch.arange(ranks)[:, None] * replicas_E, ranks, rounding_mode="floor")
    slots_NE = sorted_ER.gather(1, choice_NE.T).T.contiguous()
    experts_L = torch.full((num_slots + 1,), -1, dtype=torch.int64)
    experts_L[sorted_ER.flatten()] = torch.arange(num_experts).repeat_interleave(most)
    experts_NS = experts_L[:num_slots].view(ranks, slots_per_rank)
    return ExpertMap(
        slots_NE=slots_NE.to(device),
        experts_NS=experts_NS.to(device),
        digest=zlib.crc32(experts_NS.numpy().tobytes(), ranks),
    )


def even_map(num_experts: int, *, ranks: int, device: torch.device | None = None) -> ExpertMap:
    """Return the map without replicas: neighbouring experts share a rank, the last ranks may have empty slots."""
    slots_per_rank = -(-num_experts // ranks)
    return expert_map(torch.arange(num_experts)[:, None], ranks=ranks, slots_per_rank=slots_per_rank, device=device)


def _check(slots_ER: Tensor, ranks: int, slots_per_rank: int) -> None:
    if ranks < 1 or slots_per_rank < 1:
        raise ValueError(f"ranks and slots_per_rank must be at least 1, got {ranks} and {slots_per_rank}")
    if slots_ER.dim() != 2 or slots_ER.dtype != torch.int64:
        raise ValueError(f"slots must be int64 [experts, replicas], got {slots_ER.dtype} {list(slots_ER.shape)}")
    homeless = (slots_ER < 0).all(1).nonzero().flatten().tolist()
    if homeless:
        raise ValueError(f"expert {homeless[0]} has no slot; every expert needs one")
    used = slots_ER[slots_ER >= 0].tolist()
    if max(used, default=0) >= ranks * slots_per_rank:
        raise ValueError(f"slot {max(used)} does not exist: {ranks} ranks have {slots_per_rank} slots each")
    if len(set(used)) < len(used):
        twice = next(slot for slot in used if used.count(slot) > 1)
        raise ValueError(f"slot {twice} is given to two experts")
