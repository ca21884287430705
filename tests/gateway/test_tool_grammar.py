"""Grammars of calls: whatever they let a model write, the family's parser reads as calls that keep to their schemas."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from slipstream.runtime.gateway.tool_grammar import Function, calls_only, calls_or
from slipstream.runtime.gateway.tools import HermesParser, LlamaJsonParser, MistralParser, ParsedCall, ToolParser
from slipstream.sdk.errors import InvalidRequest
from slipstream.tests.text.tiny_tokenizers import byte_level, id_of

FAMILIES: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaJsonParser,
    "mistral": MistralParser,
}
SCHEMAS: dict[str, dict[str, Any] | None] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"enum": ["Köln", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "tree": {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}, "same": {"$ref": "#/properties/root"}},
        "required": ["root"],
        "additionalProperties": False,
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"leaf": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
                "required": ["leaf"],
                "additionalProperties": False,
            }
        },
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
STRICT = [
    Function(name=name, parameters=schema, strict=True, field=f"tools.{place}.function.parameters")
    for place, (name, schema) in enumerate(SCHEMAS.items())
]


def vocabulary(*, with_marks: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    if with_marks:
        tokenizer.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True, normalized=False)])
        tokenizer.add_tokens(
            [AddedToken(mark, special=False, normalized=False) for mark in ("<tool_call>", "</tool_call>")]
        )
    return tokenizer


def write(grammar: str, tokenizer: Tokenizer, draw: random.Random) -> str | None:
    """Write a text that a grammar allows, one token after the other by chance; None when it does not end in time."""
    end = id_of(tokenizer, "<|im_end|>")
    compiled = LLTokenizer(tokenizer.to_str(), eos_token=[end])
    matcher = LLMatcher(compiled, grammar, log_level=0)
    assert not matcher.is_error(), (matcher.get_error(), grammar)
    written: list[int] = []
    while len(written) < 400:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(compiled.vocab_size) if mask >> token & 1]
        assert allowed, matcher.get_error()
        # White space leads nowhere, and only makes texts longer.
        solid = [token for token in allowed if tokenizer.decode([token], skip_special_tokens=False).strip()]
        token = end if end in allowed and draw.random() < 0.3 else draw.choice(solid or allowed)
        if token == end:
            return tokenizer.decode(written, skip_special_tokens=False)
        assert matcher.consume_token(token)
        written.append(token)
    return None


def parse(parser: ToolParser, text: str) -> tuple[str, list[ParsedCall]]:
    parts = [parser.feed(text), parser.finish()]
    return "".join(part.content for part in parts), [call for part in parts for call in part.calls]


def check_calls(calls: list[ParsedCall]) -> None:
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name] or {})


@pytest.mark.parametrize("with_marks", [False, True])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_answer_is_nothing_but_calls(family: str, many: bool, with_marks: bool, seed: int) -> None:
    draw, tokenizer, parser = random.Random(seed), vocabulary(with_marks=with_marks), FAMILIES[family]
    grammar = calls_only(parser.call_format, STRICT, tokenizer.token_to_id, many=many)
    counts = []
    for _ in range(12):
        if (text := write(grammar, tokenizer, draw)) is None:
            continue
        content, calls = parse(parser(), text)
        assert not content.strip() and calls, text
        check_calls(calls)
        counts.append(len(calls))
    assert counts and (many or set(counts) == {1}), counts


@pytest.mark.parametrize("with_marks", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_strict_function_that_the_model_calls_gets_what_it_wants(family: str, with_marks: bool, seed: int) -> None:
    draw, tokenizer, parser = random.Random(seed), vocabulary(with_marks=with_marks), FAMILIES[family]
    grammar = calls_or(parser.call_format, STRICT, tokenizer.token_to_id, many=True, answer=None)
    end = id_of(tokenizer, "<|im_end|>")
    compiled = LLTokenizer(tokenizer.to_str(), eos_token=[end])
    mark = parser.call_format.before
    good = mark + '{"name": "weather", "' + parser.call_format.arguments_key + '": {"city": "Rome", "days": 3}}'
    cases = {
        "Just text, and more: < { [ text.": True,
        good + parser.call_format.after: True,
        good + parser.call_format.between + good.removeprefix(mark) + parser.call_format.after: True,
        good.replace("Rome", "Oslo"): False,
        good.replace("weather", "climate"): False,
        good.replace(": 3", ': "3"'): False,
    }
    if family != "llama3_json":
        cases["Let me see. " + good + parser.call_format.after] = True
    for text, expected in cases.items():
        matcher = LLMatcher(compiled, grammar, log_level=0)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        taken = matcher.try_consume_tokens(ids)
        assert (taken == len(ids) and matcher.is_accepting()) == expected, (text, matcher.get_error())
    found = 0
    for _ in range(6):
        if (written := write(grammar, tokenizer, draw)) is not None:
            check_calls(parse(parser(), written)[1])
            found += 1
    assert found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_of_a_schema_or_calls(family: str, seed: int) -> None:
    draw, tokenizer, parser = random.Random(seed), vocabulary(with_marks=True), FAMILIES[family]
    schema: dict[str, Any] = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    schema["additionalProperties"] = False
    answer = json.dumps(schema)
    grammar = calls_or(parser.call_format, STRICT, tokenizer.token_to_id, many=False, answer=answer)
    kinds = set()
    for _ in range(40):
        if (text := write(grammar, tokenizer, draw)) is None:
            continue
        content, calls = parse(parser(), text)
        kinds.add(bool(calls))
        check_calls(calls)
        if not calls:
            jsonschema.validate(json.loads(content), schema)
    assert kinds == {False, True}


def test_schemas_that_were_hints_may_hold_what_cannot_be_kept_to() -> None:
    tokenizer = vocabulary(with_marks=False)
    odd = {"type": "object", "properties": {"x": {"type": "string", "contentMediaType": "a/b"}}, "minProperties": 1}
    loose, strict = (Function(name="f", parameters=odd, strict=each, field="tools.0") for each in (False, True))
    compiled = LLTokenizer(tokenizer.to_str())
    for function, refused in ((loose, False), (strict, True)):
        grammar = calls_only(HermesParser.call_format, [function], tokenizer.token_to_id, many=False)
        assert LLMatcher(compiled, grammar, log_level=0).is_error() == refused


@pytest.mark.parametrize("parameters", [{"type": "string"}, {"type": ["object", "null"]}])
def test_parameters_that_are_no_object_are_refused(parameters: dict[str, Any]) -> None:
    function = Function(name="f", parameters=parameters, strict=False, field="tools.3.function.parameters")
    with pytest.raises(InvalidRequest, match=re.escape("tools.3.function.parameters")):
        function.call_schema("arguments")


def test_parameters_that_are_nested_too_deeply_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    function = Function(name="f", parameters={"properties": deep}, strict=False, field="tools.0.function.parameters")
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        function.call_schema("arguments")
