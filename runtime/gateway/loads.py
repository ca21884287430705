"""The load of several replicas as one: what a gateway's metrics say of all of them together."""

from __future__ import annotations

from collections.abc import Sequence

from ..messages import StageTime
from ..rpc.engine_client import EngineLoadReport


def total_load(loads: Sequence[EngineLoadReport]) -> EngineLoadReport | None:
    """Return the sum of reports, None of none. It is draining when all are; stages add up by their numbers.

    ``token_s`` is that of the slowest.
    """
    if len(loads) < 2:
        return loads[0] if loads else None
    stages: dict[int, list[StageTime]] = {}
    for load in loads:
        for time in load.stages:
            stages.setdefault(time.stage, []).append(time)
    return EngineLoadReport(
        running=sum(load.running for load in loads),
        waiting=sum(load.waiting for load in loads),
        queue_room=sum(load.queue_room for load in loads),
        blocks_total=sum(load.blocks_total for load in loads),
        blocks_available=sum(load.blocks_available for load in loads),
        preemptions=sum(load.preemptions for load in loads),
        prefix_hits=sum(load.prefix_hits for load in loads),
        prefix_misses=sum(load.prefix_misses for load in loads),
        draining=all(load.draining for load in loads),
        stages=tuple(_total_time(stage, stages[stage]) for stage in sorted(stages)),
        queued_tokens=sum(load.queued_tokens for load in loads),
        prefill_tokens_per_s=sum(load.prefill_tokens_per_s for load in loads),
        token_s=max(load.token_s for load in loads),
        awaiting=sum(load.awaiting for load in loads),
        sending=sum(load.sending for load in loads),
        receiving=sum(load.receiving for load in loads),
        kv_bytes_out=sum(load.kv_bytes_out for load in loads),
        kv_bytes_in=sum(load.kv_bytes_in for load in loads),
    )


def _total_time(stage: int, times: Sequence[StageTime]) -> StageTime:
    return StageTime(
        stage=stage,
        busy_s=sum(time.busy_s for time in times),
        waiting_s=sum(time.waiting_s for time in times),
        wire_s=sum(time.wire_s for time in times),
        wire_hidden_s=sum(time.wire_hidden_s for time in times),
    )
