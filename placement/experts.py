"""Where the experts of a model are: which rank holds which, per layer, and how often.

Owns the value that the exchange between ranks and the loading of weights both read. Every rank has the same number of
*slots* in every layer; a slot holds one expert, and an expert sits in one slot or in several (its *replicas*), never
twice on one rank. Slots count through the ranks: rank r owns slots r * slots_per_rank and following. Knows nothing of
loads: what makes a good placement is decided in ``expert_balance`` and ``expert_affinity``.

Reading order of the files on experts: ``experts``, ``expert_routes`` (which replica a token takes), ``expert_counts``
(what is observed), ``expert_packing``, ``expert_balance``, ``expert_affinity`` (placements from what is observed),
``expert_moves`` (from one placement to the next), ``expert_plan`` (which of all that a replica does). What an exchange
moves is counted in ``comm.expert_traffic``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlacement:
    """The expert in every slot of every layer.

    Shapes: physical_to_logical [layers][slots], an expert each; logical_to_physical [layers][experts], the slots of
    each expert in ascending order, made from it
    Raises: ValueError naming the field that cannot be
    """

    num_experts: int
    num_ranks: int
    ranks_per_host: int
    physical_to_logical: tuple[tuple[int, ...], ...]
    logical_to_physical: tuple[tuple[tuple[int, ...], ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_ranks(num_ranks=self.num_ranks, ranks_per_host=self.ranks_per_host)
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {self.num_experts}")
        if not self.physical_to_logical:
            raise ValueError("physical_to_logical must have at least one layer")
        slots = len(self.physical_to_logical[0])
        check_slots(num_slots=slots, num_experts=self.num_experts, num_ranks=self.num_ranks)
        layers = tuple(self._slots_of_experts(layer) for layer in range(len(self.physical_to_logical)))
        object.__setattr__(self, "logical_to_physical", layers)

    @classmethod
    def of_ranks(
        cls, layers: Sequence[Sequence[Sequence[int]]], *, num_experts: int, ranks_per_host: int
    ) -> ExpertPlacement:
        """Return the placement with these experts on every rank.

        Shapes: layers [layers][ranks][slots of a rank]
        """
        if not layers:
            raise ValueError("layers must not be empty")
        for index, ranks in enumerate(layers):
            if len(ranks) != len(layers[0]) or len({len(experts) for experts in ranks}) > 1:
                raise ValueError(f"layers[{index}]: all layers need as many ranks, and all ranks as many slots")
        return cls(
            num_experts=num_experts,
            num_ranks=len(layers[0]),
            ranks_per_host=ranks_per_host,
            physical_to_logical=tuple(tuple(expert for experts in ranks for expert in experts) for ranks in layers),
        )

    @property
    def num_layers(self) -> int:
        """The layers that have experts."""
        return len(self.physical_to_logical)

    @property
    def num_slots(self) -> int:
        """The slots of one layer, over all ranks."""
        return len(self.physical_to_logical[0])

    @property
    def slots_per_rank(self) -> int:
        """The slots of one layer on one rank."""
        return self.num_slots // self.num_ranks

    @property
    def num_hosts(self) -> int:
        """The hosts that the ranks are on."""
        return self.num_ranks // self.ranks_per_host

    def rank_of(self, slot: int) -> int:
        """Return the rank that owns a slot."""
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot {slot} is not among {self.num_slots}")
        return slot // self.slots_per_rank

    def host_of(self, rank: int) -> int:
        """Return the host that a rank is on."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is not among {self.num_ranks}")
        return rank // self.ranks_per_host

    def replicas(self, layer: int, expert: int) -> tuple[int, ...]:
        """Return the slots that hold an expert, at least one."""
        return self.logical_to_physical[layer][expert]

    def experts_on(self, layer: int, rank: int) -> tuple[int, ...]:
        """Return the experts in a rank's slots, in the slots' order."""
        first = rank * self.slots_per_rank
        return self.physical_to_logical[layer][first : first + self.slots_per_rank]

    def experts_by_rank(self, layer: int) -> list[tuple[int, ...]]:
        """Return the experts of every rank."""
        return [self.experts_on(layer, rank) for rank in range(self.num_ranks)]

    def _slots_of_experts(self, layer: int) -> tuple[tuple[int, ...], ...]:
        name = f"physical_to_logical[{layer}]"
        held = self.physical_to_logical[layer]
        if len(held) != self.num_slots:
            raise ValueError(f"{name} must have {self.num_slots} slots as the first layer, got {len(held)}")
        slots: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(held):
            if not 0 <= expert < self.num_experts:
                raise ValueError(f"{name}[{slot}] must be one of {self.num_experts} experts, got {expert}")
            slots[expert].append(slot)
        per_rank = self.slots_per_rank
        for expert, own in enumerate(slots):
            if not own:
                raise ValueError(f"{name}: expert {expert} has no slot")
            if len(own) > 1 and len({slot // per_rank for slot in own}) < len(own):
                raise ValueError(f"{name}: expert {expert} is twice on one rank, slots {own}")
        return tuple(map(tuple, slots))


def round_robin(
    num_experts: int,
    num_ranks: int,
    *,
    num_layers: int = 1,
    ranks_per_host: int | None = None,
    num_slots: int | None = None,
) -> ExpertPlacement:
    """Deal the experts to the ranks in turn: what to start with before anything is known of loads.

    Slots that are left, because the ranks do not divide the experts or because more are asked for, hold further
    replicas, again in turn.
    """
    ranks_per_host = num_ranks if ranks_per_host is None else ranks_per_host
    check_ranks(num_ranks=num_ranks, ranks_per_host=ranks_per_host)
    num_slots = -(-num_experts // num_ranks) * num_ranks if num_slots is None else num_slots
    check_slots(num_slots=num_slots, num_experts=num_experts, num_ranks=num_ranks)
    # After so many cards every expert would come back to a rank that has it: from there on one rank further.
    period = math.lcm(num_experts, num_ranks)
    ranks = [
        tuple((first + (rank - first // period) % num_ranks) % num_experts for first in range(0, num_slots, num_ranks))
        for rank in range(num_ranks)
    ]
    return ExpertPlacement.of_ranks([ranks] * num_layers, num_experts=num_experts, ranks_per_host=ranks_per_host)


def check_ranks(*, num_ranks: int, ranks_per_host: int) -> None:
    """Refuse ranks that do not fill hosts evenly."""
    for name, count in (("num_ranks", num_ranks), ("ranks_per_host", ranks_per_host)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if num_ranks % ranks_per_host:
        raise ValueError(f"ranks_per_host must divide the {num_ranks} ranks, got {ranks_per_host}")


def check_slots(*, num_slots: int, num_experts: int, num_ranks: int) -> None:
    """Refuse slots that cannot be: every expert needs one, ranks equally many, and no expert is twice on a rank."""
    if num_slots % num_ranks:
        raise ValueError(f"num_slots must be a multiple of the {num_ranks} ranks, got {num_slots}")
    if num_slots < num_experts:
        raise ValueError(f"num_slots must be at least the {num_experts} experts, got {num_slots}")
    if num_slots > num_experts * num_ranks:
        raise ValueError(
            f"num_slots must be at most {num_experts} experts times {num_ranks} ranks, got {num_slots}: "
            "an expert would be twice on a rank"
        )
