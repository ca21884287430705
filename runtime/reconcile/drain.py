"""Decides when a replica that takes no more requests may end: when nothing is left on it, or its time is over.

The first phase is ``Round.drain``: the view no longer names it, and its driver refuses what is new.
"""

from __future__ import annotations

from .adopt import Phase
from .round import Round


def finish_drains(round: Round) -> None:
    """End drained replicas, and tell those again that have not heard."""
    limits = round.policy.limits
    for replica in list(round.among(Phase.DRAINING)):
        since_s, driver = round.drains_since(replica), replica.driver
        if driver is not None and driver.idle:
            round.stop(replica, "drained: nothing is left on it")
        elif round.now_s - since_s >= limits.drain_s:
            left = driver.left if driver is not None else "unknown, its driver does not answer"
            round.stop(replica, f"its {limits.drain_s:g} s to drain are over; left: {left}")
        elif driver is None or driver.admitting:
            round.drain(replica, "it drains")
