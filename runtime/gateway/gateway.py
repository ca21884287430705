"""The parts of one gateway, put together once and handed to every route."""

from __future__ import annotations

from dataclasses import dataclass

from ..clock import Clock
from .admission import Admission
from .auth import ApiKeys
from .metrics import GatewayMetrics
from .readiness import Readiness
from .replica import Replica
from .settings import GatewaySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Everything that a request meets.

    Units: ``clock``, monotonic seconds; ``wall_clock``, and ``started_s`` on it, seconds since 1970
    """

    settings: GatewaySettings
    replica: Replica
    admission: Admission
    keys: ApiKeys
    metrics: GatewayMetrics
    readiness: Readiness
    clock: Clock
    wall_clock: Clock
    started_s: int


def make_gateway(settings: GatewaySettings, replica: Replica, *, clock: Clock, wall_clock: Clock) -> Gateway:
    """Put a gateway together around a replica."""
    admission = Admission(capacity=settings.limits.max_concurrent_requests)
    return Gateway(
        settings=settings,
        replica=replica,
        admission=admission,
        keys=ApiKeys(settings.api_keys),
        metrics=GatewayMetrics(load=replica.load, in_flight=lambda: admission.in_flight),
        readiness=Readiness(replica, clock=clock, cache_s=settings.ready_cache_s, timeout_s=settings.ready_timeout_s),
        clock=clock,
        wall_clock=wall_clock,
        started_s=int(wall_clock()),
    )
