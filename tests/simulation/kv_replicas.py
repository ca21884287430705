"""Replicas of an imagined cluster that move KV: real machines, gates and block pools; ranks, steps and time made up.

A replica has one life at a time. What its driver tells its ranks, and they it, takes time and keeps its order; what it
tells other replicas may do neither. Every write and every read of KV is held against who owns the blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slipstream.comm.kv.frame import KvHeader
from slipstream.comm.kv.incoming import Drop, Incoming, Outcome, Write
from slipstream.comm.kv.outgoing import Outgoing
from slipstream.comm.kv.receiver import KvReceiver, Loan
from slipstream.comm.kv.sender import KvSender
from slipstream.comm.kv.transfer import (
    Close,
    Committed,
    Ended,
    OpenReceiving,
    OpenSending,
    Peer,
    PeerRank,
    Report,
    Reserve,
    Tell,
    TransferId,
    TransferLimits,
)
from slipstream.comm.kv.transport import PeerDown, Released
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.engine.kv_blocks import KvBlockPool, Owner
from slipstream.tests.comm.kv.kv_bytes import RankKv, truth
from slipstream.tests.fakes.memory_kv import MemoryNetwork, MemoryTransport

ROW_BYTES = 1
TICK_S = 0.5

LIMITS = TransferLimits(
    lease_s=4.0,
    heartbeat_s=1.0,
    resend_s=1.0,
    answer_timeout_s=3.0,
    max_wait_s=6.0,
    max_tries=3,
    max_parked_blocks=10,
    max_waiting=3,
    max_remembered=64,
)


class Wrong(AssertionError):
    """What must never happen."""


class World(Protocol):
    """What replicas live in."""

    now_s: float
    draw: random.Random
    network: MemoryNetwork
    prefix_share: float
    limits: TransferLimits

    def later(self, peer: Peer, after_s: float, act: Callable[[], None]) -> None:
        """Do something in a life, if it lasts until then."""
        ...

    def tell(self, sender: Peer, tell: Tell) -> None:
        """Carry a message."""
        ...

    def ended(self, life: Peer, ended: Ended) -> None:
        """Hear that a transfer is over at one end."""
        ...


class Pool:
    """A life's blocks: sequences and transfers own them under numbers of this life."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = KvBlockPool(num_blocks, enable_prefix_caching=False)
        self._owners: dict[object, tuple[Owner, list[int]]] = {}
        self._next = 1

    def take(self, who: object, count: int) -> list[int] | None:
        owner = Owner(self._next)
        blocks = self.blocks.allocate(count, owner)
        if blocks is not None:
            self._next += 1
            self._owners[who] = (owner, blocks)
        return blocks

    def share(self, who: object, blocks: Sequence[int]) -> None:
        owner = Owner(self._next)
        self._next += 1
        self.blocks.share(blocks, owner)
        self._owners[who] = (owner, list(blocks))

    def release(self, who: object) -> None:
        owner, blocks = self._owners.pop(who)
        self.blocks.release(blocks, owner)

    def owns(self, who: object, block: int) -> bool:
        held = self._owners.get(who)
        return held is not None and held[0] in self.blocks.owners(block)

    @property
    def free(self) -> int:
        return self.blocks.available


class WatchedGate:
    """The gate of a rank; whoever writes holds the blocks from the beginning of a write to its end."""

    def __init__(self, incoming: Incoming, pool: Pool, size: int) -> None:
        self._incoming = incoming
        self._pool = pool
        self._size = size

    def admit(self, header: KvHeader, peer: PeerRank) -> Write | Drop:
        answer = self._incoming.admit(header, peer)
        if isinstance(answer, Write):
            self._watch(answer)
        return answer

    def finish(self, write: Write, outcome: Outcome) -> None:
        self._watch(write)
        self._incoming.finish(write, outcome)

    def _watch(self, write: Write) -> None:
        frame = write.frame
        first, last = frame.first_token // self._size, (frame.first_token + frame.num_tokens - 1) // self._size
        for block in write.blocks[first : last + 1]:
            if not self._pool.owns(frame.transfer, block):
                raise Wrong(f"a block of {frame.transfer} was reused under its writer")


