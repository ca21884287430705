"""Decides what becomes of replicas that have lost a rank: what is left of them ends, and failures are counted.

A replica is all its ranks. Another one takes its place when it fits (``place``), under an incarnation of its own.
"""

from __future__ import annotations

from .adopt import Phase
from .round import Round


def repair(round: Round) -> None:
    """End what is left of broken replicas, and of those that were told to end and have not yet."""
    for replica in round.among(Phase.BROKEN):
        life = round.life(replica)
        expected = life.stopping or life.drain_s is not None
        # What was broken when this controller began has failed for reasons that nobody remembers.
        if replica.own_fault and not expected and replica.id in round.before.lives:
            round.note_failure(replica.id.pool, life)
        round.stop(replica, replica.why)
    for replica in list(round.among(Phase.STOPPING)):
        round.stop(replica, "it was told to end and has not yet")
    _note_vanished(round)


def _note_vanished(round: Round) -> None:
    """Count replicas of which nothing is left, unless they were to end or their nodes are gone too."""
    there = {replica.id for replica in round.replicas}
    nodes = {node.name for node in round.observed.topology.nodes}
    for id, life in round.before.lives.items():
        if id not in there and not life.stopping and life.drain_s is None and life.nodes <= nodes:
            round.note_failure(id.pool, life)
