"""Random lives of a cluster that splits requests: a gateway, prefill and decode replicas, and all that can go wrong.

The real cores decide, together: the router, each request's way, hand-off desks with both machines, schedulers and their
block pools. Messages are late, lost, repeated and out of order, replicas die and come back, stand still, lose their
sessions and their connections. Every request ends once, in time, with the right tokens or an error that may be; then
every block is free. A violation names its seed; run this file as a module with it to see the story.
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from slipstream.comm.kv.transfer import FromReceiver, FromSender, Peer, PeerRank
from slipstream.runtime.messages import EngineRequest
from slipstream.sdk.params import SamplingParams
from slipstream.tests.fakes.oracle_executor import VOCABULARY
from slipstream.tests.simulation.kv_replicas import Wrong
from slipstream.tests.simulation.split_gateway import Gateway
from slipstream.tests.simulation.split_replica import Busy, Handed, Replica, Word

FAULTS_S = 6.0
QUIET_S = 150.0
_OTHER_TIMEOUT_S = 1800.0
PREFILLS, DECODES = ("prefill-0", "prefill-1"), ("decode-0", "decode-1")


@dataclass
class Tally:
    """What happened in some lives."""

    lives: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    """Requests that were submitted more than once."""

    def add(self, other: Tally) -> None:
        """Count another's lives as well."""
        self.lives += other.lives
        self.outcomes.update(other.outcomes)
        self.endings.update(other.endings)
        self.faults.update(other.faults)
        self.moved += other.moved


@dataclass(frozen=True)
class Weather:
    """How bad it is."""

    lost: float = 0.0
    twice: float = 0.0
    slow: float = 0.0
    spoiled: float = 0.0
    events: int = 0


CALM = Weather()


def weather(draw: random.Random) -> Weather:
    """Draw how bad it is: often only one thing goes wrong."""

    def chance(most: float) -> float:
        return draw.random() * most if draw.random() < 0.35 else 0.0

    return Weather(
        lost=chance(0.4),
        twice=chance(0.4),
        slow=chance(0.3),
        spoiled=chance(0.1),
        events=draw.choice([0, 1, 1, 2, 4]),
    )


