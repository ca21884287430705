"""Prefill nodes that compute prompts one after the other, with a cache of prefixes: time is imagined, order is not."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from slipstream.benchmarks.router.trace import BLOCK_TOKENS
from slipstream.runtime.rpc.engine_client import BlockChanges, EngineLoadReport

_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpeed:
    """How long a prompt takes: a start, each token, and each pair of a token with one before it.

    The defaults follow what Splitwise measured of Llama 2 70B on eight A100: prompts of 8,192 and 16,384 tokens take
    1.78 and 3.52 s there, and 1.76 and 3.73 s here.
    """

    start_s: float = 0.01
    token_s: float = 1 / 5000
    pair_s: float = 1 / 5000 / 60000

    def seconds(self, computed: int, behind: int) -> float:
        """Return the time for so many tokens behind others that are cached."""
        return self.start_s + computed * (self.token_s + (behind + computed / 2) * self.pair_s)


class NodeCache:
    """Blocks by their digests, the least recently used given up first, of one prompt the last before the first."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._held: OrderedDict[bytes, None] = OrderedDict()

    def hits(self, digests: list[bytes]) -> int:
        """Return how many blocks of a prompt are here."""
        return next((place for place, digest in enumerate(digests) if digest not in self._held), len(digests))

    def use(self, digests: list[bytes]) -> BlockChanges:
        """Note that a prompt was computed here; return what came and what went."""
        stored = tuple(digest for digest in digests if digest not in self._held)
        for digest in reversed(digests):
            self._held[digest] = None
            self._held.move_to_end(digest)
        removed = [self._held.popitem(last=False)[0] for _ in range(len(self._held) - self._blocks)]
        return BlockChanges(stored=stored, removed=tuple(removed))


@dataclass(slots=True)
class Job:
    """A prompt at a node."""

    number: int
    arrived_s: float
    tokens: int
    digests: list[bytes]
    begun_s: float = 0.0
    ends_s: float = 0.0
    computed: int = 0


class Node:
    """One node; caches may be shared."""

    def __init__(self, name: str, cache: NodeCache, speed: NodeSpeed, *, kv_tokens: int) -> None:
        self.name = name
        self.cache = cache
        self.running: Job | None = None
        self.waiting: deque[Job] = deque()
        self._speed = speed
        self._kv_blocks = kv_tokens // BLOCK_TOKENS
        self._rate = 0.0
        self.computed_tokens = self.asked_tokens = 0
        self.busy_s = 0.0

    def begin(self, now_s: float) -> Job | None:
        """Begin with the next prompt if there is one and nothing runs."""
        if self.running is not None or not self.waiting:
            return None
        job = self.running = self.waiting.popleft()
        behind = min(self.cache.hits(job.digests) * BLOCK_TOKENS, job.tokens - 1)
        job.begun_s, job.computed = now_s, job.tokens - behind
        job.ends_s = now_s + self._speed.seconds(job.computed, behind)
        return job

    def end(self) -> tuple[Job, BlockChanges]:
        """End the prompt that runs."""
        job, self.running = self.running, None
        assert job is not None
        took_s = job.ends_s - job.begun_s
        self.busy_s += took_s
        self.computed_tokens += job.computed
        self.asked_tokens += job.tokens
        rate = job.computed / took_s
        self._rate = rate if not self._rate else self._rate + _SMOOTHING * (rate - self._rate)
        return job, self.cache.use(job.digests)

    def left_s(self, now_s: float) -> float:
        """Return how long it will be busy with what is there: nobody but a judge knows this."""
        running_s = 0.0 if self.running is None else max(self.running.ends_s - now_s, 0.0)
        return running_s + sum(
            self._speed.seconds(job.tokens - behind, behind)
            for job in self.waiting
            for behind in (min(self.cache.hits(job.digests) * BLOCK_TOKENS, job.tokens - 1),)
        )

    def load(self, now_s: float) -> EngineLoadReport:
        """Return what an engine would report: tokens still to be computed, those that the cache has of ones that wait
        not taken off.
        """
        job = self.running
        left = 0
        if job is not None and job.ends_s > job.begun_s:
            left = int(job.computed * max(job.ends_s - now_s, 0.0) / (job.ends_s - job.begun_s))
        return EngineLoadReport(
            running=int(job is not None), waiting=len(self.waiting), queue_room=4096, blocks_total=self._kv_blocks,
            blocks_available=self._kv_blocks, preemptions=0, prefix_hits=0, prefix_misses=0, draining=False,
            queued_tokens=left + sum(each.tokens for each in self.waiting), prefill_tokens_per_s=self._rate,
        )  # fmt: skip
