"""Driver loops over the oracle executor, with hand-off desks between them, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from slipstream.comm.kv.transfer import Peer, TransferLimits
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.config import SchedulerConfig
from slipstream.runtime.engine.engine import Engine
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.handoff.settings import KvSettings
from slipstream.runtime.rpc.engine_client import EngineFacts, SendTo
from slipstream.runtime.rpc.kv_in_process import InProcessKvTalker
from slipstream.runtime.worker.driver import DriverLimits, EngineLoop
from slipstream.runtime.worker.grammar_gate import ConstraintCompiler
from slipstream.runtime.worker.kv_desk import OpenDesk, open_desk
from slipstream.tests.fakes.gated_executor import Gate, GatedExecutor, ScoringExecutor
from slipstream.tests.fakes.memory_ranks import MemoryNet, MemoryRanks, SendingExecutor, scribble
from slipstream.tests.fakes.oracle_executor import VOCABULARY, OracleExecutor

CLOSE_TIMEOUT_S = 10.0
QUICK = TransferLimits(lease_s=0.5, heartbeat_s=0.1, resend_s=0.05, answer_timeout_s=0.5, max_wait_s=1.0)
"""Limits with which a test need not wait long for what takes long."""


@dataclass
class Replica:
    """One replica that runs. ``name`` is its address too."""

    name: str
    loop: EngineLoop
    scheduler: Scheduler
    gate: Gate
    ranks: MemoryRanks
    opened: OpenDesk

    def send_to(self, ticket: str) -> SendTo:
        """Return where a request waits under a ticket."""
        return SendTo(replica=self.name, address=self.name, ticket=ticket)


class SplitBench:
    """Replicas that can send one another KV."""

    def __init__(self, stack: ExitStack) -> None:
        self.net = MemoryNet()
        self.talker = InProcessKvTalker()
        self._stack = stack
        self._incarnation = 0

    def start(
        self,
        name: str,
        *,
        role: str = "mixed",
        limits: TransferLimits = QUICK,
        gate_open: bool = True,
        driver_limits: DriverLimits | None = None,
        compiler: ConstraintCompiler | None = None,
        model: str = "oracle",
        **options: Any,
    ) -> Replica:
        """Start a replica; ``options`` are its scheduler's."""
        values: dict[str, Any] = {
            "max_model_len": 256,
            "num_blocks": 128,
            "block_size": 4,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 32,
        }
        config = SchedulerConfig(**{**values, **options})
        oracle = OracleExecutor(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_slots=config.max_num_seqs,
            max_length=config.max_model_len,
        )
        scribble(oracle)
        self._incarnation += 1
        peer = Peer(name, self._incarnation)
        ranks = MemoryRanks(self.net, peer, oracle, model=model)
        gate = Gate(is_open=gate_open)
        executor = GatedExecutor(SendingExecutor(ScoringExecutor(oracle), oracle, ranks), gate)
        scheduler = Scheduler(config)
        engine = Engine(scheduler, executor, clock=monotonic_clock, ahead=True, step_timeout_s=30.0)
        settings = KvSettings(replica=name, incarnation=peer.incarnation, secret=b"", kinds=("tcp",))
        opened = open_desk(
            settings, ranks, engine, self.talker, vocab_size=VOCABULARY, clock=monotonic_clock, limits=limits
        )
        facts = EngineFacts(
            epoch=f"{name}-{peer.incarnation}",
            model="oracle",
            vocab_size=VOCABULARY,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            eos_token_ids=(),
            dtype="none",
            device="none",
            replica=name,
            role=role,
            sends_kv=role != "decode",
            receives_kv=role != "prefill",
        )
        limits_here = driver_limits or DriverLimits(load_period_s=0.05)
        loop = EngineLoop(engine, facts, clock=monotonic_clock, limits=limits_here, compiler=compiler, desk=opened.desk)
        loop.start()
        self.talker.serve(name, opened.lines)
        replica = Replica(name=name, loop=loop, scheduler=scheduler, gate=gate, ranks=ranks, opened=opened)
        self._stack.callback(self.stop, replica)
        return replica

    def stop(self, replica: Replica) -> None:
        """End a replica; its blocks must come back."""
        replica.gate.open()
        self.talker.stop(replica.name)
        assert replica.loop.close(timeout_s=CLOSE_TIMEOUT_S), "the engine's thread did not end"
        assert replica.ranks.closed, "its ranks are still there"
        replica.scheduler.check_integrity()


@contextmanager
def split_bench() -> Iterator[SplitBench]:
    """Open a bench; at the end all its replicas are closed."""
    with ExitStack() as stack:
        yield SplitBench(stack)
