"""The whole engine with decoding steps by graphs: warmed up before the first request, and the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream import LLM, ConfigError, SamplingParams
from slipstream.kernels import backends
from slipstream.kernels.launch import INTERPRETED
from slipstream.tests.fakes.replayed_graphs import ReplayedGraphs
from slipstream.tests.models.checkpoints import make_checkpoint

PARAMS = SamplingParams(temperature=0.7, seed=5, top_k=50, max_tokens=5, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": tokens} for tokens in ([3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 10])]


@pytest.fixture(autouse=True)
def _choice_ends_with_the_test() -> Iterator[None]:
    if not INTERPRETED:
        pytest.skip("no Triton here, or it is not interpreted")
    yield
    backends.use("auto")


def generate(path: Path, operation: str, **options: object) -> list[list[int]]:
    with LLM(
        str(path),
        dtype="float32",
        device="cpu",
        skip_tokenizer_init=True,
        max_model_len=32,
        num_gpu_blocks_override=16,
        block_size=8,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        kernels=f"torch,{operation}=triton",
        **options,
    ) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize(("name", "operation"), [("llama_biases", "attention"), ("deepseek_v3", "mla")])
def test_the_same_tokens_by_graphs(
    name: str, operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, backend = make_checkpoint(name, tmp_path), ReplayedGraphs()
    as_ever = generate(path, operation)
    monkeypatch.setattr("slipstream.runtime.worker.rank.graph_backend", lambda device: backend)
    caplog.set_level("INFO", logger="slipstream.runtime.worker.warm_up")
    assert generate(path, operation) == as_ever
    assert backend.captures == 2, "one for each number of sequences"
    assert "2 graphs" in caplog.text and "warm-up took" in caplog.text
    warming, backend.replays = backend.replays, 0
    assert warming > 4
    assert generate(path, operation, enforce_eager=True) == as_ever
    assert not backend.replays, "launched one by one"


def test_the_option_is_a_choice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(str(tmp_path), enforce_eager="yes")
    assert caught.value.field == "enforce_eager"
