"""Decides what gateways are told: which replicas serve, at which addresses, in a view that is numbered upwards."""

from __future__ import annotations

from .actions import PublishView
from .adopt import Phase, Replica
from .round import Round
from .views import PoolView, ReplicaView, View


def publish(round: Round) -> PublishView | None:
    """Return the view that replaces the last one, None when that still holds."""
    last = round.observed.view
    pools = tuple(PoolView(name=pool.name, role=pool.role, wanted=pool.replicas) for pool in round.desired.pools)
    served = (_served(replica, last) for replica in round.among(Phase.READY))
    # One more than the last that was published, whoever did: gateways take no lower number.
    replicas = tuple(served)
    begun = bool(pools) and (last.begun or bool(replicas))
    view = View(epoch=last.epoch + 1, begun=begun, pools=pools, replicas=replicas)
    return None if view.says_the_same(last) else PublishView(view=view)


def _served(replica: Replica, last: View) -> ReplicaView:
    spec = replica.spec
    if replica.driver is not None:
        address = replica.driver.address
    else:
        # It is ready without an answer of its driver only if it was published before.
        before = last.replica(str(replica.id))
        assert before is not None, f"{replica.id} is ready, but nobody has seen its driver"
        address = before.address
    return ReplicaView(
        replica=str(replica.id),
        pool=replica.id.pool,
        role=spec.role,
        generation=spec.generation,
        degrees=spec.degrees,
        address=address,
    )
