"""What ``/metrics`` says of an engine's load."""

from __future__ import annotations

from dataclasses import replace

from slipstream.runtime.gateway.loads import total_load
from slipstream.runtime.gateway.metrics import GatewayMetrics
from slipstream.runtime.messages import StageTime
from slipstream.runtime.rpc.engine_client import EngineLoadReport
from slipstream.tests.fakes.scripted_host import LOAD


def exposition(load: EngineLoadReport) -> list[str]:
    return GatewayMetrics(load=lambda: load, in_flight=lambda: 0).exposition().decode().splitlines()


def test_stages_of_a_pipeline_are_told_apart() -> None:
    stages = (StageTime(stage=0, busy_s=2.5, waiting_s=0.25), StageTime(stage=1, busy_s=1.5, waiting_s=1.25))
    lines = exposition(replace(LOAD, stages=stages))
    assert 'slipstream_stage_busy_seconds_total{stage="0"} 2.5' in lines
    assert 'slipstream_stage_busy_seconds_total{stage="1"} 1.5' in lines
    assert 'slipstream_stage_waiting_seconds_total{stage="0"} 0.25' in lines
    assert 'slipstream_stage_waiting_seconds_total{stage="1"} 1.25' in lines


def test_the_wire_and_what_was_hidden_of_it_are_told_by_stage() -> None:
    stages = (
        StageTime(stage=0, busy_s=2.5, waiting_s=0.0, wire_s=1.5, wire_hidden_s=0.5),
        StageTime(stage=1, busy_s=1.5, waiting_s=0.0, wire_s=0.75, wire_hidden_s=0.0),
    )
    lines = exposition(replace(LOAD, stages=stages))
    assert 'slipstream_wire_seconds_total{stage="0"} 1.5' in lines
    assert 'slipstream_wire_seconds_total{stage="1"} 0.75' in lines
    assert 'slipstream_wire_hidden_seconds_total{stage="0"} 0.5' in lines
    assert 'slipstream_wire_hidden_seconds_total{stage="1"} 0.0' in lines


def test_a_rank_alone_has_no_stages() -> None:
    assert not any(line.startswith(("slipstream_stage_", "slipstream_wire_")) for line in exposition(LOAD))


def test_replicas_are_counted_by_state() -> None:
    metrics = GatewayMetrics(load=lambda: None, in_flight=lambda: 0, states=lambda: {"attached": 2, "lost": 0})
    lines = metrics.exposition().decode().splitlines()
    assert 'slipstream_replicas{state="attached"} 2.0' in lines
    assert 'slipstream_replicas{state="lost"} 0.0' in lines
    assert "slipstream_engine_up 0.0" in lines


def test_the_load_of_several_replicas_is_their_sum() -> None:
    one = replace(LOAD, running=1, stages=(StageTime(stage=0, busy_s=1.0, waiting_s=0.5),), draining=True)
    two = replace(
        LOAD,
        running=3,
        stages=(StageTime(stage=0, busy_s=2.0, waiting_s=0.25), StageTime(stage=1, busy_s=4.0, waiting_s=0.0)),
    )
    assert total_load([]) is None and total_load([one]) is one
    total = total_load([one, two])
    assert total is not None
    assert (total.running, total.blocks_total, total.draining) == (4, 2 * LOAD.blocks_total, False)
    assert [(time.stage, time.busy_s, time.waiting_s) for time in total.stages] == [(0, 3.0, 0.75), (1, 4.0, 0.0)]
    together = total_load([one, one])
    assert together is not None and together.draining
    # Each stage once, or nobody could read the exposition.
    assert sum("slipstream_stage_busy_seconds_total{" in line for line in exposition(total)) == 2
