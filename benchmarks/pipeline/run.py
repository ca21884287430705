"""Drives the real engine over virtual stages with the trace's requests, and sums up what came of it."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from slipstream.benchmarks.pipeline.conversations import Conversation
from slipstream.benchmarks.pipeline.virtual_stages import StepCost, VirtualStages, overlap_s
from slipstream.runtime.config import SchedulerConfig
from slipstream.runtime.engine.engine import Engine
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.messages import EngineRequest
from slipstream.sdk.params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run came to.

    ``bubbles``: of each stage, idle time while requests were alive over all of that time. ``in_flight``: steps on their
    way, on average over that time. Times between tokens and to the first one, in milliseconds.
    """

    bubbles: tuple[float, ...]
    in_flight: float
    requests_per_s: float
    output_tokens_per_s: float
    gap_p50_ms: float
    gap_p99_ms: float
    first_p50_ms: float
    first_p99_ms: float
    steps: int
    preemptions: int

    @property
    def bubble(self) -> float:
        """The stages' mean."""
        return sum(self.bubbles) / len(self.bubbles)

    @property
    def formula(self) -> float:
        """What as many even micro-batches leave idle when a pipeline fills and drains with them."""
        stages = len(self.bubbles)
        return (stages - 1) / (stages - 1 + self.in_flight)


class Run:
    """One engine, one load. ``rate``: requests a second, with the trace's gaps scaled to it; None: all at once."""

    def __init__(
        self,
        conversations: SequenceOf[Conversation],
        config: SchedulerConfig,
        cost: StepCost,
        *,
        stages: int,
        planning_s: float,
        rate: float | None,
    ) -> None:
        gaps_s = np.array([conversation.gap_s for conversation in conversations])
        scale = 0.0 if rate is None else len(gaps_s) / gaps_s.sum() / rate
        self._arrivals_s: list[float] = (np.cumsum(gaps_s) * scale).tolist()
        self._conversations = conversations
        self._stages = VirtualStages(cost=cost, stages=stages, planning_s=planning_s)
        self._engine = Engine(
            Scheduler(config), self._stages, clock=lambda: self._stages.now_s, ahead=True, step_timeout_s=1.0
        )
        self._submitted = 0
        self._last_s: dict[Sequence, float] = {}
        self._gaps_s: list[tuple[float, float]] = []
        self._firsts_s: list[tuple[float, float]] = []
        self._ended_s: list[float] = []
        self._idle: list[tuple[float, float]] = []

    def figures(self) -> Figures:
        """Run until every request is answered; what comes after the last has been admitted is left out."""
        engine, stages, end_s = self._engine, self._stages, 0.0
        while self._submitted < len(self._conversations) or engine.has_work:
            if not engine.has_work:
                next_s = max(stages.now_s, self._arrivals_s[self._submitted])
                self._idle.append((stages.now_s, next_s))
                stages.now_s = next_s
            self._submit_arrived()
            outputs = engine.step()
            self._take(outputs.sequences, outputs.finished)
            if self._submitted < len(self._conversations) or engine.scheduler.load.waiting:
                end_s = stages.now_s
        return self._sum_up((0.0, end_s))

    def _submit_arrived(self) -> None:
        while (
            self._submitted < len(self._conversations)
            and self._arrivals_s[self._submitted] <= self._stages.now_s
            and self._engine.scheduler.queue_room
        ):
            index, asked = self._submitted, self._conversations[self._submitted]
            self._engine.submit(
                EngineRequest(
                    request_id=str(index),
                    prompt_token_ids=np.full(asked.prompt_tokens, index, dtype=np.int32),
                    params=SamplingParams(max_tokens=asked.output_tokens),
                    seed=index,
                    stop_ids=(),
                    max_tokens=asked.output_tokens,
                    arrival_time_s=self._arrivals_s[index],
                )
            )
            self._submitted += 1

    def _take(self, sequences: list[Sequence], finished: list[Sequence]) -> None:
        now_s = self._stages.now_s
        for sequence in sequences:
            before_s = self._last_s.get(sequence)
            if before_s is None:
                self._firsts_s.append((now_s, now_s - sequence.request.arrival_time_s))
            else:
                self._gaps_s.append((now_s, now_s - before_s))
            self._last_s[sequence] = now_s
        for sequence in finished:
            del self._last_s[sequence]
            self._ended_s.append(now_s)

    def _sum_up(self, window: tuple[float, float]) -> Figures:
        stages = self._stages
        alive_s = window[1] - window[0] - overlap_s(self._idle, window)
        gaps_ms = 1e3 * np.array([gap_s for at_s, gap_s in self._gaps_s if at_s <= window[1]])
        firsts_ms = 1e3 * np.array([first_s for at_s, first_s in self._firsts_s if at_s <= window[1]])
        ended = sum(at_s <= window[1] for at_s in self._ended_s)
        return Figures(
            bubbles=tuple(1.0 - overlap_s(busy, window) / alive_s for busy in stages.busy),
            in_flight=overlap_s(stages.on_their_way, window) / alive_s,
            requests_per_s=ended / alive_s,
            output_tokens_per_s=(len(gaps_ms) + len(firsts_ms)) / alive_s,
            gap_p50_ms=float(np.percentile(gaps_ms, 50)),
            gap_p99_ms=float(np.percentile(gaps_ms, 99)),
            first_p50_ms=float(np.percentile(firsts_ms, 50)),
            first_p99_ms=float(np.percentile(firsts_ms, 99)),
            steps=len(stages.on_their_way),
            preemptions=self._engine.scheduler.load.preemptions,
        )
