"""Quantized engines: the same tokens alone and together, text nearly as well predicted, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, ConfigError, SamplingParams

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
MOE = DEMO.with_name("demo_moe_model")
PROMPTS = ["def fibonacci(n):", "class Stack:", "import os\n", "for line in file:\n", "    return self._", "x = [1, 2"]
PARAMS = SamplingParams(temperature=0.7, seed=3, max_tokens=40, ignore_eos=True)
SIZES: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory_bytes": 32_000_000}


def bits_per_byte(llm: LLM, text: str) -> float:
    (output,) = llm.generate(text, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    tables = (output.prompt_logprobs or [])[1:]
    total = sum((table or {})[token].logprob for token, table in zip(output.prompt_token_ids[1:], tables, strict=True))
    return -total / math.log(2) / len(text.encode())


def test_the_same_tokens_alone_and_together() -> None:
    """Each token's activations have a scale of their own: batch mates change nothing."""
    with LLM(DEMO, quantization="int8", dtype="float32", **SIZES) as llm:
        together = [output.outputs[0].token_ids for output in llm.generate(PROMPTS * 2, PARAMS)]
        alone = [llm.generate(prompt, PARAMS)[0].outputs[0].token_ids for prompt in PROMPTS]
    assert together == alone * 2


@pytest.mark.parametrize("model", [DEMO, MOE], ids=["dense", "experts"])
def test_text_is_nearly_as_well_predicted(model: Path) -> None:
    text = Path(__file__).read_text(encoding="utf-8")[:1000]
    bits = {}
    for quantization in ("none", "int8", "int4"):
        with LLM(model, quantization=quantization, dtype="bfloat16", **SIZES) as llm:
            bits[quantization] = bits_per_byte(llm, text)
    assert bits["int8"] == pytest.approx(bits["none"], rel=0.02)
    assert bits["int4"] == pytest.approx(bits["none"], rel=0.10)
    assert len(set(bits.values())) == 3, "they are not the same engine"


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization: must be one of none, int8, int4, fp8, got 'awq'"):
        LLM(DEMO, quantization="awq")
    with pytest.raises(ConfigError, match="quantization: 'int4' needs dtype bfloat16"):
        LLM(DEMO, quantization="int4", dtype="float32")
    with pytest.raises(ConfigError, match="quantization: 'fp8' is for GPUs"):
        LLM(DEMO, quantization="fp8")
