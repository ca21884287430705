"""``response_format`` and ``structured_outputs`` of a body: what the answer must look like.

Owns the two spellings of one thing, OpenAI's and vLLM's, and which of a body's fields an error is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...sdk.errors import InvalidRequest
from ...sdk.structured import StructuredOutputsParams
from .requests import GenerationBody

_INSIDE = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """A constraint, and the ``field`` of the body that asks for it."""

    constraint: StructuredOutputsParams
    field: str

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """Return an error about the constraint as one about the field that the client wrote."""
        return rename(error, self.field)


def rename(error: InvalidRequest, field: str) -> InvalidRequest:
    """Return an error about structured outputs as one about ``field``; any other as it is."""
    inside = error.field == _INSIDE or error.field.startswith(f"{_INSIDE}.")
    return InvalidRequest(field, error.problem) if inside and not field.startswith(_INSIDE) else error


def answer_format(body: GenerationBody) -> AnswerFormat | None:
    """Return what a body asks for, None when any text will do.

    Raises: InvalidRequest, naming the field
    """
    wanted = None if body.response_format is None else _from_response_format(body.response_format)
    if body.structured_outputs is None:
        return wanted
    if wanted is not None:
        raise InvalidRequest(_INSIDE, "says what response_format says too: give one of them")
    given = body.structured_outputs.model_dump(exclude_none=True, by_alias=True)
    return AnswerFormat(constraint=StructuredOutputsParams(**given), field=_INSIDE)


def _from_response_format(value: dict[str, Any]) -> AnswerFormat | None:
    match value:
        case {"type": "text", **rest} if not rest:
            return None
        case {"type": "json_object", **rest} if not rest:
            return AnswerFormat(constraint=StructuredOutputsParams(json_object=True), field="response_format")
        case {"type": "json_schema", "json_schema": dict(wrapped), **rest} if not rest:
            return _from_schema(wrapped)
    problem = "must be {type: 'text'}, {type: 'json_object'} or {type: 'json_schema', json_schema: {name, schema}}"
    raise InvalidRequest("response_format", problem)


def _from_schema(wrapped: dict[str, Any]) -> AnswerFormat:
    where = "response_format.json_schema"
    unknown = sorted(wrapped.keys() - {"name", "description", "schema", "strict"})
    if unknown:
        raise InvalidRequest(f"{where}.{unknown[0][:100]}", "is not a field that this endpoint knows")
    # ``strict`` changes nothing: a schema is always kept to.
    field, schema = f"{where}.schema", wrapped.get("schema")
    if not isinstance(schema, dict):
        raise InvalidRequest(field, "is missing" if schema is None else "must be a JSON schema, an object")
    try:
        return AnswerFormat(constraint=StructuredOutputsParams(json=schema), field=field)
    except InvalidRequest as error:
        raise rename(error, field) from None
