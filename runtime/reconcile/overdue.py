"""Decides how long a replica may take to come up, and when a pool's failures are forgotten."""

from __future__ import annotations

from .adopt import Phase, Replica
from .round import Round


def end_overdue(round: Round) -> None:
    """End replicas that are not up, or not ready, in time; forgive pools of which one has lasted."""
    limits = round.policy.limits
    for replica in list(round.among(Phase.STARTING)):
        if round.now_s - round.life(replica).born_s >= limits.starting_s:
            _give_up(round, replica, f"not all its processes were up within {limits.starting_s:g} s")
    for replica in list(round.among(Phase.LOADING, Phase.SILENT)):
        up_s = round.life(replica).up_s
        if up_s is not None and round.now_s - up_s >= limits.loading_s:
            _give_up(round, replica, f"no token came out of it within {limits.loading_s:g} s")
    for replica in round.among(Phase.READY):
        up_s, wish = round.life(replica).up_s, round.desired.pool(replica.id.pool)
        current = wish is not None and not round.is_outdated(replica, wish)
        if current and up_s is not None and round.now_s - up_s >= limits.stable_s:
            round.forget_failures(replica.id.pool)


def _give_up(round: Round, replica: Replica, why: str) -> None:
    round.note_failure(replica.id.pool, round.life(replica))
    round.stop(replica, why)
