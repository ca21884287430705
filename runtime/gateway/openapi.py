"""``/openapi.json``: FastAPI's description of the routes, with what FastAPI cannot see.

The routes that cost something read their bodies by themselves and answer in two ways; errors have one shape, whatever
raised them. Tests hold a running server against this description.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from .errors import ErrorEnvelope
from .openai_api import BODIES, STREAMED

_REFERENCES = "#/components/schemas/{model}"
_KEY = "api_key"
_LAST_DATA = "[DONE]"

_ERRORS = {
    400: "the request is not one that this endpoint takes; `param` names the field",
    401: "an API key is needed, or the one given is not valid",
    404: "no model of this name is served here",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is not `application/json`",
    429: "too many requests are on their way",
    500: "the server failed",
    503: "the engine is not there, or the server is stopping",
    504: "the request's time is over",
}
"""Status → what it means, wherever it comes."""

_RETRIED = frozenset({429, 503})
_POSTED = tuple(_ERRORS)
_READ = {"/v1/models": (401, 500), "/v1/models/{name}": (401, 404, 500)}


def describe(app: FastAPI, served_model_names: tuple[str, ...]) -> dict[str, Any]:
    """Return the whole description."""
    description: dict[str, Any] = FastAPI.openapi(app)
    components = description.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    # Errors of validation as FastAPI would tell them; ours are told in OpenAI's shape.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _, definitions = models_json_schema([(body, "validation") for body in BODIES.values()], ref_template=_REFERENCES)
    error = TypeAdapter(ErrorEnvelope).json_schema(ref_template=_REFERENCES)
    schemas |= definitions["$defs"] | error.pop("$defs") | {"ErrorEnvelope": error}
    components["securitySchemes"] = {
        _KEY: {
            "type": "http",
            "scheme": "bearer",
            "description": "needed where the server was started with --api-key-file",
        }
    }
    names = {"type": "string", "enum": list(served_model_names)}
    description["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["schema"] = names
    for path, body in BODIES.items():
        told = schemas[body.__name__]["properties"]["model"]
        told["anyOf"] = [names, {"type": "null"}]
        operation = description["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": _json(body.__name__)}
        _add_errors(operation, _POSTED)
        if path in STREAMED:
            operation["responses"]["200"]["content"] |= _events(STREAMED[path].__name__)
    for path, statuses in _READ.items():
        _add_errors(description["paths"][path]["get"], statuses)
    return description


def _add_errors(operation: dict[str, Any], statuses: tuple[int, ...]) -> None:
    operation["security"] = [{}, {_KEY: []}]
    responses = operation["responses"]
    responses.pop("422", None)
    for status in statuses:
        responses[str(status)] = {"description": _ERRORS[status], "content": _json("ErrorEnvelope")}
        if status in _RETRIED:
            responses[str(status)]["headers"] = {
                "Retry-After": {
                    "description": "seconds after which to try again",
                    "required": True,
                    "schema": {"type": "integer", "minimum": 1},
                }
            }


def _json(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCES.format(model=model)}}}


def _events(model: str) -> dict[str, Any]:
    """Describe a stream as FastAPI does its own: OpenAPI 3.1 has no word for events, 3.2 has ``itemSchema``."""
    payloads = [{"$ref": _REFERENCES.format(model=name)} for name in (model, "ErrorEnvelope")]
    piece = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": payloads}}
    event = {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": _LAST_DATA}, piece]}},
        "description": (
            f"one event of the answer when `stream` is true; the last one is `{_LAST_DATA}`. A stream that fails ends "
            "with an error instead"
        ),
    }
    return {"text/event-stream": {"itemSchema": event}}
