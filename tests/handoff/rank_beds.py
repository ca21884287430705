"""Replicas of ranks in this process that move real caches of known contents, ordered about by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from slipstream.comm.kv.transfer import (
    Drained,
    OpenReceiving,
    OpenSending,
    Peer,
    RankDone,
    RankOpened,
    Report,
    TransferId,
)
from slipstream.comm.kv.transport import PeerDown
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.handoff.rank_kv import RankKv
from slipstream.runtime.handoff.rank_orders import (
    CloseTransfer,
    ForgetTransfer,
    KvTarget,
    OpenReceive,
    OpenSend,
)
from slipstream.runtime.handoff.ranks import KvRanks, LocalKvRanks
from slipstream.runtime.handoff.settings import KvLimits, KvSeat, KvShare
from slipstream.tests.comm.kv.kv_bytes import UNTOUCHED, truth

SECRET = b"a secret of the cluster"
PATIENCE_S = 30.0
NUM_BLOCKS = 24
ROW_BYTES = 8
LIMITS = KvLimits(serial_below_tokens=0, max_frame_bytes=300)


def share_of(
    replica: str, incarnation: int, kinds: tuple[str, ...], limits: KvLimits = LIMITS, *, wire_dtype: str = "auto"
) -> KvShare:
    return KvShare(
        replica=replica,
        incarnation=incarnation,
        model="m",
        kinds=kinds,
        across_hosts=False,
        wire_dtype=wire_dtype,
        limits=limits,
    )


@dataclass
class Cache:
    """A rank's cache; layers and heads are the model's."""

    layout: KvLayout
    rank: int
    layers: list[torch.Tensor]

    @classmethod
    def blank(cls, layout: KvLayout, rank: int, *, row_bytes: int = ROW_BYTES, parts: int = 2) -> Cache:
        shape = (parts, NUM_BLOCKS, len(layout.heads_of(rank)), layout.block_size, row_bytes)
        own = layout.layers_of(rank)
        return cls(layout, rank, [torch.full(shape, UNTOUCHED, dtype=torch.uint8) for _ in own])

    def at(self, layer: int, tokens: range, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """Return a copy of what the blocks of some tokens hold; a layer as the rank counts.

        Shapes: [parts, heads, tokens, row_bytes]
        """
        positions = np.arange(tokens.start, tokens.stop)
        block = np.asarray(blocks)[positions // self.layout.block_size]
        found: NDArray[np.uint8] = self.layers[layer].numpy()[:, block, :, positions % self.layout.block_size]
        return found.transpose(1, 2, 0, 3)

    def write(self, layer: int, tokens: range, blocks: Sequence[int], what: NDArray[np.uint8]) -> None:
        heads = self.layout.heads_of(self.rank)
        size = self.layout.block_size
        for position in tokens:
            values = what[self.layout.layers_of(self.rank).start + layer, :, heads.start : heads.stop, position]
            self.layers[layer].numpy()[:, blocks[position // size], :, position % size] = values

    def holds(self, tokens: range, blocks: Sequence[int], what: NDArray[np.uint8]) -> bool:
        heads, own = self.layout.heads_of(self.rank), self.layout.layers_of(self.rank)
        return all(
            np.array_equal(
                self.at(layer, tokens, blocks),
                what[own.start + layer, :, heads.start : heads.stop, tokens.start : tokens.stop],
            )
            for layer in range(len(own))
        )


class Replica:
    """All ranks of one, and what they have said so far."""

    def __init__(
        self,
        replica: str,
        layout: KvLayout,
        *,
        incarnation: int = 3,
        kinds: tuple[str, ...] = ("tcp",),
        limits: KvLimits = LIMITS,
        join: Callable[[list[RankKv]], KvRanks] = LocalKvRanks,
        row_bytes: int = ROW_BYTES,
        parts: int = 2,
        dtype: torch.dtype = torch.uint8,
        wire_dtype: str = "auto",
    ) -> None:
        self.me = Peer(replica, incarnation)
        self.layout = layout
        self.parts = parts
        self.caches = [Cache.blank(layout, rank, row_bytes=row_bytes, parts=parts) for rank in range(layout.ranks)]
        self.kv = [
            RankKv(
                share_of(replica, incarnation, kinds, limits, wire_dtype=wire_dtype),
                KvSeat(address="127.0.0.1", secret=SECRET),
                rank=rank,
                layout=layout,
                cache=[layer.view(dtype) for layer in cache.layers],
                clock=monotonic_clock,
            )
            for rank, cache in enumerate(self.caches)
        ]
        self.ranks = join(self.kv)
        self.said: list[Report | PeerDown] = []
        self._changed = threading.Condition()
        self.ranks.listen(self._hear)

    def _hear(self, rank: int, word: Report | PeerDown) -> None:
        with self._changed:
            self.said.append(word)
            self._changed.notify_all()

    def wait(self, check: Callable[[list[Report | PeerDown]], bool]) -> None:
        """Wait until what was said is as it should. Raises: AssertionError when it does not become so"""
        with self._changed:
            assert self._changed.wait_for(lambda: check(self.said), PATIENCE_S), f"only this was said: {self.said}"

    def wait_all(self, kind: type[RankOpened] | type[RankDone] | type[Drained], transfer: TransferId) -> None:
        """Wait until all ranks have reported something of a transfer."""
        ranks = set(range(self.layout.ranks))
        self.wait(
            lambda said: {word.rank for word in said if isinstance(word, kind) and word.transfer == transfer} == ranks
        )

    def as_target(self) -> KvTarget:
        return KvTarget(layout=self.layout, ends=self.ranks.ends)

    def transfer(self, number: int) -> TransferId:
        return TransferId(self.me.replica, self.me.incarnation, number)

    def compute(self, number: int, tokens: range, blocks: list[int], what: NDArray[np.uint8]) -> None:
        """Be a step on all ranks, layer by layer."""
        for kv, cache in zip(self.kv, self.caches, strict=True):
            kv.begin_step([number], [blocks[: -(-tokens.stop // self.layout.block_size)]], [tokens.stop])
            for layer in range(len(cache.layers)):
                cache.write(layer, tokens, blocks, what)
                kv.layer_done(layer)
            kv.end_step()

    def open_send(self, number: int, to: Replica, tokens: range, blocks: Sequence[int], *, generation: int = 1) -> None:
        self.ranks.give(self.send_order(number, to, tokens, blocks, generation=generation))

    def send_order(
        self, number: int, to: Replica, tokens: range, blocks: Sequence[int], *, generation: int = 1
    ) -> OpenSend:
        grant = OpenSending(
            transfer=self.transfer(number), generation=generation, to=to.me, tokens=tokens, blocks=tuple(blocks)
        )
        return OpenSend(grant=grant, target=to.as_target())

    def open_receive(
        self, transfer: TransferId, source: KvLayout, tokens: range, blocks: Sequence[int], *, generation: int = 1
    ) -> None:
        self.ranks.give(self.receive_order(transfer, source, tokens, blocks, generation=generation))
        self.wait(
            lambda said: (
                sum(
                    isinstance(word, RankOpened) and (word.transfer, word.generation) == (transfer, generation)
                    for word in said
                )
                == self.layout.ranks
            )
        )

    def receive_order(
        self, transfer: TransferId, source: KvLayout, tokens: range, blocks: Sequence[int], *, generation: int = 1
    ) -> OpenReceive:
        grant = OpenReceiving(transfer=transfer, generation=generation, tokens=tokens, blocks=tuple(blocks))
        return OpenReceive(grant=grant, source=source)

    def shut(self, transfer: TransferId, *, generation: int = 1) -> None:
        """Close a transfer and wait until nobody touches its blocks."""
        self.ranks.give(CloseTransfer(transfer=transfer, generation=generation))
        self.wait(
            lambda said: (
                sum(
                    isinstance(word, Drained) and (word.transfer, word.generation) == (transfer, generation)
                    for word in said
                )
                == self.layout.ranks
            )
        )

    def forget(self, number: int) -> None:
        self.ranks.give(ForgetTransfer(transfer=self.transfer(number)))


@contextmanager
def pair(
    source: KvLayout | None = None,
    target: KvLayout | None = None,
    *,
    kinds: tuple[str, ...] = ("tcp",),
    limits: KvLimits = LIMITS,
    parts: int = 2,
) -> Iterator[tuple[Replica, Replica]]:
    """Yield a replica that sends and one that receives."""
    plain = KvLayout(layers=3, kv_heads=4, block_size=4)
    with ExitStack() as stack:
        prefill, decode = (
            Replica(name, layout or plain, kinds=kinds, limits=limits, parts=parts)
            for name, layout in (("prefill-0", source), ("decode-0", target))
        )
        for replica in (prefill, decode):
            stack.callback(replica.ranks.close)
        yield prefill, decode


def layout_with(**what: int) -> KvLayout:
    return replace(KvLayout(layers=3, kv_heads=4, block_size=4), **what)


def prompt(layout: KvLayout, tokens: int, seed: int, *, parts: int = 2) -> NDArray[np.uint8]:
    return truth(layout, tokens, ROW_BYTES, seed, parts=parts)


def wait_until(check: Callable[[], bool]) -> None:
    """Look again until it is so. Raises: AssertionError when it does not become so"""
    give_up_s, never = monotonic_clock() + PATIENCE_S, threading.Event()
    while not check():
        assert monotonic_clock() < give_up_s, "this does not become so"
        never.wait(0.002)
