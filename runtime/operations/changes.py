"""What a new wish changes, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..controller.ledger import Deployment, PoolRecord
from ..reconcile.desired import PoolWish

_NONE_YET = PoolRecord(model=(), cut=())


def changes(before: Deployment, after: Deployment) -> tuple[str, ...]:
    """Return what becomes different, a sentence each; none where nothing does."""
    return (*_pools(before, after), *_gateways(before, after), *_others(before, after))


def _pools(before: Deployment, after: Deployment) -> Iterator[str]:
    for wish in after.desired.pools:
        old = before.desired.pool(wish.name)
        if old is None:
            yield f"pool {wish.name} is new: {wish.replicas} replicas"
            continue
        if old.replicas != wish.replicas:
            yield f"pool {wish.name}: {old.replicas} → {wish.replicas} replicas"
        if old.generation != wish.generation:
            yield _replaced(old, wish, before, after)
    for wish in before.desired.pools:
        if after.desired.pool(wish.name) is None:
            yield f"pool {wish.name} goes away"


def _replaced(old: PoolWish, wish: PoolWish, before: Deployment, after: Deployment) -> str:
    was, is_ = before.pools.get(wish.name, _NONE_YET), after.pools.get(wish.name, _NONE_YET)
    what = ", ".join(_lines((*was.model, *was.cut), (*is_.model, *is_.cut))) or "it is started anew"
    return f"pool {wish.name}: its replicas are replaced, generation {old.generation} → {wish.generation}: {what}"


def _lines(before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    """Yield what differs between two lists of ``name=value``."""
    old, new = (dict(line.split("=", 1) for line in lines) for lines in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name} {old.get(name, 'unsaid')} → {new.get(name, 'unsaid')}"


def _gateways(before: Deployment, after: Deployment) -> Iterator[str]:
    for order in after.gateways:
        old = before.gateway(order.name)
        if old is None:
            yield f"gateway {order.name} is new, on {order.node}"
        elif old != order:
            yield f"gateway {order.name} is drained and started anew"
    for order in before.gateways:
        if after.gateway(order.name) is None:
            yield f"gateway {order.name} goes away"


def _others(before: Deployment, after: Deployment) -> Iterator[str]:
    if before.limits != after.limits:
        yield "limits"
    if before.desired.partial != after.desired.partial:
        yield f"place_what_fits: {before.desired.partial} → {after.desired.partial}".lower()
    if before.device_types != after.device_types:
        yield "the device table"
    for name in sorted(before.desired.cordoned ^ after.desired.cordoned):
        yield f"node {name} is {'drained' if name in after.desired.cordoned else 'used again'}"
    for name in sorted(after.desired.leaving - before.desired.leaving):
        yield f"replica {name} is replaced"
    for name in sorted(before.desired.leaving - after.desired.leaving):
        yield f"replica {name} may stay"
