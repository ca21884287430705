"""Structured outputs and forced calls through the real server, driven by OpenAI's own client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from slipstream import LLM, SamplingParams, StructuredOutputsParams
from slipstream.tests.gateway.server_process import Server, eventually, make_model, running_server

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
        "kinds": {"type": "array", "items": {"enum": ["a", "b", "ç"]}, "maxItems": 3},
        "inner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/inner"}]},
    },
    "required": ["name", "size", "kinds", "inner"],
    "additionalProperties": False,
    "$defs": {
        "inner": {
            "type": "object",
            "properties": {"x": {"type": "number"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
LONG = 700


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running_server(model, log, "--max-num-seqs", "16", "--kv-cache-memory-bytes", "16000000") as running:
        yield running
        eventually(running.everything_is_free, within_s=1.0, what="all blocks free at the end")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_kept_to(server: Server, temperature: float) -> None:
    answer = server.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=FORMAT, max_tokens=LONG, seed=3, n=4, temperature=temperature
    )
    for choice in answer.choices:
        # A random model may go on for ever inside a number or a space; what ends is whole.
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    assert temperature == 0.0 or any(choice.finish_reason == "stop" for choice in answer.choices)


def test_a_stream_is_the_whole_in_pieces(server: Server) -> None:
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "response_format": FORMAT,
        "max_tokens": LONG,
        "seed": 5,
    }
    whole = server.openai.chat.completions.create(**body)
    chunks = list(server.openai.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


class Animal(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    legs: Literal[2, 4]


def test_the_sdk_parses_into_a_class(server: Server) -> None:
    answer = server.openai.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Animal, max_tokens=LONG, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Animal)


CONSTRAINTS: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"regex": r"[a-c]{2,6}@[x-z]{2}\.(com|org)"}, r"[a-c]{2,6}@[x-z]{2}\.(com|org)"),
    "choice": ({"choice": ["yes", "no", "yesterday", "ñandú"]}, "yes|no|yesterday|ñandú"),
    "grammar": ({"grammar": 'start: "(" start ")" | /[0-9]{1,3}/'}, r"\(*[0-9]{1,3}\)*"),
    "no space": ({"json": SCHEMA, "disable_any_whitespace": True}, r'\{"name":".{0,12}","size":\d+,"kinds":\[.*'),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_of_completions(server: Server, model: Path, name: str) -> None:
    constraint, pattern = CONSTRAINTS[name]
    answer = server.openai.completions.create(
        model="tiny", prompt="x", max_tokens=60, seed=2, n=3, extra_body={"structured_outputs": constraint}
    )
    texts = [choice.text for choice in answer.choices]
    for choice in answer.choices:
        assert re.fullmatch(pattern, choice.text, re.DOTALL) or choice.finish_reason == "length", choice
    with LLM(str(model), max_num_seqs=4, kv_cache_memory_bytes=4_000_000) as llm:
        params = SamplingParams(max_tokens=60, seed=2, n=3, structured_outputs=StructuredOutputsParams(**constraint))
        assert [sample.text for sample in llm.generate("x", params)[0].outputs] == texts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_are_valid(server: Server, choice: Any, stream: bool) -> None:
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": LONG,
    }
    ended = 0
    for seed in range(4):
        if stream:
            chunks = list(server.openai.chat.completions.create(**body, seed=seed, stream=True))
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
            reason = chunks[-1].choices[0].finish_reason
        else:
            answer = server.openai.chat.completions.create(**body, seed=seed).choices[0]
            calls, reason = list(answer.message.tool_calls or []), answer.finish_reason
        if reason == "length":
            continue
        ended += 1
        assert reason == "tool_calls" and len(calls) == 1
        arguments = json.loads(calls[0].function.arguments)
        assert calls[0].function.name in ("weather", "now")
        if calls[0].function.name == "weather":
            jsonschema.validate(arguments, SCHEMA)
        else:
            assert choice == "required" and isinstance(arguments, dict)
    assert ended


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}}, "schema"),
    ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs.regex"),
    ({"extra_body": {"structured_outputs": {"grammar": "x"}}}, "structured_outputs.grammar"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]}, "tools"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("options", "field"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_compiled_is_refused(server: Server, options: dict[str, Any], field: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.openai.chat.completions.create(model="tiny", messages=MESSAGES, stream=stream, **options)
    assert refused.value.param and refused.value.param.endswith(field)


def test_a_grammar_that_becomes_too_complex_is_refused_and_harms_nobody(server: Server) -> None:
    (a,) = server.http.post("/tokenize", json={"prompt": "a"}).json()["tokens"]
    evil = {"structured_outputs": {"regex": "(((a{0,99}){0,99}){0,99}b?){0,99}"}, "min_tokens": 150}
    with pytest.raises(openai.BadRequestError, match="too complex"):
        server.openai.completions.create(
            model="tiny", prompt="x", max_tokens=200, logit_bias={str(a): 100}, extra_body=evil
        )
    assert server.openai.completions.create(model="tiny", prompt="x", max_tokens=3).choices[0].text
