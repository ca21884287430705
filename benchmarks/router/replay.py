"""Replays a trace against prefill nodes: each way of choosing a node meets the same requests at the same times."""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from slipstream.benchmarks.router.nodes import Job, Node, NodeCache, NodeSpeed
from slipstream.benchmarks.router.trace import BLOCK_TOKENS, Arrival
from slipstream.runtime.gateway.prompt_digests import PromptDigests
from slipstream.runtime.gateway.router import Router
from slipstream.runtime.gateway.routes import Ask, ReplicaFacts, Route, RouterSettings, Split
from slipstream.runtime.messages import Int32Array
from slipstream.runtime.rpc.engine_client import BlockChanges

REPORTS_S = 0.25
"""Between load reports of a node that is busy; one comes with each prompt that ends besides."""

DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a replay. ``hit_share``: prompt tokens that were not computed; ``most_share``: the part of all
    requests that the busiest node got.

    Units: ttft, seconds; decision_s, of choosing, the median
    """

    mean_ttft_s: float
    p50_ttft_s: float
    p99_ttft_s: float
    hit_share: float
    most_share: float
    busy_share: float
    decision_s: float


class Chooser:
    """A way of choosing, and what it is told."""

    def choose(self, ask: Ask, digests: list[bytes], nodes: dict[str, Node], now_s: float, number: int) -> str:
        """Return the name of the node for a request."""
        raise NotImplementedError

    def note_load(self, node: Node, now_s: float) -> None:
        """Hear a node's report."""

    def note_blocks(self, node: Node, changes: BlockChanges) -> None:
        """Hear what a node's cache has got and given up."""

    def ended(self, number: int) -> None:
        """Hear that a prompt is computed."""


class ByRouter(Chooser):
    """The router; ``blind`` to what is cached it is the least loaded."""

    def __init__(self, names: list[str], settings: RouterSettings, *, blind: bool = False) -> None:
        self.router = Router(settings)
        self._blind = blind
        self._routes: dict[int, Route] = {}
        for name in names:
            self.router.join(name, ReplicaFacts(role="prefill", block_size=BLOCK_TOKENS, sends_kv=True))
        self.router.join(DECODE, ReplicaFacts(role="decode", block_size=BLOCK_TOKENS, receives_kv=True))

    def choose(self, ask: Ask, digests: list[bytes], nodes: dict[str, Node], now_s: float, number: int) -> str:
        del digests, nodes
        route = self.router.route(ask, now_s)
        assert isinstance(route, Split), "prompts of the trace are long: they are split"
        self._routes[number] = route
        return route.prefill

    def note_load(self, node: Node, now_s: float) -> None:
        self.router.note_load(node.name, node.load(now_s), now_s)

    def note_blocks(self, node: Node, changes: BlockChanges) -> None:
        if not self._blind:
            self.router.note_blocks(node.name, changes)

    def ended(self, number: int) -> None:
        self.router.ended(self._routes.pop(number))


class ByPrefix(Chooser):
    """Always where most of the prompt is cached, whatever waits there; the shortest queue where that is equal."""

    def choose(self, ask: Ask, digests: list[bytes], nodes: dict[str, Node], now_s: float, number: int) -> str:
        del ask, now_s, number
        return min(nodes, key=lambda name: (-nodes[name].cache.hits(digests), len(nodes[name].waiting)))


class ByWorkLeft(Chooser):
    """Where least is left to do, known exactly: with one cache for all nodes, nobody can do much better."""

    def choose(self, ask: Ask, digests: list[bytes], nodes: dict[str, Node], now_s: float, number: int) -> str:
        del ask, digests, number
        return min(nodes, key=lambda name: nodes[name].left_s(now_s))


MakeChooser = Callable[[list[str]], Chooser]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """``cache_tokens``: of each node; all in one when they are ``shared``."""

    nodes: int = 10
    cache_tokens: int = 3_000_000
    speed: NodeSpeed = field(default_factory=NodeSpeed)


def replay(arrivals: list[Arrival], fleet: Fleet, make: MakeChooser, *, shared: bool = False) -> Outcome:
    """Let all requests come, and all prompts end."""
    blocks = fleet.cache_tokens // BLOCK_TOKENS
    common = NodeCache(blocks * fleet.nodes)
    nodes = {
        name: Node(name, common if shared else NodeCache(blocks), fleet.speed, kv_tokens=fleet.cache_tokens)
        for name in (f"prefill-{place}" for place in range(fleet.nodes))
    }
    chooser = make(list(nodes))
    digests = PromptDigests(block_size=BLOCK_TOKENS, max_strides=1 << 15)
    events: list[tuple[float, int, str]] = []
    reported_s = dict.fromkeys(nodes, 0.0)
    ttfts: list[float] = []
    decisions_s: list[float] = []
    got = dict.fromkeys(nodes, 0)

    def run_to(now_s: float) -> None:
        while events and events[0][0] <= now_s:
            at_s, _, name = heapq.heappop(events)
            node = nodes[name]
            job, changes = node.end()
            ttfts.append(at_s - job.arrived_s)
            chooser.note_blocks(node, changes)
            chooser.ended(job.number)
            begin(node, at_s)
            report(node, at_s)

    def begin(node: Node, now_s: float) -> None:
        job = node.begin(now_s)
        if job is not None:
            heapq.heappush(events, (job.ends_s, job.number, node.name))

    def report(node: Node, now_s: float) -> None:
        reported_s[node.name] = now_s
        chooser.note_load(node, now_s)

    for number, arrival in enumerate(arrivals):
        now_s = arrival.at_s
        run_to(now_s)
        for node in nodes.values():
            if node.running is not None and now_s - reported_s[node.name] >= REPORTS_S:
                report(node, now_s)
        prompt = arrival.prompt()
        named = _named(digests, prompt)
        began_s = time.perf_counter()
        name = chooser.choose(Ask(prompt=prompt, max_tokens=arrival.new_tokens + 1), named, nodes, now_s, number)
        decisions_s.append(time.perf_counter() - began_s)
        got[name] += 1
        nodes[name].waiting.append(Job(number, now_s, arrival.tokens, named))
        begin(nodes[name], now_s)
    run_to(float("inf"))
    return _outcome(ttfts, list(nodes.values()), got, decisions_s, arrivals[-1].at_s)


def _named(digests: PromptDigests, prompt: Int32Array) -> list[bytes]:
    return [short for stride in digests.strides(prompt, generated=0, cache_salt=None) for short in stride]


def _outcome(
    ttfts: list[float], nodes: list[Node], got: dict[str, int], decisions_s: list[float], lasted_s: float
) -> Outcome:
    ordered = sorted(ttfts)
    asked = sum(node.asked_tokens for node in nodes)
    return Outcome(
        mean_ttft_s=statistics.fmean(ordered),
        p50_ttft_s=ordered[len(ordered) // 2],
        p99_ttft_s=ordered[int(len(ordered) * 0.99)],
        hit_share=1 - sum(node.computed_tokens for node in nodes) / asked,
        most_share=max(got.values()) / len(ttfts),
        busy_share=sum(node.busy_s for node in nodes) / len(nodes) / lasted_s,
        decision_s=statistics.median(decisions_s),
    )
