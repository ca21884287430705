"""Views for tests: who serves where, and as little else as possible."""

from __future__ import annotations

from collections.abc import Mapping

from slipstream.placement.plan import Degrees, Role
from slipstream.runtime.reconcile.desired import Generation
from slipstream.runtime.reconcile.views import PoolView, ReplicaView, View


def replica(name: str, address: str, *, role: Role = Role.MIXED, model: int = 1) -> ReplicaView:
    """Return a replica at an address."""
    generation = Generation(model=model)
    return ReplicaView(replica=name, pool="p", role=role, generation=generation, degrees=Degrees(), address=address)


def view(epoch: int, addresses: Mapping[str, str] | None = None, *, model: int = 1) -> View:
    """Return a view of replicas: name → address."""
    replicas = tuple(replica(name, address, model=model) for name, address in (addresses or {}).items())
    pool = PoolView(name="p", role=Role.MIXED, wanted=len(replicas))
    return View(epoch=epoch, begun=True, pools=(pool,), replicas=replicas)
