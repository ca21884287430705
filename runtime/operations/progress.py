"""What has happened between two looks at a deployment, and whether it is as wanted. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ..controller.controller import PoolStatus, ReplicaStatus
from ..controller.gateway_keeper import GatewayState
from ..controller.ledger import Deployment
from ..reconcile.adopt import Phase
from ..reconcile.observed import RankState
from .status import UNKNOWN, DeploymentStatus

MOST_FAILURES = 3
"""Starts of a pool that fail in a row before it is said that it does not come up."""

_NEVER: Mapping[str, int] = {}
_PARTS = 4
"""Into how many parts loading is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. ``event``: its kind; ``text``: for people; the rest: what it is about, if anything."""

    event: str
    text: str
    pool: str = ""
    replica: str = ""
    rank: int | None = None
    node: str = ""
    state: str = ""
    loaded: float | None = None


class Verdict(StrEnum):
    """How near a deployment is to what is wanted."""

    AS_WANTED = "as wanted"
    COMING = "coming"
    SHORT = "short"  # what has a place serves; for the rest there is none
    FAILING = "failing"  # a pool of which nothing serves has failed again and again


def judge(status: DeploymentStatus, wanted: Deployment, failed_before: Mapping[str, int] = _NEVER) -> Verdict:
    """Say whether a deployment is as wanted; what a controller says that has not heard of it yet does not count.

    ``failed_before``: how often starts of a pool had failed already, before there was anything to wait for.
    """
    asked = {(pool.name, str(pool.generation), pool.replicas) for pool in wanted.desired.pools}
    heard = asked == {(pool.pool, pool.generation, pool.wanted) for pool in status.pools}
    cordoned = (tuple(sorted(wanted.desired.cordoned)), tuple(sorted(wanted.desired.leaving)))
    if not status.controller or not heard or cordoned != (status.cordoned, status.leaving):
        return Verdict.COMING
    if any(_fails(pool, failed_before) for pool in status.pools):
        return Verdict.FAILING
    moving = any(not replica.routed or replica.phase != Phase.READY for replica in status.replicas)
    moving |= any(gateway.state is not GatewayState.READY for gateway in status.gateways)
    if moving:
        return Verdict.COMING
    if status.shortages:
        return Verdict.SHORT
    return Verdict.AS_WANTED if _all_serve(status, wanted) and not status.problem else Verdict.COMING


def _fails(pool: PoolStatus, failed_before: Mapping[str, int]) -> bool:
    again = pool.failures > failed_before.get(pool.pool, 0)
    return again and pool.failures >= MOST_FAILURES and bool(pool.wanted) and not pool.serving


def _all_serve(status: DeploymentStatus, wanted: Deployment) -> bool:
    if any(pool.serving != pool.wanted or pool.coming or pool.leaving for pool in status.pools):
        return False
    away = wanted.desired.leaving
    cordoned = wanted.desired.cordoned
    return not any(
        replica.replica in away or any(device.rpartition("/")[0] in cordoned for device in replica.devices)
        for replica in status.replicas
    )


def missing(status: DeploymentStatus) -> list[str]:
    """Return what is missing, a line for each pool, gateway and reason."""
    lines = []
    for pool in status.pools:
        if pool.serving >= pool.wanted:
            continue
        line = f"pool {pool.pool}: {pool.serving} of {pool.wanted} replicas serve"
        if pool.coming:
            line += f", {pool.coming} on their way"
        if pool.failures:
            line += f", {pool.failures} starts have failed"
        lines.append(line)
        whys = dict.fromkeys(each.why for each in status.shortages if each.pool == pool.pool)
        lines += [f"  {why}" for why in whys]
    lines += [
        f"gateway {gateway.name}: {gateway.state}{gateway.detail and f': {gateway.detail}'}"
        for gateway in status.gateways
        if gateway.state is not GatewayState.READY
    ]
    if not status.controller:
        lines.append(status.controller_detail)
    if status.problem:
        lines.append(status.problem)
    return lines


def events(before: DeploymentStatus | None, after: DeploymentStatus) -> list[Event]:
    """Return what has happened since the look before; at the first look, what is there."""
    before = before or _nothing_of(after)
    return [
        *_controller(before, after),
        *_nodes(before, after),
        *_replicas(before, after),
        *_pools(before, after),
        *_gateways(before, after),
    ]


def _nothing_of(status: DeploymentStatus) -> DeploymentStatus:
    return DeploymentStatus(name=status.name, ray=status.ray, model="", served_names=(), controller=True)


def _controller(before: DeploymentStatus, after: DeploymentStatus) -> Iterator[Event]:
    if before.controller and not after.controller:
        yield Event(event="controller", state="down", text=f"{after.controller_detail}; what serves goes on")
    elif after.controller and not before.controller:
        yield Event(event="controller", state="up", text="the controller is back")
    if after.problem and after.problem != before.problem:
        yield Event(event="problem", text=after.problem)


def _nodes(before: DeploymentStatus, after: DeploymentStatus) -> Iterator[Event]:
    if not (before.controller and after.controller):
        # The ledger does not know of nodes: that none is listed says nothing.
        return
    known = {node.name for node in before.nodes}
    for node in after.nodes:
        if node.name not in known:
            text = f"node {node.name} at {node.address}: {node.devices} x {node.device_type}"
            yield Event(event="node", node=node.name, state="there", text=text)
    there = {node.name for node in after.nodes}
    for node in before.nodes:
        if node.name not in there:
            yield Event(event="node", node=node.name, state="gone", text=f"node {node.name} is gone")


def _replicas(before: DeploymentStatus, after: DeploymentStatus) -> Iterator[Event]:
    known = {replica.replica: replica for replica in before.replicas}
    for replica in after.replicas:
        yield from _replica(known.pop(replica.replica, None), replica)
    for name, gone in known.items():
        yield Event(event="replica", pool=gone.pool, replica=name, state="gone", text=f"{name} has ended")


def _replica(before: ReplicaStatus | None, after: ReplicaStatus) -> Iterator[Event]:
    name, pool = after.replica, after.pool
    if before is None:
        text = f"{name}, generation {after.generation}, on {', '.join(after.devices)}"
        yield Event(event="replica", pool=pool, replica=name, state="there", text=text)
    if after.phase == UNKNOWN or (before is not None and before.phase == UNKNOWN):
        return
    ranks = {rank.rank: rank for rank in before.ranks} if before is not None else {}
    for rank in after.ranks:
        old = ranks.get(rank.rank)
        part, old_part = int(rank.loaded * _PARTS), int(old.loaded * _PARTS) if old is not None else 0
        changed = old is None or old.state != rank.state
        if not changed and part == old_part:
            continue
        text = f"{name} rank {rank.rank} on {rank.device}: {rank.state}"
        if rank.state == RankState.LOADING and part:
            text += f", {rank.loaded:.0%} of its weights"
        if rank.detail:
            text += f": {rank.detail}"
        yield Event(
            event="rank", pool=pool, replica=name, rank=rank.rank, node=rank.device.rpartition("/")[0],
            state=rank.state, loaded=rank.loaded, text=text,
        )  # fmt: skip
    was = (before.phase, before.routed) if before is not None else ("", False)
    if was != (after.phase, after.routed):
        if after.routed and after.phase == Phase.READY:
            yield Event(
                event="replica", pool=pool, replica=name, state="serving", text=f"{name} serves at {after.address}"
            )
        elif after.phase in (Phase.DRAINING, Phase.STOPPING, Phase.BROKEN) and was[0] != after.phase:
            why = f": {after.why}" if after.why else ""
            yield Event(event="replica", pool=pool, replica=name, state=after.phase, text=f"{name} {after.phase}{why}")


def _pools(before: DeploymentStatus, after: DeploymentStatus) -> Iterator[Event]:
    told = {(shortage.pool, shortage.why) for shortage in before.shortages}
    for shortage in after.shortages:
        if (shortage.pool, shortage.why) not in told:
            told.add((shortage.pool, shortage.why))
            yield Event(event="shortage", pool=shortage.pool, text=f"pool {shortage.pool}: {shortage.why}")
    failures = {pool.pool: pool.failures for pool in before.pools}
    for pool in after.pools:
        if pool.failures > failures.get(pool.pool, 0):
            text = f"pool {pool.pool}: {pool.failures} starts have failed"
            yield Event(event="pool", pool=pool.pool, state="failing", text=text)


def _gateways(before: DeploymentStatus, after: DeploymentStatus) -> Iterator[Event]:
    known = {gateway.name: gateway for gateway in before.gateways}
    for gateway in after.gateways:
        old = known.get(gateway.name)
        if old is not None and (old.state, old.address) == (gateway.state, gateway.address):
            continue
        text = f"gateway {gateway.name} on {gateway.node}: {gateway.state}"
        if gateway.state is GatewayState.READY:
            text += f" at http://{gateway.address}/v1"
        elif gateway.detail:
            text += f": {gateway.detail}"
        yield Event(event="gateway", node=gateway.node, state=gateway.state, text=text)
