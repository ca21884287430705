"""The Ray that ``up`` started on this machine, once nothing is deployed on it any more."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..controller.cluster import ClusterError
from ..controller.ledger import deployments
from ..controller.local_ray import LocalRays, state_folder
from ..controller.operator import Operator


def end_own_ray() -> bool:
    """End the Ray that was started on this machine, with all that runs on it; return whether it ran."""
    return LocalRays(state_folder(os.environ)).end()


def unneeded_ray(operator: Operator) -> Callable[[], bool] | None:
    """Return what ends the Ray of this machine, and says whether it ran, if it is this one and nothing needs it."""
    rays = LocalRays(state_folder(os.environ))
    local = rays.find()
    if local is None or local.address != operator.address:
        return None
    try:
        return None if deployments(operator.store) else rays.end
    except ClusterError:
        # Nobody can say: it is left for another `slipstream down`.
        return None
