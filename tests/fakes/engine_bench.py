"""A driver's step loop over the oracle executor, with a gate before every step: what tests of clients stand on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.config import SchedulerConfig
from slipstream.runtime.engine.engine import Engine
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.rpc.engine_client import EngineFacts
from slipstream.runtime.worker.driver import DriverLimits, EngineLoop
from slipstream.runtime.worker.grammar_gate import ConstraintCompiler
from slipstream.tests.fakes.gated_executor import Gate, GatedExecutor, ScoringExecutor
from slipstream.tests.fakes.oracle_executor import VOCABULARY, OracleExecutor

CLOSE_TIMEOUT_S = 10.0


@dataclass
class EngineBench:
    """An engine loop that runs, and the gate of its steps."""

    loop: EngineLoop
    scheduler: Scheduler
    gate: Gate


@contextmanager
def engine_bench(
    *,
    ahead: bool = True,
    gate_open: bool = True,
    limits: DriverLimits | None = None,
    compiler: ConstraintCompiler | None = None,
    says: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[EngineBench]:
    """Run a small engine; ``options`` are the scheduler's. At the end all is closed, and every block must be free.

    ``says``: what it says of itself in place of the truth, by the names of its facts.
    """
    values: dict[str, Any] = {
        "max_model_len": 256,
        "num_blocks": 512,
        "block_size": 4,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
    }
    config = SchedulerConfig(**{**values, **options})
    oracle = OracleExecutor(
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_slots=config.max_num_seqs,
        max_length=config.max_model_len,
    )
    gate = Gate(is_open=gate_open)
    scheduler = Scheduler(config)
    executor = GatedExecutor(ScoringExecutor(oracle), gate)
    engine = Engine(scheduler, executor, clock=monotonic_clock, ahead=ahead, step_timeout_s=30.0)
    said: dict[str, Any] = {
        "epoch": "bench",
        "model": "oracle",
        "vocab_size": VOCABULARY,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "eos_token_ids": (),
        "dtype": "none",
        "device": "none",
    }
    facts = EngineFacts(**{**said, **(says or {})})
    loop = EngineLoop(engine, facts, clock=monotonic_clock, limits=limits, compiler=compiler)
    loop.start()
    try:
        yield EngineBench(loop=loop, scheduler=scheduler, gate=gate)
    finally:
        gate.open()
        assert loop.close(timeout_s=CLOSE_TIMEOUT_S), "the engine's thread did not end"
        scheduler.check_integrity()
        load = scheduler.load
        assert (load.running, load.waiting, load.blocks_available) == (0, 0, load.blocks_total), load
