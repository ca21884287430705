"""Replicas of real processes: the same tokens, and what happens when a rank ends, stops or refuses."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from slipstream import LLM, SamplingParams
from slipstream.runtime import llm as llm_module
from slipstream.runtime.worker.launch import launch_engine
from slipstream.runtime.worker.rank_processes import RankProcesses
from slipstream.sdk.errors import EngineError
from slipstream.tests.models.checkpoints import make_checkpoint

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "num_threads": 1,
    "max_num_seqs": 8,
}
PROMPTS = [{"prompt_token_ids": [3 + (7 * row + index) % 150 for index in range(20 + row)]} for row in range(5)]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=16),
    SamplingParams(temperature=1.0, seed=3, max_tokens=16),
    SamplingParams(temperature=0.7, seed=4, top_p=0.9, logprobs=2, max_tokens=16),
    SamplingParams(temperature=0.0, max_tokens=16, prompt_logprobs=1),
    SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=16),
]
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
COMM_TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("parallel_dense", tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("parallel_experts", tmp_path_factory.mktemp("experts"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RankProcesses]:
    """Note the replicas that are started, which give up on a rank after seconds."""
    replicas: list[RankProcesses] = []

    def start(setup: Any) -> RankProcesses:
        replicas.append(RankProcesses(setup, start_timeout_s=120.0, comm_timeout_s=COMM_TIMEOUT_S))
        return replicas[-1]

    monkeypatch.setattr(llm_module, "launch_engine", partial(launch_engine, start_peers=start))
    return replicas


def tokens(llm: LLM) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in output.outputs] for output in llm.generate(PROMPTS, PARAMS)]


def alone(path: Path) -> list[list[list[int]]]:
    with LLM(str(path), **OPTIONS) as llm:
        return tokens(llm)


def gone(replica: RankProcesses) -> bool:
    return not any(psutil.pid_exists(process_id) for process_id in replica.process_ids.values())


def test_tensor_and_pipeline_parallel_processes_give_the_same(dense: Path, started: list[RankProcesses]) -> None:
    with LLM(str(dense), **OPTIONS, tensor_parallel_size=2, pipeline_parallel_size=2) as llm:
        found = tokens(llm)
        assert len(started[0].process_ids) == 3
        stages = llm._engine.stage_times
    assert found == alone(dense)
    assert [time.stage for time in stages] == [0, 1]
    assert all(time.busy_s > 0.0 for time in stages) and stages[1].waiting_s > 0.0
    assert all(time.wire_s > 0.0 and time.wire_hidden_s == 0.0 for time in stages)
    assert gone(started[0])


def test_expert_parallel_processes_give_the_same(experts: Path, started: list[RankProcesses]) -> None:
    with LLM(str(experts), **OPTIONS, expert_parallel_size=2, overlap=True) as llm:
        found = tokens(llm)
    assert found == alone(experts)
    assert gone(started[0])


def test_sequence_parallel_processes_give_the_same(dense: Path, started: list[RankProcesses]) -> None:
    long = {"prompt_token_ids": [3 + (11 * index) % 150 for index in range(450)]}
    params = SamplingParams(temperature=0.0, max_tokens=16, prompt_logprobs=0)

    def answer(llm: LLM) -> tuple[Any, list[float]]:
        (output,) = llm.generate([long], params)
        scored = output.prompt_logprobs or []
        scores = [next(iter(at.values())).logprob for at in scored if at is not None]
        assert len(scores) == len(long["prompt_token_ids"]) - 1
        return (tokens(llm), output.outputs[0].token_ids), scores

    with LLM(str(dense), **OPTIONS, sequence_parallel_size=2, tensor_parallel_size=2) as llm:
        found, found_scores = answer(llm)
        assert len(started[0].process_ids) == 3
        (stage,) = llm._engine.stage_times
    with LLM(str(dense), **OPTIONS) as llm:
        expected, expected_scores = answer(llm)
    assert found == expected
    assert found_scores == pytest.approx(expected_scores, abs=1e-4)
    assert stage.wire_s > 0.0 and stage.wire_hidden_s > 0.0
    assert gone(started[0])


def kill(process_id: int) -> None:
    os.kill(process_id, signal.SIGKILL)


def stop(process_id: int) -> None:
    os.kill(process_id, signal.SIGSTOP)


@pytest.mark.parametrize(
    "degrees",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"sequence_parallel_size": 2}],
    ids=str,
)
@pytest.mark.parametrize("strike", [kill, stop])
def test_a_rank_that_is_lost_ends_requests_with_its_name_and_the_next_engine_is_right(
    strike: Callable[[int], None], degrees: dict[str, int], dense: Path, started: list[RankProcesses]
) -> None:
    with LLM(str(dense), **OPTIONS, **degrees) as llm:
        process_id = started[0].process_ids[1]
        pieces = llm.stream(PROMPTS[0], LONG)
        for _ in range(5):
            next(pieces)
        strike(process_id)
        with pytest.raises(EngineError, match=r"rank [01]") as failed:
            for _ in pieces:
                pass
        if strike is kill:
            assert f"process {process_id}" in str(failed.value)
        with pytest.raises(EngineError):
            llm.generate(PROMPTS[0], PARAMS[0])
    assert gone(started[0])
    with LLM(str(dense), **OPTIONS, **degrees) as llm:
        assert tokens(llm)[0] == alone(dense)[0]


def test_a_rank_that_cannot_start_is_named(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.runtime.worker.rank_processes._MODULE", "slipstream.runtime.worker.no_such_module")
    with pytest.raises(EngineError, match=r"rank 1 \(process \d+\) ended with status 1 before the replica was ready"):
        LLM(str(dense), **OPTIONS, tensor_parallel_size=2)
