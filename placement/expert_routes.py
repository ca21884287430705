"""Which replica of an expert a rank's tokens take: the nearest, as far as the replicas stay evenly used.

Balance counts on replicas getting about the same share of their expert's tokens. So every replica serves as many source
ranks as any other, or one more: first its own rank, then ranks of its host, then the others. A choice depends on
nothing but the placement and the source rank, so that a step can be repeated; replicas hold the same weights, so it
never changes a result.
"""

from __future__ import annotations

from .experts import ExpertPlacement


def slots_by_source(placement: ExpertPlacement, layer: int) -> tuple[tuple[int, ...], ...]:
    """Return the slot that each source rank's tokens take for each expert.

    Shapes: [ranks][experts]
    """
    by_expert = [_slots_of(placement, layer, expert) for expert in range(placement.num_experts)]
    return tuple(zip(*by_expert, strict=True))


def _slots_of(placement: ExpertPlacement, layer: int, expert: int) -> tuple[int, ...]:
    """Return the slot that each source rank's tokens take for one expert."""
    slots = placement.replicas(layer, expert)
    if len(slots) == 1:
        return slots * placement.num_ranks
    room = dict.fromkeys(slots, -(-placement.num_ranks // len(slots)))
    ranks = {slot: placement.rank_of(slot) for slot in slots}
    chosen: dict[int, int] = {}
    for reach in (1, placement.ranks_per_host, placement.num_ranks):
        for source in range(placement.num_ranks):
            near = [slot for slot in slots if ranks[slot] // reach == source // reach and room[slot]]
            if near and source not in chosen:
                # The roomiest, so that the sources of a host share its replicas.
                slot = max(near, key=room.__getitem__)
                chosen[source] = slot
                room[slot] -= 1
    return tuple(chosen[source] for source in range(placement.num_ranks))
