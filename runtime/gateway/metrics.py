"""What a gateway counts and times, in Prometheus' form.

Owns the names (prefix ``slipstream_``) and their buckets. Each gateway has a registry of its own, so that several can
live in one process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..messages import StageTime
from ..rpc.engine_client import EngineLoadReport, HandOffReport

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Gauges(Collector):
    """Values that are looked up when they are asked for."""

    def __init__(
        self,
        load: Callable[[], EngineLoadReport | None],
        in_flight: Callable[[], int],
        states: Callable[[], Mapping[str, int]],
        waiting: Callable[[], int],
        open_breakers: Callable[[], int],
        ready_paths: Callable[[], Mapping[str, bool]],
    ) -> None:
        self._load = load
        self._ready_paths = ready_paths
        self._waiting = waiting
        self._open_breakers = open_breakers
        self._in_flight = in_flight
        self._states = states

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        yield GaugeMetricFamily("slipstream_engine_up", "whether an engine is attached", value=int(load is not None))
        text = "prompts that the gateway has let in and that have not ended"
        yield GaugeMetricFamily("slipstream_gateway_in_flight", text, value=self._in_flight())
        text = "requests that wait for their API key's turn"
        yield GaugeMetricFamily("slipstream_gateway_waiting", text, value=self._waiting())
        text = "pairs of replicas over which no request is split for now, because that failed"
        yield GaugeMetricFamily("slipstream_open_breakers", text, value=self._open_breakers())
        text = "whether a token came that way when it was last tried: of one replica, or handed over between two"
        paths = GaugeMetricFamily("slipstream_ready_path", text, labels=["path"])
        for path, works in self._ready_paths().items():
            paths.add_metric([path], int(works))
        yield paths
        if states := self._states():
            family = GaugeMetricFamily(
                "slipstream_replicas", "replicas by how this gateway sees them", labels=["state"]
            )
            for state, count in states.items():
                family.add_metric([state], count)
            yield family
        if load is None:
            return
        for name, value, text in (
            ("requests_running", load.running, "sequences that the engine runs"),
            ("requests_waiting", load.waiting, "sequences that wait in the engine"),
            ("queue_room", load.queue_room, "requests that the engine's queue still takes"),
            ("kv_blocks", load.blocks_total, "KV blocks"),
            ("kv_blocks_available", load.blocks_available, "KV blocks that are free or can be evicted"),
            ("preemptions", load.preemptions, "sequences preempted since the engine started"),
            ("prefix_hits", load.prefix_hits, "prompt blocks found in the prefix cache since the engine started"),
            ("prefix_misses", load.prefix_misses, "prompt blocks not found there since the engine started"),
            ("queued_tokens", load.queued_tokens, "known tokens whose KV is still to be computed"),
            ("kv_awaiting", load.awaiting, "requests that wait for KV of another replica"),
            ("kv_sending", load.sending, "transfers of KV on their way out"),
            ("kv_receiving", load.receiving, "transfers of KV on their way in"),
            ("engine_draining", int(load.draining), "whether the engine takes no more requests"),
        ):
            yield GaugeMetricFamily(f"slipstream_{name}", text, value=value)
        yield from _stage_metrics(load.stages)


def _stage_metrics(stages: Sequence[StageTime]) -> Iterator[Metric]:
    for name, seconds, text in (
        ("stage_busy", "busy_s", "a pipeline stage's work"),
        ("stage_waiting", "waiting_s", "a pipeline stage's waiting for other stages during its steps"),
        ("wire", "wire_s", "time in which layers' exchanges between a stage's ranks were on the wire"),
        ("wire_hidden", "wire_hidden_s", "how much of that the stage computed meanwhile"),
    ):
        family = CounterMetricFamily(f"slipstream_{name}_seconds", text, labels=["stage"])
        for time in stages:
            family.add_metric([str(time.stage)], getattr(time, seconds))
        yield family


class TokenTally(Collector):
    """What is counted once a token: how many, and how far apart.

    One event loop's own and without locks, because prometheus_client's own counters cost more than the rest of what is
    done with a token's text.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._gaps = [0] * (len(_INTER_TOKEN_BUCKETS_S) + 1)
        self._gaps_s = 0.0

    def add(self, tokens: int, gap_s: float | None) -> None:
        """Count tokens of one sample that came together, ``gap_s`` seconds after those before; None: the first."""
        self._tokens += tokens
        if gap_s is not None:
            self._gaps[bisect_left(_INTER_TOKEN_BUCKETS_S, gap_s)] += 1
            self._gaps_s += gap_s

    def collect(self) -> Iterator[Metric]:
        """Return both in Prometheus' form."""
        yield CounterMetricFamily("slipstream_output_tokens", "tokens delivered", value=self._tokens)
        bounds = [*map(str, map(float, _INTER_TOKEN_BUCKETS_S)), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._gaps), strict=True))
        text = "between one token of a sample and its next"
        yield HistogramMetricFamily("slipstream_inter_token_seconds", text, buckets=buckets, sum_value=self._gaps_s)


