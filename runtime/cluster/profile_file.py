"""A table of measured steps as a JSON file: what ``slipstream profile`` writes and planning reads.

Owns the file's form. A table is of one model on one device of one kind; the planner takes from it how far that kind
falls short of its figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ...placement.calibration import MeasuredStep
from ...placement.model_sizes import ModelSizes
from ...placement.plan_memory import MemoryTraits
from ...placement.step_cost import Efficiency, filled_rows
from .model_sizes_file import read_model_sizes
from .sections import Section, read_section


class StepRow(Section):
    """One measured step; see ``MeasuredStep``."""

    tokens: Annotated[int, Field(ge=0)] = 0
    context: Annotated[int, Field(ge=0)] = 0
    batch: Annotated[int, Field(ge=0)] = 0
    seconds: Annotated[float, Field(gt=0)]


class TraitsRow(Section):
    """What the process needed beside what is worked out. Units: bytes"""

    base_bytes: Annotated[int, Field(ge=0)]
    attention_bytes: Annotated[int, Field(ge=0)] = 0
    attention_bytes_per_position: Annotated[float, Field(ge=0)] = 0.0
    packs_head: bool


class ProfileFile(Section):
    """A model's steps on a device.

    ``model``: its directory, for its sizes. ``rows_in_buckets``: products computed rows in few sizes, as on a CPU
    without compiled kernels.
    """

    device_type: str
    model: str
    dtype: str = "auto"
    quantization: str = "none"
    threads: int | None = None
    rows_in_buckets: bool = False
    steps: Annotated[tuple[StepRow, ...], Field(min_length=1)]
    memory: TraitsRow | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A table as the planner takes it."""

    device_type: str
    sizes: ModelSizes
    steps: tuple[MeasuredStep, ...]
    traits: MemoryTraits | None
    rows_in_buckets: bool = False

    @property
    def start(self) -> Efficiency:
        """What calibration begins with."""
        return Efficiency(rows=filled_rows) if self.rows_in_buckets else Efficiency()


def read_profile(path: str | Path) -> Profile:
    """Read a table. Raises: ConfigError naming the file and the field; CheckpointError for its model"""
    file = read_section(Path(path), ProfileFile)
    return Profile(
        device_type=file.device_type,
        sizes=read_model_sizes(file.model, dtype=file.dtype, quantization=file.quantization),
        steps=tuple(MeasuredStep(**row.model_dump()) for row in file.steps),
        traits=None if file.memory is None else MemoryTraits(**file.memory.model_dump()),
        rows_in_buckets=file.rows_in_buckets,
    )


def write_profile(path: str | Path, profile: ProfileFile) -> None:
    """Write a table."""
    Path(path).write_text(profile.model_dump_json(indent=1) + "\n", encoding="utf-8")
