"""Which replica of an expert a token takes: the nearest, as far as the replicas stay evenly used.

Balance counts on every replica getting the same share of its expert's tokens. So each source rank splits its tokens
for an expert into ``parts``, and every replica takes as many parts as any other: first those of its own rank, then of
its own host, then of the others. With as many parts as replicas the shares are exactly equal; the parts are taken in
turn by the token's row. With one part a source always takes the same replica, and shares differ by what ranks do not
divide. Either way a choice depends on nothing but the placement, the source rank and the row; replicas hold the same
weights, so it never changes a result.
"""

from __future__ import annotations

from dataclasses import dataclass

from .experts import ExpertPlacement


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRoutes:
    """The choices of one source rank.

    Shapes: cycles [layers][experts], the slots that rows take in turn: row i takes ``cycle[i % len(cycle)]``
    """

    source: int
    cycles: tuple[tuple[tuple[int, ...], ...], ...]

    def slot(self, layer: int, expert: int, row: int) -> int:
        """Return the slot to which a row of the source's batch goes for an expert."""
        cycle = self.cycles[layer][expert]
        return cycle[row % len(cycle)]


def routes_from(placement: ExpertPlacement, source: int, *, parts: int | None = None) -> ReplicaRoutes:
    """Return the choices of one source rank for all layers; ``parts`` as in ``source_cycles``."""
    placement.host_of(source)  # refuses a rank that is none
    return ReplicaRoutes(
        source=source,
        cycles=tuple(
            tuple(source_cycles(placement, layer, expert, parts=parts)[source] for expert in range(len(experts)))
            for layer, experts in enumerate(placement.logical_to_physical)
        ),
    )


def slots_by_source(placement: ExpertPlacement, layer: int) -> tuple[tuple[int, ...], ...]:
    """Return the one slot that each source rank's tokens take for each expert.

    Shapes: [ranks][experts]
    """
    by_expert = [source_cycles(placement, layer, expert, parts=1) for expert in range(placement.num_experts)]
    return tuple(tuple(cycles[source][0] for cycles in by_expert) for source in range(placement.num_ranks))


def source_cycles(
    placement: ExpertPlacement, layer: int, expert: int, *, parts: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Return for every source rank the slots that its tokens for an expert take in turn.

    ``parts`` is the length of the turn, as many as the expert has replicas if None.

    Shapes: [ranks][parts]
    """
    slots = placement.replicas(layer, expert)
    parts = len(slots) if parts is None else parts
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    if len(slots) == 1:
        return (slots * parts,) * placement.num_ranks
    room = dict.fromkeys(slots, -(-placement.num_ranks * parts // len(slots)))
    ranks = {slot: placement.rank_of(slot) for slot in slots}
    cycles: list[list[int]] = [[] for _ in range(placement.num_ranks)]
    for reach in (1, placement.ranks_per_host, placement.num_ranks):
        for source, cycle in enumerate(cycles):
            if len(cycle) == parts:
                continue
            near = [slot for slot in slots if ranks[slot] // reach == source // reach]
            # The roomiest first, so that the sources of a host share its replicas.
            for slot in sorted(near, key=room.__getitem__, reverse=True):
                taken = min(parts - len(cycle), room[slot])
                cycle += [slot] * taken
                room[slot] -= taken
    return tuple(map(tuple, cycles))
