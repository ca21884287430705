"""The routes for those who run the server: alive, ready, metrics. None needs an API key."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from .gateway import Gateway
from .metrics import CONTENT_TYPE
from .readiness import Look
from .responses import Health, Ready, to_json

PATHS = frozenset({"/health", "/ready", "/metrics"})


def operations_routes(gateway: Gateway) -> APIRouter:
    """Return the routes of one gateway."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Health:
        """Say that this process is alive; it says nothing about the engine."""
        return {"status": "alive"}

    not_ready = {"description": "not ready; the body says why", "model": Ready}

    @router.get("/ready", responses={200: {"model": Ready}, 503: not_ready})
    async def ready() -> Response:
        """Say whether a token was generated end to end, a moment ago or now.

        Where prompts are computed by replicas of their own, one was handed over; where only that fails, the answer has
        ``degraded``.
        """
        draining = gateway.admission.draining
        look = Look(problem="the server is stopping") if draining else await gateway.readiness.look()
        if look.problem is not None:
            status: Ready = {"status": "not ready", "problem": look.problem}
        elif look.degraded is not None:
            status = {"status": "ready", "degraded": look.degraded}
        else:
            status = {"status": "ready"}
        return Response(to_json(status), 200 if look.problem is None else 503, media_type="application/json")

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(gateway.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    return router
