"""``slipstream profile MODEL``: measure the table's steps and write it.

Owns the order of that, and the line printed for each point.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..cluster.profile_file import ProfileFile, StepRow, TraitsRow, write_profile
from .measure import MeasuredRank, ProfileOptions, measure_all
from .points import StepPoint, table_points

ATTENTION_BYTES = 16 << 20
"""Workspace of attention on a CPU: a few buffers of a share of the last-level cache each."""


def run_profile(
    options: ProfileOptions, *, device_type: str, path: Path, announce: Callable[[str], None]
) -> ProfileFile:
    """Measure, write the table to ``path`` and return it. Raises: ConfigError, CheckpointError"""
    rank = MeasuredRank(options)
    try:
        points = table_points(longest=rank.longest, positions=options.positions, most_batch=options.most_batch)
        measured = measure_all(rank, points, report=announce)
    finally:
        rank.close()
    on_cpu = device_type.startswith("cpu")
    profile = ProfileFile(
        device_type=device_type,
        model=str(Path(options.model).expanduser().resolve()),
        dtype=rank.dtype,
        quantization=options.quantization,
        threads=options.num_threads,
        steps=tuple(
            StepRow(tokens=point.tokens, context=point.context, batch=point.batch, seconds=seconds)
            for point, seconds in measured
        ),
        memory=TraitsRow(base_bytes=rank.base_bytes, attention_bytes=ATTENTION_BYTES, packs_head=True)
        if on_cpu
        else None,
    )
    for point, seconds in measured:
        announce(line(point, seconds))
    write_profile(path, profile)
    return profile


def line(point: StepPoint, seconds: float) -> str:
    """Return a measured point as a line."""
    what = f"{point.batch} decoding" if point.batch else f"{point.tokens} of a prompt"
    return f"{what} behind {point.context} positions: {seconds * 1000:.2f} ms"
