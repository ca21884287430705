"""The same tokens and logits where long prompts are shared by sequence-parallel ranks, the ranks being threads: with
chunks, prefix cache, preemption, stages and tensor-parallel ranks.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream import LLM, SamplingParams, StructuredOutputsParams
from slipstream.comm.sequence_split import StepDivision
from slipstream.runtime import llm as llm_module
from slipstream.runtime.worker import rank as rank_module
from slipstream.runtime.worker.launch import launch_engine
from slipstream.runtime.worker.sequence_ranks import SequenceRanks
from slipstream.sdk.errors import ConfigError
from slipstream.tests.fakes.thread_peers import ThreadPeers
from slipstream.tests.models.checkpoints import VOCABULARY
from slipstream.tests.models.ladder_llama import make_ladder_checkpoint
from slipstream.tests.parity.references import Reference, load_reference

DEMO_MODEL = str(Path(__file__).resolve().parents[2] / "examples" / "demo_model")
NEW_TOKENS = 8
TOLERANCE = 1e-4
LENGTHS = (90, 3, 61, 77, 70)
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=5, prompt_logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS),
    SamplingParams(temperature=0.8, seed=5, top_p=0.9, top_k=30, max_tokens=NEW_TOKENS, prompt_logprobs=1),
    SamplingParams(temperature=0.9, seed=7, repetition_penalty=1.3, logit_bias={9: 2.0}, max_tokens=NEW_TOKENS),
    SamplingParams(temperature=1.2, seed=1, n=2, max_tokens=NEW_TOKENS),
]
# Few blocks: sequences are preempted. Small ones, so that short chunks can be divided.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 112,
    "num_gpu_blocks_override": 80,
    "block_size": 2,
    "num_threads": 1,
    "step_timeout_s": 60.0,
}
MESHES = [{"sp": sp, "tp": tp, "pp": pp} for sp in (1, 2, 4) for tp in (1, 2) for pp in (1, 2) if sp > 1]
NAMES = {"sp": "sequence_parallel_size", "tp": "tensor_parallel_size", "pp": "pipeline_parallel_size"}


@pytest.fixture(autouse=True)
def divided(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Ranks that are threads, and divide whatever they can; note what there was in their steps."""
    monkeypatch.setattr(
        llm_module, "launch_engine", lambda options, clock: launch_engine(options, clock=clock, start_peers=ThreadPeers)
    )
    monkeypatch.setattr(rank_module, "SequenceRanks", partial(SequenceRanks, fewest_tokens=2, grain=1))
    seen: Counter[str] = Counter()
    divide = SequenceRanks.divide

    def noted(self: SequenceRanks, starts: np.ndarray, counts: np.ndarray) -> StepDivision | None:
        division = divide(self, starts, counts)
        if division is not None:
            rows = len(counts) - len(division.whole)
            seen["steps"] += 1
            seen["several long rows"] += rows > 1
            seen["beside short rows"] += len(division.whole) > 0
            seen["behind earlier tokens"] += any(starts[piece.row] for piece in division.own)
        return division

    monkeypatch.setattr(SequenceRanks, "divide", noted)
    yield seen


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    return cache(lambda name: load_reference(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def alone(reference: Callable[[str], Reference]) -> Callable[[str], list[Any]]:
    return cache(lambda name: generate(reference(name).path))


def asked() -> list[dict[str, list[int]]]:
    draw = random.Random(3)
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]
    # Begins as the first does: the prefix cache has it.
    prompts[-1][:50] = prompts[0][:50]
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def generate(path: Path, **options: Any) -> list[Any]:
    with LLM(str(path), **{**OPTIONS, **options}) as llm:
        outputs = llm.generate(asked(), PARAMS)
        again = llm.generate(asked(), PARAMS)
        if "num_gpu_blocks_override" not in options:
            assert llm._engine.scheduler.load.preemptions, "nobody was preempted"
    tokens = [[sample.token_ids for sample in output.outputs] for output in outputs]
    assert [[sample.token_ids for sample in output.outputs] for output in again] == tokens, "the second time"
    return outputs


def options_of(degrees: dict[str, int]) -> dict[str, int]:
    return {NAMES[axis]: degree for axis, degree in degrees.items()}


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert [sample.token_ids for sample in mine.outputs] == [sample.token_ids for sample in theirs.outputs]
        logprobs = [(mine.prompt_logprobs or [])[1:], (theirs.prompt_logprobs or [])[1:]]
        logprobs[0] += mine.outputs[0].logprobs or []
        logprobs[1] += theirs.outputs[0].logprobs or []
        for mine_at, theirs_at in zip(*logprobs, strict=True):
            assert mine_at.keys() == theirs_at.keys()
            assert all(abs(mine_at[token].logprob - theirs_at[token].logprob) <= TOLERANCE for token in mine_at)


@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_dense_models_give_the_same_on_every_mesh(
    degrees: dict[str, int],
    reference: Callable[[str], Reference],
    alone: Callable[[str], list[Any]],
    divided: Counter[str],
) -> None:
    name = "parallel_dense"
    assert_same(generate(reference(name).path, **options_of(degrees)), alone(name))
    assert divided["steps"] and divided["several long rows"] and divided["beside short rows"]


@pytest.mark.parametrize(
    ("chunk", "degrees"), [(21, {"sp": 2, "tp": 2}), (37, {"sp": 4}), (29, {"sp": 2, "pp": 2})], ids=str
)
def test_chunks_of_any_length_give_the_same(
    chunk: int,
    degrees: dict[str, int],
    reference: Callable[[str], Reference],
    alone: Callable[[str], list[Any]],
    divided: Counter[str],
) -> None:
    name = "parallel_dense"
    found = generate(reference(name).path, long_prefill_token_threshold=chunk, **options_of(degrees))
    assert_same(found, alone(name))
    assert divided["behind earlier tokens"]


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("llama_mqa", {"sp": 2, "tp": 2}),
        ("mistral_window", {"sp": 2}),
        ("qwen3_mixed_layers", {"sp": 4}),
        ("llama_dynamic", {"sp": 2}),
        ("mixtral", {"sp": 2}),
        ("gemma2", {"sp": 2, "tp": 2}),
        ("gpt_oss", {"sp": 2}),
        ("parallel_experts", {"sp": 2, "tp": 2}),
    ],
    ids=str,
)
def test_other_models(
    name: str,
    degrees: dict[str, int],
    reference: Callable[[str], Reference],
    alone: Callable[[str], list[Any]],
    divided: Counter[str],
) -> None:
    found = generate(reference(name).path, long_prefill_token_threshold=50, **options_of(degrees))
    assert_same(found, alone(name))
    assert divided["steps"]


