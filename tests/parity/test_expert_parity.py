"""Experts on several ranks give the same whichever way they get their tokens, over hosts, and while they move: by
hosts and by affinity, which lets fewer bytes pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.comm import expert_hop, experts
from slipstream.placement.expert_plan import keeps_replicas_on_hosts
from slipstream.runtime.models import expert_ranks
from slipstream.runtime.worker import expert_trial
from slipstream.runtime.worker.expert_balance import ExpertBalance
from slipstream.sdk.errors import ConfigError
from slipstream.tests.fakes.thread_peers import SentByGroup, ThreadPeers
from slipstream.tests.models.checkpoints import CASES, random_model
from slipstream.tests.parity.references import Reference, load_reference
from slipstream.tests.parity.test_parallel_parity import OPTIONS, PARAMS, asked, assert_same, generate

pytestmark = pytest.mark.usefixtures("ranks_are_threads")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    return cache(lambda name: load_reference(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def alone(reference: Callable[[str], Reference]) -> Callable[[str], list[Any]]:
    return cache(lambda name: generate(reference(name).path))


def once(path: Path, **options: Any) -> list[Any]:
    with LLM(str(path), **{**OPTIONS, **options}) as llm:
        return llm.generate(asked(), PARAMS)


def exact(found: list[Any]) -> list[Any]:
    """Return tokens and log-probabilities to the last bit."""
    first = found[0].outputs[0]
    logprobs = [{token: entry.logprob for token, entry in at.items()} for at in first.logprobs]
    return [[[sample.token_ids for sample in output.outputs] for output in found], logprobs]


@pytest.mark.parametrize(
    "options",
    [
        {"expert_parallel_size": 2, "tensor_parallel_size": 2},
        {"expert_parallel_size": 2, "ranks_per_host": 1, "num_redundant_experts": 3, "pipeline_parallel_size": 2},
        {"expert_parallel_size": 4, "ranks_per_host": 2},
        {"enable_expert_parallel": True, "tensor_parallel_size": 4, "ranks_per_host": 2},
    ],
    ids=str,
)
def test_experts_are_exchanged_or_gathered_in_any_step(
    options: dict[str, Any],
    reference: Callable[[str], Reference],
    alone: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, path = "parallel_experts", reference("parallel_experts").path
    exchanged = generate(path, expert_exchange="all_to_all", **options)
    assert_same(exchanged, alone(name))
    assert exact(once(path, expert_exchange="gather", **options)) == exact(exchanged)
    # Steps of different sizes go different ways.
    monkeypatch.setattr(expert_trial, "most_gathered", lambda *_: 5)
    ways: set[str] = set()
    for way in ("mix", "mix_gathered"):
        monkeypatch.setattr(expert_ranks, way, noting(ways, way, getattr(expert_ranks, way)))
    assert exact(once(path, **options)) == exact(exchanged)
    assert ways == {"mix", "mix_gathered"}


def noting(seen: set[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*given: Any, **options: Any) -> Any:
        seen.add(name)
        return function(*given, **options)

    return noted


def test_hosts_change_no_bits(reference: Callable[[str], Reference]) -> None:
    path, options = reference("parallel_experts").path, {"expert_parallel_size": 4, "expert_exchange": "all_to_all"}
    assert exact(once(path, **options, ranks_per_host=2)) == exact(once(path, **options))


@pytest.mark.parametrize(
    ("options", "on_hosts"),
    [
        ({"expert_parallel_size": 4, "ranks_per_host": 2}, True),
        ({"expert_parallel_size": 2, "eplb_policy": "affinity"}, False),
        ({"expert_parallel_size": 4, "ranks_per_host": 2, "eplb_policy": "affinity"}, True),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2, "eplb_policy": "affinity"}, False),
    ],
    ids=str,
)
def test_experts_move_by_hosts_and_by_affinity(
    options: dict[str, Any],
    on_hosts: bool,
    reference: Callable[[str], Reference],
    alone: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = balances(monkeypatch)
    asked_for = {"enable_eplb": True, "eplb_step_interval": 5, "num_redundant_experts": 2}
    found = generate(reference("parallel_experts").path, **asked_for, **options)
    assert_same(found, alone("parallel_experts"))
    assert any(balance.switches for balance in made), "no expert has moved"
    assert all(keeps_replicas_on_hosts(balance.placement) == on_hosts for balance in made)


def balances(monkeypatch: pytest.MonkeyPatch) -> list[ExpertBalance]:
    """Return where every rank's balance will be noted."""
    made: list[ExpertBalance] = []
    begin = ExpertBalance.begin_step

    def noted(self: ExpertBalance) -> None:
        if self not in made:
            made.append(self)
        begin(self)

    monkeypatch.setattr(ExpertBalance, "begin_step", noted)
    return made


