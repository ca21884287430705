"""Decides which replicas are too many: more than wanted, of a pool that is gone, or outdated.

Outdated is what is of an old generation, on a cordoned node, or named as leaving: an old one, for short. Those that
come up end at once. Those that serve are drained, an old one only when a new one serves in its place. When
the model changes, the last prefill replica with the old one stays, as long as it has a decode replica to work with,
until there is one with the new model, and the other way round: a request needs both, and of one model.
"""

from __future__ import annotations

from ...placement.plan import Role
from .adopt import Phase, Replica
from .desired import PoolWish
from .round import Round

COMING = (Phase.STARTING, Phase.LOADING, Phase.SILENT)
LIVING = (*COMING, Phase.READY)


def release_surplus(round: Round) -> None:
    """Drain or end what is too many."""
    for replica in surplus(round):
        if not is_held(round, replica):
            release(round, replica, _why(round, replica))


def release(round: Round, replica: Replica, why: str) -> None:
    """Let go of a replica: drain it if it may have requests, end it if it cannot."""
    if round.phase(replica) in (Phase.STARTING, Phase.LOADING):
        round.stop(replica, why)
    else:
        round.drain(replica, why)


def surplus(round: Round) -> list[Replica]:
    """Return the living replicas that nobody needs."""
    living = list(round.among(*LIVING))
    found = [replica for replica in living if round.desired.pool(replica.id.pool) is None]
    for pool in round.desired.pools:
        current = round.current(pool, *LIVING)
        found += sorted(current, key=lambda replica: _least_wanted_first(round, replica))[
            : max(0, len(current) - pool.replicas)
        ]
        found += _surplus_old(round, pool)
    return found


def old(round: Round, pool: PoolWish) -> list[Replica]:
    """Return the living replicas of a pool that others are to replace, those to go first first."""
    found = [
        replica for replica in round.among(*LIVING) if replica.id.pool == pool.name and round.is_outdated(replica, pool)
    ]
    return sorted(found, key=lambda replica: _least_wanted_first(round, replica))


def is_held(round: Round, replica: Replica) -> bool:
    """Whether a replica is the last of its pool with an old model that serves, while the new one cannot yet."""
    pool = round.desired.pool(replica.id.pool)
    if pool is None or not pool.replicas or round.phase(replica) is not Phase.READY or round.is_leaving(replica):
        return False
    model = replica.spec.generation.model
    if model == pool.generation.model:
        return False
    alike = [other for other in serving_beside(round, replica) if not round.is_leaving(other)]
    # Of several, one that may stay where it is.
    others = [other for other in alike if _stays_rather(round, other) < _stays_rather(round, replica)]
    models = {other.spec.generation.model for partner in partners(round, pool) for other in _ready(round, partner)}
    return not others and model in models and pool.generation.model not in models


def serving_beside(round: Round, replica: Replica) -> list[Replica]:
    """Return the others of a replica's pool that can take its requests: they serve, and have the same model."""
    model = replica.spec.generation.model
    return [
        other
        for other in round.among(Phase.READY)
        if other.id.pool == replica.id.pool and other.spec.generation.model == model and other.id != replica.id
    ]


def _surplus_old(round: Round, pool: PoolWish) -> list[Replica]:
    coming = [replica for replica in old(round, pool) if round.phase(replica) in COMING]
    serving = [replica for replica in old(round, pool) if round.phase(replica) is Phase.READY]
    still_needed = max(0, pool.replicas - len(round.current(pool, Phase.READY)))
    return coming + serving[: max(0, len(serving) - still_needed)]


def why_to_go(round: Round, replica: Replica) -> str:
    """Return why a replica is to go, in words."""
    if round.is_leaving(replica):
        return "it is named as leaving"
    return f"node {', '.join(round.cordoned_nodes(replica))} is cordoned"


def partners(round: Round, pool: PoolWish) -> list[PoolWish]:
    """Return the pools without which this one cannot serve."""
    if pool.role is Role.MIXED:
        return []
    other = Role.DECODE if pool.role is Role.PREFILL else Role.PREFILL
    return [wish for wish in round.desired.pools if wish.role is other and wish.replicas]


def _ready(round: Round, pool: PoolWish) -> list[Replica]:
    return [replica for replica in round.among(Phase.READY) if replica.id.pool == pool.name]


def _stays_rather(round: Round, replica: Replica) -> tuple[bool, int]:
    return bool(round.cordoned_nodes(replica)), replica.id.incarnation


def _least_wanted_first(round: Round, replica: Replica) -> tuple[bool, bool, bool, int, int]:
    driver = replica.driver
    load = 0 if driver is None else driver.requests + driver.grants + driver.transfers
    pool = round.desired.pool(replica.id.pool)
    # What is new stays rather than what may stay where it is: a pool does not go back to an old model.
    new = pool is not None and replica.spec.generation == pool.generation
    return round.phase(replica) is Phase.READY, new, not round.is_to_go(replica), load, -replica.id.incarnation


def _why(round: Round, replica: Replica) -> str:
    pool = round.desired.pool(replica.id.pool)
    if pool is None:
        return f"pool {replica.id.pool} is not wanted any more"
    if replica.spec.generation != pool.generation:
        return f"generation {replica.spec.generation} makes room for {pool.generation}"
    if round.is_to_go(replica):
        return why_to_go(round, replica)
    return f"pool {pool.name} is to have {pool.replicas} replicas"