def test_room_for_all_gives_the_same(
    reference: Callable[[str], Reference], alone: Callable[[str], list[Any]], divided: Counter[str]
) -> None:
    """Nobody is preempted, residuals are in shares, parts of steps that are not divided may hide one another's sums."""
    name = "parallel_dense"
    room = {"num_gpu_blocks_override": 600, "overlap": True, "enable_prefix_caching": False, "sharded_norm": True}
    assert_same(generate(reference(name).path, **room, **options_of({"sp": 2, "tp": 2})), alone(name))
    assert divided["steps"]


def test_ladders_give_the_same(tmp_path: Path, divided: Counter[str]) -> None:
    # Sums are on the wire beside keys and values, also from one stage to the next.
    path = make_ladder_checkpoint(tmp_path, [1, 2, 3])
    expected = generate(path)
    for degrees in ({"sp": 2, "tp": 2}, {"sp": 2, "pp": 2}):
        assert_same(generate(path, **options_of(degrees)), expected)
    assert divided["steps"]


def test_deterministic_gives_the_same_bits(reference: Callable[[str], Reference], divided: Counter[str]) -> None:
    def logprobs(**options: Any) -> list[Any]:
        outputs = generate(reference("parallel_dense").path, deterministic=True, **options)
        return [
            [{token: found.logprob for token, found in at.items()} for at in output.outputs[0].logprobs or []]
            for output in outputs
        ]

    expected = logprobs(long_prefill_token_threshold=7)
    assert not divided["steps"]
    assert logprobs(sequence_parallel_size=2, long_prefill_token_threshold=31) == expected
    assert divided["steps"]


def test_grammars_are_followed() -> None:
    params = SamplingParams(
        temperature=0.9, seed=3, max_tokens=24, structured_outputs=StructuredOutputsParams(regex=r"[a-f]{4,9}-[0-9]+!")
    )
    texts = []
    for degrees in ({}, {"sequence_parallel_size": 2, "pipeline_parallel_size": 2}):
        with LLM(DEMO_MODEL, dtype="float32", max_model_len=128, num_threads=1, block_size=2, **degrees) as llm:
            texts.append([output.outputs[0].text for output in llm.generate(["x = " * 30, "def f("], params)])
    assert texts[1] == texts[0]


@pytest.mark.parametrize(
    "spread", [{"expert_parallel_size": 2}, {"enable_expert_parallel": True, "tensor_parallel_size": 2}], ids=str
)
def test_experts_that_are_spread_are_refused(spread: dict[str, Any]) -> None:
    other = next(iter(spread))
    with pytest.raises(ConfigError, match=rf"2 ranks cannot share prompts whose experts are spread \({other}\)") as no:
        LLM(DEMO_MODEL, sequence_parallel_size=2, **spread)
    assert no.value.field == "sequence_parallel_size"
