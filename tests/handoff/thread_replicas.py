"""Replicas of real models whose ranks are threads of this process, and that hand requests on to one another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.config import EngineOptions
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.handoff.settings import KvLimits, KvSeat, KvSettings
from slipstream.runtime.rpc.engine_client import EngineFacts, SendTo
from slipstream.runtime.rpc.kv_in_process import InProcessKvTalker
from slipstream.runtime.worker.driver import EngineLoop
from slipstream.runtime.worker.kv_desk import open_desk
from slipstream.runtime.worker.launch import LaunchedEngine, launch_engine
from slipstream.tests.fakes.thread_peers import ThreadPeers

SECRET = b"between replicas of one test"
CLOSE_TIMEOUT_S = 20.0
_lives = count(1)


class _Peers(ThreadPeers):
    kv_seat = KvSeat(address="127.0.0.1", secret=SECRET)


@dataclass(frozen=True)
class Degrees:
    """How a replica is cut, in what blocks and chunks it works, and of what its numbers are."""

    tp: int = 1
    pp: int = 1
    block_size: int = 8
    chunk: int = 48
    dtype: str = "float32"
    wire_dtype: str = "auto"

    def __str__(self) -> str:
        return f"tp{self.tp}pp{self.pp}b{self.block_size}c{self.chunk}{self.dtype}{self.wire_dtype}"


@dataclass
class ThreadReplica:
    """One replica that runs. ``name`` is its address too."""

    name: str
    loop: EngineLoop
    launched: LaunchedEngine

    @property
    def scheduler(self) -> Scheduler:
        return self.launched.engine.scheduler

    def send_to(self, ticket: str) -> SendTo:
        """Return where a request waits under a ticket."""
        return SendTo(replica=self.name, address=self.name, ticket=ticket)


def _options(model: Path, degrees: Degrees) -> EngineOptions:
    return EngineOptions(
        model=str(model),
        dtype=degrees.dtype,
        max_model_len=160,
        num_gpu_blocks_override=80 * 8 // degrees.block_size,
        block_size=degrees.block_size,
        max_num_seqs=8,
        max_num_batched_tokens=degrees.chunk,
        num_threads=1,
        tensor_parallel_size=degrees.tp,
        pipeline_parallel_size=degrees.pp,
        step_timeout_s=60.0,
    )


@contextmanager
def thread_replica(talker: InProcessKvTalker, model: Path, degrees: Degrees, kind: str) -> Iterator[ThreadReplica]:
    """Run a replica that both sends and receives over transports of one kind; at the end no block may be lost."""
    life = next(_lives)
    name = f"{degrees}-{life}"
    # Layer by layer, however short a prompt is.
    limits = KvLimits(serial_below_tokens=1, streams=1)
    settings = KvSettings(
        replica=name, incarnation=life, secret=SECRET, kinds=(kind,), wire_dtype=degrees.wire_dtype, limits=limits
    )
    options: dict[str, Any] = {"clock": monotonic_clock, "start_peers": _Peers, "kv": settings}
    launched = launch_engine(_options(model, degrees), **options)
    assert launched.kv is not None
    vocab_size = launched.spec.vocab_size
    opened = open_desk(settings, launched.kv, launched.engine, talker, vocab_size=vocab_size, clock=monotonic_clock)
    facts = EngineFacts(
        epoch=name,
        model=model.name,
        vocab_size=vocab_size,
        max_model_len=launched.config.max_model_len,
        max_num_seqs=launched.config.max_num_seqs,
        eos_token_ids=launched.eos_token_ids,
        dtype=degrees.dtype,
        device="cpu",
        replica=name,
        sends_kv=True,
        receives_kv=True,
    )
    loop = EngineLoop(launched.engine, facts, clock=monotonic_clock, compiler=launched.grammars, desk=opened.desk)
    loop.start()
    talker.serve(name, opened.lines)
    replica = ThreadReplica(name=name, loop=loop, launched=launched)
    try:
        yield replica
    finally:
        talker.stop(name)
        assert loop.close(timeout_s=CLOSE_TIMEOUT_S), "the engine's thread did not end"
        replica.scheduler.check_integrity()
        assert replica.scheduler.pool.available == replica.scheduler.pool.num_blocks
