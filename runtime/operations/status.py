"""How a deployment is: what its controller says, or, while that is down, what its ledger has.

The ledger knows who was started and who was in the last view. It does not know how they are now: what is taken from it
is in phase ``unknown``. What serves goes on meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...placement.plan import Shortage
from ...sdk.errors import ConfigError
from ..controller.controller import NodeStatus, PoolStatus, RankStatus, ReplicaStatus, Status
from ..controller.gateway_keeper import GatewayReport
from ..controller.ledger import Deployment, Gang, Ledger, deployments
from ..controller.operator import Operator
from ..reconcile.views import View

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentStatus:
    """A deployment as a person wants to see it; what ``--json`` prints.

    ``ray``: the cluster's address. ``controller``: whether it answers; ``controller_detail``: why not. ``problem``: why
    its last round did not do all. Nothing in it is secret.
    """

    name: str
    ray: str
    model: str
    served_names: tuple[str, ...]
    controller: bool
    controller_detail: str = ""
    watch_address: str = ""
    epoch: int = 0
    pools: tuple[PoolStatus, ...] = ()
    replicas: tuple[ReplicaStatus, ...] = ()
    nodes: tuple[NodeStatus, ...] = ()
    gateways: tuple[GatewayReport, ...] = ()
    cordoned: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    shortages: tuple[Shortage, ...] = ()
    problem: str = ""


def which(operator: Operator, name: str | None) -> str | None:
    """Return the deployment that is meant: the one that is named, or the only one; None where there is none.

    Raises: ConfigError where several run and none is named, or none of this name does
    """
    known = deployments(operator.store)
    if name is not None and name not in known:
        raise ConfigError("--name", f"no deployment {name!r} runs; those that do: {', '.join(known) or 'none'}")
    if name is None and len(known) > 1:
        raise ConfigError("--name", f"several deployments run, say which: {', '.join(known)}")
    return name or next(iter(known), None)


def look(operator: Operator, name: str) -> DeploymentStatus:
    """Return how a deployment is now. Raises: ClusterError when the platform does not answer"""
    ledger = Ledger(operator.store, deployment=name)
    deployment = ledger.deployment()
    seen = operator.controller(name)
    known = seen.status
    # A controller that has just started has seen nothing yet.
    if known is None or not known.rounds:
        known = _from_ledger(deployment, ledger.gangs(), ledger.view())
    return DeploymentStatus(
        name=name,
        ray=operator.address,
        model=deployment.model_path,
        served_names=deployment.served_names,
        controller=seen.alive,
        controller_detail=seen.detail,
        watch_address=deployment.watch_address,
        epoch=known.epoch,
        pools=known.pools,
        replicas=known.replicas,
        nodes=known.nodes,
        gateways=operator.gateways(name, deployment.gateways),
        cordoned=known.cordoned,
        leaving=known.leaving,
        shortages=known.shortages,
        problem=known.problem,
    )


def _from_ledger(deployment: Deployment, gangs: dict[int, Gang], view: View) -> Status:
    desired = deployment.desired
    pools = tuple(
        PoolStatus(
            pool=pool.name,
            role=pool.role.value,
            degrees=pool.degrees,
            generation=str(pool.generation),
            wanted=pool.replicas,
            serving=sum(each.pool == pool.name and each.generation == pool.generation for each in view.replicas),
        )
        for pool in desired.pools
    )
    return Status(
        epoch=view.epoch,
        pools=pools,
        replicas=tuple(_replica(gang, view) for gang in gangs.values() if not gang.gone),
        cordoned=tuple(sorted(desired.cordoned)),
        leaving=tuple(sorted(desired.leaving)),
    )


def _replica(gang: Gang, view: View) -> ReplicaStatus:
    name = str(gang.spec.id)
    seen = view.replica(name)
    return ReplicaStatus(
        replica=name,
        pool=gang.spec.id.pool,
        generation=str(gang.spec.generation),
        phase=UNKNOWN,
        routed=seen is not None,
        devices=tuple(map(str, gang.devices)),
        address=seen.address if seen is not None else "",
        why="",
        ranks=tuple(
            RankStatus(rank=rank, device=str(device), state=UNKNOWN) for rank, device in enumerate(gang.devices)
        ),
        role=gang.spec.role.value,
        degrees=gang.spec.degrees,
    )
