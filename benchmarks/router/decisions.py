"""How long one decision takes with many replicas: prompts that are cached in part, everywhere by another length."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass

import numpy as np

from slipstream.runtime.gateway.prompt_digests import PromptDigests
from slipstream.runtime.gateway.router import Router
from slipstream.runtime.gateway.routes import Ask, ReplicaFacts
from slipstream.runtime.rpc.engine_client import BlockChanges, EngineLoadReport

_BLOCK = 16
_PROMPTS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Units: first_s, of a prompt that was not seen before, the median; again_s, of one that begins like one before it;
    p99_s, of these
    """

    replicas: int
    tokens: int
    cached_share: float
    first_s: float
    again_s: float
    p99_s: float


def measure(*, replicas: int, tokens: int, cached_share: float, count: int) -> Decisions:
    """Choose for so many requests among half as many replicas of either role."""
    router = Router()
    load = EngineLoadReport(
        running=8, waiting=1, queue_room=100, blocks_total=100_000, blocks_available=50_000, preemptions=0,
        prefix_hits=0, prefix_misses=0, draining=False, queued_tokens=500, prefill_tokens_per_s=5000.0, token_s=0.02,
    )  # fmt: skip
    names = [f"prefill-{place}" for place in range(replicas // 2)]
    for name in names:
        router.join(name, ReplicaFacts(role="prefill", block_size=_BLOCK, sends_kv=True))
    for place in range(replicas // 2):
        router.join(f"decode-{place}", ReplicaFacts(role="decode", block_size=_BLOCK, receives_kv=True))
        router.note_load(f"decode-{place}", load, 0.0)
    prompts = [np.arange(tokens, dtype=np.int32) + tokens * place for place in range(_PROMPTS)]
    named = PromptDigests(block_size=_BLOCK)
    for prompt in prompts:
        strides = named.strides(prompt, generated=0, cache_salt=None)
        digests = [digest for stride in strides for digest in stride]
        for place, name in enumerate(names):
            # None, a little or much of it, by another length everywhere.
            cached = int(len(digests) * cached_share * place / len(names))
            router.note_blocks(name, BlockChanges(stored=tuple(digests[:cached])))
    for name in names:
        router.note_load(name, load, 0.0)
    first_s: list[float] = []
    again_s: list[float] = []
    gc.collect()
    gc.disable()
    for turn in range(count):
        ask = Ask(prompt=prompts[turn % _PROMPTS], max_tokens=200)
        began_s = time.perf_counter()
        route = router.route(ask, turn * 1e-3)
        took_s = time.perf_counter() - began_s
        assert route is not None
        router.ended(route)
        (again_s if turn >= _PROMPTS else first_s).append(took_s)
    gc.enable()
    return Decisions(
        replicas=replicas,
        tokens=tokens,
        cached_share=cached_share,
        first_s=statistics.median(first_s),
        again_s=statistics.median(again_s),
        p99_s=sorted(again_s)[int(len(again_s) * 0.99)],
    )
