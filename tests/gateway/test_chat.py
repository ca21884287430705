"""/v1/chat/completions over a scripted engine: shapes, streams, log-probabilities, tools."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.tests.gateway.harness import asynchronous, serving

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO = f"Let me look.\n{CALL}\n{CALL}"

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("Hello, naïve fox — 你好!", {}),
    "samples": ("Hello fox", {"n": 3, "max_tokens": 6}),
    "stop": ("Hello fox and more", {"stop": " and"}),
    "log-probabilities": ("Hello fox", {"logprobs": True, "top_logprobs": 2}),
    "no alternatives": ("Hello fox", {"logprobs": True}),
    "tools, none called": ("  Hello < fox \n", {"tools": TOOLS}),
    "tools, two called": (TWO, {"tools": TOOLS}),
    "tools, one allowed": (TWO, {"tools": TOOLS, "parallel_tool_calls": False}),
    "tools, cut": (TWO, {"tools": TOOLS, "max_completion_tokens": 40}),
    "tools, not JSON": ("a <tool_call>\nfox</tool_call> b", {"tools": TOOLS}),
    "tools, not to be called": (TWO, {"tools": TOOLS, "tool_choice": "none"}),
}


@pytest.mark.parametrize("tokens_per_event", [1, 3, 500])
@pytest.mark.parametrize("name", BODIES)
@asynchronous
async def test_a_stream_is_the_whole_in_pieces(name: str, tokens_per_event: int) -> None:
    text, body = BODIES[name]
    async with serving() as setup:
        setup.say(text)
        whole = await setup.chat(messages=MESSAGES, **body)
        setup.engine.tokens_per_event = tokens_per_event
        options = {"include_usage": True}
        *events, last = await setup.stream("/v1/chat/completions", messages=MESSAGES, stream_options=options, **body)
        assert last["usage"] == whole["usage"] and last["choices"] == []
        for choice in whole["choices"]:
            pieces = [piece for event in events for piece in event["choices"] if piece["index"] == choice["index"]]
            assert pieces[0]["delta"]["role"] == "assistant"
            content = "".join(piece["delta"].get("content") or "" for piece in pieces)
            calls = [call for piece in pieces for call in piece["delta"].get("tool_calls", [])]
            assert content == (choice["message"]["content"] or "")
            expected = choice["message"].get("tool_calls", [])
            assert [call["function"] for call in calls] == [call["function"] for call in expected]
            assert [call["index"] for call in calls] == list(range(len(calls)))
            assert pieces[-1]["finish_reason"] == choice["finish_reason"]
            assert all(piece["finish_reason"] is None for piece in pieces[:-1])
            logprobs = [entry for piece in pieces for entry in (piece["logprobs"] or {"content": []})["content"]]
            assert logprobs == (choice["logprobs"] or {"content": []})["content"]


@asynchronous
async def test_a_stream_can_say_all_along_what_it_has_cost() -> None:
    async with serving() as setup:
        setup.say("Hello quick brown fox")
        options = {"include_usage": True, "continuous_usage_stats": True}
        *events, last = await setup.stream("/v1/chat/completions", messages=MESSAGES, stream_options=options)
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts) and 0 < counts[0] < counts[-1] == last["usage"]["completion_tokens"]


@asynchronous
async def test_the_answer() -> None:
    async with serving() as setup:
        setup.say("Hello fox")
        answer = await setup.chat(messages=[{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}])
        assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": "Hello fox", "refusal": None}
        assert choice["finish_reason"] == "stop"
        request = setup.engine.requests[0]
        prompt = setup.tokenizer.decode(request.prompt_token_ids.tolist(), skip_special_tokens=False)
        assert prompt == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>assistant\n"
        # Without a limit the answer may be as long as the model allows.
        assert request.max_tokens == setup.engine.facts.max_model_len - len(request.prompt_token_ids)


@asynchronous
async def test_calls() -> None:
    async with serving() as setup:
        setup.say(TWO)
        answer = await setup.chat(tools=TOOLS)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me look."
        first, second = choice["message"]["tool_calls"]
        assert first["function"] == {"name": "weather", "arguments": '{"city": "Köln"}'}
        assert first["type"] == "function" and first["id"] != second["id"]
        prompt = setup.tokenizer.decode(setup.engine.requests[0].prompt_token_ids.tolist())
        assert '"weather"' in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@asynchronous
async def test_a_call_is_forced_by_a_grammar(choice: Any) -> None:
    async with serving() as setup:
        setup.say('<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>')
        answer = await setup.chat(tools=TOOLS, tool_choice=choice)
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": "{}"}
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        constraint = setup.engine.requests[0].params.structured_outputs
        assert constraint and constraint.grammar and '"weather"' in constraint.grammar


@asynchronous
async def test_arguments_of_earlier_calls_reach_the_template_as_objects() -> None:
    async with serving() as setup:
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
        messages = [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
        ]
        await setup.chat(messages=messages, tools=TOOLS, max_tokens=2)
        prompt = setup.tokenizer.decode(setup.engine.requests[0].prompt_token_ids.tolist())
        assert '"arguments": {"a": 1}' in prompt
