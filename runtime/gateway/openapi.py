"""``/openapi.json``: FastAPI's description of the routes, and the bodies that the routes read by themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from .openai_api import BODIES

_REFERENCES = "#/components/schemas/{model}"

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the whole description."""
    description: dict[str, Any] = FastAPI.openapi(app)
    _, definitions = models_json_schema([(body, "validation") for body in BODIES.values()], ref_template=_REFERENCES)
    schemas = description.setdefault("components", {}).setdefault("schemas", {})
    schemas |= definitions["$defs"] | {"Error": _ERROR}
    for path, body in BODIES.items():
        operation = description["paths"][path]["post"]
        reference = {"$ref": _REFERENCES.format(model=body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
        operation["responses"] |= {
            "default": {
                "description": "an error",
                "content": {"application/json": {"schema": {"$ref": _REFERENCES.format(model="Error")}}},
            }
        }
    return description
