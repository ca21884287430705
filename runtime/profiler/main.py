"""``slipstream profile MODEL``: measure the table's steps and write it.

Owns the order of that, and the line printed for each point.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...placement.model_cut import Cut
from ...placement.plan import Degrees
from ...placement.plan_memory import EngineLimits, activation_bytes, buffer_bytes, weight_bytes
from ..cluster.model_sizes_file import read_model_sizes
from ..cluster.profile_file import ProfileFile, StepRow, TraitsRow, write_profile
from .measure import MeasuredRank, ProfileOptions, measure_all
from .memory_watch import peak_of
from .points import PREFILL_TOKENS, StepPoint, table_points

LARGEST_STEP = max(PREFILL_TOKENS)
"""Tokens of the largest step that is measured."""


def run_profile(
    options: ProfileOptions, *, device_type: str, path: Path, announce: Callable[[str], None]
) -> ProfileFile:
    """Measure, write the table to ``path`` and return it. Raises: ConfigError, CheckpointError"""
    rank = MeasuredRank(options)
    try:
        points = table_points(longest=rank.longest, positions=options.positions, most_batch=options.most_batch)
        measured = measure_all(rank, points, report=announce)
        used = peak_of(rank, points)
    finally:
        rank.close()
    on_cpu = device_type.startswith("cpu")
    profile = ProfileFile(
        device_type=device_type,
        model=str(Path(options.model).expanduser().resolve()),
        dtype=rank.dtype,
        quantization=options.quantization,
        threads=options.num_threads,
        rows_in_buckets=rank.rows_in_buckets,
        steps=tuple(
            StepRow(tokens=point.tokens, context=point.context, batch=point.batch, seconds=seconds)
            for point, seconds in measured
        ),
        memory=memory_traits(options, rank, used) if on_cpu else None,
    )
    for point, seconds in measured:
        announce(line(point, seconds))
    write_profile(path, profile)
    return profile


def memory_traits(options: ProfileOptions, rank: MeasuredRank, used_bytes: int) -> TraitsRow:
    """Return what a process on a CPU needs beside what is worked out.

    ``used_bytes``: what it had at the fullest moment of the table's steps.
    """
    sizes = read_model_sizes(options.model, dtype=rank.dtype, quantization=options.quantization)
    cut = Cut(model=sizes, degrees=Degrees())
    limits = EngineLimits(
        max_num_batched_tokens=min(LARGEST_STEP, rank.longest),
        max_num_seqs=options.most_batch,
        max_model_len=rank.longest,
    )
    known = activation_bytes(cut, limits, attention_bytes=0) + buffer_bytes(cut, limits) + rank.kv_bytes
    rest = max(0, used_bytes - rank.loaded_bytes - known)
    return TraitsRow(
        base_bytes=max(0, rank.loaded_bytes - weight_bytes(cut, 0, packs_head=True)),
        attention_bytes_per_position=rest / rank.longest,
        packs_head=True,
    )


def line(point: StepPoint, seconds: float) -> str:
    """Return a measured point as a line."""
    what = f"{point.batch} decoding" if point.batch else f"{point.tokens} of a prompt"
    return f"{what} behind {point.context} positions: {seconds * 1000:.2f} ms"
