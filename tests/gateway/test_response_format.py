"""``response_format`` and ``structured_outputs``: what reaches the engine, and whose field an error names."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream import InvalidRequest, StructuredOutputsParams
from slipstream.runtime.messages import FinishReason
from slipstream.tests.gateway.harness import asynchronous, serving

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
WRAPPED = {"name": "thing", "description": "a thing", "strict": True, "schema": SCHEMA}

ASKED: list[tuple[dict[str, Any], StructuredOutputsParams | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
    ({"response_format": {"type": "json_schema", "json_schema": WRAPPED}}, StructuredOutputsParams(json=SCHEMA)),
    ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputsParams(json=SCHEMA)),
    ({"structured_outputs": {"json": '{"type": "object"}'}}, StructuredOutputsParams(json='{"type": "object"}')),
    ({"structured_outputs": {"regex": "a+", "json_object": False}}, StructuredOutputsParams(regex="a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputsParams(choice=["a", "b"])),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutputsParams(grammar='start: "a"')),
    (
        {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
        StructuredOutputsParams(json_object=True, disable_any_whitespace=True),
    ),
]


@pytest.mark.parametrize(("asked", "expected"), ASKED, ids=lambda value: str(value)[:60])
@asynchronous
async def test_what_reaches_the_engine(asked: dict[str, Any], expected: StructuredOutputsParams | None) -> None:
    async with serving() as setup:
        setup.say("{}")
        await setup.completion(prompt="x", **asked)
        await setup.chat(**asked)
        assert [each.params.structured_outputs for each in setup.engine.requests] == [expected, expected]


TOOL = {"type": "function", "function": {"name": "f"}}
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": WRAPPED}}, "response_format.json_schema.schema"),
    ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("asked", "field"), FIELDS, ids=lambda value: str(value)[:60])
@asynchronous
async def test_the_engines_complaint_names_the_clients_field(asked: dict[str, Any], field: str, stream: bool) -> None:
    async with serving() as setup:
        (kind,) = {"structured_outputs.regex"} if "regex" in field else {"structured_outputs.json"}
        setup.engine.refusal = InvalidRequest(kind, "cannot be compiled")
        body = {"messages": [{"role": "user", "content": "x"}], "stream": stream, **asked}
        answer = await setup.post("/v1/chat/completions", body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert answer.json()["error"]["message"].endswith("cannot be compiled")


@asynchronous
async def test_a_grammar_that_became_too_complex_is_the_clients_fault() -> None:
    async with serving() as setup:
        setup.say("aaa", end=False)
        setup.engine.finish_reason = FinishReason.GRAMMAR
        answer = await setup.post("/v1/completions", {"prompt": "x", "response_format": {"type": "json_object"}})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "response_format"
        assert "too complex" in answer.json()["error"]["message"]
