"""``deterministic``: bit for bit the same, whatever the batch, the chunks and the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, ConfigError, Logprob, RequestOutput, SamplingParams
from slipstream.tests.kernels.native_ways import torch_alone

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
LONG = Path(__file__).read_text(encoding="utf-8")
PROMPTS = ["def fibonacci(n):", LONG[:900], "class Stack:\n    def __init__(self", LONG[100:1000], "import os\n" * 40]
PARAMS = SamplingParams(temperature=0.8, seed=5, max_tokens=48, ignore_eos=True, logprobs=2, prompt_logprobs=1)
SIZES: dict[str, Any] = {"max_model_len": 600, "kv_cache_memory_bytes": 64_000_000, "deterministic": True}

MODES: dict[str, dict[str, Any]] = {
    "together": {},
    "in chunks": {"long_prefill_token_threshold": 7, "block_size": 8},
    "in large chunks, not ahead": {"long_prefill_token_threshold": 100, "async_scheduling": False},
    "prefixes cached": {"enable_prefix_caching": True},
}


Table = dict[int, Logprob] | None


def bits(outputs: list[RequestOutput]) -> list[Any]:
    """Return tokens and every log-probability as they are, so that any rounding shows."""
    return [
        (output.outputs[0].token_ids, numbers(output.outputs[0].logprobs), numbers(output.prompt_logprobs))
        for output in outputs
    ]


def numbers(tables: Sequence[Table] | None) -> list[list[tuple[int, float]]]:
    return [sorted((token, entry.logprob) for token, entry in (table or {}).items()) for table in tables or []]


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", "none"), ("float32", "none"), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
def test_the_same_bits_in_every_mode(dtype: str, quantization: str) -> None:
    check_every_mode(dtype, quantization)


def test_the_same_bits_by_torchs_operations() -> None:
    with torch_alone():
        check_every_mode("bfloat16", "none")


def check_every_mode(dtype: str, quantization: str) -> None:
    how = {"dtype": dtype, "quantization": quantization, **SIZES}
    with LLM(DEMO, max_num_seqs=1, enable_prefix_caching=False, **how) as llm:
        alone = bits([llm.generate(prompt, PARAMS)[0] for prompt in PROMPTS])
    for name, mode in MODES.items():
        with LLM(DEMO, **{"enable_prefix_caching": False, **how, **mode}) as llm:
            first = bits(llm.generate(PROMPTS * 2, PARAMS))
            again = bits(llm.generate(list(reversed(PROMPTS)), PARAMS))
        assert first == alone * 2, name
        assert list(reversed(again)) == alone, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_the_prefix_cache_had_changes_no_bit(dtype: str) -> None:
    """Log-probabilities of a prompt need all of it computed, so they are left out here."""
    params = replace(PARAMS, prompt_logprobs=None)
    with LLM(DEMO, dtype=dtype, **SIZES) as llm:
        first = llm.generate(PROMPTS, params)
        again = llm.generate(PROMPTS, params)
    assert sum(output.num_cached_tokens for output in again) > 500
    assert bits(again) == bits(first)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="deterministic: must be true or false"):
        LLM(DEMO, deterministic="yes")
