"""``slipstream scale`` and ``slipstream drain``: one thing about what is wanted is another from now on."""

from __future__ import annotations

from dataclasses import replace

from ...sdk.errors import ConfigError
from ..controller.ledger import Deployment
from ..reconcile.desired import Desired
from .session import Session
from .status import look


def scale(session: Session, name: str, pool: str, replicas: int) -> Deployment:
    """Let a pool have so many replicas, until the cluster file is applied again. Raises: ConfigError; ClusterError"""
    deployment = session.ledger(name).deployment()
    desired = deployment.desired
    if desired.pool(pool) is None:
        known = ", ".join(wish.name for wish in desired.pools) or "none"
        raise ConfigError("POOL", f"{name} has no pool {pool!r}; it has {known}")
    pools = tuple(replace(wish, replicas=replicas) if wish.name == pool else wish for wish in desired.pools)
    return _ask(session, name, deployment, replace(desired, pools=pools))


def drain(session: Session, name: str, target: str, *, undo: bool) -> Deployment:
    """Let replicas move away from a node, or another take a replica's place; or let them stay again.

    Raises: ConfigError naming nodes and replicas where there is none of this name; ClusterError
    """
    deployment = session.ledger(name).deployment()
    desired = deployment.desired
    if undo:
        if target not in desired.cordoned | desired.leaving:
            known = ", ".join(sorted(desired.cordoned | desired.leaving)) or "nothing is"
            raise ConfigError("TARGET", f"{target} is not drained; drained: {known}")
        wanted = replace(desired, cordoned=desired.cordoned - {target}, leaving=desired.leaving - {target})
        return _ask(session, name, deployment, wanted)
    status = look(session.operator, name)
    nodes, replicas = {node.name for node in status.nodes}, {each.replica for each in status.replicas}
    # A replica that has gone never comes back under its name.
    leaving = desired.leaving & replicas
    if target in nodes:
        wanted = replace(desired, cordoned=desired.cordoned | {target}, leaving=leaving)
    elif target in replicas:
        wanted = replace(desired, leaving=leaving | {target})
    else:
        known = f"nodes {', '.join(sorted(nodes)) or 'none'}; replicas {', '.join(sorted(replicas)) or 'none'}"
        raise ConfigError("TARGET", f"there is no node or replica {target!r}; there are {known}")
    return _ask(session, name, deployment, wanted)


def _ask(session: Session, name: str, deployment: Deployment, desired: Desired) -> Deployment:
    wanted = replace(deployment, desired=desired)
    session.ask(name, wanted)
    return wanted