class HandOffTally(Collector):
    """What became of hand-offs between replicas, and what they moved."""

    def __init__(self) -> None:
        self._endings: dict[str, int] = {}
        self._bytes = 0
        self._wire_s = 0.0
        self._hidden_s = 0.0
        self._wait_s = 0.0

    def add(self, report: HandOffReport | None) -> None:
        """Count one that ended; None: nothing was heard of how."""
        ending = "lost" if report is None else report.ending
        self._endings[ending] = self._endings.get(ending, 0) + 1
        if report is not None:
            self._bytes += report.bytes_moved
            self._wire_s += report.wire_s
            self._hidden_s += report.hidden_s
            self._wait_s += report.wait_s

    def collect(self) -> Iterator[Metric]:
        """Return all in Prometheus' form."""
        ended = CounterMetricFamily("slipstream_hand_offs", "hand-offs of KV by ending", labels=["ending"])
        for ending, count in self._endings.items():
            ended.add_metric([ending], count)
        yield ended
        text = "KV that went from one replica to another"
        yield CounterMetricFamily("slipstream_kv_bytes_moved", text, value=self._bytes)
        for name, text, value in (
            ("wire", "in which KV was on its way", self._wire_s),
            ("hidden", "of those on the wire, while its prompt was still computed", self._hidden_s),
            ("wait", "from the prompt's last step to the end of its hand-off", self._wait_s),
        ):
            yield CounterMetricFamily(f"slipstream_kv_{name}_seconds", text, value=value)


class GatewayMetrics:
    """The gateway's own counters and histograms; gauges come from ``load``, ``in_flight`` and ``states``."""

    def __init__(
        self,
        *,
        load: Callable[[], EngineLoadReport | None],
        in_flight: Callable[[], int],
        states: Callable[[], Mapping[str, int]] = dict,
        waiting: Callable[[], int] = int,
        open_breakers: Callable[[], int] = int,
        ready_paths: Callable[[], Mapping[str, bool]] = dict,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Gauges(load, in_flight, states, waiting, open_breakers, ready_paths))
        self._requests = Counter(
            "slipstream_requests", "HTTP requests by endpoint and outcome", ["endpoint", "outcome"],
            registry=self._registry,
        )  # fmt: skip
        self._request_s = Histogram(
            "slipstream_request_seconds", "from arrival to last byte", ["endpoint"],
            buckets=_REQUEST_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self.ttft_s = self._histogram("time_to_first_token", "from arrival to a prompt's first token", _TTFT_BUCKETS_S)
        self.tokens = TokenTally()
        self._registry.register(self.tokens)
        self.queue_s = self._histogram("queue", "from arrival at the engine to the first step", _TTFT_BUCKETS_S)
        self.prompt_tokens = self._counter("prompt_tokens", "prompt tokens of requests that the engine took")
        self.aborted = self._counter("aborted", "prompts given up before their end: client gone, error or stop")
        self.moved = self._counter("requests_moved", "prompts that one replica did not take or lost, and another has")
        self.gone_on = self._counter("gone_on", "prompts that the replica that waited for their KV computed itself")
        self.resent = self._counter("hand_offs_resent", "prompts that another replica was to compute and send instead")
        self.hand_offs = HandOffTally()
        self._registry.register(self.hand_offs)
        self.engine_starts = self._counter("engine_starts", "engine processes that became ready")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"slipstream_{name}_seconds", text, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"slipstream_{name}", text, registry=self._registry)

    def request_ended(self, endpoint: str, outcome: str, elapsed_s: float) -> None:
        """Count one HTTP request."""
        self._requests.labels(endpoint, outcome).inc()
        self._request_s.labels(endpoint).observe(elapsed_s)

    def exposition(self) -> bytes:
        """Return everything in the text format."""
        return generate_latest(self._registry)
