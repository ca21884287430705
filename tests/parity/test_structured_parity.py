"""Structured outputs give the same tokens in every mode: a grammar's state is nothing but the tokens so far."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from slipstream import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from slipstream.tests.gateway.server_process import make_model

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy", "zzz"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "minItems": 1,
    "maxItems": 4,
}
REGEX = r"([a-f]{1,5} ){3,6}end"
PROMPTS = ["The quick", "def add(a, b):\n", "Grüße aus Köln", "for i in range(10):"]


def requests() -> list[tuple[str, SamplingParams]]:
    constraints = [
        StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
        StructuredOutputsParams(regex=REGEX),
        None,
    ]
    extras: list[dict[str, Any]] = [{}, {"frequency_penalty": 1.0, "logprobs": 1}, {"min_tokens": 12, "top_p": 0.9}]
    return [
        (
            prompt,
            SamplingParams(
                max_tokens=48, temperature=0.9, seed=seed, n=1 + seed % 2, structured_outputs=constraint, **extra
            ),
        )
        for prompt in PROMPTS
        for constraint in constraints
        for seed, extra in enumerate(extras)
    ]


PLAIN = {"max_num_seqs": 2, "async_scheduling": False, "enable_prefix_caching": False}
MODES: dict[str, dict[str, Any]] = {
    "batched": {"max_num_seqs": 32},
    "batched, not ahead": {"max_num_seqs": 32, "async_scheduling": False},
    "small chunks": {"max_num_seqs": 8, "long_prefill_token_threshold": 3, "block_size": 8},
    "preempted": {"max_num_seqs": 32, "num_gpu_blocks_override": 24, "max_model_len": 128},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def run(model: Path, options: dict[str, Any]) -> Iterator[RequestOutput]:
    size = {} if "num_gpu_blocks_override" in options else {"kv_cache_memory_bytes": 8_000_000}
    with LLM(str(model), **{"max_model_len": 256, **options, **size}) as llm:
        prompts, params = zip(*requests(), strict=True)
        yield from llm.generate(list(prompts), list(params))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[RequestOutput]:
    return list(run(model, PLAIN))


def test_the_texts_are_what_was_asked_for(expected: list[RequestOutput]) -> None:
    ended = 0
    for output, (_, params) in zip(expected, requests(), strict=True):
        constraint = params.structured_outputs
        for sample in output.outputs:
            if constraint is None or sample.finish_reason != "stop":
                continue
            ended += 1
            if constraint.regex:
                assert re.fullmatch(REGEX, sample.text)
            else:
                jsonschema.validate(json.loads(sample.text), SCHEMA)
    assert ended > len(PROMPTS)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_tokens_in_every_mode(model: Path, expected: list[RequestOutput], mode: str) -> None:
    outputs = list(run(model, MODES[mode]))
    for output, plain in zip(outputs, expected, strict=True):
        assert [s.token_ids for s in output.outputs] == [s.token_ids for s in plain.outputs], output.prompt
        assert [s.finish_reason for s in output.outputs] == [s.finish_reason for s in plain.outputs]
    if mode == "preempted":
        assert sum(output.metrics.preemptions for output in outputs) > 0
