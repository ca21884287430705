"""What an exchange of tokens between expert ranks moves, counted from the routing alone.

Owns the rule that the exchange keeps and that placements are judged by. *Flat*: a token goes once to each rank that
holds one of its experts. *Hierarchical*: once to each host, where it enters at the rank that stands on its host where
the source stands on its own, and from there once to each other rank of the host that needs it. A token that is already
where it is needed is not moved. Counts one way; results come back the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .expert_routes import source_cycles
from .experts import ExpertPlacement


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeBytes:
    """Bytes sent in one layer, over all ranks.

    Units: flat, all bytes of a flat exchange; flat_between_hosts, those of them that leave a host; between_hosts and
    inside_hosts, bytes of a hierarchical exchange
    """

    flat: int
    flat_between_hosts: int
    between_hosts: int
    inside_hosts: int


def exchange_bytes(
    placement: ExpertPlacement,
    layer: int,
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    token_bytes: int,
    parts: int | None = None,
) -> ExchangeBytes:
    """Count what dispatching these tokens moves; ``parts`` as in ``expert_routes.source_cycles``.

    Shapes: choices [ranks][tokens of the rank][top_k], an expert each
    Units: token_bytes, bytes of one copy of a token; 1 counts copies
    """
    if len(choices) != placement.num_ranks:
        raise ValueError(f"choices must be of {placement.num_ranks} ranks, got {len(choices)}")
    if token_bytes < 1:
        raise ValueError(f"token_bytes must be at least 1, got {token_bytes}")
    per_host = placement.ranks_per_host
    routes = [source_cycles(placement, layer, expert, parts=parts) for expert in range(placement.num_experts)]
    flat = flat_between = between = inside = 0
    for source, rows in enumerate(choices):
        cycles = [cycle[source] for cycle in routes]
        home, place = divmod(source, per_host)
        for row, experts in enumerate(rows):
            slots = {cycles[expert][row % len(cycles[expert])] for expert in experts}
            ranks = {slot // placement.slots_per_rank for slot in slots}
            hosts = {rank // per_host for rank in ranks}
            flat += len(ranks - {source})
            flat_between += sum(rank // per_host != home for rank in ranks)
            between += len(hosts - {home})
            inside += len(ranks - {host * per_host + place for host in hosts})
    return ExchangeBytes(
        flat=flat * token_bytes,
        flat_between_hosts=flat_between * token_bytes,
        between_hosts=between * token_bytes,
        inside_hosts=inside * token_bytes,
    )