@lru_cache(maxsize=64)
def contents(layout: KvLayout, transfer: TransferId, tokens: int) -> NDArray[np.uint8]:
    """Return what a transfer's KV is."""
    return truth(layout, tokens, ROW_BYTES, transfer.incarnation << 20 | transfer.number)


_MOMENT_S = 1e-9
"""Between two things that are done in order: more than what times lose in adding them up."""


class Life:
    """What both kinds of replicas have."""

    def __init__(self, world: World, peer: Peer, layout: KvLayout, num_blocks: int) -> None:
        self.world = world
        self.peer = peer
        self.layout = layout
        self.pool = Pool(num_blocks)
        self.num_blocks = num_blocks
        self.kv = [RankKv(layout, rank, num_blocks=num_blocks, row_bytes=ROW_BYTES) for rank in range(layout.ranks)]
        self.transports: list[MemoryTransport] = []
        self._inner_s = 0.0
        world.later(peer, TICK_S, self._tick)

    def inside(self, act: Callable[[], None]) -> None:
        """Do something at another process of the replica, in order."""
        self._inner_s = max(self._inner_s + _MOMENT_S, self.world.now_s + self.world.draw.random() * 0.05)
        self.world.later(self.peer, self._inner_s - self.world.now_s, act)

    def die(self, *, seen: bool) -> None:
        """End all of its processes at once; unseen by others where its host is gone."""
        for transport in self.transports:
            transport.end(seen=seen)

    def act(self) -> None:
        raise NotImplementedError

    def tick(self) -> None:
        raise NotImplementedError

    def _tick(self) -> None:
        self.tick()
        self.act()
        self.world.later(self.peer, TICK_S, self._tick)


@dataclass(slots=True)
class Prompt:
    """A request at the prefill replica."""

    tokens: int
    blocks: list[int]
    what: NDArray[np.uint8]
    computed: int = 0
    running: bool = True
    unfinished: set[tuple[int, int]] = field(default_factory=set)


