"""Launched engines whose ranks, threads or processes, move KV: from what a step computes to another's caches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from slipstream.comm.kv.transfer import OpenReceiving, OpenSending, Peer, RankDone, RankOpened, Report, TransferId
from slipstream.comm.kv.transport import PeerDown
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.config import EngineOptions
from slipstream.runtime.handoff.rank_orders import CloseTransfer, KvTarget, OpenReceive, OpenSend
from slipstream.runtime.handoff.ranks import KvRanks
from slipstream.runtime.handoff.settings import KvLimits, KvSeat, KvSettings
from slipstream.runtime.messages import AdmittedSequence, SequenceId, StepPlan
from slipstream.runtime.worker.launch import LaunchedEngine, launch_engine
from slipstream.sdk.errors import ConfigError, EngineError
from slipstream.sdk.params import SamplingParams
from slipstream.tests.fakes.thread_peers import ThreadPeers
from slipstream.tests.handoff.rank_beds import SECRET, wait_until
from slipstream.tests.models.checkpoints import make_checkpoint

TOKENS = 21
BLOCK_SIZE = 4


def settings(replica: str, **changes: object) -> KvSettings:
    given = {"limits": KvLimits(serial_below_tokens=0), **changes}
    return KvSettings(replica=replica, incarnation=5, secret=SECRET, **given)  # type: ignore[arg-type]  # tests' own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("parallel_dense", tmp_path_factory.mktemp("dense"))


def options(model: Path, **changes: object) -> EngineOptions:
    given: dict[str, object] = {
        "num_gpu_blocks_override": 32,
        "block_size": BLOCK_SIZE,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "device": "cpu",
        "num_threads": 1,
        "skip_tokenizer_init": True,
        **changes,
    }
    return EngineOptions(model=str(model), **given)  # type: ignore[arg-type]  # tests' own


class SeatedThreads(ThreadPeers):
    kv_seat = KvSeat(address="127.0.0.1", secret=SECRET)


@contextmanager
def launched(engine_options: EngineOptions, replica: str, **how: object) -> Iterator[LaunchedEngine]:
    engine = launch_engine(
        engine_options,
        clock=monotonic_clock,
        kv=settings(replica),
        **how,  # type: ignore[arg-type]  # tests' own
    )
    assert engine.kv is not None
    with ExitStack() as stack:
        stack.callback(engine.engine.close)
        stack.callback(engine.kv.close)
        yield engine


class Heard:
    """What ranks have said."""

    def __init__(self, ranks: KvRanks) -> None:
        self.ranks = ranks
        self.said: list[tuple[int, Report | PeerDown]] = []
        ranks.listen(lambda rank, word: self.said.append((rank, word)))

    def wait_all(self, kind: type[RankOpened] | type[RankDone]) -> None:
        count = len(self.ranks.ends)
        wait_until(lambda: {rank for rank, word in self.said if isinstance(word, kind)} == set(range(count)))


def prompt_step(transfer: int, blocks: list[int]) -> StepPlan:
    """Return a step that computes a whole prompt, which is sent."""
    token_ids = np.arange(1, TOKENS + 1, dtype=np.int32)
    none = np.empty(0, dtype=np.int32)
    admitted = AdmittedSequence(
        slot=0,
        sequence_id=SequenceId(1),
        token_ids=token_ids,
        prompt_length=TOKENS,
        block_ids=np.asarray(blocks, dtype=np.int32),
        params=SamplingParams(temperature=0.0),
        seed=0,
        stop_ids=(),
    )
    return StepPlan(
        step=1,
        admitted=(admitted,),
        slots=np.zeros(1, dtype=np.int32),
        sequence_ids=np.ones(1, dtype=np.int64),
        starts=np.zeros(1, dtype=np.int32),
        counts=np.full(1, TOKENS, dtype=np.int32),
        samples=np.ones(1, dtype=np.bool_),
        block_slots=none,
        block_indices=none,
        block_ids=none,
        copy_sources=none,
        copy_targets=none,
        sending_rows=np.zeros(1, dtype=np.int32),
        sending_transfers=np.full(1, transfer, dtype=np.int64),
    )


def move(prefill: LaunchedEngine, decode: LaunchedEngine) -> None:
    """Have a step compute a prompt, and its KV go from the one to the other."""
    assert prefill.kv is not None and decode.kv is not None
    source, target = Heard(prefill.kv), Heard(decode.kv)
    transfer = TransferId("prefill-0", 5, 1)
    tokens, blocks = range(TOKENS), (9, 3, 4, 7, 1, 2)
    receiving = OpenReceiving(transfer=transfer, generation=1, tokens=tokens, blocks=blocks)
    decode.kv.give(OpenReceive(grant=receiving, source=prefill.kv.offer.layout))
    target.wait_all(RankOpened)
    grant = OpenSending(transfer=transfer, generation=1, to=Peer("decode-0", 5), tokens=tokens, blocks=blocks)
    prefill.kv.give(OpenSend(grant=grant, target=KvTarget(layout=decode.kv.offer.layout, ends=decode.kv.ends)))
    prefill.engine._executor.submit(prompt_step(1, [5, 6, 8, 1, 0, 2])).result(60.0)
    source.wait_all(RankDone)
    # Every frame that was applied had its sum checked where it is now.
    target.wait_all(RankDone)
    for ranks in (prefill.kv, decode.kv):
        ranks.give(CloseTransfer(transfer=transfer, generation=1))
        ranks.check()
    layout, kv = decode.kv.offer.layout, decode.kv.offer
    copies = max(layout.tp // layout.kv_heads, 1)
    size = kv.parts * layout.layers * layout.kv_heads * copies * TOKENS * kv.head_dim * decode.dtype.itemsize
    assert size * BLOCK_SIZE == decode.block_bytes * copies * TOKENS
    wait_until(lambda: decode.kv is not None and decode.kv.moved().bytes_in == size)


def test_threads_as_ranks(model: Path) -> None:
    before = set(threading.enumerate())
    with (
        launched(options(model, tensor_parallel_size=2), "prefill-0", start_peers=SeatedThreads) as prefill,
        launched(options(model, pipeline_parallel_size=2), "decode-0", start_peers=SeatedThreads) as decode,
    ):
        assert prefill.kv is not None and decode.kv is not None
        assert prefill.kv.offer.model == decode.kv.offer.model
        move(prefill, decode)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("slipstream-kv")]


def test_processes_as_ranks_and_one_that_is_killed(model: Path) -> None:
    with (
        launched(options(model), "prefill-0") as prefill,
        launched(options(model, tensor_parallel_size=2), "decode-0") as decode,
    ):
        assert decode.kv is not None
        assert [[end.kind for end in ends] for ends in decode.kv.ends] == [["shm", "tcp"]] * 2
        move(prefill, decode)
        [process] = [
            each for each in psutil.Process().children() if any("rank_main" in word for word in each.cmdline())
        ]
        process.kill()

        def fails() -> bool:
            try:
                decode.check()
            except EngineError:
                return True
            return False

        wait_until(fails)


@pytest.mark.parametrize(
    ("changes", "kv", "field"),
    [
        ({"sequence_parallel_size": 2}, {}, "sequence_parallel_size"),
        ({"deterministic": True}, {"wire_dtype": "fp8"}, "kv_transfer_dtype"),
        ({}, {"kinds": ("pigeon",)}, "kv_address"),
        ({}, {"kinds": ()}, "kv_address"),
        ({}, {"address": "0.0.0.0"}, "kv_address"),
        ({}, {"across_hosts": True}, "kv_address"),
        ({}, {"address": "192.0.2.1", "across_hosts": True}, "kv_address"),
    ],
)
def test_what_cannot_be_is_refused(model: Path, changes: dict[str, object], kv: dict[str, object], field: str) -> None:
    launch = partial(launch_engine, options(model, **changes), clock=monotonic_clock, kv=settings("decode-0", **kv))
    with pytest.raises(ConfigError) as found:
        launch()
    assert found.value.field == field
