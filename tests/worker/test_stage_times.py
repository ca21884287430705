"""What stages say of their time: waiting for others is told from work, on every stage, up to the engine's totals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.comm.local_groups import local_group
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.config import EngineOptions
from slipstream.runtime.engine.engine import Engine
from slipstream.runtime.worker import stage_link
from slipstream.runtime.worker.launch import launch_engine
from slipstream.runtime.worker.stage_link import StageLink
from slipstream.tests.engine.builders import request
from slipstream.tests.fakes.thread_peers import ThreadPeers
from slipstream.tests.models.checkpoints import make_checkpoint
from slipstream.tests.models.ladder_llama import make_ladder_checkpoint


class SlowWork:
    """An operation whose result is there after some time on the test's clock."""

    def __init__(self, result: Tensor, passes: Callable[[], None]) -> None:
        self._result, self._passes = result, passes

    def wait(self, timeout_s: float | None = None) -> Tensor:
        del timeout_s
        self._passes()
        return self._result

    def done(self) -> bool:
        return False


def test_a_link_counts_what_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(stage_link, "monotonic_clock", lambda: now_s[0])

    def pass_time() -> None:
        now_s[0] += 2.5

    first, _ = local_group(2, name="pp", timeout_s=5.0)
    monkeypatch.setattr(first, "receive", lambda out, source: SlowWork(out, pass_time))
    link = StageLink(first, hidden_size=4, dtype=torch.float32, device=torch.device("cpu"))
    link.receive_hidden(3)
    assert link.waited_s == 2.5
    slots = np.array([0], dtype=np.int32)
    link.expect_tokens(slots, np.array([7], dtype=np.int64))
    assert link.waited_s == 2.5, "tokens are not waited for before they are needed"
    assert len(list(link.settle(slots))) == 1
    assert link.waited_s == 5.0


def run(engine: Engine) -> None:
    engine.submit(request("a", range(3, 40), max_tokens=6))
    engine.submit(request("b", range(5, 25), max_tokens=6))
    while engine.has_work:
        engine.step()
    engine.close()


def launch(model: Path, *, stages: int, tensor: int = 1) -> Engine:
    options = EngineOptions(
        model=str(model), dtype="float32", max_model_len=64, num_threads=1, num_gpu_blocks_override=16,
        pipeline_parallel_size=stages, tensor_parallel_size=tensor,
    )  # fmt: skip
    return launch_engine(options, clock=monotonic_clock, start_peers=ThreadPeers).engine


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_engine_knows_every_stages_time(tensor: int, tmp_path: Path) -> None:
    engine = launch(make_checkpoint("parallel_dense", tmp_path), stages=3, tensor=tensor)
    before = engine.stage_times
    assert not before
    began_s = monotonic_clock()
    run(engine)
    elapsed_s = monotonic_clock() - began_s
    assert [time.stage for time in engine.stage_times] == [0, 1, 2]
    for time in engine.stage_times:
        assert time.busy_s > 0.0 and time.busy_s + time.waiting_s < elapsed_s
    # The later stages have nothing to compute before the first one is done with a step.
    assert all(time.waiting_s > 0.0 for time in engine.stage_times[1:])


@pytest.mark.parametrize("stages", [1, 2])
def test_without_anything_to_hide_it_behind_no_wire_time_is_hidden(stages: int, tmp_path: Path) -> None:
    engine = launch(make_checkpoint("parallel_dense", tmp_path), stages=stages, tensor=2)
    run(engine)
    assert [time.stage for time in engine.stage_times] == list(range(stages))
    for time in engine.stage_times:
        assert 0.0 < time.wire_s < time.busy_s
        assert time.wire_hidden_s == 0.0


@pytest.mark.parametrize("stages", [1, 2])
def test_what_a_ladder_hides_is_known(stages: int, tmp_path: Path) -> None:
    engine = launch(make_ladder_checkpoint(tmp_path, 5), stages=stages, tensor=2)
    run(engine)
    for time in engine.stage_times:
        assert 0.0 < time.wire_hidden_s < time.wire_s


def test_a_rank_alone_is_no_pipeline(tmp_path: Path) -> None:
    engine = launch(make_checkpoint("parallel_dense", tmp_path), stages=1)
    run(engine)
    assert not engine.stage_times