class Prefill(Life):
    """A replica that computes prompts and sends them."""

    def __init__(self, world: World, peer: Peer, layout: KvLayout, num_blocks: int, target: KvLayout) -> None:
        super().__init__(world, peer, layout, num_blocks)
        self.target = target
        self.sender = KvSender(peer, ranks=layout.ranks, release=self._release, limits=world.limits)
        self.outgoing = [
            Outgoing(
                rank=rank, layout=layout, entry_bytes=2 * ROW_BYTES, max_frame_bytes=world.draw.choice([6, 24, 100])
            )
            for rank in range(layout.ranks)
        ]
        self.prompts: dict[TransferId, Prompt] = {}
        for rank, kv in enumerate(self.kv):
            nothing = Incoming(
                rank=rank, incarnation=0, layout=layout, num_blocks=num_blocks, entry_bytes=2 * ROW_BYTES
            )
            transport = MemoryTransport(
                world.network, PeerRank(peer, rank), WatchedGate(nothing, self.pool, 1), max_queued_bytes=150
            )
            transport.register(kv.memory)
            self.transports.append(transport)

    def begin(self, to: str, tokens: int, timeout_s: float) -> TransferId | None:
        """Start a request; None when there is no room for it."""
        count = -(-tokens // self.layout.block_size)
        blocks = self.pool.take(("new", tokens), count)
        if blocks is None:
            return None
        transfer = self.sender.begin(
            self.world.now_s, to, tokens=tokens, blocks=count, timeout_s=timeout_s, hint=b"a prompt"
        )
        assert transfer is not None
        self.pool.share(transfer, blocks)
        self.pool.share(("prompt", transfer), blocks)
        self.pool.release(("new", tokens))
        self.prompts[transfer] = Prompt(tokens, blocks, contents(self.layout, transfer, tokens))
        for outgoing in self.outgoing:
            outgoing.track(transfer)
            outgoing.add_blocks(transfer, blocks)
        self.act()
        self._chunk(transfer)
        return transfer

    def leave(self, transfer: TransferId) -> None:
        """Let the request go, whatever its transfer does."""
        prompt = self.prompts[transfer]
        if prompt.running:
            prompt.running = False
            self.pool.release(("prompt", transfer))

    def _chunk(self, transfer: TransferId) -> None:
        """Compute a chunk, layer by layer."""
        prompt = self.prompts[transfer]
        if not prompt.running:
            return
        first = prompt.computed
        stop = min(prompt.tokens, first + self.world.draw.randint(1, 8))
        prompt.computed = stop
        at_s = 0.0
        for layer in range(self.layout.layers):
            at_s += self.world.draw.random() * 0.1
            self.world.later(self.peer, at_s, partial(self._layer, transfer, layer, range(first, stop)))

    def _layer(self, transfer: TransferId, layer: int, tokens: range) -> None:
        prompt = self.prompts[transfer]
        if not prompt.running:
            return
        for rank, kv in enumerate(self.kv):
            if layer in kv.layers:
                kv.write(layer, tokens, prompt.blocks, prompt.what)
                self.outgoing[rank].computed(transfer, layer, tokens.stop)
        self.pump()
        if layer == self.layout.layers - 1:
            if tokens.stop < prompt.tokens:
                self._chunk(transfer)
            else:
                self.sender.prompt_done(self.world.now_s, transfer, b"go on from here")
                self.leave(transfer)
                self.act()

    def tick(self) -> None:
        self.sender.tick(self.world.now_s)
        self.pump()

    def act(self) -> None:
        for action in self.sender.take_actions():
            match action:
                case Tell():
                    self.world.tell(self.peer, action)
                case OpenSending():
                    self.inside(partial(self._open, action))
                case Close(transfer=transfer, generation=generation):
                    self.inside(partial(self._close, transfer, generation))
                case Ended(transfer=transfer):
                    self.inside(partial(self._forget, transfer))
                    self.world.ended(self.peer, action)
                    self.leave(transfer)

    def pump(self) -> None:
        """Bring what ranks have to post to their transports, and back what became of it."""
        for outgoing, transport in zip(self.outgoing, self.transports, strict=True):
            while (post := outgoing.next_post()) is not None and transport.post(post):
                outgoing.posted()
                if not all(self.pool.owns(post.frame.transfer, block) for block in post.blocks):
                    raise Wrong(f"{post.frame.transfer} is posted from blocks that are not its own")
            for event in transport.poll(0.0):
                match event:
                    case Released(frame=frame, sent=sent):
                        outgoing.released(frame, sent=sent)
                    case PeerDown(peer=peer):
                        self.inside(partial(self._lost, peer.peer))
                    case _:
                        raise Wrong("something was written into a replica that only sends")
            self._say(outgoing.take_reports())

    def _open(self, action: OpenSending) -> None:
        for transport, outgoing in zip(self.transports, self.outgoing, strict=True):
            for rank in range(self.target.ranks):
                if PeerRank(action.to, rank) in self.world.network.ends:
                    transport.connect(PeerRank(action.to, rank))
            outgoing.open(action, self.target)
        self.pump()

    def _forget(self, transfer: TransferId) -> None:
        for outgoing in self.outgoing:
            outgoing.forget(transfer)

    def _close(self, transfer: TransferId, generation: int) -> None:
        for transport, outgoing in zip(self.transports, self.outgoing, strict=True):
            outgoing.close(transfer, generation)
            transport.cancel(transfer)
        self.pump()

    def _lost(self, peer: Peer) -> None:
        self.sender.peer_lost(self.world.now_s, peer)
        self.act()

    def _say(self, reports: Sequence[Report]) -> None:
        for report in reports:
            self.inside(partial(self._hear_rank, report))

    def _hear_rank(self, report: Report) -> None:
        self.sender.report(self.world.now_s, report)
        self.act()

    def _release(self, transfer: TransferId) -> None:
        self.pool.release(transfer)


class Decode(Life):
    """A replica that receives prompts and goes on with them."""

    def __init__(self, world: World, peer: Peer, layout: KvLayout, num_blocks: int, source: KvLayout) -> None:
        super().__init__(world, peer, layout, num_blocks)
        self.source = source
        self.receiver = KvReceiver(ranks=layout.ranks, lender=self, limits=world.limits)
        self.reserved: dict[TransferId, int] = {}
        self.first: dict[TransferId, int] = {}
        self.running: set[TransferId] = set()
        self.committed: set[TransferId] = set()
        self.incoming = [
            Incoming(
                rank=rank, incarnation=peer.incarnation, layout=layout, num_blocks=num_blocks, entry_bytes=2 * ROW_BYTES
            )
            for rank in range(layout.ranks)
        ]
        for rank, kv in enumerate(self.kv):
            gate = WatchedGate(self.incoming[rank], self.pool, layout.block_size)
            transport = MemoryTransport(world.network, PeerRank(peer, rank), gate)
            transport.register(kv.memory)
            self.transports.append(transport)

    def is_expected(self, reserve: Reserve) -> bool:
        return True

    def fits(self, reserve: Reserve) -> bool:
        return -(-reserve.tokens // self.layout.block_size) <= self.num_blocks

    def take(self, reserve: Reserve) -> Loan | None:
        blocks = self.pool.take(reserve.transfer, -(-reserve.tokens // self.layout.block_size))
        if blocks is None:
            return None
        # A prefix that is here already: whole blocks, and never the last token.
        first = 0
        if self.world.draw.random() < self.world.prefix_share:
            first = self.world.draw.randrange(reserve.tokens) // self.layout.block_size * self.layout.block_size
        what = contents(self.layout, reserve.transfer, reserve.tokens)
        for kv in self.kv:
            for layer in kv.layers:
                kv.write(layer, range(first), blocks, what)
        self.reserved[reserve.transfer], self.first[reserve.transfer] = reserve.tokens, first
        return Loan(blocks=tuple(blocks), first_token=first)

    def release(self, transfer: TransferId) -> None:
        self.pool.release(transfer)

    def tick(self) -> None:
        self.receiver.tick(self.world.now_s)
        self.pump()

    def act(self) -> None:
        for action in self.receiver.take_actions():
            match action:
                case Tell():
                    self.world.tell(self.peer, action)
                case OpenReceiving():
                    self.inside(partial(self._open, action))
                case Close(transfer=transfer, generation=generation):
                    self.inside(partial(self._close, transfer, generation))
                case Committed():
                    self._adopt(action)
                case Ended():
                    self.world.ended(self.peer, action)

    def pump(self) -> None:
        """Bring back what happened at the ranks."""
        for incoming, transport in zip(self.incoming, self.transports, strict=True):
            for event in transport.poll(0.0):
                if isinstance(event, PeerDown):
                    self.inside(partial(self._lost, event.peer.peer))
            for report in incoming.take_reports():
                self.inside(partial(self._hear_rank, report))

    def _open(self, action: OpenReceiving) -> None:
        for incoming in self.incoming:
            incoming.open(action, self.source)
        self.pump()

    def _close(self, transfer: TransferId, generation: int) -> None:
        for incoming in self.incoming:
            incoming.close(transfer, generation)
        self.pump()

    def _lost(self, peer: Peer) -> None:
        self.receiver.peer_lost(peer)
        self.act()

    def _hear_rank(self, report: Report) -> None:
        self.receiver.report(report)
        self.act()

    def _adopt(self, committed: Committed) -> None:
        transfer = committed.transfer
        if transfer in self.committed:
            raise Wrong(f"{transfer} was committed twice")
        self.committed.add(transfer)
        if committed.hand_off != b"go on from here":
            raise Wrong(f"{transfer} goes on from elsewhere")
        self._check(transfer, committed.blocks, "when it was committed")
        if self.world.draw.random() < 0.1:
            # The request is gone; nobody wants the KV.
            self.receiver.cancel(transfer)
            return
        self.pool.share(("request", transfer), committed.blocks)
        self.receiver.let_go(transfer)
        self.running.add(transfer)
        self.world.later(self.peer, self.world.draw.random() * 5.0, lambda: self._finish(transfer, committed.blocks))

    def _finish(self, transfer: TransferId, blocks: Sequence[int]) -> None:
        self._check(transfer, blocks, "until its request ended")
        self.running.discard(transfer)
        self.pool.release(("request", transfer))

    def _check(self, transfer: TransferId, blocks: Sequence[int], when: str) -> None:
        tokens = self.reserved[transfer]
        what = contents(self.layout, transfer, tokens)
        for rank, kv in enumerate(self.kv):
            if not kv.holds(range(tokens), blocks, what):
                raise Wrong(f"rank {rank} does not hold the KV of {transfer} {when}")
