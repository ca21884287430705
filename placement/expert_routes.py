"""Which replica of an expert a token takes: the nearest, as far as the replicas stay evenly used.

Balance counts on every replica getting the same share of its expert's tokens. So each of n source ranks splits its
tokens for an expert with r replicas into r parts, and each replica takes n parts: first those of its own rank, then of
its own host, then of the others. The parts are taken in turn by the token's row, so that a choice depends on nothing
but the placement, the source rank and the row. Replicas hold the same weights: the choice never changes a result.
"""

from __future__ import annotations

from collections.abc import Callable
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


def routes_from(placement: ExpertPlacement, source: int) -> ReplicaRoutes:
    """Return the choices of one source rank for all layers."""
    layers = range(placement.num_layers)
    return ReplicaRoutes(source=source, cycles=tuple(layer_cycles(placement, layer, source) for layer in layers))


def layer_cycles(placement: ExpertPlacement, layer: int, source: int) -> tuple[tuple[int, ...], ...]:
    """Return the slots that the tokens of one source rank take in turn.

    Shapes: [experts][replicas of the expert]
    """
    placement.host_of(source)  # refuses a rank that is none
    return tuple(
        slots if len(slots) == 1 else source_cycles(placement, layer, expert)[source]
        for expert, slots in enumerate(placement.logical_to_physical[layer])
    )


def source_cycles(placement: ExpertPlacement, layer: int, expert: int) -> tuple[tuple[int, ...], ...]:
    """Return for every source rank the slots that its tokens for an expert take in turn.

    Shapes: [ranks][replicas of the expert]; every slot occurs as often as there are ranks
    """
    slots = placement.replicas(layer, expert)
    room = dict.fromkeys(slots, placement.num_ranks)
    cycles: list[list[int]] = [[] for _ in range(placement.num_ranks)]
    hosts = [placement.host_of(placement.rank_of(slot)) for slot in slots]
    tests: tuple[Callable[[int, int, int], bool], ...] = (
        lambda source, slot, _host: placement.rank_of(slot) == source,
        lambda source, _slot, host: placement.host_of(source) == host,
        lambda _source, _slot, _host: True,
    )
    for near in tests:
        for source, cycle in enumerate(cycles):
            missing = len(slots) - len(cycle)
            if not missing:
                continue
            allowed = [slot for slot, host in zip(slots, hosts, strict=True) if near(source, slot, host)]
            # The roomiest first, so that the sources of a host share its replicas.
            for slot in sorted(allowed, key=room.__getitem__, reverse=True):
                parts = min(missing, room[slot])
                cycle += [slot] * parts
                room[slot] -= parts
                missing -= parts
    return tuple(map(tuple, cycles))
