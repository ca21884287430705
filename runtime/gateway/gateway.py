"""The parts of one gateway, put together once and handed to every route."""

from __future__ import annotations

from dataclasses import dataclass

from ..clock import Clock
from .admission import Admission
from .afterwards import Afterwards
from .auth import ApiKeys
from .idempotency import KeptAnswers
from .metrics import GatewayMetrics
from .readiness import Readiness
from .replica import Replicas
from .settings import GatewaySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Everything that a request meets.

    Units: ``clock``, monotonic seconds; ``wall_clock``, and ``started_s`` on it, seconds since 1970
    """

    settings: GatewaySettings
    replicas: Replicas
    admission: Admission
    keys: ApiKeys
    metrics: GatewayMetrics
    readiness: Readiness
    kept: KeptAnswers
    afterwards: Afterwards
    clock: Clock
    wall_clock: Clock
    started_s: int


def make_gateway(settings: GatewaySettings, replicas: Replicas, *, clock: Clock, wall_clock: Clock) -> Gateway:
    """Put a gateway together around what serves behind it."""
    limits = settings.limits
    readiness = Readiness(replicas, clock=clock, cache_s=settings.ready_cache_s, timeout_s=settings.ready_timeout_s)
    admission = Admission(capacity=limits.max_concurrent_requests, max_waiting=limits.max_waiting_requests)
    return Gateway(
        settings=settings,
        replicas=replicas,
        admission=admission,
        keys=ApiKeys(settings.api_keys),
        metrics=GatewayMetrics(
            load=replicas.load,
            in_flight=lambda: admission.in_flight,
            states=replicas.states,
            waiting=lambda: admission.waiting,
            open_breakers=lambda: replicas.open_breakers,
            ready_paths=lambda: readiness.paths,
        ),
        readiness=readiness,
        kept=KeptAnswers(),
        afterwards=Afterwards(),
        clock=clock,
        wall_clock=wall_clock,
        started_s=int(wall_clock()),
    )
