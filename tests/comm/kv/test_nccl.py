"""KV by communicators of two ranks: with groups of threads in place of NCCL's, and through a store with gloo's."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from slipstream.comm.collectives import Collectives
from slipstream.comm.errors import BadFrame, CommMisuse
from slipstream.comm.kv.channel import StreamLimits
from slipstream.comm.kv.incoming import Outcome
from slipstream.comm.kv.nccl import GroupPairs, Nccl, Pairs
from slipstream.comm.kv.staging import HostCopier, OnDevice, StagedStore, StagingLimits
from slipstream.comm.kv.streams import StreamTransport
from slipstream.comm.kv.tensor_memory import store_of
from slipstream.comm.kv.transfer import PeerRank
from slipstream.comm.kv.transport import PeerDown
from slipstream.comm.local_groups import local_group
from slipstream.comm.torch_groups import GroupSettings
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.comm.kv.kv_bytes import UNTOUCHED, truth
from slipstream.tests.comm.kv.kv_ends import SECRET
from slipstream.tests.contracts.kv_transport import PATIENCE_S, ROW_BYTES, Bed, End, KvTransportContract, end_of

LAYOUT = KvLayout(layers=2, kv_heads=2, block_size=4)


class LocalPairs:
    """Pairs of threads of this process."""

    def __init__(self, timeout_s: float = PATIENCE_S) -> None:
        self._timeout_s = timeout_s
        self._waiting: dict[bytes, queue.SimpleQueue[Collectives]] = {}
        self.opened: list[Collectives] = []

    def invite(self) -> tuple[bytes, Callable[[], Collectives]]:
        sender, receiver = local_group(2, timeout_s=self._timeout_s)
        words = b"%d" % len(self._waiting)
        self._waiting[words] = queue.SimpleQueue()
        self._waiting[words].put(sender)
        self.opened += [sender, receiver]
        return words, lambda: receiver

    def join(self, invitation: bytes) -> Collectives:
        return self._waiting[invitation].get(timeout=PATIENCE_S)


def give(stack: ExitStack, end: End, pairs: Pairs, limits: StreamLimits) -> StreamTransport:
    end.offer = replace(end.offer, checksum="none")
    transport = StreamTransport(
        Nccl(pairs),
        end.offer,
        end.gate,
        address="127.0.0.1:0",
        secret=SECRET,
        clock=monotonic_clock,
        limits=limits,
    )
    end.transport = transport
    stack.callback(transport.close)
    layers = [torch.from_numpy(layer) for layer in end.kv.array]
    copier = OnDevice(HostCopier(), torch.device("cpu"))
    transport.register(StagedStore(end.kv.memory.shape, layers, copier, StagingLimits(buffers=4)))
    return transport


def join(stack: ExitStack, pairs: Pairs, source: End, target: End, limits: StreamLimits) -> PeerRank:
    listening, sending = (give(stack, end, pairs, limits) for end in (target, source))
    return sending.connect(listening.address, target.me.peer.replica, timeout_s=PATIENCE_S)


class TestPairs(KvTransportContract):
    def join(self, stack: ExitStack, source: End, target: End, *, max_queued_bytes: int) -> PeerRank:
        return join(stack, LocalPairs(), source, target, StreamLimits(max_queued_bytes=max_queued_bytes))


@contextmanager
def bed(pairs: Pairs) -> Iterator[Bed]:
    with ExitStack() as stack:
        source, target = end_of("prefill-0", LAYOUT, 0), end_of("decode-0", LAYOUT, 0)
        yield Bed(source, target, join(stack, pairs, source, target, StreamLimits(streams=1)))


def test_pairs_that_meet_at_a_store(seed: int) -> None:
    pairs = GroupPairs(GroupSettings(clock=monotonic_clock, host_address="127.0.0.1"))
    with bed(pairs) as moved:
        what = truth(LAYOUT, 8, ROW_BYTES, seed)
        for layer in range(2):
            moved.source.kv.write(layer, range(8), [3, 5], what)
        posts = moved.open(1, range(8), [3, 5], [6, 1])
        moved.post_all(posts)
        moved.wait(lambda: len(moved.target.written()) == len(posts), "all frames are written")
        assert moved.target.kv.holds(range(8), [6, 1], what)


def test_class_16_a_communicator_that_hangs_ends_with_its_connection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame was let in, and one side never moves it: its time ends it, and the cache was not touched."""
    pairs = LocalPairs(timeout_s=0.2)
    with bed(pairs) as moved:
        # The sender's end takes what it sends, and nothing comes out.
        monkeypatch.setattr(pairs.opened[0], "send", lambda x, to: _Done(x))
        moved.post_all(moved.open(1, range(4), [0], [1])[:1])
        moved.wait(lambda: bool(moved.target.written()), "the write ends")
        assert moved.target.written()[0].outcome is Outcome.LOST
        moved.wait(lambda: any(isinstance(each, PeerDown) for each in moved.source.look()), "the sender hears of it")
        assert (moved.target.kv.array == UNTOUCHED).all()


class _Done:
    def __init__(self, x: torch.Tensor) -> None:
        self._x = x

    def wait(self, timeout_s: float | None = None) -> torch.Tensor:
        return self._x

    def done(self) -> bool:
        return True


@pytest.mark.parametrize("words", [b"", b"[]", b'["127.0.0.1", "5", "x"]', b"[" * 900, b'[1, 5, "x"]'])
def test_an_invitation_is_not_believed(words: bytes) -> None:
    pairs = GroupPairs(GroupSettings(clock=monotonic_clock, host_address="127.0.0.1"))
    with pytest.raises(BadFrame, match="an invitation to a communicator that is none"):
        pairs.join(words)


def test_what_cannot_go_from_device_to_device_is_refused() -> None:
    end = end_of("decode-0", LAYOUT, 0)
    with pytest.raises(CommMisuse, match="goes from GPU to GPU"):
        Nccl(LocalPairs()).register(end.kv.memory)
    store = StagedStore(
        end.kv.memory.shape,
        [torch.from_numpy(layer) for layer in end.kv.array],
        OnDevice(HostCopier(), torch.device("cpu")),
    )
    passage = store.outward(0, range(2), [0, 4], [1])
    with pytest.raises(CommMisuse, match="has no checksums"):
        list(passage.runs)
    passage.end()
    assert isinstance(store_of([torch.zeros(2, 5, 3, 4, 8)], first_layer=0, heads=range(3)), type(end.kv.memory))
