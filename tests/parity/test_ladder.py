"""Ladder checkpoints give what a plain model in that order gives, on every mesh, with chunks and cut steps."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.comm.local_groups import LocalRank, LocalWork
from slipstream.comm.overlap_cost import Curve, PassCost
from slipstream.comm.overlap_split import Cuts
from slipstream.runtime.models.attention import Attention
from slipstream.runtime.models.mlp import DenseMlp
from slipstream.runtime.worker import rank as rank_module
from slipstream.runtime.worker.token_split import TokenSplit
from slipstream.sdk.errors import ConfigError
from slipstream.tests.models.checkpoints import make_checkpoint
from slipstream.tests.models.ladder_llama import LadderLlama, make_ladder_checkpoint
from slipstream.tests.parity.references import prompts

pytestmark = pytest.mark.usefixtures("ranks_are_threads")

NEW_TOKENS = 6
TOLERANCE = 1e-4
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=2)
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 112,
    "num_gpu_blocks_override": 40,
    "block_size": 8,
    "num_threads": 1,
    "step_timeout_s": 60.0,
}
PROMPTS = [prompts()[place] for place in (1, 4, 5)]
# All layers, the upper ones (over two stages the ladder crosses from one to the next), and some.
LADDERS: list[int | list[int]] = [5, 3, [1, 3]]
MESHES = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made = {str(layers): layers for layers in LADDERS}
    return cache(lambda name: make_ladder_checkpoint(tmp_path_factory.mktemp("ladder"), made[name]))


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> Callable[[str], list[tuple[list[int], torch.Tensor]]]:
    @cache
    def compute(name: str) -> list[tuple[list[int], torch.Tensor]]:
        model = LadderLlama(checkpoint(name))
        continuations = [model.continuation(prompt, NEW_TOKENS) for prompt in PROMPTS]
        both = zip(PROMPTS, continuations, strict=True)
        return [(new, model.logits([*prompt, *new]).log_softmax(-1)) for prompt, new in both]

    return compute


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A model with experts whose layers are ladders, and what one rank says."""
    path = make_checkpoint("parallel_experts", tmp_path_factory.mktemp("experts"))
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "ladder_layers": [1, 2]}))
    return path, answers(path)


def answers(path: Path, **options: Any) -> list[Any]:
    with LLM(str(path), **{**OPTIONS, **options}) as llm:
        return llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], PARAMS)


def assert_gives(path: Path, expected: list[tuple[list[int], torch.Tensor]], **options: Any) -> None:
    outputs = answers(path, **options)
    for prompt, output, (tokens, logprobs) in zip(PROMPTS, outputs, expected, strict=True):
        sample = output.outputs[0]
        assert sample.token_ids == tokens
        at_positions = [*output.prompt_logprobs[1:], *sample.logprobs]
        assert len(at_positions) == len(prompt) - 1 + NEW_TOKENS
        for position, found in enumerate(at_positions):
            for token, entry in found.items():
                assert abs(entry.logprob - float(logprobs[position, token])) <= TOLERANCE


@pytest.mark.parametrize(("tp", "pp"), MESHES)
@pytest.mark.parametrize(("ladder", "chunk"), [("5", 0), ("3", 7), ("[1, 3]", 7)])
def test_every_mesh_gives_what_the_plain_model_does(
    ladder: str,
    tp: int,
    pp: int,
    chunk: int,
    checkpoint: Callable[[str], Path],
    expected: Callable[[str], list[tuple[list[int], torch.Tensor]]],
) -> None:
    degrees = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    assert_gives(checkpoint(ladder), expected(ladder), long_prefill_token_threshold=chunk, **degrees)


def test_the_order_matters(checkpoint: Callable[[str], Path]) -> None:
    first, *others = (LadderLlama(checkpoint(str(layers))).logits(PROMPTS[0]) for layers in LADDERS)
    for other in others:
        assert not torch.allclose(first, other, atol=0.1)


