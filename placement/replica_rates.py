"""What one replica can do with a workload: points of operation from idle to full, and what bounds them.

A replica that decodes runs ``batch`` sequences at once; the more, the more tokens a second and the longer each takes.
One that prefills serves prompts one after the other; how long they wait follows from how busy it is (a queue with
random arrivals). A mixed one does both: some of its steps carry a chunk of a prompt beside the decoding rows.

With pipeline stages the batch is cut into as many parts as stages, all of which are on their way at once.

Owns this arithmetic. Which replicas there are is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from .objectives import Objectives
from .plan import Role
from .plan_memory import EngineLimits, RankMemory
from .step_cost import StageCost, Step, StepCost
from .workload import Workload

BUSIEST = 0.9
"""Share of the time that prefill may take: a queue beyond that grows faster than it is served."""

_BATCH_STEP = 1.25
"""Ratio of successive batch sizes that are tried."""

KV_ROOM = 0.95
"""Share of the cache that running sequences may fill on average; the rest is for those longer than the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A replica at one load. ``busy``: share of the time, or of the steps, that prefill has.

    Units: requests_per_s; first_token_s, at the quantile of the objectives; per_token_s, mean
    """

    batch: int
    requests_per_s: float
    first_token_s: float
    per_token_s: float
    busy: float
    cost: StageCost

    def keeps(self, objectives: Objectives) -> bool:
        """Say whether the times are within the bounds."""
        return (
            objectives.time_to_first_token_s is None or self.first_token_s <= objectives.time_to_first_token_s
        ) and (objectives.time_per_token_s is None or self.per_token_s <= objectives.time_per_token_s)


@dataclass(frozen=True, kw_only=True)
class ReplicaRates:
    """One replica of a role under a workload."""

    role: Role
    cost: StepCost
    memory: RankMemory
    limits: EngineLimits
    workload: Workload
    objectives: Objectives

    def problem(self) -> str | None:
        """Say why the replica cannot run at all; None where it can."""
        needed = self.workload.longest
        length = self.limits.max_model_len or self.cost.cut.model.longest
        if needed > length:
            return f"the longest request has {needed} tokens, sequences may have {length}"
        if self.memory.kv_tokens < needed:
            weights = self.memory.without_kv / 2**30
            return (
                f"weights, temporaries and buffers take {weights:.1f} GiB of a device, which leaves "
                f"{self.memory.kv_tokens} tokens of KV; the longest request has {needed}"
            )
        if self.max_batch < 1:
            return "no sequence fits beside its pipeline's other parts"
        return None

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """Points of operation in order of load, those that can be sustained; the first is nearly idle."""
        if self.role is Role.PREFILL:
            return tuple(self._prefill_at(share) for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9))
        points = []
        for batch in _batches(self.max_batch):
            point = self._mixed_at(batch) if self.role is Role.MIXED else self._decode_at(batch)
            if point is None:
                break
            points.append(point)
        return tuple(points)

    @cached_property
    def fullest(self) -> Point:
        """The point with the most requests a second that keeps the bounds; the first one where none does."""
        keeping = [point for point in self.points if point.keeps(self.objectives)]
        return max(keeping, key=lambda point: point.requests_per_s) if keeping else self.points[0]

    @cached_property
    def full_because(self) -> str:
        """What keeps the fullest point from more, in words."""
        place = self.points.index(self.fullest) + 1
        if self.role is not Role.PREFILL and place == len(self.points):
            if self.fullest.batch == self.max_batch:
                return "KV memory" if self._kv_batch < self.limits.max_num_seqs else "max_num_seqs"
            return "prompts, for which steps have no more room"
        if place == len(self.points):
            return f"their prompts: they are {self.fullest.busy:.0%} busy"
        following = self.points[place]
        if following.keeps(self.objectives):
            return "nothing: more at once is no faster"
        late = self.objectives.time_to_first_token_s
        first = late is not None and following.first_token_s > late
        return f"the bound on {'the first token' if first else 'the time of a token'}"

    def at(self, requests_per_s: float) -> Point:
        """Return the least loaded point that serves so many requests, or the fullest."""
        for point in self.points:
            if point.requests_per_s >= requests_per_s:
                return point
        return self.points[-1]

    @cached_property
    def max_batch(self) -> int:
        """The most sequences that run at once."""
        return min(self.limits.max_num_seqs, self._kv_batch)

    @cached_property
    def _kv_batch(self) -> int:
        return int(self.memory.kv_tokens * KV_ROOM / self.workload.mean_context)

    @property
    def _stages(self) -> int:
        return self.cost.cut.degrees.pp

    def _chunk(self, decoding: float) -> float:
        """Return the prompt tokens that a step has room for beside decoding rows."""
        return self.limits.max_num_batched_tokens - decoding

    def _slowest(self, step: Step) -> StageCost:
        return max((self.cost.stage(stage, step) for stage in self.cost.cut.distinct_stages), key=lambda c: c.seconds)

    def _decode_at(self, batch: int) -> Point:
        step = Step(decode_rows=batch / self._stages, decode_context=self.workload.mean_context)
        cost = self._slowest(step)
        return Point(
            batch=batch,
            requests_per_s=batch / self._stages / cost.seconds / self.workload.mean_output,
            first_token_s=0.0,
            per_token_s=cost.seconds * self._stages,
            busy=0.0,
            cost=cost,
        )

    def _mixed_at(self, batch: int) -> Point | None:
        """Return the point where prompts come as fast as answers end; None where a step has no room for them."""
        rows = batch / self._stages
        room = self._chunk(rows)
        if room < 1:
            return None
        chunk = min(room, self.workload.mean_prompt)
        decoding = Step(decode_rows=rows, decode_context=self.workload.mean_context)
        plain = self._slowest(decoding)
        carrying = self._slowest(
            Step(
                decode_rows=rows,
                decode_context=self.workload.mean_context,
                prefill_tokens=chunk,
                prefill_start=max(0.0, self.workload.mean_position - chunk / 2),
            )
        )
        # Of every so many steps one carries a chunk; the rest only decode.
        busy = rows * self.workload.mean_prompt / self.workload.mean_output / chunk
        if busy > BUSIEST:
            return None
        mean_s = busy * carrying.seconds + (1 - busy) * plain.seconds
        service = {length: self._mixed_prefill(length, room, decoding, plain) for length, _ in self.workload.prompts}
        return Point(
            batch=batch,
            requests_per_s=rows / mean_s / self.workload.mean_output,
            first_token_s=self._with_wait(service, busy),
            per_token_s=mean_s * self._stages,
            busy=busy,
            cost=carrying if busy * carrying.seconds > (1 - busy) * plain.seconds else plain,
        )

    def _mixed_prefill(self, length: int, room: float, decoding: Step, plain: StageCost) -> float:
        """Return the seconds until a prompt's first token, whose chunks go beside decoding rows."""
        tokens = length * (1 - self.workload.cached_share)
        chunks, rest = divmod(tokens, room)
        full = 0.0
        if chunks:
            # All chunks as the one in the middle: attention grows evenly.
            middle = replace(decoding, prefill_tokens=room, prefill_start=(tokens - room) / 2)
            full = self._slowest(middle).seconds
        last = full
        if rest >= 1:
            last = self._slowest(replace(decoding, prefill_tokens=rest, prefill_start=chunks * room)).seconds
        steps = chunks * full + (last if rest >= 1 else 0.0)
        return max(steps, plain.seconds) + (self._stages - 1) * last

    def _prefill_at(self, busy: float) -> Point:
        times = self._prefill_times
        mean_s = sum(share * times[length][0] for length, share in self.workload.prompts)
        latencies = {length: latency for length, (_, latency) in times.items()}
        return Point(
            batch=1,
            requests_per_s=busy / mean_s,
            first_token_s=self._with_wait(latencies, busy),
            per_token_s=0.0,
            busy=busy,
            cost=self._prefill_cost,
        )

    @cached_property
    def _prefill_cost(self) -> StageCost:
        chunk = min(self._chunk(0), self.workload.mean_prompt)
        start = max(0.0, self.workload.mean_position - chunk / 2)
        return self._slowest(Step(prefill_tokens=chunk, prefill_start=start))

    @cached_property
    def _prefill_times(self) -> dict[int, tuple[float, float]]:
        """Seconds that a prompt occupies a stage, and seconds until its first token, by prompt length."""
        room = self._chunk(0)
        full = self._slowest(Step(prefill_tokens=room)).seconds
        longest = max(self.workload.longest, 2)
        growth = (self._slowest(Step(prefill_tokens=room, prefill_start=longest)).seconds - full) / longest
        times = {}
        for length, _ in self.workload.prompts:
            cached = length * self.workload.cached_share
            tokens = length - cached
            chunks, rest = divmod(tokens, room)
            # Each chunk has all before it as context.
            seconds = chunks * (full + growth * (cached + room * (chunks - 1) / 2))
            last = full
            if rest >= 1:
                last = self._slowest(Step(prefill_tokens=rest, prefill_start=cached + chunks * room)).seconds
                seconds += last
            times[length] = (seconds, seconds + (self._stages - 1) * last)
        return times

    def _with_wait(self, service: dict[int, float], busy: float) -> float:
        """Return the time to the first token that the objectives' share of requests does not exceed.

        ``service``: seconds without waiting, by prompt length. The wait is that of a queue with random arrivals, whose
        tail falls off exponentially.
        """
        length = self.workload.prompt_quantile(self.objectives.quantile)
        mean = sum(share * service[length] for length, share in self.workload.prompts)
        square = sum(share * service[length] ** 2 for length, share in self.workload.prompts)
        wait = busy * square / mean / (2 * (1 - busy))
        beyond = 1 - self.objectives.quantile
        tail = wait / busy * math.log(busy / beyond) if busy > beyond else 0.0
        return service[length] + max(wait, tail)


def _batches(most: int) -> Iterator[int]:
    """Yield batch sizes from 1 to ``most``, each a little larger than the one before."""
    batch = 1
    while batch < most:
        yield batch
        batch = max(batch + 1, round(batch * _BATCH_STEP))
    if most >= 1:
        yield most


def largest_part(cost: StageCost) -> str:
    """Say what a step spends most of its time on, and whether memory or arithmetic bounds that."""
    name = max(cost.parts, key=lambda part: cost.parts[part])
    share = cost.parts[name] / cost.seconds
    memory = cost.by_memory.get(name, 0.0)
    how = "" if memory == 0.0 else ", bound by memory" if memory > 0.6 * cost.parts[name] else ", bound by arithmetic"
    return f"{name} ({share:.0%} of a step{how})"
