"""Which Ray a command works on, and reaching it.

In this order: the address that is given; ``RAY_ADDRESS``; the one that ``up`` has started on this machine; one that
somebody else has. ``up`` starts one where there is none; ``down`` ends that one, and no other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from ..clock import monotonic_clock
from ..controller.cluster import ClusterError
from ..controller.local_ray import LocalRay, LocalRays, state_folder
from ..controller.operator import NoCluster, Operator, OwnRaySilent
from ..controller.ray_operator import operating

AUTO, LOCAL = "auto", "local"

_START_TIMEOUT_S = 60.0


@contextlib.contextmanager
def reached(address: str | None, *, start: bool, announce: Callable[[str], None]) -> Iterator[Operator]:
    """Reach a Ray for as long as the block runs; ``start``: start one on this machine where there is none.

    Raises: ClusterError when none answers; RayNotStarted
    """
    rays = LocalRays(state_folder(os.environ))
    with contextlib.ExitStack() as stack:
        wanted = address or os.environ.get("RAY_ADDRESS") or None
        if wanted is None and rays.find() is None:
            operator = _found(stack)
            if operator is not None:
                yield operator
                return
        if wanted not in (None, LOCAL):
            yield stack.enter_context(operating(str(wanted)))
            return
        local = rays.find() or (_started(rays, announce) if start else None)
        if local is None:
            raise NoCluster("no Ray runs on this machine: slipstream up starts one; --address says where another is")
        yield stack.enter_context(_connected_locally(rays, local))


def _found(stack: contextlib.ExitStack) -> Operator | None:
    try:
        return stack.enter_context(operating(AUTO))
    except ClusterError:
        return None


def _started(rays: LocalRays, announce: Callable[[str], None]) -> LocalRay:
    announce("starting Ray on this machine")
    return rays.start(timeout_s=_START_TIMEOUT_S, clock=monotonic_clock)


@contextlib.contextmanager
def _connected_locally(rays: LocalRays, local: LocalRay) -> Iterator[Operator]:
    with contextlib.ExitStack() as stack:
        try:
            operator = stack.enter_context(operating(local.address, environment=rays.client_environment))
        except ClusterError as error:
            raise OwnRaySilent(f"the Ray of this machine runs and does not answer: {error}") from error
        # By this it is known again, whatever Ray calls it.
        operator.address, operator.own = local.address, True
        yield operator
