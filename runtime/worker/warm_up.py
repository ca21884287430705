"""What is done before the first request on a GPU: kernels are compiled and measured, decoding steps captured.

Owns which steps that takes: prompts of every power of two, decoding steps of every bucket of rows, draws with every
kind of parameters, as plans that the executor carries out like any other. Their tokens are made up, and what they leave
in the cache and in slots is overwritten by whoever is given them. Every rank of a replica makes the same steps. They
are few, whatever the model; a rank that is alone also stops when its time is over, and what is missing is then compiled
when it is first needed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ...kernels.tuning import Tuning, device_name, gpu_seconds, tuning_path, use_tuning
from ...sdk.params import SamplingParams
from ..clock import Clock
from ..messages import AdmittedSequence, SequenceId, StepPlan
from .executor import ModelExecutor
from .graphs import DecodeGraphs, bucket_sizes

logger = logging.getLogger(__name__)

WARM_UP_LIMIT_S = 300.0
"""Of a rank that is alone."""

_SHORTEST_PROMPT = 16
_UNEVEN = 7
"""Tokens less than a power of two: kernels are compiled anew for sizes that 16 does not divide."""

_DRAWS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=0.8, seed=1, top_k=40, top_p=0.9, min_p=0.01, logprobs=1),
    SamplingParams(temperature=0.8, seed=1, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
)
"""One of each kind of what a step draws with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUpSizes:
    """What serving may ask of a rank: tokens of a step, sequences at once, and the longest of them; its KV blocks."""

    most_tokens: int
    most_rows: int
    longest: int
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """What was done. ``graphs``: the buckets that were captured. ``is_whole``: there was time for all of it."""

    seconds: float
    steps: int
    graphs: tuple[int, ...]
    measured: int
    is_whole: bool

    def __str__(self) -> str:
        """Return it as it is told."""
        what = f"{self.steps} steps, {len(self.graphs)} graphs, {self.measured} kernels measured"
        rest = "" if self.is_whole else "; there was no time for the rest, which is compiled when it is needed"
        return f"warm-up took {self.seconds:.1f} s: {what}{rest}"


def warm_up(
    executor: ModelExecutor,
    sizes: WarmUpSizes,
    *,
    clock: Clock,
    graphs: DecodeGraphs | None = None,
    tuning: Tuning | None = None,
    limit_s: float | None = None,
) -> WarmUp:
    """Make every kind of step once, and capture the graphs. ``limit_s``: for a rank that is alone, None for others.

    Raises: what a step raises: it would do so with requests too
    """
    begin_s, steps, is_whole = clock(), 0, True

    def measuring() -> AbstractContextManager[None]:
        return nullcontext() if tuning is None else tuning.measuring()

    def carry_out(plan: StepPlan) -> None:
        with measuring():
            executor.submit(plan).result()

    def capture(size: int) -> None:
        assert graphs is not None
        with measuring():
            executor.call(partial(graphs.prepare, size)).result()
        executor.call(partial(graphs.capture, size)).result()

    # Graphs come before what is drawn: decoding steps are replays then.
    missing = () if graphs is None else graphs.missing
    work: list[Callable[[], None]] = [
        *(partial(carry_out, plan) for plan in _prompts(sizes)),
        *(partial(capture, size) for size in missing),
        *(partial(carry_out, plan) for plan in _decoding_steps(sizes)),
    ]
    for each in work:
        if limit_s is not None and clock() - begin_s > limit_s:
            is_whole = False
            break
        each()
        steps += 1
    measured = 0 if tuning is None else tuning.measured
    if tuning is not None:
        tuning.save()
    captured = () if graphs is None else graphs.sizes
    report = WarmUp(seconds=clock() - begin_s, steps=steps, graphs=captured, measured=measured, is_whole=is_whole)
    logger.log(logging.INFO if is_whole else logging.WARNING, "%s", report)
    return report


def tuning_for(device: torch.device, *, deterministic: bool) -> Tuning | None:
    """Have this process choose kernels' configurations by what was measured on its device; deterministic, by nothing.

    Measured are times of a GPU's; elsewhere there is nothing to choose by.
    """
    tuning = None
    if device.type == "cuda" and not deterministic:
        name = device_name(device)
        tuning = Tuning(tuning_path(os.environ, name), name, gpu_seconds)
    use_tuning(tuning)
    return tuning


def _prompts(sizes: WarmUpSizes) -> Iterator[StepPlan]:
    """Yield prompts of growing length, up to the most tokens that a step can have."""
    most = min(sizes.most_tokens, sizes.longest - 1, sizes.num_blocks * sizes.block_size)
    lengths = {most}
    length = _SHORTEST_PROMPT
    while length < most:
        lengths |= {length - _UNEVEN, length}
        length *= 2
    for length in sorted(lengths):
        if length > 0:
            yield _plan(sizes, [length], [_DRAWS[0]])


def _decoding_steps(sizes: WarmUpSizes) -> Iterator[StepPlan]:
    """Yield steps of rows of one token: one for each way to draw, then growing numbers, drawn at once and in turns."""
    for params in _DRAWS:
        yield _plan(sizes, [1], [params])
    for rows in bucket_sizes(sizes.most_rows):
        yield _plan(sizes, [1] * rows, [_DRAWS[0]] * rows)
        yield _plan(sizes, [1] * rows, [_DRAWS[row % len(_DRAWS)] for row in range(rows)])


def _plan(sizes: WarmUpSizes, counts: list[int], params: list[SamplingParams]) -> StepPlan:
    """Return a step of made-up sequences that begin, in slots and blocks that nobody has yet."""
    rows, none = len(counts), np.empty(0, np.int32)
    block_counts = [-(-count // sizes.block_size) for count in counts]
    admitted = tuple(
        AdmittedSequence(
            slot=slot,
            sequence_id=SequenceId(slot),
            token_ids=np.zeros(count, np.int32),
            prompt_length=count,
            # Rows may share a block: what they leave there has no meaning.
            block_ids=((slot + np.arange(blocks)) % sizes.num_blocks).astype(np.int32),
            params=each,
            seed=slot,
            stop_ids=(),
        )
        for slot, (count, blocks, each) in enumerate(zip(counts, block_counts, params, strict=True))
    )
    return StepPlan(
        step=0,
        admitted=admitted,
        slots=np.arange(rows, dtype=np.int32),
        sequence_ids=np.arange(rows, dtype=np.int64),
        starts=np.zeros(rows, np.int32),
        counts=np.array(counts, np.int32),
        samples=np.ones(rows, np.bool_),
        block_slots=none,
        block_indices=none,
        block_ids=none,
        copy_sources=none,
        copy_targets=none,
    )
