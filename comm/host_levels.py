"""Which ranks of a group share a host, and the two levels in which an exchange then goes: across hosts, and inside one.

The ranks of a replica are on hosts in their order, ``ranks_per_host`` on each; None: all are on one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def ranks_on_a_host(ranks: Sequence[int], ranks_per_host: int | None) -> int:
    """Return how many of a group's ranks every host has, of those that have any.

    Raises: ValueError when hosts have different numbers of them
    """
    if ranks_per_host is None:
        return len(ranks)
    counts = Counter(rank // ranks_per_host for rank in ranks)
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"ranks {', '.join(map(str, ranks))} are one group, and hosts of {ranks_per_host} ranks have "
            f"{' and '.join(map(str, sorted(set(counts.values()))))} of them; every host needs as many"
        )
    return len(ranks) // len(counts)


def host_levels(ranks: Sequence[int], rank: int, ranks_per_host: int | None) -> tuple[tuple[int, ...], ...]:
    """Return a rank's levels: the ranks with its place on each host, then those of its host.

    One level, the whole group, where it is on one host, or each rank on a host of its own.

    Shapes: ranks, ascending, of the replica; ``rank`` is one of them
    Raises: as ``ranks_on_a_host``
    """
    width = ranks_on_a_host(ranks, ranks_per_host)
    if width in (1, len(ranks)):
        return (tuple(ranks),)
    place = ranks.index(rank)
    first = place - place % width
    return tuple(ranks[place % width :: width]), tuple(ranks[first : first + width])
