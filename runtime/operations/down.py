"""``slipstream down``: a deployment ends, and nothing of it is left.

First what serves is drained, by the controller, which is started again where it has gone; gateways stay until then,
because what runs is answered through them. Then gateways and controller end, then whatever is left, and only when
nothing is, the records are forgotten. It may be interrupted anywhere and run again.
"""

from __future__ import annotations

from dataclasses import replace

from ..controller.cluster import ClusterError
from ..controller.ledger import Deployment
from ..controller.operator import Remains
from ..reconcile.desired import Desired
from .follow import Outcome
from .progress import Event
from .reporter import Ending
from .session import EXIT_DONE, EXIT_FAILED, Session
from .status import DeploymentStatus

END_MARGIN_S = 60.0
"""What ending takes at most, in addition to draining."""

_ENDING_S = 5.0
_LEFT_TIMEOUT_S = 30.0


def down(session: Session, name: str, *, now: bool, timeout_s: float | None) -> Ending:
    """End a deployment. ``now``: what runs is cut off. Units: timeout_s, until what has not ended is ended at once

    Raises: ClusterError when the platform does not answer
    """
    operator = session.operator
    deployment = session.ledger(name).deployment()
    if not deployment.mark and operator.remains(name, "").nothing:
        session.ledger(name).forget()
        return Ending(exit_code=EXIT_DONE, outcome="nothing", text=f"nothing of {name} runs")
    limits = replace(deployment.limits, drain_s=0.0) if now else deployment.limits
    patience_s = limits.drain_s + END_MARGIN_S if timeout_s is None else timeout_s
    drained = _drain(session, name, replace(deployment, limits=limits), timeout_s=patience_s)
    for order in deployment.gateways:
        operator.end_gateway(name, order.name, drain_s=0.0 if now else order.drain_s)
    operator.end_controller(name)
    # Actors that were told to end take a moment.
    left = _until_nothing(session, name, deployment.mark, timeout_s=_ENDING_S)
    if not left.nothing:
        session.reporter.say(f"ended at once: {left}")
        operator.end_all(name, deployment.mark)
        left = _until_nothing(session, name, deployment.mark, timeout_s=_LEFT_TIMEOUT_S)
    if not left.nothing:
        text = f"of {name} there is still {left}: run slipstream down again"
        return Ending(exit_code=EXIT_FAILED, outcome="left", text=text)
    session.ledger(name).forget()
    how = "" if drained else ", what did not end in time was cut off"
    return Ending(exit_code=EXIT_DONE, outcome="down", text=f"{name} is down{how}; nothing of it is left")


def _drain(session: Session, name: str, deployment: Deployment, *, timeout_s: float) -> bool:
    """Let all replicas end; return whether they have in time."""

    def check(status: DeploymentStatus) -> Outcome | None:
        return Outcome.DONE if status.controller and not (status.replicas or status.pools) else None

    try:
        session.ask(name, replace(deployment, desired=Desired()))
        return session.watcher(name).until(check, timeout_s=timeout_s).outcome is Outcome.DONE
    except ClusterError as error:
        text = f"nothing can be drained, all is ended at once: {error}"
        session.reporter.events([Event(event="problem", text=text)])
        return False


def _until_nothing(session: Session, name: str, mark: str, *, timeout_s: float) -> Remains:
    deadline_s = session.patience.clock() + timeout_s
    while True:
        left = session.operator.remains(name, mark)
        if left.nothing or session.patience.clock() >= deadline_s:
            return left
        session.patience.pause(session.patience.period_s)
