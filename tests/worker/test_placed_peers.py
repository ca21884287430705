"""Ranks that somebody else starts: who is missing, late, lost or refused is named, and nothing waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from slipstream.comm.errors import GroupClosed, HandshakeRefused
from slipstream.comm.groups import ALONE
from slipstream.comm.handshake import Identity
from slipstream.comm.step_endpoint import StepEndpoint, connect_rank
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.worker import bus_peers
from slipstream.runtime.worker.placed_peers import PlacedPeers, any_port
from slipstream.runtime.worker.rank import RankSetup
from slipstream.runtime.worker.rank_order import RankOrder, Seat
from slipstream.sdk.errors import EngineError

PATIENCE_S = 20.0
LATE_S = 40.0
IDENTITY = Identity(replica="chat/1", secret=b"a secret of the cluster")
HOST = "127.0.0.2"
SEAT = Seat(rank=0, address=HOST, ranks_on_host=1)


def setup(**degrees: int) -> RankSetup:
    return RankSetup(
        model="/nowhere",
        tokenizer="/nowhere",
        dtype="float32",
        device="cpu",
        quantization="none",
        deterministic=False,
        num_threads=1,
        num_blocks=8,
        block_size=16,
        max_slots=4,
        max_length=64,
        eos_token_ids=(),
        tp=degrees.get("tp", 1),
        pp=degrees.get("pp", 1),
    )


@contextmanager
def meeting(*, start_timeout_s: float, **degrees: int) -> Iterator[tuple[RankOrder, Future[PlacedPeers]]]:
    """Have a driver wait for its ranks; yield what it tells them, and what becomes of it."""
    said: Future[str] = Future()
    with ThreadPoolExecutor(max_workers=1) as threads:
        waiting = threads.submit(
            PlacedPeers,
            setup(**degrees),
            identity=IDENTITY,
            seat=SEAT,
            announce=said.set_result,
            start_timeout_s=start_timeout_s,
            comm_timeout_s=1.0,
        )
        yield RankOrder.from_json(said.result(PATIENCE_S)), waiting


def join(order: RankOrder, rank: int, *, identity: Identity = IDENTITY) -> StepEndpoint:
    return connect_rank(order.bus, identity, rank=rank, timeout_s=PATIENCE_S, clock=monotonic_clock)


def test_what_is_announced_is_at_the_nodes_own_address() -> None:
    with meeting(start_timeout_s=0.5, tp=2) as (order, waiting):
        host, _, port = order.bus.rpartition(":")
        assert (host, order.rendezvous_host) == (HOST, HOST)
        assert int(port) and order.rendezvous_port
        assert order.replica == "chat/1" and order.setup == setup(tp=2)
        with pytest.raises(EngineError):
            waiting.result(PATIENCE_S)
    assert any_port("fe80::1") == "[fe80::1]:0"


def test_ranks_that_never_come_are_named_and_so_is_who_was_refused() -> None:
    with meeting(start_timeout_s=1.0, tp=2, pp=2) as (order, waiting):
        present = join(order, 2)
        stranger = Identity(replica="chat/1", secret=b"another secret altogether")
        with pytest.raises(HandshakeRefused, match="secret"):
            join(order, 1, identity=stranger)
        with pytest.raises(EngineError, match=r"rank 1, 3 did not connect within 1 s; refused: .*secret"):
            waiting.result(PATIENCE_S)
        present.close()


def fails(endpoint: StepEndpoint) -> None:
    seq, _ = endpoint.next_step(PATIENCE_S)
    endpoint.send_failure(seq, "CheckpointError: the file is cut short")


def leaves(endpoint: StepEndpoint) -> None:
    endpoint.next_step(PATIENCE_S)
    endpoint.close("killed")


@pytest.mark.parametrize(
    ("strike", "said"),
    [
        (fails, r"^rank 1 could not get ready: CheckpointError: the file is cut short$"),
        (leaves, r"rank 1 closed its end: .*killed"),
    ],
    ids=["fails", "leaves"],
)
def test_a_rank_that_fails_while_others_wait_for_it_is_named_at_once(
    strike: Callable[[StepEndpoint], None], said: str
) -> None:
    with meeting(start_timeout_s=LATE_S, tp=2) as (order, waiting):
        endpoint = join(order, 1)
        strike(endpoint)
        with pytest.raises(EngineError, match=said):
            waiting.result(PATIENCE_S)
        endpoint.close()


def test_who_is_not_ready_by_the_deadline_is_named_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_peers, "join_groups", lambda *_, **__: ALONE)
    with meeting(start_timeout_s=3.0, tp=3) as (order, waiting), ThreadPoolExecutor(max_workers=1) as threads:
        endpoints = [join(order, rank) for rank in (1, 2)]
        peers = waiting.result(PATIENCE_S)
        for endpoint in endpoints:
            seq, _ = endpoint.next_step(PATIENCE_S)
            endpoint.send_result(seq, b"")
        peers.meet()
        seq, _ = endpoints[0].next_step(PATIENCE_S)
        endpoints[0].send_result(seq, b"")
        ready = threads.submit(peers.wait_ready)
        with pytest.raises(EngineError, match=r"^rank 2 is not ready after 3 s$"):
            ready.result(PATIENCE_S)
        peers.close()
        with pytest.raises(GroupClosed):
            endpoints[0].next_step(PATIENCE_S)
        for endpoint in endpoints:
            endpoint.close()


def test_a_rank_that_says_nothing_is_named_at_the_deadline() -> None:
    with meeting(start_timeout_s=1.0, tp=2) as (order, waiting):
        endpoint = join(order, 1)
        with pytest.raises(EngineError, match="rank 1 is not ready"):
            waiting.result(PATIENCE_S)
        endpoint.close()
