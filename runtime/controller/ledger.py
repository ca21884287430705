"""What has to outlive the controller: which incarnations and epochs were claimed, what runs, what is wanted.

    deployment/N  what is wanted, as it was last said
    links/N       what was measured between nodes; kept for the cluster (``EVERYWHERE``), not for one deployment
    gang/N        incarnation N: its ranks, and which were told to end
    view/N        the view of epoch N

A number is claimed by being the first to write its key, so of two controllers that think they are the only one, one is
refused. Of each kind the highest is kept as long as the deployment is, because numbers only grow. Where keys are stored
is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from ...placement.topology import DeviceRef, DeviceType, Link
from ..reconcile.desired import Desired, Generation, Limits
from ..reconcile.observed import ReplicaSpec
from ..reconcile.views import View
from .gateway_keeper import GatewayOrder
from .launch import Launch
from .links import MeasuredLinks
from .records import from_json, to_json

NETWORK = Link(bytes_per_s=1.25e9, latency_s=100e-6)
DEVICE_LINK = Link(bytes_per_s=32e9, latency_s=10e-6)
"""Between nodes, and between devices of one, where nobody has measured."""

NONE_YET = Generation(model=0, cut=0)
EVERYWHERE = "*"
"""In place of a deployment: what is kept for the cluster as a whole. No deployment has this name."""

_TRIES = 8

_Record = TypeVar("_Record")


class Store(Protocol):
    """Keys and values that outlive processes."""

    def put(self, key: str, value: str) -> None:
        """Write a key."""
        ...

    def put_new(self, key: str, value: str) -> bool:
        """Write a key that is not there; return whether this was the first."""
        ...

    def get(self, key: str) -> str | None:
        """Return a key's value, None if it is not there."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin so."""
        ...

    def delete(self, key: str) -> None:
        """Remove a key if it is there."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """What is kept of a replica's ranks.

    ``numbers``: the platform's of their nodes. ``ready``: whether all have been. ``stopped``: those told to end.
    ``gone``: whether nothing of it is left.
    """

    spec: ReplicaSpec
    devices: tuple[DeviceRef, ...]
    numbers: tuple[str, ...]
    ready: bool = False
    stopped: frozenset[int] = frozenset()
    gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRecord:
    """What a pool's generation stands for: what tokens depend on, and what else a running replica cannot take over.

    Lines such as ``dtype=float32``, in order: two that are equal are the same engine.
    """

    model: tuple[str, ...]
    cut: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is wanted, how the ranks of each pool are started, and what else has to be known to keep it.

    - ``pools``: what the generations of the pools stand for. ``highest``: the highest numbers that were ever given.
    - ``limits``, ``device_types``, ``network``, ``device_link``: what its controller works with.
    - ``watch_address``: where that gives views to gateways. ``secret``: what all its processes share.
    - ``mark``: what its processes, and no others, have in their environment.
    - ``model_path`` and ``served_names``: for people.
    """

    desired: Desired = field(default_factory=Desired)
    launches: Mapping[str, Launch] = field(default_factory=dict)
    pools: Mapping[str, PoolRecord] = field(default_factory=dict)
    highest: Generation = NONE_YET
    gateways: tuple[GatewayOrder, ...] = ()
    limits: Limits = field(default_factory=Limits)
    device_types: Mapping[str, DeviceType] = field(default_factory=dict)
    network: Link = NETWORK
    device_link: Link = DEVICE_LINK
    watch_address: str = ""
    secret: str = field(default="", repr=False)
    mark: str = ""
    model_path: str = ""
    served_names: tuple[str, ...] = ()

    def gateway(self, name: str) -> GatewayOrder | None:
        """Return a gateway's order, None if it is not wanted."""
        return next((each for each in self.gateways if each.name == name), None)


def deployments(store: Store) -> list[str]:
    """Return the names of the deployments of which something is kept."""
    return sorted({key.partition("/")[0] for key in store.keys("") if "/deployment/" in key})


class Ledger:
    """The records of one deployment."""

    def __init__(self, store: Store, *, deployment: str) -> None:
        self._store = store
        self._prefix = deployment

    def gangs(self) -> dict[int, Gang]:
        """Return what is kept of replicas, by incarnation; the highest claimed is among them, gone or not."""
        numbers = self._numbers("gang")
        gangs: dict[int, Gang] = {}
        for number in numbers:
            text = self._store.get(self._key("gang", number))
            if text is None:
                continue
            gang = from_json(Gang, text)
            if gang.gone and number != numbers[-1]:
                self._store.delete(self._key("gang", number))
            else:
                gangs[number] = gang
        return gangs

    def claim_gang(self, gang: Gang) -> bool:
        """Claim a replica's incarnation; return False if it, or a higher one, was claimed before."""
        return self._claim("gang", gang.spec.id.incarnation, gang)

    def keep_gang(self, gang: Gang) -> None:
        """Write what has become of a replica."""
        self._store.put(self._key("gang", gang.spec.id.incarnation), to_json(gang))

    def view(self) -> View:
        """Return the view that was published last."""
        return self._last("view", View) or View()

    def claim_view(self, view: View) -> bool:
        """Publish a view; return False if its epoch, or a higher one, was published before."""
        return self._claim_last("view", view.epoch, view)

    def deployment(self) -> Deployment:
        """Return what is wanted."""
        return self._last("deployment", Deployment) or Deployment()

    def keep_deployment(self, deployment: Deployment) -> bool:
        """Write what is wanted; return False if somebody else wrote at the same time."""
        return self._claim_last("deployment", (self._numbers("deployment") or [0])[-1] + 1, deployment)

    def links(self) -> MeasuredLinks | None:
        """Return what was measured between nodes, None if nothing was."""
        return self._last("links", MeasuredLinks)

    def links_number(self) -> int:
        """Return a number that grows with every measurement that is kept; 0 before the first."""
        return max(self._numbers("links"), default=0)

    def keep_links(self, links: MeasuredLinks) -> bool:
        """Keep a measurement in place of the last; return False if somebody else kept one at the same time."""
        return self._claim_last("links", self.links_number() + 1, links)

    def forget(self) -> None:
        """Remove everything; nothing of the deployment may run."""
        for key in self._store.keys(f"{self._prefix}/"):
            self._store.delete(key)

    def _last(self, kind: str, of: type[_Record]) -> _Record | None:
        # Between listing and reading, a newer one may have taken its place.
        for _ in range(_TRIES):
            numbers = self._numbers(kind)
            if not numbers:
                return None
            text = self._store.get(self._key(kind, numbers[-1]))
            if text is not None:
                return from_json(of, text)
        raise LookupError(f"{self._prefix}: the last {kind} is replaced faster than it can be read")

    def _claim_last(self, kind: str, number: int, value: object) -> bool:
        """Claim a number; those below are needed no more."""
        if not self._claim(kind, number, value):
            return False
        for older in self._numbers(kind):
            if older < number:
                self._store.delete(self._key(kind, older))
        return True

    def _claim(self, kind: str, number: int, value: object) -> bool:
        if number <= max(self._numbers(kind), default=0):
            return False
        return self._store.put_new(self._key(kind, number), to_json(value))

    def _numbers(self, kind: str) -> list[int]:
        return sorted(int(key.rpartition("/")[2]) for key in self._store.keys(f"{self._prefix}/{kind}/"))

    def _key(self, kind: str, number: int) -> str:
        return f"{self._prefix}/{kind}/{number:012}"
