"""Decides what becomes of replicas that are to go while no other finds a place: they go first, one at a time.

A replica that is named as leaving goes whatever becomes of its pool: that is what was asked for. One on a cordoned node
goes only while another serves on; the last one stays, and what is missing says so.
"""

from __future__ import annotations

from dataclasses import replace

from .adopt import Phase, Replica
from .desired import PoolWish
from .round import Round
from .surplus import is_held, old, release, serving_beside, why_to_go


def give_way(round: Round, pool: PoolWish) -> None:
    """Drain one replica of a pool for which there is no room elsewhere, or say why none goes."""
    to_go = [replica for replica in old(round, pool) if _is_to_go(round, replica)]
    for replica in sorted(to_go, key=lambda replica: not round.is_leaving(replica)):
        if round.is_leaving(replica) or serving_beside(round, replica):
            release(round, replica, f"{why_to_go(round, replica)}, and there is no room for another beside it")
            return
    for index, shortage in enumerate(round.shortages):
        if to_go and shortage.pool == pool.name:
            stays = f"{to_go[0].id} serves on, though {why_to_go(round, to_go[0])}: the pool has no other that serves"
            round.shortages[index] = replace(shortage, why=f"{shortage.why}; {stays}")
            return


def _is_to_go(round: Round, replica: Replica) -> bool:
    return round.phase(replica) is Phase.READY and round.is_to_go(replica) and not is_held(round, replica)
