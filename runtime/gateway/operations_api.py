"""The routes for those who run the server: alive, ready, metrics. None needs an API key."""

from __future__ import annotations

from fastapi import APIRouter, Response

from .gateway import Gateway
from .metrics import CONTENT_TYPE
from .responses import to_json

PATHS = frozenset({"/health", "/ready", "/metrics"})


def operations_routes(gateway: Gateway) -> APIRouter:
    """Return the routes of one gateway."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Say that this process is alive; it says nothing about the engine."""
        return {"status": "alive"}

    @router.get("/ready", responses={503: {"description": "not ready; the body says why"}})
    async def ready() -> Response:
        """Say whether a token was generated end to end, a moment ago or now."""
        problem = "the server is stopping" if gateway.admission.draining else await gateway.readiness.problem()
        status = {"status": "ready"} if problem is None else {"status": "not ready", "problem": problem}
        return Response(to_json(status), 200 if problem is None else 503, media_type="application/json")

    @router.get("/metrics")
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(gateway.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    return router
