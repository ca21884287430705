"""One round of the controller: what is wanted and what is seen go in, what is to be done comes out.

The deciders run in order, each a file; what one decides the next ones see. Run again on what its actions have brought
about, a round comes to rest: it asks for nothing more when everything is as wanted, or when what is missing is said in
``shortages``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...placement.plan import Shortage
from .actions import Action
from .desired import Desired
from .drain import finish_drains
from .memory import Memory
from .observed import Observed
from .overdue import end_overdue
from .place import place_missing
from .publish import publish
from .repair import repair
from .round import Policy, Round
from .surplus import release_surplus

DECIDERS = (repair, end_overdue, finish_drains, release_surplus, place_missing)
"""In their order: what cannot go on, what took too long, what has ended, what is too many, what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a round has come to. ``shortages``: replicas that find no place, and what is missing where."""

    actions: tuple[Action, ...]
    shortages: tuple[Shortage, ...]
    memory: Memory


def reconcile(desired: Desired, observed: Observed, memory: Memory, policy: Policy, *, now_s: float) -> Decision:
    """Decide what to do now. Units: now_s, of any clock that does not go back"""
    round = Round(desired, observed, memory, policy, now_s=now_s)
    for decide in DECIDERS:
        decide(round)
    # First: who is told of a replica less before it ends asks it for nothing more.
    view = publish(round)
    actions = round.actions() if view is None else (view, *round.actions())
    return Decision(actions=actions, shortages=tuple(round.shortages), memory=round.memory())