@pytest.mark.parametrize(
    "degrees",
    [
        {"tensor_parallel_size": 2},
        {"expert_parallel_size": 2, "pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2, "expert_parallel_size": 2},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ],
    ids=str,
)
def test_experts_in_a_ladder_give_the_same_on_every_mesh(
    degrees: dict[str, Any], experts: tuple[Path, list[Any]]
) -> None:
    path, alone = experts
    for mine, theirs in zip(answers(path, **degrees), alone, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        for found, expected in zip(mine.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            assert all(abs(found[token].logprob - expected[token].logprob) <= TOLERANCE for token in found)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)])
def test_cut_steps_give_the_same(
    tp: int,
    pp: int,
    checkpoint: Callable[[str], Path],
    expected: Callable[[str], list[tuple[list[int], torch.Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A wire as slow as the arithmetic: every step that can be cut is.
    line = Curve.line(fixed_s=0.0, per_unit_s=1.0)
    slow = PassCost(compute_s=line, collective_s=line, collectives=1, bytes_per_token=1.0)
    cuts: list[Cuts] = []

    class Noted(TokenSplit):
        def cut(self, tokens: int) -> Cuts | None:
            cut = super().cut(tokens)
            cuts.extend([] if cut is None else [cut])
            return cut

    monkeypatch.setattr(rank_module, "measure_split", lambda *_, **__: Noted(slow, element_bytes=4))
    degrees = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    assert_gives(checkpoint("3"), expected("3"), overlap=True, **degrees)
    assert cuts, "no step was cut"


def test_the_next_module_computes_before_a_sum_is_waited_for(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: dict[int, list[str]] = {}

    def note(entry: str) -> None:
        logs.setdefault(threading.get_ident(), []).append(entry)

    reduce, wait, attend, mlp = LocalRank.all_reduce, LocalWork.wait, Attention.parts, DenseMlp.parts

    def noted_reduce(self: LocalRank, x: torch.Tensor, *, op: str = "sum") -> Any:
        note("begin")
        return reduce(self, x, op=op)

    def noted_wait(self: LocalWork, timeout_s: float | None = None) -> torch.Tensor:
        note("wait")
        return wait(self, timeout_s)

    def noted_attend(self: Attention, *given: Any) -> Generator[Any, Any, Any]:
        note("attention")
        return (yield from attend(self, *given))

    def noted_mlp(self: DenseMlp, x_TH: torch.Tensor) -> Generator[Any, Any, Any]:
        note("mlp")
        return (yield from mlp(self, x_TH))

    with LLM(str(checkpoint("[1, 3]")), **OPTIONS, tensor_parallel_size=2) as llm:
        for owner, name, noted in (
            (LocalRank, "all_reduce", noted_reduce),
            (LocalWork, "wait", noted_wait),
            (Attention, "parts", noted_attend),
            (DenseMlp, "parts", noted_mlp),
        ):
            monkeypatch.setattr(owner, name, noted)
        llm.generate([{"prompt_token_ids": PROMPTS[0]}], SamplingParams(temperature=0.0, max_tokens=1))
    own = ["begin", "wait", "attention", "begin", "wait"]
    passes = [
        *own,  # the embedding, and the first layer's attention
        *("mlp", "begin", "attention", "begin", "wait", "mlp", "begin", "wait", "wait"),
        *("attention", "begin", "wait", "mlp", "begin", "attention", "begin", "wait", "mlp", "begin", "wait", "wait"),
        *("attention", "begin", "wait", "mlp", "begin", "wait"),
    ]
    with_layers = [log for log in logs.values() if "attention" in log]
    assert len(with_layers) == 2
    for log in with_layers:
        assert log[: len(passes)] == passes


def test_shares_are_not_for_ladders(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="ladder layers") as refused:
        LLM(str(checkpoint("3")), **OPTIONS, tensor_parallel_size=2, sharded_norm=True)
    assert refused.value.field == "sharded_norm"
