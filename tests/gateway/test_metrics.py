"""What ``/metrics`` says of an engine's load."""

from __future__ import annotations

from dataclasses import replace

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
