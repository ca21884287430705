"""The same tokens and logits on one rank and on many, the ranks being threads: every mesh, with chunks, prefix cache
and preemption.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, SamplingParams, StructuredOutputsParams
from slipstream.comm.collectives import Collectives
from slipstream.comm.overlap_cost import Curve, PassCost
from slipstream.comm.overlap_split import Cuts
from slipstream.comm.reduce_norm import NormCost
from slipstream.runtime.worker import rank as rank_module
from slipstream.runtime.worker import token_split
from slipstream.runtime.worker.expert_balance import ExpertBalance
from slipstream.runtime.worker.norm_shares import fewest_in_shares
from slipstream.runtime.worker.token_split import TokenSplit
from slipstream.sdk.errors import CheckpointError, ConfigError
from slipstream.tests.parity.references import Reference, load_reference, prompts

pytestmark = pytest.mark.usefixtures("ranks_are_threads")

DEMO_MODEL = str(Path(__file__).resolve().parents[2] / "examples" / "demo_model")
NEW_TOKENS = 12
TOLERANCE = 1e-4
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=5, prompt_logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS),
    SamplingParams(temperature=1.0, seed=11, max_tokens=NEW_TOKENS),
    SamplingParams(temperature=0.8, seed=5, top_p=0.9, top_k=30, max_tokens=NEW_TOKENS),
    SamplingParams(temperature=0.9, seed=7, repetition_penalty=1.3, logit_bias={9: 2.0}, max_tokens=NEW_TOKENS),
    SamplingParams(temperature=1.2, seed=1, n=3, max_tokens=NEW_TOKENS),
]
# Few blocks and small chunks: sequences are preempted and prompts are cut.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 112,
    "num_gpu_blocks_override": 14,
    "block_size": 8,
    "long_prefill_token_threshold": 7,
    "num_threads": 1,
    "step_timeout_s": 60.0,
}
DENSE = [{"tp": tp, "pp": pp} for tp in (1, 2, 4) for pp in (1, 2, 3) if tp * pp > 1]
EXPERTS = [{"tp": tp, "ep": ep, "pp": pp} for tp in (1, 2) for ep in (1, 2, 4) for pp in (1, 2) if tp * ep * pp > 1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    return cache(lambda name: load_reference(name, tmp_path_factory.mktemp(name)))


def asked() -> list[dict[str, list[int]]]:
    # The last prompt begins as the first does: the prefix cache has it.
    chosen = [*prompts(len(PARAMS) - 1)]
    return [{"prompt_token_ids": ids} for ids in (*chosen, [*chosen[0], 3, 4, 5])]


def generate(path: Path, **options: Any) -> list[Any]:
    with LLM(str(path), **{**OPTIONS, **options}) as llm:
        outputs = llm.generate(asked(), PARAMS)
        again = llm.generate(asked(), PARAMS)
    tokens = [[sample.token_ids for sample in output.outputs] for output in outputs]
    assert [[sample.token_ids for sample in output.outputs] for output in again] == tokens, "the second time"
    return outputs


def options_of(degrees: dict[str, int]) -> dict[str, int]:
    names = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "ep": "expert_parallel_size"}
    return {names[axis]: degree for axis, degree in degrees.items()}


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert [s.token_ids for s in mine.outputs] == [s.token_ids for s in theirs.outputs]
    mine, theirs = found[0], expected[0]
    for mine_at, theirs_at in zip(mine.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
        assert mine_at.keys() == theirs_at.keys()
        assert all(abs(mine_at[token].logprob - theirs_at[token].logprob) <= TOLERANCE for token in mine_at)
    for mine_at, theirs_at in zip(mine.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
        assert all(abs(mine_at[token].logprob - theirs_at[token].logprob) <= TOLERANCE for token in mine_at)


@pytest.fixture(scope="module")
def alone(reference: Callable[[str], Reference]) -> Callable[[str], list[Any]]:
    return cache(lambda name: generate(reference(name).path))


@pytest.mark.parametrize("degrees", DENSE, ids=str)
def test_dense_models_give_the_same_on_every_mesh(
    degrees: dict[str, int], reference: Callable[[str], Reference], alone: Callable[[str], list[Any]]
) -> None:
    name = "parallel_dense"
    assert_same(generate(reference(name).path, **options_of(degrees)), alone(name))


@pytest.mark.parametrize("degrees", EXPERTS, ids=str)
def test_experts_give_the_same_on_every_mesh(
    degrees: dict[str, int], reference: Callable[[str], Reference], alone: Callable[[str], list[Any]]
) -> None:
    name = "parallel_experts"
    assert_same(generate(reference(name).path, **options_of(degrees)), alone(name))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("parallel_experts", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
        ("mixtral", {"tensor_parallel_size": 2, "expert_parallel_size": 4}),
        ("mixtral", {"tensor_parallel_size": 4, "enable_expert_parallel": True, "pipeline_parallel_size": 2}),
        ("llama_mqa", {"tensor_parallel_size": 4}),
        ("qwen3", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("qwen3_mixed_layers", {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}),
        ("llama_dynamic", {"tensor_parallel_size": 2}),
        ("gemma2", {"tensor_parallel_size": 2, "sharded_norm": True}),
        ("gemma2", {"tensor_parallel_size": 4, "pipeline_parallel_size": 3, "sharded_norm": False}),
        ("gpt_oss", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("gpt_oss", {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
        ("gpt_oss", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
        ("deepseek_v3", {"tensor_parallel_size": 4}),
        ("deepseek_v3", {"tensor_parallel_size": 2, "expert_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("deepseek_v3", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
        ("deepseek_v3", {"tensor_parallel_size": 2, "sharded_norm": True}),
        ("deepseek_v2_groups", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    ],
    ids=str,
)
def test_other_models(
    name: str, options: dict[str, Any], reference: Callable[[str], Reference], alone: Callable[[str], list[Any]]
) -> None:
    assert_same(generate(reference(name).path, **options), alone(name))


@pytest.mark.parametrize("even_chunks", [True, False])
@pytest.mark.parametrize("stages", [2, 3])
def test_even_and_full_steps_give_the_same(
    stages: int, even_chunks: bool, reference: Callable[[str], Reference], alone: Callable[[str], list[Any]]
) -> None:
    # A budget that prompts do not fit into.
    small = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "even_chunks": even_chunks}
    found = generate(reference("parallel_dense").path, pipeline_parallel_size=stages, **small)
    assert_same(found, alone("parallel_dense"))


@pytest.mark.parametrize("sharded_norm", [False, True])
@pytest.mark.parametrize(
    ("name", "degrees", "pieces"),
    [
        ("parallel_dense", {"tp": 2}, 2),
        ("parallel_dense", {"tp": 2, "pp": 2}, 3),
        ("parallel_experts", {"tp": 2}, 4),
        ("parallel_experts", {"ep": 2}, 2),
        ("parallel_experts", {"tp": 2, "ep": 2, "pp": 2}, 3),
    ],
    ids=str,
)
def test_steps_in_parts_give_the_same(
    name: str,
    degrees: dict[str, int],
    pieces: int,
    sharded_norm: bool,
    reference: Callable[[str], Reference],
    alone: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A wire as slow as the arithmetic: every step that can be cut is.
    slow = PassCost(
        compute_s=Curve.line(fixed_s=0.0, per_unit_s=1.0),
        collective_s=Curve.line(fixed_s=0.0, per_unit_s=1.0),
        collectives=1,
        bytes_per_token=1.0,
    )
    splits: list[TokenSplit] = []

    def measured(*_: object, **__: object) -> TokenSplit:
        splits.append(TokenSplit(slow, element_bytes=4, pieces=((0, pieces),)))
        return splits[-1]

    monkeypatch.setattr(rank_module, "measure_split", measured)
    cuts: list[Cuts] = []
    choose = TokenSplit.cut

    def noted(self: TokenSplit, tokens: int) -> Cuts | None:
        cut = choose(self, tokens)
        cuts.extend([] if cut is None else [cut])
        return cut

    monkeypatch.setattr(TokenSplit, "cut", noted)
    # Steps of many tokens, to have something to cut.
    room = {"num_gpu_blocks_override": 100, "long_prefill_token_threshold": 0}
    room |= {"sharded_norm": sharded_norm}
    assert_same(generate(reference(name).path, overlap=True, **room, **options_of(degrees)), alone(name))
    assert {len(cut) for cut in cuts} == {pieces - 1}, "no step was cut, or not into so many parts"
    assert all(split.meter.totals.works for split in splits)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("parallel_dense", {"tp": 2}),
        ("parallel_dense", {"tp": 4}),
        ("parallel_dense", {"tp": 2, "pp": 3}),
        ("parallel_experts", {"tp": 2}),
        ("parallel_experts", {"tp": 2, "ep": 4}),
        ("parallel_experts", {"tp": 2, "ep": 2, "pp": 2}),
    ],
    ids=str,
)
def test_norms_in_shares_give_the_same(
    name: str, options: dict[str, int], reference: Callable[[str], Reference], alone: Callable[[str], list[Any]]
) -> None:
    # Decoding alone has fewer tokens than ranks.
    assert_same(generate(reference(name).path, sharded_norm=True, **options_of(options)), alone(name))


def test_norms_in_shares_where_experts_are_over_the_same_ranks(
    reference: Callable[[str], Reference], alone: Callable[[str], list[Any]]
) -> None:
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "sharded_norm": True}
    assert_same(generate(reference("parallel_experts").path, **options), alone("parallel_experts"))


def test_where_norms_go_is_tried_and_the_same_on_all_ranks(
    reference: Callable[[str], Reference], alone: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, bool]] = []
    found: list[int | None] = []

    def as_if_it_won(self: NormCost, tokens: int, *, margin: float = 0.03) -> bool:
        return True

    def noted(group: Collectives, run: Callable[[int, bool], None], **options: Any) -> int | None:
        def trial(tokens: int, in_shares: bool) -> None:
            tried.append((tokens, in_shares))
            run(tokens, in_shares)

        found.append(fewest_in_shares(group, trial, **options))
        return found[-1]

    monkeypatch.setattr(NormCost, "sharding_wins", as_if_it_won)
    monkeypatch.setattr(rank_module, "fewest_in_shares", noted)
    degrees = options_of({"tp": 2, "ep": 2})
    assert_same(generate(reference("parallel_experts").path, **degrees), alone("parallel_experts"))
    assert {in_shares for _, in_shares in tried} == {False, True}
    assert len(found) == 4
    assert len(set(found)) == 1


def test_what_passes_and_exchanges_take_is_the_same_on_all_ranks(
    reference: Callable[[str], Reference], alone: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs: list[PassCost] = []
    measure = token_split.measure_split

    def noted(*given: Any, **options: Any) -> TokenSplit:
        split = measure(*given, **options)
        costs.append(split.cost)
        return split

    monkeypatch.setattr(rank_module, "measure_split", noted)
    found = generate(reference("parallel_dense").path, overlap=True, tensor_parallel_size=2)
    assert_same(found, alone("parallel_dense"))
    assert len(costs) == 2
    assert costs[0] == costs[1]
    assert costs[0].collectives == 10


@pytest.mark.parametrize("degrees", [{"ep": 2}, {"tp": 2, "ep": 2}, {"ep": 4, "pp": 2}], ids=str)
def test_experts_move_while_they_serve(
    degrees: dict[str, int],
    reference: Callable[[str], Reference],
    alone: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[ExpertBalance] = []
    begin = ExpertBalance.begin_step

    def noted(self: ExpertBalance) -> None:
        if self not in made:
            made.append(self)
        begin(self)

    monkeypatch.setattr(ExpertBalance, "begin_step", noted)
    options = {"enable_eplb": True, "eplb_step_interval": 5, "num_redundant_experts": 2}
    found = generate(reference("parallel_experts").path, **options, **options_of(degrees))
    assert_same(found, alone("parallel_experts"))
    assert any(balance.switches for balance in made), "no expert has moved"
    assert all(balance.placement.num_slots >= 10 for balance in made)


@pytest.mark.parametrize("name", ["parallel_dense", "parallel_experts"])
def test_one_rank_gives_what_transformers_does(
    name: str, reference: Callable[[str], Reference], alone: Callable[[str], list[Any]]
) -> None:
    expected, _ = reference(name).continuation(asked()[0]["prompt_token_ids"], NEW_TOKENS)
    assert alone(name)[0].outputs[0].token_ids == expected[: len(alone(name)[0].outputs[0].token_ids)]


@pytest.mark.parametrize(
    ("options", "field", "problem"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size", "3 does not divide the model's 4 attention heads"),
        ({"pipeline_parallel_size": 6}, "pipeline_parallel_size", "6 is more than the model's 5 layers"),
        ({"expert_parallel_size": 2}, "expert_parallel_size", "has none"),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, "enable_expert_parallel", "has none"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(
    options: dict[str, Any], field: str, problem: str, reference: Callable[[str], Reference]
) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        LLM(str(reference("parallel_dense").path), **OPTIONS, **options)
    assert refused.value.field == field


def test_prompts_over_latents_are_not_shared(reference: Callable[[str], Reference]) -> None:
    with pytest.raises(ConfigError, match="2 ranks cannot share prompts of DeepseekV3ForCausalLM: use 1") as refused:
        LLM(str(reference("deepseek_v3").path), **OPTIONS, sequence_parallel_size=2)
    assert refused.value.field == "sequence_parallel_size"


def test_experts_that_cannot_be_read_stay_where_they_are(
    reference: Callable[[str], Reference], alone: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ExpertBalance] = []
    tried: list[int] = []
    begin = ExpertBalance.begin_step

    def noted(self: ExpertBalance) -> None:
        if self not in made:
            made.append(self)
        begin(self)

    def unreadable(*_: object, expert: int, **__: object) -> None:
        tried.append(expert)
        raise CheckpointError("model.safetensors", "the disk is gone")

    monkeypatch.setattr(ExpertBalance, "begin_step", noted)
    monkeypatch.setattr(rank_module, "read_expert", unreadable)
    options = {"enable_eplb": True, "eplb_step_interval": 5, "num_redundant_experts": 2, "expert_parallel_size": 2}
    assert_same(generate(reference("parallel_experts").path, **options), alone("parallel_experts"))
    assert tried, "no expert was to move"
    assert not any(balance.switches for balance in made)


def test_grammars_are_followed_by_every_rank() -> None:
    params = SamplingParams(
        temperature=0.9, seed=3, max_tokens=24, structured_outputs=StructuredOutputsParams(regex=r"[a-f]{4,9}-[0-9]+!")
    )
    free = SamplingParams(temperature=0.0, max_tokens=24)
    texts = []
    for degrees in ({}, {"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}):
        with LLM(DEMO_MODEL, dtype="float32", max_model_len=128, num_threads=1, **degrees) as llm:
            texts.append([output.outputs[0].text for output in llm.generate(["x = ", "def f("], [params, free])])
    assert texts[1] == texts[0]
    assert texts[2] == texts[0]
    assert re.match(r"[a-f]{4,9}-[0-9]+", texts[0][0])
