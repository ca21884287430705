"""Random lives of two replicas between which KV moves, with everything going wrong that can, judged all along.

After a stretch of faults the world becomes quiet, and within bounded time every transfer has ended, once and with a
reason, and every block is free again. A violation names its seed; run this file as a module with it to see the story.
"""

from __future__ import annotations

import heapq
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from slipstream.comm.kv.frame import KvFrame
from slipstream.comm.kv.transfer import Ended, FromReceiver, FromSender, Peer, PeerRank, Tell, TransferId
from slipstream.placement.kv_routes import KvLayout
from slipstream.tests.fakes.memory_kv import Arrival, MemoryNetwork
from slipstream.tests.simulation.kv_replicas import LIMITS, Decode, Prefill, Wrong

FAULTS_S = 10.0
QUIET_S = 120.0
PREFILL, DECODE = "prefill-0", "decode-0"


@dataclass
class Tally:
    """What happened in some lives."""

    lives: int = 0
    begun: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    tries: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Weather:
    """How bad it is."""

    lost: float
    twice: float
    slow: float
    frame_lost: float
    frame_twice: float
    frame_changed: float
    events: int


CALM = Weather(lost=0, twice=0, slow=0, frame_lost=0, frame_twice=0, frame_changed=0, events=0)


def weather(draw: random.Random) -> Weather:
    """Draw how bad it is: often only one thing goes wrong."""

    def chance(most: float) -> float:
        return draw.random() * most if draw.random() < 0.4 else 0.0

    return Weather(
        lost=chance(0.4),
        twice=chance(0.4),
        slow=chance(0.3),
        frame_lost=chance(0.02),
        frame_twice=chance(0.3),
        frame_changed=chance(0.02),
        events=draw.choice([0, 0, 1, 2, 4]),
    )


