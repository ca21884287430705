"""The application of one gateway: routes, frame, errors as OpenAI writes them."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from ... import __version__
from .errors import HttpRefusal, answer_for
from .frame import RequestFrame
from .gateway import Gateway
from .openai_api import openai_routes
from .openapi import describe
from .operations_api import operations_routes
from .responses import to_json


def create_app(gateway: Gateway) -> FastAPI:
    """Make the application. It starts nothing: whoever runs it also runs the engine."""
    app = FastAPI(title="Slipstream", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(openai_routes(gateway))
    app.include_router(operations_routes(gateway))
    app.add_middleware(RequestFrame, gateway=gateway)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(HttpRefusal, _http_error)
    app.openapi = partial(describe, app, gateway.settings.served_model_names)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer what routing refuses (404, 405), and what our plain routes do."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        error = HttpRefusal(error.status_code, f"{error.detail}: {request.method} {request.url.path[:200]}")
    answer = answer_for(error)
    return Response(
        to_json(answer.body), answer.status, headers={**headers, **answer.headers}, media_type="application/json"
    )
