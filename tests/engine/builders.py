"""Small makers of requests, engines and runs for the tests of the engine core."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slipstream.runtime.config import SchedulerConfig
from slipstream.runtime.engine.engine import Engine
from slipstream.runtime.engine.outputs import StepOutputs
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.messages import EngineRequest
from slipstream.sdk.params import SamplingParams
from slipstream.tests.fakes.oracle_executor import OracleExecutor


def request(
    name: str,
    prompt: SequenceOf[int],
    *,
    max_tokens: int = 4,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
    priority: int = 0,
    cache_salt: str | None = None,
    generated: tuple[SequenceOf[int] | None, ...] = (),
    **params: Any,
) -> EngineRequest:
    """Make a request from plain values."""
    return EngineRequest(
        request_id=name,
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=seed,
        stop_ids=stop_ids,
        max_tokens=max_tokens,
        arrival_time_s=0.0,
        priority=priority,
        cache_salt=cache_salt,
        generated=tuple(None if drawn is None else np.array(drawn, dtype=np.int32) for drawn in generated),
    )


def config(**options: Any) -> SchedulerConfig:
    """Make a small scheduler's configuration; every option can be given."""
    values: dict[str, Any] = {
        "max_model_len": 64,
        "num_blocks": 32,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
    }
    return SchedulerConfig(**{**values, **options})


@dataclass
class Bench:
    """An engine over the oracle executor, with everything that came out of it."""

    engine: Engine
    oracle: OracleExecutor
    tokens: dict[tuple[str, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    finished: list[str] = field(default_factory=list)
    steps: int = 0

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    def step(self) -> StepOutputs:
        """Do one step, collect its outputs and check every invariant."""
        outputs = self.engine.step()
        self.steps += 1
        for sequence, token in zip(outputs.sequences, outputs.token_ids, strict=True):
            self.tokens[sequence.request_id, sequence.index].append(token)
        self.finished += [f"{sequence.request_id}/{sequence.index}" for sequence in outputs.finished]
        self.scheduler.check_integrity()
        return outputs

    def run(self, limit: int = 5000) -> None:
        """Step until nothing is left to do."""
        while self.engine.has_work:
            self.step()
            limit -= 1
            assert limit > 0, f"no end in sight: {self.scheduler.load}"


def bench(settings: SchedulerConfig, *, ahead: bool = True, executor: type[OracleExecutor] = OracleExecutor) -> Bench:
    """Make an engine over the oracle executor."""
    oracle = executor(
        num_blocks=settings.num_blocks,
        block_size=settings.block_size,
        max_slots=settings.max_num_seqs,
        max_length=settings.max_model_len,
    )
    engine = Engine(Scheduler(settings), oracle, clock=lambda: 0.0, ahead=ahead, step_timeout_s=5.0)
    return Bench(engine=engine, oracle=oracle)
