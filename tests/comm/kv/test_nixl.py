"""KV by NIXL, against its agents as they are in one process. Its library is not needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from slipstream.comm.errors import CommMisuse, PeerLost
from slipstream.comm.kv import nixl
from slipstream.comm.kv.channel import StreamLimits
from slipstream.comm.kv.incoming import Outcome
from slipstream.comm.kv.nixl import Nixl
from slipstream.comm.kv.streams import StreamTransport
from slipstream.comm.kv.transfer import PeerRank
from slipstream.comm.kv.transport import PeerDown
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.comm.kv.kv_bytes import UNTOUCHED, truth
from slipstream.tests.comm.kv.kv_ends import SECRET, staged
from slipstream.tests.contracts.kv_transport import PATIENCE_S, ROW_BYTES, Bed, End, KvTransportContract, end_of
from slipstream.tests.fakes.nixl_agents import FakeAgent, FakeAgents

LAYOUT = KvLayout(layers=2, kv_heads=2, block_size=4)


def give(stack: ExitStack, end: End, agent: FakeAgent | None, limits: StreamLimits) -> StreamTransport:
    transport = StreamTransport(
        Nixl(agent),
        end.offer,
        end.gate,
        address="127.0.0.1:0",
        secret=SECRET,
        clock=monotonic_clock,
        limits=limits,
    )
    end.transport = transport
    stack.callback(transport.close)
    transport.register(end.kv.memory)
    return transport


def join(stack: ExitStack, agents: FakeAgents, source: End, target: End, limits: StreamLimits) -> PeerRank:
    listening, sending = (give(stack, end, agents.agent(str(end.me)), limits) for end in (target, source))
    return sending.connect(listening.address, target.me.peer.replica, timeout_s=PATIENCE_S)


class TestNixl(KvTransportContract):
    def join(self, stack: ExitStack, source: End, target: End, *, max_queued_bytes: int) -> PeerRank:
        return join(stack, FakeAgents(), source, target, StreamLimits(max_queued_bytes=max_queued_bytes))


@contextmanager
def bed(agents: FakeAgents, *, frame_timeout_s: float = PATIENCE_S) -> Iterator[Bed]:
    with ExitStack() as stack:
        source, target = end_of("prefill-0", LAYOUT, 0), end_of("decode-0", LAYOUT, 0)
        limits = StreamLimits(frame_timeout_s=frame_timeout_s, streams=1)
        yield Bed(source, target, join(stack, agents, source, target, limits))


def agent_of(agents: FakeAgents, end: End) -> FakeAgent:
    return next(each for each in agents.by_metadata.values() if each.name == str(end.me))


def test_a_read_that_does_not_end_can_write_no_more() -> None:
    """Its time is over: the memory is taken back from the adapter before the gate hears of the end."""
    agents = FakeAgents(stuck=True)
    with bed(agents, frame_timeout_s=0.2) as moved:
        moved.post_all(moved.open(1, range(4), [0], [1])[:1])
        moved.wait(lambda: bool(moved.target.written()), "the write ends")
        assert moved.target.written()[0].outcome is Outcome.LOST
        assert not agent_of(agents, moved.target).regions
        moved.wait(lambda: any(isinstance(each, PeerDown) for each in moved.source.events), "the sender hears of it")
        assert (moved.target.kv.array == UNTOUCHED).all()


def test_what_is_not_registered_is_not_read() -> None:
    agents = FakeAgents()
    with bed(agents) as moved:
        agent_of(agents, moved.source).regions.clear()
        moved.post_all(moved.open(1, range(4), [0], [1])[:1])
        moved.wait(lambda: bool(moved.target.written()), "the write ends")
        assert moved.target.written()[0].outcome is Outcome.LOST


def test_peers_are_forgotten_with_their_connections() -> None:
    agents = FakeAgents()
    with bed(agents) as moved:
        target = agent_of(agents, moved.target)
        assert target.peers == [str(moved.source.me)]
        moved.source.the.close()
        moved.wait(lambda: not target.peers, "the peer is forgotten")
        moved.target.the.close()
        assert not target.regions


def test_a_peer_that_nixl_does_not_know_is_not_let_in() -> None:
    with ExitStack() as stack:
        source, target = end_of("prefill-0", LAYOUT, 0), end_of("decode-0", LAYOUT, 0)
        listening = give(stack, target, FakeAgents().agent("a"), StreamLimits())
        sending = give(stack, source, FakeAgents().agent("b"), StreamLimits())
        with pytest.raises(PeerLost):
            sending.connect(listening.address, "decode-0", timeout_s=PATIENCE_S)


def test_it_needs_its_library_and_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "nixl_agent", None)
    with pytest.raises(CommMisuse, match="KV by NIXL needs its library"):
        Nixl()
    with pytest.raises(CommMisuse, match="needs a cache in the host's memory"):
        Nixl(FakeAgents().agent("a")).register(staged(end_of("decode-0", LAYOUT, 0)))


@pytest.mark.skipif(not nixl.available(), reason="NIXL is not installed")
def test_the_library_itself(seed: int) -> None:
    with ExitStack() as stack:
        source, target = end_of("prefill-0", LAYOUT, 0), end_of("decode-0", LAYOUT, 0)
        listening, sending = (give(stack, end, None, StreamLimits()) for end in (target, source))
        moved = Bed(source, target, sending.connect(listening.address, "decode-0", timeout_s=PATIENCE_S))
        what = truth(LAYOUT, 8, ROW_BYTES, seed)
        for layer in range(2):
            source.kv.write(layer, range(8), [3, 5], what)
        posts = moved.open(1, range(8), [3, 5], [6, 1])
        moved.post_all(posts)
        moved.wait(lambda: len(target.written()) == len(posts), "all frames are written")
        assert target.kv.holds(range(8), [6, 1], what)
