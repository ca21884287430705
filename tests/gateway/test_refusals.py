"""What clients are refused, with which status, naming which field; and never with a 5xx for what they sent."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from slipstream.runtime.gateway.auth import read_api_keys
from slipstream.runtime.gateway.errors import BusyRefusal, Draining, HttpRefusal, answer_for
from slipstream.runtime.gateway.settings import GatewaySettings, RequestLimits
from slipstream.sdk.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
)
from slipstream.tests.gateway.harness import asynchronous, serving
from slipstream.tests.gateway.hostile import GOOD, hostile

TOOL = {"type": "function", "function": {"name": "f"}}
CHAT = {"messages": [{"role": "user", "content": "x"}]}

SCHEMA = "response_format.json_schema"

COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1], "a", 2]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [5] * 1024}, "prompt"),
    ({"prompt": "x " * 1500}, "prompt"),
    ({"prompt": ["x"] * 2000}, "prompt"),
    ({"prompt": "x", "best_of": 2}, "best_of"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "use_beam_search": True}, "use_beam_search"),
    ({"prompt": "x", "guided_json": {}}, "guided_json"),
    ({"prompt": "x", "nonsense": 1}, "nonsense"),
    ({"prompt": "x", "messages": []}, "messages"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": 10**9}, "n"),
    ({"prompt": "x", "n": 10**30}, "n"),
    ({"prompt": "x", "n": True}, "n"),
    ({"prompt": "x", "n": "2"}, "n"),
    ({"prompt": ["x"] * 100, "n": 100}, "n"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "temperature": -0.1}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "temperature": True}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_k": -2}, "top_k"),
    ({"prompt": "x", "seed": 2**64}, "seed"),
    ({"prompt": "x", "logprobs": 1000}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "stop": ["a"] * 65}, "stop"),
    ({"prompt": "x", "stop": ""}, "stop"),
    ({"prompt": "x", "stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": 1000}}, "logit_bias"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": True, "stream_options": {"x": True}}, "stream_options.x"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format"),
    ({"prompt": "x", "response_format": {"type": "json_object", "x": 1}}, "response_format"),
    ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format"),
    ({"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"x": 1}}}, f"{SCHEMA}.x"),
    ({"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, f"{SCHEMA}.schema"),
    (
        {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"x": "y" * 70_000}}}},
        f"{SCHEMA}.schema",
    ),
    ({"prompt": "x", "structured_outputs": {}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"prompt": "x", "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"prompt": "x", "structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
    ({"prompt": "x", "structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    (
        {"prompt": "x", "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    ({"prompt": "x", "guided_regex": "a"}, "guided_regex"),
    ({"prompt": "x", "priority": 2**40}, "priority"),
    ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
]

CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [5]}, "messages"),
    ({"messages": [{"role": 1}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x " * 1500}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
    ({**CHAT, "top_logprobs": 3}, "top_logprobs"),
    ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({**CHAT, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({**CHAT, "response_format": {"type": "json_schema", "json_schema": {}}}, f"{SCHEMA}.schema"),
    ({**CHAT, "tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({**CHAT, "tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools.0.function.strict"),
    (
        {
            **CHAT,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
            "tool_choice": "required",
        },
        "tools.0.function.parameters",
    ),
    (
        {
            **CHAT,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": "y" * 70_000}}}],
            "tool_choice": "required",
        },
        "tools",
    ),
    ({**CHAT, "functions": [{"name": "f"}]}, "functions"),
    ({**CHAT, "tool_choice": "required"}, "tool_choice"),
    ({**CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({**CHAT, "tools": [TOOL], "tool_choice": {"name": "f"}}, "tool_choice"),
    ({**CHAT, "tools": [{"type": "web"}]}, "tools.0"),
    ({**CHAT, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0"),
    ({**CHAT, "tools": [TOOL] * 200}, "tools"),
    ({**CHAT, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({**CHAT, "chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs"),
    ({**CHAT, "audio": {}}, "audio"),
]

TOKENS: list[tuple[str, dict[str, Any], str]] = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "x", **CHAT}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": "x"}, "tokens"),
    ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ("/detokenize", {"tokens": [True]}, "tokens"),
]

TABLE = [
    *(("/v1/completions", body, param) for body, param in COMPLETIONS),
    *(("/v1/chat/completions", body, param) for body, param in CHATS),
    *TOKENS,
]


@asynchronous
async def test_a_bad_field_is_named() -> None:
    async with serving() as setup:
        for path, body, param in TABLE:
            answer = await setup.post(path, body)
            assert answer.status_code == 400, (path, str(body)[:200], answer.text[:500])
            error = answer.json()["error"]
            assert error["param"] == param, (str(body)[:200], error)
            assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
            assert len(answer.text) < 4000
        assert not setup.engine.requests and setup.gateway.admission.in_flight == 0


RAW: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"null", 400),
    (b"[]", 400),
    (b'"x"', 400),
    (b'{"prompt": NaN}', 400),
    (b'{"prompt": "x", "temperature": Infinity}', 400),
    (b'{"prompt": "x", "temperature": 1e999}', 400),
    (b'{"prompt": "\xff\xfe"}', 400),
    (b'{"prompt": "\\ud800"}', 400),
    (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
    (b'{"prompt": "x", "logit_bias": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", 400),
    (b'{"prompt": "x", "seed": ' + b"9" * 400 + b"}", 400),
    (b'{"prompt": "' + b"x" * 200_000 + b'"}', 413),
]


@asynchronous
async def test_a_bad_body_is_refused() -> None:
    async with serving(limits=RequestLimits(max_body_bytes=100_000)) as setup:
        for content, status in RAW:
            answer = await setup.client.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert answer.status_code == status, (content[:80], answer.text[:300])
            assert answer.json()["error"]["message"]
        for kind in ({"content-type": "text/plain"}, {"content-type": "multipart/form-data; boundary=x"}, {}):
            answer = await setup.client.post("/v1/completions", content=b'{"prompt": "x"}', headers=kind)
            assert answer.status_code == 415


@asynchronous
async def test_deep_nesting_in_what_templates_see() -> None:
    deep: Any = "x"
    for _ in range(800):
        deep = {"a": deep}
    async with serving() as setup:
        for body in (
            {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}]},
            {**CHAT, "chat_template_kwargs": {"x": deep}},
            {"messages": [{"role": "user", "content": "x", "extra": deep}]},
        ):
            answer = await setup.post("/v1/chat/completions", body)
            assert answer.status_code in (200, 400), answer.text[:300]


@asynchronous
async def test_names_and_routes() -> None:
    async with serving() as setup:
        answer = await setup.post("/v1/completions", {"model": "other", "prompt": "x"})
        assert answer.status_code == 404 and answer.json()["error"]["param"] == "model"
        assert answer.json()["error"]["code"] == "model_not_found"
        for method, path, status in (
            ("GET", "/v1/models", 200), ("GET", "/v1/models/alias", 200), ("GET", "/v1/models/other", 404),
            ("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("GET", "/health", 200),
        ):  # fmt: skip
            answer = await setup.client.request(method, path)
            assert answer.status_code == status, path
            assert status < 400 or answer.json()["error"]["message"]


@asynchronous
async def test_keys() -> None:
    async with serving(api_keys=("first-secret", "second-secret")) as setup:
        for authorization, status in (
            (None, 401), ("", 401), ("Bearer", 401), ("Bearer ", 401), ("Bearer wrong-secret", 401),
            ("Basic first-secret", 401), ("Bearer first-secret", 200), ("bearer second-secret", 200),
            ("Bearer first-secre", 401), ("Bearer ä", 401),
        ):  # fmt: skip
            headers = {} if authorization is None else {b"authorization": authorization.encode()}
            answer = await setup.client.get("/v1/models", headers=headers)
            assert answer.status_code == status, authorization
            if status == 401:
                assert answer.json()["error"]["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert (await setup.client.get(path)).status_code == 200
        assert (await setup.client.get("/nope")).status_code == 401


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n first-secret \nsecond-secret\nfirst-secret\n", encoding="utf-8")
    assert read_api_keys(file) == ("first-secret", "second-secret")
    assert "secret" not in repr(GatewaySettings(served_model_names=("m",), api_keys=read_api_keys(file)))
    for content in (b"", b"# nothing\n", b"short\n", b"two words\n", b"\xff\xff\n"):
        file.write_bytes(content)
        with pytest.raises(ConfigError):
            read_api_keys(file)
    with pytest.raises(ConfigError):
        read_api_keys(tmp_path / "missing")


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (InvalidRequest("n", "is bad"), 400, None),
        (HttpRefusal(413, "too large", closes=True), 413, None),
        (Overloaded("full"), 429, "1"),
        (BusyRefusal("full", retry_after_s=7.2), 429, "8"),
        (EngineUnavailable("gone"), 503, "2"),
        (Draining("stopping"), 503, "5"),
        (DeadlineExceeded("over"), 504, None),
        (EngineError("NaN"), 500, None),
        (RuntimeError("secret insides"), 500, None),
    ],
)
def test_the_table(error: Exception, status: int, retry_after: str | None) -> None:
    answer = answer_for(error)
    assert answer.status == status and answer.headers.get("retry-after") == retry_after
    assert "secret" not in json.dumps(answer.body)


@asynchronous
async def test_request_ids() -> None:
    async with serving() as setup:
        answer = await setup.post("/v1/completions", {"prompt": "x"}, **{"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        for bad in ("a b", "x" * 200, '"}'):
            answer = await setup.post("/v1/completions", {"prompt": ""}, **{"x-request-id": bad})
            assert answer.headers["x-request-id"] not in (bad, "mine-1")


# ------------------------------------------------------------------ hostile bodies


@asynchronous
async def test_hostile_bodies_never_cause_a_5xx(seed: int) -> None:
    draw = random.Random(seed)
    statuses: dict[int, int] = {}
    async with serving() as setup:
        for number in range(800):
            path = draw.choice(sorted(GOOD))
            content = hostile(draw, path)
            answer = await setup.client.post(path, content=content, headers={"content-type": "application/json"})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (number, path, content[:500], answer.text[:500])
            if answer.headers["content-type"].startswith("text/event-stream"):
                assert answer.text.endswith("data: [DONE]\n\n"), (number, path, content[:500])
        assert setup.gateway.admission.in_flight == 0 and not setup.engine.live
    # Both kinds must have come up for the test to mean anything.
    assert statuses.get(200, 0) > 50 and statuses.get(400, 0) > 50, statuses
