"""Recorded steps against steps computed call by call: the same tokens and log-probabilities, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream import LLM, RequestOutput, SamplingParams
from slipstream.kernels.cpu.recorded import SWITCH, Recording
from slipstream.tests.kernels.native_ways import compiled_or_skip
from slipstream.tests.models.checkpoints import make_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
TEXT = Path(__file__).read_text(encoding="utf-8")
PROMPTS = [TEXT[start : start + 30 + start % 90] for start in range(0, 440, 40)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=1)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=24, logprobs=1)
MODES: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1},
    "together": {},
    "not ahead, prefixes cached": {"async_scheduling": False, "enable_prefix_caching": True, "block_size": 8},
    "preempted": {"kv_cache_memory_bytes": None, "num_gpu_blocks_override": 24, "max_model_len": 128},
}


def bits(outputs: list[RequestOutput]) -> list[Any]:
    return [
        (
            output.outputs[0].token_ids,
            [{token: entry.logprob for token, entry in table.items()} for table in output.outputs[0].logprobs or []],
        )
        for output in outputs
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_bit_differs(monkeypatch: pytest.MonkeyPatch, mode: str, dtype: str) -> None:
    compiled_or_skip()
    how = {"dtype": dtype, "max_model_len": 512, "kv_cache_memory_bytes": 32_000_000, **MODES[mode]}
    params = [GREEDY if index % 2 else SAMPLED for index in range(len(PROMPTS))]
    found = []
    for switch in ("0", "1"):
        monkeypatch.setenv(SWITCH, switch)
        with LLM(DEMO, **how) as llm:
            outputs = llm.generate(PROMPTS, params)
        found.append(bits(outputs))
        preempted = sum(output.metrics.preemptions for output in outputs)
        assert (preempted > 0) == (mode == "preempted")
    assert found[0] == found[1]


def test_caps_and_norms_behind_modules_are_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled_or_skip()
    path = make_checkpoint("gemma2", tmp_path / "gemma2", dtype=torch.bfloat16)
    replayed: list[Recording] = []
    replay = Recording.replay

    def noted(self: Recording) -> Tensor:
        replayed.append(self)
        return replay(self)

    monkeypatch.setattr(Recording, "replay", noted)
    found = []
    for switch in ("0", "1"):
        monkeypatch.setenv(SWITCH, switch)
        with LLM(path, skip_tokenizer_init=True, max_model_len=128, num_gpu_blocks_override=32) as llm:
            found.append(bits(llm.generate([{"prompt_token_ids": [7 + row, 9]} for row in range(2)], GREEDY)))
        assert bool(replayed) == (switch == "1")
    assert found[0] == found[1]
