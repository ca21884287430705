"""One round of the controller after the other: look, decide, act.

Owns the memory between rounds and what a failing action means: it is logged, and the next round decides anew from what
is seen then.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import assert_never

from ...placement.plan import Shortage
from ..clock import Clock
from ..reconcile.actions import Action, PublishView, StartGang, StopRank, Unroute
from ..reconcile.desired import Desired
from ..reconcile.memory import Memory
from ..reconcile.observed import Observed
from ..reconcile.reconcile import reconcile
from ..reconcile.round import Policy
from ..reconcile.views import View
from .cluster import Cluster, ClusterError, StaleController

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What one round saw and did.

    ``view``: the newest, with what the round has published. ``refused``: actions that were not carried out, and why.
    """

    observed: Observed
    view: View
    actions: tuple[Action, ...]
    shortages: tuple[Shortage, ...]
    refused: tuple[tuple[Action, str], ...] = field(default=())


class Rounds:
    """Runs rounds against one cluster; ``desired`` and ``policy`` may be replaced between them."""

    def __init__(self, cluster: Cluster, policy: Policy, desired: Desired, *, clock: Clock) -> None:
        self._cluster = cluster
        self.policy = policy
        self._clock = clock
        self._shortages: tuple[Shortage, ...] = ()
        self.desired = desired
        self.memory = Memory()

    def run(self) -> RoundReport:
        """Run one round. Raises: ClusterError when the cluster cannot be seen"""
        observed = self._cluster.observe()
        decision = reconcile(self.desired, observed, self.memory, self.policy, now_s=self._clock())
        self.memory = decision.memory
        if decision.shortages != self._shortages:
            self._shortages = decision.shortages
            for shortage in decision.shortages:
                logger.warning("pool %s: %s", shortage.pool, shortage.why)
        refused: list[tuple[Action, str]] = []
        view = observed.view
        for action in decision.actions:
            try:
                self._carry_out(action)
                if isinstance(action, PublishView):
                    view = action.view
            except StaleController as error:
                # Somebody else acts: nothing of what was decided holds any more.
                logger.warning("the round ends here: %s", error)
                refused.append((action, str(error)))
                break
            except ClusterError as error:
                logger.warning("not done: %s", error)
                refused.append((action, str(error)))
                if isinstance(action, PublishView):
                    # Replicas end only after gateways were told.
                    break
        return RoundReport(
            observed=observed,
            view=view,
            actions=decision.actions,
            shortages=decision.shortages,
            refused=tuple(refused),
        )

    def _carry_out(self, action: Action) -> None:
        match action:
            case PublishView(view=view):
                logger.info("view %d: %s", view.epoch, ", ".join(each.replica for each in view.replicas) or "nobody")
                self._cluster.publish(view)
            case Unroute(replica=replica, why=why):
                logger.info("%s takes no more requests: %s", replica, why)
                self._cluster.unroute(action)
            case StopRank(replica=replica, rank=rank, why=why):
                logger.info("rank %d of %s ends: %s", rank, replica, why)
                self._cluster.stop(action)
            case StartGang(spec=spec, devices=devices):
                logger.info("%s starts on %s", spec.id, ", ".join(map(str, devices)))
                self._cluster.start(action)
            case _:
                assert_never(action)
