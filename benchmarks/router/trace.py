"""Requests in the order in which they came, with which beginnings they share: Mooncake's conversation trace, or a small
made-up one in its likeness.

A request's prompt is named by the hashes of its blocks of 512 tokens: the same hash at the same place is the same
beginning. Tokens are made up from them, so that what is equal there is equal here.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slipstream.runtime.messages import Int32Array

BLOCK_TOKENS = 512
TICK_S = 3.0
"""The trace's times come in ticks of so many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request."""

    at_s: float
    tokens: int
    new_tokens: int
    hashes: tuple[int, ...]

    def prompt(self) -> Int32Array:
        """Return tokens of which those of equal hashes are equal."""
        return np.repeat(np.asarray(self.hashes, dtype=np.int32), BLOCK_TOKENS)[: self.tokens]


def read_trace(path: Path) -> list[Arrival]:
    """Read a trace in the form of Mooncake's release: a line of JSON a request, compressed."""
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        Arrival(
            at_s=row["timestamp"] / 1000,
            tokens=row["input_length"],
            new_tokens=row["output_length"],
            hashes=tuple(row["hash_ids"]),
        )
        for row in rows
    ]


def within_ticks(arrivals: list[Arrival], seed: int) -> list[Arrival]:
    """Return arrivals at random moments of their ticks instead of all at the beginning of one."""
    draw = random.Random(seed)
    moved = [replace(each, at_s=each.at_s + draw.random() * TICK_S) for each in arrivals]
    return sorted(moved, key=lambda each: each.at_s)


def conversations(count: int, seed: int, *, per_s: float = 3.4) -> list[Arrival]:
    """Return made-up requests like the trace's: all begin alike, conversations come back longer after a while, some
    documents are asked about by many.
    """
    draw = random.Random(seed)
    fresh = iter(range(1, 1 << 30))
    documents = [tuple(next(fresh) for _ in range(draw.randint(4, 60))) for _ in range(24)]
    coming: list[tuple[float, tuple[int, ...]]] = []
    arrivals: list[Arrival] = []
    now_s = 0.0
    while len(arrivals) < count:
        now_s += draw.expovariate(per_s)
        due = [each for each in coming if each[0] <= now_s]
        if due:
            coming.remove(due[0])
            before = due[0][1]
        else:
            before = (0, *draw.choice(documents)) if draw.random() < 0.15 else (0,)
        tokens_now = min(int(draw.lognormvariate(8.2, 1.1)) + 64, 60_000)
        hashes = before + tuple(next(fresh) for _ in range(-(-tokens_now // BLOCK_TOKENS)))
        last = draw.randint(1, BLOCK_TOKENS)
        tokens = (len(hashes) - 1) * BLOCK_TOKENS + last
        arrivals.append(
            Arrival(at_s=now_s, tokens=tokens, new_tokens=1 + int(draw.expovariate(1 / 340)), hashes=hashes)
        )
        if draw.random() < 0.4 and tokens < 100_000:
            coming.append((now_s + draw.expovariate(1 / 120), hashes[: tokens // BLOCK_TOKENS]))
    return arrivals
