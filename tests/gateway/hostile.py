"""Bodies that wish a server ill: good ones with something bad in them, and damage to their bytes."""

from __future__ import annotations

import json
import random
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**40, 0.5, -0.0, 1e308, -1e308, 5e-324, "", "x", "\x00",
    "\U0010ffff", "é" * 50, "a" * 3000, "<|im_end|>", "{{ 7*7 }}", "{% raw %}", "%s%n", [], [[]], [None], [0], [[0]],
    ["x"], [["x"]], [0, "x"], [-1], [2**70], {}, {"type": "text"}, {"type": "json_object"}, {"": ""}, {"1": 1e308},
    {"0": None}, {"type": "function", "function": {"name": "f"}}, [{"role": "user", "content": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}], [{"role": "", "content": ""}],
    [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}], "auto", "required", "none",
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}, {"regex": "(a|a)*b"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "^(a|b)*a(a|b){25}$"}}},
    {"regex": "((a{1,1000}){1,1000}){1,1000}"}, {"regex": "(?=a)b"}, {"grammar": "start: start start | "},
    {"grammar": "start: s\ns: s s s | \"a\" | "}, {"choice": ["a"] * 1024}, {"json": {"minItems": 10**9}},
    {"json": {"type": "integer", "multipleOf": 999_999_937}}, {"json_object": True},
    {"json": {"properties": {f"p{number}": {"type": "string"} for number in range(1500)}}},
    {"json": {"enum": ["x" * (number % 50) + str(number) for number in range(1500)]}},
]  # fmt: skip
"""The last of these are schemas, expressions and grammars that are hard, or impossible, to compile or to follow."""

FIELDS = [
    "prompt", "messages", "model", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
    "min_p", "seed", "stop", "stop_token_ids", "logit_bias", "logprobs", "top_logprobs", "prompt_logprobs", "echo",
    "stream", "stream_options", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens",
    "ignore_eos", "tools", "tool_choice", "response_format", "structured_outputs", "chat_template_kwargs",
    "priority", "cache_salt", "suffix",
    "best_of", "tokens", "add_special_tokens", "skip_special_tokens", "parallel_tool_calls", "nonsense", "user",
    "return_token_ids", "include_stop_str_in_output", "add_generation_prompt", "return_token_strs",
]  # fmt: skip


GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5, 6]},
}


def hostile(draw: random.Random, path: str) -> bytes:
    """Make a body: mostly a good one with something bad in it, sometimes damaged as bytes."""
    body = dict(GOOD[path])
    for _ in range(draw.randrange(4)):
        body[draw.choice(FIELDS)] = draw.choice(NASTY)
    content = bytearray(json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass"))
    if draw.random() < 0.2:
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    if draw.random() < 0.05:
        del content[draw.randrange(len(content)) :]
    return bytes(content)