@pytest.fixture(scope="module")
def in_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens choose experts 0 and 1, or 2 and 3, and so on: dealt in turn they are never together."""
    case = CASES["parallel_experts"]
    model = random_model(replace(case, fields={**case.fields, "num_experts_per_tok": 2}))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, router_EH in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                pairs = torch.randn((len(router_EH) // 2, router_EH.shape[1]), generator=draw)
                noise = torch.randn(router_EH.shape, generator=draw)
                router_EH.copy_(pairs.repeat_interleave(2, dim=0) + 0.001 * noise)
    path = tmp_path_factory.mktemp("in_pairs")
    model.save_pretrained(path)
    return path


def test_experts_that_fire_together_move_together_and_fewer_bytes_pass(
    in_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = balances(monkeypatch)
    arrived: list[int] = []
    one_hop = expert_hop.hop

    def noted_hop(*given: Any, **options: Any) -> Any:
        arrival = yield from one_hop(*given, **options)
        arrived.append(len(arrival.rows_RH))
        return arrival

    monkeypatch.setattr(experts, "hop", noted_hop)
    rows: dict[str, int] = {}
    passed: dict[str, int] = {}
    tokens: dict[str, Any] = {}
    prompts_ = [{"prompt_token_ids": [3 + (7 * row + index) % 150 for index in range(24)]} for row in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    for policy in ("balance", "affinity"):
        sent: SentByGroup = {}
        monkeypatch.setattr(ThreadPeers, "sent", sent)
        made.clear()
        options = {"enable_eplb": True, "eplb_step_interval": 6, "eplb_policy": policy, "enable_prefix_caching": False}
        roomy = {**OPTIONS, "num_gpu_blocks_override": 100, "expert_exchange": "all_to_all"}
        with LLM(str(in_pairs), expert_parallel_size=2, **roomy, **options) as llm:
            before = llm.generate(prompts_, params)
            moved = sum(balance.switches for balance in made)
            (counter,) = (counter for (axis, _), counter in sent.items() if axis == "ep")
            begun = counter.total()
            arrived.clear()
            after = llm.generate(prompts_, params)
        passed[policy], rows[policy] = counter.total() - begun, sum(arrived)
        tokens[policy] = [output.outputs[0].token_ids for output in after]
        assert tokens[policy] == [output.outputs[0].token_ids for output in before]
        if policy == "affinity":
            assert moved, "no expert has moved"
            for layer in range(made[0].placement.num_layers):
                homes = {expert: rank for rank in (0, 1) for expert in made[0].placement.experts_on(layer, rank)}
                assert all(homes[expert] == homes[expert + 1] for expert in range(0, 8, 2))
    assert tokens["affinity"] == tokens["balance"]
    # Each token goes to one rank instead of two, and comes back as one row instead of two. Beside that each rank gets
    # every token's output, which stays as it was.
    assert rows["affinity"] <= 0.6 * rows["balance"]
    assert passed["affinity"] < 0.8 * passed["balance"]


@pytest.mark.parametrize(
    ("options", "field", "problem"),
    [
        ({"expert_exchange": "gather"}, "expert_exchange", "is for experts over several ranks"),
        ({"expert_exchange": "often"}, "expert_exchange", "must be one of auto, all_to_all, gather, got 'often'"),
        ({"eplb_policy": "none"}, "eplb_policy", "must be one of balance, affinity, got 'none'"),
        ({"eplb_policy": "affinity"}, "eplb_policy", "says how enable_eplb moves experts: give that too"),
        ({"ranks_per_host": 0}, "ranks_per_host", "must be an integer of at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], field: str, problem: str, reference: Callable[[str], Reference]
) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        LLM(str(reference("parallel_experts").path), **OPTIONS, **options)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"expert_parallel_size": 4, "ranks_per_host": 3}, "hosts of 3 ranks have 1 and 3 of them"),
        (
            {"expert_parallel_size": 2, "tensor_parallel_size": 2, "ranks_per_host": 3},
            "3 puts 1 or 2 ranks that experts are spread over on a host",
        ),
    ],
    ids=str,
)
def test_hosts_on_which_experts_do_not_lie_evenly_are_refused(
    options: dict[str, Any], problem: str, reference: Callable[[str], Reference]
) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        LLM(str(reference("parallel_experts").path), **OPTIONS, **options)
    assert refused.value.field == "ranks_per_host"


def test_experts_with_biases_stay_where_they_are(reference: Callable[[str], Reference]) -> None:
    with pytest.raises(ConfigError, match="moves experts without biases") as refused:
        LLM(str(reference("gpt_oss").path), **{**OPTIONS, "expert_parallel_size": 2, "enable_eplb": True})
    assert refused.value.field == "enable_eplb"