class SplitLives:
    """Time, messages, and one life at a time of each replica."""

    def __init__(self, seed: int, tally: Tally) -> None:
        self.seed = seed
        self.tally = tally
        self.draw = draw = random.Random(seed)
        self.now_s = 0.0
        self.weather = weather(draw)
        self._slowness_s = draw.choice([0.1, 0.5, 2.0])
        self.story: list[str] = []
        self._count = 0
        self._queue: list[tuple[float, int, Peer | None, Callable[[], None]]] = []
        self._paused: dict[Peer, float] = {}
        self._ordered_s: dict[tuple[Peer, str], float] = {}
        self._cuts: Counter[frozenset[str]] = Counter()
        self._incarnation: Counter[str] = Counter()
        self._reborn = 0
        names = PREFILLS[: draw.choice([1, 2])] + DECODES[: draw.choice([1, 2])]
        sizes = [(name, draw.randint(44, 110), draw.choice([2, 3, 4])) for name in names]
        self._sizes = {name: (tokens // size, size) for name, tokens, size in sizes}
        self.gateway = Gateway(self)
        self.replicas: dict[str, Replica | None] = {}
        for name in names:
            self._start(name, met_after_s=0.0)

    # -------------------------------------------------------------- what replicas use

    def later(self, peer: Peer | None, after_s: float, act: Callable[[], None]) -> None:
        """Do something in a life, if it lasts until then; in the world itself for None."""
        self._count += 1
        heapq.heappush(self._queue, (self.now_s + after_s, self._count, peer, act))

    def life(self, peer: Peer) -> Replica | None:
        """Return a life if it is that replica's now."""
        found = self.replicas.get(peer.replica)
        return found if found is not None and found.peer == peer else None

    def say(self, sender: Peer, to: str, message: FromSender | FromReceiver, *, to_sender: bool) -> None:
        """Carry a message between desks, or lose it, or carry it twice."""
        for _ in range(1 + (self.draw.random() < self.weather.twice)):
            if self.draw.random() < self.weather.lost:
                continue
            slow = self.draw.random() < self.weather.slow
            self.later(
                None,
                self.draw.random() * (4.0 if slow else 0.05),
                lambda: self._deliver(sender, to, message, to_sender=to_sender),
            )

    def frame(self, source: PeerRank, target: Peer, arrive: Callable[[], None]) -> None:
        """Carry a frame, unless the connection is cut before it is there."""
        way = frozenset((source.peer.replica, target.replica))
        cuts = self._cuts[way]
        after_s = self.draw.random() * self._slowness_s
        self.later(target, after_s, lambda: arrive() if self._cuts[way] == cuts else None)

    def spoils(self) -> bool:
        """Return whether a frame's bytes change on their way."""
        return self.draw.random() < self.weather.spoiled

    def news(self, peer: Peer, word: Word) -> None:
        """Bring the gateway what a driver says, in order."""
        if isinstance(word, Handed):
            self.tally.endings[word.report.ending] += 1
        if not isinstance(word, Busy):
            self._tell_story(f"{peer.replica}.{peer.incarnation}: {word}")
        self._in_order(peer, "news", None, lambda: self.gateway.hear(peer, word))

    def order(self, peer: Peer, act: Callable[[Replica], None]) -> None:
        """Say something to a life's driver, in order, if that lives to hear it."""

        def arrive() -> None:
            life = self.life(peer)
            assert life is not None, "only a life is told"
            act(life)

        self._in_order(peer, "order", peer, arrive)

    def ended(self, name: str, how: str) -> None:
        """Count how requests end."""
        self._tell_story(f"{name} is over: {how}")
        self.tally.outcomes[how] += 1

    def _in_order(self, peer: Peer, which: str, whose: Peer | None, act: Callable[[], None]) -> None:
        due_s = max(self._ordered_s.get((peer, which), 0.0) + 1e-9, self.now_s + self.draw.random() * 0.03)
        self._ordered_s[peer, which] = due_s
        self.later(whose, due_s - self.now_s, act)

    def _deliver(self, sender: Peer, to: str, message: FromSender | FromReceiver, *, to_sender: bool) -> None:
        life = self.replicas[to]
        if life is None:
            return

        def hear() -> None:
            if to_sender:
                life.desk.heard_receiver(message, sender)  # type: ignore[arg-type] # receivers talk to senders
            else:
                life.desk.heard_sender(message, sender)  # type: ignore[arg-type] # and these to those
            life.wake_desk()

        self.later(life.peer, 0.0, hear)

    # -------------------------------------------------------------- a whole life

    def run(self) -> None:
        """Live through it, and judge the end."""
        self.tally.lives += 1
        draw = self.draw
        bases = [[draw.randrange(VOCABULARY) for _ in range(24)] for _ in range(2)]
        begins_s = sorted(0.1 + draw.random() * FAULTS_S / 2 for _ in range(draw.choice([1, 2, 3, 5, 8])))
        for place, begin_s in enumerate(begins_s):
            self.later(None, begin_s, lambda place=place: self._ask(place, draw.choice(bases)))  # type: ignore[misc]
        faults = [self._kill, self._kill, self._pause, self._cut, self._cut, self._lose_session, self._leave]
        for _ in range(self.weather.events):
            # While something moves, mostly.
            self.later(None, draw.choice(begins_s) + draw.random() * draw.choice([0.3, 1.0, 3.0]), draw.choice(faults))
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
            if peer is None or self.life(peer) is not None:
                act()
            if self.weather is CALM and self._at_rest():
                return
        self.now_s = until_s

    def _at_rest(self) -> bool:
        if self._reborn or self.gateway.busy:
            return False
        return all(life is None or life.at_rest for life in self.replicas.values())

    def _judge(self) -> None:
        for name, client in self.gateway.clients.items():
            if not client.outcome:
                raise Wrong(f"{name} never ended")
            self.tally.moved += client.way._next > 2
        for name, life in self.replicas.items():
            if life is None:
                continue
            if not life.at_rest:
                pool, load = life.scheduler.pool, life.desk.load
                raise Wrong(f"{name}: {pool.available} of {pool.num_blocks} blocks are free, {load}, {list(life.live)}")
            life.scheduler.check_integrity()
        for index in [index for _, index in self.gateway.router._caches.values()]:
            index.check_integrity()
        if self.gateway.router._on_way:
            raise Wrong("the router counts requests that are over")

    # -------------------------------------------------------------- replicas

    def _start(self, name: str, *, met_after_s: float) -> None:
        self._incarnation[name] += 1
        blocks, size = self._sizes[name]
        role = "prefill" if name in PREFILLS else "decode"
        life = Replica(self, Peer(name, self._incarnation[name]), role, num_blocks=blocks, block_size=size)
        self.replicas[name] = life
        self._meet(life, met_after_s)

    def _meet(self, life: Replica, after_s: float) -> None:
        def meet() -> None:
            if self.life(life.peer) is not None:
                self.gateway.met(life.peer, life.facts)

        self.later(None, after_s, meet)

    def _start_again(self, name: str) -> None:
        self._reborn -= 1
        self._start(name, met_after_s=self.draw.random())

    # -------------------------------------------------------------- what happens

    def _ask(self, place: int, base: list[int]) -> None:
        draw = self.draw
        prompt = base[: draw.randint(1, 24)]
        if draw.random() < 0.3:
            prompt = [*prompt[: len(prompt) // 2], *(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 10)))]
        max_tokens = draw.choice([1, 2, 4, 8, 12])
        request = EngineRequest(
            request_id=f"r{place}",
            prompt_token_ids=np.array(prompt, dtype=np.int32),
            params=SamplingParams(max_tokens=max_tokens),
            seed=draw.randrange(1 << 30),
            stop_ids=tuple(draw.sample(range(VOCABULARY), draw.choice([0, 0, 8]))),
            max_tokens=max_tokens,
            arrival_time_s=self.now_s,
        )
        timeout_s = draw.choice([2.0, 20.0, 60.0, 60.0])
        self._tell_story(f"r{place}: {len(prompt)} tokens, at most {max_tokens} new, within {timeout_s:g} s")
        self.gateway.ask(request, timeout_s=timeout_s, may_split=draw.random() < 0.9)

    def _kill(self) -> None:
        life = self._any()
        if life is None:
            return
        self._note("killed", life.peer)
        name, peer = life.peer.replica, life.peer
        self.replicas[name] = None
        if self.draw.random() < 0.85 or self.draw.random() < 0.5:
            self._reborn += 1
            self.later(None, 0.1 + self.draw.random() * 3.0, lambda: self._start_again(name))
        self.later(None, self.draw.random() * 1.5, lambda: self.gateway.lost(peer))
        seen = self.draw.random() < 0.5
        for other in self.replicas.values():
            if other is not None and seen and peer in other.rank.peers():
                other.rank.lose(peer, "the other end was closed")

    def _pause(self) -> None:
        life = self._any()
        if life is not None:
            self._note("paused", life.peer)
            # Never shorter than it was: what waits already would come after what is to come.
            until_s = self.now_s + self.draw.choice([0.5, 3.0, 10.0])
            self._paused[life.peer] = max(until_s, self._paused.get(life.peer, 0.0))

    def _cut(self) -> None:
        ends = [
            (source, target)
            for source in self.replicas.values()
            for target in self.replicas.values()
            if source is not None and target is not None and (source.role, target.role) == ("prefill", "decode")
        ]
        if ends:
            source, target = self.draw.choice(ends)
            self._note("cut", f"{source.peer} {target.peer}")
            self._cuts[frozenset((source.peer.replica, target.peer.replica))] += 1
            source.rank.lose(target.peer, "the link was cut")
            target.rank.lose(source.peer, "the link was cut")

    def _lose_session(self) -> None:
        life = self._any()
        if life is not None:
            self._note("session lost", life.peer)
            self.gateway.lost(life.peer)
            self.order(life.peer, lambda each: each.leave())
            self._meet(life, 0.1 + self.draw.random())

    def _leave(self) -> None:
        running = [name for name, client in self.gateway.clients.items() if not client.outcome]
        if running:
            name = self.draw.choice(running)
            self._note("client gone", name)
            self.gateway.leave(name)

    def _any(self) -> Replica | None:
        living = [life for life in self.replicas.values() if life is not None]
        return self.draw.choice(living) if living else None

    def _note(self, fault: str, what: object) -> None:
        self.tally.faults[fault] += 1
        self._tell_story(f"{fault}: {what}")

    def _tell_story(self, line: str) -> None:
        self.story.append(f"{self.now_s:8.3f}  {line}")


def live(seed: int, tally: Tally) -> SplitLives:
    """Run one seed's life. Raises: Wrong that names the seed and tells the story"""
    world = SplitLives(seed, tally)
    try:
        world.run()
    except Exception as error:
        story = "\n".join(world.story[-40:])
        raise Wrong(f"seed {seed}, at {world.now_s:.3f} s: {error!r}\n{story}") from error
    return world


def live_all(first: int, count: int) -> Tally:
    """Run so many seeds' lives."""
    tally = Tally()
    for seed in range(first, first + count):
        live(seed, tally)
    return tally


def live_all_on_two_cores(first: int, count: int) -> Tally:
    """Run so many seeds' lives, half of them in another process. Raises: Wrong, also for what that one found"""
    half = count // 2
    command = [sys.executable, "-P", "-m", __name__, str(first + half), "--lives", str(count - half)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as other:
        try:
            tally = live_all(first, half)
            printed, complaint = other.communicate(timeout=_OTHER_TIMEOUT_S)
        except BaseException:
            other.kill()
            raise
    if other.returncode:
        raise Wrong(complaint)
    counts = json.loads(printed)
    tally.add(
        Tally(
            lives=counts["lives"],
            outcomes=Counter(counts["outcomes"]),
            endings=Counter(counts["endings"]),
            faults=Counter(counts["faults"]),
            moved=counts["moved"],
        )
    )
    return tally


def main() -> None:
    """Tell one seed's story, or run many and print what happened as a line of JSON."""
    parser = argparse.ArgumentParser(description="Random lives of a cluster that splits requests.")
    parser.add_argument("seed", type=int)
    parser.add_argument("--lives", type=int, help="run so many, from this seed on")
    options = parser.parse_args()
    if options.lives is None:
        print("\n".join(live(options.seed, Tally()).story))
        return
    # What desks log of thousands of broken connections is of no interest.
    logging.disable(logging.WARNING)
    # As it is and not as asdict has it, which makes pairs of what a Counter counts.
    print(json.dumps(vars(live_all(options.seed, options.lives))))


if __name__ == "__main__":
    main()
