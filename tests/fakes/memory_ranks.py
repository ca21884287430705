"""Ranks of replicas in one process, over the oracle executor: KV is copied in one piece when a prompt is computed.

A ``MemoryNet`` can hold everything back, so that a test can look at a transfer that is on its way, or lose a replica.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from slipstream.comm.kv.layout import KvOffer
from slipstream.comm.kv.transfer import Drained, OpenReceiving, Peer, PeerRank, RankDone, RankOpened, TransferId
from slipstream.comm.kv.transport import PeerDown
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.engine.engine import Executor, StepHandle
from slipstream.runtime.handoff.rank_orders import (
    CloseTransfer,
    ForgetTransfer,
    KvOrder,
    OpenReceive,
    OpenSend,
    RankEnd,
)
from slipstream.runtime.handoff.ranks import KvMoved, RankListener
from slipstream.runtime.messages import StepPlan
from slipstream.tests.fakes.oracle_executor import OracleExecutor

TOKEN_BYTES = 8


@dataclass
class MemoryNet:
    """The ranks by replica, and whether KV passes between them."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    ranks: dict[str, MemoryRanks] = field(default_factory=dict)
    flows: bool = True

    def hold(self) -> None:
        """Let nothing pass."""
        with self.lock:
            self.flows = False

    def let_flow(self) -> None:
        """Let everything pass, what was held back first."""
        with self.lock:
            self.flows = True
            for ranks in self.ranks.values():
                ranks.move_all()

    def lose(self, replica: str) -> None:
        """Break all connections of a replica, as all others see it."""
        with self.lock:
            lost = self.ranks[replica]
            for ranks in self.ranks.values():
                if ranks is not lost:
                    ranks.say(PeerDown(PeerRank(lost.peer, 0), "the test wants it"))


class MemoryRanks:
    """The one rank of a replica; a ``KvRanks``."""

    def __init__(self, net: MemoryNet, peer: Peer, oracle: OracleExecutor, *, model: str = "oracle") -> None:
        self.peer = peer
        self.closed = False
        self._net = net
        self._oracle = oracle
        self._listener: RankListener | None = None
        self._layout = KvLayout(layers=1, kv_heads=1, block_size=oracle.block_size)
        self._model = model
        self._out: dict[TransferId, OpenSend] = {}
        self._in: dict[TransferId, OpenReceiving] = {}
        self._computed: dict[int, tuple[list[int], int]] = {}
        self._sent = self._came = 0
        self._moved: dict[TransferId, KvMoved] = {}
        net.ranks[peer.replica] = self

    @property
    def offer(self) -> KvOffer:
        return KvOffer(
            replica=self.peer.replica,
            incarnation=self.peer.incarnation,
            rank=0,
            layout=self._layout,
            model=self._model,
            dtype="int64",
            head_dim=1,
        )

    @property
    def ends(self) -> tuple[tuple[RankEnd, ...], ...]:
        return ((RankEnd("tcp", self.peer.replica),),)

    def listen(self, on_report: RankListener) -> None:
        self._listener = on_report

    def give(self, order: KvOrder) -> None:
        with self._net.lock:
            match order:
                case OpenSend(grant=grant):
                    self._out[grant.transfer] = order
                    self._move(grant.transfer)
                case OpenReceive(grant=taken):
                    self._in[taken.transfer] = taken
                    self.say(RankOpened(transfer=taken.transfer, generation=taken.generation, rank=0))
                case CloseTransfer(transfer=transfer, generation=generation):
                    self._out.pop(transfer, None)
                    self._in.pop(transfer, None)
                    self.say(Drained(transfer=transfer, generation=generation, rank=0))
                case ForgetTransfer(transfer=transfer):
                    self._computed.pop(transfer.number, None)

    def computed(self, number: int, blocks: list[int], stop: int) -> None:
        """Note how far the prompt of a transfer is computed, and where."""
        with self._net.lock:
            self._computed[number] = blocks, stop
            self.move_all()

    def move_all(self) -> None:
        """Send what can be sent."""
        for transfer in list(self._out):
            self._move(transfer)

    def say(self, word: PeerDown | RankOpened | RankDone | Drained) -> None:
        assert self._listener is not None, "a desk listens before it gives orders"
        self._listener(0, word)

    def moved(self) -> KvMoved:
        return KvMoved(bytes_out=self._sent, bytes_in=self._came)

    def moved_of(self, transfer: TransferId) -> KvMoved | None:
        return self._moved.get(transfer)

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def _move(self, transfer: TransferId) -> None:
        order, known = self._out[transfer], self._computed.get(transfer.number)
        grant, size = order.grant, self._oracle.block_size
        target = self._net.ranks.get(grant.to.replica)
        if not self._net.flows or target is None or target.peer != grant.to or known is None:
            return
        taken, (blocks, stop) = target._in.get(transfer), known
        if taken is None or taken.generation != grant.generation or stop < grant.tokens.stop:
            return
        for position in grant.tokens:
            here, there = blocks[position // size], taken.blocks[position // size]
            target._oracle.kv[there, position % size] = self._oracle.kv[here, position % size]
        num_bytes = TOKEN_BYTES * len(grant.tokens)
        self._sent += num_bytes
        target._came += num_bytes
        self._moved[transfer] = KvMoved(bytes_out=num_bytes, wire_s=0.25, hidden_s=0.125)
        del self._out[transfer]
        self.say(RankDone(transfer=transfer, generation=grant.generation, rank=0))
        target.say(RankDone(transfer=transfer, generation=grant.generation, rank=0))


class SendingExecutor:
    """Tells ranks what a plan's sent rows have computed."""

    def __init__(self, executor: Executor, oracle: OracleExecutor, ranks: MemoryRanks) -> None:
        self._executor = executor
        self._oracle = oracle
        self._ranks = ranks

    def submit(self, plan: StepPlan) -> StepHandle:
        handle = self._executor.submit(plan)
        for row, number in zip(plan.sending_rows.tolist(), plan.sending_transfers.tolist(), strict=True):
            blocks = self._oracle.table[plan.slots[row]]
            self._ranks.computed(number, blocks[blocks >= 0].tolist(), int(plan.starts[row] + plan.counts[row]))
        return handle

    def close(self) -> None:
        self._executor.close()


def scribble(oracle: OracleExecutor) -> None:
    """Fill a fresh oracle's KV with what is no token's, so that KV which was not moved cannot look right."""
    oracle.kv[:] = np.iinfo(np.int64).max - np.arange(oracle.kv.size).reshape(oracle.kv.shape)
