"""/v1/completions over a scripted engine: shapes, echo, lists, log-probabilities, stop strings, streams."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.runtime.models.generation_defaults import GenerationDefaults
from slipstream.tests.gateway.harness import asynchronous, serving

TEXT = "The quick brown fox isn't tired — naïve café, 12 €. Grüße! 你好"


def joined(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Put a stream's pieces together, choice by choice."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"]:
            whole = choices.setdefault(piece["index"], {"text": "", "logprobs": None, "token_ids": []})
            whole["text"] += piece["text"]
            whole["token_ids"] += piece.get("token_ids", [])
            whole["finish_reason"], whole["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
            if piece["logprobs"] is not None:
                whole["logprobs"] = whole["logprobs"] or {name: [] for name in piece["logprobs"]}
                for name, values in piece["logprobs"].items():
                    if values is None:
                        whole["logprobs"][name] = None
                    else:
                        whole["logprobs"][name] += values
    return choices


BODIES: dict[str, dict[str, Any]] = {
    "text": {"prompt": "The", "max_tokens": 60},
    "token ids": {"prompt": [5, 6, 7], "max_tokens": 60},
    "texts": {"prompt": ["The", "def add"], "max_tokens": 60},
    "lists of token ids": {"prompt": [[5, 6], [7, 8, 9]], "max_tokens": 7},
    "samples": {"prompt": "The", "n": 3, "max_tokens": 9},
    "texts and samples": {"prompt": ["The", "def"], "n": 2, "max_tokens": 9, "logprobs": 2},
    "echo": {"prompt": ["The", "def"], "echo": True, "max_tokens": 9, "logprobs": 1},
    "only echo": {"prompt": "The quick", "echo": True, "max_tokens": 0, "logprobs": 1},
    "log-probabilities": {"prompt": "The", "max_tokens": 60, "logprobs": 3},
    "no alternatives": {"prompt": "The", "max_tokens": 60, "logprobs": 0},
    "stop": {"prompt": "The", "max_tokens": 60, "stop": ["tired —", "xyz"]},
    "stop kept": {"prompt": "The", "max_tokens": 60, "stop": "fox isn", "include_stop_str_in_output": True},
    "stop across samples": {"prompt": "The", "n": 4, "max_tokens": 60, "stop": ["ox", "café"], "logprobs": 1},
    "stop after some": {"prompt": "The", "max_tokens": 60, "stop": "e", "min_tokens": 8},
}


@pytest.mark.parametrize("tokens_per_event", [1, 3, 100])
@pytest.mark.parametrize("name", BODIES)
@asynchronous
async def test_a_stream_is_the_whole_in_pieces(name: str, tokens_per_event: int) -> None:
    async with serving() as setup:
        setup.say(TEXT)
        body = {**BODIES[name], "return_token_ids": True}
        whole = await setup.completion(**body)
        setup.engine.tokens_per_event = tokens_per_event
        events = await setup.stream("/v1/completions", **body, stream_options={"include_usage": True})
        *pieces, last = events
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert all(piece["usage"] is None for piece in pieces)
        choices = joined(pieces)
        assert [choice["index"] for choice in whole["choices"]] == sorted(choices)
        for choice in whole["choices"]:
            streamed = choices[choice["index"]]
            for field in ("text", "token_ids", "finish_reason", "stop_reason", "logprobs"):
                assert streamed[field] == choice[field], field
        assert not setup.engine.live and not setup.engine.aborted
        assert setup.gateway.admission.in_flight == 0


@asynchronous
async def test_a_stream_can_say_all_along_what_it_has_cost() -> None:
    body = {"prompt": "one two three", "max_tokens": 8, "return_token_ids": True}
    async with serving() as setup:
        setup.say(TEXT)
        options = {"include_usage": True, "continuous_usage_stats": True}
        *pieces, last = await setup.stream("/v1/completions", **body, stream_options=options)
        counts = [piece["usage"]["completion_tokens"] for piece in pieces]
        assert counts == sorted(counts) and 0 < counts[0] < counts[-1] == last["usage"]["completion_tokens"] == 8
        assert {piece["usage"]["prompt_tokens"] for piece in pieces} == {last["usage"]["prompt_tokens"]}
        # As at vLLM, it adds to include_usage and is nothing without it.
        alone = await setup.stream("/v1/completions", **body, stream_options={"continuous_usage_stats": True})
        assert not any("usage" in piece for piece in alone)


@asynchronous
async def test_the_answer() -> None:
    async with serving() as setup:
        ids = setup.say(TEXT)
        answer = await setup.completion(model="alias", prompt="The quick", max_tokens=100, seed=7, user="me")
        assert answer["model"] == "alias" and answer["object"] == "text_completion"
        assert answer["created"] == 1_700_000_000 and answer["id"].startswith("cmpl-")
        (choice,) = answer["choices"]
        assert choice == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        prompt_tokens = len(setup.tokenizer.encode("The quick"))
        # The end token counts: it was drawn.
        assert answer["usage"]["prompt_tokens"] == prompt_tokens
        assert answer["usage"]["completion_tokens"] == len(ids) + 1
        assert answer["usage"]["total_tokens"] == prompt_tokens + len(ids) + 1
        assert setup.engine.requests[0].seed == 7


@asynchronous
async def test_choices_go_prompt_by_prompt() -> None:
    async with serving() as setup:
        answer = await setup.completion(prompt=[[11, 12, 13], [21, 22]], n=2, max_tokens=3, return_token_ids=True)
        assert [choice["token_ids"] for choice in answer["choices"]] == [
            [11, 12, 13], [12, 13, 11], [21, 22, 21], [22, 21, 22],
        ]  # fmt: skip
        assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[11, 12, 13]] * 2 + [[21, 22]] * 2
        assert answer["usage"] == {
            "prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17,
            "prompt_tokens_details": {"cached_tokens": 0},
        }  # fmt: skip


@asynchronous
async def test_echo_with_log_probabilities() -> None:
    async with serving() as setup:
        setup.say("def")
        answer = await setup.completion(prompt="The quick", echo=True, logprobs=1, max_tokens=0)
        (choice,) = answer["choices"]
        assert choice["text"] == "The quick" and choice["finish_reason"] == "length"
        assert "".join(choice["logprobs"]["tokens"]) == "The quick"
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert all(value == -0.5 for value in choice["logprobs"]["token_logprobs"][1:])
        assert choice["logprobs"]["text_offset"][0] == 0
        assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("tokens_per_event", [1, 2, 5, 100])
@pytest.mark.parametrize("stop", ["fox", "quick brown", "é", " isn't tired", "好"])
@asynchronous
async def test_stop_strings_never_leak(stop: str, tokens_per_event: int) -> None:
    async with serving() as setup:
        setup.say(TEXT)
        setup.engine.tokens_per_event = tokens_per_event
        events = await setup.stream("/v1/completions", prompt="The", max_tokens=100, stop=[stop])
        shown = "".join(piece["text"] for event in events for piece in event["choices"])
        assert shown == TEXT[: TEXT.index(stop)]
        last = events[-1]["choices"][0]
        assert last["finish_reason"] == "stop" and last["stop_reason"] == stop


@asynchronous
async def test_a_stop_string_ends_the_sample_at_the_engine() -> None:
    async with serving() as setup:
        setup.say("one fox two", end=False)
        answer = await setup.completion(prompt="The", max_tokens=200, stop="fox")
        request = setup.engine.requests[0]
        assert setup.engine.aborted_samples == [(request.request_id, 0)]
        assert answer["usage"]["completion_tokens"] < 20


@asynchronous
async def test_parameters_reach_the_engine() -> None:
    async with serving(defaults=GenerationDefaults(temperature=0.3, top_k=9, top_p=0.5)) as setup:
        given: dict[str, Any] = {
            "n": 2, "temperature": 0.7, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
            "repetition_penalty": 1.2, "stop_token_ids": [3], "min_tokens": 2, "max_tokens": 5, "logprobs": 4,
        }  # fmt: skip
        await setup.completion(prompt="x", logit_bias={"5": 3}, ignore_eos=True, seed=3, top_p=1, **given)
        request = setup.engine.requests[0]
        for name, value in given.items():
            expected = (3,) if name == "stop_token_ids" else value
            assert getattr(request.params, name) == expected, name
        assert request.params.logit_bias == {5: 3.0} and request.seed == 3
        # Not given: the model's makers decide.
        assert request.params.top_k == 9 and request.params.top_p == 1
        assert request.stop_ids == (3,)


@asynchronous
async def test_null_means_not_given() -> None:
    async with serving() as setup:
        names = ("model", "temperature", "stop", "n", "stream", "logprobs", "suffix", "best_of", "max_tokens", "user")
        await setup.completion(prompt="x", **dict.fromkeys(names))
        assert setup.engine.requests[0].max_tokens == 16


@asynchronous
async def test_cache_salt_and_special_tokens() -> None:
    async with serving() as setup:
        await setup.completion(prompt="x", cache_salt="tenant", add_special_tokens=False, priority=3)
        request = setup.engine.requests[0]
        assert request.cache_salt == "tenant" and request.priority == 3


def _metric(text: str, name: str) -> float:
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@asynchronous
async def test_metrics_count_what_happened() -> None:
    async with serving() as setup:
        await setup.completion(prompt=[5, 6, 7], max_tokens=4)
        await setup.post("/v1/completions", {"prompt": ""})
        text = (await setup.client.get("/metrics")).text
        ok = 'slipstream_requests_total{endpoint="/v1/completions",outcome="ok"}'
        invalid = 'slipstream_requests_total{endpoint="/v1/completions",outcome="invalid"}'
        for name, value in {
            ok: 1, invalid: 1, "slipstream_prompt_tokens_total": 3, "slipstream_output_tokens_total": 4,
            "slipstream_time_to_first_token_seconds_count": 1, "slipstream_inter_token_seconds_count": 3,
            "slipstream_gateway_in_flight": 0, "slipstream_engine_up": 1, "slipstream_kv_blocks": 100,
        }.items():  # fmt: skip
            assert _metric(text, name) == value, name
