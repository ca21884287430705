"""What may be asked of an answer's form, and how it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream import InvalidRequest, SamplingParams, StructuredOutputsParams
from slipstream.sdk import structured as limits

VALID: list[dict[str, Any]] = [
    {"json": {"type": "object"}},
    {"json": '{"type": "object"}'},
    {"json": {}},
    {"regex": "a+"},
    {"choice": ["a"]},
    {"choice": ("a", "b") * 512},
    {"grammar": 'start: "a"'},
    {"json_object": True},
    {"json_object": True, "disable_any_whitespace": True},
    {"regex": "x" * limits.MAX_CONSTRAINT_CHARS},
]

INVALID: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"json_object": False}, ""),
    ({"json": {}, "regex": "a"}, ""),
    ({"json_object": True, "choice": ["a"]}, ""),
    ({"json": "{"}, ".json"),
    ({"json": "[]"}, ".json"),
    ({"json": "NaN"}, ".json"),
    ({"json": 5}, ".json"),
    ({"json": {"a": float("nan")}}, ".json"),
    ({"json": {"a": {1, 2}}}, ".json"),
    ({"json": '{"a":' * 50_000 + "1" + "}" * 50_000}, ".json"),
    ({"json": {"a": "\ud800"}}, ".json"),
    ({"json": {"a": "x" * limits.MAX_CONSTRAINT_CHARS}}, ".json"),
    ({"regex": ""}, ".regex"),
    ({"regex": 5}, ".regex"),
    ({"regex": "\udfff"}, ".regex"),
    ({"regex": "x" * (limits.MAX_CONSTRAINT_CHARS + 1)}, ".regex"),
    ({"grammar": ""}, ".grammar"),
    ({"grammar": b"start:"}, ".grammar"),
    ({"choice": []}, ".choice"),
    ({"choice": "ab"}, ".choice"),
    ({"choice": [""]}, ".choice"),
    ({"choice": ["a", 1]}, ".choice"),
    ({"choice": ["\ud800"]}, ".choice"),
    ({"choice": {"a"}}, ".choice"),
    ({"choice": ["a"] * (limits.MAX_CHOICES + 1)}, ".choice"),
    ({"choice": ["x" * limits.MAX_CONSTRAINT_CHARS, "y"]}, ".choice"),
    ({"json_object": 1}, ".json_object"),
    ({"json_object": True, "disable_any_whitespace": None}, ".disable_any_whitespace"),
]


@pytest.mark.parametrize("fields", VALID, ids=lambda value: str(value)[:30])
def test_valid(fields: dict[str, Any]) -> None:
    constraint = StructuredOutputsParams(**fields)
    assert constraint.kind == next(iter(fields))
    assert hash(constraint) == hash(StructuredOutputsParams(**fields))


@pytest.mark.parametrize(("fields", "field"), INVALID, ids=lambda value: str(value)[:30])
def test_invalid(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        StructuredOutputsParams(**fields)
    assert refused.value.field == f"structured_outputs{field}"
    assert len(str(refused.value)) < 300


def test_a_schema_that_is_nested_too_deeply() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.json: is not JSON"):
        StructuredOutputsParams(json=deep)


def test_a_schema_is_the_same_as_its_text() -> None:
    assert StructuredOutputsParams(json={"type": "object", "é": 1}) == StructuredOutputsParams(
        json='{"type":"object","é":1}'
    )
    assert StructuredOutputsParams(choice=["a"]) == StructuredOutputsParams(choice=("a",))


def test_it_says_when_the_text_ends() -> None:
    constraint = StructuredOutputsParams(json_object=True)
    assert SamplingParams(structured_outputs=constraint).structured_outputs == constraint
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        SamplingParams(structured_outputs=constraint, ignore_eos=True)
    with pytest.raises(InvalidRequest, match="structured_outputs: must be"):
        SamplingParams(structured_outputs={"json_object": True})  # type: ignore[arg-type]