class KvWorld:
    """Time, messages, and one life at a time of each replica."""

    def __init__(self, seed: int, tally: Tally) -> None:
        self.seed = seed
        self.tally = tally
        self.draw = draw = random.Random(seed)
        self.now_s = 0.0
        self.weather = weather(draw)
        self.limits = replace(LIMITS, max_tries=draw.choice([1, 1, 3]))
        self.prefix_share = draw.choice([0.0, 0.5])
        self.story: list[str] = []
        self._count = 0
        self._queue: list[tuple[float, int, Peer | None, Callable[[], None]]] = []
        self._paused: dict[Peer, float] = {}
        slowness_s = draw.choice([0.05, 0.5])
        self.network = MemoryNetwork(self._at_rank, fate=self._fate, send_s=lambda: draw.random() * slowness_s)
        layers, heads = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
        self.source, self.target = (
            KvLayout(
                layers=layers,
                kv_heads=heads,
                block_size=draw.choice([2, 3, 4]),
                tp=draw.choice([1, 1, 2]),
                pp=draw.choice([1, min(2, layers)]),
            )
            for _ in range(2)
        )
        self._sizes = (draw.randint(12, 40), draw.randint(10, 24))
        self._incarnation = Counter[str]()
        self._reborn = 0
        self._begun: set[TransferId] = set()
        self._ended: Counter[tuple[Peer, TransferId, int]] = Counter()
        self._sent_ended: Counter[TransferId] = Counter()
        self.prefill: Prefill | None = None
        self.decode: Decode | None = None
        self._start_prefill()
        self._start_decode()

    # -------------------------------------------------------------- what replicas use

    def later(self, peer: Peer | None, after_s: float, act: Callable[[], None]) -> None:
        """Do something in a life, if it lasts until then; in the world itself for None."""
        self._count += 1
        heapq.heappush(self._queue, (self.now_s + after_s, self._count, peer, act))

    def tell(self, sender: Peer, tell: Tell) -> None:
        """Carry a message, or lose it, or carry it twice."""
        times = 1 + (self.draw.random() < self.weather.twice)
        for _ in range(times):
            if self.draw.random() < self.weather.lost:
                continue
            slow = self.draw.random() < self.weather.slow
            after_s = self.draw.random() * (5.0 if slow else 0.1)
            self.later(None, after_s, lambda: self._deliver(sender, tell.replica, tell.message))

    def ended(self, life: Peer, ended: Ended) -> None:
        """Count endings."""
        self._tell_story(f"{life.replica}.{life.incarnation}: {ended.transfer} g{ended.generation} {ended.ending}")
        if life.replica == PREFILL:
            self._sent_ended[ended.transfer] += 1
            self.tally.endings[ended.ending] += 1
            self.tally.tries[ended.generation] += 1
            if self._sent_ended[ended.transfer] > 1:
                raise Wrong(f"{ended.transfer} ended twice at its sender")
        key = (life, ended.transfer, ended.generation)
        self._ended[key] += 1
        if self._ended[key] > 1:
            raise Wrong(f"{ended.transfer} ended twice at {life.replica}")

    # -------------------------------------------------------------- a whole life

    def run(self) -> None:
        """Live through it, and judge the end."""
        self.tally.lives += 1
        begins_s = [self.draw.random() * FAULTS_S / 2 for _ in range(self.draw.randint(1, 4))]
        for begin_s in begins_s:
            self.later(None, begin_s, self._begin)
        for _ in range(self.weather.events):
            fault = self.draw.choice(
                [self._cancel_sending, self._cancel_receiving, self._kill, self._kill, self._pause, self._cut]
            )
            # While something moves, mostly.
            self.later(None, self.draw.choice(begins_s) + self.draw.random() * self.draw.choice([1.0, 5.0]), fault)
        self._go_on(until_s=FAULTS_S)
        self.weather = CALM
        self._go_on(until_s=FAULTS_S + QUIET_S)
        self._judge()

    def _go_on(self, *, until_s: float) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            due_s, count, peer, act = heapq.heappop(self._queue)
            if peer is not None and self._paused.get(peer, 0.0) > due_s:
                heapq.heappush(self._queue, (self._paused[peer], count, peer, act))
                continue
            self.now_s = due_s
            if peer is None or self._lives(peer):
                act()
            if self.weather is CALM and self._at_rest():
                return
        self.now_s = until_s

    def _at_rest(self) -> bool:
        """Whether nothing is on its way at those that live, and nobody is about to begin again."""
        if self._reborn:
            return False
        prefill, decode = self.prefill, self.decode
        return (prefill is None or (not len(prefill.sender) and prefill.pool.free == prefill.num_blocks)) and (
            decode is None or (not len(decode.receiver) and decode.pool.free == decode.num_blocks)
        )

    def _judge(self) -> None:
        prefill, decode = self.prefill, self.decode
        if not self._at_rest():
            sent = (len(prefill.sender), prefill.pool.free, prefill.num_blocks) if prefill else None
            received = (len(decode.receiver), decode.pool.free, decode.num_blocks) if decode else None
            raise Wrong(f"transfers, free blocks and blocks at the sender: {sent}; at the receiver: {received}")
        if prefill is not None:
            if prefill.sender.parked_blocks:
                raise Wrong("blocks are parked for nobody")
            for transfer in self._begun:
                if transfer.source == prefill.peer and self._sent_ended[transfer] != 1:
                    raise Wrong(f"{transfer} never ended at its sender")
            prefill.pool.blocks.check_integrity()
        if decode is not None:
            decode.pool.blocks.check_integrity()
            for incoming in decode.incoming:
                self.tally.dropped.update(incoming.dropped)

    # -------------------------------------------------------------- replicas

    def _start_prefill(self) -> None:
        self._incarnation[PREFILL] += 1
        self.prefill = Prefill(
            self, Peer(PREFILL, self._incarnation[PREFILL]), self.source, self._sizes[0], self.target
        )

    def _start_decode(self) -> None:
        self._incarnation[DECODE] += 1
        self.decode = Decode(self, Peer(DECODE, self._incarnation[DECODE]), self.target, self._sizes[1], self.source)

    def _start_again(self, replica: str) -> None:
        self._reborn -= 1
        if replica == PREFILL:
            self._start_prefill()
        else:
            self._start_decode()

    def _life(self, replica: str) -> Prefill | Decode | None:
        return self.prefill if replica == PREFILL else self.decode

    def _lives(self, peer: Peer) -> bool:
        life = self._life(peer.replica)
        return life is not None and life.peer == peer

    def _deliver(self, sender: Peer, replica: str, message: FromSender | FromReceiver) -> None:
        life = self._life(replica)
        if life is None:
            return

        def hear() -> None:
            if isinstance(life, Prefill):
                life.sender.hear(self.now_s, message, sender)  # type: ignore[arg-type] # receivers talk to senders
            else:
                life.receiver.hear(self.now_s, message, sender)  # type: ignore[arg-type] # and these to those
            life.act()

        self.later(life.peer, 0.0, hear)

    def _at_rank(self, rank: PeerRank, after_s: float, act: Callable[[], None]) -> None:
        def do() -> None:
            act()
            life = self._life(rank.peer.replica)
            assert life is not None
            life.pump()

        self.later(rank.peer, after_s, do)

    def _fate(self, frame: KvFrame) -> list[Arrival]:
        if self.draw.random() < self.weather.frame_lost:
            return []
        changed = self.draw.random() < self.weather.frame_changed
        times = 1 + (self.draw.random() < self.weather.frame_twice)
        return [
            Arrival(after_s=self.draw.random() * 0.3, lasts_s=self.draw.random() * 0.2, changed=changed)
            for _ in range(times)
        ]

    # -------------------------------------------------------------- what happens

    def _begin(self) -> None:
        if self.prefill is None:
            return
        timeout_s = self.draw.choice([3.0, 30.0, 60.0, 60.0])
        transfer = self.prefill.begin(DECODE, self.draw.randint(1, 32), timeout_s)
        if transfer is not None:
            self._begun.add(transfer)
            self.tally.begun += 1
            self._tell_story(f"{transfer} begins")

    def _cancel_sending(self) -> None:
        if self.prefill is not None and self.prefill.prompts:
            transfer = self.draw.choice(list(self.prefill.prompts))
            self._note("sending cancelled", transfer)
            self.prefill.sender.cancel(transfer)
            self.prefill.leave(transfer)
            self.prefill.act()

    def _cancel_receiving(self) -> None:
        if self.decode is not None and self.decode.reserved:
            transfer = self.draw.choice(list(self.decode.reserved))
            self._note("receiving cancelled", transfer)
            self.decode.receiver.cancel(transfer)
            self.decode.act()

    def _kill(self) -> None:
        which = self.draw.choice([PREFILL, DECODE])
        life = self._life(which)
        if life is None:
            return
        self._note("killed", life.peer)
        if which == PREFILL:
            self.prefill = None
        else:
            self.decode = None
        if self.draw.random() < 0.85:
            self._reborn += 1
            self.later(None, self.draw.random() * 3.0, lambda: self._start_again(which))
        life.die(seen=self.draw.random() < 0.5)
        other = self._life(DECODE if which == PREFILL else PREFILL)
        if other is not None:
            self.later(other.peer, 0.0, other.pump)

    def _pause(self) -> None:
        life = self._life(self.draw.choice([PREFILL, DECODE]))
        if life is not None:
            self._note("paused", life.peer)
            # Never shorter than it was: what waits already would come after what is to come.
            until_s = self.now_s + self.draw.choice([1.0, 6.0, 20.0])
            self._paused[life.peer] = max(until_s, self._paused.get(life.peer, 0.0))

    def _cut(self) -> None:
        if self.prefill is None or self.decode is None:
            return
        self._note("cut", self.prefill.peer)
        source = PeerRank(self.prefill.peer, self.draw.randrange(self.source.ranks))
        target = PeerRank(self.decode.peer, self.draw.randrange(self.target.ranks))
        self.network.cut(source, target, "the link was cut")
        for life in (self.prefill, self.decode):
            self.later(life.peer, 0.0, life.pump)

    def _note(self, fault: str, what: object) -> None:
        self.tally.faults[fault] += 1
        self._tell_story(f"{fault}: {what}")

    def _tell_story(self, line: str) -> None:
        self.story.append(f"{self.now_s:8.3f}  {line}")


def live(seed: int, tally: Tally) -> KvWorld:
    """Run one seed's life. Raises: AssertionError that names the seed and tells the story"""
    world = KvWorld(seed, tally)
    try:
        world.run()
    except AssertionError as error:
        story = "\n".join(world.story[-40:])
        raise Wrong(f"seed {seed}, at {world.now_s:.3f} s: {error}\n{story}") from error
    return world


def live_all(first: int, count: int) -> Tally:
    """Run so many seeds' lives."""
    tally = Tally()
    for seed in range(first, first + count):
        live(seed, tally)
    return tally


if __name__ == "__main__":
    found = live(int(sys.argv[1]), Tally())
    print("\n".join(found.story))
